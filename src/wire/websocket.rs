//! WebSocket (RFC 6455): the opening handshake's headers, frames out, frames in.
//!
//! Everything here is pure. A connection keeps one [`Decoder`], 16 bytes while no frame is half received; encoding has no
//! state at all. Extensions are not offered, so a frame with a reserved bit is a protocol error.
//!
//! The node is the server side. The client side (masked frames out, unmasked frames in) exists for the command line and the
//! load generator, which so speak through the code they measure.

mod decoder;
mod encode;
mod error;
mod handshake;
mod header;

pub use decoder::{Decoder, Event, Held};
pub use encode::{write_close, write_close_answer, write_header, write_masked_frame, write_ping, write_pong};
pub use error::ProtocolError;
pub use handshake::{UpgradeError, VERSION, accept_key, check_upgrade};

/// Frame opcodes (RFC 6455, section 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Opcode {
    /// The next fragment of the message that a text or binary frame began.
    Continuation = 0,
    /// The first or only fragment of a UTF-8 message.
    Text = 1,
    /// The first or only fragment of a binary message.
    Binary = 2,
    /// The last frame a peer sends: a status code and a reason, or nothing.
    Close = 8,
    /// Asks for a pong with the same payload.
    Ping = 9,
    /// Answers a ping, or is a one-way heartbeat.
    Pong = 10,
}

impl Opcode {
    /// The opcode in the low four bits of a frame's first byte; none for the reserved ones.
    fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::Continuation),
            1 => Some(Self::Text),
            2 => Some(Self::Binary),
            8 => Some(Self::Close),
            9 => Some(Self::Ping),
            10 => Some(Self::Pong),
            _ => None,
        }
    }

    /// Close, ping and pong: never fragmented, at most [`crate::limits::CONTROL_FRAME_BYTES`], and allowed between the
    /// fragments of a message (RFC 6455, section 5.5).
    fn is_control(self) -> bool {
        self as u8 >= Self::Close as u8
    }
}

/// FIN, in a frame's first byte: the last fragment of its message.
const FIN: u8 = 0x80;
/// RSV1 to RSV3, in a frame's first byte: for extensions, of which none is ever negotiated.
const RESERVED: u8 = 0x70;
/// MASK, in a frame's second byte: a masking key follows the length.
const MASK: u8 = 0x80;
/// The seven-bit length that says: a 16-bit length follows.
const LENGTH_16: u8 = 126;
/// The seven-bit length that says: a 64-bit length follows.
const LENGTH_64: u8 = 127;
/// Bytes of the longest header: 2, a 64-bit length, a masking key.
const HEADER_BYTES: usize = 14;

/// XORs `payload` with the repeated masking key (RFC 6455, section 5.3), eight bytes at a time or more where the compiler
/// finds wider registers. Returns the key turned so that it fits the byte after `payload`.
fn mask(payload: &mut [u8], mut key: [u8; 4]) -> [u8; 4] {
    let [a, b, c, d] = key;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (words, rest) = payload.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, key) in rest.iter_mut().zip(key.iter().cycle()) {
        *byte ^= key;
    }
    key.rotate_left(payload.len() % 4);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masking_equals_the_definition_at_every_length_and_split() {
        let key = [0x37, 0xfa, 0x21, 0x3d];
        for length in 0..64 {
            let plain: Vec<u8> = (0..length).collect();
            let expected: Vec<u8> = plain.iter().enumerate().map(|(i, byte)| byte ^ key[i % 4]).collect();
            for split in 0..=plain.len() {
                let mut payload = plain.clone();
                let (left, right) = payload.split_at_mut(split);
                let turned = mask(left, key);
                mask(right, turned);
                assert_eq!(payload, expected, "{length} bytes split at {split}");
            }
        }
    }

    #[test]
    fn opcodes_map_to_their_bits_and_back() {
        let known: Vec<u8> = (0..16).filter(|bits| Opcode::from_bits(*bits).is_some()).collect();
        assert_eq!(known, [0, 1, 2, 8, 9, 10]);
        for bits in known {
            let opcode = Opcode::from_bits(bits).unwrap();
            assert_eq!(opcode as u8, bits);
            assert_eq!(opcode.is_control(), bits >= 8);
        }
    }
}
