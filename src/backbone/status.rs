//! What the backbone thread tells the rest of the node: whether it is ready, and its counters.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::limits::HEARTBEAT_STALE_MILLIS;
use crate::log::frame::Micros;

/// A count with one writer, the backbone thread.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// The count now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, more: u64) {
        // There is one writer, so this needs no locked instruction.
        self.0.store(self.get().wrapping_add(more), Ordering::Relaxed);
    }

    pub(super) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }
}

/// State and counters of the backbone thread. Counters start at zero with the process and only grow, gauges are marked.
#[derive(Debug)]
pub struct BackboneStatus {
    clock: fn() -> Micros,
    connected: AtomicBool,
    reason: Mutex<String>,
    /// Times the thread looked for work: it does so at least once a heartbeat.
    pub turns: Count,
    /// Gauge: when the connection was last made or lost, in microseconds of the node's clock.
    pub changed: Count,
    /// Gauge: when the node's last message to itself came back, in microseconds of the node's clock.
    pub heartbeat: Count,
    /// Gauge: microseconds that message took, through the backbone and the relay's own queue.
    pub heartbeat_age: Count,
    /// Connections made to the backbone, the first included.
    pub connects: Count,
    /// Publications and plain messages received.
    pub received: Count,
    /// Received again and dropped.
    pub duplicates: Count,
    /// Received with a position that the backbone's history does not know, and dropped: left over from before a failover,
    /// or not made by the publishing step.
    pub strays: Count,
    /// Payloads that were not UTF-8: delivered with replacement characters.
    pub invalid: Count,
    /// Payloads over [`crate::limits::BACKBONE_PAYLOAD_BYTES`]: announced as gaps.
    pub oversized: Count,
    /// Reads of a missed range.
    pub repairs: Count,
    /// Reads of a channel's history that failed; they are tried again.
    pub failed_reads: Count,
    /// Publications that repairs brought.
    pub repaired: Count,
    /// Reads of what lies before the node's logs, for clients that come back from there.
    pub fetches: Count,
    /// Publications that they brought.
    pub fetched: Count,
    /// Gaps announced: on a channel of this node, or to one shard that did not read in time.
    pub gaps: Count,
    /// Times the queue from the backbone was full and every channel was read anew.
    pub overruns: Count,
    /// Interests not served because the node was at [`crate::limits::RELAY_CHANNELS`].
    pub refused: Count,
    /// Gauge: channels subscribed to, or about to be.
    pub channels: Count,
    /// Gauge: bytes of encoded publications in the node's log.
    pub log_bytes: Count,
    /// Gauge: requests under way towards the backbone.
    pub in_flight: Count,
    /// By shard: publications that found its mailbox full and were sent later.
    pub overflows: Box<[Count]>,
}

impl BackboneStatus {
    /// The status of a node with so many shards, not connected yet. `clock` is the node's monotonic clock.
    #[must_use]
    pub fn new(shards: usize, clock: fn() -> Micros) -> Self {
        Self {
            clock,
            connected: AtomicBool::new(false),
            reason: Mutex::new("not connected yet".into()),
            turns: Count::default(),
            changed: Count::default(),
            heartbeat: Count::default(),
            heartbeat_age: Count::default(),
            connects: Count::default(),
            received: Count::default(),
            duplicates: Count::default(),
            strays: Count::default(),
            invalid: Count::default(),
            oversized: Count::default(),
            repairs: Count::default(),
            failed_reads: Count::default(),
            repaired: Count::default(),
            fetches: Count::default(),
            fetched: Count::default(),
            gaps: Count::default(),
            overruns: Count::default(),
            refused: Count::default(),
            channels: Count::default(),
            log_bytes: Count::default(),
            in_flight: Count::default(),
            overflows: (0..shards).map(|_| Count::default()).collect(),
        }
    }

    /// Whether the backbone is connected.
    #[must_use]
    pub fn connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Whether publications arrive: the backbone is connected, and the node's own message came back over it within
    /// [`HEARTBEAT_STALE_MILLIS`]. A stuck backbone thread is noticed too: it would take no such message. When the answer is
    /// yes no lock is taken.
    ///
    /// # Errors
    /// Says why not.
    pub fn ready(&self) -> Result<(), String> {
        if !self.connected() {
            let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
            return Err(format!("the backbone is not connected: {reason}"));
        }
        let silent = (self.clock)().saturating_sub(self.heartbeat.get()) / 1_000;
        if silent > HEARTBEAT_STALE_MILLIS {
            return Err(format!(
                "the node's message to itself did not come back for {silent} ms (allowed: {HEARTBEAT_STALE_MILLIS} ms)"
            ));
        }
        Ok(())
    }

    pub(super) fn set_connected(&self, now: Micros) {
        // The connection was just proven; the first heartbeat has its whole time to come.
        self.heartbeat.set(now);
        self.changed.set(now);
        self.connects.add(1);
        self.connected.store(true, Ordering::Relaxed);
    }

    /// Notes a lost connection or a further failed attempt. Returns whether it was connected.
    pub(super) fn set_disconnected(&self, reason: &str, now: Micros) -> bool {
        reason.clone_into(&mut self.reason.lock().unwrap_or_else(PoisonError::into_inner));
        let was = self.connected.swap(false, Ordering::Relaxed);
        if was {
            self.changed.set(now);
        }
        was
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static NOW: AtomicU64 = AtomicU64::new(0);

    #[test]
    fn ready_needs_a_connection_and_a_fresh_heartbeat() {
        let at = |millis: u64| NOW.store(millis * 1_000, Ordering::Relaxed);
        let status = BackboneStatus::new(1, || NOW.load(Ordering::Relaxed));
        assert!(status.ready().unwrap_err().contains("not connected yet"));
        at(10_000);
        status.set_connected(10_000_000);
        assert_eq!(status.ready(), Ok(()));
        at(10_000 + HEARTBEAT_STALE_MILLIS + 1);
        assert!(status.ready().unwrap_err().contains("did not come back"));
        status.heartbeat.set((10_000 + HEARTBEAT_STALE_MILLIS) * 1_000);
        assert_eq!(status.ready(), Ok(()));
        assert!(status.set_disconnected("connection refused", 20_000_000));
        assert!(status.ready().unwrap_err().contains("connection refused"));
        assert!(!status.set_disconnected("connection refused", 21_000_000));
    }
}
