//! What was really published in a channel, whoever learns of it.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::log::position::{Epoch, Position};

/// One publication.
#[derive(Debug)]
pub struct Record {
    /// Unlike that of any other record of the channel.
    pub data: String,
    /// The channel's position once it is seen.
    pub position: Position,
    /// Whether it took an offset.
    pub positioned: bool,
}

/// A channel's publications since the world began.
#[derive(Debug)]
pub struct Truth {
    pub name: Arc<str>,
    pub records: Vec<Record>,
    /// Each epoch, the number of records before it, and its records with offsets in order.
    epochs: Vec<(Epoch, usize, Vec<usize>)>,
    by_data: FxHashMap<String, usize>,
}

impl Truth {
    pub fn new(name: Arc<str>, epoch: Epoch) -> Self {
        Self { name, records: Vec::new(), epochs: vec![(epoch, 0, Vec::new())], by_data: FxHashMap::default() }
    }

    /// The channel's head.
    pub fn position(&self) -> Position {
        let (epoch, _, offsets) = self.epochs.last().expect("there is always an epoch");
        Position { epoch: *epoch, offset: offsets.len() as u64 }
    }

    /// The history was lost: offsets start again.
    pub fn renew(&mut self, epoch: Epoch) {
        self.epochs.push((epoch, self.records.len(), Vec::new()));
    }

    pub fn publish(&mut self, data: String, positioned: bool) -> Position {
        let index = self.records.len();
        if positioned {
            let (.., offsets) = self.epochs.last_mut().expect("there is always an epoch");
            offsets.push(index);
        }
        let position = self.position();
        let other = self.by_data.insert(line_feeds(&data), index);
        assert_eq!(other, None, "the simulation published {data:?} twice");
        self.records.push(Record { data, position, positioned });
        position
    }

    /// Number of the record with this data, whose line ends may all have become LF.
    pub fn find(&self, data: &str) -> Option<usize> {
        self.by_data.get(data).copied()
    }

    /// Number of the record that follows a position.
    pub fn after(&self, position: Position) -> Option<usize> {
        let (_, start, offsets) = self.epochs.iter().find(|(epoch, ..)| *epoch == position.epoch)?;
        match position.offset.checked_sub(1) {
            None => Some(*start),
            Some(last) => offsets.get(last as usize).map(|index| index + 1),
        }
    }

    /// The position of a reader that has seen everything before a record.
    pub fn position_before(&self, index: usize) -> Position {
        match index.checked_sub(1) {
            Some(last) => self.records[last].position,
            None => Position { epoch: self.epochs[0].0, offset: 0 },
        }
    }

    /// The records with offsets of the present epoch.
    pub fn history(&self) -> &[usize] {
        &self.epochs.last().expect("there is always an epoch").2
    }
}

/// A text as an event stream carries it.
pub fn line_feeds(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\r', "\n")
}
