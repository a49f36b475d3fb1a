//! Both sides over a pair of sockets, with stand-ins for shards and relays: what is tested is who serves in the end.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::leaving::{Leaver, Patience, hand_over};
use super::link::Link;
use super::message::{Facts, Identity, Message};
use super::process::Successor;
use super::taking::{Heir, Inheritance};
use super::*;
use crate::backbone::handover::{Piece, SeedChannel, ToBackbone};
use crate::backbone::interface::Tag;
use crate::log::position::{Epoch, Position};
use crate::shard::handover::{Arriving, Carried, Leaving, Verdict};
use crate::shard::mailbox::{Mailbox, ToShard};

const SECOND: Duration = Duration::from_secs(1);

/// What a stand-in for a shard was told.
#[derive(Debug, Default)]
struct Seen {
    /// Verdicts; a sender that was dropped counts as [`Verdict::Stays`].
    verdicts: Mutex<Vec<Verdict>>,
    /// Connections of the shard.
    connections: Mutex<Vec<Carried>>,
    /// Channels it was told to hold.
    expected: Mutex<Vec<String>>,
    /// Whether it stands still.
    still: AtomicBool,
}

/// A shard's thread: answers what a hand-over asks until its mailbox is told to stop.
struct Shard {
    mailbox: Arc<Mailbox>,
    seen: Arc<Seen>,
    thread: Option<JoinHandle<()>>,
}

impl Shard {
    fn start(connections: usize) -> Self {
        let seen = Arc::new(Seen::default());
        for number in 0..connections {
            let (socket, _) = UnixStream::pair().expect("room");
            let state = Bytes::from(format!("state {number}"));
            seen.connections.lock().unwrap().push(Carried { socket: socket.into(), state });
        }
        let mailbox = Arc::new(Mailbox::new().expect("room"));
        let (posted, told) = (Arc::clone(&mailbox), Arc::clone(&seen));
        let thread = std::thread::spawn(move || {
            loop {
                match posted.take() {
                    Some(ToShard::Leave(leaving)) => leave(leaving, &told),
                    Some(ToShard::Expect(expected)) => {
                        let names = expected.channels.iter().map(|name| name.to_string());
                        told.expected.lock().unwrap().extend(names);
                        let _ = expected.live.send(Ok(()));
                    }
                    Some(ToShard::Arrive(arriving)) => arrive(arriving, &told),
                    Some(ToShard::Stop) => return,
                    Some(_) => {}
                    None => std::thread::sleep(Duration::from_micros(200)),
                }
            }
        });
        Self { mailbox, seen, thread: Some(thread) }
    }

    fn verdicts(&self) -> Vec<Verdict> {
        self.seen.verdicts.lock().unwrap().clone()
    }

    fn connections(&self) -> usize {
        self.seen.connections.lock().unwrap().len()
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        while self.mailbox.post(ToShard::Stop).is_err() {}
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(ended.is_some_and(|ended| ended.is_ok()) || std::thread::panicking());
    }
}

fn leave(Leaving { carried, frozen, verdict }: Leaving, seen: &Seen) {
    let mut connections = seen.connections.lock().unwrap();
    seen.still.store(true, Ordering::SeqCst);
    let _ = frozen.send(connections.len());
    for one in connections.iter() {
        let socket = one.socket.try_clone().expect("room");
        if carried.send(Carried { socket, state: one.state.clone() }).is_err() {
            break;
        }
    }
    drop(carried);
    let verdict = verdict.recv().unwrap_or(Verdict::Stays);
    seen.still.store(false, Ordering::SeqCst);
    seen.verdicts.lock().unwrap().push(verdict);
    if verdict == Verdict::Moved {
        connections.clear();
    }
}

fn arrive(Arriving { carried, arrived, verdict }: Arriving, seen: &Seen) {
    let taken: Vec<Carried> = carried.iter().collect();
    let answer = if taken.iter().all(|one| one.state.starts_with(b"state")) {
        Ok(taken.len())
    } else {
        Err("a state that is none".into())
    };
    let _ = arrived.send(answer);
    let verdict = verdict.recv().unwrap_or(Verdict::Stays);
    seen.verdicts.lock().unwrap().push(verdict);
    if verdict == Verdict::Moved {
        seen.connections.lock().unwrap().extend(taken);
    }
}

/// A relay that has one channel, wanted by the shards 0 and 1, and counts how often it is held and released.
#[derive(Debug, Default)]
struct Relay {
    held: AtomicUsize,
    released: AtomicUsize,
    imported: AtomicUsize,
    finished: AtomicUsize,
}

fn relay() -> (mpsc::Sender<ToBackbone>, Arc<Relay>) {
    let (sender, mut orders) = mpsc::channel(crate::limits::HANDOVER_ORDERS);
    let relay = Arc::new(Relay::default());
    let told = Arc::clone(&relay);
    std::thread::spawn(move || {
        while let Some(order) = orders.blocking_recv() {
            match order {
                ToBackbone::Export { reply, .. } => drop(reply.send(piece())),
                ToBackbone::Import { piece: got, reply } => {
                    assert_eq!(got, piece());
                    told.imported.fetch_add(1, Ordering::SeqCst);
                    let _ = reply.send(Ok(()));
                }
                ToBackbone::Prepare { reply } | ToBackbone::Settle { reply, .. } => {
                    let _ = reply.send(7);
                }
                ToBackbone::Hold { reply } => {
                    told.held.fetch_add(1, Ordering::SeqCst);
                    let _ = reply.send(8);
                }
                ToBackbone::Release => drop(told.released.fetch_add(1, Ordering::SeqCst)),
                ToBackbone::Finish { beat, reply } => {
                    assert_eq!(beat, 8, "the heartbeat of the moment it was held");
                    told.finished.fetch_add(1, Ordering::SeqCst);
                    let _ = reply.send(());
                }
            }
        }
    });
    (sender, relay)
}

fn piece() -> Piece {
    let channel = SeedChannel {
        name: "news".into(),
        tip: Position { epoch: Epoch(3), offset: 4 },
        tag: Some(Tag(5)),
        ancestors: vec![Epoch(2)],
        past: vec![Epoch(1)],
        shards: vec![0, 1],
        restart: true,
        more: false,
        after_beat: 2,
        frames: Vec::new(),
    };
    Piece { channels: vec![channel], ..Piece::default() }
}

/// Stands for the new process where there is none.
#[derive(Debug, Default, Clone)]
struct Nobody(Arc<Mutex<Vec<&'static str>>>);

impl Successor for Nobody {
    fn pid(&self) -> u32 {
        4_711
    }

    fn suspend(&mut self) {
        self.0.lock().unwrap().push("suspend");
    }

    fn resume(&mut self) {
        self.0.lock().unwrap().push("resume");
    }

    fn kill(&mut self) {
        self.0.lock().unwrap().push("kill");
    }
}

/// The old process of a test.
struct Old {
    shards: Vec<Shard>,
    backbone: mpsc::Sender<ToBackbone>,
    relay: Arc<Relay>,
    successor: Nobody,
    abort: Arc<AtomicBool>,
    patience: Patience,
}

impl Old {
    fn start(connections: &[usize]) -> Self {
        let (backbone, relay) = relay();
        let shards = connections.iter().map(|&count| Shard::start(count)).collect();
        let patience = Patience { start: SECOND, prepare: SECOND, freeze: SECOND, step: SECOND };
        let (successor, abort) = (Nobody::default(), Arc::default());
        Self { shards, backbone, relay, successor, abort, patience }
    }

    fn impatient(mut self) -> Self {
        let short = Duration::from_millis(100);
        self.patience = Patience { start: short, prepare: short, freeze: short, step: short };
        self
    }

    fn hand_over(&self, link: Link) -> Result<Moved, HandoverError> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
        hand_over(Leaver {
            successor: self.successor.clone(),
            link,
            listeners: vec![OwnedFd::from(listener)],
            facts: Facts { shards: self.shards.len(), node: 5, ..Facts::default() },
            mailboxes: self.shards.iter().map(|shard| Arc::clone(&shard.mailbox)).collect(),
            backbone: self.backbone.clone(),
            round: 1,
            clock: crate::control::clock::monotonic_micros,
            abort: Arc::clone(&self.abort),
            patience: self.patience,
        })
    }

    /// Serves as before: the new process is dead, no shard stands still, none has lost a connection, the relay goes on.
    fn assert_serves(&self, connections: &[usize]) {
        assert_eq!(self.successor.0.lock().unwrap().last(), Some(&"kill"));
        for (shard, &count) in self.shards.iter().zip(connections) {
            // A shard hears of it when its verdict is dropped, which has happened; it may have to wake.
            let until = Instant::now() + 10 * SECOND;
            while shard.seen.still.load(Ordering::SeqCst) {
                assert!(Instant::now() < until, "it stands still");
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(shard.connections(), count);
            assert!(!shard.verdicts().contains(&Verdict::Moved));
        }
        let until = Instant::now() + 10 * SECOND;
        while self.relay.released.load(Ordering::SeqCst) < self.relay.held.load(Ordering::SeqCst) {
            assert!(Instant::now() < until, "the relay is held");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Takes over with so many shards.
fn take(link: Link, shards: &[Shard]) -> Result<(Moved, Tally), String> {
    let inheritance = Inheritance::accept(link).map_err(|error| error.to_string())?;
    assert_eq!((inheritance.listeners.len(), inheritance.facts.node), (1, 5));
    let (backbone, relay) = relay();
    let mailboxes = shards.iter().map(|shard| Arc::clone(&shard.mailbox)).collect();
    let heir = Heir { mailboxes, backbone, clock: crate::control::clock::monotonic_micros };
    let taken = inheritance.take(heir).map_err(|error| error.to_string())?;
    assert_eq!(relay.finished.load(Ordering::SeqCst), 1);
    assert_eq!(relay.imported.load(Ordering::SeqCst), 3, "one piece a pass");
    Ok(taken)
}

fn both(before: &[usize], after: usize) -> (Old, Vec<Shard>) {
    let old = Old::start(before);
    let shards: Vec<Shard> = (0..after).map(|_| Shard::start(0)).collect();
    let (one, other) = Link::pair().expect("room");
    let (left, taken) = std::thread::scope(|scope| {
        let taking = scope.spawn(|| take(other, &shards));
        (old.hand_over(one), taking.join().expect("no panic"))
    });
    let (left, (taken, tally)) = (left.expect("it goes"), taken.expect("it goes"));
    let total = before.iter().sum();
    assert_eq!((left.connections, taken.connections, left.pid), (total, total, 4_711));
    assert_eq!((tally.moved, tally.failed, tally.pause), (1, 0, taken.pause));
    (old, shards)
}

#[test]
fn every_connection_goes_to_a_shard_of_the_new_process() {
    for (before, after) in [(&[600, 3, 0][..], 3), (&[5, 7, 9], 2), (&[4, 6], 5), (&[0], 1)] {
        let (old, shards) = both(before, after);
        let mut expected = vec![0; after];
        before.iter().enumerate().for_each(|(shard, count)| expected[shard % after] += count);
        // The verdicts are on their way when the main threads go on.
        let until = Instant::now() + 10 * SECOND;
        let everywhere = |shards: &[Shard]| shards.iter().all(|shard| shard.verdicts() == [Verdict::Moved]);
        while !everywhere(&shards) || !everywhere(&old.shards) {
            assert!(Instant::now() < until, "not everybody was told");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(shards.iter().map(Shard::connections).collect::<Vec<_>>(), expected);
        assert!(old.shards.iter().all(|shard| shard.connections() == 0));
        assert_eq!(*shards[0].seen.expected.lock().unwrap(), ["news"], "told once, though three passes name it");
        assert!(old.successor.0.lock().unwrap().is_empty(), "it lives");
    }
}

/// Words that pass in a hand-over of one batch from the new process, in order.
fn words() -> Vec<Message> {
    let connections = 4;
    vec![
        Message::Hello(Identity::own()),
        Message::Started,
        Message::Taken,
        Message::Prepared { beat: 7 },
        Message::Taken,
        Message::Taken,
        Message::Taken,
        Message::Taken,
        Message::Arrived { connections },
        Message::Mine,
    ]
}

/// What the new process has to have heard before it says its nth word.
fn heard_before(word: usize) -> &'static [&'static str] {
    const HEARD: [&[&str]; 10] = [
        &[],
        &["listeners", "welcome"],
        &["piece"],
        &["seeded"],
        &["piece"],
        &["piece"],
        &["frozen", "connections"],
        &["connections"],
        &["sent"],
        &["commit"],
    ];
    HEARD[word]
}

/// Says the first `count` words in time and returns the link.
fn say_so_far(link: Link, count: usize) -> Link {
    let soon = || Instant::now() + 10 * SECOND;
    for (word, message) in words().iter().enumerate().take(count) {
        hear(&link, word);
        link.say(message, soon()).expect("the old process listens");
    }
    link
}

fn hear(link: &Link, word: usize) {
    for expected in heard_before(word) {
        let heard = link.receive(Instant::now() + 10 * SECOND).expect("the old process speaks").message;
        assert_eq!(heard.name(), *expected, "before word {word}");
    }
}

const FOUR: [usize; 2] = [1, 3];

/// Where a hand-over is when the new process says its nth word.
const STEPS: [Step; 10] = [
    Step::Starting,
    Step::Greeting,
    Step::Seeding,
    Step::Preparing,
    Step::Preparing,
    Step::Settling,
    Step::Carrying,
    Step::Carrying,
    Step::Arriving,
    Step::Committing,
];

/// The new process goes wrong at each of its words in turn.
fn at_each_word(fault: impl Fn(Link, usize) -> Option<Link> + Sync, impatient: bool) {
    for word in 0..words().len() {
        let old = Old::start(&FOUR);
        let old = if impatient { old.impatient() } else { old };
        let (one, other) = Link::pair().expect("room");
        let left = std::thread::scope(|scope| {
            let faulty = scope.spawn(|| {
                let link = say_so_far(other, word);
                fault(link, word)
            });
            let left = old.hand_over(one);
            drop(faulty.join().expect("no panic"));
            left
        });
        let error = left.expect_err("nobody takes over");
        // A death may be noticed when the old process speaks next, which is before it would have heard the word.
        let step = if error.reason.contains("gone") { STEPS[word.saturating_sub(1)] } else { STEPS[word] };
        assert!([step, STEPS[word]].contains(&error.step), "at word {word}: {error}");
        old.assert_serves(&FOUR);
    }
}

#[test]
fn a_new_process_that_dies_at_any_step_leaves_the_old_one_serving() {
    at_each_word(|_, _| None, false);
    // With the old one's words in its ears.
    at_each_word(
        |link, word| {
            hear(&link, word);
            None
        },
        false,
    );
}

#[test]
fn a_new_process_that_hangs_at_any_step_leaves_the_old_one_serving() {
    at_each_word(|link, _| Some(link), true);
}

#[test]
fn a_new_process_that_says_something_else_leaves_the_old_one_serving() {
    at_each_word(
        |link, word| {
            let other = if word == 0 { Message::Mine } else { Message::Hello(Identity::own()) };
            link.say(&other, Instant::now() + 10 * SECOND).expect("the old process listens");
            Some(link)
        },
        false,
    );
}

#[test]
fn a_new_process_that_gives_up_says_why() {
    at_each_word(
        |link, _| {
            let reason = "no ring".into();
            link.say(&Message::Failed { reason }, Instant::now() + 10 * SECOND).expect("the old process listens");
            Some(link)
        },
        false,
    );
}

#[test]
fn mine_that_is_said_while_the_patience_ends_counts() {
    struct Late(Option<Link>, Nobody);
    impl Successor for Late {
        fn pid(&self) -> u32 {
            1
        }
        fn suspend(&mut self) {
            // The last moment at which it can be said.
            let link = self.0.take().expect("suspended once");
            link.say(&Message::Mine, Instant::now() + 10 * SECOND).expect("the old process listens");
            self.1.suspend();
        }
        fn resume(&mut self) {
            self.1.resume();
        }
        fn kill(&mut self) {
            self.1.kill();
        }
    }
    let old = Old::start(&FOUR).impatient();
    let (one, other) = UnixStream::pair().expect("room");
    let kept = Link::new(other.try_clone().expect("room"));
    let calls = old.successor.clone();
    let moved = std::thread::scope(|scope| {
        let speaking = scope.spawn(|| say_so_far(Link::new(other), words().len() - 1));
        let leaver = Leaver {
            successor: Late(Some(kept), calls),
            link: Link::new(one),
            listeners: vec![std::net::TcpListener::bind("127.0.0.1:0").expect("free ports").into()],
            facts: Facts::default(),
            mailboxes: old.shards.iter().map(|shard| Arc::clone(&shard.mailbox)).collect(),
            backbone: old.backbone.clone(),
            round: 1,
            clock: crate::control::clock::monotonic_micros,
            abort: Arc::default(),
            patience: Patience { start: SECOND, prepare: SECOND, freeze: SECOND, step: Duration::from_millis(300) },
        };
        let moved = hand_over(leaver);
        let link = speaking.join().expect("no panic");
        assert_eq!(link.receive(Instant::now() + SECOND).expect("it was said").message, Message::Commit);
        moved
    });
    assert_eq!(moved.expect("it said so").connections, 4);
    assert_eq!(*old.successor.0.lock().unwrap(), ["suspend", "resume"]);
}

#[test]
fn releases_too_far_apart_stay_apart() {
    let strange = Identity { state: Identity::own().state + 2, version: "9.9".into(), ..Identity::own() };
    let old = Old::start(&FOUR);
    let (one, other) = Link::pair().expect("room");
    other.say(&Message::Hello(strange.clone()), Instant::now() + SECOND).expect("room");
    let error = old.hand_over(one).expect_err("they do not understand each other").to_string();
    assert!(error.contains("9.9") && error.contains("connection state"), "{error}");
    old.assert_serves(&FOUR);

    // The other way round it is the new process that finds out.
    let (one, other) = UnixStream::pair().expect("room");
    let taking = std::thread::spawn(move || Inheritance::accept(Link::new(other)).map(drop));
    let old = Link::new(one);
    old.receive(Instant::now() + SECOND).expect("it says hello");
    let (listener, _) = UnixStream::pair().expect("room");
    let listeners = [std::os::fd::AsFd::as_fd(&listener)];
    old.send(&Message::Listeners, &[], &listeners, Instant::now() + SECOND).expect("room");
    let welcome = Message::Welcome { identity: strange, facts: Facts::default() };
    old.say(&welcome, Instant::now() + SECOND).expect("room");
    let error = taking.join().expect("no panic").expect_err("it does not understand").to_string();
    assert!(error.contains("9.9"), "{error}");
}

#[test]
fn a_new_process_whose_predecessor_dies_touches_nothing() {
    // It dies at each of its words: after `count` of them nothing comes any more.
    for count in 0..4 {
        let shards = vec![Shard::start(0)];
        let (one, other) = Link::pair().expect("room");
        let (near, far) = UnixStream::pair().expect("room");
        let taken = std::thread::scope(|scope| {
            let taking = scope.spawn(|| take(other, &shards));
            let say = |message: &Message, fds: &[std::os::fd::BorrowedFd<'_>], body: &[u8]| {
                one.send(message, body, fds, Instant::now() + 10 * SECOND).expect("room");
            };
            let hear = || one.receive(Instant::now() + 10 * SECOND).expect("it speaks").message;
            let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("free ports");
            assert!(matches!(hear(), Message::Hello(_)));
            say(&Message::Listeners, &[std::os::fd::AsFd::as_fd(&listener)], &[]);
            let facts = Facts { node: 5, ..Facts::default() };
            say(&Message::Welcome { identity: Identity::own(), facts }, &[], &[]);
            assert_eq!(hear(), Message::Started);
            if count > 0 {
                say(&Message::Frozen { beat: 8, since: 1 }, &[], &[]);
            }
            if count > 1 {
                let message = Message::Connections { shard: 0, states: vec![5] };
                say(&message, &[std::os::fd::AsFd::as_fd(&far)], b"state");
                assert_eq!(hear(), Message::Taken);
            }
            if count > 2 {
                say(&Message::Sent { connections: 1 }, &[], &[]);
                assert_eq!(hear(), Message::Arrived { connections: 1 });
            }
            drop(one);
            taking.join().expect("no panic")
        });
        assert!(taken.expect_err("it is gone").contains("gone"));
        drop(far);
        // What it had of the connection is closed, and nothing was written.
        let mut rest = Vec::new();
        near.set_read_timeout(Some(10 * SECOND)).expect("a socket option");
        (&near).read_to_end(&mut rest).expect("closed");
        assert!(rest.is_empty() && !shards[0].verdicts().contains(&Verdict::Moved));
        (&near).write_all(b"x").expect_err("nobody reads");
    }
}

#[test]
fn states_that_do_not_belong_together_are_refused() {
    let old = Old::start(&[2]);
    old.shards[0].seen.connections.lock().unwrap()[1].state = Bytes::from_static(b"rubbish");
    let shards = vec![Shard::start(0)];
    let (one, other) = Link::pair().expect("room");
    let (left, taken) = std::thread::scope(|scope| {
        let taking = scope.spawn(|| take(other, &shards));
        (old.hand_over(one), taking.join().expect("no panic"))
    });
    let error = left.expect_err("it was not taken").to_string();
    assert!(error.contains("a state that is none"), "{error}");
    assert!(taken.is_err());
    old.assert_serves(&[2]);
}

#[test]
fn a_node_that_is_stopped_meanwhile_goes_on_with_that() {
    let old = Old::start(&FOUR);
    old.abort.store(true, Ordering::Relaxed);
    let (one, other) = Link::pair().expect("room");
    other.say(&Message::Hello(Identity::own()), Instant::now() + SECOND).expect("room");
    let error = old.hand_over(one).expect_err("it is stopped").to_string();
    assert!(error.contains("being stopped"), "{error}");
    old.assert_serves(&FOUR);
}

#[test]
fn a_shard_that_cannot_stand_still_ends_the_attempt() {
    let old = Old::start(&FOUR);
    // The third shard of this node lets what it is told fall.
    let deaf = Arc::new(Mailbox::new().expect("room"));
    let (one, other) = Link::pair().expect("room");
    let stop = AtomicBool::new(false);
    let left = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                drop(deaf.take());
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        scope.spawn(|| say_so_far(other, 5));
        let mut mailboxes: Vec<_> = old.shards.iter().map(|shard| Arc::clone(&shard.mailbox)).collect();
        mailboxes.push(Arc::clone(&deaf));
        let left = hand_over(Leaver {
            successor: old.successor.clone(),
            link: one,
            listeners: vec![std::net::TcpListener::bind("127.0.0.1:0").expect("free ports").into()],
            facts: Facts::default(),
            mailboxes,
            backbone: old.backbone.clone(),
            round: 1,
            clock: crate::control::clock::monotonic_micros,
            abort: Arc::default(),
            patience: old.patience,
        });
        stop.store(true, Ordering::Relaxed);
        left
    });
    let error = left.expect_err("one shard did not").to_string();
    assert_eq!(error, "the hand-over failed while freezing: shard 2 could not finish what it was answering");
    old.assert_serves(&FOUR);
}
