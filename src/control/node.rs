//! Start and stop of a node: its threads, what connects them, and what ends them.
//!
//! ```text
//! main thread: signals, ends of threads          backbone thread: the relay
//! shard-0 … shard-N: one listener, one mailbox, one block of metrics each
//! ```
//!
//! A node ends in order when a signal arrives, and with an error when one of its threads ends before that: half a node is
//! worse than none, because a balancer would go on sending clients to it.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::AtomicU8;
use std::sync::{Arc, Mutex, PoisonError, mpsc as channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::activation::{self, ActivationError};
use super::admin::{Admin, AdminError, Command, Commander, Operated, Place};
use super::clock::monotonic_micros;
use super::handover::Tally;
use super::handover::process::Program;
use super::handover::taking::{Inheritance, TakeError};
use super::host;
use super::notify::Notifier;
use super::signals::Signals;
use crate::backbone::handover::{Succession, ToBackbone};
use crate::limits::{RELAY_REQUESTS, STOP_MILLIS};
use crate::log::frame::Micros;
use crate::metrics::{Metrics, NodeSnapshot};
use crate::settings::Settings;
use crate::shard::mailbox::{Bell, Mailbox, ToRelay, ToShard};
use crate::shard::start::{NodeReport, ShardStart};

mod lifecycle;
mod listen;
mod upgrade;

pub use lifecycle::Sources;
use lifecycle::{Ending, LOOK_EVERY, Phase};

/// What the backbone thread reports to the node.
pub trait BackboneReport: Send + Sync {
    /// Whether publications arrive.
    ///
    /// # Errors
    /// The reason why not, for the operator.
    fn ready(&self) -> Result<(), String>;

    /// Fills in the metrics of the backbone.
    fn measure(&self, snapshot: &mut NodeSnapshot);

    /// Grows each time the thread has looked for work, which it does at least once a second.
    fn turns(&self) -> u64;
}

/// What the backbone thread is given. It ends when every sender of `requests` is gone.
pub struct BackboneStart {
    /// The node's settings.
    pub settings: Arc<Settings>,
    /// What the shards ask.
    pub requests: mpsc::Receiver<ToRelay>,
    /// Where the shards are told, by their index.
    pub shards: Vec<Arc<Mailbox>>,
    /// The node's monotonic clock.
    pub clock: fn() -> Micros,
    /// Who it is, whom it follows, and what it is asked when another follows.
    pub succession: Succession,
}

/// The threads' bodies. They are values so that a test can start a node without sockets or a backbone behind it.
pub struct Parts {
    /// Runs the relay until its requests end.
    pub backbone: Box<dyn FnOnce(BackboneStart) -> Result<(), String> + Send>,
    /// Runs one shard until it is told [`ToShard::Stop`].
    pub shard: fn(ShardStart) -> Result<(), String>,
    /// What the relay reports meanwhile.
    pub report: Arc<dyn BackboneReport>,
}

/// Why a node did not start, or did not end in order.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The driver asked for cannot be used.
    #[error(transparent)]
    Driver(#[from] host::DriverError),
    /// The listening sockets that were passed in cannot be used.
    #[error(transparent)]
    Activation(#[from] ActivationError),
    /// The listening sockets cannot be made.
    #[error("cannot listen on {address}: {source}{hint}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
        /// What to do about it.
        hint: &'static str,
    },
    /// The system refused a thread, a descriptor or randomness.
    #[error("cannot make {what}: {source}")]
    Resource {
        /// What was asked for.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A thread ended although nobody stopped the node.
    #[error("thread {thread} ended: {reason}")]
    ThreadEnded {
        /// Its name.
        thread: String,
        /// Its error.
        reason: String,
    },
    /// The operator's commands cannot be taken where the configuration says.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The process that runs already did not hand over.
    #[error(transparent)]
    Take(#[from] TakeError),
    /// Threads were still running when the time to stop was over, or a second signal came.
    #[error("stopped before these threads had ended: {0}")]
    Unfinished(String),
}

fn resource(what: &'static str) -> impl FnOnce(io::Error) -> NodeError {
    move |source| NodeError::Resource { what, source }
}

/// A running node.
pub struct Node {
    address: SocketAddr,
    state: Arc<NodeState>,
    mailboxes: Vec<Arc<Mailbox>>,
    relay: Option<mpsc::Sender<ToRelay>>,
    threads: Vec<(String, Option<JoinHandle<()>>)>,
    ends: Ends,
    succession: Chain,
    settings: Arc<Settings>,
    ending: Ending,
    notifier: Notifier,
    commander: Commander,
    commands: channel::Receiver<Command>,
    admin: Option<Admin>,
    sources: Option<Sources>,
}

/// What a node needs to have a successor.
struct Chain {
    program: Program,
    /// Duplicates of the shards' listeners, to be given away. They are closed when the node stops: a listener that is open takes
    /// connections.
    listeners: Vec<OwnedFd>,
    backbone: mpsc::Sender<ToBackbone>,
    /// Names its heartbeat.
    node: u64,
    redis_prefix: Option<String>,
    /// How many hand-overs were tried.
    round: u64,
    under_way: Option<upgrade::UnderWay>,
}

/// What every thread may read of the node.
struct NodeState {
    metrics: Metrics,
    report: Arc<dyn BackboneReport>,
    descriptor_limit: u64,
    /// See [`lifecycle::Phase`].
    phase: AtomicU8,
    /// How hand-overs ended.
    tally: Mutex<Tally>,
}

impl NodeState {
    fn tally(&self) -> std::sync::MutexGuard<'_, Tally> {
        // Plain numbers: whoever panicked left no half of anything.
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NodeReport for NodeState {
    fn ready(&self) -> Result<(), String> {
        match self.phase() {
            Phase::Serving => {}
            Phase::Unready | Phase::Draining => return Err("the node is draining".into()),
            Phase::Stopping => return Err("the node is stopping".into()),
        }
        self.report.ready()
    }

    fn metrics_text(&self) -> String {
        let tally = *self.tally();
        let mut snapshot = NodeSnapshot {
            phase: std::array::from_fn(|phase| u64::from(phase == self.phase() as usize)),
            handovers: [tally.moved, tally.failed],
            handover_pause_micros: tally.pause,
            ready: self.ready().is_ok(),
            descriptor_limit: self.descriptor_limit,
            ..NodeSnapshot::default()
        };
        self.report.measure(&mut snapshot);
        self.metrics.render(&snapshot, env!("CARGO_PKG_VERSION"))
    }
}

/// Where threads say that they ended: which one, and with what.
struct Ends {
    bell: Arc<Bell>,
    sender: channel::Sender<(usize, Result<(), String>)>,
    receiver: channel::Receiver<(usize, Result<(), String>)>,
}

/// Tells [`Ends`] when it is dropped, so also when its thread panics.
struct EndGuard {
    thread: usize,
    outcome: Result<(), String>,
    bell: Arc<Bell>,
    sender: channel::Sender<(usize, Result<(), String>)>,
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        let outcome = std::mem::replace(&mut self.outcome, Ok(()));
        // Nobody listens any more when the node gave up waiting.
        let _ = self.sender.send((self.thread, outcome));
        self.bell.ring();
    }
}

impl Node {
    /// Starts a node: limits, driver, listeners, then the backbone's thread and the shards'. `parts` is asked for their bodies
    /// once the number of shards is decided. [`Signals::block`] comes first.
    ///
    /// # Errors
    /// See [`NodeError`]; threads that had started end with the process.
    pub fn start(settings: Settings, parts: impl FnOnce(usize) -> Parts) -> Result<Self, NodeError> {
        Self::start_after(None, settings, parts)
    }

    /// Starts a node, in the place of a running process if there is one: then it has that one's listeners and accepts nobody
    /// until [`Node::take_over`].
    ///
    /// # Errors
    /// As [`Node::start`].
    pub fn start_after(
        inheritance: Option<&mut Inheritance>,
        settings: Settings,
        parts: impl FnOnce(usize) -> Parts,
    ) -> Result<Self, NodeError> {
        let descriptors = host::raise_descriptor_limit().map_err(resource("room for descriptors"))?;
        let cores = host::allowed_cores();
        let parallelism = std::thread::available_parallelism().map_or(1, usize::from);
        let plan = host::plan_shards(settings.shards, settings.pin, &cores, parallelism);
        let (driver, reason) = host::choose_driver(settings.driver, host::probe_uring)?;
        let shards = plan.cores.len();
        let slots = host::slots_per_shard(driver, settings.max_connections, shards, descriptors.soft);
        let accepting = inheritance.is_none();
        let follows = inheritance.as_ref().map(|inheritance| inheritance.facts.node);
        let (address, listeners) = match inheritance {
            Some(inheritance) => {
                upgrade::check_backbone(&inheritance.facts, &settings)?;
                listen::inherit(&mut inheritance.listeners, settings.listen, shards)?
            }
            None => listen::open(activation::listeners()?, settings.listen, shards)?,
        };
        tracing::info!(driver = driver.label(), reason, "driver");
        tracing::info!(shards, cores = ?cores, descriptors = descriptors.soft, were = descriptors.before, "machine");
        if let Some(because) = &plan.unpinned_because {
            tracing::warn!(because, "shards are not pinned");
        }

        let mailboxes = (0..shards).map(|_| Mailbox::new().map(Arc::new)).collect::<io::Result<Vec<_>>>();
        let mailboxes = mailboxes.map_err(resource("mailboxes"))?;
        let parts = parts(shards);
        let (relay, requests) = mpsc::channel(RELAY_REQUESTS);
        let state = Arc::new(NodeState {
            metrics: Metrics::new(shards),
            report: parts.report,
            descriptor_limit: descriptors.soft,
            phase: AtomicU8::new(0),
            tally: Mutex::default(),
        });
        let (sender, receiver) = channel::channel();
        let bell = Arc::new(Bell::new().map_err(resource("a bell"))?);
        let ends = Ends { bell, sender, receiver };
        let (orders, succession) = Succession::first(seed()?);
        let succession = Succession { follows, ..succession };
        let chain = Chain {
            program: Program::own(),
            listeners: listen::duplicate(&listeners).map_err(resource("room for listeners"))?,
            backbone: orders,
            node: succession.node,
            redis_prefix: settings.redis.as_ref().map(|redis| redis.prefix.clone()),
            round: 0,
            under_way: None,
        };
        let threads = Vec::new();
        let settings = Arc::new(settings);
        let (commander, commands) = channel::channel();
        let mut node = Self {
            address,
            state,
            mailboxes,
            relay: Some(relay.clone()),
            threads,
            succession: chain,
            settings: Arc::clone(&settings),
            ending: Ending::default(),
            notifier: Notifier::new(),
            commander: Commander { commands: commander, bell: Arc::clone(&ends.bell) },
            commands,
            admin: None,
            sources: None,
            ends,
        };

        let start = BackboneStart {
            settings: Arc::clone(&settings),
            requests,
            shards: node.mailboxes.clone(),
            clock: monotonic_micros,
            succession,
        };
        let body = parts.backbone;
        node.spawn("backbone".into(), move || body(start))?;
        for ((index, listeners), core) in listeners.into_iter().enumerate().zip(plan.cores) {
            let start = ShardStart {
                index,
                listeners,
                settings: Arc::clone(&settings),
                mailbox: Arc::clone(&node.mailboxes[index]),
                relay: relay.clone(),
                metrics: Arc::clone(&node.state.metrics.shards[index]),
                driver,
                slots,
                node: Arc::clone(&node.state) as Arc<dyn NodeReport>,
                clock: monotonic_micros,
                seed: seed()?,
                accepting,
            };
            node.spawn(format!("shard-{index}"), move || {
                if let Some(core) = core
                    && let Err(error) = host::pin_thread(core)
                {
                    tracing::warn!(shard = index, core, %error, "not pinned");
                }
                (parts.shard)(start)
            })?;
        }
        Ok(node)
    }

    /// Where it listens: the port is the real one, also when the settings say 0.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn spawn(
        &mut self,
        name: String,
        body: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<(), NodeError> {
        let guard = EndGuard {
            thread: self.threads.len(),
            outcome: Err("it panicked".into()),
            bell: Arc::clone(&self.ends.bell),
            sender: self.ends.sender.clone(),
        };
        let builder = std::thread::Builder::new().name(name.clone());
        let handle = builder.spawn(move || {
            // Moved in whole: assigning to a field alone would capture that field and drop the guard out here.
            let mut guard = guard;
            guard.outcome = body();
        });
        let handle = handle.map_err(resource("a thread"))?;
        self.threads.push((name, Some(handle)));
        Ok(())
    }

    /// Where its settings come from, for when it is told to read them again.
    pub fn reload_from(&mut self, sources: Sources) {
        self.sources = Some(sources);
    }

    /// Listens for the operator's commands. `succeeds` says that a process that handed over to this one listens there.
    ///
    /// # Errors
    /// When the configured place cannot be had. The place that nobody configured is done without, with a line in the log.
    pub fn take_commands(&mut self, succeeds: bool) -> Result<(), AdminError> {
        let listen = &self.settings.admin.listen;
        let place = Place::parse(listen, self.address.port()).expect("the configuration checked it");
        let node = Arc::clone(&self.state) as Arc<dyn Operated>;
        match Admin::start(place, succeeds, self.commander.clone(), node) {
            Ok(admin) => {
                tracing::info!(place = %admin.place(), "commands are taken");
                self.admin = Some(admin);
                Ok(())
            }
            Err(error) if listen == "auto" => {
                tracing::warn!(%error, "no commands are taken");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Runs until it is told to end by a signal or a command, or hands over; then stops in order.
    ///
    /// # Errors
    /// When a thread ends by itself, with the first one's error, or as [`Node::stop`].
    pub fn run(mut self, signals: &Signals) -> Result<(), NodeError> {
        self.notifier.ready();
        let cause = loop {
            self.tell_service_manager();
            wait(signals, &self.ends.bell, self.next_look());
            if let Some(signal) = signals.take() {
                self.on_signal(signal);
            }
            while let Ok(command) = self.commands.try_recv() {
                self.on_command(command);
            }
            if self.upgrade_ended().is_some_and(|outcome| self.has_moved(outcome)) {
                break Ok(());
            }
            if let Some((thread, outcome)) = self.next_end() {
                // A shard that has handed over may have ended before the hand-over's thread has said that it succeeded.
                if outcome.is_ok() && self.abort_upgrade().is_some_and(|outcome| self.has_moved(outcome)) {
                    break Ok(());
                }
                // A shard that has handed over may have ended before the hand-over's thread has said that it succeeded.
                if outcome.is_ok() && matches!(self.abort_upgrade(), Some(Ok(_))) {
                    break Ok(());
                }
                let reason = outcome.err().unwrap_or_else(|| "nobody asked it to".into());
                tracing::error!(thread, reason, "a thread ended");
                break Err(NodeError::ThreadEnded { thread, reason });
            }
            if self.go_on_ending() {
                break Ok(());
            }
        };
        self.abort_upgrade();
        let stopped = self.stop(signals);
        cause.and(stopped)
    }

    /// Tells every shard to stop, then waits [`STOP_MILLIS`] at most for all threads to end. A second signal ends the wait.
    ///
    /// # Errors
    /// [`NodeError::Unfinished`], or [`NodeError::ThreadEnded`] when a thread ended with an error.
    pub fn stop(&mut self, signals: &Signals) -> Result<(), NodeError> {
        let patience = if self.ends_at_once() { 0 } else { STOP_MILLIS };
        let deadline = Instant::now() + Duration::from_millis(patience);
        self.state.enter(Phase::Stopping);
        self.relay = None;
        self.succession.listeners.clear();
        let mut untold: Vec<_> = (0..self.mailboxes.len()).collect();
        let mut failed = Ok(());
        loop {
            tell(&self.mailboxes, &mut untold, || ToShard::Stop);
            while let Some((thread, outcome)) = self.next_end() {
                if let Err(reason) = outcome {
                    tracing::error!(thread, reason, "a thread ended with an error");
                    failed = failed.and(Err(NodeError::ThreadEnded { thread, reason }));
                }
            }
            let running: Vec<_> =
                self.threads.iter().filter(|(_, handle)| handle.is_some()).map(|(name, _)| name.as_str()).collect();
            if running.is_empty() {
                tracing::info!("stopped");
                return failed;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || signals.take().is_some() {
                return Err(NodeError::Unfinished(running.join(", ")));
            }
            self.tell_service_manager();
            // A full mailbox has no bell for room: look again soon.
            let most = if untold.is_empty() { LOOK_EVERY } else { RETRY };
            wait(signals, &self.ends.bell, Some(left.min(most)));
        }
    }

    /// The next thread that ended: its name and outcome.
    fn next_end(&mut self) -> Option<(String, Result<(), String>)> {
        self.ends.bell.quiet();
        let (thread, outcome) = self.ends.receiver.try_recv().ok()?;
        let (name, handle) = &mut self.threads[thread];
        // Its last act was to say so, so this waits for microseconds; a panic was reported as the outcome.
        let _ = handle.take().map(JoinHandle::join);
        Some((name.clone(), outcome))
    }
}

/// How soon a full mailbox is tried again.
const RETRY: Duration = Duration::from_millis(5);

/// Tells the shards in `untold`, and leaves in it those whose mailbox is full: they are to be told again.
fn tell(mailboxes: &[Arc<Mailbox>], untold: &mut Vec<usize>, message: impl Fn() -> ToShard) {
    untold.retain(|&shard| {
        let refused = mailboxes[shard].post(message()).is_err();
        mailboxes[shard].ring();
        refused
    });
}

/// Waits for a signal, the end of a thread, or the time to pass.
fn wait(signals: &Signals, bell: &Bell, time: Option<Duration>) {
    let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [poll(signals.as_raw_fd()), poll(bell.as_raw_fd())];
    // Rounded up, so that a wait for less than a millisecond does not become none at all.
    let millis = time.map_or(-1, |time| time.as_millis() as i32 + 1);
    // SAFETY: the array is live and its length is given. An interrupted or failed wait only makes the caller look earlier.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, millis) };
}

fn seed() -> Result<u64, NodeError> {
    getrandom::u64().map_err(|error| NodeError::Resource { what: "random bits", source: io::Error::other(error) })
}

#[cfg(test)]
mod tests;
