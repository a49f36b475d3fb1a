//! Request heads: parsed for the server, written for our own clients.

use super::body::Framing;
use super::{HeadError, Headers, Span, TargetError, pairs, percent_decode, target};
use crate::limits::{REQUEST_HEAD_BYTES, REQUEST_HEADERS};

/// The head of a request.
#[derive(Debug, Clone)]
pub struct Head {
    headers: Headers,
    method: Span,
    query: Span,
    path: Box<str>,
    minor_version: u8,
    framing: Framing,
    keep_alive: bool,
    expects_continue: bool,
}

impl Head {
    /// The method as sent; methods compare with case (RFC 9110, section 9.1).
    #[must_use]
    pub fn method(&self) -> &str {
        self.method.text(&self.headers.text)
    }

    /// The path, percent-decoded.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The query's pairs, decoded; see [`pairs`].
    pub fn query(
        &self,
    ) -> impl Iterator<Item = Result<(std::borrow::Cow<'_, str>, std::borrow::Cow<'_, str>), TargetError>> {
        pairs(self.query.text(&self.headers.text))
    }

    /// The minor version of HTTP/1.
    #[must_use]
    pub fn minor_version(&self) -> u8 {
        self.minor_version
    }

    /// The headers.
    #[must_use]
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// The first header of this name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)
    }

    /// How the body's end is found; a request without a body has [`Framing::Length`] 0.
    #[must_use]
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// Whether the client would use the connection again (RFC 9112, section 9.3).
    #[must_use]
    pub fn keep_alive(&self) -> bool {
        self.keep_alive
    }

    /// Whether the client waits for `100 Continue` before it sends the body (RFC 9110, section 10.1.1).
    #[must_use]
    pub fn expects_continue(&self) -> bool {
        self.expects_continue
    }

    fn new(text: &str, request: &httparse::Request<'_, '_>) -> Result<Self, HeadError> {
        // The parser sets all three before it says that a head is complete.
        let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version) else {
            return Err(HeadError::Malformed("incomplete first line"));
        };
        let headers = Headers::new(text, request.headers);
        // RFC 9112, section 3.2: exactly one Host in HTTP/1.1.
        match headers.all("host").count() {
            1 => {}
            0 if minor == 0 => {}
            0 => return Err(HeadError::Malformed("HTTP/1.1 needs a Host header")),
            _ => return Err(HeadError::Malformed("more than one Host header")),
        }
        let (path, query) = target::split(target)?;
        Ok(Self {
            method: Span::of(text, method.as_bytes()),
            query: Span::of(text, query.as_bytes()),
            path: percent_decode(path, false)?.into(),
            minor_version: minor,
            framing: headers.framing(minor)?.unwrap_or(Framing::Length(0)),
            keep_alive: headers.keep_alive(minor),
            expects_continue: minor >= 1 && headers.has_token("expect", "100-continue"),
            headers,
        })
    }
}

/// Reads a request head: none while it is incomplete, else the head and how many bytes it took.
///
/// # Errors
/// See [`HeadError`]; what follows on the connection cannot be understood then.
pub fn parse_head(input: &[u8]) -> Result<Option<(Head, usize)>, HeadError> {
    let bounded = &input[..input.len().min(REQUEST_HEAD_BYTES)];
    let mut fields = [httparse::EMPTY_HEADER; REQUEST_HEADERS];
    let mut request = httparse::Request::new(&mut fields);
    let httparse::Status::Complete(length) = request.parse(bounded)? else {
        return if bounded.len() == REQUEST_HEAD_BYTES { Err(HeadError::TooLarge) } else { Ok(None) };
    };
    if let Ok(text) = std::str::from_utf8(&bounded[..length]) {
        return Ok(Some((Head::new(text, &request)?, length)));
    }
    let text = String::from_utf8_lossy(&bounded[..length]);
    let mut fields = [httparse::EMPTY_HEADER; REQUEST_HEADERS];
    let mut request = httparse::Request::new(&mut fields);
    request.parse(text.as_bytes())?;
    Ok(Some((Head::new(&text, &request)?, length)))
}

/// Appends a request head. `target` is encoded already; `headers` has the Host; `body` is its length, for methods
/// that carry one.
pub fn write_request(out: &mut Vec<u8>, method: &str, target: &str, headers: &[(&str, &str)], body: Option<usize>) {
    for part in [method, " ", target, " HTTP/1.1\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
    for (name, value) in headers {
        super::response::write_header(out, name, value);
    }
    if let Some(length) = body {
        super::response::write_header(out, "Content-Length", itoa::Buffer::new().format(length));
    }
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn head(text: &str) -> Result<Head, HeadError> {
        let parsed = parse_head(text.as_bytes())?;
        let (head, length) = parsed.unwrap_or_else(|| panic!("incomplete: {text:?}"));
        assert_eq!(length, text.len());
        Ok(head)
    }

    /// A request with these header lines after its Host.
    fn with(headers: &str) -> Result<Head, HeadError> {
        head(&format!("POST / HTTP/1.1\r\nHost: h\r\n{headers}\r\n"))
    }

    #[test]
    fn a_head_is_incomplete_until_its_last_byte() {
        let text = b"GET /publish/r%C3%A4ume?channel=a+b&x=%26 HTTP/1.1\r\nHost: h\r\nAccept:  text/html \r\n\r\nBODY";
        for length in 0..text.len() - 4 {
            assert!(parse_head(&text[..length]).unwrap().is_none(), "{length}");
        }
        let (head, length) = parse_head(text).unwrap().unwrap();
        assert_eq!(&text[length..], b"BODY");
        assert_eq!((head.method(), head.path()), ("GET", "/publish/räume"));
        let query: Vec<_> = head.query().collect::<Result<_, _>>().unwrap();
        assert_eq!(query, [("channel".into(), "a b".into()), ("x".into(), "&".into())]);
        assert_eq!((head.header("ACCEPT"), head.header("cookie")), (Some("text/html"), None));
        assert_eq!((head.framing(), head.keep_alive(), head.expects_continue()), (Framing::Length(0), true, false));
    }

    #[test]
    fn what_is_too_large_is_refused_before_it_is_complete() {
        let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(REQUEST_HEAD_BYTES));
        assert_eq!(parse_head(long.as_bytes()).unwrap_err(), HeadError::TooLarge);
        let filler = REQUEST_HEAD_BYTES - "GET / HTTP/1.1\r\nHost: h\r\nA: \r\n\r\n".len();
        let exact = format!("GET / HTTP/1.1\r\nHost: h\r\nA: {}\r\n\r\n", "x".repeat(filler));
        assert_eq!(exact.len(), REQUEST_HEAD_BYTES);
        assert!(head(&exact).is_ok());
        let over = exact.replace("A: ", "A: x");
        assert_eq!(parse_head(over.as_bytes()).unwrap_err(), HeadError::TooLarge);
        let many = format!("GET / HTTP/1.1\r\n{}", "A: b\r\n".repeat(REQUEST_HEADERS + 1));
        assert_eq!(parse_head(many.as_bytes()).unwrap_err(), HeadError::TooManyHeaders);
        assert_eq!(HeadError::TooManyHeaders.status(), Status::HeadTooLarge);
    }

    #[test]
    fn two_readings_of_the_length_are_refused() {
        assert_eq!(with("Content-Length: 5\r\n").unwrap().framing(), Framing::Length(5));
        assert_eq!(with("Content-Length: 5\r\nContent-Length: 5\r\n").unwrap().framing(), Framing::Length(5));
        assert_eq!(with("Transfer-Encoding: Chunked\r\n").unwrap().framing(), Framing::Chunked);
        for headers in [
            "Content-Length: 5\r\nContent-Length: 6\r\n",
            "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
            "Content-Length: +5\r\n",
            "Content-Length: 5, 5\r\n",
            "Content-Length: 0x5\r\n",
            "Content-Length: -1\r\n",
            "Content-Length: \r\n",
            "Content-Length: 18446744073709551616\r\n",
        ] {
            let error = with(headers).unwrap_err();
            assert!(matches!(error, HeadError::Framing(_)), "{headers:?}: {error}");
            assert_eq!(error.status(), Status::BadRequest);
        }
        for headers in [
            "Transfer-Encoding: gzip, chunked\r\n",
            "Transfer-Encoding: identity\r\n",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: \u{b}chunked\r\n",
            "Transfer-Encoding: xchunked\r\n",
        ] {
            let status = with(headers).unwrap_err().status();
            assert!(matches!(status, Status::NotImplemented | Status::BadRequest), "{headers:?}: {status:?}");
        }
        let old = head("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n");
        assert!(matches!(old, Err(HeadError::Framing(_))));
    }

    #[test]
    fn bad_heads_have_the_right_status() {
        for (text, status) in [
            ("GET / HTTP/2.0\r\n\r\n", Status::VersionNotSupported),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Status::VersionNotSupported),
            ("GET / HTTP/1.1\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/1.1\r\nHost: a\r\n folded: b\r\n\r\n", Status::BadRequest),
            ("GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n", Status::BadRequest),
            ("GET /%zz HTTP/1.1\r\nHost: a\r\n\r\n", Status::BadRequest),
            ("GET /%ff HTTP/1.1\r\nHost: a\r\n\r\n", Status::BadRequest),
            ("CONNECT h:443 HTTP/1.1\r\nHost: a\r\n\r\n", Status::BadRequest),
            ("\u{16}\u{3}\u{1}\u{2}\0\u{1}", Status::BadRequest),
        ] {
            assert_eq!(parse_head(text.as_bytes()).unwrap_err().status(), status, "{text:?}");
        }
    }

    #[test]
    fn connection_tokens_decide_about_the_next_request() {
        assert!(with("").unwrap().keep_alive());
        assert!(!with("Connection: Upgrade, CLOSE\r\n").unwrap().keep_alive());
        assert!(!with("Connection: foo\r\nConnection: close\r\n").unwrap().keep_alive());
        assert!(!head("GET / HTTP/1.0\r\n\r\n").unwrap().keep_alive());
        assert!(head("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").unwrap().keep_alive());
        assert!(with("Expect: 100-Continue\r\n").unwrap().expects_continue());
        let upgrade = with("Connection: keep-alive, Upgrade\r\n").unwrap();
        assert!(upgrade.headers().has_token("Connection", "upgrade"));
        assert!(!upgrade.headers().has_token("connection", "upgrad"));
    }

    #[test]
    fn bytes_that_are_not_text_stay_visible() {
        let text = b"GET / HTTP/1.1\r\nHost: h\r\nOrigin: \xff\xfe\r\nA: \xfc\r\n\r\nrest";
        let (head, length) = parse_head(text).unwrap().unwrap();
        assert_eq!(&text[length..], b"rest");
        assert_eq!((head.header("origin"), head.header("a")), (Some("\u{fffd}\u{fffd}"), Some("\u{fffd}")));
    }

    #[test]
    fn the_server_reads_what_our_client_writes() {
        let mut out = Vec::new();
        write_request(&mut out, "POST", "/publish/a%20b?x=1", &[("Host", "h"), ("Idempotency-Key", "k")], Some(3));
        let (head, length) = parse_head(&out).unwrap().unwrap();
        assert_eq!(length, out.len());
        assert_eq!((head.method(), head.path(), head.framing()), ("POST", "/publish/a b", Framing::Length(3)));
        assert_eq!((head.header("host"), head.header("idempotency-key")), (Some("h"), Some("k")));
        assert_eq!(head.query().next(), Some(Ok(("x".into(), "1".into()))));
    }
}
