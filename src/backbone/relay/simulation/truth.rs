//! What really happened on each channel, in the order the server did it. Nothing is ever taken away from it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::log::frame::Micros;
use crate::log::position::{Epoch, Position};
use crate::shard::mailbox::Publish;

/// A publication that the server carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Names it in its payload.
    pub id: u64,
    pub position: Position,
    /// When it was carried out.
    pub at: Micros,
    /// A failover took it back.
    pub lost: bool,
    /// It is larger than a node takes.
    pub oversized: bool,
    /// The epochs that have continued the one it was published in: it has its offset in each.
    pub later: Vec<Epoch>,
}

impl Record {
    /// Whether it has this position, or had it.
    pub fn is_at(&self, position: Position) -> bool {
        let epoch = self.position.epoch == position.epoch || self.later.contains(&position.epoch);
        epoch && self.position.offset == position.offset
    }
}

/// One channel's course.
#[derive(Debug, Default)]
pub struct Line {
    pub records: Vec<Record>,
    by_id: BTreeMap<u64, usize>,
    /// The first and the last record that had a position: after a failover there can be several.
    positions: BTreeMap<(u32, u64), (usize, usize)>,
    /// The epochs, and how many records there were when each began.
    births: BTreeMap<u32, usize>,
    /// Plain messages.
    pub plain: BTreeSet<u64>,
}

impl Line {
    /// The record of a publication.
    pub fn find(&self, id: u64) -> Option<(usize, &Record)> {
        self.by_id.get(&id).map(|&index| (index, &self.records[index]))
    }

    /// How many records lie before or at a position, at least and at most.
    pub fn after(&self, position: Position) -> Option<(usize, usize)> {
        if position.offset == 0 {
            return self.births.get(&position.epoch.0).map(|&birth| (birth, birth));
        }
        self.positions.get(&(position.epoch.0, position.offset)).map(|(first, last)| (first + 1, last + 1))
    }

    /// An epoch begins.
    pub fn begin(&mut self, epoch: Epoch) {
        self.births.insert(epoch.0, self.records.len());
    }

    /// An epoch continues another: what that one still has keeps its offsets.
    pub fn carry_over(&mut self, old: Epoch, new: Epoch) {
        self.begin(new);
        for (index, record) in self.records.iter_mut().enumerate().rev() {
            if !record.lost && (record.position.epoch == old || record.later.contains(&old)) {
                record.later.push(new);
                self.positions.insert((new.0, record.position.offset), (index, index));
                self.births.insert(new.0, index);
            }
        }
    }
}

/// All channels, and the positions that idempotency keys were given.
#[derive(Debug, Default)]
pub struct Truth {
    lines: BTreeMap<Arc<str>, Line>,
    keys: BTreeMap<(Arc<str>, Box<str>), Vec<Position>>,
}

impl Truth {
    pub fn line(&mut self, channel: &Arc<str>) -> &mut Line {
        self.lines.entry(channel.clone()).or_default()
    }

    /// A publication was carried out.
    pub fn publish(&mut self, publish: &Publish, id: u64, position: Position, oversized: bool, at: Micros) {
        let channel = &publish.channel;
        let line = self.line(channel);
        let index = line.records.len();
        let place = line.positions.entry((position.epoch.0, position.offset)).or_insert((index, index));
        place.1 = index;
        line.by_id.insert(id, index);
        line.records.push(Record { id, position, at, lost: false, oversized, later: Vec::new() });
        if let Some(key) = &publish.idempotency_key {
            self.keys.entry((channel.clone(), key.clone())).or_default().push(position);
        }
    }

    /// Whether a publish with this key may be answered with this position.
    pub fn answers(&self, channel: &Arc<str>, key: &str, position: Position) -> bool {
        self.keys.get(&(channel.clone(), key.into())).is_some_and(|given| given.contains(&position))
    }

    /// How many records each channel has.
    pub fn lengths(&self) -> BTreeMap<Arc<str>, usize> {
        self.lines.iter().map(|(name, line)| (name.clone(), line.records.len())).collect()
    }

    /// The server went back to when the channels had so many records.
    pub fn rewind(&mut self, lengths: &BTreeMap<Arc<str>, usize>) {
        for (name, line) in &mut self.lines {
            let kept = lengths.get(name).copied().unwrap_or(0);
            line.records[kept..].iter_mut().for_each(|record| record.lost = true);
        }
    }
}

/// A payload that names its publication: `letter`, the number, padding, and perhaps a byte that is no UTF-8.
pub fn payload(letter: char, id: u64, bytes: usize, valid: bool) -> bytes::Bytes {
    let mut data = format!("{letter}{id}-").into_bytes();
    data.resize(bytes.max(data.len()), b'x');
    if !valid {
        data.push(0xfe);
    }
    data.into()
}

/// Reads a payload back.
pub fn named(letter: char, text: &str) -> Option<u64> {
    text.strip_prefix(letter)?.split_once('-')?.0.parse().ok()
}
