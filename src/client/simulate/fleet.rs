//! The simulated fleet: clients, nodes, a load balancer and a clock of tenths of a second.
//!
//! A client is at a node, or waits for its next attempt, or waits in a node's accept queue. Each step: what the event does to
//! nodes, then attempts that are due, then every node accepts as many of its queue as it can. The round trips themselves take
//! no time: they are short against the waits, and the same in every form.

use std::collections::{BTreeMap, VecDeque};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::Args;
use super::backoff::{ClientKind, Random};
use crate::limits::{HISTOGRAM_DIGITS, SIMULATE_STEPS};

/// Steps a second.
pub const STEPS: u64 = 10;
/// The home of a client that is at no node.
const NOWHERE: u32 = u32::MAX;

/// What happens to the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Event {
    /// A node's process dies; its clients notice at once.
    Crash,
    /// Every node in turn is taken out, drained, restarted and taken in again.
    Rolling,
}

/// How a node is chosen among those that are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// Any, which is what DNS and hashing come to.
    Random,
    /// The one with fewer connections of two at random ("least connections" in most proxies).
    TwoChoices,
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Seconds until the event was over and everybody was back.
    pub seconds: f64,
    /// Times that a client lost its node. More than clients when some were moved again.
    pub moves: u64,
    /// Attempts that failed: the node was down, or its accept queue full.
    pub failed_attempts: u64,
    /// Most handshakes a second over the fleet.
    pub peak_reconnects: u64,
    /// Most handshakes a second at one node.
    pub peak_reconnects_at_one: u64,
    /// Most connections that waited at one node to be accepted.
    pub peak_queue: u64,
    /// Most connections that one node held.
    pub peak_connections_at_one: u64,
    /// Half of the moves left a client without a node for no longer than so many seconds.
    pub offline_p50: f64,
    /// 99 % of them.
    pub offline_p99: f64,
    /// All of them.
    pub offline_max: f64,
    /// Clients that had no node when the simulation gave up. 0 unless the fleet cannot take them.
    pub still_waiting: u64,
}

/// One attempt of a client that is without a node.
#[derive(Debug, Clone, Copy)]
struct Attempt {
    client: u32,
    failures: u32,
    /// The step at which it lost its node.
    since: u64,
}

/// What a node is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It takes clients.
    In,
    /// It sends its clients away until this step, then restarts.
    Draining(u64),
    /// It is not there until this step.
    Down(u64),
    /// It is not there, for good.
    Dead,
}

#[derive(Debug)]
struct Node {
    state: State,
    clients: Vec<u32>,
    queue: VecDeque<Attempt>,
    /// Handshakes it may take, in parts of 1/[`STEPS`].
    credit: u64,
    accepted_this_second: u64,
}

/// A fleet under way.
#[derive(Debug)]
pub struct Fleet<'a> {
    args: &'a Args,
    drain: u64,
    jitter_millis: u64,
    random: Random,
    step: u64,
    nodes: Vec<Node>,
    /// Nodes that the load balancer sends clients to.
    listed: Vec<u32>,
    /// Where each client is.
    homes: Vec<u32>,
    /// Attempts by the step at which they are due.
    due: BTreeMap<u64, Vec<Attempt>>,
    /// The next node to restart.
    next: u32,
    offline: Histogram<u64>,
    outcome: Outcome,
    accepted_this_second: u64,
}

impl<'a> Fleet<'a> {
    /// A fleet with its clients spread evenly, for an event with a drain window and a jitter in seconds.
    ///
    /// # Panics
    /// Never: the bounds of the histogram are constants.
    #[must_use]
    pub fn new(args: &'a Args, drain: u32, jitter: u32) -> Self {
        let mut nodes: Vec<Node> = (0..args.nodes)
            .map(|_| Node {
                state: State::In,
                clients: Vec::with_capacity((args.clients / args.nodes) as usize + 1),
                queue: VecDeque::new(),
                credit: 0,
                accepted_this_second: 0,
            })
            .collect();
        let homes: Vec<u32> = (0..args.clients).map(|client| client % args.nodes).collect();
        for (client, home) in (0..).zip(&homes) {
            nodes[*home as usize].clients.push(client);
        }
        Self {
            args,
            drain: u64::from(drain) * STEPS,
            jitter_millis: u64::from(jitter) * 1_000,
            random: Random::new(args.seed),
            step: 0,
            nodes,
            listed: (0..args.nodes).collect(),
            homes,
            due: BTreeMap::new(),
            next: 0,
            offline: Histogram::new_with_bounds(1, SIMULATE_STEPS, HISTOGRAM_DIGITS).expect("the bounds are in order"),
            outcome: Outcome {
                seconds: 0.0,
                moves: 0,
                failed_attempts: 0,
                peak_reconnects: 0,
                peak_reconnects_at_one: 0,
                peak_queue: 0,
                peak_connections_at_one: u64::from(args.clients.div_ceil(args.nodes)),
                offline_p50: 0.0,
                offline_p99: 0.0,
                offline_max: 0.0,
                still_waiting: 0,
            },
            accepted_this_second: 0,
        }
    }

    /// Lets the event happen and waits until everybody is back, or for [`SIMULATE_STEPS`].
    #[must_use]
    pub fn run(mut self) -> Outcome {
        self.run_to_the_end();
        self.finish()
    }

    pub(super) fn run_to_the_end(&mut self) {
        if self.args.event == Event::Crash {
            self.crash();
        }
        while self.step < SIMULATE_STEPS {
            if self.args.event == Event::Rolling {
                self.roll();
            } else if self.step == u64::from(self.args.detect) * STEPS {
                self.listed.retain(|node| self.nodes[*node as usize].state != State::Dead);
            }
            for attempt in self.due.remove(&self.step).unwrap_or_default() {
                self.attempt(attempt);
            }
            self.accept();
            self.step += 1;
            if self.step.is_multiple_of(STEPS) {
                self.end_second();
            }
            if self.is_over() {
                break;
            }
        }
        self.end_second();
    }

    fn is_over(&self) -> bool {
        let rolled = self.args.event == Event::Crash || self.next == self.args.nodes;
        rolled
            && self.due.is_empty()
            && self.nodes.iter().all(|node| node.queue.is_empty() && matches!(node.state, State::In | State::Dead))
    }

    /// The first node dies.
    fn crash(&mut self) {
        self.nodes[0].state = State::Dead;
        for client in std::mem::take(&mut self.nodes[0].clients) {
            self.send_away(client);
        }
    }

    /// Moves the rolling deploy on: nodes drain, go down, come back, and as many as may be out at once are.
    fn roll(&mut self) {
        let mut out = 0;
        for index in 0..self.nodes.len() {
            match self.nodes[index].state {
                State::In | State::Dead => continue,
                State::Draining(until) => {
                    self.drain_some(index, until);
                    if self.step >= until {
                        self.nodes[index].state = State::Down(self.step + u64::from(self.args.restart) * STEPS);
                    }
                }
                State::Down(until) if self.step >= until => {
                    self.nodes[index].state = State::In;
                    self.listed.push(index as u32);
                    continue;
                }
                State::Down(_) => {}
            }
            out += 1;
        }
        while out < self.args.parallel && self.next < self.args.nodes {
            let index = self.next;
            self.next += 1;
            out += 1;
            // It is drained once the load balancer has taken it out, as `weir drain` waits for.
            self.listed.retain(|listed| *listed != index);
            self.nodes[index as usize].state = State::Draining(self.step + self.drain);
            for attempt in std::mem::take(&mut self.nodes[index as usize].queue) {
                self.fail(attempt);
            }
        }
    }

    /// Sends away as many clients as keeps the rest of the window even.
    fn drain_some(&mut self, index: usize, until: u64) {
        let left = until.saturating_sub(self.step) as usize + 1;
        let count = self.nodes[index].clients.len().div_ceil(left);
        for _ in 0..count {
            if let Some(client) = self.nodes[index].clients.pop() {
                self.send_away(client);
            }
        }
    }

    fn send_away(&mut self, client: u32) {
        self.homes[client as usize] = NOWHERE;
        self.outcome.moves += 1;
        self.schedule(Attempt { client, failures: 0, since: self.step });
    }

    fn schedule(&mut self, attempt: Attempt) {
        let advised = match self.args.client {
            ClientKind::EventSource if self.jitter_millis > 0 => self.random.below(self.jitter_millis + 1),
            _ => 0,
        };
        let millis = self.args.client.wait(attempt.failures, advised, &mut self.random);
        let step = self.step + (millis * STEPS).div_ceil(1_000).max(1);
        self.due.entry(step).or_default().push(attempt);
    }

    fn fail(&mut self, attempt: Attempt) {
        self.outcome.failed_attempts += 1;
        self.schedule(Attempt { failures: attempt.failures + 1, ..attempt });
    }

    /// A client connects to where the load balancer sends it.
    fn attempt(&mut self, attempt: Attempt) {
        let node = self.choose();
        let node = &mut self.nodes[node as usize];
        if node.state == State::In && node.queue.len() < self.args.backlog as usize {
            node.queue.push_back(attempt);
            self.outcome.peak_queue = self.outcome.peak_queue.max(node.queue.len() as u64);
        } else {
            self.fail(attempt);
        }
    }

    fn choose(&mut self) -> u32 {
        let mut any = || self.listed[self.random.below(self.listed.len() as u64) as usize];
        let (one, other) = match self.args.balance {
            Balance::Random => return any(),
            Balance::TwoChoices => (any(), any()),
        };
        let load = |node: u32| self.nodes[node as usize].clients.len() + self.nodes[node as usize].queue.len();
        if load(other) < load(one) { other } else { one }
    }

    fn accept(&mut self) {
        for (index, node) in (0..).zip(&mut self.nodes) {
            if node.queue.is_empty() {
                node.credit = 0;
                continue;
            }
            node.credit += u64::from(self.args.accept);
            while node.credit >= STEPS
                && let Some(attempt) = node.queue.pop_front()
            {
                node.credit -= STEPS;
                assert_eq!(self.homes[attempt.client as usize], NOWHERE, "a client connects once");
                self.homes[attempt.client as usize] = index;
                node.clients.push(attempt.client);
                node.accepted_this_second += 1;
                self.accepted_this_second += 1;
                self.offline.saturating_record((self.step - attempt.since).max(1));
            }
        }
    }

    fn end_second(&mut self) {
        let outcome = &mut self.outcome;
        outcome.peak_reconnects = outcome.peak_reconnects.max(self.accepted_this_second);
        self.accepted_this_second = 0;
        for node in &mut self.nodes {
            outcome.peak_reconnects_at_one = outcome.peak_reconnects_at_one.max(node.accepted_this_second);
            outcome.peak_connections_at_one = outcome.peak_connections_at_one.max(node.clients.len() as u64);
            node.accepted_this_second = 0;
        }
    }

    /// Clients at no node, after checking that every other one is at exactly one, where it says that it is.
    pub(super) fn waiting(&self) -> u64 {
        let mut seen = vec![false; self.homes.len()];
        for (index, node) in (0..).zip(&self.nodes) {
            for client in &node.clients {
                assert_eq!(self.homes[*client as usize], index, "client {client} is where it says");
                assert!(!std::mem::replace(&mut seen[*client as usize], true), "client {client} is connected twice");
            }
        }
        let waiting = self.homes.iter().filter(|home| **home == NOWHERE).count();
        assert_eq!(seen.iter().filter(|seen| !**seen).count(), waiting, "nobody is forgotten");
        waiting as u64
    }

    fn finish(mut self) -> Outcome {
        let seconds = |steps: u64| steps as f64 / STEPS as f64;
        self.outcome.still_waiting = self.waiting();
        self.outcome.seconds = seconds(self.step);
        if !self.offline.is_empty() {
            self.outcome.offline_p50 = seconds(self.offline.value_at_quantile(0.5));
            self.outcome.offline_p99 = seconds(self.offline.value_at_quantile(0.99));
            self.outcome.offline_max = seconds(self.offline.max());
        }
        self.outcome
    }
}
