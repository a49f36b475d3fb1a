//! A client of an event stream.

use super::{HEAD, Node, channel_of, entries_of};
use crate::log::position::Position;
use crate::shard::simulation::relay::Relay;
use crate::shard::simulation::view::View;
use crate::wire::sse::{EventParser, Item};

/// What a stream says.
#[derive(Debug)]
pub enum Said {
    /// An event, and the last event id with it.
    Event { name: String, data: String, id: String },
    /// The last event id moved without an event.
    Position(String),
}

/// One connection's stream.
pub struct Stream {
    /// Bytes of the response head that have not come.
    head_left: usize,
    parser: EventParser,
    /// Channels whose position could not be resumed.
    refused: Vec<usize>,
    started: bool,
    /// Events that came whole, but for those the connection was told on its own.
    pub counted: u64,
}

impl Stream {
    pub fn new() -> Self {
        let parser = EventParser::new(1 << 20);
        Self { head_left: HEAD.len(), parser, refused: Vec::new(), started: false, counted: 0 }
    }

    /// Whether the position of every channel is known.
    pub fn started(&self) -> bool {
        self.started
    }

    /// Parses bytes line by line, so that a position is seen even when an event follows at once.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Said> {
        let head = self.head_left.min(bytes.len());
        let begun = HEAD.len() - self.head_left;
        assert_eq!(&bytes[..head], &HEAD[begun..begun + head], "the response head");
        self.head_left -= head;
        let mut said = Vec::new();
        for line in bytes[head..].split_inclusive(|&byte| byte == b'\n') {
            let id = self.parser.last_event_id().to_owned();
            let before = said.len();
            let fed = self.parser.feed(line, |item| {
                if let Item::Event { name, data, id } = item {
                    said.push(Said::Event { name: name.into(), data: data.into(), id: id.into() });
                }
            });
            fed.expect("no event is that large");
            match said.get(before) {
                Some(Said::Event { name, data, .. }) => self.counted += u64::from(!is_refusal(name, data)),
                _ if self.parser.last_event_id() != id => {
                    said.push(Said::Position(self.parser.last_event_id().to_owned()));
                }
                _ => {}
            }
        }
        said
    }

    /// Reads bytes and checks what they say.
    pub fn take(&mut self, bytes: &[u8], channels: &[usize], views: &mut [View], node: &Node<'_>) {
        let relay = &*node.relay;
        for said in self.feed(bytes) {
            node.trace.said(&said);
            match said {
                Said::Position(id) => self.start(&id, channels, views, relay),
                Said::Event { name, data, .. } if is_refusal(&name, &data) => {
                    let gap: serde_json::Value = serde_json::from_str(&data).expect("JSON");
                    let channel = channel_of(relay, gap["channel"].as_str().expect("a channel"));
                    let (asked, available) = (&gap["from"], &gap["to"]);
                    let older = asked["offset"].as_u64() < available["offset"].as_u64();
                    // In a hand-over what took no offset may be lost alone.
                    let told = older || asked["epoch"] != available["epoch"] || (self.started && asked == available);
                    assert!(told, "refused though it was to be had: {data}");
                    node.trace.event("refused position", channel as u64, 0u64);
                    let (of, view) = (&relay.channels[channel], &mut views[channel]);
                    let available = place(available);
                    if self.started && view.position == Some(available) {
                        // The id that follows may say nothing new, and then it is not seen to come.
                        view.jump(&of.truth, of.received, available);
                    } else {
                        self.refused.push(channel);
                    }
                }
                Said::Event { name, data, id } => {
                    assert!(self.started, "an event before the position");
                    let entries = entries_of(&id, channels, relay);
                    if name == "gap" {
                        let gap: serde_json::Value = serde_json::from_str(&data).expect("JSON");
                        let channel = channel_of(relay, gap["channel"].as_str().expect("a channel"));
                        let at = channels.iter().position(|&other| other == channel).expect("a channel of the stream");
                        let of = &relay.channels[channel];
                        views[channel].jump(&of.truth, of.received, entries[at].position);
                    } else {
                        let channel = match channels {
                            [channel] if name == "message" => *channel,
                            _ => channel_of(relay, &name),
                        };
                        let truth = &relay.channels[channel].truth;
                        let record = truth.find(&data).unwrap_or_else(|| panic!("{data:?} was never published"));
                        views[channel].publication(truth, record);
                    }
                    for (entry, &channel) in entries.iter().zip(channels) {
                        let position = views[channel].position;
                        assert_eq!(
                            Some(entry.position),
                            position,
                            "the id {id} and what was seen of channel {channel}"
                        );
                    }
                }
            }
        }
    }

    /// The position before any event, or after a hand-over that a place was lost in.
    fn start(&mut self, id: &str, channels: &[usize], views: &mut [View], relay: &Relay) {
        let first = !std::mem::replace(&mut self.started, true);
        assert!(first || !self.refused.is_empty(), "a position after the first");
        for (entry, &channel) in entries_of(id, channels, relay).iter().zip(channels) {
            let (view, of) = (&mut views[channel], &relay.channels[channel]);
            if view.position.is_none() || self.refused.contains(&channel) {
                view.jump(&of.truth, of.received, entry.position);
            }
            assert_eq!(view.position, Some(entry.position), "resumed elsewhere than asked");
            if first {
                view.resume(of.received);
            }
        }
        self.refused.clear();
    }
}

/// The position that a gap event names.
fn place(of: &serde_json::Value) -> Position {
    let epoch = of["epoch"].as_str().expect("an epoch").parse().expect("an epoch");
    Position { epoch, offset: of["offset"].as_u64().expect("an offset") }
}

/// Whether an event says that a position could not be resumed.
fn is_refusal(name: &str, data: &str) -> bool {
    name == "gap" && data.contains("\"from\"")
}
