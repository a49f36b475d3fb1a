//! A shard on paper: the pure half without threads, sockets or a kernel, for the benches that count what weir does for a
//! delivery beside the send itself.

use std::hint::black_box;
use std::sync::Arc;

use weir::log::channel_table::{ChannelId, Slot};
use weir::log::frame::{ChannelBlocks, Frame, FrameEncoder, FrameKind, Micros};
use weir::log::position::{Epoch, Position};
use weir::metrics::{ShardMetrics, ShardRecorder};
use weir::settings::Settings;
use weir::shard::core::Core;
use weir::shard::mailbox::ToShard;
use weir::shard::sink::{Event, Piece, Short, Sink, Staged, Ticket};
use weir::wire::centrifugo::{SEPARATOR, write_connect_command, write_subscribe_command};
use weir::wire::websocket::{Opcode, write_masked_frame};

/// Bytes of a usual broadcast.
pub const PAYLOAD_BYTES: usize = 200;
/// The life of every channel here.
pub const EPOCH: Epoch = Epoch(9);

/// A JSON object of so many bytes.
pub fn payload(bytes: usize) -> String {
    format!(r#"{{"text":"{}"}}"#, "x".repeat(bytes - 11))
}

/// A publication of [`PAYLOAD_BYTES`] in every wire format.
pub fn frame(channel: &str, offset: u64) -> Arc<Frame> {
    let position = Position { epoch: EPOCH, offset };
    let data = payload(PAYLOAD_BYTES);
    let kind = FrameKind::Publication;
    Arc::new(FrameEncoder::default().encode(&mut ChannelBlocks::default(), channel, kind, position, &data, 0))
}

/// A kernel that takes every send at once, or refuses every one.
#[derive(Default)]
pub struct Null {
    refuses: bool,
    shorts: Vec<Short>,
    /// Sends asked for.
    pub sends: u64,
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
pub struct Shard {
    /// The pure half.
    pub core: Core,
    /// In place of a driver.
    pub sink: Null,
    /// What it counts.
    pub metrics: Arc<ShardMetrics>,
    /// Its connections.
    pub slots: Vec<Slot>,
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
    pub fn with_streams(channels: usize, count: usize) -> Self {
        let mut shard = Self::new(channels);
        for _ in 0..count {
            let slot = shard.core.admit_sse(b"head\r\n\r\n", &shard.channels.clone(), &[], 0);
            shard.slots.push(slot);
        }
        shard.drain();
        shard
    }

    /// Adds WebSockets, each subscribed to the only channel.
    pub fn with_websockets(count: usize) -> Self {
        let mut shard = Self::new(1);
        let command = opening_commands("channel-0");
        for _ in 0..count {
            let slot = shard.core.admit_websocket(b"head\r\n\r\n", &mut command.clone(), 0);
            shard.slots.push(slot);
        }
        shard.drain();
        shard
    }

    /// Publishes on a channel.
    pub fn publish(&mut self, channel: usize) {
        let frame = self.frames[channel].clone();
        self.core.on_message(ToShard::Publication { channel: self.channels[channel], frame }, 0);
    }

    /// Runs turns until nothing is left.
    pub fn drain(&mut self) {
        while self.core.drain(&mut self.sink) {}
        self.core.orders.clear();
    }

    /// Everyone's socket is full: a publication makes everyone fall behind, and more follow.
    pub fn fall_behind(&mut self, publications: u64) {
        self.sink.refuses = true;
        for _ in 0..publications {
            self.publish(0);
            self.drain();
        }
        self.sink.refuses = false;
    }

    /// Everyone's socket takes bytes again.
    pub fn catch_up(&mut self) {
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
