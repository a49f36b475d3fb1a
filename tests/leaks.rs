//! Thousands of abusive connections, and everything they took is given back.

use crate::harness::{Connection, Deadline, Driver, Opcode, Sse, WebSocket, Weir, eventually, push_frame, request};

scenarios! {
    each_driver: [
        abusive_connections_leave_nothing_behind,
        opened_and_closed_streams_leave_nothing_behind,
        connections_that_follow_each_other_on_a_slot_do_not_meet,
    ],
}

/// One kind of abuse; each opens one connection and leaves it in its own way.
type Abuse = fn(&Weir, usize);

/// Writes that may fail, since the node may already have ended the connection, then a reset.
fn write_and_reset(weir: &Weir, bytes: &[u8]) {
    let mut connection = Connection::open(weir.address());
    let _ = connection.try_write(bytes);
    connection.reset();
}

/// Writes that may fail, then an orderly end.
fn write_and_close(weir: &Weir, bytes: &[u8]) {
    let mut connection = Connection::open(weir.address());
    let _ = connection.try_write(bytes);
}

fn subscribed(weir: &Weir, number: usize) -> crate::harness::Centrifugo {
    let mut client = weir.centrifugo();
    client.subscribe(&format!("abused-{number}"));
    client
}

const ABUSES: &[(&str, Abuse)] = &[
    ("connect and leave", |weir, _| write_and_close(weir, b"")),
    ("connect and reset", |weir, _| write_and_reset(weir, b"")),
    ("half a head, then close", |weir, _| write_and_close(weir, b"GET /sse?channel=a HTTP/1.1\r\nHo")),
    ("half a head, then reset", |weir, _| write_and_reset(weir, b"GET /sse?channel=a HTTP/1.1\r\nHo")),
    ("garbage", |weir, number| write_and_reset(weir, &[number as u8; 300])),
    ("a body cut in the middle", |weir, _| {
        write_and_close(weir, b"POST /publish/a HTTP/1.1\r\nHost: n\r\nContent-Length: 100\r\n\r\nhalf");
    }),
    ("a chunk cut in the middle", |weir, _| {
        write_and_reset(weir, b"POST /publish/a HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nhalf");
    }),
    ("a request, then garbage", |weir, _| {
        write_and_close(weir, b"GET /health/live HTTP/1.1\r\nHost: n\r\n\r\n\0\0\0\0\r\n\r\n");
    }),
    ("ask for a stream and do not wait for it", |weir, number| {
        write_and_reset(weir, &request("GET", &format!("/sse?channel=abused-{number}"), &[], b""));
    }),
    ("ask for many channels and do not wait for them", |weir, number| {
        let channels: Vec<String> = (0..20).map(|channel| format!("channel=abused-{number}-{channel}")).collect();
        write_and_close(weir, &request("GET", &format!("/sse?{}", channels.join("&")), &[], b""));
    }),
    ("a stream that is reset", |weir, number| weir.sse(&[&format!("abused-{number}")]).reset()),
    ("a stream that says more than its request", |weir, _| {
        let mut bytes = request("GET", "/sse?channel=abused", &[], b"");
        bytes.extend_from_slice(&[b'x'; 5000]);
        write_and_reset(weir, &bytes);
    }),
    ("half a handshake", |weir, _| {
        write_and_reset(weir, b"GET /connection/websocket HTTP/1.1\r\nHost: n\r\nUpgrade: websocket\r\nConn");
    }),
    ("an upgrade that is reset", |weir, _| WebSocket::open(weir.address()).connection.reset()),
    ("a frame cut in its header", |weir, _| {
        let mut socket = WebSocket::open(weir.address());
        socket.connection.write(&[0x81, 0xfe, 0x01]);
        socket.connection.reset();
    }),
    ("a frame cut in its payload", |weir, _| {
        let mut socket = WebSocket::open(weir.address());
        socket.connection.write(&[0x81, 0xfe, 0x03, 0xe8, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    }),
    ("a message cut between its fragments", |weir, _| {
        let mut socket = WebSocket::open(weir.address());
        let mut bytes = Vec::new();
        push_frame(&mut bytes, false, Opcode::Text, Some([1, 2, 3, 4]), &[b' '; 2000]);
        socket.connection.write(&bytes);
        socket.connection.reset();
    }),
    ("frames of garbage", |weir, number| {
        let mut socket = WebSocket::open(weir.address());
        let _ = socket.connection.try_write(&[number as u8 | 0x70; 64]);
        drop(socket);
    }),
    ("a subscription that is reset", |weir, number| subscribed(weir, number).socket.connection.reset()),
    ("a subscription that vanishes in an orderly end of TCP", |weir, number| drop(subscribed(weir, number))),
    ("a subscription that closes", |weir, number| subscribed(weir, number).socket.send(Opcode::Close, &[0x03, 0xe8])),
];

/// What the node holds now: of every kind that a connection can take.
fn held(weir: &Weir) -> String {
    let samples = weir.metrics();
    format!(
        "sse {}, websocket {}, poll {}, http {}, channels {}, subscriptions {}, lagging {}, backbone channels {}, descriptors {}",
        samples.sum("weir_connections", "protocol=\"sse\""),
        samples.sum("weir_connections", "protocol=\"websocket\""),
        samples.sum("weir_connections", "protocol=\"poll\""),
        samples.sum("weir_connections", "protocol=\"http\""),
        samples.sum("weir_channels", ""),
        samples.sum("weir_subscriptions", ""),
        samples.sum("weir_lagging_connections", ""),
        samples.sum("weir_backbone_channels", ""),
        weir.descriptors().len(),
    )
}

/// Waits until the node holds the same at three looks in a row, and returns that.
#[track_caller]
fn settled(weir: &Weir) -> String {
    let mut looks: Vec<String> = Vec::new();
    eventually("the node comes to rest", || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        looks.push(held(weir));
        let last = looks.last()?;
        (looks.len() >= 3 && looks[looks.len() - 3..].iter().all(|look| look == last)).then(|| last.clone())
    })
}

#[track_caller]
fn returns_to(weir: &Weir, start: &str) {
    let deadline = Deadline::start();
    loop {
        let now = held(weir);
        if now == start {
            return;
        }
        deadline.check(&format!("everything is given back\nat the start: {start}\nnow:          {now}"));
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

fn abusive_connections_leave_nothing_behind(driver: Driver) {
    const ROUNDS: usize = 10;
    const EACH: usize = 25;
    let weir = Weir::start(driver, &["--set", "linger=100ms"]);
    let mut calm = weir.sse(&["calm"]);
    let mut number = 0;
    // One of each first: what the node makes once for all must not count as lost.
    for (_, abuse) in ABUSES {
        abuse(&weir, number);
    }
    let start = settled(&weir);

    for round in 0..ROUNDS {
        for (what, abuse) in ABUSES {
            for _ in 0..EACH {
                number += 1;
                abuse(&weir, number);
            }
            let sent = format!("round {round}, after {what:?}");
            weir.publish("calm", &sent);
            assert_eq!(calm.next().data, sent, "the calm client is served throughout");
        }
    }

    assert!(number >= 5_000, "{number} abusive connections");
    returns_to(&weir, &start);
}

fn opened_and_closed_streams_leave_nothing_behind(driver: Driver) {
    let weir = Weir::start(driver, &["--set", "linger=100ms"]);
    drop((weir.sse(&["warm"]), weir.centrifugo()));
    let start = settled(&weir);
    for round in 0..5 {
        let streams: Vec<Sse> =
            (0..200).map(|number| weir.sse(&["shared", &format!("own-{round}-{number}")])).collect();
        let clients: Vec<_> = (0..200).map(|number| subscribed(&weir, number)).collect();
        weir.publish("shared", "x");
        let during = weir.metrics();
        assert!(during.sum("weir_connections", "protocol=\"sse\"") >= 200.0);
        assert!(during.sum("weir_connections", "protocol=\"websocket\"") >= 200.0);
        assert!(during.sum("weir_subscriptions", "") >= 600.0);
        drop((streams, clients));
    }
    returns_to(&weir, &start);
}

/// Once a shutdown ordered for a connection that was just ended could run after its slot in the ring's file table had been
/// given to the next one, whose client then saw its stream end without a word.
fn connections_that_follow_each_other_on_a_slot_do_not_meet(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    std::thread::scope(|scope| {
        for worker in 0..3 {
            let weir = &weir;
            scope.spawn(move || {
                for number in 0..700 {
                    // Ended by the node, which says why and shuts its half, while the client closes in its own way.
                    let mut refused = WebSocket::open(weir.address());
                    refused.send(Opcode::Text, b"{\"id\":1,\"connect\":{}}\n{\"id\":2}");
                    assert_eq!(refused.read_to_close().0, 3501, "worker {worker}, connection {number}");
                    if number % 3 == 0 {
                        refused.connection.reset();
                    }
                    // Does everything right, probably on a slot that was just left.
                    drop(weir.centrifugo());
                }
            });
        }
    });
}
