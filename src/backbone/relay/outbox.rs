//! The way to one shard: its mailbox, and what has to wait while that is full.
//!
//! A publication that finds the mailbox full is not queued: the outbox notes from which number on its channel's frames are
//! missing, and sends them together from the node's log later. What must arrive and is in no log (replies, live
//! channels, released numbers) is queued; a shard that does not read its mailbox makes no requests either, so that queue is
//! bounded by the requests it made before ([`crate::limits::RELAY_REQUESTS`] and [`crate::limits::RELAY_IN_FLIGHT`]).

use std::collections::VecDeque;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::node_log::Sequence;
use crate::log::frame::Frame;
use crate::log::position::Position;
use crate::shard::mailbox::{LocalChannel, Mailbox, ToShard};

/// What a shard misses of one channel: everything from a number on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missed {
    /// The shard's number of the channel.
    pub local: LocalChannel,
    /// Number of the first frame missed.
    pub sequence: Sequence,
    /// Position the shard has.
    pub from: Position,
}

/// The way to one shard.
#[derive(Debug)]
pub struct Outbox {
    pub(super) mailbox: Arc<Mailbox>,
    must: VecDeque<ToShard>,
    pub(super) missed: FxHashMap<usize, Missed>,
    /// Keys of `missed` in the order they came; some of them may be gone from it.
    pub(super) order: VecDeque<usize>,
    touched: bool,
}

impl Outbox {
    /// The way to this mailbox.
    #[must_use]
    pub fn new(mailbox: Arc<Mailbox>) -> Self {
        Self { mailbox, must: VecDeque::new(), missed: FxHashMap::default(), order: VecDeque::new(), touched: false }
    }

    /// Sends what must arrive.
    pub fn send(&mut self, message: ToShard) {
        self.touched = true;
        if !self.must.is_empty() {
            self.must.push_back(message);
        } else if let Err(message) = self.mailbox.post(message) {
            self.must.push_back(message);
        }
    }

    /// Sends a frame of the channel `key`. When it cannot go now it is noted as `missed`; returns whether it went.
    pub fn publish(&mut self, key: usize, frame: &Arc<Frame>, missed: Missed) -> bool {
        self.touched = true;
        if self.missed.contains_key(&key) && !planted!(MissedOvertaken) {
            return false;
        }
        let message = ToShard::Publication { channel: missed.local, frame: frame.clone() };
        // The queue may hold the channel's Live, which comes first.
        if (self.must.is_empty() || planted!(LiveOvertaken)) && self.mailbox.post(message).is_ok() {
            return true;
        }
        self.missed.insert(key, missed);
        self.order.push_back(key);
        false
    }

    /// The shard is not interested in the channel any more.
    pub fn forget(&mut self, key: usize) {
        if !planted!(MissedKept) {
            self.missed.remove(&key);
        }
    }

    /// Whether something waits.
    #[must_use]
    pub fn waits(&self) -> bool {
        !self.must.is_empty() || !self.missed.is_empty()
    }

    /// Posts what waits and must arrive. Returns whether there is room for more.
    pub fn drain(&mut self) -> bool {
        while let Some(message) = self.must.pop_front() {
            if let Err(message) = self.mailbox.post(message) {
                self.must.push_front(message);
                return false;
            }
            self.touched = true;
        }
        self.has_room()
    }

    /// The next channel of which the shard misses something, if it can be told now: answer with [`Outbox::catch_up`].
    pub fn next_missed(&mut self) -> Option<(usize, Missed)> {
        if !self.has_room() {
            return None;
        }
        while let Some(key) = self.order.pop_front() {
            if let Some(missed) = self.missed.remove(&key) {
                return Some((key, missed));
            }
        }
        None
    }

    /// Sends what was missed.
    pub fn catch_up(&mut self, key: usize, missed: Missed, frames: Vec<Arc<Frame>>) {
        self.touched = true;
        if self.mailbox.post(ToShard::Missed { channel: missed.local, frames }).is_err() {
            // Someone else took the last place: the next time.
            self.missed.insert(key, missed);
            self.order.push_front(key);
        }
    }

    /// Wakes the shard if something was sent since the last time.
    pub fn ring(&mut self) {
        if std::mem::take(&mut self.touched) {
            self.mailbox.ring();
        }
    }

    fn has_room(&self) -> bool {
        !self.mailbox.is_full()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::MAILBOX_MESSAGES;
    use crate::log::frame::{ChannelBlocks, FrameEncoder, FrameKind};
    use crate::log::position::Epoch;

    fn at(offset: u64) -> Position {
        Position { epoch: Epoch(1), offset }
    }

    fn frame(offset: u64) -> Arc<Frame> {
        let kind = FrameKind::Publication;
        Arc::new(FrameEncoder::default().encode(&mut ChannelBlocks::default(), "c", kind, at(offset), "x", 0))
    }

    fn missed(offset: u64) -> Missed {
        Missed { local: 7, sequence: offset, from: at(offset - 1) }
    }

    /// An outbox whose mailbox is full, and the mailbox.
    fn full() -> (Outbox, Arc<Mailbox>) {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let mut outbox = Outbox::new(mailbox.clone());
        for _ in 0..MAILBOX_MESSAGES {
            outbox.send(ToShard::Released { channel: 0 });
        }
        assert!(!outbox.waits());
        (outbox, mailbox)
    }

    fn empty(mailbox: &Mailbox) -> Vec<ToShard> {
        let rest = std::iter::from_fn(|| mailbox.take());
        rest.filter(|message| !matches!(message, ToShard::Released { channel: 0 })).collect()
    }

    #[test]
    fn a_publication_never_overtakes_its_live() {
        let (mut outbox, mailbox) = full();
        outbox.send(ToShard::Live { channel: 7, position: at(1), frames: vec![] });
        mailbox.take();
        assert!(!outbox.publish(3, &frame(2), missed(2)), "there is room, but Live waits");
        mailbox.take();
        assert!(outbox.drain());
        let (key, lacks) = outbox.next_missed().unwrap();
        assert_eq!((key, lacks), (3, missed(2)));
        outbox.catch_up(key, lacks, vec![frame(2)]);
        assert!(!outbox.waits());
        let got = empty(&mailbox);
        assert!(matches!(got[..], [ToShard::Live { .. }, ToShard::Missed { .. }]), "{got:?}");
    }

    #[test]
    fn the_first_missed_number_counts_and_a_left_channel_is_forgotten() {
        let (mut outbox, mailbox) = full();
        assert!(!outbox.publish(3, &frame(2), missed(2)));
        assert!(!outbox.publish(4, &frame(1), missed(1)));
        assert_eq!(outbox.next_missed(), None, "no room yet");
        mailbox.take();
        assert!(!outbox.publish(3, &frame(3), missed(3)), "there is room, but an earlier one is missing");
        outbox.forget(4);
        assert_eq!(outbox.next_missed(), Some((3, missed(2))));
        assert_eq!(outbox.next_missed(), None);
    }
}
