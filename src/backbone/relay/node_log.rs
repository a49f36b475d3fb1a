//! What the node keeps of its channels' histories, encoded: bounded for each channel, and for all of them by bytes and age.

use std::collections::VecDeque;
use std::sync::Arc;

use super::bounds::Bounds;
use crate::backbone::interface::Tag;
use crate::log::frame::{Frame, FrameKind, Micros};
use crate::log::position::Offset;
use crate::settings::HistoryConfig;

/// Numbers everything the relay sent to shards, over all channels.
pub type Sequence = u64;

/// Bytes a frame takes beside its encoded forms: itself, its place in a channel's log and in the order of all.
const FRAME_OVERHEAD: usize = size_of::<Frame>() + size_of::<Entry>() + size_of::<Place>();

#[derive(Debug)]
struct Entry {
    sequence: Sequence,
    /// The publication's tag, if it has one.
    tag: Option<Tag>,
    frame: Arc<Frame>,
}

/// One channel's part of the log. Consecutive: after a gap it starts anew.
#[derive(Debug, Default)]
pub struct Frames {
    entries: VecDeque<Entry>,
    bytes: usize,
}

impl Frames {
    /// All frames, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Arc<Frame>> {
        self.entries.iter().map(|entry| &entry.frame)
    }

    /// The frames from `sequence` on, and whether the one with that number is still here.
    pub fn from(&self, sequence: Sequence) -> (bool, impl Iterator<Item = &Arc<Frame>>) {
        let start = self.entries.partition_point(|entry| entry.sequence < sequence);
        let whole = self.entries.get(start).is_some_and(|entry| entry.sequence == sequence);
        (whole, self.entries.range(start..).map(|entry| &entry.frame))
    }

    /// The frames after `sequence` with their numbers and tags.
    pub fn numbered_after(&self, sequence: Sequence) -> impl Iterator<Item = (Sequence, Option<Tag>, &Arc<Frame>)> {
        let start = self.entries.partition_point(|entry| entry.sequence <= sequence);
        self.entries.range(start..).map(|entry| (entry.sequence, entry.tag, &entry.frame))
    }

    /// The offsets and tags of the publications that have one, oldest first.
    pub fn tags(&self) -> impl Iterator<Item = (Offset, Tag)> {
        let publications = self.entries.iter().filter(|entry| entry.frame.kind == FrameKind::Publication);
        publications.filter_map(|entry| Some((entry.frame.position.offset, entry.tag?)))
    }

    fn first(&self) -> Option<Sequence> {
        self.entries.front().map(|entry| entry.sequence)
    }

    fn pop(&mut self) -> usize {
        let Some(entry) = self.entries.pop_front() else { return 0 };
        let bytes = size(&entry.frame);
        self.bytes -= bytes;
        bytes
    }
}

/// A frame's place in the order of all. Stale when the channel dropped the frame on its own.
#[derive(Debug)]
struct Place {
    key: usize,
    sequence: Sequence,
    arrived: Micros,
}

/// The order and the sum of all channels' frames.
#[derive(Debug, Default)]
pub struct NodeLog {
    bounds: Bounds,
    places: VecDeque<Place>,
    sequence: Sequence,
    bytes: usize,
    frames: usize,
}

impl NodeLog {
    /// An empty log within these bounds.
    #[must_use]
    pub fn within(bounds: Bounds) -> Self {
        Self { bounds, ..Self::default() }
    }

    /// Takes the next number, for something that is sent but not kept.
    pub fn number(&mut self) -> Sequence {
        self.sequence += 1;
        self.sequence
    }

    /// Keeps a frame of the channel `key` and its tag, within the channel's own bounds.
    pub fn append(
        &mut self,
        frames: &mut Frames,
        key: usize,
        (frame, tag): (Arc<Frame>, Option<Tag>),
        history: &HistoryConfig,
    ) -> Sequence {
        let sequence = self.number();
        let bytes = size(&frame);
        self.places.push_back(Place { key, sequence, arrived: frame.arrived });
        frames.entries.push_back(Entry { sequence, tag, frame });
        frames.bytes += bytes;
        self.bytes += bytes;
        self.frames += 1;
        while !frames.entries.is_empty() && (frames.entries.len() > history.messages || frames.bytes > history.bytes) {
            self.drop_first(frames);
        }
        sequence
    }

    /// Drops all frames of a channel.
    pub fn clear(&mut self, frames: &mut Frames) {
        while !frames.entries.is_empty() {
            self.drop_first(frames);
        }
    }

    /// While the log is over [`crate::limits::NODE_LOG_BYTES`] or its oldest frame is from before `oldest`: the channel
    /// whose frames up to a number have to go, by [`NodeLog::drop_until`].
    pub fn overdue(&mut self, oldest: Micros) -> Option<(usize, Sequence)> {
        let first = self.places.front()?;
        if self.bytes <= self.bounds.log_bytes && first.arrived >= oldest {
            return None;
        }
        self.places.pop_front().map(|place| (place.key, place.sequence))
    }

    /// Drops a channel's frames up to a number. Numbers are never given twice, so a place that another channel left
    /// under the same key drops nothing.
    pub fn drop_until(&mut self, frames: &mut Frames, sequence: Sequence) {
        while frames.first().is_some_and(|first| first <= sequence) {
            self.drop_first(frames);
        }
    }

    /// Clears stale places away once they outnumber the frames. `frames` finds a channel's part of the log.
    pub fn compact<'a>(&mut self, frames: impl Fn(usize) -> Option<&'a Frames>) {
        if self.places.len() > 2 * self.frames + self.bounds.stale_places {
            self.places
                .retain(|place| frames(place.key).and_then(Frames::first).is_some_and(|first| first <= place.sequence));
        }
    }

    /// Bytes of all frames.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Checks what is counted against what there is, right after [`NodeLog::compact`].
    #[cfg(test)]
    pub(super) fn check(&self, frames: usize) -> Result<(), String> {
        if self.frames != frames {
            return Err(format!("the log counts {} frames and has {frames}", self.frames));
        }
        if self.places.len() < frames {
            return Err(format!("{} places for {frames} frames", self.places.len()));
        }
        Ok(())
    }

    fn drop_first(&mut self, frames: &mut Frames) {
        self.bytes -= frames.pop();
        self.frames -= 1;
    }
}

/// Bytes a frame counts.
pub(super) fn size(frame: &Frame) -> usize {
    frame.sse().len() + frame.websocket().len() + FRAME_OVERHEAD
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::limits::NODE_LOG_BYTES;
    use crate::log::frame::{ChannelBlocks, FrameEncoder, FrameKind};
    use crate::log::position::{Epoch, Position};

    fn frame(offset: u64, bytes: usize, arrived: Micros) -> Arc<Frame> {
        let position = Position { epoch: Epoch(1), offset };
        let data = "x".repeat(bytes);
        let kind = FrameKind::Publication;
        Arc::new(FrameEncoder::default().encode(&mut ChannelBlocks::default(), "c", kind, position, &data, arrived))
    }

    fn history(messages: usize, bytes: usize) -> HistoryConfig {
        HistoryConfig { messages, bytes, age: Duration::from_secs(1) }
    }

    fn offsets(frames: &Frames) -> Vec<u64> {
        frames.iter().map(|frame| frame.position.offset).collect()
    }

    #[test]
    fn a_channel_keeps_its_newest() {
        let (mut log, mut frames) = (NodeLog::default(), Frames::default());
        for offset in 1..=5 {
            log.append(&mut frames, 0, (frame(offset, 10, 0), None), &history(3, 1 << 20));
        }
        assert_eq!(offsets(&frames), [3, 4, 5]);
        // A frame alone over the channel's bytes is not kept: the log stays consecutive and empty.
        log.append(&mut frames, 0, (frame(6, 10_000, 0), None), &history(3, 5_000));
        assert!(offsets(&frames).is_empty());
        assert_eq!(log.bytes(), 0);
    }

    #[test]
    fn numbers_find_what_is_still_there() {
        let (mut log, mut frames) = (NodeLog::default(), Frames::default());
        let numbers: Vec<_> = (1..=4)
            .map(|offset| log.append(&mut frames, 0, (frame(offset, 1, 0), None), &history(3, 1 << 20)))
            .collect();
        let found = |number| {
            let (whole, rest) = frames.from(number);
            (whole, rest.map(|frame| frame.position.offset).collect::<Vec<_>>())
        };
        assert_eq!(found(numbers[2]), (true, vec![3, 4]));
        assert_eq!(found(numbers[0]), (false, vec![2, 3, 4]));
        assert_eq!(found(numbers[3] + 1), (false, vec![]));
    }

    #[test]
    fn the_oldest_of_all_channels_go_first() {
        let mut log = NodeLog::default();
        let mut channels = [Frames::default(), Frames::default()];
        let big = NODE_LOG_BYTES / 8;
        let wide = history(100, usize::MAX);
        for offset in 1..=6 {
            let key = usize::from(offset > 2);
            log.append(&mut channels[key], key, (frame(offset, big, offset), None), &wide);
        }
        while let Some((key, sequence)) = log.overdue(0) {
            log.drop_until(&mut channels[key], sequence);
        }
        assert_eq!((offsets(&channels[0]), offsets(&channels[1])), (vec![], vec![4, 5, 6]));
        assert!(log.bytes() <= NODE_LOG_BYTES);
        while let Some((key, sequence)) = log.overdue(6) {
            log.drop_until(&mut channels[key], sequence);
        }
        assert_eq!(offsets(&channels[1]), [6]);
    }

    #[test]
    fn stale_places_are_cleared() {
        let (mut log, mut frames) = (NodeLog::default(), Frames::default());
        for offset in 1..=Bounds::default().stale_places as u64 + 10 {
            log.append(&mut frames, 0, (frame(offset, 1, 0), None), &history(2, 1 << 20));
        }
        log.compact(|_| Some(&frames));
        assert_eq!(log.places.len(), 2);
    }
}
