//! Marks: a place in a log in words that another log of the same channel understands.
//!
//! Numbers of frames mean nothing outside of their log, and a position names only what took an offset. A mark adds
//! which frames without an offset the reader has had after it, by their digests: the other log may hold them, or only
//! those that came later, and none of them is to be sent again.

use super::channel_log::{ChannelLog, Located, Seq};
use super::cursor::Cursor;
use super::frame::{Frame, FrameKind};
use super::position::Position;
use crate::limits::MARK_FRAMES;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// The position reached.
    pub position: Position,
    /// Digests of what came after it without an offset, up to the place and oldest first: the last [`MARK_FRAMES`] of them.
    pub unpositioned: Vec<u64>,
}

/// 64-bit FNV-1a of a frame's publication: the same in every process that encodes it alike.
fn digest(frame: &Frame) -> u64 {
    let bytes = frame.publication_json();
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

impl ChannelLog {
    /// The mark of the place before frame `next`.
    #[must_use]
    pub fn mark(&self, next: Seq) -> Mark {
        let position = self.position_before(next);
        let before = (self.first()..next).rev().map_while(|seq| self.get(seq));
        let run = before.take_while(|frame| frame.kind == FrameKind::Unpositioned).take(MARK_FRAMES);
        let mut unpositioned: Vec<u64> = run.map(|frame| digest(frame)).collect();
        unpositioned.reverse();
        Mark { position, unpositioned }
    }

    /// Finds the place of a mark: the frame that follows it, when the log holds everything after it. Where frames without an
    /// offset repeat each other so that the place is not clear, the earlier one: better once more than not at all.
    #[must_use]
    pub fn find(&self, mark: &Mark) -> Located {
        let Some((from, to)) = self.run_of(mark.position) else { return self.locate(mark.position) };
        let held: Vec<u64> = self.since(from).take((to - from) as usize).map(|frame| digest(frame)).collect();
        let had = &mark.unpositioned;
        let mut best = (0, 0);
        for seen in 1..=held.len() {
            let common = held[..seen].iter().rev().zip(had.iter().rev()).take_while(|(a, b)| a == b).count();
            // Either all that is held before the place was seen, or all that the mark names lies before it.
            if (common == seen || common == had.len()) && common > best.1 {
                best = (seen as u64, common);
            }
        }
        if best.1 == 0 && from == self.first() && self.tail_unpositioned {
            // What was pushed out after the position may not have been seen.
            return Located::Gone { available: self.position_before(from), rest: Cursor::at(from) };
        }
        Located::Here(Cursor::at(from + if planted!(UnpositionedAgain) { 0 } else { best.0 }))
    }

    /// The frames without an offset that follow a position: from the first of them up to the number after the last.
    fn run_of(&self, position: Position) -> Option<(Seq, Seq)> {
        let head = self.head();
        let at = |seq: Seq| self.get(seq).is_some_and(|frame| frame.position == position);
        // From the head, where most readers are.
        let last = (self.first()..=head).rev().find(|&seq| at(seq));
        let Some(last) = last else {
            return (self.position_before(self.first()) == position).then(|| (self.first(), self.first()));
        };
        let is_of_run = |seq: &Seq| at(*seq) && self.get(*seq).is_some_and(|f| f.kind == FrameKind::Unpositioned);
        let from = (self.first()..=last).rev().take_while(is_of_run).last().unwrap_or(last + 1);
        Some((from, last + 1))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::log::channel_log::{Bounds, FIRST};
    use crate::log::frame::{ChannelBlocks, FrameEncoder};
    use crate::log::position::Epoch;

    const WIDE: Bounds = Bounds { messages: 1_000, bytes: 1 << 20, age: 1 << 40, older_bytes: 1 << 20 };

    fn at(offset: u64) -> Position {
        Position { epoch: Epoch(1), offset }
    }

    /// A word a frame: `+text` takes the next offset, anything else none.
    fn frames(words: &str, mut offset: u64) -> Vec<Arc<Frame>> {
        let encode = |word: &str| {
            let kind = if word.starts_with('+') { FrameKind::Publication } else { FrameKind::Unpositioned };
            offset += u64::from(kind == FrameKind::Publication);
            let (mut encoder, mut blocks) = (FrameEncoder::default(), ChannelBlocks::default());
            Arc::new(encoder.encode(&mut blocks, "c", kind, at(offset), word, 0))
        };
        words.split_whitespace().map(encode).collect()
    }

    fn log(words: &str, before: u64) -> ChannelLog {
        let mut log = ChannelLog::new(at(before));
        frames(words, before).into_iter().for_each(|frame| _ = log.append(frame, 0, WIDE));
        log
    }

    /// What a reader who has had `seen` frames of one log is sent from another.
    fn rest(seen: u64, of: &ChannelLog, other: &ChannelLog) -> Option<Vec<String>> {
        let Located::Here(Cursor { next, .. }) = other.find(&of.mark(of.first() + seen)) else { return None };
        let text = |frame: &Arc<Frame>| {
            let json: serde_json::Value = serde_json::from_slice(frame.publication_json()).unwrap();
            json["data"].as_str().unwrap().to_owned()
        };
        Some(other.since(next).map(text).collect())
    }

    #[test]
    fn a_place_is_found_again_in_a_log_that_begins_elsewhere() {
        let words = "+a u v +b y u w +c +d x";
        let all = log(words, 0);
        let words: Vec<&str> = words.split_whitespace().collect();
        for skipped in 0..words.len() {
            let before = words[..skipped].iter().filter(|word| word.starts_with('+')).count() as u64;
            let other = log(&words[skipped..].join(" "), before);
            for seen in skipped..=words.len() {
                assert_eq!(rest(seen as u64, &all, &other).unwrap(), words[seen..], "{seen} seen, {skipped} skipped");
            }
        }
    }

    #[test]
    fn what_a_log_has_no_more_is_not_found() {
        let (old, new) = (log("+a +b +c", 0), log("+c +d", 2));
        assert_eq!(rest(1, &old, &new), None);
        assert_eq!(rest(2, &old, &new).unwrap(), ["+c", "+d"]);
        let available = at(9);
        let gone = Located::Gone { available, rest: Cursor::at(FIRST) };
        assert_eq!(ChannelLog::new(available).find(&old.mark(FIRST + 3)), gone);
        // Nor is what was pushed out after a position.
        let mut new = log("+a u +b +c", 0);
        new.trim(0, Bounds { messages: 2, ..WIDE });
        assert_eq!(rest(1, &old, &new), None);
    }

    #[test]
    fn a_history_without_what_took_no_offset_goes_on_after_it() {
        let old = log("+a u v", 0);
        assert_eq!(rest(3, &old, &log("+a", 0)).unwrap(), [""; 0]);
        assert_eq!(rest(3, &old, &log("+a w +b", 0)).unwrap(), ["w", "+b"]);
        assert_eq!(rest(2, &old, &log("+a v w", 0)).unwrap(), ["v", "w"]);
    }

    #[test]
    fn equal_messages_are_told_apart_by_their_number_as_far_as_it_is_known() {
        let old = log("+a u u u", 0);
        for seen in 1..=4 {
            let left = 5 - seen;
            assert_eq!(rest(seen, &old, &log("+a u u u u", 0)).unwrap().len() as u64, left);
        }
        let many = "u ".repeat(MARK_FRAMES + 2);
        let (old, new) = (log(&format!("+a {many}"), 0), log(&format!("+a {many} w"), 0));
        // More than a mark names: once more rather than not at all.
        assert_eq!(rest(3 + MARK_FRAMES as u64, &old, &new).unwrap(), ["u", "u", "w"]);
    }

    #[test]
    fn what_was_told_to_be_lost_does_not_come_late() {
        let mut old = log("+a", 0);
        let gap = FrameEncoder::default().encode(&mut ChannelBlocks::default(), "c", FrameKind::Gap, at(1), "", 0);
        old.append(Arc::new(gap), 0, WIDE);
        old.append(frames("w", 1).remove(0), 0, WIDE);
        assert_eq!(rest(3, &old, &log("+a v w x", 0)).unwrap(), ["x"]);
    }
}
