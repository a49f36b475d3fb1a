//! The Centrifugo client protocol on an established WebSocket: commands in, replies and subscriptions out.

mod carried;
mod history;

use self::history::HistoryAsked;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::connection::{Connection, ConnectionId, Phase, Place, Protocol, Subscription};
use super::core::{Asker, Core, FAREWELL, OpenWaiter};
use super::disconnect::Disconnect;
use super::mailbox::{Publish, Reply, RequestError, ToRelay};
use super::older::Returner;
use super::timer::{Tick, tick_of, ticks};
use crate::limits::{CONNECT_MILLIS, CONTROL_BYTES, OPEN_MILLIS, REPLY_BYTES};
use crate::log::channel_log::Located;
use crate::log::channel_table::{ChannelId, Slot};
use crate::log::cursor::Cursor;
use crate::log::frame::{Frame, FrameKind, Micros};
use crate::log::position::{Epoch, Position};
use crate::wire::centrifugo::{self, Command, ConnectResult, ErrorCode, Method, SubscribeResult};
use crate::wire::websocket::{self, Decoder, Event, Opcode, ProtocolError};
use crate::wire::{channel_name, sse};

/// A command that waits for its channel to go live, or for what lies before the channel's log.
#[derive(Debug)]
struct Pending {
    channel: ChannelId,
    command: u32,
    /// When it is refused as temporarily impossible.
    until: Tick,
    asks: Asks,
}

/// What a waiting command asks for.
#[derive(Debug)]
enum Asks {
    Subscribe {
        recover: Option<Recover>,
        /// The `unsubscribe` command that came meanwhile: answered after it.
        then_unsubscribe: Option<u32>,
    },
    History(HistoryAsked),
}

impl Pending {
    /// Whether it subscribes to a channel.
    fn subscribes_to(&self, channel: ChannelId) -> bool {
        self.channel == channel && matches!(self.asks, Asks::Subscribe { .. })
    }
}

/// The position a client wants to go on from. None when its epoch is not one of ours.
type Recover = Option<Position>;

/// What a WebSocket connection has beside what every connection has.
#[derive(Debug)]
pub struct Session {
    decoder: Decoder,
    opened: Tick,
    connected: bool,
    pending: Vec<Pending>,
    pinged: Tick,
    /// A ping is unanswered.
    waits_for_pong: bool,
}

impl Session {
    /// A session whose socket was established at `now`.
    #[must_use]
    pub fn new(now: Tick) -> Self {
        Self {
            decoder: Decoder::server(),
            opened: now,
            connected: false,
            pending: Vec::new(),
            pinged: now,
            waits_for_pong: false,
        }
    }
}

impl Core {
    /// Takes in what arrived on a WebSocket. Its session is out of the connection meanwhile.
    pub(super) fn feed_session(&mut self, slot: Slot, session: &mut Session, bytes: &mut [u8], now: Micros) {
        let most = self.settings.websocket.message_bytes;
        let mut input = bytes;
        loop {
            let phase = self.connections[slot as usize].phase;
            match session.decoder.next(&mut input, most) {
                Ok(None) => return,
                _ if phase == Phase::Closing => return,
                // A failed decoder fails every further call alike: whatever the phase, nothing more is read.
                Err(error) => {
                    self.shed(slot, disconnect_of(error), now);
                    return;
                }
                Ok(Some(Event::Close { code, .. })) => {
                    if phase == Phase::Open {
                        let mut answer = Vec::new();
                        websocket::write_close_answer(&mut answer, code);
                        self.part(slot, Disconnect::ClientClosed, &answer, FAREWELL, now);
                    } else {
                        // The answer to our close frame: both sides have said everything.
                        self.finish(slot, false);
                    }
                    return;
                }
                _ if phase != Phase::Open => {}
                Ok(Some(Event::Text(text))) => self.take_commands(slot, session, &text, now),
                Ok(Some(Event::Binary(_))) => self.shed(slot, Disconnect::BadRequest, now),
                Ok(Some(Event::Ping(payload))) => {
                    websocket::write_pong(&mut self.connections[slot as usize].control, &payload);
                    self.queue(slot);
                }
                Ok(Some(Event::Pong(_))) => {}
            }
            if self.connections[slot as usize].control.len() > CONTROL_BYTES {
                self.shed(slot, Disconnect::Slow, now);
            }
        }
    }

    /// Carries out the commands of one frame; their replies leave in one frame too.
    fn take_commands(&mut self, slot: Slot, session: &mut Session, text: &str, now: Micros) {
        let mut replies = Vec::new();
        for command in centrifugo::commands(text) {
            let before = replies.len();
            let outcome = match command {
                Ok(command) => self.take_command(slot, session, command, &mut replies, now),
                Err(_) => Err(Disconnect::BadRequest),
            };
            if let Err(why) = outcome {
                self.reply(slot, &replies);
                self.shed(slot, why, now);
                return;
            }
            if replies.len() > before {
                replies.push(b'\n');
            }
        }
        self.reply(slot, &replies);
    }

    fn reply(&mut self, slot: Slot, replies: &[u8]) {
        let Some(text) = replies.strip_suffix(b"\n").or(Some(replies)).filter(|text| !text.is_empty()) else { return };
        write_message(&mut self.connections[slot as usize].control, |out| out.extend_from_slice(text));
        self.queue(slot);
    }

    fn take_command(
        &mut self,
        slot: Slot,
        session: &mut Session,
        Command { id, method }: Command<'_>,
        out: &mut Vec<u8>,
        now: Micros,
    ) -> Result<(), Disconnect> {
        match method {
            Method::Connect(_) if !session.connected => {
                session.connected = true;
                session.pinged = tick_of(now);
                let connection = self.connections[slot as usize].id;
                let result = ConnectResult {
                    client: &self.client_id(connection),
                    version: concat!("weir ", env!("CARGO_PKG_VERSION")),
                    ping: self.settings.websocket.ping.as_secs().max(1) as u32,
                    pong: true,
                    session: "",
                    node: "",
                };
                centrifugo::write_connect(out, id, &result);
            }
            _ if !session.connected => return Err(Disconnect::BadRequest),
            Method::Connect(_) | Method::Unknown => return Err(Disconnect::BadRequest),
            Method::Ping if id == 0 => {
                // A pong. One that nobody asked for breaks the protocol.
                if !std::mem::take(&mut session.waits_for_pong) {
                    return Err(Disconnect::BadRequest);
                }
            }
            Method::Ping => centrifugo::write_empty(out, id),
            Method::Send => {}
            Method::Subscribe(subscribe) => {
                let recover = subscribe.recover.then(|| {
                    let epoch = subscribe.epoch.parse::<Epoch>().ok()?;
                    Some(Position { epoch, offset: subscribe.offset })
                });
                if let Err(code) = self.take_subscribe(slot, session, id, &subscribe.channel, recover, out, now) {
                    centrifugo::write_error(out, id, code);
                }
            }
            Method::Unsubscribe { channel } => {
                if let Some(index) = self.subscription_of(slot, &channel) {
                    if self.connections[slot as usize].cut == Some(index as u16) && !self.keep_cut(slot) {
                        return Err(Disconnect::Slow);
                    }
                    let channel = self.connections[slot as usize].subscriptions[index].channel;
                    let subscribes = |pending: &&mut Pending| pending.subscribes_to(channel);
                    match session.pending.iter_mut().find(subscribes).map(|pending| &mut pending.asks) {
                        Some(Asks::Subscribe { then_unsubscribe: later @ None, .. }) => {
                            *later = Some(id);
                            return Ok(());
                        }
                        // An earlier command will do it; this one is answered at once.
                        Some(_) => {}
                        None => {
                            self.unsubscribe(slot, index);
                            for waiting in session.pending.extract_if(.., |pending| pending.channel == channel) {
                                centrifugo::write_error(out, waiting.command, ErrorCode::PermissionDenied);
                                out.push(b'\n');
                            }
                        }
                    }
                }
                centrifugo::write_unsubscribe(out, id);
            }
            Method::Publish(publish) => {
                let allowed = self.settings.websocket.client_publish;
                if !allowed || self.subscription_of(slot, &publish.channel).is_none() {
                    centrifugo::write_error(out, id, ErrorCode::PermissionDenied);
                } else if publish.data.get().len() > self.settings.limits.publication_bytes {
                    centrifugo::write_error(out, id, ErrorCode::LimitExceeded);
                } else {
                    let publish = Publish {
                        channel: Arc::from(&*publish.channel),
                        data: Bytes::copy_from_slice(publish.data.get().as_bytes()),
                        idempotency_key: None,
                    };
                    let connection = self.connections[slot as usize].id;
                    self.ask(Asker::Command { slot, connection, command: id }, |shard, request| ToRelay::Publish {
                        shard,
                        request,
                        publish,
                    });
                }
            }
            Method::History(history) => {
                let since = match &history.since {
                    None => None,
                    Some(since) => match since.epoch.parse::<Epoch>() {
                        Ok(epoch) => Some(Position { epoch, offset: since.offset }),
                        Err(_) => {
                            centrifugo::write_error(out, id, ErrorCode::UnrecoverablePosition);
                            return Ok(());
                        }
                    },
                };
                let asked = HistoryAsked { since, limit: history.limit, reverse: history.reverse };
                self.take_history(slot, session, id, &history.channel, asked, out, now);
            }
            Method::Rpc { .. } => centrifugo::write_error(out, id, ErrorCode::MethodNotFound),
            Method::Presence { .. }
            | Method::PresenceStats { .. }
            | Method::Refresh { .. }
            | Method::SubRefresh { .. } => {
                centrifugo::write_error(out, id, ErrorCode::NotAvailable);
            }
        }
        Ok(())
    }

    /// Whether so much waits to be read by the client that nothing large may be added.
    fn replies_wait(&self, slot: Slot, out: &[u8]) -> bool {
        self.connections[slot as usize].control.len() + out.len() > REPLY_BYTES
    }

    fn subscription_of(&self, slot: Slot, name: &str) -> Option<usize> {
        let subscriptions = &self.connections[slot as usize].subscriptions;
        subscriptions.iter().position(|subscription| {
            self.channels.get(subscription.channel).is_some_and(|channel| &*channel.name == name)
        })
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one command and where its reply goes")]
    fn take_subscribe(
        &mut self,
        slot: Slot,
        session: &mut Session,
        command: u32,
        name: &str,
        recover: Option<Recover>,
        out: &mut Vec<u8>,
        now: Micros,
    ) -> Result<(), ErrorCode> {
        channel_name::check(name).map_err(|_| ErrorCode::BadRequest)?;
        if self.subscription_of(slot, name).is_some() {
            return Err(ErrorCode::AlreadySubscribed);
        }
        if self.connections[slot as usize].subscriptions.len() >= self.settings.limits.channels {
            return Err(ErrorCode::LimitExceeded);
        }
        if self.replies_wait(slot, out) {
            return Err(ErrorCode::TooManyRequests);
        }
        let channel = self.hold(&Arc::from(name));
        let connection = &mut self.connections[slot as usize];
        connection.subscriptions.reserve_exact(1);
        connection.subscriptions.push(Subscription { channel, place: Place::Opening });
        let id = connection.id;
        self.recorder.metrics.subscriptions.add(1);
        let live = self.channels.get(channel).is_some_and(|channel| channel.log().is_some());
        let waits = match recover {
            _ if !live => {
                self.waiters.entry(channel).or_default().push(OpenWaiter::Subscribe(slot, id));
                Ok(true)
            }
            Some(Some(position)) => {
                let returner = Returner::Command { slot, connection: id, command };
                self.await_older(channel, position, returner, now)
            }
            Some(None) | None => Ok(false),
        };
        match waits {
            Ok(false) => self.go_live(slot, channel, command, recover, out),
            Ok(true) => {
                let until = tick_of(now) + ticks(Duration::from_millis(OPEN_MILLIS));
                let asks = Asks::Subscribe { recover, then_unsubscribe: None };
                session.pending.push(Pending { channel, command, until, asks });
            }
            Err(error) => {
                if let Some(index) = self.connections[slot as usize].subscription(channel) {
                    self.unsubscribe(slot, index);
                }
                return Err(code_of(&error));
            }
        }
        Ok(())
    }

    /// Answers a subscribe command on a live channel whose log has what is to be had: the reply carries what the client missed,
    /// up to a bound. What is more than that follows as publications, shared like all others; then the subscription goes on
    /// from the head.
    fn go_live(&mut self, slot: Slot, id: ChannelId, command: u32, recover: Option<Recover>, out: &mut Vec<u8>) {
        let Some(log) = self.channels.get(id).and_then(|channel| channel.log()) else { return };
        let mut cursor = Cursor::at(log.head() + 1);
        let mut missed: Vec<&Arc<Frame>> = Vec::new();
        let mut recovered = false;
        if let Some(Some(position)) = recover
            && let Located::Here(from) = log.locate(position)
        {
            cursor = from.to(cursor.next).resuming(log.head());
            recovered = log.since(from.next).all(|frame| frame.kind != FrameKind::Gap);
            let mut room = self.budgets.reply_bytes;
            for (seq, frame) in (from.next..).zip(log.since(from.next)).take_while(|_| recovered) {
                let bytes = frame.publication_json().len();
                if bytes > room && !missed.is_empty() {
                    cursor = cursor.to(seq);
                    break;
                }
                room = room.saturating_sub(bytes);
                missed.extend(Some(frame).filter(|frame| frame.kind == FrameKind::Publication));
            }
        }
        let reached = log.position_before(cursor.next);
        let result = SubscribeResult {
            recoverable: true,
            positioned: true,
            epoch: &log.position().epoch.to_string(),
            offset: cursor.position(reached).offset,
            recovered,
            was_recovering: recover.is_some(),
        };
        centrifugo::write_subscribe(out, command, &result, missed.into_iter().map(|frame| frame.publication_json()));
        if let Some(index) = self.connections[slot as usize].subscription(id) {
            self.put(slot, index, cursor);
        }
    }

    /// A channel that a connection waits for is live.
    pub(super) fn opened(&mut self, slot: Slot, connection: ConnectionId, channel: ChannelId, now: Micros) {
        let Some(session) = self.session(slot, connection) else { return };
        let Some(at) = session.pending.iter().position(|pending| pending.subscribes_to(channel)) else { return };
        let Pending { command, asks: Asks::Subscribe { recover, .. }, .. } = session.pending[at] else { return };
        let waits = match recover {
            Some(Some(position)) => {
                self.await_older(channel, position, Returner::Command { slot, connection, command }, now)
            }
            Some(None) | None => Ok(false),
        };
        if waits != Ok(true)
            && let Some(session) = self.session(slot, connection)
        {
            let pending = session.pending.swap_remove(at);
            self.end_wait(slot, pending, waits.map(|_| ()));
        }
        self.read_histories(slot, connection, channel, now);
    }

    /// What lies before the log of a channel is there, as far as it is to be had, or nobody knows.
    pub(super) fn older_is_there(
        &mut self,
        slot: Slot,
        connection: ConnectionId,
        channel: ChannelId,
        command: u32,
        outcome: Result<(), RequestError>,
    ) {
        let Some(session) = self.session(slot, connection) else { return };
        let meant = |pending: &Pending| pending.channel == channel && pending.command == command;
        if let Some(at) = session.pending.iter().position(meant) {
            let pending = session.pending.swap_remove(at);
            self.end_wait(slot, pending, outcome);
        }
    }

    /// Answers a command that has waited.
    fn end_wait(&mut self, slot: Slot, pending: Pending, outcome: Result<(), RequestError>) {
        let Pending { channel, command, .. } = pending;
        if let Err(error) = outcome {
            self.give_up(slot, pending, code_of(&error));
            return;
        }
        let mut out = Vec::new();
        match pending.asks {
            Asks::History(asked) => self.write_history(slot, channel, command, asked, &mut out),
            Asks::Subscribe { recover, then_unsubscribe } => {
                self.go_live(slot, channel, command, recover, &mut out);
                if let Some(command) = then_unsubscribe {
                    out.push(b'\n');
                    centrifugo::write_unsubscribe(&mut out, command);
                    if let Some(index) = self.connections[slot as usize].subscription(channel) {
                        self.unsubscribe(slot, index);
                    }
                }
            }
        }
        self.reply(slot, &out);
    }

    /// A channel that a connection waits for will not be live.
    pub(super) fn refused(&mut self, slot: Slot, connection: ConnectionId, channel: ChannelId) {
        let Some(session) = self.session(slot, connection) else { return };
        let refused: Vec<Pending> = session.pending.extract_if(.., |pending| pending.channel == channel).collect();
        for pending in refused {
            self.give_up(slot, pending, ErrorCode::TooManyRequests);
        }
    }

    /// Answers a command that waited in vain, and takes its subscription back if it is one.
    fn give_up(&mut self, slot: Slot, pending: Pending, error: ErrorCode) {
        let Pending { channel, command, asks, .. } = pending;
        let connection = &mut self.connections[slot as usize];
        write_message(&mut connection.control, |out| centrifugo::write_error(out, command, error));
        if let Asks::Subscribe { then_unsubscribe, .. } = asks {
            if let Some(command) = then_unsubscribe {
                write_message(&mut connection.control, |out| centrifugo::write_unsubscribe(out, command));
            }
            if let Some(index) = connection.subscription(channel) {
                self.unsubscribe(slot, index);
            }
        }
        self.queue(slot);
    }

    /// The relay has answered a command.
    pub(super) fn replied(&mut self, slot: Slot, connection: ConnectionId, command: u32, reply: Reply) {
        if self.session(slot, connection).is_none() {
            return;
        }
        let mut out = Vec::new();
        match reply {
            Reply::Published(Ok(_)) => {
                self.recorder.metrics.publishes_ok.add(1);
                centrifugo::write_publish(&mut out, command);
            }
            Reply::Published(Err(error)) => {
                self.recorder.metrics.publishes_refused.add(1);
                centrifugo::write_error(&mut out, command, code_of(&error));
            }
            Reply::History(_) => return,
        }
        self.reply(slot, &out);
    }

    /// The session of a connection that is still the one meant, and open.
    fn session(&mut self, slot: Slot, id: ConnectionId) -> Option<&mut Session> {
        let connection = self.connections.get_mut(slot as usize)?;
        match &mut connection.protocol {
            Protocol::WebSocket(Some(session)) if connection.id == id && connection.phase == Phase::Open => {
                Some(session)
            }
            _ => None,
        }
    }

    /// Pings, and ends what has run out of time.
    pub(super) fn look_at_session(&mut self, slot: Slot, tick: Tick, now: Micros) {
        let (ping, pong) = (ticks(self.settings.websocket.ping), ticks(self.settings.websocket.pong));
        let Connection { protocol: Protocol::WebSocket(Some(session)), blocked, control, .. } =
            &mut self.connections[slot as usize]
        else {
            return;
        };
        if !session.connected {
            if tick >= session.opened + ticks(Duration::from_millis(CONNECT_MILLIS)) {
                self.shed(slot, Disconnect::Stale, now);
            }
            return;
        }
        if session.waits_for_pong && !*blocked && tick >= session.pinged + pong {
            self.shed(slot, Disconnect::NoPong, now);
            return;
        }
        let mut queue = false;
        if !session.waits_for_pong && !*blocked && tick >= session.pinged + ping {
            session.pinged = tick;
            session.waits_for_pong = true;
            write_message(control, centrifugo::write_ping);
            queue = true;
        }
        let overdue: Vec<Pending> = session.pending.extract_if(.., |pending| tick >= pending.until).collect();
        if queue {
            self.queue(slot);
        }
        for pending in overdue {
            self.give_up(slot, pending, ErrorCode::Internal);
        }
    }
}

/// Appends one text frame.
pub(super) fn write_message(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let mut text = Vec::new();
    write(&mut text);
    out.reserve_exact(text.len() + 10);
    websocket::write_header(out, Opcode::Text, text.len());
    out.extend_from_slice(&text);
}

/// The parting words of an event stream: why, and when to come back.
pub(super) fn write_sse_farewell(out: &mut Vec<u8>, why: Disconnect, retry: Duration) {
    sse::write_comment(out, &format!("disconnected: {}", why.reason()));
    sse::write_retry(out, retry.as_millis() as u64);
    sse::end_event(out);
}

/// How a request that failed is answered.
fn code_of(error: &RequestError) -> ErrorCode {
    match error {
        RequestError::Unavailable(_) => ErrorCode::Internal,
        RequestError::Overloaded => ErrorCode::TooManyRequests,
    }
}

fn disconnect_of(error: ProtocolError) -> Disconnect {
    match error.close_code() {
        1007 => Disconnect::InvalidUtf8,
        1009 => Disconnect::MessageTooBig,
        _ => Disconnect::ProtocolError,
    }
}
