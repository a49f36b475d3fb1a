//! What a client has seen of a channel, held against what was published.

use super::truth::Truth;
use crate::log::position::Position;

/// One client's place in one channel.
#[derive(Debug, Default)]
pub struct View {
    /// The position the client would name to go on. None before it was told one.
    pub position: Option<Position>,
    /// Number of the record it expects next.
    pub next: usize,
    /// Records without an offset may be missing before this one: nothing brings them back after a reconnect or a gap.
    loose_until: usize,
    /// It has been at a node that knew more than this one, and may get records without an offset again.
    ahead: bool,
}

impl View {
    /// The client asks for what comes from now on, wherever that is. The node has `received` records.
    pub fn start(&mut self, truth: &Truth, received: usize, position: Position) {
        *self = Self { position: Some(position), next: index_of(truth, position), loose_until: received, ahead: false };
    }

    /// The client is told that what lies before a position cannot be had.
    pub fn jump(&mut self, truth: &Truth, received: usize, position: Position) {
        let Some(had) = self.position else { return self.start(truth, received, position) };
        self.loose_until = received;
        if had == position {
            return;
        }
        let next = index_of(truth, position);
        if next < self.next {
            // A node that has not heard of the newer epoch yet cannot know which of the two is newer.
            assert!(self.ahead && had.epoch != position.epoch, "sent back from {had:?} to {position:?}");
        }
        self.next = next;
        self.position = Some(position);
    }

    /// The client goes on from its own position on another connection.
    pub fn resume(&mut self, received: usize) {
        self.loose_until = received;
    }

    /// The client is served by another node for a while and has seen everything before record `next` there.
    pub fn visit(&mut self, truth: &Truth, next: usize) {
        if next > self.next {
            self.next = next;
            self.position = Some(truth.position_before(next));
            self.ahead = true;
        }
    }

    /// The client got a publication.
    pub fn publication(&mut self, truth: &Truth, index: usize) {
        let record = &truth.records[index];
        if index < self.next {
            assert!(self.ahead && !record.positioned, "{:?} comes again or late: {:?} was next", record, self.next);
            return;
        }
        self.check_missing(truth, index);
        self.next = index + 1;
        self.ahead = false;
        if record.positioned {
            self.position = Some(record.position);
        }
    }

    /// Nothing before record `until` may be missing.
    pub fn check_missing(&self, truth: &Truth, until: usize) {
        for missing in self.next..until {
            let record = &truth.records[missing];
            assert!(missing < self.loose_until && !record.positioned, "{record:?} is missing and nobody said so");
        }
    }
}

fn index_of(truth: &Truth, position: Position) -> usize {
    truth.after(position).unwrap_or_else(|| panic!("{position:?} is no position of {}", truth.name))
}
