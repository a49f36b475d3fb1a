//! A node that is drained: its clients go elsewhere a few at a time, and nobody misses anything.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::harness::{
    DEADLINE, Driver, Incoming, Item, Persistence, Plan, Publisher, Redis, Swarm, TempDir, Weir, eventually,
};

scenarios! {
    each_driver: [
        drained_clients_move_to_another_node_at_an_even_pace,
        drain_begins_with_a_node_that_is_not_ready,
        publications_reach_clients_until_they_are_sent_away,
        second_signal_hastens_and_the_third_ends_at_once,
        drained_clients_are_told_to_come_back_at_different_times,
        operator_drains_a_node_and_sees_how_far_it_is,
        command_that_no_node_takes_says_where_it_looked,
        service_manager_is_told_that_the_node_is_ready_alive_and_ending,
    ],
}

/// The part by which the pace of arrivals may be over that of the drain.
const OVER: f64 = 1.2;
/// Time over which arrivals are counted.
const COUNTED: Duration = Duration::from_secs(2);

fn drained_clients_move_to_another_node_at_an_even_pace(driver: Driver) {
    // On epoll fewer, for the time of it.
    let (clients, window) = match driver {
        Driver::Uring => (10_000, Duration::from_secs(20)),
        Driver::Epoll => (1_000, Duration::from_secs(8)),
    };
    let redis = Redis::start(Persistence::None);
    let window_flag = format!("--set=drain.window={}s", window.as_secs());
    let flags = ["--redis", &redis.url(), &window_flag, "--set=drain.unready=1s", "--set=sse.retry=500ms"];
    let mut old = Weir::start(driver, &flags);
    let new = Weir::start(driver, &flags);
    let plan = Plan {
        clients,
        websockets: clients / 5,
        channels: (0..10).map(|number| format!("channel-{number}")).collect(),
        spread: Duration::from_millis(500),
        ..Plan::new(old.address(), &[])
    };
    let swarm = Swarm::open(plan.clone());
    let publisher = Publisher::start(new.address(), &plan.channels, Duration::from_millis(500), 0);
    publisher.wait_rounds(2);

    old.signal(libc::SIGTERM);
    assert!(old.wait_not_ready().contains("draining"));
    swarm.move_to(new.address());
    let mut arrivals = Vec::new();
    let accepted = || {
        let before = Instant::now();
        let count = new.metrics().sum("weir_accepted_total", "");
        (before, count, Instant::now())
    };
    let mut last = accepted();
    while swarm.counts().ended < clients as u64 {
        std::thread::sleep(COUNTED.saturating_sub(last.2.elapsed()));
        let now = accepted();
        // The longest the time between the two counts can have been: a stalled test does not make a herd of it.
        arrivals.push((now.1 - last.1) / (now.2 - last.0).as_secs_f64());
        last = now;
    }

    assert_eq!(old.wait_end().code(), Some(0));
    swarm.wait_live();
    publisher.wait_rounds(2);
    let rounds = publisher.stop();
    swarm.wait_received(rounds);
    let counts = swarm.counts();
    let pace = clients as f64 / window.as_secs_f64();
    println!("{clients} clients over {window:?}: {pace} a second planned, arrived a second: {arrivals:.0?}");
    counts.assert_whole();
    assert_eq!((counts.ended, counts.returns, counts.given_up), (clients as u64, clients as u64, 0), "{counts:?}");
    assert!(arrivals.iter().all(|&rate| rate <= pace * OVER), "at most {} a second: {arrivals:?}", pace * OVER);
}

fn drain_begins_with_a_node_that_is_not_ready(driver: Driver) {
    let mut weir = Weir::start(driver, &["--set=drain.unready=2s"]);
    let mut stream = weir.sse(&["news"]);
    weir.signal(libc::SIGTERM);
    assert!(weir.wait_not_ready().contains("draining"));
    // Balancers have not noticed yet: whoever comes is served, and so is who publishes.
    let mut late = weir.sse(&["news"]);
    weir.publish("news", "still here");
    for stream in [&mut stream, &mut late] {
        assert_eq!(stream.next().data, "still here");
    }
    assert_eq!(weir.metrics().sum("weir_phase", "phase=\"unready\""), 1.0);
    for stream in [stream, late] {
        stream.read_to_end();
    }
    assert_eq!(weir.wait_end().code(), Some(0));
}

fn publications_reach_clients_until_they_are_sent_away(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let mut weir = Weir::start(driver, &["--redis", &redis.url(), "--set=drain.window=4s"]);
    let other = Weir::start(driver, &["--redis", &redis.url()]);
    let streams: Vec<_> = (0..40).map(|_| weir.sse(&["count"])).collect();
    let readers: Vec<_> = streams.into_iter().map(|stream| std::thread::spawn(move || stream.read_to_end())).collect();
    let publisher = Publisher::start(other.address(), &["count".into()], Duration::from_millis(5), 0);
    publisher.wait_rounds(1);
    weir.signal(libc::SIGTERM);
    let mut last: Vec<usize> = readers
        .into_iter()
        .map(|reader| {
            let (items, unfinished) = reader.join().expect("the reader does not panic");
            assert!(unfinished.is_empty());
            let data = items.iter().filter_map(|item| match item {
                Item::Event(event) => Some(event.data.lines().next()?.parse::<usize>().expect("a number")),
                _ => None,
            });
            let data: Vec<_> = data.collect();
            assert_eq!(data, (1..=data.len()).collect::<Vec<_>>(), "in order, none missing before the last");
            data.len()
        })
        .collect();
    assert!(last.iter().all(|&number| number as u64 <= publisher.rounds()));
    last.sort_unstable();
    last.dedup();
    assert!(last.len() > 10, "who is told later has received more: {last:?}");
    assert_eq!(weir.wait_end().code(), Some(0));
    publisher.stop();
}

fn second_signal_hastens_and_the_third_ends_at_once(driver: Driver) {
    let mut weir = Weir::start(driver, &["--set=drain.window=1h", "--set=drain.unready=1h"]);
    let streams: Vec<_> = (0..20).map(|_| weir.sse(&["news"])).collect();
    weir.signal(libc::SIGTERM);
    weir.wait_not_ready();
    weir.signal(libc::SIGTERM);
    for stream in streams {
        let (items, _) = stream.read_to_end();
        assert!(items.iter().any(|item| matches!(item, Item::Comment(text) if text.contains("shutdown"))), "{items:?}");
    }
    assert_eq!(weir.wait_end().code(), Some(0), "an hour was not waited for");

    let mut weir = Weir::start(driver, &["--set=drain.window=1h", "--set=drain.unready=1h"]);
    // It never reads its parting words, so it would be waited for.
    let _stalled = weir.sse(&["news"]);
    weir.signal(libc::SIGTERM);
    weir.wait_log("the drain", |line| line.contains("not ready any more"));
    weir.signal(libc::SIGTERM);
    weir.wait_log("haste", |line| line.contains("making haste"));
    weir.signal(libc::SIGTERM);
    assert!(!weir.wait_end().success(), "somebody was left");
}

fn drained_clients_are_told_to_come_back_at_different_times(driver: Driver) {
    let mut weir = Weir::start(driver, &["--set=sse.retry=10s"]);
    let streams: Vec<_> = (0..20).map(|_| weir.sse(&["news"])).collect();
    let mut websocket = weir.centrifugo();
    weir.signal(libc::SIGTERM);
    let mut delays: Vec<u64> = streams
        .into_iter()
        .map(|stream| {
            let (items, _) = stream.read_to_end();
            let last =
                items.iter().rev().find_map(|item| if let Item::Retry(millis) = item { Some(*millis) } else { None });
            last.expect("a delay")
        })
        .collect();
    assert!(delays.iter().all(|delay| (5_000..=15_000).contains(delay)), "{delays:?}");
    delays.sort_unstable();
    delays.dedup();
    assert!(delays.len() > 15, "{delays:?}");
    // Clients of this protocol draw their delay themselves, after each code that tells them to come back.
    assert_eq!(websocket.socket.next(), Incoming::Close(3001, "shutdown".into()));
    weir.wait_end();
}

fn service_manager_is_told_that_the_node_is_ready_alive_and_ending(driver: Driver) {
    let folder = TempDir::new();
    let path = folder.path().join("notify.sock");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    let told = |word: &str| {
        let mut buffer = [0; 4096];
        loop {
            let length = socket.recv(&mut buffer).unwrap_or_else(|error| panic!("{word} is told: {error}"));
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if text.lines().any(|line| line.starts_with(word)) {
                return text;
            }
        }
    };
    let weir = Weir::command(driver).environment("NOTIFY_SOCKET", &path);
    // Microseconds, which the service manager would set.
    let mut weir = weir.environment("WATCHDOG_USEC", Path::new("400000")).flags(&["--set=drain.window=2s"]).start();
    told("READY=1");
    told("WATCHDOG=1");
    told("WATCHDOG=1");
    let stream = weir.sse(&["news"]);
    told("STATUS=serving, 1 connection");
    weir.signal(libc::SIGTERM);
    told("STOPPING=1");
    // It is alive to the end: its only client has been told, and has yet to close.
    told("STATUS=stopping, ");
    told("WATCHDOG=1");
    stream.read_to_end();
    assert_eq!(weir.wait_end().code(), Some(0));
}

fn operator_drains_a_node_and_sees_how_far_it_is(driver: Driver) {
    let mut weir = Weir::start(driver, &["--set=drain.window=3s"]);
    let streams: Vec<_> = (0..30).map(|_| weir.sse(&["news"])).collect();
    let status = weir.operate("status").expect("an answer");
    assert_eq!((&status["phase"], &status["connections"]["sse"]), (&"serving".into(), &30.into()), "{status}");
    weir.operate("drain").expect("an answer");
    let mut left = 30;
    eventually("the number of connections falls", || {
        let status = weir.operate("status").ok()?;
        assert_eq!(status["phase"], "draining", "{status}");
        let now = status["connections"]["sse"].as_u64().expect("a number");
        assert!(now <= left, "{now} after {left}");
        left = now;
        (1..30).contains(&now).then_some(())
    });
    let refused = weir.operate("upgrade").expect_err("its connections are on their way");
    assert!(refused.contains("the node is draining"), "{refused}");
    for stream in streams {
        stream.read_to_end();
    }
    assert_eq!(weir.wait_end().code(), Some(0));
}

fn command_that_no_node_takes_says_where_it_looked(driver: Driver) {
    let mut weir = Weir::start(driver, &["--set=admin.listen=off"]);
    let error = weir.operate("drain").expect_err("nobody takes it");
    assert!(error.contains("no node takes commands at unix:/"), "{error}");
    weir.kill();
}
