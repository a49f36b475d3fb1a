//! The front of a shard: accepts connections, reads requests, answers them, and hands established streams to the engine.
//! One monoio task a connection, which ends when the stream is established; a stream costs no task.

mod origin;
mod poll;
mod publish;
mod reply;
mod routes;
mod session;
mod stream;
#[cfg(test)]
mod tests;
mod transport;

use std::fmt;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use monoio::net::{TcpListener, TcpStream};
use monoio::time::Instant;

use super::gate::{Established, Gate, OpenError, Reservation};
use super::mailbox::{Publish, RequestError};
use super::poll::{Answer, Poll};
use super::start::NodeReport;
use crate::limits::{ACCEPT_PAUSE_MILLIS, ACCEPT_WARNING_MILLIS, FRONT_CONNECTIONS};
use crate::log::position::{CursorEntry, Position};
use crate::metrics::ShardMetrics;
use crate::settings::Settings;

/// What requests need to know about the node.
#[derive(Clone)]
pub struct NodeView {
    /// The configuration.
    pub settings: Arc<Settings>,
    /// This shard's counters; the front writes `accepted`, `http`, `http_requests`, the publishes over
    /// HTTP and the deliveries of polls that it answers.
    pub metrics: Arc<ShardMetrics>,
    /// The node the shard is part of.
    pub node: Arc<dyn NodeReport>,
}

impl fmt::Debug for NodeView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeView").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// What the front needs of its shard: [`Gate`], or a fake in tests.
pub trait Entrance: Clone + 'static {
    /// A place for one stream, and channels held live for it.
    type Reservation: 'static;

    /// Reserves a place, opens channels, of which there may be none yet, and waits until each is live.
    fn open(&self, names: &[Arc<str>]) -> impl Future<Output = Result<Self::Reservation, OpenError>>;

    /// Publishes and waits for the position.
    fn publish(&self, publish: Publish) -> impl Future<Output = Result<Position, RequestError>>;

    /// Reads what is new on reserved channels since a cursor.
    fn poll(
        &self,
        channels: &Self::Reservation,
        cursor: &[CursorEntry],
    ) -> impl Future<Output = Result<Answer, OpenError>>;

    /// Hands over a stream of server-sent events whose response head is still to be sent.
    fn establish_sse(&self, socket: OwnedFd, channels: Self::Reservation, resume: Vec<CursorEntry>, head: Bytes);

    /// Hands over a WebSocket whose response head is still to be sent; `early` came behind the request.
    fn establish_websocket(&self, socket: OwnedFd, place: Self::Reservation, head: Bytes, early: Bytes);

    /// Hands over a poll that waits.
    fn establish_poll(&self, socket: OwnedFd, channels: Self::Reservation, poll: Poll);
}

impl Entrance for Gate {
    type Reservation = Reservation;

    fn open(&self, names: &[Arc<str>]) -> impl Future<Output = Result<Reservation, OpenError>> {
        Gate::open(self, names)
    }

    fn publish(&self, publish: Publish) -> impl Future<Output = Result<Position, RequestError>> {
        Gate::publish(self, publish)
    }

    fn poll(&self, channels: &Reservation, cursor: &[CursorEntry]) -> impl Future<Output = Result<Answer, OpenError>> {
        Gate::poll(self, channels, cursor)
    }

    fn establish_sse(&self, socket: OwnedFd, channels: Reservation, resume: Vec<CursorEntry>, head: Bytes) {
        self.establish(socket, Established::Sse { channels, resume, head });
    }

    fn establish_websocket(&self, socket: OwnedFd, place: Reservation, head: Bytes, early: Bytes) {
        self.establish(socket, Established::WebSocket { place, head, early });
    }

    fn establish_poll(&self, socket: OwnedFd, channels: Reservation, poll: Poll) {
        self.establish(socket, Established::Poll { channels, poll });
    }
}

/// Accepts connections for as long as the task lives. The runtime needs its timer enabled.
pub async fn serve<E: Entrance>(listener: TcpListener, entrance: E, node: Rc<NodeView>) {
    let mut warned: Option<Instant> = None;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => admit(stream, entrance.clone(), Rc::clone(&node)),
            Err(error) => {
                if warned.is_none_or(|at| at.elapsed() >= Duration::from_millis(ACCEPT_WARNING_MILLIS)) {
                    warned = Some(Instant::now());
                    tracing::warn!(%error, "cannot accept connections; raise the descriptor limit if it is reached");
                }
                monoio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MILLIS)).await;
            }
        }
    }
}

fn admit<E: Entrance>(stream: TcpStream, entrance: E, node: Rc<NodeView>) {
    node.metrics.accepted.add(1);
    if node.metrics.http.get() >= FRONT_CONNECTIONS {
        tracing::debug!(limit = FRONT_CONNECTIONS, "a connection was closed: too many are not established yet");
        return;
    }
    // Without it the second small write of a connection waits for the first one's acknowledgement. It fails only on a
    // connection that is gone, and then the first read says so.
    let _ = stream.set_nodelay(true);
    monoio::spawn(async move {
        let _counted = Counted::new(&node);
        session::run(stream, &entrance, &node).await;
    });
}

/// One connection in the gauge of connections that are not streams.
struct Counted<'a>(&'a NodeView);

impl<'a> Counted<'a> {
    fn new(node: &'a NodeView) -> Self {
        node.metrics.http.add(1);
        Self(node)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.metrics.http.sub(1);
    }
}
