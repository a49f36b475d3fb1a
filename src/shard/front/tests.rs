//! The front over real sockets and on both of monoio's drivers, with a fake shard behind it.

mod harness;

use std::io::Write as _;
use std::time::Duration;

use harness::{Driver, Server, default_settings, get, post};

use crate::log::position::{ChannelTag, CursorEntry, Epoch, Position};
use crate::shard::mailbox::RequestError;
use crate::wire::websocket;

/// Runs every scenario on both drivers, so that a failure names its driver.
macro_rules! scenarios {
    ($($name:ident)*) => {
        mod uring {
            $(#[test] fn $name() { super::$name(super::Driver::Uring); })*
        }
        mod epoll {
            $(#[test] fn $name() { super::$name(super::Driver::Epoll); })*
        }
    };
}

scenarios! {
    a_payload_is_published_as_it_is
    requests_follow_each_other_on_one_connection
    a_body_arrives_in_any_form
    what_cannot_be_served_says_why_and_what_is_allowed
    an_answer_is_readable_though_the_client_still_sends
    head_and_preflight
    a_batch_has_one_result_a_publication
    a_malformed_batch_publishes_nothing
    without_a_backbone_publishers_are_told_to_come_back
    an_event_stream_is_handed_over
    an_event_stream_that_cannot_be_opened_is_refused
    a_position_that_nobody_can_look_up_now_is_answered_503
    a_websocket_is_handed_over_with_what_came_early
    a_poll_is_answered_here_or_handed_over_to_wait
    foreign_pages_are_refused
    slow_clients_are_sent_away
    health_and_metrics
}

fn a_payload_is_published_as_it_is(driver: Driver) {
    let server = Server::start(driver, default_settings());
    let mut client = server.connect();
    client.send(&post("/publish/r%C3%A4ume%2Fa", "line 1\r\nline 2 ü"));
    let reply = client.reply("POST");
    let cursor = CursorEntry { tag: ChannelTag::of("räume/a"), position: Position { epoch: Epoch(0x1f), offset: 1 } };
    assert_eq!(reply.status, 200);
    assert_eq!(
        reply.json(),
        serde_json::json!({"channel": "räume/a", "epoch": "0000001f", "offset": 1, "cursor": cursor.to_string()})
    );
    client.send("POST /publish/a HTTP/1.1\r\nHost: h\r\nIdempotency-Key: k1\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(client.reply("POST").status, 200);
    let published = server.shard.published();
    assert_eq!((&*published[0].channel, &*published[0].data), ("räume/a", "line 1\r\nline 2 ü".as_bytes()));
    assert_eq!(published[0].idempotency_key, None);
    assert_eq!((&published[1].data[..], published[1].idempotency_key.as_deref()), (&b""[..], Some("k1")));
    assert_eq!(server.metrics.publishes_ok.get(), 2);
}

fn requests_follow_each_other_on_one_connection(driver: Driver) {
    let server = Server::start(driver, default_settings());
    let mut client = server.connect();
    let pipelined = [post("/publish/a", "1"), get("/health/live"), post("/publish/a", "22"), get("/nowhere")].concat();
    client.send(&pipelined);
    assert_eq!(client.reply("POST").json()["offset"], 1);
    assert_eq!(client.reply("GET").json()["status"], "live");
    assert_eq!(client.reply("POST").json()["offset"], 2);
    assert_eq!(client.reply("GET").status, 404);
    // The connection is still good, and a byte at a time is as good as a whole request.
    for byte in get("/health/live").bytes() {
        client.send(&char::from(byte).to_string());
    }
    let reply = client.reply("GET");
    assert_eq!((reply.status, reply.head.keep_alive()), (200, true));
    client.send("GET /health/live HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    let reply = client.reply("GET");
    assert_eq!((reply.status, reply.head.keep_alive()), (200, false));
    assert!(client.is_at_end());
    let mut old = server.connect();
    old.send("GET / HTTP/1.0\r\n\r\n");
    assert!(old.reply("GET").text().contains("curl"));
    assert!(old.is_at_end());
}

fn a_body_arrives_in_any_form(driver: Driver) {
    let server = Server::start(driver, default_settings());
    let mut client = server.connect();
    let head = "POST /publish/a HTTP/1.1\r\nHost: h\r\n";
    let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\n\r\n");
    client.send(&chunked);
    assert_eq!(client.reply("POST").status, 200);
    for byte in chunked.bytes() {
        client.send(&char::from(byte).to_string());
    }
    assert_eq!(client.reply("POST").status, 200);
    client.send(&format!("{head}Content-Length: 5\r\nExpect: 100-continue\r\n\r\n"));
    assert_eq!(client.reply("POST").status, 100);
    client.send("hello");
    assert_eq!(client.reply("POST").status, 200);
    // Who does not wait is not invited.
    client.send(&format!("{head}Content-Length: 5\r\nExpect: 100-continue\r\n\r\nworld"));
    assert_eq!(client.reply("POST").status, 200);
    let largest = "x".repeat(server.settings.limits.publication_bytes);
    client.send(&post("/publish/a", &largest));
    assert_eq!(client.reply("POST").status, 200);
    let payloads: Vec<_> = server.shard.published().iter().map(|publish| publish.data.clone()).collect();
    assert_eq!(payloads, ["abcdefg", "abcdefg", "hello", "world", &largest]);
}

fn what_cannot_be_served_says_why_and_what_is_allowed(driver: Driver) {
    let server = Server::start(driver, default_settings());
    let many = (0..=server.settings.limits.channels).map(|n| format!("channel=c{n}&")).collect::<String>();
    let headers = "A: b\r\n".repeat(65);
    for (request, status, says) in [
        (get("/nowhere"), 404, "/publish/NAME"),
        (get("/publish/a"), 405, "POST"),
        (post("/sse?channel=a", ""), 405, "GET"),
        (get("/sse"), 400, "at least one channel"),
        (get("/sse?channel="), 400, "this one is empty"),
        (get("/sse?channel=a%0Ab"), 400, "U+000A"),
        (get("/sse?channel=a%zz"), 400, "%25"),
        (get("/sse?channel=a&last_event_id=xyz"), 400, "not a cursor"),
        (get("/sse?channel=a&channel=gap"), 400, "gap"),
        (get(&format!("/sse?{many}")), 400, "at most 128 channels"),
        (get("/poll"), 400, "at least one channel"),
        (get("/poll?channel=a%0Ab"), 400, "U+000A"),
        (get("/poll?channel=a&cursor=xyz"), 400, "not a cursor"),
        (get("/poll?channel=a&wait=-1"), 400, "whole number of seconds"),
        (get("/poll?channel=a&wait="), 400, "whole number of seconds"),
        (get("/poll?channel=a&wait=99999999999"), 400, "whole number of seconds"),
        (get(&format!("/poll?{many}")), 400, "at most 128 channels"),
        (post("/poll?channel=a", ""), 405, "GET"),
        (get("/connection/websocket"), 426, "Upgrade: websocket"),
        (post("/publish/", "x"), 400, "this one is empty"),
        (post("/publish/%07", "x"), 400, "U+0007"),
        (get("/%ff"), 400, "UTF-8"),
        ("GET / HTTP/1.1\r\n\r\n".into(), 400, "Host"),
        ("GET / HTTP/3.0\r\nHost: h\r\n\r\n".into(), 505, "HTTP/1.1"),
        ("nonsense\r\n\r\n".into(), 400, "first line"),
        (format!("GET / HTTP/1.1\r\nHost: h\r\n{headers}\r\n"), 431, "64 headers"),
        (format!("GET /{} HTTP/1.1\r\n", "x".repeat(17_000)), 431, "16384 bytes"),
        ("POST /publish/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n".into(), 501, "chunked"),
        ("POST /publish/a HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n".into(), 400, "differ"),
        ("POST /publish/a HTTP/1.1\r\nHost: h\r\nContent-Length: 65537\r\n\r\n".into(), 413, "65536 bytes"),
        ("POST /publish/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n".into(), 400, "hexadecimal"),
        (
            format!(
                "POST /publish/a HTTP/1.1\r\nHost: h\r\nIdempotency-Key: {}\r\nContent-Length: 0\r\n\r\n",
                "k".repeat(256)
            ),
            400,
            "255",
        ),
    ] {
        let mut client = server.connect();
        client.send(&request);
        let reply = client.reply("GET");
        assert_eq!(reply.status, status, "{request:?}");
        assert!(reply.text().contains(says), "{request:?}: {}", reply.text());
        assert!(reply.json()["error"].is_string());
    }
    let mut client = server.connect();
    client.send("POST /publish/a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\n");
    client.stream.write_all(b"a\xff\xfe").unwrap();
    let reply = client.reply("POST");
    assert_eq!(reply.status, 400);
    assert!(reply.text().contains("at byte 1"), "{}", reply.text());
    assert_eq!(server.shard.published(), []);
    assert_eq!(server.metrics.publishes_ok.get(), 0);
}

fn an_answer_is_readable_though_the_client_still_sends(driver: Driver) {
    let server = Server::start(driver, default_settings());
    let mut client = server.connect();
    let body = "x".repeat(600_000);
    client.send(&format!("POST /publish/a HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
    assert_eq!(client.reply("POST").status, 413);
    assert!(client.is_at_end());
    server.wait_for_no_connections();
}

fn head_and_preflight(driver: Driver) {
    let server = Server::start(driver, default_settings());
    let mut client = server.connect();
    client.send(&get("/metrics"));
    let whole = client.reply("GET");
    client.send(&get("/metrics").replace("GET", "HEAD"));
    let head = client.reply("HEAD");
    assert_eq!((head.status, head.text()), (200, ""));
    assert_eq!(head.head.header("content-length"), whole.head.header("content-length"));
    assert_eq!(head.head.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    client.send("OPTIONS /publish/a HTTP/1.1\r\nHost: h\r\nOrigin: https://a.example\r\nAccess-Control-Request-Method: POST\r\n\r\n");
    let preflight = client.reply("OPTIONS");
    assert_eq!((preflight.status, preflight.text()), (204, ""));
    assert_eq!(preflight.head.header("access-control-allow-origin"), Some("*"));
    assert_eq!(preflight.head.header("access-control-allow-methods"), Some("POST, OPTIONS"));
    assert!(preflight.head.headers().has_token("access-control-allow-headers", "idempotency-key"));
    client.send("OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(client.reply("OPTIONS").status, 204);
    client.send("HEAD /sse?channel=a HTTP/1.1\r\nHost: h\r\n\r\n");
    let stream = client.reply("HEAD");
    assert_eq!(stream.head.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert!(client.is_at_end());
    assert_eq!(server.shard.opened(), Vec::<Vec<String>>::new());
}

fn a_batch_has_one_result_a_publication(driver: Driver) {
    let server = Server::start(driver, default_settings());
    let mut client = server.connect();
    client.send(&post("/api/publish", r#"{"channels":["a","b"],"data":{"z":1e2, "a":[null]}}"#));
    let results = client.reply("POST").json();
    assert_eq!(results["results"].as_array().unwrap().len(), 2);
    assert_eq!((&results["results"][0]["channel"], &results["results"][0]["offset"]), (&"a".into(), &1.into()));
    assert_eq!((&results["results"][1]["channel"], &results["results"][1]["offset"]), (&"b".into(), &2.into()));
    let body = concat!(
        r#"{"publications":[{"channel":"a","data":null},{"channel":"a\nb","data":1},{"channel":"a","text":"t\u00fc"},"#,
        r#"{"channel":"b","data":"s","idempotency_key":"k"}]}"#
    );
    client.send(&post("/api/publish", body));
    let reply = client.reply("POST");
    assert_eq!(reply.status, 200);
    let results = reply.json();
    assert_eq!(results["results"][0]["offset"], 3);
    assert!(results["results"][1]["error"].as_str().unwrap().contains("U+000A"));
    assert_eq!(results["results"][1]["channel"], "a\nb");
    assert_eq!((&results["results"][2]["offset"], &results["results"][3]["offset"]), (&4.into(), &5.into()));
    let published = server.shard.published();
    let payloads: Vec<_> = published.iter().map(|publish| str::from_utf8(&publish.data).unwrap()).collect();
    // Byte for byte: neither the number nor the order of the keys was touched.
    assert_eq!(payloads, [r#"{"z":1e2, "a":[null]}"#, r#"{"z":1e2, "a":[null]}"#, "null", "tü", "\"s\""]);
    assert_eq!(published[4].idempotency_key.as_deref(), Some("k"));
    assert_eq!((server.metrics.publishes_ok.get(), server.metrics.publishes_refused.get()), (5, 1));
}

fn a_malformed_batch_publishes_nothing(driver: Driver) {
    let server = Server::start(driver, default_settings());
    let many: Vec<_> = (0..=1_000).map(|n| format!("\"c{n}\"")).collect();
    let mut client = server.connect();
    for (body, says) in [
        ("", "is a JSON object"),
        ("[\"a\"]", "is a JSON object"),
        ("{", "not a publish request"),
        (r#"{"channel":"a","data":1"#, "not a publish request"),
        (r#"{"chanel":"a","data":1}"#, "chanel"),
        (r#"{"data":1}"#, "either channel or channels"),
        (r#"{"channel":"a","channels":["b"],"data":1}"#, "either channel or channels"),
        (r#"{"channel":"a"}"#, "either data or text"),
        (r#"{"channel":"a","data":1,"text":"x"}"#, "either data or text"),
        (r#"{"publications":[{"channel":"a","data":1}],"channel":"a"}"#, "stands alone"),
        (r#"{"publications":[{"channel":"a","data":1},{"publications":[]}]}"#, "publication 1: publications cannot"),
        (r#"{"publications":[]}"#, "nothing to publish"),
        (&format!(r#"{{"channels":[{}],"data":1}}"#, many.join(",")), "at most 1000"),
    ] {
        client.send(&post("/api/publish", body));
        let reply = client.reply("POST");
        assert_eq!(reply.status, 400, "{body}");
        assert!(reply.text().contains(says), "{body}: {}", reply.text());
    }
    let large = format!(r#"{{"channel":"a","text":"{}"}}"#, "x".repeat(70_000));
    client.send(&post("/api/publish", &large));
    assert!(client.reply("POST").json()["results"][0]["error"].as_str().unwrap().contains("65536 bytes"));
    assert_eq!(server.shard.published(), []);
}

fn without_a_backbone_publishers_are_told_to_come_back(driver: Driver) {
    let server = Server::start(driver, default_settings());
    server.shard.fail_publishes(RequestError::Unavailable("connection refused".into()));
    let mut client = server.connect();
    for request in [post("/publish/a", "x"), post("/api/publish", r#"{"channel":"a","data":1}"#)] {
        client.send(&request);
        let reply = client.reply("POST");
        assert_eq!(reply.status, 503);
        assert!(reply.text().contains("connection refused"), "{}", reply.text());
        let seconds: u32 = reply.head.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=5).contains(&seconds));
    }
    assert_eq!(server.metrics.publishes_refused.get(), 2);
}

fn an_event_stream_is_handed_over(driver: Driver) {
    let server = Server::start(driver, default_settings());
    let entry =
        |name, offset| CursorEntry { tag: ChannelTag::of(name), position: Position { epoch: Epoch(7), offset } };
    let mut client = server.connect();
    client.send(&format!(
        "GET /sse?channel=b&channel=a&channel=b&last_event_id=ignored HTTP/1.1\r\nHost: h\r\nLast-Event-ID: {},{}\r\n\r\n",
        entry("a", 3),
        entry("b", 4)
    ));
    let stream = client.reply_head();
    assert_eq!(stream.status, 200);
    for (name, value) in [
        ("content-type", "text/event-stream; charset=utf-8"),
        ("cache-control", "no-store"),
        ("x-accel-buffering", "no"),
        ("connection", "close"),
        ("access-control-allow-origin", "*"),
    ] {
        assert_eq!(stream.head.header(name), Some(value), "{name}");
    }
    assert_eq!(client.rest(), "data: from the engine\n\n");
    assert_eq!(server.shard.opened(), [["b", "a"]]);
    assert_eq!(server.shard.resumed(), [entry("a", 3), entry("b", 4)]);
    let mut client = server.connect();
    client.send(&get(&format!("/sse?channel=gap&last_event_id={}", entry("gap", 9))));
    assert_eq!(client.reply_head().status, 200);
    assert_eq!(server.shard.resumed(), [entry("a", 3), entry("b", 4), entry("gap", 9)]);
    server.wait_for_no_connections();
}

fn an_event_stream_that_cannot_be_opened_is_refused(driver: Driver) {
    let server = Server::start(driver, default_settings());
    server.shard.fail_opens();
    let mut client = server.connect();
    client.send(&get("/sse?channel=a"));
    let reply = client.reply("GET");
    assert_eq!(reply.status, 503);
    assert!(reply.head.header("retry-after").is_some());
    assert!(reply.json()["error"].as_str().unwrap().contains("in time"));
    client.send(&get("/health/live"));
    assert_eq!(client.reply("GET").status, 200, "the connection is still good");
}

fn a_position_that_nobody_can_look_up_now_is_answered_503(driver: Driver) {
    let server = Server::start(driver, default_settings());
    let position = Position { epoch: Epoch(0x1f), offset: 3 };
    let entry = CursorEntry { tag: ChannelTag::of("a"), position };
    server.shard.fail_fetches(RequestError::Unavailable("away".into()));
    for target in ["/sse?channel=a&last_event_id=", "/poll?channel=a&cursor="] {
        let mut client = server.connect();
        client.send(&get(&format!("{target}{entry}")));
        let reply = client.reply("GET");
        assert_eq!(reply.status, 503, "a gap would be a guess: {target}");
        assert!(reply.head.header("retry-after").is_some());
        assert!(reply.json()["error"].as_str().unwrap().contains("away"));
    }
    assert_eq!(server.shard.fetched(), [entry; 2]);
    assert!(server.shard.resumed().is_empty() && server.shard.polled().is_empty());
}

fn a_websocket_is_handed_over_with_what_came_early(driver: Driver) {
    let server = Server::start(driver, default_settings());
    let key = "dGhlIHNhbXBsZSBub25jZQ==";
    let upgrade = |query: &str, more: &str| {
        format!(
            "GET /connection/websocket{query} HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n{more}\r\n"
        )
    };
    for (more, subprotocol) in [
        ("", None),
        ("Sec-WebSocket-Protocol: centrifuge-json\r\n", Some("centrifuge-json")),
        ("Sec-WebSocket-Protocol: centrifuge-protobuf, centrifuge-json\r\n", Some("centrifuge-json")),
        ("Sec-WebSocket-Protocol: other\r\n", None),
    ] {
        let mut client = server.connect();
        client.send(&format!("{}early", upgrade("", more)));
        let reply = client.reply_head();
        assert_eq!(reply.status, 101);
        assert_eq!(reply.head.header("sec-websocket-accept"), Some(&*websocket::accept_key(key)));
        assert_eq!(reply.head.header("sec-websocket-protocol"), subprotocol, "{more:?}");
        assert!(reply.head.headers().has_token("connection", "upgrade"));
        assert_eq!(client.rest(), "early", "the fake engine sends back what it was given");
    }
    for request in [
        upgrade("", "Sec-WebSocket-Protocol: centrifuge-protobuf\r\n"),
        upgrade("?format=protobuf", ""),
        upgrade("?cf_protocol=protobuf", ""),
    ] {
        let mut client = server.connect();
        client.send(&request);
        let reply = client.reply("GET");
        assert_eq!((reply.status, &reply.json()["allowed"][1]), (400, &"centrifuge-json".into()));
    }
    let mut client = server.connect();
    client.send(&upgrade("", "").replace("Version: 13", "Version: 8"));
    let reply = client.reply("GET");
    assert_eq!((reply.status, reply.head.header("sec-websocket-version")), (426, Some("13")));
    client.send(&upgrade("", "").replace(key, "short"));
    assert_eq!(client.reply("GET").status, 400);
    client.send(&upgrade("", "").replace("HTTP/1.1", "HTTP/1.0"));
    assert_eq!(client.reply("GET").status, 400);
}

fn a_poll_is_answered_here_or_handed_over_to_wait(driver: Driver) {
    let server = Server::start(driver, default_settings());
    let entry =
        |name, offset| CursorEntry { tag: ChannelTag::of(name), position: Position { epoch: Epoch(7), offset } };
    let mut client = server.connect();
    client.send(&get("/poll?channel=b&channel=a&channel=b"));
    let reply = client.reply("GET");
    assert_eq!((reply.status, reply.text(), reply.head.keep_alive()), (200, r#"{"news":true}"#, true));
    for (name, value) in [
        ("content-type", "application/json"),
        ("etag", "\"true\""),
        ("cache-control", "public, max-age=1"),
        ("access-control-allow-origin", "*"),
        ("access-control-expose-headers", "ETag"),
    ] {
        assert_eq!(reply.head.header(name), Some(value), "{name}");
    }
    assert_eq!(reply.head.header("vary"), None);
    // A wait that finds something, and every HEAD, is answered at once on the same connection.
    client.send(&get(&format!("/poll?channel=a&cursor={}&wait=9", entry("a", 0))));
    assert_eq!(client.reply("GET").json()["news"], true);
    client.send(&get(&format!("/poll?channel=a&cursor={}&wait=9", entry("a", 5))).replace("GET", "HEAD"));
    let head = client.reply("HEAD");
    assert_eq!((head.status, head.head.header("content-length"), head.text()), (200, Some("14"), ""));
    let again = get(&format!("/poll?channel=a&cursor={}", entry("a", 5)));
    client.send(&again.replace("\r\n\r\n", "\r\nIf-None-Match: \"x\"\r\nIf-None-Match: \"false\"\r\n\r\n"));
    let unchanged = client.reply("GET");
    assert_eq!((unchanged.status, unchanged.head.header("etag"), unchanged.text()), (304, Some("\"false\""), ""));
    assert_eq!(server.metrics.deliveries.get(), 2);
    assert_eq!(server.shard.waiting(), []);

    client.send(&get(&format!("/poll?channel=a&cursor={}&wait=9&unknown=x", entry("a", 5))));
    assert_eq!(client.reply("GET").text(), "\"later\"");
    assert!(client.is_at_end());
    let mut client = server.connect();
    client.send(&get(&format!("/poll?channel=a&cursor={}&wait=9999", entry("a", 5))));
    assert_eq!(client.reply("GET").status, 200);
    let waits: Vec<u64> = server.shard.waiting().iter().map(|poll| poll.wait.as_secs()).collect();
    assert_eq!(waits, [9, 25], "as asked, and cut to the longest");
    assert_eq!(server.shard.waiting()[0].cursor, [entry("a", 5)]);
    assert_eq!(server.shard.opened()[0], ["b", "a"]);
    assert_eq!(server.shard.polled().len(), 5);

    server.shard.fail_opens();
    let mut client = server.connect();
    client.send(&get("/poll?channel=a"));
    let reply = client.reply("GET");
    assert_eq!(reply.status, 503);
    assert!(reply.head.header("retry-after").is_some());
    drop(client);
    server.wait_for_no_connections();
}

fn foreign_pages_are_refused(driver: Driver) {
    let mut settings = default_settings();
    settings.allow_origins = vec!["https://a.example".into()];
    let server = Server::start(driver, settings);
    let mut client = server.connect();
    let from = |request: String, origin: &str| request.replacen("\r\n", &format!("\r\nOrigin: {origin}\r\n"), 1);
    client.send(&from(post("/publish/a", "x"), "https://a.example"));
    let reply = client.reply("POST");
    assert_eq!((reply.status, reply.head.header("access-control-allow-origin")), (200, Some("https://a.example")));
    for request in [
        post("/publish/a", "x"),
        post("/api/publish", "{}"),
        get("/sse?channel=a"),
        get("/poll?channel=a"),
        get("/connection/websocket"),
    ] {
        client.send(&from(request, "https://evil.example"));
        let reply = client.reply("GET");
        assert_eq!((reply.status, &reply.json()["allowed"]), (403, &serde_json::json!(["https://a.example"])));
        assert_eq!(reply.head.header("access-control-allow-origin"), None);
    }
    client.send(&from(get("/health/live"), "https://evil.example"));
    assert_eq!(client.reply("GET").status, 200);
    assert_eq!(server.shard.published().len(), 1);
}

fn slow_clients_are_sent_away(driver: Driver) {
    let mut settings = default_settings();
    settings.limits.head_time = Duration::from_millis(150);
    settings.limits.body_time = Duration::from_millis(150);
    settings.limits.keep_alive = Duration::from_millis(150);
    let server = Server::start(driver, settings);
    let mut silent = server.connect();
    let mut half_head = server.connect();
    half_head.send("GET / HTTP/1.1\r\nHo");
    let mut half_body = server.connect();
    half_body.send("POST /publish/a HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nabc");
    let mut idle = server.connect();
    idle.send(&get("/health/live"));
    assert_eq!(idle.reply("GET").status, 200);
    assert!(silent.is_at_end(), "nobody asked for anything: nothing is answered");
    assert!(half_head.reply("GET").json()["error"].as_str().unwrap().contains("head took longer"));
    assert!(half_body.reply("POST").json()["error"].as_str().unwrap().contains("body took longer"));
    assert!(half_head.is_at_end() && half_body.is_at_end() && idle.is_at_end());
    drop((half_head, half_body));
    server.wait_for_no_connections();
    assert_eq!(server.metrics.accepted.get(), 4);
    assert_eq!(server.shard.published(), []);
}

fn health_and_metrics(driver: Driver) {
    let server = Server::start(driver, default_settings());
    let mut client = server.connect();
    client.send(&get("/health/ready"));
    assert_eq!(client.reply("GET").json()["status"], "ready");
    server.shard.set_unready("the backbone is away");
    client.send(&get("/health/ready"));
    let reply = client.reply("GET");
    assert_eq!((reply.status, &reply.json()["error"]), (503, &"not ready: the backbone is away".into()));
    client.send(&get("/health/live"));
    assert_eq!(client.reply("GET").status, 200);
    client.send(&get("/metrics"));
    assert_eq!(client.reply("GET").text(), "weir_test 1\n");
    client.send(&get("/"));
    assert!(client.reply("GET").text().contains("curl -N 'http://h/sse?channel=news'"));
    let classes: Vec<_> = server.metrics.http_requests.iter().map(crate::metrics::Counter::get).collect();
    assert_eq!(classes, [0, 4, 0, 0, 1]);
}
