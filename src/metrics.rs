//! Every metric once: its name, type and meaning, where its value comes from, and the Prometheus text that shows it.
//!
//! A counter has one writer, the shard that owns it, so adding is a plain load and store: no lock-prefixed instruction
//! and no cache line shared between two writers. Readers see each value whole, and values of different moments.

mod families;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam::queue::ArrayQueue;
use hdrhistogram::Histogram;

use families::{FAMILIES, Family, Source};

use crate::limits::{HISTOGRAM_DIGITS, HISTOGRAM_MICROS};

/// `Content-Type` of [`Metrics::render`] (Prometheus text exposition format 0.0.4).
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A number that only rises. One thread writes it, any thread reads it.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owning thread may call this: two writers would lose counts.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that rises and falls. One thread writes it, any thread reads it.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Sets the value. Only the owning thread may call this.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Adds `n`. Only the owning thread may call this.
    pub fn add(&self, n: u64) {
        self.set(self.get().wrapping_add(n));
    }

    /// Takes `n` away. Only the owning thread may call this.
    pub fn sub(&self, n: u64) {
        let now = self.get();
        debug_assert!(n <= now, "a gauge fell below zero: something was taken away twice");
        self.set(now.saturating_sub(n));
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Label values of `weir_disconnects_total`, in the order of `shard::disconnect::Disconnect`, which takes its labels
/// from here: metrics lie below the shard and cannot name its enum.
pub const DISCONNECT_REASONS: [&str; 15] = [
    "client_gone",
    "client_closed",
    "shutdown",
    "slow",
    "stale",
    "no_pong",
    "bad_request",
    "protocol_error",
    "message_too_big",
    "invalid_utf8",
    "internal_error",
    "insufficient_state",
    "connection_limit",
    "write_error",
    "answered",
];

/// Label values of `weir_connections`: established streams by protocol, polls that wait, and ordinary HTTP connections.
const PROTOCOLS: [&str; 4] = ["sse", "websocket", "poll", "http"];
/// Label values of `weir_http_requests_total`: the classes of RFC 9110 section 15.
const STATUS_CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];
/// Label values of `weir_publishes_total`.
const PUBLISH_RESULTS: [&str; 2] = ["ok", "refused"];

/// The counters of one shard. The shard is their only writer; the alignment keeps two shards off one cache line (128
/// bytes, because processors fetch lines in pairs).
#[derive(Debug)]
#[repr(align(128))]
pub struct ShardMetrics {
    /// Established server-sent event streams.
    pub sse: Gauge,
    /// Established WebSockets.
    pub websocket: Gauge,
    /// Polls that wait for something new.
    pub poll: Gauge,
    /// HTTP connections that are not streams.
    pub http: Gauge,
    /// Connections accepted.
    pub accepted: Counter,
    /// Channels with a local subscriber.
    pub channels: Gauge,
    /// Subscriptions: connections times channels.
    pub subscriptions: Gauge,
    /// Publications taken from the mailbox.
    pub publications: Counter,
    /// Publications sent whole, counted once a connection, and those in answers to polls.
    pub deliveries: Counter,
    /// Bytes given to the kernel on established streams.
    pub delivered_bytes: Counter,
    /// Send operations.
    pub sends: Counter,
    /// Send operations that could not take the whole.
    pub sends_short: Counter,
    /// Bytes received on established streams.
    pub received_bytes: Counter,
    /// Connections that are behind the head.
    pub lagging: Gauge,
    /// Connections ended, by the index of their reason in [`DISCONNECT_REASONS`].
    pub disconnects: [Counter; DISCONNECT_REASONS.len()],
    /// Turns of the engine.
    pub turns: Counter,
    /// Messages in the mailbox at the start of the last turn.
    pub mailbox_depth: Gauge,
    /// HTTP requests answered, by status class; [`ShardMetrics::count_response`] picks the class.
    pub http_requests: [Counter; STATUS_CLASSES.len()],
    /// Publications that clients asked for and the backbone took.
    pub publishes_ok: Counter,
    /// Publications that clients asked for and that were refused or failed.
    pub publishes_refused: Counter,
    posted: ArrayQueue<Arc<Histograms>>,
}

impl Default for ShardMetrics {
    fn default() -> Self {
        Self {
            sse: Gauge::default(),
            websocket: Gauge::default(),
            poll: Gauge::default(),
            http: Gauge::default(),
            accepted: Counter::default(),
            channels: Gauge::default(),
            subscriptions: Gauge::default(),
            publications: Counter::default(),
            deliveries: Counter::default(),
            delivered_bytes: Counter::default(),
            sends: Counter::default(),
            sends_short: Counter::default(),
            received_bytes: Counter::default(),
            lagging: Gauge::default(),
            disconnects: Default::default(),
            turns: Counter::default(),
            mailbox_depth: Gauge::default(),
            http_requests: Default::default(),
            publishes_ok: Counter::default(),
            publishes_refused: Counter::default(),
            posted: ArrayQueue::new(1),
        }
    }
}

impl ShardMetrics {
    /// Counts an HTTP response by the class of its status.
    pub fn count_response(&self, status: u16) {
        let class = usize::from(status / 100).clamp(1, STATUS_CLASSES.len());
        self.http_requests[class - 1].add(1);
    }
}

/// What a shard has recorded since it started.
#[derive(Debug, Clone)]
struct Histograms {
    latency: Histogram<u64>,
    turn: Histogram<u64>,
}

impl Histograms {
    fn new() -> Self {
        Self { latency: new_histogram(), turn: new_histogram() }
    }

    fn add(&mut self, other: &Self) {
        for (sum, part) in [(&mut self.latency, &other.latency), (&mut self.turn, &other.turn)] {
            sum.add(part).expect("all histograms here have the same bounds");
        }
    }
}

/// An empty histogram of microseconds. Record with `saturating_record` or `saturating_record_n`: more than
/// [`HISTOGRAM_MICROS`] counts as that.
#[must_use]
pub fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, HISTOGRAM_MICROS, HISTOGRAM_DIGITS).expect("the bounds are constants in order")
}

/// A shard's own side of its metrics: the counters, and histograms that nobody else touches.
#[derive(Debug)]
pub struct ShardRecorder {
    /// The counters, shared with readers.
    pub metrics: Arc<ShardMetrics>,
    /// Microseconds from a publication's arrival at the node to its submitted send, one value a delivery.
    pub latency: Histogram<u64>,
    /// Microseconds of one turn of the engine.
    pub turn: Histogram<u64>,
}

impl ShardRecorder {
    /// A recorder with empty histograms.
    #[must_use]
    pub fn new(metrics: Arc<ShardMetrics>) -> Self {
        Self { metrics, latency: new_histogram(), turn: new_histogram() }
    }

    /// Shows readers the histograms as they are now. Copies some 40 KB: call it once a second, not once a turn.
    pub fn publish(&mut self) {
        let copy = Histograms { latency: self.latency.clone(), turn: self.turn.clone() };
        self.metrics.posted.force_push(Arc::new(copy));
    }
}

/// Where a node is in its life, in order.
pub const PHASES: [&str; 4] = ["serving", "unready", "draining", "stopping"];

/// What the node knows besides its shards, taken at the moment of rendering.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeSnapshot {
    /// Where the node is in its life: 1 for one of [`PHASES`].
    pub phase: [u64; PHASES.len()],
    /// Whether the node takes traffic.
    pub ready: bool,
    /// Descriptors the process may open.
    pub descriptor_limit: u64,
    /// Hand-overs to a next process: that succeeded, and after which the old one went on.
    pub handovers: [u64; 2],
    /// Microseconds of the last one's pause.
    pub handover_pause_micros: u64,
    /// Whether the backbone is connected.
    pub backbone_connected: bool,
    /// Connections made to the backbone.
    pub backbone_connects: u64,
    /// Microseconds the node's last message to itself took through the backbone.
    pub backbone_heartbeat_micros: u64,
    /// Requests to the backbone that are not answered yet.
    pub backbone_in_flight: u64,
    /// Publications received from the backbone.
    pub backbone_publications: u64,
    /// Publications dropped because the node had them.
    pub backbone_duplicates: u64,
    /// Publications dropped because the channel's history does not know their position.
    pub backbone_strays: u64,
    /// Payloads that were not UTF-8.
    pub backbone_invalid: u64,
    /// Payloads too large to deliver.
    pub backbone_oversized: u64,
    /// Times the node fell behind the backbone and read every channel anew.
    pub backbone_overruns: u64,
    /// Channels not subscribed to because the node had too many.
    pub backbone_refused: u64,
    /// Times a missed range was read from the history.
    pub backbone_repairs: u64,
    /// Publications recovered by those reads.
    pub backbone_repaired: u64,
    /// Reads of what lies before the node's logs, for clients that come back from there.
    pub backbone_fetches: u64,
    /// Publications that they brought.
    pub backbone_fetched: u64,
    /// Reads of a channel's history that failed and are tried again.
    pub backbone_failed_reads: u64,
    /// Gaps announced to subscribers.
    pub backbone_gaps: u64,
    /// Channels subscribed to on the backbone.
    pub backbone_channels: u64,
    /// Bytes of frames held in the node's log.
    pub log_bytes: u64,
    /// Publications that found a shard's mailbox full, one entry a shard.
    pub mailbox_overflows: Vec<u64>,
}

/// The metrics of a node.
#[derive(Debug)]
pub struct Metrics {
    /// One block a shard.
    pub shards: Vec<Arc<ShardMetrics>>,
    // Only scrapes take this lock, and only while they swap pointers: no turn of a shard does.
    latest: Mutex<Vec<Arc<Histograms>>>,
}

impl Metrics {
    /// Metrics for `shards` shards, all zero.
    #[must_use]
    pub fn new(shards: usize) -> Self {
        Self {
            shards: (0..shards).map(|_| Arc::default()).collect(),
            latest: Mutex::new((0..shards).map(|_| Arc::new(Histograms::new())).collect()),
        }
    }

    /// Writes every metric in the Prometheus text format. `version` is the program's.
    ///
    /// Histograms cover all shards and are up to a second old. Their buckets and sum come from values kept to
    /// [`HISTOGRAM_DIGITS`] digits. There are no ready-made quantiles: those of single nodes since their start cannot be
    /// combined, `histogram_quantile` over a rate of the buckets can.
    #[must_use]
    pub fn render(&self, node: &NodeSnapshot, version: &str) -> String {
        let histograms = self.merged_histograms();
        let mut out = String::with_capacity(16 * 1024);
        for family in FAMILIES {
            let kind = match (&family.source, family.name.ends_with("_total")) {
                (Source::Histogram(_), _) => "histogram",
                (_, true) => "counter",
                (_, false) => "gauge",
            };
            // Writing to a String cannot fail; the results are dropped for that reason here and below.
            let _ = writeln!(out, "# HELP {} {}\n# TYPE {} {kind}", family.name, family.help, family.name);
            self.write_samples(&mut out, family, &histograms, node, version);
        }
        out
    }

    fn write_samples(&self, out: &mut String, family: &Family, all: &Histograms, node: &NodeSnapshot, version: &str) {
        let name = family.name;
        match family.source {
            Source::Shard(read) => {
                for (shard, metrics) in self.shards.iter().enumerate() {
                    let _ = writeln!(out, "{name}{{shard=\"{shard}\"}} {}", read(metrics));
                }
            }
            Source::ShardBy { label, values, read } => {
                for (shard, metrics) in self.shards.iter().enumerate() {
                    for (index, value) in values.iter().enumerate() {
                        let sample = read(metrics, index);
                        let _ = writeln!(out, "{name}{{shard=\"{shard}\",{label}=\"{value}\"}} {sample}");
                    }
                }
            }
            Source::Node(read) => {
                let _ = writeln!(out, "{name} {}", read(node));
            }
            Source::NodeBy { label, values, read } => {
                for (value, sample) in values.iter().zip(read(node)) {
                    let _ = writeln!(out, "{name}{{{label}=\"{value}\"}} {sample}");
                }
            }
            Source::NodeSeconds(read) => {
                let _ = writeln!(out, "{name} {}", read(node) as f64 / 1e6);
            }
            Source::NodeByShard(read) => {
                for (shard, value) in read(node).iter().enumerate() {
                    let _ = writeln!(out, "{name}{{shard=\"{shard}\"}} {value}");
                }
            }
            Source::Version => {
                let _ = writeln!(out, "{name}{{version=\"{version}\"}} 1");
            }
            Source::Histogram(read) => write_histogram(out, name, read(all)),
        }
    }

    fn merged_histograms(&self) -> Histograms {
        let latest = {
            // Nothing in this block can panic half way, so a poisoned lock holds good values.
            let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
            for (slot, shard) in latest.iter_mut().zip(&self.shards) {
                if let Some(newer) = shard.posted.pop() {
                    *slot = newer;
                }
            }
            latest.clone()
        };
        let mut all = Histograms::new();
        latest.iter().for_each(|shard| all.add(shard));
        all
    }
}

/// Upper bounds of the buckets, in microseconds and as the `le` label in seconds. From one turn of a small fan-out to a
/// subscriber that is about to be shed for its age.
const BUCKETS: [(u64, &str); 17] = [
    (50, "0.00005"),
    (100, "0.0001"),
    (250, "0.00025"),
    (500, "0.0005"),
    (1_000, "0.001"),
    (2_500, "0.0025"),
    (5_000, "0.005"),
    (10_000, "0.01"),
    (25_000, "0.025"),
    (50_000, "0.05"),
    (100_000, "0.1"),
    (250_000, "0.25"),
    (500_000, "0.5"),
    (1_000_000, "1"),
    (2_500_000, "2.5"),
    (5_000_000, "5"),
    (10_000_000, "10"),
];

fn write_histogram(out: &mut String, name: &str, histogram: &Histogram<u64>) {
    let mut recorded = histogram.iter_recorded().peekable();
    let (mut count, mut sum_micros) = (0u64, 0u128);
    let mut take = |limit: u64, count: &mut u64| {
        while let Some(value) = recorded.next_if(|value| value.value_iterated_to() <= limit) {
            *count += value.count_since_last_iteration();
            let middle = histogram.median_equivalent(value.value_iterated_to());
            sum_micros += u128::from(middle) * u128::from(value.count_since_last_iteration());
        }
    };
    for (bound, le) in BUCKETS {
        // A recorded value is known to within its equivalent range; the range that holds the bound counts as below it.
        take(histogram.highest_equivalent(bound), &mut count);
        let _ = writeln!(out, "{name}_bucket{{le=\"{le}\"}} {count}");
    }
    take(u64::MAX, &mut count);
    let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {count}");
    let _ = writeln!(out, "{name}_sum {}", sum_micros as f64 / 1e6);
    let _ = writeln!(out, "{name}_count {count}");
}
