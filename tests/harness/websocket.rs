//! A WebSocket client (RFC 6455) and the Centrifugo client protocol on it, sharing nothing with the product's codecs.

use std::collections::VecDeque;
use std::net::SocketAddr;

use serde_json::{Value, json};

use super::http::{Response, read_head};
use super::{Connection, Deadline, request};

/// The sample of RFC 6455, section 1.3: a key and the answer it must get.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// The opcodes that are used here (RFC 6455, section 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Opcode {
    Continuation = 0,
    Text = 1,
    Close = 8,
    Ping = 9,
    Pong = 10,
}

/// What the server sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// A whole text message.
    Text(String),
    /// A ping.
    Ping(Vec<u8>),
    /// A pong.
    Pong(Vec<u8>),
    /// A close frame: code and reason.
    Close(u16, String),
    /// The connection ended without a close frame.
    End,
}

/// An upgraded connection.
pub struct WebSocket {
    /// The connection, for tests that write bytes of their own.
    pub connection: Connection,
}

impl WebSocket {
    /// Upgrades a new connection.
    #[track_caller]
    pub fn open(address: SocketAddr) -> Self {
        Self::open_on(Connection::open(address), &[]).unwrap_or_else(|refused| panic!("not upgraded: {refused:?}"))
    }

    /// Upgrades a connection; `extra` headers come after the usual ones.
    ///
    /// # Errors
    /// Gives the response when it is not 101.
    #[track_caller]
    pub fn open_on(mut connection: Connection, extra: &[(&str, &str)]) -> Result<Self, Response> {
        connection.write(&upgrade_request(extra));
        let response = read_head(&mut connection).expect("the node ended the connection instead of answering");
        if response.status != 101 {
            return Err(response);
        }
        assert_eq!(response.header("sec-websocket-accept"), Some(ACCEPT));
        assert!(
            response.header("upgrade").is_some_and(|value| value.eq_ignore_ascii_case("websocket")),
            "{response:?}"
        );
        Ok(Self { connection })
    }

    /// Sends one masked final frame.
    #[track_caller]
    pub fn send(&mut self, opcode: Opcode, payload: &[u8]) {
        let mut bytes = Vec::new();
        push_frame(&mut bytes, true, opcode, Some([0x5a, 0xc3, 0x0f, 0x96]), payload);
        self.connection.write(&bytes);
    }

    /// Reads the next message or control frame.
    #[track_caller]
    pub fn next(&mut self) -> Incoming {
        let mut text = Vec::new();
        loop {
            let Some((fin, opcode, payload)) = self.connection.read_until(take_frame) else {
                return Incoming::End;
            };
            match opcode {
                9 => return Incoming::Ping(payload),
                10 => return Incoming::Pong(payload),
                8 => {
                    assert!(payload.len() >= 2, "a close frame of this server says why: {payload:?}");
                    let reason = String::from_utf8(payload[2..].to_vec()).expect("a close reason is UTF-8");
                    return Incoming::Close(u16::from_be_bytes([payload[0], payload[1]]), reason);
                }
                0 | 1 => {
                    text.extend_from_slice(&payload);
                    if fin {
                        return Incoming::Text(String::from_utf8(text).expect("a text message is UTF-8"));
                    }
                }
                other => panic!("opcode {other} from the server"),
            }
        }
    }

    /// Reads until the server closes, skipping messages, and returns code and reason.
    #[track_caller]
    pub fn read_to_close(&mut self) -> (u16, String) {
        let deadline = Deadline::start();
        loop {
            deadline.check("a close frame");
            match self.next() {
                Incoming::Close(code, reason) => return (code, reason),
                Incoming::End => panic!("the connection ended without a close frame"),
                Incoming::Text(_) | Incoming::Ping(_) | Incoming::Pong(_) => {}
            }
        }
    }
}

/// The request for a WebSocket; `extra` headers come after the usual ones.
pub(super) fn upgrade_request(extra: &[(&str, &str)]) -> Vec<u8> {
    let mut headers = vec![
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Key", KEY),
        ("Sec-WebSocket-Version", "13"),
    ];
    headers.extend_from_slice(extra);
    request("GET", "/connection/websocket", &headers, b"")
}

/// Takes one whole server frame from a buffer: final, opcode, payload.
pub(super) fn take_frame(buffer: &mut Vec<u8>) -> Option<(bool, u8, Vec<u8>)> {
    let &[first, second, ..] = buffer.as_slice() else { return None };
    assert_eq!(first & 0x70, 0, "reserved bits from the server");
    assert_eq!(second & 0x80, 0, "a server's frame is not masked");
    let (header, length) = match second & 0x7f {
        126 => (4, usize::from(u16::from_be_bytes(buffer.get(2..4)?.try_into().ok()?))),
        127 => (10, usize::try_from(u64::from_be_bytes(buffer.get(2..10)?.try_into().ok()?)).expect("a sane length")),
        short => (2, usize::from(short)),
    };
    if buffer.len() < header + length {
        return None;
    }
    let frame: Vec<u8> = buffer.drain(..header + length).collect();
    Some((first & 0x80 != 0, first & 0x0f, frame[header..].to_vec()))
}

/// Appends a frame as a client writes it; without a mask it is one that a server must refuse.
pub fn push_frame(out: &mut Vec<u8>, fin: bool, opcode: Opcode, mask: Option<[u8; 4]>, payload: &[u8]) {
    out.push(u8::from(fin) << 7 | opcode as u8);
    let masked = u8::from(mask.is_some()) << 7;
    match payload.len() {
        short @ 0..=125 => out.push(masked | short as u8),
        medium @ 126..=0xffff => {
            out.push(masked | 126);
            out.extend_from_slice(&(medium as u16).to_be_bytes());
        }
        long => {
            out.push(masked | 127);
            out.extend_from_slice(&(long as u64).to_be_bytes());
        }
    }
    match mask {
        None => out.extend_from_slice(payload),
        Some(mask) => {
            out.extend_from_slice(&mask);
            out.extend(payload.iter().enumerate().map(|(index, byte)| byte ^ mask[index % 4]));
        }
    }
}

/// A client of the Centrifugo protocol.
pub struct Centrifugo {
    /// The WebSocket below.
    pub socket: WebSocket,
    next_id: u32,
    /// Values not taken yet, each with the text of its line.
    inbox: VecDeque<(Value, String)>,
    /// The result of `connect`.
    pub connected: Value,
}

impl Centrifugo {
    /// Upgrades and connects.
    #[track_caller]
    pub fn open(address: SocketAddr) -> Self {
        Self::open_on(Connection::open(address))
    }

    /// Upgrades a connection made before, and connects.
    #[track_caller]
    pub fn open_on(connection: Connection) -> Self {
        let socket = WebSocket::open_on(connection, &[]).unwrap_or_else(|refused| panic!("not upgraded: {refused:?}"));
        let mut client = Self { socket, next_id: 0, inbox: VecDeque::new(), connected: Value::Null };
        client.connected = client.call("connect", json!({ "name": "e2e" }));
        client
    }

    /// Sends a command and returns its result.
    #[track_caller]
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.try_call(method, parameters).unwrap_or_else(|error| panic!("{method}: {error}"))
    }

    /// Sends a command and returns its result or its error object.
    ///
    /// # Errors
    /// The reply's `error`.
    #[track_caller]
    pub fn try_call(&mut self, method: &str, parameters: Value) -> Result<Value, Value> {
        self.next_id += 1;
        let id = self.next_id;
        self.send(&json!({ "id": id, method: parameters }));
        let deadline = Deadline::start();
        let reply = loop {
            deadline.check("the reply to a command");
            match self.inbox.iter().position(|(value, _)| value["id"].as_u64() == Some(u64::from(id))) {
                Some(index) => break self.inbox.remove(index).expect("just found").0,
                None => self.read_more(),
            }
        };
        match reply.get("error") {
            Some(error) => Err(error.clone()),
            None => {
                Ok(reply.get(method).unwrap_or_else(|| panic!("a reply to {method} without {method}: {reply}")).clone())
            }
        }
    }

    /// Subscribes and returns the result.
    #[track_caller]
    pub fn subscribe(&mut self, channel: &str) -> Value {
        self.call("subscribe", json!({ "channel": channel }))
    }

    /// Subscribes and asks for what was missed since a position.
    #[track_caller]
    pub fn recover(&mut self, channel: &str, epoch: &str, offset: u64) -> Value {
        self.call("subscribe", json!({ "channel": channel, "recover": true, "epoch": epoch, "offset": offset }))
    }

    /// Sends one value as a text message.
    #[track_caller]
    pub fn send(&mut self, value: &Value) {
        self.socket.send(Opcode::Text, value.to_string().as_bytes());
    }

    /// The next publication: its channel and the `pub` object.
    #[track_caller]
    pub fn next_publication(&mut self) -> (String, Value) {
        let (push, _) = self.next_push();
        let channel = push["channel"].as_str().unwrap_or_else(|| panic!("a push without a channel: {push}"));
        let publication = push.get("pub").unwrap_or_else(|| panic!("not a publication: {push}"));
        (channel.to_owned(), publication.clone())
    }

    /// The next push, and the text of the line it came in.
    #[track_caller]
    pub fn next_push(&mut self) -> (Value, String) {
        let deadline = Deadline::start();
        let (value, text) = loop {
            deadline.check("a push");
            match self.inbox.pop_front() {
                Some(unread) => break unread,
                None => self.read_more(),
            }
        };
        (value.get("push").unwrap_or_else(|| panic!("not a push: {value}")).clone(), text)
    }

    /// The `data` of the next `count` publications.
    #[track_caller]
    pub fn next_data(&mut self, count: usize) -> Vec<Value> {
        (0..count).map(|_| self.next_publication().1["data"].clone()).collect()
    }

    /// Reads one message into the inbox; the server's pings are answered at once.
    #[track_caller]
    fn read_more(&mut self) {
        match self.socket.next() {
            Incoming::Text(text) => {
                for line in text.split('\n').filter(|line| !line.is_empty()) {
                    let value: Value =
                        serde_json::from_str(line).unwrap_or_else(|error| panic!("not JSON ({error}): {line}"));
                    if value == json!({}) {
                        self.send(&json!({}));
                    } else {
                        self.inbox.push_back((value, line.to_owned()));
                    }
                }
            }
            Incoming::Ping(payload) => self.socket.send(Opcode::Pong, &payload),
            Incoming::Pong(_) => {}
            ended @ (Incoming::Close(..) | Incoming::End) => panic!("the server ended the connection: {ended:?}"),
        }
    }
}
