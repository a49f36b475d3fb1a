//! The shard's clock and the sweep: every connection is looked at once a second, a slice of them each tick.
//!
//! A connection has no timer of its own: at tens of thousands a shard a timer wheel would cost memory for each, and
//! heartbeats, pongs and lag need no more precision than the second.

use std::ops::Range;

use crate::log::frame::Micros;

/// Ticks of [`TICK_MILLIS`] since the node started. Enough for 13 years.
pub type Tick = u32;

/// Milliseconds in a tick.
pub const TICK_MILLIS: u64 = 100;

/// Ticks until every connection has been looked at.
pub const SWEEP_TICKS: u32 = 10;

/// The tick of a point in time.
#[must_use]
pub fn tick_of(now: Micros) -> Tick {
    (now / (TICK_MILLIS * 1000)) as Tick
}

/// A duration in ticks, rounded up.
#[must_use]
pub fn ticks(duration: std::time::Duration) -> Tick {
    duration.as_millis().div_ceil(u128::from(TICK_MILLIS)).min(u128::from(Tick::MAX / 2)) as Tick
}

/// Which slots are due at a tick.
#[derive(Debug, Default)]
pub struct Sweep {
    last: Tick,
}

impl Sweep {
    /// Moves on to a tick and says which slices of everything that is swept are due: none when the tick has not changed, one
    /// a tick, and each once at most when ticks were missed.
    pub fn advance(&mut self, now: Tick) -> Slices {
        let missed = now.saturating_sub(self.last).min(SWEEP_TICKS);
        self.last = self.last.max(now);
        Slices { now, missed }
    }
}

/// The slices due at a tick.
#[derive(Debug, Clone, Copy)]
pub struct Slices {
    now: Tick,
    missed: u32,
}

impl Slices {
    /// Which of the numbers below `bound` are due.
    pub fn of(self, bound: usize) -> impl Iterator<Item = usize> {
        (0..self.missed).flat_map(move |back| slice(self.now - back, bound))
    }
}

fn slice(tick: Tick, bound: usize) -> Range<usize> {
    let part = (tick % SWEEP_TICKS) as usize;
    let parts = SWEEP_TICKS as usize;
    bound * part / parts..bound * (part + 1) / parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_is_looked_at_once_a_round_however_late_the_ticks_come() {
        for (bound, step) in [(0, 1), (1, 1), (7, 3), (10, 1), (1001, 4), (64, 25)] {
            let mut sweep = Sweep::default();
            let mut seen = vec![0u32; bound];
            let mut now = 20;
            sweep.advance(now);
            for _ in 0..100 {
                now += step;
                sweep.advance(now).of(bound).for_each(|slot| seen[slot] += 1);
            }
            let rounds = 100 * step.min(SWEEP_TICKS) / SWEEP_TICKS;
            assert!(seen.iter().all(|&n| n == rounds), "{bound} {step} {seen:?}");
        }
    }

    #[test]
    fn a_repeated_tick_looks_at_nothing() {
        let mut sweep = Sweep::default();
        assert_eq!(sweep.advance(5).of(100).count(), 50);
        assert_eq!(sweep.advance(5).of(100).count(), 0);
    }
}
