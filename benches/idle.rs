//! Memory of an idle established connection with one subscription: how much more a running `weir` holds after thousands of
//! them than before.
//!
//! The node is the real binary in a process of its own, on io_uring, with one shard; the clients' sockets are in this
//! process. Measured is the growth of the node's resident memory (`Rss` of `/proc/PID/smaps_rollup`), after a few
//! connections have paid for what is used once, and what the kernel's slabs grew by meanwhile, on both ends together
//! (`Slab` of `/proc/meminfo`: the machine's, so other processes show in it).
//!
//! `cargo bench --bench idle` exits with 1 when a connection takes more than [`MOST_BYTES`]. `-- --quick` opens fewer;
//! `--connections N` as many as given.

mod sockets;

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use sockets::Protocol;
use sockets::network::Network;
use weir::client::bench::kernel::sample_process;
use weir::control::host;

/// The bar of the project.
const MOST_BYTES: u64 = 1_024;
/// Memory a node takes once and not for each connection, such as pages of code and of its allocator. Part of the bar in the
/// quick form, where few connections share it; nothing beside 15,000.
const FIXED_BYTES: u64 = 512 * 1024;
/// Connections opened before the first measurement.
const FIRST: usize = 200;
/// How long a node may take until everything of an opened connection is over.
const SETTLES: Duration = Duration::from_secs(2);

/// A node; killed when dropped.
struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    fn start() -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
        command.args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--shards",
            "1",
            "--driver",
            "uring",
            "--log-format",
            "json",
        ]);
        // The clients of this benchmark answer no pings.
        command.args(["--set", "websocket.ping=1h", "--set", "sse.heartbeat=1h"]);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("WEIR_")) {
            command.env_remove(name);
        }
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("start the node");
        let log = BufReader::new(child.stderr.take().expect("piped"));
        let mut lines = log.lines().map_while(Result::ok);
        let address = lines.find_map(|line| {
            let line: serde_json::Value = serde_json::from_str(&line).ok()?;
            let fields = &line["fields"];
            (fields["message"] == "listening").then(|| fields["address"].as_str()?.parse().ok())?
        });
        // The log goes on being read, so that the node is never stopped by a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address: address.expect("the node says where it listens") }
    }

    fn resident_bytes(&self) -> u64 {
        sample_process(self.child.id()).expect("the node's memory map").resident_bytes
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes of the kernel's slabs; none where `/proc/meminfo` may not be read.
fn slab_bytes() -> Option<u64> {
    let memory = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kilobytes = memory.lines().find_map(|line| line.strip_prefix("Slab:")?.trim().strip_suffix(" kB"))?;
    Some(kilobytes.parse::<u64>().ok()? * 1024)
}

/// Resident bytes a connection, and kernel bytes a socket.
fn measure(protocol: Protocol, connections: usize) -> (u64, Option<u64>) {
    let server = Server::start();
    let open =
        |count: usize| -> Vec<TcpStream> { (0..count).map(|_| protocol.subscribe(server.address, "idle")).collect() };
    let first = open(FIRST);
    std::thread::sleep(SETTLES);
    let (before, kernel_before) = (server.resident_bytes(), slab_bytes());
    let rest = open(connections);
    std::thread::sleep(SETTLES);
    let (after, kernel_after) = (server.resident_bytes(), slab_bytes());
    assert_eq!(first.iter().chain(&rest).filter(|client| is_open(client)).count(), FIRST + connections);
    let kernel = kernel_after.zip(kernel_before).map(|(after, before)| after.saturating_sub(before));
    (after.saturating_sub(before) / connections as u64, kernel.map(|bytes| bytes / (2 * connections as u64)))
}

/// Whether the server has not ended a connection.
fn is_open(mut client: &TcpStream) -> bool {
    use std::io::Read;
    client.set_nonblocking(true).expect("set O_NONBLOCK");
    client.read(&mut [0]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}

fn main() -> ExitCode {
    let (mut connections, mut most) = (15_000, MOST_BYTES);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" | "--test" => connections = 2_000,
            "--connections" => connections = args.next().and_then(|value| value.parse().ok()).expect("a number"),
            // cargo passes flags of its own.
            _ => {}
        }
    }
    if connections < 15_000 {
        most += FIXED_BYTES / connections as u64;
    }
    let network = Network::enter();
    host::raise_descriptor_limit().expect("raise the descriptor limit");
    println!("{connections} idle connections, one subscription each, io_uring, one shard; {network}");
    println!("| protocol | node's resident memory a connection | kernel's slabs a socket |\n|---|---|---|");
    let mut code = ExitCode::SUCCESS;
    for protocol in Protocol::ALL {
        let (bytes, kernel) = measure(protocol, connections);
        let kernel = kernel.map_or("not readable".into(), |bytes| format!("{bytes} B"));
        println!("| {} | {bytes} B | {kernel} |", protocol.name());
        if bytes > most {
            eprintln!("a connection takes {bytes} B; at most {most} B are allowed");
            code = ExitCode::FAILURE;
        }
    }
    code
}
