//! A client that polls.

use std::time::Duration;

use super::{Node, channel_of, entries_of, publication};
use crate::log::position::{CursorEntry, Position};
use crate::shard::poll::Poll;
use crate::shard::simulation::view::View;
use crate::wire::http1::{Framing, parse_response_head};

/// What came on one connection.
#[derive(Default)]
pub struct Stream {
    bytes: Vec<u8>,
}

impl Stream {
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Whether nothing came yet.
    pub fn waits(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The connection has ended: reads the answer, if it is whole.
    pub fn end(&self, channels: &[usize], views: &mut [View], node: &Node<'_>) {
        let Some((head, length)) = parse_response_head(&self.bytes).expect("a response head") else { return };
        let body = &self.bytes[length..];
        match head.framing("GET") {
            Framing::Length(length) if body.len() as u64 == length => {}
            Framing::Length(length) => return assert!((body.len() as u64) < length, "bytes after the answer"),
            other => panic!("an answer without a length: {other:?}"),
        }
        match head.status {
            200 => take(body, channels, views, node),
            503 => node.trace.event("poll refused", 0u64, 0u64),
            other => panic!("a poll answered with {other}"),
        }
    }
}

/// What a poll asks for.
pub fn ask(cursor: Vec<CursorEntry>, node: &mut Node<'_>) -> Poll {
    let millis = if node.calm { 3_600_000 } else { node.random.within(0..=20_000) };
    Poll { cursor, wait: Duration::from_millis(millis as u64), known: None, origin: None }
}

#[derive(serde::Deserialize)]
struct Body<'a> {
    cursor: &'a str,
    #[serde(borrow)]
    channels: std::collections::BTreeMap<&'a str, Channel<'a>>,
}

#[derive(serde::Deserialize)]
struct Channel<'a> {
    epoch: &'a str,
    offset: u64,
    #[serde(borrow)]
    gap: Option<Gap<'a>>,
    #[serde(borrow)]
    publications: Vec<crate::wire::centrifugo::Publication<'a>>,
}

#[derive(serde::Deserialize)]
struct Gap<'a> {
    #[serde(borrow)]
    from: Place<'a>,
    #[serde(borrow)]
    to: Place<'a>,
}

#[derive(serde::Deserialize)]
struct Place<'a> {
    epoch: &'a str,
    offset: u64,
}

/// Checks an answer.
pub fn take(body: &[u8], channels: &[usize], views: &mut [View], node: &Node<'_>) {
    let relay = &*node.relay;
    let Body { cursor, channels: answers } = serde_json::from_slice(body).expect("JSON");
    assert_eq!(answers.len(), channels.len(), "an answer for each channel");
    for (name, Channel { epoch, offset, gap, publications }) in answers {
        let channel = channel_of(relay, name);
        let (of, view) = (&relay.channels[channel], &mut views[channel]);
        let asked = view.position;
        // An answer has no publications without an offset.
        view.resume(of.received);
        if let Some(Gap { from, to }) = gap {
            assert_eq!(asked, Some(position(from.epoch, from.offset)), "the gap in {name} begins where the reader was");
            node.trace.event("poll gap", channel as u64, to.offset);
            view.jump(&of.truth, of.received, position(to.epoch, to.offset));
        }
        for of_channel in publications {
            publication(view, &of.truth, of_channel.data.get(), of_channel.offset);
        }
        let reached = position(epoch, offset);
        if asked.is_none() {
            view.start(&of.truth, of.received, reached);
        }
        assert_eq!(view.position, Some(reached), "where the answer leaves the reader of {name}");
    }
    for (entry, &channel) in entries_of(cursor, channels, relay).iter().zip(channels) {
        assert_eq!(views[channel].position, Some(entry.position), "the cursor {cursor} and what was seen");
    }
    node.trace.event("poll answered", body.len() as u64, 0u64);
}

fn position(epoch: &str, offset: u64) -> Position {
    Position { epoch: epoch.parse().expect("an epoch"), offset }
}
