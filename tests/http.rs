//! Ordinary HTTP: connections that are kept, pipelined, cut into pieces, and the routes' answers.

use serde_json::json;

use crate::harness::{Driver, Http, Weir, request};

scenarios! {
    each_driver: [
        kept_connection_serves_many_requests,
        pipelined_requests_are_answered_in_order,
        request_in_single_bytes,
        expect_continue_is_answered_before_the_body,
        chunked_body_is_decoded,
        connection_close_and_http_1_0_end_the_connection,
        idle_kept_connection_is_closed,
        head_answers_like_get_without_a_body,
        preflight_allows_what_a_browser_asks,
        cross_origin_rules_are_applied,
        health_and_metrics_and_start_page,
        publish_api_takes_every_form,
        batch_reports_each_publication_by_itself,
    ],
}

fn kept_connection_serves_many_requests(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut http = Http::open(weir.address());
    for offset in 1..=20 {
        let reply = http.send("POST", "/publish/kept", &[], b"x").expect(200).json();
        assert_eq!(reply["offset"], offset);
        http.send("GET", "/health/live", &[], b"").expect(200);
        http.send("GET", "/no/such/path", &[], b"").expect(404);
    }
}

fn pipelined_requests_are_answered_in_order(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut http = Http::open(weir.address());
    let mut bytes = Vec::new();
    for number in 0..50 {
        bytes.extend(request("POST", "/publish/piped", &[], format!("body {number}").as_bytes()));
        bytes.extend(request("GET", if number % 2 == 0 { "/health/live" } else { "/nowhere" }, &[], b""));
    }
    http.connection.write(&bytes);
    for number in 0..50 {
        assert_eq!(http.read(false).expect(200).json()["offset"], number + 1);
        http.read(false).expect(if number % 2 == 0 { 200 } else { 404 });
    }
}

fn request_in_single_bytes(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut sse = weir.sse(&["slow"]);
    let mut http = Http::open(weir.address());
    for byte in request("POST", "/publish/slow", &[("X-Padding", "yes")], b"in pieces") {
        http.connection.write(&[byte]);
    }
    http.read(false).expect(200);
    assert_eq!(sse.next().data, "in pieces");
}

fn expect_continue_is_answered_before_the_body(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut sse = weir.sse(&["asked"]);
    let mut http = Http::open(weir.address());
    let head = "POST /publish/asked HTTP/1.1\r\nHost: node\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n";
    http.connection.write(head.as_bytes());
    // Without the interim response this client would wait for it, and the node for the body.
    assert_eq!(http.read(false).status, 100);
    http.connection.write(b"hello");
    http.read(false).expect(200);
    assert_eq!(sse.next().data, "hello");

    // What will be refused is refused before the body is sent.
    let head = "POST /publish/asked HTTP/1.1\r\nHost: node\r\nContent-Length: 9999999\r\nExpect: 100-continue\r\n\r\n";
    http.connection.write(head.as_bytes());
    http.read(false).expect(413);
}

fn chunked_body_is_decoded(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut sse = weir.sse(&["chunked"]);
    let mut http = Http::open(weir.address());
    let head = b"POST /publish/chunked HTTP/1.1\r\nHost: node\r\nTransfer-Encoding: chunked\r\n\r\n";
    http.connection.write(head);
    for piece in ["5\r\nhello\r\n", "6;name=value\r\n world\r\n", "0\r\nTrailer: x\r\n", "\r\n"] {
        http.connection.write(piece.as_bytes());
    }
    http.read(false).expect(200);
    assert_eq!(sse.next().data, "hello world");
    http.send("GET", "/health/live", &[], b"").expect(200);
}

fn connection_close_and_http_1_0_end_the_connection(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut http = Http::open(weir.address());
    http.send("GET", "/health/live", &[("Connection", "close")], b"").expect(200);
    assert!(!http.connection.fill(), "ended after Connection: close");

    let mut http = Http::open(weir.address());
    http.connection.write(b"GET /health/live HTTP/1.0\r\n\r\n");
    http.read(false).expect(200);
    assert!(!http.connection.fill(), "ended after an HTTP/1.0 request");

    let mut http = Http::open(weir.address());
    http.connection.write(&request("GET", "/health/live", &[], b""));
    http.connection.end_writing();
    http.read(false).expect(200);
    assert!(!http.connection.fill(), "ended after the client said that it has no more requests");
}

fn idle_kept_connection_is_closed(driver: Driver) {
    let weir = Weir::start(driver, &["--set", "limits.keep_alive=300ms"]);
    let mut http = Http::open(weir.address());
    http.send("GET", "/health/live", &[], b"").expect(200);
    assert!(!http.connection.fill(), "the node ends it");
    let mut sse = weir.sse(&["stream"]);
    std::thread::sleep(std::time::Duration::from_millis(600));
    weir.publish("stream", "1");
    assert_eq!(sse.next().data, "1", "a stream is not an idle connection");
}

fn head_answers_like_get_without_a_body(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut http = Http::open(weir.address());
    for target in ["/", "/health/live", "/health/ready", "/metrics"] {
        let get = http.send("GET", target, &[], b"").expect(200);
        let head = http.send("HEAD", target, &[], b"").expect(200);
        assert_eq!(head.header("content-type"), get.header("content-type"), "{target}");
        assert!(head.header("content-length").is_some(), "{target}: {head:?}");
    }
    http.send("HEAD", "/nowhere", &[], b"").expect(404);
    // Had a body followed, it would now be read as the head of this response.
    http.send("GET", "/health/live", &[], b"").expect(200);
}

fn preflight_allows_what_a_browser_asks(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut http = Http::open(weir.address());
    let asked = [
        ("Origin", "https://app.example"),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "content-type, idempotency-key"),
    ];
    let reply = http.send("OPTIONS", "/publish/news", &asked, b"");
    assert!(matches!(reply.status, 200 | 204), "{reply:?}");
    assert!(matches!(reply.header("access-control-allow-origin"), Some("*" | "https://app.example")), "{reply:?}");
    let allows = |name: &str, value: &str| {
        let header = reply.header(name).unwrap_or_default().to_ascii_lowercase();
        assert!(header.split(',').any(|part| matches!(part.trim(), "*") || part.trim() == value), "{name}: {reply:?}");
    };
    allows("access-control-allow-methods", "post");
    allows("access-control-allow-headers", "content-type");
    allows("access-control-allow-headers", "idempotency-key");
}

fn cross_origin_rules_are_applied(driver: Driver) {
    let weir = Weir::start(driver, &["--set", "allow_origins=https://app.example"]);
    let mut http = Http::open(weir.address());
    let allowed = http.send("GET", "/health/live", &[("Origin", "https://app.example")], b"").expect(200);
    assert_eq!(allowed.header("access-control-allow-origin"), Some("https://app.example"));
    let stranger = http.send("GET", "/health/live", &[("Origin", "https://evil.example")], b"");
    assert_eq!(stranger.header("access-control-allow-origin"), None, "{stranger:?}");

    // Browsers do not apply those headers to WebSockets, so the node refuses by itself.
    let upgrade = |origin| {
        let connection = crate::harness::Connection::open(weir.address());
        crate::harness::WebSocket::open_on(connection, &[("Origin", origin)])
    };
    assert!(upgrade("https://app.example").is_ok());
    assert_eq!(upgrade("https://evil.example").err().expect("refused").status, 403);
}

fn health_and_metrics_and_start_page(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    weir.get("/health/live").expect(200);
    weir.get("/health/ready").expect(200);
    let page = weir.get("/").expect(200);
    assert!(page.text().contains("/sse?channel="), "the start page shows how to begin: {}", page.text());
    let metrics = weir.get("/metrics").expect(200);
    assert!(metrics.header("content-type").is_some_and(|value| value.starts_with("text/plain")), "{metrics:?}");
    let before = weir.metrics().sum("weir_publishes_total", "result=\"ok\"");
    weir.publish("counted", "x");
    assert_eq!(weir.metrics().sum("weir_publishes_total", "result=\"ok\""), before + 1.0);
}

fn publish_api_takes_every_form(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut sse = weir.sse(&["a", "b"]);
    let mut http = Http::open(weir.address());
    let mut send = |body: serde_json::Value| {
        let headers = [("Content-Type", "application/json")];
        let reply = http.send("POST", "/api/publish", &headers, body.to_string().as_bytes()).expect(200).json();
        reply["results"].as_array().unwrap_or_else(|| panic!("no results: {reply}")).clone()
    };

    assert_eq!(send(json!({ "channel": "a", "data": { "n": [1, null] } }))[0]["offset"], 1);
    assert_eq!(sse.next().data, r#"{"n":[1,null]}"#);
    send(json!({ "channel": "a", "data": "a string" }));
    assert_eq!(sse.next().data, r#""a string""#, "data is JSON");
    send(json!({ "channel": "a", "text": "a text\nof two lines" }));
    assert_eq!(sse.next().data, "a text\nof two lines", "text is as it is");

    let results = send(json!({ "channels": ["a", "b"], "data": 7 }));
    assert_eq!((results[0]["channel"].as_str(), results[1]["channel"].as_str()), (Some("a"), Some("b")));
    let mut got = [sse.next(), sse.next()].map(|event| (event.name, event.data));
    got.sort();
    assert_eq!(got, [("a".into(), "7".into()), ("b".into(), "7".into())]);

    let batch = json!({ "publications": [{ "channel": "b", "data": 1 }, { "channel": "b", "text": "2" }] });
    let results = send(batch);
    assert_eq!((results[0]["offset"].as_u64(), results[1]["offset"].as_u64()), (Some(2), Some(3)));
    assert_eq!(sse.next_data(2), ["1", "2"]);
}

fn batch_reports_each_publication_by_itself(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let body = json!({ "publications": [
        { "channel": "good", "data": 1 },
        { "channel": "bad\nname", "data": 2 },
        { "channel": "good", "data": 3 },
    ] });
    let reply = weir.post("/api/publish", &[], body.to_string().as_bytes()).expect(200).json();
    assert_eq!(reply["results"][0]["offset"], 1);
    assert!(reply["results"][1]["error"].as_str().is_some_and(|text| text.contains("control")), "{reply}");
    assert_eq!(reply["results"][2]["offset"], 2);

    for body in [&b"{"[..], b"[]", b"{\"data\":1}", b"{\"channel\":\"a\"}", b"{\"channel\":1,\"data\":1}", b"\xff"] {
        let refused = weir.post("/api/publish", &[], body).expect(400);
        assert!(refused.json()["error"].is_string(), "{refused:?}");
    }
}
