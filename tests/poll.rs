//! Polling: the same positions as streams, answers that caches may share, and waits that cost no more than a stream.

use serde_json::{Value, json};

use crate::harness::{
    Connection, Driver, Http, Place, Response, Sse, Weir, eventually, percent_encode, request, target as sse_target,
};

scenarios! {
    each_driver: [
        wait_that_ends_with_nothing_gives_the_same_cursor,
        unchanged_answer_is_not_sent_again,
        thousand_waiting_polls_cost_no_task_and_all_get_the_publication,
        client_that_vanishes_while_waiting_leaves_nothing,
        answer_to_a_reader_with_a_narrow_line_arrives_whole,
        sigterm_sends_waiting_polls_away_with_a_time_to_come_back,
        full_node_says_when_to_come_back,
        abusive_requests_are_refused,
        page_of_a_listed_origin_may_read_answers_and_refusals,
    ],
    each_backbone: [
        first_poll_gives_a_position_to_start_from,
        poll_gives_exactly_what_is_new,
        cut_answers_lead_to_the_end,
        waiting_poll_is_woken_by_a_publication_on_any_channel,
        cursors_of_streams_and_polls_are_the_same,
        position_of_another_epoch_is_answered_with_a_gap,
        position_past_the_end_of_the_history_is_answered_with_a_gap,
    ],
}

/// The request target of a poll; an empty cursor is left out.
fn target(channels: &[&str], cursor: &str, more: &str) -> String {
    let mut query: Vec<String> = channels.iter().map(|name| format!("channel={}", percent_encode(name))).collect();
    if !cursor.is_empty() {
        query.push(format!("cursor={cursor}"));
    }
    format!("/poll?{}{more}", query.join("&"))
}

#[track_caller]
fn poll(weir: &Weir, channels: &[&str], cursor: &str) -> Value {
    weir.get(&target(channels, cursor, "")).expect(200).json()
}

#[track_caller]
fn cursor_of(answer: &Value) -> String {
    answer["cursor"].as_str().unwrap_or_else(|| panic!("no cursor: {answer}")).to_owned()
}

/// Sends a poll that waits.
fn begin(weir: &Weir, channels: &[&str], cursor: &str, headers: &[(&str, &str)]) -> Http {
    let mut http = Http::open(weir.address());
    http.connection.write(&request("GET", &target(channels, cursor, "&wait=25"), headers, b""));
    http
}

fn waiting(weir: &Weir) -> f64 {
    weir.metrics().sum("weir_connections", "protocol=\"poll\"")
}

#[track_caller]
fn wait_for_waiting(weir: &Weir, count: f64) {
    eventually("the polls wait", || (waiting(weir) == count).then_some(()));
}

/// The answer to a poll that waited: it is the last thing on its connection.
#[track_caller]
fn end(mut http: Http) -> Response {
    let response = http.read(false);
    assert_eq!(response.header("connection"), Some("close"));
    assert!(!http.connection.fill(), "more than one answer");
    response
}

fn first_poll_gives_a_position_to_start_from(place: &Place) {
    let weir = place.weir(&[]);
    weir.publish("news", "before");
    let published = weir.publish("news", "and this");

    let answer = poll(&weir, &["news", "unused"], "");

    let news = &answer["channels"]["news"];
    assert_eq!(news, &json!({ "epoch": published.epoch, "offset": 2, "publications": [] }));
    assert_eq!(answer["channels"]["unused"]["offset"], 0);
    assert_eq!(answer["more"], false);
    assert!(cursor_of(&answer).starts_with(&format!("{},", published.cursor)), "{answer}");
    // Where a channel is that the cursor does not name is said at once, also to a reader that would wait.
    let wider = weir.get(&target(&["news", "other"], &published.cursor, "&wait=25")).expect(200).json();
    assert!(wider["channels"]["other"]["epoch"].is_string(), "{wider}");
}

fn poll_gives_exactly_what_is_new(place: &Place) {
    let weir = place.weir(&[]);
    let start = cursor_of(&poll(&weir, &["a", "b"], ""));
    weir.publish("a", r#"{"n": 1}"#);
    weir.publish("b", "text");
    weir.publish("a", "3");

    let answer = poll(&weir, &["a", "b"], &start);

    let expected = [
        json!([{ "data": { "n": 1 }, "offset": 1 }, { "data": 3, "offset": 2 }]),
        json!([{ "data": "text", "offset": 1 }]),
    ];
    for (channel, publications) in ["a", "b"].into_iter().zip(expected) {
        assert_eq!(answer["channels"][channel]["publications"], publications, "{answer}");
        assert_eq!(answer["channels"][channel].get("gap"), None);
    }
    let next = cursor_of(&answer);
    let nothing = poll(&weir, &["a", "b"], &next);
    assert_eq!((cursor_of(&nothing), &nothing["channels"]["a"]["publications"]), (next.clone(), &json!([])));
    weir.publish("b", "5");
    let last = poll(&weir, &["a", "b"], &next);
    assert_eq!(last["channels"]["b"]["publications"], json!([{ "data": 5, "offset": 2 }]));
    // An old cursor gives the same publications for as long as they are kept.
    let again = poll(&weir, &["a"], start.split(',').next().expect("an entry"));
    assert_eq!(again["channels"]["a"]["publications"], answer["channels"]["a"]["publications"]);
}

fn cut_answers_lead_to_the_end(place: &Place) {
    let weir = place.weir(&[]);
    let mut cursor = cursor_of(&poll(&weir, &["deep"], ""));
    let numbers: Vec<String> = (1..=600).map(|number| number.to_string()).collect();
    weir.publish_all("deep", numbers.iter().map(String::as_str));
    let mut got: Vec<u64> = Vec::new();
    let mut polls = 0;
    loop {
        let answer = poll(&weir, &["deep"], &cursor);
        let publications = answer["channels"]["deep"]["publications"].as_array().expect("a list");
        assert!(publications.len() <= 256, "bounded: {}", publications.len());
        got.extend(publications.iter().map(|publication| publication["data"].as_u64().expect("a number")));
        cursor = cursor_of(&answer);
        polls += 1;
        if answer["more"] == false {
            break;
        }
    }
    assert_eq!(got, (1..=600).collect::<Vec<u64>>());
    assert_eq!(polls, 3);
    assert!(weir.metrics().sum("weir_deliveries_total", "") >= 600.0);
}

fn waiting_poll_is_woken_by_a_publication_on_any_channel(place: &Place) {
    let weir = place.weir(&[]);
    let channels = ["a", "b", "c"];
    let mut cursor = cursor_of(&poll(&weir, &channels, ""));
    for (channel, data) in [("b", "1"), ("a", "2"), ("c", "3"), ("b", "4")] {
        let http = begin(&weir, &channels, &cursor, &[]);
        wait_for_waiting(&weir, 1.0);
        weir.publish(channel, data);

        let response = end(http).expect(200);

        assert_eq!(response.header("cache-control"), Some("public, max-age=1"));
        let answer = response.json();
        for name in channels {
            let publications = answer["channels"][name]["publications"].as_array().expect("a list");
            let data: Vec<String> = publications.iter().map(|publication| publication["data"].to_string()).collect();
            assert_eq!(data, if name == channel { vec![data[0].clone()] } else { vec![] }, "{answer}");
        }
        assert_eq!(answer["channels"][channel]["publications"][0]["data"].to_string(), data);
        cursor = cursor_of(&answer);
    }
    wait_for_waiting(&weir, 0.0);
}

fn wait_that_ends_with_nothing_gives_the_same_cursor(driver: Driver) {
    let weir = Weir::start(driver, &["--set", "poll.wait=1s"]);
    let cursor = cursor_of(&poll(&weir, &["quiet"], ""));
    let begun = std::time::Instant::now();
    let response = end(begin(&weir, &["quiet"], &cursor, &[])).expect(200);
    assert!(begun.elapsed() >= std::time::Duration::from_millis(900), "it waited: {:?}", begun.elapsed());
    assert_eq!(response.header("cache-control"), Some("no-store"), "or a cache would answer the next wait with it");
    let answer = response.json();
    assert_eq!((cursor_of(&answer), &answer["channels"]["quiet"]["publications"]), (cursor, &json!([])));
}

fn cursors_of_streams_and_polls_are_the_same(place: &Place) {
    let weir = place.weir(&[]);
    for channels in [&["a"][..], &["a", "b"]] {
        let mut sse = weir.sse(channels);
        sse.wait_for_position();
        weir.publish("a", "1");
        sse.next();
        let id = sse.last_id.clone();
        sse.reset();
        let published = weir.publish("a", "2");

        let answer = poll(&weir, channels, &id);

        assert_eq!(answer["channels"]["a"]["publications"], json!([{ "data": 2, "offset": published.offset }]));
        weir.publish("a", "3");
        let mut back = weir.sse_from(channels, &cursor_of(&answer));
        assert_eq!(back.next().data, "3");
        assert_eq!(poll(&weir, &["a"], &published.cursor)["channels"]["a"]["publications"][0]["data"], 3);
    }
}

fn unchanged_answer_is_not_sent_again(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let cursor = cursor_of(&poll(&weir, &["news"], ""));
    let mut http = Http::open(weir.address());
    let target = target(&["news"], &cursor, "");
    let first = http.send("GET", &target, &[], b"").expect(200);
    assert_eq!(first.header("cache-control"), Some("public, max-age=1"));
    let tag = first.header("etag").expect("a tag").to_owned();

    let same = http.send("GET", &target, &[("If-None-Match", &tag)], b"").expect(304);
    assert_eq!((same.header("etag"), same.header("cache-control")), (Some(&*tag), first.header("cache-control")));
    let weak = format!("\"other\", W/{tag}");
    http.send("GET", &target, &[("If-None-Match", &weak)], b"").expect(304);
    let head = http.send("HEAD", &target, &[], b"").expect(200);
    assert_eq!(head.header("content-length"), Some(first.body.len().to_string()).as_deref());

    weir.publish("news", "1");
    let changed = http.send("GET", &target, &[("If-None-Match", &tag)], b"").expect(200);
    assert_ne!(changed.header("etag"), Some(&*tag));
    assert_eq!(changed.json()["channels"]["news"]["publications"][0]["data"], 1);
}

fn position_of_another_epoch_is_answered_with_a_gap(place: &Place) {
    let weir = place.weir(&[]);
    let published = weir.publish("news", "1");
    let stranger = if published.epoch == "00000001" { "00000002" } else { "00000001" };
    let cursor = published.cursor.replace(&published.epoch, stranger);

    // At once, also when it would wait.
    let answer = weir.get(&target(&["news"], &cursor, "&wait=25")).expect(200).json();

    let news = &answer["channels"]["news"];
    assert_eq!(news["gap"]["from"], json!({ "epoch": stranger, "offset": 1 }));
    assert_eq!(news["gap"]["to"]["epoch"], published.epoch.as_str());
    assert_eq!(cursor_of(&answer), published.cursor, "and the next poll goes on from there");
    assert_eq!(poll(&weir, &["news"], &published.cursor)["channels"]["news"].get("gap"), None);
}

fn position_past_the_end_of_the_history_is_answered_with_a_gap(place: &Place) {
    let weir = place.weir(&["--set", "history.messages=10", "--set", "lag.messages=10"]);
    let numbers: Vec<String> = (1..=50).map(|number| number.to_string()).collect();
    let positions = weir.publish_all("short", numbers.iter().map(String::as_str));

    let answer = poll(&weir, &["short"], &positions[4].cursor);

    let short = &answer["channels"]["short"];
    assert_eq!(short["gap"]["from"], json!({ "epoch": positions[0].epoch, "offset": 5 }));
    let first = short["gap"]["to"]["offset"].as_u64().expect("an offset") + 1;
    assert!(first > 6, "{answer}");
    let publications = short["publications"].as_array().expect("a list");
    let offsets: Vec<u64> = publications.iter().map(|publication| publication["offset"].as_u64().unwrap()).collect();
    assert_eq!(offsets, (first..=50).collect::<Vec<u64>>(), "what is left follows the gap without another hole");
    assert_eq!(cursor_of(&answer), positions[49].cursor);
}

fn thousand_waiting_polls_cost_no_task_and_all_get_the_publication(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let cursor = cursor_of(&poll(&weir, &["crowd"], ""));
    let polls: Vec<Http> = (0..1_000).map(|_| begin(&weir, &["crowd"], &cursor, &[])).collect();
    wait_for_waiting(&weir, 1_000.0);
    let during = weir.metrics();
    // A connection with a task is counted as http: here only that of the scrape itself.
    assert!(during.sum("weir_connections", "protocol=\"http\"") < 10.0);
    assert_eq!(during.sum("weir_subscriptions", ""), 1_000.0);

    weir.publish("crowd", "\"all of you\"");

    for http in polls {
        let answer = end(http).expect(200).json();
        assert_eq!(answer["channels"]["crowd"]["publications"], json!([{ "data": "all of you", "offset": 1 }]));
    }
    wait_for_waiting(&weir, 0.0);
    let after = weir.metrics();
    assert_eq!(after.sum("weir_deliveries_total", ""), 1_000.0);
    assert_eq!(after.sum("weir_disconnects_total", "reason=\"answered\""), 1_000.0);
    assert_eq!(after.sum("weir_subscriptions", ""), 0.0);
}

fn client_that_vanishes_while_waiting_leaves_nothing(driver: Driver) {
    let weir = Weir::start(driver, &["--set", "linger=0s"]);
    let cursor = cursor_of(&poll(&weir, &["a", "b"], ""));
    let polls: Vec<Http> = (0..20).map(|_| begin(&weir, &["a", "b"], &cursor, &[])).collect();
    wait_for_waiting(&weir, 20.0);
    polls.into_iter().enumerate().for_each(|(number, http)| {
        if number % 2 == 0 {
            http.connection.reset();
        }
    });
    eventually("everything is given back", || {
        let samples = weir.metrics();
        let held = ["weir_subscriptions", "weir_channels", "weir_backbone_channels"].map(|name| samples.sum(name, ""));
        (samples.sum("weir_connections", "protocol=\"poll\"") == 0.0 && held == [0.0; 3]).then_some(())
    });
    assert_eq!(weir.metrics().sum("weir_disconnects_total", "reason=\"client_gone\""), 20.0);
}

fn answer_to_a_reader_with_a_narrow_line_arrives_whole(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let cursor = cursor_of(&poll(&weir, &["bulk"], ""));
    let text = "x".repeat(60_000);
    let mut http = Http { connection: Connection::open_with_receive_buffer(weir.address(), 4096) };
    http.connection.write(&request("GET", &target(&["bulk"], &cursor, "&wait=25"), &[], b""));
    wait_for_waiting(&weir, 1.0);
    weir.publish_all("bulk", [&*text, &*text, &*text, &*text]);
    let answer = end(http).expect(200).json();
    let publications = answer["channels"]["bulk"]["publications"].as_array().expect("a list");
    assert!(!publications.is_empty() && publications.iter().all(|publication| publication["data"] == *text));
}

fn sigterm_sends_waiting_polls_away_with_a_time_to_come_back(driver: Driver) {
    let mut weir = Weir::start(driver, &[]);
    let cursor = cursor_of(&poll(&weir, &["news"], ""));
    let polls: Vec<Http> = (0..30).map(|_| begin(&weir, &["news"], &cursor, &[])).collect();
    wait_for_waiting(&weir, 30.0);
    weir.signal(libc::SIGTERM);
    let mut delays: Vec<u32> = Vec::new();
    for http in polls {
        let response = end(http).expect(503);
        assert_eq!(response.json()["error"], "shutdown");
        delays.push(response.header("retry-after").and_then(|value| value.parse().ok()).expect("a number of seconds"));
    }
    assert!(delays.iter().all(|delay| (1..=5).contains(delay)), "{delays:?}");
    assert!(delays.iter().any(|delay| *delay != delays[0]), "not all at once: {delays:?}");
    assert_eq!(weir.wait_end().code(), Some(0));
}

fn full_node_says_when_to_come_back(driver: Driver) {
    let weir = Weir::start(driver, &["--set", "max_connections=2"]);
    let mut streams: Vec<Sse> = Vec::new();
    eventually("both shards are full", || {
        // The kernel chooses the shard: one that is full refuses.
        streams.extend(Sse::open_target(Connection::open(weir.address()), &sse_target(&["news"]), &[]));
        (streams.len() == 2).then_some(())
    });
    let refused = weir.get("/poll?channel=news").expect(503);
    assert!(refused.header("retry-after").is_some(), "{refused:?}");
    assert_eq!(refused.header("cache-control"), Some("no-store"));
}

fn abusive_requests_are_refused(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let many: Vec<String> = (0..129).map(|number| format!("channel=c{number}")).collect();
    let entries = vec!["00000001.00000001.1"; 129].join(",");
    for query in [
        "".to_owned(),
        "channel=".to_owned(),
        "channel=a%00".to_owned(),
        many.join("&"),
        format!("channel=a&cursor={entries}"),
        "channel=a&cursor=1".to_owned(),
        "channel=a&cursor=00000001.00000001.99999999999999999999".to_owned(),
        "channel=a&wait=forever".to_owned(),
        "channel=a&wait=1e9".to_owned(),
    ] {
        let refused = weir.get(&format!("/poll?{query}")).expect(400);
        assert!(refused.json()["error"].is_string(), "{query}");
        assert_eq!(refused.header("cache-control"), Some("no-store"), "{query}");
    }
    // The longest position there is, in an epoch that is not this one's: a gap, and no harm.
    let far = format!("{}.00000001.{}", &cursor_of(&poll(&weir, &["a"], ""))[..8], u64::MAX);
    assert_eq!(poll(&weir, &["a"], &far)["channels"]["a"]["gap"]["from"]["offset"], u64::MAX);
}

fn page_of_a_listed_origin_may_read_answers_and_refusals(driver: Driver) {
    let mut weir = Weir::start(driver, &["--set", "allow_origins=https://app.example"]);
    let page = [("Origin", "https://app.example")];
    let mut http = Http::open(weir.address());
    let plain = http.send("GET", "/poll?channel=news", &[], b"").expect(200);
    assert_eq!((plain.header("vary"), plain.header("access-control-allow-origin")), (Some("Origin"), None));
    let answer = http.send("GET", "/poll?channel=news", &page, b"").expect(200);
    http.send("GET", "/poll?channel=news", &[("Origin", "https://evil.example")], b"").expect(403);
    let waits = begin(&weir, &["news"], &cursor_of(&answer.json()), &page);
    wait_for_waiting(&weir, 1.0);
    weir.signal(libc::SIGTERM);
    for response in [answer, end(waits).expect(503)] {
        assert_eq!(response.header("vary"), Some("Origin"));
        assert_eq!(response.header("access-control-allow-origin"), Some("https://app.example"));
    }
    drop(http);
    assert_eq!(weir.wait_end().code(), Some(0));
}
