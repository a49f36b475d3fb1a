//! One simulated world: shards, a relay, its way to a server, and everything that goes wrong between them.

use std::cell::Cell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::account::Expected;
use super::backbone::SimulatedBackbone;
use super::invariants::{self, Interests};
use super::plan::Plan;
use super::server::Server;
use super::shard::{Shard, Taken};
use crate::backbone::interface::Backbone;
use crate::backbone::relay::Relay;
use crate::backbone::status::BackboneStatus;
use crate::limits::HEARTBEAT_STALE_MILLIS;
use crate::log::frame::Micros;
use crate::shard::mailbox::{ToRelay, ToShard};
use crate::shard::simulation::random::Random;
use crate::shard::simulation::trace::{Counts, Trace};

/// Microseconds within which a healthy world comes to rest: a session that went deaf is noticed, a read is tried again.
const REST: Micros = 4 * HEARTBEAT_STALE_MILLIS * 1_000;

thread_local! {
    static NOW: Cell<Micros> = const { Cell::new(0) };
}

/// How a seed went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pub hash: u64,
    pub counts: Counts,
}

/// Runs a seed.
pub fn run(seed: u64, print: bool) -> Result<Run, String> {
    let trace = Trace::new(print);
    let outcome = catch_unwind(AssertUnwindSafe(|| World::new(seed, &trace).live()));
    let outcome = outcome.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref().copied());
        Err(format!("a panic: {}", text.unwrap_or("without words")))
    });
    outcome.map(|()| Run { hash: trace.hash(), counts: trace.counts() })
}

/// See the module.
pub(super) struct World<'a> {
    pub(super) random: Random,
    pub(super) trace: &'a Trace,
    pub(super) plan: Plan,
    pub(super) now: Micros,
    pub(super) relay: Relay,
    pub(super) requests: VecDeque<ToRelay>,
    pub(super) shards: Vec<Shard>,
    pub(super) interests: Interests,
    pub(super) expected: Expected,
    pub(super) published: u64,
}

impl<'a> World<'a> {
    fn new(seed: u64, trace: &'a Trace) -> Self {
        let mut random = Random::new(seed);
        let plan = Plan::new(&mut random);
        let now = 1_000_000;
        NOW.set(now);
        let server = Server::new(plan.settings.history.messages, plan.bounds.payload_bytes, random.split());
        let backbone = SimulatedBackbone::new(server, plan.queue, random.split());
        let shards: Vec<Shard> = (0..plan.shards).map(|shard| Shard::new(shard, plan.mailbox)).collect();
        let status = Arc::new(BackboneStatus::new(shards.len(), || NOW.get()));
        let relay = Relay::within(
            plan.bounds,
            Arc::new(plan.settings.clone()),
            Backbone::Simulated(Box::new(backbone)),
            shards.iter().map(|shard| shard.mailbox.clone()).collect(),
            status,
            now,
        );
        let (requests, interests, expected) = Default::default();
        Self { random, trace, plan, now, relay, requests, shards, interests, expected, published: 0 }
    }

    pub(super) fn backbone(&mut self) -> &mut SimulatedBackbone {
        match &mut self.relay.backbone {
            Backbone::Simulated(simulated) => simulated,
            Backbone::Memory(_) | Backbone::Redis(_) => unreachable!("the world made it"),
        }
    }

    /// Storms, each followed by a calm in which everything has to come right; then everybody leaves.
    fn live(&mut self) -> Result<(), String> {
        for _ in 0..self.plan.storms {
            for _ in 0..self.random.within(30..=200) {
                let micros = self.random.within(1..=2_000) as Micros;
                self.pass(micros);
                self.step()?;
            }
            self.trace.event("calm", self.now, 0u64);
            self.backbone().calm = true;
            self.calm()?;
            self.backbone().calm = false;
        }
        self.backbone().calm = true;
        self.leave()?;
        self.sum_up();
        Ok(())
    }

    fn calm(&mut self) -> Result<(), String> {
        if !self.plan.loud {
            // What was lost or changed without a word shows by what comes next. The first of it may be lost as well, on a
            // session that went deaf.
            for _ in 0..2 {
                self.come_to_rest()?;
                for channel in self.plan.channels.clone() {
                    self.publish_elsewhere(&channel, 10, true, None, true);
                }
            }
        }
        self.come_to_rest()?;
        self.at_rest()
    }

    pub(super) fn pass(&mut self, micros: Micros) {
        self.now += micros;
        NOW.set(self.now);
        let now = self.now;
        self.backbone().watch(now);
    }

    /// One round of the relay's loop: see [`crate::backbone::relay::run`].
    pub(super) fn turn(&mut self) -> Result<(), String> {
        let idle = !self.backbone().has_event() && (self.requests.is_empty() || !self.relay.takes_requests());
        if idle && self.now < self.relay.next_wake() {
            return Ok(());
        }
        for _ in 0..self.random.within(1..=self.plan.turn) {
            let event = self.backbone().try_next();
            let request = if self.relay.takes_requests() { self.requests.pop_front() } else { None };
            if let Some(event) = event {
                self.note_event(&event);
                self.relay.on_event(event, self.now);
            }
            if let Some(request) = request {
                self.note_request(&request);
                self.relay.on_request(request, self.now);
            }
        }
        self.relay.end_turn(self.now);
        self.trace.event("turn", self.relay.channels.len() as u64, self.relay.waiting.len() as u64);
        invariants::check(&self.relay, &self.interests)?;
        self.check_status()
    }

    pub(super) fn take(&mut self, shard: usize) -> Result<bool, String> {
        let Backbone::Simulated(simulated) = &mut self.relay.backbone else { unreachable!("the world made it") };
        let Some(Taken { message, request }) = self.shards[shard].take(&mut simulated.server)? else {
            return Ok(false);
        };
        self.requests.extend(request);
        let (what, a, b) = match &message {
            ToShard::Live { channel, position, frames } => {
                ("live", u64::from(*channel) << 32 | position.offset, frames.len() as u64)
            }
            ToShard::Publication { channel, frame } => ("frame", u64::from(*channel), frame.position.offset),
            ToShard::Missed { channel, frames } => ("missed", u64::from(*channel), frames.len() as u64),
            ToShard::Refused { channel } => ("refused", u64::from(*channel), 0),
            ToShard::Released { channel } => ("released", u64::from(*channel), 0),
            ToShard::Reply { request, .. } => ("reply", *request, 0),
            ToShard::Drain { .. } => ("drain", 0, 0),
            ToShard::Reload(_) => ("reload", 0, 0),
            ToShard::Leave(_) | ToShard::Expect(_) | ToShard::Arrive(_) => ("hand-over", 0, 0),
            ToShard::Stop => ("stop", 0, 0),
        };
        self.trace.event(what, a, (shard as u64) << 32 | b);
        self.trace.said(&message);
        Ok(true)
    }

    /// Nothing goes wrong any more, and everybody does their work.
    pub(super) fn come_to_rest(&mut self) -> Result<(), String> {
        let until = self.now + REST;
        while self.now < until {
            self.pass(1);
            let now = self.now;
            let mut busy = false;
            self.backbone().connect(now);
            for _ in 0..4 {
                busy |= self.backbone().execute(now);
                busy |= self.backbone().answer();
                busy |= self.backbone().change_subscriptions();
                busy |= self.backbone().arrive();
            }
            busy |= self.backbone().has_event() || !self.requests.is_empty();
            self.turn()?;
            for shard in 0..self.shards.len() {
                while self.take(shard)? {
                    busy = true;
                }
            }
            if !busy {
                // Asleep until the next timer of the relay or of the session.
                let wake = self.relay.next_wake().max(self.now + 1);
                self.pass((wake - self.now).min(1_000_000));
            }
        }
        Ok(())
    }

    fn at_rest(&mut self) -> Result<(), String> {
        let Backbone::Simulated(simulated) = &mut self.relay.backbone else { unreachable!("the world made it") };
        if self.relay.status.ready().is_err() {
            return Err(format!("not ready at rest: {:?}", self.relay.status.ready()));
        }
        for shard in &self.shards {
            shard.at_rest(&mut simulated.server)?;
        }
        if !self.relay.is_done() {
            return Err(format!("still waiting at rest: {:?}", self.relay.waiting));
        }
        Ok(())
    }

    /// Everybody leaves: nothing stays behind.
    fn leave(&mut self) -> Result<(), String> {
        for shard in 0..self.shards.len() {
            for channel in self.plan.channels.clone() {
                if self.shards[shard].wants(&channel) {
                    self.requests.extend(self.shards[shard].toggle(&channel));
                }
            }
        }
        self.come_to_rest()?;
        self.pass(Micros::try_from(self.plan.settings.linger.as_micros()).expect("a short time"));
        self.come_to_rest()?;
        if let Some(shard) = self.shards.iter().find(|shard| !shard.is_empty()) {
            return Err(format!("left behind: {shard:?}"));
        }
        let relay = &self.relay;
        let left = [
            ("channels", relay.channels.len()),
            ("bytes", relay.log.bytes()),
            ("requests", relay.waiting.len()),
            ("lingering", relay.lingering.len()),
            ("to subscribe", relay.to_subscribe.len()),
            ("to read", relay.to_read.len() + relay.to_retry.len()),
        ];
        if let Some((what, count)) = left.into_iter().find(|(_, count)| *count > 0) {
            return Err(format!("left behind: {count} {what}"));
        }
        match self.backbone().subscribed() {
            0 => Ok(()),
            count => Err(format!("{count} channels are still subscribed to")),
        }
    }
}
