//! What the parent and its workers tell each other: one JSON object a line, over pipes.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::kernel::Nanos;
use super::schedule::Schedule;
use super::tally::{Counts, SparseHistogram};
use crate::limits::BENCH_REASONS;

/// What the subscribing connections speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum Protocol {
    /// Server-sent events.
    Sse,
    /// WebSocket, the Centrifugo client protocol in JSON.
    Websocket,
}

/// A worker's share of the run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// The server.
    pub target: SocketAddr,
    /// The value of the `Host` header.
    pub authority: String,
    /// What the connections speak.
    pub protocol: Protocol,
    /// Request target of a subscription; `{channel}` stands for the percent-encoded name.
    pub subscribe_path: String,
    /// What every channel's name starts with; its number follows.
    pub channel_prefix: String,
    /// The run's number, in every stamp.
    pub run: u32,
    /// The first of this worker's connections, among all of the run.
    pub first: usize,
    /// This worker's connections.
    pub connections: usize,
    /// Channels of the run.
    pub channels: u32,
    /// Publishing connections of the run.
    pub publishers: u16,
    /// Percent of the run's connections that never read.
    pub stalled_percent: f64,
    /// Connections this worker opens a second.
    pub connect_rate: f64,
    /// How long after the last one was opened the worker waits for the rest to be established.
    pub settle: Nanos,
    /// How long after the last publication the worker waits for what is still missing.
    pub drain: Nanos,
}

impl Plan {
    /// The name of a channel.
    #[must_use]
    pub fn channel_name(&self, channel: u32) -> String {
        channel_name(&self.channel_prefix, channel)
    }
}

/// The name of a channel of a run.
#[must_use]
pub fn channel_name(prefix: &str, channel: u32) -> String {
    format!("{prefix}{channel}")
}

/// From the parent to a worker. A closed pipe means: end.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToWorker {
    /// The first message: open the connections.
    Open(Plan),
    /// Publishing begins.
    Start(Schedule),
    /// Publishing has ended: wait for the rest, then report.
    Finish {
        /// How many publications of the schedule were sent.
        published: u64,
        /// Those among them that the server did not take, in order.
        refused: Vec<u64>,
    },
}

/// From a worker to its parent.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromWorker {
    /// Four times a second.
    Progress(Progress),
    /// Every connection is established or will not be.
    Opened(Progress),
    /// The last message.
    Outcome(Box<Outcome>),
    /// The worker cannot go on.
    Failed(String),
}

/// How many times something happened for which reason; bounded by [`BENCH_REASONS`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Reasons(pub BTreeMap<String, u64>);

impl Reasons {
    /// Counts one more.
    pub fn count(&mut self, reason: String) {
        self.add(reason, 1);
    }

    /// Adds another worker's reasons.
    pub fn merge(&mut self, other: Reasons) {
        for (reason, count) in other.0 {
            self.add(reason, count);
        }
    }

    fn add(&mut self, reason: String, count: u64) {
        let known = self.0.len() < BENCH_REASONS || self.0.contains_key(&reason);
        *self.0.entry(if known { reason } else { "other reasons".into() }).or_default() += count;
    }
}

/// How far a worker is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Connections established so far, those that ended since included.
    pub established: usize,
    /// Connections that the server refused or ended before they were established.
    pub failed: usize,
    /// Connections whose establishment never came to an end.
    pub never: usize,
    /// Established connections that never read.
    pub stalled: usize,
    /// Reading connections that were established and then ended.
    pub disconnected: usize,
    /// Stalled connections that the server ended.
    pub shed: usize,
    /// What the reading connections received.
    pub counts: Counts,
}

impl Progress {
    /// Adds another worker's.
    pub fn add(&mut self, other: &Progress) {
        self.established += other.established;
        self.failed += other.failed;
        self.never += other.never;
        self.stalled += other.stalled;
        self.disconnected += other.disconnected;
        self.shed += other.shed;
        self.counts.add(&other.counts);
    }
}

/// What a worker found.
#[derive(Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// The last progress.
    pub progress: Progress,
    /// Latencies of the measured publications in nanoseconds.
    pub latency: SparseHistogram,
    /// CPU seconds of the worker while measuring.
    pub cpu_seconds: f64,
    /// Why connections failed.
    pub failures: Reasons,
    /// Why connections that read were ended.
    pub disconnects: Reasons,
}

/// Writes one message as a line.
///
/// # Errors
/// What the pipe says.
pub fn send(pipe: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    pipe.write_all(&line)
}

/// Reads the next message; none when the other side has closed the pipe.
///
/// # Errors
/// What the pipe says, or that a line is not a message.
pub fn receive<T: for<'a> Deserialize<'a>>(pipe: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = String::new();
    if pipe.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&line)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_reasons_are_bounded_and_none_is_lost() {
        let mut reasons = Reasons::default();
        for number in 0..BENCH_REASONS * 3 {
            reasons.count(format!("reason {number}"));
            reasons.count("reason 0".into());
        }
        assert_eq!(reasons.0.len(), BENCH_REASONS + 1);
        assert_eq!(reasons.0.values().sum::<u64>(), BENCH_REASONS as u64 * 6);
    }

    #[test]
    fn a_message_survives_the_pipe() {
        let mut pipe = Vec::new();
        send(&mut pipe, &ToWorker::Finish { published: 9, refused: vec![3, 4] }).unwrap();
        let received: ToWorker = receive(&mut pipe.as_slice()).unwrap().unwrap();
        assert!(matches!(received, ToWorker::Finish { published: 9, refused } if refused == [3, 4]));
        assert!(receive::<ToWorker>(&mut io::empty()).unwrap().is_none());
    }
}
