//! Established connections on their way to another process: what crosses between a shard and `control::handover`.
//!
//! The old process freezes its shards, so that nothing of a connection is in the kernel and nothing changes; each of them
//! gives its connections away as duplicates and waits for the verdict. The new process takes them in, frozen too, and
//! serves them once it is told to. Until the verdict falls both sides can go back: nobody has read or written a byte.

mod arrive;
mod depart;
pub(super) mod state;

pub use state::Request;
use std::os::fd::OwnedFd;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender};

use bytes::Bytes;

/// The form of [`Carried::state`]. A process understands its own and the one before.
pub const STATE_VERSION: u32 = 1;

/// One connection on its way.
#[derive(Debug)]
pub struct Carried {
    /// Its socket.
    pub socket: OwnedFd,
    /// What the other process's shard needs to go on with it, in the form of [`STATE_VERSION`]; opaque to all others.
    pub state: Bytes,
}

/// How a hand-over ended for a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The other process serves the connections now (told to the old shard), or serve them (told to the new one).
    Moved,
    /// It failed: the old shard goes on as before, the new one forgets what it was given without touching the sockets. A
    /// sender that is dropped without a word means the same.
    Stays,
}

/// Told to a shard of the old process: freeze, give everything away, wait.
#[derive(Debug)]
pub struct Leaving {
    /// Where the connections go, one by one; the shard's thread blocks when it is full. It is dropped after the last.
    pub carried: SyncSender<Carried>,
    /// Told first, once nothing of this shard's is in the kernel any more and no request is being answered.
    pub frozen: Sender<usize>,
    /// What comes of it. The shard's thread blocks on it.
    pub verdict: Receiver<Verdict>,
}

/// Told to a shard of the new process before it serves anybody.
#[derive(Debug)]
pub struct Arriving {
    /// The connections. Their channels are live here already: see [`Expected`].
    pub carried: Receiver<Carried>,
    /// How many were taken in, or why one could not be.
    pub arrived: Sender<Result<usize, String>>,
    /// Whether to serve them. The shard's thread blocks on it.
    pub verdict: Receiver<Verdict>,
}

/// Told to a shard of the new process: hold these channels live until [`Arriving`] is over.
#[derive(Debug)]
pub struct Expected {
    /// Channel names.
    pub channels: Vec<Arc<str>>,
    /// Told once all are live, or why one cannot be.
    pub live: Sender<Result<(), String>>,
}

#[cfg(test)]
mod tests;
