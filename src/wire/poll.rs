//! The answer to a poll: one JSON object with what is new on each channel and the cursor to ask with next.
//!
//! `{"cursor":"…","channels":{"news":{"epoch":"…","offset":7,"publications":[{"data":…,"offset":7}]}},"more":false}`.
//! A channel on which publications are lost has `"gap":{"from":{"epoch":"…","offset":3},"to":{…}}` before its
//! publications: what came after `from` up to `to` cannot be had.

use serde_json::to_writer;

/// A place in the history of a channel, as texts and numbers of the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place<'a> {
    /// The epoch's text; digits and letters only.
    pub epoch: &'a str,
    /// The last publication seen.
    pub offset: u64,
}

/// Writes one answer.
#[derive(Debug)]
pub struct BodyWriter {
    out: Vec<u8>,
    first: bool,
}

impl BodyWriter {
    /// An answer after which the reader goes on from `cursor`.
    #[must_use]
    pub fn new(cursor: &str) -> Self {
        let mut out = b"{\"cursor\":".to_vec();
        write_text(&mut out, cursor);
        out.extend_from_slice(b",\"channels\":{");
        Self { out, first: true }
    }

    /// Appends a channel: where the reader is once it has seen the publications, what is lost before them, and the
    /// publications, oldest first, each an encoded JSON object.
    pub fn channel<'p>(
        &mut self,
        name: &str,
        reached: Place<'_>,
        gap: Option<(Place<'_>, Place<'_>)>,
        publications: impl IntoIterator<Item = &'p [u8]>,
    ) {
        let out = &mut self.out;
        if !std::mem::take(&mut self.first) {
            out.push(b',');
        }
        write_text(out, name);
        out.extend_from_slice(b":{");
        write_place(out, reached);
        if let Some((from, to)) = gap {
            out.extend_from_slice(b",\"gap\":{\"from\":{");
            write_place(out, from);
            out.extend_from_slice(b"},\"to\":{");
            write_place(out, to);
            out.extend_from_slice(b"}}");
        }
        out.extend_from_slice(b",\"publications\":[");
        for (index, publication) in publications.into_iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            out.extend_from_slice(publication);
        }
        out.extend_from_slice(b"]}");
    }

    /// Ends the answer. `more` says that it was cut: the rest can be asked for at once.
    #[must_use]
    pub fn finish(mut self, more: bool) -> Vec<u8> {
        self.out.extend_from_slice(if more { b"},\"more\":true}" } else { b"},\"more\":false}" });
        self.out
    }
}

fn write_text(out: &mut Vec<u8>, text: &str) {
    to_writer(out, text).expect("a string is JSON and a Vec takes every write");
}

fn write_place(out: &mut Vec<u8>, Place { epoch, offset }: Place<'_>) {
    out.extend_from_slice(b"\"epoch\":");
    write_text(out, epoch);
    out.extend_from_slice(b",\"offset\":");
    out.extend_from_slice(itoa::Buffer::new().format(offset).as_bytes());
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn an_answer_is_the_json_it_says() {
        let mut body = BodyWriter::new("a.1,b.2");
        let publications = [br#"{"data":1,"offset":6}"#, br#"{"data":2,"offset":7}"#];
        let places = (Place { epoch: "0a", offset: 3 }, Place { epoch: "0b", offset: 5 });
        body.channel("n\"\u{e4}", Place { epoch: "0b", offset: 7 }, Some(places), publications.map(|p| &p[..]));
        body.channel("empty", Place { epoch: "0c", offset: 0 }, None, []);
        let value: Value = serde_json::from_slice(&body.finish(true)).expect("JSON");
        assert_eq!(
            value,
            json!({
                "cursor": "a.1,b.2",
                "channels": {
                    "n\"\u{e4}": {
                        "epoch": "0b",
                        "offset": 7,
                        "gap": { "from": { "epoch": "0a", "offset": 3 }, "to": { "epoch": "0b", "offset": 5 } },
                        "publications": [{ "data": 1, "offset": 6 }, { "data": 2, "offset": 7 }],
                    },
                    "empty": { "epoch": "0c", "offset": 0, "publications": [] },
                },
                "more": true,
            })
        );
        assert_eq!(BodyWriter::new("").finish(false), br#"{"cursor":"","channels":{},"more":false}"#);
    }
}
