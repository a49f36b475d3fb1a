//! Nodes that share a Redis, and publishers that speak to it without a node.

use crate::harness::{Driver, Persistence, Place, Redis, Weir, eventually};

scenarios! {
    each_driver: [
        two_nodes_share_a_redis,
        function_call_by_redis_cli_reaches_every_node,
        plain_publish_by_redis_cli_is_delivered_without_a_position,
        one_backbone_subscription_per_node_and_channel_and_none_after_the_linger,
        publications_of_three_publishers_are_one_sequence,
        history_written_before_a_node_starts_can_be_resumed,
        redis_on_a_unix_socket,
        prefix_separates_two_fleets_on_one_redis,
    ],
}

fn with_redis(driver: Driver, redis: &Redis) -> Weir {
    Weir::start(driver, &["--redis", &redis.url()])
}

fn two_nodes_share_a_redis(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let (left, right) = (with_redis(driver, &redis), with_redis(driver, &redis));
    let (mut at_left, mut at_right) = (left.sse(&["shared"]), right.sse(&["shared"]));
    let mut socket = right.centrifugo();
    socket.subscribe("shared");

    let first = left.publish("shared", "1");
    let second = right.publish("shared", "2");

    assert_eq!((second.epoch.as_str(), second.offset), (first.epoch.as_str(), 2), "one history for the fleet");
    assert_eq!(at_left.next_data(2), ["1", "2"]);
    assert_eq!(at_right.next_data(2), ["1", "2"]);
    assert_eq!(at_left.last_id, at_right.last_id);
    assert_eq!(socket.next_data(2), [1, 2]);

    // A client may come back to the other node.
    let mut moved = right.sse_from(&["shared"], &first.cursor);
    assert_eq!(moved.next_data(1), ["2"]);
}

fn function_call_by_redis_cli_reaches_every_node(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let (left, right) = (with_redis(driver, &redis), with_redis(driver, &redis));
    let (mut at_left, mut at_right) = (left.sse(&["news"]), right.sse(&["news"]));

    let reply = redis.fcall("news", r#"{"from":"redis-cli"}"#);

    let fields: Vec<&str> = reply.lines().collect();
    assert_eq!(fields[1..], ["1", "0"], "epoch, offset, duplicate: {reply:?}");
    for stream in [&mut at_left, &mut at_right] {
        let event = stream.next();
        assert_eq!(event.data, r#"{"from":"redis-cli"}"#);
        assert!(event.id.ends_with(&format!("{}.1", fields[0])), "{event:?} carries {reply:?}");
    }
}

fn plain_publish_by_redis_cli_is_delivered_without_a_position(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let weir = with_redis(driver, &redis);
    let mut sse = weir.sse(&["news"]);
    let mut socket = weir.centrifugo();
    socket.subscribe("news");
    let before = weir.publish("news", "positioned");
    assert_eq!(sse.next().data, "positioned");
    assert_eq!(socket.next_data(1), ["positioned"]);

    assert_eq!(redis.cli(&["PUBLISH", "weir:{news}", "plain text"]), "1");

    let event = sse.next();
    assert_eq!(event.data, "plain text");
    assert_eq!(event.id, before.cursor, "it moves no position");
    let (_, publication) = socket.next_publication();
    assert_eq!(publication, serde_json::json!({ "data": "plain text" }), "and has no offset");
    assert_eq!(weir.publish("news", "next").offset, before.offset + 1, "and takes none");
    assert_eq!(sse.next().data, "next");
}

fn one_backbone_subscription_per_node_and_channel_and_none_after_the_linger(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let flags = ["--redis", &redis.url(), "--set", "linger=300ms"];
    let (left, right) = (Weir::start(driver, &flags), Weir::start(driver, &flags));
    let at_left: Vec<_> = (0..50).map(|_| left.sse(&["busy"])).collect();
    assert_eq!(redis.subscribers("busy"), 1, "fifty clients on both shards are one subscription");
    let mut at_right: Vec<_> = (0..50).map(|_| right.sse(&["busy"])).collect();
    assert_eq!(redis.subscribers("busy"), 2, "one a node");

    drop(at_left);
    eventually("the left node lets the channel go", || (redis.subscribers("busy") == 1).then_some(()));
    left.publish("busy", "still delivered");
    for stream in &mut at_right {
        assert_eq!(stream.next().data, "still delivered");
    }
    drop(at_right);
    eventually("both nodes let the channel go", || (redis.subscribers("busy") == 0).then_some(()));

    let mut again = left.sse(&["busy"]);
    left.publish("busy", "again");
    assert_eq!(again.next().data, "again", "a channel that was let go can be had again");
}

fn publications_of_three_publishers_are_one_sequence(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let (left, right) = (with_redis(driver, &redis), with_redis(driver, &redis));
    let mut streams = [left.sse(&["mixed"]), right.sse(&["mixed"])];
    std::thread::scope(|scope| {
        scope.spawn(|| (0..100).for_each(|number| drop(left.publish("mixed", &format!("left-{number}")))));
        scope.spawn(|| (0..100).for_each(|number| drop(right.publish("mixed", &format!("right-{number}")))));
        scope.spawn(|| redis.fcall_all("mixed", (0..100).map(|number| format!("cli-{number}"))));
    });
    let seen = streams.each_mut().map(|stream| {
        let events: Vec<_> = (0..300).map(|_| stream.next()).collect();
        for (index, event) in events.iter().enumerate() {
            assert!(event.id.ends_with(&format!(".{}", index + 1)), "offset {} was {}", index + 1, event.id);
        }
        events.into_iter().map(|event| event.data).collect::<Vec<_>>()
    });
    assert_eq!(seen[0], seen[1], "both nodes saw the same order");
    for publisher in ["left", "right", "cli"] {
        let own: Vec<&String> = seen[0].iter().filter(|data| data.starts_with(publisher)).collect();
        let expected: Vec<String> = (0..100).map(|number| format!("{publisher}-{number}")).collect();
        assert_eq!(own, expected.iter().collect::<Vec<_>>(), "each publisher's own order is kept");
    }
}

fn history_written_before_a_node_starts_can_be_resumed(driver: Driver) {
    let place = Place::redis(driver);
    let first = place.weir(&[]);
    let positions = first.publish_all("kept", ["1", "2", "3"]);
    drop(first);
    let second = place.weir(&[]);
    let mut sse = second.sse_from(&["kept"], &positions[0].cursor);
    assert_eq!(sse.next_data(2), ["2", "3"]);
}

fn redis_on_a_unix_socket(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let weir = Weir::start(driver, &["--redis", &redis.unix_url()]);
    let mut sse = weir.sse(&["local"]);
    weir.publish("local", "1");
    assert_eq!(sse.next().data, "1");
}

fn prefix_separates_two_fleets_on_one_redis(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let production = with_redis(driver, &redis);
    let staging = Weir::start(driver, &["--redis", &redis.url(), "--set", "redis.prefix=staging:"]);
    let mut sse = production.sse(&["news"]);
    staging.publish("news", "from staging");
    production.publish("news", "from production");
    assert_eq!(sse.next().data, "from production");
}
