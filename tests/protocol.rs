//! The Centrifugo client protocol beyond delivery: what each command answers.

use serde_json::{Value, json};

use crate::harness::{Driver, Incoming, Opcode, Place, WebSocket, Weir};

scenarios! {
    each_driver: [
        connect_says_what_the_client_libraries_need,
        commands_of_one_frame_are_all_answered,
        command_cut_into_fragments_and_single_bytes,
        websocket_ping_is_answered_with_its_payload,
        orderly_close_is_answered,
        client_publish_is_refused_unless_allowed,
        unsubscribed_channel_is_silent,
        commands_sent_with_the_upgrade_request_are_served,
    ],
    each_backbone: [
        subscribe_says_the_position,
        history_pages_both_ways,
    ],
}

fn connect_says_what_the_client_libraries_need(driver: Driver) {
    let weir = Weir::start(driver, &["--set", "websocket.ping=7s", "--set", "websocket.pong=5s"]);
    let (first, second) = (weir.centrifugo(), weir.centrifugo());
    assert_eq!(first.connected["ping"], 7, "{}", first.connected);
    assert_eq!(first.connected["pong"], true);
    for field in ["client", "version"] {
        assert!(first.connected[field].as_str().is_some_and(|text| !text.is_empty()), "{}", first.connected);
    }
    assert_ne!(first.connected["client"], second.connected["client"], "each connection has an id of its own");
}

fn commands_of_one_frame_are_all_answered(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut socket = WebSocket::open(weir.address());
    let commands = [
        json!({ "id": 1, "connect": {} }),
        json!({ "id": 2, "subscribe": { "channel": "a" } }),
        json!({ "id": 3, "subscribe": { "channel": "b" } }),
        json!({ "id": 4, "unsubscribe": { "channel": "a" } }),
        json!({ "id": 5, "unsubscribe": { "channel": "never subscribed" } }),
    ];
    let text: Vec<String> = commands.iter().map(Value::to_string).collect();
    socket.send(Opcode::Text, (text.join("\n") + "\n").as_bytes());
    let mut answered = Vec::new();
    while answered.len() < commands.len() {
        let Incoming::Text(text) = socket.next() else { panic!("ended after {answered:?}") };
        for line in text.lines() {
            let reply: Value = serde_json::from_str(line).expect("JSON");
            assert!(reply.get("error").is_none(), "{reply}");
            let id = reply["id"].as_u64();
            answered.push(id.unwrap_or_else(|| panic!("silence, then {reply}; answered were {answered:?}")));
        }
    }
    answered.sort_unstable();
    assert_eq!(answered, [1, 2, 3, 4, 5]);
}

fn command_cut_into_fragments_and_single_bytes(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut socket = WebSocket::open(weir.address());
    let mut bytes = Vec::new();
    for (fin, opcode, part) in [
        (false, Opcode::Text, &br#"{"id":1,"#[..]),
        (true, Opcode::Ping, b"between"),
        (false, Opcode::Continuation, br#""conn"#),
        (true, Opcode::Continuation, br#"ect":{}}"#),
    ] {
        crate::harness::push_frame(&mut bytes, fin, opcode, Some([9, 8, 7, 6]), part);
    }
    for byte in bytes {
        socket.connection.write(&[byte]);
    }
    assert_eq!(socket.next(), Incoming::Pong(b"between".to_vec()), "a ping does not wait for the message around it");
    let Incoming::Text(reply) = socket.next() else { panic!("no reply") };
    assert!(serde_json::from_str::<Value>(&reply).expect("JSON")["connect"]["client"].is_string(), "{reply}");
}

fn websocket_ping_is_answered_with_its_payload(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut socket = WebSocket::open(weir.address());
    for payload in [&b""[..], b"payload", &[0xff; 125]] {
        socket.send(Opcode::Ping, payload);
        assert_eq!(socket.next(), Incoming::Pong(payload.to_vec()));
    }
}

fn orderly_close_is_answered(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut client = weir.centrifugo();
    client.subscribe("a");
    client.socket.send(Opcode::Close, &[0x03, 0xe8, b'b', b'y', b'e']);
    assert!(matches!(client.socket.next(), Incoming::Close(1000, _)), "the code is echoed (RFC 6455, section 5.5.1)");
    assert_eq!(client.socket.next(), Incoming::End, "and the node ends the connection");
}

fn client_publish_is_refused_unless_allowed(driver: Driver) {
    let strict = Weir::start(driver, &[]);
    let mut client = strict.centrifugo();
    client.subscribe("chat");
    let error = client.try_call("publish", json!({ "channel": "chat", "data": 1 })).expect_err("refused by default");
    assert_eq!(error["code"], 103, "{error}");

    let open = Weir::start(driver, &["--set", "websocket.client_publish=true"]);
    let mut client = open.centrifugo();
    let mut sse = open.sse(&["chat"]);
    let error = client.try_call("publish", json!({ "channel": "chat", "data": 1 })).expect_err("not subscribed yet");
    assert_eq!(error["code"], 103, "{error}");
    client.subscribe("chat");
    client.call("publish", json!({ "channel": "chat", "data": { "n": 2 } }));
    assert_eq!(
        client.next_publication().1,
        json!({ "data": { "n": 2 }, "offset": 1 }),
        "the sender gets its own as well"
    );
    assert_eq!(sse.next().data, r#"{"n":2}"#);
}

fn unsubscribed_channel_is_silent(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    let mut client = weir.centrifugo();
    client.subscribe("left");
    client.subscribe("kept");
    weir.publish("left", "1");
    assert_eq!(client.next_publication().0, "left");
    client.call("unsubscribe", json!({ "channel": "left" }));
    weir.publish("left", "2");
    weir.publish("kept", "3");
    assert_eq!(client.next_publication().0, "kept");
    let result = client.subscribe("left");
    assert_eq!(result["offset"], 2, "and can be subscribed again: {result}");
    weir.publish("left", "4");
    assert_eq!(client.next_publication().1["offset"], 3);
}

fn commands_sent_with_the_upgrade_request_are_served(driver: Driver) {
    // A client may not wait for the 101 in the same segment: what follows the head must not be lost in the hand-over.
    let weir = Weir::start(driver, &[]);
    let mut connection = crate::harness::Connection::open(weir.address());
    let headers = [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("Sec-WebSocket-Version", "13"),
    ];
    let mut bytes = crate::harness::request("GET", "/connection/websocket", &headers, b"");
    crate::harness::push_frame(&mut bytes, true, Opcode::Text, Some([1, 1, 1, 1]), br#"{"id":1,"connect":{}}"#);
    connection.write(&bytes);
    let mut http = crate::harness::Http { connection };
    assert_eq!(http.read(false).status, 101);
    let mut socket = WebSocket { connection: http.connection };
    assert!(matches!(socket.next(), Incoming::Text(reply) if reply.contains(r#""connect""#)));
}

fn subscribe_says_the_position(place: &Place) {
    let weir = place.weir(&[]);
    let published = weir.publish_all("news", ["1", "2"]).pop().expect("two");
    let mut client = weir.centrifugo();
    let result = client.subscribe("news");
    assert_eq!(result["epoch"], published.epoch.as_str(), "{result}");
    assert_eq!(result["offset"], 2);
    assert_eq!((&result["recoverable"], &result["positioned"]), (&json!(true), &json!(true)));
    assert!(result.get("publications").is_none_or(|list| list == &json!([])), "nothing was asked for: {result}");
    let fresh = client.subscribe("never used");
    assert!(fresh["epoch"].as_str().is_some_and(|epoch| !epoch.is_empty()), "a client may recover from here: {fresh}");
}

fn history_pages_both_ways(place: &Place) {
    let weir = place.weir(&[]);
    let epoch = weir.publish_all("news", ["1", "2", "3", "4", "5"])[0].epoch.clone();
    let mut client = weir.centrifugo();
    client.subscribe("news");
    let mut page = |parameters: Value| -> Vec<u64> {
        let mut request = json!({ "channel": "news" });
        request.as_object_mut().expect("an object").extend(parameters.as_object().expect("an object").clone());
        let result = client.call("history", request);
        assert_eq!((result["epoch"].as_str(), result["offset"].as_u64()), (Some(epoch.as_str()), Some(5)), "{result}");
        let empty = Vec::new();
        let publications = result.get("publications").map_or(&empty, |list| list.as_array().expect("a list"));
        for publication in publications {
            assert_eq!(publication["data"], publication["offset"], "{result}");
        }
        publications.iter().map(|publication| publication["offset"].as_u64().expect("an offset")).collect()
    };
    let since = |offset: u64| json!({ "epoch": epoch, "offset": offset });
    assert_eq!(page(json!({ "limit": 0 })), [0; 0], "the position alone");
    assert_eq!(page(json!({ "limit": -1 })), [1, 2, 3, 4, 5]);
    assert_eq!(page(json!({ "limit": 2 })), [1, 2]);
    assert_eq!(page(json!({ "limit": 2, "since": since(2) })), [3, 4]);
    assert_eq!(page(json!({ "limit": -1, "since": since(5) })), [0; 0]);
    assert_eq!(page(json!({ "limit": 2, "reverse": true })), [5, 4]);
    assert_eq!(page(json!({ "limit": -1, "since": since(3), "reverse": true })), [2, 1]);
    let error = client
        .try_call("history", json!({ "channel": "news", "limit": 1, "since": { "epoch": "00000000", "offset": 1 } }))
        .expect_err("another epoch");
    assert_eq!(error["code"], 112, "{error}");
}
