//! Frames out. Everything is appended to a buffer of the caller, so that several frames leave in one send.

use super::{FIN, HEADER_BYTES, LENGTH_16, LENGTH_64, MASK, Opcode, mask};
use crate::limits::CONTROL_FRAME_BYTES;

/// Appends the header of one unmasked final frame, as a server sends it; `payload` is in bytes and follows by the caller's
/// hand (RFC 6455, section 5.2).
pub fn write_header(out: &mut Vec<u8>, opcode: Opcode, payload: usize) {
    write_any_header(out, opcode, payload, 0);
}

/// Appends one whole masked final frame, as a client sends it. The key should be fresh and unpredictable for each frame
/// (RFC 6455, section 5.3); where it comes from is the caller's matter.
pub fn write_masked_frame(out: &mut Vec<u8>, opcode: Opcode, payload: &[u8], key: [u8; 4]) {
    out.reserve(HEADER_BYTES + payload.len());
    write_any_header(out, opcode, payload.len(), MASK);
    out.extend_from_slice(&key);
    let start = out.len();
    out.extend_from_slice(payload);
    mask(&mut out[start..], key);
}

/// Appends a server's close frame. A reason longer than the frame can hold
/// ([`CONTROL_FRAME_BYTES`] less two for the code) is cut at a character boundary (RFC 6455, section 5.5.1).
pub fn write_close(out: &mut Vec<u8>, code: u16, reason: &str) {
    let mut length = reason.len().min(CONTROL_FRAME_BYTES - 2);
    while !reason.is_char_boundary(length) {
        length -= 1;
    }
    write_header(out, Opcode::Close, 2 + length);
    out.extend_from_slice(&code.to_be_bytes());
    out.extend_from_slice(&reason.as_bytes()[..length]);
}

/// Appends a server's answer to a close frame it received: the same code, or an empty frame when it came without one.
pub fn write_close_answer(out: &mut Vec<u8>, received: Option<u16>) {
    match received {
        Some(code) => write_close(out, code, ""),
        None => write_header(out, Opcode::Close, 0),
    }
}

/// Appends a server's ping.
///
/// # Panics
/// When the payload has more than [`CONTROL_FRAME_BYTES`].
pub fn write_ping(out: &mut Vec<u8>, payload: &[u8]) {
    write_control(out, Opcode::Ping, payload);
}

/// Appends a server's pong. The payload of a received ping always fits.
///
/// # Panics
/// When the payload has more than [`CONTROL_FRAME_BYTES`].
pub fn write_pong(out: &mut Vec<u8>, payload: &[u8]) {
    write_control(out, Opcode::Pong, payload);
}

fn write_control(out: &mut Vec<u8>, opcode: Opcode, payload: &[u8]) {
    assert!(payload.len() <= CONTROL_FRAME_BYTES, "a control frame of {} bytes", payload.len());
    write_header(out, opcode, payload.len());
    out.extend_from_slice(payload);
}

/// `masked` is [`MASK`] or 0.
fn write_any_header(out: &mut Vec<u8>, opcode: Opcode, payload: usize, masked: u8) {
    let first = FIN | opcode as u8;
    if payload < LENGTH_16 as usize {
        out.extend_from_slice(&[first, masked | payload as u8]);
    } else if let Ok(length) = u16::try_from(payload) {
        out.extend_from_slice(&[first, masked | LENGTH_16]);
        out.extend_from_slice(&length.to_be_bytes());
    } else {
        out.extend_from_slice(&[first, masked | LENGTH_64]);
        out.extend_from_slice(&(payload as u64).to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        write(&mut out);
        out
    }

    #[test]
    fn the_length_takes_the_shortest_form() {
        let header = |payload| written(|out| write_header(out, Opcode::Text, payload));
        assert_eq!(header(0), [0x81, 0]);
        assert_eq!(header(125), [0x81, 125]);
        assert_eq!(header(126), [0x81, 126, 0, 126]);
        assert_eq!(header(65_535), [0x81, 126, 0xff, 0xff]);
        assert_eq!(header(65_536), [0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0]);
    }

    #[test]
    fn masked_frame_is_the_example_of_rfc_6455_section_5_7() {
        let frame = written(|out| write_masked_frame(out, Opcode::Text, b"Hello", [0x37, 0xfa, 0x21, 0x3d]));
        assert_eq!(frame, [0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58]);
    }

    #[test]
    fn control_frames() {
        assert_eq!(written(|out| write_ping(out, b"")), [0x89, 0]);
        assert_eq!(written(|out| write_pong(out, b"ab")), [0x8a, 2, b'a', b'b']);
        assert_eq!(written(|out| write_close(out, 3001, "bye")), [0x88, 5, 0x0b, 0xb9, b'b', b'y', b'e']);
        assert_eq!(written(|out| write_close_answer(out, Some(1000))), [0x88, 2, 0x03, 0xe8]);
        assert_eq!(written(|out| write_close_answer(out, None)), [0x88, 0]);
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character_boundary() {
        let frame = written(|out| write_close(out, 1000, &"x".repeat(200)));
        assert_eq!(frame.len(), 2 + 125);
        // 123 bytes would end inside the 62nd two-byte character.
        let frame = written(|out| write_close(out, 1000, &"é".repeat(100)));
        assert_eq!(frame[1], 2 + 122);
        assert_eq!(std::str::from_utf8(&frame[4..]).unwrap(), "é".repeat(61));
    }

    #[test]
    #[should_panic(expected = "a control frame of 126 bytes")]
    fn a_ping_longer_than_the_protocol_allows_is_our_own_mistake() {
        write_ping(&mut Vec::new(), &[0; 126]);
    }
}
