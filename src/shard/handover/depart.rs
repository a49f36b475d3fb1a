//! The connections of a shard that leaves, as the other process is told of them.

use super::super::connection::{Connection, Phase, Place, Protocol, Subscription};
use super::super::core::Core;
use super::super::disconnect::Disconnect;
use super::super::sink::Order;
use super::super::subscription::position_at;
use super::super::timer::{TICK_MILLIS, tick_of};
use super::state::{At, Form, Place as Carried, State, WaitingPoll};
use crate::limits::HANDOVER_DUE_BYTES;
use crate::log::channel_table::{ChannelId, Lane, Slot};
use crate::log::frame::{FrameKind, Micros};
use crate::log::mark::Mark;

impl Core {
    /// Brings every open connection into a form that can be carried and says which they are. One whose place a log has let go
    /// of ends as it would have at its next send.
    pub(in crate::shard) fn ready_to_leave(&mut self, now: Micros) -> Vec<Slot> {
        let open = |(slot, connection): (usize, &Connection)| (connection.phase == Phase::Open).then_some(slot as Slot);
        let mut slots: Vec<Slot> = self.connections.iter().filter_map(open).collect();
        slots.retain(|&slot| {
            let connection = &self.connections[slot as usize];
            if matches!(connection.protocol, Protocol::Poll(_)) {
                // It is answered from positions alone.
                return true;
            }
            for index in 0..connection.subscriptions.len() {
                if self.is_owed(slot, index) {
                    // Its group has not been served yet.
                    self.detach(slot, index);
                }
            }
            if self.connections[slot as usize].subscriptions.iter().any(|subscription| self.lapsed(subscription)) {
                self.shed(slot, Disconnect::Slow, now);
                return false;
            }
            if !self.keep_cut(slot) {
                self.close(slot, Disconnect::Slow, true);
                return false;
            }
            self.keep_due(slot);
            true
        });
        slots
    }

    /// Makes frames that no log of another process need have (those without an offset, and gaps) the connection's own bytes,
    /// together with what comes before them.
    fn keep_due(&mut self, slot: Slot) {
        let mut room = HANDOVER_DUE_BYTES;
        let mut index = 0;
        while index < self.connections[slot as usize].subscriptions.len() {
            if !self.keep_due_of(slot, index, &mut room) {
                // As before a send: the client subscribes again with its position and is told what it missed.
                self.lose_subscription(slot, index);
                continue;
            }
            index += 1;
        }
    }

    /// See [`Core::keep_due`]. False at a gap in a subscription of a WebSocket, which ends it.
    fn keep_due_of(&mut self, slot: Slot, index: usize, room: &mut usize) -> bool {
        let connection = &self.connections[slot as usize];
        let (lane, channel) = (connection.lane, connection.subscriptions[index].channel);
        let Place::Behind(mut cursor) = connection.subscriptions[index].place else { return true };
        let Some(log) = self.channels.get(channel).and_then(|channel| channel.log()) else { return true };
        let mut due = log.since(cursor.next);
        let Some(last) = due.rposition(|frame| frame.kind != FrameKind::Publication) else { return true };
        let frames: Vec<_> = log.since(cursor.next).take(last + 1).cloned().collect();
        for frame in frames {
            if !cursor.skips(&frame) {
                if lane == Lane::WebSocket && frame.kind == FrameKind::Gap {
                    return false;
                }
                let mut bytes = Vec::new();
                self.write_frame(slot, index, &frame, &mut bytes);
                if bytes.len() > *room {
                    return true;
                }
                *room -= bytes.len();
                self.connections[slot as usize].control.extend_from_slice(&bytes);
            }
            cursor = cursor.past();
            self.connections[slot as usize].subscriptions[index].place = Place::Behind(cursor);
        }
        true
    }

    /// Whether frames are due to a subscription that is in its group or waits.
    fn is_owed(&self, slot: Slot, index: usize) -> bool {
        let connection = &self.connections[slot as usize];
        let subscription = &connection.subscriptions[index];
        let Some(channel) = self.channels.get(subscription.channel) else { return false };
        let Some(log) = channel.log() else { return false };
        match subscription.place {
            Place::CaughtUp { index } => channel.groups[connection.lane as usize].sent_to(index) < log.head(),
            Place::Waiting { cursor, .. } => cursor.next <= log.head(),
            Place::Opening | Place::Behind(_) => false,
        }
    }

    /// The state of a connection that is ready to leave.
    pub(in crate::shard) fn carried(&self, slot: Slot, now: Micros) -> State {
        let tick = tick_of(now);
        let connection = &self.connections[slot as usize];
        let name = |id: ChannelId| self.channels.get(id).map_or_else(String::new, |channel| channel.name.to_string());
        let form = match &connection.protocol {
            Protocol::Sse => Form::Sse,
            Protocol::WebSocket(None) => unreachable!("a session is out only while its input is handled"),
            Protocol::WebSocket(Some(session)) => Form::WebSocket(session.carried(tick, name)),
            Protocol::Poll(waiting) => {
                let cursor: Vec<String> = waiting.poll.cursor.iter().map(ToString::to_string).collect();
                Form::Poll(WaitingPoll {
                    cursor: cursor.join(","),
                    known: waiting.poll.known.as_deref().map(Into::into),
                    origin: waiting.poll.origin.as_deref().map(Into::into),
                    left: u64::from(waiting.until.saturating_sub(tick)) * TICK_MILLIS,
                })
            }
        };
        let places = connection.subscriptions.iter().enumerate().map(|(index, subscription)| Carried {
            channel: name(subscription.channel),
            at: self.at(connection, index),
        });
        State {
            form,
            silent: u64::from(tick.saturating_sub(connection.last_sent)) * TICK_MILLIS,
            subscriptions: places.collect(),
            control: connection.control_due().to_vec(),
        }
    }

    fn at(&self, connection: &Connection, index: usize) -> Option<At> {
        let subscription = &connection.subscriptions[index];
        let channel = self.channels.get(subscription.channel)?;
        let log = channel.log()?;
        let (next, cursor) = match subscription.place {
            Place::Opening => return None,
            Place::CaughtUp { index } => (channel.groups[connection.lane as usize].sent_to(index) + 1, None),
            Place::Waiting { cursor, .. } | Place::Behind(cursor) => (cursor.next, Some(cursor)),
        };
        let Mark { position, unpositioned } = log.mark(next);
        // What the reader came with counts only while it is ahead of its place.
        let floor = cursor.filter(|&cursor| position_at(log, cursor) != position).map(|cursor| cursor.came_with());
        Some(At {
            epoch: position.epoch.0,
            offset: position.offset,
            unpositioned,
            floor: floor.map(|floor| (floor.epoch.0, floor.offset)),
            backlog: cursor.map_or(0, |cursor| cursor.backlog()),
        })
    }

    /// The other process did not take the connections: they go on here.
    pub(in crate::shard) fn stay(&mut self) {
        let slots: Vec<Slot> = self.connections.iter().map(|(slot, _)| slot as Slot).collect();
        for slot in slots {
            let connection = &self.connections[slot as usize];
            let behind = |subscription: &Subscription| matches!(subscription.place, Place::Behind(_));
            let owed = !connection.control_due().is_empty() || connection.subscriptions.iter().any(behind);
            if connection.phase == Phase::Open && owed {
                self.queue(slot);
            }
        }
    }

    /// The other process has the connection: it is let go of here, and its peer does not notice.
    pub(in crate::shard) fn moved(&mut self, slot: Slot) {
        let connection = &mut self.connections[slot as usize];
        connection.control = Vec::new();
        connection.control_sent = 0;
        connection.phase = Phase::Closing;
        if std::mem::replace(&mut connection.blocked, false) {
            self.recorder.metrics.lagging.sub(1);
        }
        self.let_go_of_subscriptions(slot);
        self.orders.push(Order::Forget(slot));
    }

    /// No connection is taken any more, and the shard ends with the last.
    pub(in crate::shard) fn stop_quietly(&mut self) {
        self.stopping = true;
    }
}
