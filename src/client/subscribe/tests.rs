//! The subscriber against a scripted server: what it prints, what it asks for when it comes back, and when it gives up.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;

use clap::Parser;

use super::{Args, backoff, subscribe};
use crate::limits::CLIENT_RECONNECT_MILLIS;
use crate::wire::websocket::{self, Decoder, Event, Opcode};

#[derive(Parser)]
struct CommandLine {
    #[command(flatten)]
    args: Args,
}

/// Accepts one connection for each script and runs it; a script returns what it wants to be known of the request.
fn server<F>(scripts: Vec<F>) -> (String, JoinHandle<Vec<String>>)
where
    F: FnOnce(&mut TcpStream) -> String + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let run = move |script: F| script(&mut listener.accept().unwrap().0);
    (url, std::thread::spawn(move || scripts.into_iter().map(run).collect()))
}

fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

/// A script that answers with `answer` and closes.
fn answering(answer: &'static str) -> impl FnOnce(&mut TcpStream) -> String + Send + 'static {
    move |stream| {
        let head = read_head(stream);
        stream.write_all(answer.as_bytes()).unwrap();
        head
    }
}

/// Result, standard output and standard error.
fn run(url: &str, options: &[&str]) -> (Result<(), String>, String, String) {
    let line = CommandLine::try_parse_from(["subscribe", "--url", url].iter().chain(options)).unwrap();
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    let result = subscribe(&line.args, &mut out, &mut notes);
    (result, String::from_utf8(out).unwrap(), String::from_utf8(notes).unwrap())
}

const STREAM: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n";

#[test]
fn a_lost_stream_is_resumed_after_the_last_whole_event_when_the_server_advised() {
    let (url, thread) = server(vec![
        answering(
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\nretry: 1\n\nid: t.e.0\n\ndata: one\ndata: more\nid: t.e.1\n\ndata: cut\nid: t.e.2\n",
        ),
        answering("HTTP/1.1 503 Busy\r\nRetry-After: 0\r\nContent-Length: 17\r\n\r\n{\"error\":\"later\"}"),
        answering(
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\na\r\ndata: two\n\r\nB\r\nid: t.e.2\n\n\r\n0\r\n\r\n",
        ),
    ]);
    let (result, out, notes) = run(&url, &["--count", "2", "a b"]);
    result.unwrap();
    assert_eq!(out, "a b\tt.e.1\tone\n\t\tmore\na b\tt.e.2\ttwo\n");
    assert_eq!(
        notes,
        "weir subscribe: the stream ended; again in 0.0 s, after t.e.1\nweir subscribe: HTTP 503: later; again in 0.0 s, after t.e.1\n"
    );
    let heads = thread.join().unwrap();
    assert!(heads[0].starts_with("GET /sse?channel=a%20b HTTP/1.1\r\n"), "{}", heads[0]);
    assert!(!heads[0].contains("Last-Event-ID"));
    for head in &heads[1..] {
        assert!(head.contains("\r\nLast-Event-ID: t.e.1\r\n"), "{head}");
    }
}

#[test]
fn events_of_many_channels_name_theirs_and_a_gap_is_said_aloud() {
    let stream = format!(
        "{STREAM}event: gap\ndata: {{\"channel\":\"a\"}}\nid: x.1.1\n\nevent: b\ndata: {{\"n\": 1}}\nid: x.1.2\n\nevent: a\ndata:\n\n"
    );
    let (url, thread) = server(vec![answering(stream.leak())]);
    let (result, out, notes) = run(&url, &["--json", "--count", "2", "--last-event-id", "x.1.0", "a", "b"]);
    result.unwrap();
    assert_eq!(
        out,
        "{\"channel\":\"b\",\"id\":\"x.1.2\",\"data\":\"{\\\"n\\\": 1}\"}\n{\"channel\":\"a\",\"id\":\"x.1.2\",\"data\":\"\"}\n"
    );
    assert_eq!(notes, "weir subscribe: gap: {\"channel\":\"a\"}\n");
    let heads = thread.join().unwrap();
    assert!(heads[0].starts_with("GET /sse?channel=a&channel=b HTTP/1.1\r\n"));
    assert!(heads[0].contains("\r\nLast-Event-ID: x.1.0\r\n"));
}

#[test]
fn what_would_be_refused_again_is_not_tried_again() {
    let refusal = "HTTP/1.1 400 Bad Request\r\nContent-Length: 20\r\n\r\n{\"error\":\"bad name\"}";
    for websocket in [false, true] {
        let (url, thread) = server(vec![answering(refusal)]);
        let options: &[&str] = if websocket { &["--websocket", "a"] } else { &["a"] };
        assert_eq!(run(&url, options).0.unwrap_err(), "HTTP 400: bad name");
        thread.join().unwrap();
    }
    let (url, thread) = server(vec![answering("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n")]);
    assert_eq!(run(&url, &["a"]).0.unwrap_err(), "the answer is no event stream but of type text/html");
    thread.join().unwrap();
}

/// Completes the upgrade, takes the first message, and sends `messages` as frames.
fn speaking(messages: Vec<Vec<u8>>) -> impl FnOnce(&mut TcpStream) -> String + Send + 'static {
    move |stream| {
        let head = read_head(stream);
        let key = head.lines().find_map(|line| line.strip_prefix("Sec-WebSocket-Key: ")).unwrap();
        let accept = websocket::accept_key(key);
        let answer = format!("HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: {accept}\r\n\r\n");
        stream.write_all(answer.as_bytes()).unwrap();
        let mut decoder = Decoder::server();
        let mut text = next_text(stream, &mut decoder);
        for message in messages {
            stream.write_all(&message).unwrap();
            if message.ends_with(b"{}") {
                text = format!("{text} {}", next_text(stream, &mut decoder));
            }
        }
        text
    }
}

fn next_text(stream: &mut TcpStream, decoder: &mut Decoder) -> String {
    let mut part = [0; 4096];
    loop {
        let count = stream.read(&mut part).unwrap();
        assert!(count > 0, "the client has left");
        match decoder.next(&mut &mut part[..count], 4096).unwrap() {
            Some(Event::Text(text)) => return text.into_owned(),
            other => assert!(other.is_none(), "{other:?}"),
        }
    }
}

fn text(text: &str) -> Vec<u8> {
    let mut frame = Vec::new();
    websocket::write_header(&mut frame, Opcode::Text, text.len());
    frame.extend_from_slice(text.as_bytes());
    frame
}

fn close(code: u16, reason: &str) -> Vec<u8> {
    let mut frame = Vec::new();
    websocket::write_close(&mut frame, code, reason);
    frame
}

const CONNECTED: &str = "{\"id\":1,\"connect\":{\"client\":\"c\",\"ping\":25,\"pong\":true}}";

#[test]
fn a_lost_websocket_recovers_what_it_missed() {
    let (url, thread) = server(vec![
        speaking(vec![
            text(&format!("{CONNECTED}\n{{\"id\":2,\"subscribe\":{{\"epoch\":\"e1\",\"offset\":4}}}}")),
            text("{}"),
            text("{\"push\":{\"channel\":\"a\",\"pub\":{\"data\":{\"n\": 5},\"offset\":5}}}"),
            close(3001, "shutdown"),
        ]),
        speaking(vec![
            text(CONNECTED),
            text(
                "{\"id\":2,\"subscribe\":{\"epoch\":\"e1\",\"offset\":7,\"recovered\":true,\"was_recovering\":true,\"publications\":[{\"data\":\"x\",\"offset\":6},{\"data\":7,\"offset\":7}]}}",
            ),
        ]),
    ]);
    let (result, out, notes) = run(&url, &["--websocket", "--count", "3", "a"]);
    result.unwrap();
    assert_eq!(out, "a\t5\t{\"n\": 5}\na\t6\t\"x\"\na\t7\t7\n");
    assert!(notes.starts_with("weir subscribe: the server closed the connection, code 3001: shutdown; again in "));
    assert!(notes.ends_with(" s, after e1.5\n"), "{notes}");
    let texts = thread.join().unwrap();
    assert!(texts[0].ends_with(" {}"), "the ping was not answered: {}", texts[0]);
    assert!(!texts[0].contains("recover"));
    let subscribe: serde_json::Value = serde_json::from_str(texts[1].lines().nth(1).unwrap()).unwrap();
    assert_eq!(
        subscribe["subscribe"],
        serde_json::json!({"channel": "a", "recover": true, "epoch": "e1", "offset": 5})
    );
}

#[test]
fn a_terminal_close_and_a_lost_history_are_said() {
    let (url, thread) = server(vec![speaking(vec![
        text(&format!(
            "{CONNECTED}\n{{\"id\":2,\"subscribe\":{{\"epoch\":\"e2\",\"offset\":1,\"was_recovering\":true}}}}"
        )),
        close(3503, "force disconnect"),
    ])]);
    let (result, out, notes) = run(&url, &["--websocket", "--last-event-id", "t.e1.9", "a"]);
    assert_eq!(result.unwrap_err(), "the server closed the connection, code 3503: force disconnect");
    assert_eq!(out, "");
    assert!(notes.contains("gap in a: some of what followed e1.9 is gone"), "{notes}");
    thread.join().unwrap();
}

#[test]
fn bad_options_say_what_is_allowed() {
    let (result, ..) = run("http://127.0.0.1:1", &["--websocket", "--last-event-id", "t.e.1", "a", "b"]);
    assert!(result.unwrap_err().contains("allowed: one channel"));
    let (result, ..) = run("http://127.0.0.1:1", &["--websocket", "--last-event-id", "7", "a"]);
    assert!(result.unwrap_err().contains("tag.epoch.offset"));
    let bad = CommandLine::try_parse_from(["subscribe", "a\nb"]);
    assert!(bad.err().unwrap().to_string().contains("control characters"));
    assert!(CommandLine::try_parse_from(["subscribe"]).is_err());
}

#[test]
fn waits_grow_and_stay_within_their_bounds() {
    let (first, longest) = CLIENT_RECONNECT_MILLIS;
    for failures in [1, 2, 5, 50, u32::MAX] {
        let millis = backoff(failures).as_millis() as u64;
        assert!((first..=longest).contains(&millis), "{millis} after {failures}");
    }
    assert!(backoff(1).as_millis() as u64 <= 2 * first);
}
