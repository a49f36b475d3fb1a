//! Shards on threads of their own, and a relay that feeds any number of them alike.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::super::{Arriving, Expected, Leaving, Verdict};
use crate::log::frame::{ChannelBlocks, Frame, FrameEncoder, FrameKind, Micros};
use crate::log::position::{Epoch, Position};
use crate::metrics::ShardMetrics;
use crate::settings::Settings;
use crate::shard::mailbox::{LocalChannel, Mailbox, Reply, ToRelay, ToShard};
use crate::shard::start::{DriverKind, NodeReport, ShardStart, run};

/// Long enough for a loaded machine; a test that hangs fails after it.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn clock() -> Micros {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    1_000_000 + START.get_or_init(std::time::Instant::now).elapsed().as_micros() as u64
}

#[derive(Default)]
struct Channel {
    blocks: ChannelBlocks,
    frames: Vec<Arc<Frame>>,
    position: Position,
    /// Shards that are told of it, by the numbers of their mailboxes.
    live: Vec<(usize, LocalChannel)>,
}

#[derive(Default)]
struct Channels {
    channels: HashMap<Arc<str>, Channel>,
    mailboxes: Vec<Arc<Mailbox>>,
    encoder: FrameEncoder,
}

/// The relay. What is published reaches every shard's mailbox under one lock, so that of two shards neither has a message
/// that the other could not have.
#[derive(Clone, Default)]
pub(super) struct Hub(Arc<Mutex<Channels>>);

impl Hub {
    pub(super) fn publish(&self, name: &str, data: &str, positioned: bool) -> Position {
        let mut all = self.0.lock().unwrap();
        let Channels { channels, mailboxes, encoder } = &mut *all;
        let channel = channels.entry(name.into()).or_default();
        channel.position.epoch = Epoch(7);
        channel.position.offset += u64::from(positioned);
        let kind = if positioned { FrameKind::Publication } else { FrameKind::Unpositioned };
        let frame = Arc::new(encoder.encode(&mut channel.blocks, name, kind, channel.position, data, clock()));
        channel.frames.push(frame.clone());
        for &(shard, local) in &channel.live {
            let message = ToShard::Publication { channel: local, frame: frame.clone() };
            mailboxes[shard].post(message).expect("the test publishes less than a mailbox holds");
            mailboxes[shard].ring();
        }
        channel.position
    }

    /// Everything published in a channel.
    pub(super) fn frames(&self, name: &str) -> Vec<Arc<Frame>> {
        self.0.lock().unwrap().channels[name].frames.clone()
    }

    fn request(&self, shard: usize, request: ToRelay) {
        let mut all = self.0.lock().unwrap();
        let mailbox = all.mailboxes[shard].clone();
        let message = match request {
            ToRelay::Interest { channel: local, name, .. } => {
                let channel = all.channels.entry(name).or_default();
                channel.position.epoch = Epoch(7);
                channel.live.push((shard, local));
                // As the real one does: a message without a position is no history.
                let positioned = |frame: &&Arc<Frame>| frame.kind == FrameKind::Publication;
                let frames = channel.frames.iter().filter(positioned).cloned().collect();
                ToShard::Live { channel: local, position: channel.position, frames }
            }
            ToRelay::Disinterest { channel: local, name, .. } => {
                all.channels.get_mut(&name).unwrap().live.retain(|&(other, _)| other != shard);
                ToShard::Released { channel: local }
            }
            ToRelay::Publish { request, publish, .. } => {
                drop(all);
                let position = self.publish(&publish.channel, std::str::from_utf8(&publish.data).unwrap(), true);
                ToShard::Reply { request, reply: Reply::Published(Ok(position)) }
            }
            ToRelay::History { .. } => unreachable!("nobody asks"),
        };
        mailbox.post(message).expect("room in the mailbox");
        mailbox.ring();
    }

    /// A shard, and the thread that carries its requests.
    pub(super) fn shard(
        &self,
        kind: DriverKind,
        listener: &TcpListener,
        settings: &Settings,
        accepting: bool,
    ) -> Shard {
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let number = {
            let mut all = self.0.lock().unwrap();
            all.mailboxes.push(mailbox.clone());
            all.mailboxes.len() - 1
        };
        let (relay, mut requests) = tokio::sync::mpsc::channel(1_000);
        let hub = self.clone();
        std::thread::spawn(move || {
            while let Some(request) = requests.blocking_recv() {
                hub.request(number, request);
            }
        });
        let metrics = Arc::new(ShardMetrics::default());
        static SEEDS: AtomicU64 = AtomicU64::new(1);
        let start = ShardStart {
            index: number,
            listeners: vec![listener.try_clone().unwrap()],
            settings: Arc::new(settings.clone()),
            mailbox: mailbox.clone(),
            relay,
            metrics: metrics.clone(),
            driver: kind,
            slots: 4_000,
            node: Arc::new(Node),
            clock,
            seed: SEEDS.fetch_add(1, Ordering::Relaxed),
            accepting,
        };
        let (ended, end) = mpsc::channel();
        let thread = std::thread::spawn(move || ended.send(run(start)).unwrap());
        Shard { mailbox, metrics, end, _thread: thread }
    }
}

struct Node;

impl NodeReport for Node {
    fn ready(&self) -> Result<(), String> {
        Ok(())
    }

    fn metrics_text(&self) -> String {
        String::new()
    }
}

/// A running shard.
pub(super) struct Shard {
    mailbox: Arc<Mailbox>,
    pub(super) metrics: Arc<ShardMetrics>,
    end: Receiver<Result<(), String>>,
    _thread: JoinHandle<()>,
}

/// The step of a hand-over at which it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failing {
    Nowhere,
    /// The process half gives up before the freeze.
    BeforeFreeze,
    /// In the middle of the connections.
    WhileCarried,
    /// When all have arrived.
    BeforeVerdict,
    /// One of them is not understood.
    Garbled,
}

impl Shard {
    fn tell(&self, message: ToShard) {
        self.mailbox.post(message).expect("room in the mailbox");
        self.mailbox.ring();
    }

    /// Waits for the shard's end.
    pub(super) fn ended(&self) {
        assert_eq!(self.end.recv_timeout(PATIENCE).expect("the shard ends"), Ok(()));
    }

    pub(super) fn stop(&self) {
        self.tell(ToShard::Stop);
        self.ended();
    }

    /// Gives everything to another shard, as the process half does. Returns how many connections went.
    pub(super) fn hand_over(&self, to: &Shard, channels: &[&str], failing: Failing) -> usize {
        let (live, lives) = mpsc::channel();
        let channels = channels.iter().map(|&name| name.into()).collect();
        to.tell(ToShard::Expect(Expected { channels, live }));
        assert_eq!(lives.recv_timeout(PATIENCE).unwrap(), Ok(()));
        let (carried, carries) = mpsc::sync_channel(16);
        let (frozen, freezes) = mpsc::channel();
        let (judge, verdict) = mpsc::channel();
        let leaving = Leaving { carried, frozen, verdict };
        if failing == Failing::BeforeFreeze {
            drop(freezes);
            self.tell(ToShard::Leave(leaving));
            to.tell(ToShard::Stop);
            to.ended();
            return 0;
        }
        self.tell(ToShard::Leave(leaving));
        let announced = freezes.recv_timeout(PATIENCE).expect("the shard freezes");
        let (carry, arriving) = mpsc::channel();
        let (arrived, arrives) = mpsc::channel();
        let (new_judge, new_verdict) = mpsc::channel();
        to.tell(ToShard::Arrive(Arriving { carried: arriving, arrived, verdict: new_verdict }));
        let mut count = 0;
        for mut on_its_way in carries {
            if failing == Failing::WhileCarried && count == 5 {
                break;
            }
            if failing == Failing::Garbled && count == 7 {
                on_its_way.state = on_its_way.state.slice(..10);
            }
            count += 1;
            if carry.send(on_its_way).is_err() {
                break;
            }
        }
        drop(carry);
        let outcome = arrives.recv_timeout(PATIENCE).unwrap();
        if failing != Failing::Nowhere {
            assert_eq!(outcome.is_err(), failing == Failing::Garbled, "{outcome:?}");
            drop((new_judge, judge));
            to.ended();
            return 0;
        }
        assert_eq!((outcome, announced), (Ok(count), count));
        judge.send(Verdict::Moved).unwrap();
        new_judge.send(Verdict::Moved).unwrap();
        count
    }
}

/// Where a listener listens.
pub(super) fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}
