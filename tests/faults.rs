//! Redis fails under load, in every way it can: clients stay connected, and nothing is missing silently.

use std::cell::Cell;
use std::time::{Duration, Instant};

use crate::harness::{Counts, Driver, Fault, Persistence, Plan, Proxy, Publisher, Redis, Swarm, Weir, eventually};

scenarios! {
    each_driver: [
        redis_killed_and_restarted_loses_nothing_and_disconnects_nobody,
        redis_restarted_empty_announces_a_gap_to_every_client,
        redis_frozen_for_eight_seconds_loses_nothing,
        failover_to_a_replica_loses_nothing,
        failover_to_a_replica_that_lags_announces_a_gap,
        failover_to_a_replica_that_went_on_announces_a_gap,
        half_open_backbone_connection_is_noticed_and_repaired,
        slow_backbone_keeps_order,
        node_frozen_under_load_loses_nothing,
    ],
}

/// Channels that are published to through the node.
const CHANNELS: usize = 5;
/// Channels that are published to directly, also when the node does not hear of it.
const DIRECT: usize = 3;

/// A node with clients, and a publisher that does not give up.
pub struct Load {
    pub weir: Weir,
    pub publisher: Publisher,
    /// Clients of what the publisher publishes through the node.
    pub swarm: Swarm,
    /// Clients of what is published directly.
    pub direct: Swarm,
    directly: Cell<u64>,
}

fn names(kind: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{kind}-{number}")).collect()
}

impl Load {
    /// `clients` on a node at this Redis, a tenth of them over WebSocket, a round of publications every `pause`, and a fifth
    /// as many clients of [`Load::publish_directly`].
    #[track_caller]
    fn start(driver: Driver, redis: &str, clients: usize, pause: Duration) -> Self {
        let weir = Weir::start(driver, &["--redis", redis]);
        let channels = names("channel", CHANNELS);
        let spread = Duration::from_secs(1);
        let plan = Plan { clients, websockets: clients / 10, channels, spread, ..Plan::new(weir.address(), &[]) };
        let swarm = Swarm::open(plan.clone());
        let (clients, websockets, channels) = (clients / 5, clients / 50, names("direct", DIRECT));
        let direct = Swarm::open(Plan { clients, websockets, channels, ..plan.clone() });
        let publisher = Publisher::start(weir.address(), &plan.channels, pause, 0);
        publisher.wait_rounds(3);
        Self { weir, publisher, swarm, direct, directly: Cell::new(0) }
    }

    /// As [`Load::start`] with what most scenarios have.
    #[track_caller]
    pub fn usual(driver: Driver, redis: &str) -> Self {
        Self::start(driver, redis, 300, Duration::from_millis(20))
    }

    /// Publishes the next twenty numbers on each channel that is published to directly, by another program.
    #[track_caller]
    pub fn publish_directly(&self, redis: &Redis) {
        let last = self.directly.get();
        for channel in names("direct", DIRECT) {
            redis.fcall_all(&channel, (last + 1..=last + 20).map(|number| number.to_string()));
        }
        self.directly.set(last + 20);
    }

    /// Publications that the node had to read from the history, since it did not hear of them.
    fn repaired(&self) -> f64 {
        self.weir.metrics().sum("weir_backbone_repaired_publications_total", "")
    }

    /// Waits until every client has been told of a gap.
    #[track_caller]
    fn wait_gaps(&self) {
        for swarm in [&self.swarm, &self.direct] {
            swarm.wait("every client is told", |counts| counts.least_gaps > 0);
        }
    }

    /// Publishes more, waits until every client has everything, and checks that no connection ended meanwhile, seen from
    /// either side of it.
    #[track_caller]
    fn finish(self, redis: &Redis) -> [Counts; 2] {
        self.publish_directly(redis);
        self.publisher.wait_rounds(3);
        let rounds = self.publisher.stop();
        self.swarm.wait_received(rounds);
        self.direct.wait_received(self.directly.get());
        assert_eq!(self.weir.metrics().sum("weir_disconnects_total", ""), 0.0);
        [&self.swarm, &self.direct].map(|swarm| {
            let counts = swarm.counts();
            assert_eq!((counts.ended, counts.returns), (0, 0), "every client stays connected: {counts:?}");
            println!("{rounds} rounds: {:?}", counts.verdicts);
            counts
        })
    }

    /// [`Load::finish`], and nothing may be missing.
    #[track_caller]
    pub fn finish_whole(self, redis: &Redis) {
        self.finish(redis).iter().for_each(Counts::assert_whole);
    }

    /// [`Load::finish`], and nothing may be missing that was not announced.
    #[track_caller]
    pub fn finish_told(self, redis: &Redis) {
        self.finish(redis).iter().for_each(Counts::assert_nothing_silent);
    }
}

fn redis_killed_and_restarted_loses_nothing_and_disconnects_nobody(driver: Driver) {
    let (clients, pause) = match driver {
        Driver::Uring => (5_000, Duration::from_millis(200)),
        Driver::Epoll => (500, Duration::from_millis(20)),
    };
    let mut redis = Redis::start(Persistence::AppendOnly);
    let load = Load::start(driver, &redis.url(), clients, pause);
    load.publish_directly(&redis);

    redis.kill();
    load.weir.wait_not_ready();
    std::thread::sleep(Duration::from_secs(1));
    redis.run();
    let answers = Instant::now();
    let missed = load.publisher.rounds();
    // At once: the node has probably not subscribed again yet.
    load.publish_directly(&redis);
    load.weir.wait_ready();
    let ready = answers.elapsed();
    load.direct.wait_received(load.directly.get());
    load.swarm.wait_received(missed + 1);
    let repaired = answers.elapsed();

    let retries = load.publisher.retries();
    println!(
        "{clients} clients: ready {ready:?} after Redis answered, every client up to date after {repaired:?}, \
         {retries} publications repeated"
    );
    assert!(retries > 0, "it published all the time");
    load.finish_whole(&redis);
}

fn redis_restarted_empty_announces_a_gap_to_every_client(driver: Driver) {
    let mut redis = Redis::start(Persistence::None);
    let load = Load::usual(driver, &redis.url());
    load.publish_directly(&redis);

    redis.kill();
    redis.forget();
    load.weir.wait_not_ready();
    redis.run();
    load.publish_directly(&redis);

    load.wait_gaps();
    load.finish_told(&redis);
}

fn redis_frozen_for_eight_seconds_loses_nothing(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let load = Load::usual(driver, &redis.url());

    redis.freeze();
    let frozen = Instant::now();
    let reason = load.weir.wait_not_ready();
    std::thread::sleep(Duration::from_secs(8).saturating_sub(frozen.elapsed()));
    redis.thaw();
    load.publish_directly(&redis);

    assert!(!reason.is_empty(), "an operator is told why");
    load.weir.wait_ready();
    load.finish_whole(&redis);
}

/// A primary with a replica and a node that reaches whichever of them the proxy points to. The replica's own connection goes
/// through another proxy.
struct Pair {
    primary: Redis,
    replica: Redis,
    to_redis: Proxy,
    to_primary: Proxy,
    load: Load,
}

impl Pair {
    #[track_caller]
    fn start(driver: Driver) -> Self {
        let (primary, replica) = (Redis::start(Persistence::None), Redis::start(Persistence::None));
        let (to_redis, to_primary) = (Proxy::start(primary.address()), Proxy::start(primary.address()));
        let load = Load::usual(driver, &format!("redis://{}", to_redis.address()));
        replica.follow(to_primary.address());
        load.publisher.wait_rounds(3);
        load.publish_directly(&primary);
        Self { primary, replica, to_redis, to_primary, load }
    }

    /// The primary dies and the replica takes over. Something is published there before the node finds it.
    #[track_caller]
    fn fail_over(&mut self) {
        self.load.weir.wait_not_ready();
        self.replica.promote();
        self.load.publish_directly(&self.replica);
        self.to_redis.set_target(self.replica.address());
    }
}

fn failover_to_a_replica_loses_nothing(driver: Driver) {
    let mut pair = Pair::start(driver);

    pair.load.publisher.between_rounds(|| {
        pair.primary.wait_replicated();
        pair.primary.kill();
    });
    pair.fail_over();

    pair.load.weir.wait_ready();
    pair.load.direct.wait_received(pair.load.directly.get());
    assert!(pair.load.repaired() >= 20.0, "what it did not hear of it has read");
    pair.load.finish_whole(&pair.replica);
}

fn failover_to_a_replica_that_lags_announces_a_gap(driver: Driver) {
    let mut pair = Pair::start(driver);

    // What is published now is taken, answered and delivered, and the replica never hears of it.
    pair.to_primary.set(Fault::Swallow);
    pair.load.publisher.wait_rounds(5);
    pair.load.publish_directly(&pair.primary);
    pair.load.publish_directly(&pair.primary);
    pair.load.direct.wait_received(pair.load.directly.get());
    let repaired = pair.load.repaired();
    pair.primary.kill();
    pair.fail_over();

    pair.load.wait_gaps();
    pair.load.weir.wait_ready();
    // It has the offsets of what was lost, and nobody was there to hear of it. A WebSocket client is told to subscribe again
    // and begins at the head: the protocol has no partial recovery.
    eventually("what the new primary has is delivered after the gap", || {
        (pair.load.repaired() - repaired >= 20.0 * DIRECT as f64).then_some(())
    });
    pair.load.finish_told(&pair.replica);
}

/// Other nodes' publications come to the replica before this one is back: the offsets that its clients have are given out
/// again, and more.
fn failover_to_a_replica_that_went_on_announces_a_gap(driver: Driver) {
    let mut pair = Pair::start(driver);

    pair.to_primary.set(Fault::Swallow);
    pair.load.publisher.wait_rounds(5);
    pair.load.publish_directly(&pair.primary);
    pair.load.direct.wait_received(pair.load.directly.get());
    pair.primary.kill();
    pair.load.weir.wait_not_ready();
    pair.replica.promote();
    // Not of the sequence: the publisher will go on with it.
    for channel in names("channel", CHANNELS) {
        pair.replica.fcall_all(&channel, std::iter::repeat_n(String::from("0"), 20));
    }
    pair.load.publish_directly(&pair.replica);
    pair.fail_over();

    pair.load.wait_gaps();
    pair.load.weir.wait_ready();
    pair.load.finish_told(&pair.replica);
}

fn half_open_backbone_connection_is_noticed_and_repaired(driver: Driver) {
    /// The bound on the age of the node's heartbeat, and as much again for a loaded machine.
    const NOTICED: Duration = Duration::from_secs(10);
    let redis = Redis::start(Persistence::None);
    let proxy = Proxy::start(redis.address());
    let load = Load::usual(driver, &format!("redis://{}", proxy.address()));

    proxy.set(Fault::Swallow);
    let vanished = Instant::now();
    load.weir.wait_not_ready();
    let noticed = vanished.elapsed();
    assert!(noticed < NOTICED, "{noticed:?}");
    load.publish_directly(&redis);
    assert_eq!(load.weir.get("/health/live").status, 200);
    // Those there are stay as they are: only new ones work.
    proxy.set_coming(|_| Fault::None);
    load.weir.wait_ready();

    println!("not ready {noticed:?} after the packets vanished, ready again after {:?}", vanished.elapsed());
    load.direct.wait_received(load.directly.get());
    assert!(load.repaired() >= 20.0, "what it did not hear of it has read");
    load.finish_whole(&redis);
}

fn slow_backbone_keeps_order(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let proxy = Proxy::start(redis.address());
    let load = Load::usual(driver, &format!("redis://{}", proxy.address()));

    proxy.set(Fault::Delay(Duration::from_millis(100)));
    load.publisher.wait_rounds(3);
    proxy.set_present(Fault::None);
    load.publisher.wait_rounds(10);
    // And a connection that is cut again and again, somewhere.
    proxy.set_coming(|number| Fault::CutAfter(2_000 + 1_357 * number));
    proxy.set_present(Fault::Reset);
    for _ in 0..10 {
        load.publish_directly(&redis);
        load.publisher.wait_rounds(2);
    }
    proxy.set(Fault::None);

    load.weir.wait_ready();
    load.finish_whole(&redis);
}

fn node_frozen_under_load_loses_nothing(driver: Driver) {
    /// More than a shard's mailbox holds, and than the relay takes at once.
    const BURST: u64 = 10_000;
    let redis = Redis::start(Persistence::None);
    let flags = ["--redis", &redis.url(), "--set", "history.messages=20000", "--set", "lag.messages=20000"];
    let weir = Weir::start(driver, &flags);
    let plan = Plan { clients: 100, websockets: 10, ..Plan::new(weir.address(), &["burst"]) };
    let swarm = Swarm::open(plan);
    redis.fcall_all("burst", (1..=10).map(|number| number.to_string()));
    swarm.wait_received(10);

    weir.signal(libc::SIGSTOP);
    redis.fcall_all("burst", (11..=BURST).map(|number| number.to_string()));
    weir.signal(libc::SIGCONT);

    swarm.wait_received(BURST);
    let counts = swarm.counts();
    counts.assert_whole();
    assert_eq!(counts.ended, 0, "nobody is disconnected for it");
}
