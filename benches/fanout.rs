//! CPU per delivery of the real fan-out against a bare floor, over real loopback sockets in one run.
//!
//! The floor does the part nobody can do without: it sends the same bytes to the same number of sockets, by a loop of
//! `send(2)` and by a bare ring with the flags the product uses. weir is a whole node (embedded backbone, one shard). Every
//! contender is published to by the same thread, does its work in threads of its own, and is read by a process of its own;
//! what counts is the CPU time of its threads from the moment before the first publication of a round until they sleep after
//! the last, from the kernel's own accounting. Contenders alternate within a round, and each ratio is the median over the
//! rounds, because absolute times move with whatever else the machine does.
//!
//! `cargo bench --bench fanout` exits with 1 when weir takes more than [`MOST_RATIO`] times the bare ring's time.
//! `-- --quick` is short and only reports; `--subscribers N --size BYTES --rounds N --messages N` change the form.

mod sockets;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use io_uring::squeue::Flags;
use io_uring::{IoUring, opcode, types::Fixed};
use sockets::crowd::Crowd;
use sockets::network::Network;
use sockets::{LOOPBACK, Protocol, Publisher, payload};
use weir::control::host;
use weir::control::node::Node;
use weir::log::frame::{ChannelBlocks, FrameEncoder, FrameKind};
use weir::log::position::{Epoch, Position};
use weir::settings::Settings;

/// The bar of the project: everything weir does beside the sends costs at most a tenth of them.
const MOST_RATIO: f64 = 1.10;
/// Publications before the first round: offsets have three digits from then on, so every frame has the same length.
const WARM_UP: usize = 100;
/// How long a thread may take to go to sleep after its last delivery has arrived; its CPU time is exact only then.
const SLEEPS: Duration = Duration::from_millis(3);
/// Longer than any run: heartbeats and pings would be counted as deliveries.
const NEVER: Duration = Duration::from_secs(3_600);

struct Options {
    subscribers: usize,
    size: usize,
    rounds: usize,
    /// Publications a round and contender.
    messages: usize,
    quick: bool,
}

impl Options {
    fn from_args() -> Self {
        let mut options = Self { subscribers: 5_000, size: 200, rounds: 9, messages: 20, quick: false };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut number = || args.next().and_then(|value| value.parse().ok()).expect("a number");
            match arg.as_str() {
                "--quick" | "--test" => {
                    (options.subscribers, options.rounds, options.messages, options.quick) = (500, 3, 10, true);
                }
                "--subscribers" => options.subscribers = number(),
                "--size" => options.size = number(),
                "--rounds" => options.rounds = number(),
                "--messages" => options.messages = number(),
                // cargo passes flags of its own.
                _ => {}
            }
        }
        assert!(WARM_UP + 1 + options.rounds * options.messages < 1_000, "offsets must keep their three digits");
        options
    }
}

/// Nanoseconds on a CPU of one thread of this process; exact while it sleeps.
fn cpu_nanos(thread: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).expect("schedstat");
    text.split_whitespace().next().and_then(|field| field.parse().ok()).expect("nanoseconds")
}

fn thread_named(name: &str) -> String {
    for entry in std::fs::read_dir("/proc/self/task").expect("own threads").flatten() {
        if std::fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim() == name) {
            return entry.file_name().to_string_lossy().into_owned();
        }
    }
    panic!("no thread {name}");
}

/// One way to deliver a publication to every client of a crowd.
struct Contender {
    name: String,
    crowd: Crowd,
    /// The threads whose CPU time counts.
    threads: Vec<String>,
    /// Hands one publication to those threads.
    publish: Box<dyn FnMut()>,
    /// Bytes one client receives for one publication.
    frame_bytes: usize,
}

impl Contender {
    /// A floor: `prepare` runs in a thread of its own and makes what sends a frame to all of the sockets.
    fn floor<S: FnMut()>(
        name: &str,
        mut crowd: Crowd,
        count: usize,
        frame_bytes: usize,
        core: Option<usize>,
        prepare: impl FnOnce(Vec<TcpStream>) -> S + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind(LOOPBACK).expect("a listener");
        let address = listener.local_addr().expect("a bound address");
        let accepting = std::thread::spawn(move || {
            let accept = |_| {
                let socket = listener.accept().expect("a client").0;
                socket.set_nodelay(true).expect("set TCP_NODELAY");
                socket
            };
            (0..count).map(accept).collect::<Vec<_>>()
        });
        crowd.open(address);
        let servers = accepting.join().expect("all clients were accepted");
        let (publish, publications) = mpsc::channel();
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::Builder::new().name(name.into());
        let body = move || {
            pin(core);
            let mut send = prepare(servers);
            ready.send(()).expect("the benchmark waits");
            for () in publications {
                send();
            }
        };
        thread.spawn(body).expect("a thread");
        is_ready.recv().expect("the thread is ready");
        let publish = Box::new(move || publish.send(()).expect("the thread lives"));
        Self { name: name.into(), crowd, threads: vec![thread_named(name)], publish, frame_bytes }
    }

    /// weir itself: published to over HTTP, fanned out by its shard. How long a frame is shows after the warm-up.
    fn weir(protocol: Protocol, mut crowd: Crowd, address: SocketAddr, options: &Options) -> Self {
        crowd.open(address);
        let mut publisher = Publisher::new(address, channel(protocol), &payload(options.size));
        let mut publish = move || publisher.publish();
        for _ in 0..WARM_UP {
            publish();
        }
        let before = crowd.settled();
        publish();
        let bytes = (crowd.settled() - before) as usize;
        assert_eq!(bytes % options.subscribers, 0, "everyone gets the same");
        Self {
            name: format!("weir {}", protocol.name()),
            crowd,
            threads: ["shard-0", "backbone"].map(thread_named).into(),
            publish: Box::new(publish),
            frame_bytes: bytes / options.subscribers,
        }
    }

    /// CPU nanoseconds a delivery in one round.
    fn round(&mut self, options: &Options) -> f64 {
        let cpu = |threads: &[String]| threads.iter().map(|thread| cpu_nanos(thread)).sum::<u64>();
        let before = cpu(&self.threads);
        for _ in 0..options.messages {
            let due = self.crowd.received() + (options.subscribers * self.frame_bytes) as u64;
            (self.publish)();
            self.crowd.wait_for(due);
        }
        std::thread::sleep(SLEEPS);
        (cpu(&self.threads) - before) as f64 / (options.messages * options.subscribers) as f64
    }
}

fn pin(core: Option<usize>) {
    if let Some(core) = core {
        host::pin_thread(core).expect("pin to an allowed core");
    }
}

fn channel(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Sse => "fanout-sse",
        Protocol::WebSocket => "fanout-ws",
    }
}

/// The floor of a loop: one system call a socket.
fn send_loop(servers: Vec<TcpStream>, frame: Vec<u8>) -> impl FnMut() {
    move || {
        for server in &servers {
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: the frame is live and its length is given.
            let sent = unsafe { libc::send(server.as_raw_fd(), frame.as_ptr().cast(), frame.len(), flags) };
            assert_eq!(sent, frame.len() as isize, "a healthy socket refused a send");
        }
    }
}

/// The floor of a ring: registered files, silent success, one submission queue full of sends at a time.
fn bare_ring(servers: Vec<TcpStream>, frame: Vec<u8>) -> impl FnMut() {
    let mut ring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .build(weir::limits::RING_SUBMISSIONS)
        .expect("a ring");
    let sockets: Vec<_> = servers.iter().map(AsRawFd::as_raw_fd).collect();
    ring.submitter().register_files(&sockets).expect("register the sockets");
    // From here on they live in the ring alone, as weir's do.
    drop(servers);
    let count = sockets.len() as u32;
    let flags = libc::MSG_DONTWAIT | libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
    move || {
        for slot in 0..count {
            let send = opcode::Send::new(Fixed(slot), frame.as_ptr(), frame.len() as u32).flags(flags).build();
            let send = send.flags(Flags::SKIP_SUCCESS);
            // SAFETY: the frame is live, and each send is over when the submission returns.
            while unsafe { ring.submission().push(&send) }.is_err() {
                ring.submit().expect("submit");
            }
        }
        ring.submit().expect("submit");
        assert_eq!(ring.completion().count(), 0, "a healthy socket refused a send");
    }
}

/// What a subscriber of an event stream receives for one publication.
fn event(size: usize) -> Vec<u8> {
    let frame = FrameEncoder::default().encode(
        &mut ChannelBlocks::default(),
        channel(Protocol::Sse),
        FrameKind::Publication,
        Position { epoch: Epoch(0), offset: WARM_UP as u64 },
        &payload(size),
        0,
    );
    frame.sse().to_vec()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> ExitCode {
    let options = Options::from_args();
    let network = Network::enter();
    // Whoever sends runs on the first core; whoever reads, and this thread, on the last.
    let cores = host::allowed_cores();
    let (sends, reads) = (cores.first().copied(), cores.last().copied());
    let plain = |address| TcpStream::connect(address).expect("connect to a floor");
    let crowds: [Crowd; 4] = [
        Crowd::fork(options.subscribers, reads, plain),
        Crowd::fork(options.subscribers, reads, plain),
        Crowd::fork(options.subscribers, reads, |address| Protocol::Sse.subscribe(address, channel(Protocol::Sse))),
        Crowd::fork(options.subscribers, reads, |address| {
            Protocol::WebSocket.subscribe(address, channel(Protocol::WebSocket))
        }),
    ];
    let mut settings = Settings { listen: LOOPBACK, shards: 1, ..Settings::default() };
    (settings.sse.heartbeat, settings.websocket.ping) = (NEVER, NEVER);
    let node = Node::start(settings, weir::control::parts::of).expect("a node");
    pin(reads);

    let frame = event(options.size);
    let (count, bytes) = (options.subscribers, frame.len());
    let [looped, ringed, streams, websockets] = crowds;
    let mut contenders = [
        Contender::floor("bare ring", ringed, count, bytes, sends, {
            let frame = frame.clone();
            move |servers| bare_ring(servers, frame)
        }),
        Contender::floor("send(2) loop", looped, count, bytes, sends, move |servers| send_loop(servers, frame)),
        Contender::weir(Protocol::Sse, streams, node.address(), &options),
        Contender::weir(Protocol::WebSocket, websockets, node.address(), &options),
    ];
    println!(
        "{} subscribers, {} B payloads, {} rounds of {} publications; {network}",
        count, options.size, options.rounds, options.messages
    );
    let mut results: Vec<Vec<f64>> = vec![Vec::new(); contenders.len()];
    for _ in 0..options.rounds {
        for (contender, results) in contenders.iter_mut().zip(&mut results) {
            results.push(contender.round(&options));
        }
    }
    println!("| sender | frame | CPU per delivery | × bare ring (median, least–most) |\n|---|---|---|---|");
    let mut worst = 0f64;
    for (contender, values) in contenders.iter().zip(&results) {
        let mut ratios: Vec<f64> = values.iter().zip(&results[0]).map(|(own, ring)| own / ring).collect();
        ratios.sort_by(f64::total_cmp);
        let ratio = median(ratios.clone());
        let (least, most) = (ratios[0], ratios[ratios.len() - 1]);
        let micros = median(values.clone()) / 1000.0;
        let Contender { name, frame_bytes, .. } = contender;
        println!("| {name} | {frame_bytes} B | {micros:.2} µs | {ratio:.3} ({least:.3}–{most:.3}) |");
        if name.starts_with("weir") {
            worst = worst.max(ratio);
        }
    }
    if options.quick || worst <= MOST_RATIO {
        return ExitCode::SUCCESS;
    }
    eprintln!("weir takes {worst:.3} times the bare ring's time; at most {MOST_RATIO} is allowed");
    ExitCode::FAILURE
}
