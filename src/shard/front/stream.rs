//! Opening a stream: what a client asks for, and the response head that the engine sends.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;

use super::reply::Reply;
use crate::log::position::{CursorEntry, parse_cursor};
use crate::settings::Settings;
use crate::wire::channel_name;
use crate::wire::http1::{AllowOrigin, Head, ResponseWriter, Status};
use crate::wire::websocket::{self, UpgradeError};

/// Event names of our own. A stream of many channels names its events by channel, so these channels would forge them.
const RESERVED: [&str; 3] = ["open", "error", "gap"];

/// The subprotocol of the Centrifugo client protocol in JSON.
const JSON_SUBPROTOCOL: &str = "centrifuge-json";
/// The same in Protobuf, which is not spoken here.
const PROTOBUF_SUBPROTOCOL: &str = "centrifuge-protobuf";

/// What an event stream is asked to carry.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SseRequest {
    /// The channels, each once, in the order of the request.
    pub(super) channels: Vec<Arc<str>>,
    /// Where the client left off.
    pub(super) resume: Vec<CursorEntry>,
}

/// Reads the request of an event stream.
///
/// # Errors
/// The answer 400, which says what was wrong.
pub(super) fn parse_sse(head: &Head, settings: &Settings) -> Result<SseRequest, Reply> {
    let most = settings.limits.channels;
    let mut channels: Vec<Arc<str>> = Vec::new();
    let mut cursor = Cow::Borrowed("");
    for pair in head.query() {
        let (name, value) = pair.map_err(|error| bad(format_args!("the query: {error}")))?;
        match &*name {
            "channel" => add_channel(&mut channels, &value, most)?,
            "last_event_id" => cursor = value,
            _ => {}
        }
    }
    if channels.is_empty() {
        return Err(bad("name at least one channel: /sse?channel=NAME&channel=NAME"));
    }
    if channels.len() > 1
        && let Some(name) = channels.iter().find(|name| RESERVED.contains(&&***name))
    {
        return Err(bad(format_args!(
            "a stream of several channels names its events by channel, and the event {name:?} is the server's own: \
             follow that channel with a stream of its own"
        )));
    }
    // The header is what a browser sends by itself when it reconnects, so it is newer than the address.
    let cursor = head.header("last-event-id").unwrap_or(&cursor);
    let resume = parse_cursor(cursor, most).map_err(bad)?;
    Ok(SseRequest { channels, resume })
}

/// Adds a channel of a request, once, if there is room.
///
/// # Errors
/// The answer 400, which says what was wrong.
pub(super) fn add_channel(channels: &mut Vec<Arc<str>>, name: &str, most: usize) -> Result<(), Reply> {
    channel_name::check(name).map_err(bad)?;
    if channels.iter().any(|known| **known == *name) {
        return Ok(());
    }
    if channels.len() == most {
        return Err(bad(format_args!("one request names at most {most} channels")));
    }
    channels.push(name.into());
    Ok(())
}

/// The head of an event stream. Its body ends with the connection (RFC 9112, section 6.3).
pub(super) fn sse_head(allow_origin: AllowOrigin<'_>) -> Bytes {
    let mut out = Vec::with_capacity(256);
    ResponseWriter::new(&mut out, Status::Ok)
        .header("Content-Type", "text/event-stream; charset=utf-8")
        .header("Cache-Control", "no-store")
        // nginx would otherwise collect events before it passes them on.
        .header("X-Accel-Buffering", "no")
        .allow_origin(allow_origin)
        .until_close();
    out.into()
}

/// Checks a WebSocket request and makes the head that accepts it (RFC 6455, section 4.2.2).
///
/// # Errors
/// The answer, which says what was wrong.
pub(super) fn accept_websocket(head: &Head) -> Result<Bytes, Reply> {
    if head.minor_version() == 0 {
        return Err(bad("a WebSocket request is HTTP/1.1 (RFC 6455, section 4.1); this one is HTTP/1.0"));
    }
    let headers = head.headers();
    let accept = websocket::check_upgrade(
        headers.all("upgrade"),
        headers.all("connection"),
        head.header("sec-websocket-version"),
        head.header("sec-websocket-key"),
    )
    .map_err(not_an_upgrade)?;
    let asked_by_query =
        head.query().flatten().any(|(name, value)| matches!(&*name, "format" | "cf_protocol") && value == "protobuf");
    let json = headers.has_token("sec-websocket-protocol", JSON_SUBPROTOCOL);
    let protobuf = headers.has_token("sec-websocket-protocol", PROTOBUF_SUBPROTOCOL);
    if asked_by_query || (protobuf && !json) {
        let message = "Protobuf is not spoken here: use the JSON form of the protocol";
        return Err(Reply::refuse(Status::BadRequest, message, &["no subprotocol", JSON_SUBPROTOCOL]));
    }
    let mut out = Vec::with_capacity(192);
    let mut writer = ResponseWriter::new(&mut out, Status::SwitchingProtocols)
        .header("Upgrade", "websocket")
        .header("Connection", "Upgrade")
        .header("Sec-WebSocket-Accept", &accept);
    if json {
        writer = writer.header("Sec-WebSocket-Protocol", JSON_SUBPROTOCOL);
    }
    writer.end();
    Ok(out.into())
}

fn not_an_upgrade(error: UpgradeError) -> Reply {
    match error {
        // Another request would be understood: say which (RFC 9110, section 15.5.22).
        UpgradeError::Upgrade | UpgradeError::Version => Reply::error(Status::UpgradeRequired, error)
            .header("Upgrade", "websocket")
            .header("Connection", "Upgrade")
            .header("Sec-WebSocket-Version", websocket::VERSION),
        UpgradeError::Connection | UpgradeError::Key => bad(error),
    }
}

/// The answer 400.
pub(super) fn bad(message: impl std::fmt::Display) -> Reply {
    Reply::error(Status::BadRequest, message)
}
