//! Positions: where in which life of a channel's history.

use std::fmt;
use std::str::FromStr;

/// One life of a channel's history: random, kept in the backbone with the history. Another epoch means that offsets
/// cannot be compared. Written as eight lower-case hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Epoch(pub u32);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

impl FromStr for Epoch {
    type Err = CursorError;
    fn from_str(text: &str) -> Result<Self, CursorError> {
        hex8(text).map(Epoch)
    }
}

/// Number of a publication within its epoch: consecutive from 1. Zero is "before the first".
pub type Offset = u64;

/// An epoch and the offset of the last publication seen in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Position {
    /// The life of the history the offset counts in.
    pub epoch: Epoch,
    /// The last publication seen; 0 when none was.
    pub offset: Offset,
}

/// Stands for a channel's name inside a cursor: 32-bit FNV-1a of its UTF-8 bytes. Two names of one stream that
/// collide are told apart by their epochs, so a collision is an announced gap and never a silent one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChannelTag(pub u32);

impl ChannelTag {
    /// The tag of a channel name.
    #[must_use]
    pub fn of(name: &str) -> Self {
        ChannelTag(name.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)))
    }
}

/// One channel's entry of a cursor text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CursorEntry {
    /// Which channel.
    pub tag: ChannelTag,
    /// How far it was read.
    pub position: Position,
}

impl fmt::Display for CursorEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}.{}.{}", self.tag.0, self.position.epoch, self.position.offset)
    }
}

/// Most bytes one entry takes: 8 + 1 + 8 + 1 + 20.
pub const CURSOR_ENTRY_BYTES: usize = 38;

/// Appends one entry without going through a formatter: this runs once a delivery on streams of many channels.
pub fn write_entry(out: &mut Vec<u8>, entry: CursorEntry) {
    write_hex8(out, entry.tag.0);
    out.push(b'.');
    write_hex8(out, entry.position.epoch.0);
    out.push(b'.');
    out.extend_from_slice(itoa::Buffer::new().format(entry.position.offset).as_bytes());
}

/// Why a text is not a cursor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a cursor: {0}; a cursor is what an event's id or a reply's cursor said: tag.epoch.offset entries joined by commas"
)]
pub struct CursorError(&'static str);

/// Reads a cursor text: `tag.epoch.offset[,tag.epoch.offset…]`, at most `most` entries. The empty text has none.
///
/// # Errors
/// Names the malformed part.
pub fn parse_cursor(text: &str, most: usize) -> Result<Vec<CursorEntry>, CursorError> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let mut entries = Vec::new();
    for part in text.split(',') {
        if entries.len() == most {
            return Err(CursorError("too many entries"));
        }
        let mut fields = part.splitn(3, '.');
        let (Some(tag), Some(epoch), Some(offset)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(CursorError("an entry has three fields"));
        };
        if offset.is_empty() || !offset.bytes().all(|b| b.is_ascii_digit()) {
            return Err(CursorError("an offset is a decimal number"));
        }
        let offset = offset.parse().map_err(|_| CursorError("an offset fits 64 bits"))?;
        entries.push(CursorEntry { tag: ChannelTag(hex8(tag)?), position: Position { epoch: epoch.parse()?, offset } });
    }
    Ok(entries)
}

fn hex8(text: &str) -> Result<u32, CursorError> {
    if text.len() != 8 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(CursorError("a tag or epoch is eight lower-case hexadecimal digits"));
    }
    u32::from_str_radix(text, 16).map_err(|_| CursorError("a tag or epoch is hexadecimal"))
}

fn write_hex8(out: &mut Vec<u8>, value: u32) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut digits = [0; 8];
    for (i, digit) in digits.iter_mut().enumerate() {
        *digit = DIGITS[(value >> (28 - 4 * i)) as usize & 15];
    }
    out.extend_from_slice(&digits);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_survives_its_text() {
        let entries = [
            CursorEntry { tag: ChannelTag::of("news"), position: Position { epoch: Epoch(0x1f), offset: 42 } },
            CursorEntry { tag: ChannelTag(u32::MAX), position: Position { epoch: Epoch(u32::MAX), offset: u64::MAX } },
        ];
        let mut text = Vec::new();
        for entry in entries {
            if !text.is_empty() {
                text.push(b',');
            }
            let before = text.len();
            write_entry(&mut text, entry);
            assert_eq!(std::str::from_utf8(&text[before..]).unwrap(), entry.to_string());
            assert!(text.len() - before <= CURSOR_ENTRY_BYTES);
        }
        assert_eq!(parse_cursor(std::str::from_utf8(&text).unwrap(), 2).unwrap(), entries);
    }

    #[test]
    fn malformed_cursors_are_refused() {
        for text in [
            "x",
            "00000000.00000000",
            "00000000.00000000.",
            "0000000g.00000000.1",
            "00000000.00000000.-1",
            ",",
            "00000000.00000000.18446744073709551616",
            "00000000.00000000.1,",
            "00000000.00000000.1.2",
            "0000000A.00000000.1",
        ] {
            assert!(parse_cursor(text, 8).is_err(), "{text}");
        }
        assert!(parse_cursor("00000000.00000000.1,00000000.00000000.1", 1).is_err());
        assert_eq!(parse_cursor("", 1).unwrap(), []);
    }
}
