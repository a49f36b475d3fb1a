//! A session that goes on in another process.

use std::sync::Arc;
use std::time::Duration;

use super::super::connection::Subscription;
use super::super::core::{Core, OpenWaiter};
use super::super::handover::state::{Conversation, PendingSubscribe, StateError};
use super::super::timer::{TICK_MILLIS, Tick, tick_of, ticks};
use super::{Asks, Decoder, Pending, Place, Protocol, Session};
use crate::log::channel_table::{ChannelId, Slot};
use crate::log::frame::Micros;
use crate::log::position::{Epoch, Position};

/// Milliseconds of a number of ticks.
fn millis(ticks: Tick) -> u64 {
    u64::from(ticks) * TICK_MILLIS
}

impl Session {
    /// What the other process needs. `name` says a channel's name.
    pub(in crate::shard) fn carried(&self, tick: Tick, name: impl Fn(ChannelId) -> String) -> Conversation {
        let pending = |pending: &Pending| {
            // The others are answered before the shard stands still: see `Session::asks_for_history`.
            let Asks::Subscribe { recover, then_unsubscribe } = pending.asks else { return None };
            Some(PendingSubscribe {
                channel: name(pending.channel),
                command: pending.command,
                recovers: recover.is_some(),
                position: recover.flatten().map(|position| (position.epoch.0, position.offset)),
                left: millis(pending.until.saturating_sub(tick)),
                then_unsubscribe,
            })
        };
        Conversation {
            held: self.decoder.held(),
            connected: self.connected,
            opened: millis(tick.saturating_sub(self.opened)),
            pinged: millis(tick.saturating_sub(self.pinged)),
            waits_for_pong: self.waits_for_pong,
            pending: self.pending.iter().filter_map(pending).collect(),
        }
    }

    /// Whether a `history` command waits for its channel.
    pub(in crate::shard) fn asks_for_history(&self) -> bool {
        self.pending.iter().any(|pending| matches!(pending.asks, Asks::History(_)))
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
    pub(in crate::shard) fn pend(&mut self, slot: Slot, of: PendingSubscribe, now: Micros) {
        let tick = tick_of(now);
        let channel = self.hold(&Arc::from(&*of.channel));
        let position = of.position.map(|(epoch, offset)| Position { epoch: Epoch(epoch), offset });
        let pending = Pending {
            channel,
            command: of.command,
            until: tick + ticks(Duration::from_millis(of.left)),
            asks: Asks::Subscribe { recover: of.recovers.then_some(position), then_unsubscribe: of.then_unsubscribe },
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
            self.opened(slot, id, channel, now);
        } else {
            self.waiters.entry(channel).or_default().push(OpenWaiter::Subscribe(slot, id));
        }
    }
}
