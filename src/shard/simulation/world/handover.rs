//! A hand-over in the middle of everything: a fresh shard takes the clients over, or fails to.

use std::sync::Arc;

use super::{Client, Deadlines, World, invariants};
use crate::log::channel_log::Bounds;
use crate::log::channel_table::{ChannelId, ChannelTable, Slot};
use crate::metrics::ShardRecorder;
use crate::shard::connection::{Connection, Phase, Place};
use crate::shard::core::Core;
use crate::shard::handover::state::State;
use crate::shard::mailbox::ToRelay;

/// Who holds the channels until the clients are there.
const EXPECTED: usize = usize::MAX;

impl World {
    /// Hands over, when nothing is in the way: nobody is being parted from, opens a stream or waits for the relay.
    pub(super) fn hand_over(&mut self) {
        let now = self.now;
        // The words to leave come behind everything else in the mailbox.
        while let Some(message) = self.relay.mailbox.pop_front() {
            self.core.on_message(message, now);
        }
        let open = |(_, connection): (usize, &Connection)| connection.phase == Phase::Open;
        let idle = self.core.askers().next().is_none() && self.core.orders.is_empty() && self.core.answers.is_empty();
        let ready = idle
            && self.core.connections.iter().all(open)
            && self.core.requests.is_empty()
            && !self.core.waits_for_history()
            && self.clients.iter().all(|client| client.reserved().is_empty());
        if !ready {
            return;
        }
        self.uncounted += self.due();
        let count = self.core.connections();
        let slots = self.core.ready_to_leave(now);
        let states: Vec<Vec<u8>> = slots.iter().map(|&slot| self.core.carried(slot, now).encode()).collect();
        if slots.len() < count || self.random.once_in(3) {
            self.trace.event("hand-over failed", count as u64, 0u64);
            self.core.stay();
            return;
        }
        self.trace.event("hand-over", count as u64, 0u64);
        let sockets = self.kernel.give_away(&slots);
        slots.iter().for_each(|&slot| self.core.moved(slot));
        let recorder = ShardRecorder::new(self.metrics.clone());
        let settings = Arc::new(self.plan.settings.clone());
        self.metrics.channels.set(0);
        self.core = Core::new(0, settings, self.random.next(), recorder);
        self.core.budgets = self.plan.budgets;
        let bounds = Bounds::from(&self.plan.settings.history);
        self.core.channels = ChannelTable::new(Bounds { older_bytes: self.plan.older_bytes, ..bounds });
        self.deadlines = Deadlines::default();

        let held: Vec<(ChannelId, bool)> =
            self.relay.leave().iter().map(|name| self.core.reserve(name, EXPECTED)).collect();
        for request in std::mem::take(&mut self.core.requests) {
            let ToRelay::Interest { channel, name, .. } = request else { panic!("{request:?} of a new shard") };
            for message in self.relay.seed(&name, channel) {
                self.core.on_message(message, now);
            }
        }
        self.core.answers.clear();
        for (state, socket) in states.iter().zip(sockets) {
            let slot: Slot = self.core.vacant_slot();
            self.kernel.take_over(slot, socket);
            let state = State::decode(state).expect("a state of our own");
            assert_eq!(self.core.arrive(state, now), Ok(slot));
        }
        held.iter().for_each(|&(channel, _)| self.core.unreserve(channel));
        self.core.requests.drain(..).for_each(|request| self.relay.request(request));
        let reserved: Vec<ChannelId> = self.clients.iter().flat_map(Client::reserved).copied().collect();
        // A poll may have been answered, which says farewell.
        invariants::check(&self.core, &self.kernel, &reserved, self.plan.small_budgets, self.plan.older_bytes);
    }

    /// Frames that may become own bytes of connections and are not counted as delivered then.
    fn due(&self) -> u64 {
        let mut due = 0;
        for (_, connection) in &self.core.connections {
            for subscription in &connection.subscriptions {
                let channel = self.core.channels.get(subscription.channel).expect("a subscription holds its channel");
                let Some(log) = channel.log() else { continue };
                let next = match subscription.place {
                    Place::Opening => continue,
                    Place::Waiting { cursor, .. } | Place::Behind(cursor) => cursor.next,
                    Place::CaughtUp { index } => channel.groups[connection.lane as usize].sent_to(index) + 1,
                };
                due += (log.head() + 1).saturating_sub(next);
            }
        }
        due
    }
}
