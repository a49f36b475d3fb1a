//! The end of a node, in the order that costs its clients least: first it is not ready, then it sends them away a few at a
//! time, then it stops.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::{Node, NodeState, RETRY, tell};
use crate::control::admin::{Command, Operated};
use crate::control::config::reload::{Change, Reload, reload};
use crate::control::config::{ConfigErrors, Loaded};
use crate::control::signals::Signal;
use crate::limits::{DRAIN_HASTENED_MILLIS, FAREWELL_MILLIS};
use crate::metrics::PHASES;
use crate::shard::mailbox::ToShard;

/// Where a node is in its life. It only ever moves down this list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Clients are served.
    Serving,
    /// As before, but `/health/ready` says no, so that balancers send nobody any more.
    Unready,
    /// Nobody is accepted, and clients are told to go elsewhere, a few at a time.
    Draining,
    /// Whoever is left is told at once, and the threads end.
    Stopping,
}

impl Phase {
    const ALL: [Self; PHASES.len()] = [Self::Serving, Self::Unready, Self::Draining, Self::Stopping];

    /// Its name in metrics and answers.
    pub(super) fn label(self) -> &'static str {
        PHASES[self as usize]
    }

    fn from_number(number: u8) -> Self {
        Self::ALL.get(usize::from(number)).copied().unwrap_or(Self::Stopping)
    }
}

/// Where a node's settings come from.
pub struct Sources {
    /// Reads them again.
    pub load: Box<dyn Fn() -> Result<Loaded, ConfigErrors>>,
    /// Has other lines written to the log from now on.
    pub set_log_filter: Box<dyn Fn(&str)>,
}

/// How urgently the node is to end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Haste {
    /// It is not to end.
    #[default]
    None,
    /// As the configuration says: SIGTERM, `weir drain`.
    Paced,
    /// Somebody waits: a second signal, or SIGINT.
    Hastened,
    /// Now: one signal more.
    AtOnce,
}

/// The end under way.
#[derive(Debug, Default)]
pub(super) struct Ending {
    haste: Haste,
    /// When the present phase is over.
    until: Option<Instant>,
    /// Shards that were not told of the drain yet, because their mailbox was full.
    untold: Vec<usize>,
    /// Shards that were not told of other settings yet.
    unreloaded: Vec<usize>,
    window: Duration,
    /// Connections when the drain began.
    began_with: u64,
    reported: Option<Instant>,
    /// Who asked for the upgrade under way.
    pub(super) upgrade: Option<oneshot::Sender<Result<Value, String>>>,
}

/// Time between two lines in the log about a drain.
const REPORT_EVERY: Duration = Duration::from_secs(5);
/// Time between two looks at how many are left.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(100);

impl Node {
    /// Takes up a signal.
    pub(super) fn on_signal(&mut self, signal: Signal) {
        let haste = self.ending.haste;
        match signal {
            Signal::Upgrade => {
                if let Err(error) = self.begin_upgrade() {
                    tracing::warn!(error, "no upgrade");
                }
            }
            Signal::Reload => drop(self.reload()),
            // Somebody at a keyboard, or a service manager for the second time.
            Signal::Interrupt | Signal::Terminate if haste >= Haste::Hastened => self.ending.haste = Haste::AtOnce,
            Signal::Terminate if haste == Haste::None => self.end(Haste::Paced, signal.name()),
            Signal::Interrupt | Signal::Terminate => self.end(Haste::Hastened, signal.name()),
        }
    }

    /// Takes up a command of the operator.
    pub(super) fn on_command(&mut self, command: Command) {
        match command {
            Command::Drain(reply) => {
                let haste = if self.ending.haste == Haste::None { Haste::Paced } else { Haste::Hastened };
                self.end(haste.max(self.ending.haste), "weir drain");
                // Who asked may have gone.
                let _ = reply.send(self.state.status());
            }
            Command::Reload(reply) => drop(reply.send(self.reload())),
            Command::Upgrade(reply) => match self.begin_upgrade() {
                Ok(()) => self.ending.upgrade = Some(reply),
                Err(reason) => drop(reply.send(Err(reason))),
            },
        }
    }

    /// Reads the configuration again, and has what may change at once change. Returns what did and what waits for a restart.
    fn reload(&mut self) -> Result<Value, String> {
        let Some(sources) = &self.sources else { return Err("this node has no configuration to read again".into()) };
        self.notifier.reloading();
        let reload = (sources.load)().and_then(|loaded| reload(&self.settings, &loaded));
        let told = match reload {
            Ok(Reload { settings, live, restart }) => {
                if settings.log.filter != self.settings.log.filter {
                    (sources.set_log_filter)(&settings.log.filter);
                }
                for Change { key, from, to } in &live {
                    tracing::info!(key, from, to, "changed");
                }
                for Change { key, from, to } in &restart {
                    tracing::warn!(key, from, to, "changes with a restart or weir upgrade");
                }
                self.settings = Arc::new(settings);
                self.ending.unreloaded = (0..self.mailboxes.len()).collect();
                tracing::debug!(shards = self.mailboxes.len(), "the shards are told of the settings");
                Ok(json!({ "changed": live, "needs_restart": restart }))
            }
            Err(errors) => {
                tracing::error!(%errors, "the configuration stays as it is");
                Err(errors.to_string())
            }
        };
        self.notifier.ready();
        told
    }

    /// Begins to end, or makes haste.
    fn end(&mut self, haste: Haste, asked_by: &str) {
        self.ending.haste = haste;
        // A hand-over would take the connections out of a drain's hands.
        drop(self.abort_upgrade());
        let connections = self.state.connections();
        if haste == Haste::Paced {
            let unready = self.settings.drain.unready;
            tracing::info!(asked_by, connections, unready_millis = unready.as_millis() as u64, "not ready any more");
            self.state.enter(Phase::Unready);
            self.notifier.stopping();
            self.ending.until = Some(Instant::now() + unready);
        } else {
            tracing::info!(asked_by, connections, "making haste");
            self.notifier.stopping();
            self.drain(self.settings.drain.window.min(Duration::from_millis(DRAIN_HASTENED_MILLIS)));
        }
    }

    fn drain(&mut self, window: Duration) {
        if self.state.phase() < Phase::Draining {
            self.ending.began_with = self.state.connections();
        }
        self.state.enter(Phase::Draining);
        // A listener that is open takes connections, also when nobody accepts them.
        self.succession.listeners.clear();
        self.ending.window = window;
        self.ending.until = Some(Instant::now() + window + Duration::from_millis(FAREWELL_MILLIS));
        self.ending.untold = (0..self.mailboxes.len()).collect();
        tracing::info!(connections = self.ending.began_with, window_millis = window.as_millis() as u64, "draining");
        self.go_on_ending();
    }

    /// Goes on with the end. True when it is time to stop.
    pub(super) fn go_on_ending(&mut self) -> bool {
        let now = Instant::now();
        let window = self.ending.window;
        tell(&self.mailboxes, &mut self.ending.unreloaded, || ToShard::Reload(Arc::clone(&self.settings)));
        tell(&self.mailboxes, &mut self.ending.untold, || ToShard::Drain { window });
        let over = self.ending.until.is_some_and(|until| now >= until);
        match self.state.phase() {
            _ if self.ending.haste == Haste::AtOnce => true,
            Phase::Serving => false,
            Phase::Unready => {
                if over {
                    self.drain(self.settings.drain.window);
                }
                false
            }
            Phase::Draining | Phase::Stopping => {
                let left = self.state.connections();
                if self.ending.reported.is_none_or(|at| now - at >= REPORT_EVERY) {
                    self.ending.reported = Some(now);
                    tracing::info!(left, of = self.ending.began_with, "draining");
                }
                over || (self.ending.untold.is_empty() && left == 0)
            }
        }
    }

    /// Whether nobody is to be waited for.
    pub(super) fn ends_at_once(&self) -> bool {
        self.ending.haste == Haste::AtOnce
    }

    /// How long the main thread may sleep when nothing wakes it.
    pub(super) fn next_look(&self) -> Option<Duration> {
        let now = Instant::now();
        let ending = match self.state.phase() {
            _ if !(self.ending.untold.is_empty() && self.ending.unreloaded.is_empty()) => Some(RETRY),
            Phase::Serving => None,
            Phase::Unready => self.ending.until.map(|until| until.saturating_duration_since(now)),
            Phase::Draining | Phase::Stopping => Some(LOOK_EVERY),
        };
        [ending, self.notifier.next_look()].into_iter().flatten().min()
    }

    /// Tells the service manager how it goes.
    pub(super) fn tell_service_manager(&mut self) {
        let progress = self.state.metrics.shards.iter().map(|shard| shard.turns.get());
        let mut progress: Vec<_> = progress.chain([self.state.report.turns()]).collect();
        if self.state.phase() == Phase::Stopping {
            // Threads end one after the other, and have a bound for it.
            progress.clear();
        }
        if self.notifier.feed(progress, Instant::now()) || self.state.phase() != Phase::Serving {
            let (phase, count) = (self.state.phase().label(), self.state.connections());
            let status = format!("{phase}, {count} connection{}", if count == 1 { "" } else { "s" });
            self.notifier.status(status);
        }
    }
}

impl NodeState {
    /// Where the node is in its life.
    pub(super) fn phase(&self) -> Phase {
        Phase::from_number(self.phase.load(std::sync::atomic::Ordering::Relaxed))
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, std::sync::atomic::Ordering::Relaxed);
    }

    /// Established streams and polls that wait, over all shards.
    fn connections(&self) -> u64 {
        self.by_protocol().iter().sum()
    }

    fn by_protocol(&self) -> [u64; 3] {
        let mut sums = [0; 3];
        for shard in &self.metrics.shards {
            for (sum, gauge) in sums.iter_mut().zip([&shard.sse, &shard.websocket, &shard.poll]) {
                *sum += gauge.get();
            }
        }
        sums
    }
}

impl Operated for NodeState {
    fn status(&self) -> Value {
        use crate::shard::start::NodeReport as _;
        let [sse, websocket, poll] = self.by_protocol();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "phase": self.phase().label(),
            "not_ready_because": self.ready().err(),
            "connections": { "sse": sse, "websocket": websocket, "poll": poll },
        })
    }
}
