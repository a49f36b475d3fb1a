//! The pure half of a shard: its connections and channels, and how they change. It is told what happened and asked what to
//! do; it reads no clock and touches no socket, so a simulation can drive it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use rustc_hash::FxHashMap;
use slab::Slab;

use super::connection::{Connection, ConnectionId, Phase, Place, Protocol, Subscription};
use super::disconnect::Disconnect;
use super::dismissal::Dismissal;
use super::drain::{Budgets, Work};
use super::mailbox::{Reply, RequestError, RequestId, ToRelay, ToShard};
use super::older::Fetch;
use super::session::Session;
use super::sink::{Event, Order};
use super::timer::{Sweep, Tick, tick_of, ticks};
use crate::limits;
use crate::log::channel_log::{Bounds, Located};
use crate::log::channel_table::{ChannelId, ChannelTable, Interest, Lane, Slot};
use crate::log::cursor::{Cursor, LagBounds};
use crate::log::frame::Micros;
use crate::log::position::{CursorEntry, Position};
use crate::metrics::ShardRecorder;
use crate::settings::Settings;
use crate::wire::sse;

/// Who waits for a channel to go live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenWaiter {
    /// A stream that is about to be established, by the engine's number.
    Stream(usize),
    /// A connection's pending subscribe command.
    Subscribe(Slot, ConnectionId),
}

/// Who waits for the relay's answer to a request.
#[derive(Debug)]
pub enum Asker {
    /// A task of the front, by the engine's number.
    Task(usize),
    /// Clients that come back from before a channel's log.
    Older(ChannelId),
    /// A command of a connection.
    Command {
        /// Where.
        slot: Slot,
        /// Who.
        connection: ConnectionId,
        /// The command's id.
        command: u32,
    },
}

/// What the pure half hands to the engine besides [`Order`]s.
#[derive(Debug)]
pub enum Answer {
    /// One more of the channels a stream waits for is live.
    Opened(usize),
    /// One of the channels a stream waits for will not be live: the stream is to let all of them go.
    Refused(usize),
    /// The relay's answer for a task.
    Replied(usize, Reply),
    /// One more of the fetches that a task waits for has come to its end: what was to be had is there, or nothing is known.
    Fetched(usize, Result<(), RequestError>),
}

/// The time a disconnected client has to read its parting words, and then to close.
pub(super) const FAREWELL: Duration = Duration::from_millis(limits::FAREWELL_MILLIS);

/// The state of one shard.
pub struct Core {
    pub(super) shard: usize,
    pub(super) settings: Arc<Settings>,
    pub(super) lag: LagBounds,
    pub(super) connections: Slab<Connection>,
    pub(super) channels: ChannelTable,
    /// Connections with something of their own to send, each once. A slot that is used again while it is still in here may
    /// be in here twice, which costs a look.
    pub(super) ready: VecDeque<Slot>,
    /// Channels with frames to fan out, each once; the same goes for their numbers.
    pub(super) due: VecDeque<ChannelId>,
    pub(super) work: Work,
    pub(super) budgets: Budgets,
    /// What the driver is asked besides sending, in order.
    pub orders: Vec<Order>,
    /// What the relay is asked, in order.
    pub requests: VecDeque<ToRelay>,
    /// What the engine's tasks wait for.
    pub answers: Vec<Answer>,
    pub(super) waiters: FxHashMap<ChannelId, Vec<OpenWaiter>>,
    pub(super) askers: FxHashMap<RequestId, Asker>,
    /// Fetches of what lies before a channel's log.
    pub(super) fetches: FxHashMap<ChannelId, Fetch>,
    next_connection: ConnectionId,
    next_request: RequestId,
    sweep: Sweep,
    seed: u64,
    pub(super) stopping: bool,
    /// The end under way.
    pub(super) dismissal: Option<Dismissal>,
    /// This shard's counters.
    pub recorder: ShardRecorder,
}

impl Core {
    /// A shard without connections. `seed` makes client ids that are not to be guessed.
    #[must_use]
    pub fn new(shard: usize, settings: Arc<Settings>, seed: u64, recorder: ShardRecorder) -> Self {
        Self {
            shard,
            lag: LagBounds::from(&settings.lag),
            channels: ChannelTable::new(Bounds::from(&settings.history)),
            settings,
            connections: Slab::new(),
            ready: VecDeque::new(),
            due: VecDeque::new(),
            work: Work::default(),
            budgets: Budgets::default(),
            orders: Vec::new(),
            requests: VecDeque::new(),
            answers: Vec::new(),
            waiters: FxHashMap::default(),
            askers: FxHashMap::default(),
            fetches: FxHashMap::default(),
            next_connection: 1,
            next_request: 1,
            sweep: Sweep::default(),
            seed,
            stopping: false,
            dismissal: None,
            recorder,
        }
    }

    /// Established connections, those being closed included.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Whether the thread ends once every connection has.
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.stopping
    }

    /// Who waits for the relay's answers.
    pub(super) fn askers(&self) -> impl Iterator<Item = &Asker> {
        self.askers.values()
    }

    /// Whether a client waits for the answer to a `history` command.
    pub(super) fn waits_for_history(&self) -> bool {
        self.connections.iter().any(|(_, connection)| {
            matches!(&connection.protocol, Protocol::WebSocket(Some(session)) if session.asks_for_history())
        })
    }

    /// Whether a connection is still there and open.
    pub(super) fn is_open(&self, slot: Slot, id: ConnectionId) -> bool {
        self.connections.get(slot as usize).is_some_and(|of| of.id == id && of.phase == Phase::Open)
    }

    /// The slot the next connection will have.
    #[must_use]
    pub fn vacant_slot(&self) -> Slot {
        self.connections.vacant_key() as Slot
    }

    /// Holds a channel for a stream that is about to be established. True when it is live already; otherwise
    /// [`Answer::Opened`] with `waiter` follows.
    pub fn reserve(&mut self, name: &Arc<str>, waiter: usize) -> (ChannelId, bool) {
        let id = self.hold(name);
        let live = self.channels.get(id).is_some_and(|channel| channel.log().is_some());
        if !live {
            self.waiters.entry(id).or_default().push(OpenWaiter::Stream(waiter));
        }
        (id, live)
    }

    /// A stream no longer waits for a channel.
    pub fn unwait(&mut self, id: ChannelId, waiter: usize) {
        if let Some(waiters) = self.waiters.get_mut(&id) {
            waiters.retain(|&other| other != OpenWaiter::Stream(waiter));
        }
    }

    /// Lets go of a reserved channel.
    pub fn unreserve(&mut self, id: ChannelId) {
        self.release(id);
    }

    /// Takes over an event stream on reserved, live channels. Each subscription goes on where `resume` says, and a
    /// position that cannot be resumed is answered with a `gap` event.
    pub fn admit_sse(&mut self, head: &[u8], channels: &[ChannelId], resume: &[CursorEntry], now: Micros) -> Slot {
        let lane = if channels.len() == 1 { Lane::SseSingle } else { Lane::SseMany };
        let mut control = head.to_vec();
        sse::write_retry(&mut control, self.settings.sse.retry.as_millis() as u64);
        let mut cursors = Vec::with_capacity(channels.len());
        for &id in channels {
            let Some(channel) = self.channels.get(id) else { continue };
            let Some(log) = channel.log() else { continue };
            let asked = resume.iter().find(|entry| entry.tag == channel.tag).map(|entry| entry.position);
            let cursor = match asked.map(|asked| (asked, log.locate(asked))) {
                None => Cursor::at(log.head() + 1),
                Some((_, Located::Here(cursor))) => cursor.resuming(log.head()),
                Some((asked, Located::Gone { available, rest })) => {
                    write_gap(&mut control, &channel.name, asked, available);
                    rest.resuming(log.head())
                }
            };
            cursors.push((id, cursor));
        }
        let slot = self.insert(Protocol::Sse, lane, control, now);
        let connection = &mut self.connections[slot as usize];
        connection.subscriptions =
            cursors.iter().map(|&(channel, cursor)| Subscription { channel, place: Place::Behind(cursor) }).collect();
        // The position before anything is delivered, so that a client that has seen nothing yet can resume too.
        self.write_position(slot);
        for (index, &(_, cursor)) in cursors.iter().enumerate() {
            self.put(slot, index, cursor);
        }
        self.queue(slot);
        self.recorder.metrics.sse.add(1);
        self.recorder.metrics.subscriptions.add(cursors.len() as u64);
        slot
    }

    /// Tells an event stream where it stands.
    pub(super) fn write_position(&mut self, slot: Slot) {
        let mut position = Vec::new();
        sse::write_id(&mut position, |out| self.write_cursor(slot, out));
        sse::end_event(&mut position);
        self.connections[slot as usize].control.extend_from_slice(&position);
    }

    /// Takes over a WebSocket; `early` is what the client sent right after its request.
    pub fn admit_websocket(&mut self, head: &[u8], early: &mut [u8], now: Micros) -> Slot {
        let session = Box::new(Session::new(tick_of(now)));
        let slot = self.insert(Protocol::WebSocket(Some(session)), Lane::WebSocket, head.to_vec(), now);
        self.recorder.metrics.websocket.add(1);
        self.queue(slot);
        if !early.is_empty() {
            self.receive(slot, early, now);
        }
        slot
    }

    pub(super) fn insert(&mut self, protocol: Protocol, lane: Lane, control: Vec<u8>, now: Micros) -> Slot {
        let id = self.next_connection;
        self.next_connection += 1;
        self.connections.insert(Connection::new(id, protocol, lane, control, tick_of(now))) as Slot
    }

    /// Something happened on a socket.
    pub fn on_event(&mut self, event: Event<'_>, now: Micros) {
        match event {
            Event::Received(slot, bytes) => {
                self.recorder.metrics.received_bytes.add(bytes.len() as u64);
                self.receive(slot, bytes, now);
            }
            Event::Ended(slot) => match self.connections.get(slot as usize).map(|connection| connection.phase) {
                Some(Phase::Open | Phase::Farewell { .. }) => self.close(slot, Disconnect::ClientGone, false),
                Some(Phase::HalfClosed { .. }) => self.finish(slot, false),
                Some(Phase::Closing) | None => {}
            },
            Event::Writable(slot) => {
                if let Some(connection) = self.connections.get_mut(slot as usize)
                    && std::mem::replace(&mut connection.blocked, false)
                {
                    self.recorder.metrics.lagging.sub(1);
                    self.queue(slot);
                }
            }
            Event::Gone(slot) => {
                self.connections.remove(slot as usize);
            }
        }
    }

    fn receive(&mut self, slot: Slot, bytes: &mut [u8], now: Micros) {
        let Some(connection) = self.connections.get_mut(slot as usize) else { return };
        if connection.phase == Phase::Closing {
            return;
        }
        // An event stream's client has nothing to say; what it says anyway is read and dropped.
        if let Protocol::WebSocket(session) = &mut connection.protocol
            && let Some(mut taken) = session.take()
        {
            self.feed_session(slot, &mut taken, bytes, now);
            if let Some(Connection { protocol: Protocol::WebSocket(session), .. }) =
                self.connections.get_mut(slot as usize)
            {
                *session = Some(taken);
            }
        }
    }

    /// A message from the relay.
    pub fn on_message(&mut self, message: ToShard, now: Micros) {
        match message {
            ToShard::Live { channel, position, frames } => {
                if self.channels.open(channel, position, frames, now) {
                    for waiter in self.waiters.remove(&channel).unwrap_or_default() {
                        match waiter {
                            OpenWaiter::Stream(stream) => self.answers.push(Answer::Opened(stream)),
                            OpenWaiter::Subscribe(slot, connection) => self.opened(slot, connection, channel, now),
                        }
                    }
                }
            }
            ToShard::Publication { channel, frame } => {
                self.recorder.metrics.publications.add(1);
                if self.channels.append(channel, frame, now) {
                    self.due.push_back(channel);
                }
            }
            ToShard::Missed { channel, frames } => {
                for frame in frames {
                    self.recorder.metrics.publications.add(1);
                    if self.channels.append(channel, frame, now) {
                        self.due.push_back(channel);
                    }
                }
            }
            ToShard::Refused { channel } => {
                if self.channels.refuse(channel) == Interest::Unwanted {
                    self.ask_disinterest(channel);
                    for waiter in self.waiters.remove(&channel).unwrap_or_default() {
                        match waiter {
                            OpenWaiter::Stream(stream) => self.answers.push(Answer::Refused(stream)),
                            OpenWaiter::Subscribe(slot, connection) => self.refused(slot, connection, channel),
                        }
                    }
                }
            }
            ToShard::Released { channel } => {
                if self.channels.released(channel) == Interest::Wanted {
                    self.ask_interest(channel);
                }
                self.recorder.metrics.channels.set(self.channels.len() as u64);
            }
            ToShard::Reply { request, reply } => match self.askers.remove(&request) {
                Some(Asker::Task(task)) => self.answers.push(Answer::Replied(task, reply)),
                Some(Asker::Command { slot, connection, command }) => self.replied(slot, connection, command, reply),
                Some(Asker::Older(channel)) => self.fetched(channel, request, reply, now),
                None => {}
            },
            ToShard::Drain { window } => self.dismiss_all(window, now),
            ToShard::Leave(_) | ToShard::Expect(_) | ToShard::Arrive(_) | ToShard::Reload(_) => {
                unreachable!("the engine, which has the sockets, takes these itself")
            }
            ToShard::Stop => {
                self.stopping = true;
                self.dismiss_all(Duration::ZERO, now);
                let slots: Vec<Slot> = self.connections.iter().map(|(slot, _)| slot as Slot).collect();
                for slot in slots {
                    self.hasten(slot, now);
                }
            }
        }
    }

    /// Other settings are in force. What a stream was told at its start stays as it is.
    pub fn reload(&mut self, settings: Arc<Settings>) {
        self.lag = LagBounds::from(&settings.lag);
        self.settings = settings;
    }

    /// Numbers a request and remembers who asked. Returns the number.
    pub fn ask(&mut self, asker: Asker, make: impl FnOnce(usize, RequestId) -> ToRelay) -> RequestId {
        let request = self.next_request;
        self.next_request += 1;
        self.askers.insert(request, asker);
        self.requests.push_back(make(self.shard, request));
        request
    }

    /// Looks at the connections and channels whose turn it is: lag, heartbeats, pings, and time that has run out.
    pub fn sweep(&mut self, now: Micros) {
        let tick = tick_of(now);
        let slices = self.sweep.advance(tick);
        for slot in slices.of(self.connections.capacity()) {
            if self.connections.contains(slot) {
                self.look_at(slot as Slot, tick, now);
            }
        }
        for id in slices.of(self.channels.id_bound() as usize) {
            self.channels.trim(id as ChannelId, now);
        }
    }

    fn look_at(&mut self, slot: Slot, tick: Tick, now: Micros) {
        let connection = &self.connections[slot as usize];
        match connection.phase {
            Phase::Open => {}
            Phase::Farewell { until } | Phase::HalfClosed { until } => {
                if tick >= until {
                    self.finish(slot, true);
                }
                return;
            }
            Phase::Closing => return,
        }
        if matches!(connection.protocol, Protocol::Poll(_)) {
            // What is due to it is bounded and read when it is answered: it does not lag.
            self.look_at_poll(slot, tick, now);
            return;
        }
        for subscription in &connection.subscriptions {
            if let Place::Behind(cursor) = subscription.place {
                self.channels.seen(subscription.channel, cursor.next, now);
            }
        }
        let lags = connection.subscriptions.iter().any(|subscription| match subscription.place {
            Place::Behind(cursor) => {
                self.channels.get(subscription.channel).and_then(|channel| channel.log()).is_some_and(|log| {
                    !log.holds(cursor.next) || self.lag.exceeded_by(log.lag(cursor.lags_from(), now))
                })
            }
            Place::Opening | Place::CaughtUp { .. } | Place::Waiting { .. } => false,
        });
        if lags || connection.control.len() > limits::CONTROL_BYTES {
            self.shed(slot, Disconnect::Slow, now);
            return;
        }
        match &connection.protocol {
            Protocol::Sse => {
                let silent = tick.saturating_sub(connection.last_sent);
                if silent >= ticks(self.settings.sse.heartbeat) && connection.control.is_empty() && !connection.blocked
                {
                    let connection = &mut self.connections[slot as usize];
                    sse::write_comment(&mut connection.control, "");
                    self.queue(slot);
                }
            }
            Protocol::WebSocket(_) => self.look_at_session(slot, tick, now),
            Protocol::Poll(_) => {}
        }
    }

    /// Queues a connection that has something to send, unless its socket is full.
    pub(super) fn queue(&mut self, slot: Slot) {
        let connection = &mut self.connections[slot as usize];
        if !connection.blocked && !connection.queued {
            connection.queued = true;
            self.ready.push_back(slot);
        }
    }

    /// An identifier for a client that cannot be guessed from another's: 32 hexadecimal digits.
    pub(super) fn client_id(&self, connection: ConnectionId) -> String {
        let high = self.draw(connection);
        let low = mix(high ^ self.seed.rotate_left(32) ^ (self.shard as u64) << 48);
        format!("{high:016x}{low:016x}")
    }

    /// A number for a connection, the same each time and different from the others' as if drawn.
    pub(super) fn draw(&self, connection: ConnectionId) -> u64 {
        mix(self.seed ^ connection)
    }
}

/// The finalizer of SplitMix64: every bit of the result depends on every bit of `x`.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A position that cannot be resumed, told to an event stream in the form of the relay's gap frames: what followed `from`
/// up to `to` is missing.
pub(super) fn write_gap(out: &mut Vec<u8>, channel: &str, asked: Position, available: Position) {
    let place =
        |position: Position| serde_json::json!({ "epoch": position.epoch.to_string(), "offset": position.offset });
    let data = serde_json::json!({ "channel": channel, "from": place(asked), "to": place(available) });
    sse::write_event_name(out, "gap");
    sse::write_data(out, &data.to_string());
    sse::end_event(out);
}
