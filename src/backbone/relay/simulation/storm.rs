//! What happens in a storm, one step after the other.

use std::sync::Arc;

use super::plan::Plan;
use super::shard::Asked;
use super::truth::payload;
use super::world::World;
use crate::log::frame::Micros;
use crate::log::position::Position;
use crate::shard::mailbox::{HistoryQuery, Publish, ToRelay};

impl World<'_> {
    /// One step: somebody gets on with their work, wants something, or something goes wrong.
    pub(super) fn step(&mut self) -> Result<(), String> {
        let now = self.now;
        match self.random.below(100) {
            0..20 => self.turn()?,
            20..30 => _ = self.backbone().execute(now),
            30..40 => _ = self.backbone().answer(),
            40..48 => _ = self.backbone().arrive(),
            48..53 => _ = self.backbone().change_subscriptions(),
            53..63 => self.publish(),
            63..71 => self.ask(),
            71..84 => {
                let shard = self.random.below(self.shards.len());
                for _ in 0..self.random.within(1..=self.plan.mailbox) {
                    self.take(shard)?;
                }
            }
            84..88 => {
                let most = if self.random.once_in(30) { 60_000 } else { 800 };
                let millis = self.random.within(1..=most) as Micros;
                self.trace.event("time passes", millis, 0u64);
                self.pass(millis * 1_000);
            }
            88..91 => self.backbone().connect(now),
            _ => self.fault(),
        }
        Ok(())
    }

    /// Somebody publishes: another node or service, or one of the shards.
    fn publish(&mut self) {
        let channel = self.random.pick(&self.plan.channels).clone();
        let bytes = match self.random.below(30) {
            0 => self.plan.bounds.payload_bytes + 1,
            1 => self.plan.bounds.payload_bytes,
            _ => self.random.within(1..=60),
        };
        let valid = !self.random.once_in(12);
        let key = self.random.once_in(5).then(|| format!("k{}", self.random.below(6)).into_boxed_str());
        match self.random.below(5) {
            0 => {
                self.published += 1;
                let id = self.published;
                self.trace.event("plain", id, bytes as u64);
                self.backbone().server.truth.line(&channel).plain.insert(id);
                self.backbone().publish_plain(&channel, payload('m', id, bytes, valid));
            }
            1 => {
                self.published += 1;
                let id = self.published;
                let shard = self.random.below(self.shards.len());
                let asked = Asked::Publish { channel: channel.clone(), id, key: key.clone() };
                let (shard, request) = self.shards[shard].ask(asked);
                let data = payload('p', id, bytes, true);
                let publish = Publish { channel, data, idempotency_key: key };
                self.requests.push_back(ToRelay::Publish { shard, request, publish });
            }
            _ => {
                let keep = !(self.plan.holes && self.random.once_in(10));
                for _ in 0..if self.random.once_in(10) { self.plan.burst } else { 1 } {
                    self.publish_elsewhere(&channel, bytes, valid, key.clone(), keep);
                }
            }
        }
    }

    /// Another node or service publishes.
    pub(super) fn publish_elsewhere(
        &mut self,
        channel: &Arc<str>,
        bytes: usize,
        valid: bool,
        key: Option<Box<str>>,
        keep: bool,
    ) {
        self.published += 1;
        let data = payload('p', self.published, bytes, valid);
        let (publish, now) = (Publish { channel: channel.clone(), data, idempotency_key: key }, self.now);
        let position = self.backbone().publish_elsewhere(&publish, keep, now);
        self.trace.event("published elsewhere", self.published, position.offset);
    }

    /// A shard asks the relay for something.
    fn ask(&mut self) {
        let channel = self.random.pick(&self.plan.channels).clone();
        let shard = self.random.below(self.shards.len());
        if self.random.once_in(2) {
            let wanted = self.shards[shard].wants(&channel);
            if !wanted || self.random.once_in(3) {
                self.requests.extend(self.shards[shard].toggle(&channel));
            }
            return;
        }
        let known = self.shards[self.random.below(self.shards.len())].position(&channel);
        let head = self.backbone().server.head(&channel);
        let upto = known.filter(|_| !self.random.once_in(4)).unwrap_or(head);
        let back = 1 + self.random.below(6) as u64;
        let Some(offset) = upto.offset.checked_sub(back) else { return };
        let since = Position { offset, ..upto };
        let upto = upto.offset - self.random.below(back as usize) as u64;
        let alone = !self.shards.iter().any(|shard| shard.reads(&channel));
        let query = HistoryQuery { channel, since, upto };
        let server = &mut self.backbone().server;
        // Who joins a read under way gets what was there when it was made.
        let held = alone && query.upto <= head.offset && server.holds(&query.channel, since);
        let asked = Asked::History { query: query.clone(), held, upheavals: server.upheavals };
        let (shard, request) = self.shards[shard].ask(asked);
        self.requests.push_back(ToRelay::History { shard, request, query });
    }

    /// Something goes wrong.
    fn fault(&mut self) {
        let channel = self.random.pick(&self.plan.channels).clone();
        let Plan { loud, forgetful, .. } = self.plan;
        let rare = self.random.once_in(4);
        let what = self.random.below(12);
        let channels = self.plan.channels.clone();
        let backbone = self.backbone();
        let name = match what {
            0 | 1 => {
                backbone.server.replicate();
                "replicated"
            }
            2 if !loud && backbone.lose() => "lost",
            3 if backbone.repeat() => "repeated",
            4 if rare => {
                backbone.deafen();
                "deaf"
            }
            5 if rare => {
                backbone.disconnect("the pub/sub connection broke");
                "session ended"
            }
            6 if rare => {
                backbone.break_all();
                "everything broke"
            }
            7 if rare => {
                let channels = channels.into_iter();
                let lost: Vec<_> = channels.map(|name| (name.clone(), backbone.server.head(&name))).collect();
                backbone.server.fail_over();
                backbone.break_all();
                if self.random.once_in(2) {
                    for (channel, lost) in lost {
                        self.go_on(&channel, lost);
                    }
                    "failed over and went on"
                } else {
                    "failed over"
                }
            }
            8 if rare && !loud => {
                backbone.server.flush();
                "flushed"
            }
            9 if rare && !loud => {
                let epoch = backbone.server.head(&channel).epoch;
                backbone.server.renew(&channel, epoch);
                "renewed elsewhere"
            }
            10 if rare && !loud => {
                backbone.server.evict_meta(&channel);
                "meta evicted"
            }
            11 if forgetful && rare => {
                backbone.server.expire_stream(&channel);
                "stream expired"
            }
            11 if forgetful => {
                backbone.server.trim(&channel, 2);
                "trimmed"
            }
            _ => return,
        };
        self.trace.event(name, 0u64, 0u64);
    }

    /// Others find the server before the node does, and their publications get the offsets that were lost: some of them, all,
    /// or more. Perhaps the entries are gone again before the node comes.
    fn go_on(&mut self, channel: &Arc<str>, lost: Position) {
        let keep = !(self.plan.holes && self.random.once_in(3));
        let missing = lost.offset.saturating_sub(self.backbone().server.head(channel).offset);
        let count = if self.random.once_in(2) {
            missing as usize
        } else {
            self.random.within(0..=missing as usize + self.plan.burst)
        };
        for _ in 0..count {
            self.publish_elsewhere(channel, 10, true, None, keep);
        }
        if !self.plan.forgetful || self.random.once_in(3) {
            return;
        }
        // The entry of the last one that was lost is gone, or the stream up to it, or all of it.
        let after = self.backbone().server.head(channel).offset.saturating_sub(lost.offset);
        if after > 0 && self.random.once_in(2) {
            self.backbone().server.trim(channel, after as usize);
        } else {
            self.backbone().server.expire_stream(channel);
        }
    }
}
