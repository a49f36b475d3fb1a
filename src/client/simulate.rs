//! `weir simulate`: how a fleet takes a crash or a rolling deploy, with and without pacing and jitter.
//!
//! No socket is opened. [`fleet`] moves simulated clients between simulated nodes in steps of a tenth of a second: clients wait
//! as real ones do ([`backoff`]), nodes take so many handshakes a second, and a seed makes every run repeatable.

pub mod backoff;
pub mod fleet;
pub mod report;

#[cfg(test)]
mod tests;

use std::io::Write as _;
use std::process::ExitCode;

use self::backoff::ClientKind;
use self::fleet::{Balance, Event, Fleet};
use self::report::{Report, Row};
use crate::limits::{SIMULATE_CLIENTS, SIMULATE_NODES, SIMULATE_SECONDS};

/// Simulate a node's crash or a rolling deploy over a fleet: reconnects a second, waiting times and load at the survivors.
///
/// Each form of the event is a row: as it is, with the drain spread over its window (pacing), with the clients' first waits
/// spread (jitter), and with both.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// What happens.
    #[arg(value_enum)]
    pub event: Event,
    /// Nodes, spares included.
    #[arg(long, default_value_t = 202, value_parser = clap::value_parser!(u32).range(2..=i64::from(SIMULATE_NODES)))]
    pub nodes: u32,
    /// Clients of the whole fleet.
    #[arg(long, default_value_t = 10_000_000, value_parser = clap::value_parser!(u32).range(1..=i64::from(SIMULATE_CLIENTS)))]
    pub clients: u32,
    /// How the clients come back.
    #[arg(long, value_enum, default_value_t = ClientKind::EventSource)]
    pub client: ClientKind,
    /// How the load balancer chooses a node.
    #[arg(long, value_enum, default_value_t = Balance::TwoChoices)]
    pub balance: Balance,
    /// Handshakes a node takes a second. Measure yours: see the capacity page of the documentation.
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub accept: u32,
    /// Connections that may wait at a node to be accepted; further ones fail.
    #[arg(long, default_value_t = 4_096)]
    pub backlog: u32,
    /// Seconds a node's drain is spread over.
    #[arg(long, default_value_t = 60, value_parser = seconds())]
    pub drain: u32,
    /// Seconds the advised waits of `EventSource` clients are spread over; the centrifuge SDKs have a spread of their own.
    #[arg(long, default_value_t = 20, value_parser = seconds())]
    pub jitter: u32,
    /// Seconds from a node's drain until it takes clients again.
    #[arg(long, default_value_t = 10, value_parser = seconds())]
    pub restart: u32,
    /// Nodes that are restarted at once.
    #[arg(long, default_value_t = 1)]
    pub parallel: u32,
    /// Seconds until the load balancer stops sending clients to a node that crashed.
    #[arg(long, default_value_t = 5, value_parser = seconds())]
    pub detect: u32,
    /// The random numbers.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Print one JSON object instead.
    #[arg(long)]
    pub json: bool,
}

fn seconds() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(0..=i64::from(SIMULATE_SECONDS))
}

impl Args {
    /// The forms of the event: the name of each, its drain window and its jitter, in seconds.
    fn forms(&self) -> Vec<(&'static str, u32, u32)> {
        // A crash asks nobody, so there is nothing to pace; the centrifuge SDKs are told no wait, so there is none to spread.
        let paced = self.event == Event::Rolling && self.drain > 0;
        let spread = self.client == ClientKind::EventSource && self.jitter > 0;
        let mut forms = vec![("as it comes", 0, 0)];
        if paced {
            forms.push(("paced", self.drain, 0));
        }
        if spread {
            forms.push(("jitter", 0, self.jitter));
        }
        if paced && spread {
            forms.push(("paced, jitter", self.drain, self.jitter));
        }
        forms
    }

    /// Runs every form.
    fn simulate(&self) -> Report {
        let row = |(form, drain, jitter)| Row { form, outcome: Fleet::new(self, drain, jitter).run() };
        Report::new(self, self.forms().into_iter().map(row).collect())
    }
}

/// Runs the command. Exits with 1 when the arguments contradict each other or clients were still waiting at the end.
#[must_use]
pub fn run(args: &Args) -> ExitCode {
    if args.parallel == 0 || args.parallel >= args.nodes {
        eprintln!(
            "--parallel = {} is not allowed; allowed: 1 up to one less than --nodes = {}",
            args.parallel, args.nodes
        );
        return ExitCode::FAILURE;
    }
    let report = args.simulate();
    let text = if args.json { report.to_json() } else { report.to_string() };
    let _ = std::io::stdout().write_all(text.as_bytes());
    if report.all_back() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
