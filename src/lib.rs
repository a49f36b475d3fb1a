//! weir: an edge broadcast node. This file is the map: the whole module tree, the two walks, and what is
//! deliberately absent.
//!
//! # The one idea
//!
//! One log per channel, one cursor per subscription. A publication is appended once and encoded once for each wire
//! format; fan-out only moves cursors. The log is the send queue, the replay buffer and the lag meter.
//!
//! # Two walks
//!
//! - publish: [`backbone::redis`] → [`backbone::relay`] → [`shard::mailbox`] → [`shard::engine`] →
//!   [`log::channel_table`] → [`shard::drain`] → [`shard::driver`]
//! - connect: [`shard::front`] → [`shard::connection`] → [`log::channel_table`] → [`log::cursor`] →
//!   [`shard::drain`] → [`shard::driver`]
//!
//! # What is absent
//!
//! - [`wire`] and [`log`] read no clock, environment, randomness or socket: time and seeds are arguments.
//! - [`shard`] knows no Redis; [`backbone`] knows no Connection.
//! - A shard holds no lock: it changes only in its own turn, on its own thread.
//!
//! A layer uses only the layers above it in this list; `tests/layers.rs` checks it.

#[macro_use]
mod planted;

pub mod limits;
pub mod metrics;
pub mod settings;

#[cfg(test)]
mod testing;

/// Pure codecs: bytes in, values and consumed length out. An incomplete input is not an error.
pub mod wire {
    pub mod centrifugo;
    pub mod channel_name;
    pub mod http1;
    pub mod poll;
    pub mod sse;
    pub mod websocket;
}

/// The log and cursor core. Pure: clock and seed are arguments.
pub mod log {
    pub mod channel_log;
    pub mod channel_table;
    pub mod cursor;
    pub mod frame;
    pub mod mark;
    pub mod position;
}

/// One pinned thread: a monoio runtime for what is rare, an engine for established connections.
pub mod shard {
    pub mod buffers;
    pub mod connection;
    pub mod core;
    pub mod disconnect;
    mod dismissal;
    pub mod drain;
    pub mod driver;
    pub mod engine;
    pub mod front;
    pub mod gate;
    pub mod handover;
    pub mod mailbox;
    mod older;
    mod parting;
    pub mod poll;
    pub mod session;
    #[cfg(test)]
    pub(crate) mod simulation;
    pub mod sink;
    pub mod start;
    mod subscription;
    pub mod timer;
}

/// Where publications come from: the embedded backbone or Redis/Valkey, and the relay that feeds the shards.
pub mod backbone {
    pub mod handover;
    pub mod interface;
    pub mod memory;
    pub mod redis;
    pub mod relay;
    pub mod status;
}

/// Configuration, start and stop of a node.
pub mod control {
    pub mod activation;
    pub mod admin;
    pub mod clock;
    pub mod config;
    pub mod doctor;
    pub mod handover;
    pub mod host;
    pub mod node;
    pub mod notify;
    pub mod parts;
    pub mod signals;
}

/// The command-line clients, the load generator and the fleet simulation. Uses [`wire`] only.
pub mod client {
    pub mod bench;
    mod http;
    pub mod publish;
    pub mod simulate;
    pub mod subscribe;
}
