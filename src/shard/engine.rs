//! The engine: owns a shard's established sockets and turns the pure half's decisions into system calls.
//!
//! One descriptor becomes readable when there is something to do, and each wake runs one turn: reap, knocks, mailbox, timers,
//! drain, submit. A turn is bounded by budgets; what is left over rings the bell for the next one, so that the shard's
//! other tasks get their time in between.

mod handover;
mod wake;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use slab::Slab;
use tokio::sync::{mpsc, oneshot};

use super::core::{Answer, Asker, Core};
use super::driver::{Clock, Driver};
use super::front::{Current, Parked, Parking};
use super::gate::{Established, Gate, Knock, OpenError, Reservation};
use super::mailbox::{Mailbox, Reply, RequestError, ToRelay, ToShard};
use crate::limits::{MESSAGES_PER_TURN, PEER_SILENCE_MILLIS};
use crate::log::channel_table::{ChannelId, Slot};
use crate::log::frame::Micros;
use crate::shard::disconnect::Disconnect;
use wake::Wake;

/// A stream that waits for its channels to go live.
struct Opening {
    channels: Vec<ChannelId>,
    missing: usize,
    done: oneshot::Sender<Result<Reservation, OpenError>>,
}

/// A request that waits for what lies before logs.
struct Fetching {
    missing: usize,
    outcome: Result<(), RequestError>,
    done: oneshot::Sender<Result<(), RequestError>>,
}

/// Goes on with a connection of the front that was parked.
pub type Readmit = Box<dyn Fn(Parked) -> std::io::Result<()>>;

/// What an engine is made of.
pub struct Parts {
    /// The pure half.
    pub core: Core,
    /// The way to the kernel.
    pub driver: Driver,
    /// What the relay tells.
    pub mailbox: Arc<Mailbox>,
    /// What the shard's tasks want.
    pub gate: Gate,
    /// What the relay is asked.
    pub relay: mpsc::Sender<ToRelay>,
    /// The node's monotonic clock.
    pub clock: Clock,
    /// Most sockets at a time.
    pub capacity: usize,
    /// The front's switch. While it is not open, the driver receives nothing.
    pub parking: Parking,
    /// The front's settings.
    pub current: Current,
    /// See [`Readmit`].
    pub readmit: Readmit,
}

/// One shard's engine.
pub struct Engine {
    core: Core,
    driver: Driver,
    mailbox: Arc<Mailbox>,
    gate: Gate,
    relay: mpsc::Sender<ToRelay>,
    clock: Clock,
    /// Most sockets at a time.
    capacity: usize,
    /// Places reserved for streams that are not established yet.
    promised: usize,
    openings: Slab<Opening>,
    askers: Slab<oneshot::Sender<Reply>>,
    parking: Parking,
    current: Current,
    readmit: Readmit,
    handover: handover::Handover,
    fetchings: Slab<Fetching>,
    /// Microseconds of the last report of the histograms.
    reported: Micros,
}

/// Microseconds between two reports of the histograms.
const REPORT_MICROS: Micros = 1_000_000;

impl Engine {
    /// An engine without connections.
    pub fn new(parts: Parts) -> Self {
        let Parts { core, mut driver, mailbox, gate, relay, clock, capacity, parking, current, readmit } = parts;
        if !parking.is_open() {
            driver.pause();
        }
        Self {
            core,
            driver,
            mailbox,
            gate,
            relay,
            clock,
            capacity,
            promised: 0,
            openings: Slab::new(),
            askers: Slab::new(),
            fetchings: Slab::new(),
            parking,
            current,
            readmit,
            handover: handover::Handover::default(),
            reported: 0,
        }
    }

    /// Runs turns until the node stops, or another process has its connections, and every one that is left has ended.
    ///
    /// # Errors
    /// When the wake descriptor cannot be watched.
    pub async fn run(mut self) -> std::io::Result<()> {
        // SAFETY: the driver, which owns the descriptor, outlives this borrow.
        let wake = Wake::new(unsafe { BorrowedFd::borrow_raw(self.driver.wake_fd()) }.try_clone_to_owned()?)?;
        while !self.is_done() {
            wake.wait().await?;
            if self.turn() {
                self.mailbox.ring();
            }
        }
        Ok(())
    }

    /// One turn. True when something is left for the next.
    fn turn(&mut self) -> bool {
        let begun = (self.clock)();
        self.mailbox.bell().quiet();

        let Self { core, driver, .. } = self;
        driver.reap(&mut |event| core.on_event(event, begun));

        for knock in self.gate.knocks() {
            self.take_knock(knock, begun);
        }

        let mut messages = 0;
        while messages < MESSAGES_PER_TURN
            && let Some(message) = self.mailbox.take()
        {
            match message {
                message @ (ToShard::Drain { .. } | ToShard::Stop) => {
                    self.parking.shut();
                    self.core.on_message(message, begun);
                }
                ToShard::Reload(settings) => {
                    self.current.replace(Arc::clone(&settings));
                    self.core.reload(settings);
                }
                ToShard::Leave(leaving) => self.leave(leaving, begun),
                ToShard::Expect(expected) => self.expect(expected),
                ToShard::Arrive(arriving) => self.arrive(arriving, begun),
                message => self.core.on_message(message, begun),
            }
            messages += 1;
            if self.has_failed() {
                // The sockets are another process's: not one byte may go out on them.
                return false;
            }
        }

        self.core.sweep(begun);

        let mut more = match &mut self.driver {
            Driver::Uring(uring) => self.core.drain(uring),
            Driver::Epoll(epoll) => self.core.drain(epoll),
        };

        more |= self.core.dismiss(more, begun);
        for order in self.core.orders.drain(..) {
            self.driver.order(order);
        }
        self.answer();
        more |= self.ask_relay();
        self.driver.submit();
        more |= self.go_on_leaving(begun);
        more |= self.driver.pending() || messages == MESSAGES_PER_TURN;

        let now = (self.clock)();
        let recorder = &mut self.core.recorder;
        recorder.metrics.turns.add(1);
        recorder.metrics.mailbox_depth.set(self.mailbox.depth() as u64);
        recorder.turn.saturating_record(now - begun);
        if now - self.reported >= REPORT_MICROS {
            self.reported = now;
            recorder.publish();
            // Streams whose client gave up waiting let their channels go.
            self.openings_abandoned();
        }
        more
    }

    fn take_knock(&mut self, knock: Knock, now: Micros) {
        match knock {
            Knock::Open { names, done } => self.open_channels(&names, done),
            Knock::Release(channels) => {
                self.promised -= 1;
                channels.into_iter().for_each(|channel| self.core.unreserve(channel));
            }
            Knock::Poll { channels, cursor, done } => {
                // A task that has given up needs no answer.
                let _ = done.send(self.core.poll(&channels, &cursor));
            }
            Knock::Establish { socket, stream } => self.establish(socket, stream, now),
            Knock::Publish { publish, done } => {
                let task = self.askers.insert(done);
                self.core.ask(Asker::Task(task), |shard, request| ToRelay::Publish { shard, request, publish });
            }
            Knock::Fetch { channels, cursor, done } => {
                let task = self.fetchings.vacant_key();
                match self.core.fetch_older(task, &channels, &cursor, now) {
                    // It stays until all of them are answered, whoever still listens: then the number is free.
                    (missing @ 1.., outcome) => _ = self.fetchings.insert(Fetching { missing, outcome, done }),
                    (0, outcome) => _ = done.send(outcome),
                }
            }
        }
    }

    fn open_channels(&mut self, names: &[Arc<str>], done: oneshot::Sender<Result<Reservation, OpenError>>) {
        if !self.core.admits() || self.core.connections() + self.promised >= self.capacity {
            Disconnect::ConnectionLimit.count(&self.core.recorder.metrics);
            let _ = done.send(Err(OpenError::Closed));
            return;
        }
        self.promised += 1;
        let opening = self.openings.vacant_key();
        let mut channels = Vec::with_capacity(names.len());
        let mut missing = 0;
        for (index, name) in names.iter().enumerate() {
            if names[..index].contains(name) {
                continue;
            }
            let (channel, live) = self.core.reserve(name, opening);
            channels.push(channel);
            missing += usize::from(!live);
        }
        if missing == 0 {
            let _ = done.send(Ok(self.gate.reservation(channels)));
        } else {
            self.openings.insert(Opening { channels, missing, done });
        }
    }

    fn establish(&mut self, socket: OwnedFd, stream: Established, now: Micros) {
        // A peer that acknowledges nothing for so long is gone, whatever its last word was. The option fails only on a
        // socket that is broken already.
        let silence = Duration::from_millis(PEER_SILENCE_MILLIS);
        let _ = socket2::SockRef::from(&socket).set_tcp_user_timeout(Some(silence));
        let slot: Slot = self.core.vacant_slot();
        if let Err(error) = self.driver.adopt(slot, socket) {
            tracing::warn!(%error, "a socket could not be handed to the driver");
            Disconnect::InternalError.count(&self.core.recorder.metrics);
            return;
        }
        self.promised -= 1;
        let admitted = match stream {
            Established::Sse { channels, resume, head } => self.core.admit_sse(&head, &channels.take(), &resume, now),
            Established::WebSocket { place, head, early } => {
                place.take();
                self.core.admit_websocket(&head, &mut early.to_vec(), now)
            }
            Established::Poll { channels, poll } => self.core.admit_poll(&channels.take(), poll, now),
        };
        debug_assert_eq!(admitted, slot);
        if !self.core.admits() {
            self.core.shed(slot, Disconnect::Shutdown, now);
        }
    }

    /// Wakes the tasks whose answers are there.
    fn answer(&mut self) {
        for answer in std::mem::take(&mut self.core.answers) {
            match answer {
                Answer::Opened(handover::EXPECTED) => self.expected(Ok(())),
                Answer::Refused(handover::EXPECTED) => {
                    self.expected(Err("the node follows as many channels as it can".into()));
                }
                Answer::Opened(opening) => {
                    let Some(of) = self.openings.get_mut(opening) else { continue };
                    of.missing -= 1;
                    if of.missing == 0 {
                        let Opening { channels, done, .. } = self.openings.remove(opening);
                        // A task that has given up drops the reservation, which lets the channels go.
                        let _ = done.send(Ok(self.gate.reservation(channels)));
                    }
                }
                Answer::Refused(opening) => {
                    // Another of its channels may have been refused before.
                    if let Some(of) = self.openings.try_remove(opening) {
                        let done = self.let_go(opening, of);
                        let _ = done.send(Err(OpenError::TooManyChannels));
                    }
                }
                Answer::Fetched(task, outcome) => {
                    let Some(of) = self.fetchings.get_mut(task) else { continue };
                    of.missing -= 1;
                    if of.outcome.is_ok() {
                        of.outcome = outcome;
                    }
                    if of.missing == 0 {
                        let Fetching { outcome, done, .. } = self.fetchings.remove(task);
                        let _ = done.send(outcome);
                    }
                }
                Answer::Replied(task, reply) => {
                    if let Some(done) = self.askers.try_remove(task) {
                        let _ = done.send(reply);
                    }
                }
            }
        }
    }

    fn openings_abandoned(&mut self) {
        let abandoned: Vec<usize> =
            self.openings.iter().filter(|(_, of)| of.done.is_closed()).map(|(opening, _)| opening).collect();
        for opening in abandoned {
            let of = self.openings.remove(opening);
            self.let_go(opening, of);
        }
    }

    /// Gives back what a stream that will not be established holds.
    fn let_go(&mut self, opening: usize, of: Opening) -> oneshot::Sender<Result<Reservation, OpenError>> {
        self.promised -= 1;
        for channel in of.channels {
            self.core.unwait(channel, opening);
            self.core.unreserve(channel);
        }
        of.done
    }

    /// Passes requests on to the relay without ever waiting for it. True when answers of refused ones are to be told.
    fn ask_relay(&mut self) -> bool {
        let mut refused = false;
        let mut kept = Vec::new();
        while let Some(request) = self.core.requests.pop_front() {
            // Once one is kept the later ones are too: a disinterest must not overtake the interest that it ends.
            if !kept.is_empty() && matches!(request, ToRelay::Interest { .. } | ToRelay::Disinterest { .. }) {
                kept.push(request);
                continue;
            }
            let Err(mpsc::error::TrySendError::Full(request) | mpsc::error::TrySendError::Closed(request)) =
                self.relay.try_send(request)
            else {
                continue;
            };
            // Full: what somebody waits for is refused at once, what keeps the books is kept for the next turn.
            let (request, reply) = match request {
                ToRelay::Publish { request, .. } => (request, Reply::Published(Err(RequestError::Overloaded))),
                ToRelay::History { request, .. } => (request, Reply::History(Err(RequestError::Overloaded))),
                interest @ (ToRelay::Interest { .. } | ToRelay::Disinterest { .. }) => {
                    kept.push(interest);
                    continue;
                }
            };
            self.core.on_message(ToShard::Reply { request, reply }, (self.clock)());
            refused = true;
        }
        self.core.requests.extend(kept);
        refused
    }
}

/// Rings a shard's bell every tick, so that timers run while nothing else happens.
pub async fn tick(mailbox: Arc<Mailbox>) {
    let mut interval = monoio::time::interval(std::time::Duration::from_millis(super::timer::TICK_MILLIS));
    loop {
        interval.tick().await;
        mailbox.ring();
    }
}
