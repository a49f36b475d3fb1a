//! Stopping a node: every client is told, and the process ends with success.

use crate::harness::{Driver, Incoming, Item, Place, Weir, free_address};

scenarios! {
    each_driver: [
        sigterm_tells_every_client_and_exits_with_zero,
        sigint_exits_with_zero,
        sigterm_with_a_reader_that_never_reads_still_ends,
        sigterm_in_a_flood_cuts_no_event,
        node_can_be_started_again_on_its_port_at_once,
    ],
    each_backbone: [
        idle_node_ends_at_once,
    ],
}

fn sigterm_tells_every_client_and_exits_with_zero(driver: Driver) {
    let mut weir = Weir::start(driver, &[]);
    let mut streams: Vec<_> = (0..10).map(|_| weir.sse(&["news"])).collect();
    streams.push(weir.sse(&["news", "sport"]));
    let mut clients: Vec<_> = (0..10).map(|_| weir.centrifugo()).collect();
    clients[0].subscribe("news");
    weir.publish("news", "last words");
    // The publisher's answer may overtake the delivery, so the signal waits for the latter.
    for stream in &mut streams {
        assert_eq!(stream.next().data, "last words");
    }
    assert_eq!(clients[0].next_data(1), ["last words"]);

    weir.signal(libc::SIGTERM);

    for stream in streams {
        let (items, unfinished) = stream.read_to_end();
        assert!(matches!(items.last(), Some(Item::Retry(_) | Item::Comment(_))), "{items:?}");
        let told = |item: &Item| matches!(item, Item::Comment(text) if text.contains("shutdown"));
        assert!(items.iter().any(told), "the reason is said: {items:?}");
        assert!(items.iter().any(|item| matches!(item, Item::Retry(_))), "with advice when to come back: {items:?}");
        assert!(unfinished.is_empty());
    }
    for client in &mut clients {
        assert_eq!(client.socket.next(), Incoming::Close(3001, "shutdown".into()));
    }
    assert_eq!(weir.wait_end().code(), Some(0));
}

fn sigint_exits_with_zero(driver: Driver) {
    let mut weir = Weir::start(driver, &[]);
    let stream = weir.sse(&["news"]);
    weir.signal(libc::SIGINT);
    stream.read_to_end();
    assert_eq!(weir.wait_end().code(), Some(0));
}

fn sigterm_with_a_reader_that_never_reads_still_ends(driver: Driver) {
    let flags = ["history.bytes=64MiB", "history.messages=2000", "lag.bytes=64MiB", "lag.messages=2000"];
    let flags = flags.map(|setting| format!("--set={setting}"));
    let mut weir = Weir::start(driver, &flags.each_ref().map(String::as_str));
    let stalled = weir.sse_narrow(&["bulk"]);
    let bulk = "x".repeat(60_000);
    crate::harness::eventually("the reader is behind", || {
        weir.publish("bulk", &bulk);
        (weir.metrics().sum("weir_lagging_connections", "") >= 1.0).then_some(())
    });
    weir.signal(libc::SIGTERM);
    assert_eq!(weir.wait_end().code(), Some(0), "one bad client must not hold the node");
    drop(stalled);
}

fn sigterm_in_a_flood_cuts_no_event(driver: Driver) {
    let mut weir = Weir::start(driver, &[]);
    let mut streams: Vec<_> = (0..20).map(|_| weir.sse(&["flood"])).collect();
    weir.publish("flood", "0");
    for stream in &mut streams {
        assert_eq!(stream.next().data, "0", "the flood has begun");
    }
    let readers: Vec<_> = streams.into_iter().map(|stream| std::thread::spawn(move || stream.read_to_end())).collect();
    let numbers: Vec<String> = (1..=100).map(|number| number.to_string()).collect();
    for _ in 0..3 {
        weir.publish_all("flood", numbers.iter().map(String::as_str));
    }
    weir.signal(libc::SIGTERM);
    for reader in readers {
        let (items, unfinished) = reader.join().expect("the reader does not panic");
        assert!(unfinished.is_empty(), "{:?}", String::from_utf8_lossy(&unfinished));
        let data: Vec<&String> = items
            .iter()
            .filter_map(|item| if let Item::Event(event) = item { Some(&event.data) } else { None })
            .collect();
        let expected: Vec<&String> = numbers.iter().cycle().take(data.len()).collect();
        assert_eq!(data, expected, "whole events, in order, none twice");
    }
    assert_eq!(weir.wait_end().code(), Some(0));
}

fn node_can_be_started_again_on_its_port_at_once(driver: Driver) {
    let address = free_address();
    let mut first = Weir::command(driver).listen(address).start();
    let streams: Vec<_> = (0..5).map(|_| first.sse(&["news"])).collect();
    // The node closes first, so its connections stay in TIME_WAIT.
    first.signal(libc::SIGTERM);
    streams.into_iter().for_each(|stream| drop(stream.read_to_end()));
    first.wait_end();
    let second = Weir::command(driver).listen(address).start();
    let mut stream = second.sse(&["news"]);
    second.publish("news", "1");
    assert_eq!(stream.next().data, "1");
}

fn idle_node_ends_at_once(place: &Place) {
    let mut weir = place.weir(&[]);
    weir.signal(libc::SIGTERM);
    assert_eq!(weir.wait_end().code(), Some(0));
}
