//! One client of a swarm, without its socket: bytes in, verdicts and commands out.

use std::time::Duration;

use serde_json::{Value, json};

use super::super::http::{Response, parse_head};
use super::super::websocket::{Opcode, push_frame, take_frame, upgrade_request};
use super::super::{Item, Parser, request, target};
use super::sequence::Sequence;

/// What a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaks {
    /// Server-sent events.
    Sse,
    /// The Centrifugo client protocol over WebSocket.
    WebSocket,
}

/// Where a connection is.
enum Reader {
    /// The response head is being read.
    Head(Vec<u8>),
    /// An event stream.
    Events(Box<Parser>),
    /// A WebSocket.
    Frames(Vec<u8>),
}

/// Why a client gives its connection up.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// The node answered with another status than the one that opens a stream.
    Status(u16),
    /// The node sent a close frame.
    Closed(u16),
}

/// A client of one channel that survives its connections: what it has and where it goes on.
pub struct Client {
    speaks: Speaks,
    channel: String,
    reader: Reader,
    /// Of the last complete event.
    last_id: String,
    /// Of the last publication over WebSocket.
    position: Option<(String, u64)>,
    /// The delay before the next connection that this one was told at its end.
    advice: Option<Duration>,
    /// Whether this connection is subscribed and knows its position.
    live: bool,
    /// The verdicts.
    pub sequence: Sequence,
}

impl Client {
    /// A client that was never connected.
    pub fn new(speaks: Speaks, channel: String) -> Self {
        let reader = Reader::Head(Vec::new());
        Self {
            speaks,
            channel,
            reader,
            last_id: String::new(),
            position: None,
            advice: None,
            live: false,
            sequence: Sequence::default(),
        }
    }

    /// Whether this connection is subscribed and knows its position.
    pub fn is_live(&self) -> bool {
        self.live
    }

    /// How long the node asked it to stay away, after it was live.
    pub fn advice(&self) -> Option<Duration> {
        self.advice
    }

    /// A new connection: what was received in part over the last one is forgotten. Returns the request.
    pub fn connect(&mut self) -> Vec<u8> {
        self.reader = Reader::Head(Vec::new());
        self.advice = None;
        self.live = false;
        match self.speaks {
            Speaks::Sse => {
                let headers = [("Last-Event-ID", self.last_id.as_str())];
                let headers = if self.last_id.is_empty() { &headers[..0] } else { &headers };
                request("GET", &target(&[&self.channel]), headers, b"")
            }
            Speaks::WebSocket => upgrade_request(&[]),
        }
    }

    /// The connection is over.
    pub fn disconnected(&mut self) {
        self.live = false;
    }

    /// Takes what was read; what is to be sent goes to `out`.
    pub fn receive(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), Refused> {
        match &mut self.reader {
            Reader::Head(head) => {
                head.extend_from_slice(bytes);
                let Some((Response { status, .. }, rest)) = parse_head(head) else { return Ok(()) };
                match (self.speaks, status) {
                    (Speaks::Sse, 200) => self.reader = Reader::Events(Box::default()),
                    (Speaks::WebSocket, 101) => {
                        self.reader = Reader::Frames(Vec::new());
                        send(out, &[json!({ "id": 1, "connect": {} }), self.subscribe_command()]);
                    }
                    _ => return Err(Refused::Status(status)),
                }
                self.receive(&rest, out)
            }
            Reader::Events(parser) => {
                parser.feed(bytes);
                self.take_items();
                Ok(())
            }
            Reader::Frames(buffer) => {
                buffer.extend_from_slice(bytes);
                self.take_frames(out)
            }
        }
    }

    fn take_items(&mut self) {
        let Reader::Events(parser) = &mut self.reader else { return };
        while let Some(item) = parser.next() {
            match item {
                Item::Position(id) => {
                    self.last_id = id;
                    self.live = true;
                }
                Item::Event(event) => {
                    match event.name.as_str() {
                        "message" => self.sequence.take(number(&event.data)),
                        "gap" => self.sequence.gap(),
                        other => panic!("an event named {other:?} on a stream of one channel"),
                    }
                    if !event.id.is_empty() {
                        self.last_id = event.id;
                    }
                }
                // The one at the start is for connections that break; the one at the end is this client's own.
                Item::Retry(millis) => self.advice = self.live.then(|| Duration::from_millis(millis)),
                Item::Comment(_) => {}
            }
        }
    }

    fn subscribe_command(&self) -> Value {
        let mut subscribe = json!({ "channel": self.channel });
        if let Some((epoch, offset)) = &self.position {
            subscribe["recover"] = json!(true);
            subscribe["epoch"] = json!(epoch);
            subscribe["offset"] = json!(offset);
        }
        json!({ "id": 2, "subscribe": subscribe })
    }

    fn take_frames(&mut self, out: &mut Vec<u8>) -> Result<(), Refused> {
        loop {
            let Reader::Frames(buffer) = &mut self.reader else { return Ok(()) };
            let Some((fin, opcode, payload)) = take_frame(buffer) else { return Ok(()) };
            match opcode {
                1 => {
                    assert!(fin, "this server does not fragment");
                    let text = String::from_utf8(payload).expect("a text message is UTF-8");
                    text.split('\n').filter(|line| !line.is_empty()).for_each(|line| self.take_line(line, out));
                }
                8 => return Err(Refused::Closed(payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code)))),
                9 => push_frame(out, true, Opcode::Pong, Some([1, 2, 3, 4]), &payload),
                other => panic!("opcode {other} from the server"),
            }
        }
    }

    fn take_line(&mut self, line: &str, out: &mut Vec<u8>) {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("not JSON ({error}): {line}"));
        if value == json!({}) {
            return send(out, &[value]);
        }
        assert!(value.get("error").is_none(), "{value}");
        if let Some(result) = value.get("subscribe") {
            if self.position.is_some() && result["recovered"] != json!(true) {
                self.sequence.gap();
            }
            let publications = result["publications"].as_array().map_or(&[][..], Vec::as_slice);
            publications.iter().for_each(|publication| self.sequence.take(number_of(publication)));
            let epoch = result["epoch"].as_str().expect("a position").to_owned();
            self.position = Some((epoch, result["offset"].as_u64().unwrap_or(0)));
            self.live = true;
        } else if let Some(publication) = value["push"].get("pub") {
            self.sequence.take(number_of(publication));
            let (_, offset) = self.position.as_mut().expect("subscribed");
            *offset = publication["offset"].as_u64().expect("an offset");
        } else if value["push"].get("unsubscribe").is_some() {
            // The client libraries subscribe again; the answer then says whether anything is missing.
            send(out, &[self.subscribe_command()]);
        }
    }
}

fn send(out: &mut Vec<u8>, commands: &[Value]) {
    let lines: Vec<String> = commands.iter().map(Value::to_string).collect();
    push_frame(out, true, Opcode::Text, Some([0x5a, 0xc3, 0x0f, 0x96]), lines.join("\n").as_bytes());
}

fn number_of(publication: &Value) -> u64 {
    match &publication["data"] {
        Value::String(text) => number(text),
        data => data.as_u64().unwrap_or_else(|| panic!("not a number: {publication}")),
    }
}

/// The number in a payload's first line; the rest of it is ballast.
fn number(data: &str) -> u64 {
    let line = data.lines().next().unwrap_or_default();
    line.parse().unwrap_or_else(|_| panic!("a payload that begins with a number: {data:?}"))
}

#[cfg(test)]
mod tests {
    use super::super::sequence::Verdicts;
    use super::*;

    #[test]
    fn an_incomplete_event_is_not_received_and_not_remembered() {
        let mut client = Client::new(Speaks::Sse, "a b".into());
        let out = &mut Vec::new();
        assert!(client.connect().starts_with(b"GET /sse?channel=a%20b HTTP/1.1\r\n"));
        client.receive(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nretry: 1\n\nid: p", out).unwrap();
        assert!(!client.is_live());
        client.receive(b"0\n\ndata: 1\ndata: ballast\nid: p1\n\ndata: 2\nid: p2\n", out).unwrap();
        assert!(client.is_live());
        let request = String::from_utf8(client.connect()).unwrap();
        assert!(request.contains("\r\nLast-Event-ID: p1\r\n"), "{request}");
        client
            .receive(b"HTTP/1.1 200 OK\r\n\r\nid: p1\n\ndata: 2\nid: p2\n\nevent: gap\ndata: {}\nid: q0\n\n", out)
            .unwrap();
        assert_eq!(client.sequence.verdicts(), Verdicts { received: 2, gaps: 1, ..Verdicts::default() });
        client.connect();
        assert_eq!(client.receive(b"HTTP/1.1 503 No\r\n\r\n", out), Err(Refused::Status(503)));
        assert!(out.is_empty());
    }
}
