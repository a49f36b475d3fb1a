//! The Centrifugo client protocol, version 2, JSON (centrifugal/protocol: definitions/client.proto; centrifugal.dev:
//! transports/client_protocol). One JSON object per line, any number of lines in a frame, both ways; empty and zero
//! fields are left out.
//!
//! - the server's side: [`commands`] reads a client's frame, the `write_…` functions append one object each
//! - the client's side, for our own tools: the `write_…_command` functions and [`server_messages`]
//!
//! Whoever puts several objects into one frame separates them with [`SEPARATOR`].

mod client;
mod code;
mod command;
mod reply;

pub use client::{
    Publication, ServerMessage, server_messages, write_connect_command, write_pong, write_subscribe_command,
};
pub use code::{DisconnectCode, ErrorCode, UnsubscribeCode, reconnects};
pub use command::{Command, CommandError, Connect, History, Method, Publish, Since, Subscribe, commands};
pub use reply::{
    ConnectResult, HistoryResult, SubscribeResult, write_connect, write_disconnect_push, write_empty, write_error,
    write_history, write_ping, write_publication_push, write_publish, write_subscribe, write_unsubscribe,
    write_unsubscribe_push,
};

/// What stands between two objects of one frame.
pub const SEPARATOR: u8 = b'\n';
