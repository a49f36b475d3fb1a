use super::*;
use crate::wire::websocket::{write_close, write_header, write_masked_frame};

const KEY: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];
const MAX: usize = 100_000;

/// A masked frame with any first byte: FIN, reserved bits and opcode as given.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    write_masked_frame(&mut out, Opcode::Text, payload, KEY);
    out[0] = first;
    out
}

/// Feeds `input` and returns copies of the events, up to an error if there is one.
fn feed(decoder: &mut Decoder, input: &[u8]) -> (Vec<Event<'static>>, Option<ProtocolError>) {
    let mut input = input.to_vec();
    let mut input = &mut input[..];
    let mut events = Vec::new();
    loop {
        match decoder.next(&mut input, MAX) {
            Ok(Some(event)) => events.push(owned(event)),
            Ok(None) => {
                assert!(input.is_empty(), "all input is taken when there is no event");
                return (events, None);
            }
            Err(error) => return (events, Some(error)),
        }
    }
}

fn owned(event: Event<'_>) -> Event<'static> {
    match event {
        Event::Text(text) => Event::Text(Cow::Owned(text.into_owned())),
        Event::Binary(bytes) => Event::Binary(Cow::Owned(bytes.into_owned())),
        Event::Ping(bytes) => Event::Ping(Cow::Owned(bytes.into_owned())),
        Event::Pong(bytes) => Event::Pong(Cow::Owned(bytes.into_owned())),
        Event::Close { code, reason } => Event::Close { code, reason: Cow::Owned(reason.into_owned()) },
    }
}

fn one_shot(input: &[u8]) -> (Vec<Event<'static>>, Option<ProtocolError>) {
    feed(&mut Decoder::server(), input)
}

fn refusal(input: &[u8]) -> ProtocolError {
    let (events, error) = one_shot(input);
    assert_eq!(events, [], "nothing is delivered of a bad frame");
    error.expect("the frame is bad")
}

fn text(text: &str) -> Event<'_> {
    Event::Text(Cow::Borrowed(text))
}

/// xorshift64*: the seeds are fixed, so a failure repeats.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }
}

#[test]
fn a_whole_message_is_borrowed_from_the_input() {
    let mut input = [frame(0x81, b"Hello"), frame(0x82, &[0, 255]), frame(0x89, b"p")].concat();
    let range = input.as_ptr_range();
    let mut input = &mut input[..];
    let mut decoder = Decoder::server();
    let inside = |bytes: &[u8]| range.contains(&bytes.as_ptr());

    let Some(Event::Text(Cow::Borrowed(text))) = decoder.next(&mut input, MAX).unwrap() else { panic!("copied") };
    assert!(text == "Hello" && inside(text.as_bytes()));
    let Some(Event::Binary(Cow::Borrowed(bytes))) = decoder.next(&mut input, MAX).unwrap() else { panic!("copied") };
    assert!(bytes == [0, 255] && inside(bytes));
    let Some(Event::Ping(Cow::Borrowed(bytes))) = decoder.next(&mut input, MAX).unwrap() else { panic!("copied") };
    assert!(bytes == b"p" && inside(bytes));
    assert_eq!(decoder.next(&mut input, MAX), Ok(None));
    assert!(decoder.is_idle());
}

#[test]
fn a_payload_that_arrives_apart_from_its_header_is_still_borrowed() {
    let mut message = frame(0x81, b"Hello");
    let (mut header, mut payload) = message.split_at_mut(6);
    let mut decoder = Decoder::server();
    assert_eq!(decoder.next(&mut header, MAX), Ok(None));
    assert!(!decoder.is_idle());
    assert_eq!(decoder.next(&mut payload, MAX), Ok(Some(text("Hello"))));
    assert!(decoder.is_idle());
}

#[test]
fn control_frames_come_between_the_fragments_of_a_message() {
    let input = [frame(0x01, b"Hel"), frame(0x89, b"ping"), frame(0x00, b""), frame(0x8a, b""), frame(0x80, b"lo")];
    let (events, error) = one_shot(&input.concat());
    assert_eq!(error, None);
    let ping = Event::Ping(Cow::Borrowed(b"ping".as_slice()));
    let pong = Event::Pong(Cow::Borrowed(b"".as_slice()));
    assert_eq!(events, [ping, pong, text("Hello")]);
}

#[test]
fn every_length_form() {
    for length in [0, 1, 125, 126, 127, 65_535, 65_536, MAX] {
        let payload = vec![b'x'; length];
        let (events, error) = one_shot(&frame(0x82, &payload));
        assert_eq!((events, error), (vec![Event::Binary(Cow::Owned(payload))], None), "{length} bytes");
    }
}

#[test]
fn memory_is_freed_with_each_message() {
    let mut decoder = Decoder::server();
    let whole = [frame(0x01, "é".as_bytes()), frame(0x89, b"ping"), frame(0x80, b"!")].concat();
    for _ in 0..2 {
        for (at, byte) in whole.iter().enumerate() {
            assert_eq!(decoder.is_idle(), at == 0, "before byte {at}");
            feed(&mut decoder, &[*byte]);
        }
        assert!(decoder.is_idle(), "after the message");
    }
    feed(&mut decoder, &whole[..3]);
    feed(&mut decoder, &frame(0xff, b""));
    assert!(decoder.is_idle(), "after a failure");
}

#[test]
fn a_promised_length_reserves_no_memory() {
    let mut decoder = Decoder::server();
    let promise = frame(0x82, &vec![0; MAX]);
    feed(&mut decoder, &promise[..64]);
    let message = decoder.partial.as_ref().unwrap().message.as_ref().unwrap();
    assert_eq!(message.bytes.len(), 50);
    assert!(message.bytes.capacity() < 1_000);
}

#[test]
fn each_violation_has_its_error() {
    use ProtocolError::*;
    let mut unmasked = Vec::new();
    write_header(&mut unmasked, Opcode::Text, 0);
    assert_eq!(refusal(&unmasked), Unmasked);
    for bit in [0x40, 0x20, 0x10] {
        assert_eq!(refusal(&frame(0x81 | bit, b"")), ReservedBits);
    }
    for opcode in [3, 4, 5, 6, 7, 11, 12, 13, 14, 15] {
        assert_eq!(refusal(&frame(0x80 | opcode, b"")), ReservedOpcode(opcode));
    }
    for opcode in [8, 9, 10] {
        assert_eq!(refusal(&frame(opcode, b"")), FragmentedControl);
        assert_eq!(refusal(&frame(0x80 | opcode, &[b'x'; 126])), ControlTooLong);
    }
    assert_eq!(refusal(&[0x81, 0x80 | 126, 0, 125]), LengthNotMinimal);
    assert_eq!(refusal(&[0x81, 0x80 | 127, 0, 0, 0, 0, 0, 0, 0xff, 0xff]), LengthNotMinimal);
    assert_eq!(refusal(&[0x81, 0x80 | 127, 0x80, 0, 0, 0, 0, 0, 0, 0]), LengthTooLarge);
    assert_eq!(refusal(&frame(0x80, b"x")), UnexpectedContinuation);
    assert_eq!(refusal(&frame(0x00, b"x")), UnexpectedContinuation);
    for opcode in [0x81, 0x82] {
        assert_eq!(refusal(&[frame(0x01, b"x"), frame(opcode, b"y")].concat()), ExpectedContinuation);
    }
    assert_eq!(refusal(&frame(0x88, &[3])), CloseTruncated);
    for error in [Unmasked, ReservedBits, CloseTruncated, CloseCode(0)] {
        assert_eq!(error.close_code(), 1002);
    }
    assert_eq!((InvalidUtf8.close_code(), TooBig.close_code()), (1007, 1009));
}

#[test]
fn close_codes_that_may_travel_and_those_that_may_not() {
    for code in [1000u16, 1003, 1007, 1011, 1014, 3000, 3999, 4000, 4999] {
        let (events, error) = one_shot(&frame(0x88, &[&code.to_be_bytes()[..], "é".as_bytes()].concat()));
        assert_eq!((events, error), (vec![Event::Close { code: Some(code), reason: "é".into() }], None));
    }
    for code in [0u16, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65_535] {
        assert_eq!(refusal(&frame(0x88, &code.to_be_bytes())), ProtocolError::CloseCode(code));
    }
    assert_eq!(one_shot(&frame(0x88, b"")).0, [Event::Close { code: None, reason: "".into() }]);
    assert_eq!(refusal(&frame(0x88, &[0x03, 0xe8, 0xff])), ProtocolError::InvalidUtf8);
}

#[test]
fn nothing_is_decoded_after_a_close_frame() {
    let mut decoder = Decoder::server();
    let (events, error) = feed(&mut decoder, &[frame(0x88, b""), frame(0x81, b"late"), vec![0xff, 0xff]].concat());
    assert_eq!((events.len(), error), (1, None));
    assert_eq!(feed(&mut decoder, &frame(0x89, b"")), (vec![], None));
}

#[test]
fn a_failed_decoder_keeps_failing() {
    let mut decoder = Decoder::server();
    let failed = (vec![], Some(ProtocolError::ReservedBits));
    assert_eq!(feed(&mut decoder, &frame(0xc1, b"")), failed);
    assert_eq!(feed(&mut decoder, &frame(0x81, b"fine")), failed);
}

#[test]
fn a_message_too_big_is_refused_at_its_header() {
    let whole = frame(0x81, &vec![b'x'; MAX + 1]);
    assert_eq!(refusal(&whole[..14]), ProtocolError::TooBig);
    assert_eq!(refusal(&[0x82, 0xff, 0x7f, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 0]), ProtocolError::TooBig);

    // Over all fragments: the first fills the bound, an empty one may follow, one more byte may not.
    let full = [frame(0x01, &vec![b'x'; MAX]), frame(0x00, b"")].concat();
    assert_eq!(one_shot(&full), (vec![], None));
    assert_eq!(refusal(&[full, frame(0x80, b"y")[..6].to_vec()].concat()), ProtocolError::TooBig);
}

#[test]
fn invalid_text_fails_at_the_first_byte_that_makes_it_so() {
    // (bytes before, the byte that cannot follow): overlong forms, a surrogate, above U+10FFFF, a stray continuation, a cut character.
    let cases: [(&[u8], u8); 6] =
        [(b"\xc1", 0x80), (b"\xe0", 0x80), (b"\xed", 0xa0), (b"\xf4", 0x90), (b"ok", 0x80), (b"\xe2\x82", b'x')];
    for (before, bad) in cases {
        let payload = [before, &[bad], b"the rest never comes"].concat();
        for first in [0x01, 0x81] {
            let bytes = frame(first, &payload);
            let mut decoder = Decoder::server();
            // 0xc1 begins nothing valid: it fails by itself.
            let fails_at = 6 + before.len() - usize::from(before == b"\xc1");
            for (at, byte) in bytes[..=fails_at].iter().enumerate() {
                let (events, error) = feed(&mut decoder, &[*byte]);
                assert_eq!(events, []);
                assert_eq!(error, (at == fails_at).then_some(ProtocolError::InvalidUtf8), "byte {at} of {payload:x?}");
            }
        }
    }
}

#[test]
fn a_character_may_be_split_over_fragments_but_not_over_messages() {
    let euro = "€".as_bytes();
    let split = [frame(0x01, &euro[..1]), frame(0x00, &euro[1..2]), frame(0x80, &euro[2..])].concat();
    assert_eq!(one_shot(&split), (vec![text("€")], None));

    assert_eq!(refusal(&frame(0x81, &euro[..2])), ProtocolError::InvalidUtf8);
    assert_eq!(refusal(&[frame(0x01, b"ok"), frame(0x80, &euro[..2])].concat()), ProtocolError::InvalidUtf8);
}

#[test]
fn the_client_takes_what_the_server_sends() {
    let mut input = Vec::new();
    write_header(&mut input, Opcode::Text, 2);
    input.extend_from_slice(b"hi");
    write_close(&mut input, 3008, "slow");
    let expected = vec![text("hi"), Event::Close { code: Some(3008), reason: "slow".into() }];
    assert_eq!(feed(&mut Decoder::client(), &input), (expected, None));
    assert_eq!(feed(&mut Decoder::client(), &frame(0x81, b"x")), (vec![], Some(ProtocolError::Masked)));
}

/// A valid conversation and the events it means, built without the decoder.
fn conversation(random: &mut Random) -> (Vec<u8>, Vec<Event<'static>>) {
    let (mut bytes, mut events) = (Vec::new(), Vec::new());
    for _ in 0..1 + random.below(4) {
        let is_text = random.below(2) == 0;
        // A 64-bit length now and then only: fed byte by byte, it takes a while.
        let length = if random.below(100) == 0 { 66_000 } else { [0, 3, 20, 125, 126, 300][random.below(6)] };
        let payload: Vec<u8> = match is_text {
            true => "añ€𝄞".chars().cycle().take(length / 3).collect::<String>().into_bytes(),
            false => (0..length).map(|_| random.below(256) as u8).collect(),
        };
        let mut rest = &payload[..];
        let mut opcode = if is_text { 1 } else { 2 };
        loop {
            let last = random.below(3) > 0;
            let (now, later) = rest.split_at(if last { rest.len() } else { random.below(rest.len() + 1) });
            bytes.extend(frame(opcode | if last { 0x80 } else { 0 }, now));
            (rest, opcode) = (later, 0);
            if last {
                break;
            }
            if random.below(2) == 0 {
                let ping: Vec<u8> = (0..random.below(126)).map(|_| random.below(256) as u8).collect();
                bytes.extend(frame(0x89, &ping));
                events.push(Event::Ping(Cow::Owned(ping)));
            }
        }
        events.push(match is_text {
            true => Event::Text(Cow::Owned(String::from_utf8(payload).unwrap())),
            false => Event::Binary(Cow::Owned(payload)),
        });
    }
    (bytes, events)
}

/// Cuts `bytes` into pieces of at most `most` bytes and feeds them one by one.
fn in_pieces(bytes: &[u8], most: usize, random: &mut Random) -> (Vec<Event<'static>>, Option<ProtocolError>) {
    let mut decoder = Decoder::server();
    let (mut rest, mut events) = (bytes, Vec::new());
    while !rest.is_empty() {
        let (now, later) = rest.split_at((1 + random.below(most)).min(rest.len()));
        let (more, error) = feed(&mut decoder, now);
        events.extend(more);
        if error.is_some() {
            return (events, error);
        }
        rest = later;
    }
    (events, None)
}

#[test]
fn however_the_bytes_are_cut_the_events_are_the_same() {
    for seed in 0..200 {
        let random = &mut Random(0x9e37_79b9_7f4a_7c15 ^ (seed << 20));
        let (mut bytes, expected) = conversation(random);
        assert_eq!(one_shot(&bytes), (expected.clone(), None), "seed {seed}");
        for most in [1, 7, 200, 40_000] {
            assert_eq!(in_pieces(&bytes, most, random), (expected.clone(), None), "seed {seed}, pieces up to {most}");
        }
        // The same for damaged conversations: whatever one piece means, many pieces mean, the error included.
        for _ in 0..10 {
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
            let meant = one_shot(&bytes);
            for most in [1, 50] {
                assert_eq!(in_pieces(&bytes, most, random), meant, "seed {seed}, bit flipped in byte {at}");
            }
        }
    }
}
