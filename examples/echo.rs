//! A WebSocket echo server on the node's codec, for conformance suites: blocking sockets, one thread a connection.
//!
//! `cargo run --example echo -- PORT` listens on 127.0.0.1 (0 picks a free port) and prints the address.

use std::io::{Error, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use weir::limits::{REQUEST_HEAD_BYTES, REQUEST_HEADERS};
use weir::wire::websocket::{self, Decoder, Event, Opcode};

/// Bytes in one message: the suites' largest.
const MESSAGE_BYTES: usize = 16 * 1024 * 1024;
/// Bytes in one read.
const READ_BYTES: usize = 64 * 1024;
/// How long the peer may take to close after the closing handshake.
const LINGER: Duration = Duration::from_secs(1);

fn main() -> std::io::Result<()> {
    let Some(port) = std::env::args().nth(1).and_then(|port| port.parse::<u16>().ok()) else {
        eprintln!("usage: echo PORT (0 to 65535; 0 picks a free one)");
        std::process::exit(2);
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    println!("{}", listener.local_addr()?);
    for socket in listener.incoming() {
        let socket = socket?;
        std::thread::spawn(move || {
            if let Err(error) = serve(socket) {
                eprintln!("{error}");
            }
        });
    }
    Ok(())
}

fn serve(mut socket: TcpStream) -> std::io::Result<()> {
    let mut buffer = vec![0; READ_BYTES];
    let mut length = 0;
    let head = loop {
        let read = socket.read(&mut buffer[length..REQUEST_HEAD_BYTES])?;
        if read == 0 {
            return Err(Error::new(ErrorKind::UnexpectedEof, "the request head is cut off or too large"));
        }
        length += read;
        if let Some(head) = upgrade(&mut socket, &buffer[..length])? {
            break head;
        }
    };

    let mut decoder = Decoder::server();
    let mut out = Vec::new();
    let mut open = echo(&mut decoder, &mut buffer[head..length], &mut out);
    loop {
        socket.write_all(&out)?;
        out.clear();
        if !open {
            break;
        }
        let read = socket.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        open = echo(&mut decoder, &mut buffer[..read], &mut out);
    }

    // Closing with unread input would reset the connection and take the close frame back.
    socket.shutdown(Shutdown::Write)?;
    socket.set_read_timeout(Some(LINGER))?;
    while matches!(socket.read(&mut buffer), Ok(1..)) {}
    Ok(())
}

/// Answers a whole request head and returns its length.
fn upgrade(socket: &mut TcpStream, bytes: &[u8]) -> std::io::Result<Option<usize>> {
    let mut headers = [httparse::EMPTY_HEADER; REQUEST_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes).map_err(|error| Error::new(ErrorKind::InvalidData, error))? {
        httparse::Status::Complete(length) => length,
        httparse::Status::Partial => return Ok(None),
    };
    let values = |name: &'static str| {
        let named = request.headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name));
        named.filter_map(|header| std::str::from_utf8(header.value).ok())
    };
    let version = values("sec-websocket-version").next();
    let key = values("sec-websocket-key").next();
    match websocket::check_upgrade(values("upgrade"), values("connection"), version, key) {
        Ok(accept) => {
            write!(
                socket,
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                 Sec-WebSocket-Accept: {accept}\r\nServer: weir-echo\r\n\r\n"
            )?;
            Ok(Some(length))
        }
        Err(error) => {
            write!(
                socket,
                "HTTP/1.1 {} Refused\r\nUpgrade: websocket\r\nSec-WebSocket-Version: {}\r\nConnection: close\r\n\
                 Content-Length: {}\r\n\r\n{error}",
                error.status(),
                websocket::VERSION,
                error.to_string().len()
            )?;
            Err(Error::new(ErrorKind::InvalidData, error))
        }
    }
}

/// Appends the answers to what `input` holds. Returns whether the connection stays open.
fn echo(decoder: &mut Decoder, mut input: &mut [u8], out: &mut Vec<u8>) -> bool {
    let message = |out: &mut Vec<u8>, opcode, payload: &[u8]| {
        websocket::write_header(out, opcode, payload.len());
        out.extend_from_slice(payload);
    };
    loop {
        match decoder.next(&mut input, MESSAGE_BYTES) {
            Ok(Some(Event::Text(text))) => message(out, Opcode::Text, text.as_bytes()),
            Ok(Some(Event::Binary(bytes))) => message(out, Opcode::Binary, &bytes),
            Ok(Some(Event::Ping(payload))) => websocket::write_pong(out, &payload),
            Ok(Some(Event::Pong(_))) => {}
            Ok(Some(Event::Close { code, .. })) => {
                websocket::write_close_answer(out, code);
                return false;
            }
            Ok(None) => return true,
            Err(error) => {
                websocket::write_close(out, error.close_code(), &error.to_string());
                return false;
            }
        }
    }
}
