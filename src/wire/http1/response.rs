//! Response heads: written for the server, parsed for our own clients.

use super::body::Framing;
use super::{HeadError, Headers};
use crate::limits::{REQUEST_HEAD_BYTES, REQUEST_HEADERS};

macro_rules! statuses {
    ($($variant:ident = $code:literal, $reason:literal;)*) => {
        /// Every status this server answers with (RFC 9110, section 15; 431: RFC 6585).
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u16)]
        pub enum Status {
            $(#[doc = $reason] $variant = $code,)*
        }

        impl Status {
            /// The number.
            #[must_use]
            pub fn code(self) -> u16 {
                self as u16
            }

            /// Number and reason, as the status line has them.
            fn line(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!(stringify!($code), " ", $reason),)*
                }
            }
        }
    };
}

statuses! {
    Continue = 100, "Continue";
    SwitchingProtocols = 101, "Switching Protocols";
    Ok = 200, "OK";
    NoContent = 204, "No Content";
    NotModified = 304, "Not Modified";
    BadRequest = 400, "Bad Request";
    Forbidden = 403, "Forbidden";
    NotFound = 404, "Not Found";
    MethodNotAllowed = 405, "Method Not Allowed";
    RequestTimeout = 408, "Request Timeout";
    ContentTooLarge = 413, "Content Too Large";
    UpgradeRequired = 426, "Upgrade Required";
    HeadTooLarge = 431, "Request Header Fields Too Large";
    NotImplemented = 501, "Not Implemented";
    ServiceUnavailable = 503, "Service Unavailable";
    VersionNotSupported = 505, "HTTP Version Not Supported";
}

/// Which pages may read a response (Fetch, CORS protocol).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllowOrigin<'a> {
    /// Only those of the same origin: no header.
    None,
    /// Any.
    Any,
    /// This one; caches are told that the answer depends on it.
    Only(&'a str),
}

/// Writes one response head. It ends with one of the methods that say how the body ends.
#[derive(Debug)]
#[must_use]
pub struct ResponseWriter<'a> {
    out: &'a mut Vec<u8>,
}

impl<'a> ResponseWriter<'a> {
    /// Appends the status line.
    pub fn new(out: &'a mut Vec<u8>, status: Status) -> Self {
        for part in ["HTTP/1.1 ", status.line(), "\r\n"] {
            out.extend_from_slice(part.as_bytes());
        }
        Self { out }
    }

    /// Appends a header. Control characters in the value become spaces: a value cannot forge another header.
    pub fn header(self, name: &str, value: &str) -> Self {
        write_header(self.out, name, value);
        self
    }

    /// Appends what CORS needs.
    pub fn allow_origin(self, allow: AllowOrigin<'_>) -> Self {
        match allow {
            AllowOrigin::None => self,
            AllowOrigin::Any => self.header("Access-Control-Allow-Origin", "*"),
            AllowOrigin::Only(origin) => self.header("Access-Control-Allow-Origin", origin).header("Vary", "Origin"),
        }
    }

    /// Ends the head of a response with a body of `length` bytes.
    pub fn with_length(self, length: usize, keep_alive: bool) {
        self.header("Content-Length", itoa::Buffer::new().format(length)).without_body(keep_alive);
    }

    /// Ends the head of a response that has no body by its status (204, 304).
    pub fn without_body(self, keep_alive: bool) {
        self.header("Connection", if keep_alive { "keep-alive" } else { "close" }).end();
    }

    /// Ends the head of a response whose body ends with the connection (RFC 9112, section 6.3).
    pub fn until_close(self) {
        self.without_body(false);
    }

    /// Ends the head as it stands: 100, and 101 with its own `Connection`.
    pub fn end(self) {
        self.out.extend_from_slice(b"\r\n");
    }
}

/// Appends one header line; control characters of the value become spaces.
pub(super) fn write_header(out: &mut Vec<u8>, name: &str, value: &str) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend(value.bytes().map(|byte| if byte.is_ascii_control() { b' ' } else { byte }));
    out.extend_from_slice(b"\r\n");
}

/// The head of a response.
#[derive(Debug, Clone)]
pub struct ResponseHead {
    /// The status code.
    pub status: u16,
    headers: Headers,
    minor_version: u8,
    framing: Option<Framing>,
}

impl ResponseHead {
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

    /// How the body's end is found, for a response to `method` (RFC 9112, section 6.3).
    #[must_use]
    pub fn framing(&self, method: &str) -> Framing {
        if method == "HEAD" || matches!(self.status, 100..=199 | 204 | 304) {
            return Framing::Length(0);
        }
        self.framing.unwrap_or(Framing::UntilClose)
    }

    /// Whether the connection may be used again.
    #[must_use]
    pub fn keep_alive(&self) -> bool {
        self.headers.keep_alive(self.minor_version)
    }
}

/// Reads a response head: none while it is incomplete, else the head and how many bytes it took.
///
/// # Errors
/// See [`HeadError`].
pub fn parse_response_head(input: &[u8]) -> Result<Option<(ResponseHead, usize)>, HeadError> {
    let bounded = &input[..input.len().min(REQUEST_HEAD_BYTES)];
    let mut fields = [httparse::EMPTY_HEADER; REQUEST_HEADERS];
    let mut response = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(length) = response.parse(bounded)? else {
        return if bounded.len() == REQUEST_HEAD_BYTES { Err(HeadError::TooLarge) } else { Ok(None) };
    };
    let text = std::str::from_utf8(&bounded[..length]).map_err(|_| HeadError::Malformed("a header is not UTF-8"))?;
    let (Some(status), Some(minor_version)) = (response.code, response.version) else {
        return Err(HeadError::Malformed("incomplete status line"));
    };
    let headers = Headers::new(text, response.headers);
    let framing = headers.framing(minor_version)?;
    Ok(Some((ResponseHead { status, headers, minor_version, framing }, length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(out: &[u8]) -> ResponseHead {
        let (head, length) = parse_response_head(out).unwrap().expect("complete");
        assert_eq!(length, out.len());
        head
    }

    #[test]
    fn our_client_reads_what_the_server_writes() {
        let mut out = Vec::new();
        ResponseWriter::new(&mut out, Status::MethodNotAllowed)
            .header("Allow", "GET, HEAD")
            .allow_origin(AllowOrigin::Only("https://a.example"))
            .with_length(12, true);
        let head = read(&out);
        assert_eq!((head.status, head.header("allow")), (405, Some("GET, HEAD")));
        assert_eq!(head.header("access-control-allow-origin"), Some("https://a.example"));
        assert_eq!(head.header("vary"), Some("Origin"));
        assert_eq!((head.framing("GET"), head.keep_alive()), (Framing::Length(12), true));
        assert_eq!(head.framing("HEAD"), Framing::Length(0));

        out.clear();
        ResponseWriter::new(&mut out, Status::Ok).allow_origin(AllowOrigin::Any).until_close();
        let head = read(&out);
        assert_eq!(head.header("access-control-allow-origin"), Some("*"));
        assert_eq!((head.framing("GET"), head.keep_alive()), (Framing::UntilClose, false));

        out.clear();
        ResponseWriter::new(&mut out, Status::NoContent).allow_origin(AllowOrigin::None).without_body(true);
        assert_eq!(out, b"HTTP/1.1 204 No Content\r\nConnection: keep-alive\r\n\r\n");
        assert_eq!(read(&out).framing("POST"), Framing::Length(0));

        out.clear();
        ResponseWriter::new(&mut out, Status::Continue).end();
        assert_eq!(out, b"HTTP/1.1 100 Continue\r\n\r\n");
    }

    #[test]
    fn a_value_cannot_forge_a_header() {
        let mut out = Vec::new();
        ResponseWriter::new(&mut out, Status::Ok).header("X", "a\r\nSet-Cookie: b").with_length(0, false);
        let head = read(&out);
        assert_eq!((head.header("x"), head.header("set-cookie")), (Some("a  Set-Cookie: b"), None));
    }

    #[test]
    fn a_foreign_response() {
        let text = b"HTTP/1.0 200 Fine\r\ntransfer-encoding: chunked\r\n\r\n";
        assert!(matches!(parse_response_head(text), Err(HeadError::Framing(_))));
        let text = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert_eq!(parse_response_head(text).unwrap().unwrap().0.framing("GET"), Framing::Chunked);
        assert!(parse_response_head(&text[..30]).unwrap().is_none());
        assert!(parse_response_head(b"nonsense\r\n\r\n").is_err());
    }
}
