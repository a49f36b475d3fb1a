//! What the relay asks of a backbone and what a backbone tells it, over both kinds.
//!
//! Every operation is started with a [`Ticket`] and answered by an event with the same ticket, so the relay waits for
//! nothing and has one stream to read. Commands of one kind take effect in the order they were started.

use std::sync::Arc;

use bytes::Bytes;

use super::memory::MemoryBackbone;
use super::redis::RedisBackbone;
#[cfg(test)]
use super::relay::SimulatedBackbone;
use crate::log::frame::Micros;
use crate::log::position::{Epoch, Offset, Position};
use crate::shard::mailbox::{Publish, RequestError};

/// Names an operation under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// Tells apart two publications that were given the same position, by a backbone that lost its last writes in between:
/// `publish.lua` has the contract. The publications of one script may share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag(pub u64);

/// A publication as the backbone keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its offset in the epoch of its page.
    pub offset: Offset,
    /// Its tag; none on a backbone that loses no writes, or when another hand wrote it.
    pub tag: Option<Tag>,
    /// The tag of the publication before it, which may be gone.
    pub previous: Option<Tag>,
    /// The payload as published: UTF-8 is not assured.
    pub data: Bytes,
}

/// Part of a channel's history at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The channel's position; the default position for a channel that has no epoch yet.
    pub head: Position,
    /// The tag of the publication at the head, also when the history does not have it any more.
    pub tag: Option<Tag>,
    /// The epochs that this one continues, the latest last: its offsets go on from theirs. See [`Backbone::renew`].
    pub continues: Vec<Epoch>,
    /// In the order asked for.
    pub publications: Vec<Stored>,
}

/// A read from a channel's history.
#[derive(Debug, Clone)]
pub struct Read {
    /// A checked channel name.
    pub channel: Arc<str>,
    /// Forward: only offsets above this; reversed: only offsets below it.
    pub since: Option<Offset>,
    /// Most publications; 0 asks for the position alone.
    pub limit: usize,
    /// Newest first.
    pub reverse: bool,
    /// Begin an epoch when the channel has none, so that even a subscriber of a silent channel holds a position.
    pub create: bool,
}

/// A message on a subscribed channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The channel's name.
    pub channel: String,
    /// Its position; none when it was published without one.
    pub position: Option<Position>,
    /// Its tag, if it has one.
    pub tag: Option<Tag>,
    /// The payload as published: UTF-8 is not assured.
    pub data: Bytes,
}

/// What a backbone tells the relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackboneEvent {
    /// A message on a subscribed channel.
    Message(Message),
    /// The channels of this subscribe are subscribed: what is published from now on arrives.
    Subscribed(Ticket),
    /// The answer to a publish.
    Published(Ticket, Result<Position, BackboneError>),
    /// The answer to a read or a renewal.
    Page(Ticket, Result<Page, BackboneError>),
    /// The node's message to itself came back; it was sent at this time.
    Heartbeat(Micros),
    /// The message to itself of the process that this one takes over from, sent at this time.
    PredecessorBeat(Micros),
    /// Messages were dropped because the relay did not keep up: any channel may lack some.
    Overrun,
    /// Connected; nothing is subscribed yet.
    Connected,
    /// Not connected any more, or still not. Subscribes under way are not answered; everything else is.
    Disconnected(String),
}

/// Why a backbone did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackboneError {
    /// There is no connection.
    #[error("not connected: {0}")]
    Disconnected(String),
    /// The connection broke or the answer did not come in time. A publish may have happened all the same; a retry with an
    /// idempotency key is safe.
    #[error("no answer: {0}")]
    Unanswered(String),
    /// The backbone answered with an error; nothing was done.
    #[error("refused: {0}")]
    Refused(String),
}

impl From<BackboneError> for RequestError {
    fn from(error: BackboneError) -> Self {
        RequestError::Unavailable(error.to_string())
    }
}

/// Where publications come from.
#[derive(Debug)]
pub enum Backbone {
    /// In this process: one node, nothing outlives it.
    Memory(MemoryBackbone),
    /// A Redis or Valkey server shared by all nodes.
    Redis(RedisBackbone),
    /// A simulated server, its connections and what goes wrong with them.
    #[cfg(test)]
    Simulated(Box<SimulatedBackbone>),
}

impl Backbone {
    /// Publishes; answered by [`BackboneEvent::Published`].
    pub fn publish(&mut self, ticket: Ticket, publish: Publish, now: Micros) {
        match self {
            Backbone::Memory(memory) => memory.publish(ticket, &publish, now),
            Backbone::Redis(redis) => redis.publish(ticket, publish),
            #[cfg(test)]
            Backbone::Simulated(simulated) => simulated.publish(ticket, publish),
        }
    }

    /// Reads from a channel's history; answered by [`BackboneEvent::Page`].
    pub fn read(&mut self, ticket: Ticket, read: Read, now: Micros) {
        match self {
            Backbone::Memory(memory) => memory.read(ticket, &read, now),
            Backbone::Redis(redis) => redis.read(ticket, read),
            #[cfg(test)]
            Backbone::Simulated(simulated) => simulated.read(ticket, read),
        }
    }

    /// Begins a new epoch if the channel is still in `epoch`; answered by [`BackboneEvent::Page`] with the position then. For
    /// a history that was rewound (a server lost its last writes): its offsets were used before, for other publications.
    /// What it has stays, under the same offsets: the new epoch continues the old one.
    pub fn renew(&mut self, ticket: Ticket, channel: Arc<str>, epoch: Epoch, now: Micros) {
        match self {
            Backbone::Memory(memory) => memory.renew(ticket, &channel, epoch, now),
            Backbone::Redis(redis) => redis.renew(ticket, channel, epoch),
            #[cfg(test)]
            Backbone::Simulated(simulated) => simulated.renew(ticket, channel, epoch),
        }
    }

    /// Subscribes; answered by [`BackboneEvent::Subscribed`].
    pub fn subscribe(&mut self, ticket: Ticket, channels: Vec<Arc<str>>, now: Micros) {
        match self {
            Backbone::Memory(memory) => memory.subscribe(ticket, &channels, now),
            Backbone::Redis(redis) => redis.subscribe(ticket, channels),
            #[cfg(test)]
            Backbone::Simulated(simulated) => simulated.subscribe(ticket, channels),
        }
    }

    /// Unsubscribes; not answered.
    pub fn unsubscribe(&mut self, channels: Vec<Arc<str>>) {
        match self {
            Backbone::Memory(memory) => memory.unsubscribe(&channels),
            Backbone::Redis(redis) => redis.unsubscribe(channels),
            #[cfg(test)]
            Backbone::Simulated(simulated) => simulated.unsubscribe(channels),
        }
    }

    /// The next event, if there is one now.
    pub fn try_next(&mut self) -> Option<BackboneEvent> {
        match self {
            Backbone::Memory(memory) => memory.try_next(),
            Backbone::Redis(redis) => redis.try_next(),
            #[cfg(test)]
            Backbone::Simulated(simulated) => simulated.try_next(),
        }
    }

    /// The next event. Cancelling loses none.
    pub async fn next(&mut self) -> BackboneEvent {
        match self {
            Backbone::Memory(memory) => match memory.try_next() {
                Some(event) => event,
                None => std::future::pending().await,
            },
            Backbone::Redis(redis) => redis.next().await,
            #[cfg(test)]
            Backbone::Simulated(_) => std::future::pending().await,
        }
    }

    /// What has to be done from time to time, about once a second.
    pub fn sweep(&mut self, now: Micros) {
        match self {
            Backbone::Memory(memory) => memory.sweep(now),
            Backbone::Redis(_) => {}
            #[cfg(test)]
            Backbone::Simulated(_) => {}
        }
    }
}
