//! The simulated way to the server: what `redis.rs` and `redis/session.rs` promise the relay, and no more than that.
//!
//! A session is two connections. Commands are carried out in the order they were started and answered in that order, or
//! not at all; the answers of an ended session may still come. Messages and the confirmations of subscribes
//! come in the order the server sent them, but the relay gets confirmations and answers before the messages that wait.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::server::Server;
use crate::backbone::interface::{BackboneError, BackboneEvent, Message, Page, Read, Ticket};
use crate::limits::{HEARTBEAT_MILLIS, HEARTBEAT_STALE_MILLIS};
use crate::log::frame::Micros;
use crate::log::position::{Epoch, Position};
use crate::shard::mailbox::Publish;
use crate::shard::simulation::random::Random;

/// What the relay started.
#[derive(Debug)]
enum Command {
    Publish(Publish),
    Read(Read),
    Renew(Arc<str>, Epoch),
}

/// A command's result, before it is known whether the answer arrives.
#[derive(Debug)]
enum Answer {
    Published(Result<Position, BackboneError>),
    Page(Result<Page, BackboneError>),
}

impl Command {
    fn fails(&self, error: BackboneError) -> Answer {
        match self {
            Command::Publish(_) => Answer::Published(Err(error)),
            Command::Read(_) | Command::Renew(..) => Answer::Page(Err(error)),
        }
    }
}

impl Answer {
    fn event(self, ticket: Ticket) -> BackboneEvent {
        match self {
            Answer::Published(result) => BackboneEvent::Published(ticket, result),
            Answer::Page(result) => BackboneEvent::Page(ticket, result),
        }
    }

    /// The answer is on its way when the connection breaks.
    fn unanswered(self) -> Self {
        let error = || BackboneError::Unanswered("the connection broke".into());
        match self {
            Answer::Published(_) => Answer::Published(Err(error())),
            Answer::Page(_) => Answer::Page(Err(error())),
        }
    }
}

/// A session's connection for commands. It lasts until everything is answered, even when the session has ended.
#[derive(Debug, Default)]
struct Pipe {
    broken: bool,
    commands: VecDeque<(Ticket, Command)>,
    answers: VecDeque<(Ticket, Answer)>,
}

#[derive(Debug)]
enum Change {
    Subscribe(Ticket, Vec<Arc<str>>),
    Unsubscribe(Vec<Arc<str>>),
}

/// What is on its way over the pub/sub connection.
#[derive(Debug)]
enum Arrival {
    Message(Message),
    Heartbeat(Micros),
    /// A change was carried out.
    Confirmed(Option<Ticket>),
}

/// A session's pub/sub connection.
#[derive(Debug)]
struct Session {
    number: u64,
    changes: VecDeque<Change>,
    /// A change is not confirmed yet.
    changing: bool,
    subscribed: BTreeSet<Arc<str>>,
    wire: VecDeque<Arrival>,
    pushes: VecDeque<BackboneEvent>,
    overrun: bool,
    /// Open, and nothing arrives.
    deaf: bool,
    beat: Micros,
    next_beat: Micros,
}

#[derive(Debug)]
enum Outcome {
    Up(u64),
    Event(BackboneEvent),
}

/// See the module.
#[derive(Debug)]
pub struct SimulatedBackbone {
    pub server: Server,
    /// No more faults.
    pub calm: bool,
    /// The session the relay works with, as far as it knows.
    link: Option<u64>,
    outcomes: VecDeque<Outcome>,
    session: Option<Session>,
    sessions: u64,
    pipes: BTreeMap<u64, Pipe>,
    /// Answers that will say that there was none.
    stragglers: Vec<BackboneEvent>,
    /// Messages that wait for the relay.
    queue: usize,
    random: Random,
}

impl SimulatedBackbone {
    /// A server that nothing is connected to; `queue` messages wait for the relay at most.
    pub fn new(server: Server, queue: usize, random: Random) -> Self {
        Self {
            server,
            calm: false,
            link: None,
            outcomes: VecDeque::new(),
            session: None,
            sessions: 0,
            pipes: BTreeMap::new(),
            stragglers: Vec::new(),
            queue,
            random,
        }
    }

    pub fn publish(&mut self, ticket: Ticket, publish: Publish) {
        self.start(ticket, Command::Publish(publish));
    }

    pub fn read(&mut self, ticket: Ticket, read: Read) {
        self.start(ticket, Command::Read(read));
    }

    pub fn renew(&mut self, ticket: Ticket, channel: Arc<str>, epoch: Epoch) {
        self.start(ticket, Command::Renew(channel, epoch));
    }

    fn start(&mut self, ticket: Ticket, command: Command) {
        match self.link.and_then(|link| self.pipes.get_mut(&link)) {
            Some(pipe) if !pipe.broken => pipe.commands.push_back((ticket, command)),
            Some(_) => {
                let answer = command.fails(BackboneError::Unanswered("the connection is broken".into()));
                self.stragglers.push(answer.event(ticket));
            }
            None => {
                let answer = command.fails(BackboneError::Disconnected("simulated".into()));
                self.outcomes.push_back(Outcome::Event(answer.event(ticket)));
            }
        }
    }

    pub fn subscribe(&mut self, ticket: Ticket, channels: Vec<Arc<str>>) {
        self.change(Change::Subscribe(ticket, channels));
    }

    pub fn unsubscribe(&mut self, channels: Vec<Arc<str>>) {
        self.change(Change::Unsubscribe(channels));
    }

    fn change(&mut self, change: Change) {
        if let Some(session) = self.session.as_mut().filter(|session| self.link == Some(session.number)) {
            session.changes.push_back(change);
        }
    }

    /// The relay's next event.
    pub fn try_next(&mut self) -> Option<BackboneEvent> {
        if let Some(outcome) = self.outcomes.pop_front() {
            return Some(match outcome {
                Outcome::Up(number) => {
                    self.link = Some(number);
                    BackboneEvent::Connected
                }
                Outcome::Event(event) => {
                    if matches!(event, BackboneEvent::Disconnected(_)) {
                        self.link = None;
                    }
                    event
                }
            });
        }
        let session = self.session.as_mut().filter(|session| self.link == Some(session.number))?;
        if let Some(event) = session.pushes.pop_front() {
            return Some(event);
        }
        std::mem::take(&mut session.overrun).then_some(BackboneEvent::Overrun)
    }

    /// Whether the relay has something to take.
    pub fn has_event(&self) -> bool {
        let known = self.session.as_ref().filter(|session| self.link == Some(session.number));
        !self.outcomes.is_empty() || known.is_some_and(|session| !session.pushes.is_empty() || session.overrun)
    }

    /// Whether there is a session.
    pub fn is_connected(&self) -> bool {
        self.session.is_some()
    }

    /// Channels the server has this node's subscription of.
    pub fn subscribed(&self) -> usize {
        self.session.as_ref().map_or(0, |session| session.subscribed.len())
    }

    /// Connects, if there is no session.
    pub fn connect(&mut self, now: Micros) {
        if self.session.is_some() {
            return;
        }
        self.sessions += 1;
        self.pipes.insert(self.sessions, Pipe::default());
        self.session = Some(Session {
            number: self.sessions,
            changes: VecDeque::new(),
            changing: false,
            subscribed: BTreeSet::new(),
            wire: VecDeque::new(),
            pushes: VecDeque::new(),
            overrun: false,
            deaf: false,
            beat: now,
            next_beat: now,
        });
        self.outcomes.push_back(Outcome::Up(self.sessions));
    }

    /// The session ends, or a further attempt fails.
    pub fn disconnect(&mut self, reason: &str) {
        self.session = None;
        self.outcomes.push_back(Outcome::Event(BackboneEvent::Disconnected(reason.into())));
    }

    /// All connections break: what is not answered will not be.
    pub fn break_all(&mut self) {
        for pipe in self.pipes.values_mut() {
            pipe.broken = true;
            let lost = pipe.commands.drain(..);
            let lost = lost.map(|(ticket, command)| {
                command.fails(BackboneError::Unanswered("the connection broke".into())).event(ticket)
            });
            self.stragglers.extend(lost);
            self.stragglers.extend(pipe.answers.drain(..).map(|(ticket, answer)| answer.unanswered().event(ticket)));
        }
        self.disconnect("the connection broke");
    }

    /// A publisher of its own publishes straight to the server.
    pub fn publish_elsewhere(&mut self, publish: &Publish, keep: bool, now: Micros) -> Position {
        let (position, message) = self.server.publish(publish, keep, now);
        self.send(message);
        position
    }

    /// Somebody uses plain `PUBLISH`.
    pub fn publish_plain(&mut self, channel: &Arc<str>, data: bytes::Bytes) {
        self.send(Some(Message { channel: channel.as_ref().to_owned(), position: None, tag: None, data }));
    }

    fn send(&mut self, message: Option<Message>) {
        if let (Some(message), Some(session)) = (message, &mut self.session)
            && session.subscribed.contains(message.channel.as_str())
        {
            session.wire.push_back(Arrival::Message(message));
        }
    }

    /// The server carries out the next command of one connection. Returns whether there was one.
    pub fn execute(&mut self, now: Micros) -> bool {
        let busy: Vec<u64> =
            self.pipes.iter().filter(|(_, pipe)| !pipe.commands.is_empty()).map(|(number, _)| *number).collect();
        if busy.is_empty() {
            return false;
        }
        let number = *self.random.pick(&busy);
        let pipe = self.pipes.get_mut(&number).expect("a busy one");
        let (ticket, command) = pipe.commands.pop_front().expect("a busy one");
        if !self.calm && self.random.once_in(12) {
            let answer = command.fails(BackboneError::Refused("simulated".into()));
            self.pipes.get_mut(&number).expect("a busy one").answers.push_back((ticket, answer));
            return true;
        }
        let answer = match command {
            Command::Publish(publish) => {
                let (position, message) = self.server.publish(&publish, true, now);
                self.send(message);
                Answer::Published(Ok(position))
            }
            Command::Read(read) => Answer::Page(Ok(self.server.read(&read))),
            Command::Renew(channel, epoch) => Answer::Page(Ok(self.server.renew(&channel, epoch))),
        };
        if !self.calm && self.random.once_in(25) {
            // It took longer than the relay's client waits.
            self.stragglers.push(answer.unanswered().event(ticket));
        } else {
            self.pipes.get_mut(&number).expect("a busy one").answers.push_back((ticket, answer));
        }
        true
    }

    /// An answer arrives. Returns whether there was one.
    pub fn answer(&mut self) -> bool {
        let ready: Vec<u64> =
            self.pipes.iter().filter(|(_, pipe)| !pipe.answers.is_empty()).map(|(number, _)| *number).collect();
        let late = !self.stragglers.is_empty() && (ready.is_empty() || self.random.once_in(3));
        let event = if late {
            self.stragglers.swap_remove(self.random.below(self.stragglers.len()))
        } else if ready.is_empty() {
            return false;
        } else {
            let pipe = self.pipes.get_mut(self.random.pick(&ready)).expect("a ready one");
            let (ticket, answer) = pipe.answers.pop_front().expect("a ready one");
            answer.event(ticket)
        };
        self.outcomes.push_back(Outcome::Event(event));
        true
    }

    /// The server carries out the next change of the subscriptions. Returns whether there was one.
    pub fn change_subscriptions(&mut self) -> bool {
        let Some(session) = self.session.as_mut().filter(|session| !session.changing) else { return false };
        let Some(change) = session.changes.pop_front() else { return false };
        session.changing = true;
        let confirmed = match change {
            Change::Subscribe(ticket, channels) => {
                session.subscribed.extend(channels);
                Some(ticket)
            }
            Change::Unsubscribe(channels) => {
                channels.iter().for_each(|channel| _ = session.subscribed.remove(channel));
                None
            }
        };
        session.wire.push_back(Arrival::Confirmed(confirmed));
        true
    }

    /// What was sent next over the pub/sub connection arrives. Returns whether there was something.
    pub fn arrive(&mut self) -> bool {
        let Some(session) = &mut self.session else { return false };
        let Some(arrival) = session.wire.pop_front() else { return false };
        if session.deaf {
            return true;
        }
        match arrival {
            Arrival::Confirmed(ticket) => {
                session.changing = false;
                let confirmed = ticket.map(|ticket| Outcome::Event(BackboneEvent::Subscribed(ticket)));
                self.outcomes.extend(confirmed);
            }
            Arrival::Message(_) | Arrival::Heartbeat(_) if session.pushes.len() >= self.queue => session.overrun = true,
            Arrival::Message(message) => session.pushes.push_back(BackboneEvent::Message(message)),
            Arrival::Heartbeat(sent) => session.pushes.push_back(BackboneEvent::Heartbeat(sent)),
        }
        true
    }

    /// The session's task watches its heartbeat.
    pub fn watch(&mut self, now: Micros) {
        let Some(session) = &mut self.session else { return };
        if now.saturating_sub(session.beat) > HEARTBEAT_STALE_MILLIS * 1_000 {
            return self.disconnect("nothing came back");
        }
        if now >= session.next_beat {
            session.next_beat = now + HEARTBEAT_MILLIS * 1_000;
            session.wire.push_back(Arrival::Heartbeat(now));
        }
    }

    /// A heartbeat was taken by the relay.
    pub fn beat(&mut self, now: Micros) {
        if let Some(session) = &mut self.session {
            session.beat = now;
        }
    }

    /// Nothing arrives any more on the pub/sub connection, which stays open.
    pub fn deafen(&mut self) {
        if let Some(session) = &mut self.session {
            session.deaf = true;
        }
    }

    /// A message gets lost. Returns whether there was one.
    pub fn lose(&mut self) -> bool {
        let Some(session) = &mut self.session else { return false };
        let messages: Vec<usize> = indices(&session.wire, |arrival| matches!(arrival, Arrival::Message(_)));
        if messages.is_empty() {
            return false;
        }
        session.wire.remove(*self.random.pick(&messages));
        true
    }

    /// A message with a position comes a second time, some time later. Returns whether there was one.
    pub fn repeat(&mut self) -> bool {
        let Some(session) = &mut self.session else { return false };
        let positioned = |arrival: &Arrival| matches!(arrival, Arrival::Message(message) if message.position.is_some());
        let messages = indices(&session.wire, positioned);
        if messages.is_empty() {
            return false;
        }
        let from = *self.random.pick(&messages);
        let Arrival::Message(message) = &session.wire[from] else { unreachable!("it was just chosen") };
        let copy = Arrival::Message(message.clone());
        session.wire.insert(self.random.within(from + 1..=session.wire.len()), copy);
        true
    }
}

fn indices(wire: &VecDeque<Arrival>, wanted: impl Fn(&Arrival) -> bool) -> Vec<usize> {
    wire.iter().enumerate().filter(|(_, arrival)| wanted(arrival)).map(|(index, _)| index).collect()
}
