//! Decides what follows what. Pure: asked, not told.

use crate::backbone::interface::{Page, Stored};
use crate::log::position::{Offset, Position};

/// How a position stands to the last one delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It follows.
    Next,
    /// It was delivered before.
    Duplicate,
    /// Something lies between, or it is of another epoch: the history has to be read.
    Jump,
}

/// Judges a publication by its position.
#[must_use]
pub fn judge(last: Position, next: Position) -> Verdict {
    if next.epoch != last.epoch {
        Verdict::Jump
    } else if next.offset <= last.offset {
        Verdict::Duplicate
    } else if next.offset - last.offset == 1 || planted!(JumpTaken) {
        Verdict::Next
    } else {
        Verdict::Jump
    }
}

/// The last publication delivered, as far as needed to recognise it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tip {
    /// Its position.
    pub position: Position,
    /// A digest of its payload; none when nothing of this epoch was delivered.
    pub digest: Option<u64>,
}

/// A digest of a payload, to tell two publications with the same position apart.
#[must_use]
pub fn digest(data: &[u8]) -> u64 {
    use std::hash::Hasher;
    let mut hasher = rustc_hash::FxHasher::default();
    hasher.write(data);
    hasher.finish()
}

/// What is to be done next on a channel that is being repaired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Deliver a publication: it follows.
    Deliver(Stored),
    /// Announce that what lies between is lost.
    Gap {
        /// The last position delivered.
        from: Position,
        /// Where the channel goes on.
        to: Position,
    },
}

/// What a read of the missed range says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Repair {
    /// Do these; if `more`, the page was full and the rest has to be read.
    Steps { steps: Vec<Step>, more: bool },
    /// The channel is in another epoch: read its newest publications and [`start_over`].
    OtherEpoch,
    /// The epoch is the same but what was delivered is not in it: the backbone lost writes and gave their offsets out again.
    /// Its epoch has to be renewed, or positions would mean two things.
    Rewound,
}

/// Where a read for [`repair`] begins: one before the last publication, so that it is in the page to be compared.
#[must_use]
pub fn read_since(last: Position) -> Offset {
    last.offset.saturating_sub(1)
}

/// Compares what was delivered with a forward read from [`read_since`] of at most `limit` publications.
#[must_use]
pub fn repair(last: Tip, page: Page, limit: usize) -> Repair {
    let Position { epoch, offset } = last.position;
    if page.head.epoch != epoch {
        return Repair::OtherEpoch;
    }
    if page.head.offset < offset {
        return Repair::Rewound;
    }
    if let (Some(known), Some(kept)) = (last.digest, page.publications.first())
        && kept.offset == offset
        && digest(&kept.data) != known
        && !planted!(RewindUnnoticed)
    {
        return Repair::Rewound;
    }
    let full = page.publications.len() >= limit;
    let mut steps = Vec::with_capacity(page.publications.len());
    let mut at = last.position;
    follow(&mut at, page.publications, &mut steps);
    let more = full && at.offset < page.head.offset;
    if !more && at.offset < page.head.offset {
        steps.push(Step::Gap { from: at, to: page.head });
    }
    Repair::Steps { steps, more }
}

/// Goes over to another epoch: announces the gap, then delivers what the new one has. `page` has its newest publications,
/// oldest first.
#[must_use]
pub fn start_over(last: Position, page: Page) -> Vec<Step> {
    let first = page.publications.first().map_or(page.head.offset, |stored| stored.offset - 1);
    let mut at = Position { epoch: page.head.epoch, offset: first };
    let mut steps = vec![Step::Gap { from: last, to: at }];
    follow(&mut at, page.publications, &mut steps);
    if at.offset < page.head.offset {
        steps.push(Step::Gap { from: at, to: page.head });
    }
    steps
}

fn follow(at: &mut Position, publications: Vec<Stored>, steps: &mut Vec<Step>) {
    for stored in publications {
        if stored.offset <= at.offset {
            continue;
        }
        let before = Position { epoch: at.epoch, offset: stored.offset - 1 };
        if before.offset > at.offset {
            steps.push(Step::Gap { from: *at, to: before });
        }
        at.offset = stored.offset;
        steps.push(Step::Deliver(stored));
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::log::position::Epoch;

    fn at(epoch: u32, offset: u64) -> Position {
        Position { epoch: Epoch(epoch), offset }
    }

    fn stored(offset: u64) -> Stored {
        Stored { offset, data: Bytes::from(format!("p{offset}")) }
    }

    fn tip(offset: u64) -> Tip {
        Tip { position: at(1, offset), digest: Some(digest(format!("p{offset}").as_bytes())) }
    }

    fn page(head: u64, offsets: &[u64]) -> Page {
        Page { head: at(1, head), publications: offsets.iter().map(|&offset| stored(offset)).collect() }
    }

    fn steps(repair: Repair) -> Vec<Step> {
        match repair {
            Repair::Steps { steps, more: false } => steps,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_publication_follows_repeats_or_jumps() {
        assert_eq!(judge(at(1, 5), at(1, 6)), Verdict::Next);
        assert_eq!(judge(at(1, 0), at(1, 1)), Verdict::Next);
        assert_eq!(judge(at(1, 5), at(1, 5)), Verdict::Duplicate);
        assert_eq!(judge(at(1, 5), at(1, 1)), Verdict::Duplicate);
        assert_eq!(judge(at(1, 5), at(1, 7)), Verdict::Jump);
        assert_eq!(judge(at(1, 5), at(2, 6)), Verdict::Jump);
        assert_eq!(judge(at(1, 5), at(1, u64::MAX)), Verdict::Jump);
    }

    #[test]
    fn a_missed_range_is_delivered_in_order() {
        let got = steps(repair(tip(5), page(7, &[5, 6, 7]), 10));
        assert_eq!(got, [Step::Deliver(stored(6)), Step::Deliver(stored(7))]);
        assert_eq!(steps(repair(tip(5), page(5, &[5]), 10)), []);
    }

    #[test]
    fn a_full_page_is_followed_by_another() {
        let Repair::Steps { steps, more } = repair(tip(5), page(9, &[5, 6, 7]), 3) else { panic!() };
        assert_eq!(steps.len(), 2);
        assert!(more);
        let Repair::Steps { more, .. } = repair(tip(5), page(7, &[5, 6, 7]), 3) else { panic!() };
        assert!(!more);
    }

    #[test]
    fn what_was_trimmed_is_a_gap() {
        let got = steps(repair(tip(5), page(9, &[8, 9]), 10));
        let gap = Step::Gap { from: at(1, 5), to: at(1, 7) };
        assert_eq!(got, [gap, Step::Deliver(stored(8)), Step::Deliver(stored(9))]);
        // All of it, and a hole in the middle.
        assert_eq!(steps(repair(tip(5), page(9, &[]), 10)), [Step::Gap { from: at(1, 5), to: at(1, 9) }]);
        let got = steps(repair(tip(5), page(8, &[6, 8]), 10));
        let gap = Step::Gap { from: at(1, 6), to: at(1, 7) };
        assert_eq!(got, [Step::Deliver(stored(6)), gap, Step::Deliver(stored(8))]);
    }

    #[test]
    fn an_expired_history_without_news_is_no_gap() {
        assert_eq!(steps(repair(tip(5), page(5, &[]), 10)), []);
    }

    #[test]
    fn lost_writes_are_recognised() {
        assert_eq!(repair(tip(5), page(4, &[4]), 10), Repair::Rewound);
        // The offset was given out again, to another publication.
        let other = Tip { position: at(1, 5), digest: Some(digest(b"another")) };
        assert_eq!(repair(other, page(6, &[5, 6]), 10), Repair::Rewound);
        let unknown = Tip { position: at(1, 5), digest: None };
        assert_eq!(steps(repair(unknown, page(6, &[5, 6]), 10)), [Step::Deliver(stored(6))]);
    }

    #[test]
    fn another_epoch_starts_with_a_gap_and_keeps_what_it_has() {
        let new = Page { head: at(2, 3), publications: vec![stored(2), stored(3)] };
        assert_eq!(repair(tip(5), new.clone(), 10), Repair::OtherEpoch);
        let gap = Step::Gap { from: at(1, 5), to: at(2, 1) };
        assert_eq!(start_over(at(1, 5), new), [gap, Step::Deliver(stored(2)), Step::Deliver(stored(3))]);
        let empty = Page { head: at(2, 0), publications: vec![] };
        assert_eq!(start_over(at(1, 5), empty), [Step::Gap { from: at(1, 5), to: at(2, 0) }]);
    }
}
