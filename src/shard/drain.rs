//! Fan-out: what is due goes to whom it is due to, in batches, and what a socket did not take becomes a cursor.
//!
//! A batch holds at most one send a connection, and the driver carries a whole batch out before anything else is decided.
//! So a send either took everything, which is silent, or its connection is *behind* from a known byte on.

use std::sync::Arc;

use super::connection::{Phase, Place};
use super::core::Core;
use super::disconnect::Disconnect;
use super::sink::{Order, Piece, Short, Sink, Ticket};
use super::subscription::leave_group;
use super::timer::tick_of;
use crate::limits::{
    BYTES_PER_SEND, CHANNELS_PER_TURN, OWN_SENDS_PER_TURN, PIECES_PER_SEND, RECOVERED_BYTES, SENDS_PER_CHANNEL_TURN,
    TAIL_BYTES_PER_BATCH,
};
use crate::log::channel_log::Seq;
use crate::log::channel_table::{ChannelId, Lane, Slot, State};
use crate::log::cursor::Cursor;
use crate::log::frame::{Frame, FrameKind, Micros};

/// One part of a connection's own send.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// Its own bytes.
    Control,
    /// (The rest of) a frame of one of its subscriptions.
    Frame { subscription: u16, seq: Seq, arrived: Micros },
}

/// A send of a batch, by ticket.
#[derive(Debug)]
enum Sent {
    /// One of a group: `frames` of [`Work::pinned`] from `from` on.
    Group { channel: ChannelId, lane: Lane, from: Seq, frames: (u32, u32), members: u32 },
    /// A connection's own: `parts` of [`Work::parts`]. `taken` is what it took when that was not everything.
    Own { slot: Slot, parts: (u32, u32), taken: Option<usize> },
}

/// What was found for a connection's own send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Collected {
    /// Nothing is due to it.
    Nothing,
    /// Something is.
    Some,
    /// Something is, but this batch has no room for it.
    NoRoom,
}

/// What one turn and one send may take: [`crate::limits`], but for the simulation, which makes everything small.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budgets {
    /// See [`OWN_SENDS_PER_TURN`].
    pub own_sends: usize,
    /// See [`CHANNELS_PER_TURN`].
    pub channels: usize,
    /// See [`SENDS_PER_CHANNEL_TURN`].
    pub sends_per_channel: usize,
    /// See [`BYTES_PER_SEND`].
    pub bytes_per_send: usize,
    /// See [`TAIL_BYTES_PER_BATCH`].
    pub tail_bytes: usize,
    /// See [`RECOVERED_BYTES`].
    pub reply_bytes: usize,
}

impl Default for Budgets {
    fn default() -> Self {
        Self {
            own_sends: OWN_SENDS_PER_TURN,
            channels: CHANNELS_PER_TURN,
            sends_per_channel: SENDS_PER_CHANNEL_TURN,
            bytes_per_send: BYTES_PER_SEND,
            tail_bytes: TAIL_BYTES_PER_BATCH,
            reply_bytes: RECOVERED_BYTES,
        }
    }
}

/// Memory of the batch under way; kept between batches so that nothing is allocated for a subscriber.
#[derive(Debug, Default)]
pub struct Work {
    batch: u32,
    sent: Vec<Sent>,
    parts: Vec<(Part, u32)>,
    pieces: Vec<Piece>,
    /// Frames that the batch's sends point into: they outlive it whatever the logs do.
    pinned: Vec<Arc<Frame>>,
    /// Event names and ids made for streams of many channels. Never grows within a batch: sends point into it.
    tails: Vec<u8>,
    /// No room for another id in this batch.
    tails_full: bool,
    /// Where each subscription of the connection being gathered for will be after the send.
    progress: Vec<Option<Cursor>>,
    shorts: Vec<Short>,
    /// Connections whose group lapsed: shed once the batch is settled.
    lapsed: Vec<Slot>,
}

impl Core {
    /// Sends what is due, within the turn's budgets. True when something is left for the next turn.
    pub fn drain<S: Sink>(&mut self, sink: &mut S) -> bool {
        self.begin_batch();
        let now = sink.now();
        for _ in 0..self.ready.len().min(self.budgets.own_sends) {
            if let Some(slot) = self.ready.pop_front() {
                self.gather(slot, sink, now);
            }
        }
        // Settled before any group is served: a group's send may not overtake a connection's own.
        self.settle(sink);
        for _ in 0..self.due.len().min(self.budgets.channels) {
            if let Some(id) = self.due.pop_front()
                && self.fan_out(id, sink, now)
            {
                self.due.push_back(id);
            }
        }
        self.settle(sink);
        while let Some(slot) = self.work.lapsed.pop() {
            if self.connections.contains(slot as usize) {
                self.shed(slot, Disconnect::Slow, now);
            }
        }
        !self.ready.is_empty() || !self.due.is_empty()
    }

    fn begin_batch(&mut self) {
        self.work.batch = self.work.batch.wrapping_add(1).max(1);
    }

    /// Fans the due frames of one channel out to its groups. True when the budget ran out before everyone was served.
    fn fan_out<S: Sink>(&mut self, id: ChannelId, sink: &mut S, now: Micros) -> bool {
        let Some(channel) = self.channels.get_mut(id) else { return false };
        let State::Live(log) = &channel.state else {
            channel.due = false;
            return false;
        };
        let head = log.head();
        let moved = std::mem::replace(&mut channel.woken, head) < head;
        let mut budget = self.budgets.sends_per_channel;
        let mut more = false;
        for lane in Lane::ALL {
            if moved && !planted!(WakeForgotten) {
                self.wake(id, lane);
            }
            if lane.shares() {
                more |= self.serve_group(id, lane, &mut budget, sink, now);
            }
        }
        if let Some(channel) = self.channels.get_mut(id) {
            channel.due = more;
        }
        more
    }

    /// Queues the connections of a lane that wait with a cursor.
    fn wake(&mut self, id: ChannelId, lane: Lane) {
        let Some(channel) = self.channels.get_mut(id) else { return };
        let woken = channel.group(lane).wake();
        for &slot in &woken {
            let connection = &mut self.connections[slot as usize];
            if let Some(index) = connection.subscription(id)
                && let Place::Waiting { cursor, .. } = connection.subscriptions[index].place
            {
                connection.subscriptions[index].place = Place::Behind(cursor);
                self.queue(slot);
            }
        }
        if let Some(channel) = self.channels.get_mut(id) {
            channel.group(lane).recycle(woken);
        }
    }

    /// Serves one group until it has everything or the budget is spent; true in the second case.
    fn serve_group<S: Sink>(
        &mut self,
        id: ChannelId,
        lane: Lane,
        budget: &mut usize,
        sink: &mut S,
        now: Micros,
    ) -> bool {
        loop {
            let Some(channel) = self.channels.get_mut(id) else { return false };
            let State::Live(log) = &channel.state else { return false };
            let group = &mut channel.groups[lane as usize];
            let from = group.at() + 1;
            let target = match group.pass() {
                Some(pass) => pass.target,
                None if group.members().is_empty() => log.head(),
                None => last_of_send(log.since(from), lane, from, self.budgets.bytes_per_send).unwrap_or(log.head()),
            };
            if group.begin_pass(target).is_none() {
                return false;
            }
            if *budget == 0 {
                return true;
            }
            let first = self.work.pinned.len();
            let held = log.holds(from);
            let gap = lane == Lane::WebSocket && log.get(from).is_some_and(|frame| frame.kind == FrameKind::Gap);
            self.work.pieces.clear();
            if held && !gap {
                self.work.pinned.extend(log.since(from).take((target + 1 - from) as usize).cloned());
                self.work.pieces.extend(self.work.pinned[first..].iter().map(|frame| Piece::from(shared(frame, lane))));
            }
            let staged = (held && !gap).then(|| {
                // SAFETY: the pieces lie in frames that `pinned` keeps until this batch is settled, and frames never change.
                unsafe { sink.stage(&self.work.pieces) }
            });
            let ticket = self.work.sent.len() as Ticket;
            let mut members = 0;
            while *budget > 0 {
                let Some((index, slot)) = group.next_in_pass() else { break };
                let connection = &mut self.connections[slot as usize];
                let busy = connection.blocked || connection.queued || connection.batch == self.work.batch;
                if let (Some(staged), false) = (staged, busy) {
                    connection.batch = self.work.batch;
                    connection.last_sent = tick_of(now);
                    sink.send(slot, staged, ticket);
                    group.served();
                    members += 1;
                    *budget -= 1;
                    continue;
                }
                // It is owed something else first, or needs more than a shared frame: it goes on from a cursor of its own.
                leave_group(&mut self.connections, group, id, index);
                let connection = &mut self.connections[slot as usize];
                if let Some(at) = connection.subscription(id) {
                    connection.subscriptions[at].place = Place::Behind(Cursor::at(from));
                }
                if !held {
                    self.work.lapsed.push(slot);
                } else if !connection.blocked && !connection.queued {
                    connection.queued = true;
                    self.ready.push_back(slot);
                }
            }
            let ended = !group.pass_goes_on();
            if ended {
                group.next_in_pass();
            }
            let frames = (first as u32, self.work.pinned.len() as u32);
            self.work.sent.push(Sent::Group { channel: id, lane, from, frames, members });
            if ended {
                // Whoever waited for the group to arrive may join it now.
                self.wake(id, lane);
            }
            let at_head = self.channels.get(id).and_then(|c| Some(c.groups[lane as usize].at() >= c.log()?.head()));
            if ended && at_head != Some(false) {
                return false;
            }
            if ended {
                // The rest of the log goes out in a send of its own, and a batch holds one send a connection.
                self.settle(sink);
            }
        }
    }

    /// Carries the batch out and takes in what was not sent whole.
    fn settle<S: Sink>(&mut self, sink: &mut S) {
        if self.work.sent.is_empty() {
            self.work.pinned.clear();
            return;
        }
        let mut shorts = std::mem::take(&mut self.work.shorts);
        sink.settle(&mut shorts);
        let now = sink.now();
        let mut sent = std::mem::take(&mut self.work.sent);
        let pinned = std::mem::take(&mut self.work.pinned);
        let parts = std::mem::take(&mut self.work.parts);
        self.recorder.metrics.sends_short.add(shorts.len() as u64);
        for Short { slot, ticket, taken } in shorts.drain(..) {
            match &mut sent[ticket as usize] {
                Sent::Group { channel, lane, from, frames, members } => {
                    *members -= 1;
                    self.recorder.metrics.sends.add(1);
                    if let Ok(taken) = taken {
                        let frames = &pinned[frames.0 as usize..frames.1 as usize];
                        self.cut_off(slot, *channel, *lane, *from, frames, taken);
                    }
                }
                Sent::Own { taken: own, .. } => {
                    *own = Some(*taken.as_ref().unwrap_or(&0));
                    if taken.is_ok() {
                        self.block(slot);
                    }
                }
            }
            if let Err(error) = taken {
                self.broken(slot, &error);
            }
        }
        self.count_groups(&sent, &pinned, now);
        for own in &sent {
            if let Sent::Own { slot, parts: (from, to), taken } = own {
                self.apply(*slot, &parts[*from as usize..*to as usize], *taken, now);
            }
        }
        self.work.shorts = shorts;
        self.work.sent = cleared(sent);
        self.work.pinned = cleared(pinned);
        self.work.parts = cleared(parts);
        self.work.tails.clear();
        self.begin_batch();
    }

    /// Counts the deliveries of the group sends that were taken whole.
    fn count_groups(&mut self, sent: &[Sent], pinned: &[Arc<Frame>], now: Micros) {
        let mut deliveries = 0;
        let mut bytes = 0;
        let mut sends = 0;
        for group in sent {
            let Sent::Group { lane, frames, members, .. } = group else {
                sends += 1;
                continue;
            };
            sends += u64::from(*members);
            for frame in &pinned[frames.0 as usize..frames.1 as usize] {
                deliveries += u64::from(*members);
                bytes += u64::from(*members) * shared(frame, *lane).len() as u64;
                if *members > 0 {
                    self.recorder.latency.saturating_record_n(now.saturating_sub(frame.arrived), u64::from(*members));
                }
            }
        }
        self.recorder.metrics.deliveries.add(deliveries);
        self.recorder.metrics.delivered_bytes.add(bytes);
        self.recorder.metrics.sends.add(sends);
    }

    /// A member's socket took only `taken` bytes of a group's send: it leaves the group and goes on from there.
    fn cut_off(&mut self, slot: Slot, id: ChannelId, lane: Lane, from: Seq, frames: &[Arc<Frame>], taken: usize) {
        let mut cursor = Cursor::at(from);
        let mut left = taken;
        for frame in frames {
            let len = shared(frame, lane).len();
            if left < len {
                break;
            }
            left -= len;
            cursor.next += 1;
        }
        cursor.sent = left as u32;
        self.recorder.metrics.deliveries.add(cursor.next - from);
        self.recorder.metrics.delivered_bytes.add(taken as u64);
        let Some(index) = self.connections.get(slot as usize).and_then(|connection| connection.subscription(id)) else {
            return;
        };
        self.detach(slot, index);
        let connection = &mut self.connections[slot as usize];
        connection.subscriptions[index].place = Place::Behind(cursor);
        connection.cut = (cursor.sent > 0 && !planted!(CutForgotten)).then_some(index as u16);
        self.block(slot);
    }

    /// The socket is full: nothing is sent to it until it says that it takes bytes again.
    fn block(&mut self, slot: Slot) {
        let connection = &mut self.connections[slot as usize];
        if connection.phase != Phase::Closing && !std::mem::replace(&mut connection.blocked, true) {
            self.recorder.metrics.lagging.add(1);
            self.orders.push(Order::AwaitWritable(slot));
        }
    }

    /// The socket refused for good.
    fn broken(&mut self, slot: Slot, error: &std::io::Error) {
        use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, TimedOut};
        let gone = matches!(error.kind(), BrokenPipe | ConnectionReset | ConnectionAborted | NotConnected | TimedOut);
        if self.connections.contains(slot as usize) {
            self.close(slot, if gone { Disconnect::ClientGone } else { Disconnect::WriteError }, true);
        }
    }
}

/// The bytes of a frame that everyone of a lane is sent.
fn shared(frame: &Frame, lane: Lane) -> &[u8] {
    match lane {
        Lane::SseSingle => frame.sse(),
        Lane::SseMany => frame.sse_body(),
        Lane::WebSocket => frame.websocket(),
    }
}

/// The last frame of one send that begins with frame `from`: bounded in bytes and pieces, and it stops before a gap on
/// lanes that announce gaps differently.
fn last_of_send<'a>(frames: impl Iterator<Item = &'a Arc<Frame>>, lane: Lane, from: Seq, most: usize) -> Option<Seq> {
    let mut bytes = 0;
    let mut last = None;
    for (index, frame) in frames.enumerate().take(PIECES_PER_SEND) {
        bytes += shared(frame, lane).len();
        let gap = lane == Lane::WebSocket && frame.kind == FrameKind::Gap;
        if index > 0 && (bytes > most || gap) {
            break;
        }
        last = Some(from + index as u64);
        if gap {
            break;
        }
    }
    last
}

fn cleared<T>(mut memory: Vec<T>) -> Vec<T> {
    memory.clear();
    memory
}

mod own;
#[cfg(test)]
mod tests;
