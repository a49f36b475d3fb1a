//! Clients that read all they are sent and never answer a doubt: what they got is compared byte for byte.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::hub::{Hub, PATIENCE};
use crate::log::frame::Frame;
use crate::wire::sse::{EventParser, Item};
use crate::wire::websocket::{Opcode, write_masked_frame};

/// What a client follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Sse(&'static str),
    SseMany(&'static [&'static str]),
    WebSocket(&'static str),
}

pub(super) struct Client {
    pub(super) kind: Kind,
    pub(super) stream: TcpStream,
    pub(super) got: Vec<u8>,
    /// Bytes before the first publication.
    prelude: usize,
    ended: bool,
}

pub(super) fn connect(address: SocketAddr, receive_buffer: Option<usize>) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    if let Some(bytes) = receive_buffer {
        socket.set_recv_buffer_size(bytes).unwrap();
    }
    socket.connect(&address.into()).unwrap();
    socket.set_tcp_nodelay(true).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.into()
}

pub(super) fn masked(text: &str) -> Vec<u8> {
    let mut frame = Vec::new();
    write_masked_frame(&mut frame, Opcode::Text, text.as_bytes(), [3, 1, 4, 1]);
    frame
}

const UPGRADE: &str = "GET /connection/websocket HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

impl Client {
    /// Connects and waits until it is subscribed.
    pub(super) fn open(address: SocketAddr, kind: Kind, receive_buffer: Option<usize>) -> Self {
        let stream = connect(address, receive_buffer);
        let mut client = Self { kind, stream, got: Vec::new(), prelude: 0, ended: false };
        match kind {
            Kind::Sse(channel) => {
                client.send(format!("GET /sse?channel={channel} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes());
                client.skip_past(b"\nid: ");
                client.skip_past(b"\n\n");
            }
            Kind::SseMany(channels) => {
                let query = channels.iter().map(|name| format!("channel={name}")).collect::<Vec<_>>().join("&");
                client.send(format!("GET /sse?{query} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes());
                client.skip_past(b"\nid: ");
                client.skip_past(b"\n\n");
            }
            Kind::WebSocket(channel) => {
                client.send(UPGRADE.as_bytes());
                client.send(&masked(r#"{"id":1,"connect":{}}"#));
                client.send(&masked(&format!(r#"{{"id":2,"subscribe":{{"channel":"{channel}"}}}}"#)));
                client.skip_past(br#"{"id":2,"subscribe""#);
                client.skip_past(b"}}");
            }
        }
        client.stream.set_nonblocking(true).unwrap();
        client
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.stream.set_nonblocking(false).unwrap();
        self.stream.write_all(bytes).unwrap();
    }

    fn skip_past(&mut self, words: &[u8]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let rest = &self.got[self.prelude..];
            if let Some(at) = rest.windows(words.len()).position(|window| window == words) {
                self.prelude += at + words.len();
                return;
            }
            assert!(Instant::now() < deadline, "{:?} of {:?}", String::from_utf8_lossy(&self.got), self.kind);
            self.read();
            assert!(!self.ended, "ended: {:?}", String::from_utf8_lossy(&self.got));
        }
    }

    /// Takes what is there.
    pub(super) fn read(&mut self) -> bool {
        let mut piece = [0; 65536];
        match self.stream.read(&mut piece) {
            Ok(0) => self.ended = true,
            Ok(count) => {
                self.got.extend_from_slice(&piece[..count]);
                return true;
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => panic!("{:?}: {error}", self.kind),
        }
        false
    }

    /// What it got after it was subscribed.
    pub(super) fn news(&self) -> &[u8] {
        &self.got[self.prelude..]
    }

    /// Everything published since it subscribed, exactly once and in order. True when it has all.
    pub(super) fn check(&self, hub: &Hub) -> bool {
        assert!(!self.ended, "{:?} was disconnected", self.kind);
        match self.kind {
            Kind::Sse(channel) => exact(self.news(), hub, channel, |frame| frame.sse()),
            Kind::WebSocket(channel) => exact(self.news(), hub, channel, |frame| frame.websocket()),
            Kind::SseMany(channels) => {
                let mut parser = EventParser::new(1 << 20);
                let mut events: Vec<(String, String)> = Vec::new();
                let on = |item: Item<'_>| {
                    if let Item::Event { name, data, .. } = item {
                        events.push((name.to_owned(), data.to_owned()));
                    }
                };
                parser.feed(self.news(), on).unwrap();
                channels.iter().all(|&channel| {
                    let got: Vec<&str> =
                        events.iter().filter(|(name, _)| name == channel).map(|(_, data)| &data[..]).collect();
                    let all: Vec<String> = hub.frames(channel).iter().map(|frame| data_of(frame)).collect();
                    let Some(first) = got.first() else { return false };
                    let from = all.iter().position(|data| data == first).expect("it was published");
                    let end = from + got.len();
                    assert_eq!(got, all[from..end.min(all.len())], "{channel}");
                    end == all.len()
                })
            }
        }
    }
}

fn data_of(frame: &Frame) -> String {
    let text = String::from_utf8(frame.sse_body().to_vec()).unwrap();
    text.trim_start_matches("data: ").trim_end().to_owned()
}

/// Whether `got` is the channel's frames from some point on, to the last byte of the last.
fn exact(got: &[u8], hub: &Hub, channel: &str, bytes: fn(&Frame) -> &bytes::Bytes) -> bool {
    let frames = hub.frames(channel);
    let first = frames
        .iter()
        .position(|frame| !got.is_empty() && bytes(frame)[..].starts_with(&got[..got.len().min(bytes(frame).len())]));
    let Some(first) = first else {
        assert!(got.is_empty(), "begins with {:?}", String::from_utf8_lossy(&got[..got.len().min(300)]));
        return false;
    };
    let all: Vec<u8> = frames[first..].iter().flat_map(|frame| bytes(frame).iter().copied()).collect();
    if got.len() > all.len() || got != &all[..got.len()] {
        let at = got.iter().zip(&all).position(|(a, b)| a != b).unwrap_or(all.len());
        let around = |of: &[u8]| {
            String::from_utf8_lossy(&of[at.saturating_sub(200).min(of.len())..(at + 200).min(of.len())]).into_owned()
        };
        panic!("{channel}: differs at {at}:\n got {}\n not {}", around(got), around(&all));
    }
    got.len() == all.len()
}

/// Reads until everyone has everything.
pub(super) fn settle(clients: &mut [Client], hub: &Hub) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut read = false;
        for client in clients.iter_mut() {
            client.stream.set_nonblocking(true).unwrap();
            while client.read() {
                read = true;
            }
        }
        if !read && clients.iter().all(|client| client.check(hub)) {
            return;
        }
        assert!(Instant::now() < deadline, "{} lack something", clients.iter().filter(|of| !of.check(hub)).count());
        std::thread::sleep(Duration::from_millis(20));
    }
}
