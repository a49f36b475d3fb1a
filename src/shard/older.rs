//! Clients that come back from before a channel's log: what they lack is fetched from the backbone once for all of them and
//! put in front of the log, and only then are they answered. Without an answer they are sent away to try again: a gap is
//! announced only when the backbone does not have it either.

use super::connection::{Connection, ConnectionId, Place, Protocol};
use super::core::{Answer, Asker, Core};
use super::disconnect::Disconnect;
use super::mailbox::{HistoryQuery, Reply, RequestError, RequestId, ToRelay};
use crate::limits::OLDER_BYTES_MOST;
use crate::log::channel_log::{ChannelLog, FIRST, Lack};
use crate::log::channel_table::{ChannelId, Slot};
use crate::log::frame::Micros;
use crate::log::position::{CursorEntry, Position};

/// Who waits for what lies before a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Returner {
    /// A task of the front, by the engine's number.
    Task(usize),
    /// A command of a connection.
    Command {
        /// Where.
        slot: Slot,
        /// Who.
        connection: ConnectionId,
        /// The command's id.
        command: u32,
    },
}

/// A fetch under way: one a channel.
#[derive(Debug)]
pub(super) struct Fetch {
    request: RequestId,
    since: Position,
    returners: Vec<Returner>,
    /// Those that come from further back than it reaches, and from where: the next one is theirs.
    later: Vec<(Position, Returner)>,
}

impl Core {
    /// Fetches what a task's client lacks on reserved, live channels. Returns how many [`Answer::Fetched`] for `task` follow,
    /// and what is known already.
    pub fn fetch_older(
        &mut self,
        task: usize,
        channels: &[ChannelId],
        cursor: &[CursorEntry],
        now: Micros,
    ) -> (usize, Result<(), RequestError>) {
        let mut missing = 0;
        for &id in channels {
            let tag = self.channels.get(id).map(|channel| channel.tag);
            let Some(entry) = cursor.iter().find(|entry| Some(entry.tag) == tag) else { continue };
            match self.await_older(id, entry.position, Returner::Task(task), now) {
                Ok(waits) => missing += usize::from(waits),
                Err(error) => return (missing, Err(error)),
            }
        }
        (missing, Ok(()))
    }

    /// Whether a reader has to wait for what lies between its position and the channel's log; `returner` is told when it is there.
    ///
    /// # Errors
    /// [`RequestError::Overloaded`] while logs hold as much for returning clients as they may.
    pub(super) fn await_older(
        &mut self,
        id: ChannelId,
        asked: Position,
        returner: Returner,
        now: Micros,
    ) -> Result<bool, RequestError> {
        let Some(channel) = self.channels.get(id) else { return Ok(false) };
        let Some(Lack { since, upto }) = channel.log().and_then(|log| log.lacks(asked)) else {
            self.channels.keep_for(id, asked, now);
            return Ok(false);
        };
        if let Some(fetch) = self.fetches.get_mut(&id) {
            if fetch.since.epoch == since.epoch && fetch.since.offset <= since.offset {
                fetch.returners.push(returner);
            } else {
                fetch.later.push((asked, returner));
            }
            return Ok(true);
        }
        if self.channels.older_bytes() >= OLDER_BYTES_MOST as u64 {
            return Err(RequestError::Overloaded);
        }
        let query = HistoryQuery { channel: channel.name.clone(), since, upto };
        // Meanwhile the log lets go of nothing, or what is fetched would not lead up to it any more.
        self.channels.keep(id, now);
        let history = |shard, request| ToRelay::History { shard, request, query };
        let request = self.ask(Asker::Older(id), history);
        self.fetches.insert(id, Fetch { request, since, returners: vec![returner], later: Vec::new() });
        Ok(true)
    }

    /// The relay has answered a fetch.
    pub(super) fn fetched(&mut self, id: ChannelId, request: RequestId, reply: Reply, now: Micros) {
        // The channel may have been let go of meanwhile, and its number be another's.
        if self.fetches.get(&id).is_none_or(|fetch| fetch.request != request) {
            return;
        }
        let Some(Fetch { since, returners, mut later, .. }) = self.fetches.remove(&id) else { return };
        let outcome = match reply {
            Reply::History(Ok(frames)) => {
                self.channels.keep(id, now);
                if !planted!(LapsedRevived) {
                    self.shed_lapsed(id, now);
                }
                self.channels.prepend(id, &frames, since);
                Ok(())
            }
            Reply::History(Err(error)) => Err(error),
            Reply::Published(_) => Err(RequestError::Unavailable("answered something else".into())),
        };
        for returner in returners {
            self.tell_returner(id, returner, outcome.clone());
        }
        // The first one's fetch is to reach back far enough for the others.
        later.sort_by_key(|(asked, _)| asked.offset);
        for (asked, returner) in later {
            match self.await_older(id, asked, returner, now) {
                Ok(true) => {}
                Ok(false) => self.tell_returner(id, returner, Ok(())),
                Err(error) => self.tell_returner(id, returner, Err(error)),
            }
        }
    }

    /// Sheds who stands where a channel's log begins no more. It would happen soon anyway; now the numbers of frames that are
    /// gone are about to be given to others.
    fn shed_lapsed(&mut self, id: ChannelId, now: Micros) {
        let Some(channel) = self.channels.get(id) else { return };
        let Some(first) = channel.log().map(ChannelLog::first).filter(|first| *first > FIRST) else { return };
        let mut slots: Vec<Slot> = Vec::new();
        for group in &channel.groups {
            slots.extend(group.waiting());
            if group.at() + 1 < first {
                let lapsed = |(index, _): &(usize, &Slot)| group.sent_to(*index as u32) + 1 < first;
                slots.extend(group.members().iter().enumerate().filter(lapsed).map(|(_, slot)| slot));
            }
        }
        // Whoever has a cursor of its own is served or waits for its socket.
        let moving = self.connections.iter().filter(|(_, connection)| connection.blocked || connection.queued);
        slots.extend(moving.map(|(slot, _)| slot as Slot));
        for slot in slots {
            let Connection { protocol, subscriptions, lane, .. } = &self.connections[slot as usize];
            let lapsed = subscriptions.iter().filter(|of| of.channel == id).any(|of| match of.place {
                Place::Opening => false,
                Place::CaughtUp { index } => {
                    let group = self.channels.get(id).map(|channel| &channel.groups[*lane as usize]);
                    group.is_some_and(|group| group.sent_to(index) + 1 < first)
                }
                Place::Waiting { cursor, .. } | Place::Behind(cursor) => cursor.next < first,
            });
            // What a poll is answered with is found by its position.
            if lapsed && !matches!(protocol, Protocol::Poll(_)) {
                self.shed(slot, Disconnect::Slow, now);
            }
        }
    }

    /// The channel was let go of: nobody holds it, so whoever is left needs no answer but must not wait for one either.
    pub(super) fn forget_fetch(&mut self, id: ChannelId) {
        let Some(Fetch { returners, later, .. }) = self.fetches.remove(&id) else { return };
        for returner in returners.into_iter().chain(later.into_iter().map(|(_, returner)| returner)) {
            if let Returner::Task(task) = returner {
                self.answers.push(Answer::Fetched(task, Err(RequestError::Unavailable("given up".into()))));
            }
        }
    }

    fn tell_returner(&mut self, id: ChannelId, who: Returner, outcome: Result<(), RequestError>) {
        match who {
            Returner::Task(task) => self.answers.push(Answer::Fetched(task, outcome)),
            Returner::Command { slot, connection, command } => {
                self.older_is_there(slot, connection, id, command, outcome);
            }
        }
    }
}
