//! Frames in: an incremental decoder of one direction of one connection.
//!
//! What a read brought is decoded where it lies. A message that is whole in the input is unmasked in place and borrowed from
//! it; only what is cut by the end of the input, or fragmented by the peer, is copied and kept.

#[cfg(test)]
mod tests;

mod held;

pub use held::Held;

use std::borrow::Cow;

use super::header::{FrameHeader, Peer};
use super::{HEADER_BYTES, Opcode, ProtocolError, mask};

/// What a peer sent, whole. Borrowed from the input where it lay there in one piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// A text message.
    Text(Cow<'a, str>),
    /// A binary message.
    Binary(Cow<'a, [u8]>),
    /// Wants a pong with the same payload.
    Ping(Cow<'a, [u8]>),
    /// A heartbeat or the answer to a ping.
    Pong(Cow<'a, [u8]>),
    /// The peer sends nothing after this. Wants a close frame back, unless one was sent already.
    Close {
        /// A code that may travel (RFC 6455, section 7.4); none when the frame was empty.
        code: Option<u16>,
        /// Empty more often than not.
        reason: Cow<'a, str>,
    },
}

/// How far the connection is.
#[derive(Debug, Clone, Copy)]
enum State {
    /// Frames are decoded.
    Open,
    /// A close frame came: what follows is discarded (RFC 6455, section 5.5.1).
    Closed,
    /// The peer broke the protocol: every further call says so again.
    Failed(ProtocolError),
}

/// Decodes what one peer sends. Between messages it is these 16 bytes and nothing on the heap.
#[derive(Debug)]
pub struct Decoder {
    partial: Option<Box<Partial>>,
    state: State,
    peer: Peer,
}

const _: () = assert!(size_of::<Decoder>() <= 16, "held once per connection, idle or not");

/// What is known of frames and messages that are not whole yet.
#[derive(Debug, Default)]
struct Partial {
    /// The first bytes of a header whose rest has not come.
    head: [u8; HEADER_BYTES],
    /// How many of them.
    head_length: u8,
    /// The frame whose payload has not come in full.
    frame: Option<FrameHeader>,
    /// The message whose final fragment has not come in full.
    message: Option<Message>,
    /// Payload of an unfinished control frame, which may lie between two fragments of `message`.
    control: Vec<u8>,
}

/// The fragments of a message so far. Grows with what arrives and not with what a header announces: a peer cannot make the
/// node reserve memory by promising bytes.
#[derive(Debug)]
struct Message {
    text: bool,
    bytes: Vec<u8>,
    /// Bytes of a text known to be UTF-8: all but a character cut by the last read.
    checked: usize,
}

impl Decoder {
    /// Decodes a client's frames: the server's side of a connection.
    pub fn server() -> Self {
        Self { partial: None, state: State::Open, peer: Peer::Client }
    }

    /// Decodes a server's frames: the client's side of a connection.
    pub fn client() -> Self {
        Self { partial: None, state: State::Open, peer: Peer::Server }
    }

    /// Whether the decoder waits for the rest of nothing: no frame and no message is half received.
    pub fn is_idle(&self) -> bool {
        self.partial.is_none()
    }

    /// Takes the next message or control frame off the front of `input`, which it unmasks in place. `max_message` bounds the
    /// payload bytes of a message over all its fragments; a longer one is refused at its header.
    ///
    /// Call it until it returns none: then all of `input` has been taken and the buffer is free. What it keeps is freed
    /// with the event it belongs to. After [`Event::Close`] further input is discarded.
    ///
    /// # Errors
    /// The peer broke the protocol or sent too much; the rest of the input is discarded and every further call fails alike.
    pub fn next<'a>(
        &mut self,
        input: &mut &'a mut [u8],
        max_message: usize,
    ) -> Result<Option<Event<'a>>, ProtocolError> {
        let outcome = match self.state {
            State::Open => self.advance(input, max_message),
            State::Closed => Ok(None),
            State::Failed(error) => Err(error),
        };
        match outcome {
            Ok(Some(Event::Close { .. })) => self.end(State::Closed),
            Err(error) => self.end(State::Failed(error)),
            Ok(_) => {}
        }
        if !matches!(self.state, State::Open) {
            *input = &mut [];
        }
        outcome
    }

    fn end(&mut self, state: State) {
        self.state = state;
        self.partial = None;
    }

    fn advance<'a>(
        &mut self,
        input: &mut &'a mut [u8],
        max_message: usize,
    ) -> Result<Option<Event<'a>>, ProtocolError> {
        loop {
            let started = self.partial.as_mut().and_then(|partial| partial.frame.take());
            let Some(frame) = (match started {
                Some(frame) => Some(frame),
                None => self.take_header(input, max_message)?,
            }) else {
                return Ok(None);
            };
            let event = self.take_payload(frame, input)?;
            if self.partial.as_ref().is_some_and(|partial| partial.is_empty()) {
                self.partial = None;
            }
            if event.is_some() || input.is_empty() {
                return Ok(event);
            }
        }
    }

    /// Takes a whole header, together with what an earlier input held of it; keeps what there is when it is not whole.
    fn take_header(&mut self, input: &mut &mut [u8], max_message: usize) -> Result<Option<FrameHeader>, ProtocolError> {
        let held = self.partial.as_ref().map_or(0, |partial| partial.head_length as usize);
        let parsed = if held == 0 {
            FrameHeader::parse(input, self.peer)?
        } else {
            let partial = self.partial.get_or_insert_default();
            let arrived = input.len().min(HEADER_BYTES - held);
            partial.head[held..held + arrived].copy_from_slice(&input[..arrived]);
            FrameHeader::parse(&partial.head[..held + arrived], self.peer)?
        };
        let Some((frame, size)) = parsed else {
            let rest = std::mem::take(input);
            if !rest.is_empty() {
                let partial = self.partial.get_or_insert_default();
                partial.head[held..held + rest.len()].copy_from_slice(rest);
                partial.head_length += rest.len() as u8;
            }
            return Ok(None);
        };
        *input = &mut std::mem::take(input)[size - held..];
        let message = self.partial.as_mut().and_then(|partial| {
            partial.head_length = 0;
            partial.message.as_ref().map(|message| message.bytes.len())
        });
        frame.check(message, max_message)?;
        Ok(Some(frame))
    }

    /// Takes what there is of a frame's payload. Returns its event when it is the last frame of one and whole.
    fn take_payload<'a>(
        &mut self,
        mut frame: FrameHeader,
        input: &mut &'a mut [u8],
    ) -> Result<Option<Event<'a>>, ProtocolError> {
        let arrived = frame.left.min(input.len() as u64) as usize;
        let payload = input.split_off_mut(..arrived).unwrap_or_default();
        frame.left -= arrived as u64;
        if let Some(key) = &mut frame.key {
            *key = mask(payload, *key);
        }
        let whole = frame.left == 0;
        if arrived == 0 && !whole {
            // The input ended with the header: the payload may still come in one piece.
            self.partial.get_or_insert_default().frame = Some(frame);
            return Ok(None);
        }

        if frame.opcode.is_control() {
            let begun = self.partial.as_ref().is_some_and(|partial| !partial.control.is_empty());
            if whole && !begun {
                return control_event(frame.opcode, Cow::Borrowed(payload)).map(Some);
            }
            let partial = self.partial.get_or_insert_default();
            partial.control.extend_from_slice(payload);
            if whole {
                return control_event(frame.opcode, Cow::Owned(std::mem::take(&mut partial.control))).map(Some);
            }
            partial.frame = Some(frame);
            return Ok(None);
        }

        let begun = self.partial.as_ref().is_some_and(|partial| partial.message.is_some());
        if whole && frame.last && !begun {
            return message_event(frame.opcode == Opcode::Text, Cow::Borrowed(payload)).map(Some);
        }
        let partial = self.partial.get_or_insert_default();
        let message = partial.message.get_or_insert_with(|| Message::new(frame.opcode));
        message.append(payload)?;
        if !whole {
            partial.frame = Some(frame);
        } else if frame.last
            && let Some(message) = partial.message.take()
        {
            return message_event(message.text, Cow::Owned(message.bytes)).map(Some);
        }
        Ok(None)
    }
}

impl Partial {
    fn is_empty(&self) -> bool {
        self.head_length == 0 && self.frame.is_none() && self.message.is_none() && self.control.is_empty()
    }
}

impl Message {
    fn new(opcode: Opcode) -> Self {
        Self { text: opcode == Opcode::Text, bytes: Vec::new(), checked: 0 }
    }

    /// Appends payload; text that can no longer become UTF-8 fails here, however much of the message is still to come.
    fn append(&mut self, payload: &[u8]) -> Result<(), ProtocolError> {
        self.bytes.extend_from_slice(payload);
        if self.text {
            self.checked += match std::str::from_utf8(&self.bytes[self.checked..]) {
                Ok(text) => text.len(),
                Err(error) if error.error_len().is_none() => error.valid_up_to(),
                Err(_) => return Err(ProtocolError::InvalidUtf8),
            };
        }
        Ok(())
    }
}

fn message_event(text: bool, payload: Cow<'_, [u8]>) -> Result<Event<'_>, ProtocolError> {
    if !text {
        return Ok(Event::Binary(payload));
    }
    // Assembled text was checked as it came, but for a character cut by its end. Checking it again costs less than the copies
    // it went through, and asks for no unsafe code.
    let text = match payload {
        Cow::Borrowed(bytes) => std::str::from_utf8(bytes).ok().map(Cow::Borrowed),
        Cow::Owned(bytes) => String::from_utf8(bytes).ok().map(Cow::Owned),
    };
    text.map(Event::Text).ok_or(ProtocolError::InvalidUtf8)
}

fn control_event(opcode: Opcode, payload: Cow<'_, [u8]>) -> Result<Event<'_>, ProtocolError> {
    match opcode {
        Opcode::Ping => Ok(Event::Ping(payload)),
        Opcode::Pong => Ok(Event::Pong(payload)),
        _ => close_event(payload),
    }
}

fn close_event(payload: Cow<'_, [u8]>) -> Result<Event<'_>, ProtocolError> {
    let code = match *payload {
        [] => return Ok(Event::Close { code: None, reason: Cow::Borrowed("") }),
        [_] => return Err(ProtocolError::CloseTruncated),
        [high, low, ..] => u16::from_be_bytes([high, low]),
    };
    // 1004 to 1006 and 1015 are reserved for use inside a peer; 1012 to 1014 came to the registry after the RFC.
    if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
        return Err(ProtocolError::CloseCode(code));
    }
    let reason = match payload {
        Cow::Borrowed(bytes) => std::str::from_utf8(&bytes[2..]).ok().map(Cow::Borrowed),
        Cow::Owned(mut bytes) => String::from_utf8(bytes.split_off(2)).ok().map(Cow::Owned),
    };
    reason.map(|reason| Event::Close { code: Some(code), reason }).ok_or(ProtocolError::InvalidUtf8)
}
