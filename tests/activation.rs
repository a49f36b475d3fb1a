//! Listening sockets that a service manager passes in: they outlive the node, so nobody is refused while it restarts.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use socket2::{Domain, Socket, Type};

use crate::harness::{DEADLINE, Driver, TempDir, Weir, eventually, free_address};

scenarios! {
    each_driver: [
        who_connects_while_no_node_runs_is_served_by_the_next,
        shards_share_one_socket,
        every_queue_of_a_group_and_every_address_is_served,
        an_upgrade_hands_the_socket_on_and_a_restart_finds_it_again,
        the_real_service_manager_code_starts_it_at_the_first_connection,
    ],
}

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").expect("loopback has free ports")
}

fn address(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().expect("it is bound")
}

fn node<'a>(driver: Driver, sockets: impl IntoIterator<Item = &'a TcpListener>) -> Weir {
    Weir::command(driver).activated(sockets.into_iter().map(AsFd::as_fd)).start()
}

/// Connects and asks, and does not wait for the answer.
fn ask(address: SocketAddr) -> TcpStream {
    let mut client = TcpStream::connect(address).expect("the socket listens");
    client.set_read_timeout(Some(DEADLINE)).expect("a socket option");
    client.write_all(b"GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("room for a request");
    client
}

#[track_caller]
fn assert_answered(mut client: TcpStream) {
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
}

fn who_connects_while_no_node_runs_is_served_by_the_next(driver: Driver) {
    let socket = listener();
    let mut weir = node(driver, [&socket]);
    assert_eq!(weir.address(), address(&socket), "the socket decides, not the settings");
    for stop in [libc::SIGTERM, libc::SIGKILL] {
        weir.signal(stop);
        weir.wait_end();
        let waiting: Vec<_> = (0..50).map(|_| ask(address(&socket))).collect();
        weir = node(driver, [&socket]);
        waiting.into_iter().for_each(assert_answered);
    }
    let mut stream = weir.sse(&["news"]);
    weir.publish("news", "1");
    assert_eq!(stream.next().data, "1");
}

fn shards_share_one_socket(driver: Driver) {
    let socket = listener();
    let weir = node(driver, [&socket]);
    let before = weir.metrics().sum("weir_accepted_total", "");
    let clients: Vec<_> = (0..100).map(|_| ask(address(&socket))).collect();
    clients.into_iter().for_each(assert_answered);
    // The scrape itself is one.
    assert_eq!(weir.metrics().sum("weir_accepted_total", "") - before, 101.0, "each is accepted once");
}

fn every_queue_of_a_group_and_every_address_is_served(driver: Driver) {
    // As ReusePort=yes makes them: three queues for two shards, the kernel chooses one for each connection.
    let reuse_port = |address: SocketAddr| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_reuse_port(true).expect("a socket option");
        socket.bind(&address.into()).expect("the address may be shared");
        socket.listen(128).expect("it is bound");
        TcpListener::from(socket)
    };
    let first = reuse_port("127.0.0.1:0".parse().expect("an address"));
    let group = [reuse_port(address(&first)), reuse_port(address(&first)), first, listener()];
    let weir = node(driver, &group);
    for socket in [&group[0], &group[3]] {
        let clients: Vec<_> = (0..60).map(|_| ask(address(socket))).collect();
        clients.into_iter().for_each(assert_answered);
    }
    weir.wait_log("whose sockets", |line| {
        line.contains("the service manager's sockets") && line.contains("\"sockets\":4")
    });
}

fn environment(pid: u32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/environ")).expect("it runs");
    String::from_utf8_lossy(&bytes).replace('\0', "\n")
}

fn an_upgrade_hands_the_socket_on_and_a_restart_finds_it_again(driver: Driver) {
    let socket = listener();
    let command = Weir::command(driver).activated([socket.as_fd()]);
    // A whole day: nobody is there to be told.
    let command = command.environment("WATCHDOG_USEC", Path::new("86400000000"));
    let mut weir = command.environment("WATCHDOG_PID", Path::new("1")).start();
    let mut stream = weir.sse(&["news"]);
    weir.upgrade();
    weir.publish("news", "1");
    assert_eq!(stream.next().data, "1");
    let seen = environment(weir.pid());
    assert!(!seen.contains("LISTEN_") && !seen.contains("WATCHDOG_PID"), "they speak of the process before: {seen}");
    assert!(seen.contains("WATCHDOG_USEC="), "the next process is watched as well: {seen}");
    weir.signal(libc::SIGTERM);
    stream.read_to_end();
    let last = weir.pid();
    eventually("the next process ends", || weir.has_ended(last).then_some(()));
    let waiting = ask(address(&socket));
    let _weir = node(driver, [&socket]);
    assert_answered(waiting);
}

fn the_real_service_manager_code_starts_it_at_the_first_connection(driver: Driver) {
    let address = free_address();
    let first = std::thread::spawn(move || {
        eventually("the socket listens", || TcpStream::connect(address).ok().map(drop));
        assert_answered(ask(address));
    });
    let listen = address.to_string();
    let weir = Weir::command(driver).launched_by(&["systemd-socket-activate", "--listen", &listen]).start();
    assert_eq!(weir.address(), address);
    first.join().expect("it was answered");
}

#[track_caller]
fn assert_refused(descriptors: &[BorrowedFd<'_>], parts: &[&str]) {
    let command = Weir::command(Driver::Epoll).activated(descriptors.iter().copied());
    let (status, text) = command.run_to_refusal();
    assert!(!status.success());
    for part in parts.iter().chain(&["allowed: a listening TCP socket", "Accept=no"]) {
        assert!(text.contains(part), "names {part:?}: {text}");
    }
}

#[test]
fn what_is_no_listening_tcp_socket_is_refused_by_name() {
    let directory = TempDir::new();
    let unix = UnixListener::bind(directory.path().join("a.sock")).expect("a free path");
    let udp = UdpSocket::bind("127.0.0.1:0").expect("loopback has free ports");
    let good = listener();
    let connection = TcpStream::connect(address(&good)).expect("it listens");
    assert_refused(&[unix.as_fd()], &["descriptor 3", "is a Unix socket"]);
    assert_refused(&[good.as_fd(), udp.as_fd()], &["descriptor 4", "is not of TCP"]);
    // What a unit with Accept=yes passes in.
    assert_refused(&[connection.as_fd()], &["descriptor 3", "does not listen"]);
}

#[test]
fn a_count_that_means_nothing_is_refused() {
    let script = "export LISTEN_PID=$$ LISTEN_FDS=many; exec \"$0\" \"$@\"";
    let (status, text) = Weir::command(Driver::Epoll).launched_by(&["/bin/bash", "-c", script]).run_to_refusal();
    assert!(!status.success());
    for part in ["LISTEN_FDS", "many", "allowed: a number up to 1024"] {
        assert!(text.contains(part), "names {part:?}: {text}");
    }
}

#[test]
fn sockets_of_another_process_are_left_alone() {
    // An ancestor's variables, which it did not remove: descriptor 3 is whatever the program has there.
    let (one, other) = (Path::new("1"), Path::new("2"));
    let weir = Weir::command(Driver::Epoll).environment("LISTEN_PID", one).environment("LISTEN_FDS", other).start();
    assert_ne!(weir.address().port(), 0, "it listens by itself");
}
