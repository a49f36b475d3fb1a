//! What must be true of a shard after every turn.

use super::kernel::Kernel;
use crate::log::channel_log::ChannelLog;
use crate::log::channel_table::{ChannelId, Group, Lane, Slot, State};
use crate::log::frame::FrameKind;
use crate::log::position::Position;
use crate::shard::connection::{Connection, Phase, Place, Protocol};
use crate::shard::core::Core;

/// Checks everything that can be seen from outside of a turn. `reserved` are the channels held for streams that are not
/// established yet; `stale` says that a turn may leave so much over that a number is used again while it is still queued, and
/// `older_bytes` is the bound on a log's older frames.
pub fn check(core: &Core, kernel: &Kernel, reserved: &[ChannelId], stale: bool, older_bytes: u64) {
    let mut found = vec![Found::default(); core.channels.id_bound() as usize];
    for (slot, connection) in &core.connections {
        check_connection(core, kernel, slot as Slot, connection);
        for subscription in &connection.subscriptions {
            let found = &mut found[subscription.channel as usize];
            found.holds += 1;
            found.members += usize::from(matches!(subscription.place, Place::CaughtUp { .. }));
            found.waiting += usize::from(matches!(subscription.place, Place::Waiting { .. }));
        }
    }
    reserved.iter().for_each(|&id| found[id as usize].holds += 1);
    for &id in &core.due {
        let found = &mut found[id as usize];
        // A number may still be queued for a channel that had it before.
        found.due = if stale { 1 } else { found.due + 1 };
    }
    for (id, found) in found.into_iter().enumerate() {
        check_channel(core, id as ChannelId, &found, stale, older_bytes);
    }
    let logs = (0..core.channels.id_bound()).filter_map(|id| core.channels.get(id)?.log());
    assert_eq!(core.channels.older_bytes(), logs.map(ChannelLog::older_bytes).sum::<u64>(), "bytes of older frames");
    for &id in core.fetches.keys() {
        assert!(core.channels.get(id).is_some_and(|channel| channel.log().is_some()), "a fetch for no log: {id}");
    }
    check_ready(core, stale);
    check_metrics(core);
}

/// What was found of one channel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Found {
    holds: u32,
    members: usize,
    waiting: usize,
    due: usize,
}

fn check_connection(core: &Core, kernel: &Kernel, slot: Slot, connection: &Connection) {
    let Connection { phase, lane, subscriptions, cut, blocked, queued, .. } = connection;
    let served = *blocked || *queued;
    if *phase != Phase::Open {
        assert!(subscriptions.is_empty() && cut.is_none(), "slot {slot}: {phase:?} and still subscribed");
    }
    if matches!(phase, Phase::Open | Phase::Farewell { .. }) {
        assert!(served || connection.control_due().is_empty(), "slot {slot}: own bytes that nobody sends");
    }
    assert_eq!(*blocked, kernel.awaits_writable(slot) && *phase != Phase::Closing, "slot {slot}: blocked");
    if connection.cut.is_some() {
        assert_eq!(connection.control_sent, 0, "slot {slot}: a frame and own bytes are both cut");
    }
    for (index, subscription) in subscriptions.iter().enumerate() {
        let channel = core.channels.get(subscription.channel).expect("a subscription holds its channel");
        let log = channel.log();
        let group = &channel.groups[*lane as usize];
        let is_cut = *cut == Some(index as u16);
        match subscription.place {
            Place::Opening => {
                let fetches = core.fetches.contains_key(&subscription.channel);
                assert!((log.is_none() || fetches) && !is_cut, "slot {slot}: a live channel is still awaited");
            }
            Place::CaughtUp { index } => {
                assert!(lane.shares() && !is_cut);
                assert_eq!(group.members().get(index as usize), Some(&slot), "slot {slot}: member {index}");
                let log = log.expect("a group's channel is live");
                let behind = group.pass().is_some() || group.at() < log.head();
                assert!(channel.due || !behind, "slot {slot}: its group is behind and its channel is not due");
            }
            Place::Waiting { cursor, index } => {
                assert_eq!(group.waiting().get(index as usize), Some(&slot), "slot {slot}: waits at {index}");
                assert!(cursor.sent == 0 && !is_cut);
                let head = log.expect("a group's channel is live").head();
                assert!(cursor.next == head + 1 || (cursor.next <= head && channel.due), "slot {slot}: waits forever");
            }
            Place::Behind(cursor) => {
                assert!(served, "slot {slot}: behind and nobody serves it");
                assert_eq!(cursor.sent > 0, is_cut, "slot {slot}: which frame is cut");
                assert!(cursor.next <= log.expect("a cursor's channel is live").head() + 1, "slot {slot}: {cursor:?}");
            }
        }
    }
}

fn check_channel(core: &Core, id: ChannelId, found: &Found, stale: bool, older_bytes: u64) {
    let Some(channel) = core.channels.get(id) else {
        assert!(found.holds == 0 && (found.due == 0 || stale), "channel {id} is gone and still held or due");
        return;
    };
    let groups = Lane::ALL.map(|lane| &channel.groups[lane as usize]);
    // Each subscription has been found at its index, so equal numbers mean that nobody else is in there.
    let sum = |length: fn(&Group) -> usize| groups.iter().map(|group| length(group)).sum::<usize>();
    let listed = Found {
        holds: channel.holds,
        members: sum(|group| group.members().len()),
        waiting: sum(|group| group.waiting().len()),
        due: usize::from(channel.due || (stale && found.due > 0)),
    };
    assert_eq!(*found, listed, "what connections know and what channel {id} knows");
    if let State::Live(log) = &channel.state {
        let head = log.head();
        let passed = |group: &&Group| group.at() > head || group.pass().is_some_and(|pass| pass.target > head);
        assert!(!groups.iter().any(passed), "a group of channel {id} is past its head");
        let bounds = &core.settings.history;
        let (first, bytes) = (log.bounded_first(), log.bytes() - log.older_bytes());
        assert!(head + 1 - first <= bounds.messages as u64, "frames held by channel {id}");
        assert!(bytes <= bounds.bytes as u64 || head <= first, "bytes held by channel {id}");
        assert!(log.older_bytes() <= older_bytes, "bytes of older frames held by channel {id}");
        // Invariant of everything that walks through a log: what follows a position has the next one.
        for (one, next) in log.since(log.first()).zip(log.since(log.first() + 1)) {
            let (one, position) = (one.position, next.position);
            let follows = match next.kind {
                FrameKind::Publication => position == Position { offset: one.offset + 1, ..one },
                FrameKind::Unpositioned => position == one,
                FrameKind::Gap => true,
            };
            assert!(follows, "{position:?} after {one:?} in the log of channel {id}");
        }
    }
}

fn check_ready(core: &Core, stale: bool) {
    let mut ready: Vec<Slot> = core.ready.iter().copied().collect();
    ready.sort_unstable();
    assert!(stale || ready.windows(2).all(|pair| pair[0] != pair[1]), "a connection is queued twice: {ready:?}");
    for (slot, connection) in &core.connections {
        let found = ready.binary_search(&(slot as Slot)).is_ok();
        assert!(found == connection.queued || (stale && found), "slot {slot} among the ready ones");
    }
}

fn check_metrics(core: &Core) {
    let metrics = &core.recorder.metrics;
    let mut lagging = 0;
    let mut subscriptions = 0;
    let mut sse = 0;
    let mut websocket = 0;
    let mut poll = 0;
    for (_, connection) in &core.connections {
        lagging += u64::from(connection.blocked);
        subscriptions += connection.subscriptions.len() as u64;
        let open = u64::from(connection.phase == Phase::Open);
        match connection.protocol {
            Protocol::Sse => sse += open,
            Protocol::WebSocket(_) => websocket += open,
            Protocol::Poll(_) => poll += open,
        }
    }
    assert_eq!(metrics.lagging.get(), lagging, "the gauge of lagging connections");
    assert_eq!(metrics.subscriptions.get(), subscriptions, "the gauge of subscriptions");
    assert_eq!(metrics.sse.get(), sse, "the gauge of event streams");
    assert_eq!(metrics.websocket.get(), websocket, "the gauge of WebSockets");
    assert_eq!(metrics.poll.get(), poll, "the gauge of waiting polls");
    assert_eq!(metrics.channels.get(), core.channels.len() as u64, "the gauge of channels");
}
