//! The position in front of a payload on the pub/sub channel: byte 0xFF, eight hexadecimal digits, `.`, a decimal
//! offset, a space (`publish.lua` has the contract). UTF-8 text never contains 0xFF, so a plain message is told apart.

use crate::log::position::{Epoch, Position};

/// First byte of a message that carries its position.
const MARK: u8 = 0xff;

/// Splits a message into its position, if it carries one, and where the payload begins.
#[must_use]
pub fn split(message: &[u8]) -> (Option<Position>, usize) {
    match header(message) {
        Some((position, start)) => (Some(position), start),
        None => (None, 0),
    }
}

fn header(message: &[u8]) -> Option<(Position, usize)> {
    // Mark, epoch, dot, at most twenty digits, space.
    let head = &message[..message.len().min(1 + 8 + 1 + 20 + 1)];
    let (mark, rest) = head.split_first()?;
    let end = memchr::memchr(b' ', rest)?;
    let (epoch, offset) = std::str::from_utf8(&rest[..end]).ok()?.split_once('.')?;
    if *mark != MARK || !offset.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let position = Position { epoch: epoch.parse::<Epoch>().ok()?, offset: offset.parse().ok()? };
    (position.offset > 0).then_some((position, 1 + end + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_positioned_message_is_split() {
        let message = b"\xff0000abcd.42 {\"a\": 1}";
        let (position, start) = split(message);
        assert_eq!(position, Some(Position { epoch: Epoch(0xabcd), offset: 42 }));
        assert_eq!(&message[start..], b"{\"a\": 1}");
        let (position, start) = split(b"\xffffffffff.18446744073709551615 ");
        assert_eq!(position, Some(Position { epoch: Epoch(u32::MAX), offset: u64::MAX }));
        assert_eq!(start, 31);
    }

    #[test]
    fn anything_else_is_a_plain_message() {
        for message in [
            &b""[..],
            b"\xff",
            b"0000abcd.42 x",
            b"\xff0000abcd.42",
            b"\xff0000abcd. x",
            b"\xff0000abcd.+4 x",
            b"\xff0000abcd.0 x",
            b"\xff000abcd.1 x",
            b"\xff0000ABCD.1 x",
            b"\xff0000abcd.18446744073709551616 x",
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff.1 x",
        ] {
            assert_eq!(split(message), (None, 0), "{message:?}");
        }
    }
}
