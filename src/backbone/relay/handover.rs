//! The relay's part in a hand-over: see [`crate::backbone::handover`].

use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::Relay;
use super::channel::{Channel, Exported, Name, Phase};
use super::continuity::{Tip, Verdict, judge};
use crate::backbone::handover::{Piece, Place, SeedChannel, ToBackbone};
use crate::backbone::interface::{Backbone, Tag};
use crate::limits::HANDOVER_PIECE_BYTES;
use crate::log::frame::{FrameKind, FrameParts, Micros};
use crate::log::position::Position;

/// What the relay was asked and has not answered yet.
#[derive(Debug)]
pub(super) enum Awaited {
    /// Every channel is to be subscribed to.
    Subscribed(Sender<Micros>),
    /// After that a heartbeat of the process before is to come that is later than this.
    Beat(Micros, Sender<Micros>),
    /// Nothing is to be missing.
    Settled { beat: Micros, delivered: bool, reply: Sender<Micros> },
}

impl Relay {
    pub(super) fn on_order(&mut self, order: ToBackbone, now: Micros) {
        match order {
            ToBackbone::Export { round, from, reply } => tell(&reply, self.export(round, from)),
            ToBackbone::Import { piece, reply } => tell(&reply, self.import(piece, now)),
            ToBackbone::Prepare { reply } => self.awaited.push(Awaited::Subscribed(reply)),
            ToBackbone::Settle { beat, delivered, reply } => {
                self.awaited.push(Awaited::Settled { beat, delivered, reply });
            }
            ToBackbone::Hold { reply } => {
                self.holding = true;
                tell(&reply, self.beat);
            }
            ToBackbone::Release => self.holding = false,
            ToBackbone::Finish { beat, reply } => {
                self.finish(beat, now);
                tell(&reply, ());
            }
        }
    }

    /// Answers what has come true.
    pub(super) fn answer_awaited(&mut self) {
        for awaited in std::mem::take(&mut self.awaited) {
            match awaited {
                Awaited::Subscribed(reply) if !self.is_prepared() => self.awaited.push(Awaited::Subscribed(reply)),
                Awaited::Subscribed(reply) if matches!(self.backbone, Backbone::Memory(_)) => tell(&reply, 0),
                Awaited::Subscribed(reply) => self.awaited.push(Awaited::Beat(self.predecessor_beat, reply)),
                Awaited::Beat(last, reply) if self.predecessor_beat <= last => {
                    self.awaited.push(Awaited::Beat(last, reply));
                }
                Awaited::Beat(_, reply) => {
                    self.prepared = true;
                    tell(&reply, self.predecessor_beat);
                }
                Awaited::Settled { beat, delivered, reply } if !self.is_settled(beat, delivered) => {
                    self.awaited.push(Awaited::Settled { beat, delivered, reply });
                }
                Awaited::Settled { reply, .. } => tell(&reply, self.beat),
            }
        }
    }

    fn is_prepared(&self) -> bool {
        let settled = |channel: &Channel| matches!(channel.phase, Phase::Following | Phase::Live);
        self.connected && self.to_subscribe.is_empty() && self.channels.iter().all(|(_, channel)| settled(channel))
    }

    fn is_settled(&self, beat: Micros, delivered: bool) -> bool {
        let wanted = |channel: &Channel| !channel.interests.is_empty();
        self.beat >= beat
            && self.to_subscribe.is_empty()
            && self.reads == 0
            && !(delivered && self.outboxes.iter().any(super::Outbox::waits))
            && self.channels.iter().all(|(_, channel)| channel.phase == Phase::Live || !wanted(channel))
    }

    fn export(&mut self, round: u64, from: Place) -> Piece {
        let mut piece = Piece::default();
        let mut room = HANDOVER_PIECE_BYTES;
        if let Place::Channels(first) = from {
            for key in first..self.channels.capacity() {
                if room == 0 {
                    piece.next = Some(Place::Channels(key));
                    return piece;
                }
                let Some(seed) = self.export_channel(round, key, &mut room) else { continue };
                let more = seed.more;
                piece.channels.push(seed);
                if more {
                    piece.next = Some(Place::Channels(key));
                    return piece;
                }
            }
        }
        if let Backbone::Memory(memory) = &mut self.backbone {
            let from = if let Place::Stored(index) = from { index } else { 0 };
            memory.export(round, from, room, &mut piece);
        }
        piece
    }

    /// What of a channel the other process does not have yet; none when nothing.
    fn export_channel(&mut self, round: u64, key: usize, room: &mut usize) -> Option<SeedChannel> {
        let beat = self.beat;
        let channel = self.channels.get_mut(key)?;
        let tip = channel.tip?;
        let before = channel.exported;
        let fresh = before.round != round;
        let restart = fresh || before.gaps != channel.gaps;
        let after = if restart { 0 } else { before.sequence };
        let (mut frames, mut sequence, mut more) = (Vec::new(), after, false);
        for (number, tag, frame) in channel.frames.numbered_after(after) {
            if *room == 0 {
                more = true;
                break;
            }
            let parts = frame.parts();
            *room = room.saturating_sub(parts.bytes());
            frames.push((parts, tag));
            sequence = number;
        }
        let after_beat = if channel.after_beat.0 == beat { channel.after_beat.1 } else { 0 };
        let news = restart || more || !frames.is_empty() || tip.position != before.tip || after_beat > 0;
        channel.exported = Exported { round, sequence, gaps: channel.gaps, tip: tip.position };
        // A channel of no frames is something to send as well.
        *room = room.saturating_sub(channel.name.len());
        news.then(|| SeedChannel {
            name: channel.name.clone(),
            tip: tip.position,
            tag: tip.tag,
            ancestors: channel.ancestors.clone(),
            past: channel.past().to_vec(),
            shards: channel.interests.iter().map(|interest| interest.shard).collect(),
            restart,
            more,
            after_beat,
            frames,
        })
    }

    fn import(&mut self, piece: Piece, now: Micros) -> Result<(), String> {
        if let Backbone::Memory(memory) = &mut self.backbone {
            memory.import(piece.stored, piece.keys, now);
        } else if !piece.stored.is_empty() || !piece.keys.is_empty() {
            return Err("the process before has the embedded backbone, this one has Redis".into());
        }
        piece.channels.into_iter().try_for_each(|seed| self.import_channel(seed, now))
    }

    fn import_channel(&mut self, seed: SeedChannel, now: Micros) -> Result<(), String> {
        let key = match self.names.get(&seed.name) {
            Some(&key) => key,
            None if self.channels.len() >= self.bounds.channels => {
                return Err(format!("more than {} channels", self.bounds.channels));
            }
            None => {
                let key = self.add_channel(&seed.name);
                self.channels[key].seeded = !self.prepared;
                key
            }
        };
        let channel = &mut self.channels[key];
        channel.after_beat = (0, seed.after_beat);
        let Some(tip) = channel.tip else {
            seed.past.iter().for_each(|&epoch| channel.leave_epoch(epoch));
            channel.ancestors.clone_from(&seed.ancestors);
            let start = seed.frames.first().map_or(seed.tip, |(parts, _)| parts.kind.before(parts.position));
            channel.tip = Some(Tip { position: start, tag: None });
            return self.import_frames(key, seed, now);
        };
        if tip.position.epoch != seed.tip.epoch && channel.was_in(seed.tip.epoch) {
            // This process has seen the end of that epoch already.
            return Ok(());
        }
        if let (true, Some((first, _))) = (seed.restart, seed.frames.first()) {
            self.go_to(key, Tip { position: first.kind.before(first.position), tag: None }, now);
        }
        self.import_frames(key, seed, now)
    }

    fn import_frames(&mut self, key: usize, seed: SeedChannel, now: Micros) -> Result<(), String> {
        for (parts, tag) in &seed.frames {
            let Some(tip) = self.channels[key].tip else { return Ok(()) };
            match parts.kind {
                FrameKind::Publication => match judge(tip.position, parts.position) {
                    Verdict::Next => self.import_frame(key, parts, *tag, tip.position)?,
                    Verdict::Duplicate => {}
                    // More was published between two passes than the log holds.
                    Verdict::Jump => {
                        self.go_to(key, Tip { position: parts.kind.before(parts.position), tag: None }, now);
                        self.import_frame(key, parts, *tag, parts.kind.before(parts.position))?;
                    }
                },
                // A channel that went another way hears of these itself.
                FrameKind::Unpositioned if self.channels[key].seeded => {
                    self.import_frame(key, parts, *tag, tip.position)?
                }
                FrameKind::Unpositioned | FrameKind::Gap => {}
            }
        }
        if !seed.more {
            self.go_to(key, Tip { position: seed.tip, tag: seed.tag }, now);
            if let Some(tip) = self.channels[key].tip.as_mut().filter(|tip| tip.position == seed.tip) {
                tip.tag = seed.tag;
            }
        }
        Ok(())
    }

    fn import_frame(&mut self, key: usize, parts: &FrameParts, tag: Option<Tag>, from: Position) -> Result<(), String> {
        let channel = &mut self.channels[key];
        let frame = channel.blocks.restore(parts).map_err(|error| format!("channel {}: {error}", channel.name))?;
        channel.tip = Some(Tip { position: parts.position, tag });
        self.keep_and_post(key, Arc::new(frame), tag, from);
        Ok(())
    }

    /// Moves a channel on to a position without what lies between: nobody of this process was served yet, and whoever comes from
    /// the other one has seen it there.
    fn go_to(&mut self, key: usize, to: Tip, now: Micros) {
        let Some(tip) = self.channels[key].tip else { return };
        let ahead = tip.position.epoch == to.position.epoch && tip.position.offset >= to.position.offset;
        if !ahead {
            self.restart_at(key, tip.position, to, now);
        }
    }

    /// The other process has said its last word.
    fn finish(&mut self, beat: Micros, now: Micros) {
        let mut followed = Vec::new();
        for (key, channel) in &mut self.channels {
            if channel.interests.is_empty() && channel.linger_until.is_none() {
                let until = now + Micros::try_from(self.settings.linger.as_micros()).unwrap_or(Micros::MAX - now);
                channel.linger_until = Some(until);
                self.lingering.push_back((until, Name { key, life: channel.life }));
            }
            if channel.phase == Phase::Following {
                let mut seen = channel.after_beat.1;
                channel.pending.retain(|held| {
                    if held.message.position.is_some() || held.beat > beat {
                        return true;
                    }
                    let had = held.beat < beat || seen > 0;
                    seen = seen.saturating_sub(u32::from(held.beat == beat));
                    !had
                });
                followed.push(Name { key, life: channel.life });
            }
        }
        for name in followed {
            self.go_live(name, now);
        }
        self.follows = None;
    }
}

/// Answers. Whoever asked and is gone has given up.
fn tell<T>(reply: &Sender<T>, answer: T) {
    let _ = reply.send(answer);
}
