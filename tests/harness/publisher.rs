//! A publisher that never gives up: every publication has an idempotency key and is repeated until it is taken.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{DEADLINE, Http, eventually, percent_encode};

/// How long it waits after a refusal.
const RETRY: Duration = Duration::from_millis(50);

struct Shared {
    /// Rounds that are complete: every channel has all numbers up to this one.
    rounds: AtomicU64,
    retries: AtomicU64,
    stop: AtomicBool,
    /// Held by whoever lets the publisher wait.
    hold: Mutex<()>,
}

/// Publishes rounds of one publication for each channel, the numbers 1, 2, 3, …, through the node.
pub struct Publisher {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Publisher {
    /// Starts, with a pause after each round. Each payload is its number and `ballast` more bytes in a second line.
    pub fn start(address: SocketAddr, channels: &[String], pause: Duration, ballast: usize) -> Self {
        let shared = Arc::new(Shared {
            rounds: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            hold: Mutex::new(()),
        });
        let thread = std::thread::spawn({
            let (shared, channels) = (Arc::clone(&shared), channels.to_vec());
            move || publish(address, &channels, pause, ballast, &shared)
        });
        Self { shared, thread: Some(thread) }
    }

    /// Rounds that are complete.
    pub fn rounds(&self) -> u64 {
        self.shared.rounds.load(Ordering::Acquire)
    }

    /// Publications that were refused and repeated.
    pub fn retries(&self) -> u64 {
        self.shared.retries.load(Ordering::Acquire)
    }

    /// Waits for so many further rounds to be complete.
    #[track_caller]
    pub fn wait_rounds(&self, more: u64) {
        let goal = self.rounds() + more;
        eventually("the publisher goes on", || (self.rounds() >= goal).then_some(()));
    }

    /// Calls `act` between two rounds, while nothing is under way.
    pub fn between_rounds<T>(&self, act: impl FnOnce() -> T) -> T {
        let _held = self.shared.hold.lock().expect("no holder panics");
        act()
    }

    /// Completes the round and ends; returns how many there were.
    #[track_caller]
    pub fn stop(mut self) -> u64 {
        self.join();
        self.rounds()
    }

    #[track_caller]
    fn join(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the publisher failed; see above");
        }
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.join();
    }
}

fn publish(address: SocketAddr, channels: &[String], pause: Duration, ballast: usize, shared: &Shared) {
    let mut http = Http::open(address);
    let ballast = "x".repeat(ballast);
    for round in 1.. {
        std::thread::sleep(pause);
        let _hold = shared.hold.lock().expect("no holder panics");
        if shared.stop.load(Ordering::Acquire) {
            return;
        }
        for channel in channels {
            let (target, key) = (format!("/publish/{}", percent_encode(channel)), format!("{channel}-{round}"));
            let payload = if ballast.is_empty() { round.to_string() } else { format!("{round}\n{ballast}") };
            let mut left = DEADLINE.as_millis() / RETRY.as_millis();
            loop {
                let response = http.send("POST", &target, &[("Idempotency-Key", &key)], payload.as_bytes());
                match response.status {
                    200 => break,
                    503 if left > 0 => left -= 1,
                    _ => panic!("{channel} {round}: {response:?}"),
                }
                shared.retries.fetch_add(1, Ordering::AcqRel);
                std::thread::sleep(RETRY);
            }
        }
        shared.rounds.store(round, Ordering::Release);
    }
}
