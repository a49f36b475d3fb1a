//! Polling: what is new since a cursor, in one answer, at once or as soon as there is something.
//!
//! A poll that waits is a connection without a stream: a place in the engine, subscriptions that wait with a cursor, no task
//! and no buffer. The first frame due on any of its channels or its deadline wakes it; then the answer becomes the
//! connection's own bytes and the connection ends.

mod answer;

pub use answer::Answer;
use answer::Reading;

use std::time::Duration;

use super::connection::{Connection, Phase, Place, Protocol, Subscription};
use super::core::Core;
use super::disconnect::Disconnect;
use super::timer::{Tick, tick_of, ticks};
use crate::limits::RETRY_AFTER_SECONDS;
use crate::log::channel_table::{ChannelId, Lane, Slot};
use crate::log::cursor::Cursor;
use crate::log::frame::Micros;
use crate::log::position::CursorEntry;
use crate::settings::Settings;
use crate::wire::http1::{AllowOrigin, ResponseWriter, Status, none_match_names};

/// What a poll asks for beside its channels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Poll {
    /// Where the reader is; a channel without an entry is answered with its position at once.
    pub cursor: Vec<CursorEntry>,
    /// How long it waits when nothing is new.
    pub wait: Duration,
    /// The entity tags of the answers it has (`If-None-Match`).
    pub known: Option<Box<str>>,
    /// The listed origin whose pages may read the answer, when the request came from one.
    pub origin: Option<Box<str>>,
}

/// A poll that waits.
#[derive(Debug)]
pub struct Waiting {
    pub(super) poll: Poll,
    pub(super) until: Tick,
}

/// How an answer is sent.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    /// The reader waited for it.
    pub waited: bool,
    /// The connection may be used again.
    pub keep_alive: bool,
    /// The request was `HEAD`.
    pub head_only: bool,
}

impl Poll {
    /// Writes the response: the answer, or 304 when the reader has it already.
    pub fn write_answer(&self, out: &mut Vec<u8>, answer: &Answer, form: Form, settings: &Settings) -> Status {
        let known = self.known.as_deref().is_some_and(|known| none_match_names(known, &answer.tag));
        let status = if known { Status::NotModified } else { Status::Ok };
        let writer = self
            .head(out, status, settings)
            .header("ETag", &answer.tag)
            .header("Cache-Control", &cache_control(answer, form, settings))
            .header("Access-Control-Expose-Headers", "ETag");
        if known {
            writer.without_body(form.keep_alive);
            return status;
        }
        writer
            .header("Content-Type", "application/json")
            .header("X-Content-Type-Options", "nosniff")
            .with_length(answer.body.len(), form.keep_alive);
        if !form.head_only {
            out.extend_from_slice(&answer.body);
        }
        status
    }

    /// Writes the response to a poll whose wait is ended without an answer: why, and to come back after `seconds`.
    fn write_refusal(&self, out: &mut Vec<u8>, why: &str, seconds: u32, settings: &Settings) -> Status {
        let body = serde_json::json!({ "error": why }).to_string();
        self.head(out, Status::ServiceUnavailable, settings)
            .header("Retry-After", itoa::Buffer::new().format(seconds))
            .header("Access-Control-Expose-Headers", "Retry-After")
            .header("Content-Type", "application/json")
            .header("Cache-Control", "no-store")
            .with_length(body.len(), false);
        out.extend_from_slice(body.as_bytes());
        Status::ServiceUnavailable
    }

    /// Begins a response that pages of the right origins may read.
    fn head<'o>(&self, out: &'o mut Vec<u8>, status: Status, settings: &Settings) -> ResponseWriter<'o> {
        let writer = ResponseWriter::new(out, status);
        match &self.origin {
            _ if settings.allow_origins.iter().any(|pattern| pattern == "*") => writer.allow_origin(AllowOrigin::Any),
            Some(origin) => writer.allow_origin(AllowOrigin::Only(origin)),
            // A cache may not give this to a page of a listed origin, which could not read it.
            None => writer.header("Vary", "Origin"),
        }
    }
}

/// What caches may do with an answer.
///
/// Every reader at the same cursor may have the same answer, whether it waited or not: it is correct for ever, only later
/// than the next one. The exception is a wait that ended with nothing: its reader asks again at once, and as long as a cache
/// gave it that same nothing the wait would be none.
fn cache_control(answer: &Answer, form: Form, settings: &Settings) -> String {
    match settings.poll.max_age.as_secs() {
        _ if form.waited && !answer.news => "no-store".into(),
        0 => "no-cache".into(),
        seconds => format!("public, max-age={seconds}"),
    }
}

impl Core {
    /// What is new on reserved, live channels since `cursor`.
    #[must_use]
    pub fn poll(&self, channels: &[ChannelId], cursor: &[CursorEntry]) -> Answer {
        Reading::of(&self.channels, channels, cursor).answer()
    }

    /// Takes over the connection of a poll that waits on reserved, live channels.
    pub fn admit_poll(&mut self, channels: &[ChannelId], mut poll: Poll, now: Micros) -> Slot {
        // It may be one of very many.
        poll.cursor.shrink_to_fit();
        let until = tick_of(now) + ticks(poll.wait);
        let protocol = Protocol::Poll(Box::new(Waiting { poll, until }));
        let slot = self.insert(protocol, Lane::SseMany, Vec::new(), now);
        let head = |id: ChannelId| Some(self.channels.get(id)?.log()?.head());
        let subscription = |&channel| {
            let place = Place::Behind(Cursor::at(head(channel)? + 1));
            Some(Subscription { channel, place })
        };
        let mut subscriptions: Vec<Subscription> = channels.iter().filter_map(subscription).collect();
        subscriptions.shrink_to_fit();
        self.recorder.metrics.poll.add(1);
        self.recorder.metrics.subscriptions.add(subscriptions.len() as u64);
        self.connections[slot as usize].subscriptions = subscriptions;
        // Something may have come since the front looked.
        self.answer_poll(slot, false, now);
        slot
    }

    /// Answers a poll that waits, when there is something new or its time is `over`; otherwise it goes on waiting.
    pub(super) fn answer_poll(&mut self, slot: Slot, over: bool, now: Micros) {
        let Connection { protocol: Protocol::Poll(waiting), subscriptions, phase: Phase::Open, .. } =
            &self.connections[slot as usize]
        else {
            return;
        };
        let channels: Vec<ChannelId> = subscriptions.iter().map(|subscription| subscription.channel).collect();
        let reading = Reading::of(&self.channels, &channels, &waiting.poll.cursor);
        if !reading.is_news() && !over {
            self.wait_on(slot);
            return;
        }
        let answer = reading.answer();
        let form = Form { waited: true, keep_alive: false, head_only: false };
        let mut response = Vec::with_capacity(answer.body.len() + 512);
        let status = waiting.poll.write_answer(&mut response, &answer, form, &self.settings);
        if status == Status::Ok {
            for frame in reading.frames() {
                self.recorder.latency.saturating_record(now.saturating_sub(frame.arrived));
            }
            self.recorder.metrics.deliveries.add(answer.publications);
        }
        self.recorder.metrics.count_response(status.code());
        // An answer may be large and its reader's line slow: it has the time a request's body has.
        let patience = self.settings.limits.body_time;
        self.part(slot, Disconnect::Answered, &response, patience, now);
    }

    /// Lets every subscription of a poll wait for the next frame of its channel.
    fn wait_on(&mut self, slot: Slot) {
        for index in 0..self.connections[slot as usize].subscriptions.len() {
            let Subscription { channel, place } = self.connections[slot as usize].subscriptions[index];
            if matches!(place, Place::Behind(_))
                && let Some(log) = self.channels.get(channel).and_then(|channel| channel.log())
            {
                self.put(slot, index, Cursor::at(log.head() + 1));
            }
        }
    }

    /// Answers a poll whose time is over.
    pub(super) fn look_at_poll(&mut self, slot: Slot, tick: Tick, now: Micros) {
        if let Protocol::Poll(waiting) = &self.connections[slot as usize].protocol
            && tick >= waiting.until
        {
            self.answer_poll(slot, true, now);
        }
    }

    /// The parting words to a poll that is not answered. The delay is drawn, so that clients do not come back as one.
    pub(super) fn refuse_poll(&self, waiting: &Waiting, draw: u64, why: Disconnect, out: &mut Vec<u8>) {
        let seconds = 1 + (draw % u64::from(RETRY_AFTER_SECONDS)) as u32;
        let status = waiting.poll.write_refusal(out, why.reason(), seconds, &self.settings);
        self.recorder.metrics.count_response(status.code());
    }
}

#[cfg(test)]
mod tests;
