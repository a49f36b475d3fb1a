//! What the server sends: one object a call, appended to a buffer.

use std::ops::Range;

use memchr::memchr2;
use serde_json::value::RawValue;

use super::code::{DisconnectCode, ErrorCode, UnsubscribeCode};

/// An open JSON object. Fields with empty and zero values are left out, as the protocol has it.
pub(super) struct Object<'a> {
    out: &'a mut Vec<u8>,
    first: bool,
}

impl<'a> Object<'a> {
    pub(super) fn open(out: &'a mut Vec<u8>) -> Self {
        out.push(b'{');
        Self { out, first: true }
    }

    /// Appends the field's name; its value must follow. Names are plain ASCII of this module.
    fn key(&mut self, name: &str) {
        if !std::mem::take(&mut self.first) {
            self.out.push(b',');
        }
        self.out.push(b'"');
        self.out.extend_from_slice(name.as_bytes());
        self.out.extend_from_slice(b"\":");
    }

    pub(super) fn text(&mut self, name: &str, value: &str) -> &mut Self {
        if !value.is_empty() {
            self.key(name);
            write_string(self.out, value);
        }
        self
    }

    pub(super) fn number(&mut self, name: &str, value: u64) -> &mut Self {
        if value != 0 {
            self.key(name);
            self.out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
        }
        self
    }

    pub(super) fn flag(&mut self, name: &str, value: bool) -> &mut Self {
        if value {
            self.key(name);
            self.out.extend_from_slice(b"true");
        }
        self
    }

    pub(super) fn object(&mut self, name: &str, fill: impl FnOnce(&mut Object<'_>)) -> &mut Self {
        self.key(name);
        let mut inner = Object::open(self.out);
        fill(&mut inner);
        inner.close();
        self
    }

    /// Appends the field `publications` from already encoded objects.
    fn publications<'p>(&mut self, publications: impl IntoIterator<Item = &'p [u8]>) -> &mut Self {
        let mut some = false;
        for publication in publications {
            if some {
                self.out.push(b',');
            } else {
                self.key("publications");
                self.out.push(b'[');
                some = true;
            }
            self.out.extend_from_slice(publication);
        }
        if some {
            self.out.push(b']');
        }
        self
    }

    pub(super) fn close(self) {
        self.out.push(b'}');
    }
}

fn write_string(out: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(out, text).expect("a string is JSON and a Vec takes every write");
}

/// Appends `data` as it stands inside JSON: embedded when it is JSON itself, as a JSON string otherwise.
fn write_data(out: &mut Vec<u8>, data: &str) {
    let Ok(json) = serde_json::from_str::<&RawValue>(data) else {
        write_string(out, data);
        return;
    };
    // A line is one object, so no CR or LF may stay. Inside a JSON string they are escaped: these are white space.
    let mut rest = json.get().as_bytes();
    while let Some(at) = memchr2(b'\r', b'\n', rest) {
        out.extend_from_slice(&rest[..at]);
        out.push(b' ');
        rest = &rest[at + 1..];
    }
    out.extend_from_slice(rest);
}

/// Appends `{"push":{"channel":…,"pub":{"data":…,"offset":…}}}` and returns where the `pub` object lies in `out`. Data
/// that is JSON is embedded, any other text becomes a JSON string. A publication without a position has no offset.
pub fn write_publication_push(out: &mut Vec<u8>, channel: &str, offset: Option<u64>, data: &str) -> Range<usize> {
    out.extend_from_slice(b"{\"push\":{\"channel\":");
    write_string(out, channel);
    out.extend_from_slice(b",\"pub\":");
    let start = out.len();
    let mut publication = Object::open(out);
    publication.key("data");
    write_data(publication.out, data);
    publication.number("offset", offset.unwrap_or(0));
    publication.close();
    let end = out.len();
    out.extend_from_slice(b"}}");
    start..end
}

/// Result of `connect`.
#[derive(Debug, Clone, Copy)]
pub struct ConnectResult<'a> {
    /// The connection's name, unique over all nodes.
    pub client: &'a str,
    /// The server's version.
    pub version: &'a str,
    /// Interval of the server's pings, in seconds.
    pub ping: u32,
    /// Whether the client must answer them.
    pub pong: bool,
    /// A secret of the session; may be empty.
    pub session: &'a str,
    /// The node's name; may be empty.
    pub node: &'a str,
}

/// Result of `subscribe`.
#[derive(Debug, Clone, Copy)]
pub struct SubscribeResult<'a> {
    /// Whether the client may ask for what it missed when it returns.
    pub recoverable: bool,
    /// Whether publications carry offsets that the server watches for gaps.
    pub positioned: bool,
    /// The channel's epoch.
    pub epoch: &'a str,
    /// The channel's head once the publications listed are seen.
    pub offset: u64,
    /// Whether nothing is missing between the position the client named and `offset`.
    pub recovered: bool,
    /// Whether the client asked for recovery.
    pub was_recovering: bool,
}

/// Result of `history`, beside its publications.
#[derive(Debug, Clone, Copy)]
pub struct HistoryResult<'a> {
    /// The channel's epoch.
    pub epoch: &'a str,
    /// The channel's head.
    pub offset: u64,
}

fn reply(out: &mut Vec<u8>, id: u32, method: &str, fill: impl FnOnce(&mut Object<'_>)) {
    let mut reply = Object::open(out);
    reply.number("id", id.into()).object(method, fill);
    reply.close();
}

/// Appends the reply to `connect`.
pub fn write_connect(out: &mut Vec<u8>, id: u32, result: &ConnectResult<'_>) {
    reply(out, id, "connect", |object| {
        object.text("client", result.client).text("version", result.version).number("ping", result.ping.into());
        object.flag("pong", result.pong).text("session", result.session).text("node", result.node);
    });
}

/// Appends the reply to `subscribe`. `publications` are what recovery found, oldest first, each an encoded object
/// such as [`write_publication_push`] points out.
pub fn write_subscribe<'p>(
    out: &mut Vec<u8>,
    id: u32,
    result: &SubscribeResult<'_>,
    publications: impl IntoIterator<Item = &'p [u8]>,
) {
    reply(out, id, "subscribe", |object| {
        object.flag("recoverable", result.recoverable).flag("positioned", result.positioned);
        object.text("epoch", result.epoch).number("offset", result.offset);
        object.flag("recovered", result.recovered).flag("was_recovering", result.was_recovering);
        object.publications(publications);
    });
}

/// Appends the reply to `history`; `publications` as for [`write_subscribe`].
pub fn write_history<'p>(
    out: &mut Vec<u8>,
    id: u32,
    result: &HistoryResult<'_>,
    publications: impl IntoIterator<Item = &'p [u8]>,
) {
    reply(out, id, "history", |object| {
        object.publications(publications).text("epoch", result.epoch).number("offset", result.offset);
    });
}

/// Appends the reply to `unsubscribe`.
pub fn write_unsubscribe(out: &mut Vec<u8>, id: u32) {
    reply(out, id, "unsubscribe", |_| ());
}

/// Appends the reply to `publish`.
pub fn write_publish(out: &mut Vec<u8>, id: u32) {
    reply(out, id, "publish", |_| ());
}

/// Appends a reply without a result: the answer to a client's own ping.
pub fn write_empty(out: &mut Vec<u8>, id: u32) {
    let mut reply = Object::open(out);
    reply.number("id", id.into());
    reply.close();
}

/// Appends the refusal of a command.
pub fn write_error(out: &mut Vec<u8>, id: u32, code: ErrorCode) {
    reply(out, id, "error", |object| {
        object.number("code", code.number().into()).text("message", code.text()).flag("temporary", code.temporary());
    });
}

/// Appends the server's ping.
pub fn write_ping(out: &mut Vec<u8>) {
    out.extend_from_slice(b"{}");
}

/// Appends the news that the server ended a subscription.
pub fn write_unsubscribe_push(out: &mut Vec<u8>, channel: &str, code: UnsubscribeCode) {
    push(out, channel, "unsubscribe", |object| {
        object.number("code", code.number().into()).text("reason", code.text());
    });
}

/// Appends the news that the server ends the connection, for transports without close codes. A WebSocket gets a close
/// frame with the same code and text instead.
pub fn write_disconnect_push(out: &mut Vec<u8>, code: DisconnectCode) {
    push(out, "", "disconnect", |object| {
        object.number("code", code.number().into()).text("reason", code.text());
    });
}

fn push(out: &mut Vec<u8>, channel: &str, kind: &str, fill: impl FnOnce(&mut Object<'_>)) {
    let mut message = Object::open(out);
    message.object("push", |push| {
        push.text("channel", channel).object(kind, fill);
    });
    message.close();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        let text = String::from_utf8(out).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).expect("JSON");
        text
    }

    fn push_of(data: &str, offset: Option<u64>) -> (String, String) {
        let mut out = b"before".to_vec();
        let range = write_publication_push(&mut out, "a\"b", offset, data);
        let publication = String::from_utf8(out[range].to_vec()).unwrap();
        (String::from_utf8(out).unwrap(), publication)
    }

    #[test]
    fn json_is_embedded_on_one_line_and_any_other_text_is_a_string() {
        let (all, publication) = push_of(r#"{"t":"c"}"#, Some(43));
        assert_eq!(all, r#"before{"push":{"channel":"a\"b","pub":{"data":{"t":"c"},"offset":43}}}"#);
        assert_eq!(publication, r#"{"data":{"t":"c"},"offset":43}"#);
        assert_eq!(push_of(" [1,\r\n 2]\n", None).1, r#"{"data":[1,   2]}"#);
        assert_eq!(push_of("17", Some(1)).1, r#"{"data":17,"offset":1}"#);
        assert_eq!(push_of("\"a\\nb\"", None).1, r#"{"data":"a\nb"}"#);
        for text in ["", " ", "plain", "{\"cut\":", "1 2", "line\nbreak\"\u{1}", "NaN", "{}{}"] {
            let (_, publication) = push_of(text, Some(u64::MAX));
            assert!(!publication.contains('\n'));
            let value: serde_json::Value = serde_json::from_str(&publication).unwrap();
            assert_eq!(value, serde_json::json!({"data": text, "offset": u64::MAX}));
        }
    }

    #[test]
    fn replies_leave_empty_fields_out() {
        let connect =
            ConnectResult { client: "9f1", version: "weir 0.1", ping: 25, pong: true, session: "", node: "n1" };
        assert_eq!(
            written(|out| write_connect(out, 1, &connect)),
            r#"{"id":1,"connect":{"client":"9f1","version":"weir 0.1","ping":25,"pong":true,"node":"n1"}}"#
        );
        let fresh = SubscribeResult {
            recoverable: true,
            positioned: true,
            epoch: "0000001f",
            offset: 0,
            recovered: false,
            was_recovering: false,
        };
        assert_eq!(
            written(|out| write_subscribe(out, 2, &fresh, [])),
            r#"{"id":2,"subscribe":{"recoverable":true,"positioned":true,"epoch":"0000001f"}}"#
        );
        let recovered = SubscribeResult { offset: 42, recovered: true, was_recovering: true, ..fresh };
        let publications: [&[u8]; 2] = [br#"{"data":1,"offset":41}"#, br#"{"data":2,"offset":42}"#];
        assert_eq!(
            written(|out| write_subscribe(out, 2, &recovered, publications)),
            concat!(
                r#"{"id":2,"subscribe":{"recoverable":true,"positioned":true,"epoch":"0000001f","offset":42,"#,
                r#""recovered":true,"was_recovering":true,"#,
                r#""publications":[{"data":1,"offset":41},{"data":2,"offset":42}]}}"#
            )
        );
        let position = HistoryResult { epoch: "0000001f", offset: 43 };
        assert_eq!(
            written(|out| write_history(out, 3, &position, [])),
            r#"{"id":3,"history":{"epoch":"0000001f","offset":43}}"#
        );
        assert_eq!(written(|out| write_publish(out, 4)), r#"{"id":4,"publish":{}}"#);
        assert_eq!(written(|out| write_unsubscribe(out, 4)), r#"{"id":4,"unsubscribe":{}}"#);
        assert_eq!(written(|out| write_empty(out, 4)), r#"{"id":4}"#);
        assert_eq!(written(write_ping), "{}");
    }

    #[test]
    fn refusals_and_ends_carry_number_and_text() {
        assert_eq!(
            written(|out| write_error(out, 4, ErrorCode::PermissionDenied)),
            r#"{"id":4,"error":{"code":103,"message":"permission denied"}}"#
        );
        assert_eq!(
            written(|out| write_error(out, 4, ErrorCode::TooManyRequests)),
            r#"{"id":4,"error":{"code":111,"message":"too many requests","temporary":true}}"#
        );
        assert_eq!(
            written(|out| write_unsubscribe_push(out, "a", UnsubscribeCode::InsufficientState)),
            r#"{"push":{"channel":"a","unsubscribe":{"code":2500,"reason":"insufficient state"}}}"#
        );
        assert_eq!(
            written(|out| write_disconnect_push(out, DisconnectCode::Shutdown)),
            r#"{"push":{"disconnect":{"code":3001,"reason":"shutdown"}}}"#
        );
    }
}
