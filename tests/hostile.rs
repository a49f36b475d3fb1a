//! Malformed and excessive input: each gets its own answer, and nobody else notices.

use serde_json::json;

use crate::harness::{
    Centrifugo, Connection, Driver, Http, Opcode, Response, Sse, WebSocket, Weir, push_frame, request,
};

scenarios! {
    each_driver: [
        malformed_request_heads,
        unknown_routes_and_methods_name_what_there_is,
        bad_channels_and_cursors,
        bad_bodies,
        half_request_is_timed_out,
        bad_websocket_handshakes,
        bad_websocket_frames,
        bad_centrifugo_commands_end_the_connection,
        refused_centrifugo_commands_keep_the_connection,
        connections_past_the_limit_are_refused,
    ],
}

/// Clients that do everything right while others do not.
struct Bystanders {
    sse: Sse,
    websocket: Centrifugo,
    count: u64,
}

impl Bystanders {
    fn join(weir: &Weir) -> Self {
        let mut websocket = weir.centrifugo();
        websocket.subscribe("calm");
        Self { sse: weir.sse(&["calm"]), websocket, count: 0 }
    }

    /// Fails unless both still get the next publication, and only it.
    #[track_caller]
    fn undisturbed(&mut self, weir: &Weir) {
        self.count += 1;
        weir.publish("calm", &self.count.to_string());
        assert_eq!(self.sse.next().data, self.count.to_string());
        assert_eq!(self.websocket.next_data(1), [self.count]);
    }
}

/// Sends bytes on a new connection and reads the answer.
#[track_caller]
fn answer(weir: &Weir, bytes: &[u8]) -> Response {
    let mut http = Http::open(weir.address());
    http.connection.write(bytes);
    http.read(false)
}

fn malformed_request_heads(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut bystanders = Bystanders::join(&weir);
    let post = |headers: &str| format!("POST /publish/a HTTP/1.1\r\nHost: node\r\n{headers}\r\n\r\nhello");
    let get = |headers: &str| format!("GET / HTTP/1.1\r\nHost: node\r\n{headers}\r\n\r\n");
    let cases = [
        ("no request line", "garbage\r\n\r\n".to_owned(), 400),
        ("a TLS hello", "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\r\n\r\n".to_owned(), 400),
        ("a header without a colon", get("nonsense"), 400),
        ("a space before the colon", get("Name : value"), 400),
        ("a control character in a value", get("Name: a\u{1}b"), 400),
        ("another major version", "GET / HTTP/2.0\r\nHost: node\r\n\r\n".to_owned(), 505),
        ("both framings", post("Content-Length: 5\r\nTransfer-Encoding: chunked"), 400),
        ("two lengths", post("Content-Length: 5\r\nContent-Length: 6"), 400),
        ("a negative length", post("Content-Length: -5"), 400),
        ("a length with a sign", post("Content-Length: +5"), 400),
        ("a length past 64 bits", post("Content-Length: 99999999999999999999"), 400),
        ("an unknown coding", post("Transfer-Encoding: gzip"), 501),
        (
            "a bad chunk size",
            "POST /publish/a HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n".to_owned(),
            400,
        ),
        ("one header of 20,000 bytes", get(&format!("Name: {}", "x".repeat(20_000))), 431),
        ("a target of 20,000 bytes", format!("GET /{} HTTP/1.1\r\nHost: node\r\n\r\n", "x".repeat(20_000)), 431),
        ("65 headers and the host", get(&["Name: value"; 65].join("\r\n")), 431),
    ];
    for (what, bytes, status) in cases {
        let reply = answer(&weir, bytes.as_bytes());
        assert_eq!(reply.status, status, "{what}: {reply:?}");
        assert!(reply.json()["error"].is_string(), "{what}: {reply:?}");
        bystanders.undisturbed(&weir);
    }
}

fn unknown_routes_and_methods_name_what_there_is(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let unknown = weir.get("/subscribe").expect(404);
    for path in ["/sse", "/connection/websocket", "/publish/", "/api/publish", "/health/ready", "/metrics"] {
        assert!(unknown.text().contains(path), "{path} is named: {}", unknown.text());
    }
    let mut http = Http::open(weir.address());
    for (method, target, allowed) in [
        ("DELETE", "/sse?channel=a", "GET"),
        ("POST", "/metrics", "GET"),
        ("GET", "/publish/a", "POST"),
        ("PUT", "/api/publish", "POST"),
    ] {
        let reply = http.send(method, target, &[], b"").expect(405);
        assert!(reply.header("allow").is_some_and(|value| value.contains(allowed)), "{method} {target}: {reply:?}");
    }
}

fn bad_channels_and_cursors(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut bystanders = Bystanders::join(&weir);
    let channels = |count: usize| (0..count).map(|n| format!("channel=c{n}")).collect::<Vec<_>>().join("&");
    let too_long = format!("/sse?channel={}", "x".repeat(256));
    let (most, too_many) = (format!("/sse?{}", channels(128)), format!("/sse?{}", channels(129)));
    let cases = [
        ("/sse", "channel"),
        ("/sse?channel=", "empty"),
        ("/sse?channel=a%0Ab", "control"),
        ("/sse?channel=a%00", "control"),
        ("/sse?channel=a%C2%85b", "control"),
        ("/sse?channel=%FF%FE", "UTF-8"),
        (&too_long, "255"),
        (&too_many, "128"),
        ("/sse?channel=a&channel=gap", "gap"),
        ("/sse?channel=a&channel=open", "open"),
        ("/sse?channel=a&channel=error", "error"),
        ("/sse?channel=a&last_event_id=yesterday", "cursor"),
        ("/sse?channel=a&last_event_id=00000000.00000000.-1", "cursor"),
    ];
    for (target, named) in cases {
        let reply = weir.get(target).expect(400);
        let error = reply.json()["error"].as_str().unwrap_or_else(|| panic!("no error: {reply:?}")).to_owned();
        assert!(error.contains(named), "{target}: {error:?} does not name {named:?}");
    }
    for target in ["/publish/", "/publish/a%0Ab", "/publish/%FF"] {
        let status = weir.post(target, &[], b"x").status;
        assert!(matches!(status, 400 | 404), "{target}: {status}");
    }
    for target in ["/sse?channel=gap", "/sse?channel=a&channel=a", &most] {
        let opened = Sse::open_target(Connection::open(weir.address()), target, &[]);
        assert!(opened.is_ok(), "{target} is allowed: {:?}", opened.err());
    }
    bystanders.undisturbed(&weir);
}

fn bad_bodies(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut bystanders = Bystanders::join(&weir);
    weir.post("/publish/calm", &[], b"\xff\xfe not text").expect(400);
    weir.post("/publish/calm", &[], b"cut \xf0\x9f\x98").expect(400);
    weir.post("/publish/calm", &[], &vec![b'x'; 64 * 1024 + 1]).expect(413);
    // Announced, never sent: it must be refused by its head alone.
    let head = "POST /publish/calm HTTP/1.1\r\nHost: node\r\nContent-Length: 3000000000\r\n\r\n";
    assert_eq!(answer(&weir, head.as_bytes()).status, 413);
    let head = "POST /api/publish HTTP/1.1\r\nHost: node\r\nContent-Length: 1048577\r\n\r\n";
    assert_eq!(answer(&weir, head.as_bytes()).status, 413);
    // A chunked body has no length to refuse beforehand.
    let head = b"POST /publish/calm HTTP/1.1\r\nHost: node\r\nTransfer-Encoding: chunked\r\n\r\n";
    let chunk = [b"8000\r\n".to_vec(), vec![b'x'; 0x8000], b"\r\n".to_vec()].concat();
    let mut http = Http::open(weir.address());
    http.connection.write(head);
    // The node may refuse and stop reading before all of it is written.
    for _ in 0..3 {
        let _ = http.connection.try_write(&chunk);
    }
    assert_eq!(http.read(false).status, 413);
    bystanders.undisturbed(&weir);
}

fn half_request_is_timed_out(driver: Driver) {
    let weir = Weir::start(driver, &["--set", "limits.head_time=300ms", "--set", "limits.body_time=300ms"]);
    let mut bystanders = Bystanders::join(&weir);
    let halves = [
        "",
        "GET / HT",
        "GET / HTTP/1.1\r\nHost: node\r\n",
        "POST /publish/a HTTP/1.1\r\nHost: node\r\nContent-Length: 5\r\n\r\nhe",
    ];
    for half in halves {
        let mut http = Http::open(weir.address());
        http.connection.write(half.as_bytes());
        // With or without a word, the connection must not be held.
        if let Some(reply) = http.try_read(false) {
            assert_eq!(reply.status, 408, "{half:?}: {reply:?}");
            assert!(!http.connection.fill(), "{half:?}: ended after 408");
        }
        bystanders.undisturbed(&weir);
    }
}

fn bad_websocket_handshakes(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let upgrade = |change: fn(&mut Vec<(&'static str, &'static str)>)| {
        let mut headers = vec![
            ("Upgrade", "websocket"),
            ("Connection", "keep-alive, Upgrade"),
            ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("Sec-WebSocket-Version", "13"),
        ];
        change(&mut headers);
        let mut connection = Connection::open(weir.address());
        connection.write(&request("GET", "/connection/websocket", &headers, b""));
        crate::harness::Http { connection }.read(false)
    };
    assert_eq!(upgrade(|_| {}).status, 101, "the unchanged one is right");
    assert_eq!(upgrade(|headers| headers.push(("Sec-WebSocket-Protocol", "centrifuge-json"))).status, 101);
    let refused = upgrade(|headers| headers[3].1 = "8");
    assert!(matches!(refused.status, 400 | 426), "{refused:?}");
    assert_eq!(refused.header("sec-websocket-version"), Some("13"), "RFC 6455, section 4.2.2: {refused:?}");
    for status in [
        upgrade(|headers| headers[2].1 = "short"),
        upgrade(|headers| headers.truncate(2)),
        upgrade(|headers| headers[1].1 = "keep-alive"),
        upgrade(|headers| headers.push(("Sec-WebSocket-Protocol", "centrifuge-protobuf"))),
    ]
    .map(|reply| reply.status)
    {
        assert!(matches!(status, 400 | 426), "{status}");
    }
    let plain = weir.get("/connection/websocket");
    assert!(matches!(plain.status, 400 | 426), "{plain:?}");
}

fn bad_websocket_frames(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut bystanders = Bystanders::join(&weir);
    let mask = Some([1, 2, 3, 4]);
    let frame = |fin, opcode, mask, payload: &[u8]| {
        let mut bytes = Vec::new();
        push_frame(&mut bytes, fin, opcode, mask, payload);
        bytes
    };
    let cases: Vec<(&str, Vec<u8>, u16)> = vec![
        ("unmasked", frame(true, Opcode::Text, None, b"{}"), 1002),
        ("a reserved bit", vec![0xc1, 0x80, 1, 2, 3, 4], 1002),
        ("a reserved opcode", vec![0x83, 0x80, 1, 2, 3, 4], 1002),
        ("a ping in fragments", frame(false, Opcode::Ping, mask, b"x"), 1002),
        ("a ping of 126 bytes", frame(true, Opcode::Ping, mask, &[b'x'; 126]), 1002),
        ("a continuation of nothing", frame(true, Opcode::Continuation, mask, b"x"), 1002),
        (
            "a message inside another",
            [frame(false, Opcode::Text, mask, b"{"), frame(true, Opcode::Text, mask, b"{}")].concat(),
            1002,
        ),
        ("a close of one byte", frame(true, Opcode::Close, mask, b"x"), 1002),
        ("a close with a code of nobody", frame(true, Opcode::Close, mask, &[0x03, 0xed]), 1002),
        ("text that is not UTF-8", frame(true, Opcode::Text, mask, b"\"\xff\""), 1007),
        ("a header that promises a gigabyte", vec![0x81, 0xff, 0, 0, 0, 0, 0x40, 0, 0, 0, 1, 2, 3, 4], 1009),
        (
            "64 KiB and one byte in two fragments",
            [frame(false, Opcode::Text, mask, &[b' '; 64 * 1024]), frame(true, Opcode::Continuation, mask, b" ")]
                .concat(),
            1009,
        ),
    ];
    for (what, bytes, code) in cases {
        let mut socket = WebSocket::open(weir.address());
        socket.connection.write(&bytes);
        assert_eq!(socket.read_to_close().0, code, "{what}");
        bystanders.undisturbed(&weir);
    }
}

fn bad_centrifugo_commands_end_the_connection(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut bystanders = Bystanders::join(&weir);
    let connect = r#"{"id":1,"connect":{}}"#;
    let cases = [
        ("not JSON", "hello".to_owned()),
        ("an array", "[]".to_owned()),
        ("subscribe before connect", r#"{"id":1,"subscribe":{"channel":"a"}}"#.to_owned()),
        ("a pong before connect", "{}".to_owned()),
        ("connect without an id", r#"{"connect":{}}"#.to_owned()),
        ("a second connect", format!("{connect}\n{}", r#"{"id":2,"connect":{}}"#)),
        ("a later command with id 0", format!("{connect}\n{}", r#"{"id":0,"subscribe":{"channel":"a"}}"#)),
        ("a command without a method", format!("{connect}\n{}", r#"{"id":2}"#)),
        ("a method that is not there", format!("{connect}\n{}", r#"{"id":2,"levitate":{}}"#)),
        (
            "two methods",
            format!("{connect}\n{}", r#"{"id":2,"subscribe":{"channel":"a"},"unsubscribe":{"channel":"a"}}"#),
        ),
        ("a pong that nobody asked for", format!("{connect}\n{{}}")),
        ("an array of fields", format!("{connect}\n{}", r#"[2,null,{"channel":"a"}]"#)),
        ("half an object", format!("{connect}\n{}", r#"{"id":2,"subscribe":"#)),
        ("a channel that is a number", format!("{connect}\n{}", r#"{"id":2,"subscribe":{"channel":5}}"#)),
        ("an id past 32 bits", format!("{connect}\n{}", r#"{"id":4294967296,"subscribe":{"channel":"a"}}"#)),
    ];
    for (what, text) in cases {
        let mut socket = WebSocket::open(weir.address());
        socket.send(Opcode::Text, text.as_bytes());
        assert_eq!(socket.read_to_close(), (3501, "bad request".to_owned()), "{what}");
        bystanders.undisturbed(&weir);
    }
}

fn refused_centrifugo_commands_keep_the_connection(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut client = weir.centrifugo();
    let mut refused = |method: &str, parameters: serde_json::Value| {
        let error =
            client.try_call(method, parameters.clone()).expect_err(&format!("{method} {parameters} is refused"));
        assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "{error}");
        error["code"].as_u64().unwrap_or_else(|| panic!("no code: {error}"))
    };
    assert_eq!(refused("subscribe", json!({ "channel": "" })), 107);
    assert_eq!(refused("subscribe", json!({ "channel": "a\nb" })), 107);
    assert_eq!(refused("subscribe", json!({ "channel": "x".repeat(256) })), 107);
    assert_eq!(refused("publish", json!({ "channel": "a", "data": 1 })), 103);
    assert_eq!(refused("rpc", json!({ "method": "x", "data": 1 })), 104);
    assert_eq!(refused("presence", json!({ "channel": "a" })), 108);

    for number in 0..128 {
        client.subscribe(&format!("channel-{number}"));
    }
    let mut code = |channel: &str| {
        client.try_call("subscribe", json!({ "channel": channel })).expect_err("refused")["code"].clone()
    };
    assert_eq!(code("channel-0"), 105, "already subscribed");
    assert_eq!(code("one more"), 106, "limit exceeded");
    weir.publish("channel-127", "1");
    assert_eq!(client.next_publication().0, "channel-127", "after all that it is still served");
}

fn connections_past_the_limit_are_refused(driver: Driver) {
    let weir = Weir::start(driver, &["--set", "max_connections=4"]);
    let mut open = Vec::new();
    let mut refused = Vec::new();
    for _ in 0..40 {
        match Sse::open_target(Connection::open(weir.address()), "/sse?channel=full", &[]) {
            Ok(stream) => open.push(stream),
            Err(reply) => refused.push(reply),
        }
    }
    assert!((1..=4).contains(&open.len()), "{} streams opened", open.len());
    assert!(refused.iter().all(|reply| reply.status == 503 && reply.header("retry-after").is_some()), "{refused:?}");
    weir.publish("full", "1");
    for stream in &mut open {
        assert_eq!(stream.next().data, "1", "those that are in are served");
    }
    drop(open);
    // A place that was left can be taken again.
    let mut again = crate::harness::eventually("a place is free", || {
        Sse::open_target(Connection::open(weir.address()), "/sse?channel=full", &[]).ok()
    });
    weir.publish("full", "2");
    assert_eq!(again.next().data, "2");
}
