//! What every scenario uses: the node under test, a Redis of its own, and small blocking clients with deadlines.

mod connection;
mod http;
mod metrics;
mod node_script;
mod proxy;
mod publisher;
mod redis;
mod sentinel;
mod sse;
mod swarm;
mod websocket;
mod weir;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub use connection::Connection;
pub use http::{Http, Response, percent_encode, request};
pub use metrics::Samples;
pub use node_script::NodeScript;
pub use proxy::{Fault, Proxy};
pub use publisher::Publisher;
pub use redis::{Persistence, Redis};
pub use sentinel::Group;
pub use sse::{Event, Item, Parser, Sse, target};
pub use swarm::{Counts, Plan, Swarm};
pub use websocket::{Centrifugo, Incoming, Opcode, WebSocket, push_frame};
pub use weir::{Published, Upgrade, Weir, without_settings};

/// How long a condition may take to come true before its test fails. Generous: it only costs time when something is
/// broken, and two loaded cores run everything here.
pub const DEADLINE: Duration = Duration::from_secs(40);

/// The driver a scenario runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// io_uring.
    Uring,
    /// epoll.
    Epoll,
}

impl Driver {
    /// The value of `--driver`.
    pub fn flag(self) -> &'static str {
        match self {
            Driver::Uring => "uring",
            Driver::Epoll => "epoll",
        }
    }
}

/// A driver and a backbone: where a scenario runs.
pub struct Place {
    /// The driver.
    pub driver: Driver,
    /// The Redis behind the node; none means the embedded backbone.
    pub redis: Option<Redis>,
}

impl Place {
    /// The embedded backbone.
    pub fn memory(driver: Driver) -> Self {
        Self { driver, redis: None }
    }

    /// A Redis of this scenario's own.
    pub fn redis(driver: Driver) -> Self {
        Self { driver, redis: Some(Redis::start(Persistence::None)) }
    }

    /// Starts a node here.
    pub fn weir(&self, flags: &[&str]) -> Weir {
        let mut command = Weir::command(self.driver);
        if let Some(redis) = &self.redis {
            command = command.flags(&["--redis", &redis.url()]);
        }
        command.flags(flags).start()
    }
}

/// Calls `probe` until it gives a value.
///
/// # Panics
/// When [`DEADLINE`] passes first; `what` says what never happened.
#[track_caller]
pub fn eventually<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Ends a loop that waits for something on a stream where other things keep coming, such as heartbeats.
pub struct Deadline(Instant);

impl Deadline {
    /// [`DEADLINE`] from now.
    pub fn start() -> Self {
        Self(Instant::now() + DEADLINE)
    }

    /// Fails once the time is over; `what` says what never came.
    #[track_caller]
    pub fn check(&self, what: &str) {
        assert!(Instant::now() < self.0, "not within {DEADLINE:?}: {what}");
    }
}

/// A directory that is removed with its contents when dropped.
pub struct TempDir(PathBuf);

impl TempDir {
    /// Makes a new, empty directory. Its path is short: a Unix socket's path has 107 bytes.
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("weir-e2e-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap_or_else(|error| panic!("cannot make {}: {error}", path.display()));
        Self(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // A child killed a moment ago may still be closing its files; what is left is in the system's temp directory.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A TCP port of 127.0.0.1 that nobody uses, for what is started again on the same port. Below the range that the kernel
/// takes the ports of clients from: one of those, of any test's connection, would take the place in between.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    const FIRST: u32 = 12_000;
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").expect("read the port range");
    let end = range.split_whitespace().next().and_then(|low| low.parse().ok()).unwrap_or(32_768).max(FIRST + 100);
    // Processes of a test run that overlap begin at different places.
    let start = std::process::id().wrapping_mul(97);
    for _ in 0..1_000 {
        let port = FIRST + start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % (end - FIRST);
        let port = u16::try_from(port).expect("a port");
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port between {FIRST} and {end}");
}

/// [`free_port`] as an address to listen on.
pub fn free_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}

/// Makes the kernel kill a child when the test's thread ends, so that an aborted test run leaves no servers behind.
pub fn die_with_parent(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: prctl is async-signal-safe and touches no memory of the parent.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}
