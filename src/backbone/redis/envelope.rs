//! The position in front of a payload on the pub/sub channel: byte 0xFF, eight hexadecimal digits, `.`, a decimal
//! offset, `.`, a decimal tag, a space (`publish.lua` has the contract; its version 1 had no tag). UTF-8 text never contains
//! 0xFF, so a plain message is told apart.

use crate::backbone::interface::Tag;
use crate::log::position::{Epoch, Position};

/// First byte of a message that carries its position.
const MARK: u8 = 0xff;

/// What stands in front of a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Where the publication is.
    pub position: Position,
    /// Its tag, if it has one.
    pub tag: Option<Tag>,
}

/// Splits a message into its header, if it carries one, and where the payload begins.
#[must_use]
pub fn split(message: &[u8]) -> (Option<Header>, usize) {
    match header(message) {
        Some((header, start)) => (Some(header), start),
        None => (None, 0),
    }
}

fn header(message: &[u8]) -> Option<(Header, usize)> {
    // Mark, epoch, dot, at most twenty digits, dot, as many, space.
    let head = &message[..message.len().min(1 + 8 + 1 + 20 + 1 + 20 + 1)];
    let (mark, rest) = head.split_first()?;
    let end = memchr::memchr(b' ', rest)?;
    let mut fields = std::str::from_utf8(&rest[..end]).ok()?.split('.');
    let (epoch, offset, tag) = (fields.next()?, decimal(fields.next()?)?, fields.next());
    if *mark != MARK || offset == 0 || fields.next().is_some() {
        return None;
    }
    let tag = match tag {
        Some(tag) => Some(Tag(decimal(tag)?)),
        None => None,
    };
    let position = Position { epoch: epoch.parse::<Epoch>().ok()?, offset };
    Some((Header { position, tag }, 1 + end + 1))
}

fn decimal(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_positioned_message_is_split() {
        let message = b"\xff0000abcd.42 {\"a\": 1}";
        let (header, start) = split(message);
        let position = Position { epoch: Epoch(0xabcd), offset: 42 };
        assert_eq!(header, Some(Header { position, tag: None }));
        assert_eq!(&message[start..], b"{\"a\": 1}");
        let (header, start) = split(b"\xff0000abcd.42.1790000000123456 x y");
        assert_eq!(header, Some(Header { position, tag: Some(Tag(1_790_000_000_123_456)) }));
        assert_eq!(start, 30);
        let (header, start) = split(b"\xffffffffff.18446744073709551615.18446744073709551615 ");
        let position = Position { epoch: Epoch(u32::MAX), offset: u64::MAX };
        assert_eq!(header, Some(Header { position, tag: Some(Tag(u64::MAX)) }));
        assert_eq!(start, 52);
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
            b"\xff0000abcd.1. x",
            b"\xff0000abcd.1.x x",
            b"\xff0000abcd.1.2.3 x",
            b"\xff0000abcd.1.18446744073709551616 x",
            b"\xff000abcd.1 x",
            b"\xff0000ABCD.1 x",
            b"\xff0000abcd.18446744073709551616 x",
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff.1 x",
        ] {
            assert_eq!(split(message), (None, 0), "{message:?}");
        }
    }
}
