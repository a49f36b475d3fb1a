//! A publication reaches every subscriber: whole, once and in order.

use serde_json::{Value, json};

use crate::harness::{Driver, Place, Weir};

scenarios! {
    each_driver: [
        payloads_arrive_exactly_over_sse,
        payloads_arrive_exactly_over_websocket,
        channel_names_of_any_printable_text,
        payload_of_the_largest_size_passes_and_one_byte_more_is_refused,
        subscribers_on_every_shard_get_the_same,
    ],
    each_backbone: [
        publish_reaches_sse_and_websocket_subscribers,
        one_thousand_publications_keep_their_order,
        many_channels_on_one_stream_carry_an_id_after_each_events_data,
        offsets_are_consecutive_from_one,
    ],
}

fn publish_reaches_sse_and_websocket_subscribers(place: &Place) {
    let weir = place.weir(&[]);
    let mut sse = weir.sse(&["news"]);
    let mut other = weir.sse(&["other"]);
    let mut websocket = weir.centrifugo();
    websocket.subscribe("news");

    let published = weir.publish("news", r#"{"hello":1}"#);

    let event = sse.next();
    assert_eq!((event.name.as_str(), event.data.as_str()), ("message", r#"{"hello":1}"#));
    assert_eq!(event.id, published.cursor);
    let (channel, publication) = websocket.next_publication();
    assert_eq!(channel, "news");
    assert_eq!(publication, json!({ "data": { "hello": 1 }, "offset": published.offset }));

    // Whoever did not subscribe to it gets nothing of it: the first event it sees is its own channel's.
    weir.publish("other", "2");
    assert_eq!(other.next().data, "2");
}

fn one_thousand_publications_keep_their_order(place: &Place) {
    let weir = place.weir(&[]);
    let mut sse = weir.sse(&["numbers"]);
    let mut websocket = weir.centrifugo();
    websocket.subscribe("numbers");
    let numbers: Vec<String> = (1..=1000).map(|number| number.to_string()).collect();

    let positions = weir.publish_all("numbers", numbers.iter().map(String::as_str));

    for (index, number) in numbers.iter().enumerate() {
        let event = sse.next();
        assert_eq!(&event.data, number);
        assert_eq!(event.id, positions[index].cursor);
        let (_, publication) = websocket.next_publication();
        assert_eq!(publication, json!({ "data": index + 1, "offset": index + 1 }));
    }
}

fn many_channels_on_one_stream_carry_an_id_after_each_events_data(place: &Place) {
    let weir = place.weir(&[]);
    let channels: Vec<String> = (0..10).map(|number| format!("room:{number}")).collect();
    let names: Vec<&str> = channels.iter().map(String::as_str).collect();
    let mut sse = weir.sse(&names);

    let mut ids = std::collections::HashSet::new();
    for round in 0..20 {
        for name in &names {
            weir.publish(name, &format!("{name} line one\nround {round}"));
            let event = sse.next();
            assert_eq!(&event.name, name);
            assert_eq!(event.data, format!("{name} line one\nround {round}"));
            assert!(event.fields.iter().any(|field| field == "id"), "{:?}", event.fields);
            assert!(ids.insert(event.id), "each event moves the stream's position");
        }
    }
}

fn offsets_are_consecutive_from_one(place: &Place) {
    let weir = place.weir(&[]);
    let positions = weir.publish_all("counted", ["a", "b", "c", "d", "e"]);
    let offsets: Vec<u64> = positions.iter().map(|position| position.offset).collect();
    assert_eq!(offsets, [1, 2, 3, 4, 5]);
    assert!(positions.iter().all(|position| position.epoch == positions[0].epoch), "{positions:?}");
    assert_ne!(weir.publish("another", "a").epoch, positions[0].epoch, "each channel has a life of its own");
}

/// Payloads that a careless codec breaks.
fn payloads() -> Vec<String> {
    let mut payloads: Vec<String> = [
        "",
        " ",
        "plain",
        "two\nlines",
        "a trailing line feed\n",
        "\n",
        "\n\n\n",
        " leads with a space",
        ": not a comment",
        "data: forged\n\nid: 7\nevent: gap\nretry: 1\n\n",
        "emoji 👋🏽, größe, 漢字, \u{2028} and \u{2029}",
        "\u{feff}a byte order mark",
        "nul \0 and bell \u{7} and delete \u{7f}",
        r#"{"b":1.0,"a":12345678901234567890,"é":"\u00e9\ud83d\ude00"}"#,
        "{\n  \"pretty\": [1,\n 2]\n}",
        r#"{"broken":"#,
        r#"quotes " and \ backslashes \" and \u0041"#,
        r#""a JSON string""#,
        "null",
        "12",
        "{} {}",
    ]
    .map(str::to_owned)
    .to_vec();
    payloads.push("x".repeat(64 * 1024));
    payloads.push("😀".repeat(16 * 1024));
    payloads.push("\n".repeat(2000));
    // Around the lengths where a WebSocket header grows.
    payloads.extend([60, 70, 80, 90, 100, 110, 120, 126, 65_400, 65_500].map(|length| "y".repeat(length)));
    payloads
}

fn payloads_arrive_exactly_over_sse(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut one = weir.sse(&["exact"]);
    let mut many = weir.sse(&["exact", "silent"]);
    let mut payloads = payloads();
    payloads.extend(["cr\ronly", "cr\r\nlf", "\r", "\n\r", "mixed\r\r\n\n"].map(str::to_owned));
    for payload in &payloads {
        let published = weir.publish("exact", payload);
        // An event stream has lines, so a payload's line ends all become LF; nothing else changes.
        let expected = payload.replace("\r\n", "\n").replace('\r', "\n");
        let event = one.next();
        assert_eq!(event.data, expected);
        assert_eq!(event.id, published.cursor);
        let event = many.next();
        assert_eq!((event.name.as_str(), event.data), ("exact", expected));
    }
}

fn payloads_arrive_exactly_over_websocket(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut websocket = weir.centrifugo();
    websocket.subscribe("exact");
    let mut payloads = payloads();
    payloads.extend(["cr\ronly", "cr\r\nlf", "\r"].map(str::to_owned));
    for payload in &payloads {
        weir.publish("exact", payload);
        let (push, text) = websocket.next_push();
        match serde_json::from_str::<Value>(payload) {
            // JSON is embedded as it is: numbers keep their digits, strings their escapes, objects their order.
            Ok(value) => {
                assert_eq!(push["pub"]["data"], value, "{payload:?}");
                assert!(text.contains(&payload.replace('\n', " ")), "{payload:?} was rewritten: {text}");
            }
            Err(_) => assert_eq!(push["pub"]["data"], Value::String(payload.clone())),
        }
    }
}

fn channel_names_of_any_printable_text(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    for name in ["räume:köln", "a b&c=d/é?#%+;", "{tagged}:x", "漢字", "\"quoted\\\"", "a,b", &"x".repeat(255)] {
        let mut sse = weir.sse(&[name, "second"]);
        let mut websocket = weir.centrifugo();
        websocket.subscribe(name);
        weir.publish(name, "here");
        let event = sse.next();
        assert_eq!((event.name.as_str(), event.data.as_str()), (name, "here"));
        assert_eq!(websocket.next_publication().0, name);
    }
}

fn payload_of_the_largest_size_passes_and_one_byte_more_is_refused(driver: Driver) {
    let weir = Weir::start(driver, &["--set", "limits.publication_bytes=1000"]);
    let mut sse = weir.sse(&["sized"]);
    weir.publish("sized", &"x".repeat(1000));
    assert_eq!(sse.next().data.len(), 1000);
    let refused = weir.post("/publish/sized", &[], "x".repeat(1001).as_bytes()).expect(413);
    assert!(refused.json()["error"].as_str().is_some_and(|text| text.contains("1000")), "says the bound: {refused:?}");
    weir.publish("sized", "after");
    assert_eq!(sse.next().data, "after", "the refused one took no part in the channel");
}

fn subscribers_on_every_shard_get_the_same(driver: Driver) {
    // The kernel spreads connections over the shards' listeners, so forty hit both of two with near certainty.
    let weir = Weir::start(driver, &[]);
    let mut streams: Vec<_> = (0..40).map(|_| weir.sse(&["wide"])).collect();
    let numbers: Vec<String> = (0..50).map(|number| number.to_string()).collect();
    weir.publish_all("wide", numbers.iter().map(String::as_str));
    for stream in &mut streams {
        assert_eq!(stream.next_data(50), numbers);
    }
}
