//! A backbone that breaks: whatever was missed is delivered or announced, and nothing twice.

use super::*;

/// Reads a shard's publications until one has this payload; returns what came before it: publications and gaps.
fn read_until(node: &Node, data: &str) -> (Vec<Position>, Vec<Position>, Position) {
    let (mut publications, mut gaps) = (Vec::new(), Vec::new());
    loop {
        let frame = node.frame(0);
        match frame.kind {
            FrameKind::Publication if payload(&frame) == data => return (publications, gaps, frame.position),
            FrameKind::Publication => publications.push(frame.position),
            FrameKind::Gap => gaps.push(frame.position),
            FrameKind::Unpositioned => panic!("{frame:?}"),
        }
    }
}

#[test]
fn what_was_published_while_unsubscribed_is_read() {
    let server = Server::start(&[]);
    let node = Node::on(Some(&server), 1);
    let channels: Vec<String> = (0..40).map(|n| format!("c{n}")).collect();
    let mut starts = Vec::new();
    for (local, name) in (0..).zip(&channels) {
        node.interest(0, local, name);
        starts.push(node.live(0).0);
    }
    // The subscriptions go and the publications come in one step of the server.
    let mut pipeline = redis::pipe();
    pipeline.atomic().cmd("CLIENT").arg(&["KILL", "TYPE", "pubsub"]).ignore();
    let each = crate::limits::RECOVERY_PAGE as u64 + 10;
    for name in &channels {
        let count = if name == "c0" { each } else { 3 };
        for n in 1..=count {
            let key = |suffix: &str| format!("weir:{{{name}}}{suffix}");
            pipeline.cmd("FCALL").arg("weir_publish").arg(2).arg(key(":meta")).arg(key(":stream")).arg(key("")).arg(n);
            pipeline.ignore();
        }
    }
    pipeline.exec(&mut server.connect()).unwrap();
    let mut next: Vec<u64> = vec![1; channels.len()];
    for _ in 0..each + 39 * 3 {
        let ToShard::Publication { channel, frame } = node.next(0) else { panic!() };
        let local = channel as usize;
        assert_eq!(frame.position, Position { offset: next[local], ..starts[local] });
        assert_eq!(payload(&frame), next[local].to_string());
        next[local] += 1;
    }
    assert_eq!(node.status.gaps.get(), 0);
    assert_eq!(node.status.repaired.get(), each + 39 * 3);
    assert_eq!(node.status.connects.get(), 2);
    server.cli_publish("c7", "4");
    assert_eq!(node.publication(0).0.offset, 4);
}

#[test]
fn a_killed_server_that_kept_its_data_costs_nothing() {
    let mut server = Server::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    let node = Node::on(Some(&server), 1);
    node.interest(0, 1, "news");
    let (start, _) = node.live(0);
    server.cli_publish("news", "1");
    assert_eq!(node.publication(0).0.offset, 1);
    server.kill();
    node.until("disconnected", |node| node.status.ready().is_err());
    let refused = Instant::now();
    node.publish(0, "news", "lost", None);
    match node.next(0) {
        ToShard::Reply { reply: Reply::Published(Err(RequestError::Unavailable(_))), .. } => {}
        other => panic!("{other:?}"),
    }
    assert!(refused.elapsed() < Duration::from_secs(1), "a publish without a connection is answered at once");
    server.restart();
    for n in 2..=4 {
        server.cli_publish("news", &n.to_string());
    }
    for offset in 2..=4 {
        assert_eq!(node.publication(0), (Position { offset, ..start }, offset.to_string()));
    }
    node.until("ready", |node| node.status.ready().is_ok());
    assert_eq!(node.status.gaps.get(), 0);
}

#[test]
fn a_server_that_comes_back_empty_is_an_announced_gap() {
    let mut server = Server::start(&[]);
    let node = Node::on(Some(&server), 2);
    node.interest(0, 1, "news");
    let (start, _) = node.live(0);
    server.cli_publish("news", "1");
    assert_eq!(node.publication(0).0.offset, 1);
    server.kill();
    server.restart();
    let frame = node.frame(0);
    assert_eq!((frame.kind, frame.position.offset), (FrameKind::Gap, 0));
    assert_ne!(frame.position.epoch, start.epoch);
    let gap: serde_json::Value = serde_json::from_str(&payload(&frame)).unwrap();
    assert_eq!(gap["channel"], "news");
    assert_eq!(gap["from"], serde_json::json!({ "epoch": start.epoch.to_string(), "offset": 1 }));
    assert_eq!(gap["to"], serde_json::json!({ "epoch": frame.position.epoch.to_string(), "offset": 0 }));
    let position = node.publish_and_wait(1, "news", "again", None);
    assert_eq!(position, Position { offset: 1, ..frame.position });
    assert_eq!(node.publication(0), (position, "again".into()));
    // Who comes now is not given positions of both epochs.
    node.interest(1, 1, "news");
    assert_eq!(node.live(1), (position, vec![1]));
}

/// Redis saved at offset 2, the node saw 4, Redis died and came back with 2: offsets 3 and 4 are given out again. Without
/// another epoch the node would take the new ones for repetitions.
#[test]
fn offsets_given_out_again_are_not_taken_for_repetitions() {
    for publish_at_once in [false, true] {
        let mut server = Server::start(&[]);
        let node = Node::on(Some(&server), 1);
        node.interest(0, 1, "news");
        let (start, _) = node.live(0);
        server.cli_publish("news", "1");
        server.cli_publish("news", "2");
        server.query::<()>(&["SAVE"]);
        server.cli_publish("news", "3");
        server.cli_publish("news", "4");
        for offset in 1..=4 {
            assert_eq!(node.publication(0).0, Position { offset, ..start });
        }
        server.kill();
        server.restart();
        if publish_at_once {
            for n in 3..=6 {
                server.cli_publish("news", &format!("new {n}"));
            }
        }
        node.until("told of the gap", |node| node.status.gaps.get() > 0);
        server.cli_publish("news", "last");
        let (_, gaps, last) = read_until(&node, "last");
        assert!(!gaps.is_empty());
        assert_ne!(last.epoch, start.epoch);
    }
}

/// Redis saved at offset 2, the node saw 4, Redis came back with 2 and others have published since: the same payloads, so
/// that nothing but the tags differs, and as many as were lost or one more. `then` happens before the node comes back.
fn regained(more: u64, then: &[&str]) -> (Node, Server, Position) {
    let mut server = Server::start(&[]);
    let door = server.door();
    let node = Node::start(Settings { redis: Some(door.config()), ..Settings::default() }, 1);
    node.interest(0, 1, "news");
    let (start, _) = node.live(0);
    for n in 1..=4 {
        server.cli_publish("news", &n.to_string());
        assert_eq!(node.publication(0).0, Position { offset: n, ..start });
        if n == 2 {
            server.query::<()>(&["SAVE"]);
        }
    }
    door.close();
    server.kill();
    server.restart();
    for n in 3..=4 + more {
        server.cli_publish("news", &n.to_string());
    }
    if !then.is_empty() {
        server.cli(then);
    }
    door.open();
    (node, server, start)
}

#[test]
fn the_same_payloads_under_the_same_offsets_are_not_the_same_publications() {
    for more in [0, 1] {
        let (node, server, start) = regained(more, &[]);
        let frame = node.frame(0);
        assert_eq!((frame.kind, frame.position.offset), (FrameKind::Gap, 2), "what both have is not lost");
        assert_ne!(frame.position.epoch, start.epoch);
        let epoch = frame.position.epoch;
        for offset in 3..=4 + more {
            assert_eq!(
                node.publication(0),
                (Position { epoch, offset }, offset.to_string()),
                "what Redis has is delivered"
            );
        }
        server.cli_publish("news", "last");
        assert_eq!(node.publication(0), (Position { epoch, offset: 5 + more }, "last".into()));
        assert_eq!(node.status.gaps.get(), 1);
    }
}

#[test]
fn an_offset_given_out_again_is_recognised_when_its_entry_is_gone() {
    let trims: [(u64, &[&str]); 3] = [
        (0, &["DEL", "weir:{news}:stream"]),
        (1, &["XTRIM", "weir:{news}:stream", "MAXLEN", "=", "1"]),
        (1, &["DEL", "weir:{news}:stream"]),
    ];
    for (more, then) in trims {
        let (node, server, start) = regained(more, then);
        let frame = node.frame(0);
        assert_eq!(frame.kind, FrameKind::Gap, "{then:?}: {frame:?}");
        server.cli_publish("news", "last");
        let (_, _, last) = read_until(&node, "last");
        assert_eq!(last.offset, 5 + more);
        assert!(last.epoch != start.epoch || (more == 1 && then[0] == "DEL"), "only a plain gap keeps the epoch");
    }
}

/// Whoever was not told of the lost publications goes on without a gap of its own beyond the change of the epoch.
#[test]
fn a_node_that_did_not_see_what_was_lost_misses_nothing() {
    let (node, server, start) = regained(0, &[]);
    let gap = node.frame(0);
    let other = Node::on(Some(&server), 1);
    other.interest(0, 1, "news");
    let (head, frames) = other.live(0);
    assert_eq!((head, frames), (Position { epoch: gap.position.epoch, offset: 4 }, vec![1, 2, 3, 4]));
    assert_ne!(head.epoch, start.epoch);
}

#[test]
fn a_server_that_hangs_is_noticed_and_found_again() {
    let server = Server::start(&[]);
    let node = Node::on(Some(&server), 1);
    node.interest(0, 1, "news");
    let (start, _) = node.live(0);
    server.signal(libc::SIGSTOP);
    node.until("not ready", |node| node.status.ready().is_err());
    node.until("disconnected", |node| !node.status.connected());
    server.signal(libc::SIGCONT);
    node.until("ready", |node| node.status.ready().is_ok());
    server.cli_publish("news", "1");
    assert_eq!(node.publication(0).0, Position { offset: 1, ..start });
    assert_eq!(node.status.gaps.get(), 0);
}

/// The field's best-known failure: commands are answered, the connection is open, and no message arrives any more.
#[test]
fn a_subscription_that_went_deaf_is_noticed_and_made_anew() {
    let server = Server::start(&[]);
    let proxy = server.proxy();
    let node = Node::start(Settings { redis: Some(proxy.config()), ..Settings::default() }, 1);
    node.interest(0, 1, "news");
    let (start, _) = node.live(0);
    server.cli_publish("news", "1");
    assert_eq!(node.publication(0).0, Position { offset: 1, ..start });
    proxy.set_deaf(true);
    server.cli_publish("news", "2");
    node.until("not ready", |node| node.status.ready().is_err());
    node.until("disconnected", |node| !node.status.connected());
    let reason = node.status.ready().unwrap_err();
    assert!(reason.contains("nothing came back over pub/sub") || reason.contains("no answer"), "{reason}");
    proxy.set_deaf(false);
    node.until("ready", |node| node.status.ready().is_ok());
    assert_eq!(node.publication(0), (Position { offset: 2, ..start }, "2".into()));
    assert_eq!(node.status.gaps.get(), 0);
}

#[test]
fn a_flushed_publishing_step_is_brought_back() {
    let server = Server::start(&[]);
    let node = Node::on(Some(&server), 1);
    assert_eq!(node.publish_and_wait(0, "news", "1", None).offset, 1);
    server.query::<()>(&["FUNCTION", "FLUSH"]);
    assert_eq!(node.publish_and_wait(0, "news", "2", None).offset, 2);
    assert_eq!(node.publish_and_wait(0, "news", "3", None).offset, 3);
}

#[test]
fn without_functions_the_step_is_a_script() {
    let server = Server::start(&["--rename-command", "FUNCTION", "NOFUNCTION"]);
    let node = Node::on(Some(&server), 2);
    node.interest(0, 1, "news");
    let (start, _) = node.live(0);
    for offset in 1..=3 {
        let position = node.publish_and_wait(1, "news", &offset.to_string(), Some("k").filter(|_| offset == 3));
        assert_eq!(position, Position { offset, ..start });
        assert_eq!(node.publication(0).0, position);
        server.query::<()>(&["SCRIPT", "FLUSH"]);
    }
    assert_eq!(node.publish_and_wait(1, "news", "3", Some("k")).offset, 3);
    assert_eq!(server.query::<Vec<String>>(&["NOFUNCTION", "LIST"]), Vec::<String>::new());
}

#[test]
fn a_later_version_of_the_step_is_kept() {
    let server = Server::start(&[]);
    let later = include_str!("../../publish.lua").replace("contract, version 2\n", "contract, version 3\n");
    server.query::<String>(&["FUNCTION", "LOAD", "REPLACE", &later]);
    let node = Node::on(Some(&server), 1);
    assert_eq!(node.publish_and_wait(0, "news", "1", None).offset, 1);
    assert!(server.cli(&["FUNCTION", "LIST", "WITHCODE"]).contains("contract, version 3"));
}

#[test]
fn a_position_that_redis_does_not_know_moves_nothing() {
    let server = Server::start(&[]);
    let node = Node::on(Some(&server), 1);
    node.interest(0, 1, "news");
    let (start, _) = node.live(0);
    let mut forged = vec![0xff];
    forged.extend_from_slice(format!("{}.1000 forged", start.epoch).as_bytes());
    redis::cmd("PUBLISH").arg("weir:{news}").arg(forged).exec(&mut server.connect()).unwrap();
    node.until("seen", |node| node.status.strays.get() == 1);
    server.cli_publish("news", "1");
    assert_eq!(node.publication(0), (Position { offset: 1, ..start }, "1".into()));
    assert_eq!(node.status.gaps.get(), 0);
}

/// Redis evicts one of a channel's two keys: the entries that are left belong to the epoch before.
#[test]
fn a_stream_without_its_position_is_not_delivered_again() {
    let server = Server::start(&[]);
    let node = Node::on(Some(&server), 1);
    node.interest(0, 1, "news");
    let (start, _) = node.live(0);
    server.cli_publish("news", "1");
    server.cli_publish("news", "2");
    assert_eq!((node.publication(0).0.offset, node.publication(0).0.offset), (1, 2));
    server.query::<u64>(&["DEL", "weir:{news}:meta"]);
    server.query::<u64>(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    node.until("told of the gap", |node| node.status.gaps.get() > 0);
    server.cli_publish("news", "3");
    let (again, gaps, last) = read_until(&node, "3");
    assert_eq!(again, []);
    assert!(!gaps.is_empty());
    assert_ne!(last.epoch, start.epoch);
}

/// The same, by a publisher that keeps no history: nothing ever clashes with the old entries.
#[test]
fn an_evicted_position_does_not_bring_back_the_epoch_before() {
    let server = Server::start(&[]);
    let node = Node::on(Some(&server), 2);
    node.interest(0, 1, "news");
    let (start, _) = node.live(0);
    for n in 1..=3 {
        server.cli_publish("news", &n.to_string());
        assert_eq!(node.publication(0).0.offset, n);
    }
    server.query::<String>(&["XADD", "weir:{news}:stream", "*", "d", "added"]);
    server.query::<u64>(&["DEL", "weir:{news}:meta"]);
    server.query::<u64>(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    node.until("told of the gap", |node| node.status.gaps.get() > 0);
    for n in 1..=2 {
        let names = ["weir:{news}:meta", "weir:{news}:stream", "weir:{news}", &format!("unkept {n}"), "0"];
        server.cli(&[&["FCALL", "weir_publish", "2"][..], &names].concat());
    }
    let (again, _, last) = read_until(&node, "unkept 2");
    assert_eq!((again.len(), last.offset), (1, 2));
    assert_ne!(last.epoch, start.epoch);
    assert_eq!(
        node.history(1, query("news", Position { offset: 0, ..last }, 3)),
        Ok(vec![]),
        "none of the two was kept"
    );
    assert_eq!(server.query::<u64>(&["XLEN", "weir:{news}:stream"]), 1, "a plain entry still waits to be taken up");
    server.cli_publish("news", "kept");
    assert_eq!(read_until(&node, "added").2.offset, 3);
    assert_eq!(node.publication(0), (Position { offset: 4, ..last }, "kept".into()));
}
