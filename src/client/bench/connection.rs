//! One subscribing connection, without its socket: bytes in, deliveries and answers out.

use super::kernel::Nanos;
use super::plan::{Plan, Protocol};
use super::stamp::{Carry, Scanner};
use super::tally::Tally;
use crate::client::http;
use crate::limits::CLIENT_EVENT_BYTES;
use crate::wire::centrifugo::{self, ServerMessage};
use crate::wire::http1;
use crate::wire::websocket::{self, Decoder, Event, Opcode};

/// Id of the `subscribe` command; `connect` has 1.
const SUBSCRIBE_ID: u32 = 2;
/// The key of every WebSocket handshake. It need not be secret: it only proves that the answer was not cached.
const HANDSHAKE_KEY: &str = "d2VpciBiZW5jaCBrZXkgMQ==";

/// Where a connection is in its life.
#[derive(Debug)]
pub enum State {
    /// The request is on its way or sent; what has come of the response head.
    Opening(Vec<u8>),
    /// The WebSocket is open, the subscription is not confirmed.
    Subscribing(Decoder),
    /// Subscribed to an event stream.
    Events(Carry),
    /// Subscribed over WebSocket.
    Messages(Decoder),
}

/// Why a connection cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum End {
    /// Another status than the one that opens a stream.
    #[error("{0}")]
    Refused(String),
    /// Not HTTP, or not the right answer to the upgrade.
    #[error("bad response: {0}")]
    Response(String),
    /// Not WebSocket, or not Centrifugo's protocol.
    #[error("bad message: {0}")]
    Message(String),
    /// A refused command.
    #[error("error {code}: {message}")]
    Command {
        /// Centrifugo's error code.
        code: u32,
        /// Its text.
        message: String,
    },
    /// The server unsubscribed the connection.
    #[error("unsubscribed, code {code}: {reason}")]
    Unsubscribed {
        /// Centrifugo's unsubscribe code.
        code: u32,
        /// Its text.
        reason: String,
    },
    /// The server said it closes.
    #[error("closed, code {code}: {reason}")]
    Closed {
        /// The close code; 1005 when there was none.
        code: u32,
        /// Its text.
        reason: String,
    },
    /// The stream ended without a word.
    #[error("the stream ended")]
    Eof,
    /// The socket failed.
    #[error("{0}")]
    Socket(String),
}

/// What one call needs besides the connection.
#[derive(Debug)]
pub struct Surroundings<'a> {
    /// The worker's plan.
    pub plan: &'a Plan,
    /// Finds stamps.
    pub scanner: &'a Scanner,
    /// Takes deliveries.
    pub tally: &'a mut Tally,
    /// Takes what is to be sent.
    pub answer: &'a mut Vec<u8>,
    /// When the input was read.
    pub now: Nanos,
}

/// A subscription to one channel.
#[derive(Debug)]
pub struct Subscriber {
    /// Among the worker's connections.
    pub number: usize,
    /// Among the run's channels.
    pub channel: u32,
    state: State,
}

impl Subscriber {
    /// A connection that will subscribe to `channel`.
    #[must_use]
    pub fn new(number: usize, channel: u32) -> Self {
        Self { number, channel, state: State::Opening(Vec::new()) }
    }

    /// The request that opens the stream.
    #[must_use]
    pub fn request(&self, plan: &Plan) -> Vec<u8> {
        let channel = http1::percent_encode(&plan.channel_name(self.channel));
        let target = plan.subscribe_path.replace("{channel}", &channel);
        match plan.protocol {
            Protocol::Sse => http::event_stream_request(&plan.authority, &target, None),
            Protocol::Websocket => http::upgrade_request(&plan.authority, &target, HANDSHAKE_KEY),
        }
    }

    /// Whether the server confirmed the subscription.
    #[must_use]
    pub fn is_live(&self) -> bool {
        matches!(self.state, State::Events(_) | State::Messages(_))
    }

    /// Takes what was read; `input` is used as scratch.
    ///
    /// # Errors
    /// Why the connection is over.
    pub fn receive(&mut self, input: &mut [u8], around: &mut Surroundings<'_>) -> Result<(), End> {
        match &mut self.state {
            State::Opening(head) => {
                head.extend_from_slice(input);
                let mut head = std::mem::take(head);
                match self.open(&head, around)? {
                    Some(used) if used < head.len() => self.receive(&mut head[used..], around),
                    Some(_) => Ok(()),
                    None => {
                        self.state = State::Opening(head);
                        Ok(())
                    }
                }
            }
            State::Events(carry) => {
                let (number, channel, now) = (self.number, self.channel, around.now);
                around.scanner.scan(carry, input, |stamp| around.tally.deliver(number, channel, stamp, now));
                Ok(())
            }
            State::Subscribing(_) | State::Messages(_) => self.receive_messages(input, around),
        }
    }

    /// Reads the response head; how long it is, once it is whole.
    fn open(&mut self, bytes: &[u8], around: &mut Surroundings<'_>) -> Result<Option<usize>, End> {
        let parsed = http1::parse_response_head(bytes).map_err(|error| End::Response(error.to_string()))?;
        let Some((head, used)) = parsed else { return Ok(None) };
        let (wanted, next) = match around.plan.protocol {
            Protocol::Sse => (200, State::Events(Carry::default())),
            Protocol::Websocket => (101, State::Subscribing(Decoder::client())),
        };
        if head.status != wanted {
            return Err(End::Refused(http::complaint(head.status, &bytes[used..])));
        }
        if around.plan.protocol == Protocol::Websocket {
            if head.header("sec-websocket-accept") != Some(&websocket::accept_key(HANDSHAKE_KEY)) {
                return Err(End::Response("Sec-WebSocket-Accept does not answer the key".into()));
            }
            let mut commands = Vec::new();
            centrifugo::write_connect_command(&mut commands, 1, "", "weir-bench");
            commands.push(centrifugo::SEPARATOR);
            let channel = around.plan.channel_name(self.channel);
            centrifugo::write_subscribe_command(&mut commands, SUBSCRIBE_ID, &channel, None);
            self.send_text(&commands, around);
        }
        self.state = next;
        Ok(Some(used))
    }

    fn receive_messages(&mut self, mut input: &mut [u8], around: &mut Surroundings<'_>) -> Result<(), End> {
        loop {
            let (State::Subscribing(decoder) | State::Messages(decoder)) = &mut self.state else { return Ok(()) };
            match decoder.next(&mut input, CLIENT_EVENT_BYTES).map_err(|error| End::Message(error.to_string()))? {
                None => return Ok(()),
                Some(Event::Text(text)) => self.receive_text(&text, around)?,
                Some(Event::Ping(payload)) => self.send(Opcode::Pong, &payload, around),
                Some(Event::Pong(_) | Event::Binary(_)) => {}
                Some(Event::Close { code, reason }) => {
                    return Err(End::Closed { code: code.unwrap_or(1005).into(), reason: reason.into_owned() });
                }
            }
        }
    }

    /// Takes one message: lines of JSON. A line with a stamp in it is a publication and is not parsed further.
    fn receive_text(&mut self, text: &str, around: &mut Surroundings<'_>) -> Result<(), End> {
        for line in text.split('\n') {
            let mut found = false;
            let (number, channel, now) = (self.number, self.channel, around.now);
            // What a line cuts off is cut off for good: a payload has no line break in it.
            let mut carry = Carry::default();
            around.scanner.scan(&mut carry, line.as_bytes(), |stamp| {
                found = true;
                around.tally.deliver(number, channel, stamp, now);
            });
            if !found {
                self.receive_line(line, around)?;
            }
        }
        Ok(())
    }

    fn receive_line(&mut self, line: &str, around: &mut Surroundings<'_>) -> Result<(), End> {
        for message in centrifugo::server_messages(line) {
            match message.map_err(|error| End::Message(error.to_string()))? {
                ServerMessage::Subscribed { id: SUBSCRIBE_ID, .. } => {
                    if let State::Subscribing(decoder) = &mut self.state {
                        self.state = State::Messages(std::mem::replace(decoder, Decoder::client()));
                    }
                }
                ServerMessage::Ping => {
                    let mut pong = Vec::new();
                    centrifugo::write_pong(&mut pong);
                    self.send_text(&pong, around);
                }
                ServerMessage::Error { code, message, .. } => {
                    return Err(End::Command { code, message: message.into_owned() });
                }
                ServerMessage::Unsubscribe { code, reason, .. } => {
                    return Err(End::Unsubscribed { code, reason: reason.into_owned() });
                }
                ServerMessage::Disconnect { code, reason } => {
                    return Err(End::Closed { code, reason: reason.into_owned() });
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn send_text(&self, text: &[u8], around: &mut Surroundings<'_>) {
        self.send(Opcode::Text, text, around);
    }

    fn send(&self, opcode: Opcode, payload: &[u8], around: &mut Surroundings<'_>) {
        // Masking guards proxies between a browser's script and a server (RFC 6455, section 10.3). There is neither
        // here, so a key that differs by connection and time will do.
        let key = (self.number as u32 ^ around.now as u32).wrapping_mul(0x9e37_79b9).to_ne_bytes();
        websocket::write_masked_frame(around.answer, opcode, payload, key);
    }
}
