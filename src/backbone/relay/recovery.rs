//! Getting channels live and keeping them whole: subscribe, read the history, merge by offset; the same after a lost
//! connection, a lost message or another epoch.
//!
//! ```text
//! Wanted ─► Subscribing ─► ToRead ─► Reading ─► Live
//!   ▲            messages are held meanwhile      │ a jump, an overrun
//!   └── disconnected, from anywhere     ToRead ◄──┘
//! ```

use bytes::Bytes;

use super::channel::{Name, Phase, Plan};
use super::continuity::{Repair, Step, Tip, Verdict, judge, known_tags, read_since, repair, start_over};
use super::{Relay, Waiting};
use crate::backbone::interface::{BackboneError, Message, Page, Read, Ticket};
use crate::limits::RECOVERY_RETRY_MILLIS;
use crate::log::frame::Micros;
use crate::log::position::Position;

impl Relay {
    pub(super) fn on_connected(&mut self, now: Micros) {
        tracing::info!(channels = self.channels.len(), "the backbone is connected");
        self.status.set_connected(now);
        self.connected = true;
        self.to_subscribe = self.channels.iter().map(|(key, channel)| Name { key, life: channel.life }).collect();
    }

    pub(super) fn on_disconnected(&mut self, reason: &str, now: Micros) {
        if self.status.set_disconnected(reason, now) {
            tracing::warn!(reason, "the backbone connection is lost");
        } else {
            tracing::debug!(reason, "the backbone cannot be reached");
        }
        self.connected = false;
        self.to_subscribe.clear();
        self.subscribing = None;
        self.to_read.clear();
        self.to_retry.clear();
        self.fetches.forget_all();
        for (_, channel) in &mut self.channels {
            channel.phase = Phase::Wanted;
            // Another process vouched for what came before a subscription that is over.
            channel.seeded = false;
            // The server behind the next connection may never have had them; what it has is read there.
            if !planted!(HeldForever) {
                channel.pending.clear();
            }
        }
    }

    /// Messages were dropped on the way: any live channel may lack some.
    pub(super) fn on_overrun(&mut self) {
        tracing::warn!("the queue from the backbone was full: reading every channel anew");
        self.status.overruns.add(1);
        for (key, channel) in &mut self.channels {
            // One that follows another process may lack messages too: the read shows what.
            if matches!(channel.phase, Phase::Live | Phase::Following) {
                channel.phase = Phase::ToRead(Plan::Repair);
                self.to_read.push_back(Name { key, life: channel.life });
            }
        }
    }

    /// Subscribes the next channels that wait for it, a batch at a time.
    pub(super) fn subscribe_some(&mut self, now: Micros) {
        if !self.connected || self.subscribing.is_some() || self.to_subscribe.is_empty() {
            return;
        }
        let (mut batch, mut names) = (Vec::new(), Vec::new());
        while batch.len() < self.bounds.subscribe_batch
            && let Some(name) = self.to_subscribe.pop_front()
        {
            let Some(channel) = self.channels.get_mut(name.key) else { continue };
            if channel.life == name.life && channel.phase == Phase::Wanted {
                channel.phase = Phase::Subscribing;
                names.push(channel.name.clone());
                batch.push(name);
            }
        }
        if !batch.is_empty() {
            let ticket = self.ticket();
            self.subscribing = Some((ticket, batch));
            self.backbone.subscribe(ticket, names, now);
            if planted!(ReadTooEarly) {
                self.on_subscribed(ticket);
            }
        }
    }

    pub(super) fn on_subscribed(&mut self, ticket: Ticket) {
        let Some((_, batch)) = self.subscribing.take_if(|(expected, _)| *expected == ticket) else { return };
        for name in batch {
            let Some(channel) = self.channels.get_mut(name.key) else { continue };
            if channel.life == name.life && channel.phase == Phase::Subscribing {
                if channel.seeded && self.follows.is_some() {
                    channel.phase = Phase::Following;
                    continue;
                }
                channel.phase = Phase::ToRead(if channel.tip.is_some() { Plan::Repair } else { Plan::Open });
                self.to_read.push_back(name);
            }
        }
    }

    /// Starts reads that wait, up to [`crate::limits::RECOVERY_READS`] at once.
    pub(super) fn read_some(&mut self, now: Micros) {
        while self.reads < self.bounds.reads
            && let Some(name) = self.to_read.pop_front()
        {
            let Some(channel) = self.channels.get(name.key) else { continue };
            if let (true, Phase::ToRead(plan)) = (channel.life == name.life, channel.phase) {
                self.start_read(name, plan, now);
            }
        }
    }

    fn start_read(&mut self, name: Name, plan: Plan, now: Micros) {
        let ticket = self.ticket();
        self.reads += 1;
        self.waiting.insert(ticket, Waiting::Recovery(name));
        let channel = &mut self.channels[name.key];
        channel.phase = Phase::Reading(plan, ticket);
        channel.pending.cover();
        let newest = Read {
            channel: channel.name.clone(),
            since: None,
            limit: self.settings.history.messages,
            reverse: true,
            create: true,
        };
        match (plan, channel.tip) {
            (Plan::Renew(epoch), Some(_)) => self.backbone.renew(ticket, newest.channel, epoch, now),
            (Plan::Repair, Some(tip)) => {
                self.status.repairs.add(1);
                let since = Some(read_since(tip.position));
                let read = Read { since, limit: self.bounds.page, reverse: false, create: false, ..newest };
                self.backbone.read(ticket, read, now);
            }
            _ => self.backbone.read(ticket, newest, now),
        }
    }

    /// A read for a channel came back, or failed.
    pub(super) fn on_page(&mut self, ticket: Ticket, name: Name, page: Result<Page, BackboneError>, now: Micros) {
        self.reads -= 1;
        let Some(channel) = self.channels.get(name.key) else { return };
        let Phase::Reading(plan, expected) = channel.phase else { return };
        if channel.life != name.life || expected != ticket {
            return;
        }
        let mut page = match page {
            Ok(page) => page,
            Err(error) => {
                tracing::debug!(channel = %channel.name, %error, "a channel's history could not be read");
                self.status.failed_reads.add(1);
                self.channels[name.key].phase = Phase::ToRead(plan);
                if !planted!(RetryForgotten) {
                    self.to_retry.push_back((now + RECOVERY_RETRY_MILLIS * 1_000, name));
                }
                return;
            }
        };
        if matches!(plan, Plan::Open | Plan::StartOver) {
            page.publications.reverse();
        }
        match (plan, channel.tip) {
            (Plan::Repair, Some(tip)) => match repair(tip, page, self.bounds.page) {
                Repair::Steps { steps, more } => {
                    self.take_steps(name.key, steps, now);
                    if more {
                        self.read_next(name, Plan::Repair);
                        return;
                    }
                }
                Repair::OtherEpoch => return self.read_next(name, Plan::StartOver),
                Repair::Rewound => return self.read_next(name, Plan::Renew(tip.position.epoch)),
            },
            (Plan::Renew(_), Some(_)) => return self.read_next(name, Plan::StartOver),
            (Plan::StartOver, Some(tip)) if page.head.epoch == tip.position.epoch => {
                return self.read_next(name, Plan::Repair);
            }
            // Back in an epoch that was left: its positions would mean two things.
            (Plan::StartOver, Some(_)) if channel.was_in(page.head.epoch) => {
                return self.read_next(name, Plan::Renew(page.head.epoch));
            }
            (Plan::StartOver, Some(tip)) => {
                let channel = &self.channels[name.key];
                let known = known_tags(tip, channel.frames.tags());
                let relation = channel.relation(tip.position.epoch, &page);
                let ancestors = page.continues.clone();
                self.take_steps(name.key, start_over(tip, &known, relation, page), now);
                self.channels[name.key].ancestors = ancestors;
            }
            _ => self.open(name.key, page, now),
        }
        self.go_live(name, now);
    }

    fn read_next(&mut self, name: Name, plan: Plan) {
        self.channels[name.key].phase = Phase::ToRead(plan);
        // Before the channels that have not begun: this one holds messages.
        self.to_read.push_front(name);
    }

    fn take_steps(&mut self, key: usize, steps: Vec<Step>, now: Micros) {
        for step in steps {
            match step {
                Step::Gap { from, to } => self.announce_gap(key, from, to, now),
                Step::Deliver(stored) => {
                    let Some(tip) = self.channels[key].tip else { return };
                    self.status.repaired.add(1);
                    let position = Position { offset: stored.offset, ..tip.position };
                    self.deliver(key, Tip { position, tag: stored.tag }, &stored.data, now);
                }
            }
        }
    }

    /// Takes over what the backbone has of a channel nobody here has seen before, as far as it is consecutive up to
    /// the head.
    fn open(&mut self, key: usize, page: Page, now: Micros) {
        let head = page.head;
        let channel = &mut self.channels[key];
        channel.tip = Some(Tip { position: head, tag: page.tag });
        channel.ancestors.clone_from(&page.continues);
        let largest = self.bounds.payload_bytes;
        let held = page.publications.iter().rev().zip(0..);
        let count = held.take_while(|(s, back)| s.offset + back == head.offset && s.data.len() <= largest).count();
        let consecutive = &page.publications[page.publications.len() - count..];
        for stored in consecutive {
            let at = Tip { position: Position { epoch: head.epoch, offset: stored.offset }, tag: stored.tag };
            self.fill(key, at, &stored.data, now);
        }
        let shards: Vec<usize> = self.channels[key].interests.iter().map(|interest| interest.shard).collect();
        for shard in shards {
            self.tell_live(key, shard);
        }
    }

    /// Delivers what was held meanwhile. The channel is live unless one of those messages jumps again.
    pub(super) fn go_live(&mut self, name: Name, now: Micros) {
        self.channels[name.key].phase = Phase::Live;
        while let Some(held) = self.channels[name.key].pending.pop() {
            match self.take_message(name.key, &held.message, now) {
                Verdict::Next | Verdict::Duplicate => {}
                // The read knew of no such position although it was started later than the message came.
                Verdict::Jump if held.covered => self.status.strays.add(1),
                Verdict::Jump => {
                    self.channels[name.key].pending.put_back(held);
                    return self.read_next(name, Plan::Repair);
                }
            }
        }
    }

    /// A message arrived on a subscribed channel.
    pub(super) fn on_message(&mut self, message: Message, now: Micros) {
        // Not known: it was on its way when the channel was unsubscribed.
        let Some(&key) = self.names.get(message.channel.as_str()) else { return };
        self.status.received.add(1);
        let channel = &mut self.channels[key];
        if channel.phase != Phase::Live {
            channel.pending.push(message, self.predecessor_beat, &self.bounds);
            return;
        }
        let name = Name { key, life: channel.life };
        if self.take_message(key, &message, now) == Verdict::Jump {
            self.channels[key].pending.push(message, self.predecessor_beat, &self.bounds);
            self.read_next(name, Plan::Repair);
        }
    }

    fn take_message(&mut self, key: usize, message: &Message, now: Micros) -> Verdict {
        let data: &Bytes = &message.data;
        let (Some(position), Some(tip)) = (message.position, self.channels[key].tip) else {
            self.count_after_beat(key);
            self.deliver_unpositioned(key, data, now);
            return Verdict::Next;
        };
        let verdict = judge(tip.position, position);
        match verdict {
            Verdict::Next => self.deliver(key, Tip { position, tag: message.tag }, data, now),
            Verdict::Duplicate => self.status.duplicates.add(1),
            Verdict::Jump => {}
        }
        verdict
    }
}
