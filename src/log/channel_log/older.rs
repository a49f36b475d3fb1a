//! Older frames: what a log holds beyond its bounds for readers who come back from further behind.
//!
//! The backbone's history may reach further back than the log. What lies before the log's tail is fetched once and put in
//! front, with numbers that go on downwards, so readers walk through it into the log as if it had always been there, and
//! share it as they share everything. It goes when the last of them has passed.

use std::sync::Arc;

use super::{Bounds, ChannelLog, Entry, Located};
use crate::limits::OLDER_MILLIS;
use crate::log::channel_log::Seq;
use crate::log::frame::{Frame, FrameKind, Micros};
use crate::log::position::{Offset, Position};

/// How long older frames are held.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kept {
    /// Until then, unless a reader is seen.
    until: Micros,
    /// Until then, whatever is seen: who does not pass within the age of a history will not.
    end: Micros,
}

impl Kept {
    /// Whether they are still held.
    pub(super) fn holds(self, now: Micros) -> bool {
        now <= self.until
    }
}

/// What a reader needs from before a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lack {
    /// What comes after this position,
    pub since: Position,
    /// up to this offset, which is where the log begins.
    pub upto: Offset,
}

impl ChannelLog {
    /// Bytes of one wire format that the older frames take.
    #[must_use]
    pub fn older_bytes(&self) -> u64 {
        match self.older.checked_sub(1).and_then(|last| self.entries.get(last)) {
            Some(last) => last.end - self.bytes_gone,
            None => 0,
        }
    }

    /// Number of the first frame that is not an older one.
    #[must_use]
    pub fn bounded_first(&self) -> Seq {
        self.first + self.older as u64
    }

    /// What a reader at `asked` lacks and the backbone may have. None when the log holds everything that follows, when the
    /// position is of another epoch (the backbone has one at a time), and when it was found out that there is nothing more.
    #[must_use]
    pub fn lacks(&self, asked: Position) -> Option<Lack> {
        let tail = self.tail_position;
        // An announced gap at the very start leads here from nobody knows where.
        let from_nowhere = |entry: &Entry| entry.frame.kind == FrameKind::Gap && entry.frame.position == tail;
        if asked.epoch != tail.epoch
            || self.head_position.epoch != tail.epoch
            || self.entries.front().is_some_and(from_nowhere)
        {
            return None;
        }
        let gone = if self.gone.epoch == tail.epoch { self.gone.offset } else { 0 };
        let since = Position { offset: asked.offset.max(gone), ..asked };
        (since.offset < tail.offset).then_some(Lack { since, upto: tail.offset })
    }

    /// Holds older frames from now on: a reader needs some, or waits for some to be fetched.
    pub fn keep(&mut self, now: Micros, bounds: Bounds) {
        let until = now + OLDER_MILLIS * 1_000;
        self.kept = Some(Kept { until, end: until.saturating_add(bounds.age) });
    }

    /// Holds them on when a position is among them: somebody goes on from there.
    pub fn keep_for(&mut self, asked: Position, now: Micros, bounds: Bounds) {
        if self.older > 0
            && let Located::Here(cursor) = self.locate(asked)
            && cursor.next < self.bounded_first()
        {
            self.keep(now, bounds);
        }
    }

    /// A reader was seen among them.
    pub fn still_read(&mut self, now: Micros) {
        if let Some(kept) = &mut self.kept {
            kept.until = kept.end.min(now + OLDER_MILLIS * 1_000);
        }
    }

    /// Puts fetched publications in front, oldest first: those that lead up to the log without a hole, as far back as the
    /// bound allows. `since` is where the fetch began, so what is not there after it is known to be gone.
    pub fn prepend(&mut self, frames: &[Arc<Frame>], since: Position, bounds: Bounds) {
        let mut newest_first = frames.iter().rev().peekable();
        while newest_first.next_if(|frame| frame.position.offset > self.tail_position.offset).is_some() {}
        for frame in newest_first {
            let follows = frame.position == self.tail_position || planted!(OlderWithHole);
            let bytes = frame.sse().len() as u64;
            if !follows || frame.kind != FrameKind::Publication || self.older_bytes() + bytes > bounds.older_bytes {
                break;
            }
            self.entries.push_front(Entry { frame: frame.clone(), end: self.bytes_gone });
            self.bytes_gone -= bytes;
            self.first -= 1;
            self.older += 1;
            self.tail_position = frame.kind.before(frame.position);
        }
        if self.tail_position.epoch == since.epoch && self.tail_position.offset > since.offset {
            self.gone = self.tail_position;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::FIRST;
    use super::*;
    use crate::log::cursor::Cursor;
    use crate::log::frame::testing::frame;
    use crate::log::position::Epoch;

    const SECOND: Micros = 1_000_000;
    const BOUNDS: Bounds = Bounds { messages: 3, bytes: 1 << 20, age: 60 * SECOND, older_bytes: 1 << 20 };

    fn at(epoch: u32, offset: u64) -> Position {
        Position { epoch: Epoch(epoch), offset }
    }

    fn frames(epoch: u32, offsets: std::ops::RangeInclusive<u64>) -> Vec<Arc<Frame>> {
        offsets.map(|offset| frame(FrameKind::Publication, at(epoch, offset), 0)).collect()
    }

    /// A log of 8, 9 and 10.
    fn log() -> ChannelLog {
        ChannelLog::with_history(at(1, 10), frames(1, 8..=10), 0, BOUNDS)
    }

    fn offsets(log: &ChannelLog, from: Position) -> Vec<u64> {
        match log.locate(from) {
            Located::Here(Cursor { next, .. }) => log.since(next).map(|frame| frame.position.offset).collect(),
            Located::Gone { .. } => vec![],
        }
    }

    #[test]
    fn what_is_fetched_leads_into_the_log() {
        let mut log = log();
        assert_eq!(log.lacks(at(1, 7)), None);
        assert_eq!(log.lacks(at(1, 4)), Some(Lack { since: at(1, 4), upto: 7 }));
        log.keep(0, BOUNDS);
        log.prepend(&frames(1, 5..=7), at(1, 4), BOUNDS);
        assert_eq!(log.lacks(at(1, 4)), None);
        assert_eq!((log.first(), log.bounded_first()), (FIRST - 3, FIRST));
        assert_eq!(offsets(&log, at(1, 4)), [5, 6, 7, 8, 9, 10]);
        assert_eq!(log.position_before(log.first()), at(1, 4));
        assert_eq!(log.lag(log.first(), 0).bytes, log.bytes());
        log.prepend(&frames(1, 2..=7), at(1, 1), BOUNDS);
        assert_eq!(offsets(&log, at(1, 1)), [2, 3, 4, 5, 6, 7, 8, 9, 10]);
    }

    #[test]
    fn what_the_bounds_push_out_is_held_while_somebody_needs_it() {
        let mut log = log();
        log.keep(0, BOUNDS);
        for offset in 11..=14 {
            log.append(frame(FrameKind::Publication, at(1, offset), 0), 0, BOUNDS);
        }
        assert_eq!(offsets(&log, at(1, 7)), [8, 9, 10, 11, 12, 13, 14], "the fetch still finds where it leads to");
        log.prepend(&frames(1, 6..=7), at(1, 5), BOUNDS);
        log.trim(OLDER_MILLIS * 1_000, BOUNDS);
        assert_eq!(log.position_before(log.first()), at(1, 5));
        log.still_read(OLDER_MILLIS * 1_000);
        log.trim(OLDER_MILLIS * 1_000 + 1, BOUNDS);
        assert_eq!(log.position_before(log.first()), at(1, 5));
        log.trim(2 * OLDER_MILLIS * 1_000 + 1, BOUNDS);
        assert_eq!((log.position_before(log.first()), log.older_bytes()), (at(1, 11), 0));
    }

    #[test]
    fn a_reader_that_never_passes_does_not_hold_them_for_ever() {
        let mut log = log();
        log.keep(0, BOUNDS);
        log.prepend(&frames(1, 6..=7), at(1, 5), BOUNDS);
        let mut now = 0;
        while log.locate(at(1, 5)) == Located::Here(Cursor::of(FIRST - 2, at(1, 5))) {
            now += SECOND;
            log.still_read(now);
            log.trim(now, BOUNDS);
            assert!(now <= BOUNDS.age + (OLDER_MILLIS + 1_000) * 1_000, "{now}");
        }
        assert!(now > BOUNDS.age);
    }

    #[test]
    fn what_does_not_lead_up_to_the_log_is_no_use() {
        for wrong in [frames(1, 4..=6), frames(2, 5..=7), Vec::new()] {
            let mut log = log();
            log.keep(0, BOUNDS);
            log.prepend(&wrong, at(1, 3), BOUNDS);
            assert_eq!(log.first(), FIRST, "{wrong:?}");
            assert_eq!(log.lacks(at(1, 3)), None, "and nothing is asked for again");
        }
        let mut log = log();
        let mut holed = frames(1, 3..=4);
        holed.extend(frames(1, 6..=7));
        log.prepend(&holed, at(1, 2), BOUNDS);
        assert_eq!(log.position_before(log.first()), at(1, 5));
        assert_eq!(log.lacks(at(1, 2)), None);
    }

    #[test]
    fn the_bound_on_bytes_cuts_the_oldest() {
        let size = frames(1, 7..=7)[0].sse().len() as u64;
        let bounds = Bounds { older_bytes: 2 * size, ..BOUNDS };
        let mut log = log();
        log.keep(0, bounds);
        log.prepend(&frames(1, 1..=7), at(1, 0), bounds);
        assert_eq!((log.position_before(log.first()), log.older_bytes()), (at(1, 5), 2 * size));
        log.trim(0, bounds);
        assert_eq!(log.position_before(log.first()), at(1, 5), "nothing that was put in falls out again");
        assert_eq!(log.lacks(at(1, 0)), None);
    }

    #[test]
    fn only_the_present_epoch_has_anything_older() {
        let mut log = log();
        assert_eq!(log.lacks(at(2, 1)), None);
        log.append(frame(FrameKind::Gap, at(2, 3), 0), 0, BOUNDS);
        assert_eq!(log.lacks(at(1, 4)), None, "the backbone has left that epoch");
        assert_eq!(log.lacks(at(2, 1)), None, "frames of another epoch lie between");
        let after_gap = ChannelLog::with_history(at(2, 3), vec![frame(FrameKind::Gap, at(2, 3), 0)], 0, BOUNDS);
        assert_eq!(after_gap.lacks(at(2, 1)), None, "what lies before the gap was found to be lost");
    }
}
