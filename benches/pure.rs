//! The log and the pure half of a shard, without a kernel: what weir does for a delivery beside the send itself.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use paper::{EPOCH, PAYLOAD_BYTES, Shard, frame, payload};
use weir::limits::{CHANNELS_PER_CONNECTION, LAG_MESSAGES, LOG_MESSAGES};
use weir::log::channel_log::{Bounds, ChannelLog};
use weir::log::frame::{ChannelBlocks, FrameEncoder, FrameKind};
use weir::log::position::{ChannelTag, CursorEntry, Position, parse_cursor, write_entry};
use weir::settings::Settings;
use weir::shard::sink::Event;
use weir::wire::websocket::{Opcode, write_masked_frame};

mod paper;

/// Subscribers of the usual measurements: one, some, and what one core is expected to serve.
const SUBSCRIBERS: [usize; 3] = [1, 100, 5_000];

fn append(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("log");
    let bounds = Bounds::from(&Settings::default().history);
    let mut log = ChannelLog::new(Position { epoch: EPOCH, offset: 0 });
    let frame = frame("news", 1);
    for _ in 0..LOG_MESSAGES {
        log.append(frame.clone(), 0, bounds);
    }
    group.throughput(Throughput::Elements(1));
    // Every append pushes the oldest frame out.
    group.bench_function("append to a full log", |bencher| {
        bencher.iter(|| log.append(black_box(&frame).clone(), 0, bounds));
    });
    assert_eq!(log.since(0).len(), LOG_MESSAGES);
    group.finish();
}

fn encode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("encode");
    for bytes in [PAYLOAD_BYTES, 4_096] {
        let data = payload(bytes);
        let (mut encoder, mut blocks) = (FrameEncoder::default(), ChannelBlocks::default());
        let mut offset = 0;
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(format!("every format, {bytes} B"), |bencher| {
            bencher.iter(|| {
                offset += 1;
                let position = Position { epoch: EPOCH, offset };
                encoder.encode(&mut blocks, "news", FrameKind::Publication, position, black_box(&data), 0)
            });
        });
    }
    group.finish();
}

fn cursor(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cursor");
    for channels in [1, CHANNELS_PER_CONNECTION] {
        let entries: Vec<CursorEntry> = (0..channels)
            .map(|n| CursorEntry {
                tag: ChannelTag::of(&format!("channel-{n}")),
                position: Position { epoch: EPOCH, offset: 1_000 + n as u64 },
            })
            .collect();
        let mut text = Vec::new();
        let write = |text: &mut Vec<u8>| {
            text.clear();
            for &entry in &entries {
                if !text.is_empty() {
                    text.push(b',');
                }
                write_entry(text, black_box(entry));
            }
        };
        write(&mut text);
        let written = String::from_utf8(text.clone()).expect("a cursor is text");
        assert_eq!(parse_cursor(&written, channels).expect("a cursor"), entries);
        group.throughput(Throughput::Elements(channels as u64));
        group.bench_function(BenchmarkId::new("write", channels), |bencher| bencher.iter(|| write(&mut text)));
        group.bench_function(BenchmarkId::new("parse", channels), |bencher| {
            bencher.iter(|| parse_cursor(black_box(&written), channels));
        });
    }
    group.finish();
}

/// Everyone is caught up: one publication, one shared send a subscriber.
fn drain_caught_up(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("drain/caught up");
    for subscribers in SUBSCRIBERS {
        let shards = [("SSE", Shard::with_streams(1, subscribers)), ("WebSocket", Shard::with_websockets(subscribers))];
        for (name, mut shard) in shards {
            let (sends, deliveries) = (shard.sink.sends, shard.metrics.deliveries.get());
            shard.publish(0);
            shard.drain();
            assert_eq!(shard.sink.sends - sends, subscribers as u64);
            assert_eq!(shard.metrics.deliveries.get() - deliveries, subscribers as u64);
            group.throughput(Throughput::Elements(subscribers as u64));
            group.bench_function(BenchmarkId::new(name, subscribers), |bencher| {
                bencher.iter(|| {
                    shard.publish(0);
                    shard.drain();
                });
            });
        }
    }
    group.finish();
}

/// Everyone's socket fills, then takes bytes again: refused sends, cursors of their own, sends of their own, and back into
/// the group. An element is a delivery.
fn drain_behind(criterion: &mut Criterion) {
    const SUBSCRIBERS: usize = 1_000;
    let mut group = criterion.benchmark_group("drain/fall behind and catch up");
    for publications in [1, 32, LAG_MESSAGES] {
        for (name, mut shard) in
            [("SSE", Shard::with_streams(1, SUBSCRIBERS)), ("WebSocket", Shard::with_websockets(SUBSCRIBERS))]
        {
            let due = publications * SUBSCRIBERS as u64;
            let deliveries = shard.metrics.deliveries.get();
            shard.fall_behind(publications);
            assert_eq!(shard.metrics.lagging.get(), SUBSCRIBERS as u64);
            shard.catch_up();
            assert_eq!(shard.metrics.lagging.get(), 0);
            assert_eq!(shard.metrics.deliveries.get() - deliveries, due);
            group.throughput(Throughput::Elements(due));
            group.bench_function(BenchmarkId::new(name, publications), |bencher| {
                bencher.iter(|| {
                    shard.fall_behind(publications);
                    shard.catch_up();
                });
            });
        }
    }
    group.finish();
}

/// Streams of many channels: each delivery has an id of the connection's own.
fn drain_many_channels(criterion: &mut Criterion) {
    const STREAMS: usize = 1_000;
    let mut group = criterion.benchmark_group("drain/streams of many channels");
    for channels in [2, 16, CHANNELS_PER_CONNECTION] {
        let mut shard = Shard::with_streams(channels, STREAMS);
        let deliveries = shard.metrics.deliveries.get();
        shard.publish(0);
        shard.drain();
        assert_eq!(shard.metrics.deliveries.get() - deliveries, STREAMS as u64);
        let mut next = 0;
        group.throughput(Throughput::Elements(STREAMS as u64));
        group.bench_function(BenchmarkId::from_parameter(channels), |bencher| {
            bencher.iter(|| {
                next = (next + 1) % channels;
                shard.publish(next);
                shard.drain();
            });
        });
    }
    group.finish();
}

/// A client's commands, from masked bytes to the replies that were sent.
fn session(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("session");
    // The second client keeps the channel open while the first one leaves it.
    let mut shard = Shard::with_websockets(2);
    let slot = shard.slots[0];
    let commands = |text: &str| {
        let mut frame = Vec::new();
        // Unmasking with zeros changes nothing, so the same bytes can be handled again and again.
        write_masked_frame(&mut frame, Opcode::Text, text.as_bytes(), [0; 4]);
        frame
    };
    let cases = [
        ("ping", commands(r#"{"id":3,"ping":{}}"#), 1),
        (
            "unsubscribe and subscribe",
            commands(
                "{\"id\":4,\"unsubscribe\":{\"channel\":\"channel-0\"}}\n{\"id\":5,\"subscribe\":{\"channel\":\"channel-0\"}}",
            ),
            2,
        ),
        ("history of no entries", commands(r#"{"id":6,"history":{"channel":"channel-0"}}"#), 1),
    ];
    for (name, mut frame, count) in cases {
        group.throughput(Throughput::Elements(count));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                shard.core.on_event(Event::Received(slot, &mut frame), 0);
                shard.drain();
            });
        });
        assert_eq!(shard.metrics.subscriptions.get(), 2, "the client is still connected and subscribed");
    }
    group.finish();
}

criterion_group!(pure, append, encode, cursor, drain_caught_up, drain_behind, drain_many_channels, session);
criterion_main!(pure);
