//! A client that comes back gets exactly what it missed, or is told that it cannot be had.

use std::collections::HashMap;

use serde_json::json;

use crate::harness::{Connection, Driver, Event, Item, Parser, Place, Sse, Weir, request, target};

scenarios! {
    each_driver: [
        cut_at_any_byte_loses_and_repeats_nothing,
    ],
    each_backbone: [
        resume_gives_exactly_what_was_missed,
        resume_from_every_event_of_many_channels,
        resume_from_the_position_said_at_connect,
        resume_by_query_parameter_and_the_header_wins,
        resume_with_nothing_missed_gives_nothing,
        resume_from_further_behind_than_the_lag_bound_is_not_slow,
        resume_from_another_epoch_announces_a_gap,
        resume_past_the_end_of_the_history_announces_a_gap,
        recovery_over_websocket_gives_exactly_what_was_missed,
        recovery_from_another_epoch_is_refused_over_websocket,
        idempotency_key_publishes_once,
    ],
}

fn resume_gives_exactly_what_was_missed(place: &Place) {
    let weir = place.weir(&[]);
    let mut sse = weir.sse(&["news"]);
    weir.publish_all("news", ["1", "2", "3", "4", "5"]);
    assert_eq!(sse.next_data(3), ["1", "2", "3"]);
    let id = sse.last_id.clone();
    sse.reset();
    weir.publish_all("news", ["6", "7"]);

    let mut back = weir.sse_from(&["news"], &id);

    assert_eq!(back.next_data(4), ["4", "5", "6", "7"]);
    weir.publish("news", "8");
    assert_eq!(back.next().data, "8", "and goes on live, with nothing twice");
}

fn cut_at_any_byte_loses_and_repeats_nothing(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    for channels in [&["a"][..], &["a", "b"]] {
        let mut connection = Connection::open(weir.address());
        connection.write(&request("GET", &target(channels), &[], b""));
        let head = connection.read_until(|buffer| buffer.windows(4).position(|window| window == b"\r\n\r\n"));
        connection.take(head.expect("a response") + 4);
        let mut sent: Vec<(&str, String)> = Vec::new();
        for number in 0..6 {
            let channel = channels[number % channels.len()];
            let data = format!("{number}\nof {channels:?}");
            weir.publish(channel, &data);
            sent.push((channel, data));
        }
        let last = format!("data: of {channels:?}\n");
        // Everything is there once the sixth event is, to its blank line.
        let stream = connection.read_until(|buffer| {
            let text = std::str::from_utf8(buffer).ok()?;
            (text.matches(&last).count() == 6 && text.ends_with("\n\n")).then(|| std::mem::take(buffer))
        });
        let stream = stream.expect("six events");

        for cut in 0..=stream.len() {
            let mut parser = Parser::default();
            parser.feed(&stream[..cut]);
            let (mut id, mut got) = (String::new(), Vec::new());
            while let Some(item) = parser.next() {
                match item {
                    Item::Event(event) if event.name != "open" => {
                        id = event.id;
                        got.push((event.name, event.data));
                    }
                    Item::Event(Event { id: position, .. }) | Item::Position(position) => id = position,
                    Item::Comment(_) | Item::Retry(_) => {}
                }
            }
            if id.is_empty() {
                // Cut before the stream said where it is: such a client starts anew.
                assert!(got.is_empty(), "an event without a position, cut at byte {cut}");
                continue;
            }
            let mut back = weir.sse_from(channels, &id);
            let mut rest: Vec<(String, String)> =
                (got.len()..6).map(|_| back.next()).map(|event| (event.name, event.data)).collect();
            let named = |channel: &str| if channels.len() == 1 { "message".to_owned() } else { channel.to_owned() };
            let mut expected: Vec<(String, String)> =
                sent.iter().map(|(channel, data)| (named(channel), data.clone())).collect();
            expected.retain(|event| !got.contains(event));
            // The order within a channel is kept; between channels it is free.
            rest.sort_by(|left, right| left.0.cmp(&right.0));
            expected.sort_by(|left, right| left.0.cmp(&right.0));
            assert_eq!(rest, expected, "cut at byte {cut} of {}", stream.len());
        }
    }
}

fn resume_from_every_event_of_many_channels(place: &Place) {
    let weir = place.weir(&[]);
    let channels = ["a", "b", "c"];
    let mut sse = weir.sse(&channels);
    let mut published: Vec<(&str, String)> = Vec::new();
    let mut ids = Vec::new();
    for number in 0..15 {
        // Uneven, so that the channels' offsets differ.
        let channel = channels[[0, 0, 1, 0, 2][number % 5]];
        weir.publish(channel, &number.to_string());
        published.push((channel, number.to_string()));
        let event = sse.next();
        assert_eq!((event.name.as_str(), event.data), (channel, number.to_string()));
        ids.push(event.id);
    }

    for (index, id) in ids.iter().enumerate() {
        let mut back = weir.sse_from(&channels, id);
        let missed = &published[index + 1..];
        let mut got: HashMap<String, Vec<String>> = HashMap::new();
        for _ in missed {
            let event = back.next();
            got.entry(event.name).or_default().push(event.data);
        }
        for channel in channels {
            let expected: Vec<&String> =
                missed.iter().filter(|(name, _)| *name == channel).map(|(_, data)| data).collect();
            let got: Vec<&String> = got.get(channel).map(|data| data.iter().collect()).unwrap_or_default();
            assert_eq!(got, expected, "resumed after event {index} ({id}), channel {channel}");
        }
        // Nothing else was due: the next event is one that is published now.
        let sentinel = format!("after {index}");
        weir.publish("b", &sentinel);
        published.push(("b", sentinel.clone()));
        assert_eq!(back.next().data, sentinel);
    }
}

fn resume_from_the_position_said_at_connect(place: &Place) {
    let weir = place.weir(&[]);
    weir.publish("quiet", "before");
    for channels in [&["quiet"][..], &["quiet", "never used"]] {
        let mut sse = weir.sse(channels);
        sse.wait_for_position();
        let id = sse.last_id.clone();
        sse.reset();
        weir.publish_all("quiet", ["1", "2"]);
        let mut back = weir.sse_from(channels, &id);
        assert_eq!(back.next_data(2), ["1", "2"]);
    }
}

fn resume_by_query_parameter_and_the_header_wins(place: &Place) {
    let weir = place.weir(&[]);
    let positions = weir.publish_all("news", ["1", "2", "3"]);
    let target = format!("/sse?channel=news&last_event_id={}", positions[0].cursor);

    let mut by_query = Sse::open_target(Connection::open(weir.address()), &target, &[]).expect("opened");
    assert_eq!(by_query.next_data(2), ["2", "3"]);

    // A browser reconnects to the same URL, and what it read since is in the header.
    let header = [("Last-Event-ID", positions[1].cursor.as_str())];
    let mut by_header = Sse::open_target(Connection::open(weir.address()), &target, &header).expect("opened");
    assert_eq!(by_header.next_data(1), ["3"]);
}

fn resume_with_nothing_missed_gives_nothing(place: &Place) {
    let weir = place.weir(&[]);
    let positions = weir.publish_all("news", ["1", "2"]);
    let mut back = weir.sse_from(&["news"], &positions[1].cursor);
    weir.publish("news", "3");
    assert_eq!(back.next().data, "3");
}

fn resume_from_further_behind_than_the_lag_bound_is_not_slow(place: &Place) {
    // Who comes back has a backlog at once, through no slowness of its own: only what it does not take counts.
    let weir = place.weir(&["--set", "lag.messages=50", "--set", "history.messages=1000"]);
    let numbers: Vec<String> = (1..=600).map(|number| number.to_string()).collect();
    let positions = weir.publish_all("deep", numbers.iter().map(String::as_str));
    let mut back = weir.sse_from(&["deep"], &positions[0].cursor);
    assert_eq!(back.next_data(599), numbers[1..]);
    weir.publish("deep", "live");
    assert_eq!(back.next().data, "live");
}

fn resume_from_another_epoch_announces_a_gap(place: &Place) {
    let weir = place.weir(&[]);
    let published = weir.publish("news", "1");
    let stranger = if published.epoch == "00000001" { "00000002" } else { "00000001" };
    let id = published.cursor.replace(&published.epoch, stranger);

    let mut back = weir.sse_from(&["news"], &id);

    let gap = back.next();
    assert_eq!(gap.name, "gap", "{gap:?}");
    let data: serde_json::Value = serde_json::from_str(&gap.data).expect("a gap's data is JSON");
    assert_eq!(data["channel"], "news");
    assert_eq!(data["from"]["epoch"], stranger);
    assert_eq!(data["to"]["epoch"], published.epoch.as_str());
}

fn resume_past_the_end_of_the_history_announces_a_gap(place: &Place) {
    let weir = place.weir(&["--set", "history.messages=10", "--set", "lag.messages=10"]);
    let numbers: Vec<String> = (1..=50).map(|number| number.to_string()).collect();
    let positions = weir.publish_all("short", numbers.iter().map(String::as_str));

    let mut back = weir.sse_from(&["short"], &positions[4].cursor);

    assert_eq!(back.next().name, "gap", "publication 6 is gone, and that is said before anything else");
    weir.publish("short", "51");
    // After the gap it goes on without another hole: up to what is published now.
    let mut after: Vec<u64> = Vec::new();
    while after.last() != Some(&51) {
        let event = back.next();
        assert_eq!(event.name, "message", "{event:?}");
        after.push(event.data.parse().expect("a number"));
    }
    assert!(after.windows(2).all(|pair| pair[1] == pair[0] + 1), "{after:?}");
}

fn recovery_over_websocket_gives_exactly_what_was_missed(place: &Place) {
    let weir = place.weir(&[]);
    let positions = weir.publish_all("news", ["1", "2", "3", "4"]);
    let epoch = &positions[0].epoch;
    let mut client = weir.centrifugo();

    let result = client.recover("news", epoch, 2);

    assert_eq!(result["recovered"], true, "{result}");
    assert_eq!(result["was_recovering"], true, "{result}");
    assert_eq!(result["epoch"], epoch.as_str());
    assert_eq!(result["offset"], 4);
    assert_eq!(result["publications"], json!([{ "data": 3, "offset": 3 }, { "data": 4, "offset": 4 }]));
    weir.publish("news", "5");
    assert_eq!(client.next_publication().1, json!({ "data": 5, "offset": 5 }));

    let nothing_missed = weir.centrifugo().recover("news", epoch, 5);
    assert_eq!(nothing_missed["recovered"], true, "{nothing_missed}");
    assert!(nothing_missed.get("publications").is_none_or(|list| list == &json!([])), "{nothing_missed}");
}

fn recovery_from_another_epoch_is_refused_over_websocket(place: &Place) {
    let weir = place.weir(&[]);
    let published = weir.publish("news", "1");
    let mut client = weir.centrifugo();
    let result = client.recover("news", "00000000", 0);
    assert_ne!(result["recovered"], json!(true), "{result}");
    assert_eq!(result["was_recovering"], true, "{result}");
    assert!(result.get("publications").is_none_or(|list| list == &json!([])), "never a part: {result}");
    assert_eq!((result["epoch"].as_str(), result["offset"].as_u64()), (Some(published.epoch.as_str()), Some(1)));
    weir.publish("news", "2");
    assert_eq!(client.next_publication().1["offset"], 2, "and it is subscribed from here");
}

fn idempotency_key_publishes_once(place: &Place) {
    let weir = place.weir(&[]);
    let mut sse = weir.sse(&["orders"]);
    let first = weir.publish_with("orders", "paid", &[("Idempotency-Key", "order-7")]);
    let retry = weir.publish_with("orders", "paid", &[("Idempotency-Key", "order-7")]);
    assert_eq!(retry, first, "a retry is answered with the first one's position");
    let other = weir.publish_with("orders", "sent", &[("Idempotency-Key", "order-8")]);
    assert_eq!(other.offset, first.offset + 1);
    assert_eq!(sse.next_data(2), ["paid", "sent"]);
    let elsewhere = weir.publish_with("returns", "paid", &[("Idempotency-Key", "order-7")]);
    assert_eq!(elsewhere.offset, 1, "a key counts within its channel");
}
