//! What the benchmarks over real sockets share: streams to subscribe with, a crowd of clients that read, a network of
//! their own, and the kernel's own accounting.

#![allow(dead_code, reason = "each benchmark uses its part")]

pub mod crowd;
pub mod network;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use weir::wire::websocket::{Opcode, write_masked_frame};

/// Most time any answer may take.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// What a subscriber speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Server-sent events.
    Sse,
    /// The Centrifugo protocol on a WebSocket.
    WebSocket,
}

impl Protocol {
    /// Every protocol.
    pub const ALL: [Self; 2] = [Self::Sse, Self::WebSocket];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sse => "SSE",
            Self::WebSocket => "WebSocket",
        }
    }

    /// Opens a stream on one channel and reads everything the server says at its start.
    pub fn subscribe(self, address: SocketAddr, channel: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).expect("connect to the server");
        stream.set_read_timeout(Some(DEADLINE)).expect("set a timeout");
        let say = |stream: &mut TcpStream, bytes: &[u8]| stream.write_all(bytes).expect("write a request");
        match self {
            Self::Sse => {
                say(&mut stream, format!("GET /sse?channel={channel} HTTP/1.1\r\nHost: bench\r\n\r\n").as_bytes());
                read_until(&mut stream, |text| text.contains("\nid: ") && text.ends_with("\n\n"));
            }
            Self::WebSocket => {
                let upgrade = "GET /connection/websocket HTTP/1.1\r\nHost: bench\r\nConnection: Upgrade\r\n\
                    Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
                say(&mut stream, upgrade.as_bytes());
                read_until(&mut stream, |text| text.ends_with("\r\n\r\n"));
                let commands =
                    format!(r#"{{"id":1,"connect":{{}}}}{}{{"id":2,"subscribe":{{"channel":"{channel}"}}}}"#, '\n');
                let mut frame = Vec::new();
                write_masked_frame(&mut frame, Opcode::Text, commands.as_bytes(), [1; 4]);
                say(&mut stream, &frame);
                read_until(&mut stream, |text| text.contains("\"subscribe\":{") && text.ends_with("}}"));
            }
        }
        stream
    }
}

fn read_until(stream: &mut TcpStream, complete: impl Fn(&str) -> bool) {
    let mut text = String::new();
    let mut buffer = [0; 1024];
    while !complete(&text) {
        let read = stream.read(&mut buffer).expect("an answer");
        assert!(read > 0, "the server closed the connection: {text}");
        text.push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
}

/// A connection that publishes over HTTP.
pub struct Publisher {
    stream: TcpStream,
    request: Vec<u8>,
}

impl Publisher {
    /// Publishes `data` into `channel` each time.
    pub fn new(address: SocketAddr, channel: &str, data: &str) -> Self {
        let stream = TcpStream::connect(address).expect("connect to the server");
        stream.set_nodelay(true).expect("set TCP_NODELAY");
        let head = format!("POST /publish/{channel} HTTP/1.1\r\nHost: bench\r\nContent-Length: {}", data.len());
        Self { stream, request: format!("{head}\r\n\r\n{data}").into_bytes() }
    }

    /// Publishes once and waits for the answer.
    pub fn publish(&mut self) {
        self.stream.write_all(&self.request).expect("write a request");
        let mut answer = [0; 1024];
        let read = self.stream.read(&mut answer).expect("an answer");
        assert!(answer[..read].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer[..read]));
    }
}

/// A JSON payload of about so many bytes.
pub fn payload(size: usize) -> String {
    let (head, tail) = (r#"{"text":""#, r#""}"#);
    format!("{head}{}{tail}", "x".repeat(size.saturating_sub(head.len() + tail.len())))
}

/// Any address of this machine's loopback, with a port the kernel chooses.
pub const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
