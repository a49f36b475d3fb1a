//! The relay on both backbones, as the shards see it. `faults` breaks the backbone, `dropped` loses messages on the way,
//! `overflow` has shards that do not read, `handover`
//! has a next process.

mod dropped;
mod faults;
mod handover;
mod overflow;

use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::*;
use crate::backbone::redis::testing::Server;
use crate::log::frame::{Frame, FrameKind};
use crate::settings::HistoryConfig;
use crate::shard::mailbox::{HistoryQuery, Publish};

const PATIENCE: Duration = Duration::from_secs(20);

fn clock() -> Micros {
    static START: OnceLock<Instant> = OnceLock::new();
    Micros::try_from(START.get_or_init(Instant::now).elapsed().as_micros()).unwrap()
}

/// A relay on its thread and the mailboxes of its shards.
struct Node {
    requests: mpsc::Sender<ToRelay>,
    orders: mpsc::Sender<ToBackbone>,
    shards: Vec<Arc<Mailbox>>,
    status: Arc<BackboneStatus>,
    thread: JoinHandle<()>,
}

impl Node {
    fn start(settings: Settings, shards: usize) -> Self {
        Self::start_as(1, None, settings, shards)
    }

    fn start_as(node: u64, follows: Option<u64>, settings: Settings, shards: usize) -> Self {
        let (requests, receiver) = mpsc::channel(crate::limits::RELAY_REQUESTS);
        let shards: Vec<_> = (0..shards).map(|_| Arc::new(Mailbox::new().unwrap())).collect();
        let status = Arc::new(BackboneStatus::new(shards.len(), clock));
        let (mailboxes, told) = (shards.clone(), status.clone());
        let (orders, succession) = Succession::first(node);
        let succession = Succession { follows, ..succession };
        let thread = std::thread::spawn(move || {
            run(Arc::new(settings), receiver, mailboxes, told, clock, succession).unwrap();
        });
        let node = Self { requests, orders, shards, status, thread };
        node.until("ready", |node| node.status.ready().is_ok());
        node
    }

    fn on(server: Option<&Server>, shards: usize) -> Self {
        Self::start(Settings { redis: server.map(Server::config), ..Settings::default() }, shards)
    }

    fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(Instant::now() < until, "not {what}: {:?}", self.status);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn ask(&self, request: ToRelay) {
        self.requests.blocking_send(request).unwrap();
    }

    fn interest(&self, shard: usize, channel: LocalChannel, name: &str) {
        self.ask(ToRelay::Interest { shard, channel, name: name.into() });
    }

    fn disinterest(&self, shard: usize, channel: LocalChannel, name: &str) {
        self.ask(ToRelay::Disinterest { shard, channel, name: name.into() });
    }

    /// The next message for a shard.
    fn next(&self, shard: usize) -> ToShard {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(message) = self.shards[shard].take() {
                return message;
            }
            assert!(Instant::now() < until, "nothing came: {:?}", self.status);
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// The channel's Live: its position and the offsets of its frames.
    fn live(&self, shard: usize) -> (Position, Vec<u64>) {
        match self.next(shard) {
            ToShard::Live { position, frames, .. } => {
                (position, frames.iter().map(|frame| frame.position.offset).collect())
            }
            other => panic!("{other:?}"),
        }
    }

    fn frame(&self, shard: usize) -> Arc<Frame> {
        match self.next(shard) {
            ToShard::Publication { frame, .. } => frame,
            other => panic!("{other:?}"),
        }
    }

    /// The next publication's position and payload.
    fn publication(&self, shard: usize) -> (Position, String) {
        let frame = self.frame(shard);
        assert_eq!(frame.kind, FrameKind::Publication, "{frame:?}");
        (frame.position, payload(&frame))
    }

    fn publish(&self, shard: usize, name: &str, data: &str, key: Option<&str>) {
        let publish = Publish {
            channel: name.into(),
            data: Bytes::copy_from_slice(data.as_bytes()),
            idempotency_key: key.map(Into::into),
        };
        self.ask(ToRelay::Publish { shard, request: 1, publish });
    }

    /// Publishes from a shard that gets nothing but replies.
    fn publish_and_wait(&self, shard: usize, name: &str, data: &str, key: Option<&str>) -> Position {
        self.publish(shard, name, data, key);
        match self.next(shard) {
            ToShard::Reply { request: 1, reply: Reply::Published(Ok(position)) } => position,
            other => panic!("{other:?}"),
        }
    }

    /// The offsets that a shard is answered with.
    fn history(&self, shard: usize, query: HistoryQuery) -> Result<Vec<u64>, RequestError> {
        self.ask(ToRelay::History { shard, request: 2, query });
        self.brought(shard)
    }

    fn brought(&self, shard: usize) -> Result<Vec<u64>, RequestError> {
        match self.next(shard) {
            ToShard::Reply { request: 2, reply: Reply::History(answer) } => {
                answer.map(|frames| frames.iter().map(|frame| frame.position.offset).collect())
            }
            other => panic!("{other:?}"),
        }
    }
}

fn payload(frame: &Frame) -> String {
    let object: serde_json::Value = serde_json::from_slice(frame.publication_json()).unwrap();
    match &object["data"] {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn query(name: &str, since: Position, upto: u64) -> HistoryQuery {
    HistoryQuery { channel: name.into(), since, upto }
}

/// Runs a test on the embedded backbone and on a Redis of its own.
fn on_both(test: impl Fn(Option<&Server>)) {
    test(None);
    test(Some(&Server::start(&[])));
}

#[test]
fn positions_are_consecutive_and_the_epoch_stays() {
    on_both(|server| {
        let node = Node::on(server, 3);
        node.interest(0, 7, "news");
        let (start, frames) = node.live(0);
        assert_eq!((start.offset, frames), (0, vec![]));
        for offset in 1..=3 {
            let data = format!("{{\"n\":{offset}}}");
            let position = node.publish_and_wait(2, "news", &data, None);
            assert_eq!(position, Position { offset, ..start });
            assert_eq!(node.publication(0), (position, data));
        }
        node.interest(1, 9, "news");
        assert_eq!(node.live(1), (Position { offset: 3, ..start }, vec![1, 2, 3]));
        node.publish(2, "news", "4", None);
        assert_eq!(node.publication(0), (Position { offset: 4, ..start }, "4".into()));
        assert_eq!(node.publication(1), (Position { offset: 4, ..start }, "4".into()));
    });
}

#[test]
fn what_was_published_before_anyone_asked_is_in_the_history() {
    on_both(|server| {
        let node = Node::on(server, 2);
        let last =
            (1..=5).fold(Position::default(), |_, n: u32| node.publish_and_wait(1, "news", &n.to_string(), None));
        node.interest(0, 1, "news");
        assert_eq!(node.live(0), (last, vec![1, 2, 3, 4, 5]));
    });
}

#[test]
fn three_publishers_make_one_sequence() {
    on_both(|server| {
        let node = Node::on(server, 4);
        node.interest(0, 1, "news");
        let (start, _) = node.live(0);
        std::thread::scope(|scope| {
            for shard in 1..4 {
                let node = &node;
                scope.spawn(move || {
                    for n in 0..100 {
                        node.publish(shard, "news", &format!("{shard}-{n}"), None);
                    }
                    let offsets: Vec<u64> = (0..100)
                        .map(|_| match node.next(shard) {
                            ToShard::Reply { reply: Reply::Published(Ok(position)), .. } => position.offset,
                            other => panic!("{other:?}"),
                        })
                        .collect();
                    assert!(offsets.is_sorted(), "one publisher's publications keep their order");
                });
            }
        });
        let mut counts = [0; 4];
        for offset in 1..=300 {
            let (position, data) = node.publication(0);
            assert_eq!(position, Position { offset, ..start });
            let (shard, n) = data.split_once('-').unwrap();
            let shard: usize = shard.parse().unwrap();
            assert_eq!(n.parse(), Ok(counts[shard]), "one publisher's publications keep their order");
            counts[shard] += 1;
        }
        assert_eq!(node.status.gaps.get(), 0);
    });
}

#[test]
fn a_repeated_key_publishes_once() {
    on_both(|server| {
        let node = Node::on(server, 2);
        node.interest(0, 1, "news");
        node.live(0);
        let first = node.publish_and_wait(1, "news", "a", Some("order-1"));
        assert_eq!(node.publish_and_wait(1, "news", "a", Some("order-1")), first);
        let other = node.publish_and_wait(1, "news", "b", Some("order-2"));
        assert_eq!(other.offset, first.offset + 1);
        let elsewhere = node.publish_and_wait(1, "sport", "a", Some("order-1"));
        assert_eq!(elsewhere.offset, 1);
        assert_eq!(node.publication(0), (first, "a".into()));
        assert_eq!(node.publication(0), (other, "b".into()));
    });
}

#[test]
fn history_is_read_up_to_where_a_log_begins() {
    on_both(|server| {
        let history = HistoryConfig { messages: 4, ..Settings::default().history };
        let node = Node::start(Settings { redis: server.map(Server::config), history, ..Settings::default() }, 2);
        let head =
            (1..=6).fold(Position::default(), |_, n: u32| node.publish_and_wait(1, "news", &n.to_string(), None));
        let at = |offset| Position { offset, ..head };
        let read = |since, upto| node.history(1, query("news", since, upto));
        assert_eq!(read(at(4), 6), Ok(vec![5, 6]));
        assert_eq!(read(at(2), 5), Ok(vec![3, 4, 5]));
        assert_eq!(read(at(0), 5), Ok(vec![3, 4, 5]), "what is left of it");
        assert_eq!(read(at(0), 2), Ok(vec![]), "nothing is left of it");
        assert_eq!(read(at(6), 7), Ok(vec![]), "it never was");
        let other = Position { epoch: crate::log::position::Epoch(head.epoch.0 ^ 1), offset: 3 };
        assert_eq!(read(other, 5), Ok(vec![]));
        assert_eq!(node.history(1, query("silent", at(1), 5)), Ok(vec![]));
    });
}

#[test]
fn shards_that_ask_for_the_same_history_cost_one_read() {
    on_both(|server| {
        let node = Node::on(server, 4);
        let head =
            (1..=9).fold(Position::default(), |_, n: u32| node.publish_and_wait(3, "news", &n.to_string(), None));
        let since = |offset| Position { offset, ..head };
        for (shard, from) in [(0, 2), (1, 2), (2, 4)] {
            node.ask(ToRelay::History { shard, request: 2, query: query("news", since(from), 7) });
        }
        assert_eq!(node.brought(0), Ok(vec![3, 4, 5, 6, 7]));
        assert_eq!(node.brought(1), Ok(vec![3, 4, 5, 6, 7]));
        assert_eq!(node.brought(2), Ok(vec![5, 6, 7]));
        assert_eq!((node.status.fetches.get(), node.status.fetched.get()), (1, 5));
        // Who asks for more gets it by another read.
        assert_eq!(node.history(1, query("news", since(0), 8)), Ok(vec![1, 2, 3, 4, 5, 6, 7, 8]));
        assert_eq!(node.status.fetches.get(), 2);
    });
}

#[test]
fn an_old_history_is_gone_and_its_position_stays() {
    on_both(|server| {
        let history = HistoryConfig { age: Duration::from_secs(1), ..Settings::default().history };
        let node = Node::start(Settings { redis: server.map(Server::config), history, ..Settings::default() }, 1);
        let head = node.publish_and_wait(0, "news", "1", None);
        let start = Position { offset: 0, ..head };
        if let Some(server) = server {
            assert_eq!(server.query::<u64>(&["TTL", "weir:{news}:stream"]), 1);
            assert!(server.query::<u64>(&["TTL", "weir:{news}:meta"]) > 29 * 24 * 3_600);
        }
        std::thread::sleep(Duration::from_millis(1_200));
        assert_eq!(node.history(0, query("news", start, 1)), Ok(vec![]));
        let next = node.publish_and_wait(0, "news", "2", None);
        assert_eq!(next, Position { offset: 2, ..head });
        assert_eq!(node.history(0, query("news", start, 2)), Ok(vec![2]));
    });
}

#[test]
fn a_channel_is_subscribed_once_and_released_after_the_linger() {
    let server = Server::start(&[]);
    let linger = Duration::from_millis(300);
    let node = Node::start(Settings { redis: Some(server.config()), linger, ..Settings::default() }, 2);
    let subscriptions = || server.query::<(String, u64)>(&["PUBSUB", "NUMSUB", "weir:{news}"]).1;
    node.interest(0, 1, "news");
    node.interest(1, 2, "news");
    node.live(0);
    node.live(1);
    assert_eq!(subscriptions(), 1);
    node.disinterest(0, 1, "news");
    assert!(matches!(node.next(0), ToShard::Released { channel: 1 }));
    node.disinterest(1, 2, "news");
    assert!(matches!(node.next(1), ToShard::Released { channel: 2 }), "released at once, before the linger");
    // Whoever comes back within the linger finds the channel live.
    node.interest(1, 3, "news");
    node.live(1);
    std::thread::sleep(linger * 2);
    assert_eq!(subscriptions(), 1);
    let left = Instant::now();
    node.disinterest(1, 3, "news");
    node.until("unsubscribed", |_| subscriptions() == 0);
    assert!(left.elapsed() >= linger);
    // And whoever comes later opens it anew.
    let head = node.publish_and_wait(0, "news", "1", None);
    assert!(matches!(node.next(1), ToShard::Released { channel: 3 }));
    node.interest(1, 4, "news");
    assert_eq!(node.live(1), (head, vec![1]));
    assert_eq!(subscriptions(), 1);
    assert_eq!(node.status.channels.get(), 1);
}

#[test]
fn what_others_put_into_redis_arrives() {
    let server = Server::start(&[]);
    let node = Node::on(Some(&server), 1);
    node.interest(0, 1, "news");
    let (start, _) = node.live(0);
    let printed = server.cli_publish("news", "{\"hello\":1}");
    assert_eq!(printed, format!("{}\n1\n0\n", start.epoch));
    assert_eq!(node.publication(0), (Position { offset: 1, ..start }, "{\"hello\":1}".into()));

    // A plain PUBLISH has no position and moves none.
    server.query::<u64>(&["PUBLISH", "weir:{news}", "\"plain\""]);
    let frame = node.frame(0);
    assert_eq!((frame.kind, frame.position.offset), (FrameKind::Unpositioned, 1));
    assert_eq!(payload(&frame), "plain");

    // A plain XADD waits for the next publication and comes before it.
    server.query::<String>(&["XADD", "weir:{news}:stream", "*", "d", "added"]);
    server.query::<String>(&["XADD", "weir:{news}:stream", "*", "other", "field"]);
    server.cli_publish("news", "after");
    for (offset, data) in [(2, "added"), (3, "field"), (4, "after")] {
        assert_eq!(node.publication(0), (Position { offset, ..start }, data.into()));
    }
    assert_eq!(server.query::<u64>(&["XLEN", "weir:{news}:stream"]), 4);
    assert_eq!(node.status.gaps.get(), 0);
}

#[test]
fn text_that_is_none_is_replaced_and_too_much_is_a_gap() {
    let server = Server::start(&[]);
    let node = Node::on(Some(&server), 1);
    node.interest(0, 1, "news");
    let (start, _) = node.live(0);
    let publish = |data: &[u8]| {
        let mut command = redis::cmd("FCALL");
        command.arg(&["weir_publish", "2", "weir:{news}:meta", "weir:{news}:stream", "weir:{news}"]).arg(data);
        command.exec(&mut server.connect()).unwrap();
    };
    publish(b"caf\xe9");
    assert_eq!(node.publication(0).1, "caf\u{fffd}");
    assert_eq!(node.status.invalid.get(), 1);
    publish(&vec![b'x'; crate::limits::BACKBONE_PAYLOAD_BYTES + 1]);
    let frame = node.frame(0);
    assert_eq!((frame.kind, frame.position), (FrameKind::Gap, Position { offset: 2, ..start }));
    publish(b"small");
    assert_eq!(node.publication(0), (Position { offset: 3, ..start }, "small".into()));
    assert_eq!(node.status.oversized.get(), 1);
}

#[test]
fn a_relay_without_shards_answers_and_ends() {
    on_both(|server| {
        let node = Node::on(server, 1);
        for n in 0..100 {
            node.publish(0, "news", &n.to_string(), None);
        }
        let Node { requests, shards, thread, .. } = node;
        drop(requests);
        thread.join().unwrap();
        let replies = std::iter::from_fn(|| shards[0].take())
            .filter(|message| matches!(message, ToShard::Reply { reply: Reply::Published(Ok(_)), .. }));
        assert_eq!(replies.count(), 100);
    });
}

#[test]
fn a_bad_address_ends_it_at_once() {
    let redis = Some(crate::settings::RedisConfig { url: "nowhere".into(), prefix: "weir:".into() });
    let settings = Arc::new(Settings { redis, ..Settings::default() });
    let (_requests, receiver) = mpsc::channel(1);
    let ended = run(settings, receiver, vec![], Arc::new(BackboneStatus::new(0, clock)), clock, Succession::first(1).1);
    assert!(matches!(ended, Err(RelayError::Address(_))), "{ended:?}");
}
