//! A shard's thread: what it is given, and what runs on it.

use std::net::TcpListener;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::core::Core;
use super::driver::Driver;
use super::engine::{Engine, Parts, Readmit, tick};
use super::front::{self, Current, NodeView, Parking};
use super::gate::Gate;
use super::mailbox::{Mailbox, ToRelay};
use crate::log::frame::Micros;
use crate::metrics::{ShardMetrics, ShardRecorder};
use crate::settings::Settings;

/// How the engine talks to the kernel, decided once for the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverKind {
    /// A ring of its own.
    Uring,
    /// An epoll descriptor.
    Epoll,
}

impl DriverKind {
    /// Its name in the configuration and the log.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Uring => "uring",
            Self::Epoll => "epoll",
        }
    }
}

/// What a shard may ask about the node it is part of. Any thread may ask at any time.
pub trait NodeReport: Send + Sync {
    /// Whether the node takes traffic.
    ///
    /// # Errors
    /// The reason why not, for the operator.
    fn ready(&self) -> Result<(), String>;

    /// Every metric, in the text format of [`crate::metrics::CONTENT_TYPE`].
    fn metrics_text(&self) -> String;
}

/// Everything a shard needs. Its thread is pinned already, and blocks the signals that stop the node.
pub struct ShardStart {
    /// Which shard of the node it is, from 0.
    pub index: usize,
    /// Its listening sockets (`SO_REUSEPORT`): one, or all that fall to it when a process with more shards hands over.
    pub listeners: Vec<TcpListener>,
    /// The node's settings.
    pub settings: Arc<Settings>,
    /// What the relay tells it.
    pub mailbox: Arc<Mailbox>,
    /// What it asks the relay. The relay ends when all shards have dropped theirs.
    pub relay: mpsc::Sender<ToRelay>,
    /// Its counters: it is their only writer.
    pub metrics: Arc<ShardMetrics>,
    /// How to talk to the kernel.
    pub driver: DriverKind,
    /// Most established sockets at a time.
    pub slots: u32,
    /// The node it is part of.
    pub node: Arc<dyn NodeReport>,
    /// The node's monotonic clock.
    pub clock: fn() -> Micros,
    /// Random bits that no other shard has.
    pub seed: u64,
    /// Whether it accepts at once. One that expects the connections of another process
    /// ([`super::mailbox::ToShard::Expect`]) accepts when it has them.
    pub accepting: bool,
}

/// Runs one shard on this thread until it is told to stop and every connection has ended.
///
/// # Errors
/// Names what the kernel refused.
pub fn run(start: ShardStart) -> Result<(), String> {
    match start.driver {
        DriverKind::Uring => {
            let runtime = monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().enable_timer().build();
            let mut runtime = runtime.map_err(|error| format!("cannot make a monoio runtime on io_uring: {error}"))?;
            runtime.block_on(serve(start))
        }
        DriverKind::Epoll => {
            let runtime = monoio::RuntimeBuilder::<monoio::LegacyDriver>::new().enable_timer().build();
            let mut runtime = runtime.map_err(|error| format!("cannot make a monoio runtime on epoll: {error}"))?;
            runtime.block_on(serve(start))
        }
    }
}

/// A listener for the runtime, and a duplicate that sets its mode. The mode is the socket's, which a process that hands over
/// still accepts on: a ring needs it blocking, epoll does not, and neither may change it before this process accepts.
fn watch(listener: TcpListener) -> std::io::Result<(TcpListener, monoio::net::TcpListener)> {
    let mode = listener.try_clone()?;
    Ok((mode, monoio::net::TcpListener::from_std(listener)?))
}

async fn serve(start: ShardStart) -> Result<(), String> {
    let ShardStart {
        index,
        listeners,
        settings,
        mailbox,
        relay,
        metrics,
        driver: kind,
        slots,
        node,
        clock,
        seed,
        accepting,
    } = start;
    let driver = Driver::new(kind, slots, &mailbox, clock);
    let driver = driver.map_err(|error| format!("cannot set up the driver for {slots} sockets: {error}"))?;
    let gate = Gate::new(Arc::clone(&mailbox));
    let parking = Parking::new(Arc::clone(&mailbox), accepting);
    let current = Current::new(Arc::clone(&settings));
    let view = Rc::new(NodeView { settings: current.clone(), metrics: Arc::clone(&metrics), node });
    let nonblocking = kind == DriverKind::Epoll;
    for listener in listeners {
        let (mode, listener) = watch(listener).map_err(|error| format!("cannot watch the listener: {error}"))?;
        let (gate, view, parking) = (gate.clone(), Rc::clone(&view), parking.clone());
        monoio::spawn(async move {
            parking.opened().await;
            // It fails only for what is no socket.
            let _ = mode.set_nonblocking(nonblocking);
            drop(mode);
            front::serve(listener, gate, view, parking).await;
        });
    }
    monoio::spawn(tick(Arc::clone(&mailbox)));
    let core = Core::new(index, settings, seed, ShardRecorder::new(metrics));
    let readmit: Readmit = {
        let (gate, parking) = (gate.clone(), parking.clone());
        Box::new(move |parked| front::readmit(parked, gate.clone(), Rc::clone(&view), parking.clone(), nonblocking))
    };
    let capacity = slots as usize;
    let engine = Engine::new(Parts { core, driver, mailbox, gate, relay, clock, capacity, parking, current, readmit });
    engine.run().await.map_err(|error| format!("cannot wait for work: {error}"))
}
