//! The engine's part in a hand-over: leaving, and arriving.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender};

use super::super::core::Asker;
use super::super::front::Parked;
use super::super::handover::state::{Form, State, StateError};
use super::super::handover::{Arriving, Carried, Expected, Leaving, Verdict};
use super::Engine;
use crate::limits::{HANDOVER_BATCH, HANDOVER_SETTLE_MILLIS};
use crate::log::channel_table::{ChannelId, Slot};
use crate::log::frame::Micros;

/// The number by which the core tells of channels that are expected; no stream has it.
pub(super) const EXPECTED: usize = usize::MAX;

/// How far a hand-over is on this shard.
#[derive(Debug, Default)]
pub(super) enum Handover {
    /// None is under way.
    #[default]
    None,
    /// What is under way comes to its end.
    Settling { leaving: Leaving, until: Micros },
    /// The connections are another process's. What was being closed ends here.
    Moved,
    /// Channels are held for an arrival.
    Expecting { channels: Vec<ChannelId>, missing: usize, live: Option<Sender<Result<(), String>>> },
    /// An arrival failed: the shard ends, and the sockets it was given are let go of.
    Failed,
}

impl Engine {
    /// Whether the shard's work is done.
    pub(super) fn is_done(&self) -> bool {
        match self.handover {
            Handover::Failed => true,
            // Answered clients may still be reading.
            Handover::Moved if self.core.recorder.metrics.http.get() > 0 => false,
            _ => self.core.stopping() && self.core.connections() == 0,
        }
    }

    /// Whether the shard was given connections that it may not serve.
    pub(super) fn has_failed(&self) -> bool {
        matches!(self.handover, Handover::Failed)
    }

    /// Begins to leave. Nothing is accepted or received any more; publications are delivered until the freeze.
    pub(super) fn leave(&mut self, leaving: Leaving, now: Micros) {
        if !self.core.admits() || !matches!(self.handover, Handover::None) {
            // Dropped: that it fails is all there is to say.
            return;
        }
        self.parking.close();
        self.driver.pause();
        self.handover = Handover::Settling { leaving, until: now + HANDOVER_SETTLE_MILLIS * 1_000 };
    }

    /// Freezes once nothing is under way, or gives up when that takes too long. True when a further turn is wanted.
    pub(super) fn go_on_leaving(&mut self, now: Micros) -> bool {
        let Handover::Settling { until, .. } = self.handover else { return false };
        if !self.core.admits() || (now >= until && !self.is_settled()) {
            tracing::warn!(?self.parking, receiving = self.driver.receiving(), "a hand-over failed: requests are still under way");
            self.handover = Handover::None;
            self.stay(Vec::new());
            return true;
        }
        if !self.is_settled() {
            return false;
        }
        let Handover::Settling { leaving, .. } = std::mem::take(&mut self.handover) else { return false };
        let slots = self.core.ready_to_leave(now);
        let parked = self.parking.take();
        match self.give_away(leaving, &slots, &parked, now) {
            Verdict::Stays => self.stay(parked),
            Verdict::Moved => {
                slots.iter().for_each(|&slot| self.core.moved(slot));
                self.core.stop_quietly();
                self.handover = Handover::Moved;
            }
        }
        true
    }

    /// Nothing of a connection is in the kernel, no request is being answered, and nobody waits for the relay.
    fn is_settled(&self) -> bool {
        let waits = |asker: &Asker| match asker {
            Asker::Task(_) => false,
            Asker::Older(_) => true,
            Asker::Command { slot, connection, .. } => self.core.is_open(*slot, *connection),
        };
        self.driver.receiving() == 0
            && self.parking.busy() == 0
            && self.promised == 0
            && self.openings.is_empty()
            && self.gate.is_quiet()
            && !self.core.askers().any(waits)
            && !self.core.waits_for_history()
    }

    fn give_away(&mut self, leaving: Leaving, slots: &[Slot], parked: &[Parked], now: Micros) -> Verdict {
        let Leaving { carried, frozen, verdict } = leaving;
        if frozen.send(slots.len() + parked.len()).is_err() {
            return Verdict::Stays;
        }
        for batch in slots.chunks(HANDOVER_BATCH) {
            let sockets = match self.driver.duplicate(batch) {
                Ok(sockets) => sockets,
                Err(error) => {
                    tracing::warn!(%error, "a hand-over failed: sockets cannot be duplicated");
                    return Verdict::Stays;
                }
            };
            for (&slot, socket) in batch.iter().zip(sockets) {
                let state = self.core.carried(slot, now).encode().into();
                if carried.send(Carried { socket, state }).is_err() {
                    return Verdict::Stays;
                }
            }
        }
        for Parked { socket, request } in parked {
            let form = Form::Request(request.clone());
            let state = State { form, silent: 0, subscriptions: Vec::new(), control: Vec::new() };
            let sent = socket.try_clone().is_ok_and(|socket| {
                let state = state.encode().into();
                carried.send(Carried { socket, state }).is_ok()
            });
            if !sent {
                return Verdict::Stays;
            }
        }
        drop(carried);
        verdict.recv().unwrap_or(Verdict::Stays)
    }

    /// Goes on as before.
    fn stay(&mut self, parked: Vec<Parked>) {
        self.core.stay();
        self.driver.resume();
        self.open(parked);
    }

    fn open(&mut self, parked: Vec<Parked>) {
        self.parking.open();
        for parked in parked.into_iter().chain(self.parking.take()) {
            if let Err(error) = (self.readmit)(parked) {
                tracing::warn!(%error, "a connection could not be taken up again");
            }
        }
    }

    /// Holds the channels of connections that will arrive, besides those it holds already.
    pub(super) fn expect(&mut self, Expected { channels: names, live }: Expected) {
        let mut channels = match std::mem::take(&mut self.handover) {
            Handover::None => Vec::with_capacity(names.len()),
            Handover::Expecting { channels, live: None, .. } => channels,
            other => {
                self.handover = other;
                let _ = live.send(Err("channels are expected that are not live yet, or the shard leaves".into()));
                return;
            }
        };
        let mut missing = 0;
        // One that is named twice is held twice, and told of twice.
        for name in &names {
            let (channel, live) = self.core.reserve(name, EXPECTED);
            channels.push(channel);
            missing += usize::from(!live);
        }
        let mut live = Some(live);
        if missing == 0 {
            tell(&mut live, Ok(()));
        }
        self.handover = Handover::Expecting { channels, missing, live };
    }

    /// One more of the expected channels is live, or will not be.
    pub(super) fn expected(&mut self, outcome: Result<(), String>) {
        let Handover::Expecting { missing, live, .. } = &mut self.handover else { return };
        *missing = missing.saturating_sub(1);
        if *missing == 0 || outcome.is_err() {
            tell(live, outcome);
        }
    }

    /// Takes connections in and serves them if that is the verdict; otherwise the shard ends.
    pub(super) fn arrive(&mut self, Arriving { carried, arrived, verdict }: Arriving, now: Micros) {
        let channels = match std::mem::take(&mut self.handover) {
            Handover::Expecting { channels, .. } => channels,
            Handover::None => Vec::new(),
            other => {
                self.handover = other;
                let _ = arrived.send(Err("the shard leaves".into()));
                return;
            }
        };
        let outcome = self.take_in(&carried, now);
        drop(carried);
        let told = arrived.send(outcome.as_ref().map(|(count, _)| *count).map_err(ToString::to_string));
        let verdict = if told.is_err() { Verdict::Stays } else { verdict.recv().unwrap_or(Verdict::Stays) };
        match outcome {
            Ok((_, parked)) if verdict == Verdict::Moved => {
                channels.into_iter().for_each(|channel| self.core.unreserve(channel));
                self.driver.resume();
                self.open(parked);
            }
            // What came is dropped as it is: the other process serves it.
            _ => self.handover = Handover::Failed,
        }
    }

    fn take_in(&mut self, carried: &Receiver<Carried>, now: Micros) -> Result<(usize, Vec<Parked>), StateError> {
        let (mut count, mut parked) = (0, Vec::new());
        for Carried { socket, state } in carried {
            let state = State::decode(&state)?;
            match state {
                State { form: Form::Request(request), .. } => parked.push(Parked { socket, request }),
                state => self.take_in_one(socket, state, now)?,
            }
            count += 1;
        }
        Ok((count, parked))
    }

    fn take_in_one(&mut self, socket: OwnedFd, state: State, now: Micros) -> Result<(), StateError> {
        if self.core.connections() >= self.capacity {
            return Err(StateError::Full(self.capacity));
        }
        let slot = self.core.vacant_slot();
        self.driver.adopt(slot, socket).map_err(|error| StateError::Socket(error.to_string()))?;
        let taken = self.core.arrive(state, now)?;
        debug_assert_eq!(taken, slot);
        Ok(())
    }
}

/// Tells once.
fn tell(live: &mut Option<Sender<Result<(), String>>>, outcome: Result<(), String>) {
    if let Some(live) = live.take() {
        // Whoever asked may have given up.
        let _ = live.send(outcome);
    }
}
