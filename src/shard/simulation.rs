//! A seeded simulation of the pure half of a shard: a kernel, a relay and clients that do what their real counterparts may do,
//! in an order that one number decides. Everything a client gets is held against what was published, and what must be true of
//! the shard is checked after every turn.
//!
//! `WEIR_SIM_SEED=n` replays one seed and prints what happens; `WEIR_SIM_SEEDS=n` sets how many are run.

mod client;
mod deadlines;
mod invariants;
mod kernel;
pub(crate) mod random;
mod relay;
pub(crate) mod trace;
mod truth;
mod view;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use trace::Counts;

use crate::planted::{Bug, plant};

/// Seeds run by default.
const SEEDS: u64 = 1_000;

/// What some of them must meet, so that the simulation cannot quietly lose its teeth.
const MET: [&str; 42] = [
    "another node",
    "asks to unsubscribe",
    "bad_request",
    "channels left over",
    "client_closed",
    "client_gone",
    "fetch fails",
    "fetch of another epoch",
    "fetched a part",
    "fetched",
    "gap",
    "gives up",
    "hand-over",
    "hand-over failed",
    "ids fill a batch",
    "invalid_utf8",
    "lost by the node",
    "mailbox full",
    "message_too_big",
    "missed",
    "new epoch",
    "no room",
    "no_pong",
    "poll answered",
    "poll gap",
    "poll refused",
    "poll",
    "protocol_error",
    "received",
    "recovered",
    "refused command",
    "refused",
    "refused position",
    "released",
    "short",
    "shutdown",
    "slow",
    "stale",
    "stream",
    "unsubscribed",
    "writable",
    "write_error",
];

/// Threads that run seeds.
const THREADS: u64 = 2;

/// Seconds after which a seed that has not ended is taken to hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// Reads a number from the environment.
pub(crate) fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text}: a decimal number is wanted")))
}

/// Runs seeds and returns what they met.
pub(crate) fn run_seeds(seeds: std::ops::Range<u64>, run: fn(u64) -> Result<Counts, String>) -> Counts {
    let (done, outcomes) = mpsc::channel();
    let running: Arc<Vec<AtomicU64>> = Arc::new((0..THREADS).map(|_| AtomicU64::new(0)).collect());
    for thread in 0..THREADS {
        let (done, running, seeds) = (done.clone(), running.clone(), seeds.clone());
        // Not joined: a seed that hangs must not hang the test.
        std::thread::spawn(move || {
            for seed in seeds.filter(|seed| seed % THREADS == thread) {
                running[thread as usize].store(seed, Ordering::Relaxed);
                if done.send((seed, run(seed))).is_err() {
                    return;
                }
            }
        });
    }
    let mut all = Counts::new();
    let mut failures = Vec::new();
    for _ in seeds {
        let (seed, outcome) =
            outcomes.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("one of the seeds {running:?} does not end"));
        match outcome {
            Ok(counts) => counts.into_iter().for_each(|(what, count)| *all.entry(what).or_default() += count),
            Err(error) => failures.push(format!("seed {seed}: {error}")),
        }
    }
    failures.sort();
    assert!(failures.is_empty(), "WEIR_SIM_SEED=n replays one of {}:\n{}", failures.len(), failures.join("\n"));
    all
}

#[test]
fn every_client_gets_everything_or_is_told() {
    if let Some(seed) = number("WEIR_SIM_SEED") {
        let run = world::run(seed, true);
        panic!("seed {seed}: {run:?}");
    }
    let seeds = number("WEIR_SIM_SEEDS").unwrap_or(SEEDS);
    let counts = run_seeds(0..seeds, |seed| world::run(seed, false).map(|run| run.counts));
    let missing: Vec<&str> = MET.into_iter().filter(|what| !counts.contains_key(what)).collect();
    assert!(seeds < SEEDS || missing.is_empty(), "{seeds} seeds never met {missing:?}, but {counts:?}");
}

#[test]
fn a_seed_repeats_itself() {
    for seed in 0..20 {
        let first = world::run(seed, false).expect("a sound world");
        assert_eq!(world::run(seed, false), Ok(first.clone()), "seed {seed}");
        assert_ne!(world::run(seed + 1_000_000, false).expect("a sound world").hash, first.hash);
    }
}

#[test]
fn each_planted_bug_is_found() {
    for bug in Bug::SHARD {
        plant(Some(bug));
        let found = (0..200).find_map(|seed| world::run(seed, false).err().map(|error| (seed, error)));
        plant(None);
        let (seed, error) = found.unwrap_or_else(|| panic!("{bug:?} is not found"));
        eprintln!("{bug:?}: seed {seed}: {error}");
    }
}
