//! `weir bench`: a load generator that proves what it measures.
//!
//! Publications go out on a fixed schedule and carry a sequence number and the time they were due. Every subscribing
//! connection checks every publication: a lost, repeated, reordered or misrouted one is found, and latency counts from
//! when the publication was due, so that a stall is not hidden by the publications it delayed (coordinated omission).
//!
//! The command is the parent of `--workers` processes that hold the connections ([`worker`]); it publishes itself, in a
//! thread ([`publisher`]). They talk over pipes ([`plan`]) and share the machine's monotonic clock.

pub mod connection;
pub mod kernel;
pub mod plan;
pub mod publisher;
pub mod report;
pub mod run;
pub mod schedule;
pub mod stamp;
pub mod tally;
pub mod worker;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::FromRawFd;
use std::process::ExitCode;

use self::plan::Protocol;
use self::run::BenchError;
use self::schedule::is_stalled;
use self::stamp::LEAST_PAYLOAD_BYTES;
use super::http::BaseUrl;
use crate::limits::{BENCH_CHANNELS, BENCH_CONNECTIONS, BENCH_PUBLISHERS, BENCH_WORKER_CONNECTIONS, PUBLICATION_BYTES};

/// Measure a running node, and check that every subscriber gets every publication once and in order.
///
/// Exits with 1 when a reading connection missed, repeated, reordered or misrouted a publication.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Where the node is.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    pub url: BaseUrl,
    /// Subscribing connections. On a loopback IPv4 address every 20,000 get a source address of their own (127.0.0.1,
    /// .2, .3).
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..=BENCH_CONNECTIONS as u64))]
    pub connections: u64,
    /// What the subscribing connections speak.
    #[arg(long, value_enum, default_value_t = Protocol::Sse)]
    pub protocol: Protocol,
    /// Channels; the connections are spread over them round robin and each subscribes to one.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(BENCH_CHANNELS)))]
    pub channels: u32,
    /// Publications a second over all channels, on a fixed schedule.
    #[arg(long, default_value_t = 10.0, value_parser = positive)]
    pub rate: f64,
    /// Publishing connections. Publications of one are in order and waited for one after another by the node.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(BENCH_PUBLISHERS)))]
    pub publishers: u16,
    /// Bytes of a payload.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(PAYLOAD_BYTES))]
    pub size: u64,
    /// Seconds to measure.
    #[arg(long, default_value_t = 10.0, value_parser = positive)]
    pub duration: f64,
    /// Seconds to publish before measuring begins.
    #[arg(long, default_value_t = 1.0, value_parser = not_negative)]
    pub warmup: f64,
    /// Seconds to wait, after the last publication, for what is still missing.
    #[arg(long, default_value_t = 5.0, value_parser = not_negative)]
    pub drain: f64,
    /// Percent of the connections that never read, spread evenly; their receive buffers are small.
    #[arg(long, default_value_t = 0.0, value_parser = percent)]
    pub stalled: f64,
    /// Processes that hold the connections; 0 holds them in this one. Default: one for 15,000 connections.
    #[arg(long, value_parser = clap::value_parser!(u64).range(0..=64))]
    pub workers: Option<u64>,
    /// Connections opened a second.
    #[arg(long, default_value_t = 5_000.0, value_parser = positive)]
    pub connect_rate: f64,
    /// The node's process id: reports its CPU time and memory.
    #[arg(long)]
    pub server_pid: Option<u32>,
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
    /// What channel names start with; a number follows.
    #[arg(long, default_value = "bench:")]
    pub channel_prefix: String,
    /// Path to subscribe at; {channel} stands for the percent-encoded name. Default: the path of a node.
    #[arg(long)]
    pub subscribe_path: Option<String>,
    /// Path to publish at, with POST.
    #[arg(long, default_value = "/publish/{channel}")]
    pub publish_path: String,
    /// Be a worker of another `weir bench`: commands on standard input, reports on standard output.
    #[arg(long, hide = true)]
    worker: bool,
}

/// What `--size` may be.
const PAYLOAD_BYTES: std::ops::RangeInclusive<u64> = LEAST_PAYLOAD_BYTES as u64..=PUBLICATION_BYTES as u64;

fn number(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(|| "not a number".into())
}

fn positive(text: &str) -> Result<f64, String> {
    number(text).and_then(|number| if number >= 0.001 { Ok(number) } else { Err("allowed: 0.001 and more".into()) })
}

fn not_negative(text: &str) -> Result<f64, String> {
    number(text).and_then(|number| if number >= 0.0 { Ok(number) } else { Err("allowed: 0 and more".into()) })
}

fn percent(text: &str) -> Result<f64, String> {
    number(text).and_then(|number| match number {
        0.0..=100.0 => Ok(number),
        _ => Err("allowed: 0 to 100".into()),
    })
}

impl Args {
    /// How the connections are divided: connections of each worker, none empty.
    fn shares(&self) -> Vec<usize> {
        let connections = self.connections as usize;
        let workers = match self.workers {
            Some(0) => 1,
            Some(workers) => workers as usize,
            None => connections.div_ceil(BENCH_WORKER_CONNECTIONS),
        };
        let workers = workers.min(connections);
        (0..workers).map(|worker| connections / workers + usize::from(worker < connections % workers)).collect()
    }

    fn subscribe_path(&self) -> &str {
        match (&self.subscribe_path, self.protocol) {
            (Some(path), _) => path,
            (None, Protocol::Sse) => "/sse?channel={channel}",
            (None, Protocol::Websocket) => "/connection/websocket",
        }
    }

    /// Checks what no single option shows.
    fn check(&self) -> Result<(), BenchError> {
        if u64::from(self.channels) > self.connections {
            return Err(BenchError::Channels { channels: self.channels, connections: self.connections });
        }
        if (0..self.connections as usize).all(|index| is_stalled(index, self.stalled)) {
            return Err(BenchError::AllStalled);
        }
        let longest = plan::channel_name(&self.channel_prefix, self.channels);
        crate::wire::channel_name::check(&longest).map_err(BenchError::Prefix)
    }
}

/// Runs the load generator, or one of its workers.
#[must_use]
pub fn run(args: Args) -> ExitCode {
    if args.worker {
        return run_worker();
    }
    match run::execute(&args, io::stderr().is_terminal()) {
        Ok(report) => {
            let text = if args.json {
                serde_json::to_string_pretty(&report).unwrap_or_else(|error| error.to_string())
            } else {
                report.to_string()
            };
            // A closed pipe is the reader's wish; the exit code still says how the run went.
            let _ = writeln!(io::stdout(), "{text}");
            if report.verdict().is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        Err(error) => {
            eprintln!("weir bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_worker() -> ExitCode {
    let _ = kernel::raise_descriptor_limit();
    // SAFETY: descriptor 1 is open from the start of the process, and nothing else of a worker writes to standard
    // output. It is taken as a file because standard output would add a lock and a line buffer.
    let reports = unsafe { File::from_raw_fd(1) };
    match worker::run(io::stdin(), reports) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weir bench, a worker: {error}");
            ExitCode::FAILURE
        }
    }
}
