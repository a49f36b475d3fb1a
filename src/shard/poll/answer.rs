//! What is new on some channels since a cursor, read from their logs within bounds.
//!
//! Channels share one answer, and the oldest publication goes first: a busy channel delays the others and starves none.
//! Publications without an offset are left out: no cursor could say whether a reader has had them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use sha1_smol::Sha1;

use crate::limits::{POLL_BYTES, POLL_PUBLICATIONS};
use crate::log::channel_log::{ChannelLog, Located, Seq};
use crate::log::channel_table::{Channel, ChannelId, ChannelTable};
use crate::log::frame::{Frame, FrameKind, Micros};
use crate::log::position::{CursorEntry, Position, write_entry};
use crate::wire::poll::{BodyWriter, Place};

/// The content of the answer to one poll.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// A JSON object; see [`crate::wire::poll`].
    pub body: Vec<u8>,
    /// Its strong entity tag, with the quotes (RFC 9110, section 8.8.3). Equal tags are equal bodies on every node, since
    /// a position names one publication for ever.
    pub tag: String,
    /// Publications in it.
    pub publications: u64,
    /// Whether it tells the reader anything: publications, a gap, or the position of a channel that its cursor lacks.
    pub news: bool,
}

/// What was found on the channels of one poll. Borrows the logs.
#[derive(Debug)]
pub(super) struct Reading<'a> {
    channels: Vec<ChannelReading<'a>>,
    /// The bounds cut it, or it ends before a gap.
    more: bool,
}

/// What was found on one channel.
#[derive(Debug)]
struct ChannelReading<'a> {
    channel: &'a Channel,
    log: &'a ChannelLog,
    /// Where the reader says that it is.
    asked: Option<Position>,
    /// What is lost before the publications: everything after the first position up to the second.
    gap: Option<(Position, Position)>,
    publications: Vec<&'a Arc<Frame>>,
    /// Where the reader is once it has seen them.
    reached: Position,
    /// The next frame to look at.
    next: Seq,
}

impl<'a> Reading<'a> {
    /// Reads what the logs hold of these channels after `cursor`; those that are not live are left out.
    pub(super) fn of(table: &'a ChannelTable, channels: &[ChannelId], cursor: &[CursorEntry]) -> Self {
        let begin = |&id: &ChannelId| ChannelReading::begin(table.get(id)?, cursor);
        let mut channels: Vec<ChannelReading<'a>> = channels.iter().filter_map(begin).collect();
        let arrived = |(index, channel): (usize, &mut ChannelReading<'_>)| {
            channel.due().map(|frame| Reverse((frame.arrived, index)))
        };
        let mut due: BinaryHeap<Reverse<(Micros, usize)>> =
            channels.iter_mut().enumerate().filter_map(arrived).collect();
        let (mut publications, mut bytes) = (0, 0);
        let mut cut = false;
        while let Some(Reverse((_, index))) = due.pop() {
            let channel = &mut channels[index];
            let Some(frame) = channel.due() else { continue };
            bytes += frame.publication_json().len();
            if publications == POLL_PUBLICATIONS || (publications > 0 && bytes > POLL_BYTES) {
                cut = true;
                break;
            }
            publications += 1;
            channel.take(frame);
            due.extend(arrived((index, channel)));
        }
        let more = cut || channels.iter().any(ChannelReading::stands_before_a_gap);
        Self { channels, more }
    }

    /// See [`Answer::news`].
    pub(super) fn is_news(&self) -> bool {
        let tells = |channel: &ChannelReading<'_>| {
            channel.asked.is_none() || channel.gap.is_some() || !channel.publications.is_empty()
        };
        self.channels.iter().any(tells)
    }

    /// The publications found, channel by channel.
    pub(super) fn frames(&self) -> impl Iterator<Item = &'a Arc<Frame>> {
        self.channels.iter().flat_map(|channel| channel.publications.iter().copied())
    }

    /// Writes it down.
    pub(super) fn answer(&self) -> Answer {
        let mut cursor = Vec::new();
        for ChannelReading { channel, reached, .. } in &self.channels {
            if !cursor.is_empty() {
                cursor.push(b',');
            }
            write_entry(&mut cursor, CursorEntry { tag: channel.tag, position: *reached });
        }
        let mut body = BodyWriter::new(&String::from_utf8_lossy(&cursor));
        for ChannelReading { channel, reached, gap, publications, .. } in &self.channels {
            let epoch = reached.epoch.to_string();
            let place = |epoch, position: Position| Place { epoch, offset: position.offset };
            let epochs = gap.map(|(from, to)| [from, to].map(|position| position.epoch.to_string()));
            let gap = gap.zip(epochs.as_ref()).map(|((from, to), [left, right])| (place(left, from), place(right, to)));
            let publications = publications.iter().map(|frame| frame.publication_json());
            body.channel(&channel.name, place(&epoch, *reached), gap, publications);
        }
        Answer {
            body: body.finish(self.more),
            tag: self.tag(),
            publications: self.frames().count() as u64,
            news: self.is_news(),
        }
    }

    /// Hashes what the body is made from instead of the body itself, which may be a thousand times as long.
    fn tag(&self) -> String {
        // Another version may write the same content in another form.
        let mut identity = concat!(env!("CARGO_PKG_VERSION"), "\n").as_bytes().to_vec();
        for ChannelReading { channel, asked, gap, reached, .. } in &self.channels {
            let (from, to) = gap.unzip();
            identity.extend_from_slice(channel.name.as_bytes());
            for position in [*asked, from, to, Some(*reached)] {
                // Names have no control characters, so that no two contents are written alike.
                identity.push(b'\n');
                if let Some(position) = position {
                    write_entry(&mut identity, CursorEntry { tag: channel.tag, position });
                }
            }
            identity.push(b'\n');
        }
        identity.push(u8::from(self.more));
        format!("\"{}\"", Sha1::from(&identity).digest())
    }
}

impl<'a> ChannelReading<'a> {
    fn begin(channel: &'a Channel, cursor: &[CursorEntry]) -> Option<Self> {
        let log = channel.log()?;
        let asked = cursor.iter().find(|entry| entry.tag == channel.tag).map(|entry| entry.position);
        let (gap, reached, next) = match asked.map(|asked| (asked, log.locate(asked))) {
            None => (None, log.position(), log.head() + 1),
            Some((asked, Located::Here(cursor))) => (None, asked, cursor.next),
            Some((asked, Located::Gone { available, rest })) => (Some((asked, available)), available, rest.next),
        };
        Some(Self { channel, log, asked, gap, publications: Vec::new(), reached, next })
    }

    /// The next publication due to the reader. A gap before the first one becomes part of the answer; a later one ends it.
    fn due(&mut self) -> Option<&'a Arc<Frame>> {
        let log = self.log;
        while let Some(frame) = log.get(self.next) {
            match frame.kind {
                FrameKind::Publication if !self.had(frame.position) => return Some(frame),
                FrameKind::Publication | FrameKind::Unpositioned => {}
                FrameKind::Gap if self.publications.is_empty() => self.lose_up_to(frame.position),
                FrameKind::Gap => return None,
            }
            self.next += 1;
        }
        None
    }

    /// Whether the reader has a publication from a node that was ahead of this one.
    fn had(&self, publication: Position) -> bool {
        self.asked.is_some_and(|asked| publication.epoch == asked.epoch && publication.offset <= asked.offset)
    }

    fn lose_up_to(&mut self, to: Position) {
        if self.had(to) {
            return;
        }
        let from = self.gap.map_or(self.reached, |(from, _)| from);
        self.gap = Some((from, to));
        self.reached = to;
    }

    fn take(&mut self, frame: &'a Arc<Frame>) {
        self.publications.push(frame);
        self.reached = frame.position;
        self.next += 1;
    }

    fn stands_before_a_gap(&self) -> bool {
        self.log.get(self.next).is_some_and(|frame| frame.kind == FrameKind::Gap)
    }
}

#[cfg(test)]
mod tests;
