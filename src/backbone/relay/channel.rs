//! One channel of the relay: how far it is, who wants it, and what waits while its history is read.

use std::collections::VecDeque;
use std::sync::Arc;

use super::bounds::Bounds;
use super::continuity::{Relation, Tip};
use super::node_log::{Frames, Sequence};
use crate::backbone::interface::{Message, Page, Ticket};
use crate::limits::PAST_EPOCHS;
use crate::log::frame::{ChannelBlocks, Micros};
use crate::log::position::{Epoch, Position};
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
    /// The backbone lost writes and is in this epoch again or still: begin another one that continues it, then start over.
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
    /// Subscribed; what is published is held until the process that hands over has said its last word.
    Following,
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
    /// The epochs that its present one continues.
    pub ancestors: Vec<Epoch>,
    /// Epochs it was in before or that those continued, the newest last: at most [`PAST_EPOCHS`].
    past: Vec<Epoch>,
    /// When the subscription ends, if nobody comes back.
    pub linger_until: Option<Micros>,
    /// Whether the process that hands over vouches for what came before this one's subscription.
    pub seeded: bool,
    /// How far it was given to the next process.
    pub exported: Exported,
    /// How many messages without a position came after the heartbeat that is named.
    pub after_beat: (Micros, u32),
    /// How often a gap has cleared its log.
    pub gaps: u64,
}

/// How far a channel was given to the next process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Exported {
    /// The hand-over this is about.
    pub round: u64,
    /// Everything up to this number was given.
    pub sequence: Sequence,
    /// How many gaps had cleared the log by then.
    pub gaps: u64,
    /// The position given last.
    pub tip: Position,
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
            ancestors: Vec::new(),
            past: Vec::new(),
            linger_until: None,
            seeded: false,
            exported: Exported::default(),
            after_beat: (0, 0),
            gaps: 0,
        }
    }

    /// The epochs it was in before, the newest last.
    #[must_use]
    pub fn past(&self) -> &[Epoch] {
        &self.past
    }

    /// Its history has ended with this epoch.
    pub fn leave_epoch(&mut self, epoch: Epoch) {
        let ended = self.ancestors.drain(..).chain([epoch]);
        for epoch in ended {
            self.past.retain(|known| *known != epoch);
            self.past.push(epoch);
        }
        let drop = self.past.len().saturating_sub(PAST_EPOCHS);
        self.past.drain(..drop);
    }

    /// How the epoch of a page stands to what was delivered. `tip` is the epoch the channel is in.
    #[must_use]
    pub fn relation(&self, tip: Epoch, page: &Page) -> Relation {
        let there = |epoch: &Epoch| *epoch == page.head.epoch || page.continues.contains(epoch);
        if there(&tip) || self.ancestors.iter().any(there) {
            Relation::Shared
        } else if self.past.iter().any(there) {
            Relation::Returned
        } else {
            Relation::Fresh
        }
    }

    /// Whether its history has ended with this epoch before.
    #[must_use]
    pub fn was_in(&self, epoch: Epoch) -> bool {
        self.past.contains(&epoch)
    }
}

/// A message that is held.
#[derive(Debug)]
pub struct Held {
    /// The message.
    pub message: Message,
    /// The predecessor's last heartbeat before it: see [`super::handover`].
    pub beat: Micros,
    /// Whether it was there when the read under way was started.
    pub covered: bool,
}

/// Messages held while a channel's history is read, bounded by [`crate::limits::PENDING_MESSAGES`] and
/// [`crate::limits::PENDING_BYTES`].
///
/// When it is full the oldest is dropped, never the newest: the one after it then jumps, and a further read brings both.
#[derive(Debug, Default)]
pub struct Pending {
    messages: VecDeque<Held>,
    bytes: usize,
    /// How many of them were there when the read under way was started: a read that does not know their positions proves
    /// that the backbone does not have them.
    covered: usize,
}

impl Pending {
    /// Holds a message that came after the heartbeat `beat`.
    pub fn push(&mut self, message: Message, beat: Micros, bounds: &Bounds) {
        self.bytes += message.data.len();
        self.messages.push_back(Held { message, beat, covered: false });
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

    /// Takes the oldest.
    pub fn pop(&mut self) -> Option<Held> {
        let mut held = self.messages.pop_front()?;
        self.bytes -= held.message.data.len();
        held.covered = self.covered > 0;
        self.covered = self.covered.saturating_sub(1);
        Some(held)
    }

    /// Puts back what was just taken, before the others.
    pub fn put_back(&mut self, held: Held) {
        self.bytes += held.message.data.len();
        self.messages.push_front(held);
    }

    /// Keeps only the messages that `keep` accepts.
    pub fn retain(&mut self, keep: impl FnMut(&Held) -> bool) {
        let mut kept = std::mem::take(self);
        kept.messages.retain(keep);
        kept.bytes = kept.messages.iter().map(|held| held.message.data.len()).sum();
        kept.covered = 0;
        *self = kept;
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::limits::{PENDING_BYTES, PENDING_MESSAGES};

    fn message(bytes: usize) -> Message {
        Message { channel: "c".into(), position: None, tag: None, data: Bytes::from(vec![b'x'; bytes]) }
    }

    #[test]
    fn the_oldest_are_dropped() {
        let mut pending = Pending::default();
        for size in 0..PENDING_MESSAGES + 2 {
            pending.push(message(size), 0, &Bounds::default());
        }
        assert_eq!(pending.pop().unwrap().message.data.len(), 2);
        let mut pending = Pending::default();
        for _ in 0..3 {
            pending.push(message(PENDING_BYTES / 2), 0, &Bounds::default());
        }
        assert_eq!(pending.messages.len(), 2);
        pending.push(message(2 * PENDING_BYTES), 0, &Bounds::default());
        assert_eq!(pending.messages.len(), 1);
    }

    #[test]
    fn a_read_covers_what_was_there() {
        let mut pending = Pending::default();
        pending.push(message(1), 0, &Bounds::default());
        pending.push(message(2), 0, &Bounds::default());
        pending.cover();
        pending.push(message(3), 0, &Bounds::default());
        let covered: Vec<bool> = std::iter::from_fn(|| pending.pop()).map(|held| held.covered).collect();
        assert_eq!(covered, [true, true, false]);
    }
}
