//! A shard that does not read its mailbox: it gets everything later, and nobody else notices. A node with as many channels
//! as it can follow: who asks for one more is told.

use super::*;
use crate::limits::{LOG_MESSAGES, MAILBOX_MESSAGES};

/// Publishes `count` numbers to `news` from a shard that reads its replies.
fn publish_numbers(node: &Node, shard: usize, count: u64) {
    for n in 1..=count {
        node.publish_and_wait(shard, "news", &n.to_string(), None);
    }
}

/// Reads a shard's mailbox until `last` arrived: what came in order, with gaps as their positions.
fn read_until(node: &Node, shard: usize, last: u64) -> (Vec<u64>, Vec<(u64, u64)>, usize) {
    let (mut offsets, mut gaps, mut missed) = (Vec::new(), Vec::new(), 0);
    let mut take = |frame: &Frame| match frame.kind {
        FrameKind::Publication => offsets.push(frame.position.offset),
        FrameKind::Gap => gaps.push((offsets.last().copied().unwrap_or(0), frame.position.offset)),
        FrameKind::Unpositioned => panic!("{frame:?}"),
    };
    loop {
        let newest = match node.next(shard) {
            ToShard::Publication { channel: 5, frame } => {
                take(&frame);
                frame.position.offset
            }
            ToShard::Missed { channel: 5, frames } => {
                missed += 1;
                frames.iter().for_each(|frame| take(frame));
                frames.last().unwrap().position.offset
            }
            other => panic!("{other:?}"),
        };
        if newest == last {
            return (offsets, gaps, missed);
        }
    }
}

#[test]
fn a_full_mailbox_catches_up_in_order() {
    let node = Node::on(None, 3);
    node.interest(0, 5, "news");
    node.live(0);
    node.interest(1, 5, "news");
    node.live(1);
    let count = MAILBOX_MESSAGES as u64 + 500;
    std::thread::scope(|scope| {
        scope.spawn(|| publish_numbers(&node, 2, count));
        let (offsets, gaps, missed) = read_until(&node, 1, count);
        assert!(offsets.iter().copied().eq(1..=count));
        assert_eq!((gaps, missed), (vec![], 0), "the other shard notices nothing");
    });
    assert_eq!(node.status.overflows[0].get(), 500);
    assert_eq!(node.status.overflows[1].get(), 0);
    let (offsets, gaps, missed) = read_until(&node, 0, count);
    assert!(offsets.iter().copied().eq(1..=count));
    assert_eq!(gaps, vec![]);
    assert!(missed >= 1);
    // And then it goes on as before.
    node.publish_and_wait(2, "news", "next", None);
    assert_eq!(node.publication(0).0.offset, count + 1);
}

#[test]
fn what_left_the_log_meanwhile_is_an_announced_gap() {
    let node = Node::on(None, 2);
    node.interest(0, 5, "news");
    node.live(0);
    let (full, kept) = (MAILBOX_MESSAGES as u64, LOG_MESSAGES as u64);
    let count = full + kept + 100;
    publish_numbers(&node, 1, count);
    let (offsets, gaps, _) = read_until(&node, 0, count);
    assert_eq!(gaps, [(full, full + 100)]);
    assert!(offsets.iter().copied().eq((1..=full).chain(full + 101..=count)));
}

#[test]
fn answers_wait_for_a_full_mailbox() {
    let node = Node::on(None, 2);
    node.interest(0, 5, "news");
    node.live(0);
    publish_numbers(&node, 1, MAILBOX_MESSAGES as u64);
    // The mailbox of shard 0 is full now.
    node.publish(0, "sport", "1", None);
    node.interest(0, 6, "sport");
    node.disinterest(0, 5, "news");
    node.publish_and_wait(1, "news", "lost on shard 0", None);
    node.publish_and_wait(1, "sport", "2", None);
    let mut rest = std::iter::repeat_with(|| node.next(0)).skip(MAILBOX_MESSAGES);
    assert!(matches!(rest.next(), Some(ToShard::Reply { request: 1, reply: Reply::Published(Ok(_)) })));
    // The order of these two is the backbone's: one waits for a read, the other for nothing.
    let (mut live, mut released) = (None, false);
    while live.is_none() || !released {
        match rest.next() {
            Some(ToShard::Live { channel: 6, position, .. }) => live = Some(position.offset),
            Some(ToShard::Released { channel: 5 }) => released = true,
            other => panic!("{other:?}"),
        }
    }
    match rest.next() {
        Some(ToShard::Missed { channel: 6, frames }) => assert_eq!(frames[0].position.offset, 2),
        Some(ToShard::Publication { channel: 6, frame }) => assert_eq!(frame.position.offset, 2),
        other => panic!("{other:?}"),
    }
    assert_eq!(live, Some(1));
}

#[test]
fn one_channel_too_many_is_refused_until_another_is_let_go() {
    let settings = Arc::new(Settings { linger: Duration::ZERO, ..Settings::default() });
    let mailbox = Arc::new(Mailbox::new().unwrap());
    let status = Arc::new(BackboneStatus::new(1, clock));
    let backbone = Backbone::Memory(MemoryBackbone::new(settings.history.clone(), 1));
    let mut relay = Relay::new(settings, backbone, vec![mailbox.clone()], status.clone(), 0);
    relay.bounds.channels = 2;
    let mut ask = |request| {
        relay.on_request(request, 0);
        for _ in 0..3 {
            while let Some(event) = relay.backbone.try_next() {
                relay.on_event(event, 0);
            }
            relay.end_turn(0);
        }
        mailbox.take().unwrap()
    };
    let interest = |channel, name: &str| ToRelay::Interest { shard: 0, channel, name: name.into() };
    let disinterest = |channel, name: &str| ToRelay::Disinterest { shard: 0, channel, name: name.into() };
    assert!(matches!(ask(interest(0, "a")), ToShard::Live { channel: 0, .. }));
    assert!(matches!(ask(interest(1, "b")), ToShard::Live { channel: 1, .. }));
    assert!(matches!(ask(interest(2, "c")), ToShard::Refused { channel: 2 }));
    assert!(matches!(ask(disinterest(2, "c")), ToShard::Released { channel: 2 }), "its number is given back");
    assert!(matches!(ask(disinterest(0, "a")), ToShard::Released { channel: 0 }));
    assert!(matches!(ask(interest(2, "c")), ToShard::Live { channel: 2, .. }));
    assert_eq!(status.refused.get(), 1);
}
