//! Where subscriptions stand: in a group, waiting, or behind with a cursor of their own, and what they have seen.

use std::sync::Arc;

use slab::Slab;

use super::connection::{Connection, Place, Subscription};
use super::core::{Core, OpenWaiter};
use super::mailbox::ToRelay;
use crate::log::channel_log::ChannelLog;
use crate::log::channel_table::{ChannelId, Group, Interest, Lane, Moved, Slot, State};
use crate::log::cursor::Cursor;
use crate::log::position::{CursorEntry, Position, write_entry};

impl Core {
    /// Puts a subscription where its cursor belongs: behind when frames are due, else into the group or to wait.
    pub(super) fn put(&mut self, slot: Slot, index: usize, cursor: Cursor) {
        let connection = &mut self.connections[slot as usize];
        let lane = connection.lane;
        let subscription = &mut connection.subscriptions[index];
        let Some(channel) = self.channels.get_mut(subscription.channel) else { return };
        let State::Live(log) = &channel.state else { return };
        let (head, reached) = (log.head(), log.position());
        if cursor.next <= head {
            subscription.place = Place::Behind(cursor);
            self.queue(slot);
            return;
        }
        let group = channel.group(lane);
        subscription.place = if lane.shares() && cursor.position(reached) == reached && group.admits(cursor.next) {
            Place::CaughtUp { index: group.join(slot, cursor.next) }
        } else {
            Place::Waiting { cursor, index: group.wait(slot) }
        };
    }

    /// Takes a subscription out of its group or the waiting ones and gives it a cursor of its own.
    pub(super) fn detach(&mut self, slot: Slot, index: usize) {
        let connection = &self.connections[slot as usize];
        let lane = connection.lane;
        let Subscription { channel: id, place } = connection.subscriptions[index];
        let Some(channel) = self.channels.get_mut(id) else { return };
        let group = channel.group(lane);
        let cursor = match place {
            Place::Opening | Place::Behind(_) => return,
            Place::CaughtUp { index } => {
                let cursor = Cursor::at(group.sent_to(index) + 1);
                leave_group(&mut self.connections, group, id, index);
                cursor
            }
            Place::Waiting { cursor, index } => {
                if let Some(Moved { slot, index }) = group.stop_waiting(index) {
                    let moved = &mut self.connections[slot as usize];
                    if let Some(at) = moved.subscription(id)
                        && let Place::Waiting { index: place, .. } = &mut moved.subscriptions[at].place
                    {
                        *place = index;
                    }
                }
                cursor
            }
        };
        self.connections[slot as usize].subscriptions[index].place = Place::Behind(cursor);
    }

    /// Ends a subscription and lets go of its channel. It must not be in the middle of a frame: see [`Core::keep_cut`].
    pub(super) fn unsubscribe(&mut self, slot: Slot, index: usize) {
        debug_assert_ne!(self.connections[slot as usize].cut, Some(index as u16));
        if !planted!(ReleasedNotDetached) {
            self.detach(slot, index);
        }
        let connection = &mut self.connections[slot as usize];
        let last = connection.subscriptions.len() - 1;
        if connection.cut == Some(last as u16) {
            connection.cut = Some(index as u16);
        }
        let Subscription { channel, place } = connection.subscriptions.swap_remove(index);
        if place == Place::Opening
            && let Some(waiters) = self.waiters.get_mut(&channel)
        {
            waiters.retain(|&waiter| waiter != OpenWaiter::Subscribe(slot, connection.id));
        }
        self.recorder.metrics.subscriptions.sub(1);
        self.release(channel);
    }

    /// Whether the log has let go of frames that are due to a subscription. One that waits may lapse before it is woken.
    pub(super) fn lapsed(&self, subscription: &Subscription) -> bool {
        let (Place::Behind(cursor) | Place::Waiting { cursor, .. }) = subscription.place else { return false };
        let log = self.channels.get(subscription.channel).and_then(|channel| channel.log());
        log.is_some_and(|log| !log.holds(cursor.next))
    }

    pub(super) fn hold(&mut self, name: &Arc<str>) -> ChannelId {
        let (id, interest) = self.channels.hold(name);
        if interest == Interest::Wanted {
            self.ask_interest(id);
            self.recorder.metrics.channels.set(self.channels.len() as u64);
        }
        id
    }

    pub(super) fn release(&mut self, id: ChannelId) {
        if self.channels.release(id) == Interest::Unwanted {
            self.ask_disinterest(id);
            self.forget_fetch(id);
        }
    }

    pub(super) fn ask_disinterest(&mut self, id: ChannelId) {
        if let Some(channel) = self.channels.get(id) {
            let name = channel.name.clone();
            self.requests.push_back(ToRelay::Disinterest { shard: self.shard, channel: id, name });
        }
    }

    pub(super) fn ask_interest(&mut self, id: ChannelId) {
        if let Some(channel) = self.channels.get(id) {
            let name = channel.name.clone();
            self.requests.push_back(ToRelay::Interest { shard: self.shard, channel: id, name });
        }
    }

    /// The position a subscription has reached.
    pub(super) fn position_of(&self, lane: Lane, subscription: &Subscription) -> Option<Position> {
        let channel = self.channels.get(subscription.channel)?;
        let log = channel.log()?;
        Some(match subscription.place {
            Place::Opening => return None,
            Place::CaughtUp { index } => log.position_before(channel.groups[lane as usize].sent_to(index) + 1),
            Place::Waiting { cursor, .. } | Place::Behind(cursor) => position_at(log, cursor),
        })
    }

    /// Writes the compound cursor of a connection: one entry for each of its channels.
    pub(super) fn write_cursor(&self, slot: Slot, out: &mut Vec<u8>) {
        let connection = &self.connections[slot as usize];
        let mut first = true;
        for subscription in &connection.subscriptions {
            let Some(channel) = self.channels.get(subscription.channel) else { continue };
            let Some(position) = self.position_of(connection.lane, subscription) else { continue };
            if !std::mem::take(&mut first) {
                out.push(b',');
            }
            write_entry(out, CursorEntry { tag: channel.tag, position });
        }
    }
}

/// The position of a reader at a cursor.
pub(super) fn position_at(log: &ChannelLog, cursor: Cursor) -> Position {
    let next = if planted!(HeadInIds) { log.head() + 1 } else { cursor.next };
    cursor.position(log.position_before(next))
}

/// Takes a member out of its group and tells those that moved for it their new indices.
pub(super) fn leave_group(connections: &mut Slab<Connection>, group: &mut Group, id: ChannelId, index: u32) {
    for Moved { slot, index } in group.leave(index).into_iter().flatten() {
        let moved = &mut connections[slot as usize];
        if let Some(at) = moved.subscription(id).filter(|_| !planted!(IndexNotFixed)) {
            moved.subscriptions[at].place = Place::CaughtUp { index };
        }
    }
}
