//! Positions older than the node's own log that the stream in Redis still has: fetched once for all who come back with them,
//! and delivered without a gap.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Driver, Incoming, Opcode, Persistence, Plan, Published, Redis, Sse, Swarm, Weir};
use crate::storms::{difference, without_publications};

scenarios! {
    each_driver: [
        stream_resumes_from_the_oldest_position_in_redis,
        stream_of_many_channels_resumes_from_the_oldest_positions,
        poll_and_waiting_poll_go_on_from_the_oldest_position,
        websocket_recovers_from_the_oldest_position,
        websocket_history_reaches_back_into_redis,
        history_right_behind_subscribe_waits_for_the_channel,
        position_that_has_left_redis_too_is_a_gap_and_what_is_left_follows,
        large_backlog_over_websocket_comes_in_pushes_behind_the_reply,
        publishing_goes_on_while_everyone_resumes_from_far_behind,
        unreachable_redis_is_an_error_and_no_gap,
        storm_from_old_positions_costs_redis_by_channel,
    ],
}

/// Publications of a history.
const LENGTH: usize = 300;
/// Bytes of each of them.
const SIZE: usize = 1_000;

/// A node whose log holds a tenth of what the stream in Redis has.
fn node(driver: Driver, url: &str) -> Weir {
    Weir::start(
        driver,
        &[
            "--redis",
            url,
            "--set",
            "history.bytes=128KiB",
            "--set",
            "lag.bytes=64KiB",
            "--set",
            "limits.publication_bytes=32KiB",
        ],
    )
}

fn payload(number: usize) -> String {
    json!({ "number": number, "ballast": "x".repeat(SIZE) }).to_string()
}

fn number(data: &Value) -> usize {
    data["number"].as_u64().expect("a number") as usize
}

fn publish(weir: &Weir, channel: &str, numbers: std::ops::RangeInclusive<usize>) -> Vec<Published> {
    let payloads: Vec<String> = numbers.map(payload).collect();
    weir.publish_all(channel, payloads.iter().map(String::as_str))
}

/// Follows a stream up to publication `last` and checks that each comes once and in order.
fn follow(sse: &mut Sse, from: usize, last: usize) {
    for expected in from..=last {
        let event = sse.next();
        assert_ne!(event.name, "gap", "Redis has it: {event:?}");
        let data: Value = serde_json::from_str(&event.data).expect("JSON");
        assert_eq!(number(&data), expected);
    }
}

fn stream_resumes_from_the_oldest_position_in_redis(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let weir = node(driver, &redis.url());
    let positions = publish(&weir, "deep", 1..=LENGTH);
    for first in [0, 1, LENGTH / 2, LENGTH - 1] {
        let mut back = weir.sse_from(&["deep"], &positions[first].cursor);
        follow(&mut back, first + 2, LENGTH);
    }
    let before = weir.sse_from(&["deep"], &positions[0].cursor.replace(".1", ".0"));
    let mut back = before;
    follow(&mut back, 1, LENGTH);
    publish(&weir, "deep", LENGTH + 1..=LENGTH + 1);
    follow(&mut back, LENGTH + 1, LENGTH + 1);
}

fn stream_of_many_channels_resumes_from_the_oldest_positions(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let weir = node(driver, &redis.url());
    let channels = ["a", "b", "c"];
    let cursors: Vec<String> =
        channels.iter().map(|channel| publish(&weir, channel, 1..=LENGTH)[0].cursor.clone()).collect();
    let mut back = weir.sse_from(&channels, &cursors.join(","));
    let mut next = [2; 3];
    for _ in 0..3 * (LENGTH - 1) {
        let event = back.next();
        let at = channels.iter().position(|channel| *channel == event.name).unwrap_or_else(|| panic!("{event:?}"));
        let data: Value = serde_json::from_str(&event.data).expect("JSON");
        assert_eq!(number(&data), next[at], "of {}", event.name);
        next[at] += 1;
    }
}

fn poll_and_waiting_poll_go_on_from_the_oldest_position(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let weir = node(driver, &redis.url());
    let positions = publish(&weir, "deep", 1..=LENGTH);
    for wait in ["", "&wait=5"] {
        let (mut cursor, mut got) = (positions[0].cursor.clone(), Vec::new());
        while got.len() < LENGTH - 1 {
            let answer = weir.get(&format!("/poll?channel=deep&cursor={cursor}{wait}")).expect(200).json();
            let of = &answer["channels"]["deep"];
            assert_eq!(of.get("gap"), None, "{:?}", of.get("gap"));
            let page = of["publications"].as_array().expect("publications");
            assert!(!page.is_empty());
            got.extend(page.iter().map(|publication| number(&publication["data"])));
            cursor = answer["cursor"].as_str().expect("a cursor").to_owned();
        }
        assert_eq!(got, (2..=LENGTH).collect::<Vec<_>>());
    }
}

fn websocket_recovers_from_the_oldest_position(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let weir = node(driver, &redis.url());
    let positions = publish(&weir, "deep", 1..=LENGTH);
    // Once on a channel that is live here, once on one that the node has to open first.
    for _ in 0..2 {
        let mut client = weir.centrifugo();
        let result = client.recover("deep", &positions[0].epoch, 1);
        assert_eq!((&result["recovered"], &result["was_recovering"]), (&json!(true), &json!(true)));
        let missed: Vec<usize> = result["publications"]
            .as_array()
            .expect("publications")
            .iter()
            .map(|publication| number(&publication["data"]))
            .collect();
        assert_eq!(missed, (2..=LENGTH).collect::<Vec<_>>());
        assert_eq!(result["offset"], LENGTH);
    }
    let mut client = weir.centrifugo();
    client.recover("deep", &positions[0].epoch, 1);
    publish(&weir, "deep", LENGTH + 1..=LENGTH + 1);
    assert_eq!(client.next_publication().1["offset"], LENGTH + 1, "and goes on live");
}

fn websocket_history_reaches_back_into_redis(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let weir = node(driver, &redis.url());
    let positions = publish(&weir, "deep", 1..=LENGTH);
    let epoch = &positions[0].epoch;
    let mut client = weir.centrifugo();
    client.subscribe("deep");
    let mut history = |asked: Value| -> Vec<u64> {
        let result = client.call("history", asked);
        let list = result["publications"].as_array().cloned().unwrap_or_default();
        list.iter().map(|publication| publication["offset"].as_u64().expect("an offset")).collect()
    };
    let since = |offset| json!({ "epoch": epoch, "offset": offset });
    assert_eq!(history(json!({ "channel": "deep", "limit": 3, "since": since(4) })), [5, 6, 7]);
    assert_eq!(history(json!({ "channel": "deep", "limit": 2 })), [1, 2]);
    assert_eq!(history(json!({ "channel": "deep", "limit": 2, "reverse": true, "since": since(20) })), [19, 18]);
    let newest = history(json!({ "channel": "deep", "limit": -1, "reverse": true }));
    assert_eq!(newest, (1..=LENGTH as u64).rev().collect::<Vec<_>>());
}

fn history_right_behind_subscribe_waits_for_the_channel(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let weir = node(driver, &redis.url());
    let elsewhere = Weir::start(driver, &["--redis", &redis.url()]);
    publish(&elsewhere, "deep", 1..=3);
    let mut client = weir.centrifugo();
    let commands = [
        json!({ "id": 71, "subscribe": { "channel": "deep" } }),
        json!({ "id": 72, "history": { "channel": "deep", "limit": 10 } }),
        json!({ "id": 73, "history": { "channel": "other", "limit": 10 } }),
    ];
    client.socket.send(Opcode::Text, commands.map(|command| command.to_string()).join("\n").as_bytes());
    let mut answers: Vec<Value> = Vec::new();
    while answers.len() < 3 {
        let Incoming::Text(text) = client.socket.next() else { continue };
        answers.extend(text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")));
    }
    let of = |id: u64| answers.iter().find(|answer| answer["id"] == id).expect("an answer");
    assert_eq!(of(71)["subscribe"]["offset"], 3, "{answers:?}");
    assert_eq!(of(72)["history"]["publications"].as_array().map(Vec::len), Some(3), "{answers:?}");
    assert_eq!(of(73)["error"]["code"], 103, "who has not subscribed may not read: {answers:?}");
}

fn position_that_has_left_redis_too_is_a_gap_and_what_is_left_follows(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let weir = node(driver, &redis.url());
    let positions = publish(&weir, "deep", 1..=LENGTH);
    // Publications 1 to 100 leave the stream; the node's log begins much later.
    redis.cli(&["XTRIM", "weir:{deep}:stream", "MINID", "101"]);

    let mut back = weir.sse_from(&["deep"], &positions[9].cursor);
    let gap = back.next();
    assert_eq!(gap.name, "gap");
    let data: Value = serde_json::from_str(&gap.data).expect("JSON");
    assert_eq!((&data["from"]["offset"], &data["to"]["offset"]), (&json!(10), &json!(100)), "and no more than that");
    follow(&mut back, 101, LENGTH);

    let mut client = weir.centrifugo();
    let refused = client.recover("deep", &positions[0].epoch, 10);
    assert_ne!(refused["recovered"], json!(true));
    let mut other = weir.centrifugo();
    assert_eq!(other.recover("deep", &positions[0].epoch, 100)["recovered"], true);
    let since = |offset: u64| json!({ "channel": "deep", "limit": 1, "since": { "epoch": positions[0].epoch, "offset": offset } });
    assert_eq!(other.call("history", since(100))["publications"][0]["offset"], 101);
    assert_eq!(other.try_call("history", since(10)).expect_err("a hole")["code"], 112);
}

fn large_backlog_over_websocket_comes_in_pushes_behind_the_reply(driver: Driver) {
    const COUNT: usize = 200;
    let redis = Redis::start(Persistence::None);
    let weir = node(driver, &redis.url());
    let large = |number: usize| json!({ "number": number, "ballast": "x".repeat(30_000) }).to_string();
    let payloads: Vec<String> = (1..=COUNT).map(large).collect();
    let positions: Vec<Published> = payloads.iter().map(|payload| weir.publish("deep", payload)).collect();
    let mut client = weir.centrifugo();

    let result = client.recover("deep", &positions[0].epoch, 1);

    assert_eq!(result["recovered"], true);
    let listed = result["publications"].as_array().expect("publications");
    let mut got: Vec<usize> = listed.iter().map(|publication| number(&publication["data"])).collect();
    assert!(got.len() < 150, "a reply has a bound: {}", got.len());
    assert_eq!(result["offset"], 1 + got.len(), "the position behind what was listed");
    while got.len() < COUNT - 1 {
        got.push(number(&client.next_publication().1["data"]));
    }
    assert_eq!(got, (2..=COUNT).collect::<Vec<_>>());
}

fn publishing_goes_on_while_everyone_resumes_from_far_behind(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let weir = node(driver, &redis.url());
    let positions = publish(&weir, "deep", 1..=LENGTH);
    let mut back: Vec<Sse> = (0..20).map(|client| weir.sse_from(&["deep"], &positions[client * 3].cursor)).collect();
    // More than the node's log holds is published before anyone has read a thing.
    publish(&weir, "deep", LENGTH + 1..=2 * LENGTH);
    for (client, sse) in back.iter_mut().enumerate() {
        follow(sse, client * 3 + 2, 2 * LENGTH);
    }
}

fn unreachable_redis_is_an_error_and_no_gap(driver: Driver) {
    let mut redis = Redis::start(Persistence::None);
    let weir = node(driver, &redis.url());
    let positions = publish(&weir, "deep", 1..=LENGTH);
    let mut live = weir.sse(&["deep"]);
    live.wait_for_position();
    let mut subscriber = weir.centrifugo();
    redis.kill();
    weir.wait_not_ready();

    let query = format!("/sse?channel=deep&last_event_id={}", positions[0].cursor);
    let refused = weir.get(&query).expect(503);
    assert!(refused.header("retry-after").is_some());
    weir.get(&format!("/poll?channel=deep&cursor={}", positions[0].cursor)).expect(503);
    let recover = json!({ "channel": "deep", "recover": true, "epoch": positions[0].epoch, "offset": 1 });
    let error = subscriber.try_call("subscribe", recover).expect_err("nobody knows");
    assert_eq!((&error["code"], &error["temporary"]), (&json!(100), &json!(true)), "{error}");

    // What the node has itself is still to be had.
    let mut back = weir.sse_from(&["deep"], &positions[LENGTH - 2].cursor);
    follow(&mut back, LENGTH, LENGTH);
}

fn storm_from_old_positions_costs_redis_by_channel(driver: Driver) {
    const CHANNELS: usize = 10;
    const BACKLOG: u64 = 60;
    let clients = match driver {
        Driver::Uring => 10_000,
        Driver::Epoll => 1_000,
    };
    let redis = Redis::start(Persistence::None);
    // The log of a channel holds a few publications; the clients come back from before all of them.
    let small = ["--set", "history.bytes=8KiB", "--set", "lag.bytes=4KiB", "--set", "limits.publication_bytes=2KiB"];
    let weir = Weir::command(driver).flags(&["--redis", &redis.url()]).flags(&small).start();
    let channels: Vec<String> = (0..CHANNELS).map(|channel| format!("channel-{channel}")).collect();
    let (websockets, spread) = (clients / 50, Duration::from_secs(2));
    let plan = Plan { clients, websockets, channels, spread, ..Plan::new(weir.address(), &[]) };
    let publish = |numbers: std::ops::RangeInclusive<u64>| {
        let of = |(number, channel): (u64, &String)| json!({ "channel": channel, "text": format!("{number}\n{}", "x".repeat(200)) });
        let all = numbers.flat_map(|number| plan.channels.iter().map(move |channel| (number, channel))).map(of);
        let body = json!({ "publications": all.collect::<Vec<_>>() }).to_string();
        weir.post("/api/publish", &[], body.as_bytes()).expect(200);
    };
    let swarm = Swarm::open(plan.clone());
    let start = redis.calls();
    publish(1..=3);
    let before = redis.calls();
    swarm.wait_received(3);

    // They are cut before they have read what comes, so they come back from before what the logs hold by then.
    swarm.pause(clients);
    publish(4..=BACKLOG);
    swarm.cut();
    swarm.pause(0);
    swarm.wait_received(BACKLOG);

    let cost = without_publications(&difference(&before, &redis.calls()), &difference(&start, &before));
    println!("{clients} clients were back from before the logs; Redis operations: {cost:?}");
    publish(BACKLOG + 1..=BACKLOG + 3);
    swarm.wait_received(BACKLOG + 3);
    let counts = swarm.counts();
    counts.assert_whole();
    // The node's heartbeats are no price of theirs.
    let theirs = cost.iter().filter(|(name, _)| *name != "publish");
    assert!(theirs.map(|(_, count)| count).sum::<u64>() <= 3 * CHANNELS as u64, "{cost:?}");
    assert!(cost["xrevrange"] >= CHANNELS as u64, "they came from before the log: {cost:?}");
}
