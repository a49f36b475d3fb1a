//! Decides what follows what. Pure: asked, not told.

use crate::backbone::interface::{Page, Stored, Tag};
use crate::log::position::{Epoch, Offset, Position};

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
    /// Its tag; none before the first of an epoch, or on a backbone without tags.
    pub tag: Option<Tag>,
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
        to: Tip,
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
    if page.head.epoch != last.position.epoch {
        return Repair::OtherEpoch;
    }
    if is_rewound(last, &page) && !planted!(RewindUnnoticed) {
        return Repair::Rewound;
    }
    let full = page.publications.len() >= limit;
    let mut steps = Vec::with_capacity(page.publications.len());
    let mut at = last.position;
    let end = Tip { position: page.head, tag: page.tag };
    follow(&mut at, page.publications, &mut steps);
    let more = full && at.offset < end.position.offset;
    if !more && at.offset < end.position.offset {
        steps.push(Step::Gap { from: at, to: end });
    }
    Repair::Steps { steps, more }
}

/// Whether the last publication delivered is another one in the backbone, or none. Tags say so: its own, or what its
/// successor says of it when its entry has left the history, or what the position's key says of the head. When none of
/// these is there, its successor is gone too, and that is a gap in any case.
fn is_rewound(last: Tip, page: &Page) -> bool {
    let offset = last.position.offset;
    if offset == 0 {
        return false;
    }
    if page.head.offset < offset {
        return true;
    }
    matches!((last.tag, tag_of(page, offset)), (Some(known), Some(there)) if known != there)
}

/// The tag of what the backbone has, or had, at an offset, as far as a page tells.
fn tag_of(page: &Page, offset: Offset) -> Option<Tag> {
    let own = page.publications.iter().find(|stored| stored.offset == offset).and_then(|stored| stored.tag);
    let after = || page.publications.iter().find(|stored| stored.offset == offset + 1)?.previous;
    let head = || page.tag.filter(|_| page.head.offset == offset);
    own.or_else(|| if planted!(LinkIgnored) { None } else { after() })
        .or_else(|| if planted!(HeadIgnored) { None } else { head() })
}

/// What was delivered since the last gap, oldest first and up to the tip, by offset and tag.
#[must_use]
pub fn known_tags(last: Tip, log: impl Iterator<Item = (Offset, Tag)>) -> Vec<(Offset, Tag)> {
    let mut known: Vec<(Offset, Tag)> = log.collect();
    if known.last().is_none_or(|(offset, _)| *offset != last.position.offset)
        && let Some(tag) = last.tag
    {
        known.push((last.position.offset, tag));
    }
    known
}

/// How another epoch stands to what was delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// It has nothing to do with any epoch before: its offsets began with it.
    Fresh,
    /// It and the one that the channel is in go on from the same offsets.
    Shared,
    /// It goes on from the offsets of an epoch that was left for a fresh one.
    Returned,
}

/// Goes over to another epoch: announces the gap, then delivers what the new one has and the channel's subscribers do not.
/// `page` has its newest publications, oldest first, and `known` are the [`known_tags`] of what was delivered.
///
/// Where offsets are shared, nothing up to the last publication that both have is delivered again. Neither is what lies
/// before the known ones, which cannot be told. Of an epoch that was returned to nothing can be told: only the gap is announced.
#[must_use]
pub fn start_over(last: Tip, known: &[(Offset, Tag)], relation: Relation, page: Page) -> Vec<Step> {
    let head = Tip { position: page.head, tag: page.tag };
    let delivered = match relation {
        Relation::Fresh => 0,
        Relation::Shared => shared(last, known, &page),
        Relation::Returned => page.head.offset,
    };
    let epoch: Epoch = page.head.epoch;
    let publications: Vec<Stored> =
        page.publications.into_iter().filter(|s| s.offset > delivered || planted!(DeliveredAgain)).collect();
    let Some(first) = publications.first() else {
        return vec![Step::Gap { from: last.position, to: head }];
    };
    let mut at = Position { epoch, offset: first.offset - 1 };
    let mut steps = vec![Step::Gap { from: last.position, to: Tip { position: at, tag: first.previous } }];
    follow(&mut at, publications, &mut steps);
    if at.offset < page.head.offset {
        steps.push(Step::Gap { from: at, to: head });
    }
    steps
}

/// Up to where an epoch with the same offsets has nothing that was not delivered, or nothing that can be told from it.
fn shared(last: Tip, known: &[(Offset, Tag)], page: &Page) -> Offset {
    let both = known.iter().rev().find(|(offset, tag)| tag_of(page, *offset) == Some(*tag));
    match (both, known.first()) {
        (Some((offset, _)), _) => *offset,
        (None, Some((oldest, _))) => oldest - 1,
        (None, None) => last.position.offset,
    }
}

fn follow(at: &mut Position, publications: Vec<Stored>, steps: &mut Vec<Step>) {
    for stored in publications {
        if stored.offset <= at.offset {
            continue;
        }
        let before = Position { epoch: at.epoch, offset: stored.offset - 1 };
        if before.offset > at.offset {
            steps.push(Step::Gap { from: *at, to: Tip { position: before, tag: stored.previous } });
        }
        at.offset = stored.offset;
        steps.push(Step::Deliver(stored));
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn at(epoch: u32, offset: u64) -> Position {
        Position { epoch: Epoch(epoch), offset }
    }

    /// A publication whose tag is its offset, as is everybody's unless a test says otherwise.
    fn stored(offset: u64) -> Stored {
        tagged(offset, offset, offset - 1)
    }

    fn tagged(offset: u64, tag: u64, previous: u64) -> Stored {
        Stored { offset, tag: Some(Tag(tag)), previous: Some(Tag(previous)), data: Bytes::from(format!("p{offset}")) }
    }

    fn to(epoch: u32, offset: u64) -> Tip {
        Tip { position: at(epoch, offset), tag: Some(Tag(offset)) }
    }

    fn tip(offset: u64) -> Tip {
        to(1, offset)
    }

    fn page(head: u64, offsets: &[u64]) -> Page {
        let publications = offsets.iter().map(|&offset| stored(offset)).collect();
        Page { head: at(1, head), tag: Some(Tag(head)), continues: vec![], publications }
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
        let gap = Step::Gap { from: at(1, 5), to: to(1, 7) };
        assert_eq!(got, [gap, Step::Deliver(stored(8)), Step::Deliver(stored(9))]);
        // All of it, and a hole in the middle.
        assert_eq!(steps(repair(tip(5), page(9, &[]), 10)), [Step::Gap { from: at(1, 5), to: to(1, 9) }]);
        let got = steps(repair(tip(5), page(8, &[6, 8]), 10));
        let gap = Step::Gap { from: at(1, 6), to: to(1, 7) };
        assert_eq!(got, [Step::Deliver(stored(6)), gap, Step::Deliver(stored(8))]);
    }

    #[test]
    fn an_expired_history_without_news_is_no_gap() {
        assert_eq!(steps(repair(tip(5), page(5, &[]), 10)), []);
    }

    #[test]
    fn lost_writes_are_recognised_by_any_trace_of_the_last_publication() {
        assert_eq!(repair(tip(5), page(4, &[4]), 10), Repair::Rewound);
        // The offset was given out again. Its entry is there; or it is gone and the next one's is there; or none is.
        let other = Tip { tag: Some(Tag(99)), ..tip(5) };
        for kept in [&[5, 6][..], &[6]] {
            assert_eq!(repair(other, page(6, kept), 10), Repair::Rewound, "{kept:?}");
        }
        for kept in [&[5][..], &[]] {
            assert_eq!(repair(other, page(5, kept), 10), Repair::Rewound, "{kept:?}");
        }
        // With nothing left to compare there is a gap, as without a failover.
        assert_eq!(steps(repair(other, page(7, &[]), 10)), [Step::Gap { from: at(1, 5), to: to(1, 7) }]);
        let untagged = Tip { tag: None, ..tip(5) };
        assert_eq!(steps(repair(untagged, page(6, &[5, 6]), 10)), [Step::Deliver(stored(6))]);
        let nothing = Tip { tag: None, position: at(1, 0) };
        assert_eq!(steps(repair(nothing, page(1, &[1]), 10)), [Step::Deliver(stored(1))]);
    }

    #[test]
    fn a_fresh_epoch_starts_with_a_gap_and_keeps_what_it_has() {
        let new = Page { head: at(2, 3), ..page(3, &[2, 3]) };
        assert_eq!(repair(tip(5), new.clone(), 10), Repair::OtherEpoch);
        let gap = Step::Gap { from: at(1, 5), to: to(2, 1) };
        let known = [(4, Tag(4)), (5, Tag(5))];
        let got = start_over(tip(5), &known, Relation::Fresh, new);
        assert_eq!(got, [gap, Step::Deliver(stored(2)), Step::Deliver(stored(3))]);
        let empty = Page { head: at(2, 0), tag: None, ..page(0, &[]) };
        let to = Tip { position: at(2, 0), tag: None };
        assert_eq!(start_over(tip(5), &known, Relation::Fresh, empty), [Step::Gap { from: at(1, 5), to }]);
    }

    /// 1 to 5 were replicated, 6 and 7 were lost, and other publications took their offsets before the node came.
    #[test]
    fn a_continued_epoch_delivers_what_is_new_there() {
        let publications = vec![stored(4), stored(5), tagged(6, 60, 5), tagged(7, 70, 60)];
        let new = Page {
            head: at(2, 7),
            tag: Some(Tag(70)),
            continues: vec![Epoch(9), Epoch(1)],
            publications: publications.clone(),
        };
        let deliver = |from: usize| publications[from..].iter().cloned().map(Step::Deliver);
        let known = |offsets: std::ops::RangeInclusive<u64>| offsets.map(|n| (n, Tag(n))).collect::<Vec<_>>();
        let steps = |known: &[(u64, Tag)]| start_over(tip(7), known, Relation::Shared, new.clone());
        let gap = |offset| Step::Gap { from: at(1, 7), to: to(2, offset) };
        assert!(steps(&known(3..=7)).into_iter().eq(std::iter::once(gap(5)).chain(deliver(2))));
        // The node's log begins after what both have: what is not known to be different is not delivered.
        assert!(steps(&known(6..=7)).into_iter().eq(std::iter::once(gap(5)).chain(deliver(2))));
        let gap = |tag| Step::Gap { from: at(1, 7), to: Tip { position: at(2, 6), tag: Some(Tag(tag)) } };
        assert!(steps(&known(7..=7)).into_iter().eq(std::iter::once(gap(60)).chain(deliver(3))));
        let end = Step::Gap { from: at(1, 7), to: Tip { position: at(2, 7), tag: Some(Tag(70)) } };
        assert_eq!(steps(&[]), std::slice::from_ref(&end));
        // Nothing of it can be told by whoever has been in one of its epochs before, and left it.
        assert_eq!(start_over(tip(7), &known(3..=7), Relation::Returned, new.clone()), [end]);
    }

    #[test]
    fn the_last_publication_that_both_have_may_be_known_by_its_link_alone() {
        let publications = vec![tagged(6, 60, 5)];
        let new = Page { head: at(2, 6), tag: Some(Tag(60)), continues: vec![Epoch(1)], publications };
        let got = start_over(tip(5), &[(4, Tag(4)), (5, Tag(5))], Relation::Shared, new);
        assert_eq!(got, [Step::Gap { from: at(1, 5), to: to(2, 5) }, Step::Deliver(tagged(6, 60, 5))]);
    }
}
