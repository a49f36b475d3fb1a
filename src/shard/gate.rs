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

use super::mailbox::{HistoryQuery, Mailbox, Publish, Reply, RequestError, RequestId, ToRelay};
use super::poll::{Answer, Poll};
use crate::limits::{OPEN_MILLIS, PUBLISH_MILLIS};
use crate::log::channel_table::ChannelId;
use crate::log::frame::Frame;
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
    /// A request to the relay.
    Ask { request: Request, done: oneshot::Sender<Reply> },
}

/// A request to the relay without the numbers the engine adds.
#[derive(Debug)]
pub(super) enum Request {
    Publish(Publish),
    History(HistoryQuery),
}

impl Request {
    /// Adds the numbers that bring the answer back.
    pub(super) fn numbered(self, shard: usize, request: RequestId) -> ToRelay {
        match self {
            Self::Publish(publish) => ToRelay::Publish { shard, request, publish },
            Self::History(query) => ToRelay::History { shard, request, query },
        }
    }
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
        match self.ask(Request::Publish(publish)).await? {
            Reply::Published(outcome) => outcome,
            Reply::History(_) => Err(RequestError::Unavailable("answered something else".into())),
        }
    }

    /// Reads from a channel's history.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub async fn history(&self, query: HistoryQuery) -> Result<(Position, Vec<Arc<Frame>>), RequestError> {
        match self.ask(Request::History(query)).await? {
            Reply::History(outcome) => outcome,
            Reply::Published(_) => Err(RequestError::Unavailable("answered something else".into())),
        }
    }

    async fn ask(&self, request: Request) -> Result<Reply, RequestError> {
        let (done, answer) = oneshot::channel();
        self.knock(Knock::Ask { request, done });
        match timeout(Duration::from_millis(PUBLISH_MILLIS), answer).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => Err(RequestError::Unavailable("the node is stopping".into())),
            Err(_) => Err(RequestError::Unavailable("no answer in time".into())),
        }
    }
}
