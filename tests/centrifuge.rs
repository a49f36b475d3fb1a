//! The published JavaScript client `centrifuge`, unmodified, under Node.js.

use serde_json::{Value, json};

use crate::harness::{Driver, NodeScript, Persistence, Redis, Weir, free_address};

scenarios! {
    each_driver: [
        javascript_client_delivers_recovers_and_unsubscribes,
        javascript_client_may_publish_where_allowed,
    ],
}

/// Everything up to the answer to the client's publish; returns the error code it got.
fn up_to_publish(weir: &Weir, script: &mut NodeScript) -> Value {
    let subscribed = script.expect("subscribed");
    assert_eq!(subscribed["subscribed"][0]["recoverable"], true, "{subscribed}");
    let numbers: Vec<String> = (1..=100).map(|number| number.to_string()).collect();
    weir.publish_all("numbers", numbers.iter().map(String::as_str));
    let received = script.expect("received");
    let expected: Vec<Value> = (1..=100).map(|number| json!({ "data": number, "offset": number })).collect();
    assert_eq!(received["seen"], json!(expected));
    script.expect("published")["refused"].clone()
}

fn websocket_url(weir: &Weir) -> String {
    format!("ws://{}/connection/websocket", weir.address())
}

fn javascript_client_delivers_recovers_and_unsubscribes(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let address = free_address();
    let mut weir = Weir::command(driver).flags(&["--redis", &redis.url()]).listen(address).start();
    let mut script = NodeScript::start("centrifuge.mjs", &[&websocket_url(&weir)]);
    assert_eq!(up_to_publish(&weir, &mut script), 103, "permission denied by default");
    let history = script.expect("history");
    assert_eq!((&history["offsets"], &history["top"]), (&json!([100, 99, 98]), &json!(100)));

    weir.kill();
    redis.fcall_all("numbers", (101..=110).map(|number| number.to_string()));
    let weir = Weir::command(driver).flags(&["--redis", &redis.url()]).listen(address).start();

    let recovered = script.expect("recovered");
    assert_eq!(recovered["subscribed"][1]["wasRecovering"], true, "{recovered}");
    assert_eq!(recovered["subscribed"][1]["recovered"], true, "{recovered}");
    let expected: Vec<Value> = (101..=110).map(|number| json!({ "data": number, "offset": number })).collect();
    assert_eq!(recovered["seen"], json!(expected));

    script.expect("unsubscribed");
    weir.publish("numbers", "111");
    script.go_on();
    script.expect("other");
    weir.publish("numbers", "112");
    weir.publish("other", "\"only this\"");
    let done = script.expect("done");
    assert_eq!((&done["otherSeen"], &done["extra"], &done["seen"]), (&json!(["only this"]), &json!(0), &json!(110)));
}

fn javascript_client_may_publish_where_allowed(driver: Driver) {
    let weir = Weir::start(driver, &["--set", "websocket.client_publish=true"]);
    let mut sse = weir.sse(&["numbers"]);
    let mut script = NodeScript::start("centrifuge.mjs", &[&websocket_url(&weir)]);
    assert_eq!(up_to_publish(&weir, &mut script), Value::Null, "no error");
    assert_eq!(sse.next_data(101).pop().as_deref(), Some(r#"{"from":"client"}"#));
}
