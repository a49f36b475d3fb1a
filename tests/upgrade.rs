//! A new process takes over from a running one, and clients notice nothing: no disconnect, nothing lost, repeated or reordered.

use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::harness::{Driver, Http, Place, Plan, Publisher, Sse, Swarm, TempDir, Upgrade, Weir, eventually};

scenarios! {
    each_driver: [
        from_one_driver_to_the_other_and_back_with_other_shards,
        a_new_program_that_fails_leaves_the_old_one_serving,
        operator_upgrades_a_node_and_goes_on_with_the_new_process,
    ],
    each_backbone: [
        twenty_upgrades_in_a_row_under_load,
        clients_that_come_during_upgrades_are_served,
        new_process_killed_at_every_step,
        messages_with_and_without_a_position_go_over,
    ],
}

/// Clients of the twenty upgrades. The largest crowd once, for the time of it.
fn crowd(place: &Place) -> usize {
    match (place.driver, &place.redis) {
        (Driver::Uring, Some(_)) => 10_000,
        (Driver::Uring, None) => 2_000,
        (Driver::Epoll, _) => 1_000,
    }
}

/// Clients on ten channels, a fifth of them over WebSocket.
fn plan(weir: &Weir, clients: usize) -> Plan {
    let channels = (0..10).map(|number| format!("channel-{number}")).collect();
    let spread = Duration::from_secs(1);
    Plan { clients, websockets: clients / 5, channels, spread, ..Plan::new(weir.address(), &[]) }
}

/// Fails if a client noticed anything.
#[track_caller]
fn assert_unnoticed(swarm: &Swarm) {
    let counts = swarm.counts();
    counts.assert_whole();
    assert_eq!((counts.returns, counts.ended, counts.given_up), (0, 0, 0), "{counts:?}");
}

fn twenty_upgrades_in_a_row_under_load(place: &Place) {
    let mut weir = place.weir(&[]);
    let plan = plan(&weir, crowd(place));
    let swarm = Swarm::open(plan.clone());
    let publisher = Publisher::start(weir.address(), &plan.channels, Duration::from_millis(20), 0);
    publisher.wait_rounds(2);
    let mut pauses = Vec::new();
    for _ in 0..20 {
        let Upgrade { connections, pause } = weir.upgrade();
        assert!(connections >= plan.clients as u64, "{connections} of {}", plan.clients);
        pauses.push(pause);
        publisher.wait_rounds(1);
    }
    let refused = publisher.retries();
    let rounds = publisher.stop();
    swarm.wait_received(rounds);
    assert_unnoticed(&swarm);
    assert_eq!(refused, 0, "publishing goes on");
    assert_eq!(weir.metrics().sum("weir_handovers_total", "outcome=\"moved\""), 20.0);
    pauses.sort();
    println!("{} clients, {rounds} rounds: pauses of {:?} to {:?}", plan.clients, pauses[0], pauses[19]);
}

fn new_process_killed_at_every_step(place: &Place) {
    const STEPS: [&str; 7] = ["greeting", "seeding", "preparing", "settling", "carrying", "arriving", "committing"];
    let directory = TempDir::new();
    let fault = directory.path().join("fault");
    let mut command = Weir::command(place.driver).environment("HANDOVER_FAULT", &fault);
    if let Some(redis) = &place.redis {
        command = command.flags(&["--redis", &redis.url()]);
    }
    let mut weir = command.start();
    let plan = plan(&weir, 300);
    let swarm = Swarm::open(plan.clone());
    let publisher = Publisher::start(weir.address(), &plan.channels, Duration::from_millis(10), 0);
    publisher.wait_rounds(2);
    let first = weir.pid();
    for (tries, step) in (1..).zip(STEPS) {
        std::fs::write(&fault, step).expect("write the fault");
        let why = weir.upgrade_in_vain(tries);
        assert!(why.contains("is gone"), "{step}: {why}");
        publisher.wait_rounds(2);
    }
    assert_eq!(weir.pid(), first);
    std::fs::write(&fault, "none").expect("write the fault");
    weir.upgrade();
    publisher.wait_rounds(2);
    let refused = publisher.retries();
    let rounds = publisher.stop();
    swarm.wait_received(rounds);
    assert_unnoticed(&swarm);
    assert_eq!(refused, 0, "publishing goes on");
    let count = |outcome: &str| weir.metrics().sum("weir_handovers_total", &format!("outcome=\"{outcome}\""));
    assert_eq!((count("moved"), count("failed")), (1.0, STEPS.len() as f64));
}

fn clients_that_come_during_upgrades_are_served(place: &Place) {
    let mut weir = place.weir(&[]);
    let address = weir.address();
    let stop = AtomicBool::new(false);
    let came = std::thread::scope(|scope| {
        let coming = scope.spawn(|| {
            let mut streams = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                // A channel that nobody has had before: it is opened in the middle of whatever is going on.
                let channel = format!("new-{}", streams.len());
                let mut stream = Sse::open(address, &[&channel], None);
                Http::open(address).send("POST", &format!("/publish/{channel}"), &[], b"first").expect(200);
                assert_eq!(stream.next_data(1), ["first"]);
                streams.push((channel, stream));
            }
            streams
        });
        for _ in 0..10 {
            weir.upgrade();
        }
        stop.store(true, Ordering::Relaxed);
        coming.join().expect("every client is served")
    });
    assert!(came.len() >= 10, "only {} came", came.len());
    for (channel, mut stream) in came {
        weir.publish(&channel, "last");
        assert_eq!(stream.next_data(1), ["last"]);
    }
}

fn messages_with_and_without_a_position_go_over(place: &Place) {
    let mut weir = place.weir(&[]);
    let mut stream = weir.sse(&["plain"]);
    let (mut sent, mut next) = (Vec::new(), 0);
    let mut publish = |weir: &Weir, count: usize| {
        for _ in 0..count {
            next += 1;
            let text = format!("m{next}");
            match &place.redis {
                Some(redis) if next % 2 == 0 => drop(redis.cli(&["PUBLISH", "weir:{plain}", &text])),
                _ => drop(weir.publish("plain", &text)),
            }
            sent.push(text);
        }
    };
    publish(&weir, 4);
    for _ in 0..3 {
        weir.upgrade();
        publish(&weir, 4);
    }
    assert_eq!(stream.next_data(sent.len()), sent);
}

fn from_one_driver_to_the_other_and_back_with_other_shards(driver: Driver) {
    let directory = TempDir::new();
    let file = directory.path().join("weir.toml");
    let other = if driver == Driver::Uring { "epoll" } else { "uring" };
    let write = |driver: &str, shards: u32| {
        std::fs::write(&file, format!("driver = \"{driver}\"\nshards = {shards}\n")).expect("write the configuration");
    };
    write(driver.flag(), 2);
    let mut weir = Weir::command(driver).configured_by(&file).start();
    let plan = plan(&weir, 300);
    let swarm = Swarm::open(plan.clone());
    let publisher = Publisher::start(weir.address(), &plan.channels, Duration::from_millis(10), 0);
    for (driver, shards) in [(other, 1), (driver.flag(), 3), (other, 2), (driver.flag(), 2)] {
        write(driver, shards);
        weir.upgrade();
        publisher.wait_rounds(2);
        // Each listener is accepted on, also those that no shard of its own is there for.
        (0..20).for_each(|_| drop(weir.get("/health/ready").expect(200)));
    }
    let rounds = publisher.stop();
    swarm.wait_received(rounds);
    assert_unnoticed(&swarm);
}

fn a_new_program_that_fails_leaves_the_old_one_serving(driver: Driver) {
    let directory = TempDir::new();
    let program = directory.path().join("weir");
    std::fs::copy(env!("CARGO_BIN_EXE_weir"), &program).expect("copy the program");
    let mut weir = Weir::command(driver).program(&program).start();
    let mut stream = weir.sse(&["news"]);
    weir.publish("news", "before");
    let replace = |script: &str| {
        // As a package manager does: the running program's file keeps its contents under no name.
        let fresh = directory.path().join("fresh");
        std::fs::write(&fresh, script).expect("write a program");
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o755)).expect("make it executable");
        std::fs::rename(&fresh, &program).expect("put it in place");
    };
    for (tries, (script, reason)) in (1..).zip([
        ("#!/bin/sh\nexit 3\n", "is gone"),
        ("#!/bin/sh\neval \"echo 1234567890123456 >&$WEIR_HANDOVER_FD\"\n", "starting"),
    ]) {
        replace(script);
        let why = weir.upgrade_in_vain(tries);
        assert!(why.contains(reason), "{why}");
        weir.publish("news", "meanwhile");
    }
    std::fs::remove_file(&program).expect("remove it");
    weir.signal(libc::SIGUSR2);
    weir.wait_log("it cannot be started", |line| line.contains("cannot start"));
    std::fs::copy(env!("CARGO_BIN_EXE_weir"), &program).expect("copy the program");
    weir.upgrade();
    weir.publish("news", "after");
    assert_eq!(stream.next_data(4), ["before", "meanwhile", "meanwhile", "after"]);
    eventually("the new process serves", || (weir.get("/health/ready").status == 200).then_some(()));
}

fn operator_upgrades_a_node_and_goes_on_with_the_new_process(driver: Driver) {
    let mut weir = Weir::start(driver, &[]);
    let mut stream = weir.sse(&["news"]);
    let before = weir.operate("status").expect("an answer")["pid"].clone();
    let told = weir.operate("upgrade").expect("it succeeds");
    assert_eq!(told["connections"], 1, "{told}");
    let status = eventually("the new process takes commands", || {
        let status = weir.operate("status").ok()?;
        (status["pid"] != before).then_some(status)
    });
    assert_eq!((&status["pid"], &status["phase"]), (&told["pid"], &"serving".into()), "{status}");
    weir.follow(u32::try_from(status["pid"].as_u64().expect("a number")).expect("a process id"));
    weir.publish("news", "after");
    assert_eq!(stream.next().data, "after");
    weir.operate("drain").expect("an answer");
    let (items, _) = stream.read_to_end();
    assert!(!items.is_empty(), "it is told to go");
}
