//! What must be true of the relay after each of its turns.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::backbone::relay::channel::{Channel, Name, Phase};
use crate::backbone::relay::node_log::size;
use crate::backbone::relay::{Relay, Waiting};
use crate::log::frame::FrameKind;
use crate::shard::mailbox::{LocalChannel, ToRelay};

/// Which shards want which channels, as far as the relay was told.
#[derive(Debug, Default)]
pub struct Interests(BTreeMap<Arc<str>, BTreeMap<usize, LocalChannel>>);

impl Interests {
    /// The relay is told.
    pub fn note(&mut self, request: &ToRelay) {
        match request {
            ToRelay::Interest { shard, channel, name } => {
                self.0.entry(name.clone()).or_default().insert(*shard, *channel);
            }
            ToRelay::Disinterest { shard, name, .. } => {
                self.0.entry(name.clone()).or_default().remove(shard);
            }
            ToRelay::Publish { .. } | ToRelay::History { .. } => {}
        }
    }
}

macro_rules! must {
    ($holds:expr, $($else:tt)*) => {
        if !$holds {
            return Err(format!($($else)*));
        }
    };
}

/// Checks a relay that has just ended its turn.
pub fn check(relay: &Relay, interests: &Interests) -> Result<(), String> {
    must!(
        relay.names.len() == relay.channels.len(),
        "{} names for {} channels",
        relay.names.len(),
        relay.channels.len()
    );
    let recoveries = relay.waiting.values().filter(|waiting| matches!(waiting, Waiting::Recovery(_))).count();
    must!(relay.reads == recoveries, "{} reads are counted and {recoveries} are under way", relay.reads);
    must!(relay.reads <= relay.bounds.reads, "{} reads are under way", relay.reads);
    for (name, shards) in interests.0.iter().filter(|(_, shards)| !shards.is_empty()) {
        let channel = relay.names.get(name).map(|&key| &relay.channels[key]);
        let known: BTreeMap<usize, LocalChannel> = channel
            .map(|channel| channel.interests.iter().map(|interest| (interest.shard, interest.local)).collect())
            .unwrap_or_default();
        must!(known == *shards, "{name} is wanted by {shards:?}, the relay has {known:?}");
    }
    let (mut bytes, mut frames) = (0, 0);
    for (key, channel) in &relay.channels {
        check_channel(relay, Name { key, life: channel.life }, channel, interests)?;
        bytes += channel.frames.iter().map(|frame| size(frame)).sum::<usize>();
        frames += channel.frames.iter().count();
    }
    must!(relay.log.bytes() == bytes, "the log counts {} bytes and has {bytes}", relay.log.bytes());
    must!(bytes <= relay.bounds.log_bytes, "the log has {bytes} bytes");
    relay.log.check(frames)?;
    for (shard, outbox) in relay.outboxes.iter().enumerate() {
        let full = outbox.mailbox.is_full();
        must!(full || !outbox.waits(), "something waits for shard {shard} and its mailbox has room");
        for (key, missed) in &outbox.missed {
            let interests = relay.channels.get(*key).map(|channel| &channel.interests[..]).unwrap_or_default();
            let wanted = interests.iter().any(|i| i.shard == shard && i.live && i.local == missed.local);
            must!(wanted, "shard {shard} misses what it does not want: {missed:?}");
            must!(outbox.order.contains(key), "shard {shard} will never be sent what it misses: {missed:?}");
        }
    }
    let status = &relay.status;
    must!(status.log_bytes.get() == bytes as u64, "the status says {} bytes", status.log_bytes.get());
    must!(status.channels.get() == relay.channels.len() as u64, "the status says {} channels", status.channels.get());
    must!(status.in_flight.get() == relay.waiting.len() as u64, "the status says {} requests", status.in_flight.get());
    Ok(())
}

fn check_channel(relay: &Relay, name: Name, channel: &Channel, interests: &Interests) -> Result<(), String> {
    let called = &channel.name;
    must!(relay.names.get(called) == Some(&name.key), "{called} is not found by its name");
    let unwanted = channel.interests.is_empty();
    must!(unwanted == channel.linger_until.is_some(), "{called} lingers: {:?}", channel.linger_until);
    must!(!unwanted || interests.0.get(called).is_none_or(BTreeMap::is_empty), "{called} is wanted and lingers");
    let shards: BTreeSet<usize> = channel.interests.iter().map(|interest| interest.shard).collect();
    must!(shards.len() == channel.interests.len(), "a shard wants {called} twice: {:?}", channel.interests);
    for interest in &channel.interests {
        must!(interest.live == channel.tip.is_some(), "{called} at {:?}: {interest:?}", channel.tip);
    }

    let due = |phase| channel.phase == phase;
    let subscribes = relay.to_subscribe.iter().filter(|other| **other == name).count();
    let batch = relay.subscribing.as_ref().map(|(_, batch)| &batch[..]).unwrap_or_default();
    let reads = relay.to_read.iter().filter(|other| **other == name).count();
    let retries = relay.to_retry.iter().filter(|(_, other)| *other == name).count();
    let right = match channel.phase {
        Phase::Wanted => subscribes == usize::from(relay.connected) && reads + retries == 0,
        Phase::Subscribing => batch.contains(&name) && subscribes + reads + retries == 0,
        Phase::ToRead(_) => subscribes == 0 && reads + retries == 1,
        Phase::Reading(_, ticket) => {
            let waits = matches!(relay.waiting.get(&ticket), Some(Waiting::Recovery(other)) if *other == name);
            waits && subscribes + reads + retries == 0
        }
        // Live and, in a process that takes over, Following.
        Phase::Live | Phase::Following => subscribes + reads + retries == 0,
    };
    must!(right, "{called} in {:?}: {subscribes} subscribes, {reads} reads, {retries} retries wait", channel.phase);
    must!(relay.connected || due(Phase::Wanted), "{called} in {:?} without a connection", channel.phase);
    let held = channel.pending.len();
    must!(!due(Phase::Live) || held == 0, "{called} is live and holds {held} messages");
    must!(held <= relay.bounds.pending_messages, "{called} holds {held} messages");

    let mut position = channel.tip.map(|tip| tip.position);
    for frame in channel.frames.iter().rev() {
        must!(Some(frame.position) == position, "{called}: {:?} where {position:?} was expected", frame.position);
        must!(frame.kind != FrameKind::Gap, "{called} keeps a gap");
        if frame.kind == FrameKind::Publication {
            position = position.map(|mut position| {
                position.offset -= 1;
                position
            });
        }
    }
    let kept = channel.frames.iter().count();
    must!(kept <= relay.settings.history.messages, "{called} keeps {kept} frames");
    Ok(())
}
