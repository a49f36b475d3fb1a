//! What must have happened after so much time: whoever lags is shed, a farewell ends, silence is broken, and logs forget.

use rustc_hash::FxHashMap;

use crate::log::frame::Micros;
use crate::shard::connection::{Connection, ConnectionId, Phase, Place, Protocol};
use crate::shard::core::Core;
use crate::shard::timer::{SWEEP_TICKS, TICK_MILLIS, tick_of, ticks};

/// Every connection and channel is looked at once in [`SWEEP_TICKS`]; one whose slice moves because the table grew, a
/// round later.
const ROUNDS: u32 = 2 * SWEEP_TICKS + 1;

/// Since when each connection lags more than it may.
#[derive(Debug, Default)]
pub struct Deadlines {
    lagging: FxHashMap<ConnectionId, Micros>,
}

impl Deadlines {
    /// Checks a shard after a turn.
    pub fn check(&mut self, core: &Core, now: Micros) {
        let mut lagging = FxHashMap::default();
        for (slot, connection) in &core.connections {
            let silent = tick_of(now).saturating_sub(connection.last_sent);
            match connection.phase {
                Phase::Open => {
                    // What is due to a poll is read when it is answered: it does not lag.
                    let poll = matches!(connection.protocol, Protocol::Poll(_));
                    if !poll && lags(core, connection, now) {
                        let since = *self.lagging.get(&connection.id).unwrap_or(&now);
                        let most = u64::from(ROUNDS) * TICK_MILLIS * 1000;
                        assert!(now - since <= most, "slot {slot} lags since {since} and is not shed");
                        lagging.insert(connection.id, since);
                    }
                    let quiet =
                        matches!(connection.protocol, Protocol::Sse) && !connection.blocked && !connection.queued;
                    let most = ticks(core.settings.sse.heartbeat) + ROUNDS;
                    assert!(!quiet || silent <= most, "slot {slot} got nothing for {silent} ticks");
                }
                Phase::Farewell { until } | Phase::HalfClosed { until } => {
                    assert!(tick_of(now) <= until + ROUNDS, "slot {slot} says farewell for ever");
                }
                Phase::Closing => {}
            }
        }
        self.lagging = lagging;
        for id in 0..core.channels.id_bound() {
            if let Some(log) = core.channels.get(id).and_then(|channel| channel.log())
                && let Some(oldest) = log.get(log.bounded_first())
            {
                let most = core.settings.history.age.as_micros() as u64 + u64::from(ROUNDS) * TICK_MILLIS * 1000;
                assert!(now - oldest.arrived <= most, "channel {id} holds a frame of {}", oldest.arrived);
            }
        }
    }
}

fn lags(core: &Core, connection: &Connection, now: Micros) -> bool {
    connection.subscriptions.iter().any(|subscription| {
        let log = core.channels.get(subscription.channel).and_then(|channel| channel.log());
        let (Place::Behind(cursor), Some(log)) = (subscription.place, log) else { return false };
        core.lapsed(subscription) || core.lag.exceeded_by(log.lag(cursor.lags_from(), now))
    })
}
