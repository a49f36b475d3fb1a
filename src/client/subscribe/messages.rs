//! Subscribing over WebSocket, with the Centrifugo protocol.

use std::io::Write;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::{Args, Data, Line, Printer, Stop, connect};
use crate::client::http::{self, Connection, Response};
use crate::limits::CLIENT_EVENT_BYTES;
use crate::wire::centrifugo::{self, Publication, ServerMessage};
use crate::wire::websocket::{self, Decoder, Event, Opcode};

/// Id of the `connect` command; the `subscribe` command of channel `n` has the id `n` + 2.
const CONNECT_ID: u32 = 1;
const FIRST_SUBSCRIBE_ID: u32 = CONNECT_ID + 1;

/// The subscription between attempts.
pub(super) struct Messages {
    /// By channel: epoch and offset of the last publication seen.
    places: Vec<Option<(String, u64)>>,
}

impl Messages {
    pub(super) fn new(args: &Args) -> Result<Self, String> {
        let mut places = vec![None; args.channels.len()];
        if let Some(cursor) = &args.last_event_id {
            places[0] = Some(place_of(cursor)?);
            if args.channels.len() > 1 {
                return Err("--last-event-id with --websocket; allowed: one channel".into());
            }
        }
        Ok(Self { places })
    }

    /// Where the next attempt begins, for people.
    pub(super) fn place(&self) -> String {
        match self.places.as_slice() {
            [Some((epoch, offset))] => format!("after {epoch}.{offset}"),
            places if places.iter().any(Option::is_some) => "after the last publications".into(),
            _ => "from now on".into(),
        }
    }

    /// Opens the connection and follows it to its end; sets `opened` once the node has accepted it.
    pub(super) fn follow<O: Write, N: Write>(
        &mut self,
        args: &Args,
        printer: &mut Printer<O, N>,
        opened: &mut bool,
    ) -> Stop {
        let Err(stop) = self.try_follow(args, printer, opened) else {
            return Stop::lost("the server closed the connection without a word");
        };
        stop
    }

    fn try_follow<O: Write, N: Write>(
        &mut self,
        args: &Args,
        printer: &mut Printer<O, N>,
        opened: &mut bool,
    ) -> Result<(), Stop> {
        let mut socket = Socket::open(args)?;
        let mut commands = Vec::new();
        centrifugo::write_connect_command(&mut commands, CONNECT_ID, "", "weir");
        for (id, (name, place)) in (FIRST_SUBSCRIBE_ID..).zip(args.channels.iter().zip(&self.places)) {
            commands.push(centrifugo::SEPARATOR);
            let recover = place.as_ref().map(|(epoch, offset)| (epoch.as_str(), *offset));
            centrifugo::write_subscribe_command(&mut commands, id, name, recover);
        }
        socket.send(Opcode::Text, &commands)?;
        let mut decoder = Decoder::client();
        loop {
            let mut part = socket.connection.read_part()?;
            if part.is_empty() {
                return Ok(());
            }
            let mut rest = part.as_mut_slice();
            while let Some(event) = decoder
                .next(&mut rest, CLIENT_EVENT_BYTES)
                .map_err(|error| Stop::Refused(format!("bad WebSocket frame: {error}")))?
            {
                match event {
                    Event::Text(text) => self.take(&text, args, printer, &mut socket, opened)?,
                    Event::Ping(payload) => socket.send(Opcode::Pong, &payload)?,
                    Event::Binary(_) | Event::Pong(_) => {}
                    Event::Close { code, reason } => return Err(closed(code.unwrap_or(1005), &reason)),
                }
            }
        }
    }

    fn take<O: Write, N: Write>(
        &mut self,
        text: &str,
        args: &Args,
        printer: &mut Printer<O, N>,
        socket: &mut Socket,
        opened: &mut bool,
    ) -> Result<(), Stop> {
        for message in centrifugo::server_messages(text) {
            match message.map_err(|error| Stop::Refused(format!("bad message: {error}")))? {
                ServerMessage::Connected { pong, .. } => {
                    socket.answers_pings = pong;
                    *opened = true;
                }
                ServerMessage::Subscribed { id, epoch, offset, recovered, was_recovering, publications } => {
                    let index = id.wrapping_sub(FIRST_SUBSCRIBE_ID) as usize;
                    let Some(name) = args.channels.get(index) else { continue };
                    if was_recovering && !recovered {
                        let (epoch, last) = self.places[index].take().unwrap_or_default();
                        printer.note(&format!("gap in {name}: some of what followed {epoch}.{last} is gone"));
                    }
                    let first = publications.first().map_or(offset, |first| first.offset.saturating_sub(1));
                    self.places[index] = Some((epoch.into_owned(), first));
                    for publication in publications {
                        self.publication(index, name, &publication, printer)?;
                    }
                    if let Some((_, place)) = &mut self.places[index] {
                        *place = offset;
                    }
                }
                ServerMessage::Publication { channel, publication } => {
                    let Some(index) = args.channels.iter().position(|name| *name == channel) else { continue };
                    self.publication(index, &channel, &publication, printer)?;
                }
                ServerMessage::Ping if socket.answers_pings => {
                    let mut pong = Vec::new();
                    centrifugo::write_pong(&mut pong);
                    socket.send(Opcode::Text, &pong)?;
                }
                ServerMessage::Error { code, message, temporary, .. } => {
                    let reason = format!("error {code}: {message}");
                    return Err(if temporary { Stop::lost(reason) } else { Stop::Refused(reason) });
                }
                ServerMessage::Disconnect { code, reason } => return Err(closed(code as u16, &reason)),
                ServerMessage::Unsubscribe { channel, code, reason } => {
                    let reason = format!("unsubscribed from {channel}, code {code}: {reason}");
                    // 2500 and above ask the client to subscribe again (Centrifugo, unsubscribe codes).
                    return Err(if code >= 2500 { Stop::lost(reason) } else { Stop::Refused(reason) });
                }
                ServerMessage::Ping | ServerMessage::Other => {}
            }
        }
        Ok(())
    }

    fn publication<O: Write, N: Write>(
        &mut self,
        index: usize,
        channel: &str,
        publication: &Publication<'_>,
        printer: &mut Printer<O, N>,
    ) -> Result<(), Stop> {
        let offset = (publication.offset > 0).then_some(publication.offset);
        if let (Some((_, place)), Some(offset)) = (&mut self.places[index], offset) {
            *place = offset;
        }
        printer.publication(&Line { channel, id: None, offset, data: Data::Json(publication.data) })
    }
}

/// Epoch and offset of a cursor `tag.epoch.offset`.
fn place_of(cursor: &str) -> Result<(String, u64), String> {
    let mut fields = cursor.split('.');
    match (fields.next(), fields.next(), fields.next().map(str::parse), fields.next()) {
        (Some(_), Some(epoch), Some(Ok(offset)), None) => Ok((epoch.into(), offset)),
        _ => Err(format!("--last-event-id {cursor:?}; allowed with --websocket: one tag.epoch.offset")),
    }
}

fn closed(code: u16, reason: &str) -> Stop {
    let text = format!("the server closed the connection, code {code}: {reason}");
    if centrifugo::reconnects(code) { Stop::lost(text) } else { Stop::Refused(text) }
}

/// An open WebSocket.
struct Socket {
    connection: Connection,
    answers_pings: bool,
}

impl Socket {
    fn open(args: &Args) -> Result<Self, Stop> {
        let key = STANDARD.encode(random::<16>()?);
        let mut connection = connect(args)?;
        let target = format!("{}/connection/websocket", args.url.prefix);
        connection.send(&http::upgrade_request(&args.url.authority(), &target, &key))?;
        let head = connection.read_head()?;
        if head.status != 101 {
            let body = connection.read_body(&head, "GET")?;
            return Err(Stop::of_response(&Response { head, body }));
        }
        if head.header("sec-websocket-accept") != Some(&websocket::accept_key(&key)) {
            return Err(Stop::Refused("the answer to the WebSocket upgrade has the wrong Sec-WebSocket-Accept".into()));
        }
        Ok(Self { connection, answers_pings: false })
    }

    fn send(&mut self, opcode: Opcode, payload: &[u8]) -> Result<(), Stop> {
        let mut frame = Vec::new();
        websocket::write_masked_frame(&mut frame, opcode, payload, random()?);
        Ok(self.connection.send(&frame)?)
    }
}

fn random<const BYTES: usize>() -> Result<[u8; BYTES], Stop> {
    let mut bytes = [0; BYTES];
    getrandom::fill(&mut bytes).map_err(|error| Stop::Refused(format!("no random bytes: {error}")))?;
    Ok(bytes)
}
