//! A paced end: everyone is told to go elsewhere, a few at a time, so that whoever takes them in is not overrun.

use std::time::Duration;

use super::connection::{ConnectionId, Phase};
use super::core::Core;
use super::disconnect::Disconnect;
use super::timer::TICK_MILLIS;
use crate::limits::DISMISSAL_PATIENCE_MILLIS;
use crate::log::channel_table::Slot;
use crate::log::frame::Micros;

/// An end under way.
#[derive(Debug)]
pub(super) struct Dismissal {
    from: Micros,
    window: Micros,
    /// Connections there were at the start.
    total: usize,
    /// Those that were not told yet, the next one last.
    left: Vec<(Slot, ConnectionId)>,
    /// When somebody was last told, or nobody had to wait.
    told: Micros,
    /// When this was last looked at.
    looked: Micros,
}

/// Turns follow each other at least this closely, in microseconds: two ticks.
const STILL_MICROS: Micros = 2 * TICK_MILLIS * 1_000;

impl Dismissal {
    /// How many of `total` are to be told by a point in time: evenly over the window, the first at once and the last a
    /// step before its end.
    fn due(&self, now: Micros) -> usize {
        let passed = now.saturating_sub(self.from);
        if passed >= self.window {
            return self.total;
        }
        let due = self.total as u128 * u128::from(passed) / u128::from(self.window);
        (due as usize + 1).min(self.total)
    }
}

impl Core {
    /// Begins to part with everyone at an even pace over `window`, in an order drawn at random; nobody is taken in any more. An
    /// end under way goes on at the new pace with those that are left.
    pub(super) fn dismiss_all(&mut self, window: Duration, now: Micros) {
        let mut left: Vec<_> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.phase == Phase::Open)
            .map(|(slot, connection)| (slot as Slot, connection.id))
            .collect();
        left.sort_unstable_by_key(|&(_, id)| self.draw(id));
        let window = window.as_micros() as Micros;
        self.dismissal = Some(Dismissal { from: now, window, total: left.len(), left, told: now, looked: now });
    }

    /// Whether new connections are taken in.
    #[must_use]
    pub fn admits(&self) -> bool {
        !self.stopping && self.dismissal.is_none()
    }

    /// Tells those whose time has come. Comes after the turn's fan-out: `busy` says that it left something for the next turn, and
    /// then everybody is first given what is due, unless the node is too busy for too long to wait for that. True when
    /// somebody has something to be sent.
    pub fn dismiss(&mut self, busy: bool, now: Micros) -> bool {
        let Some(mut dismissal) = self.dismissal.take() else { return false };
        // A shard that stood still does not catch up in one burst: its window ends later instead.
        dismissal.from += now.saturating_sub(dismissal.looked + STILL_MICROS);
        dismissal.looked = now;
        let late = now.saturating_sub(dismissal.told) >= DISMISSAL_PATIENCE_MILLIS * 1_000;
        let due = if busy && !late { 0 } else { dismissal.due(now) };
        let before = dismissal.left.len();
        while dismissal.total - dismissal.left.len() < due
            && let Some((slot, id)) = dismissal.left.pop()
        {
            if self.connections.get(slot as usize).is_some_and(|connection| connection.id == id) {
                self.shed(slot, Disconnect::Shutdown, now);
            }
        }
        if !busy || dismissal.left.len() < before {
            dismissal.told = now;
        }
        self.dismissal = Some(dismissal);
        !self.ready.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_even_share_is_due_at_each_moment() {
        let dismissal = Dismissal { from: 1_000, window: 100, total: 50, left: Vec::new(), told: 0, looked: 0 };
        let due: Vec<_> = [0, 1_000, 1_010, 1_050, 1_099, 1_100, 9_999].map(|now| dismissal.due(now)).to_vec();
        assert_eq!(due, [1, 1, 6, 26, 50, 50, 50]);
        let none = Dismissal { total: 0, ..dismissal };
        assert_eq!(none.due(1_050), 0);
    }
}
