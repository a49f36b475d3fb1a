//! The backbone goes away and comes back: clients stay connected, and nothing is missing silently.

use crate::harness::{Driver, Persistence, Redis, Weir, eventually};

scenarios! {
    each_driver: [
        restarted_redis_loses_nothing_for_connected_clients,
        restarted_redis_that_forgot_everything_announces_a_gap,
        frozen_redis_makes_the_node_unready_and_loses_nothing,
        publish_without_a_backbone_is_refused_and_told_to_retry,
        node_starts_before_its_redis,
        missed_publications_are_repaired_when_redis_drops_the_connection,
    ],
}

fn node(driver: Driver, redis: &Redis) -> Weir {
    Weir::start(driver, &["--redis", &redis.url()])
}

fn restarted_redis_loses_nothing_for_connected_clients(driver: Driver) {
    let mut redis = Redis::start(Persistence::AppendOnly);
    let weir = node(driver, &redis);
    let mut sse = weir.sse(&["durable"]);
    let mut socket = weir.centrifugo();
    socket.subscribe("durable");
    weir.publish("durable", "1");

    redis.kill();
    weir.wait_not_ready();
    redis.run();
    // At once, by another program: the node has probably not subscribed again yet.
    redis.fcall_all("durable", (2..=51).map(|number| number.to_string()));
    weir.wait_ready();
    weir.publish("durable", "52");

    let expected: Vec<String> = (1..=52).map(|number| number.to_string()).collect();
    assert_eq!(sse.next_data(52), expected, "on the same stream, each once");
    assert_eq!(socket.next_data(52), (1..=52).collect::<Vec<_>>());
}

fn restarted_redis_that_forgot_everything_announces_a_gap(driver: Driver) {
    let mut redis = Redis::start(Persistence::None);
    let weir = node(driver, &redis);
    let mut sse = weir.sse(&["fragile"]);
    let mut socket = weir.centrifugo();
    socket.subscribe("fragile");
    let before = weir.publish("fragile", "1");
    assert_eq!(sse.next().data, "1");
    assert_eq!(socket.next_data(1), [1]);

    redis.kill();
    redis.forget();
    weir.wait_not_ready();
    redis.run();
    weir.wait_ready();
    let after = weir.publish("fragile", "2");

    assert_ne!(after.epoch, before.epoch, "a new life of the history");
    let gap = sse.next();
    assert_eq!(gap.name, "gap", "the change is said before anything of the new life: {gap:?}");
    let event = sse.next();
    assert_eq!((event.data.as_str(), event.id), ("2", after.cursor));
    let (push, _) = socket.next_push();
    assert_eq!(push["channel"], "fragile", "{push}");
    let code = push["unsubscribe"]["code"].as_u64();
    assert!(code >= Some(2500), "client libraries subscribe again by themselves from 2500 on: {push}");
    assert_eq!(socket.subscribe("fragile")["epoch"], after.epoch.as_str(), "and this connection may, too");
}

fn frozen_redis_makes_the_node_unready_and_loses_nothing(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let weir = node(driver, &redis);
    let mut sse = weir.sse(&["news"]);
    weir.publish("news", "1");
    assert_eq!(sse.next().data, "1");

    redis.freeze();
    // The connection is open and silent: only the heartbeat's age can tell.
    let reason = weir.wait_not_ready();
    redis.thaw();

    assert!(!reason.is_empty(), "an operator is told why");
    weir.wait_ready();
    assert!(sse.is_open(), "clients stay through it");
    redis.fcall("news", "2");
    // A heartbeat made the node ready; it may still give the long silent connection up, and asks to try again meanwhile.
    eventually("a publish is taken", || (weir.post("/publish/news", &[], b"3").status == 200).then_some(()));
    assert_eq!(sse.next_data(2), ["2", "3"]);
}

fn publish_without_a_backbone_is_refused_and_told_to_retry(driver: Driver) {
    let mut redis = Redis::start(Persistence::None);
    let weir = node(driver, &redis);
    let mut sse = weir.sse(&["news"]);
    redis.kill();
    weir.wait_not_ready();

    let refused = weir.post("/publish/news", &[], b"lost").expect(503);

    assert!(refused.header("retry-after").is_some_and(|value| value.parse::<u32>().is_ok()), "{refused:?}");
    assert!(refused.json()["error"].as_str().is_some_and(|text| text.contains("backbone")), "{refused:?}");
    assert_eq!(weir.get("/health/live").status, 200, "a node without its backbone is alive");
    assert!(sse.is_open(), "and keeps its clients");
}

fn node_starts_before_its_redis(driver: Driver) {
    let mut redis = Redis::stopped(Persistence::None);
    let weir = Weir::command(driver).flags(&["--redis", &redis.url()]).start_unready();
    weir.wait_not_ready();
    redis.run();
    weir.wait_ready();
    let mut sse = weir.sse(&["news"]);
    weir.publish("news", "1");
    assert_eq!(sse.next().data, "1");
}

fn missed_publications_are_repaired_when_redis_drops_the_connection(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let weir = node(driver, &redis);
    let mut sse = weir.sse(&["news"]);
    weir.publish("news", "1");
    assert_eq!(sse.next().data, "1");
    let mut expected = Vec::new();
    for round in 0..5 {
        // Both kinds: a subscriber's connection and a command connection.
        redis.cli(&["CLIENT", "KILL", "TYPE", "pubsub"]);
        redis.cli(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
        let data: Vec<String> = (0..20).map(|number| format!("{round}-{number}")).collect();
        redis.fcall_all("news", data.clone());
        expected.extend(data);
        eventually("subscribed again", || (redis.subscribers("news") == 1).then_some(()));
    }
    assert_eq!(sse.next_data(100), expected, "each once, in order, on the same stream");
    weir.wait_ready();
}
