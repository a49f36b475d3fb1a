//! From the relay to the shards: encode once, keep, and post to whoever wants the channel.

use std::sync::Arc;

use bytes::Bytes;

use super::Relay;
use super::channel::Channel;
use super::continuity::Tip;
use super::node_log::Frames;
use super::outbox::Missed;
use crate::backbone::interface::Tag;
use crate::log::frame::{Frame, FrameKind, Micros};
use crate::log::position::Position;
use crate::shard::mailbox::ToShard;

impl Relay {
    /// Delivers a publication that follows the channel's last one.
    pub(super) fn deliver(&mut self, key: usize, tip: Tip, data: &Bytes, now: Micros) {
        let Some(last) = self.channels[key].tip else { return };
        if data.len() > self.bounds.payload_bytes {
            self.status.oversized.add(1);
            self.announce_gap(key, last.position, tip, now);
            return;
        }
        self.channels[key].tip = Some(tip);
        self.append_and_post(key, FrameKind::Publication, tip, last.position, data, now);
    }

    /// Delivers a message that was published without a position.
    pub(super) fn deliver_unpositioned(&mut self, key: usize, data: &Bytes, now: Micros) {
        let Some(last) = self.channels[key].tip else { return };
        if data.len() > self.bounds.payload_bytes {
            self.status.oversized.add(1);
            return;
        }
        self.append_and_post(key, FrameKind::Unpositioned, last, last.position, data, now);
    }

    /// Keeps a publication of a channel that is being opened: nobody was told of it yet.
    pub(super) fn fill(&mut self, key: usize, at: Tip, data: &Bytes, now: Micros) {
        let frame = self.encode(key, FrameKind::Publication, at.position, data, now);
        self.log.append(&mut self.channels[key].frames, key, (frame, at.tag), &self.settings.history);
    }

    /// Announces that what lies between two positions is lost. The channel's log starts anew: it stays consecutive.
    pub(super) fn announce_gap(&mut self, key: usize, from: Position, tip: Tip, now: Micros) {
        let to = tip.position;
        // One line a channel can be very many: the counter is what an operator watches.
        tracing::debug!(channel = %self.channels[key].name, ?from, ?to, "publications are lost");
        self.status.gaps.add(1);
        self.restart_at(key, from, tip, now);
    }

    /// Goes on at a position that does not follow: the channel's log starts anew, and whoever wants the channel is told.
    pub(super) fn restart_at(&mut self, key: usize, from: Position, tip: Tip, now: Micros) {
        let to = tip.position;
        let frame = self.gap_frame(key, from, to, now);
        let channel = &mut self.channels[key];
        if to.epoch != from.epoch {
            channel.leave_epoch(from.epoch);
        }
        if !planted!(LogAcrossGap) {
            self.log.clear(&mut channel.frames);
        }
        channel.gaps += 1;
        channel.tip = Some(tip);
        let sequence = self.log.number();
        self.post(key, &frame, sequence, from);
    }

    /// Tells a shard that a channel is live and what the node has of its history.
    pub(super) fn tell_live(&mut self, key: usize, shard: usize) {
        let channel = &mut self.channels[key];
        let Some(tip) = channel.tip else { return };
        let Some(interest) = channel.interests.iter_mut().find(|interest| interest.shard == shard) else { return };
        interest.live = true;
        // A message without a position cannot be resumed, so it is no history.
        let frames = channel.frames.iter().filter(|frame| frame.kind == FrameKind::Publication).cloned().collect();
        self.outboxes[shard].send(ToShard::Live { channel: interest.local, position: tip.position, frames });
    }

    /// Posts what waits for a shard, as far as its mailbox has room.
    pub(super) fn flush(&mut self, shard: usize, now: Micros) {
        if !self.outboxes[shard].drain() {
            return;
        }
        while let Some((key, missed)) = self.outboxes[shard].next_missed() {
            let (whole, rest) = self.channels[key].frames.from(missed.sequence);
            let mut frames: Vec<Arc<Frame>> = rest.cloned().collect();
            if !whole {
                self.status.gaps.add(1);
                let to = before(&self.channels[key], frames.first());
                frames.insert(0, self.gap_frame(key, missed.from, to, now));
            }
            self.outboxes[shard].catch_up(key, missed, frames);
        }
    }

    /// Encodes a payload for every wire format.
    pub(super) fn encode(
        &mut self,
        key: usize,
        kind: FrameKind,
        position: Position,
        data: &[u8],
        now: Micros,
    ) -> Arc<Frame> {
        let channel = &mut self.channels[key];
        let text = String::from_utf8_lossy(data);
        if matches!(text, std::borrow::Cow::Owned(_)) {
            self.status.invalid.add(1);
        }
        Arc::new(self.encoder.encode(&mut channel.blocks, &channel.name, kind, position, &text, now))
    }

    fn append_and_post(&mut self, key: usize, kind: FrameKind, at: Tip, from: Position, data: &Bytes, now: Micros) {
        let frame = self.encode(key, kind, at.position, data, now);
        self.keep_and_post(key, frame, at.tag, from);
    }

    /// Keeps a frame and posts it to whoever wants the channel.
    pub(super) fn keep_and_post(&mut self, key: usize, frame: Arc<Frame>, tag: Option<Tag>, from: Position) {
        let frames: &mut Frames = &mut self.channels[key].frames;
        let sequence = self.log.append(frames, key, (frame.clone(), tag), &self.settings.history);
        self.post(key, &frame, sequence, from);
    }

    fn post(&mut self, key: usize, frame: &Arc<Frame>, sequence: u64, from: Position) {
        for interest in self.channels[key].interests.iter().filter(|interest| interest.live) {
            let missed = Missed { local: interest.local, sequence, from };
            if !self.outboxes[interest.shard].publish(key, frame, missed) {
                self.status.overflows[interest.shard].add(1);
            }
        }
    }

    fn gap_frame(&mut self, key: usize, from: Position, to: Position, now: Micros) -> Arc<Frame> {
        let place =
            |position: Position| serde_json::json!({ "epoch": position.epoch.to_string(), "offset": position.offset });
        let data = serde_json::json!({
            "channel": &*self.channels[key].name, "from": place(from), "to": place(to),
        });
        self.encode(key, FrameKind::Gap, to, data.to_string().as_bytes(), now)
    }
}

/// The position right before a frame of a channel, or the channel's own when there is none.
fn before(channel: &Channel, first: Option<&Arc<Frame>>) -> Position {
    match first {
        Some(frame) => frame.kind.before(frame.position),
        None => channel.tip.map_or(Position::default(), |tip| tip.position),
    }
}
