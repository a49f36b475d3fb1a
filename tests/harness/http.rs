//! A small HTTP/1.1 client that keeps its connection.

use std::net::SocketAddr;

use super::Connection;

/// A response, read whole.
#[derive(Debug)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Names in lower case, in order.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Response {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("a text body is UTF-8")
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("not JSON ({error}): {self:?}"))
    }

    /// Reads the body that the head announced.
    #[track_caller]
    pub fn read_body(&mut self, connection: &mut Connection) {
        assert!(self.header("transfer-encoding").is_none(), "this client reads no codings: {self:?}");
        self.body = match self.header("content-length") {
            Some(length) => {
                let length: usize = length.parse().expect("Content-Length is a number");
                connection
                    .read_until(|buffer| (buffer.len() >= length).then(|| buffer.drain(..length).collect()))
                    .expect("the body is as long as its head says")
            }
            None => connection.read_to_end(),
        };
    }

    /// Fails unless the status is as said.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "body: {}", String::from_utf8_lossy(&self.body));
        self
    }
}

/// A kept-alive connection.
pub struct Http {
    /// The connection, for tests that write bytes of their own.
    pub connection: Connection,
}

impl Http {
    /// Connects.
    pub fn open(address: SocketAddr) -> Self {
        Self { connection: Connection::open(address) }
    }

    /// Sends one request and reads its response.
    #[track_caller]
    pub fn send(&mut self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        self.connection.write(&request(method, target, headers, body));
        self.read(method == "HEAD")
    }

    /// Reads one response; a response to HEAD has no body whatever its head says.
    #[track_caller]
    pub fn read(&mut self, without_body: bool) -> Response {
        self.try_read(without_body).expect("the node ended the connection instead of answering")
    }

    /// Reads one response, or none when the node ends the connection first.
    #[track_caller]
    pub fn try_read(&mut self, without_body: bool) -> Option<Response> {
        let mut response = read_head(&mut self.connection)?;
        if !without_body && response.status != 204 && response.status / 100 != 1 && response.status != 304 {
            response.read_body(&mut self.connection);
        }
        Some(response)
    }
}

/// Reads a response head. None means that the connection ended first.
#[track_caller]
pub fn read_head(connection: &mut Connection) -> Option<Response> {
    connection.read_until(|buffer| {
        let (response, rest) = parse_head(buffer)?;
        *buffer = rest;
        Some(response)
    })
}

/// Parses a response head, once it is whole; also returns what follows it.
#[track_caller]
pub fn parse_head(bytes: &[u8]) -> Option<(Response, Vec<u8>)> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).expect("a response head is text");
    let mut lines = head.split("\r\n");
    let status_line = lines.next().expect("split gives at least one line");
    let status =
        status_line.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|code| code.parse().ok());
    let status = status.unwrap_or_else(|| panic!("not a status line: {status_line:?}"));
    let headers = lines
        .map(|line| {
            let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("not a header: {line:?}"));
            (name.to_ascii_lowercase(), value.trim().to_owned())
        })
        .collect();
    Some((Response { status, headers, body: Vec::new() }, bytes[end + 4..].to_vec()))
}

/// Writes a request; a body gets its Content-Length.
pub fn request(method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut text = format!("{method} {target} HTTP/1.1\r\nHost: node\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    if !body.is_empty() || matches!(method, "POST" | "PUT") {
        text += &format!("Content-Length: {}\r\n", body.len());
    }
    text += "\r\n";
    let mut bytes = text.into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// Percent-encodes everything but unreserved characters (RFC 3986, section 2.3).
pub fn percent_encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}
