//! A simulated shard: it keeps to the mailbox's contract, and holds what it is sent against what really happened.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::reader::Reader;
use super::server::Server;
use crate::log::position::Position;
use crate::shard::mailbox::{HistoryQuery, LocalChannel, Mailbox, Reply, RequestError, RequestId, ToRelay, ToShard};

/// What a shard has asked of a channel.
#[derive(Debug)]
enum State {
    Asked,
    Live(Reader),
    Leaving(Option<Reader>),
}

/// What a message asks of the shard in turn.
pub struct Taken {
    pub message: ToShard,
    pub request: Option<ToRelay>,
}

/// A request that is not answered yet.
#[derive(Debug)]
pub enum Asked {
    /// A publication with this number, and its key.
    Publish { channel: Arc<str>, id: u64, key: Option<Box<str>> },
    /// A read; whether the server could serve it then, and how many upheavals there had been.
    History { query: HistoryQuery, held: bool, upheavals: u64 },
}

/// See the module.
#[derive(Debug)]
pub struct Shard {
    pub mailbox: Arc<Mailbox>,
    index: usize,
    /// By the shard's own number.
    channels: BTreeMap<LocalChannel, (Arc<str>, State)>,
    asked: BTreeMap<RequestId, Asked>,
    requests: RequestId,
    /// Gaps seen.
    pub gaps: u64,
    /// Frames that came together after the mailbox was full.
    pub missed: u64,
}

impl Shard {
    pub fn new(index: usize, mailbox: usize) -> Self {
        Self {
            mailbox: Arc::new(Mailbox::of(mailbox).expect("a descriptor")),
            index,
            channels: BTreeMap::new(),
            asked: BTreeMap::new(),
            requests: 0,
            gaps: 0,
            missed: 0,
        }
    }

    fn local(&self, name: &Arc<str>) -> Option<LocalChannel> {
        self.channels.iter().find(|(_, (known, _))| known == name).map(|(local, _)| *local)
    }

    /// Asks for a channel or lets go of it, unless it waits for its release.
    pub fn toggle(&mut self, name: &Arc<str>) -> Option<ToRelay> {
        let shard = self.index;
        let Some(channel) = self.local(name) else {
            let channel = (0..).find(|local| !self.channels.contains_key(local)).expect("a free number");
            self.channels.insert(channel, (name.clone(), State::Asked));
            return Some(ToRelay::Interest { shard, channel, name: name.clone() });
        };
        let (_, state) = self.channels.get_mut(&channel).expect("it was just found");
        let reader = match std::mem::replace(state, State::Asked) {
            State::Asked => None,
            State::Live(reader) => Some(reader),
            left @ State::Leaving(_) => {
                *state = left;
                return None;
            }
        };
        *state = State::Leaving(reader);
        Some(ToRelay::Disinterest { shard, channel, name: name.clone() })
    }

    /// Whether it wants a channel.
    pub fn wants(&self, name: &Arc<str>) -> bool {
        self.channels.values().any(|(known, state)| known == name && !matches!(state, State::Leaving(_)))
    }

    /// Remembers a request and numbers it.
    pub fn ask(&mut self, asked: Asked) -> (usize, RequestId) {
        self.requests += 1;
        self.asked.insert(self.requests, asked);
        (self.index, self.requests)
    }

    /// Takes the next message.
    pub fn take(&mut self, server: &mut Server) -> Result<Option<Taken>, String> {
        let Some(message) = self.mailbox.take() else { return Ok(None) };
        let wrong = |error: String| format!("shard {}: {error}", self.index);
        let mut request = None;
        match &message {
            ToShard::Live { channel, position, frames } => {
                let (name, state) = self.channels.get_mut(channel).ok_or_else(|| wrong("an unknown channel".into()))?;
                let line = server.truth.line(name);
                let reader =
                    Reader::open(line, *position, frames).map_err(|error| wrong(format!("{name}: {error}")))?;
                *state = match state {
                    State::Asked => State::Live(reader),
                    State::Leaving(None) => State::Leaving(Some(reader)),
                    State::Live(_) | State::Leaving(Some(_)) => return Err(wrong(format!("{name} is live twice"))),
                };
            }
            ToShard::Publication { channel, frame } => self.read(server, *channel, std::slice::from_ref(frame))?,
            ToShard::Missed { channel, frames } => {
                if frames.is_empty() {
                    return Err(wrong("it missed nothing".into()));
                }
                self.missed += frames.len() as u64;
                self.read(server, *channel, frames)?;
            }
            ToShard::Refused { channel } => match self.channels.get_mut(channel) {
                Some((name, state @ State::Asked)) => {
                    *state = State::Leaving(None);
                    let name = name.clone();
                    request = Some(ToRelay::Disinterest { shard: self.index, channel: *channel, name });
                }
                Some((_, State::Leaving(None))) => {}
                other => return Err(wrong(format!("{other:?} was refused"))),
            },
            ToShard::Released { channel } => match self.channels.remove(channel) {
                Some((_, State::Leaving(_))) => {}
                other => return Err(wrong(format!("{other:?} was released"))),
            },
            ToShard::Reply { request, reply } => {
                let asked = self.asked.remove(request).ok_or_else(|| wrong(format!("{request} is answered twice")))?;
                check(&asked, reply, server).map_err(|error| wrong(format!("{error}: {asked:?} {reply:?}")))?;
            }
            ToShard::Leave(_)
            | ToShard::Expect(_)
            | ToShard::Arrive(_)
            | ToShard::Reload(_)
            | ToShard::Drain { .. }
            | ToShard::Stop => {
                return Err(wrong("nobody stopped it".into()));
            }
        }
        Ok(Some(Taken { message, request }))
    }

    fn read(
        &mut self,
        server: &mut Server,
        channel: LocalChannel,
        frames: &[Arc<crate::log::frame::Frame>],
    ) -> Result<(), String> {
        let known = self.channels.get_mut(&channel);
        let Some((name, State::Live(reader) | State::Leaving(Some(reader)))) = known else {
            return Err(format!("shard {}: frames of a channel that is not live: {known:?}", self.index));
        };
        for frame in frames {
            self.gaps += u64::from(frame.kind == crate::log::frame::FrameKind::Gap);
            let taken = reader.take(server.truth.line(name), frame);
            taken.map_err(|error| format!("shard {}: {name}: {error}", self.index))?;
        }
        Ok(())
    }

    /// Once everything has come to rest: every request was answered and every channel is where the server is.
    pub fn at_rest(&self, server: &mut Server) -> Result<(), String> {
        if !self.asked.is_empty() {
            return Err(format!("shard {}: not answered: {:?}", self.index, self.asked));
        }
        for (name, state) in self.channels.values() {
            let State::Live(reader) = state else {
                return Err(format!("shard {}: {name} is left in {state:?}", self.index));
            };
            let head = server.head(name);
            reader
                .ends(server.truth.line(name), head)
                .map_err(|error| format!("shard {}: {name}: {error}", self.index))?;
        }
        Ok(())
    }

    /// Whether it waits for a read of a channel's history.
    pub fn reads(&self, name: &Arc<str>) -> bool {
        self.asked.values().any(|asked| matches!(asked, Asked::History { query, .. } if query.channel == *name))
    }

    /// Whether nothing of it is left.
    pub fn is_empty(&self) -> bool {
        self.channels.is_empty() && self.asked.is_empty()
    }

    /// A position that a client of this shard may have on a channel.
    pub fn position(&self, name: &Arc<str>) -> Option<Position> {
        self.channels.values().find_map(|(known, state)| match state {
            State::Live(reader) if known == name => Some(reader.position()),
            _ => None,
        })
    }
}

fn check(asked: &Asked, reply: &Reply, server: &mut Server) -> Result<(), String> {
    match (asked, reply) {
        (
            _,
            Reply::Published(Err(RequestError::Unavailable(_))) | Reply::History(Err(RequestError::Unavailable(_))),
        ) => Ok(()),
        (Asked::Publish { channel, id, key }, Reply::Published(Ok(position))) => {
            let mine = server.truth.line(channel).find(*id).is_some_and(|(_, record)| record.position == *position);
            let given = key.as_ref().is_some_and(|key| server.truth.answers(channel, key, *position));
            if mine || given { Ok(()) } else { Err("not where it was published".into()) }
        }
        (Asked::History { query, held, upheavals }, Reply::History(Ok(frames))) => {
            super::reader::check_history(server.truth.line(&query.channel), query, frames)?;
            let whole = frames.len() as u64 == query.upto - query.since.offset;
            if !whole && *held && *upheavals == server.upheavals && server.holds(&query.channel, query.since) {
                return Err("the server has it".into());
            }
            Ok(())
        }
        _ => Err("an answer to another question".into()),
    }
}
