//! The simulated server: what `publish.lua` and the commands of `redis/commands.rs` do to a channel's two keys, and what a
//! failover, a flush, an eviction or an expiry does to them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::truth::{Truth, named};
use crate::backbone::interface::{Message, Page, Read, Stored};
use crate::log::frame::Micros;
use crate::log::position::{Epoch, Offset, Position};
use crate::shard::mailbox::Publish;
use crate::shard::simulation::random::Random;

/// A channel's keys.
#[derive(Debug, Clone, Default)]
struct Keys {
    meta: Option<Position>,
    stream: VecDeque<Stored>,
    /// The stream's last id.
    last: Offset,
}

impl Keys {
    fn delete_stream(&mut self) {
        self.stream.clear();
        self.last = 0;
    }
}

/// Everything a failover can take back.
#[derive(Debug, Clone, Default)]
struct Data {
    channels: BTreeMap<Arc<str>, Keys>,
    once: BTreeMap<(Arc<str>, Box<str>), Position>,
}

/// See the module.
#[derive(Debug)]
pub struct Server {
    data: Data,
    replica: (Data, BTreeMap<Arc<str>, usize>),
    messages: usize,
    /// Bytes of the largest payload that a node takes.
    largest: usize,
    epochs: Random,
    /// Counts what takes publications away other than by their number.
    pub upheavals: u64,
    pub truth: Truth,
}

impl Server {
    /// An empty server that keeps so many publications a channel, for nodes that take payloads of up to `largest` bytes.
    pub fn new(messages: usize, largest: usize, epochs: Random) -> Self {
        let (data, replica) = Default::default();
        Self { data, replica, messages, largest, epochs, upheavals: 0, truth: Truth::default() }
    }

    fn keys(&mut self, channel: &Arc<str>) -> &mut Keys {
        self.data.channels.entry(channel.clone()).or_default()
    }

    fn begin_epoch(&mut self, channel: &Arc<str>) -> Position {
        let position = Position { epoch: Epoch((self.epochs.next() as u32).max(1)), offset: 0 };
        self.keys(channel).meta = Some(position);
        self.truth.line(channel).begin(position.epoch);
        position
    }

    /// Publishes; returns the position and, unless it is a repetition, the message for whoever is subscribed. A publisher of
    /// its own may keep no history (`keep` is false).
    pub fn publish(&mut self, publish: &Publish, keep: bool, now: Micros) -> (Position, Option<Message>) {
        let channel = &publish.channel;
        let once = publish.idempotency_key.as_ref().map(|key| (channel.clone(), key.clone()));
        if let Some(&first) = once.as_ref().and_then(|once| self.data.once.get(once)) {
            return (first, None);
        }
        let mut position = match self.keys(channel).meta {
            Some(position) => position,
            None => {
                self.keys(channel).delete_stream();
                self.begin_epoch(channel)
            }
        };
        if keep && self.keys(channel).last > position.offset {
            // The stream takes no such id: meta and stream do not belong together.
            self.keys(channel).delete_stream();
            position = self.begin_epoch(channel);
        }
        position.offset += 1;
        let most = self.messages;
        let keys = self.keys(channel);
        keys.meta = Some(position);
        if keep {
            keys.stream.push_back(Stored { offset: position.offset, data: publish.data.clone() });
            keys.last = position.offset;
            while keys.stream.len() > most {
                keys.stream.pop_front();
            }
        }
        let id = named('p', &String::from_utf8_lossy(&publish.data)).expect("a payload of the simulation");
        self.truth.publish(publish, id, position, publish.data.len() > self.largest, now);
        if let Some(once) = once {
            self.data.once.insert(once, position);
        }
        let message =
            Message { channel: channel.as_ref().to_owned(), position: Some(position), data: publish.data.clone() };
        (position, Some(message))
    }

    /// Reads from a channel's history.
    pub fn read(&mut self, read: &Read) -> Page {
        if read.create && self.keys(&read.channel).meta.is_none() {
            self.begin_epoch(&read.channel);
        }
        let keys = self.keys(&read.channel);
        let head = keys.meta.unwrap_or_default();
        let kept = keys.stream.iter().filter(|stored| stored.offset <= head.offset);
        let publications = if read.reverse {
            let below = read.since.unwrap_or(Offset::MAX);
            kept.rev().filter(|stored| stored.offset < below).take(read.limit).cloned().collect()
        } else {
            let above = read.since.unwrap_or(0);
            kept.filter(|stored| stored.offset > above).take(read.limit).cloned().collect()
        };
        Page { head, publications }
    }

    /// Begins a new epoch if the channel is still in `epoch`.
    pub fn renew(&mut self, channel: &Arc<str>, epoch: Epoch) -> Page {
        if self.keys(channel).meta.is_some_and(|position| position.epoch == epoch) {
            self.upheavals += 1;
            self.keys(channel).delete_stream();
            self.begin_epoch(channel);
        }
        Page { head: self.head(channel), publications: Vec::new() }
    }

    /// A channel's position.
    pub fn head(&mut self, channel: &Arc<str>) -> Position {
        self.keys(channel).meta.unwrap_or_default()
    }

    /// Whether everything after a position can be read by a node.
    pub fn holds(&mut self, channel: &Arc<str>, since: Position) -> bool {
        let head = self.head(channel);
        let largest = self.largest;
        let kept = self.keys(channel).stream.iter().filter(|kept| kept.offset > since.offset);
        let after = kept.filter(|kept| kept.data.len() <= largest).map(|kept| kept.offset);
        since.epoch == head.epoch && since.offset <= head.offset && after.eq(since.offset + 1..=head.offset)
    }

    /// The replica catches up.
    pub fn replicate(&mut self) {
        self.replica = (self.data.clone(), self.truth.lengths());
    }

    /// The replica takes over: what it did not have is lost.
    pub fn fail_over(&mut self) {
        self.upheavals += 1;
        self.data = self.replica.0.clone();
        self.truth.rewind(&self.replica.1);
    }

    /// All keys are gone.
    pub fn flush(&mut self) {
        self.upheavals += 1;
        self.data = Data::default();
    }

    /// A channel's stream was not written for so long that it is gone.
    pub fn expire_stream(&mut self, channel: &Arc<str>) {
        self.upheavals += 1;
        self.keys(channel).delete_stream();
    }

    /// A channel's position was evicted.
    pub fn evict_meta(&mut self, channel: &Arc<str>) {
        self.upheavals += 1;
        self.keys(channel).meta = None;
    }

    /// Another hand trims a channel's stream.
    pub fn trim(&mut self, channel: &Arc<str>, most: usize) {
        self.upheavals += 1;
        let stream = &mut self.keys(channel).stream;
        stream.drain(..stream.len().saturating_sub(most));
    }
}
