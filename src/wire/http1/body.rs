//! Message bodies (RFC 9112, sections 6 and 7): of a known length, chunked, or as long as the connection.

use memchr::memchr;

use super::Status;
use crate::limits::{CHUNK_LINE_BYTES, TRAILER_BYTES};

/// How a body's end is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// After this many bytes; 0 when there is no body.
    Length(u64),
    /// After the last chunk.
    Chunked,
    /// With the connection. Responses only.
    UntilClose,
}

/// Why a body cannot be read. The connection is of no use after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// Larger than the reader takes.
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    /// Not the chunked coding.
    #[error("malformed chunked body: {0}")]
    Chunk(&'static str),
}

impl BodyError {
    /// What a server answers.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            Self::TooLarge(_) => Status::ContentTooLarge,
            Self::Chunk(_) => Status::BadRequest,
        }
    }
}

/// Incremental reader of one body.
#[derive(Debug)]
pub struct BodyDecoder {
    state: State,
    /// Bytes of body that may still come.
    room: usize,
    most: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// This many bytes of body follow, then the end.
    Plain(usize),
    /// A chunk's size line follows.
    Size,
    /// This many bytes of a chunk follow, then its CRLF.
    Chunk(usize),
    /// The CRLF after a chunk follows.
    ChunkEnd,
    /// Trailer lines follow; so many of their bytes were seen.
    Trailer(usize),
    /// Everything up to the end of the connection is body.
    Open,
    /// The body is complete.
    Done,
}

impl BodyDecoder {
    /// A reader of a body of at most `most` bytes.
    ///
    /// # Errors
    /// [`BodyError::TooLarge`] when the announced length is more.
    pub fn new(framing: Framing, most: usize) -> Result<Self, BodyError> {
        let state = match framing {
            Framing::Length(0) => State::Done,
            Framing::Length(length) => match usize::try_from(length) {
                Ok(length) if length <= most => State::Plain(length),
                _ => return Err(BodyError::TooLarge(most)),
            },
            Framing::Chunked => State::Size,
            Framing::UntilClose => State::Open,
        };
        Ok(Self { state, room: most, most })
    }

    /// Whether the body is complete. One that ends with the connection never is.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Writes what a reader of the same message has to be given before the rest of it to be where this one is, `body` being
    /// what this one has read.
    pub fn restate(&self, framing: Framing, body: &[u8], out: &mut Vec<u8>) {
        if framing != Framing::Chunked {
            out.extend_from_slice(body);
            return;
        }
        let chunk = |length: usize, out: &mut Vec<u8>| {
            if length > 0 {
                out.extend_from_slice(format!("{length:x}\r\n").as_bytes());
            }
            out.extend_from_slice(body);
        };
        match self.state {
            State::Chunk(left) => chunk(body.len() + left, out),
            State::ChunkEnd => chunk(body.len(), out),
            State::Size | State::Trailer(_) | State::Plain(_) | State::Open | State::Done => {
                chunk(body.len(), out);
                if !body.is_empty() {
                    out.extend_from_slice(b"\r\n");
                }
                if matches!(self.state, State::Trailer(_)) {
                    out.extend_from_slice(b"0\r\n");
                }
            }
        }
    }

    /// Appends the body's bytes to `out` and returns how much of `input` was used. What was not used belongs to an
    /// unfinished line, and comes again with more behind it, or to the next message.
    ///
    /// # Errors
    /// See [`BodyError`].
    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<usize, BodyError> {
        let mut rest = input;
        loop {
            match self.state {
                State::Done => break,
                State::Plain(left) => {
                    let taken = self.copy(&mut rest, left, out)?;
                    self.state = if taken == left { State::Done } else { State::Plain(left - taken) };
                }
                State::Open => {
                    self.copy(&mut rest, usize::MAX, out)?;
                }
                State::Chunk(left) => {
                    let taken = self.copy(&mut rest, left, out)?;
                    self.state = if taken == left { State::ChunkEnd } else { State::Chunk(left - taken) };
                }
                State::Size => match take_line(&mut rest, CHUNK_LINE_BYTES)? {
                    Some(line) => {
                        self.state = match chunk_size(line)? {
                            0 => State::Trailer(0),
                            size if size <= self.room as u64 => State::Chunk(size as usize),
                            _ => return Err(BodyError::TooLarge(self.most)),
                        }
                    }
                    None => break,
                },
                State::ChunkEnd => match take_line(&mut rest, 0)? {
                    Some(_) => self.state = State::Size,
                    None => break,
                },
                State::Trailer(seen) => match take_line(&mut rest, TRAILER_BYTES - seen)? {
                    Some([]) => self.state = State::Done,
                    // Trailer fields are allowed and of no use here (RFC 9110, section 6.5.1).
                    Some(line) => self.state = State::Trailer((seen + line.len() + 2).min(TRAILER_BYTES)),
                    None => break,
                },
            }
            if rest.is_empty() {
                break;
            }
        }
        Ok(input.len() - rest.len())
    }

    fn copy(&mut self, rest: &mut &[u8], most: usize, out: &mut Vec<u8>) -> Result<usize, BodyError> {
        let (part, behind) = rest.split_at(rest.len().min(most));
        if part.len() > self.room {
            return Err(BodyError::TooLarge(self.most));
        }
        self.room -= part.len();
        out.extend_from_slice(part);
        *rest = behind;
        Ok(part.len())
    }
}

/// Takes a line of at most `most` bytes, without its CRLF; none while it is incomplete. A bare LF ends no line: parties
/// that differ on it would see different messages.
fn take_line<'a>(rest: &mut &'a [u8], most: usize) -> Result<Option<&'a [u8]>, BodyError> {
    let window = &rest[..rest.len().min(most.saturating_add(2))];
    let Some(end) = memchr(b'\n', window) else {
        // An incomplete line may still be a full one with only its LF missing.
        let full = window.len() == most.saturating_add(2) || (window.len() > most && window.last() != Some(&b'\r'));
        return if full { Err(BodyError::Chunk("a line is too long or a chunk has no CRLF")) } else { Ok(None) };
    };
    let Some(line) = window[..end].strip_suffix(b"\r") else {
        return Err(BodyError::Chunk("a line ends in LF without CR"));
    };
    *rest = &rest[end + 1..];
    Ok(Some(line))
}

/// Size of a chunk from its line: hexadecimal digits, then perhaps an extension, which is ignored.
fn chunk_size(line: &[u8]) -> Result<u64, BodyError> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    if digits == 0 || digits > 16 {
        return Err(BodyError::Chunk("a chunk's size has 1 to 16 hexadecimal digits"));
    }
    let (size, extension) = line.split_at(digits);
    let extension = extension.trim_ascii_start();
    if !(extension.is_empty() || extension.starts_with(b";")) || extension.contains(&b'\r') {
        return Err(BodyError::Chunk("only an extension may follow a chunk's size"));
    }
    Ok(size.iter().fold(0, |value, digit| value << 4 | u64::from(char::from(*digit).to_digit(16).unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `input` in pieces of `step` bytes and returns the body and what was left over.
    fn decode(framing: Framing, most: usize, input: &[u8], step: usize) -> Result<(Vec<u8>, Vec<u8>), BodyError> {
        let mut decoder = BodyDecoder::new(framing, most)?;
        let (mut pending, mut body) = (Vec::new(), Vec::new());
        for piece in input.chunks(step) {
            pending.extend_from_slice(piece);
            let used = decoder.feed(&pending, &mut body)?;
            pending.drain(..used);
        }
        assert_eq!(decoder.is_done(), framing != Framing::UntilClose, "the input was whole");
        Ok((body, pending))
    }

    #[test]
    fn a_body_ends_where_its_framing_says_at_any_cut() {
        let chunked = b"4\r\nwiki\r\n5;name=\"v\"\r\npedia\r\n0A \r\n0123456789\r\n0\r\nTrailer: x\r\n\r\nNEXT";
        for step in 1..=chunked.len() {
            let (body, left) = decode(Framing::Chunked, 19, chunked, step).unwrap();
            assert_eq!((&body[..], &left[..]), (&b"wikipedia0123456789"[..], &b"NEXT"[..]));
            let (body, left) = decode(Framing::Length(5), 5, b"helloNEXT", step).unwrap();
            assert_eq!((&body[..], &left[..]), (&b"hello"[..], &b"NEXT"[..]));
            let (body, left) = decode(Framing::UntilClose, 9, b"helloNEXT", step).unwrap();
            assert_eq!((&body[..], &left[..]), (&b"helloNEXT"[..], &b""[..]));
        }
        assert_eq!(decode(Framing::Length(0), 0, b"NEXT", 4).unwrap().1, b"NEXT");
    }

    #[test]
    fn a_body_goes_on_with_another_reader_from_any_cut() {
        let chunked = b"4\r\nwiki\r\n5;name=\"v\"\r\npedia\r\n0\r\nTrailer: x\r\n\r\n";
        for (framing, input) in [(Framing::Chunked, &chunked[..]), (Framing::Length(9), b"wikipedia")] {
            for cut in 0..input.len() {
                let mut first = BodyDecoder::new(framing, 9).unwrap();
                let mut body = Vec::new();
                let used = first.feed(&input[..cut], &mut body).unwrap();
                let mut restated = Vec::new();
                first.restate(framing, &body, &mut restated);
                restated.extend_from_slice(&input[used..]);
                let (body, left) = decode(framing, 9, &restated, 1).unwrap();
                assert_eq!((&body[..], &left[..]), (&b"wikipedia"[..], &b""[..]), "cut at {cut}");
            }
        }
    }

    #[test]
    fn a_body_that_is_too_large_is_refused_as_early_as_it_is_known() {
        assert_eq!(BodyDecoder::new(Framing::Length(6), 5).unwrap_err(), BodyError::TooLarge(5));
        assert_eq!(BodyDecoder::new(Framing::Length(u64::MAX), 5).unwrap_err(), BodyError::TooLarge(5));
        let mut decoder = BodyDecoder::new(Framing::Chunked, 5).unwrap();
        assert_eq!(decoder.feed(b"6\r\n", &mut Vec::new()), Err(BodyError::TooLarge(5)));
        let mut decoder = BodyDecoder::new(Framing::Chunked, 5).unwrap();
        assert_eq!(decoder.feed(b"3\r\nabc\r\n3\r\n", &mut Vec::new()), Err(BodyError::TooLarge(5)));
        let mut decoder = BodyDecoder::new(Framing::UntilClose, 5).unwrap();
        assert_eq!(decoder.feed(b"abcdef", &mut Vec::new()), Err(BodyError::TooLarge(5)));
    }

    #[test]
    fn what_is_not_the_chunked_coding_is_refused() {
        let long_line = format!("1;{}\r\n", "x".repeat(CHUNK_LINE_BYTES));
        let endless_line = "1;".repeat(CHUNK_LINE_BYTES);
        let trailers = format!("0\r\n{}\r\n", "T: x\r\n".repeat(TRAILER_BYTES / 6 + 3));
        for input in [
            "\r\n",
            "x\r\n",
            "-1\r\n",
            "+1\r\n",
            "0x1\r\n",
            "1 1\r\n",
            "1\n",
            "1;a\rb\r\n",
            "11112222333344445\r\n",
            "1\r\nab",
            "1\r\na\n",
            "1\r\naX\r\n",
            &long_line,
            &endless_line,
            &trailers,
        ] {
            let mut decoder = BodyDecoder::new(Framing::Chunked, 1024).unwrap();
            let got = decoder.feed(input.as_bytes(), &mut Vec::new());
            assert!(matches!(got, Err(BodyError::Chunk(_))), "{input:?}: {got:?}");
        }
    }
}
