//! A session that goes on in another process.

use std::sync::Arc;
use std::time::Duration;

use super::super::connection::Subscription;
use super::super::core::{Core, OpenWaiter};
use super::super::handover::state::{Conversation, PendingSubscribe, StateError};
use super::super::timer::{TICK_MILLIS, Tick, ticks};
use super::{Decoder, Pending, Place, Protocol, Session};
use crate::log::channel_table::{ChannelId, Slot};
use crate::log::position::{Epoch, Position};

/// Milliseconds of a number of ticks.
fn millis(ticks: Tick) -> u64 {
    u64::from(ticks) * TICK_MILLIS
}

impl Session {
    /// What the other process needs. `name` says a channel's name.
    pub(in crate::shard) fn carried(&self, tick: Tick, name: impl Fn(ChannelId) -> String) -> Conversation {
        let pending = |pending: &Pending| PendingSubscribe {
            channel: name(pending.channel),
            command: pending.command,
            recovers: pending.recover.is_some(),
            position: pending.recover.flatten().map(|position| (position.epoch.0, position.offset)),
            left: millis(pending.until.saturating_sub(tick)),
            then_unsubscribe: pending.then_unsubscribe,
        };
        Conversation {
            held: self.decoder.held(),
            connected: self.connected,
            opened: millis(tick.saturating_sub(self.opened)),
            pinged: millis(tick.saturating_sub(self.pinged)),
            waits_for_pong: self.waits_for_pong,
            pending: self.pending.iter().map(pending).collect(),
        }
    }

    /// The session in this process, without its subscribe commands: see [`Core::pend`].
    ///
    /// # Errors
    /// When no session could have been in that state.
    pub(in crate::shard) fn arrived(of: &Conversation, tick: Tick) -> Result<Self, StateError> {
        let decoder = Decoder::server_with(of.held.clone()).ok_or(StateError::Impossible("partial message"))?;
        let since = |millis: u64| tick.saturating_sub(ticks(Duration::from_millis(millis)));
        Ok(Self {
            decoder,
            opened: since(of.opened),
            connected: of.connected,
            pending: Vec::new(),
            pinged: since(of.pinged),
            waits_for_pong: of.waits_for_pong,
        })
    }
}

impl Core {
    /// Waits for the channel of a subscribe command that waited in the other process.
    pub(in crate::shard) fn pend(&mut self, slot: Slot, of: PendingSubscribe, tick: Tick) {
        let channel = self.hold(&Arc::from(&*of.channel));
        let position = of.position.map(|(epoch, offset)| Position { epoch: Epoch(epoch), offset });
        let pending = Pending {
            channel,
            command: of.command,
            recover: of.recovers.then_some(position),
            until: tick + ticks(Duration::from_millis(of.left)),
            then_unsubscribe: of.then_unsubscribe,
        };
        let live = self.channels.get(channel).is_some_and(|channel| channel.log().is_some());
        let connection = &mut self.connections[slot as usize];
        connection.subscriptions.push(Subscription { channel, place: Place::Opening });
        self.recorder.metrics.subscriptions.add(1);
        let id = connection.id;
        if let Protocol::WebSocket(Some(session)) = &mut connection.protocol {
            session.pending.push(pending);
        }
        if live {
            self.opened(slot, id, channel);
        } else {
            self.waiters.entry(channel).or_default().push(OpenWaiter::Subscribe(slot, id));
        }
    }
}
