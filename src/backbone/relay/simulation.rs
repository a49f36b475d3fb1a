//! A seeded simulation of the relay: shards, a server and the connections to it do what their real counterparts may do, in an
//! order that one number decides. Everything a shard gets is held against what was published, and what must be true of the relay
//! is checked after every turn. Payloads name their publications; the relay does not look into them, so it is as if all were
//! the same.
//!
//! `WEIR_SIM_SEED=n` replays one seed and prints what happens; `WEIR_SIM_SEEDS=n` sets how many are run.

mod account;
mod backbone;
mod invariants;
mod plan;
mod reader;
mod server;
mod shard;
mod storm;
mod truth;
mod world;

pub use backbone::SimulatedBackbone;

use crate::planted::{Bug, plant};
use crate::shard::simulation::{number, run_seeds};

/// Seeds run by default.
const SEEDS: u64 = 3_000;

/// What some of them must meet, so that the simulation cannot quietly lose its teeth.
const MET: [&str; 38] = [
    "connected",
    "counted duplicates",
    "counted failed reads",
    "counted gaps",
    "counted invalid",
    "counted overflows",
    "counted oversized",
    "counted repaired",
    "counted repairs",
    "counted strays",
    "deaf",
    "disconnected",
    "everything broke",
    "failed over",
    "failed over and went on",
    "flushed",
    "frame",
    "live",
    "lost",
    "message",
    "meta evicted",
    "missed",
    "no page",
    "not published",
    "overrun",
    "page",
    "plain",
    "published",
    "published elsewhere",
    "refused",
    "released",
    "renewed elsewhere",
    "repeated",
    "reply",
    "session ended",
    "stream expired",
    "subscribed",
    "trimmed",
];

#[test]
fn every_shard_gets_everything_or_is_told() {
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
    for bug in Bug::RELAY {
        plant(Some(bug));
        let found = (0..SEEDS).find_map(|seed| world::run(seed, false).err().map(|error| (seed, error)));
        plant(None);
        let (seed, error) = found.unwrap_or_else(|| panic!("{bug:?} is not found"));
        eprintln!("{bug:?}: seed {seed}: {error}");
    }
}
