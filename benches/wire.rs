//! The codecs, without sockets.

use std::borrow::Cow;
use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use serde::Deserialize;
use serde_json::value::RawValue;
use simd_json::BorrowedValue;
use simd_json::prelude::*;
use weir::limits::CLIENT_EVENT_BYTES;
use weir::wire::websocket::{self, Decoder, Event, Opcode};
use weir::wire::{centrifugo, http1, sse};

/// Payload bytes: a small command, a usual broadcast, the largest message a client may send by default.
const SIZES: [usize; 3] = [32, 200, 64 * 1024];
/// Bytes in one read of a busy connection: what a decoder is fed at a time.
const READ_BYTES: usize = 4096;
/// Unmasking with it changes nothing and costs the same, so one buffer can be decoded again and again.
const KEY: [u8; 4] = [0; 4];

/// Masked frames, as many as fill one read and at least one.
fn masked_frames(opcode: Opcode, payload: &[u8]) -> Vec<u8> {
    let mut frames = Vec::new();
    for _ in 0..(READ_BYTES / payload.len()).max(1) {
        websocket::write_masked_frame(&mut frames, opcode, payload, KEY);
    }
    frames
}

/// Payload bytes of all messages in `input`, which is fed `step` bytes at a time.
fn decode(decoder: &mut Decoder, input: &mut [u8], step: usize) -> usize {
    let mut decoded = 0;
    for mut piece in input.chunks_mut(step) {
        while let Some(event) = decoder.next(&mut piece, usize::MAX).expect("the frames are valid") {
            decoded += match event {
                Event::Text(text) => text.len(),
                Event::Binary(bytes) => bytes.len(),
                other => panic!("{other:?} was not sent"),
            };
        }
    }
    decoded
}

fn websocket_decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("websocket/decode");
    for size in SIZES {
        let payload = vec![b'x'; size];
        // A cut in each frame: nothing is borrowed, everything is assembled.
        let cut = size / 2 + 1;
        let cases = [
            ("text", Opcode::Text, usize::MAX),
            ("binary", Opcode::Binary, usize::MAX),
            ("text, cut", Opcode::Text, cut),
        ];
        for (name, opcode, step) in cases {
            let mut input = masked_frames(opcode, &payload);
            let mut decoder = Decoder::server();
            let expected = (READ_BYTES / size).max(1) * size;
            assert_eq!(decode(&mut decoder, &mut input, step), expected);
            group.throughput(Throughput::Bytes(input.len() as u64));
            group.bench_function(format!("{name}, {size} B"), |bencher| {
                bencher.iter(|| decode(&mut decoder, black_box(&mut input), step));
            });
        }
    }
    group.finish();
}

fn websocket_encode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("websocket/encode");
    for size in SIZES {
        let payload = vec![b'x'; size];
        let mut out = Vec::new();
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(format!("server, {size} B"), |bencher| {
            bencher.iter(|| {
                out.clear();
                websocket::write_header(&mut out, Opcode::Text, black_box(&payload).len());
                out.extend_from_slice(&payload);
                black_box(&out);
            });
        });
        group.bench_function(format!("client, {size} B"), |bencher| {
            bencher.iter(|| {
                out.clear();
                websocket::write_masked_frame(&mut out, Opcode::Text, black_box(&payload), black_box(KEY));
                black_box(&out);
            });
        });
    }
    group.finish();
}

/// A publication of 200 B such as services send: names, numbers, a text.
const PAYLOAD: &str = concat!(
    r#"{"id":918273645,"symbol":"WEIR","bid":101.25,"ask":101.5,"volume":1844670,"open":false,"#,
    r#""tags":["spot","eu","edge"],"at":"2025-06-01T12:00:00.123Z","#,
    r#""note":"a publication of two hundred bytes is usual"}"#
);
const _: () = assert!(PAYLOAD.len() == 200);

fn http(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("http1");
    let browser = concat!(
        "GET /sse?channel=news HTTP/1.1\r\nHost: weir.example:8080\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) ",
        "Gecko/20100101 Firefox/128.0\r\nAccept: text/event-stream\r\nAccept-Language: en-US,en;q=0.5\r\n",
        "Accept-Encoding: gzip, deflate, br, zstd\r\nReferer: https://shop.example/\r\nOrigin: https://shop.example\r\n",
        "Connection: keep-alive\r\nSec-Fetch-Dest: empty\r\nSec-Fetch-Mode: cors\r\nSec-Fetch-Site: cross-site\r\n",
        "Pragma: no-cache\r\nCache-Control: no-cache\r\nLast-Event-ID: 4bc7bc46.01991c37.1\r\n\r\n"
    );
    let publisher = "POST /publish/news HTTP/1.1\r\nHost: weir.example:8080\r\nContent-Length: 200\r\n\r\n";
    for (name, head) in [("a browser's", browser), ("a publisher's", publisher)] {
        let parsed = http1::parse_head(head.as_bytes()).expect("a head");
        assert_eq!(parsed.expect("it is complete").1, head.len());
        group.throughput(Throughput::Bytes(head.len() as u64));
        group.bench_function(format!("parse {name} head"), |bencher| {
            bencher.iter(|| http1::parse_head(black_box(head.as_bytes())));
        });
    }
    group.finish();
}

fn events(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sse");
    let encode = |out: &mut Vec<u8>| {
        out.clear();
        sse::write_data(out, black_box(PAYLOAD));
        sse::write_id(out, |out| out.extend_from_slice(b"4bc7bc46.01991c37.1"));
        sse::end_event(out);
    };
    let mut out = Vec::new();
    encode(&mut out);
    let stream = out.repeat(READ_BYTES / out.len());
    group.throughput(Throughput::Bytes(out.len() as u64));
    group.bench_function("encode, 200 B", |bencher| bencher.iter(|| encode(&mut out)));
    for (name, step) in [("parse whole reads, 200 B", usize::MAX), ("parse, cut every 100 B", 100)] {
        let mut parser = sse::EventParser::new(CLIENT_EVENT_BYTES);
        let mut parse = || {
            let mut events = 0;
            for piece in stream.chunks(step.min(stream.len())) {
                let fed = parser.feed(black_box(piece), |item| {
                    events += usize::from(matches!(item, sse::Item::Event { data: PAYLOAD, .. }));
                });
                fed.expect("no event is too large");
            }
            events
        };
        assert_eq!(parse(), stream.len() / out.len());
        group.throughput(Throughput::Bytes(stream.len() as u64));
        group.bench_function(name, |bencher| bencher.iter(&mut parse));
    }
    group.finish();
}

fn centrifugo(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("centrifugo");
    let recovering = concat!(
        r#"{"id":2,"subscribe":{"channel":"news","recover":true,"epoch":"01991c37","offset":41}}"#,
        "\n",
        r#"{"id":3,"subscribe":{"channel":"weather"}}"#
    );
    let publish = format!(r#"{{"id":4,"publish":{{"channel":"news","data":{PAYLOAD}}}}}"#);
    for (name, text) in [("two subscribes", recovering), ("a publish of 200 B", &publish), ("a pong", "{}")] {
        assert!(centrifugo::commands(text).all(|command| command.is_ok()));
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function(format!("parse {name}"), |bencher| {
            bencher.iter(|| centrifugo::commands(black_box(text)).filter(Result::is_ok).count());
        });
    }
    let mut out = Vec::new();
    group.throughput(Throughput::Bytes(PAYLOAD.len() as u64));
    for (name, data) in [("JSON", PAYLOAD), ("plain text", &PAYLOAD[1..])] {
        group.bench_function(format!("write a publication push, 200 B of {name}"), |bencher| {
            bencher.iter(|| {
                out.clear();
                centrifugo::write_publication_push(&mut out, "news", Some(42), black_box(data))
            });
        });
    }
    group.finish();
}

/// What `POST /api/publish` is parsed into: each payload stays the text the publisher wrote.
#[derive(Deserialize)]
struct RawRequest<'a> {
    #[serde(borrow)]
    publications: Vec<RawEntry<'a>>,
}

#[derive(Deserialize)]
struct RawEntry<'a> {
    #[serde(borrow)]
    channel: Cow<'a, str>,
    #[serde(borrow)]
    data: &'a RawValue,
}

/// The decision behind `POST /api/publish`: serde_json's raw values against simd-json, with what each must do to get the
/// payload's text, and simd-json's tape alone as the least it could do.
fn publish_body(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("publish body");
    for count in [1, 100] {
        let entry = format!(r#"{{"channel":"news","data":{PAYLOAD}}}"#);
        let body = format!(r#"{{"publications":[{}]}}"#, vec![entry; count].join(",")).into_bytes();
        group.throughput(Throughput::Bytes(body.len() as u64));
        let raw = |body: &[u8]| {
            let text = std::str::from_utf8(body).expect("UTF-8");
            let request: RawRequest<'_> = serde_json::from_str(text).expect("JSON");
            let lengths = request.publications.iter().map(|entry| entry.channel.len() + entry.data.get().len());
            lengths.sum::<usize>()
        };
        // It has no raw values: a payload becomes a tree that has to be written again.
        let tree = |body: &mut [u8]| {
            let request = simd_json::to_borrowed_value(body).expect("JSON");
            let entries = request["publications"].as_array().expect("a list").iter();
            let length = |entry: &BorrowedValue<'_>| {
                entry["channel"].as_str().expect("a name").len() + entry["data"].encode().len()
            };
            entries.map(length).sum::<usize>()
        };
        assert_eq!(raw(&body), count * ("news".len() + PAYLOAD.len()));
        assert_eq!(tree(&mut body.clone()), count * ("news".len() + PAYLOAD.len()));
        // simd-json parses in place: it gets a fresh copy each time, which is not measured.
        group.bench_function(format!("{count}: serde_json, raw values"), |bencher| {
            bencher.iter_batched_ref(|| body.clone(), |body| raw(body), BatchSize::SmallInput);
        });
        group.bench_function(format!("{count}: simd-json, payloads written again"), |bencher| {
            bencher.iter_batched_ref(|| body.clone(), |body| tree(body), BatchSize::SmallInput);
        });
        group.bench_function(format!("{count}: simd-json, tape only"), |bencher| {
            let tape = |body: &mut Vec<u8>| simd_json::to_tape(body).map(|tape| tape.0.len()).expect("JSON");
            bencher.iter_batched_ref(|| body.clone(), tape, BatchSize::SmallInput);
        });
    }
    group.finish();
}

criterion_group!(wire, websocket_decode, websocket_encode, http, events, centrifugo, publish_body);
criterion_main!(wire);
