//! What a simulation came to, for people and as JSON.

use std::fmt;

use serde::Serialize;

use super::Args;
use super::fleet::{Event, Outcome};

/// One form of the event and what it came to.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Which form.
    pub form: &'static str,
    /// What it came to.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// All forms of one event.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    event: Event,
    nodes: u32,
    clients: u32,
    accept: u32,
    seed: u64,
    rows: Vec<Row>,
}

impl Report {
    /// The rows with what they were computed from.
    #[must_use]
    pub fn new(args: &Args, rows: Vec<Row>) -> Self {
        let Args { event, nodes, clients, accept, seed, .. } = *args;
        Self { event, nodes, clients, accept, seed, rows }
    }

    /// Whether every client had a node at the end, in every form.
    #[must_use]
    pub fn all_back(&self) -> bool {
        self.rows.iter().all(|row| row.outcome.still_waiting == 0)
    }

    /// One JSON object.
    ///
    /// # Panics
    /// Never: names and finite numbers are always JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("names and finite numbers are always JSON") + "\n"
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { event, nodes, clients, accept, seed, .. } = self;
        let event = if *event == Event::Crash { "crash of a node" } else { "rolling deploy" };
        writeln!(f, "{event}: {clients} clients, {nodes} nodes, {accept} handshakes a second and node, seed {seed}")?;
        writeln!(
            f,
            "{:14} {:>9} {:>9} {:>10} {:>10} {:>8} {:>9} {:>9} {:>20}",
            "form", "seconds", "moves", "peak/s", "peak/s one", "queue", "failed", "most held", "offline p50/p99/max"
        )?;
        for Row { form, outcome } in &self.rows {
            let offline = format!("{:.1}/{:.1}/{:.1} s", outcome.offline_p50, outcome.offline_p99, outcome.offline_max);
            writeln!(
                f,
                "{form:14} {:>9.1} {:>9} {:>10} {:>10} {:>8} {:>9} {:>9} {offline:>20}",
                outcome.seconds,
                outcome.moves,
                outcome.peak_reconnects,
                outcome.peak_reconnects_at_one,
                outcome.peak_queue,
                outcome.failed_attempts,
                outcome.peak_connections_at_one,
            )?;
            if outcome.still_waiting > 0 {
                writeln!(
                    f,
                    "{form}: {} clients were still waiting: the fleet cannot take them",
                    outcome.still_waiting
                )?;
            }
        }
        Ok(())
    }
}
