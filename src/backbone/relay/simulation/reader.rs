//! Holds what one shard gets of one channel against what really happened.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::truth::{Line, Record, named};
use crate::log::frame::{Frame, FrameKind, Micros};
use crate::log::position::{Epoch, Position};
use crate::shard::mailbox::HistoryQuery;

/// How far a shard is on a channel.
#[derive(Debug)]
pub struct Reader {
    position: Position,
    /// The next record that it may get.
    next: usize,
    /// The first record that it must get, or be told of: later than `next` when it went live at a position that more than one
    /// publication had.
    owed: usize,
    /// The records that it was given.
    seen: BTreeSet<usize>,
    /// When the last gap after that was announced: it speaks of everything that had happened by then.
    told: Option<Micros>,
    /// The last plain message.
    plain: u64,
}

impl Reader {
    /// The channel is live.
    pub fn open(line: &Line, position: Position, frames: &[Arc<Frame>]) -> Result<Self, String> {
        let Some(first) = frames.first() else {
            let (next, owed) = line.after(position).ok_or_else(|| format!("live at {position:?}, which never was"))?;
            return Ok(Self { position, next, owed, seen: BTreeSet::new(), told: None, plain: 0 });
        };
        let (next, _) = record(line, first)?;
        let before = Position { offset: first.position.offset - 1, ..first.position };
        let mut reader = Self { position: before, next, owed: next, seen: BTreeSet::new(), told: None, plain: 0 };
        for frame in frames {
            if frame.kind != FrameKind::Publication {
                return Err(format!("{:?} in a history", frame.kind));
            }
            reader.take(line, frame)?;
        }
        if reader.position != position {
            return Err(format!("live at {position:?} with a history up to {:?}", reader.position));
        }
        Ok(reader)
    }

    /// The last position.
    pub fn position(&self) -> Position {
        self.position
    }

    /// The next frame.
    pub fn take(&mut self, line: &Line, frame: &Frame) -> Result<(), String> {
        let at = frame.position;
        match frame.kind {
            FrameKind::Unpositioned => {
                let id = named('m', &text(frame)).filter(|id| line.plain.contains(id));
                let id = id.ok_or_else(|| format!("a plain message nobody sent: {}", text(frame)))?;
                if id <= self.plain || at != self.position {
                    return Err(format!("plain message {id} at {at:?} after {} at {:?}", self.plain, self.position));
                }
                self.plain = id;
            }
            FrameKind::Publication => {
                let (index, _) = record(line, frame)?;
                if (at.epoch, at.offset) != (self.position.epoch, self.position.offset + 1) {
                    return Err(format!("{at:?} after {:?}", self.position));
                }
                if index < self.next || !self.seen.insert(index) {
                    return Err(format!("{at:?} again: it is record {index}, expected was {}", self.next));
                }
                self.skip(line, index)?;
                self.position = at;
                self.next = index + 1;
                self.told = None;
            }
            FrameKind::Gap => {
                let (from, to) = gap(frame)?;
                if from != self.position || to != at || (to.epoch == from.epoch && to.offset < from.offset) {
                    return Err(format!("a gap from {from:?} to {to:?} at {at:?} after {:?}", self.position));
                }
                if to.epoch != from.epoch
                    && let Some((next, _)) = line.after(to)
                {
                    // The server may have gone back to an epoch from before this shard came.
                    self.next = self.next.min(next);
                }
                self.position = at;
                self.told = Some(frame.arrived);
            }
        }
        Ok(())
    }

    /// Everything before `end` that is still true was announced as lost.
    fn skip(&self, line: &Line, end: usize) -> Result<(), String> {
        let told = |record: &Record| self.told.is_some_and(|told| record.at <= told);
        let due = |index: &usize| !self.seen.contains(index);
        let fine = |record: &Record| record.lost || told(record);
        match (self.next.max(self.owed)..end).filter(due).map(|index| &line.records[index]).find(|record| !fine(record))
        {
            Some(record) => Err(format!("{record:?} is lost and nobody was told; gap at {:?}", self.told)),
            None => Ok(()),
        }
    }

    /// Everything has come to rest at `head`.
    pub fn ends(&self, line: &Line, head: Position) -> Result<(), String> {
        if self.position != head {
            return Err(format!("it stays at {:?}, the server is at {head:?}", self.position));
        }
        self.skip(line, line.records.len())
    }
}

/// Checks an answer to a read: true publications that lead up to the last one asked for.
pub fn check_history(line: &Line, query: &HistoryQuery, frames: &[Arc<Frame>]) -> Result<(), String> {
    let mut offsets = Vec::new();
    for frame in frames {
        record(line, frame)?;
        if frame.kind != FrameKind::Publication || frame.position.epoch != query.since.epoch {
            return Err("a frame of another history".into());
        }
        offsets.push(frame.position.offset);
    }
    let first = query.upto + 1 - frames.len() as u64;
    let sound = first > query.since.offset && offsets.iter().copied().eq(first..=query.upto);
    if sound { Ok(()) } else { Err(format!("offsets {offsets:?} for {query:?}")) }
}

fn record<'a>(line: &'a Line, frame: &Frame) -> Result<(usize, &'a Record), String> {
    let text = text(frame);
    let found = named('p', &text).and_then(|id| line.find(id));
    found
        .filter(|(_, record)| record.is_at(frame.position) && !record.oversized)
        .ok_or_else(|| format!("{text} at {:?}; what happened is {found:?}", frame.position))
}

/// A frame's payload.
fn text(frame: &Frame) -> String {
    let body = String::from_utf8_lossy(frame.sse_body());
    body.strip_prefix("event: gap\n").unwrap_or(&body).trim_start_matches("data: ").trim_end().to_owned()
}

/// What a gap frame says of itself.
fn gap(frame: &Frame) -> Result<(Position, Position), String> {
    let text = text(frame);
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| format!("{text}: {error}"))?;
    let place = |which: &str| {
        let epoch = value[which]["epoch"].as_str()?.parse::<Epoch>().ok()?;
        Some(Position { epoch, offset: value[which]["offset"].as_u64()? })
    };
    place("from").zip(place("to")).ok_or_else(|| format!("not a gap: {text}"))
}
