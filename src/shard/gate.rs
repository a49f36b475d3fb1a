//! The gate between a shard's monoio tasks and its engine, both on one thread. Tasks put work in and await answers; the engine
//! takes it up in its next turn, so the shard's state changes nowhere else.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use monoio::time::timeout;
use tokio::sync::oneshot;

use super::mailbox::{Mailbox, Publish, Reply, RequestError};
use super::poll::{Answer, Poll};
use crate::limits::{OLDER_FETCH_MILLIS, OPEN_MILLIS, PUBLISH_MILLIS};
use crate::log::channel_table::ChannelId;
use crate::log::position::{CursorEntry, Position};

/// The tasks' side of a shard. Cheap to clone; stays on its thread.
#[derive(Debug, Clone)]
pub struct Gate(Rc<Shared>);

#[derive(Debug)]
struct Shared {
    knocks: RefCell<Vec<Knock>>,
    mailbox: Arc<Mailbox>,
}

/// What a task wants of the engine.
#[derive(Debug)]
pub(super) enum Knock {
    /// Hold these channels and say when all are live.
    Open { names: Vec<Arc<str>>, done: oneshot::Sender<Result<Reservation, OpenError>> },
    /// A reservation was not used: its place is free and its channels are let go.
    Release(Vec<ChannelId>),
    /// Say what is new on channels of a reservation since a cursor.
    Poll { channels: Vec<ChannelId>, cursor: Vec<CursorEntry>, done: oneshot::Sender<Answer> },
    /// A socket to take over.
    Establish { socket: OwnedFd, stream: Established },
    /// Publish.
    Publish { publish: Publish, done: oneshot::Sender<Reply> },
    /// Have what follows a cursor on channels of a reservation in their logs, as far as the backbone has it.
    Fetch { channels: Vec<ChannelId>, cursor: Vec<CursorEntry>, done: oneshot::Sender<Result<(), RequestError>> },
}

/// A place for a stream that is about to be established, and channels held live for it. Dropping it gives both back.
#[derive(Debug)]
pub struct Reservation {
    channels: Option<Vec<ChannelId>>,
    gate: Gate,
}

impl Reservation {
    /// The channels; whoever takes them has the place and holds the channels from now on.
    pub(super) fn take(mut self) -> Vec<ChannelId> {
        self.channels.take().unwrap_or_default()
    }

    fn channels(&self) -> &[ChannelId] {
        self.channels.as_deref().unwrap_or_default()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(channels) = self.channels.take() {
            self.gate.knock(Knock::Release(channels));
        }
    }
}

/// Why a stream's channels could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The backbone did not make the channels live within [`OPEN_MILLIS`].
    #[error("the backbone did not open the channels in time")]
    TimedOut,
    /// The node follows [`crate::limits::RELAY_CHANNELS`] others.
    #[error("this node follows as many channels as it can; try again later or at another node")]
    TooManyChannels,
    /// The shard is stopping or full.
    #[error("this node takes no more connections now")]
    Closed,
}

/// A stream or a poll that waits: from here on the engine owns the socket.
#[derive(Debug)]
pub enum Established {
    /// Server-sent events.
    Sse {
        /// The channels, in the order of the request.
        channels: Reservation,
        /// Where the client left off; channels without an entry start at the head.
        resume: Vec<CursorEntry>,
        /// The response head.
        head: Bytes,
    },
    /// A WebSocket that speaks the Centrifugo protocol.
    WebSocket {
        /// Its place.
        place: Reservation,
        /// The 101 response.
        head: Bytes,
        /// What the client sent after its request head.
        early: Bytes,
    },
    /// A poll that waits. Its response is written when it is answered.
    Poll {
        /// The channels, in the order of the request.
        channels: Reservation,
        /// What it asks for.
        poll: Poll,
    },
}

impl Gate {
    /// The gate of the shard that owns `mailbox`; its bell wakes the engine.
    #[must_use]
    pub fn new(mailbox: Arc<Mailbox>) -> Self {
        Self(Rc::new(Shared { knocks: RefCell::default(), mailbox }))
    }

    fn knock(&self, knock: Knock) {
        self.0.knocks.borrow_mut().push(knock);
        self.0.mailbox.ring();
    }

    /// What the tasks want, oldest first. Only the engine calls this.
    pub(super) fn knocks(&self) -> Vec<Knock> {
        std::mem::take(&mut *self.0.knocks.borrow_mut())
    }

    /// Whether the tasks want nothing.
    pub(super) fn is_quiet(&self) -> bool {
        self.0.knocks.borrow().is_empty()
    }

    /// A reservation of a place and channels that the engine keeps for it.
    pub(super) fn reservation(&self, channels: Vec<ChannelId>) -> Reservation {
        Reservation { channels: Some(channels), gate: self.clone() }
    }

    /// Reserves a place for a stream, opens its channels, each once, and waits until all are live on this shard.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(&self, names: &[Arc<str>]) -> Result<Reservation, OpenError> {
        let (done, opened) = oneshot::channel();
        self.knock(Knock::Open { names: names.to_vec(), done });
        match timeout(Duration::from_millis(OPEN_MILLIS), opened).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(OpenError::Closed),
            Err(_) => Err(OpenError::TimedOut),
        }
    }

    /// Reads what is new on reserved channels since a cursor.
    ///
    /// # Errors
    /// [`OpenError::Closed`] when the shard has stopped.
    pub async fn poll(&self, channels: &Reservation, cursor: &[CursorEntry]) -> Result<Answer, OpenError> {
        let (done, answer) = oneshot::channel();
        self.knock(Knock::Poll { channels: channels.channels().to_vec(), cursor: cursor.to_vec(), done });
        answer.await.map_err(|_| OpenError::Closed)
    }

    /// Has what follows a cursor fetched where a channel's log does not reach back to it, and waits for it. It is then in the
    /// log for [`crate::limits::OLDER_MILLIS`] at least; what is not, the backbone does not have either.
    ///
    /// # Errors
    /// [`RequestError`] when the backbone could not be asked, or did not answer within [`OLDER_FETCH_MILLIS`].
    pub async fn fetch(&self, channels: &Reservation, cursor: &[CursorEntry]) -> Result<(), RequestError> {
        if cursor.is_empty() {
            return Ok(());
        }
        let (done, fetched) = oneshot::channel();
        self.knock(Knock::Fetch { channels: channels.channels().to_vec(), cursor: cursor.to_vec(), done });
        match timeout(Duration::from_millis(OLDER_FETCH_MILLIS), fetched).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(RequestError::Unavailable("the node is stopping".into())),
            Err(_) => Err(RequestError::Unavailable("no answer in time".into())),
        }
    }

    /// Hands an established socket to the engine.
    pub fn establish(&self, socket: OwnedFd, stream: Established) {
        self.knock(Knock::Establish { socket, stream });
    }

    /// Publishes and waits for the position.
    ///
    /// # Errors
    /// [`RequestError::Unavailable`] also when no answer came within [`PUBLISH_MILLIS`]: the publication may then
    /// have happened or not, and a retry with the same idempotency key is safe.
    pub async fn publish(&self, publish: Publish) -> Result<Position, RequestError> {
        let (done, answer) = oneshot::channel();
        self.knock(Knock::Publish { publish, done });
        match timeout(Duration::from_millis(PUBLISH_MILLIS), answer).await {
            Ok(Ok(Reply::Published(outcome))) => outcome,
            Ok(Ok(Reply::History(_))) => Err(RequestError::Unavailable("answered something else".into())),
            Ok(Err(_)) => Err(RequestError::Unavailable("the node is stopping".into())),
            Err(_) => Err(RequestError::Unavailable("no answer in time".into())),
        }
    }
}
