//! What a run found, for people and as JSON.

use std::fmt::{self, Write as _};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::kernel::ProcessSample;
use super::plan::{Progress, Reasons};
use super::publisher::Published;

/// The whole result of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Connections asked for.
    pub connections: usize,
    /// What became of them, and what they received.
    #[serde(flatten)]
    pub progress: Progress,
    /// Why connections were not established.
    pub failures: Reasons,
    /// Why connections that read were ended.
    pub disconnects: Reasons,
    /// Seconds that were measured.
    pub measured_seconds: f64,
    /// Publications received a second while measuring.
    pub deliveries_per_second: f64,
    /// From when a publication was due until a subscriber had read it.
    pub latency: Latency,
    /// The publishing side.
    pub publisher: PublisherReport,
    /// CPU seconds of the subscribing workers while measuring, and of the publisher over the run.
    pub generator_cpu_seconds: f64,
    /// The server, when its process was named.
    pub server: Option<ServerReport>,
}

/// Quantiles of a time, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    /// How many were measured.
    pub samples: u64,
    /// Half took no longer.
    pub p50_micros: f64,
    /// 99 % took no longer.
    pub p99_micros: f64,
    /// 99.9 % took no longer.
    pub p999_micros: f64,
    /// None took longer.
    pub max_micros: f64,
}

impl Latency {
    /// Takes the quantiles of a histogram of nanoseconds.
    #[must_use]
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let micros = |nanos: u64| nanos as f64 / 1e3;
        Self {
            samples: histogram.len(),
            p50_micros: micros(histogram.value_at_quantile(0.5)),
            p99_micros: micros(histogram.value_at_quantile(0.99)),
            p999_micros: micros(histogram.value_at_quantile(0.999)),
            max_micros: micros(histogram.max()),
        }
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.samples == 0 {
            return f.write_str("no samples");
        }
        let [p50, p99, p999, max] =
            [self.p50_micros, self.p99_micros, self.p999_micros, self.max_micros].map(readable_micros);
        write!(f, "p50 {p50}, p99 {p99}, p99.9 {p999}, max {max}")
    }
}

/// Writes microseconds with three digits or so, in the unit they are readable in.
fn readable_micros(micros: f64) -> String {
    match micros {
        ..1e3 => format!("{micros:.0} µs"),
        ..1e4 => format!("{:.2} ms", micros / 1e3),
        ..1e5 => format!("{:.1} ms", micros / 1e3),
        ..1e6 => format!("{:.0} ms", micros / 1e3),
        _ => format!("{:.2} s", micros / 1e6),
    }
}

/// The publishing side.
#[derive(Debug, Serialize)]
pub struct PublisherReport {
    /// Publications a second asked for.
    pub rate_asked: f64,
    /// Publications a second sent while measuring.
    pub rate_sent: f64,
    /// Sent publications over the whole run.
    pub sent: u64,
    /// Those the server took.
    pub accepted: u64,
    /// Those it refused or did not answer in time.
    pub refused: usize,
    /// Publications of the schedule that were never sent because the server was too far behind.
    pub unsent: u64,
    /// Why the server refused.
    pub reasons: Reasons,
    /// How late publications were sent.
    pub slip: Latency,
    /// From when a publication was due until the server's answer.
    pub answered: Latency,
}

impl PublisherReport {
    /// Sums up what the publisher found.
    #[must_use]
    pub fn of(published: &Published, rate: f64, measured_seconds: f64) -> Self {
        Self {
            rate_asked: rate,
            rate_sent: published.measured as f64 / measured_seconds,
            sent: published.sent,
            accepted: published.accepted,
            refused: published.refused.len(),
            unsent: published.unsent,
            reasons: published.reasons.clone(),
            slip: Latency::of(&published.slip),
            answered: Latency::of(&published.answered),
        }
    }
}

/// The server's process.
#[derive(Debug, Serialize)]
pub struct ServerReport {
    /// CPU seconds while measuring.
    pub cpu_seconds: f64,
    /// The same as a share of one core.
    pub cores: f64,
    /// CPU microseconds a delivery; none without deliveries.
    pub cpu_micros_per_delivery: Option<f64>,
    /// Resident bytes before the connections were opened.
    pub resident_before: u64,
    /// Resident bytes with all connections established and nothing published.
    pub resident_connected: u64,
    /// Resident bytes when measuring ended.
    pub resident_after: u64,
    /// What each established connection added to resident memory, in bytes; kernel memory is not in it.
    pub resident_per_connection: Option<f64>,
}

/// The server's process at four points of a run.
#[derive(Debug, Clone, Copy)]
pub struct ServerSamples {
    /// Before the connections were opened.
    pub before: ProcessSample,
    /// With all of them established.
    pub connected: ProcessSample,
    /// When measuring began.
    pub from: ProcessSample,
    /// When measuring ended.
    pub until: ProcessSample,
}

impl ServerReport {
    /// Sums up the samples.
    #[must_use]
    pub fn of(samples: &ServerSamples, measured_seconds: f64, deliveries: u64, established: usize) -> Self {
        let cpu_seconds = samples.until.cpu_seconds - samples.from.cpu_seconds;
        let added = samples.connected.resident_bytes.saturating_sub(samples.before.resident_bytes);
        Self {
            cpu_seconds,
            cores: cpu_seconds / measured_seconds,
            cpu_micros_per_delivery: (deliveries > 0).then(|| cpu_seconds * 1e6 / deliveries as f64),
            resident_before: samples.before.resident_bytes,
            resident_connected: samples.connected.resident_bytes,
            resident_after: samples.until.resident_bytes,
            resident_per_connection: (established > 0).then(|| added as f64 / established as f64),
        }
    }
}

impl Report {
    /// What makes the run a failure, in words; none when every reading connection got every publication once and in
    /// order.
    #[must_use]
    pub fn verdict(&self) -> Option<String> {
        let Self { progress, publisher, .. } = self;
        let counts = &progress.counts;
        if progress.established == 0 {
            return Some("no connection was established".into());
        }
        if publisher.accepted == 0 {
            return Some("no publication was accepted".into());
        }
        let problems = [
            (counts.gaps, "missing in between"),
            (counts.undelivered, "missing at the end"),
            (counts.duplicates, "duplicated"),
            (counts.reorders, "out of order"),
            (counts.misrouted, "of another channel"),
            (counts.malformed, "unreadable"),
        ];
        let found: Vec<String> =
            problems.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
        if !found.is_empty() {
            return Some(format!("deliveries went wrong: {}", found.join(", ")));
        }
        let all_ended = progress.disconnected == progress.established - progress.stalled;
        all_ended.then(|| "every reading connection was ended before the run was over".into())
    }

    /// What a reader of the numbers must know, though it is no failure.
    #[must_use]
    pub fn remarks(&self) -> Vec<String> {
        let progress = &self.progress;
        let mut remarks = Vec::new();
        if progress.failed + progress.never > 0 {
            let missing = progress.failed + progress.never;
            remarks.push(format!("{missing} of {} connections took no part", self.connections));
        }
        if progress.disconnected > 0 {
            let ended = progress.disconnected;
            remarks.push(format!("{ended} reading connections were ended; what they lack after that is not counted"));
        }
        if self.publisher.refused > 0 {
            let (refused, excused) = (self.publisher.refused, progress.counts.refused);
            remarks.push(format!(
                "{refused} publications were refused or not answered; the {excused} deliveries they lack are not counted as missing"
            ));
        }
        if self.publisher.unsent > 0 {
            remarks.push(format!(
                "the server did not keep up with the schedule: {} publications were never sent",
                self.publisher.unsent
            ));
        }
        if self.publisher.slip.p99_micros > SLIP_WORTH_A_WORD {
            let slip = readable_micros(self.publisher.slip.p99_micros);
            remarks.push(format!("1 % of the publications were sent {slip} late or more; the latencies include that"));
        }
        if progress.counts.foreign > 0 {
            remarks.push(format!("{} publications of other runs were received and ignored", progress.counts.foreign));
        }
        remarks
    }
}

/// Microseconds by which the slowest 1 % of publications may be sent late before the report says so.
const SLIP_WORTH_A_WORD: f64 = 5_000.0;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { progress, publisher, .. } = self;
        let counts = &progress.counts;
        writeln!(
            f,
            "connections  {} asked, {} established ({} stalled), {} failed, {} never connected",
            self.connections, progress.established, progress.stalled, progress.failed, progress.never
        )?;
        write_reasons(f, &self.failures)?;
        writeln!(f, "ended        {} reading, {} stalled", progress.disconnected, progress.shed)?;
        write_reasons(f, &self.disconnects)?;
        writeln!(
            f,
            "published    {} accepted, {} refused or not answered, {} unsent; {:.1}/s sent of {:.1}/s asked",
            publisher.accepted, publisher.refused, publisher.unsent, publisher.rate_sent, publisher.rate_asked
        )?;
        write_reasons(f, &publisher.reasons)?;
        writeln!(f, "  sent late  {}", publisher.slip)?;
        writeln!(f, "  answered   {}", publisher.answered)?;
        writeln!(
            f,
            "delivered    {} in all; {} in {:.1} s measured, {:.0}/s",
            counts.deliveries, counts.measured, self.measured_seconds, self.deliveries_per_second
        )?;
        writeln!(f, "  latency    {}", self.latency)?;
        writeln!(
            f,
            "checked      {} gaps, {} undelivered, {} duplicates, {} reorders, {} misrouted, {} unreadable",
            counts.gaps, counts.undelivered, counts.duplicates, counts.reorders, counts.misrouted, counts.malformed
        )?;
        writeln!(f, "generator    {:.2} CPU s", self.generator_cpu_seconds)?;
        if let Some(server) = &self.server {
            write_server(f, server)?;
        }
        for remark in self.remarks() {
            writeln!(f, "note         {remark}")?;
        }
        match self.verdict() {
            Some(problem) => write!(f, "FAILED       {problem}"),
            None => f.write_str("ok           every reading connection got every publication once and in order, as long as it was there"),
        }
    }
}

fn write_reasons(f: &mut fmt::Formatter<'_>, reasons: &Reasons) -> fmt::Result {
    reasons.0.iter().try_for_each(|(reason, count)| writeln!(f, "             {count} × {reason}"))
}

fn write_server(f: &mut fmt::Formatter<'_>, server: &ServerReport) -> fmt::Result {
    write!(f, "server       {:.2} CPU s ({:.2} cores)", server.cpu_seconds, server.cores)?;
    if let Some(micros) = server.cpu_micros_per_delivery {
        write!(f, ", {micros:.2} µs a delivery")?;
    }
    let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    write!(
        f,
        "\n  resident   {:.1} MiB at first, {:.1} MiB connected, {:.1} MiB at the end",
        mebibytes(server.resident_before),
        mebibytes(server.resident_connected),
        mebibytes(server.resident_after)
    )?;
    match server.resident_per_connection {
        Some(bytes) => writeln!(f, "; {bytes:.0} B a connection"),
        None => writeln!(f),
    }
}

/// The line that a terminal shows while a run goes on.
#[must_use]
pub fn progress_line(phase: &str, asked: usize, progress: &Progress, per_second: f64) -> String {
    let counts = &progress.counts;
    let mut line = format!("{phase}: {}/{asked} connected", progress.established);
    let rest = [
        (progress.failed + progress.never, "failed"),
        (progress.disconnected, "ended"),
        (progress.shed, "stalled ended"),
        (counts.gaps as usize, "gaps"),
        (counts.duplicates as usize, "duplicates"),
        (counts.reorders as usize, "reorders"),
    ];
    for (count, what) in rest.into_iter().filter(|(count, _)| *count > 0) {
        let _ = write!(line, ", {count} {what}");
    }
    let _ = write!(line, ", {} delivered, {per_second:.0}/s", counts.deliveries);
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_readable() {
        for (micros, text) in [(7.4, "7 µs"), (999.0, "999 µs"), (1234.0, "1.23 ms"), (12_345.0, "12.3 ms")] {
            assert_eq!(readable_micros(micros), text);
        }
        assert_eq!(readable_micros(123_456.0), "123 ms");
        assert_eq!(readable_micros(1_234_567.0), "1.23 s");
    }

    #[test]
    fn the_server_is_charged_for_the_measured_time_alone() {
        let sample = |cpu_seconds, resident_bytes| ProcessSample { cpu_seconds, resident_bytes };
        let samples = ServerSamples {
            before: sample(1.0, 1_000),
            connected: sample(3.0, 5_000),
            from: sample(4.0, 6_000),
            until: sample(9.0, 7_000),
        };
        let server = ServerReport::of(&samples, 10.0, 1_000_000, 40);
        assert_eq!((server.cpu_seconds, server.cores), (5.0, 0.5));
        assert_eq!((server.cpu_micros_per_delivery, server.resident_per_connection), (Some(5.0), Some(100.0)));
        assert_eq!(ServerReport::of(&samples, 10.0, 0, 0).cpu_micros_per_delivery, None);
    }
}
