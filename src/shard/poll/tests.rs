//! Polls that wait, without sockets: what they would be sent is read from the connection.

use std::sync::Arc;

use super::*;
use crate::limits::FAREWELL_MILLIS;
use crate::log::frame::FrameKind;
use crate::log::frame::testing::frame;
use crate::log::position::{ChannelTag, Epoch, Position};
use crate::metrics::{DISCONNECT_REASONS, ShardMetrics, ShardRecorder};
use crate::shard::mailbox::ToShard;
use crate::shard::timer::TICK_MILLIS;
use crate::wire::http1::{ResponseHead, parse_response_head};

const SECOND: Micros = 1_000_000;

fn at(offset: u64) -> Position {
    Position { epoch: Epoch(1), offset }
}

fn poll(offset: u64) -> Poll {
    let cursor = vec![CursorEntry { tag: ChannelTag::of("a"), position: at(offset) }];
    Poll { cursor, wait: Duration::from_secs(20), known: None, origin: None }
}

/// A shard with one live channel at offset 0, and its metrics.
fn shard(settings: Settings) -> (Core, ChannelId, Arc<ShardMetrics>) {
    let metrics = Arc::new(ShardMetrics::default());
    let mut core = Core::new(0, Arc::new(settings), 7, ShardRecorder::new(metrics.clone()));
    let (channel, _) = core.reserve(&Arc::from("a"), 0);
    core.on_message(ToShard::Live { channel, position: at(0), frames: Vec::new() }, 0);
    (core, channel, metrics)
}

/// A poll on the channel, which takes a hold of its own.
fn admit(core: &mut Core, poll: Poll, now: Micros) -> Slot {
    let (channel, live) = core.reserve(&Arc::from("a"), 0);
    assert!(live);
    core.admit_poll(&[channel], poll, now)
}

fn publish(core: &mut Core, channel: ChannelId, offset: u64, now: Micros) {
    let frame = frame(FrameKind::Publication, at(offset), now);
    core.on_message(ToShard::Publication { channel, frame }, now);
}

fn response(core: &Core, slot: Slot) -> (ResponseHead, String) {
    let control = &core.connections[slot as usize].control;
    let (head, length) = parse_response_head(control).unwrap().expect("a whole head");
    (head, String::from_utf8(control[length..].to_vec()).unwrap())
}

fn ended(metrics: &ShardMetrics, reason: &str) -> u64 {
    metrics.disconnects[DISCONNECT_REASONS.iter().position(|label| *label == reason).unwrap()].get()
}

/// Every tick from one moment to another.
fn pass_time(core: &mut Core, from: Micros, to: Micros) {
    (from..to).step_by(TICK_MILLIS as usize * 1_000).for_each(|now| core.sweep(now));
}

#[test]
fn a_wait_that_ends_with_nothing_is_answered_with_the_same_cursor() {
    let (mut core, _, metrics) = shard(Settings::default());
    let slot = admit(&mut core, poll(0), 0);
    pass_time(&mut core, 0, 20 * SECOND);
    assert!(core.connections[slot as usize].control.is_empty());
    assert_eq!((metrics.poll.get(), metrics.subscriptions.get()), (1, 1));
    pass_time(&mut core, 20 * SECOND, 22 * SECOND);
    let (head, body) = response(&core, slot);
    assert_eq!((head.status, head.keep_alive(), head.header("cache-control")), (200, false, Some("no-store")));
    let body: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["cursor"], poll(0).cursor[0].to_string());
    assert_eq!(body["channels"]["a"]["publications"], serde_json::json!([]));
    assert_eq!((metrics.poll.get(), metrics.subscriptions.get(), ended(&metrics, "answered")), (0, 0, 1));
    assert_eq!((metrics.http_requests[1].get(), metrics.deliveries.get()), (1, 0));
}

#[test]
fn what_came_before_the_socket_did_is_answered_at_once() {
    let (mut core, channel, metrics) = shard(Settings::default());
    publish(&mut core, channel, 1, 5);
    let slot = admit(&mut core, poll(0), 9);
    let (head, body) = response(&core, slot);
    assert_eq!((head.status, head.header("cache-control")), (200, Some("public, max-age=1")));
    assert!(body.contains("\"publications\":[1]"), "{body}");
    assert_eq!((metrics.poll.get(), metrics.deliveries.get()), (0, 1));
}

#[test]
fn an_answer_the_reader_has_is_not_sent_again() {
    let (mut core, channel, metrics) = shard(Settings::default());
    let tag = core.poll(&[channel], &poll(0).cursor).tag;
    let slot = admit(&mut core, Poll { known: Some(format!("\"x\", W/{tag}").into()), ..poll(0) }, 0);
    pass_time(&mut core, 0, 22 * SECOND);
    let (head, body) = response(&core, slot);
    assert_eq!((head.status, head.header("etag"), &*body), (304, Some(&*tag), ""));
    assert_eq!(metrics.http_requests[2].get(), 1);
}

#[test]
fn a_node_that_stops_sends_polls_away_with_a_time_to_come_back() {
    let (mut core, _, metrics) = shard(Settings::default());
    let slots: Vec<Slot> = (0..40).map(|_| admit(&mut core, poll(0), 0)).collect();
    core.on_message(ToShard::Stop, SECOND);
    core.dismiss(false, SECOND);
    let mut delays: Vec<u32> = Vec::new();
    for slot in slots {
        let (head, body) = response(&core, slot);
        assert_eq!((head.status, &*body), (503, r#"{"error":"shutdown"}"#));
        delays.push(head.header("retry-after").unwrap().parse().unwrap());
    }
    delays.sort_unstable();
    delays.dedup();
    assert!(delays.len() > 2 && delays[0] >= 1 && *delays.last().unwrap() <= RETRY_AFTER_SECONDS, "{delays:?}");
    assert_eq!((metrics.poll.get(), ended(&metrics, "shutdown"), metrics.http_requests[4].get()), (0, 40, 40));
}

#[test]
fn a_slow_reader_has_time_for_its_answer_until_the_node_stops() {
    let (mut core, channel, _) = shard(Settings::default());
    publish(&mut core, channel, 1, 0);
    let slot = admit(&mut core, poll(0), 0);
    let farewell = FAREWELL_MILLIS * 1_000;
    pass_time(&mut core, 0, 2 * farewell);
    assert!(matches!(core.connections[slot as usize].phase, Phase::Farewell { .. }));
    core.on_message(ToShard::Stop, 2 * farewell);
    pass_time(&mut core, 2 * farewell, 3 * farewell + 2 * SECOND);
    assert_eq!(core.connections[slot as usize].phase, Phase::Closing);
}

#[test]
fn caches_are_told_what_may_be_shared() {
    let answer = |news| Answer { body: Vec::new(), tag: "\"t\"".into(), publications: 0, news };
    let form = |waited| Form { waited, keep_alive: true, head_only: false };
    let mut settings = Settings::default();
    assert_eq!(cache_control(&answer(true), form(true), &settings), "public, max-age=1");
    assert_eq!(cache_control(&answer(false), form(false), &settings), "public, max-age=1");
    assert_eq!(cache_control(&answer(false), form(true), &settings), "no-store");
    settings.poll.max_age = Duration::from_millis(999);
    assert_eq!(cache_control(&answer(true), form(true), &settings), "no-cache");
    for (patterns, origin, allowed, vary) in [
        ("*", None, Some("*"), None),
        ("https://a.example", Some("https://a.example"), Some("https://a.example"), Some("Origin")),
        ("https://a.example", None, None, Some("Origin")),
    ] {
        settings.allow_origins = vec![patterns.into()];
        let asked = Poll { origin: origin.map(Into::into), ..poll(0) };
        let mut out = Vec::new();
        asked.write_answer(&mut out, &answer(true), form(false), &settings);
        let (head, _) = parse_response_head(&out).unwrap().unwrap();
        assert_eq!((head.header("access-control-allow-origin"), head.header("vary")), (allowed, vary));
    }
}
