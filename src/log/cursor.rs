//! Cursors: where a subscription that is not caught up goes on.

use super::channel_log::Seq;
use super::frame::{Frame, FrameKind, Micros};
use super::position::{Epoch, Offset, Position};
use crate::settings::LagConfig;

/// The place of a subscription in its channel's log. A caught-up subscription has none: its group's head is its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// Next frame to send.
    pub next: Seq,
    /// Bytes of it that are already sent.
    pub sent: u32,
    /// Frames up to this one were there before the reader came back: they do not count as its lag, or whoever resumes far
    /// behind over a slow line would be shed for it again and again.
    backlog: Seq,
    /// The position the reader came with: it may come from a node that was ahead of this one.
    epoch: Epoch,
    floor: Offset,
}

const _: () = assert!(size_of::<Cursor>() == 32, "held once per subscription");

impl Cursor {
    /// Before frame `next`.
    #[must_use]
    pub const fn at(next: Seq) -> Self {
        Self::of(next, Position { epoch: Epoch(0), offset: 0 })
    }

    /// Before frame `next`, for a reader that has everything up to `seen`.
    #[must_use]
    pub const fn of(next: Seq, seen: Position) -> Self {
        Self { next, sent: 0, backlog: 0, epoch: seen.epoch, floor: seen.offset }
    }

    /// For a reader that comes back while the log's head is at `head`.
    #[must_use]
    pub const fn resuming(self, head: Seq) -> Self {
        Self { backlog: head, ..self }
    }

    /// What the reader came with.
    #[must_use]
    pub const fn came_with(&self) -> Position {
        Position { epoch: self.epoch, offset: self.floor }
    }

    /// How many of the frames still to come were there before the reader came back.
    #[must_use]
    pub const fn backlog(&self) -> u64 {
        (self.backlog + 1).saturating_sub(self.next)
    }

    /// The first frame that counts as its lag.
    #[must_use]
    pub fn lags_from(&self) -> Seq {
        self.next.max(self.backlog + 1)
    }

    /// Before another frame.
    #[must_use]
    pub const fn to(self, next: Seq) -> Self {
        Self { next, sent: 0, ..self }
    }

    /// After its frame.
    #[must_use]
    pub const fn past(self) -> Self {
        self.to(self.next + 1)
    }

    /// Whether the reader came with what lies before a position already.
    #[must_use]
    fn has(&self, reached: Position) -> bool {
        reached.epoch == self.epoch && reached.offset <= self.floor && !planted!(FloorIgnored)
    }

    /// Whether the reader has no use for a frame: it came with the publication, or from after the point where a publication
    /// without an offset was made or a gap ended. A gap that ends exactly where the reader is says something to it: no
    /// publication with an offset is missing, but some without may be.
    #[must_use]
    pub fn skips(&self, frame: &Frame) -> bool {
        match frame.kind {
            FrameKind::Publication => self.has(frame.position),
            FrameKind::Unpositioned | FrameKind::Gap => self.has(frame.position) && frame.position.offset < self.floor,
        }
    }

    /// The position of the reader once the channel is at `reached` for it: its own while that is further.
    #[must_use]
    pub fn position(&self, reached: Position) -> Position {
        if self.has(reached) { Position { epoch: self.epoch, offset: self.floor } } else { reached }
    }
}

/// How far a subscription is behind the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lag {
    /// Frames not yet sent whole.
    pub messages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Age of the oldest of them.
    pub age: Micros,
}

/// How far a subscription may be behind before its connection is shed.
#[derive(Debug, Clone, Copy)]
pub struct LagBounds {
    messages: u64,
    bytes: u64,
    age: Micros,
}

impl From<&LagConfig> for LagBounds {
    fn from(config: &LagConfig) -> Self {
        Self { messages: config.messages, bytes: config.bytes, age: config.age.as_micros() as u64 }
    }
}

impl LagBounds {
    /// Whether a lag is past one of the bounds.
    #[must_use]
    pub fn exceeded_by(&self, lag: Lag) -> bool {
        lag.messages > self.messages || lag.bytes > self.bytes || lag.age > self.age
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::frame::testing::frame;

    #[test]
    fn what_a_reader_came_with_counts_in_its_own_epoch() {
        let at = |epoch, offset| Position { epoch: Epoch(epoch), offset };
        let cursor = Cursor::of(5, at(1, 12));
        let reached = [at(1, 10), at(1, 13), at(2, 3)];
        assert_eq!(reached.map(|reached| cursor.position(reached)), [at(1, 12), at(1, 13), at(2, 3)]);
        let skips = |kind, position| cursor.skips(&frame(kind, position, 0));
        let publication = FrameKind::Publication;
        assert!(skips(publication, at(1, 12)) && !skips(publication, at(1, 13)) && !skips(publication, at(2, 3)));
        for kind in [FrameKind::Unpositioned, FrameKind::Gap] {
            assert!(skips(kind, at(1, 11)) && !skips(kind, at(1, 12)) && !skips(kind, at(2, 3)), "{kind:?}");
        }
        assert!(!Cursor::at(5).skips(&frame(FrameKind::Publication, at(0, 1), 0)));
    }

    #[test]
    fn each_bound_counts_by_itself() {
        let bounds = LagBounds { messages: 10, bytes: 1000, age: 5 };
        assert!(!bounds.exceeded_by(Lag { messages: 10, bytes: 1000, age: 5 }));
        assert!(bounds.exceeded_by(Lag { messages: 11, bytes: 0, age: 0 }));
        assert!(bounds.exceeded_by(Lag { messages: 1, bytes: 1001, age: 0 }));
        assert!(bounds.exceeded_by(Lag { messages: 1, bytes: 1, age: 6 }));
    }
}
