//! A client that speaks the Centrifugo protocol on a WebSocket.

use super::{HEAD, Node, channel_of, find, publication};
use crate::log::position::Position;
use crate::shard::simulation::kernel::SocketId;
use crate::shard::simulation::truth::Truth;
use crate::shard::simulation::view::View;
use crate::wire::centrifugo::{self, ServerMessage};
use crate::wire::websocket::{Decoder, Event, Opcode, write_masked_frame};

/// What the server says, in a form that outlives its bytes.
#[derive(Debug)]
pub enum Said {
    Connected,
    Subscribed { id: u32, position: Position, recovered: bool, was_recovering: bool, missed: Vec<(String, u64)> },
    Publication { channel: String, data: String, offset: u64 },
    Unsubscribed { channel: String },
    Ping,
    Refused { id: u32 },
    Done { id: u32 },
    History { id: u32, position: Position, held: Vec<(String, u64)> },
    Close,
    Nothing,
}

/// A command without an answer yet.
#[derive(Debug)]
enum Asked {
    Connect,
    Subscribe { channel: usize, recover: Option<Position> },
    Unsubscribe { channel: usize },
    History { channel: usize },
    Publish,
}

/// One connection's stream.
pub struct Stream {
    head_left: usize,
    decoder: Decoder,
    commands: u32,
    asked: Vec<(u32, Asked)>,
    connected: bool,
    /// Channels that publications may come from.
    on: Vec<usize>,
    /// Pings are answered.
    answers: bool,
    /// It has said something that ends the connection.
    condemned: bool,
    /// Publications that came whole as pushes.
    pub counted: u64,
}

impl Stream {
    /// A new stream, and the bytes of its first command.
    pub fn connect(node: &mut Node<'_>) -> (Self, Vec<u8>) {
        let mut stream = Self {
            head_left: HEAD.len(),
            decoder: Decoder::client(),
            commands: 0,
            asked: Vec::new(),
            connected: false,
            on: Vec::new(),
            answers: !node.random.once_in(8),
            condemned: false,
            counted: 0,
        };
        let id = stream.number(Asked::Connect);
        let mut text = Vec::new();
        centrifugo::write_connect_command(&mut text, id, "", "simulation");
        let frame = stream.frame(Opcode::Text, &text, node);
        (stream, frame)
    }

    /// Whether it is subscribed to all of these and nothing is unanswered.
    pub fn at_rest(&self, channels: &[usize]) -> bool {
        self.connected && self.asked.is_empty() && channels.iter().all(|channel| self.on.contains(channel))
    }

    fn number(&mut self, asked: Asked) -> u32 {
        self.commands += 1;
        self.asked.push((self.commands, asked));
        self.commands
    }

    fn frame(&self, opcode: Opcode, payload: &[u8], node: &mut Node<'_>) -> Vec<u8> {
        let mut frame = Vec::new();
        write_masked_frame(&mut frame, opcode, payload, (node.random.next() as u32).to_ne_bytes());
        frame
    }

    fn send(&self, opcode: Opcode, payload: &[u8], node: &mut Node<'_>, socket: SocketId) {
        let frame = self.frame(opcode, payload, node);
        node.kernel.write(socket, &frame);
    }

    /// Parses bytes.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Said> {
        let head = self.head_left.min(bytes.len());
        self.head_left -= head;
        let mut rest = bytes[head..].to_vec();
        let mut input = &mut rest[..];
        let mut said = Vec::new();
        while let Some(event) = self.decoder.next(&mut input, usize::MAX).expect("frames of the server") {
            match event {
                Event::Text(text) => said.extend(text.lines().map(said_by)),
                Event::Close { .. } => said.push(Said::Close),
                Event::Ping(_) | Event::Pong(_) => said.push(Said::Nothing),
                Event::Binary(_) => panic!("a binary frame"),
            }
        }
        self.counted += said.iter().filter(|said| matches!(said, Said::Publication { .. })).count() as u64;
        said
    }

    /// Reads bytes, checks what they say and answers.
    pub fn take(&mut self, bytes: &[u8], views: &mut [View], node: &mut Node<'_>, socket: SocketId) {
        for said in self.feed(bytes) {
            node.trace.said(&said);
            match said {
                Said::Connected => {
                    self.answered(self.asked[0].0);
                    self.connected = true;
                }
                Said::Subscribed { id, position, recovered, was_recovering, missed } => {
                    let Asked::Subscribe { channel, recover } = self.answered(id) else { panic!("no subscribe") };
                    assert_eq!(was_recovering, recover.is_some());
                    assert!(recovered || missed.is_empty(), "publications of nothing recovered");
                    let (truth, received) =
                        (&node.relay.channels[channel].truth, node.relay.channels[channel].received);
                    let view = &mut views[channel];
                    match (recover, recovered) {
                        (None, _) => view.start(truth, received, position),
                        (Some(_), false) => view.jump(truth, received, position),
                        (Some(_), true) => {
                            view.resume(received);
                            for (data, offset) in missed {
                                publication(view, truth, &data, offset);
                            }
                            assert_eq!(view.position, Some(position), "the position after what was recovered");
                        }
                    }
                    node.trace.event(if recovered { "recovered" } else { "subscribed" }, id, channel as u64);
                    // Unless an unsubscribe is already on its way.
                    self.on.push(channel);
                }
                Said::Publication { channel, data, offset } => {
                    let channel = channel_of(node.relay, &channel);
                    assert!(self.on.contains(&channel), "a publication of a channel it is not subscribed to");
                    publication(&mut views[channel], &node.relay.channels[channel].truth, &data, offset);
                }
                Said::Unsubscribed { channel } => {
                    let channel = channel_of(node.relay, &channel);
                    node.trace.event("unsubscribed", channel as u64, 0u64);
                    assert!(self.on.contains(&channel), "unsubscribed from what it is not subscribed to");
                    self.on.retain(|&other| other != channel);
                }
                Said::Ping if self.answers || node.calm => {
                    let mut text = Vec::new();
                    centrifugo::write_pong(&mut text);
                    self.send(Opcode::Text, &text, node, socket);
                }
                Said::Refused { id } => {
                    node.trace.event("refused command", id, 0u64);
                    self.answered(id);
                }
                Said::Done { id } => {
                    if let Asked::Unsubscribe { channel } = self.answered(id) {
                        self.on.retain(|&other| other != channel);
                    }
                }
                Said::History { id, position, held } => {
                    let Asked::History { channel } = self.answered(id) else { panic!("no history") };
                    check_history(&node.relay.channels[channel].truth, position, &held);
                }
                Said::Close => {
                    if node.random.once_in(2) {
                        self.send(Opcode::Close, &[], node, socket);
                    }
                    self.condemned = true;
                }
                Said::Ping | Said::Nothing => {}
            }
        }
    }

    fn answered(&mut self, id: u32) -> Asked {
        let at = self.asked.iter().position(|(asked, _)| *asked == id).expect("an answer to a command that was sent");
        self.asked.remove(at).1
    }

    fn asks_for(&self, channel: usize) -> bool {
        self.asked.iter().any(|(_, asked)| match asked {
            Asked::Subscribe { channel: other, .. } | Asked::Unsubscribe { channel: other } => *other == channel,
            Asked::Connect | Asked::History { .. } | Asked::Publish => false,
        })
    }

    /// Sends what it wants to say in this turn.
    pub fn act(&mut self, name: usize, channels: &[usize], views: &mut [View], node: &mut Node<'_>, socket: SocketId) {
        if self.condemned {
            return;
        }
        if node.calm {
            for &channel in channels {
                if self.connected && !self.on.contains(&channel) && !self.asks_for(channel) {
                    self.subscribe(channel, views, node, socket);
                }
            }
            return;
        }
        let channel = *node.random.pick(channels);
        match node.random.below(120) {
            0..15 if !self.on.contains(&channel) && !self.asks_for(channel) => {
                self.subscribe(channel, views, node, socket);
            }
            15..18 => self.unsubscribe(channel, node, socket),
            18..20 if self.asks_for(channel) => {
                for _ in 0..node.random.within(1..=2) {
                    self.unsubscribe(channel, node, socket);
                }
            }
            20 | 21 => {
                let id = self.number(Asked::Publish);
                let channel = &node.relay.channels[channel].truth.name;
                let data = format!(r#""{channel} client {name} {socket} {id}""#);
                let command = format!(r#"{{"id":{id},"publish":{{"channel":"{channel}","data":{data}}}}}"#);
                self.send(Opcode::Text, command.as_bytes(), node, socket);
            }
            22 => self.send(Opcode::Ping, b"there?", node, socket),
            26 => {
                let id = self.number(Asked::History { channel });
                let at = channel;
                let channel = &node.relay.channels[channel].truth.name;
                let limit = node.random.within(0..=20) as i64 - 1;
                let since = views[at].position.filter(|_| node.random.once_in(2)).map(|Position { epoch, offset }| {
                    let offset = offset.saturating_sub(node.random.below(30) as u64);
                    format!(r#","since":{{"epoch":"{epoch}","offset":{offset}}}"#)
                });
                let (since, reverse) = (since.unwrap_or_default(), node.random.once_in(4));
                let asked = format!(r#""channel":"{channel}","limit":{limit},"reverse":{reverse}{since}"#);
                let text = format!(r#"{{"id":{id},"history":{{{asked}}}}}"#);
                self.send(Opcode::Text, text.as_bytes(), node, socket);
            }
            23 if node.random.once_in(6) => self.misbehave(node, socket),
            24 if node.random.once_in(4) => {
                self.condemned = true;
                self.send(Opcode::Close, &[0x03, 0xe8], node, socket);
            }
            _ => {}
        }
    }

    fn misbehave(&mut self, node: &mut Node<'_>, socket: SocketId) {
        node.trace.event("misbehaves", socket as u64, 0u64);
        self.condemned = true;
        match node.random.below(5) {
            0 => self.send(Opcode::Text, b"{\"id\":", node, socket),
            1 => self.send(Opcode::Binary, b"\0", node, socket),
            2 => self.send(Opcode::Text, b"\xff\xff", node, socket),
            3 => self.send(Opcode::Text, &[b' '; 100_000], node, socket),
            _ => node.kernel.write(socket, &[0xff; 40]),
        }
    }

    fn subscribe(&mut self, channel: usize, views: &mut [View], node: &mut Node<'_>, socket: SocketId) {
        let view = &mut views[channel];
        if !node.calm && node.random.once_in(8) {
            let truth = &node.relay.channels[channel].truth;
            if view.position.is_some() && truth.records.len() > view.next {
                node.trace.event("another node", socket as u64, channel as u64);
                view.visit(truth, node.random.within(view.next..=truth.records.len()));
            }
        }
        let recover = view.position.filter(|_| node.calm || !node.random.once_in(4));
        let id = self.number(Asked::Subscribe { channel, recover });
        let epoch = recover.map(|position| position.epoch.to_string());
        let recover = epoch.as_deref().zip(recover.map(|position| position.offset));
        let mut text = Vec::new();
        centrifugo::write_subscribe_command(&mut text, id, &node.relay.channels[channel].truth.name, recover);
        self.send(Opcode::Text, &text, node, socket);
    }

    fn unsubscribe(&mut self, channel: usize, node: &mut Node<'_>, socket: SocketId) {
        node.trace.event("asks to unsubscribe", socket as u64, channel as u64);
        let id = self.number(Asked::Unsubscribe { channel });
        let channel = &node.relay.channels[channel].truth.name;
        let text = format!(r#"{{"id":{id},"unsubscribe":{{"channel":"{channel}"}}}}"#);
        self.send(Opcode::Text, text.as_bytes(), node, socket);
    }
}

/// What our own tools do not read of a reply.
#[derive(serde::Deserialize)]
struct Reply<'a> {
    id: u32,
    #[serde(borrow)]
    history: Option<History<'a>>,
}

#[derive(serde::Deserialize)]
#[serde(default)]
#[derive(Default)]
struct History<'a> {
    epoch: &'a str,
    offset: u64,
    #[serde(borrow)]
    publications: Vec<centrifugo::Publication<'a>>,
}

/// A history is a run of what was published in its epoch up to its position.
fn check_history(truth: &Truth, position: Position, held: &[(String, u64)]) {
    for (data, offset) in held {
        let of = &truth.records[find(truth, data)];
        assert_eq!((of.position.offset, of.position.epoch, of.positioned), (*offset, position.epoch, true), "{of:?}");
        assert!(*offset <= position.offset, "{of:?} is past the head of its history");
    }
    let (forward, reverse) =
        (held.is_sorted_by(|(_, one), (_, next)| one < next), held.is_sorted_by(|(_, one), (_, next)| one > next));
    assert!(forward || reverse, "a history out of order: {held:?}");
}

fn said_by(line: &str) -> Said {
    let message = centrifugo::server_messages(line).next().expect("a message a line").expect("JSON");
    match message {
        ServerMessage::Connected { .. } => Said::Connected,
        ServerMessage::Subscribed { id, epoch, offset, recovered, was_recovering, publications } => Said::Subscribed {
            id,
            position: Position { epoch: epoch.parse().expect("an epoch"), offset },
            recovered,
            was_recovering,
            missed: publications.into_iter().map(|of| (of.data.get().to_owned(), of.offset)).collect(),
        },
        ServerMessage::Publication { channel, publication } => Said::Publication {
            channel: channel.into_owned(),
            data: publication.data.get().to_owned(),
            offset: publication.offset,
        },
        ServerMessage::Ping => Said::Ping,
        ServerMessage::Error { id, .. } => Said::Refused { id },
        ServerMessage::Unsubscribe { channel, .. } => Said::Unsubscribed { channel: channel.into_owned() },
        ServerMessage::Disconnect { .. } => panic!("a disconnect push on a WebSocket"),
        ServerMessage::Other => {
            let reply: Reply = serde_json::from_str(line).expect("JSON");
            let id = reply.id;
            reply.history.map_or(Said::Done { id }, |history| Said::History {
                id,
                position: Position { epoch: history.epoch.parse().expect("an epoch"), offset: history.offset },
                held: history.publications.into_iter().map(|of| (of.data.get().to_owned(), of.offset)).collect(),
            })
        }
    }
}
