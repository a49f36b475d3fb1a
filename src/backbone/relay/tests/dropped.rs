//! Messages that get lost between the backbone and the relay. The relay is stepped by hand here: what it is not shown is lost.

use super::*;
use crate::log::frame::FrameKind;

/// A relay with one shard, interested in `news`, on an embedded backbone.
struct Stepped {
    relay: Relay,
    mailbox: Arc<Mailbox>,
}

impl Stepped {
    fn new(history: HistoryConfig) -> Self {
        let settings = Arc::new(Settings { history: history.clone(), ..Settings::default() });
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let status = Arc::new(BackboneStatus::new(1, clock));
        let backbone = Backbone::Memory(MemoryBackbone::new(history, 1));
        let relay = Relay::new(settings, backbone, vec![mailbox.clone()], status, clock());
        let mut stepped = Self { relay, mailbox };
        stepped.settle();
        let interest = ToRelay::Interest { shard: 0, channel: 1, name: "news".into() };
        stepped.relay.on_request(interest, clock());
        stepped.settle();
        assert!(matches!(stepped.mailbox.take(), Some(ToShard::Live { .. })));
        stepped
    }

    /// Publishes without showing the relay; returns the message.
    fn publish(&mut self, data: &str) -> BackboneEvent {
        let publish =
            Publish { channel: "news".into(), data: Bytes::copy_from_slice(data.as_bytes()), idempotency_key: None };
        let ticket = self.relay.ticket();
        self.relay.backbone.publish(ticket, publish, clock());
        let events: Vec<_> = std::iter::from_fn(|| self.relay.backbone.try_next()).collect();
        events.into_iter().find(|event| matches!(event, BackboneEvent::Message(_))).expect("a message")
    }

    fn show(&mut self, event: BackboneEvent) {
        self.relay.on_event(event, clock());
    }

    /// Lets the relay do what it has started.
    fn settle(&mut self) {
        loop {
            self.relay.end_turn(clock());
            let events: Vec<_> = std::iter::from_fn(|| self.relay.backbone.try_next()).collect();
            if events.is_empty() {
                return;
            }
            events.into_iter().for_each(|event| self.show(event));
        }
    }

    /// What the shard got, in order: kind and offset.
    fn got(&mut self) -> Vec<(FrameKind, u64)> {
        self.settle();
        std::iter::from_fn(|| self.mailbox.take())
            .map(|message| match message {
                ToShard::Publication { frame, .. } => (frame.kind, frame.position.offset),
                other => panic!("{other:?}"),
            })
            .collect()
    }
}

const P: FrameKind = FrameKind::Publication;

#[test]
fn the_next_message_reveals_a_lost_one() {
    let mut stepped = Stepped::new(Settings::default().history);
    let first = stepped.publish("1");
    stepped.show(first.clone());
    stepped.publish("2");
    stepped.publish("3");
    let fourth = stepped.publish("4");
    stepped.show(fourth.clone());
    // These arrive while the history is read.
    let fifth = stepped.publish("5");
    stepped.show(fifth);
    stepped.show(first);
    assert_eq!(stepped.got(), [(P, 1), (P, 2), (P, 3), (P, 4), (P, 5)]);
    stepped.show(fourth);
    assert_eq!(stepped.got(), []);
    let status = &stepped.relay.status;
    assert_eq!((status.repairs.get(), status.repaired.get(), status.gaps.get()), (1, 4, 0));
}

#[test]
fn a_lost_one_that_the_history_dropped_is_a_gap() {
    let mut stepped = Stepped::new(HistoryConfig { messages: 2, ..Settings::default().history });
    let first = stepped.publish("1");
    stepped.show(first);
    for n in 2..=5 {
        stepped.publish(&n.to_string());
    }
    let last = stepped.publish("6");
    stepped.show(last);
    assert_eq!(stepped.got(), [(P, 1), (FrameKind::Gap, 4), (P, 5), (P, 6)]);
}

#[test]
fn an_overrun_reads_even_when_no_message_follows() {
    let mut stepped = Stepped::new(Settings::default().history);
    stepped.publish("1");
    stepped.publish("2");
    stepped.show(BackboneEvent::Overrun);
    assert_eq!(stepped.got(), [(P, 1), (P, 2)]);
    assert_eq!(stepped.relay.status.overruns.get(), 1);
}

#[test]
fn more_than_can_be_held_meanwhile_is_read() {
    let history = HistoryConfig { messages: 10_000, ..Settings::default().history };
    let mut stepped = Stepped::new(history);
    stepped.publish("lost");
    let count = crate::limits::PENDING_MESSAGES as u64 + 100;
    for n in 2..=count {
        let message = stepped.publish(&n.to_string());
        stepped.show(message);
    }
    assert!(stepped.got().into_iter().eq((1..=count).map(|offset| (P, offset))));
    assert_eq!(stepped.relay.status.gaps.get(), 0);
}

#[test]
fn a_lost_connection_is_made_good_on_the_next() {
    let mut stepped = Stepped::new(Settings::default().history);
    stepped.show(BackboneEvent::Disconnected("test".into()));
    stepped.publish("1");
    // A new subscriber meanwhile gets what the node has.
    stepped.relay.on_request(ToRelay::Interest { shard: 0, channel: 1, name: "news".into() }, clock());
    stepped.settle();
    match stepped.mailbox.take() {
        Some(ToShard::Live { position, .. }) => assert_eq!(position.offset, 0),
        other => panic!("{other:?}"),
    }
    stepped.show(BackboneEvent::Connected);
    assert_eq!(stepped.got(), [(P, 1)]);
}
