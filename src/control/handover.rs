//! A new process takes the place of a running one, with its listeners and established connections. Clients notice nothing.
//!
//! The old process starts the new one and talks to it over a pair of sockets. [`leaving`] is the old process's side, [`taking`]
//! the new one's, [`link`] carries messages with descriptors between them, [`message`] says what they mean, and [`process`]
//! starts and stops the new process. Shards and relay do their part: see [`crate::shard::handover`] and
//! [`crate::backbone::handover`].
//!
//! The steps are the variants of [`Step`]. Until the last one the old process can go back, and does so when the new one dies,
//! fails or does not answer in time; the new one has touched no socket by then. In the last step the old process says
//! "commit" and the new one says "mine" and serves. Unix sockets deliver what was written before the writer died, so the old
//! process learns for certain which it was: "mine", or an end without it. A new process that says neither in time is
//! stopped before it is looked for a last time, so that it cannot say it while it is killed.

pub mod leaving;
pub mod link;
pub mod message;
mod pieces;
pub mod process;
pub mod taking;

use crate::log::frame::Micros;

/// Where a hand-over is, seen from the old process. Each step has its own time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The new process is started and says its first word.
    Starting,
    /// Both say which versions they understand; listeners and facts about the node go over, and the new process starts its
    /// threads. It does not accept.
    Greeting,
    /// What the relay holds goes over, while everything is served as usual.
    Seeding,
    /// The new process subscribes to every channel and holds what arrives; its shards hold the channels.
    Preparing,
    /// The shards finish what they are answering and stand still. From here on nothing is delivered.
    Freezing,
    /// What the relay got since the seed goes over.
    Settling,
    /// The connections go over.
    Carrying,
    /// The new process's shards take them in.
    Arriving,
    /// The new process is told to serve, and says that it does.
    Committing,
}

impl Step {
    /// Its name in the log.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Greeting => "greeting",
            Self::Seeding => "seeding",
            Self::Preparing => "preparing",
            Self::Freezing => "freezing",
            Self::Settling => "settling",
            Self::Carrying => "carrying",
            Self::Arriving => "arriving",
            Self::Committing => "committing",
        }
    }
}

/// Why a hand-over failed. The old process serves as before.
#[derive(Debug, thiserror::Error)]
#[error("the hand-over failed while {}: {reason}", step.label())]
pub struct HandoverError {
    /// Where.
    pub step: Step,
    /// Why.
    pub reason: String,
}

/// A hand-over that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// The process that serves now.
    pub pid: u32,
    /// Connections it has been given.
    pub connections: usize,
    /// Microseconds during which nothing was delivered, from the first shard that stood still.
    pub pause: Micros,
}

/// How often hand-overs ended which way. It goes over with the rest, so that a counter does not start anew with each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tally {
    /// That succeeded.
    pub moved: u64,
    /// After which the old process went on.
    pub failed: u64,
    /// Microseconds of the last pause.
    pub pause: Micros,
}

#[cfg(test)]
mod tests;
