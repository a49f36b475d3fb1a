//! A connection: what one established socket is owed, and where it is in its life.

use super::poll::Waiting;
use super::session::Session;
use super::timer::Tick;
use crate::log::channel_table::{ChannelId, Lane};
use crate::log::cursor::Cursor;

/// Names a connection for as long as the shard lives; its slot is used again, its id never.
pub type ConnectionId = u64;

/// Where a connection is in its life. It only ever moves down this list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Subscriptions are served.
    Open,
    /// No subscriptions any more: what is left of a cut frame and the parting words are being sent.
    Farewell {
        /// When the peer has had its time to read them.
        until: Tick,
    },
    /// Everything is sent and our half is shut: the peer's end of stream is awaited, so that closing the socket does not
    /// reset away what the peer has not read yet.
    HalfClosed {
        /// When the peer has had its time to close.
        until: Tick,
    },
    /// The driver is bringing home what it has in the kernel; then the slot is free.
    Closing,
}

/// What is spoken on a connection.
#[derive(Debug)]
pub enum Protocol {
    /// Server-sent events.
    Sse,
    /// The Centrifugo protocol on a WebSocket. Taken out while its input is handled.
    WebSocket(Option<Box<Session>>),
    /// HTTP: one answer is awaited, and ends it.
    Poll(Box<Waiting>),
}

/// Where a subscription stands in its channel's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The channel is not live on this shard yet.
    Opening,
    /// In its lane's group, at this index.
    CaughtUp {
        /// Index in the group.
        index: u32,
    },
    /// Nothing is due, but it is not in the group: its lane has none, or the group is elsewhere at the moment.
    Waiting {
        /// Where it goes on.
        cursor: Cursor,
        /// Index among the group's waiting ones.
        index: u32,
    },
    /// Frames are due: the connection is queued, or the socket is full.
    Behind(Cursor),
}

/// A connection's subscription to a channel.
#[derive(Debug)]
pub struct Subscription {
    /// The channel.
    pub channel: ChannelId,
    /// Where it stands.
    pub place: Place,
}

/// One established socket.
#[derive(Debug)]
pub struct Connection {
    /// Its name for late answers.
    pub id: ConnectionId,
    /// Where it is in its life.
    pub phase: Phase,
    /// What is spoken on it.
    pub protocol: Protocol,
    /// How its frames are sent.
    pub lane: Lane,
    /// What it is subscribed to.
    pub subscriptions: Vec<Subscription>,
    /// Bytes of its own (response head, replies, pings, parting words): sent before any further frame.
    pub control: Vec<u8>,
    /// How many of them are sent.
    pub control_sent: u32,
    /// The subscription whose next frame is partly sent: nothing else may be sent before the rest of it.
    pub cut: Option<u16>,
    /// The last batch with a send to this connection: at most one is in the kernel at a time.
    pub batch: u32,
    /// The socket took less than it was given; writability is awaited.
    pub blocked: bool,
    /// Whether it is in the queue of connections with something to send.
    pub queued: bool,
    /// When something was last sent.
    pub last_sent: Tick,
}

impl Connection {
    /// A connection whose first bytes are `control`.
    #[must_use]
    pub fn new(id: ConnectionId, protocol: Protocol, lane: Lane, control: Vec<u8>, now: Tick) -> Self {
        Self {
            id,
            phase: Phase::Open,
            protocol,
            lane,
            subscriptions: Vec::new(),
            control,
            control_sent: 0,
            cut: None,
            batch: 0,
            blocked: false,
            queued: false,
            last_sent: now,
        }
    }

    /// The index of a channel's subscription.
    #[must_use]
    pub fn subscription(&self, channel: ChannelId) -> Option<usize> {
        self.subscriptions.iter().position(|subscription| subscription.channel == channel)
    }

    /// Own bytes that are not sent yet.
    #[must_use]
    pub fn control_due(&self) -> &[u8] {
        &self.control[self.control_sent as usize..]
    }

    /// Notes that own bytes were sent; gives the memory back once all are.
    pub fn control_done(&mut self, bytes: u32) {
        self.control_sent += bytes;
        if self.control_sent as usize == self.control.len() {
            self.control = Vec::new();
            self.control_sent = 0;
        }
    }
}
