//! A client for server-sent events, written from the standard (WHATWG HTML, section 9.2) and sharing nothing with the
//! product's codec, so that a mistake there cannot hide here.

use std::collections::VecDeque;
use std::net::SocketAddr;

use super::http::{Response, read_head};
use super::{Connection, Deadline, percent_encode, request};

/// What a stream said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// An event.
    Event(Event),
    /// A block that only moved the last event id.
    Position(String),
    /// A comment, without its colon and first space.
    Comment(String),
    /// The reconnect delay in milliseconds.
    Retry(u64),
}

/// An event as `EventSource` would dispatch it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The value of `event`, or `message`.
    pub name: String,
    /// The data lines, joined by LF.
    pub data: String,
    /// The last event id when it was dispatched.
    pub id: String,
    /// The names of the block's fields in the order they came.
    pub fields: Vec<String>,
}

impl Event {
    /// Fails unless the event's id, if it has one, comes after its data: a client that reads field by field and is cut between
    /// the two must have the event again, not lose it.
    #[track_caller]
    fn check_order(&self) {
        let id = self.fields.iter().position(|field| field == "id");
        let data = self.fields.iter().rposition(|field| field == "data");
        assert!(id.is_none() || id > data, "the id comes before the data: {self:?}");
    }
}

/// Cuts a byte stream into items.
#[derive(Default)]
pub struct Parser {
    rest: Vec<u8>,
    after_cr: bool,
    fields: Vec<String>,
    name: String,
    data: String,
    last_id: String,
    new_id: bool,
    items: VecDeque<Item>,
}

impl Parser {
    /// Takes the next bytes of the stream.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if std::mem::take(&mut self.after_cr) && bytes[0] == b'\n' {
                bytes = &bytes[1..];
                continue;
            }
            let Some(end) = bytes.iter().position(|byte| matches!(byte, b'\r' | b'\n')) else {
                return self.rest.extend_from_slice(bytes);
            };
            self.rest.extend_from_slice(&bytes[..end]);
            self.after_cr = bytes[end] == b'\r';
            bytes = &bytes[end + 1..];
            let line = String::from_utf8(std::mem::take(&mut self.rest)).expect("an event stream is UTF-8");
            self.line(&line);
        }
    }

    /// The next whole item.
    pub fn next(&mut self) -> Option<Item> {
        self.items.pop_front()
    }

    /// Bytes of a line that is not complete.
    pub fn unfinished(&self) -> &[u8] {
        &self.rest
    }

    fn line(&mut self, line: &str) {
        if line.is_empty() {
            return self.dispatch();
        }
        if let Some(comment) = line.strip_prefix(':') {
            return self.items.push_back(Item::Comment(comment.strip_prefix(' ').unwrap_or(comment).to_owned()));
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        self.fields.push(field.to_owned());
        match field {
            "event" => value.clone_into(&mut self.name),
            "data" => {
                self.data += value;
                self.data.push('\n');
            }
            "id" if !value.contains('\0') => {
                value.clone_into(&mut self.last_id);
                self.new_id = true;
            }
            "retry" if value.bytes().all(|byte| byte.is_ascii_digit()) => {
                self.items.push_back(Item::Retry(value.parse().expect("digits that fit")));
            }
            other => panic!("a field that the standard does not know: {other:?} in {line:?}"),
        }
    }

    fn dispatch(&mut self) {
        let fields = std::mem::take(&mut self.fields);
        let name = std::mem::take(&mut self.name);
        let mut data = std::mem::take(&mut self.data);
        let new_id = std::mem::take(&mut self.new_id);
        if data.is_empty() {
            if new_id {
                self.items.push_back(Item::Position(self.last_id.clone()));
            }
            return;
        }
        data.pop();
        let name = if name.is_empty() { "message".to_owned() } else { name };
        self.items.push_back(Item::Event(Event { name, data, id: self.last_id.clone(), fields }));
    }
}

/// An open event stream.
pub struct Sse {
    connection: Connection,
    parser: Parser,
    /// The last event id seen: what `EventSource` would send to resume.
    pub last_id: String,
}

impl Sse {
    /// Opens a stream of `channels`; `last_id` resumes.
    #[track_caller]
    pub fn open(address: SocketAddr, channels: &[&str], last_id: Option<&str>) -> Self {
        Self::open_on(Connection::open(address), channels, last_id)
    }

    /// Opens a stream on a connection made before.
    #[track_caller]
    pub fn open_on(connection: Connection, channels: &[&str], last_id: Option<&str>) -> Self {
        let headers: Vec<(&str, &str)> = last_id.map(|id| ("Last-Event-ID", id)).into_iter().collect();
        Self::open_target(connection, &target(channels), &headers)
            .unwrap_or_else(|refused| panic!("not opened: {refused:?}"))
    }

    /// Asks for a stream by its whole request target.
    ///
    /// # Errors
    /// Gives the response when it is not an event stream.
    #[track_caller]
    pub fn open_target(mut connection: Connection, target: &str, headers: &[(&str, &str)]) -> Result<Self, Response> {
        connection.write(&request("GET", target, headers, b""));
        let mut response = read_head(&mut connection).expect("the node ended the connection instead of answering");
        if response.status != 200 {
            response.read_body(&mut connection);
            return Err(response);
        }
        assert_eq!(response.header("content-type"), Some("text/event-stream; charset=utf-8"));
        assert_eq!(response.header("transfer-encoding"), None, "the body is not coded: it ends with the connection");
        Ok(Self { connection, parser: Parser::default(), last_id: String::new() })
    }

    /// The next item, or none at the end of the stream.
    #[track_caller]
    pub fn next_item(&mut self) -> Option<Item> {
        loop {
            let available = self.connection.buffered().len();
            let bytes = self.connection.take(available);
            self.parser.feed(&bytes);
            if let Some(item) = self.parser.next() {
                match &item {
                    Item::Event(event) => {
                        event.check_order();
                        self.last_id.clone_from(&event.id);
                    }
                    Item::Position(id) => self.last_id.clone_from(id),
                    Item::Comment(_) | Item::Retry(_) => {}
                }
                return Some(item);
            }
            if !self.connection.fill() {
                return None;
            }
        }
    }

    /// The next event, skipping comments, retry advice and announcements of the stream's own position.
    #[track_caller]
    pub fn next(&mut self) -> Event {
        let deadline = Deadline::start();
        loop {
            match self.next_item() {
                Some(Item::Event(event)) if event.name != "open" => return event,
                Some(_) => deadline.check("an event; only comments and the like came"),
                None => panic!("the stream ended; last event id {:?}", self.last_id),
            }
        }
    }

    /// The data of the next `count` events.
    #[track_caller]
    pub fn next_data(&mut self, count: usize) -> Vec<String> {
        (0..count).map(|_| self.next().data).collect()
    }

    /// Reads on until the stream has said its position, so that `last_id` can be resumed from.
    #[track_caller]
    pub fn wait_for_position(&mut self) {
        let deadline = Deadline::start();
        while self.last_id.is_empty() {
            deadline.check("the stream's position");
            self.next_item().expect("a stream says its position right after connect");
        }
    }

    /// Everything to the end of the stream, and the bytes after the last complete line.
    #[track_caller]
    pub fn read_to_end(mut self) -> (Vec<Item>, Vec<u8>) {
        let mut items = Vec::new();
        let deadline = Deadline::start();
        while let Some(item) = self.next_item() {
            deadline.check("the end of the stream");
            items.push(item);
        }
        (items, self.parser.unfinished().to_vec())
    }

    /// Whether the stream is still open, without waiting for anything.
    pub fn is_open(&mut self) -> bool {
        self.connection.fill_without_waiting()
    }

    /// Ends the stream with a reset.
    pub fn reset(self) {
        self.connection.reset();
    }
}

/// The request target of a stream.
pub fn target(channels: &[&str]) -> String {
    let query: Vec<String> = channels.iter().map(|channel| format!("channel={}", percent_encode(channel))).collect();
    format!("/sse?{}", query.join("&"))
}

/// The client is a judge of the product, so it is judged itself.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parser_follows_the_standard() {
        let text = ": hi\nretry: 5\n\nid: 1\n\ndata: a\r\ndata:  b\rdata\nid: 2\nevent: x\n\ndata\n\ndata: cut";
        let event = |name: &str, data: &str, fields: &[&str]| {
            let fields = fields.iter().map(|&field| field.to_owned()).collect();
            Item::Event(Event { name: name.into(), data: data.into(), id: "2".into(), fields })
        };
        let expected = [
            Item::Comment("hi".into()),
            Item::Retry(5),
            Item::Position("1".into()),
            event("x", "a\n b\n", &["data", "data", "data", "id", "event"]),
            event("message", "", &["data"]),
        ];
        for step in [1, 2, 3, text.len()] {
            let mut parser = Parser::default();
            text.as_bytes().chunks(step).for_each(|chunk| parser.feed(chunk));
            let items: Vec<Item> = std::iter::from_fn(|| parser.next()).collect();
            assert_eq!(items, expected, "fed {step} bytes at a time");
            assert_eq!(parser.unfinished(), b"data: cut");
        }
    }
}
