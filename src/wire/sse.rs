//! Server-sent events (WHATWG HTML, section 9.2): the lines a server writes, and the parser of our own clients.

use std::borrow::Cow;

use memchr::memchr2;

/// Appends an `event:` line. `name` has no line break (channel names and our own names never do).
pub fn write_event_name(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    out.push(b'\n');
}

/// Appends one `data:` line for each line of `data`. A line ends at CR, LF or CRLF, as it does for the client, so the
/// client gets `data` back with its line ends turned into LF, the last one included. The empty text is one empty line.
pub fn write_data(out: &mut Vec<u8>, data: &str) {
    write_lines(out, b"data: ", data);
}

/// Appends comment lines, which clients ignore: heartbeats, and reasons for people who watch with curl. It needs no
/// blank line after it.
pub fn write_comment(out: &mut Vec<u8>, text: &str) {
    write_lines(out, b": ", text);
}

/// Appends a `retry:` line: how many milliseconds the client waits before it connects again.
pub fn write_retry(out: &mut Vec<u8>, millis: u64) {
    out.extend_from_slice(b"retry: ");
    out.extend_from_slice(itoa::Buffer::new().format(millis).as_bytes());
    out.push(b'\n');
}

/// Appends an `id:` line whose value `write` appends.
pub fn write_id(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    out.extend_from_slice(b"id: ");
    write(out);
    out.push(b'\n');
}

/// Ends the event: the blank line that makes the client dispatch it.
pub fn end_event(out: &mut Vec<u8>) {
    out.push(b'\n');
}

fn write_lines(out: &mut Vec<u8>, prefix: &[u8], text: &str) {
    let mut rest = text.as_bytes();
    loop {
        out.extend_from_slice(prefix);
        let Some(end) = memchr2(b'\r', b'\n', rest) else {
            out.extend_from_slice(rest);
            out.push(b'\n');
            return;
        };
        out.extend_from_slice(&rest[..end]);
        out.push(b'\n');
        let crlf = rest[end] == b'\r' && rest.get(end + 1) == Some(&b'\n');
        rest = &rest[end + 1 + usize::from(crlf)..];
    }
}

/// What an event stream says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item<'a> {
    /// A dispatched event.
    Event {
        /// Its type; `message` when the stream named none.
        name: &'a str,
        /// Its data, lines joined by LF.
        data: &'a str,
        /// The last event id as of this event: what to send as `Last-Event-ID` once it is handled.
        id: &'a str,
    },
    /// A comment line, without its colon and one leading space.
    Comment(&'a str),
    /// The reconnect delay the server asks for, in milliseconds.
    Retry(u64),
}

/// One line or one event's data is larger than the client takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event of the stream is larger than {0} bytes")]
pub struct TooLarge(pub usize);

/// Incremental parser of an event stream (WHATWG HTML, section 9.2.6). Holds the unfinished line and event.
#[derive(Debug)]
pub struct EventParser {
    most: usize,
    line: Vec<u8>,
    data: Vec<u8>,
    name: String,
    /// The id of the event being read. It survives the event: later events without an id carry it too.
    id_buffer: String,
    /// The id as of the last blank line.
    last_event_id: String,
    /// The last byte was a CR: an LF that follows belongs to it.
    after_cr: bool,
    /// No line was read yet: it may start with a byte order mark.
    at_start: bool,
}

impl EventParser {
    /// A parser for a new stream. `most` bounds the bytes of one line and of one event's data.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self {
            most,
            line: Vec::new(),
            data: Vec::new(),
            name: String::new(),
            id_buffer: String::new(),
            last_event_id: String::new(),
            after_cr: false,
            at_start: true,
        }
    }

    /// The last event id: what to send as `Last-Event-ID` when connecting again. Blocks with an id and no data move it
    /// too; an event that was cut off does not.
    #[must_use]
    pub fn last_event_id(&self) -> &str {
        &self.last_event_id
    }

    /// Starts a new stream after a reconnect: the unfinished event is discarded, the last event id stays.
    pub fn restart(&mut self) {
        self.line.clear();
        self.data.clear();
        self.name.clear();
        self.id_buffer.clone_from(&self.last_event_id);
        self.after_cr = false;
        self.at_start = true;
    }

    /// Takes the next bytes of the stream and hands over what they complete.
    ///
    /// # Errors
    /// When a line or an event is larger than the parser takes; the stream cannot go on.
    pub fn feed(&mut self, mut input: &[u8], mut on: impl FnMut(Item<'_>)) -> Result<(), TooLarge> {
        while !input.is_empty() {
            if std::mem::take(&mut self.after_cr) && input[0] == b'\n' {
                input = &input[1..];
                continue;
            }
            let end = memchr2(b'\r', b'\n', input);
            let part = &input[..end.unwrap_or(input.len())];
            if self.line.len() + part.len() > self.most {
                return Err(TooLarge(self.most));
            }
            let Some(end) = end else {
                self.line.extend_from_slice(part);
                return Ok(());
            };
            self.after_cr = input[end] == b'\r';
            input = &input[end + 1..];
            if self.line.is_empty() {
                self.take_line(part, &mut on)?;
            } else {
                let mut line = std::mem::take(&mut self.line);
                line.extend_from_slice(part);
                self.take_line(&line, &mut on)?;
                line.clear();
                self.line = line;
            }
        }
        Ok(())
    }

    fn take_line(&mut self, mut line: &[u8], on: &mut impl FnMut(Item<'_>)) -> Result<(), TooLarge> {
        if std::mem::take(&mut self.at_start) {
            line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
        }
        if line.is_empty() {
            self.dispatch(on);
            return Ok(());
        }
        let (field, value) = match memchr::memchr(b':', line) {
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (line, &b""[..]),
        };
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match field {
            b"" => on(Item::Comment(&String::from_utf8_lossy(value))),
            b"data" => {
                if self.data.len() + value.len() + 1 > self.most {
                    return Err(TooLarge(self.most));
                }
                self.data.extend_from_slice(value);
                self.data.push(b'\n');
            }
            b"event" => replace(&mut self.name, value),
            b"id" if !value.contains(&0) => replace(&mut self.id_buffer, value),
            b"retry" if !value.is_empty() && value.iter().all(u8::is_ascii_digit) => {
                if let Some(millis) = std::str::from_utf8(value).ok().and_then(|digits| digits.parse().ok()) {
                    on(Item::Retry(millis));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn dispatch(&mut self, on: &mut impl FnMut(Item<'_>)) {
        self.last_event_id.clone_from(&self.id_buffer);
        if self.data.pop().is_some() {
            let name = if self.name.is_empty() { "message" } else { &self.name };
            let data: Cow<'_, str> = String::from_utf8_lossy(&self.data);
            on(Item::Event { name, data: &data, id: &self.last_event_id });
        }
        self.data.clear();
        self.name.clear();
    }
}

fn replace(text: &mut String, value: &[u8]) {
    text.clear();
    text.push_str(&String::from_utf8_lossy(value));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a stream says, one line an item, fed in pieces of `step` bytes.
    fn items(stream: &[u8], step: usize) -> Vec<String> {
        let mut parser = EventParser::new(1024);
        let mut seen = Vec::new();
        for piece in stream.chunks(step) {
            parser.feed(piece, |item| seen.push(format!("{item:?}"))).unwrap();
        }
        seen.push(format!("last {:?}", parser.last_event_id()));
        seen
    }

    fn event(name: &str, data: &str, id: &str) -> String {
        format!("{:?}", Item::Event { name, data, id })
    }

    #[test]
    fn a_payload_survives_with_its_line_ends_as_lf() {
        for payload in
            ["", "one", "a\nb", "a\r\nb\rc\n", "\n", "\r\n", "\n\n", "  two spaces", ": colon", "ü\r", "data: x"]
        {
            let mut stream = Vec::new();
            write_event_name(&mut stream, "room");
            write_data(&mut stream, payload);
            write_id(&mut stream, |out| out.extend_from_slice(b"7"));
            end_event(&mut stream);
            let expected = payload.replace("\r\n", "\n").replace('\r', "\n");
            for step in [1, 2, 3, stream.len()] {
                assert_eq!(items(&stream, step), [event("room", &expected, "7"), "last \"7\"".into()], "{payload:?}");
            }
        }
    }

    #[test]
    fn every_line_end_and_a_byte_order_mark_are_understood_at_any_cut() {
        let stream = b"\xef\xbb\xbfdata: 1\r\n\r\ndata: 2\r\rdata: 3\n\ndata:4\r\ndata\r\n\r\n";
        for step in 1..=stream.len() {
            assert_eq!(
                items(stream, step),
                [
                    event("message", "1", ""),
                    event("message", "2", ""),
                    event("message", "3", ""),
                    event("message", "4\n", ""),
                    "last \"\"".into()
                ]
            );
        }
    }

    #[test]
    fn ids_outlive_their_event_and_need_no_data() {
        // An id alone moves the last event id; a NUL makes the line void; an empty id resets it; a cut event counts nothing.
        let stream =
            b"id: 1\n\ndata: a\n\nid: 2\0\ndata: b\n\nid\ndata: c\n\nid: 3\nevent: e\n\ndata: d\n\nid: 4\ndata: cut";
        assert_eq!(
            items(stream, 5),
            [
                event("message", "a", "1"),
                event("message", "b", "1"),
                event("message", "c", ""),
                event("message", "d", "3"),
                "last \"3\"".into()
            ]
        );
    }

    #[test]
    fn comments_and_retry_are_told_and_unknown_fields_are_not() {
        let mut stream = Vec::new();
        write_comment(&mut stream, "slow\nreader");
        write_retry(&mut stream, 2500);
        stream.extend_from_slice(b"retry: 5s\nretry:\nother: x\n:\n\n");
        let expected = [Item::Comment("slow"), Item::Comment("reader"), Item::Retry(2500), Item::Comment("")];
        let mut expected: Vec<_> = expected.iter().map(|item| format!("{item:?}")).collect();
        expected.push("last \"\"".into());
        assert_eq!(items(&stream, 4), expected);
    }

    #[test]
    fn a_restart_drops_the_cut_event_and_keeps_the_id() {
        let mut parser = EventParser::new(64);
        parser.feed(b"id: 5\ndata: a\n\nid: 6\ndata: cut", |_| ()).unwrap();
        parser.restart();
        let mut seen = Vec::new();
        parser.feed(b"data: b\n\n", |item| seen.push(format!("{item:?}"))).unwrap();
        assert_eq!(seen, [event("message", "b", "5")]);
    }

    #[test]
    fn what_is_too_large_is_refused() {
        let mut parser = EventParser::new(8);
        assert_eq!(parser.feed(b"data: abc", |_| ()), Err(TooLarge(8)));
        let mut parser = EventParser::new(8);
        assert_eq!(parser.feed(b"data:abc\ndata:abc\ndata:\n", |_| ()), Err(TooLarge(8)));
    }
}
