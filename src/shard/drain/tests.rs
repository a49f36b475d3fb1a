//! The publish path on real sockets and both drivers, and what it costs in allocations.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::log::channel_table::{ChannelId, Slot};
use crate::log::frame::{ChannelBlocks, FrameEncoder, FrameKind, Micros};
use crate::log::position::{ChannelTag, CursorEntry, Epoch, Position};
use crate::metrics::{ShardMetrics, ShardRecorder};
use crate::settings::Settings;
use crate::shard::core::Core;
use crate::shard::driver::Driver;
use crate::shard::mailbox::{Mailbox, ToShard};
use crate::shard::sink::{Event, Piece, Short, Sink, Staged, Ticket};
use crate::shard::start::DriverKind;
use crate::testing::allocations_in;
use crate::wire::centrifugo;
use crate::wire::websocket::{Opcode, write_masked_frame};

/// A shard without threads, its clients' ends in hand.
struct Bed {
    core: Core,
    driver: Driver,
    listener: TcpListener,
    clients: Vec<TcpStream>,
    channel: ChannelId,
    encoder: FrameEncoder,
    blocks: ChannelBlocks,
    offset: u64,
    metrics: Arc<ShardMetrics>,
}

const NAMES: [&str; 2] = ["news", "weather"];

impl Bed {
    /// A shard with `count` event streams, each of the first `channels` channels.
    fn new(kind: DriverKind, count: usize, channels: usize) -> Self {
        let mut bed = Self::empty(kind, count);
        for _ in 0..count {
            let ids: Vec<ChannelId> = NAMES[..channels].iter().map(|name| bed.open(name)).collect();
            bed.connect();
            bed.core.admit_sse(b"head\r\n\r\n", &ids, &[], 0);
        }
        bed.drain();
        bed
    }

    /// A shard with `count` WebSockets that have subscribed to the first channel.
    fn websockets(kind: DriverKind, count: usize) -> Self {
        let mut bed = Self::empty(kind, count);
        bed.open(NAMES[0]);
        let mut commands = Vec::new();
        centrifugo::write_connect_command(&mut commands, 1, "", "");
        commands.push(centrifugo::SEPARATOR);
        centrifugo::write_subscribe_command(&mut commands, 2, NAMES[0], None);
        let mut early = Vec::new();
        write_masked_frame(&mut early, Opcode::Text, &commands, [0; 4]);
        for _ in 0..count {
            bed.connect();
            bed.core.admit_websocket(b"head\r\n\r\n", &mut early.clone(), 0);
        }
        bed.drain();
        bed
    }

    fn empty(kind: DriverKind, count: usize) -> Self {
        let metrics = Arc::new(ShardMetrics::default());
        let settings = Arc::new(Settings::default());
        let core = Core::new(0, settings, 7, ShardRecorder::new(metrics.clone()));
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let driver = Driver::new(kind, count as u32, &mailbox, || 0).unwrap();
        Self {
            core,
            driver,
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            clients: Vec::new(),
            channel: 0,
            encoder: FrameEncoder::default(),
            blocks: ChannelBlocks::default(),
            offset: 0,
            metrics,
        }
    }

    /// Holds a channel, which is live from then on.
    fn open(&mut self, name: &str) -> ChannelId {
        let (id, live) = self.core.reserve(&Arc::from(name), 0);
        if !live {
            let position = Position { epoch: Epoch(9), offset: 0 };
            self.core.on_message(ToShard::Live { channel: id, position, frames: Vec::new() }, 0);
        }
        id
    }

    /// A new socket at the slot of the next connection.
    fn connect(&mut self) {
        self.clients.push(TcpStream::connect(self.listener.local_addr().unwrap()).unwrap());
        let socket = OwnedFd::from(self.listener.accept().unwrap().0);
        self.driver.adopt(self.core.vacant_slot(), socket).unwrap();
    }

    fn drain(&mut self) {
        loop {
            let more = match &mut self.driver {
                Driver::Uring(uring) => self.core.drain(uring),
                Driver::Epoll(epoll) => self.core.drain(epoll),
            };
            if !more {
                return;
            }
        }
    }

    fn publish(&mut self, data: &str) {
        self.offset += 1;
        let position = Position { epoch: Epoch(9), offset: self.offset };
        let frame = self.encoder.encode(&mut self.blocks, NAMES[0], FrameKind::Publication, position, data, 0);
        self.core.on_message(ToShard::Publication { channel: self.channel, frame: Arc::new(frame) }, 0);
    }

    /// What a client has read when it has read `until`.
    fn read_until(&mut self, client: usize, until: &str) -> String {
        let mut text = Vec::new();
        let mut buffer = [0; 4096];
        while !String::from_utf8_lossy(&text).contains(until) {
            let read = self.clients[client].read(&mut buffer).unwrap();
            assert!(read > 0, "the stream ended early: {}", String::from_utf8_lossy(&text));
            text.extend_from_slice(&buffer[..read]);
        }
        String::from_utf8(text).unwrap()
    }
}

fn everyone_gets_everything_in_order(kind: DriverKind) {
    for channels in [1, 2] {
        let mut bed = Bed::new(kind, 40, channels);
        for n in 0..5 {
            bed.publish(&format!("message {n}"));
            bed.publish(&format!("again {n}"));
            bed.drain();
        }
        let expected: Vec<String> =
            (0..5).flat_map(|n| [format!("data: message {n}"), format!("data: again {n}")]).collect();
        for client in 0..40 {
            let text = bed.read_until(client, "data: again 4\n");
            let data: Vec<&str> = text.lines().filter(|line| line.starts_with("data: ")).collect();
            assert_eq!(data, expected);
        }
        assert_eq!(bed.metrics.deliveries.get(), 400);
    }
}

#[test]
fn everyone_gets_everything_in_order_on_io_uring() {
    everyone_gets_everything_in_order(DriverKind::Uring);
}

#[test]
fn everyone_gets_everything_in_order_on_epoll() {
    everyone_gets_everything_in_order(DriverKind::Epoll);
}

/// What the node loses without an offset leaves a gap that ends where it began. A reader that came back with that very position
/// may lack it all the same.
fn a_gap_that_ends_where_a_reader_came_back_is_told(kind: DriverKind) {
    let mut bed = Bed::empty(kind, 1);
    let ids = NAMES.map(|name| bed.open(name));
    let position = Position { epoch: Epoch(9), offset: 0 };
    let resume = CursorEntry { tag: ChannelTag::of(NAMES[0]), position };
    bed.connect();
    bed.core.admit_sse(b"head\r\n\r\n", &ids, &[resume], 0);
    bed.drain();
    let gap = bed.encoder.encode(&mut bed.blocks, NAMES[0], FrameKind::Gap, position, r#"{"lost":true}"#, 0);
    bed.core.on_message(ToShard::Publication { channel: ids[0], frame: Arc::new(gap) }, 0);
    bed.publish("the end");
    bed.drain();
    let text = bed.read_until(0, "data: the end\n");
    assert_eq!(text.matches("event: gap\ndata: {\"lost\":true}\n").count(), 1, "{text}");
}

#[test]
fn a_gap_that_ends_where_a_reader_came_back_is_told_on_io_uring() {
    a_gap_that_ends_where_a_reader_came_back_is_told(DriverKind::Uring);
}

#[test]
fn a_gap_that_ends_where_a_reader_came_back_is_told_on_epoll() {
    a_gap_that_ends_where_a_reader_came_back_is_told(DriverKind::Epoll);
}

/// A socket that stops taking bytes makes its connection *behind*; when it reads again nothing is missing, and several
/// frames leave in one send.
fn a_full_socket_catches_up(kind: DriverKind) {
    let mut bed = Bed::new(kind, 2, 1);
    let filler = "x".repeat(30_000);
    let mut last = 0;
    while bed.metrics.lagging.get() < 2 {
        last += 1;
        bed.publish(&format!("{last} {filler}"));
        bed.drain();
        let orders: Vec<_> = bed.core.orders.drain(..).collect();
        orders.into_iter().for_each(|order| bed.driver.order(order));
        bed.driver.submit();
        assert!(last < 1000, "the socket never fills");
    }
    bed.publish("the end");
    let mut clients: Vec<TcpStream> = bed.clients.iter().map(|client| client.try_clone().unwrap()).collect();
    let reader = std::thread::spawn(move || {
        let mut texts = Vec::new();
        for client in &mut clients {
            let mut text = Vec::new();
            let mut buffer = vec![0; 1 << 16];
            while !text.ends_with(b"\n\n")
                || !String::from_utf8_lossy(&text[text.len().saturating_sub(100)..]).contains("data: the end")
            {
                let read = client.read(&mut buffer).unwrap();
                assert!(read > 0);
                text.extend_from_slice(&buffer[..read]);
            }
            texts.push(String::from_utf8(text).unwrap());
        }
        texts
    });
    let begun = std::time::Instant::now();
    while !reader.is_finished() {
        assert!(begun.elapsed().as_secs() < 20, "never caught up");
        let Bed { core, driver, .. } = &mut bed;
        driver.reap(&mut |event| core.on_event(event, 0));
        bed.drain();
        let orders: Vec<_> = bed.core.orders.drain(..).collect();
        orders.into_iter().for_each(|order| bed.driver.order(order));
        bed.driver.submit();
        std::thread::yield_now();
    }
    for text in reader.join().unwrap() {
        let numbers: Vec<u32> =
            text.lines().filter_map(|line| line.strip_prefix("data: ")?.split_once(' ')?.0.parse().ok()).collect();
        assert_eq!(numbers, (1..=last).collect::<Vec<u32>>());
    }
    assert_eq!(bed.metrics.deliveries.get(), u64::from(2 * last + 2));
    assert_eq!(bed.metrics.lagging.get(), 0);
}

#[test]
fn a_full_socket_catches_up_on_io_uring() {
    a_full_socket_catches_up(DriverKind::Uring);
}

#[test]
fn a_full_socket_catches_up_on_epoll() {
    a_full_socket_catches_up(DriverKind::Epoll);
}

/// Allocations of ten publications to so many caught-up subscribers.
fn allocations_of_publications(mut bed: Bed) -> u64 {
    // The first publications grow what is kept.
    for _ in 0..40 {
        bed.publish("warm");
        bed.drain();
    }
    let before = bed.metrics.deliveries.get();
    let allocations = allocations_in(|| {
        for _ in 0..10 {
            bed.publish(r#"{"hello":1}"#);
            bed.drain();
        }
    });
    assert_eq!(bed.metrics.deliveries.get() - before, 10 * bed.clients.len() as u64);
    allocations
}

#[test]
fn no_allocation_depends_on_the_number_of_subscribers() {
    let streams = [1, 300].map(|count| allocations_of_publications(Bed::new(DriverKind::Uring, count, 1)));
    let websockets = [1, 300].map(|count| allocations_of_publications(Bed::websockets(DriverKind::Uring, count)));
    for counts in [streams, websockets] {
        assert_eq!(counts[0], counts[1], "ten publications to 1 and to 300 subscribers");
        // A frame, the list of its pieces, and now and then a block: no more than four a publication.
        assert!(counts[0] <= 40, "{counts:?}");
    }
}

/// A kernel that takes every send whole, or refuses every one.
#[derive(Default)]
struct Switch {
    refuses: bool,
    shorts: Vec<Short>,
}

impl Switch {
    fn take(&mut self, slot: Slot, ticket: Ticket) {
        if self.refuses {
            self.shorts.push(Short { slot, ticket, taken: Ok(0) });
        }
    }
}

impl Sink for Switch {
    unsafe fn stage(&mut self, _: &[Piece]) -> Staged {
        Staged(0)
    }

    fn send(&mut self, slot: Slot, _: Staged, ticket: Ticket) {
        self.take(slot, ticket);
    }

    unsafe fn send_own(&mut self, slot: Slot, _: &[Piece], ticket: Ticket) -> bool {
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

/// Ten times everyone's socket fills, five publications wait, and everyone catches up with them from a cursor of its own.
fn allocations_of_falling_behind(count: usize) -> u64 {
    let mut bed = Bed::new(DriverKind::Uring, count, 1);
    let mut sink = Switch::default();
    let slots: Vec<Slot> = (0..count as Slot).collect();
    let mut cycle = |bed: &mut Bed| {
        sink.refuses = true;
        for _ in 0..5 {
            bed.publish(r#"{"hello":1}"#);
            while bed.core.drain(&mut sink) {}
        }
        assert_eq!(bed.metrics.lagging.get(), count as u64);
        sink.refuses = false;
        for &slot in &slots {
            bed.core.on_event(Event::Writable(slot), 0);
        }
        while bed.core.drain(&mut sink) {}
        bed.core.orders.clear();
    };
    for _ in 0..8 {
        cycle(&mut bed);
    }
    let before = bed.metrics.deliveries.get();
    let allocations = allocations_in(|| (0..10).for_each(|_| cycle(&mut bed)));
    assert_eq!(bed.metrics.deliveries.get() - before, 50 * count as u64);
    allocations
}

#[test]
fn no_allocation_depends_on_the_number_of_those_behind() {
    let counts = [1, 300].map(allocations_of_falling_behind);
    assert_eq!(counts[0], counts[1], "1 and 300 subscribers fall behind and catch up");
}
