//! A frame's header, read and checked.

use super::{FIN, LENGTH_16, LENGTH_64, MASK, Opcode, ProtocolError, RESERVED};
use crate::limits::CONTROL_FRAME_BYTES;

/// Which side of the connection the decoder's frames come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Masks its frames.
    Client,
    /// Does not.
    Server,
}

/// A frame's header; `left` counts down as payload arrives.
#[derive(Debug, Clone, Copy)]
pub struct FrameHeader {
    pub opcode: Opcode,
    /// FIN: the only or final fragment of its message.
    pub last: bool,
    /// Bytes of payload still to come.
    pub left: u64,
    /// Turned to fit the next byte of payload; none for a server's frames.
    pub key: Option<[u8; 4]>,
}

impl FrameHeader {
    /// Reads a header and its size in bytes; none when it is not whole. Its bytes are checked in their order, so that a
    /// header arriving byte by byte fails for the same reason as one arriving at once (RFC 6455, section 5.2).
    pub fn parse(bytes: &[u8], peer: Peer) -> Result<Option<(Self, usize)>, ProtocolError> {
        let &[first, second, ref rest @ ..] = bytes else { return Ok(None) };
        if first & RESERVED != 0 {
            return Err(ProtocolError::ReservedBits);
        }
        let bits = first & 0x0f;
        let opcode = Opcode::from_bits(bits).ok_or(ProtocolError::ReservedOpcode(bits))?;
        let last = first & FIN != 0;
        if opcode.is_control() && !last {
            return Err(ProtocolError::FragmentedControl);
        }
        let masked = second & MASK != 0;
        match peer {
            Peer::Client if !masked => return Err(ProtocolError::Unmasked),
            Peer::Server if masked => return Err(ProtocolError::Masked),
            Peer::Client | Peer::Server => {}
        }
        let short = second & !MASK;
        if opcode.is_control() && short as usize > CONTROL_FRAME_BYTES {
            return Err(ProtocolError::ControlTooLong);
        }
        let (payload, rest) = match short {
            LENGTH_16 => {
                let Some((length, rest)) = rest.split_first_chunk() else { return Ok(None) };
                let length = u64::from(u16::from_be_bytes(*length));
                if length < u64::from(LENGTH_16) {
                    return Err(ProtocolError::LengthNotMinimal);
                }
                (length, rest)
            }
            LENGTH_64 => {
                let Some((length, rest)) = rest.split_first_chunk() else { return Ok(None) };
                let length = u64::from_be_bytes(*length);
                if length > i64::MAX as u64 {
                    return Err(ProtocolError::LengthTooLarge);
                }
                if length <= u64::from(u16::MAX) {
                    return Err(ProtocolError::LengthNotMinimal);
                }
                (length, rest)
            }
            _ => (u64::from(short), rest),
        };
        let (key, rest) = match peer {
            Peer::Client => {
                let Some((key, rest)) = rest.split_first_chunk() else { return Ok(None) };
                (Some(*key), rest)
            }
            Peer::Server => (None, rest),
        };
        Ok(Some((Self { opcode, last, left: payload, key }, bytes.len() - rest.len())))
    }

    /// Checks the header against the message it would begin or continue, of which `message` bytes have come (RFC 6455,
    /// section 5.4).
    pub fn check(&self, message: Option<usize>, max_message: usize) -> Result<(), ProtocolError> {
        let begun = match (self.opcode, message) {
            (Opcode::Continuation, None) => return Err(ProtocolError::UnexpectedContinuation),
            (Opcode::Text | Opcode::Binary, Some(_)) => return Err(ProtocolError::ExpectedContinuation),
            (Opcode::Close | Opcode::Ping | Opcode::Pong, _) => return Ok(()),
            (_, message) => message.unwrap_or(0),
        };
        if self.left > max_message.saturating_sub(begun) as u64 { Err(ProtocolError::TooBig) } else { Ok(()) }
    }
}
