//! A small blocking HTTP/1.1 client for the command line: one connection, plain TCP.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::str::FromStr;
use std::time::Duration;

use crate::limits::{CLIENT_CONNECT_MILLIS, CLIENT_RESPONSE_BODY_BYTES};
use crate::wire::http1::{self, BodyDecoder, BodyError, Framing, HeadError, ResponseHead};
use crate::wire::websocket;

/// Where a node is: `http://host[:port][/prefix]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseUrl {
    /// Host as it is resolved: a name, an IPv4 address, or an IPv6 address without brackets.
    pub host: String,
    /// TCP port, 80 when the URL has none.
    pub port: u16,
    /// What every path starts with: empty, or `/…` without a slash at its end.
    pub prefix: String,
}

/// Why a text is not the URL of a node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Another scheme, or none.
    #[error("{0:?} does not start with http://; TLS is not spoken here, so give the address behind the TLS proxy")]
    Scheme(String),
    /// No host.
    #[error("{0:?} has no host; expected http://host[:port][/prefix]")]
    Host(String),
    /// Port not 1 to 65535.
    #[error("{0:?} is not a port: expected 1 to 65535")]
    Port(String),
    /// Query, fragment or user name.
    #[error(
        "{0:?} has a query, a fragment, a user name, a space or a control character; expected http://host[:port][/prefix]"
    )]
    Extra(String),
}

impl FromStr for BaseUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let rest = text.strip_prefix("http://").ok_or_else(|| UrlError::Scheme(text.into()))?;
        if rest.contains(|c: char| matches!(c, '?' | '#' | '@' | ' ') || c.is_control()) {
            return Err(UrlError::Extra(text.into()));
        }
        let (authority, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
        let (host, port) = match authority.strip_prefix('[') {
            Some(v6) => v6.split_once(']').ok_or_else(|| UrlError::Host(text.into()))?,
            None => authority.find(':').map_or((authority, ""), |colon| authority.split_at(colon)),
        };
        if host.is_empty() {
            return Err(UrlError::Host(text.into()));
        }
        let port = match port {
            "" => 80,
            _ => port
                .strip_prefix(':')
                .and_then(|digits| digits.parse().ok())
                .filter(|&port| port != 0)
                .ok_or_else(|| UrlError::Port(port.trim_start_matches(':').into()))?,
        };
        Ok(Self { host: host.into(), port, prefix: path.trim_end_matches('/').into() })
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.authority(), self.prefix)
    }
}

impl BaseUrl {
    /// The value of the `Host` header.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// Connects to the first of the host's addresses that answers.
    ///
    /// # Errors
    /// [`HttpError::Connect`], with the last address's error.
    pub fn connect(&self) -> Result<TcpStream, HttpError> {
        let refused = |error| HttpError::Connect { url: self.to_string(), error };
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in (self.host.as_str(), self.port).to_socket_addrs().map_err(refused)? {
            match TcpStream::connect_timeout(&address, Duration::from_millis(CLIENT_CONNECT_MILLIS)) {
                Ok(stream) => {
                    stream.set_nodelay(true).map_err(refused)?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(refused(last))
    }
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// No connection.
    #[error("cannot connect to {url}: {error}")]
    Connect {
        /// Where to.
        url: String,
        /// Why not.
        error: io::Error,
    },
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// It ended before the answer did.
    #[error("the server closed the connection before its answer was complete")]
    Cut,
    /// What came is not the head of an HTTP/1.1 response.
    #[error("the server's answer is not HTTP/1.1: {0}")]
    Head(#[from] HeadError),
    /// The body is malformed or longer than this client takes.
    #[error("the server's answer cannot be read: {0}")]
    Body(#[from] BodyError),
}

/// One connection and what was read from it but not used yet.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// A whole response.
#[derive(Debug)]
pub struct Response {
    /// Status and headers.
    pub head: ResponseHead,
    /// The body, without its transfer coding.
    pub body: Vec<u8>,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// See [`BaseUrl::connect`].
    pub fn open(url: &BaseUrl) -> Result<Self, HttpError> {
        Ok(Self { stream: url.connect()?, buffer: Vec::new() })
    }

    /// The socket, for what follows the response head of a stream.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Whether the server closed the connection while it was idle.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        let peeked = self.stream.set_nonblocking(true).and_then(|()| self.stream.peek(&mut [0]));
        let stale = !matches!(&peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        self.stream.set_nonblocking(false).is_err() || stale
    }

    /// Sends a request's bytes.
    ///
    /// # Errors
    /// [`HttpError::Io`].
    pub fn send(&mut self, request: &[u8]) -> Result<(), HttpError> {
        Ok(self.stream.write_all(request)?)
    }

    /// Reads the next part of what the server sends; empty at its end.
    ///
    /// # Errors
    /// [`HttpError::Io`].
    pub fn read_part(&mut self) -> Result<Vec<u8>, HttpError> {
        if self.buffer.is_empty() {
            self.fill()?;
        }
        Ok(std::mem::take(&mut self.buffer))
    }

    /// Reads a response head.
    ///
    /// # Errors
    /// [`HttpError::Cut`], [`HttpError::Head`] or [`HttpError::Io`].
    pub fn read_head(&mut self) -> Result<ResponseHead, HttpError> {
        loop {
            match http1::parse_response_head(&self.buffer)? {
                Some((head, used)) => {
                    self.buffer.drain(..used);
                    return Ok(head);
                }
                None if self.fill()? == 0 => return Err(HttpError::Cut),
                None => {}
            }
        }
    }

    /// Reads the body that follows `head`, the head of a response to `method`.
    ///
    /// # Errors
    /// As [`Connection::read_head`], and [`HttpError::Body`].
    pub fn read_body(&mut self, head: &ResponseHead, method: &str) -> Result<Vec<u8>, HttpError> {
        let framing = head.framing(method);
        let mut decoder = BodyDecoder::new(framing, CLIENT_RESPONSE_BODY_BYTES)?;
        let mut body = Vec::new();
        loop {
            let used = decoder.feed(&self.buffer, &mut body)?;
            self.buffer.drain(..used);
            if decoder.is_done() {
                return Ok(body);
            }
            if self.fill()? == 0 {
                return if framing == Framing::UntilClose { Ok(body) } else { Err(HttpError::Cut) };
            }
        }
    }

    /// Sends a request of `method` and reads its whole response.
    ///
    /// # Errors
    /// See [`Connection::send`], [`Connection::read_head`] and [`Connection::read_body`].
    pub fn exchange(&mut self, request: &[u8], method: &str) -> Result<Response, HttpError> {
        self.send(request)?;
        let head = self.read_head()?;
        let body = self.read_body(&head, method)?;
        Ok(Response { head, body })
    }

    fn fill(&mut self) -> Result<usize, HttpError> {
        let mut part = [0; 16 * 1024];
        loop {
            match self.stream.read(&mut part) {
                Ok(count) => {
                    self.buffer.extend_from_slice(&part[..count]);
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Response {
    /// Whether the request was fulfilled.
    #[must_use]
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.head.status)
    }

    /// The server's complaint, for people: its `error` and what it says is allowed, or the start of the body as it is.
    #[must_use]
    pub fn complaint(&self) -> String {
        complaint(self.head.status, &self.body)
    }
}

/// Words the refusal that a response of `status` with `body` is. A node answers errors with `{"error":…,"allowed":…}`.
#[must_use]
pub fn complaint(status: u16, body: &[u8]) -> String {
    let object = serde_json::from_slice::<serde_json::Value>(body).unwrap_or_default();
    let plain = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match (object.get("error"), object.get("allowed")) {
        (Some(error), Some(allowed)) => format!("HTTP {status}: {} (allowed: {})", plain(error), plain(allowed)),
        (Some(error), None) => format!("HTTP {status}: {}", plain(error)),
        _ => {
            let text: String = String::from_utf8_lossy(body).chars().take(SHOWN_CHARACTERS).collect();
            format!("HTTP {status}: {}", text.trim()).trim_end_matches([' ', ':']).into()
        }
    }
}

/// Characters shown of a body that is not a node's error.
const SHOWN_CHARACTERS: usize = 200;

/// The request that opens an event stream.
#[must_use]
pub fn event_stream_request(authority: &str, target: &str, last_event_id: Option<&str>) -> Vec<u8> {
    let mut headers = vec![("Host", authority), ("Accept", "text/event-stream"), ("Cache-Control", "no-cache")];
    headers.extend(last_event_id.map(|id| ("Last-Event-ID", id)));
    let mut request = Vec::new();
    http1::write_request(&mut request, "GET", target, &headers, None);
    request
}

/// The request that opens a WebSocket (RFC 6455, section 4.1); `key` is 16 bytes in base64.
#[must_use]
pub fn upgrade_request(authority: &str, target: &str, key: &str) -> Vec<u8> {
    let headers = [
        ("Host", authority),
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Version", websocket::VERSION),
        ("Sec-WebSocket-Key", key),
    ];
    let mut request = Vec::new();
    http1::write_request(&mut request, "GET", target, &headers, None);
    request
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn urls() {
        let url = |text: &str| text.parse::<BaseUrl>().map(|url| (url.host, url.port, url.prefix));
        assert_eq!(url("http://127.0.0.1:8080").unwrap(), ("127.0.0.1".into(), 8080, String::new()));
        assert_eq!(url("http://node/").unwrap(), ("node".into(), 80, String::new()));
        assert_eq!(url("http://[::1]:81/edge/").unwrap(), ("::1".into(), 81, "/edge".into()));
        for bad in [
            "https://a",
            "a:80",
            "http://",
            "http://:80",
            "http://a:0",
            "http://a:65536",
            "http://a:x",
            "http://[::1",
            "http://[::1]80",
        ] {
            assert!(url(bad).is_err(), "{bad}");
        }
        for extra in ["http://a/?x", "http://u@a", "http://a/#f", "http://a/b c", "http://a\r\nb"] {
            assert!(matches!(url(extra), Err(UrlError::Extra(_))), "{extra}");
        }
        assert_eq!("http://[::1]:81/edge".parse::<BaseUrl>().unwrap().to_string(), "http://[::1]:81/edge");
    }

    #[test]
    fn bodies_of_every_framing_are_read_to_their_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url: BaseUrl = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let answers = [
                "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
                "HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{\"error\":\r\n7\r\n\"later\"\r\n1\r\n}\r\n0\r\n\r\n",
                "HTTP/1.1 200 OK\r\n\r\nuntil the end",
            ];
            for answer in answers {
                // The request has no body and arrives in one piece on loopback.
                assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let mut connection = Connection::open(&url).unwrap();
        let request = event_stream_request("h", "/", None);
        assert_eq!(connection.exchange(&request, "GET").unwrap().body, b"hello");
        assert!(!connection.is_stale());
        let refusal = connection.exchange(&request, "GET").unwrap();
        assert!(!refusal.is_success());
        assert_eq!(refusal.complaint(), "HTTP 503: later");
        assert_eq!(connection.exchange(&request, "GET").unwrap().body, b"until the end");
        server.join().unwrap();
        assert!(connection.is_stale());
        assert!(matches!(connection.exchange(&request, "GET"), Err(HttpError::Cut | HttpError::Io(_))));
    }

    #[test]
    fn complaints_are_readable() {
        assert_eq!(
            complaint(400, br#"{"error":"no such key","allowed":["a","b"]}"#),
            r#"HTTP 400: no such key (allowed: ["a","b"])"#
        );
        assert_eq!(complaint(502, b"<h1>Bad Gateway</h1>\n"), "HTTP 502: <h1>Bad Gateway</h1>");
        assert_eq!(complaint(404, b""), "HTTP 404");
    }
}
