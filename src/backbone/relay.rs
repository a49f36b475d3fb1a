//! The relay: one subscription a channel, one encoding a publication, one message a shard.
//!
//! It runs on the backbone thread and owns all its state; nothing here is locked. It takes requests from the shards and
//! events from the backbone, as many as there are up to [`RELAY_TURN`], and then ends its turn: timers, subscribes, reads,
//! what waits for full mailboxes, one ring for each shard it wrote to.

mod bounds;
mod channel;
mod continuity;
mod delivery;
mod handover;
mod history;
mod node_log;
mod outbox;
mod recovery;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use rustc_hash::FxHashMap;
use slab::Slab;
use tokio::sync::mpsc::Receiver;

use self::bounds::Bounds;
use self::channel::{Channel, Interest, Name, Phase};
use self::handover::Awaited;
use self::history::Fetches;
use self::node_log::NodeLog;
use self::outbox::Outbox;
#[cfg(test)]
pub(super) use self::simulation::SimulatedBackbone;
use super::handover::{Succession, ToBackbone};
use super::interface::{Backbone, BackboneError, BackboneEvent, Ticket};
use super::memory::MemoryBackbone;
use super::redis::RedisBackbone;
use super::redis::address::AddressError;
use super::status::BackboneStatus;
use crate::limits::{HEARTBEAT_MILLIS, MAILBOX_RETRY_MILLIS, PUBLISH_MILLIS, RELAY_TURN};
use crate::log::frame::{FrameEncoder, Micros};
use crate::log::position::Position;
use crate::settings::Settings;
use crate::shard::mailbox::{LocalChannel, Mailbox, Reply, RequestError, RequestId, ToRelay, ToShard};

/// Why the relay did not start.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The configured address is none.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The thread's runtime could not be made.
    #[error("the backbone thread has no runtime: {0}")]
    Runtime(std::io::Error),
    /// The system's randomness names the node and seeds epochs.
    #[error("the system gave no random number: {0}")]
    Random(getrandom::Error),
}

/// Runs the relay on this thread until every sender of `requests` is gone; answers what is under way first, for
/// [`PUBLISH_MILLIS`] at most. `shards[i]` is the mailbox of the shard that calls itself `i` in its requests, and `status` was made for
/// as many. `clock` is the node's monotonic clock, `succession` the process's place among those that follow each other.
///
/// # Errors
/// See [`RelayError`]. A backbone that cannot be reached is no error: it is tried again, and `status` says so.
pub fn run(
    settings: Arc<Settings>,
    requests: Receiver<ToRelay>,
    shards: Vec<Arc<Mailbox>>,
    status: Arc<BackboneStatus>,
    clock: fn() -> Micros,
    succession: Succession,
) -> Result<(), RelayError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(RelayError::Runtime)?;
    runtime.block_on(async {
        let random = getrandom::u64().map_err(RelayError::Random)?;
        let Succession { node, follows, orders } = succession;
        let backbone = match &settings.redis {
            Some(config) => {
                let history = settings.history.clone();
                Backbone::Redis(RedisBackbone::start(config, history, node, follows, clock)?)
            }
            None => Backbone::Memory(MemoryBackbone::new(settings.history.clone(), random)),
        };
        let mut relay = Relay::new(settings, backbone, shards, status, clock());
        relay.follows = follows;
        serve(relay, requests, orders, clock).await;
        Ok(())
    })
}

async fn serve(
    mut relay: Relay,
    mut requests: Receiver<ToRelay>,
    mut orders: Receiver<ToBackbone>,
    clock: fn() -> Micros,
) {
    let mut stopping: Option<Micros> = None;
    loop {
        relay.status.turns.add(1);
        let sleep = relay.next_wake().saturating_sub(clock());
        tokio::select! {
            biased;
            Some(order) = orders.recv() => relay.on_order(order, clock()),
            event = relay.backbone.next(), if !relay.holding => relay.on_event(event, clock()),
            request = requests.recv(), if stopping.is_none() && relay.takes_requests() => match request {
                Some(request) => relay.on_request(request, clock()),
                None => stopping = Some(clock() + PUBLISH_MILLIS * 1_000),
            },
            () = tokio::time::sleep(Duration::from_micros(sleep)) => {}
        }
        for _ in 0..RELAY_TURN {
            let event = if relay.holding { None } else { relay.backbone.try_next() };
            let request = if relay.takes_requests() { requests.try_recv().ok() } else { None };
            if event.is_none() && request.is_none() {
                break;
            }
            let now = clock();
            if let Some(event) = event {
                relay.on_event(event, now);
            }
            if let Some(request) = request {
                relay.on_request(request, now);
            }
        }
        relay.end_turn(clock());
        if stopping.is_some_and(|until| clock() >= until || relay.is_done()) {
            return;
        }
        // The connections' tasks live on this thread too, and the queues above can be ready for ever.
        tokio::task::yield_now().await;
    }
}

/// Who waits for an answer of the backbone.
#[derive(Debug)]
enum Waiting {
    Publish {
        shard: usize,
        request: RequestId,
    },
    /// A fetch of what lies before the logs of shards.
    History(Arc<str>),
    Recovery(Name),
}

/// The relay's state. Everything it does follows from its calls; the clock is an argument.
#[derive(Debug)]
struct Relay {
    settings: Arc<Settings>,
    bounds: Bounds,
    status: Arc<BackboneStatus>,
    backbone: Backbone,
    connected: bool,
    outboxes: Vec<Outbox>,
    channels: Slab<Channel>,
    names: FxHashMap<Arc<str>, usize>,
    lives: u64,
    log: NodeLog,
    encoder: FrameEncoder,
    tickets: u64,
    waiting: FxHashMap<Ticket, Waiting>,
    /// Channels whose turn to be subscribed has not come.
    to_subscribe: VecDeque<Name>,
    /// The batch whose SUBSCRIBE is under way.
    subscribing: Option<(Ticket, Vec<Name>)>,
    /// Channels whose turn to be read has not come.
    to_read: VecDeque<Name>,
    /// Reads for channels under way.
    reads: usize,
    /// Channels whose read was refused, and when to try again.
    to_retry: VecDeque<(Micros, Name)>,
    fetches: Fetches,
    /// Channels without interest, and when their subscription ends.
    lingering: VecDeque<(Micros, Name)>,
    /// The process this one takes over from, until it has said its last word.
    follows: Option<u64>,
    /// The last heartbeat of that process, and of this one.
    predecessor_beat: Micros,
    beat: Micros,
    /// Whether every channel taken over so far was subscribed to before `predecessor_beat`.
    prepared: bool,
    /// Nothing is taken from the backbone: see [`ToBackbone::Hold`].
    holding: bool,
    awaited: Vec<Awaited>,
    next_sweep: Micros,
    now: Micros,
}

impl Relay {
    fn new(
        settings: Arc<Settings>,
        backbone: Backbone,
        shards: Vec<Arc<Mailbox>>,
        status: Arc<BackboneStatus>,
        now: Micros,
    ) -> Self {
        Self::within(Bounds::default(), settings, backbone, shards, status, now)
    }

    fn within(
        bounds: Bounds,
        settings: Arc<Settings>,
        backbone: Backbone,
        shards: Vec<Arc<Mailbox>>,
        status: Arc<BackboneStatus>,
        now: Micros,
    ) -> Self {
        assert_eq!(shards.len(), status.overflows.len(), "the status was made for another number of shards");
        Self {
            settings,
            bounds,
            status,
            backbone,
            connected: false,
            outboxes: shards.into_iter().map(Outbox::new).collect(),
            channels: Slab::new(),
            names: FxHashMap::default(),
            lives: 0,
            log: NodeLog::within(bounds),
            encoder: FrameEncoder::default(),
            tickets: 0,
            waiting: FxHashMap::default(),
            to_subscribe: VecDeque::new(),
            subscribing: None,
            to_read: VecDeque::new(),
            reads: 0,
            to_retry: VecDeque::new(),
            fetches: Fetches::default(),
            lingering: VecDeque::new(),
            follows: None,
            predecessor_beat: 0,
            beat: 0,
            prepared: false,
            holding: false,
            awaited: Vec::new(),
            next_sweep: now,
            now,
        }
    }

    fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    fn takes_requests(&self) -> bool {
        self.waiting.len() < self.bounds.in_flight
    }

    fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.fetches.is_empty() && !self.outboxes.iter().any(Outbox::waits)
    }

    fn on_request(&mut self, request: ToRelay, now: Micros) {
        match request {
            ToRelay::Interest { shard, channel, name } => self.on_interest(shard, channel, &name),
            ToRelay::Disinterest { shard, channel, name } => self.on_disinterest(shard, channel, &name, now),
            ToRelay::Publish { shard, request, publish } => {
                let ticket = self.ticket();
                self.waiting.insert(ticket, Waiting::Publish { shard, request });
                self.backbone.publish(ticket, publish, now);
            }
            ToRelay::History { shard, request, query } => self.on_history(shard, request, query, now),
        }
    }

    fn on_event(&mut self, event: BackboneEvent, now: Micros) {
        match event {
            BackboneEvent::Message(message) => self.on_message(message, now),
            BackboneEvent::Subscribed(ticket) => self.on_subscribed(ticket),
            BackboneEvent::Published(ticket, result) => {
                if let Some(Waiting::Publish { shard, request }) = self.waiting.remove(&ticket) {
                    self.answer_publish(shard, request, result);
                }
            }
            BackboneEvent::Page(ticket, page) => match self.waiting.remove(&ticket) {
                Some(Waiting::Recovery(name)) => self.on_page(ticket, name, page, now),
                Some(Waiting::History(channel)) => self.on_history_page(channel, page, now),
                Some(Waiting::Publish { .. }) | None => {}
            },
            BackboneEvent::PredecessorBeat(sent) => self.predecessor_beat = sent,
            BackboneEvent::Heartbeat(sent) => {
                self.beat = sent;
                self.status.heartbeat.set(now);
                self.status.heartbeat_age.set(now.saturating_sub(sent));
            }
            BackboneEvent::Overrun => self.on_overrun(),
            BackboneEvent::Connected => self.on_connected(now),
            BackboneEvent::Disconnected(reason) => self.on_disconnected(&reason, now),
        }
    }

    /// Counts a message without a position: see [`crate::backbone::handover`].
    fn count_after_beat(&mut self, key: usize) {
        let (beat, count) = &mut self.channels[key].after_beat;
        *count = if *beat == self.beat { *count + 1 } else { 1 };
        *beat = self.beat;
    }

    fn answer_publish(&mut self, shard: usize, request: RequestId, result: Result<Position, BackboneError>) {
        let reply = Reply::Published(result.map_err(RequestError::from));
        self.outboxes[shard].send(ToShard::Reply { request, reply });
    }

    fn on_interest(&mut self, shard: usize, local: LocalChannel, name: &Arc<str>) {
        let key = match self.names.get(name) {
            Some(&key) => key,
            None if self.channels.len() >= self.bounds.channels => {
                self.status.refused.add(1);
                self.outboxes[shard].send(ToShard::Refused { channel: local });
                return;
            }
            None => self.add_channel(name),
        };
        let channel = &mut self.channels[key];
        if !planted!(LingerNotEnded) {
            channel.linger_until = None;
        }
        channel.interests.retain(|interest| interest.shard != shard);
        channel.interests.push(Interest { shard, local, live: false });
        self.tell_live(key, shard);
    }

    fn add_channel(&mut self, name: &Arc<str>) -> usize {
        self.lives += 1;
        let key = self.channels.insert(Channel::new(name.clone(), self.lives));
        self.names.insert(name.clone(), key);
        if self.connected {
            self.to_subscribe.push_back(Name { key, life: self.lives });
        }
        key
    }

    fn on_disinterest(&mut self, shard: usize, local: LocalChannel, name: &Arc<str>, now: Micros) {
        if let Some(&key) = self.names.get(name) {
            self.outboxes[shard].forget(key);
            let channel = &mut self.channels[key];
            channel.interests.retain(|interest| interest.shard != shard);
            if channel.interests.is_empty() && channel.linger_until.is_none() {
                let until = now + Micros::try_from(self.settings.linger.as_micros()).unwrap_or(Micros::MAX - now);
                channel.linger_until = Some(until);
                let name = Name { key, life: channel.life };
                self.lingering.push_back((until, name));
            }
        }
        self.outboxes[shard].send(ToShard::Released { channel: local });
    }

    /// When [`Relay::end_turn`] has to be called at the latest.
    fn next_wake(&self) -> Micros {
        let retry = self.to_retry.front().map(|(due, _)| *due);
        let linger = self.lingering.front().map(|(due, _)| *due);
        let full = self.outboxes.iter().any(Outbox::waits).then_some(self.now + MAILBOX_RETRY_MILLIS * 1_000);
        [retry, linger, full].into_iter().flatten().fold(self.next_sweep, Micros::min)
    }

    fn end_turn(&mut self, now: Micros) {
        self.now = now;
        self.end_lingering(now);
        while let Some(&(due, name)) = self.to_retry.front()
            && due <= now
        {
            self.to_retry.pop_front();
            self.to_read.push_back(name);
        }
        self.subscribe_some(now);
        self.read_some(now);
        let age = Micros::try_from(self.settings.history.age.as_micros()).unwrap_or(Micros::MAX);
        while let Some((key, sequence)) = self.log.overdue(now.saturating_sub(age)) {
            if let Some(channel) = self.channels.get_mut(key) {
                self.log.drop_until(&mut channel.frames, sequence);
            }
        }
        if now >= self.next_sweep {
            self.next_sweep = now + HEARTBEAT_MILLIS * 1_000;
            self.backbone.sweep(now);
            self.fetches.forget(now, self.bounds.older_bytes_most);
            let channels = &self.channels;
            self.log.compact(|key| channels.get(key).map(|channel| &channel.frames));
        }
        for shard in 0..self.outboxes.len() {
            self.flush(shard, now);
            self.outboxes[shard].ring();
        }
        if !self.awaited.is_empty() {
            self.answer_awaited();
        }
        self.status.channels.set(self.channels.len() as u64);
        self.status.log_bytes.set(self.log.bytes() as u64);
        self.status.in_flight.set(self.waiting.len() as u64);
    }

    /// Unsubscribes the channels nobody came back to.
    fn end_lingering(&mut self, now: Micros) {
        let mut ended = Vec::new();
        while let Some(&(due, name)) = self.lingering.front()
            && due <= now
        {
            self.lingering.pop_front();
            // Somebody came back meanwhile, perhaps left again: then a later entry ends it.
            let over = |channel: &&mut Channel| channel.life == name.life && channel.linger_until == Some(due);
            let Some(channel) = self.channels.get_mut(name.key).filter(over) else { continue };
            self.log.clear(&mut channel.frames);
            let channel = self.channels.remove(name.key);
            self.names.remove(&channel.name);
            if channel.phase != Phase::Wanted {
                ended.push(channel.name);
            }
        }
        for batch in ended.chunks(self.bounds.subscribe_batch) {
            self.backbone.unsubscribe(batch.to_vec());
        }
    }
}
