//! What the backbone thread gives to the process that takes over, and what it takes from the one before.
//!
//! The old relay is asked for everything it holds in passes of bounded pieces ([`ToBackbone::Export`]): the first pass has it
//! all, each further one only what changed since, so that the last, while all shards are frozen, is short. The new relay takes
//! the pieces in ([`ToBackbone::Import`]), subscribes, and holds what arrives until the old one's last word
//! ([`ToBackbone::Finish`]).
//!
//! Publications with a position find their place by it. Messages without one are told apart by the old node's heartbeats: both
//! processes are subscribed to them, and a server sends its messages in one order to all. The old relay says which heartbeat
//! it saw last and how many messages of a channel came after it; the new one drops those, and all from before that heartbeat.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::interface::{Stored, Tag};
use crate::log::frame::{FrameParts, Micros};
use crate::log::position::{Epoch, Position};

/// Who a relay is and whom it follows.
#[derive(Debug)]
pub struct Succession {
    /// Random: names the node's heartbeat.
    pub node: u64,
    /// The process that this one takes over from.
    pub follows: Option<u64>,
    /// What `control::handover` asks.
    pub orders: mpsc::Receiver<ToBackbone>,
}

impl Succession {
    /// A process that follows nobody, and the way to ask its relay.
    #[must_use]
    pub fn first(node: u64) -> (mpsc::Sender<ToBackbone>, Self) {
        let (sender, orders) = mpsc::channel(crate::limits::HANDOVER_ORDERS);
        (sender, Self { node, follows: None, orders })
    }
}

/// Where an export goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// At this channel of the relay.
    Channels(usize),
    /// At this channel of the embedded backbone.
    Stored(usize),
}

/// Asked of the backbone thread by `control::handover`.
#[derive(Debug)]
pub enum ToBackbone {
    /// Give what changed since the last pass of this hand-over, from a place on, up to
    /// [`crate::limits::HANDOVER_PIECE_BYTES`].
    Export {
        /// Names the hand-over: another number begins with everything.
        round: u64,
        /// Where to go on; the start of a pass is `Place::Channels(0)`.
        from: Place,
        /// Told the piece.
        reply: Sender<Piece>,
    },
    /// Take a piece of the process before.
    Import {
        /// The piece.
        piece: Piece,
        /// Told why it cannot be taken, if so.
        reply: Sender<Result<(), String>>,
    },
    /// Say once every channel taken in is subscribed to and a heartbeat of the process before has arrived since.
    Prepare {
        /// Told that heartbeat; 0 where there are none, with the embedded backbone.
        reply: Sender<Micros>,
    },
    /// Say once nothing is missing on any channel, this heartbeat (or a later one) has come back, and, if asked for, nothing
    /// waits for a full mailbox.
    Settle {
        /// The heartbeat.
        beat: Micros,
        /// Whether the mailboxes matter. Those of frozen shards cannot be emptied.
        delivered: bool,
        /// Told the last heartbeat seen.
        reply: Sender<Micros>,
    },
    /// Take nothing from the backbone any more, so that a pass is of one moment.
    Hold {
        /// Told the last heartbeat seen.
        reply: Sender<Micros>,
    },
    /// The hand-over failed: go on.
    Release,
    /// The process before has said its last word, and this was the last heartbeat it had seen: go live.
    Finish {
        /// The heartbeat.
        beat: Micros,
        /// Told when it is done.
        reply: Sender<()>,
    },
}

/// Part of what a backbone thread holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Piece {
    /// Channels of the relay.
    pub channels: Vec<SeedChannel>,
    /// Channels of the embedded backbone.
    pub stored: Vec<StoredChannel>,
    /// Idempotency keys of the embedded backbone.
    pub keys: Vec<StoredKey>,
    /// Where the pass goes on; none when this was its last piece.
    pub next: Option<Place>,
}

/// A channel of the relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedChannel {
    /// Its name.
    pub name: Arc<str>,
    /// Its position once all of `frames` and those in the pieces that follow were seen.
    pub tip: Position,
    /// The tag of its last publication.
    pub tag: Option<Tag>,
    /// Epochs that the present one continues.
    pub ancestors: Vec<Epoch>,
    /// Epochs it was in before those.
    pub past: Vec<Epoch>,
    /// The shards that want it.
    pub shards: Vec<usize>,
    /// Whether `frames` do not go on from what was given before.
    pub restart: bool,
    /// Whether more of its frames follow.
    pub more: bool,
    /// Messages without a position since the last heartbeat.
    pub after_beat: u32,
    /// What was published with its tags, oldest first.
    pub frames: Vec<(FrameParts, Option<Tag>)>,
}

/// A channel of the embedded backbone, or the part of it that is new.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredChannel {
    /// Its name.
    pub name: Arc<str>,
    /// Its position.
    pub head: Position,
    /// Its publications with the time they were made.
    pub kept: Vec<(Stored, Micros)>,
}

/// An idempotency key of the embedded backbone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredKey {
    /// The channel it was used on.
    pub channel: Arc<str>,
    /// The key.
    pub key: Box<str>,
    /// The position of its publication.
    pub position: Position,
    /// Until when it is recognised.
    pub until: Micros,
}

impl FrameParts {
    /// Bytes of both encoded forms.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let len = |bytes: &Bytes| bytes.len();
        len(&self.sse) + len(&self.websocket)
    }
}
