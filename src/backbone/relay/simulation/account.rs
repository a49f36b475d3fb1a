//! What the relay's status has to say, counted beside it.

use super::world::World;
use crate::backbone::interface::BackboneEvent;
use crate::limits::HEARTBEAT_STALE_MILLIS;
use crate::log::frame::Micros;
use crate::shard::mailbox::ToRelay;

/// See the module.
#[derive(Debug, Default)]
pub struct Expected {
    connected: bool,
    beat: Micros,
    connects: u64,
    overruns: u64,
    received: u64,
    failed: u64,
    refused: u64,
}

impl World<'_> {
    /// The relay is about to be given a request.
    pub(super) fn note_request(&mut self, request: &ToRelay) {
        if let ToRelay::Interest { name, .. } = request
            && !self.relay.names.contains_key(name)
            && self.relay.channels.len() >= self.plan.bounds.channels
        {
            self.expected.refused += 1;
        } else {
            self.interests.note(request);
        }
    }

    /// The relay is about to be given an event.
    pub(super) fn note_event(&mut self, event: &BackboneEvent) {
        let (now, expected) = (self.now, &mut self.expected);
        match event {
            BackboneEvent::Connected => {
                (expected.connected, expected.beat) = (true, now);
                expected.connects += 1;
                self.trace.event("connected", 0u64, 0u64);
            }
            BackboneEvent::Disconnected(_) => {
                expected.connected = false;
                self.trace.event("disconnected", 0u64, 0u64);
            }
            BackboneEvent::Heartbeat(_) => {
                expected.beat = now;
                self.backbone().beat(now);
            }
            // The simulated node follows nobody.
            BackboneEvent::PredecessorBeat(_) => {}
            BackboneEvent::Overrun => {
                expected.overruns += 1;
                self.trace.event("overrun", 0u64, 0u64);
            }
            BackboneEvent::Message(message) => {
                expected.received += u64::from(self.relay.names.contains_key(message.channel.as_str()));
                let offset = message.position.map_or(0, |position| position.offset);
                self.trace.event("message", offset, message.data.len() as u64);
            }
            BackboneEvent::Page(ticket, page) => {
                expected.failed += u64::from(page.is_err());
                self.trace.event(if page.is_ok() { "page" } else { "no page" }, ticket.0, 0u64);
            }
            BackboneEvent::Subscribed(ticket) => self.trace.event("subscribed", ticket.0, 0u64),
            BackboneEvent::Published(ticket, result) => {
                self.trace.event(if result.is_ok() { "published" } else { "not published" }, ticket.0, 0u64);
            }
        }
    }

    /// Compares.
    pub(super) fn check_status(&self) -> Result<(), String> {
        let (status, expected) = (&self.relay.status, &self.expected);
        let fresh = self.now.saturating_sub(expected.beat) / 1_000 <= HEARTBEAT_STALE_MILLIS;
        let gaps = self.shards.iter().map(|shard| shard.gaps).max().unwrap_or(0);
        let counts = [
            ("connects", status.connects.get(), expected.connects),
            ("overruns", status.overruns.get(), expected.overruns),
            ("received", status.received.get(), expected.received),
            ("refused", status.refused.get(), expected.refused),
            ("ready", status.ready().is_ok().into(), (expected.connected && fresh).into()),
        ];
        if let Some((what, said, is)) = counts.into_iter().find(|(_, said, is)| said != is) {
            return Err(format!("the status says {said} {what}, it is {is}"));
        }
        let bounds = [
            ("failed reads", status.failed_reads.get(), expected.failed),
            ("gaps a shard saw", gaps, status.gaps.get()),
            ("dropped", status.duplicates.get() + status.strays.get(), status.received.get()),
        ];
        if let Some((what, said, most)) = bounds.into_iter().find(|(_, said, most)| said > most) {
            return Err(format!("the status says {said} {what}, it can be {most} at the most"));
        }
        let missed = self.shards.iter().zip(&status.overflows);
        match missed.enumerate().find(|(_, (shard, overflows))| shard.missed > overflows.get() + shard.gaps) {
            Some((index, _)) => Err(format!("shard {index} was sent more late than was counted as late")),
            None => Ok(()),
        }
    }

    /// Notes what the relay counted.
    pub(super) fn sum_up(&self) {
        let status = &self.relay.status;
        let counts = [
            ("counted duplicates", &status.duplicates),
            ("counted strays", &status.strays),
            ("counted invalid", &status.invalid),
            ("counted oversized", &status.oversized),
            ("counted repairs", &status.repairs),
            ("counted failed reads", &status.failed_reads),
            ("counted repaired", &status.repaired),
            ("counted gaps", &status.gaps),
            ("counted overflows", &status.overflows[0]),
        ];
        for (what, count) in counts.into_iter().filter(|(_, count)| count.get() > 0) {
            self.trace.event(what, count.get(), 0u64);
        }
    }
}
