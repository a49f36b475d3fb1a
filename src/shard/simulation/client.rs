//! The simulated clients: they connect, read at their own pace, vanish, come back from where they were, and hold every
//! publication they get against what was published.

mod poll;
mod sse;
mod websocket;

use std::rc::Rc;
use std::sync::Arc;

use super::kernel::{Kernel, Read, SocketId};
use super::random::Random;
use super::relay::Relay;
use super::trace::Trace;
use super::truth::{Truth, line_feeds};
use super::view::View;
use crate::limits::CHANNELS_PER_CONNECTION;
use crate::log::channel_table::ChannelId;
use crate::log::frame::Micros;
use crate::log::position::{ChannelTag, CursorEntry, parse_cursor};
use crate::shard::core::Core;
use crate::shard::mailbox::RequestError;

/// The response head of every stream. Its meaning is another's matter.
const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\n\r\n";

/// Numbers of tasks are a client's own and this many times its attempt, so that answers to one that it gave up are known.
pub const TASKS: usize = 10_000;

/// What a client acts on.
pub struct Node<'a> {
    pub core: &'a mut Core,
    pub kernel: &'a mut Kernel,
    pub relay: &'a mut Relay,
    pub random: &'a mut Random,
    pub trace: &'a Rc<Trace>,
    pub now: Micros,
    /// No more faults.
    pub calm: bool,
    /// Bytes a socket holds.
    pub capacity: usize,
}

/// What a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Sse,
    WebSocket,
    Poll,
}

enum State {
    /// Not connected for so many turns.
    Away(usize),
    /// Its channels are asked for; so many are not live yet.
    Opening {
        reserved: Vec<ChannelId>,
        missing: usize,
    },
    Connected(Link),
}

struct Link {
    socket: SocketId,
    stream: Stream,
    /// Turns in which it does not read.
    stalls: usize,
    /// It has sent its last byte.
    shut: bool,
}

/// Parses what comes on one connection.
enum Stream {
    Sse(sse::Stream),
    WebSocket(websocket::Stream),
    Poll(poll::Stream),
}

impl Stream {
    /// Counts what was delivered but never read.
    fn count(&mut self, unread: &[u8]) -> u64 {
        match self {
            Self::Sse(stream) => drop(stream.feed(unread)),
            Self::WebSocket(stream) => drop(stream.feed(unread)),
            Self::Poll(_) => {}
        }
        match self {
            Self::Sse(stream) => stream.counted,
            Self::WebSocket(stream) => stream.counted,
            Self::Poll(_) => 0,
        }
    }
}

/// See the module.
pub struct Client {
    name: usize,
    kind: Kind,
    /// The channels it wants, by their numbers in the relay.
    channels: Vec<usize>,
    /// By channel.
    views: Vec<View>,
    state: State,
    /// Bytes it reads in a turn.
    pace: usize,
    /// What it lacks was asked for on this attempt.
    fetched: bool,
    attempts: usize,
    /// Its poll was found to have nothing new and is about to wait.
    looked: bool,
    /// The connections it had.
    past: Vec<(SocketId, Stream)>,
}

impl Client {
    pub fn new(name: usize, kind: Kind, channels: Vec<usize>, of: usize, random: &mut Random) -> Self {
        let pace = *random.pick(&[20, 100, 1000, 100_000]);
        let state = State::Away(random.below(6));
        Self {
            name,
            kind,
            channels,
            views: (0..of).map(|_| View::default()).collect(),
            state,
            pace,
            fetched: false,
            attempts: 0,
            looked: false,
            past: Vec::new(),
        }
    }

    /// One more of the channels it waits for is live.
    pub fn opened(&mut self) {
        if let State::Opening { missing, .. } = &mut self.state {
            *missing -= 1;
        }
    }

    /// One of the channels it waits for will not be live.
    pub fn refused(&mut self, core: &mut Core) {
        if matches!(self.state, State::Opening { .. }) {
            self.let_go(core, 3);
        }
    }

    /// One more of the fetches that it waits for has come to its end.
    pub fn fetched(&mut self, attempt: usize, outcome: &Result<(), RequestError>, core: &mut Core) {
        let State::Opening { missing, .. } = &mut self.state else { return };
        if attempt != self.attempts || !self.fetched {
            return;
        }
        match outcome {
            Ok(()) => *missing -= 1,
            // It is answered 503.
            Err(_) => self.let_go(core, 3),
        }
    }

    /// Channels held for it that no connection holds yet.
    pub fn reserved(&self) -> &[ChannelId] {
        match &self.state {
            State::Opening { reserved, .. } => reserved,
            State::Away(_) | State::Connected(_) => &[],
        }
    }

    pub fn away(&self) -> bool {
        matches!(self.state, State::Away(_))
    }

    /// Whether it is connected to everything it wants and waits for nothing but publications.
    pub fn at_rest(&self, kernel: &Kernel) -> bool {
        let State::Connected(link) = &self.state else { return false };
        let ready = match &link.stream {
            Stream::WebSocket(stream) => stream.at_rest(&self.channels),
            Stream::Sse(stream) => stream.started(),
            Stream::Poll(stream) => stream.waits(),
        };
        ready && kernel.is_open(link.socket)
    }

    /// Nothing the node has may be missing.
    pub fn check(&mut self, relay: &Relay) {
        for &channel in &self.channels {
            let (of, view) = (&relay.channels[channel], &mut self.views[channel]);
            if self.kind == Kind::Poll {
                // No poll is answered with publications without an offset.
                view.resume(of.received);
            }
            view.check_missing(&of.truth, of.received);
        }
    }

    /// Publications that reached its sockets whole.
    pub fn delivered(&mut self, kernel: &mut Kernel) -> u64 {
        assert!(self.away());
        self.past.iter_mut().map(|(socket, stream)| stream.count(&kernel.unread(*socket))).sum()
    }

    /// One turn of the client.
    pub fn turn(&mut self, node: &mut Node<'_>) {
        match &mut self.state {
            State::Away(turns) if *turns > 0 && !node.calm => *turns -= 1,
            State::Away(_) if !node.core.admits() => {}
            State::Away(_) => self.connect(node),
            State::Opening { missing: 0, .. } => {
                if node.calm || node.random.once_in(2) {
                    self.establish(node);
                }
            }
            State::Opening { .. } => {
                if !node.core.admits() || (!node.calm && node.random.once_in(20)) {
                    self.give_up(node);
                }
            }
            State::Connected(_) => {
                self.read(node);
                self.act(node);
            }
        }
    }

    fn connect(&mut self, node: &mut Node<'_>) {
        if self.kind == Kind::WebSocket {
            let slot = node.core.vacant_slot();
            let socket = node.kernel.adopt(slot, node.capacity);
            let (stream, mut early) = websocket::Stream::connect(node);
            let late = early.split_off(node.random.below(early.len() + 1));
            assert_eq!(node.core.admit_websocket(HEAD, &mut early, node.now), slot);
            node.kernel.write(socket, &late);
            self.connected(socket, Stream::WebSocket(stream), node);
            return;
        }
        if !node.calm && node.random.once_in(4) {
            // Another page of the application: other channels.
            self.choose_channels(node.random);
        }
        let names = self.channels.iter().map(|&channel| &node.relay.channels[channel].truth.name);
        let opened: Vec<(ChannelId, bool)> = names.map(|name| node.core.reserve(name, self.name)).collect();
        let missing = opened.iter().filter(|(_, live)| !live).count();
        (self.fetched, self.attempts) = (false, self.attempts + 1);
        self.state = State::Opening { reserved: opened.into_iter().map(|(id, _)| id).collect(), missing };
    }

    fn choose_channels(&mut self, random: &mut Random) {
        let of = self.views.len();
        let all: Vec<usize> = (0..of).filter(|_| random.once_in(2)).collect();
        self.channels = if all.is_empty() { vec![random.below(of)] } else { all };
    }

    fn establish(&mut self, node: &mut Node<'_>) {
        if !std::mem::replace(&mut self.fetched, true) {
            self.visit_another_node(node);
            let cursor = self.cursor(node);
            let State::Opening { reserved, missing } = &mut self.state else { return };
            let task = self.name + TASKS * self.attempts;
            let outcome;
            (*missing, outcome) = node.core.fetch_older(task, reserved, &cursor, node.now);
            match outcome {
                Err(_) => return self.let_go(node.core, 3),
                Ok(()) if *missing > 0 => return,
                Ok(()) => {}
            }
        }
        if self.kind == Kind::Poll && !self.looked {
            return self.look(node);
        }
        self.looked = false;
        let State::Opening { reserved, .. } = std::mem::replace(&mut self.state, State::Away(0)) else { return };
        if !node.core.admits() {
            reserved.into_iter().for_each(|channel| node.core.unreserve(channel));
            return;
        }
        let resume = self.cursor(node);
        let slot = node.core.vacant_slot();
        let socket = node.kernel.adopt(slot, node.capacity);
        if self.kind == Kind::Poll {
            let poll = poll::ask(resume, node);
            assert_eq!(node.core.admit_poll(&reserved, poll, node.now), slot);
            node.trace.event("poll", self.name as u64, socket as u64);
            return self.connected(socket, Stream::Poll(poll::Stream::default()), node);
        }
        assert_eq!(node.core.admit_sse(HEAD, &reserved, &resume, node.now), slot);
        node.trace.event("stream", self.name as u64, resume.len() as u64);
        self.connected(socket, Stream::Sse(sse::Stream::new()), node);
    }

    /// Asks what is new, as the front does before it lets a poll wait.
    fn look(&mut self, node: &mut Node<'_>) {
        let State::Opening { reserved, .. } = &self.state else { return };
        let answer = node.core.poll(reserved, &self.cursor(node));
        self.looked = !answer.news;
        if self.looked {
            return;
        }
        poll::take(&answer.body, &self.channels, &mut self.views, node);
        reserved.iter().for_each(|&channel| node.core.unreserve(channel));
        self.state = State::Away(node.random.below(6));
    }

    /// What it asks to go on from: a text that it was given as a whole.
    fn cursor(&self, node: &Node<'_>) -> Vec<CursorEntry> {
        let text: Vec<String> = self.channels.iter().filter_map(|&channel| self.entry(channel, node)).collect();
        parse_cursor(&text.join(","), CHANNELS_PER_CONNECTION).expect("a cursor")
    }

    fn entry(&self, channel: usize, node: &Node<'_>) -> Option<String> {
        let tag = ChannelTag::of(&node.relay.channels[channel].truth.name);
        let position = self.views[channel].position?;
        Some(CursorEntry { tag, position }.to_string())
    }

    /// Between two connections the client may have been served by a node that knew more.
    fn visit_another_node(&mut self, node: &mut Node<'_>) {
        if node.calm || !node.random.once_in(6) {
            return;
        }
        for &channel in &self.channels {
            let truth = &node.relay.channels[channel].truth;
            let view = &mut self.views[channel];
            if view.position.is_some() && truth.records.len() > view.next {
                node.trace.event("another node", self.name as u64, channel as u64);
                view.visit(truth, node.random.within(view.next..=truth.records.len()));
            }
        }
    }

    fn connected(&mut self, socket: SocketId, stream: Stream, node: &mut Node<'_>) {
        node.trace.event("connected", self.name as u64, socket as u64);
        self.state = State::Connected(Link { socket, stream, stalls: 0, shut: false });
    }

    fn give_up(&mut self, node: &mut Node<'_>) {
        node.trace.event("gives up", self.name as u64, 0u64);
        let away = node.random.below(20);
        self.let_go(node.core, away);
    }

    /// Waits no longer, and comes back after so many turns.
    fn let_go(&mut self, core: &mut Core, away: usize) {
        let State::Opening { reserved, .. } = std::mem::replace(&mut self.state, State::Away(away)) else { return };
        self.looked = false;
        for channel in reserved {
            core.unwait(channel, self.name);
            core.unreserve(channel);
        }
    }

    fn leave(&mut self, node: &mut Node<'_>) {
        let away = State::Away(node.random.below(20));
        if let State::Connected(link) = std::mem::replace(&mut self.state, away) {
            node.trace.event("left", self.name as u64, link.socket as u64);
            self.past.push((link.socket, link.stream));
        }
    }

    fn read(&mut self, node: &mut Node<'_>) {
        let State::Connected(link) = &mut self.state else { return };
        if !node.calm {
            if link.stalls > 0 {
                link.stalls -= 1;
                return;
            }
            if node.random.once_in(30) {
                link.stalls = node.random.below(60);
            }
        }
        let most = if node.calm { usize::MAX } else { node.random.within(1..=self.pace) };
        let mut bytes = Vec::new();
        let read = node.kernel.read(link.socket, most, &mut bytes);
        let (socket, channels, views) = (link.socket, &self.channels, &mut self.views);
        node.trace.event("read", self.name as u64, bytes.len() as u64);
        node.trace.bytes(&bytes);
        match &mut link.stream {
            Stream::Sse(stream) => stream.take(&bytes, channels, views, node),
            Stream::WebSocket(stream) => stream.take(&bytes, views, node, socket),
            Stream::Poll(stream) => {
                stream.feed(&bytes);
                if read == Read::End {
                    stream.end(channels, views, node);
                }
            }
        }
        if matches!(read, Read::End | Read::Reset) {
            node.kernel.shut(socket);
            self.leave(node);
        }
    }

    /// Does what it does beside reading.
    fn act(&mut self, node: &mut Node<'_>) {
        let State::Connected(link) = &mut self.state else { return };
        if let Stream::WebSocket(stream) = &mut link.stream
            && !link.shut
        {
            stream.act(self.name, &self.channels, &mut self.views, node, link.socket);
        }
        if node.calm {
            return;
        }
        match node.random.below(300) {
            0 | 1 => {
                node.kernel.reset(link.socket);
                self.leave(node);
            }
            2 | 3 => {
                // It reads on to the node's end of the stream.
                node.kernel.shut(link.socket);
                link.shut = true;
            }
            4 if self.kind == Kind::Sse => node.kernel.write(link.socket, b"hello?"),
            _ => {}
        }
    }
}

/// Number of the channel of a name.
fn channel_of(relay: &Relay, name: &str) -> usize {
    let named = |name: &Arc<str>, wanted: &str| **name == *wanted;
    relay.channels.iter().position(|channel| named(&channel.truth.name, name)).expect("a channel of the world")
}

/// The entries of an id: one for each channel of the stream, in order.
fn entries_of(id: &str, channels: &[usize], relay: &Relay) -> Vec<CursorEntry> {
    let entries = parse_cursor(id, CHANNELS_PER_CONNECTION).expect("a cursor");
    let tags: Vec<ChannelTag> = entries.iter().map(|entry| entry.tag).collect();
    let wanted: Vec<ChannelTag> =
        channels.iter().map(|&channel| ChannelTag::of(&relay.channels[channel].truth.name)).collect();
    assert_eq!(tags, wanted, "the id {id} has one entry a channel");
    entries
}

/// A client got a publication as JSON.
fn publication(view: &mut View, truth: &Truth, data: &str, offset: u64) {
    let record = find(truth, data);
    let of = &truth.records[record];
    assert_eq!(offset, if of.positioned { of.position.offset } else { 0 }, "the offset of {of:?}");
    view.publication(truth, record);
}

/// Number of the record that a `data` field stands for.
fn find(truth: &Truth, json: &str) -> usize {
    let text = serde_json::from_str::<String>(json).map(|text| line_feeds(&text));
    let found = truth.find(json).or_else(|| truth.find(&text.ok()?));
    found.unwrap_or_else(|| panic!("{json} was never published"))
}
