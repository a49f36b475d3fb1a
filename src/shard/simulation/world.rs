//! One simulated world: a shard between a relay and clients, from its first turn to its stop.

mod handover;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::client::{Client, Kind, Node, TASKS};
use super::deadlines::Deadlines;
use super::invariants;
use super::kernel::Kernel;
use super::random::Random;
use super::relay::Relay;
use super::trace::{Counts, Trace};
use crate::log::channel_log::Bounds;
use crate::log::channel_table::{ChannelId, ChannelTable};
use crate::log::frame::Micros;
use crate::metrics::{Counter, DISCONNECT_REASONS, ShardMetrics, ShardRecorder};
use crate::settings::Settings;
use crate::shard::core::{Answer, Core};
use crate::shard::drain::Budgets;
use crate::shard::mailbox::ToShard;

/// What kind of world a seed makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// A few clients and channels, everything small.
    Small,
    /// More members than one turn serves.
    Crowd,
    /// Streams of so many channels that their ids fill a batch.
    Wide,
    /// Logs longer than one send.
    Deep,
}

/// How a world is laid out.
struct Plan {
    shape: Shape,
    channels: usize,
    clients: usize,
    /// Kinds of clients.
    kinds: usize,
    /// Times that a storm and a calm follow each other.
    rounds: usize,
    /// Turns of a storm.
    turns: usize,
    /// Most publications of a burst.
    burst: usize,
    capacity: usize,
    room: usize,
    mailbox: usize,
    /// Bytes of older frames that a log holds.
    older_bytes: u64,
    settings: Settings,
    budgets: Budgets,
    small_budgets: bool,
}

impl Plan {
    fn new(random: &mut Random) -> Self {
        let shape = match random.below(200) {
            0 => Shape::Crowd,
            1 | 2 => Shape::Wide,
            3 | 4 => Shape::Deep,
            _ => Shape::Small,
        };
        let mut settings = Settings::default();
        let seconds = |random: &mut Random| Duration::from_millis(random.within(500..=20_000) as u64);
        settings.sse.heartbeat = Duration::from_millis(random.within(300..=5_000) as u64);
        settings.websocket.ping = Duration::from_secs(random.within(1..=5) as u64);
        settings.websocket.pong = Duration::from_secs(random.within(1..=5) as u64);
        settings.websocket.client_publish = true;
        if shape == Shape::Small {
            settings.history.messages = random.within(2..=40);
            settings.history.bytes = random.within(300..=10_000);
            settings.history.age = seconds(random);
            settings.lag.messages = random.within(2..=40) as u64;
            settings.lag.bytes = random.within(300..=10_000) as u64;
            settings.lag.age = seconds(random);
        }
        let mut budgets = Budgets::default();
        let small_budgets = shape == Shape::Small && random.once_in(2);
        if small_budgets {
            budgets = Budgets {
                own_sends: random.within(1..=5),
                channels: random.within(1..=2),
                sends_per_channel: random.within(1..=4),
                bytes_per_send: random.within(1..=1_000),
                tail_bytes: random.within(200..=1_000),
                reply_bytes: random.within(1..=1_000),
            };
        }
        let (channels, clients, rounds, turns, burst) = match shape {
            Shape::Small => (random.within(1..=4), random.within(2..=7), 2, random.within(20..=80), 4),
            Shape::Crowd => (2, 600, 1, 16, 2),
            Shape::Wide => (110, 7, 1, 8, 60),
            Shape::Deep => (2, 4, 1, 12, 600),
        };
        Self {
            shape,
            channels,
            clients,
            kinds: random.within(2..=3),
            rounds,
            turns,
            burst,
            capacity: match shape {
                Shape::Small => *random.pick(&[60, 300, 1000, 4000, 30_000]),
                Shape::Crowd | Shape::Wide | Shape::Deep => *random.pick(&[30_000, 300_000]),
            },
            room: if shape == Shape::Small && random.once_in(2) { random.within(1..=6) } else { usize::MAX },
            mailbox: if shape == Shape::Small { random.within(3..=40) } else { 2_000 },
            older_bytes: if random.once_in(3) { random.within(100..=5_000) as u64 } else { 1 << 30 },
            settings,
            budgets,
            small_budgets,
        }
    }
}

/// See the module.
struct World {
    plan: Plan,
    random: Random,
    trace: Rc<Trace>,
    now: Micros,
    calm: bool,
    core: Core,
    metrics: Arc<ShardMetrics>,
    kernel: Kernel,
    relay: Relay,
    clients: Vec<Client>,
    deadlines: Deadlines,
    published: u64,
    /// Most deliveries that may have gone uncounted.
    uncounted: u64,
}

impl World {
    fn new(seed: u64, trace: Rc<Trace>) -> Self {
        let mut random = Random::new(seed);
        let plan = Plan::new(&mut random);
        let metrics = Arc::new(ShardMetrics::default());
        let recorder = ShardRecorder::new(metrics.clone());
        let mut core = Core::new(0, Arc::new(plan.settings.clone()), seed, recorder);
        core.budgets = plan.budgets;
        let bounds = Bounds::from(&plan.settings.history);
        core.channels = ChannelTable::new(Bounds { older_bytes: plan.older_bytes, ..bounds });
        let names = (0..plan.channels).map(|channel| Arc::from(format!("channel-{channel}")));
        let relay = Relay::new(names, plan.mailbox, random.split(), trace.clone());
        let kernel = Kernel::new(random.split(), trace.clone(), plan.room);
        let clients = (0..plan.clients).map(|name| {
            let (kind, channels) = match plan.shape {
                Shape::Small | Shape::Deep => {
                    let kind = *random.pick(&[Kind::Sse, Kind::WebSocket, Kind::Poll][..plan.kinds]);
                    let all = (0..plan.channels).filter(|_| random.once_in(2)).collect::<Vec<usize>>();
                    (kind, if all.is_empty() { vec![0] } else { all })
                }
                Shape::Crowd => (if name % 60 == 0 { Kind::WebSocket } else { Kind::Sse }, vec![0]),
                Shape::Wide => (Kind::Sse, (0..plan.channels).collect()),
            };
            Client::new(name, kind, channels, plan.channels, &mut random)
        });
        let clients = clients.collect();
        Self {
            plan,
            random,
            trace,
            now: 1_000_000,
            calm: false,
            core,
            metrics,
            kernel,
            relay,
            clients,
            deadlines: Deadlines::default(),
            published: 0,
            uncounted: 0,
        }
    }

    fn run(&mut self) {
        for round in 1..=self.plan.rounds {
            self.set_calm(false);
            for _ in 0..self.plan.turns {
                self.storm();
                self.turn();
                if self.random.once_in(8) {
                    self.hand_over();
                }
            }
            self.set_calm(true);
            if round == self.plan.rounds && self.random.once_in(4) {
                // The stop comes in the middle of everything.
                break;
            }
            self.come_to_rest();
            // One more in each channel, so that whoever stands in the wrong place shows it.
            for channel in 0..self.plan.channels {
                self.publish(channel, true);
            }
            self.come_to_rest();
        }
        self.stop();
    }

    fn set_calm(&mut self, calm: bool) {
        (self.calm, self.kernel.calm, self.relay.calm) = (calm, calm, calm);
    }

    /// What happens to a world in trouble.
    fn storm(&mut self) {
        self.now += match self.random.below(60) {
            0 => self.random.within(1_000_000..=12_000_000),
            1..6 => self.random.within(50_000..=900_000),
            _ => self.random.within(0..=30_000),
        } as Micros;
        if self.random.once_in(2) {
            let channel = self.random.below(self.plan.channels);
            for _ in 0..self.random.within(1..=self.plan.burst) {
                let channel =
                    if self.plan.shape == Shape::Wide { self.random.below(self.plan.channels) } else { channel };
                let positioned = !self.random.once_in(8);
                self.publish(channel, positioned);
            }
        }
        if self.random.once_in(60) {
            let channel = self.random.below(self.plan.channels);
            self.relay.renew(channel);
        }
    }

    fn publish(&mut self, channel: usize, positioned: bool) {
        self.published += 1;
        let filler = match self.random.below(20) {
            0 => self.random.within(500..=3000),
            _ => self.random.below(60),
        };
        let breaks = if self.random.once_in(4) { "\n" } else { "" };
        let data = format!("{} of channel {channel}{breaks} {}", self.published, "~".repeat(filler));
        self.relay.publish(channel, data, positioned);
    }

    /// One turn of everything.
    fn turn(&mut self) {
        let ends = |metrics: &ShardMetrics| metrics.disconnects.iter().map(Counter::get).sum::<u64>();
        let (ended, shorts) = (ends(&self.metrics), self.metrics.sends_short.get());
        let cuts = self.core.connections.iter().filter(|(_, connection)| connection.cut.is_some()).count() as u64;

        let Self { random, trace, now, calm, core, kernel, relay, clients, plan, .. } = self;
        let (now, calm) = (*now, *calm);
        trace.event("turn", now, core.connections() as u64);
        kernel.begin_turn(now);
        relay.work(now);
        kernel.events(|event| core.on_event(event, now));
        let mut node = Node { core, kernel, relay, random, trace, now, calm, capacity: plan.capacity };
        for client in clients.iter_mut() {
            client.turn(&mut node);
        }
        let messages = if calm { usize::MAX } else { random.below(20) };
        for _ in 0..messages {
            let Some(message) = relay.mailbox.pop_front() else { break };
            core.on_message(message, now);
        }
        core.sweep(now);
        let busy = core.drain(kernel);
        let more = busy | core.dismiss(busy, now);
        assert_eq!(more, !core.ready.is_empty() || !core.due.is_empty(), "whether something is left");
        core.orders.drain(..).for_each(|order| kernel.order(order));
        for answer in std::mem::take(&mut core.answers) {
            match answer {
                Answer::Opened(client) => clients[client].opened(),
                Answer::Refused(client) => clients[client].refused(core),
                Answer::Fetched(task, outcome) => {
                    let (client, attempt) = (task % TASKS, task / TASKS);
                    clients[client].fetched(attempt, &outcome, core);
                }
                Answer::Replied(..) => unreachable!("no task asks anything"),
            }
        }
        core.requests.drain(..).for_each(|request| relay.request(request));
        let reserved: Vec<ChannelId> = clients.iter().flat_map(Client::reserved).copied().collect();
        invariants::check(core, kernel, &reserved, plan.small_budgets, plan.older_bytes);
        self.deadlines.check(core, now);
        if !core.due.is_empty() {
            trace.event("channels left over", core.due.len() as u64, 0u64);
        }

        // A frame that is cut when its subscription ends is finished as the connection's own bytes, and not counted.
        let metrics = &self.metrics;
        self.uncounted += (ends(metrics) - ended).min(cuts + metrics.sends_short.get() - shorts);
    }

    /// Runs without faults until nothing more happens; then everyone must have everything.
    fn come_to_rest(&mut self) {
        for turn in 0.. {
            self.now += 2_000;
            self.turn();
            let still = self.kernel.quiet() && self.relay.quiet() && self.core.ready.is_empty();
            if still && self.core.due.is_empty() && self.clients.iter().all(|client| client.at_rest(&self.kernel)) {
                break;
            }
            assert!(turn < 3_000, "does not come to rest");
        }
        for client in &mut self.clients {
            client.check(&self.relay);
        }
    }

    fn stop(&mut self) {
        let window = Duration::from_millis(self.random.within(0..=300) as u64);
        self.relay.mailbox.push_back(ToShard::Drain { window });
        for turn in 0.. {
            self.now += 2_000;
            if turn == self.random.within(1..=150) || turn == 150 {
                self.relay.mailbox.push_back(ToShard::Stop);
            }
            self.turn();
            if self.core.connections() == 0 && self.relay.quiet() && self.clients.iter().all(Client::away) {
                break;
            }
            assert!(turn < 400, "does not stop");
        }
        assert!(self.core.channels.is_empty(), "channels outlive their last subscriber");
        let Self { clients, kernel, metrics, .. } = self;
        let delivered: u64 = clients.iter_mut().map(|client| client.delivered(kernel)).sum();
        let counted = metrics.deliveries.get();
        let unsubscribes = self.trace.counts().get("asks to unsubscribe").copied().unwrap_or(0);
        let most = counted + self.uncounted + unsubscribes;
        // What a poll is answered counts at once, whether it is read or not.
        let counts = self.plan.kinds == 3 || (counted..=most).contains(&delivered);
        assert!(counts, "{delivered} deliveries, {counted} counted");
        for (label, counter) in DISCONNECT_REASONS.into_iter().zip(&metrics.disconnects) {
            for _ in 0..counter.get() {
                self.trace.event(label, 0u64, 0u64);
            }
        }
    }
}

/// What a run was like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pub hash: u64,
    pub counts: Counts,
}

/// Runs the world of a seed.
///
/// # Errors
/// What was wrong with it.
pub fn run(seed: u64, print: bool) -> Result<Run, String> {
    let trace = Rc::new(Trace::new(print));
    let outcome = catch_unwind(AssertUnwindSafe(|| World::new(seed, trace.clone()).run()));
    match outcome {
        Ok(()) => Ok(Run { hash: trace.hash(), counts: trace.counts() }),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            Err(text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default())
        }
    }
}
