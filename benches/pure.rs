//! The log and the pure half of a shard, without a kernel: what weir does for a delivery beside the send itself.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use weir::limits::{CHANNELS_PER_CONNECTION, LAG_MESSAGES, LOG_MESSAGES};
use weir::log::channel_log::{Bounds, ChannelLog};
use weir::log::channel_table::{ChannelId, Slot};
use weir::log::frame::{ChannelBlocks, Frame, FrameEncoder, FrameKind, Micros};
use weir::log::position::{ChannelTag, CursorEntry, Epoch, Position, parse_cursor, write_entry};
use weir::metrics::{ShardMetrics, ShardRecorder};
use weir::settings::Settings;
use weir::shard::core::Core;
use weir::shard::mailbox::ToShard;
use weir::shard::sink::{Event, Piece, Short, Sink, Staged, Ticket};
use weir::wire::centrifugo::{SEPARATOR, write_connect_command, write_subscribe_command};
use weir::wire::websocket::{Opcode, write_masked_frame};

/// Bytes of a usual broadcast.
const PAYLOAD_BYTES: usize = 200;
const EPOCH: Epoch = Epoch(9);
/// Subscribers of the usual measurements: one, some, and what one core is expected to serve.
const SUBSCRIBERS: [usize; 3] = [1, 100, 5_000];

fn payload(bytes: usize) -> String {
    format!(r#"{{"text":"{}"}}"#, "x".repeat(bytes - 11))
}

fn frame(channel: &str, offset: u64) -> Arc<Frame> {
    let position = Position { epoch: EPOCH, offset };
    let data = payload(PAYLOAD_BYTES);
    let kind = FrameKind::Publication;
    Arc::new(FrameEncoder::default().encode(&mut ChannelBlocks::default(), channel, kind, position, &data, 0))
}

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

/// A kernel that takes every send at once, or refuses every one.
#[derive(Default)]
struct Null {
    refuses: bool,
    shorts: Vec<Short>,
    sends: u64,
}

impl Null {
    fn take(&mut self, slot: Slot, ticket: Ticket) {
        self.sends += 1;
        if self.refuses {
            self.shorts.push(Short { slot, ticket, taken: Ok(0) });
        }
    }
}

impl Sink for Null {
    unsafe fn stage(&mut self, pieces: &[Piece]) -> Staged {
        black_box(pieces);
        Staged(0)
    }

    fn send(&mut self, slot: Slot, _: Staged, ticket: Ticket) {
        self.take(slot, ticket);
    }

    unsafe fn send_own(&mut self, slot: Slot, pieces: &[Piece], ticket: Ticket) -> bool {
        black_box(pieces);
        self.take(slot, ticket);
        true
    }

    fn settle(&mut self, shorts: &mut Vec<Short>) {
        shorts.append(&mut self.shorts);
    }

    fn now(&self) -> Micros {
        0
    }
}

/// A shard without threads and sockets.
struct Shard {
    core: Core,
    sink: Null,
    metrics: Arc<ShardMetrics>,
    slots: Vec<Slot>,
    channels: Vec<ChannelId>,
    frames: Vec<Arc<Frame>>,
}

impl Shard {
    fn new(channels: usize) -> Self {
        let metrics = Arc::new(ShardMetrics::default());
        let core = Core::new(0, Arc::new(Settings::default()), 7, ShardRecorder::new(metrics.clone()));
        let mut shard = Self { core, sink: Null::default(), metrics, slots: vec![], channels: vec![], frames: vec![] };
        for n in 0..channels {
            let name = format!("channel-{n}");
            let (id, live) = shard.core.reserve(&Arc::from(&*name), 0);
            assert!(!live);
            let position = Position { epoch: EPOCH, offset: 0 };
            shard.core.on_message(ToShard::Live { channel: id, position, frames: Vec::new() }, 0);
            shard.channels.push(id);
            shard.frames.push(frame(&name, 1));
        }
        shard
    }

    /// Adds event streams, each on all channels, and lets them read what they are told at their start.
    fn with_streams(channels: usize, count: usize) -> Self {
        let mut shard = Self::new(channels);
        for _ in 0..count {
            let slot = shard.core.admit_sse(b"head\r\n\r\n", &shard.channels.clone(), &[], 0);
            shard.slots.push(slot);
        }
        shard.drain();
        shard
    }

    /// Adds WebSockets, each subscribed to the only channel.
    fn with_websockets(count: usize) -> Self {
        let mut shard = Self::new(1);
        let command = opening_commands("channel-0");
        for _ in 0..count {
            let slot = shard.core.admit_websocket(b"head\r\n\r\n", &mut command.clone(), 0);
            shard.slots.push(slot);
        }
        shard.drain();
        shard
    }

    fn publish(&mut self, channel: usize) {
        let frame = self.frames[channel].clone();
        self.core.on_message(ToShard::Publication { channel: self.channels[channel], frame }, 0);
    }

    fn drain(&mut self) {
        while self.core.drain(&mut self.sink) {}
        self.core.orders.clear();
    }

    /// Everyone's socket is full: a publication makes everyone fall behind, and more follow.
    fn fall_behind(&mut self, publications: u64) {
        self.sink.refuses = true;
        for _ in 0..publications {
            self.publish(0);
            self.drain();
        }
        self.sink.refuses = false;
    }

    fn catch_up(&mut self) {
        for &slot in &self.slots {
            self.core.on_event(Event::Writable(slot), 0);
        }
        self.drain();
    }
}

/// The masked frame in which a client connects and subscribes.
fn opening_commands(channel: &str) -> Vec<u8> {
    let mut commands = Vec::new();
    write_connect_command(&mut commands, 1, "", "bench");
    commands.push(SEPARATOR);
    write_subscribe_command(&mut commands, 2, channel, None);
    let mut frame = Vec::new();
    write_masked_frame(&mut frame, Opcode::Text, &commands, [0; 4]);
    frame
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
