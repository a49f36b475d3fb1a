//! How connections end: in order with parting words, or at once.

use std::time::Duration;

use super::connection::{ConnectionId, Phase, Place, Protocol, Subscription};
use super::core::{Core, FAREWELL};
use super::disconnect::Disconnect;
use super::session;
use super::sink::Order;
use super::timer::{tick_of, ticks};
use crate::log::channel_table::Slot;
use crate::log::frame::Micros;
use crate::wire::websocket;

impl Core {
    /// Disconnects in order, with parting words that name the reason in the connection's own protocol.
    pub(super) fn shed(&mut self, slot: Slot, why: Disconnect, now: Micros) {
        let connection = &self.connections[slot as usize];
        if connection.phase != Phase::Open {
            return;
        }
        let mut words = Vec::new();
        match &connection.protocol {
            Protocol::Sse => session::write_sse_farewell(&mut words, why, self.retry_of(connection.id)),
            Protocol::WebSocket(_) => websocket::write_close(&mut words, why.code(), why.reason()),
            Protocol::Poll(waiting) => self.refuse_poll(waiting, self.draw(connection.id), why, &mut words),
        }
        self.part(slot, why, &words, FAREWELL, now);
    }

    /// The delay after which a client comes back, drawn for each: between half of `sse.retry` and one and a half of it, so
    /// that those who were told together do not come back together.
    fn retry_of(&self, connection: ConnectionId) -> Duration {
        let retry = self.settings.sse.retry.as_millis() as u64;
        Duration::from_millis(retry.div_ceil(2) + self.draw(connection) % (retry + 1))
    }

    /// Disconnects in order: the rest of a cut frame, what the connection was still to be told, these words, and then our
    /// end of the stream. The peer has `patience` to read them and to close.
    pub(super) fn part(&mut self, slot: Slot, why: Disconnect, words: &[u8], patience: Duration, now: Micros) {
        if self.connections[slot as usize].phase != Phase::Open {
            return;
        }
        if !self.keep_cut(slot) {
            self.close(slot, why, true);
            return;
        }
        let connection = &mut self.connections[slot as usize];
        connection.control.extend_from_slice(words);
        connection.phase = Phase::Farewell { until: tick_of(now) + ticks(patience) };
        self.ended(slot, why);
        self.queue(slot);
    }

    /// The node stops: who is being parted from has no more time than everyone else.
    pub(super) fn hasten(&mut self, slot: Slot, now: Micros) {
        let latest = tick_of(now) + ticks(FAREWELL);
        if let Phase::Farewell { until } | Phase::HalfClosed { until } = &mut self.connections[slot as usize].phase {
            *until = latest.min(*until);
        }
    }

    /// Copies the rest of a cut frame in front of the connection's own bytes, so that the frame no longer needs its
    /// subscription. False when a log has let go of the frame, or of a place that the frame's id names: then nothing that
    /// follows could be read as what it is.
    pub(super) fn keep_cut(&mut self, slot: Slot) -> bool {
        let connection = &self.connections[slot as usize];
        let Some(cut) = connection.cut else { return true };
        if connection.subscriptions.iter().any(|subscription| self.lapsed(subscription)) {
            return false;
        }
        let Subscription { channel, place } = connection.subscriptions[cut as usize];
        let Place::Behind(cursor) = place else { unreachable!("a cut subscription is behind") };
        let log = self.channels.get(channel).and_then(|channel| channel.log());
        let Some(frame) = log.and_then(|log| log.get(cursor.next)).cloned() else { return false };
        let mut rest = Vec::new();
        self.write_frame(slot, cut as usize, &frame, &mut rest);
        rest.drain(..cursor.sent as usize);
        // A cut frame and a cut control cannot be at once: `control_sent` is 0.
        let connection = &mut self.connections[slot as usize];
        rest.extend_from_slice(connection.control_due());
        connection.control = rest;
        connection.cut = None;
        connection.subscriptions[cut as usize].place = Place::Behind(cursor.past());
        true
    }

    /// Ends a connection at once, with nothing more to say.
    pub(super) fn close(&mut self, slot: Slot, why: Disconnect, abort: bool) {
        if self.connections[slot as usize].phase == Phase::Open {
            self.ended(slot, why);
        }
        self.finish(slot, abort);
    }

    /// Counts the end and lets the subscriptions go.
    pub(super) fn ended(&mut self, slot: Slot, why: Disconnect) {
        self.connections[slot as usize].cut = None;
        why.count(&self.recorder.metrics);
        self.let_go_of_subscriptions(slot);
    }

    /// Ends every subscription of a connection that is open no more.
    pub(super) fn let_go_of_subscriptions(&mut self, slot: Slot) {
        while !self.connections[slot as usize].subscriptions.is_empty() {
            let index = self.connections[slot as usize].subscriptions.len() - 1;
            self.unsubscribe(slot, index);
        }
        match self.connections[slot as usize].protocol {
            Protocol::Sse => self.recorder.metrics.sse.sub(1),
            Protocol::WebSocket(_) => self.recorder.metrics.websocket.sub(1),
            Protocol::Poll(_) => self.recorder.metrics.poll.sub(1),
        }
    }

    /// Asks for the socket to be closed; the slot is free once the driver says so.
    pub(super) fn finish(&mut self, slot: Slot, abort: bool) {
        let connection = &mut self.connections[slot as usize];
        if connection.phase == Phase::Closing {
            return;
        }
        connection.phase = Phase::Closing;
        connection.control = Vec::new();
        connection.control_sent = 0;
        connection.cut = None;
        if std::mem::replace(&mut connection.blocked, false) {
            self.recorder.metrics.lagging.sub(1);
        }
        self.orders.push(Order::Close { slot, abort });
    }

    /// Everything is said: shut our half and wait for the peer's.
    pub(super) fn half_close(&mut self, slot: Slot) {
        let connection = &mut self.connections[slot as usize];
        if let Phase::Farewell { until } = connection.phase {
            connection.phase = Phase::HalfClosed { until };
            self.orders.push(Order::HalfClose(slot));
        }
    }
}
