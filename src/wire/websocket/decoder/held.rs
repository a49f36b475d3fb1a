//! What a decoder holds of messages that are not whole, in a form that another process can go on from.

use serde::{Deserialize, Serialize};

use super::super::header::{FrameHeader, Peer};
use super::super::{HEADER_BYTES, Opcode};
use super::{Decoder, Message, Partial, State};
use crate::limits::CONTROL_FRAME_BYTES;

/// What an open decoder knows of frames and messages that are not whole yet. Empty between messages.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Held {
    /// The first bytes of a header whose rest has not come.
    head: Vec<u8>,
    frame: Option<HeldFrame>,
    /// The message is text.
    text: Option<bool>,
    /// Payload of the message so far.
    #[serde(skip)]
    message: Vec<u8>,
    /// Payload of an unfinished control frame.
    control: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct HeldFrame {
    opcode: u8,
    last: bool,
    left: u64,
    key: Option<[u8; 4]>,
}

impl Held {
    /// The payload of the message so far: kept apart from the rest because it may be large.
    #[must_use]
    pub fn message(&self) -> &[u8] {
        &self.message
    }

    /// The same with this payload of the message so far.
    #[must_use]
    pub fn with_message(self, message: Vec<u8>) -> Self {
        Self { message, ..self }
    }
}

impl Decoder {
    /// What a decoder that has met neither a close frame nor an error holds.
    #[must_use]
    pub fn held(&self) -> Held {
        let Some(partial) = &self.partial else { return Held::default() };
        let frame = |frame: &FrameHeader| HeldFrame {
            opcode: frame.opcode as u8,
            last: frame.last,
            left: frame.left,
            key: frame.key,
        };
        Held {
            head: partial.head[..usize::from(partial.head_length)].to_vec(),
            frame: partial.frame.as_ref().map(frame),
            text: partial.message.as_ref().map(|message| message.text),
            message: partial.message.as_ref().map(|message| message.bytes.clone()).unwrap_or_default(),
            control: partial.control.clone(),
        }
    }

    /// A server's decoder that goes on from there. None when no decoder of a server could have held that.
    #[must_use]
    pub fn server_with(held: Held) -> Option<Self> {
        let Held { head, frame, text, message, control } = held;
        if head.len() >= HEADER_BYTES || control.len() > CONTROL_FRAME_BYTES || (text.is_none() && !message.is_empty())
        {
            return None;
        }
        let frame = match frame {
            None => None,
            Some(HeldFrame { opcode, last, left, key: Some(key) }) if left <= i64::MAX as u64 => {
                let opcode = Opcode::from_bits(opcode)?;
                let most = (CONTROL_FRAME_BYTES - control.len()) as u64;
                if opcode.is_control() && (!last || left > most) {
                    return None;
                }
                Some(FrameHeader { opcode, last, left, key: Some(key) })
            }
            Some(_) => return None,
        };
        let message = match text {
            None => None,
            Some(text) => {
                let mut begun = Message { text, bytes: Vec::new(), checked: 0 };
                begun.append(&message).ok()?;
                Some(begun)
            }
        };
        let mut partial = Partial { head_length: head.len() as u8, frame, message, control, ..Partial::default() };
        partial.head[..head.len()].copy_from_slice(&head);
        let partial = (!partial.is_empty()).then(|| Box::new(partial));
        Some(Self { partial, state: State::Open, peer: Peer::Client })
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::write_masked_frame;
    use super::super::Event;
    use super::*;

    #[test]
    fn a_message_goes_on_with_another_decoder_from_any_cut() {
        let mut input = Vec::new();
        write_masked_frame(&mut input, Opcode::Text, "grüße an alle".as_bytes(), [1, 2, 3, 4]);
        // A text of two fragments with a ping between them.
        let at = input.len();
        write_masked_frame(&mut input, Opcode::Text, "zwei Tei".as_bytes(), [9, 8, 7, 6]);
        input[at] &= 0x7f;
        write_masked_frame(&mut input, Opcode::Ping, b"there?", [5; 4]);
        let at = input.len();
        write_masked_frame(&mut input, Opcode::Text, "le ü".as_bytes(), [4; 4]);
        input[at] &= 0xf0;
        for cut in 0..=input.len() {
            let (mut decoder, mut said) = (Decoder::server(), Vec::new());
            let mut input = input.clone();
            let (first, second) = input.split_at_mut(cut);
            let mut read = |decoder: &mut Decoder, mut bytes: &mut [u8]| {
                while let Some(event) = decoder.next(&mut bytes, 100).unwrap() {
                    said.push(match event {
                        Event::Text(text) => text.into_owned(),
                        Event::Ping(payload) => format!("ping {}", String::from_utf8_lossy(&payload)),
                        other => panic!("{other:?}"),
                    });
                }
            };
            read(&mut decoder, first);
            let held = decoder.held();
            let told: Held = serde_json::from_str(&serde_json::to_string(&held).unwrap()).unwrap();
            let mut decoder = Decoder::server_with(told.with_message(held.message().to_vec())).unwrap();
            read(&mut decoder, second);
            assert_eq!(said, ["grüße an alle", "ping there?", "zwei Teile ü"], "cut at {cut}");
            assert!(decoder.is_idle());
        }
    }

    #[test]
    fn what_no_decoder_holds_is_refused() {
        let held = |json: &str| serde_json::from_str::<Held>(json).unwrap();
        for json in [
            r#"{"head":[1,2,3,4,5,6,7,8,9,10,11,12,13,14]}"#,
            r#"{"frame":{"opcode":3,"last":true,"left":1,"key":[0,0,0,0]}}"#,
            r#"{"frame":{"opcode":1,"last":true,"left":1,"key":null}}"#,
            r#"{"frame":{"opcode":9,"last":false,"left":1,"key":[0,0,0,0]}}"#,
            r#"{"frame":{"opcode":9,"last":true,"left":126,"key":[0,0,0,0]}}"#,
            r#"{"frame":{"opcode":1,"last":true,"left":9223372036854775808,"key":[0,0,0,0]}}"#,
        ] {
            assert!(Decoder::server_with(held(json)).is_none(), "{json}");
        }
        assert!(Decoder::server_with(held("{}").with_message(b"x".to_vec())).is_none());
        assert!(Decoder::server_with(held(r#"{"text":true}"#).with_message(b"\xff".to_vec())).is_none());
        assert!(Decoder::server_with(held("{}")).unwrap().is_idle());
    }
}
