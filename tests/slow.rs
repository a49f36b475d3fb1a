//! Whoever cannot keep up is shed and told so; whoever can, notices nothing.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::harness::{
    Centrifugo, Connection, Driver, Event, Incoming, Item, Plan, Samples, Sse, Swarm, Weir, eventually,
};

scenarios! {
    each_driver: [
        slow_event_stream_is_shed_with_its_reason_and_can_resume,
        slow_websocket_is_shed_with_3008_and_can_recover,
        stalled_reader_is_shed_by_age_without_further_publications,
        reader_that_pauses_below_the_bound_catches_up,
        hot_channel_does_not_starve_a_small_one,
        silent_websocket_client_is_ended_with_no_pong,
        silent_event_stream_gets_heartbeats,
    ],
}

/// Bytes of each publication here. The kernel holds a few megabytes for a reader that does not read; the rest of what is
/// due to it is its lag.
const BULK: usize = 32 * 1024;

/// Most publications until something is shed: 64 MiB, many times what the kernel holds.
const MOST: u64 = 2_000;

fn bulk(number: u64) -> String {
    format!("{number}:{}", "x".repeat(BULK))
}

fn number(data: &str) -> u64 {
    let (number, rest) = data.split_once(':').expect("a bulk payload");
    assert_eq!(rest.len(), BULK, "a whole payload");
    number.parse().expect("a number")
}

/// Readers that keep up, one of each protocol.
struct Healthy {
    sse: Sse,
    websocket: Centrifugo,
    next: u64,
}

impl Healthy {
    fn join(weir: &Weir) -> Self {
        let mut websocket = weir.centrifugo();
        websocket.subscribe("bulk");
        Self { sse: weir.sse(&["bulk"]), websocket, next: 1 }
    }

    /// Publishes the next number and reads it on both, so that neither is ever behind by more than one.
    fn publish(&mut self, weir: &Weir) -> u64 {
        let published = weir.publish("bulk", &bulk(self.next));
        assert_eq!(published.offset, self.next);
        assert_eq!(number(&self.sse.next().data), self.next);
        let (_, publication) = self.websocket.next_publication();
        assert_eq!(number(publication["data"].as_str().expect("text")), self.next);
        self.next += 1;
        published.offset
    }

    /// Publishes until the metrics say `done`; returns the last number.
    #[track_caller]
    fn publish_until(&mut self, weir: &Weir, what: &str, done: impl Fn(&Samples) -> bool) -> u64 {
        loop {
            let last = self.publish(weir);
            assert!(last < MOST, "never after {MOST} publications: {what}");
            if last.is_multiple_of(8) && done(&weir.metrics()) {
                return last;
            }
        }
    }
}

fn shed(samples: &Samples) -> bool {
    samples.sum("weir_disconnects_total", "reason=\"slow\"") >= 1.0
}

fn lagging(samples: &Samples) -> bool {
    samples.sum("weir_lagging_connections", "") >= 1.0
}

/// A node whose histories hold everything that these tests publish, with the given bounds of lag.
fn node(driver: Driver, messages: &str, bytes: &str, age: &str) -> Weir {
    let set = |key: &str, value: &str| format!("--set={key}={value}");
    let flags = [
        set("history.messages", "4000"),
        set("history.bytes", "128MiB"),
        set("history.age", "10m"),
        set("lag.messages", messages),
        set("lag.bytes", bytes),
        set("lag.age", age),
    ];
    Weir::start(driver, &flags.each_ref().map(String::as_str))
}

fn slow_event_stream_is_shed_with_its_reason_and_can_resume(driver: Driver) {
    let weir = node(driver, "64", "1MiB", "10m");
    let slow = weir.sse_narrow(&["bulk"]);
    let mut healthy = Healthy::join(&weir);

    let last = healthy.publish_until(&weir, "the slow stream is shed", shed);

    let (items, unfinished) = slow.read_to_end();
    assert!(unfinished.is_empty(), "the stream ends with a whole line");
    let events: Vec<&Event> =
        items.iter().filter_map(|item| if let Item::Event(event) = item { Some(event) } else { None }).collect();
    let numbers: Vec<u64> = events.iter().map(|event| number(&event.data)).collect();
    let got = numbers.len() as u64;
    assert_eq!(numbers, (1..=got).collect::<Vec<_>>(), "what it got has no hole");
    assert!(got < last, "it was shed before everything was sent");
    let farewell =
        items.iter().rposition(|item| matches!(item, Item::Event(_))).map_or(&items[..], |at| &items[at + 1..]);
    assert!(
        farewell.iter().any(|item| matches!(item, Item::Comment(text) if text.contains("slow"))),
        "the reason is readable before the end: {farewell:?}"
    );
    assert!(farewell.iter().any(|item| matches!(item, Item::Retry(_))), "with advice when to come back: {farewell:?}");

    let id = &events.last().expect("the kernel took some").id;
    let mut back = weir.sse_from(&["bulk"], id);
    for expected in got + 1..=last {
        assert_eq!(number(&back.next().data), expected, "it resumes where it was cut");
    }
    healthy.publish(&weir);
}

fn slow_websocket_is_shed_with_3008_and_can_recover(driver: Driver) {
    let weir = node(driver, "64", "1MiB", "10m");
    let mut slow = Centrifugo::open_on(Connection::open_with_receive_buffer(weir.address(), 4096));
    let epoch = slow.subscribe("bulk")["epoch"].as_str().expect("a position").to_owned();
    let mut healthy = Healthy::join(&weir);

    let last = healthy.publish_until(&weir, "the slow connection is shed", shed);

    let mut got = 0;
    loop {
        match slow.socket.next() {
            Incoming::Text(text) => {
                for line in text.lines().filter(|line| *line != "{}") {
                    let value: serde_json::Value = serde_json::from_str(line).expect("JSON");
                    got += 1;
                    assert_eq!(number(value["push"]["pub"]["data"].as_str().expect("text")), got);
                }
            }
            Incoming::Close(code, reason) => {
                assert_eq!((code, reason.as_str()), (3008, "slow"));
                break;
            }
            Incoming::Ping(_) | Incoming::Pong(_) => {}
            Incoming::End => panic!("ended without a close frame after {got} publications"),
        }
    }
    assert!(got < last, "it was shed before everything was sent");

    let mut again = weir.centrifugo();
    let result = again.recover("bulk", &epoch, got);
    assert_eq!(result["recovered"], true, "{}", result["recovered"]);
    let mut missed: Vec<u64> = result["publications"]
        .as_array()
        .expect("publications")
        .iter()
        .map(|publication| number(publication["data"].as_str().expect("text")))
        .collect();
    // What is more than a reply lists follows as publications.
    let rest = (last - got) as usize - missed.len();
    missed.extend(again.next_data(rest).iter().map(|data| number(data.as_str().expect("text"))));
    assert_eq!(missed, (got + 1..=last).collect::<Vec<_>>());
}

fn stalled_reader_is_shed_by_age_without_further_publications(driver: Driver) {
    let weir = node(driver, "4000", "64MiB", "300ms");
    let _stalled = weir.sse_narrow(&["bulk"]);
    let mut healthy = Healthy::join(&weir);
    healthy.publish_until(&weir, "a reader is behind", |samples| lagging(samples) || shed(samples));
    // Nothing more is published: a timer has to notice it.
    eventually("the stalled reader is shed", || shed(&weir.metrics()).then_some(()));
    healthy.publish(&weir);
}

fn reader_that_pauses_below_the_bound_catches_up(driver: Driver) {
    let weir = node(driver, "4000", "64MiB", "10m");
    let mut paused = weir.sse_narrow(&["bulk"]);
    let mut paused_socket = Centrifugo::open_on(Connection::open_with_receive_buffer(weir.address(), 4096));
    paused_socket.subscribe("bulk");
    let mut healthy = Healthy::join(&weir);
    healthy
        .publish_until(&weir, "both readers are behind", |samples| samples.sum("weir_lagging_connections", "") >= 2.0);
    // Further on while they are behind, with sizes that do not fit what the kernel frees.
    let last = (0..20).map(|_| healthy.publish(&weir)).last().expect("twenty");

    for expected in 1..=last {
        assert_eq!(number(&paused.next().data), expected);
    }
    for expected in 1..=last {
        let (_, publication) = paused_socket.next_publication();
        assert_eq!(publication["offset"], expected);
        assert_eq!(number(publication["data"].as_str().expect("text")), expected);
    }
    eventually("nobody is behind any more", || (!lagging(&weir.metrics())).then_some(()));
    assert!(!shed(&weir.metrics()), "nobody was shed");
    healthy.publish(&weir);
    assert_eq!(number(&paused.next().data), last + 1, "and goes on live");
}

fn hot_channel_does_not_starve_a_small_one(driver: Driver) {
    const CROWD: usize = 100;
    /// Publications that the crowd may be behind: less than the bound of lag, so that a loaded machine sheds nobody.
    const WINDOW: u64 = 1_000;
    let weir = node(driver, "4000", "64MiB", "10m");
    let crowd = Swarm::open(Plan { clients: CROWD, ..Plan::new(weir.address(), &["hot"]) });
    let mut small = weir.sse(&["small"]);
    let stop = AtomicBool::new(false);
    let hot = AtomicU64::new(0);

    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Acquire) {
                let from = hot.load(Ordering::Acquire);
                let batch: Vec<String> = (from + 1..=from + 100).map(|number| number.to_string()).collect();
                weir.publish_all("hot", batch.iter().map(String::as_str));
                hot.store(from + 100, Ordering::Release);
                eventually("the crowd reads on", || (crowd.counts().least + WINDOW > from + 100).then_some(()));
            }
        });
        // The small channel gets through a hundred round trips although the hot one never rests.
        let finished = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for number in 0..100 {
                weir.publish("small", &number.to_string());
                assert_eq!(small.next().data, number.to_string());
            }
            eventually("the hot channel was really busy", || (hot.load(Ordering::Acquire) > WINDOW).then_some(()));
        }));
        stop.store(true, Ordering::Release);
        finished.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });

    let total = hot.load(Ordering::Acquire);
    crowd.wait_received(total);
    let counts = crowd.counts();
    counts.assert_whole();
    assert_eq!(counts.ended, 0, "nobody was disconnected");
}

fn silent_websocket_client_is_ended_with_no_pong(driver: Driver) {
    let weir = Weir::start(driver, &["--set", "websocket.ping=1s", "--set", "websocket.pong=1s"]);
    let mut answering = weir.centrifugo();
    answering.subscribe("quiet");
    std::thread::scope(|scope| {
        // The Centrifugo client of the harness answers pings while it reads; the silent one is read below it.
        let answers = scope.spawn(|| answering.next_data(1));
        let mut silent = weir.centrifugo();
        assert_eq!(silent.socket.read_to_close(), (3012, "no pong".to_owned()));
        weir.publish("quiet", "1");
        assert_eq!(answers.join().expect("the client that answers stays connected"), [1]);
    });
}

fn silent_event_stream_gets_heartbeats(driver: Driver) {
    let weir = Weir::start(driver, &["--set", "sse.heartbeat=1s"]);
    let mut sse = weir.sse(&["quiet"]);
    let mut comments = 0;
    while comments < 3 {
        match sse.next_item().expect("the stream stays open") {
            Item::Comment(_) => comments += 1,
            Item::Event(event) => assert_eq!(event.name, "open", "nothing was published"),
            Item::Position(_) | Item::Retry(_) => {}
        }
    }
}
