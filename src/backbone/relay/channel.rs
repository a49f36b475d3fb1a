//! One channel of the relay: how far it is, who wants it, and what waits while its history is read.

use std::collections::VecDeque;
use std::sync::Arc;

use super::bounds::Bounds;
use super::continuity::Tip;
use super::node_log::Frames;
use crate::backbone::interface::{Message, Ticket};
use crate::limits::PAST_EPOCHS;
use crate::log::frame::{ChannelBlocks, Micros};
use crate::log::position::Epoch;
use crate::shard::mailbox::LocalChannel;

/// Names one life of a channel in the relay. A key is used again by other channels; a life never is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name {
    /// Its place in the table.
    pub key: usize,
    /// Which of the channels that had this place.
    pub life: u64,
}

/// Why a channel's history is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Nothing is known of it yet: the newest publications and the position.
    Open,
    /// Something was missed: what came after the last publication delivered.
    Repair,
    /// The epoch is another: its newest publications.
    StartOver,
    /// The backbone lost writes and is in this epoch again or still: begin another one, then start over.
    Renew(Epoch),
}

/// How far a channel is. Messages are delivered in [`Phase::Live`] and held in all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not subscribed: there is no connection, or its turn has not come.
    Wanted,
    /// SUBSCRIBE was sent.
    Subscribing,
    /// Subscribed; a read is to be started.
    ToRead(Plan),
    /// Subscribed; a read is under way.
    Reading(Plan, Ticket),
    /// Subscribed and up to date.
    Live,
}

/// A shard that wants a channel.
#[derive(Debug)]
pub struct Interest {
    /// Which.
    pub shard: usize,
    /// Its number for the channel.
    pub local: LocalChannel,
    /// Whether it was told [`crate::shard::mailbox::ToShard::Live`].
    pub live: bool,
}

/// One channel of the relay.
#[derive(Debug)]
pub struct Channel {
    pub name: Arc<str>,
    pub life: u64,
    pub phase: Phase,
    /// The last publication delivered; none until the channel was opened.
    pub tip: Option<Tip>,
    pub frames: Frames,
    pub blocks: ChannelBlocks,
    pub interests: Vec<Interest>,
    pub pending: Pending,
    /// Epochs it was in before, the newest last: at most [`PAST_EPOCHS`].
    past: Vec<Epoch>,
    /// When the subscription ends, if nobody comes back.
    pub linger_until: Option<Micros>,
}

impl Channel {
    /// A channel nobody has asked for yet.
    #[must_use]
    pub fn new(name: Arc<str>, life: u64) -> Self {
        Self {
            name,
            life,
            phase: Phase::Wanted,
            tip: None,
            frames: Frames::default(),
            blocks: ChannelBlocks::default(),
            interests: Vec::new(),
            pending: Pending::default(),
            past: Vec::new(),
            linger_until: None,
        }
    }

    /// Its history has ended with this epoch.
    pub fn leave_epoch(&mut self, epoch: Epoch) {
        if self.past.len() == PAST_EPOCHS {
            self.past.remove(0);
        }
        self.past.push(epoch);
    }

    /// Whether its history has ended with this epoch before.
    #[must_use]
    pub fn was_in(&self, epoch: Epoch) -> bool {
        self.past.contains(&epoch)
    }
}

/// Messages held while a channel's history is read, bounded by [`crate::limits::PENDING_MESSAGES`] and
/// [`crate::limits::PENDING_BYTES`].
///
/// When it is full the oldest is dropped, never the newest: the one after it then jumps, and a further read brings both.
#[derive(Debug, Default)]
pub struct Pending {
    messages: VecDeque<Message>,
    bytes: usize,
    /// How many of them were there when the read under way was started: a read that does not know their positions proves
    /// that the backbone does not have them.
    covered: usize,
}

impl Pending {
    /// Holds a message.
    pub fn push(&mut self, message: Message, bounds: &Bounds) {
        self.bytes += message.data.len();
        self.messages.push_back(message);
        while self.messages.len() > bounds.pending_messages
            || (self.bytes > bounds.pending_bytes && self.messages.len() > 1)
        {
            self.pop();
        }
    }

    /// Messages held.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Lets go of all of them.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// A read is started now.
    pub fn cover(&mut self) {
        self.covered = self.messages.len();
    }

    /// Takes the oldest, and whether it was there when the read was started.
    pub fn pop(&mut self) -> Option<(Message, bool)> {
        let message = self.messages.pop_front()?;
        self.bytes -= message.data.len();
        let covered = self.covered > 0;
        self.covered = self.covered.saturating_sub(1);
        Some((message, covered))
    }

    /// Puts back what was just taken, before the others.
    pub fn put_back(&mut self, message: Message) {
        self.bytes += message.data.len();
        self.messages.push_front(message);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::limits::{PENDING_BYTES, PENDING_MESSAGES};

    fn message(bytes: usize) -> Message {
        Message { channel: "c".into(), position: None, data: Bytes::from(vec![b'x'; bytes]) }
    }

    #[test]
    fn the_oldest_are_dropped() {
        let mut pending = Pending::default();
        for size in 0..PENDING_MESSAGES + 2 {
            pending.push(message(size), &Bounds::default());
        }
        assert_eq!(pending.pop().unwrap().0.data.len(), 2);
        let mut pending = Pending::default();
        for _ in 0..3 {
            pending.push(message(PENDING_BYTES / 2), &Bounds::default());
        }
        assert_eq!(pending.messages.len(), 2);
        pending.push(message(2 * PENDING_BYTES), &Bounds::default());
        assert_eq!(pending.messages.len(), 1);
    }

    #[test]
    fn a_read_covers_what_was_there() {
        let mut pending = Pending::default();
        pending.push(message(1), &Bounds::default());
        pending.push(message(2), &Bounds::default());
        pending.cover();
        pending.push(message(3), &Bounds::default());
        let covered: Vec<bool> = std::iter::from_fn(|| pending.pop()).map(|(_, covered)| covered).collect();
        assert_eq!(covered, [true, true, false]);
    }
}
