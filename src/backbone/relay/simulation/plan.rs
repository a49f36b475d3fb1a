//! How a seed's world is laid out.

use std::sync::Arc;
use std::time::Duration;

use crate::backbone::relay::bounds::Bounds;
use crate::settings::{HistoryConfig, Settings};
use crate::shard::simulation::random::Random;

/// See the module.
#[derive(Debug)]
pub struct Plan {
    pub channels: Vec<Arc<str>>,
    pub shards: usize,
    /// Times that a storm and a calm follow each other.
    pub storms: usize,
    /// Messages in a mailbox.
    pub mailbox: usize,
    /// Messages from the backbone that wait for the relay.
    pub queue: usize,
    /// Events and requests that the relay takes in one turn at the most.
    pub turn: usize,
    /// Publications in a burst.
    pub burst: usize,
    /// Nothing is lost, and no history changes its epoch, without the relay being told.
    pub loud: bool,
    /// Histories may be shorter than what a failover takes back.
    pub forgetful: bool,
    /// Some publishers keep no history.
    pub holes: bool,
    pub settings: Settings,
    pub bounds: Bounds,
}

impl Plan {
    pub fn new(random: &mut Random) -> Self {
        let forgetful = random.once_in(2);
        let messages = if forgetful { random.within(1..=12) } else { 10_000 };
        let history = HistoryConfig {
            messages,
            bytes: if random.once_in(3) { random.within(1_000..=10_000) } else { 1 << 20 },
            age: Duration::from_millis(random.within(500..=60_000) as u64),
        };
        Self {
            channels: (0..random.within(1..=5)).map(|channel| format!("c{channel}").into()).collect(),
            shards: random.within(1..=3),
            storms: random.within(1..=3),
            mailbox: random.within(1..=12),
            queue: *random.pick(&[2, 5, 1_000]),
            turn: random.within(1..=8),
            burst: random.within(2..=20),
            loud: random.once_in(2),
            forgetful,
            holes: forgetful && random.once_in(2),
            settings: Settings {
                history,
                linger: Duration::from_millis(random.within(1..=3_000) as u64),
                ..Settings::default()
            },
            bounds: Bounds {
                channels: if random.once_in(4) { random.within(1..=4) } else { 1_000 },
                in_flight: random.within(1..=8),
                subscribe_batch: random.within(1..=3),
                reads: random.within(1..=3),
                page: random.within(2..=6),
                older_page: random.within(1..=4),
                older_bytes: 1 << 20,
                older_bytes_most: if random.once_in(3) { 1_000 } else { 1 << 24 },
                pending_messages: random.within(1..=8),
                pending_bytes: random.within(50..=600),
                payload_bytes: 200,
                log_bytes: if random.once_in(3) { random.within(1_000..=20_000) } else { 1 << 24 },
                stale_places: random.within(0..=8),
            },
        }
    }
}
