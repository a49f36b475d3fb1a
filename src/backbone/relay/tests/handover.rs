//! A relay gives what it holds to the relay of the next process. Nothing is lost, repeated or reordered.

use std::sync::mpsc::channel as answers;

use super::*;
use crate::backbone::handover::{Piece, Place};

const BOTH: usize = 2;

impl Node {
    fn order<T>(&self, order: impl FnOnce(std::sync::mpsc::Sender<T>) -> ToBackbone) -> T {
        let (reply, answer) = answers();
        self.orders.blocking_send(order(reply)).expect("it runs");
        answer.recv_timeout(PATIENCE).expect("it answers")
    }

    fn follower(server: Option<&Server>) -> Self {
        let settings = Settings { redis: server.map(Server::config), ..Settings::default() };
        Self::start_as(2, Some(1), settings, BOTH)
    }

    /// One pass of a hand-over.
    fn pass(&self, next: &Node, round: u64) -> Vec<Piece> {
        let mut from = Some(Place::Channels(0));
        let mut pieces = Vec::new();
        while let Some(place) = from {
            let piece = self.order(|reply| ToBackbone::Export { round, from: place, reply });
            from = piece.next;
            next.order(|reply| ToBackbone::Import { piece: piece.clone(), reply }).expect("it takes it");
            pieces.push(piece);
        }
        pieces
    }

    /// Everything up to where the shards would stand still: what follows is delivered by neither.
    fn seed(&self, next: &Node) {
        self.pass(next, 1);
        let beat = next.order(|reply| ToBackbone::Prepare { reply });
        self.order(|reply| ToBackbone::Settle { beat, delivered: false, reply });
        self.pass(next, 1);
    }

    fn finish(&self, next: &Node) {
        let beat = self.order(|reply| ToBackbone::Hold { reply });
        self.pass(next, 1);
        next.order(|reply| ToBackbone::Finish { beat, reply });
        next.order(|reply| ToBackbone::Settle { beat: 0, delivered: true, reply });
    }

    /// The payloads of everything a shard was told of a channel, its Live included.
    fn heard(&self, shard: usize, last: &str) -> Vec<String> {
        let mut heard = Vec::new();
        while heard.last().map(String::as_str) != Some(last) {
            match self.next(shard) {
                ToShard::Live { frames, .. } | ToShard::Missed { frames, .. } => {
                    heard.extend(frames.iter().map(|frame| payload(frame)));
                }
                ToShard::Publication { frame, .. } => heard.push(payload(&frame)),
                other => panic!("{other:?}"),
            }
        }
        heard
    }
}

fn names(numbers: std::ops::RangeInclusive<u32>) -> Vec<String> {
    numbers.map(|number| format!("m{number}")).collect()
}

#[test]
fn the_embedded_backbone_goes_over_with_positions_keys_and_history() {
    let old = Node::on(None, BOTH);
    old.interest(0, 5, "news");
    old.live(0);
    let first = old.publish_and_wait(1, "news", "m1", Some("key"));
    let silent = old.publish_and_wait(1, "unheard", "x", None);
    let new = Node::follower(None);
    old.seed(&new);
    assert_eq!(old.publish_and_wait(1, "news", "m2", None).offset, 2);
    let late = old.publish_and_wait(1, "news", "m3", Some("late"));
    old.finish(&new);

    new.interest(0, 1, "news");
    let (position, offsets) = new.live(0);
    assert_eq!((position, offsets), (late, vec![1, 2, 3]));
    assert_eq!(new.publish_and_wait(1, "news", "again", Some("key")), first, "the key is known");
    assert_eq!(new.publish_and_wait(1, "news", "again", Some("late")), late, "and one used after the seed");
    assert_eq!(new.publish_and_wait(1, "news", "m4", None), Position { offset: 4, ..first });
    assert_eq!(new.publication(0).1, "m4");
    assert_eq!(new.publish_and_wait(1, "unheard", "y", None), Position { offset: 2, ..silent });
    assert_eq!(new.history(1, query("unheard", Position { offset: 0, ..silent }, 2)), Ok(vec![1, 2]));
}

#[test]
fn a_channel_goes_over_in_pieces() {
    let old = Node::on(None, BOTH);
    old.interest(0, 5, "big");
    old.live(0);
    let half = "x".repeat(crate::limits::HANDOVER_PIECE_BYTES / 2);
    for _ in 0..7 {
        old.publish_and_wait(1, "big", &half, None);
    }
    let new = Node::follower(None);
    let pieces = old.pass(&new, 1);
    assert!(pieces.len() > 3, "{} pieces", pieces.len());
    let again = old.pass(&new, 1);
    assert_eq!(again, [Piece::default()], "nothing is given twice");
    old.publish_and_wait(1, "big", "last", None);
    old.seed(&new);
    old.finish(&new);
    new.interest(0, 1, "big");
    let head = new.live(0).0;
    assert_eq!(head.offset, 8);
    assert_eq!(new.history(1, query("big", Position { offset: 0, ..head }, 8)), Ok((1..=8).collect()));
}

#[test]
fn on_redis_every_publication_comes_once_and_in_order_with_or_without_a_position() {
    let server = Server::start(&[]);
    let old = Node::on(Some(&server), BOTH);
    old.interest(0, 5, "news");
    old.live(0);
    // Without a position, as any program may.
    let plain = |text: &str| drop(server.cli(&["PUBLISH", "weir:{news}", text]));
    let publish = |numbers: std::ops::RangeInclusive<u32>| {
        for number in numbers {
            match number % 3 {
                0 => drop(old.publish_and_wait(1, "news", &format!("m{number}"), None)),
                _ => plain(&format!("m{number}")),
            }
        }
    };
    publish(1..=9);
    assert_eq!(old.heard(0, "m9"), names(1..=9));
    let new = Node::follower(Some(&server));
    old.pass(&new, 1);
    new.interest(0, 5, "news");
    publish(10..=20);
    let beat = new.order(|reply| ToBackbone::Prepare { reply });
    publish(21..=30);
    old.order(|reply| ToBackbone::Settle { beat, delivered: false, reply });
    publish(31..=40);
    old.pass(&new, 1);
    publish(41..=50);
    assert_eq!(old.heard(0, "m50"), names(10..=50));
    let beat = old.order(|reply| ToBackbone::Hold { reply });
    // What the old one does not take up any more.
    plain("m51");
    plain("m52");
    old.pass(&new, 1);
    plain("m53");
    new.order(|reply| ToBackbone::Finish { beat, reply });
    new.order(|reply| ToBackbone::Settle { beat: 0, delivered: true, reply });
    plain("m54");
    // What took no position before the shard had the channel is no history: its connections have seen it.
    let expected = [vec!["m3".into(), "m6".into(), "m9".into()], names(10..=54)].concat();
    assert_eq!(new.heard(0, "m54"), expected);
    assert_eq!(new.status.gaps.get(), 0);
}

#[test]
fn a_channel_that_is_opened_late_goes_over_too() {
    let server = Server::start(&[]);
    let old = Node::on(Some(&server), BOTH);
    let new = Node::follower(Some(&server));
    old.seed(&new);
    old.interest(0, 5, "late");
    old.live(0);
    let position = old.publish_and_wait(1, "late", "m1", None);
    old.finish(&new);
    new.interest(0, 1, "late");
    assert_eq!(new.live(0), (position, vec![1]));
    new.publish_and_wait(1, "late", "m2", None);
    assert_eq!(new.publication(0).1, "m2");
}

#[test]
fn a_hand_over_that_fails_leaves_the_relay_as_it_was_and_may_be_tried_again() {
    let old = Node::on(None, BOTH);
    old.interest(0, 5, "news");
    old.live(0);
    old.publish_and_wait(1, "news", "m1", None);
    let failed = Node::follower(None);
    old.seed(&failed);
    old.order(|reply| ToBackbone::Hold { reply });
    drop(failed);
    old.orders.blocking_send(ToBackbone::Release).expect("it runs");
    old.publish_and_wait(1, "news", "m2", None);
    assert_eq!(old.heard(0, "m2"), names(1..=2));
    let new = Node::follower(None);
    old.pass(&new, 2);
    new.order(|reply| ToBackbone::Prepare { reply });
    let beat = old.order(|reply| ToBackbone::Hold { reply });
    old.pass(&new, 2);
    new.order(|reply| ToBackbone::Finish { beat, reply });
    new.interest(0, 1, "news");
    assert_eq!(new.live(0).1, [1, 2]);
}
