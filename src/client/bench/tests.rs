//! The load generator against a small server that does wrong exactly what a test asks for. What it did wrong must be
//! reported, to the last delivery, and nothing else.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use clap::Parser;

use super::report::Report;
use super::{Args, run};
use crate::wire::websocket::{self, Opcode};

/// What the server does to its `N`th publication, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// Accepts it and delivers it to nobody.
    Drop(usize),
    /// Delivers it to one subscriber fewer.
    DropForOne(usize),
    /// Delivers it twice.
    Duplicate(usize),
    /// Delivers it after the next one.
    Delay(usize),
    /// Delivers it to the subscribers of other channels.
    Misroute(usize),
    /// Answers 503 and does not deliver it.
    Refuse(usize),
    /// Closes every stream after it.
    EndStreams(usize),
    /// Delivers with its stamp spoilt.
    Spoil(usize),
    /// Delivers it in small pieces.
    Cut(usize),
}

struct Subscriber {
    stream: TcpStream,
    channel: String,
    websocket: bool,
}

#[derive(Default)]
struct Node {
    subscribers: Vec<Subscriber>,
    published: usize,
    delayed: Option<(String, Vec<u8>)>,
}

impl Node {
    /// Writes to the subscribers of `channel`, or, with `others`, to all the others; `skip` leaves out the first ones.
    fn deliver(&mut self, channel: &str, payload: &[u8], others: bool, skip: usize, piece: usize) {
        let chosen = self.subscribers.iter_mut().filter(|subscriber| (subscriber.channel == channel) != others);
        for subscriber in chosen.skip(skip) {
            let mut message = Vec::new();
            if subscriber.websocket {
                let head = format!("{{\"push\":{{\"channel\":\"{channel}\",\"pub\":{{\"data\":");
                let text = [head.as_bytes(), payload, b"}}}"].concat();
                websocket::write_header(&mut message, Opcode::Text, text.len());
                message.extend_from_slice(&text);
                // Servers of this protocol ping in between; a client that does not answer is thrown out by a real one.
                websocket::write_header(&mut message, Opcode::Text, 2);
                message.extend_from_slice(b"{}");
            } else {
                message.extend_from_slice(&[b"data: ", payload, b"\nid: 1\n\n"].concat());
            }
            for part in message.chunks(piece) {
                // A stalled subscriber takes no more at some point, and one that left takes nothing.
                let _ = subscriber.stream.write(part);
                if piece < message.len() {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            }
        }
    }

    fn publish(&mut self, fault: Fault, channel: &str, payload: &[u8]) -> bool {
        const WHOLE: usize = usize::MAX;
        self.published += 1;
        let number = self.published;
        match fault {
            Fault::Drop(faulty) if faulty == number => {}
            Fault::DropForOne(faulty) if faulty == number => self.deliver(channel, payload, false, 1, WHOLE),
            Fault::Duplicate(faulty) if faulty == number => {
                self.deliver(channel, payload, false, 0, WHOLE);
                self.deliver(channel, payload, false, 0, WHOLE);
            }
            Fault::Delay(faulty) if faulty == number => self.delayed = Some((channel.into(), payload.into())),
            Fault::Misroute(faulty) if faulty == number => {
                self.deliver(channel, payload, false, 0, WHOLE);
                self.deliver(channel, payload, true, 0, WHOLE);
            }
            Fault::Refuse(faulty) if faulty == number => return false,
            Fault::EndStreams(faulty) if faulty == number => {
                self.deliver(channel, payload, false, 0, WHOLE);
                self.subscribers.clear();
            }
            Fault::Spoil(faulty) if faulty == number => {
                let text = String::from_utf8(payload.into()).unwrap();
                self.deliver(channel, text.replacen(":0000", ":00x0", 1).as_bytes(), false, 0, WHOLE);
            }
            Fault::Cut(faulty) if faulty == number => self.deliver(channel, payload, false, 0, 7),
            _ => {
                self.deliver(channel, payload, false, 0, WHOLE);
                if let Some((channel, payload)) = self.delayed.take() {
                    self.deliver(&channel, &payload, false, 0, WHOLE);
                }
            }
        }
        true
    }
}

/// Serves until the test process ends.
fn start(fault: Fault) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let node = Arc::new(Mutex::new(Node::default()));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let node = Arc::clone(&node);
            std::thread::spawn(move || serve(stream.unwrap(), &node, fault));
        }
    });
    address
}

/// Reads until `input` has `wanted(input)`; none when the client is gone.
fn read_until<T>(stream: &mut TcpStream, input: &mut Vec<u8>, wanted: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
    loop {
        if let Some(found) = wanted(input) {
            return Some(found);
        }
        let mut part = [0; 4096];
        let count = stream.read(&mut part).ok()?;
        if count == 0 {
            return None;
        }
        input.extend_from_slice(&part[..count]);
    }
}

fn serve(mut stream: TcpStream, node: &Mutex<Node>, fault: Fault) {
    let mut input = Vec::new();
    loop {
        let head_end = |input: &[u8]| input.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4);
        let Some(end) = read_until(&mut stream, &mut input, head_end) else { return };
        let head = String::from_utf8(input.drain(..end).collect()).unwrap();
        let target = head.split(' ').nth(1).unwrap().to_owned();
        let value = |name: &str| {
            let line = head.lines().find(|line| line.to_lowercase().starts_with(name))?;
            Some(line.split_once(": ").unwrap().1.to_owned())
        };
        if let Some(channel) = target.strip_prefix("/publish/") {
            let length: usize = value("content-length").unwrap().parse().unwrap();
            let whole = |input: &[u8]| (input.len() >= length).then_some(());
            let Some(()) = read_until(&mut stream, &mut input, whole) else { return };
            let payload: Vec<u8> = input.drain(..length).collect();
            let answer = match node.lock().unwrap().publish(fault, channel, &payload) {
                true => "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
                false => "HTTP/1.1 503 Busy\r\nContent-Length: 16\r\n\r\n{\"error\":\"busy\"}",
            };
            stream.write_all(answer.as_bytes()).unwrap();
        } else if let Some(channel) = target.strip_prefix("/sse?channel=") {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: hello\n\n").unwrap();
            stream.set_nonblocking(true).unwrap();
            let channel = channel.to_owned();
            return node.lock().unwrap().subscribers.push(Subscriber { stream, channel, websocket: false });
        } else if target == "/connection/websocket" {
            let accept = websocket::accept_key(&value("sec-websocket-key").unwrap());
            let answer = format!(
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
            );
            stream.write_all(answer.as_bytes()).unwrap();
            return serve_websocket(stream, input, node);
        } else {
            let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
        }
    }
}

/// Takes the first message for `connect` and `subscribe`, and then counts a masked `{}` as the answer to a ping.
fn serve_websocket(mut stream: TcpStream, mut input: Vec<u8>, node: &Mutex<Node>) {
    let mut decoder = websocket::Decoder::server();
    let mut subscribed = false;
    loop {
        let mut part = [0; 4096];
        let count = match input.len() {
            0 => stream.read(&mut part).unwrap_or(0),
            early => {
                part[..early].copy_from_slice(&input);
                input.clear();
                early
            }
        };
        if count == 0 {
            return;
        }
        let mut rest = &mut part[..count];
        while let Some(event) = decoder.next(&mut rest, 4096).unwrap() {
            let websocket::Event::Text(text) = event else { panic!("{event:?}") };
            if subscribed {
                assert_eq!(text, "{}");
                continue;
            }
            subscribed = true;
            let channel = text.split("\"channel\":\"").nth(1).unwrap().split('"').next().unwrap().to_owned();
            let replies =
                "{\"id\":1,\"connect\":{\"client\":\"c\",\"ping\":25,\"pong\":true}}\n{\"id\":2,\"subscribe\":{}}";
            let mut frame = Vec::new();
            websocket::write_header(&mut frame, Opcode::Text, replies.len());
            frame.extend_from_slice(replies.as_bytes());
            stream.write_all(&frame).unwrap();
            let writer = stream.try_clone().unwrap();
            node.lock().unwrap().subscribers.push(Subscriber { stream: writer, channel, websocket: true });
        }
    }
}

#[derive(Parser)]
struct CommandLine {
    #[command(flatten)]
    args: Args,
}

/// 60 publications in 0.3 s to 6 connections, from a worker in this process, with further options.
fn bench(fault: Fault, options: &str) -> Report {
    let url = format!("http://{}", start(fault));
    let common = format!(
        "bench --url {url} --connections 6 --rate 200 --warmup 0.1 --duration 0.2 --drain 2 --workers 0 --channel-prefix bench- {options}"
    );
    let line = CommandLine::try_parse_from(common.split_whitespace()).unwrap();
    run::execute(&line.args, false).unwrap()
}

/// Gaps, undelivered, duplicates, reorders, misrouted, malformed.
fn wrongs(report: &Report) -> [u64; 6] {
    let counts = &report.progress.counts;
    [counts.gaps, counts.undelivered, counts.duplicates, counts.reorders, counts.misrouted, counts.malformed]
}

const PROTOCOLS: [&str; 2] = ["--protocol sse", "--protocol websocket"];

#[test]
fn a_server_without_fault_gets_a_clean_report() {
    for protocol in PROTOCOLS {
        let report = bench(Fault::None, protocol);
        assert_eq!(wrongs(&report), [0; 6], "{report}");
        assert_eq!(report.verdict(), None);
        assert_eq!((report.progress.established, report.progress.failed, report.progress.disconnected), (6, 0, 0));
        assert_eq!((report.publisher.sent, report.publisher.accepted), (60, 60));
        assert_eq!(report.progress.counts.deliveries, 360);
        assert_eq!(report.latency.samples, 240, "publications due in the first 0.1 s are not measured");
    }
}

#[test]
fn a_dropped_publication_is_a_gap_for_every_subscriber() {
    for protocol in PROTOCOLS {
        let report = bench(Fault::Drop(30), protocol);
        assert_eq!(wrongs(&report), [6, 0, 0, 0, 0, 0], "{report}");
        assert!(report.verdict().unwrap().contains("6 missing in between"));
        assert_eq!(report.progress.counts.deliveries, 354);
    }
}

#[test]
fn a_publication_dropped_for_one_subscriber_is_one_gap() {
    assert_eq!(wrongs(&bench(Fault::DropForOne(30), "")), [1, 0, 0, 0, 0, 0]);
}

#[test]
fn the_last_publication_dropped_is_noticed_though_nothing_follows_it() {
    assert_eq!(wrongs(&bench(Fault::Drop(60), "")), [0, 6, 0, 0, 0, 0]);
}

#[test]
fn a_duplicated_publication_is_counted_for_every_subscriber() {
    for protocol in PROTOCOLS {
        assert_eq!(wrongs(&bench(Fault::Duplicate(30), protocol)), [0, 0, 6, 0, 0, 0]);
    }
}

#[test]
fn a_delayed_publication_is_a_reorder_and_no_gap() {
    assert_eq!(wrongs(&bench(Fault::Delay(30), "")), [0, 0, 0, 6, 0, 0]);
}

#[test]
fn a_misrouted_publication_is_counted_where_it_does_not_belong() {
    let report = bench(Fault::Misroute(30), "--channels 3");
    assert_eq!(wrongs(&report), [0, 0, 0, 0, 4, 0], "{report}");
}

#[test]
fn an_unreadable_publication_is_also_a_gap() {
    assert_eq!(wrongs(&bench(Fault::Spoil(30), "")), [6, 0, 0, 0, 0, 6]);
}

#[test]
fn a_publication_in_pieces_is_one_publication() {
    for protocol in PROTOCOLS {
        assert_eq!(wrongs(&bench(Fault::Cut(30), protocol)), [0; 6]);
    }
}

#[test]
fn a_refused_publication_is_not_held_against_the_deliveries() {
    for faulty in [30, 60] {
        let report = bench(Fault::Refuse(faulty), "--channels 2 --publishers 2");
        assert_eq!(wrongs(&report), [0; 6], "{report}");
        assert_eq!((report.publisher.accepted, report.publisher.refused), (59, 1));
        assert_eq!(report.publisher.reasons.0.keys().collect::<Vec<_>>(), ["HTTP 503: busy"]);
        assert_eq!(report.progress.counts.refused, 3);
        assert_eq!(report.verdict(), None);
        assert!(report.remarks()[0].starts_with("1 publications were refused or not answered; the 3 deliveries"));
    }
}

#[test]
fn ended_streams_are_disconnects_and_no_gaps() {
    let report = bench(Fault::EndStreams(30), "");
    assert_eq!((wrongs(&report), report.progress.disconnected), ([0; 6], 6));
    assert_eq!(report.disconnects.0, BTreeMap::from([("the stream ended".to_owned(), 6)]));
    assert_eq!(report.progress.counts.deliveries, 180);
    assert_eq!(report.verdict().unwrap(), "every reading connection was ended before the run was over");
}

#[test]
fn stalled_connections_are_counted_apart_and_their_end_is_seen() {
    let report = bench(Fault::None, "--stalled 50");
    assert_eq!((wrongs(&report), report.progress.stalled, report.progress.shed), ([0; 6], 3, 0), "{report}");
    assert_eq!(report.progress.counts.deliveries, 180);
    let report = bench(Fault::EndStreams(30), "--stalled 50");
    assert_eq!((report.progress.shed, report.progress.disconnected), (3, 3), "{report}");
}

#[test]
fn refused_connections_are_counted_with_the_reason() {
    let report = bench(Fault::None, "--subscribe-path /nowhere");
    assert_eq!((report.progress.established, report.progress.failed), (0, 6));
    assert_eq!(report.verdict().unwrap(), "no connection was established");
    assert_eq!(report.failures.0, BTreeMap::from([("HTTP 404".to_owned(), 6)]));
}

#[test]
fn nobody_listening_is_an_error_that_says_so() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let line = CommandLine::try_parse_from(["bench", "--workers", "0", "--url", &format!("http://{free}")]).unwrap();
    let error = run::execute(&line.args, false).unwrap_err().to_string();
    assert!(error.starts_with(&format!("cannot connect to http://{free}")), "{error}");
}

#[test]
fn options_that_make_no_sense_are_refused_with_what_is_allowed() {
    let refused = |options: &str| {
        let line = CommandLine::try_parse_from(["bench"].into_iter().chain(options.split_whitespace()));
        match line {
            Err(error) => error.to_string(),
            Ok(line) => run::execute(&line.args, false).unwrap_err().to_string(),
        }
    };
    assert!(refused("--connections 60001").contains("1..=60000"));
    assert!(refused("--rate 0").contains("allowed: 0.001 and more"));
    assert!(refused("--rate NaN").contains("not a number"));
    assert!(refused("--stalled 101").contains("allowed: 0 to 100"));
    assert!(refused("--size 10").contains("..=65536"));
    assert!(refused("--connections 3 --channels 4").contains("at most one a connection"));
    assert!(refused("--stalled 100").contains("leaves at least one"));
    assert!(refused("--url https://a").contains("http://"));
}
