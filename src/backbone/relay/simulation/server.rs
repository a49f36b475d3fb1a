//! The simulated server: what `publish.lua` and the commands of `redis/commands.rs` do to a channel's two keys, and what a
//! failover, a flush, an eviction or an expiry does to them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::truth::{Truth, named};
use crate::backbone::interface::{Message, Page, Read, Stored, Tag};
use crate::limits::PAST_EPOCHS;
use crate::log::frame::Micros;
use crate::log::position::{Epoch, Offset, Position};
use crate::shard::mailbox::Publish;
use crate::shard::simulation::random::Random;

/// A channel's position, what is known of the publication there, and the epochs that this one continues.
#[derive(Debug, Clone, Default)]
struct Meta {
    position: Position,
    tag: Option<Tag>,
    was: Vec<Epoch>,
}

/// A channel's keys.
#[derive(Debug, Clone, Default)]
struct Keys {
    meta: Option<Meta>,
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
    /// The last tag: a clock, which no failover sets back.
    tags: u64,
    /// Counts what takes publications away other than by their number.
    pub upheavals: u64,
    pub truth: Truth,
}

impl Server {
    /// An empty server that keeps so many publications a channel, for nodes that take payloads of up to `largest` bytes.
    pub fn new(messages: usize, largest: usize, epochs: Random) -> Self {
        let (data, replica) = Default::default();
        Self { data, replica, messages, largest, epochs, tags: 0, upheavals: 0, truth: Truth::default() }
    }

    fn keys(&mut self, channel: &Arc<str>) -> &mut Keys {
        self.data.channels.entry(channel.clone()).or_default()
    }

    fn new_epoch(&mut self) -> Epoch {
        Epoch((self.epochs.next() as u32).max(1))
    }

    /// Begins an epoch that continues none.
    fn begin_epoch(&mut self, channel: &Arc<str>) -> Meta {
        let meta = Meta { position: Position { epoch: self.new_epoch(), offset: 0 }, ..Meta::default() };
        self.keys(channel).meta = Some(meta.clone());
        self.truth.line(channel).begin(meta.position.epoch);
        meta
    }

    /// Publishes; returns the position and, unless it is a repetition, the message for whoever is subscribed. A publisher of
    /// its own may keep no history (`keep` is false).
    pub fn publish(&mut self, publish: &Publish, keep: bool, now: Micros) -> (Position, Option<Message>) {
        let channel = &publish.channel;
        let once = publish.idempotency_key.as_ref().map(|key| (channel.clone(), key.clone()));
        if let Some(&first) = once.as_ref().and_then(|once| self.data.once.get(once)) {
            return (first, None);
        }
        let mut meta = match self.keys(channel).meta.clone() {
            Some(meta) => meta,
            None => {
                self.keys(channel).delete_stream();
                self.begin_epoch(channel)
            }
        };
        if keep && self.keys(channel).last > meta.position.offset {
            // The stream takes no such id: meta and stream do not belong together.
            self.keys(channel).delete_stream();
            meta = self.begin_epoch(channel);
        }
        self.tags += 1;
        let (tag, previous) = (Some(Tag(self.tags)), meta.tag);
        meta.position.offset += 1;
        meta.tag = tag;
        let position = meta.position;
        let most = self.messages;
        let keys = self.keys(channel);
        keys.meta = Some(meta);
        if keep {
            keys.stream.push_back(Stored { offset: position.offset, tag, previous, data: publish.data.clone() });
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
            Message { channel: channel.as_ref().to_owned(), position: Some(position), tag, data: publish.data.clone() };
        (position, Some(message))
    }

    /// Reads from a channel's history.
    pub fn read(&mut self, read: &Read) -> Page {
        if read.create && self.keys(&read.channel).meta.is_none() {
            self.keys(&read.channel).delete_stream();
            self.begin_epoch(&read.channel);
        }
        let keys = self.keys(&read.channel);
        let meta = keys.meta.clone().unwrap_or_default();
        let head = meta.position;
        let kept = keys.stream.iter().filter(|stored| stored.offset <= head.offset);
        let publications = if read.reverse {
            let below = read.since.unwrap_or(Offset::MAX);
            kept.rev().filter(|stored| stored.offset < below).take(read.limit).cloned().collect()
        } else {
            let above = read.since.unwrap_or(0);
            kept.filter(|stored| stored.offset > above).take(read.limit).cloned().collect()
        };
        Page { head, tag: meta.tag, continues: meta.was, publications }
    }

    /// Begins an epoch that continues `epoch`, if the channel is still in that.
    pub fn renew(&mut self, channel: &Arc<str>, epoch: Epoch) -> Page {
        let meta = self.keys(channel).meta.clone().unwrap_or_default();
        if meta.position.epoch == epoch && meta.position != Position::default() {
            self.upheavals += 1;
            let new = self.new_epoch();
            let meta = self.keys(channel).meta.as_mut().expect("it is in an epoch");
            meta.position.epoch = new;
            meta.was.push(epoch);
            let drop = meta.was.len().saturating_sub(PAST_EPOCHS);
            meta.was.drain(..drop);
            self.truth.line(channel).carry_over(epoch, new);
        }
        let meta = self.keys(channel).meta.clone().unwrap_or_default();
        Page { head: meta.position, tag: meta.tag, continues: meta.was, publications: Vec::new() }
    }

    /// A channel's position.
    pub fn head(&mut self, channel: &Arc<str>) -> Position {
        self.keys(channel).meta.as_ref().map_or(Position::default(), |meta| meta.position)
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
