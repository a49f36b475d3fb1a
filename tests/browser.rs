//! A real browser: `EventSource` resumes by itself over the node's crash and over its orderly stop.

use serde_json::{Value, json};

use crate::harness::{Driver, NodeScript, Persistence, Redis, Weir, free_address};

scenarios! {
    each_driver: [
        event_source_resumes_by_itself_and_misses_nothing,
    ],
}

/// Publishes the numbers of one round past the node: all on `news`, half of them on each of `a` and `b`.
fn publish(redis: &Redis, round: u64) {
    let numbers = || (round * 10 + 1..=round * 10 + 10).map(|number| number.to_string());
    redis.fcall_all("news", numbers());
    redis.fcall_all("a", numbers().take(5));
    redis.fcall_all("b", numbers().skip(5));
}

#[track_caller]
fn check(step: &Value, rounds: u64) {
    let data: Vec<&Value> = step["one"].as_array().expect("a list").iter().map(|event| &event["data"]).collect();
    let expected: Vec<Value> = (1..=rounds * 10).map(|number| json!(number.to_string())).collect();
    assert_eq!(data, expected.iter().collect::<Vec<_>>(), "{step}");
    let mut many: Vec<&str> =
        step["many"].as_array().expect("a list").iter().map(|text| text.as_str().expect("text")).collect();
    let mut expected: Vec<String> = (0..rounds)
        .flat_map(|round| {
            (1..=10).map(move |number| format!("{} {}", if number <= 5 { "a" } else { "b" }, round * 10 + number))
        })
        .collect();
    // The order between channels is not promised over a resume; the order within each is.
    many.sort_by_key(|text| text.chars().next());
    expected.sort_by_key(|text| text.chars().next());
    assert_eq!(many, expected, "{step}");
}

fn event_source_resumes_by_itself_and_misses_nothing(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let redis_url = redis.url();
    let flags = ["--redis", &redis_url, "--set", "sse.retry=200ms"];
    let address = free_address();
    let mut weir = Weir::command(driver).flags(&flags).listen(address).start();
    let mut script = NodeScript::start("browser.mjs", &[&weir.url()]);
    let open = script.expect("open");
    let reply: Value = serde_json::from_str(open["socket"][0].as_str().expect("a message")).expect("JSON");
    assert!(reply["connect"]["client"].is_string(), "the browser's own WebSocket is served: {reply}");

    publish(&redis, 0);
    check(&script.expect("received"), 1);

    weir.kill();
    publish(&redis, 1);
    let mut weir = Weir::command(driver).flags(&flags).listen(address).start();
    let resumed = script.expect("resumed");
    check(&resumed, 2);
    assert!(resumed["opens"].as_u64() >= Some(4), "both streams were opened again: {resumed}");

    weir.signal(libc::SIGTERM);
    assert_eq!(weir.wait_end().code(), Some(0));
    publish(&redis, 2);
    let _weir = Weir::command(driver).flags(&flags).listen(address).start();
    check(&script.expect("done"), 3);
}
