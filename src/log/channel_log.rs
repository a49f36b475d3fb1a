//! The log of one channel: queue, replay buffer and lag meter in one.

mod older;

pub use self::older::Lack;

use std::collections::VecDeque;
use std::sync::Arc;

use super::cursor::{Cursor, Lag};
use super::frame::{Frame, FrameKind, Micros};
use super::position::Position;
use crate::limits::OLDER_BYTES;
use crate::settings::HistoryConfig;

use self::older::Kept;

/// Number of a frame in one log: consecutive. Unlike an offset it counts every frame, also those that took no
/// offset and the announcements of gaps, and it means nothing outside the log.
pub type Seq = u64;

/// Number of the first frame appended to a log. Smaller ones are for what is fetched of the time before it, which is far
/// less: each frame has bytes, and [`crate::limits::OLDER_BYTES`] bounds them.
pub const FIRST: Seq = 1 << 32;

/// Where the count of a log's bytes begins, for the same reason.
const FIRST_BYTE: u64 = 1 << 48;

/// What a log keeps.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Frames.
    pub messages: usize,
    /// Bytes of one wire format.
    pub bytes: u64,
    /// Age of the oldest frame.
    pub age: Micros,
    /// Bytes of one wire format beyond these bounds that are held for readers of older frames.
    pub older_bytes: u64,
}

impl From<&HistoryConfig> for Bounds {
    fn from(config: &HistoryConfig) -> Self {
        Self {
            messages: config.messages,
            bytes: config.bytes as u64,
            age: config.age.as_micros() as u64,
            older_bytes: OLDER_BYTES as u64,
        }
    }
}

#[derive(Debug)]
struct Entry {
    frame: Arc<Frame>,
    /// Bytes appended to the log up to and with this frame.
    end: u64,
}

/// Frames in order, each present until the bounds push it out at the tail. The head never waits for a reader.
///
/// While a reader is on its way through frames that the bounds no longer allow, or through fetched ones from before the
/// log, these are held too, within a bound of their own: the *older* frames, always the first ones of the log.
#[derive(Debug)]
pub struct ChannelLog {
    entries: VecDeque<Entry>,
    /// Number of the first frame held; `head + 1` when none is.
    first: Seq,
    /// Position before the first frame held.
    tail_position: Position,
    /// The last frame pushed out had no offset: who stands at the tail's position may lack it.
    pub(super) tail_unpositioned: bool,
    /// Position after the last frame.
    head_position: Position,
    /// Bytes up to the last frame, and up to the first one held; both count from [`FIRST_BYTE`].
    bytes: u64,
    bytes_gone: u64,
    /// How many of the first frames are older ones.
    older: usize,
    /// Until when they are held.
    kept: Option<Kept>,
    /// The backbone has nothing up to here.
    gone: Position,
}

/// Where a returning client's position lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Located {
    /// Everything after it is in the log: go on from this cursor.
    Here(Cursor),
    /// It is of an epoch that is not held, or what followed it was pushed out. A reader that wants what is left of the
    /// present epoch goes on from `rest`.
    Gone {
        /// Oldest position of the present epoch that can be resumed.
        available: Position,
        /// Cursor of the oldest frame after it.
        rest: Cursor,
    },
}

impl ChannelLog {
    /// An empty log of a channel whose head is at `position`.
    #[must_use]
    pub fn new(position: Position) -> Self {
        Self {
            entries: VecDeque::new(),
            first: FIRST,
            tail_position: position,
            tail_unpositioned: false,
            head_position: position,
            bytes: FIRST_BYTE,
            bytes_gone: FIRST_BYTE,
            older: 0,
            kept: None,
            gone: Position::default(),
        }
    }

    /// A log of frames that end at `position`, oldest first.
    #[must_use]
    pub fn with_history(position: Position, frames: Vec<Arc<Frame>>, now: Micros, bounds: Bounds) -> Self {
        let before = match frames.first() {
            Some(frame) => frame.kind.before(frame.position),
            None => position,
        };
        let mut log = Self::new(before);
        for frame in frames {
            log.append(frame, now, bounds);
        }
        log.head_position = position;
        if log.entries.is_empty() {
            log.tail_position = position;
        }
        log
    }

    /// Number of the first frame held; `head() + 1` when none is.
    #[must_use]
    pub fn first(&self) -> Seq {
        self.first
    }

    /// Number of the last frame appended; one less than [`FIRST`] when none ever was.
    #[must_use]
    pub fn head(&self) -> Seq {
        self.first + self.entries.len() as u64 - 1
    }

    /// Position after the last frame.
    #[must_use]
    pub fn position(&self) -> Position {
        self.head_position
    }

    /// Bytes of one wire format held.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes - self.bytes_gone
    }

    /// Appends a frame and pushes out what the bounds no longer allow. Returns its number.
    pub fn append(&mut self, frame: Arc<Frame>, now: Micros, bounds: Bounds) -> Seq {
        self.bytes += frame.sse().len() as u64;
        self.head_position = frame.position;
        self.entries.push_back(Entry { frame, end: self.bytes });
        self.trim(now, bounds);
        self.head()
    }

    /// Pushes out what the bounds no longer allow. The newest frame always stays until its age pushes it out.
    pub fn trim(&mut self, now: Micros, bounds: Bounds) {
        while let Some(oldest) = self.entries.get(self.older) {
            let kept = self.entries.len() - self.older;
            let over = kept > bounds.messages || (self.bytes() - self.older_bytes() > bounds.bytes && kept > 1);
            if !over && now.saturating_sub(oldest.frame.arrived) <= bounds.age {
                break;
            }
            self.older += 1;
        }
        let kept = self.kept.is_some_and(|kept| kept.holds(now));
        while self.older > 0
            && (!kept || self.older_bytes() > bounds.older_bytes)
            && let Some(oldest) = self.entries.pop_front()
        {
            self.tail_position = oldest.frame.position;
            self.tail_unpositioned = oldest.frame.kind == FrameKind::Unpositioned;
            self.bytes_gone = oldest.end;
            self.first += 1;
            self.older -= 1;
        }
        if self.entries.is_empty() {
            // A channel that fell silent gives its memory back: most channels are silent most of the time.
            self.entries = VecDeque::new();
        }
    }

    /// The frame of a number, if the log holds it.
    #[must_use]
    pub fn get(&self, seq: Seq) -> Option<&Arc<Frame>> {
        let index = seq.checked_sub(self.first)?;
        self.entries.get(index as usize).map(|entry| &entry.frame)
    }

    /// The frames from `from` to the head, oldest first; those pushed out are left out.
    pub fn since(&self, from: Seq) -> impl DoubleEndedIterator<Item = &Arc<Frame>> + ExactSizeIterator {
        let skip = from.saturating_sub(self.first).min(self.entries.len() as u64) as usize;
        self.entries.range(skip..).map(|entry| &entry.frame)
    }

    /// The position of a reader that has seen everything before frame `next`.
    #[must_use]
    pub fn position_before(&self, next: Seq) -> Position {
        match next.checked_sub(self.first + 1).and_then(|index| self.entries.get(index as usize)) {
            Some(entry) => entry.frame.position,
            None if next > self.head() => self.head_position,
            None => self.tail_position,
        }
    }

    /// Whether everything from `next` on is still held (invariant 1).
    #[must_use]
    pub fn holds(&self, next: Seq) -> bool {
        self.first <= next + u64::from(planted!(TailOffByOne)) && next <= self.head() + 1
    }

    /// How far a reader whose next frame is `next` is behind the head.
    #[must_use]
    pub fn lag(&self, next: Seq, now: Micros) -> Lag {
        let head = self.head();
        if next > head {
            return Lag::default();
        }
        let Some(entry) = self.entries.get(next.saturating_sub(self.first) as usize) else { return Lag::default() };
        let bytes = self.bytes - (entry.end - entry.frame.sse().len() as u64);
        Lag { messages: head + 1 - next, bytes, age: now.saturating_sub(entry.frame.arrived) }
    }

    /// Finds where a reader at `asked` goes on. A position of an earlier epoch is found too while all that follows is
    /// held: the gap that begins the present epoch is part of it.
    #[must_use]
    pub fn locate(&self, asked: Position) -> Located {
        let Position { epoch, .. } = self.head_position;
        // The frames of one epoch lie together, offsets ascending.
        let begin = self.entries.partition_point(|entry| entry.frame.position.epoch != epoch);
        let had =
            |entry: &Entry| entry.frame.position.epoch == asked.epoch && entry.frame.position.offset <= asked.offset;
        let index = if asked.epoch == epoch {
            self.entries.partition_point(|entry| entry.frame.position.epoch != epoch || had(entry))
        } else {
            self.entries.range(..begin).rposition(had).map_or(0, |last| last + 1)
        };
        // Offsets in the log are consecutive but for announced gaps, so from here on either every publication follows or a
        // gap frame comes first and says what is missing.
        let before = self.position_before(self.first + index as u64);
        if before.epoch == asked.epoch && before.offset <= asked.offset {
            return Located::Here(Cursor::of(self.first + index as u64, asked));
        }
        // What an earlier epoch left is not replayed: the reader may have seen it before it went on elsewhere.
        let rest = self.first + begin as u64;
        match (self.position_before(rest), self.entries.get(begin)) {
            (before, Some(gap)) if before.epoch != epoch => {
                Located::Gone { available: gap.frame.position, rest: Cursor::at(rest + 1) }
            }
            (available, _) => Located::Gone { available, rest: Cursor::at(rest) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::frame::testing::frame;
    use crate::log::position::Epoch;

    const WIDE: Bounds = Bounds { messages: 100, bytes: 1 << 20, age: 1 << 40, older_bytes: 1 << 20 };

    fn at(epoch: u32, offset: u64) -> Position {
        Position { epoch: Epoch(epoch), offset }
    }

    /// The number of the nth frame.
    const fn nth(n: Seq) -> Seq {
        FIRST - 1 + n
    }

    fn log_of(offsets: std::ops::RangeInclusive<u64>, bounds: Bounds) -> ChannelLog {
        let mut log = ChannelLog::new(at(1, offsets.start() - 1));
        for offset in offsets {
            log.append(frame(FrameKind::Publication, at(1, offset), offset), offset, bounds);
        }
        log
    }

    #[test]
    fn the_tail_goes_by_messages_bytes_and_age() {
        let log = log_of(1..=10, Bounds { messages: 4, ..WIDE });
        assert_eq!((log.first(), log.head()), (nth(7), nth(10)));
        let size = log.get(nth(9)).unwrap().sse().len() as u64;
        let log = log_of(1..=9, Bounds { bytes: 3 * size, ..WIDE });
        assert_eq!((log.first(), log.head(), log.bytes()), (nth(7), nth(9), 3 * size));
        let mut log = log_of(1..=10, WIDE);
        log.trim(15, Bounds { age: 8, ..WIDE });
        assert_eq!(log.first(), nth(7));
        log.trim(1000, Bounds { age: 8, ..WIDE });
        assert_eq!((log.first(), log.head(), log.position(), log.bytes()), (nth(11), nth(10), at(1, 10), 0));
    }

    #[test]
    fn lag_counts_messages_bytes_and_age() {
        let log = log_of(1..=10, WIDE);
        assert_eq!(log.lag(nth(11), 50), Lag::default());
        let size: u64 = log.since(nth(8)).map(|frame| frame.sse().len() as u64).sum();
        assert_eq!(log.lag(nth(8), 50), Lag { messages: 3, bytes: size, age: 42 });
    }

    fn here(next: Seq, asked: Position) -> Located {
        Located::Here(Cursor::of(nth(next), asked))
    }

    #[test]
    fn a_position_is_found_while_everything_after_it_is_held() {
        let log = log_of(1..=10, Bounds { messages: 4, ..WIDE });
        for (asked, next) in [(at(1, 10), 11), (at(1, 8), 9), (at(1, 6), 7), (at(1, 12), 11)] {
            assert_eq!(log.locate(asked), here(next, asked));
        }
        let gone = Located::Gone { available: at(1, 6), rest: Cursor::at(nth(7)) };
        assert_eq!(log.locate(at(1, 5)), gone);
        assert_eq!(log.locate(at(2, 8)), gone);
    }

    #[test]
    fn an_empty_log_knows_its_head() {
        let log = ChannelLog::with_history(at(3, 7), Vec::new(), 0, WIDE);
        assert_eq!(log.locate(at(3, 7)), here(1, at(3, 7)));
        assert_eq!(log.locate(at(3, 6)), Located::Gone { available: at(3, 7), rest: Cursor::at(nth(1)) });
        assert_eq!(log.position_before(nth(1)), at(3, 7));
    }

    #[test]
    fn frames_without_an_offset_move_no_position() {
        let mut log = log_of(1..=3, WIDE);
        log.append(frame(FrameKind::Unpositioned, at(1, 3), 4), 4, WIDE);
        log.append(frame(FrameKind::Publication, at(1, 4), 5), 5, WIDE);
        assert_eq!(log.locate(at(1, 3)), here(5, at(1, 3)));
        assert_eq!(log.position_before(nth(5)), at(1, 3));
        assert_eq!(log.head(), nth(5));
    }

    #[test]
    fn a_gap_inside_the_log_is_replayed_as_an_announcement() {
        let mut log = log_of(1..=3, WIDE);
        log.append(frame(FrameKind::Gap, at(1, 8), 4), 4, WIDE);
        log.append(frame(FrameKind::Publication, at(1, 9), 5), 5, WIDE);
        assert_eq!(log.locate(at(1, 5)), here(4, at(1, 5)), "starts with the gap frame");
        assert_eq!(log.locate(at(1, 8)), here(5, at(1, 8)));
        log.append(frame(FrameKind::Gap, at(2, 0), 6), 6, WIDE);
        log.append(frame(FrameKind::Publication, at(2, 1), 7), 7, WIDE);
        assert_eq!(log.locate(at(2, 0)), here(7, at(2, 0)));
    }

    #[test]
    fn an_earlier_epoch_is_resumed_up_to_the_gap_that_ends_it_and_never_replayed() {
        let mut log = log_of(4..=6, WIDE);
        log.append(frame(FrameKind::Gap, at(2, 3), 7), 7, WIDE);
        log.append(frame(FrameKind::Publication, at(2, 4), 8), 8, WIDE);
        for (asked, next) in [(at(1, 3), 1), (at(1, 5), 3), (at(1, 6), 4), (at(1, 9), 4), (at(2, 3), 5), (at(2, 4), 6)]
        {
            assert_eq!(log.locate(asked), here(next, asked));
        }
        let gone = Located::Gone { available: at(2, 3), rest: Cursor::at(nth(5)) };
        for asked in [at(1, 2), at(2, 1), at(3, 1)] {
            assert_eq!(log.locate(asked), gone, "{asked:?}");
        }
        log.trim(20, Bounds { messages: 2, ..WIDE });
        assert_eq!(log.locate(at(2, 1)), gone, "the gap is the oldest frame");
        assert_eq!(log.locate(at(1, 7)), here(4, at(1, 7)));
    }
}
