//! The state of one connection as bytes.
//!
//! A length, a JSON object, and behind it the runs of bytes whose lengths the object lists. An object is read whatever
//! fields it has besides those known here, and a field that is missing has its default: so a process understands the
//! version before and after its own. Times are relative, in milliseconds: what is left, or what has passed.

use serde::{Deserialize, Serialize};

use super::STATE_VERSION;
use crate::wire::websocket::Held;

/// Why a state cannot be taken in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// It ends before it is whole, or goes on behind its end.
    #[error("a state has {0} bytes where another length is announced")]
    Length(usize),
    /// The JSON object is none of ours.
    #[error("malformed state: {0}")]
    Malformed(String),
    /// Of a version that is neither ours nor a neighbour's.
    #[error("a state of version {0}; understood are {from} to {to}", from = STATE_VERSION - 1, to = STATE_VERSION + 1)]
    Version(u32),
    /// A field says what no connection is in.
    #[error("a state with an impossible {0}")]
    Impossible(&'static str),
    /// A channel of its subscriptions is not live on this shard.
    #[error("channel {0:?} is not live here")]
    NotLive(String),
    /// The driver does not take the socket.
    #[error("a socket could not be handed to the driver: {0}")]
    Socket(String),
    /// The shard has no more slots.
    #[error("more connections than the {0} this shard has room for")]
    Full(usize),
}

/// What is spoken on a connection, and what only that has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::shard) enum Form {
    Sse,
    WebSocket(Conversation),
    Poll(WaitingPoll),
    Request(Request),
}

/// A connection on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::shard) struct State {
    pub form: Form,
    /// Since something was last sent.
    pub silent: u64,
    /// In the order of the connection, which the ids of event streams keep.
    pub subscriptions: Vec<Place>,
    /// Own bytes that are not sent yet.
    pub control: Vec<u8>,
}

/// A subscription's place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::shard) struct Place {
    pub channel: String,
    /// None while the channel is not live.
    #[serde(default)]
    pub at: Option<At>,
}

/// See [`crate::log::mark::Mark`], and what a cursor has beside its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::shard) struct At {
    pub epoch: u32,
    pub offset: u64,
    #[serde(default)]
    pub unpositioned: Vec<u64>,
    /// What the reader came with, when it was something.
    #[serde(default)]
    pub floor: Option<(u32, u64)>,
    /// See [`crate::log::cursor::Cursor::backlog`].
    #[serde(default)]
    pub backlog: u64,
}

/// A session of the Centrifugo protocol.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::shard) struct Conversation {
    pub held: Held,
    pub connected: bool,
    /// Since the socket was established.
    pub opened: u64,
    /// Since the last ping, or the connect command.
    pub pinged: u64,
    pub waits_for_pong: bool,
    pub pending: Vec<PendingSubscribe>,
}

/// A subscribe command whose channel is not live yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::shard) struct PendingSubscribe {
    pub channel: String,
    pub command: u32,
    #[serde(default)]
    pub recovers: bool,
    /// None also when its epoch was none of ours.
    #[serde(default)]
    pub position: Option<(u32, u64)>,
    /// Until it is refused.
    pub left: u64,
    #[serde(default)]
    pub then_unsubscribe: Option<u32>,
}

/// A poll that waits.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(in crate::shard) struct WaitingPoll {
    /// In the form of a cursor's text.
    pub cursor: String,
    pub known: Option<String>,
    pub origin: Option<String>,
    /// Until it is answered with nothing.
    pub left: u64,
}

/// An HTTP connection between two requests or in the middle of one.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Request {
    /// What was read of a request that is not whole. A request that was read in part is read again from its first byte.
    #[serde(skip)]
    pub received: Vec<u8>,
    /// What is left of the answer to the one before.
    #[serde(skip)]
    pub unsent: Vec<u8>,
    /// The connection ends with that answer.
    pub last: bool,
    /// The client was told to go on and send its body (RFC 9110, section 10.1.1).
    pub invited: bool,
    /// Milliseconds left for what was under way.
    pub left: u64,
}

#[derive(Serialize, Deserialize)]
struct Head {
    version: u32,
    form: Form,
    #[serde(default)]
    silent: u64,
    #[serde(default)]
    subscriptions: Vec<Place>,
    /// Lengths of what follows: own bytes, then what the form has.
    #[serde(default)]
    runs: Vec<usize>,
}

impl State {
    /// Writes it down.
    pub(in crate::shard) fn encode(self) -> Vec<u8> {
        let Self { form, silent, subscriptions, control } = self;
        let mut runs = vec![control];
        match &form {
            Form::WebSocket(conversation) => runs.push(conversation.held.message().to_vec()),
            Form::Request(request) => runs.extend([request.received.clone(), request.unsent.clone()]),
            Form::Sse | Form::Poll(_) => {}
        }
        let lengths = runs.iter().map(Vec::len).collect();
        let head = Head { version: STATE_VERSION, form, silent, subscriptions, runs: lengths };
        let head = serde_json::to_vec(&head).expect("structs with text keys are JSON and a Vec takes every write");
        let mut out = Vec::with_capacity(4 + head.len() + runs.iter().map(Vec::len).sum::<usize>());
        out.extend_from_slice(&(head.len() as u32).to_le_bytes());
        out.extend_from_slice(&head);
        runs.iter().for_each(|run| out.extend_from_slice(run));
        out
    }

    /// Reads it.
    ///
    /// # Errors
    /// See [`StateError`].
    pub(in crate::shard) fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let wrong = || StateError::Length(bytes.len());
        let (length, rest) = bytes.split_first_chunk().ok_or_else(wrong)?;
        let (head, mut rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(wrong)?;
        let malformed = |error: serde_json::Error| StateError::Malformed(error.to_string());
        // The version before all else: another one may have forms that this one does not know.
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_slice(head).map_err(malformed)?;
        if version.abs_diff(STATE_VERSION) > 1 {
            return Err(StateError::Version(version));
        }
        let Head { mut form, silent, subscriptions, runs, .. } = serde_json::from_slice(head).map_err(malformed)?;
        let mut runs = runs.into_iter().map(|length| {
            let (run, behind) = rest.split_at_checked(length).ok_or_else(wrong)?;
            rest = behind;
            Ok(run.to_vec())
        });
        let mut next = || runs.next().unwrap_or_else(|| Ok(Vec::new()));
        let control = next()?;
        match &mut form {
            Form::WebSocket(conversation) => {
                conversation.held = std::mem::take(&mut conversation.held).with_message(next()?);
            }
            Form::Request(request) => (request.received, request.unsent) = (next()?, next()?),
            Form::Sse | Form::Poll(_) => {}
        }
        // Runs that a later version adds are read over.
        runs.try_for_each(|run| run.map(drop))?;
        if !rest.is_empty() {
            return Err(wrong());
        }
        Ok(Self { form, silent, subscriptions, control })
    }
}

#[cfg(test)]
mod tests;
