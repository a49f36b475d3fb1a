//! Nodes whose shards and backbone are small stand-ins: what is tested is who starts, who is told and who is waited for.

use std::io::{Read, Write};
use std::net::TcpStream;

use super::*;
use crate::settings::{DrainConfig, DriverChoice};

struct Steady;

impl BackboneReport for Steady {
    fn ready(&self) -> Result<(), String> {
        Ok(())
    }
    fn turns(&self) -> u64 {
        0
    }
    fn measure(&self, snapshot: &mut NodeSnapshot) {
        snapshot.backbone_channels = 7;
    }
}

fn settings() -> Settings {
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let drain = DrainConfig { unready: Duration::ZERO, window: Duration::ZERO };
    Settings { listen, shards: 2, driver: DriverChoice::Epoll, drain, ..Settings::default() }
}

/// Ends, as the relay does, when every shard and the node have dropped their sender.
fn relay(mut start: BackboneStart) -> Result<(), String> {
    assert_eq!(start.shards.len(), 2);
    while start.requests.blocking_recv().is_some() {}
    Ok(())
}

fn parts(shard: fn(ShardStart) -> Result<(), String>) -> impl FnOnce(usize) -> Parts {
    move |_| bodies(shard)
}

fn bodies(shard: fn(ShardStart) -> Result<(), String>) -> Parts {
    Parts { backbone: Box::new(relay), shard, report: Arc::new(Steady) }
}

/// Waits for the shard's bell; true when it was told to stop.
fn told_to_stop(start: &ShardStart) -> bool {
    let mut fd = libc::pollfd { fd: start.mailbox.bell().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one live pollfd.
    unsafe { libc::poll(&raw mut fd, 1, 10) };
    start.mailbox.bell().quiet();
    std::iter::from_fn(|| start.mailbox.take()).any(|message| matches!(message, ToShard::Stop))
}

/// Answers each connection with the node's readiness and metrics until it is told to stop.
fn reporting_shard(start: ShardStart) -> Result<(), String> {
    start.listeners[0].set_nonblocking(true).map_err(|error| error.to_string())?;
    while !told_to_stop(&start) {
        if let Ok((mut client, _)) = start.listeners[0].accept() {
            let text = format!("{:?} {}\n{}", start.node.ready(), start.index, start.node.metrics_text());
            client.write_all(text.as_bytes()).map_err(|error| error.to_string())?;
        }
    }
    assert_eq!(start.node.ready(), Err("the node is stopping".into()));
    Ok(())
}

/// Starts, uses and ends a node on a thread of its own, whose signals are blocked for it alone.
fn on_own_thread<T: Send + 'static>(test: impl FnOnce(Signals) -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(|| test(Signals::block().expect("a descriptor")));
    thread.join().expect("the test thread ends")
}

fn signal_this_thread() {
    // SAFETY: sends a signal that this thread blocks to this thread alone.
    unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGTERM) };
}

#[test]
fn a_node_serves_until_a_signal_and_ends_in_order() {
    on_own_thread(|signals| {
        let node = Node::start(settings(), parts(reporting_shard)).expect("it starts");
        let mut answer = String::new();
        let mut client = TcpStream::connect(node.address()).expect("it listens");
        client.read_to_string(&mut answer).expect("it answers");
        assert!(answer.starts_with("Ok(()) "), "{answer}");
        assert!(answer.contains("\nweir_ready 1\n") && answer.contains("\nweir_backbone_channels 7\n"), "{answer}");
        signal_this_thread();
        node.run(&signals).expect("it ends in order");
    });
}

#[test]
fn a_shard_that_fails_ends_the_node() {
    on_own_thread(|signals| {
        let failing = |start: ShardStart| if start.index == 1 { Err("no ring".into()) } else { reporting_shard(start) };
        let node = Node::start(settings(), parts(failing)).expect("it starts");
        let error = node.run(&signals).expect_err("half a node is none").to_string();
        assert_eq!(error, "thread shard-1 ended: no ring");
    });
}

#[test]
fn a_thread_that_panics_or_leaves_ends_the_node() {
    on_own_thread(|signals| {
        let leaving = |start: ShardStart| if start.index == 0 { Ok(()) } else { reporting_shard(start) };
        let node = Node::start(settings(), parts(leaving)).expect("it starts");
        assert_eq!(node.run(&signals).expect_err("it left").to_string(), "thread shard-0 ended: nobody asked it to");
        let panicking =
            Parts { backbone: Box::new(|_| panic!("a panic that this test causes")), ..bodies(reporting_shard) };
        let node = Node::start(settings(), |_| panicking).expect("it starts");
        assert_eq!(node.run(&signals).expect_err("it panicked").to_string(), "thread backbone ended: it panicked");
    });
}

#[test]
fn a_full_mailbox_is_told_to_stop_all_the_same() {
    on_own_thread(|signals| {
        let busy = |start: ShardStart| {
            while start.mailbox.post(ToShard::Released { channel: 0 }).is_ok() {}
            start.relay.blocking_send(ToRelay::Disinterest { shard: 0, channel: 0, name: "full".into() }).unwrap();
            std::thread::sleep(Duration::from_millis(30));
            while !told_to_stop(&start) {}
            Ok(())
        };
        let (full, fulls) = channel::channel();
        let watching = Parts {
            backbone: Box::new(move |mut start: BackboneStart| {
                while start.requests.blocking_recv().is_some() {
                    let _ = full.send(());
                }
                Ok(())
            }),
            ..bodies(busy)
        };
        let mut node = Node::start(settings(), |_| watching).expect("it starts");
        (0..2).for_each(|_| fulls.recv().expect("each mailbox gets full"));
        node.stop(&signals).expect("it ends in order");
    });
}

#[test]
fn a_second_signal_ends_the_wait() {
    on_own_thread(|signals| {
        let deaf = |start: ShardStart| {
            while start.node.ready().is_ok() {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_secs(3_600));
            Ok(())
        };
        let mut node = Node::start(settings(), parts(deaf)).expect("it starts");
        signal_this_thread();
        let error = node.stop(&signals).expect_err("the shards do not listen").to_string();
        assert_eq!(error, "stopped before these threads had ended: backbone, shard-0, shard-1");
    });
}

#[test]
fn what_cannot_be_had_is_said_before_anything_starts() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    let listen = taken.local_addr().expect("it is bound");
    let error = Node::start(Settings { listen, ..settings() }, parts(reporting_shard)).err().expect("it is taken");
    assert!(matches!(error, NodeError::Listen { address, .. } if address == listen), "{error}");
}
