//! Reads for clients that come back from before the node's log: once for all who ask, whichever shard they are on.
//!
//! One fetch a channel is under way at a time. Who asks for part of what it brings waits for it, who asks for more waits for
//! the next one, and what it brought is kept for a moment for shards that ask a little later.

use std::collections::VecDeque;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::node_log::size;
use super::{Relay, Waiting};
use crate::backbone::interface::{BackboneError, Page, Read, Stored};
use crate::limits::OLDER_KEPT_MILLIS;
use crate::log::frame::{ChannelBlocks, Frame, FrameKind, Micros};
use crate::log::position::{Offset, Position};
use crate::shard::mailbox::{HistoryQuery, Reply, RequestError, RequestId, ToShard};

/// Who asked, and for what.
#[derive(Debug)]
struct Asker {
    shard: usize,
    request: RequestId,
    query: HistoryQuery,
}

/// A read of one channel's history, page by page from its newest end.
#[derive(Debug)]
struct Fetch {
    since: Position,
    upto: Offset,
    /// What was read, newest first. There may be holes.
    read: Vec<Stored>,
    bytes: usize,
    /// What lies below this offset is not read yet.
    below: Offset,
    askers: Vec<Asker>,
    /// Those that it does not bring everything for.
    later: Vec<Asker>,
}

/// What a fetch brought, oldest first.
#[derive(Debug)]
struct Brought {
    channel: Arc<str>,
    since: Position,
    upto: Offset,
    frames: Vec<Arc<Frame>>,
    bytes: usize,
    until: Micros,
}

/// Fetches waiting and under way, and what the last ones brought.
#[derive(Debug, Default)]
pub(super) struct Fetches {
    by_channel: FxHashMap<Arc<str>, Fetch>,
    /// Channels whose turn has not come.
    waiting: VecDeque<Arc<str>>,
    /// Reads under way.
    reads: usize,
    brought: VecDeque<Brought>,
    brought_bytes: usize,
}

impl Fetches {
    /// Whether nobody waits for a fetch.
    pub(super) fn is_empty(&self) -> bool {
        self.by_channel.is_empty()
    }

    /// Lets go of everything that was kept: the server behind the next connection may have given its offsets to others.
    pub(super) fn forget_all(&mut self) {
        self.brought.clear();
        self.brought_bytes = 0;
    }

    /// Lets go of what was kept for long enough, and of the oldest when it is too much.
    pub(super) fn forget(&mut self, now: Micros, most: usize) {
        while self.brought.front().is_some_and(|oldest| oldest.until <= now || self.brought_bytes > most) {
            self.brought_bytes -= self.brought.pop_front().map_or(0, |oldest| oldest.bytes);
        }
    }
}

/// Whether what is asked for lies in a range.
fn covers(since: Position, upto: Offset, query: &HistoryQuery) -> bool {
    since.epoch == query.since.epoch && since.offset <= query.since.offset && query.upto <= upto
}

/// The part of some frames that was asked for: those that lead up to its end without a hole.
fn part(frames: &[Arc<Frame>], query: &HistoryQuery) -> Vec<Arc<Frame>> {
    let end = frames.partition_point(|frame| frame.position.offset <= query.upto);
    let wanted = (query.since.offset + 1..=query.upto).rev();
    let whole = frames[..end].iter().rev().zip(wanted).take_while(|(frame, offset)| frame.position.offset == *offset);
    frames[end - whole.count()..end].to_vec()
}

impl Relay {
    /// A shard asks for what lies before its log.
    pub(super) fn on_history(&mut self, shard: usize, request: RequestId, query: HistoryQuery, now: Micros) {
        self.fetches.forget(now, self.bounds.older_bytes_most);
        let kept = self
            .fetches
            .brought
            .iter()
            .find(|brought| brought.channel == query.channel && covers(brought.since, brought.upto, &query));
        if let Some(brought) = kept {
            let frames = part(&brought.frames, &query);
            self.outboxes[shard].send(ToShard::Reply { request, reply: Reply::History(Ok(frames)) });
            return;
        }
        self.fetch_for(Asker { shard, request, query });
        self.fetch_some(now);
    }

    fn fetch_for(&mut self, asker: Asker) {
        let HistoryQuery { channel, since, upto } = asker.query.clone();
        match self.fetches.by_channel.get_mut(&channel) {
            Some(fetch) if covers(fetch.since, fetch.upto, &asker.query) => fetch.askers.push(asker),
            Some(fetch) => fetch.later.push(asker),
            None => {
                let (read, bytes, later) = (Vec::new(), 0, Vec::new());
                let (askers, below) = (vec![asker], upto + 1);
                let fetch = Fetch { since, upto, read, bytes, below, askers, later };
                self.fetches.by_channel.insert(channel.clone(), fetch);
                self.fetches.waiting.push_back(channel);
            }
        }
    }

    fn fetch_some(&mut self, now: Micros) {
        while self.fetches.reads < self.bounds.reads
            && let Some(channel) = self.fetches.waiting.pop_front()
        {
            self.fetches.reads += 1;
            self.read_older(channel, now);
        }
    }

    /// Starts the read of a fetch's next page.
    fn read_older(&mut self, channel: Arc<str>, now: Micros) {
        let Some(fetch) = self.fetches.by_channel.get(&channel) else { return };
        let missing = usize::try_from(fetch.below - 1 - fetch.since.offset).unwrap_or(usize::MAX);
        let read = Read {
            channel: channel.clone(),
            since: Some(fetch.below),
            limit: missing.min(self.bounds.older_page),
            reverse: true,
            create: false,
        };
        self.status.fetches.add(1);
        let ticket = self.ticket();
        self.waiting.insert(ticket, Waiting::History(channel));
        self.backbone.read(ticket, read, now);
    }

    /// A page of a fetch came back, or failed.
    pub(super) fn on_history_page(&mut self, channel: Arc<str>, page: Result<Page, BackboneError>, now: Micros) {
        let Some(fetch) = self.fetches.by_channel.get_mut(&channel) else { return };
        match page {
            Ok(page) => {
                if fetch.take(page, self.bounds.payload_bytes, self.bounds.older_page, self.bounds.older_bytes) {
                    return self.read_older(channel, now);
                }
                self.end_fetch(&channel, Ok(()), now);
            }
            Err(error) => {
                tracing::debug!(%channel, %error, "older publications could not be read");
                self.status.failed_reads.add(1);
                self.end_fetch(&channel, Err(error.into()), now);
            }
        }
    }

    /// Answers those who wait for a fetch, and begins the next one for those who asked for more.
    fn end_fetch(&mut self, channel: &Arc<str>, outcome: Result<(), RequestError>, now: Micros) {
        let Some(fetch) = self.fetches.by_channel.remove(channel) else { return };
        self.fetches.reads -= 1;
        let Fetch { since, read, askers, later, .. } = fetch;
        let mut blocks = ChannelBlocks::default();
        let encode = |stored: Stored| {
            let position = Position { offset: stored.offset, ..since };
            let text = String::from_utf8_lossy(&stored.data);
            Arc::new(self.encoder.encode(&mut blocks, channel, FrameKind::Publication, position, &text, now))
        };
        let frames: Vec<Arc<Frame>> = read.into_iter().rev().map(encode).collect();
        self.status.fetched.add(frames.len() as u64);
        for Asker { shard, request, query } in askers {
            let reply = Reply::History(outcome.clone().map(|()| part(&frames, &query)));
            self.outboxes[shard].send(ToShard::Reply { request, reply });
        }
        self.keep_brought(channel, frames, now);
        self.fetch_later(later);
        self.fetch_some(now);
    }

    /// Keeps what a fetch brought for a moment. What it did not find may be there by then, so only what it found counts.
    fn keep_brought(&mut self, channel: &Arc<str>, frames: Vec<Arc<Frame>>, now: Micros) {
        let (Some(first), Some(last)) = (frames.first(), frames.last()) else { return };
        let since = Position { offset: first.position.offset - 1, ..first.position };
        let upto = last.position.offset;
        if upto - since.offset != frames.len() as u64 {
            return;
        }
        let bytes = frames.iter().map(|frame| size(frame)).sum();
        let until = now + OLDER_KEPT_MILLIS * 1_000;
        self.fetches.brought_bytes += bytes;
        self.fetches.brought.push_back(Brought { channel: channel.clone(), since, upto, frames, bytes, until });
        self.fetches.forget(now, self.bounds.older_bytes_most);
    }

    /// Begins one fetch for all of these, as far as they ask about one epoch.
    fn fetch_later(&mut self, later: Vec<Asker>) {
        let Some(first) = later.first() else { return };
        let (channel, epoch) = (first.query.channel.clone(), first.query.since.epoch);
        let alike = || later.iter().map(|asker| &asker.query).filter(|query| query.since.epoch == epoch);
        let offset = alike().map(|query| query.since.offset).min().unwrap_or_default();
        let upto = alike().map(|query| query.upto).max().unwrap_or_default();
        for asker in later {
            self.fetch_for(asker);
            if let Some(fetch) = self.fetches.by_channel.get_mut(&channel) {
                // The first one has made it: it is to bring what all of them need.
                (fetch.since, fetch.upto, fetch.below) = (Position { epoch, offset }, upto, upto + 1);
            }
        }
    }
}

impl Fetch {
    /// Takes what a page has. True when there may be more before it.
    fn take(&mut self, page: Page, largest: usize, limit: usize, most: usize) -> bool {
        if page.head.epoch != self.since.epoch {
            return false;
        }
        // An entry from before `since` means that nothing is left above it.
        let further = page.publications.last().is_some_and(|last| last.offset > self.since.offset + 1);
        let full = page.publications.len() >= limit;
        for stored in page.publications.into_iter().filter(|stored| stored.offset > self.since.offset) {
            self.below = stored.offset;
            self.bytes += stored.data.len();
            if self.bytes > most {
                return false;
            }
            if stored.data.len() <= largest {
                self.read.push(stored);
            }
        }
        full && further
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

    fn fetch() -> Fetch {
        let (read, askers, later) = (Vec::new(), Vec::new(), Vec::new());
        Fetch { since: at(1, 2), upto: 7, read, bytes: 0, below: 8, askers, later }
    }

    fn page(epoch: u32, offsets: &[u64]) -> Page {
        let stored = |&offset: &u64| Stored {
            offset,
            tag: None,
            previous: None,
            data: Bytes::from(vec![b'x'; offset as usize]),
        };
        Page {
            head: at(epoch, 9),
            tag: None,
            continues: Vec::new(),
            publications: offsets.iter().map(stored).collect(),
        }
    }

    #[test]
    fn pages_follow_each_other_down_to_where_it_begins() {
        let mut two = fetch();
        assert!(two.take(page(1, &[7, 6]), 100, 2, 1_000), "a full page");
        assert_eq!(two.below, 6);
        assert!(!two.take(page(1, &[5, 4, 3]), 100, 3, 1_000), "everything");
        assert_eq!(two.read.len(), 5);
        assert!(!fetch().take(page(1, &[7]), 100, 2, 1_000), "the history has no more");
        assert!(!fetch().take(page(1, &[]), 100, 2, 1_000));
        assert!(!fetch().take(page(1, &[7, 2]), 100, 2, 1_000), "a full page, but of what was not asked for");
    }

    #[test]
    fn another_epoch_and_too_many_bytes_end_it() {
        let mut other = fetch();
        assert!(!other.take(page(2, &[7, 6]), 100, 2, 1_000) && other.read.is_empty());
        let mut many = fetch();
        assert!(!many.take(page(1, &[7, 6, 5]), 100, 3, 15) && many.read.len() == 2);
        let mut large = fetch();
        assert!(large.take(page(1, &[7, 6]), 6, 2, 1_000));
        assert_eq!(large.read.len(), 1, "what is too large to deliver is as good as gone");
    }

    #[test]
    fn a_part_leads_up_to_its_end_without_a_hole() {
        let kind = FrameKind::Publication;
        let frame = |offset| crate::log::frame::testing::frame(kind, at(1, offset), 0);
        let frames: Vec<Arc<Frame>> = [3, 5, 6, 7].map(frame).to_vec();
        let of = |since, upto| {
            let query = HistoryQuery { channel: "c".into(), since: at(1, since), upto };
            part(&frames, &query).iter().map(|frame| frame.position.offset).collect::<Vec<_>>()
        };
        assert_eq!(of(4, 6), [5, 6]);
        assert_eq!(of(5, 6), [6]);
        assert_eq!(of(0, 7), [5, 6, 7]);
        assert_eq!(of(0, 3), [3]);
        assert_eq!(of(0, 4), [0u64; 0]);
        assert_eq!(of(5, 8), [0u64; 0]);
        assert_eq!(of(0, 2), [0u64; 0]);
    }
}
