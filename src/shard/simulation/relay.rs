//! The simulated backbone and the relay between it and the shard. It answers late, loses what it may lose, and says so.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use super::random::Random;
use super::trace::Trace;
use super::truth::Truth;
use crate::log::frame::{ChannelBlocks, Frame, FrameEncoder, FrameKind, Micros};
use crate::log::position::{Epoch, Position};
use crate::shard::mailbox::{HistoryQuery, LocalChannel, Reply, RequestError, RequestId, ToRelay, ToShard};

/// What the shard has asked of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Interest {
    None,
    Asked(LocalChannel),
    Live(LocalChannel),
    /// The node follows as many channels as it can.
    Refused(LocalChannel),
    Leaving(LocalChannel),
}

/// A channel, and what the node knows of it.
#[derive(Debug)]
pub struct Channel {
    pub truth: Truth,
    /// Records of the truth that the node has, or knows that it will never have.
    pub received: usize,
    blocks: ChannelBlocks,
    /// Every frame of the node, oldest first.
    log: Vec<Arc<Frame>>,
    /// Position after the last of them.
    position: Position,
    /// Position before the first of them.
    base: Position,
    interest: Interest,
    /// Frames of `log` that the shard was given.
    fed: usize,
    /// Those that it was given as history.
    since: usize,
    /// The mailbox was full when the next of them was due.
    missed: bool,
}

/// See the module.
pub struct Relay {
    pub channels: Vec<Channel>,
    pub mailbox: VecDeque<ToShard>,
    /// No more faults, and everything happens soon.
    pub calm: bool,
    capacity: usize,
    replies: VecDeque<ToShard>,
    /// Fetches that are not answered.
    fetches: Vec<(RequestId, HistoryQuery)>,
    encoder: FrameEncoder,
    random: Random,
    trace: Rc<Trace>,
}

impl Relay {
    pub fn new(names: impl Iterator<Item = Arc<str>>, capacity: usize, mut random: Random, trace: Rc<Trace>) -> Self {
        let channels = names.map(|name| {
            let epoch = Epoch(random.next() as u32);
            Channel {
                truth: Truth::new(name, epoch),
                received: 0,
                blocks: ChannelBlocks::default(),
                log: Vec::new(),
                position: Position { epoch, offset: 0 },
                base: Position { epoch, offset: 0 },
                interest: Interest::None,
                fed: 0,
                since: 0,
                missed: false,
            }
        });
        Self {
            channels: channels.collect(),
            mailbox: VecDeque::new(),
            calm: false,
            capacity,
            replies: VecDeque::new(),
            fetches: Vec::new(),
            encoder: FrameEncoder::default(),
            random,
            trace,
        }
    }

    /// Somebody publishes.
    pub fn publish(&mut self, channel: usize, data: String, positioned: bool) -> Position {
        self.trace.event("published", channel as u64, positioned);
        self.channels[channel].truth.publish(data, positioned)
    }

    /// The backbone loses a channel's history.
    pub fn renew(&mut self, channel: usize) {
        self.trace.event("new epoch", channel as u64, 0u64);
        let epoch = Epoch(self.random.next() as u32);
        self.channels[channel].truth.renew(epoch);
    }

    /// The shard asks for something.
    pub fn request(&mut self, request: ToRelay) {
        match request {
            ToRelay::Interest { channel: local, name, .. } => {
                let channel = self.channels.iter_mut().find(|channel| channel.truth.name == name).expect("a channel");
                assert_eq!(channel.interest, Interest::None, "interest in {name} twice");
                channel.interest = Interest::Asked(local);
            }
            ToRelay::Disinterest { channel: local, name, .. } => {
                let channel = self.channels.iter_mut().find(|channel| channel.truth.name == name).expect("a channel");
                let held = match channel.interest {
                    Interest::Asked(held) | Interest::Live(held) | Interest::Refused(held) => held == local,
                    Interest::None | Interest::Leaving(_) => false,
                };
                assert!(held, "no interest in {name} to end: {:?}", channel.interest);
                channel.interest = Interest::Leaving(local);
            }
            ToRelay::Publish { request, publish, .. } => {
                let channel = self.channels.iter().position(|channel| channel.truth.name == publish.channel);
                let reply = match self.random.below(8) {
                    0 if !self.calm => Err(RequestError::Unavailable("simulated".into())),
                    1 if !self.calm => Err(RequestError::Overloaded),
                    _ => {
                        let data = String::from_utf8(publish.data.to_vec()).expect("checked at the edge");
                        Ok(self.publish(channel.expect("a channel"), data, true))
                    }
                };
                self.replies.push_back(ToShard::Reply { request, reply: Reply::Published(reply) });
            }
            ToRelay::History { request, query, .. } => {
                self.trace.event("fetch", request, query.since.offset);
                assert!(query.since.offset < query.upto, "nothing is asked for: {query:?}");
                self.fetches.push((request, query));
            }
        }
    }

    /// The shard leaves: what it was told last is in its mailbox no more. The channels that were live.
    pub fn leave(&mut self) -> Vec<Arc<str>> {
        assert!(self.mailbox.is_empty(), "the shard has read everything");
        let mut live = Vec::new();
        for channel in &mut self.channels {
            if let Interest::Live(_) = std::mem::replace(&mut channel.interest, Interest::None) {
                live.push(channel.truth.name.clone());
            }
        }
        live
    }

    /// Makes a channel live for the shard that goes on, from what the node had some time before the other one left: a history,
    /// and then everything since.
    pub fn seed(&mut self, name: &str, local: LocalChannel) -> Vec<ToShard> {
        let Self { channels, random, .. } = self;
        let channel = channels.iter_mut().find(|channel| *channel.truth.name == *name).expect("a channel");
        channel.interest = Interest::Live(local);
        channel.missed = false;
        // From some time of the other shard's life: what it has not had, or had as news, is told as news, and what took no
        // offset is no history.
        let until = random.within(channel.since..=channel.fed);
        channel.fed = channel.log.len();
        channel.since = channel.fed;
        let kept = |frame: &&Arc<Frame>| frame.kind == FrameKind::Publication;
        // No history goes across a gap.
        let gap = channel.log[..until].iter().rposition(|frame| frame.kind == FrameKind::Gap);
        let from = random.within(gap.map_or(0, |gap| gap + 1)..=until);
        let frames = channel.log[from..until].iter().filter(kept).cloned().collect();
        let position = until.checked_sub(1).map_or(channel.base, |last| channel.log[last].position);
        let live = ToShard::Live { channel: local, position, frames };
        let news =
            channel.log[until..].iter().map(|frame| ToShard::Publication { channel: local, frame: frame.clone() });
        std::iter::once(live).chain(news).collect()
    }

    /// Whether the shard has been told everything.
    pub fn quiet(&self) -> bool {
        let settled = |channel: &Channel| match channel.interest {
            Interest::Live(_) => channel.received == channel.truth.records.len() && channel.fed == channel.log.len(),
            Interest::None => true,
            Interest::Asked(_) | Interest::Refused(_) | Interest::Leaving(_) => false,
        };
        self.mailbox.is_empty()
            && self.replies.is_empty()
            && self.fetches.is_empty()
            && self.channels.iter().all(settled)
    }

    /// The relay gets on with its work.
    pub fn work(&mut self, now: Micros) {
        for index in 0..self.channels.len() {
            self.receive(index, now);
            if !self.calm && self.random.once_in(3) {
                continue;
            }
            self.answer(index, now);
            self.feed(index, now);
        }
        for (request, query) in std::mem::take(&mut self.fetches) {
            if self.calm || self.random.once_in(4) {
                let reply = Reply::History(self.fetch(&query, now));
                self.replies.push_back(ToShard::Reply { request, reply });
            } else {
                self.fetches.push((request, query));
            }
        }
        while self.mailbox.len() < self.capacity
            && let Some(reply) = self.replies.pop_front()
        {
            self.mailbox.push_back(reply);
        }
    }

    /// What the backbone still has of a channel's history, when it can be asked.
    fn fetch(&mut self, query: &HistoryQuery, now: Micros) -> Result<Vec<Arc<Frame>>, RequestError> {
        let channel = self.channels.iter().find(|channel| channel.truth.name == query.channel).expect("a channel");
        let faulty = !self.calm;
        if faulty && self.random.once_in(8) {
            self.trace.event("fetch fails", 0u64, 0u64);
            return Err(RequestError::Unavailable("simulated".into()));
        }
        if channel.truth.position().epoch != query.since.epoch {
            self.trace.event("fetch of another epoch", 0u64, 0u64);
            return Ok(Vec::new());
        }
        // The oldest may be gone, or all of it.
        let wanted = query.since.offset..query.upto;
        let gone =
            if faulty && self.random.once_in(4) { self.random.below(wanted.clone().count() + 1) as u64 } else { 0 };
        self.trace.event(if gone > 0 { "fetched a part" } else { "fetched" }, query.since.offset, query.upto);
        let mut blocks = ChannelBlocks::default();
        let mut frame = |index: u64| {
            let record = &channel.truth.records[channel.truth.history()[index as usize]];
            let (name, kind) = (&channel.truth.name, FrameKind::Publication);
            Arc::new(self.encoder.encode(&mut blocks, name, kind, record.position, &record.data, now))
        };
        Ok(wanted.skip(gone as usize).map(&mut frame).collect())
    }

    /// Takes in what the backbone has for a channel.
    fn receive(&mut self, index: usize, now: Micros) {
        loop {
            let Self { channels, random, trace, calm, .. } = self;
            let channel = &mut channels[index];
            let calm = *calm;
            let position = channel.position;
            let Some(record) = channel.truth.records.get(channel.received) else {
                // A new epoch may be heard of before anything is published in it.
                let head = channel.truth.position();
                if head.epoch != position.epoch && (calm || random.once_in(8)) {
                    self.append(index, FrameKind::Gap, Position { offset: 0, ..head }, now);
                }
                return;
            };
            if !calm && random.once_in(5) {
                return;
            }
            if record.position.epoch != position.epoch {
                let offset = record.position.offset - u64::from(record.positioned);
                let position = Position { offset, ..record.position };
                self.append(index, FrameKind::Gap, position, now);
            } else if !calm && random.once_in(40) {
                // The connection to the backbone breaks, and what came meanwhile has left the history.
                let left = channel.truth.records.len() - channel.received;
                channel.received += 1 + random.below(left);
                let next = channel.truth.position_before(channel.received);
                trace.event("lost by the node", index as u64, channel.received as u64);
                self.append(index, FrameKind::Gap, next, now);
            } else {
                let kind = if record.positioned { FrameKind::Publication } else { FrameKind::Unpositioned };
                channel.received += 1;
                let record = channel.received - 1;
                let (data, position) = (&channel.truth.records[record].data, channel.truth.records[record].position);
                let frame = self.encoder.encode(&mut channel.blocks, &channel.truth.name, kind, position, data, now);
                channel.log.push(Arc::new(frame));
                channel.position = position;
            }
        }
    }

    fn append(&mut self, index: usize, kind: FrameKind, position: Position, now: Micros) {
        let frame = self.gap(index, kind, position, now);
        let channel = &mut self.channels[index];
        channel.log.push(frame);
        channel.position = position;
    }

    fn gap(&mut self, index: usize, kind: FrameKind, position: Position, now: Micros) -> Arc<Frame> {
        let channel = &mut self.channels[index];
        self.trace.event("gap", index as u64, position.offset);
        let data = format!(r#"{{"channel":"{}","lost":true}}"#, channel.truth.name);
        Arc::new(self.encoder.encode(&mut channel.blocks, &channel.truth.name, kind, position, &data, now))
    }

    /// Tells the shard that a channel is live or let go.
    fn answer(&mut self, index: usize, now: Micros) {
        let full = self.mailbox.len() >= self.capacity;
        match self.channels[index].interest {
            Interest::Asked(local) if !full && !self.calm && self.random.once_in(12) => {
                self.trace.event("refused", index as u64, local);
                self.mailbox.push_back(ToShard::Refused { channel: local });
                self.channels[index].interest = Interest::Refused(local);
            }
            Interest::Asked(local) if !full => {
                if self.channels[index].log.is_empty() || self.random.once_in(4) {
                    self.read_history(index, now);
                }
                let channel = &mut self.channels[index];
                let frames = channel.log[channel.log.len() - self.random.below(channel.log.len() + 1)..].to_vec();
                self.trace.event("live", index as u64, frames.len() as u64);
                self.mailbox.push_back(ToShard::Live { channel: local, position: channel.position, frames });
                channel.fed = channel.log.len();
                channel.since = channel.fed;
                channel.missed = false;
                channel.interest = Interest::Live(local);
            }
            Interest::Leaving(channel) if !full => {
                self.trace.event("released", index as u64, channel);
                self.mailbox.push_back(ToShard::Released { channel });
                self.channels[index].interest = Interest::None;
            }
            _ => {}
        }
    }

    /// The node subscribes to the channel anew: it has what the backbone's history has, and knows of nothing before it.
    fn read_history(&mut self, index: usize, now: Micros) {
        let channel = &mut self.channels[index];
        let history = channel.truth.history();
        let from = self.random.below(history.len() + 1);
        channel.log.clear();
        for &record in &history[from..] {
            let record = &channel.truth.records[record];
            let (name, position) = (&channel.truth.name, record.position);
            let kind = FrameKind::Publication;
            let frame = self.encoder.encode(&mut channel.blocks, name, kind, position, &record.data, now);
            channel.log.push(Arc::new(frame));
        }
        channel.received = channel.truth.records.len();
        channel.position = channel.truth.position();
        channel.base = channel.position;
    }

    /// Posts what the shard does not have yet, as far as its mailbox has room.
    fn feed(&mut self, index: usize, now: Micros) {
        let Interest::Live(local) = self.channels[index].interest else { return };
        while self.channels[index].fed < self.channels[index].log.len() {
            if self.mailbox.len() >= self.capacity {
                self.trace.event("mailbox full", index as u64, self.channels[index].fed as u64);
                self.channels[index].missed = true;
                return;
            }
            let fed = self.channels[index].fed;
            if !std::mem::take(&mut self.channels[index].missed) {
                let frame = self.channels[index].log[fed].clone();
                self.mailbox.push_back(ToShard::Publication { channel: local, frame });
                self.channels[index].fed += 1;
                continue;
            }
            // The node may no longer have the oldest of what was missed.
            let log = &self.channels[index].log;
            let kept = if self.random.once_in(2) { fed } else { self.random.within(fed..=log.len()) };
            let mut frames = log[kept..].to_vec();
            if kept > fed && frames.first().is_none_or(|frame| frame.kind != FrameKind::Gap) {
                let position = match frames.first() {
                    None => self.channels[index].position,
                    Some(frame) => {
                        let taken = u64::from(frame.kind == FrameKind::Publication);
                        Position { offset: frame.position.offset - taken, ..frame.position }
                    }
                };
                frames.insert(0, self.gap(index, FrameKind::Gap, position, now));
            }
            self.trace.event("missed", index as u64, frames.len() as u64);
            self.channels[index].fed = self.channels[index].log.len();
            self.mailbox.push_back(ToShard::Missed { channel: local, frames });
        }
    }
}
