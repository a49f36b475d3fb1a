//! Reads for clients: from the node's log where it has what is asked, else from the backbone.

use std::sync::Arc;

use super::channel::{Channel, Phase};
use super::{Relay, Waiting};
use crate::backbone::interface::{BackboneError, Page, Read, Stored};
use crate::log::frame::{ChannelBlocks, Frame, FrameKind, Micros};
use crate::log::position::Position;
use crate::shard::mailbox::{HistoryQuery, Reply, RequestError, RequestId, ToShard};

/// The head and what was asked for, or why it cannot be had.
type Answer = Result<(Position, Vec<Arc<Frame>>), RequestError>;

impl Relay {
    pub(super) fn on_history(&mut self, shard: usize, request: RequestId, query: HistoryQuery, now: Micros) {
        let known = self.names.get(&query.channel).map(|&key| &self.channels[key]);
        if let Some(answer) = known.and_then(|channel| from_log(channel, &query)) {
            self.answer_history(shard, request, answer);
            return;
        }
        let ticket = self.ticket();
        let read = Read {
            channel: query.channel.clone(),
            since: query.since.map(|position| position.offset),
            limit: query.limit,
            reverse: query.reverse,
            create: false,
        };
        self.waiting.insert(ticket, Waiting::History { shard, request, query });
        self.backbone.read(ticket, read, now);
    }

    pub(super) fn on_history_page(
        &mut self,
        shard: usize,
        request: RequestId,
        query: &HistoryQuery,
        page: Result<Page, BackboneError>,
        now: Micros,
    ) {
        let answer = page.map_err(RequestError::from).and_then(|page| self.encode_page(query, page, now));
        self.answer_history(shard, request, answer);
    }

    fn encode_page(&mut self, query: &HistoryQuery, page: Page, now: Micros) -> Answer {
        let largest = self.bounds.payload_bytes;
        let whole: Vec<Stored> = page.publications.into_iter().filter(|stored| stored.data.len() <= largest).collect();
        check(query, page.head, &whole)?;
        let mut blocks = ChannelBlocks::default();
        let frames = whole.into_iter().map(|stored| {
            let position = Position { offset: stored.offset, ..page.head };
            let text = String::from_utf8_lossy(&stored.data);
            let kind = FrameKind::Publication;
            Arc::new(self.encoder.encode(&mut blocks, &query.channel, kind, position, &text, now))
        });
        Ok((page.head, frames.collect()))
    }

    fn answer_history(&mut self, shard: usize, request: RequestId, answer: Answer) {
        self.outboxes[shard].send(ToShard::Reply { request, reply: Reply::History(answer) });
    }
}

/// Answers from the node's log: the position alone, or forward from a position that is still in it. A channel that is not
/// live (the backbone is away) may be behind, so it is not asked. Neither is one that does not know the position: another
/// node may have been ahead of this one when it gave it out.
fn from_log(channel: &Channel, query: &HistoryQuery) -> Option<Answer> {
    let head = channel.tip.filter(|_| channel.phase == Phase::Live)?.position;
    let known = |since: &Position| since.epoch == head.epoch && since.offset <= head.offset;
    if query.limit == 0 {
        let asked = query.since.filter(|since| *since != Position::default());
        return asked.is_none_or(|since| known(&since)).then(|| Ok((head, Vec::new())));
    }
    let since = query.since.filter(|since| !query.reverse && known(since))?;
    let missing = usize::try_from(head.offset - since.offset).ok()?;
    let publications = || channel.frames.iter().filter(|frame| frame.kind == FrameKind::Publication);
    let held = publications().count();
    (missing <= held).then(|| Ok((head, publications().skip(held - missing).take(query.limit).cloned().collect())))
}

/// Checks that a position asked for belongs to the history, and that nothing after it is gone: what was read, forward, goes on
/// from it without a hole, as far as asked for or up to the head.
fn check(query: &HistoryQuery, head: Position, read: &[Stored]) -> Result<(), RequestError> {
    let Some(since) = query.since else { return Ok(()) };
    // The default position is from before the channel's first epoch: everything came after it.
    let fresh = since == Position::default();
    let known = fresh || (since.epoch == head.epoch && since.offset <= head.offset);
    let whole = || {
        let end = since.offset.saturating_add(read.len() as u64);
        let consecutive = read.iter().zip(1..).all(|(stored, nth)| stored.offset == since.offset + nth);
        consecutive && (read.len() == query.limit || end == head.offset)
    };
    if known && (query.reverse || query.limit == 0 || whole()) {
        Ok(())
    } else {
        Err(RequestError::Unrecoverable(head))
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

    fn since(position: Position) -> HistoryQuery {
        HistoryQuery { channel: "c".into(), since: Some(position), limit: 10, reverse: false }
    }

    fn read(offsets: &[u64]) -> Vec<Stored> {
        offsets.iter().map(|&offset| Stored { offset, tag: None, previous: None, data: Bytes::new() }).collect()
    }

    #[test]
    fn a_position_is_checked_against_the_history() {
        let gone = |head| Err(RequestError::Unrecoverable(head));
        assert_eq!(check(&since(at(1, 5)), at(1, 7), &read(&[6, 7])), Ok(()));
        assert_eq!(check(&since(at(1, 7)), at(1, 7), &[]), Ok(()));
        assert_eq!(check(&since(at(1, 5)), at(1, 7), &read(&[7])), gone(at(1, 7)));
        assert_eq!(check(&since(at(1, 5)), at(1, 7), &[]), gone(at(1, 7)));
        assert_eq!(check(&since(at(1, 8)), at(1, 7), &[]), gone(at(1, 7)));
        assert_eq!(check(&since(at(2, 5)), at(1, 7), &read(&[6, 7])), gone(at(1, 7)));
        assert_eq!(check(&HistoryQuery { reverse: true, ..since(at(1, 5)) }, at(1, 7), &read(&[4])), Ok(()));
        assert_eq!(check(&HistoryQuery { limit: 0, ..since(at(1, 5)) }, at(1, 7), &[]), Ok(()));
    }

    #[test]
    fn a_hole_is_no_history() {
        let gone = Err(RequestError::Unrecoverable(at(1, 9)));
        assert_eq!(check(&since(at(1, 5)), at(1, 9), &read(&[6, 8, 9])), gone);
        assert_eq!(
            check(&since(at(1, 5)), at(1, 9), &read(&[6, 7])),
            gone,
            "what is not there at the end is a hole too"
        );
        assert_eq!(check(&HistoryQuery { limit: 2, ..since(at(1, 5)) }, at(1, 9), &read(&[6, 7])), Ok(()));
    }

    #[test]
    fn before_the_first_epoch_nothing_was_missed() {
        assert_eq!(check(&since(Position::default()), Position::default(), &[]), Ok(()));
        assert_eq!(check(&since(Position::default()), at(1, 2), &read(&[1, 2])), Ok(()));
        assert!(check(&since(Position::default()), at(1, 2), &read(&[2])).is_err());
    }
}
