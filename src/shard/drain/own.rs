//! Sends of a connection's own: the rest of a cut frame, its own bytes, and what is due to cursors that no group shares.

use std::sync::Arc;

use super::super::connection::{Connection, Phase, Place, Protocol};
use super::super::core::Core;
use super::super::disconnect::Disconnect;
use super::super::session::write_message;
use super::super::sink::{Piece, Sink, Ticket};
use super::super::subscription::position_at;
use super::super::timer::tick_of;
use super::{Collected, Part, Sent, Work, shared};
use crate::limits::PIECES_PER_SEND;
use crate::log::channel_table::{ChannelTable, Lane, Slot};
use crate::log::frame::{Frame, FrameKind, Micros};
use crate::log::position::{CURSOR_ENTRY_BYTES, CursorEntry, Position, write_entry};
use crate::wire::{centrifugo, sse};

impl Core {
    /// Builds one connection's own send: the rest of a cut frame, its own bytes, then what is due to each subscription.
    pub(super) fn gather<S: Sink>(&mut self, slot: Slot, sink: &mut S, now: Micros) {
        let Some(connection) = self.connections.get_mut(slot as usize) else { return };
        connection.queued = false;
        if connection.blocked || matches!(connection.phase, Phase::HalfClosed { .. } | Phase::Closing) {
            return;
        }
        if connection.batch == self.work.batch {
            self.queue(slot);
            return;
        }
        if connection.phase == Phase::Open && matches!(connection.protocol, Protocol::Poll(_)) {
            // Something came for it. Its answer ends it, and is sent as the rest of any farewell.
            self.answer_poll(slot, false, now);
            return;
        }
        if connection.phase == Phase::Open && !self.prepare(slot, now) {
            return;
        }
        let mut first = self.work.parts.len();
        let mut collected = self.collect(slot);
        if collected == Collected::NoRoom || (collected == Collected::Some && !self.send_collected(slot, sink)) {
            // The batch is full: carry it out and begin the next one with this connection.
            self.work.parts.truncate(first);
            self.settle(sink);
            first = self.work.parts.len();
            collected = self.collect(slot);
            if collected == Collected::Some && !self.send_collected(slot, sink) {
                unreachable!("an empty batch has room for one send");
            }
        }
        if collected != Collected::Some {
            self.rest(slot);
            return;
        }
        let connection = &mut self.connections[slot as usize];
        connection.batch = self.work.batch;
        connection.last_sent = tick_of(now);
        let parts = (first as u32, self.work.parts.len() as u32);
        self.work.sent.push(Sent::Own { slot, parts, taken: None });
    }

    fn send_collected<S: Sink>(&mut self, slot: Slot, sink: &mut S) -> bool {
        let ticket = self.work.sent.len() as Ticket;
        // SAFETY: the pieces lie in frames that `pinned` keeps, in `tails`, which does not grow within a batch, and in the
        // connection's `control`, which nothing changes before the batch is settled: gathering touches only the connection
        // it gathers for, and own sends are settled before groups are served.
        unsafe { sink.send_own(slot, &self.work.pieces, ticket) }
    }

    /// Before a send: subscriptions whose place is lost are told so. False when the connection itself ends.
    fn prepare(&mut self, slot: Slot, now: Micros) -> bool {
        let mut index = 0;
        while index < self.connections[slot as usize].subscriptions.len() {
            let connection = &self.connections[slot as usize];
            let subscription = &connection.subscriptions[index];
            if self.lapsed(subscription) {
                self.shed(slot, Disconnect::Slow, now);
                return self.connections[slot as usize].phase != Phase::Closing;
            }
            if let Place::Behind(cursor) = subscription.place
                && let Some(channel) = self.channels.get(subscription.channel)
                && let Some(log) = channel.log()
            {
                let gap = |frame: &Arc<Frame>| frame.kind == FrameKind::Gap && !cursor.skips(frame);
                if connection.lane == Lane::WebSocket && log.get(cursor.next).is_some_and(gap) {
                    // The client subscribes again with its position and is answered `recovered: false`.
                    self.lose_subscription(slot, index);
                    continue;
                }
            }
            index += 1;
        }
        true
    }

    /// Ends a subscription of a WebSocket that cannot go on, and tells the client.
    pub(in crate::shard) fn lose_subscription(&mut self, slot: Slot, index: usize) {
        let channel = self.connections[slot as usize].subscriptions[index].channel;
        let Some(name) = self.channels.get(channel).map(|channel| channel.name.clone()) else { return };
        self.unsubscribe(slot, index);
        let connection = &mut self.connections[slot as usize];
        write_message(&mut connection.control, |out| {
            centrifugo::write_unsubscribe_push(out, &name, centrifugo::UnsubscribeCode::InsufficientState);
        });
    }

    /// Collects the pieces and parts of one connection's send: the rest of a cut frame, its own bytes, then the frames due
    /// to each subscription.
    fn collect(&mut self, slot: Slot) -> Collected {
        let Self { connections, channels, work, budgets, .. } = self;
        let connection = &mut connections[slot as usize];
        work.pieces.clear();
        work.progress.clear();
        if connection.lane == Lane::SseMany && work.tails.capacity() == 0 {
            work.tails.reserve_exact(budgets.tail_bytes);
        }
        work.progress.extend(connection.subscriptions.iter().map(|subscription| match subscription.place {
            Place::Waiting { cursor, .. } | Place::Behind(cursor) => Some(cursor),
            Place::Opening | Place::CaughtUp { .. } => None,
        }));
        let mut budget = budgets.bytes_per_send;
        let parts = work.parts.len();
        if let Some(cut) = connection.cut
            && !planted!(ControlBeforeCut)
            && !push_frame(connection, channels, work, usize::from(cut), &mut budget)
        {
            return Collected::NoRoom;
        }
        let due = connection.control_due();
        if !due.is_empty() {
            work.pieces.push(Piece::from(due));
            work.parts.push((Part::Control, due.len() as u32));
        }
        // From another subscription each time, so that none starves.
        let count = connection.subscriptions.len();
        for step in 0..count {
            let index = (work.batch as usize + step) % count;
            if matches!(connection.subscriptions[index].place, Place::Behind(_)) {
                while push_frame(connection, channels, work, index, &mut budget) {}
            }
        }
        if work.parts.len() > parts {
            Collected::Some
        } else if work.tails_full {
            Collected::NoRoom
        } else {
            Collected::Nothing
        }
    }

    /// Nothing is due to a connection: its subscriptions join their groups or wait, and a farewell that is said is over.
    fn rest(&mut self, slot: Slot) {
        if matches!(self.connections[slot as usize].phase, Phase::Farewell { .. }) {
            self.half_close(slot);
            return;
        }
        for index in 0..self.connections[slot as usize].subscriptions.len() {
            if let Place::Behind(cursor) = self.connections[slot as usize].subscriptions[index].place {
                self.put(slot, index, cursor);
            }
        }
    }

    /// Advances a connection by what its own send took.
    pub(super) fn apply(&mut self, slot: Slot, parts: &[(Part, u32)], taken: Option<usize>, now: Micros) {
        let mut left = taken.unwrap_or(usize::MAX);
        let mut delivered = 0;
        let mut bytes = 0;
        let Some(connection) = self.connections.get_mut(slot as usize) else { return };
        if connection.phase == Phase::Closing {
            return;
        }
        for &(part, len) in parts {
            let took = left.min(len as usize) as u32;
            left = left.saturating_sub(len as usize);
            match part {
                Part::Control => connection.control_done(took),
                Part::Frame { subscription, seq, arrived } => {
                    let index = usize::from(subscription);
                    let Place::Behind(cursor) = &mut connection.subscriptions[index].place else { continue };
                    bytes += u64::from(took);
                    debug_assert_eq!(cursor.next, seq, "only what comes first is skipped");
                    if took == len {
                        *cursor = cursor.past();
                        connection.cut = None;
                        delivered += 1;
                        self.recorder.latency.saturating_record(now.saturating_sub(arrived));
                    } else if took > 0 {
                        cursor.sent += took;
                        connection.cut = Some(subscription);
                    }
                }
            }
            if took < len {
                break;
            }
        }
        self.recorder.metrics.deliveries.add(delivered);
        self.recorder.metrics.delivered_bytes.add(bytes);
        if taken.is_none() {
            // More may be due: it is looked at again, and rests if not.
            self.queue_or_rest(slot);
        }
    }

    fn queue_or_rest(&mut self, slot: Slot) {
        let connection = &self.connections[slot as usize];
        let due = !connection.control_due().is_empty()
            || connection.subscriptions.iter().any(|subscription| match subscription.place {
                Place::Behind(cursor) => self
                    .channels
                    .get(subscription.channel)
                    .and_then(|channel| channel.log())
                    .is_some_and(|log| cursor.next <= log.head()),
                Place::Opening | Place::CaughtUp { .. } | Place::Waiting { .. } => false,
            });
        if due {
            self.queue(slot);
        } else {
            self.rest(slot);
        }
    }

    /// Writes a frame as a connection is sent it, whole.
    pub(in crate::shard) fn write_frame(&self, slot: Slot, index: usize, frame: &Frame, out: &mut Vec<u8>) {
        let connection = &self.connections[slot as usize];
        out.extend_from_slice(shared(frame, connection.lane));
        if connection.lane != Lane::SseMany {
            return;
        }
        let Some(channel) = self.channels.get(connection.subscriptions[index].channel) else { return };
        let entries = connection.subscriptions.iter().enumerate().filter_map(|(i, subscription)| {
            let tag = self.channels.get(subscription.channel)?.tag;
            let reached = self.position_of(connection.lane, subscription)?;
            Some((tag, if i == index { frame.position } else { reached }))
        });
        write_tail(out, &channel.name, frame.kind, entries);
    }
}

/// What ends an event of a stream of many channels: its channel, and the position of every channel once it is seen.
fn write_tail(
    out: &mut Vec<u8>,
    name: &str,
    kind: FrameKind,
    entries: impl Iterator<Item = (crate::log::position::ChannelTag, Position)>,
) {
    if kind != FrameKind::Gap {
        sse::write_event_name(out, name);
    }
    sse::write_id(out, |out| {
        for (index, (tag, position)) in entries.enumerate() {
            if index > 0 {
                out.push(b',');
            }
            write_entry(out, CursorEntry { tag, position });
        }
    });
    sse::end_event(out);
}

/// Adds the next frame due to one subscription. False when none is, or when the send or the batch is full.
fn push_frame(
    connection: &mut Connection,
    channels: &ChannelTable,
    work: &mut Work,
    index: usize,
    budget: &mut usize,
) -> bool {
    let lane = connection.lane;
    let subscription = &mut connection.subscriptions[index];
    let Some(mut cursor) = work.progress[index] else { return false };
    let Some(channel) = channels.get(subscription.channel) else { return false };
    let Some(log) = channel.log() else { return false };
    let frame = loop {
        let Some(frame) = log.get(cursor.next) else { return false };
        if !cursor.skips(frame) || cursor.sent > 0 {
            break frame;
        }
        // What a reader came with is one run at the start of what follows: nothing of this send lies before it.
        debug_assert_eq!(subscription.place, Place::Behind(cursor));
        cursor = cursor.past();
        subscription.place = Place::Behind(cursor);
        work.progress[index] = Some(cursor);
    };
    let gap = lane == Lane::WebSocket && frame.kind == FrameKind::Gap;
    if gap || *budget == 0 || work.pieces.len() + 3 > PIECES_PER_SEND {
        return false;
    }
    let (body, mut skip) = (shared(frame, lane), cursor.sent as usize);
    let mut len = body.len() - skip.min(body.len());
    if lane == Lane::SseMany {
        let most = 16 + channel.name.len() + connection.subscriptions.len() * (CURSOR_ENTRY_BYTES + 1);
        work.tails_full = work.tails.capacity() - work.tails.len() < most;
        if work.tails_full {
            return false;
        }
        if skip < body.len() {
            work.pieces.push(Piece::from(&body[skip..]));
        }
        skip = skip.saturating_sub(body.len());
        work.progress[index] = Some(cursor.past());
        let tail = work.tails.len();
        let entries = connection.subscriptions.iter().zip(&work.progress).filter_map(|(subscription, cursor)| {
            let channel = channels.get(subscription.channel)?;
            Some((channel.tag, position_at(channel.log()?, (*cursor)?)))
        });
        write_tail(&mut work.tails, &channel.name, frame.kind, entries);
        work.pieces.push(Piece::from(&work.tails[tail + skip..]));
        len += work.tails.len() - tail - skip;
    } else {
        work.pieces.push(Piece::from(&body[skip..]));
        work.progress[index] = Some(cursor.past());
    }
    work.pinned.push(frame.clone());
    let part = Part::Frame { subscription: index as u16, seq: cursor.next, arrived: frame.arrived };
    work.parts.push((part, len as u32));
    *budget = budget.saturating_sub(len);
    true
}
