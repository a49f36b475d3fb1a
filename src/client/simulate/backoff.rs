//! How clients wait before they connect again, and the random numbers they wait by.

use serde::Serialize;

/// Milliseconds weir tells an `EventSource` to wait (`sse.retry`).
const RETRY_MILLIS: u64 = 2_000;
/// The least and the most that the centrifuge SDKs wait (their defaults `minReconnectDelay` and `maxReconnectDelay`).
const CENTRIFUGE_MILLIS: (u64, u64) = (500, 20_000);

/// How clients come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ClientKind {
    /// A browser's `EventSource`: the wait that the server last advised, the same each time (HTML, section 9.2.3).
    #[value(name = "eventsource")]
    EventSource,
    /// A centrifuge SDK: exponential from half a second up to twenty, with full jitter.
    Centrifuge,
}

impl ClientKind {
    /// Milliseconds until the next attempt, after `failures` attempts since the connection ended. `advised` is what the server
    /// added to this client's `retry:`.
    #[must_use]
    pub fn wait(self, failures: u32, advised: u64, random: &mut Random) -> u64 {
        match self {
            Self::EventSource => RETRY_MILLIS + advised,
            Self::Centrifuge => {
                let (least, most) = CENTRIFUGE_MILLIS;
                let span = least.saturating_mul(1 << failures.min(31)).min(most);
                (least + random.below(span)).min(most)
            }
        }
    }
}

/// Random numbers that a seed repeats (SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators").
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The numbers of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `bound`, and 0 when that is 0. The bias is below one in 2³² for what is asked for here.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % bound.max(1)
    }
}
