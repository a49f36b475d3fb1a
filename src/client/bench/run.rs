//! The parent's part of a run: starts the workers, publishes, samples the server and sums up.

use std::io::{self, BufReader, PipeReader, PipeWriter, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Args;
use super::kernel::{self, MILLI, Nanos, ProcessSample};
use super::plan::{self, FromWorker, Outcome, Plan, Progress, Reasons, ToWorker, channel_name};
use super::publisher::{self, Published, PublisherPlan};
use super::report::{Latency, PublisherReport, Report, ServerReport, ServerSamples, progress_line};
use super::schedule::{Schedule, opening, seconds};
use super::tally::{add_sparse, latency_histogram};
use super::worker;
use crate::client::http::HttpError;
use crate::limits::BENCH_SETTLE_MILLIS;
use crate::wire::channel_name::NameError;
use crate::wire::http1;

/// Between the last connection and the first publication: the workers learn of the schedule in it.
const LEAD: Nanos = 200 * MILLI;
/// How often the progress line changes, and how exactly the measured window is met by the server's samples.
const TICK: Nanos = 20 * MILLI;
/// Descriptors of a worker that are not connections, with room to spare.
const OTHER_DESCRIPTORS: u64 = 64;
/// How long a worker may be silent past everything it was asked to wait for.
const SILENCE: Nanos = 30_000 * MILLI;

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A channel without a subscriber.
    #[error(
        "--channels {channels} with --connections {connections} leaves channels without a subscriber; allowed: at most one a connection"
    )]
    Channels {
        /// Channels asked for.
        channels: u32,
        /// Connections asked for.
        connections: u64,
    },
    /// Nobody reads.
    #[error("--stalled leaves no connection that reads; allowed: a share that leaves at least one")]
    AllStalled,
    /// Channel names would not be valid.
    #[error("--channel-prefix: {0}")]
    Prefix(NameError),
    /// Too few descriptors.
    #[error(
        "a worker of {connections} connections needs {needed} descriptors and the hard limit (ulimit -Hn) is {limit}; use --workers {workers} or more"
    )]
    Descriptors {
        /// Connections of the largest worker.
        connections: usize,
        /// Descriptors it needs.
        needed: u64,
        /// Descriptors it may have.
        limit: u64,
        /// Workers that would do.
        workers: u64,
    },
    /// The server does not answer.
    #[error(transparent)]
    Server(#[from] HttpError),
    /// The process to watch cannot be.
    #[error("--server-pid {pid}: {error}")]
    Process {
        /// Its id.
        pid: u32,
        /// Why not.
        error: io::Error,
    },
    /// A worker could not be started or has died.
    #[error("a worker failed: {0}")]
    Worker(String),
    /// The publisher could not start.
    #[error("the publisher failed: {0}")]
    Publisher(io::Error),
}

/// Runs the load generator; with `live`, a progress line on standard error.
///
/// # Errors
/// See [`BenchError`]. Deliveries that went wrong are no error but part of the report.
pub fn execute(args: &Args, live: bool) -> Result<Report, BenchError> {
    args.check()?;
    let shares = args.shares();
    check_descriptors(args, &shares)?;
    let target = args.url.connect()?.peer_addr().map_err(HttpError::Io)?;
    let before = sample(args)?;
    let run_number = kernel::now() as u32 ^ std::process::id();

    let mut crew = Crew::start(args, &shares, target, run_number)?;
    let mut screen = Screen { live, asked: args.connections as usize, last: (kernel::now(), 0), rate: 0.0 };
    let opened_by =
        opening(kernel::now(), args.connections as usize, args.connect_rate) + BENCH_SETTLE_MILLIS * MILLI + SILENCE;
    while !crew.all_opened() {
        crew.listen(opened_by)?;
        screen.show("connecting", &crew.progress());
    }
    let connected = sample(args)?;

    let schedule = Schedule {
        run: run_number,
        rate: args.rate,
        channels: args.channels,
        publishers: args.publishers,
        start: kernel::now() + LEAD,
        warmup: seconds(args.warmup),
        duration: seconds(args.duration),
    };
    crew.tell(&ToWorker::Start(schedule))?;
    let publisher = start_publisher(args, target, schedule);
    let [mut from, mut until] = [None; 2];
    while !publisher.is_finished() {
        crew.listen(Nanos::MAX)?;
        screen.show("publishing", &crew.progress());
        sample_at(args, schedule.measure_from(), &mut from)?;
        sample_at(args, schedule.measure_until(), &mut until)?;
    }
    let published = publisher
        .join()
        .map_err(|_| BenchError::Worker("the publisher panicked".into()))?
        .map_err(BenchError::Publisher)?;
    sample_at(args, 0, &mut from)?;
    // The answers may all be there before the schedule's last interval has passed.
    while until.is_none() && args.server_pid.is_some() {
        crew.listen(schedule.measure_until() + SILENCE)?;
        sample_at(args, schedule.measure_until(), &mut until)?;
    }

    let Published { sent, ref refused, .. } = published;
    crew.tell(&ToWorker::Finish { published: sent, refused: refused.clone() })?;
    let finished_by = kernel::now() + seconds(args.drain) + SILENCE;
    while !crew.all_finished() {
        crew.listen(finished_by)?;
        screen.show("finishing", &crew.progress());
    }
    screen.clear();
    let server = match (before, connected, from, until) {
        (Some(before), Some(connected), Some(from), Some(until)) => {
            Some(ServerSamples { before, connected, from, until })
        }
        _ => None,
    };
    Ok(sum_up(args, crew.finish()?, &published, server.as_ref()))
}

fn check_descriptors(args: &Args, shares: &[usize]) -> Result<(), BenchError> {
    let limit = kernel::raise_descriptor_limit();
    let connections = shares.iter().copied().max().unwrap_or(0);
    let needed = connections as u64 + OTHER_DESCRIPTORS + u64::from(args.publishers);
    if needed <= limit {
        return Ok(());
    }
    let each = limit.saturating_sub(OTHER_DESCRIPTORS + u64::from(args.publishers)).max(1);
    Err(BenchError::Descriptors { connections, needed, limit, workers: args.connections.div_ceil(each) })
}

fn sample(args: &Args) -> Result<Option<ProcessSample>, BenchError> {
    let Some(pid) = args.server_pid else { return Ok(None) };
    kernel::sample_process(pid).map(Some).map_err(|error| BenchError::Process { pid, error })
}

/// Samples the server once `time` has come.
fn sample_at(args: &Args, time: Nanos, slot: &mut Option<ProcessSample>) -> Result<(), BenchError> {
    if slot.is_none() && kernel::now() >= time {
        *slot = sample(args)?;
    }
    Ok(())
}

fn start_publisher(args: &Args, target: SocketAddr, schedule: Schedule) -> JoinHandle<io::Result<Published>> {
    let authority = args.url.authority();
    let head = |channel| {
        let name = http1::percent_encode(&channel_name(&args.channel_prefix, channel));
        let path = format!("{}{}", args.url.prefix, args.publish_path.replace("{channel}", &name));
        let headers = [("Host", authority.as_str()), ("Content-Type", "application/json")];
        let mut head = Vec::new();
        http1::write_request(&mut head, "POST", &path, &headers, Some(args.size as usize));
        head
    };
    let heads = (0..args.channels).map(head).collect();
    let plan = PublisherPlan { target, heads, size: args.size as usize, schedule };
    std::thread::spawn(move || publisher::publish(&plan))
}

fn sum_up(args: &Args, outcomes: Vec<Outcome>, published: &Published, server: Option<&ServerSamples>) -> Report {
    let mut progress = Progress::default();
    let mut latency = latency_histogram();
    let (mut failures, mut disconnects) = (Reasons::default(), Reasons::default());
    let mut generator_cpu_seconds = published.cpu_seconds;
    for outcome in outcomes {
        progress.add(&outcome.progress);
        add_sparse(&mut latency, &outcome.latency);
        generator_cpu_seconds += outcome.cpu_seconds;
        failures.merge(outcome.failures);
        disconnects.merge(outcome.disconnects);
    }
    let measured = progress.counts.measured;
    Report {
        connections: args.connections as usize,
        progress,
        failures,
        disconnects,
        measured_seconds: args.duration,
        deliveries_per_second: measured as f64 / args.duration,
        latency: Latency::of(&latency),
        publisher: PublisherReport::of(published, args.rate, args.duration),
        generator_cpu_seconds,
        server: server.map(|samples| ServerReport::of(samples, args.duration, measured, progress.established)),
    }
}

/// One worker as its parent sees it.
struct Member {
    commands: PipeWriter,
    /// None for a worker in this process.
    child: Option<Child>,
    progress: Progress,
    opened: bool,
    outcome: Option<Outcome>,
}

/// All workers.
struct Crew {
    members: Vec<Member>,
    /// What they say, by the member's number; none when a pipe has ended.
    reports: Receiver<(usize, io::Result<Option<FromWorker>>)>,
}

impl Crew {
    fn start(args: &Args, shares: &[usize], target: SocketAddr, run: u32) -> Result<Self, BenchError> {
        let failed = |error: io::Error| BenchError::Worker(error.to_string());
        let (sender, reports) = mpsc::channel();
        let mut crew = Self { members: Vec::new(), reports };
        let mut first = 0;
        for (number, &connections) in shares.iter().enumerate() {
            let (control, commands) = io::pipe().map_err(failed)?;
            let (output, input) = io::pipe().map_err(failed)?;
            let child = if args.workers == Some(0) {
                std::thread::spawn(move || worker::run(control, input));
                None
            } else {
                Some(start_process(control, input).map_err(failed)?)
            };
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut output = BufReader::new(output);
                loop {
                    let message = plan::receive(&mut output);
                    let last = !matches!(message, Ok(Some(_)));
                    if sender.send((number, message)).is_err() || last {
                        return;
                    }
                }
            });
            crew.members.push(Member { commands, child, progress: Progress::default(), opened: false, outcome: None });
            let plan = Plan {
                target,
                authority: args.url.authority(),
                protocol: args.protocol,
                subscribe_path: format!("{}{}", args.url.prefix, args.subscribe_path()),
                channel_prefix: args.channel_prefix.clone(),
                run,
                first,
                connections,
                channels: args.channels,
                publishers: args.publishers,
                stalled_percent: args.stalled,
                connect_rate: args.connect_rate * connections as f64 / args.connections as f64,
                settle: BENCH_SETTLE_MILLIS * MILLI,
                drain: seconds(args.drain),
            };
            first += connections;
            crew.members[number].tell(&ToWorker::Open(plan))?;
        }
        Ok(crew)
    }

    fn tell(&mut self, message: &ToWorker) -> Result<(), BenchError> {
        self.members.iter_mut().try_for_each(|member| member.tell(message))
    }

    /// Takes the next report, for at most [`TICK`].
    fn listen(&mut self, deadline: Nanos) -> Result<(), BenchError> {
        let (number, message) = match self.reports.recv_timeout(Duration::from_nanos(TICK)) {
            Ok(report) => report,
            Err(RecvTimeoutError::Timeout) if kernel::now() < deadline => return Ok(()),
            Err(_) => return Err(BenchError::Worker("it has stopped reporting".into())),
        };
        let member = &mut self.members[number];
        match message {
            Ok(Some(FromWorker::Progress(progress))) => member.progress = progress,
            Ok(Some(FromWorker::Opened(progress))) => {
                member.progress = progress;
                member.opened = true;
            }
            Ok(Some(FromWorker::Outcome(outcome))) => {
                member.progress = outcome.progress;
                member.outcome = Some(*outcome);
            }
            Ok(Some(FromWorker::Failed(reason))) => return Err(BenchError::Worker(reason)),
            Ok(None) if member.outcome.is_some() => {}
            Ok(None) => return Err(BenchError::Worker("it ended before it had reported".into())),
            Err(error) => return Err(BenchError::Worker(error.to_string())),
        }
        Ok(())
    }

    fn all_opened(&self) -> bool {
        self.members.iter().all(|member| member.opened)
    }

    fn all_finished(&self) -> bool {
        self.members.iter().all(|member| member.outcome.is_some())
    }

    fn progress(&self) -> Progress {
        let mut sum = Progress::default();
        self.members.iter().for_each(|member| sum.add(&member.progress));
        sum
    }

    fn finish(mut self) -> Result<Vec<Outcome>, BenchError> {
        let outcomes = self.members.iter_mut().filter_map(|member| member.outcome.take()).collect();
        for mut member in std::mem::take(&mut self.members) {
            drop(member.commands);
            if let Some(child) = &mut member.child {
                child.wait().map_err(|error| BenchError::Worker(error.to_string()))?;
            }
        }
        Ok(outcomes)
    }
}

impl Drop for Crew {
    /// After an error: workers end when their pipe does, and are waited for so that none is left behind.
    fn drop(&mut self) {
        for member in std::mem::take(&mut self.members) {
            drop(member.commands);
            if let Some(mut child) = member.child {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

impl Member {
    fn tell(&mut self, message: &ToWorker) -> Result<(), BenchError> {
        plan::send(&mut self.commands, message)
            .map_err(|error| BenchError::Worker(format!("it takes no commands: {error}")))
    }
}

/// Starts this program again as a worker.
fn start_process(control: PipeReader, reports: PipeWriter) -> io::Result<Child> {
    // Not the path it was started by: that may hold another program by now.
    Command::new("/proc/self/exe")
        .args(["bench", "--worker"])
        .stdin(Stdio::from(control))
        .stdout(Stdio::from(reports))
        .spawn()
}

/// The progress line.
struct Screen {
    live: bool,
    asked: usize,
    /// When the rate was last taken, and the deliveries until then.
    last: (Nanos, u64),
    rate: f64,
}

/// How long the shown rate is the mean of.
const RATE_INTERVAL: Nanos = 1_000 * MILLI;

impl Screen {
    fn show(&mut self, phase: &str, progress: &Progress) {
        if !self.live {
            return;
        }
        let (time, deliveries) = self.last;
        let passed = kernel::now() - time;
        if passed >= RATE_INTERVAL {
            self.rate = progress.counts.deliveries.saturating_sub(deliveries) as f64 * 1e9 / passed as f64;
            self.last = (kernel::now(), progress.counts.deliveries);
        }
        let line = progress_line(phase, self.asked, progress, self.rate);
        // A terminal that is gone is no reason to stop.
        let _ = write!(io::stderr(), "\r\x1b[K{line}").and_then(|()| io::stderr().flush());
    }

    fn clear(&self) {
        if self.live {
            let _ = write!(io::stderr(), "\r\x1b[K").and_then(|()| io::stderr().flush());
        }
    }
}
