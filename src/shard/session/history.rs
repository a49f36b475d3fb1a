//! The `history` command: answered from the channel's log, once what it asks for is there.

use std::sync::Arc;
use std::time::Duration;

use super::super::connection::ConnectionId;
use super::super::core::Core;
use super::super::older::Returner;
use super::super::timer::{tick_of, ticks};
use super::{Asks, Pending, Session, code_of};
use crate::limits::{HISTORY_PUBLICATIONS, OPEN_MILLIS};
use crate::log::channel_log::Located;
use crate::log::channel_table::{ChannelId, Slot};
use crate::log::frame::{Frame, FrameKind, Micros};
use crate::log::position::Position;
use crate::wire::centrifugo::{self, ErrorCode, HistoryResult};

/// What a `history` command asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct HistoryAsked {
    /// Only what came after (or, reversed, before) this position.
    pub since: Option<Position>,
    /// Most publications; 0 asks for the position alone, a negative number for as many as there may be.
    pub limit: i32,
    /// Newest first.
    pub reverse: bool,
}

impl HistoryAsked {
    fn most(&self) -> usize {
        usize::try_from(self.limit).unwrap_or(HISTORY_PUBLICATIONS).min(HISTORY_PUBLICATIONS)
    }

    /// The position that the log has to reach back to for it. None when nothing is to be listed.
    fn reaches_back_to(&self, head: Position) -> Option<Position> {
        let other = self.since.is_some_and(|since| since.epoch != head.epoch);
        if self.most() == 0 || other {
            return None;
        }
        let offset = match self.since {
            since if self.reverse => {
                let end = since.map_or(head.offset, |since| since.offset.saturating_sub(1).min(head.offset));
                end.saturating_sub(self.most() as u64)
            }
            Some(since) => since.offset,
            None => 0,
        };
        Some(Position { offset, ..head })
    }
}

impl Core {
    #[expect(clippy::too_many_arguments, reason = "a command, whose it is and where its reply goes")]
    pub(super) fn take_history(
        &mut self,
        slot: Slot,
        session: &mut Session,
        command: u32,
        name: &str,
        asked: HistoryAsked,
        out: &mut Vec<u8>,
        now: Micros,
    ) {
        let Some(index) = self.subscription_of(slot, name) else {
            // Only subscribers may read a channel's history.
            centrifugo::write_error(out, command, ErrorCode::PermissionDenied);
            return;
        };
        // Commands that wait take memory too.
        if self.replies_wait(slot, out) || session.pending.len() > self.settings.limits.channels {
            centrifugo::write_error(out, command, ErrorCode::TooManyRequests);
            return;
        }
        let connection = &self.connections[slot as usize];
        let (id, channel) = (connection.id, connection.subscriptions[index].channel);
        match self.history_waits(slot, id, channel, command, asked, now) {
            Ok(false) => self.write_history(slot, channel, command, asked, out),
            Ok(true) => {
                let until = tick_of(now) + ticks(Duration::from_millis(OPEN_MILLIS));
                session.pending.push(Pending { channel, command, until, asks: Asks::History(asked) });
            }
            Err(code) => centrifugo::write_error(out, command, code),
        }
    }

    /// Whether what a command asks for is still to come: the channel is not live yet, or its log does not reach back far enough.
    fn history_waits(
        &mut self,
        slot: Slot,
        connection: ConnectionId,
        channel: ChannelId,
        command: u32,
        asked: HistoryAsked,
        now: Micros,
    ) -> Result<bool, ErrorCode> {
        let Some(log) = self.channels.get(channel).and_then(|channel| channel.log()) else { return Ok(true) };
        let Some(from) = asked.reaches_back_to(log.position()) else { return Ok(false) };
        let returner = Returner::Command { slot, connection, command };
        self.await_older(channel, from, returner, now).map_err(|error| code_of(&error))
    }

    /// A channel is live: answers the commands that waited for it, or lets them wait for what lies before its log.
    pub(super) fn read_histories(&mut self, slot: Slot, connection: ConnectionId, channel: ChannelId, now: Micros) {
        let Some(session) = self.session(slot, connection) else { return };
        let reads = |pending: &mut Pending| pending.channel == channel && matches!(pending.asks, Asks::History(_));
        let reading: Vec<Pending> = session.pending.extract_if(.., reads).collect();
        for pending in reading {
            let Asks::History(asked) = pending.asks else { continue };
            match self.history_waits(slot, connection, channel, pending.command, asked, now) {
                Ok(false) => self.end_wait(slot, pending, Ok(())),
                Ok(true) => {
                    if let Some(session) = self.session(slot, connection) {
                        session.pending.push(pending);
                    }
                }
                Err(code) => self.give_up(slot, pending, code),
            }
        }
    }

    /// Answers from the log as it is.
    pub(super) fn write_history(
        &self,
        slot: Slot,
        channel: ChannelId,
        command: u32,
        asked: HistoryAsked,
        out: &mut Vec<u8>,
    ) {
        let HistoryAsked { since, reverse, .. } = asked;
        let subscribed = self.connections[slot as usize].subscription(channel).is_some();
        let log = self.channels.get(channel).and_then(|channel| channel.log()).filter(|_| subscribed);
        let Some(log) = log else {
            // It was unsubscribed meanwhile.
            centrifugo::write_error(out, command, ErrorCode::PermissionDenied);
            return;
        };
        let (head, most) = (log.position(), asked.most());
        let lost = |since: Position| {
            let hole = most > 0 && !reverse && matches!(log.locate(since), Located::Gone { .. });
            since.epoch != head.epoch || hole
        };
        if since.is_some_and(lost) {
            centrifugo::write_error(out, command, ErrorCode::UnrecoverablePosition);
            return;
        }
        let wanted = |frame: &&Arc<Frame>| {
            let offset = frame.position.offset;
            let side = since.is_none_or(|since| if reverse { offset < since.offset } else { offset > since.offset });
            frame.kind == FrameKind::Publication && frame.position.epoch == head.epoch && side
        };
        let held = log.since(log.first()).filter(wanted);
        let frames: Vec<&Arc<Frame>> =
            if reverse { held.rev().take(most).collect() } else { held.take(most).collect() };
        let result = HistoryResult { epoch: &head.epoch.to_string(), offset: head.offset };
        centrifugo::write_history(out, command, &result, frames.into_iter().map(|frame| frame.publication_json()));
    }
}
