//! HTTP/1.1 messages (RFC 9112): request heads and bodies for the server, requests and response heads for our own
//! clients. A message whose length two parties could read differently is refused, never guessed (section 11.2).

mod body;
mod conditional;
mod request;
mod response;
mod target;

pub use body::{BodyDecoder, BodyError, Framing};
pub use conditional::none_match_names;
pub use request::{Head, parse_head, write_request};
pub use response::{AllowOrigin, ResponseHead, ResponseWriter, Status, parse_response_head};
pub use target::{TargetError, pairs, percent_decode, percent_encode};

use crate::limits::{REQUEST_HEAD_BYTES, REQUEST_HEADERS};

/// Why a message head cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// More than [`REQUEST_HEAD_BYTES`].
    #[error("the head is larger than {REQUEST_HEAD_BYTES} bytes")]
    TooLarge,
    /// More than [`REQUEST_HEADERS`].
    #[error("the head has more than {REQUEST_HEADERS} headers")]
    TooManyHeaders,
    /// Not HTTP/1.0 or HTTP/1.1.
    #[error("the version is not supported; allowed: HTTP/1.1 and HTTP/1.0")]
    Version,
    /// Not the grammar of a head.
    #[error("malformed head: {0}")]
    Malformed(&'static str),
    /// Not a request target this server understands.
    #[error("bad request target: {0}")]
    Target(#[from] TargetError),
    /// The length of the body is not certain.
    #[error("the body's length is ambiguous: {0}")]
    Framing(&'static str),
    /// A transfer coding other than chunked.
    #[error("the transfer coding is not supported; allowed: chunked")]
    Coding,
}

impl HeadError {
    /// What a server answers.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            Self::TooLarge | Self::TooManyHeaders => Status::HeadTooLarge,
            Self::Version => Status::VersionNotSupported,
            Self::Malformed(_) | Self::Target(_) | Self::Framing(_) => Status::BadRequest,
            Self::Coding => Status::NotImplemented,
        }
    }
}

impl From<httparse::Error> for HeadError {
    fn from(error: httparse::Error) -> Self {
        match error {
            httparse::Error::TooManyHeaders => Self::TooManyHeaders,
            httparse::Error::Version => Self::Version,
            httparse::Error::HeaderName => Self::Malformed("invalid byte in a header name"),
            httparse::Error::HeaderValue => Self::Malformed("invalid byte in a header value"),
            httparse::Error::NewLine => Self::Malformed("invalid line end"),
            httparse::Error::Status => Self::Malformed("invalid status line"),
            httparse::Error::Token => Self::Malformed("invalid byte in the first line"),
        }
    }
}

/// A part of a head's text. 16 bits are enough: see the assertion below.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: u16,
    end: u16,
}

const _: () = assert!(
    REQUEST_HEAD_BYTES * 3 <= u16::MAX as usize,
    "a head of invalid UTF-8 takes up to three bytes for one, and spans count in 16 bits"
);

impl Span {
    /// Where `part` lies in `whole`; it must lie there.
    fn of(whole: &str, part: &[u8]) -> Self {
        let start = part.as_ptr() as usize - whole.as_ptr() as usize;
        debug_assert!(start + part.len() <= whole.len());
        Self { start: start as u16, end: (start + part.len()) as u16 }
    }

    fn text(self, whole: &str) -> &str {
        &whole[usize::from(self.start)..usize::from(self.end)]
    }
}

/// The headers of one head. Names compare without case. Bytes that are not UTF-8 were replaced by U+FFFD, so that a
/// comparison with a known value fails instead of the header seeming absent.
#[derive(Debug, Clone)]
pub struct Headers {
    text: Box<str>,
    fields: Box<[(Span, Span)]>,
}

impl Headers {
    fn new(text: &str, fields: &[httparse::Header<'_>]) -> Self {
        let span = |field: &httparse::Header<'_>| (Span::of(text, field.name.as_bytes()), Span::of(text, field.value));
        Self { text: text.into(), fields: fields.iter().map(span).collect() }
    }

    /// The first header of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.all(name).next()
    }

    /// Every header of this name, in order.
    pub fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        let named = move |field: &&(Span, Span)| field.0.text(&self.text).eq_ignore_ascii_case(name);
        self.fields.iter().filter(named).map(|field| field.1.text(&self.text))
    }

    /// Whether a header that lists tokens, such as `Connection`, has this one (RFC 9110, section 5.6.1).
    #[must_use]
    pub fn has_token(&self, name: &str, token: &str) -> bool {
        self.all(name).flat_map(|value| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case(token))
    }

    /// Whether the connection may be used again after this message (RFC 9112, section 9.3).
    fn keep_alive(&self, minor_version: u8) -> bool {
        !self.has_token("connection", "close") && (minor_version >= 1 || self.has_token("connection", "keep-alive"))
    }

    /// The body's length as the message says it; none when it says nothing (RFC 9112, section 6.3).
    fn framing(&self, minor_version: u8) -> Result<Option<Framing>, HeadError> {
        let mut length = None;
        for value in self.all("content-length") {
            let number = match value.bytes().all(|byte| byte.is_ascii_digit()) {
                true => value.parse().map_err(|_| HeadError::Framing("Content-Length is not a 64-bit number"))?,
                false => return Err(HeadError::Framing("Content-Length is not one decimal number")),
            };
            if length.is_some_and(|other: u64| other != number) {
                return Err(HeadError::Framing("Content-Length headers differ"));
            }
            length = Some(number);
        }
        let mut codings = self.all("transfer-encoding");
        let Some(coding) = codings.next() else {
            return Ok(length.map(Framing::Length));
        };
        if length.is_some() {
            return Err(HeadError::Framing("both Content-Length and Transfer-Encoding"));
        }
        if minor_version == 0 {
            return Err(HeadError::Framing("Transfer-Encoding in HTTP/1.0"));
        }
        if codings.next().is_some() || !coding.trim().eq_ignore_ascii_case("chunked") {
            return Err(HeadError::Coding);
        }
        Ok(Some(Framing::Chunked))
    }
}
