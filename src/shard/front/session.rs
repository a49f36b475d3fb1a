//! One connection: request after request, until it is closed or handed to the engine.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use monoio::net::TcpStream;
use monoio::time::Instant;

use super::origin::Origin;
use super::reply::Reply;
use super::routes::{self, Route};
use super::transport::{Ended, Transport};
use super::{Entrance, NodeView, poll, publish, stream};
use crate::log::position::CursorEntry;
use crate::shard::poll::Poll;
use crate::wire::http1::{self, AllowOrigin, BodyDecoder, Framing, Head, ResponseWriter, Status};

/// What a request leads to.
pub(super) enum Outcome<R> {
    /// An answer.
    Reply(Reply),
    /// An answer that is written already.
    Answered { status: Status, response: Vec<u8> },
    /// The head of an event stream that is not opened: the answer to `HEAD`.
    SseHead(Bytes),
    /// An event stream.
    Sse { channels: R, resume: Vec<CursorEntry>, head: Bytes },
    /// A WebSocket.
    WebSocket { place: R, head: Bytes },
    /// A poll that waits.
    Poll { channels: R, poll: Poll },
}

/// Why a message could not be read to its end.
enum Broken {
    /// Nobody is left to answer, or nothing was asked.
    Gone,
    /// It is answered, and the connection is of no use after it.
    Refused(Reply),
}

/// Serves one connection.
pub(super) async fn run<E: Entrance>(stream: TcpStream, entrance: &E, node: &Rc<NodeView>) {
    let limits = &node.settings.limits;
    let mut transport = Transport::new(stream);
    // A client that has just connected has something to say; one that was answered may have nothing for a while.
    let mut patience = limits.head_time;
    loop {
        let head = match next_head(&mut transport, patience, limits.head_time).await {
            Ok(head) => head,
            Err(Broken::Gone) => return,
            Err(Broken::Refused(reply)) => return send_away(transport, reply, false, AllowOrigin::None, node).await,
        };
        patience = limits.keep_alive;

        let head_only = head.method() == "HEAD";
        let origin = Origin::of(&head, &node.settings.allow_origins);
        let outcome = match routes::find(&head) {
            Err(reply) if head.framing() == Framing::Length(0) => Outcome::Reply(reply),
            // The body of a request that is not served is not read.
            Err(reply) => return send_away(transport, reply, head_only, origin.allow(), node).await,
            Ok(route) => match read_body(&mut transport, &head, route, node).await {
                Ok(body) => answer(route, &head, body, origin, entrance, node).await,
                Err(Broken::Gone) => return,
                Err(Broken::Refused(reply)) => {
                    return send_away(transport, reply, head_only, origin.allow(), node).await;
                }
            },
        };
        let (status, response, again) = match outcome {
            Outcome::Reply(reply) => {
                let status = reply.status;
                (status, reply.render(head_only, head.keep_alive(), origin.allow()), head.keep_alive())
            }
            Outcome::Answered { status, response } => (status, response, head.keep_alive()),
            Outcome::SseHead(head) => (Status::Ok, head.into(), false),
            Outcome::Sse { channels, resume, head } => {
                node.metrics.count_response(Status::Ok.code());
                let (socket, _) = transport.into_socket();
                return entrance.establish_sse(socket, channels, resume, head);
            }
            Outcome::WebSocket { place, head } => {
                node.metrics.count_response(Status::SwitchingProtocols.code());
                let (socket, early) = transport.into_socket();
                return entrance.establish_websocket(socket, place, head, early.into());
            }
            Outcome::Poll { channels, poll } => {
                // Its answer closes the connection, so what came behind the request is not served.
                let (socket, _) = transport.into_socket();
                return entrance.establish_poll(socket, channels, poll);
            }
        };
        node.metrics.count_response(status.code());
        if transport.send(response, Instant::now() + limits.body_time).await.is_err() {
            return;
        }
        if !again {
            return transport.linger().await;
        }
    }
}

/// Answers and closes.
async fn send_away(mut transport: Transport, reply: Reply, head_only: bool, allow: AllowOrigin<'_>, node: &NodeView) {
    node.metrics.count_response(reply.status.code());
    let bytes = reply.render(head_only, false, allow);
    if transport.send(bytes, Instant::now() + node.settings.limits.body_time).await.is_ok() {
        transport.linger().await;
    }
}

/// Reads the next request head: within `patience` its first byte, within `head_time` of that the rest.
async fn next_head(transport: &mut Transport, patience: Duration, head_time: Duration) -> Result<Head, Broken> {
    let mut started = false;
    let mut deadline = Instant::now() + patience;
    loop {
        if !transport.received().is_empty() {
            match http1::parse_head(transport.received()) {
                Ok(Some((head, length))) => {
                    transport.consume(length);
                    return Ok(head);
                }
                Ok(None) => {}
                Err(error) => return Err(Broken::Refused(Reply::error(error.status(), error))),
            }
            if !std::mem::replace(&mut started, true) {
                deadline = Instant::now() + head_time;
            }
        }
        match transport.fill(deadline).await {
            Ok(()) => {}
            Err(Ended::TimedOut) if started => return Err(too_slow("head", head_time)),
            Err(_) => return Err(Broken::Gone),
        }
    }
}

/// Reads a request's body, within `body_time`.
async fn read_body(
    transport: &mut Transport,
    head: &Head,
    route: Route<'_>,
    node: &NodeView,
) -> Result<Vec<u8>, Broken> {
    let limits = &node.settings.limits;
    let refuse = |error: http1::BodyError| Broken::Refused(Reply::error(error.status(), error));
    let most = if matches!(route, Route::Publish(_)) { limits.publication_bytes } else { limits.body_bytes };
    let mut decoder = BodyDecoder::new(head.framing(), most).map_err(refuse)?;
    let mut body = Vec::new();
    let deadline = Instant::now() + limits.body_time;
    let mut waits = head.expects_continue();
    loop {
        let used = decoder.feed(transport.received(), &mut body).map_err(refuse)?;
        transport.consume(used);
        if decoder.is_done() {
            return Ok(body);
        }
        // A client that sends its body without waiting needs no invitation (RFC 9110, section 10.1.1).
        if std::mem::take(&mut waits) && used == 0 {
            let mut invitation = Vec::new();
            ResponseWriter::new(&mut invitation, Status::Continue).end();
            transport.send(invitation, deadline).await.map_err(|_| Broken::Gone)?;
        }
        match transport.fill(deadline).await {
            Ok(()) => {}
            Err(Ended::TimedOut) => return Err(too_slow("body", limits.body_time)),
            Err(Ended::Closed) => return Err(Broken::Gone),
        }
    }
}

fn too_slow(part: &str, time: Duration) -> Broken {
    let message = format!("the request's {part} took longer than {} ms", time.as_millis());
    Broken::Refused(Reply::error(Status::RequestTimeout, message))
}

/// Does what a request asks for.
async fn answer<E: Entrance>(
    route: Route<'_>,
    head: &Head,
    body: Vec<u8>,
    origin: Origin<'_>,
    entrance: &E,
    node: &Rc<NodeView>,
) -> Outcome<E::Reservation> {
    if let Origin::Foreign(name) = origin
        && route.is_guarded()
    {
        let allowed: Vec<_> = node.settings.allow_origins.iter().map(String::as_str).collect();
        let message = format_args!("pages of {name} may not use this node; see allow_origins");
        return Outcome::Reply(Reply::refuse(Status::Forbidden, message, &allowed));
    }
    Outcome::Reply(match route {
        Route::Index => routes::index(head),
        Route::Live => routes::live(),
        Route::Ready => routes::ready(node),
        Route::Metrics => routes::metrics(node),
        Route::Publish(channel) => publish::one(channel, head, body, entrance, node).await,
        Route::ApiPublish => publish::batch(&body, entrance, node).await,
        Route::Sse => match open_sse(head, origin, entrance, node).await {
            Ok(stream) => return stream,
            Err(reply) => reply,
        },
        Route::Poll => match poll::answer(head, origin, entrance, node).await {
            Ok(outcome) => return outcome,
            Err(reply) => reply,
        },
        Route::WebSocket => match open_websocket(head, entrance).await {
            Ok(stream) => return stream,
            Err(reply) => reply,
        },
    })
}

async fn open_websocket<E: Entrance>(head: &Head, entrance: &E) -> Result<Outcome<E::Reservation>, Reply> {
    let response = stream::accept_websocket(head)?;
    let place = entrance.open(&[]).await.map_err(Reply::unavailable)?;
    Ok(Outcome::WebSocket { place, head: response })
}

async fn open_sse<E: Entrance>(
    head: &Head,
    origin: Origin<'_>,
    entrance: &E,
    node: &NodeView,
) -> Result<Outcome<E::Reservation>, Reply> {
    let request = stream::parse_sse(head, &node.settings)?;
    let response = stream::sse_head(origin.allow());
    if head.method() == "HEAD" {
        return Ok(Outcome::SseHead(response));
    }
    let channels = entrance.open(&request.channels).await.map_err(Reply::unavailable)?;
    Ok(Outcome::Sse { channels, resume: request.resume, head: response })
}
