//! Connections of another process, taken in at the places where they stand.

use std::time::Duration;

use super::super::connection::{Place, Protocol, Subscription};
use super::super::core::{Core, write_gap};
use super::super::poll::{Poll, Waiting};
use super::super::session::{Session, write_message};
use super::super::timer::{tick_of, ticks};
use super::state::{At, Form, Place as Carried, State, StateError, WaitingPoll};
use crate::log::channel_log::{ChannelLog, Located};
use crate::log::channel_table::{ChannelId, Lane, Slot};
use crate::log::cursor::Cursor;
use crate::log::frame::Micros;
use crate::log::mark::Mark;
use crate::log::position::{Epoch, Position, parse_cursor};
use crate::wire::centrifugo::{self, UnsubscribeCode};

impl Core {
    /// Takes a connection in. It is served from the next turn on.
    ///
    /// # Errors
    /// When its state is not one that a connection may be in, or a channel is not live here. Nothing is held then.
    pub(in crate::shard) fn arrive(&mut self, state: State, now: Micros) -> Result<Slot, StateError> {
        let State { form, silent, subscriptions, mut control } = state;
        let tick = tick_of(now);
        if subscriptions.len() > crate::limits::CHANNELS_PER_CONNECTION_MOST {
            return Err(StateError::Impossible("number of subscriptions"));
        }
        let mut live = Vec::with_capacity(subscriptions.len());
        let (mut lost, mut gap) = (Vec::new(), false);
        let (protocol, lane, pending) = match form {
            Form::Sse if subscriptions.len() == 1 => (Protocol::Sse, Lane::SseSingle, Vec::new()),
            Form::Sse => (Protocol::Sse, Lane::SseMany, Vec::new()),
            Form::WebSocket(conversation) => {
                let session = Box::new(Session::arrived(&conversation, tick)?);
                (Protocol::WebSocket(Some(session)), Lane::WebSocket, conversation.pending)
            }
            Form::Poll(poll) => (Protocol::Poll(Box::new(waiting(poll, tick)?)), Lane::SseMany, Vec::new()),
            Form::Request(_) => return Err(StateError::Impossible("form: a request is the front's")),
        };
        let poll = matches!(protocol, Protocol::Poll(_));
        for Carried { channel, at } in subscriptions {
            // Those without a place are among the commands that wait.
            let Some(at) = at else { continue };
            let Some((id, log)) = self.live(&channel) else { return Err(StateError::NotLive(channel)) };
            let asked = Position { epoch: Epoch(at.epoch), offset: at.offset };
            match place(log, at) {
                _ if poll => live.push((id, Cursor::at(log.head() + 1))),
                Ok(cursor) => live.push((id, cursor)),
                // As at a gap: the client subscribes again with its position and is told what it missed.
                Err(_) if lane == Lane::WebSocket => lost.push(channel),
                Err((available, rest)) => {
                    write_gap(&mut control, &channel, asked, available);
                    gap = true;
                    live.push((id, rest));
                }
            }
        }
        for name in lost {
            write_message(&mut control, |out| {
                centrifugo::write_unsubscribe_push(out, &name, UnsubscribeCode::InsufficientState);
            });
        }
        let slot = self.take_in(protocol, lane, control, &live, silent, now);
        if gap {
            // Where it goes on, before anything is delivered, as for a stream that is resumed.
            self.write_position(slot);
        }
        pending.into_iter().for_each(|pending| self.pend(slot, pending, now));
        if !self.connections[slot as usize].control_due().is_empty() {
            self.queue(slot);
        }
        Ok(slot)
    }

    fn take_in(
        &mut self,
        protocol: Protocol,
        lane: Lane,
        control: Vec<u8>,
        places: &[(ChannelId, Cursor)],
        silent: u64,
        now: Micros,
    ) -> Slot {
        let metrics = &self.recorder.metrics;
        match protocol {
            Protocol::Sse => metrics.sse.add(1),
            Protocol::WebSocket(_) => metrics.websocket.add(1),
            Protocol::Poll(_) => metrics.poll.add(1),
        }
        metrics.subscriptions.add(places.len() as u64);
        let poll = matches!(protocol, Protocol::Poll(_));
        let slot = self.insert(protocol, lane, control, now);
        let connection = &mut self.connections[slot as usize];
        connection.last_sent = tick_of(now).saturating_sub(ticks(Duration::from_millis(silent)));
        connection.subscriptions =
            places.iter().map(|&(channel, cursor)| Subscription { channel, place: Place::Behind(cursor) }).collect();
        for &(channel, _) in places {
            self.channels.hold_again(channel);
        }
        if poll {
            self.answer_poll(slot, false, now);
        } else {
            for (index, &(_, cursor)) in places.iter().enumerate() {
                self.put(slot, index, cursor);
            }
        }
        slot
    }

    /// A live channel by its name.
    fn live(&self, name: &str) -> Option<(ChannelId, &ChannelLog)> {
        let id = self.channels.id_of(name)?;
        Some((id, self.channels.get(id)?.log()?))
    }
}

/// Where a subscription goes on, or what is left of its channel when its place is lost.
fn place(log: &ChannelLog, at: At) -> Result<Cursor, (Position, Cursor)> {
    let At { epoch, offset, unpositioned, floor, backlog } = at;
    let position = Position { epoch: Epoch(epoch), offset };
    let cursor = match log.find(&Mark { position, unpositioned }) {
        Located::Here(cursor) => cursor,
        Located::Gone { available, rest } => return Err((available, rest.resuming(log.head()))),
    };
    // It may have come from a node that was ahead, and be there still.
    let cursor = match floor {
        Some((epoch, offset)) => Cursor::of(cursor.next, Position { epoch: Epoch(epoch), offset }),
        None => cursor,
    };
    let behind = backlog.min(log.head().saturating_sub(cursor.next - 1));
    Ok(if behind == 0 { cursor } else { cursor.resuming(cursor.next - 1 + behind) })
}

fn waiting(of: WaitingPoll, tick: super::super::timer::Tick) -> Result<Waiting, StateError> {
    let WaitingPoll { cursor, known, origin, left } = of;
    let most = crate::limits::CHANNELS_PER_CONNECTION_MOST;
    let cursor = parse_cursor(&cursor, most).map_err(|_| StateError::Impossible("cursor"))?;
    let left = Duration::from_millis(left);
    let poll = Poll { cursor, wait: left, known: known.map(Into::into), origin: origin.map(Into::into) };
    Ok(Waiting { poll, until: tick + ticks(left) })
}
