//! The front of a shard: accepts connections, reads requests, answers them, and hands established streams to the engine.
//! One monoio task a connection, which ends when the stream is established; a stream costs no task.

mod origin;
mod parking;
mod poll;
mod publish;
mod reply;
mod routes;
mod session;
mod stream;
#[cfg(test)]
mod tests;
mod transport;

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use monoio::net::{TcpListener, TcpStream};
use monoio::time::Instant;

pub use parking::{Parked, Parking};
use transport::Transport;

use super::gate::{Established, Gate, OpenError, Reservation};
use super::handover::Request;
use super::mailbox::{Publish, RequestError};
use super::poll::{Answer, Poll};
use super::start::NodeReport;
use crate::limits::{ACCEPT_PAUSE_MILLIS, ACCEPT_WARNING_MILLIS, FRONT_CONNECTIONS};
use crate::log::position::{CursorEntry, Position};
use crate::metrics::ShardMetrics;
use crate::settings::Settings;

/// The settings in force: a reload replaces them. Cheap to clone; stays on its thread.
#[derive(Debug, Clone)]
pub struct Current(Rc<RefCell<Arc<Settings>>>);

impl Current {
    /// Begins with these.
    #[must_use]
    pub fn new(settings: Arc<Settings>) -> Self {
        Self(Rc::new(RefCell::new(settings)))
    }

    /// Those of the moment. A request keeps the ones it began with.
    #[must_use]
    pub fn get(&self) -> Arc<Settings> {
        Arc::clone(&self.0.borrow())
    }

    /// Has others from now on.
    pub fn replace(&self, settings: Arc<Settings>) {
        self.0.replace(settings);
    }
}

/// What requests need to know about the node.
#[derive(Clone)]
pub struct NodeView {
    /// The configuration.
    pub settings: Current,
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

    /// Has what follows a cursor in the logs of reserved channels, fetching what they do not reach back to.
    fn fetch(
        &self,
        channels: &Self::Reservation,
        cursor: &[CursorEntry],
    ) -> impl Future<Output = Result<(), RequestError>>;

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

    fn fetch(&self, channels: &Reservation, cursor: &[CursorEntry]) -> impl Future<Output = Result<(), RequestError>> {
        Gate::fetch(self, channels, cursor)
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

/// Accepts connections while `parking` is open, until it is shut. The runtime needs its timer enabled.
pub async fn serve<E: Entrance>(listener: TcpListener, entrance: E, node: Rc<NodeView>, parking: Parking) {
    let mut warned: Option<Instant> = None;
    loop {
        parking.opened().await;
        if parking.is_shut() {
            // Closing a listener resets who waits to be accepted: they are taken in first, and sent away with an answer.
            for stream in waiting(&listener) {
                admit(stream, entrance.clone(), Rc::clone(&node), parking.clone());
            }
            return;
        }
        // A shard that leaves waits until this accept has come home: armed in a ring that is on its way out, it would take
        // the wake-up of the next connection (the kernel wakes one of those that wait) and nobody would accept that.
        let armed = parking.enter();
        let accepted = listener.cancelable_accept(parking.door()).await;
        drop(armed);
        match accepted {
            Ok((stream, _)) => admit(stream, entrance.clone(), Rc::clone(&node), parking.clone()),
            Err(_) if parking.is_shut() || !parking.is_open() => {}
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

/// Whoever waits to be accepted.
fn waiting(listener: &TcpListener) -> Vec<TcpStream> {
    // SAFETY: the listener, which owns the descriptor, outlives this borrow.
    let borrowed = unsafe { BorrowedFd::borrow_raw(listener.as_raw_fd()) };
    let socket = socket2::SockRef::from(&borrowed);
    // An accept that must not wait, whichever driver the listener is set up for. The flag is the open file's, which another
    // process may share, so it is put back.
    let Ok(nonblocking) = socket.nonblocking() else { return Vec::new() };
    if socket.set_nonblocking(true).is_err() {
        return Vec::new();
    }
    let accepted = std::iter::from_fn(|| socket.accept().ok()).filter_map(|(socket, _)| {
        socket.set_nonblocking(nonblocking).ok()?;
        TcpStream::from_std(socket.into()).ok()
    });
    let accepted = accepted.collect();
    let _ = socket.set_nonblocking(nonblocking);
    accepted
}

fn admit<E: Entrance>(stream: TcpStream, entrance: E, node: Rc<NodeView>, parking: Parking) {
    node.metrics.accepted.add(1);
    if node.metrics.http.get() >= FRONT_CONNECTIONS {
        tracing::debug!(limit = FRONT_CONNECTIONS, "a connection was closed: too many are not established yet");
        return;
    }
    // Without it the second small write of a connection waits for the first one's acknowledgement. It fails only on a
    // connection that is gone, and then the first read says so.
    let _ = stream.set_nodelay(true);
    attend(stream, None, entrance, node, parking);
}

/// Goes on with a connection that was parked, here or in another process.
///
/// # Errors
/// When the runtime cannot watch the socket.
pub fn readmit<E: Entrance>(
    Parked { socket, request }: Parked,
    entrance: E,
    node: Rc<NodeView>,
    parking: Parking,
    nonblocking: bool,
) -> std::io::Result<()> {
    let socket = std::net::TcpStream::from(socket);
    // A ring waits only for sockets in blocking mode, and an epoll runtime only for those that are not.
    socket.set_nonblocking(nonblocking)?;
    attend(TcpStream::from_std(socket)?, Some(request), entrance, node, parking);
    Ok(())
}

fn attend<E: Entrance>(stream: TcpStream, request: Option<Request>, entrance: E, node: Rc<NodeView>, parking: Parking) {
    let busy = parking.enter();
    let counted = Counted::new(Rc::clone(&node));
    monoio::spawn(async move {
        let _counted = counted;
        let transport = Transport::new(stream, parking);
        if let Some(transport) = session::run(transport, request, &entrance, &node).await {
            // Whoever only waits for its client to close does not hold a leaving shard up.
            drop(busy);
            transport.linger().await;
        }
    });
}

/// One connection in the gauge of connections that are not streams.
struct Counted(Rc<NodeView>);

impl Counted {
    fn new(node: Rc<NodeView>) -> Self {
        node.metrics.http.add(1);
        Self(node)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.metrics.http.sub(1);
    }
}
