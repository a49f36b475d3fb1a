//! The stamp every publication of a run carries, and the search for stamps in a byte stream.
//!
//! A stamp is plain text of one length, so it survives every framing a server may put around it (event-stream lines,
//! JSON, a JSON string, HTTP chunks) and is found without parsing that framing.

use memchr::memmem::Finder;

use super::kernel::Nanos;

/// What every stamp starts with. Its first letter occurs once in it and in no field, so a search never backs up.
const MARK: &[u8] = b"weir-bench:";

/// Bytes of a stamp: the mark, then run (8), publisher (4), channel (8), sequence (8) and time (16), with colons
/// between.
pub const STAMP_BYTES: usize = MARK.len() + 8 + 1 + 4 + 1 + 8 + 1 + 8 + 1 + 16;

/// Bytes of the smallest payload.
pub const LEAST_PAYLOAD_BYTES: usize = STAMP_BYTES + OPEN.len() + MIDDLE.len() + CLOSE.len();

const OPEN: &[u8] = b"{\"stamp\":\"";
const MIDDLE: &[u8] = b"\",\"pad\":\"";
const CLOSE: &[u8] = b"\"}";

/// Which publication this is and when it was due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The run, so that what an earlier run left behind is told apart.
    pub run: u32,
    /// The publishing connection.
    pub publisher: u16,
    /// The channel's number.
    pub channel: u32,
    /// Consecutive from 1 for this publisher in this channel.
    pub sequence: u32,
    /// When the schedule wanted it sent.
    pub intended: Nanos,
}

/// Appends a JSON payload of exactly `size` bytes (at least [`LEAST_PAYLOAD_BYTES`]) that carries `stamp`.
pub fn write_payload(out: &mut Vec<u8>, stamp: Stamp, size: usize) {
    out.extend_from_slice(OPEN);
    out.extend_from_slice(MARK);
    write_hex(out, u64::from(stamp.run), 8);
    out.push(b':');
    write_hex(out, u64::from(stamp.publisher), 4);
    out.push(b':');
    write_hex(out, u64::from(stamp.channel), 8);
    out.push(b':');
    write_hex(out, u64::from(stamp.sequence), 8);
    out.push(b':');
    write_hex(out, stamp.intended, 16);
    out.extend_from_slice(MIDDLE);
    out.resize(out.len() + size.saturating_sub(LEAST_PAYLOAD_BYTES), b'.');
    out.extend_from_slice(CLOSE);
}

fn write_hex(out: &mut Vec<u8>, value: u64, digits: u32) {
    for digit in (0..digits).rev() {
        out.push(b"0123456789abcdef"[(value >> (4 * digit)) as usize & 15]);
    }
}

fn read_hex(text: &[u8]) -> Option<u64> {
    text.iter().try_fold(0u64, |value, &byte| {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            _ => return None,
        };
        Some(value << 4 | u64::from(digit))
    })
}

/// Reads the stamp that `text`, exactly [`STAMP_BYTES`] long, is.
fn read(text: &[u8]) -> Option<Stamp> {
    let fields = text.strip_prefix(MARK)?;
    if [8, 13, 22, 31].iter().any(|&colon| fields[colon] != b':') {
        return None;
    }
    Some(Stamp {
        run: read_hex(&fields[..8])? as u32,
        publisher: read_hex(&fields[9..13])? as u16,
        channel: read_hex(&fields[14..22])? as u32,
        sequence: read_hex(&fields[23..31])? as u32,
        intended: read_hex(&fields[32..48])?,
    })
}

/// The start of a stamp whose rest has not arrived yet. Empty most of the time.
#[derive(Debug, Clone, Copy)]
pub struct Carry {
    length: u8,
    bytes: [u8; STAMP_BYTES],
}

impl Default for Carry {
    fn default() -> Self {
        Self { length: 0, bytes: [0; STAMP_BYTES] }
    }
}

impl Carry {
    /// Whether a stamp was begun and not finished.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

/// Finds stamps.
#[derive(Debug)]
pub struct Scanner {
    finder: Finder<'static>,
}

impl Default for Scanner {
    fn default() -> Self {
        Self { finder: Finder::new(MARK) }
    }
}

impl Scanner {
    /// Calls `found` for every stamp in a stream of which `input` is the next part; `None` stands for a mark with
    /// unreadable fields. A stamp that `input` cuts off is kept in `carry`.
    pub fn scan(&self, carry: &mut Carry, mut input: &[u8], mut found: impl FnMut(Option<Stamp>)) {
        if carry.length > 0 {
            let held = usize::from(carry.length);
            let taken = input.len().min(STAMP_BYTES - held);
            carry.bytes[held..held + taken].copy_from_slice(&input[..taken]);
            let whole = held + taken;
            let compared = whole.min(MARK.len());
            if carry.bytes[..compared] != MARK[..compared] {
                // It only looked like a mark. No other can start inside what was held, so the input is searched from
                // its start.
                carry.length = 0;
            } else if whole < STAMP_BYTES {
                carry.length = whole as u8;
                return;
            } else {
                found(read(&carry.bytes));
                carry.length = 0;
                input = &input[taken..];
            }
        }
        while let Some(start) = self.finder.find(input) {
            let Some(text) = input.get(start..start + STAMP_BYTES) else {
                return Self::keep(carry, &input[start..]);
            };
            found(read(text));
            input = &input[start + STAMP_BYTES..];
        }
        let tail = &input[input.len().saturating_sub(MARK.len() - 1)..];
        if let Some(start) = memchr::memrchr(MARK[0], tail)
            && MARK.starts_with(&tail[start..])
        {
            Self::keep(carry, &tail[start..]);
        }
    }

    fn keep(carry: &mut Carry, start: &[u8]) {
        carry.bytes[..start.len()].copy_from_slice(start);
        carry.length = start.len() as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(sequence: u32) -> Stamp {
        Stamp { run: 0xdead_beef, publisher: 3, channel: 77, sequence, intended: u64::MAX - u64::from(sequence) }
    }

    #[test]
    fn a_payload_has_the_size_asked_for_and_is_json() {
        for size in [LEAST_PAYLOAD_BYTES, LEAST_PAYLOAD_BYTES + 1, 200, 4096] {
            let mut payload = Vec::new();
            write_payload(&mut payload, stamp(1), size);
            assert_eq!(payload.len(), size);
            let value: serde_json::Value = serde_json::from_slice(&payload).unwrap();
            assert_eq!(value["stamp"].as_str().unwrap().len(), STAMP_BYTES);
        }
    }

    #[test]
    fn stamps_are_found_wherever_the_stream_is_cut() {
        let mut stream = b"HTTP weir-bench weir weir-benc".to_vec();
        for sequence in 1..=3 {
            stream.extend_from_slice(b"data: w");
            write_payload(&mut stream, stamp(sequence), 120);
            stream.extend_from_slice(b"\nid: 1.2.3\n\nweir-");
        }
        let scanner = Scanner::default();
        for first in 0..stream.len() {
            for second in [first, first + 1, (first + 40).min(stream.len()), stream.len()] {
                let second = second.min(stream.len());
                let mut carry = Carry::default();
                let mut seen = Vec::new();
                for part in [&stream[..first], &stream[first..second], &stream[second..]] {
                    scanner.scan(&mut carry, part, |found| seen.push(found.unwrap()));
                }
                assert_eq!(seen, [stamp(1), stamp(2), stamp(3)], "cut at {first} and {second}");
            }
        }
        let mut carry = Carry::default();
        let mut seen = Vec::new();
        for byte in &stream {
            scanner.scan(&mut carry, std::slice::from_ref(byte), |found| seen.push(found.unwrap()));
        }
        assert_eq!(seen.len(), 3);
    }

    #[test]
    fn an_unreadable_stamp_is_reported_and_the_next_one_found() {
        let mut stream = Vec::new();
        write_payload(&mut stream, stamp(1), 120);
        stream[30] = b'?';
        write_payload(&mut stream, stamp(2), 120);
        let mut seen = Vec::new();
        Scanner::default().scan(&mut Carry::default(), &stream, |found| seen.push(found));
        assert_eq!(seen, [None, Some(stamp(2))]);
    }
}
