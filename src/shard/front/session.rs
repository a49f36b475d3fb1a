//! One connection: request after request, until it is closed or handed to the engine.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use monoio::time::Instant;

use super::origin::Origin;
use super::reply::Reply;
use super::routes::{self, Route};
use super::transport::{Ended, Transport};
use super::{Entrance, NodeView, poll, publish, stream};
use crate::log::position::CursorEntry;
use crate::settings::{ClientLimits, Settings};
use crate::shard::handover::Request;
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
    /// The shard leaves; these bytes of the message were used already and are to be read again.
    Parked(Vec<u8>),
}

/// Serves one connection. Returns it when all that is left is to wait for its client to close.
pub(super) async fn run<E: Entrance>(
    mut transport: Transport,
    begun: Option<Request>,
    entrance: &E,
    node: &Rc<NodeView>,
) -> Option<Transport> {
    let mut settings = node.settings.get();
    let mut limits = &settings.limits;
    // A client that has just connected has something to say; one that was answered may have nothing for a while.
    let mut patience = limits.head_time;
    let (mut invited, mut left) = (false, None);
    if let Some(Request { received, unsent, last, invited: before, left: millis }) = begun {
        transport.restore(received);
        let time = Duration::from_millis(millis);
        if !unsent.is_empty() {
            match transport.answer(unsent, Instant::now() + time.min(limits.body_time)).await {
                Ok(()) if last => return Some(transport),
                Ok(()) => patience = limits.keep_alive,
                Err(Ended::Parked) => {
                    transport.park(Vec::new(), false, last);
                    return None;
                }
                Err(Ended::Closed | Ended::TimedOut) => return None,
            }
        } else {
            (invited, left, patience) = (before, Some(time), limits.keep_alive);
        }
    }
    loop {
        let head = match next_head(&mut transport, patience, limits.head_time, left).await {
            Ok(head) => head,
            Err(Broken::Gone) => return None,
            Err(Broken::Parked(read)) => {
                transport.park(read, invited, false);
                return None;
            }
            Err(Broken::Refused(reply)) => {
                return send_away(transport, reply, false, AllowOrigin::None, limits, node).await;
            }
        };
        settings = node.settings.get();
        limits = &settings.limits;
        patience = limits.keep_alive;

        let (head, raw) = head;
        let head_only = head.method() == "HEAD";
        let origin = Origin::of(&head, &settings.allow_origins);
        let outcome = match routes::find(&head) {
            Err(reply) if head.framing() == Framing::Length(0) => Outcome::Reply(reply),
            // The body of a request that is not served is not read.
            Err(reply) => return send_away(transport, reply, head_only, origin.allow(), limits, node).await,
            Ok(route) => {
                let time = left.take().map_or(limits.body_time, |left| left.min(limits.body_time));
                match read_body(&mut transport, &head, raw, route, time, &mut invited, limits).await {
                    Ok(body) => answer(route, &head, body, origin, entrance, &settings, node).await,
                    Err(Broken::Gone) => return None,
                    Err(Broken::Parked(read)) => {
                        transport.park(read, invited, false);
                        return None;
                    }
                    Err(Broken::Refused(reply)) => {
                        return send_away(transport, reply, head_only, origin.allow(), limits, node).await;
                    }
                }
            }
        };
        (invited, left) = (false, None);
        let (status, response, again) = match outcome {
            Outcome::Reply(reply) => {
                let status = reply.status;
                let again = head.keep_alive() && !transport.ends();
                (status, reply.render(head_only, again, origin.allow()), again)
            }
            Outcome::Answered { status, response } => (status, response, head.keep_alive()),
            Outcome::SseHead(head) => (Status::Ok, head.into(), false),
            Outcome::Sse { channels, resume, head } => {
                node.metrics.count_response(Status::Ok.code());
                let (socket, _) = transport.into_socket();
                entrance.establish_sse(socket, channels, resume, head);
                return None;
            }
            Outcome::WebSocket { place, head } => {
                node.metrics.count_response(Status::SwitchingProtocols.code());
                let (socket, early) = transport.into_socket();
                entrance.establish_websocket(socket, place, head, early.into());
                return None;
            }
            Outcome::Poll { channels, poll } => {
                // Its answer closes the connection, so what came behind the request is not served.
                let (socket, _) = transport.into_socket();
                entrance.establish_poll(socket, channels, poll);
                return None;
            }
        };
        node.metrics.count_response(status.code());
        if !respond(&mut transport, response, limits.body_time).await.ok()? {
            transport.park(Vec::new(), false, !again);
            return None;
        }
        if !again {
            return Some(transport);
        }
    }
}

/// Sends an answer. False when the shard leaves before it is sent whole.
async fn respond(transport: &mut Transport, response: Vec<u8>, time: Duration) -> Result<bool, Ended> {
    match transport.answer(response, Instant::now() + time).await {
        Ok(()) => Ok(true),
        Err(Ended::Parked) => Ok(false),
        Err(ended) => Err(ended),
    }
}

/// Answers and closes.
async fn send_away(
    mut transport: Transport,
    reply: Reply,
    head_only: bool,
    allow: AllowOrigin<'_>,
    limits: &ClientLimits,
    node: &NodeView,
) -> Option<Transport> {
    node.metrics.count_response(reply.status.code());
    let bytes = reply.render(head_only, false, allow);
    if respond(&mut transport, bytes, limits.body_time).await.ok()? {
        return Some(transport);
    }
    transport.park(Vec::new(), false, true);
    None
}

/// Reads the next request head, and its bytes when a body follows: within `patience` its first byte, within `head_time` of
/// that the rest; `left` is what is left of either for a connection that was interrupted.
async fn next_head(
    transport: &mut Transport,
    patience: Duration,
    head_time: Duration,
    left: Option<Duration>,
) -> Result<(Head, Vec<u8>), Broken> {
    let mut started = !transport.received().is_empty() && left.is_some();
    let mut deadline = Instant::now() + left.map_or(patience, |left| left.min(patience.max(head_time)));
    loop {
        // Before a request is taken up: one that is whole already is served by whoever goes on.
        transport.check_open(deadline).map_err(|_| Broken::Parked(Vec::new()))?;
        if !transport.received().is_empty() {
            match http1::parse_head(transport.received()) {
                Ok(Some((head, length))) => {
                    let body = head.framing() != Framing::Length(0);
                    let raw = if body { transport.received()[..length].to_vec() } else { Vec::new() };
                    transport.consume(length);
                    return Ok((head, raw));
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
            Err(Ended::Parked) => return Err(Broken::Parked(Vec::new())),
            Err(Ended::Closed | Ended::TimedOut) => return Err(Broken::Gone),
        }
    }
}

/// Reads a request's body, within `time`. `raw` is the request's head as it came, and `invited` whether the client was told to
/// send its body.
async fn read_body(
    transport: &mut Transport,
    head: &Head,
    raw: Vec<u8>,
    route: Route<'_>,
    time: Duration,
    invited: &mut bool,
    limits: &ClientLimits,
) -> Result<Vec<u8>, Broken> {
    let refuse = |error: http1::BodyError| Broken::Refused(Reply::error(error.status(), error));
    let most = if matches!(route, Route::Publish(_)) { limits.publication_bytes } else { limits.body_bytes };
    let mut decoder = BodyDecoder::new(head.framing(), most).map_err(refuse)?;
    let mut body = Vec::new();
    let deadline = Instant::now() + time;
    let mut waits = head.expects_continue() && !*invited;
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
            *invited = true;
        }
        match transport.fill(deadline).await {
            Ok(()) => {}
            Err(Ended::TimedOut) => return Err(too_slow("body", limits.body_time)),
            Err(Ended::Closed) => return Err(Broken::Gone),
            Err(Ended::Parked) => {
                let mut read = raw;
                decoder.restate(head.framing(), &body, &mut read);
                return Err(Broken::Parked(read));
            }
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
    settings: &Settings,
    node: &Rc<NodeView>,
) -> Outcome<E::Reservation> {
    if let Origin::Foreign(name) = origin
        && route.is_guarded()
    {
        let allowed: Vec<_> = settings.allow_origins.iter().map(String::as_str).collect();
        let message = format_args!("pages of {name} may not use this node; see allow_origins");
        return Outcome::Reply(Reply::refuse(Status::Forbidden, message, &allowed));
    }
    Outcome::Reply(match route {
        Route::Index => routes::index(head),
        Route::Live => routes::live(),
        Route::Ready => routes::ready(node),
        Route::Metrics => routes::metrics(node),
        Route::Publish(channel) => publish::one(channel, head, body, entrance, node).await,
        Route::ApiPublish => publish::batch(&body, entrance, settings, node).await,
        Route::Sse => match open_sse(head, origin, entrance, settings).await {
            Ok(stream) => return stream,
            Err(reply) => reply,
        },
        Route::Poll => match poll::answer(head, origin, entrance, settings, node).await {
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
    settings: &Settings,
) -> Result<Outcome<E::Reservation>, Reply> {
    let request = stream::parse_sse(head, settings)?;
    let response = stream::sse_head(origin.allow());
    if head.method() == "HEAD" {
        return Ok(Outcome::SseHead(response));
    }
    let channels = entrance.open(&request.channels).await.map_err(Reply::unavailable)?;
    entrance.fetch(&channels, &request.resume).await.map_err(Reply::unavailable)?;
    Ok(Outcome::Sse { channels, resume: request.resume, head: response })
}
