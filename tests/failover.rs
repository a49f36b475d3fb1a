//! Sentinels fail over under load: the node follows, clients stay connected, and nothing is missing silently.

use std::time::{Duration, Instant};

use crate::faults::Load;
use crate::harness::{Driver, Group, Redis, Weir, eventually};

scenarios! {
    each_driver: [
        primary_killed_under_load_is_left_for_its_replica,
        primary_frozen_under_load_is_not_trusted_when_it_comes_back,
        sentinels_that_are_all_dead_change_nothing,
        sentinels_that_do_not_know_the_name_are_said_to,
    ],
}

fn role(server: &Redis) -> Option<String> {
    server.try_cli(&["ROLE"]).and_then(|answer| answer.lines().next().map(str::to_owned))
}

/// Waits until every client has something that was published after the switch, and prints how long that took.
#[track_caller]
fn measure(load: &Load, switched: Instant, down: Instant) {
    let rounds = load.publisher.rounds();
    load.publisher.wait_rounds(1);
    load.swarm.wait_received(rounds + 1);
    println!(
        "switched {:?} after the primary stopped; every client was delivered to again {:?} after the switch; {} publications \
         repeated",
        switched - down,
        switched.elapsed(),
        load.publisher.retries(),
    );
}

fn primary_killed_under_load_is_left_for_its_replica(driver: Driver) {
    let mut group = Group::start(2);
    let load = Load::usual(driver, &group.url());
    load.publish_directly(&group.servers[0]);
    load.publisher.wait_rounds(5);

    group.servers[0].kill();
    let down = Instant::now();
    let primary = group.wait_switched();
    measure(&load, Instant::now(), down);

    load.weir.wait_ready();
    assert_eq!(role(primary).as_deref(), Some("master"));
    assert!(load.publisher.retries() > 0, "it published all the time");
    load.finish_told(primary);
}

/// It takes what lay in its sockets, and says that it is a primary until the sentinels tell it otherwise.
fn primary_frozen_under_load_is_not_trusted_when_it_comes_back(driver: Driver) {
    let group = Group::start(1);
    let load = Load::usual(driver, &group.url());
    load.publish_directly(&group.servers[0]);
    load.publisher.wait_rounds(5);

    let old = &group.servers[0];
    old.freeze();
    let down = Instant::now();
    let primary = group.wait_switched();
    measure(&load, Instant::now(), down);
    load.weir.wait_ready();

    old.thaw();
    // What is written there now is lost.
    old.try_cli(&[
        "FCALL",
        "weir_publish",
        "2",
        "weir:{channel-0}:meta",
        "weir:{channel-0}:stream",
        "weir:{channel-0}",
        "0",
    ]);
    load.publisher.wait_rounds(5);
    eventually("the old primary is a replica", || role(old).filter(|role| role == "slave"));
    load.publisher.wait_rounds(5);
    assert_eq!(old.subscribers("channel-0"), 0, "nobody listens there");
    assert_eq!(primary.subscribers("channel-0"), 1);
    load.finish_told(primary);
}

fn sentinels_that_are_all_dead_change_nothing(driver: Driver) {
    let mut group = Group::start(1);
    let load = Load::usual(driver, &group.url());

    group.kill_sentinels();
    load.publisher.wait_rounds(5);
    // The connections break, too: the primary that was known last is still the one.
    for _ in 0..3 {
        let primary = &group.servers[0];
        primary.cli(&["CLIENT", "KILL", "TYPE", "pubsub"]);
        load.publish_directly(primary);
        eventually("subscribed again", || (primary.subscribers("direct-0") == 1).then_some(()));
    }

    load.weir.wait_ready();
    load.finish_whole(&group.servers[0]);
}

fn sentinels_that_do_not_know_the_name_are_said_to(driver: Driver) {
    let group = Group::start(1);
    let weir = Weir::command(driver).flags(&["--redis", &group.url_of("other")]).start_unready();
    let reason = eventually("the sentinels have answered", || {
        std::thread::sleep(Duration::from_millis(20));
        Some(weir.wait_not_ready()).filter(|reason| reason.contains("No such master"))
    });
    assert!(reason.contains("no sentinel names the primary of `other`"), "{reason}");
    assert!(reason.contains("127.0.0.1:1: "), "each sentinel has its reason: {reason}");
}
