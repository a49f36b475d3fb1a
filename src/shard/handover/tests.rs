//! Two real shards on threads of their own, clients over loopback, and a relay that feeds both.

mod client;
mod hub;

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use client::{Client, Kind, connect, settle};
use hub::{Failing, Hub, listen};

use crate::settings::Settings;
use crate::shard::start::DriverKind;
use crate::wire::websocket::{Opcode, write_masked_frame};

const CHANNELS: [&str; 3] = ["small", "other", "big"];

/// Nothing but publications, and nobody is shed.
fn settings() -> Settings {
    let mut settings = Settings::default();
    settings.sse.heartbeat = Duration::from_secs(3_000);
    settings.websocket.ping = Duration::from_secs(3_000);
    settings.websocket.client_publish = true;
    settings.limits.head_time = Duration::from_secs(3_000);
    settings.limits.body_time = Duration::from_secs(3_000);
    settings.lag.messages = 100_000;
    settings.lag.bytes = 1 << 30;
    settings.lag.age = Duration::from_secs(3_000);
    settings.history.messages = 100_000;
    settings.history.bytes = 1 << 30;
    settings
}

/// Publishes until it is dropped.
struct Publisher {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Publisher {
    fn start(hub: &Hub) -> Self {
        let (hub, stop) = (hub.clone(), Arc::new(AtomicBool::new(false)));
        let stopped = stop.clone();
        let filler = "x".repeat(8_000);
        let thread = std::thread::spawn(move || {
            for n in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                hub.publish("small", &format!("small {n}"), n % 3 != 1);
                hub.publish("other", &format!("other {n}"), true);
                hub.publish("big", &format!("big {n} {filler}"), n % 4 != 1);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// Both ends of a thousand connections are in this process.
fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a live struct.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
    }
}

fn kind_of(n: usize) -> Kind {
    match n % 4 {
        0 => Kind::Sse("small"),
        1 => Kind::WebSocket("small"),
        2 => Kind::SseMany(&["small", "other"]),
        _ => Kind::WebSocket("other"),
    }
}

/// Hands over so many times from one kind of driver to the other and back, while everything goes on.
fn ten_times(kinds: [DriverKind; 2], times: usize, clients: usize) {
    raise_descriptor_limit();
    let ((listener, address), hub, settings) = (listen(), Hub::default(), settings());
    let mut shard = hub.shard(kinds[0], &listener, &settings, true);
    let mut all: Vec<Client> = (0..clients).map(|n| Client::open(address, kind_of(n), None)).collect();
    // These do not read until the end: their sockets are full and their frames cut.
    let mut slow: Vec<Client> = [Kind::Sse("big"), Kind::WebSocket("big"), Kind::SseMany(&["big", "other"])]
        .into_iter()
        .cycle()
        .take(12)
        .map(|kind| Client::open(address, kind, Some(4_096)))
        .collect();
    let publisher = Publisher::start(&hub);
    // A request that comes byte by byte, and commands in fragments.
    let request = format!(
        "POST /publish/post HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n{:x}\r\n{}\r\n0\r\n\r\n",
        times * 4,
        "w".repeat(times * 4)
    );
    let mut post = connect(address, None);
    let mut sent = 0;
    let mut talker = Client::open(address, Kind::WebSocket("talk"), None);
    let mut command = Vec::new();
    let text = r#"{"id":3,"publish":{"channel":"talk","data":"in pieces"}}"#;
    write_masked_frame(&mut command, Opcode::Text, &text.as_bytes()[..20], [1, 2, 3, 4]);
    command[0] &= 0x7f;
    let second = command.len();
    write_masked_frame(&mut command, Opcode::Text, &text.as_bytes()[20..], [4, 3, 2, 1]);
    command[second] &= 0xf0;
    for n in 0..times {
        std::thread::sleep(Duration::from_millis(50));
        let end = request.len() * (n + 1) / (times + 1);
        post.write_all(&request.as_bytes()[sent..end]).unwrap();
        sent = end;
        let (from, to) = (command.len() * n / times, command.len() * (n + 1) / times);
        talker.send(&command[from..to]);
        let late = std::thread::spawn(move || Client::open(address, kind_of(n), None));
        let next = hub.shard(kinds[(n + 1) % 2], &listener, &settings, false);
        let count = shard.hand_over(&next, &[&CHANNELS[..], &["talk"]].concat(), Failing::Nowhere);
        // What is still in the backlog is not among them: the other shard accepts it.
        assert!(count > clients + slow.len(), "{count} went");
        all.push(late.join().unwrap());
        shard.ended();
        shard = next;
        // A little, or the kernel takes them for gone (`TCP_USER_TIMEOUT`) on a loaded machine.
        for client in &mut slow {
            client.read();
        }
        for client in &mut all {
            client.stream.set_nonblocking(true).unwrap();
            while client.read() {}
        }
    }
    post.write_all(&request.as_bytes()[sent..]).unwrap();
    let mut answer = [0; 1024];
    let read = post.read(&mut answer).unwrap();
    assert!(answer[..read].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer[..read]));
    std::thread::sleep(Duration::from_millis(100));
    drop(publisher);
    settle(&mut all, &hub);
    settle(&mut slow, &hub);
    until_it_got(&mut talker, &["in pieces", r#"{"id":3,"publish":{}}"#]);
    let ends: u64 = shard.metrics.disconnects.iter().map(crate::metrics::Counter::get).sum();
    assert_eq!(ends, 0, "somebody was disconnected");
    shard.stop();
}

/// Waits until a client has got all of these.
fn until_it_got(client: &mut Client, words: &[&str]) {
    let deadline = std::time::Instant::now() + hub::PATIENCE;
    client.stream.set_nonblocking(true).unwrap();
    while !words.iter().all(|word| String::from_utf8_lossy(client.news()).contains(word)) {
        assert!(std::time::Instant::now() < deadline, "{:?}", String::from_utf8_lossy(client.news()));
        client.read();
        std::thread::sleep(Duration::from_millis(5));
    }
}

const URING: DriverKind = DriverKind::Uring;
const EPOLL: DriverKind = DriverKind::Epoll;

#[test]
fn a_thousand_clients_notice_nothing_of_ten_hand_overs_between_rings() {
    ten_times([URING, URING], 10, 1_000);
}

#[test]
fn a_thousand_clients_notice_nothing_of_ten_hand_overs_between_epolls() {
    ten_times([EPOLL, EPOLL], 10, 1_000);
}

#[test]
fn a_thousand_clients_notice_nothing_of_ten_hand_overs_from_one_driver_to_the_other() {
    ten_times([URING, EPOLL], 10, 1_000);
}

/// Hands over in vain at every step, and once to some purpose.
fn in_vain(old: DriverKind, new: DriverKind) {
    let ((listener, address), hub, settings) = (listen(), Hub::default(), settings());
    let shard = hub.shard(old, &listener, &settings, true);
    let mut clients: Vec<Client> = (0..40).map(|n| Client::open(address, kind_of(n), None)).collect();
    clients.extend((0..6).map(|_| Client::open(address, Kind::Sse("big"), Some(4_096))));
    let publisher = Publisher::start(&hub);
    let mut half = connect(address, None);
    half.write_all(b"GET /health/live HTTP/1.1\r\nHo").unwrap();
    for failing in [Failing::BeforeFreeze, Failing::WhileCarried, Failing::BeforeVerdict, Failing::Garbled] {
        std::thread::sleep(Duration::from_millis(60));
        let next = hub.shard(new, &listener, &settings, false);
        shard.hand_over(&next, &CHANNELS, failing);
        // The old one accepts and answers.
        clients.push(Client::open(address, Kind::Sse("other"), None));
        half.write_all(b"st: h\r\n\r\nGET /health/live HTTP/1.1\r\nHo").unwrap();
        let mut answer = [0; 1024];
        let read = half.read(&mut answer).unwrap();
        assert!(answer[..read].starts_with(b"HTTP/1.1 200"), "{failing:?}");
    }
    let next = hub.shard(new, &listener, &settings, false);
    shard.hand_over(&next, &CHANNELS, Failing::Nowhere);
    shard.ended();
    std::thread::sleep(Duration::from_millis(60));
    drop(publisher);
    settle(&mut clients, &hub);
    next.stop();
}

#[test]
fn a_ring_goes_on_when_a_hand_over_fails_at_any_step() {
    in_vain(URING, URING);
    in_vain(URING, EPOLL);
}

#[test]
fn an_epoll_goes_on_when_a_hand_over_fails_at_any_step() {
    in_vain(EPOLL, EPOLL);
    in_vain(EPOLL, URING);
}
