//! The channels of one shard: their logs, and who stands where in them.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use slab::Slab;

use super::channel_log::{Bounds, ChannelLog, Seq};
use super::frame::{Frame, Micros};
use super::position::{ChannelTag, Position};

/// The shard's number of a channel.
pub type ChannelId = u32;

/// The shard's number of a connection; opaque here.
pub type Slot = u32;

/// How a group's members are sent their frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Lane {
    /// Event streams of one channel: the whole event is shared.
    SseSingle,
    /// Event streams of many channels: the body is shared, the id is the connection's own, so each is sent to by itself and
    /// none joins the group. Polls wait here too: each has an answer of its own.
    SseMany,
    /// WebSocket frames, shared.
    WebSocket,
}

impl Lane {
    /// Every lane.
    pub const ALL: [Lane; 3] = [Lane::SseSingle, Lane::SseMany, Lane::WebSocket];

    /// Whether subscriptions of this lane join a group when they are caught up.
    #[must_use]
    pub fn shares(self) -> bool {
        self != Lane::SseMany
    }
}

/// A fan-out under way: the served members have everything up to `target`, the others up to the group's `at`. Each pass walks
/// the members in the opposite direction of the one before, so that nobody is always the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Last frame of the pass.
    pub target: Seq,
    /// How many members are served: those at the front, or at the back when it walks backward.
    served: u32,
    /// Whether it walks from the last member to the first.
    backward: bool,
}

/// The subscriptions of one lane that have nothing due: the caught-up ones, which share the group's place in the log and
/// have no cursor of their own, and those that wait with a cursor.
#[derive(Debug, Default)]
pub struct Group {
    members: Vec<Slot>,
    /// Every member has been sent every frame up to this one.
    at: Seq,
    pass: Option<Pass>,
    /// The direction of the next pass.
    backward: bool,
    /// Woken when the head moves or a pass ends.
    waiting: Vec<Slot>,
}

/// A member that changed its index because another one left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// Who.
    pub slot: Slot,
    /// Its index now.
    pub index: u32,
}

impl Group {
    /// Members, those that the pass under way has served at one end.
    #[must_use]
    pub fn members(&self) -> &[Slot] {
        &self.members
    }

    /// Subscriptions that wait with a cursor.
    #[must_use]
    pub fn waiting(&self) -> &[Slot] {
        &self.waiting
    }

    /// The last frame that every member has been sent.
    #[must_use]
    pub fn at(&self) -> Seq {
        self.at
    }

    /// The pass under way.
    #[must_use]
    pub fn pass(&self) -> Option<Pass> {
        self.pass
    }

    /// Whether a subscription that has everything before frame `next` may join: no pass is under way and the group stands
    /// at the same place.
    #[must_use]
    pub fn admits(&self, next: Seq) -> bool {
        let here = self.members.is_empty() || self.at + 1 == next || planted!(JoinsAnywhere);
        self.pass.is_none() && here
    }

    /// Adds a member that has everything before frame `next`; [`Group::admits`] must hold. Returns its index.
    pub fn join(&mut self, slot: Slot, next: Seq) -> u32 {
        debug_assert!(self.admits(next));
        self.at = next - 1;
        self.members.push(slot);
        self.members.len() as u32 - 1
    }

    /// The last frame the member of this index was sent.
    #[must_use]
    pub fn sent_to(&self, index: u32) -> Seq {
        match self.pass {
            Some(pass) if (index < self.front(pass)) != pass.backward => pass.target,
            _ => self.at,
        }
    }

    /// How many members lie before the border between those served and those not.
    fn front(&self, pass: Pass) -> u32 {
        if pass.backward { self.members.len() as u32 - pass.served } else { pass.served }
    }

    /// Takes a member out and keeps those already served together. Up to two others move.
    pub fn leave(&mut self, index: u32) -> [Option<Moved>; 2] {
        let mut moved = [None; 2];
        let mut hole = index;
        if let Some(pass) = self.pass
            && !planted!(BorderNotMoved)
        {
            let front = self.front(pass);
            if (index < front) != pass.backward {
                self.pass = Some(Pass { served: pass.served - 1, ..pass });
            }
            if index < front {
                // The last one before the border fills the hole, and the hole moves to the border.
                hole = front - 1;
                if hole != index {
                    self.members[index as usize] = self.members[hole as usize];
                    moved[0] = Some(Moved { slot: self.members[index as usize], index });
                }
            }
        }
        self.members.swap_remove(hole as usize);
        if let Some(&slot) = self.members.get(hole as usize) {
            moved[1] = Some(Moved { slot, index: hole });
        }
        moved
    }

    /// Lets a subscription with a cursor and nothing due wait. Returns its index.
    pub fn wait(&mut self, slot: Slot) -> u32 {
        self.waiting.push(slot);
        self.waiting.len() as u32 - 1
    }

    /// Takes a waiting subscription out; another one may move.
    pub fn stop_waiting(&mut self, index: u32) -> Option<Moved> {
        self.waiting.swap_remove(index as usize);
        self.waiting.get(index as usize).map(|&slot| Moved { slot, index })
    }

    /// Takes every waiting subscription out.
    pub fn wake(&mut self) -> Vec<Slot> {
        std::mem::take(&mut self.waiting)
    }

    /// Gives the memory of [`Group::wake`] back for the next ones to wait.
    pub fn recycle(&mut self, mut empty: Vec<Slot>) {
        if self.waiting.is_empty() {
            empty.clear();
            self.waiting = empty;
        }
    }

    /// Begins or continues the pass towards `head`; `None` when every member has everything.
    pub fn begin_pass(&mut self, head: Seq) -> Option<Pass> {
        if self.pass.is_none() {
            if self.members.is_empty() || self.at >= head {
                self.at = self.at.max(head);
                return None;
            }
            self.pass = Some(Pass { target: head, served: 0, backward: self.backward });
            self.backward = !self.backward;
        }
        self.pass
    }

    /// Whether the pass under way, if there is one, has members left to serve.
    #[must_use]
    pub fn pass_goes_on(&self) -> bool {
        self.pass.is_some_and(|pass| (pass.served as usize) < self.members.len())
    }

    /// The next member of the pass and its index; `None` ends the pass.
    pub fn next_in_pass(&mut self) -> Option<(u32, Slot)> {
        let pass = self.pass?;
        let left = self.members.len() as u32 - pass.served;
        if left == 0 {
            self.at = pass.target;
            self.pass = None;
            return None;
        }
        let index = if pass.backward { left - 1 } else { pass.served };
        Some((index, self.members[index as usize]))
    }

    /// Notes that the member [`Group::next_in_pass`] gave was served.
    pub fn served(&mut self) {
        if let Some(pass) = &mut self.pass {
            pass.served += 1;
        }
    }
}

/// What the shard knows of a channel.
#[derive(Debug)]
pub enum State {
    /// Asked of the relay; these connections and waiting streams hold on until it is live.
    Opening,
    /// Publications arrive.
    Live(ChannelLog),
    /// Nobody is left; the number is kept until the relay has confirmed.
    Closing {
        /// Somebody came back meanwhile: open it again once it is released.
        reopen: bool,
    },
}

/// One channel of a shard.
#[derive(Debug)]
pub struct Channel {
    /// Its name.
    pub name: Arc<str>,
    /// Stands for the name in cursors.
    pub tag: ChannelTag,
    /// Where it is in its life.
    pub state: State,
    /// Caught-up subscriptions, by [`Lane`].
    pub groups: [Group; 3],
    /// Subscriptions and reservations that keep it open.
    pub holds: u32,
    /// Whether it is queued for fan-out.
    pub due: bool,
    /// The head when those that wait were last woken.
    pub woken: Seq,
}

impl Channel {
    fn new(name: Arc<str>) -> Self {
        Self {
            tag: ChannelTag::of(&name),
            name,
            state: State::Opening,
            groups: Default::default(),
            holds: 0,
            due: false,
            woken: 0,
        }
    }

    /// The log, when the channel is live.
    #[must_use]
    pub fn log(&self) -> Option<&ChannelLog> {
        match &self.state {
            State::Live(log) => Some(log),
            State::Opening | State::Closing { .. } => None,
        }
    }

    /// The group of a lane.
    pub fn group(&mut self, lane: Lane) -> &mut Group {
        &mut self.groups[lane as usize]
    }
}

/// What holding or letting go of a channel asks of the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Nothing.
    Unchanged,
    /// Tell it that this shard wants the channel.
    Wanted,
    /// Tell it that this shard does not want it any more.
    Unwanted,
}

/// The channels of one shard, by name and by number.
#[derive(Debug)]
pub struct ChannelTable {
    channels: Slab<Channel>,
    names: FxHashMap<Arc<str>, ChannelId>,
    bounds: Bounds,
    /// See [`ChannelTable::older_bytes`].
    older_bytes: u64,
}

impl ChannelTable {
    /// An empty table whose logs keep to `bounds`.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self { channels: Slab::new(), names: FxHashMap::default(), bounds, older_bytes: 0 }
    }

    /// Channels known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.channels.len()
    }

    /// Whether no channel is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.channels.is_empty()
    }

    /// The number of a channel.
    #[must_use]
    pub fn id_of(&self, name: &str) -> Option<ChannelId> {
        self.names.get(name).copied()
    }

    /// The channel of a number.
    #[must_use]
    pub fn get(&self, id: ChannelId) -> Option<&Channel> {
        self.channels.get(id as usize)
    }

    /// The channel of a number.
    pub fn get_mut(&mut self, id: ChannelId) -> Option<&mut Channel> {
        self.channels.get_mut(id as usize)
    }

    /// Every channel.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (ChannelId, &mut Channel)> {
        self.channels.iter_mut().map(|(id, channel)| (id as ChannelId, channel))
    }

    /// Holds a channel open, making it when it is new.
    pub fn hold(&mut self, name: &Arc<str>) -> (ChannelId, Interest) {
        let id = match self.names.get(name) {
            Some(&id) => id,
            None => {
                let id = self.channels.insert(Channel::new(name.clone())) as ChannelId;
                self.names.insert(name.clone(), id);
                self.channels[id as usize].holds = 1;
                return (id, Interest::Wanted);
            }
        };
        let channel = &mut self.channels[id as usize];
        channel.holds += 1;
        if let State::Closing { reopen } = &mut channel.state {
            *reopen = true;
        }
        (id, Interest::Unchanged)
    }

    /// Holds a channel once more that the caller already holds.
    pub fn hold_again(&mut self, id: ChannelId) {
        self.channels[id as usize].holds += 1;
    }

    /// Lets go of a channel.
    pub fn release(&mut self, id: ChannelId) -> Interest {
        let channel = &mut self.channels[id as usize];
        channel.holds -= 1;
        if channel.holds > 0 {
            return Interest::Unchanged;
        }
        match &mut channel.state {
            State::Closing { reopen } => {
                *reopen = false;
                Interest::Unchanged
            }
            state => {
                if let State::Live(log) = state {
                    self.older_bytes -= log.older_bytes();
                }
                *state = State::Closing { reopen: false };
                channel.groups = Default::default();
                Interest::Unwanted
            }
        }
    }

    /// The relay does not open a channel. [`Interest::Unwanted`] when somebody waits for it: they are to be told, and to let
    /// go of it.
    pub fn refuse(&mut self, id: ChannelId) -> Interest {
        match self.channels.get_mut(id as usize) {
            Some(Channel { state: state @ State::Opening, .. }) => {
                *state = State::Closing { reopen: false };
                Interest::Unwanted
            }
            _ => Interest::Unchanged,
        }
    }

    /// The relay has let go of a channel: forget it, or say that it is wanted again.
    pub fn released(&mut self, id: ChannelId) -> Interest {
        let Some(channel) = self.channels.get_mut(id as usize) else { return Interest::Unchanged };
        match channel.state {
            State::Closing { reopen: true } => {
                channel.state = State::Opening;
                Interest::Wanted
            }
            State::Closing { reopen: false } => {
                self.names.remove(&channel.name);
                self.channels.remove(id as usize);
                Interest::Unchanged
            }
            State::Opening | State::Live(_) => Interest::Unchanged,
        }
    }

    /// A channel is live with this head and history. False when nobody waits for it any more.
    pub fn open(&mut self, id: ChannelId, position: Position, history: Vec<Arc<Frame>>, now: Micros) -> bool {
        let bounds = self.bounds;
        match self.get_mut(id) {
            Some(channel) if matches!(channel.state, State::Opening) => {
                let log = ChannelLog::with_history(position, history, now, bounds);
                // The numbers of an earlier log mean nothing in this one.
                channel.woken = log.head();
                channel.state = State::Live(log);
                true
            }
            _ => false,
        }
    }

    /// Appends a frame to a live channel. True when the channel was not yet queued for fan-out and now is.
    pub fn append(&mut self, id: ChannelId, frame: Arc<Frame>, now: Micros) -> bool {
        if self.change(id, |log, bounds| log.append(frame, now, bounds)).is_none() {
            return false;
        }
        self.get_mut(id).is_some_and(|channel| !std::mem::replace(&mut channel.due, true))
    }

    /// Lets age push frames out of one channel's log.
    pub fn trim(&mut self, id: ChannelId, now: Micros) {
        self.change(id, |log, bounds| log.trim(now, bounds));
    }

    /// See [`ChannelLog::keep`].
    pub fn keep(&mut self, id: ChannelId, now: Micros) {
        self.change(id, |log, bounds| log.keep(now, bounds));
    }

    /// See [`ChannelLog::keep_for`].
    pub fn keep_for(&mut self, id: ChannelId, asked: Position, now: Micros) {
        self.change(id, |log, bounds| log.keep_for(asked, now, bounds));
    }

    /// Notes that a subscription stands before frame `next`: older frames that it needs are held on.
    pub fn seen(&mut self, id: ChannelId, next: Seq, now: Micros) {
        if let Some(Channel { state: State::Live(log), .. }) = self.get_mut(id)
            && next < log.bounded_first()
        {
            log.still_read(now);
        }
    }

    /// See [`ChannelLog::prepend`].
    pub fn prepend(&mut self, id: ChannelId, frames: &[Arc<Frame>], since: Position) {
        self.change(id, |log, bounds| log.prepend(frames, since, bounds));
    }

    /// Bytes of one wire format that older frames take, over all channels.
    #[must_use]
    pub fn older_bytes(&self) -> u64 {
        self.older_bytes
    }

    /// Changes the log of a channel, if it is live.
    fn change<T>(&mut self, id: ChannelId, change: impl FnOnce(&mut ChannelLog, Bounds) -> T) -> Option<T> {
        let bounds = self.bounds;
        let Some(Channel { state: State::Live(log), .. }) = self.channels.get_mut(id as usize) else { return None };
        let before = log.older_bytes();
        let outcome = change(log, bounds);
        self.older_bytes = self.older_bytes - before + log.older_bytes();
        Some(outcome)
    }

    /// Upper bound of the numbers in use.
    #[must_use]
    pub fn id_bound(&self) -> ChannelId {
        self.channels.capacity() as ChannelId
    }
}

#[cfg(test)]
mod tests;
