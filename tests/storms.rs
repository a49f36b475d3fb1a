//! Many clients are cut at once, come back at once, and have missed nothing; Redis hardly notices.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::harness::{Driver, Fault, Persistence, Plan, Proxy, Publisher, Redis, Swarm, Weir, eventually};

scenarios! {
    each_driver: [
        reconnect_storm_costs_redis_nothing_by_client,
        storm_on_a_node_that_just_started_costs_redis_by_channel,
        clients_cut_at_any_byte_while_publishing_goes_on,
        clients_whose_packets_vanish_come_back_and_miss_nothing,
        clients_that_stop_reading_in_a_crowd_are_shed_and_resume,
    ],
}

/// Channels of a storm.
const CHANNELS: usize = 10;

/// Clients of a storm. On epoll fewer, for the time of it.
fn crowd(driver: Driver) -> usize {
    match driver {
        Driver::Uring => 10_000,
        Driver::Epoll => 1_000,
    }
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("channel-{number}")).collect()
}

/// Clients on [`CHANNELS`] channels, some of them over WebSocket, that come back within a second.
fn plan(weir: &Weir, clients: usize) -> Plan {
    let channels = names(CHANNELS);
    Plan {
        clients,
        websockets: clients / 50,
        channels,
        spread: Duration::from_secs(1),
        ..Plan::new(weir.address(), &[])
    }
}

/// How often each command was called between two looks, but for the looks themselves.
pub fn difference(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let more = |(name, count): (&String, &u64)| (name.clone(), count - before.get(name).unwrap_or(&0));
    after.iter().map(more).filter(|(name, count)| *count > 0 && name != "info").collect()
}

/// What is left of the calls of a time when those of its publications are taken away. `usual` is a time with nothing but
/// publications; the node's heartbeats are left in.
pub fn without_publications(calls: &BTreeMap<String, u64>, usual: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let publications = calls["fcall"];
    let left = |(name, count): (&String, &u64)| {
        // Of all that a publication calls only this is called by heartbeats too.
        let each = if name == "publish" { 1 } else { usual.get(name).unwrap_or(&0) / usual["fcall"] };
        (name.clone(), count - each * publications)
    };
    calls.iter().map(left).filter(|(_, count)| *count > 0).collect()
}

fn reconnect_storm_costs_redis_nothing_by_client(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let weir = Weir::start(driver, &["--redis", &redis.url()]);
    let plan = plan(&weir, crowd(driver));
    let swarm = Swarm::open(plan.clone());
    let publisher = Publisher::start(weir.address(), &plan.channels, Duration::from_millis(500), 0);
    let look = || publisher.between_rounds(|| redis.calls());
    let start = look();
    publisher.wait_rounds(3);
    let before = look();

    let cut = Instant::now();
    swarm.cut();
    swarm.wait_live();
    let back = cut.elapsed();

    let after = look();
    publisher.wait_rounds(2);
    let rounds = publisher.stop();
    swarm.wait_received(rounds);
    let counts = swarm.counts();
    let cost = without_publications(&difference(&before, &after), &difference(&start, &before));
    println!("{} clients were back after {back:?}; Redis operations: {cost:?}", plan.clients);
    counts.assert_whole();
    assert_eq!((counts.returns, counts.ended), (plan.clients as u64, 0), "{counts:?}");
    assert!(cost.values().sum::<u64>() <= 3 * CHANNELS as u64, "{cost:?}");
}

fn storm_on_a_node_that_just_started_costs_redis_by_channel(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let mut weir = Weir::start(driver, &["--redis", &redis.url()]);
    let plan = plan(&weir, crowd(driver));
    let swarm = Swarm::open(plan.clone());
    let publish = |numbers: std::ops::RangeInclusive<u64>| {
        for channel in &plan.channels {
            redis.fcall_all(channel, numbers.clone().map(|number| number.to_string()));
        }
    };
    publish(1..=3);
    swarm.wait_received(3);
    weir.kill();
    swarm.wait("every client is cut", |counts| counts.ended == plan.clients as u64);
    publish(4..=6);
    let before = redis.calls();

    let weir = Weir::command(driver).flags(&["--redis", &redis.url()]).listen(weir.address()).start();
    let started = Instant::now();
    swarm.wait_live();
    let back = started.elapsed();

    let cost = difference(&before, &redis.calls());
    publish(7..=9);
    swarm.wait_received(9);
    println!("{} clients were back {back:?} after the node was; Redis operations: {cost:?}", plan.clients);
    swarm.counts().assert_whole();
    let count = |name: &str| cost.get(name).copied().unwrap_or(0);
    assert_eq!(count("exec"), CHANNELS as u64, "one read a channel: {cost:?}");
    assert!(count("subscribe") <= 2 + CHANNELS as u64, "{cost:?}");
    // Commands in a read's transaction are counted one by one, and so is what a connection begins with.
    assert!(cost.values().sum::<u64>() <= 10 * CHANNELS as u64, "{cost:?}");
    drop(weir);
}

fn clients_cut_at_any_byte_while_publishing_goes_on(driver: Driver) {
    /// The response head and what comes right after it, in bytes, and a few events more.
    const BYTES: u64 = 1_500;
    let redis = Redis::start(Persistence::None);
    let weir = Weir::start(driver, &["--redis", &redis.url()]);
    let proxy = Proxy::start(weir.address());
    let channels = names(3);
    let plan = Plan { clients: 150, websockets: 30, channels, ..Plan::new(proxy.address(), &[]) };
    let swarm = Swarm::open(plan.clone());
    let publisher = Publisher::start(weir.address(), &plan.channels, Duration::from_millis(5), 100);
    publisher.wait_rounds(5);

    // 7 shares no factor with the bytes: each position has its turn.
    proxy.set_coming(|number| Fault::CutAfter(number * 7 % BYTES));
    proxy.set_present(Fault::Reset);
    swarm.wait("every position was cut at", |counts| counts.returns > BYTES);
    proxy.set(Fault::None);

    swarm.wait_live();
    publisher.wait_rounds(5);
    let rounds = publisher.stop();
    swarm.wait_received(rounds);
    let counts = swarm.counts();
    println!("{} cuts while {rounds} rounds were published", counts.returns);
    counts.assert_whole();
}

fn clients_whose_packets_vanish_come_back_and_miss_nothing(driver: Driver) {
    let flags = ["--set", "sse.heartbeat=1s", "--set", "websocket.ping=1s", "--set", "websocket.pong=1s"];
    let weir = Weir::start(driver, &flags);
    let proxy = Proxy::start(weir.address());
    let silence = Some(Duration::from_secs(4));
    let plan = Plan { clients: 200, websockets: 50, channels: names(4), silence, ..Plan::new(proxy.address(), &[]) };
    let swarm = Swarm::open(plan.clone());
    let publisher = Publisher::start(weir.address(), &plan.channels, Duration::from_millis(50), 0);
    publisher.wait_rounds(5);

    // No end and no reset: both sides believe that they are connected.
    proxy.set_present(Fault::Swallow);
    swarm.wait("every client has noticed", |counts| counts.given_up >= plan.clients as u64);
    swarm.wait_live();
    eventually("the node has noticed those that have to answer", || {
        let ended = weir.metrics().sum("weir_disconnects_total", "reason=\"no_pong\"");
        (ended >= plan.websockets as f64 / 2.0).then_some(())
    });

    publisher.wait_rounds(5);
    let rounds = publisher.stop();
    swarm.wait_received(rounds);
    swarm.counts().assert_whole();
}

fn clients_that_stop_reading_in_a_crowd_are_shed_and_resume(driver: Driver) {
    const STOPPED: usize = 5;
    let history = ["--set", "history.bytes=256MiB", "--set", "history.messages=4000"];
    let weir = Weir::command(driver).flags(&["--set", "lag.messages=64"]).flags(&history).start();
    let plan =
        Plan { clients: 60, websockets: 12, narrow: STOPPED, channels: names(2), ..Plan::new(weir.address(), &[]) };
    let swarm = Swarm::open(plan.clone());
    // The kernel holds a hundred of them for a healthy reader, besides the lag allowed: a loaded machine sheds none.
    let publisher = Publisher::start(weir.address(), &plan.channels, Duration::from_millis(20), 32 * 1024);
    publisher.wait_rounds(5);
    let shed = || weir.metrics().sum("weir_disconnects_total", "reason=\"slow\"");

    swarm.pause(STOPPED);
    eventually("those that do not read are shed", || (shed() >= STOPPED as f64).then_some(()));
    publisher.wait_rounds(5);
    let rounds = publisher.stop();
    assert_eq!((swarm.counts().ended, shed()), (0, STOPPED as f64), "and nobody else");
    swarm.pause(0);

    swarm.wait_received(rounds);
    let counts = swarm.counts();
    println!("{rounds} rounds of 32 KiB: {:?}", counts.verdicts);
    counts.assert_whole();
    assert_eq!((counts.returns, counts.ended), (STOPPED as u64, STOPPED as u64), "{counts:?}");
}
