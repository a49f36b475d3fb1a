//! The embedded backbone: the same positions, history and idempotency as Redis, within one process and for its lifetime.

mod handover;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustc_hash::FxHashMap;

use super::interface::{BackboneError, BackboneEvent, Message, Page, Read, Stored, Ticket};
use crate::limits::{
    IDEMPOTENCY_SECONDS, MEMORY_CHANNELS, MEMORY_IDEMPOTENCY_KEYS, MEMORY_IDLE_MILLIS, MEMORY_SWEEP_MILLIS,
};
use crate::log::frame::Micros;
use crate::log::position::{Epoch, Position};
use crate::settings::HistoryConfig;
use crate::shard::mailbox::Publish;

/// Bytes a stored publication takes beside its payload.
const STORED_OVERHEAD: usize = size_of::<Kept>();

#[derive(Debug)]
struct Kept {
    stored: Stored,
    since: Micros,
}

#[derive(Debug)]
struct Channel {
    head: Position,
    kept: VecDeque<Kept>,
    bytes: usize,
    subscribed: bool,
    used: Micros,
    /// How far it was given to the next process, and in which hand-over.
    exported: (u64, Position),
}

/// The embedded backbone.
#[derive(Debug)]
pub struct MemoryBackbone {
    channels: FxHashMap<Arc<str>, Channel>,
    once: OnceKeys,
    history: HistoryConfig,
    seed: u64,
    epochs: u64,
    next_pass: Micros,
    events: VecDeque<BackboneEvent>,
    export: handover::Export,
}

impl MemoryBackbone {
    /// An empty backbone. Its epochs follow from `seed`: take it from the system's randomness, so that no position of an
    /// earlier process is mistaken for one of this.
    #[must_use]
    pub fn new(history: HistoryConfig, seed: u64) -> Self {
        Self {
            channels: FxHashMap::default(),
            once: OnceKeys::default(),
            history,
            seed,
            epochs: 0,
            next_pass: 0,
            events: VecDeque::from([BackboneEvent::Connected]),
            export: handover::Export::default(),
        }
    }

    /// See [`super::interface::Backbone::publish`].
    pub fn publish(&mut self, ticket: Ticket, publish: &Publish, now: Micros) {
        let result = self.publish_now(publish, now);
        self.events.push_back(BackboneEvent::Published(ticket, result));
    }

    fn publish_now(&mut self, publish: &Publish, now: Micros) -> Result<Position, BackboneError> {
        if let Some(key) = &publish.idempotency_key
            && let Some(first) = self.once.get(&publish.channel, key, now)
        {
            return Ok(first);
        }
        if !self.channels.contains_key(&publish.channel) && self.channels.len() >= MEMORY_CHANNELS {
            return Err(BackboneError::Refused(format!("the embedded backbone holds {MEMORY_CHANNELS} channels")));
        }
        let history = self.history.clone();
        let channel = self.channel(&publish.channel, now);
        channel.head.offset += 1;
        let position = channel.head;
        channel.keep(position, publish.data.clone(), now);
        channel.trim(&history, now);
        if channel.subscribed {
            self.events.push_back(BackboneEvent::Message(Message {
                channel: publish.channel.as_ref().to_owned(),
                position: Some(position),
                tag: None,
                data: publish.data.clone(),
            }));
        }
        if let Some(key) = &publish.idempotency_key {
            self.once.put(&publish.channel, key, position, now);
        }
        Ok(position)
    }

    /// See [`super::interface::Backbone::read`].
    pub fn read(&mut self, ticket: Ticket, read: &Read, now: Micros) {
        let history = self.history.clone();
        let page = if read.create || self.channels.contains_key(&read.channel) {
            let channel = self.channel(&read.channel, now);
            channel.trim(&history, now);
            channel.page(read)
        } else {
            page(Position::default(), Vec::new())
        };
        self.events.push_back(BackboneEvent::Page(ticket, Ok(page)));
    }

    /// See [`super::interface::Backbone::renew`]. Nothing here loses writes, so nothing here has to be kept either.
    pub fn renew(&mut self, ticket: Ticket, name: &Arc<str>, epoch: Epoch, now: Micros) {
        if self.channel(name, now).head.epoch == epoch {
            let epoch = self.new_epoch();
            let channel = self.channel(name, now);
            channel.head = Position { epoch, offset: 0 };
            channel.kept.clear();
            channel.bytes = 0;
        }
        let head = self.channel(name, now).head;
        self.events.push_back(BackboneEvent::Page(ticket, Ok(page(head, Vec::new()))));
    }

    /// See [`super::interface::Backbone::subscribe`].
    pub fn subscribe(&mut self, ticket: Ticket, names: &[Arc<str>], now: Micros) {
        for name in names {
            self.channel(name, now).subscribed = true;
        }
        self.events.push_back(BackboneEvent::Subscribed(ticket));
    }

    /// See [`super::interface::Backbone::unsubscribe`].
    pub fn unsubscribe(&mut self, names: &[Arc<str>]) {
        for name in names {
            if let Some(channel) = self.channels.get_mut(name) {
                channel.subscribed = false;
            }
        }
    }

    /// See [`super::interface::Backbone::try_next`].
    pub fn try_next(&mut self) -> Option<BackboneEvent> {
        self.events.pop_front()
    }

    /// Gives the heartbeat, and every [`MEMORY_SWEEP_MILLIS`] forgets what is too old: publications, idempotency keys, and
    /// channels that nobody used for [`MEMORY_IDLE_MILLIS`]. A channel with subscribers keeps its position however long it is
    /// silent.
    pub fn sweep(&mut self, now: Micros) {
        self.events.push_back(BackboneEvent::Heartbeat(now));
        if now < self.next_pass {
            return;
        }
        self.next_pass = now + MEMORY_SWEEP_MILLIS * 1_000;
        let history = &self.history;
        self.channels.retain(|_, channel| {
            channel.trim(history, now);
            channel.subscribed || now.saturating_sub(channel.used) < MEMORY_IDLE_MILLIS * 1_000
        });
        self.once.expire(now);
    }

    fn channel(&mut self, name: &Arc<str>, now: Micros) -> &mut Channel {
        if !self.channels.contains_key(name) {
            let head = Position { epoch: self.new_epoch(), offset: 0 };
            let exported = (0, head);
            let channel = Channel { head, kept: VecDeque::new(), bytes: 0, subscribed: false, used: now, exported };
            self.channels.insert(name.clone(), channel);
        }
        let channel = self.channels.get_mut(name).expect("it was just made");
        channel.used = now;
        channel
    }

    fn new_epoch(&mut self) -> Epoch {
        self.epochs += 1;
        Epoch((mix(self.seed ^ self.epochs) as u32).max(1))
    }
}

/// The finalizer of SplitMix64: neighbouring inputs give unrelated outputs.
fn mix(mut value: u64) -> u64 {
    value = value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// There are no tags here, and no epoch that continues another.
fn page(head: Position, publications: Vec<Stored>) -> Page {
    Page { head, tag: None, continues: Vec::new(), publications }
}

impl Channel {
    fn keep(&mut self, position: Position, data: Bytes, now: Micros) {
        self.bytes += data.len() + STORED_OVERHEAD;
        self.kept.push_back(Kept {
            stored: Stored { offset: position.offset, tag: None, previous: None, data },
            since: now,
        });
    }

    fn trim(&mut self, history: &HistoryConfig, now: Micros) {
        let oldest = now.saturating_sub(micros(history.age));
        while let Some(first) = self.kept.front()
            && (self.kept.len() > history.messages || self.bytes > history.bytes || first.since < oldest)
        {
            self.bytes -= first.stored.data.len() + STORED_OVERHEAD;
            self.kept.pop_front();
        }
    }

    fn page(&self, read: &Read) -> Page {
        let kept = self.kept.iter().map(|kept| &kept.stored);
        let publications = if read.reverse {
            let below = read.since.unwrap_or(u64::MAX);
            kept.rev().filter(|stored| stored.offset < below).take(read.limit).cloned().collect()
        } else {
            let above = read.since.unwrap_or(0);
            kept.filter(|stored| stored.offset > above).take(read.limit).cloned().collect()
        };
        page(self.head, publications)
    }
}

/// Idempotency keys with the position of their first publication.
#[derive(Debug, Default)]
struct OnceKeys {
    positions: FxHashMap<(Arc<str>, Box<str>), (Position, Micros)>,
    order: VecDeque<(Micros, Arc<str>, Box<str>)>,
    /// How many were ever put in.
    added: u64,
}

impl OnceKeys {
    fn get(&self, channel: &Arc<str>, key: &str, now: Micros) -> Option<Position> {
        let (position, until) = self.positions.get(&(channel.clone(), key.into()))?;
        (now < *until).then_some(*position)
    }

    fn put(&mut self, channel: &Arc<str>, key: &str, position: Position, now: Micros) {
        self.expire(now);
        self.put_until(channel, key, position, now + IDEMPOTENCY_SECONDS * 1_000_000);
    }

    fn put_until(&mut self, channel: &Arc<str>, key: &str, position: Position, until: Micros) {
        if self.order.len() >= MEMORY_IDEMPOTENCY_KEYS {
            self.forget_oldest();
        }
        self.added += 1;
        self.order.push_back((until, channel.clone(), key.into()));
        self.positions.insert((channel.clone(), key.into()), (position, until));
    }

    fn expire(&mut self, now: Micros) {
        while self.order.front().is_some_and(|(until, ..)| *until <= now) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, channel, key)) = self.order.pop_front() {
            self.positions.remove(&(channel, key));
        }
    }
}

fn micros(duration: Duration) -> Micros {
    duration.as_micros().try_into().unwrap_or(Micros::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Settings;

    const SECOND: Micros = 1_000_000;

    fn backbone(seed: u64) -> MemoryBackbone {
        MemoryBackbone::new(Settings::default().history, seed)
    }

    fn publish(backbone: &mut MemoryBackbone, channel: &str, key: Option<&str>, now: Micros) -> Position {
        let data = Bytes::from_static(b"x");
        backbone
            .publish_now(&Publish { channel: channel.into(), data, idempotency_key: key.map(Into::into) }, now)
            .unwrap()
    }

    #[test]
    fn an_idle_channel_is_forgotten_unless_someone_is_subscribed() {
        let mut backbone = backbone(1);
        let idle = publish(&mut backbone, "idle", None, 0);
        let watched = publish(&mut backbone, "watched", None, 0);
        backbone.subscribe(Ticket(1), &["watched".into()], 0);
        let later = MEMORY_IDLE_MILLIS * 1_000;
        backbone.sweep(later);
        assert_eq!(publish(&mut backbone, "watched", None, later), Position { offset: 2, ..watched });
        let again = publish(&mut backbone, "idle", None, later);
        assert_eq!(again.offset, 1);
        assert_ne!(again.epoch, idle.epoch);
        // Once nobody is subscribed it goes like any other.
        backbone.unsubscribe(&["watched".into()]);
        backbone.sweep(2 * later + SECOND);
        assert_eq!(publish(&mut backbone, "watched", None, 2 * later + SECOND).offset, 1);
    }

    #[test]
    fn a_key_is_recognised_for_its_time() {
        let mut backbone = backbone(1);
        let window = IDEMPOTENCY_SECONDS * SECOND;
        assert_eq!(publish(&mut backbone, "c", Some("k"), 0).offset, 1);
        assert_eq!(publish(&mut backbone, "c", Some("k"), window - 1).offset, 1);
        assert_eq!(publish(&mut backbone, "c", Some("k"), window).offset, 2);
        assert_eq!(publish(&mut backbone, "c", Some("k"), window + 1).offset, 2);
    }

    #[test]
    fn epochs_follow_the_seed() {
        let epoch = |seed| publish(&mut backbone(seed), "c", None, 0).epoch;
        assert_eq!(epoch(1), epoch(1));
        assert_ne!(epoch(1), epoch(2));
    }
}
