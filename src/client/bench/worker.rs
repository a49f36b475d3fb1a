//! A worker: one thread that holds its share of the subscribing connections, checks every delivery and reports.

use std::io::{self, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::mpsc::{self, Receiver, TryRecvError};

use socket2::{Domain, Socket, Type};

use super::connection::{End, Subscriber, Surroundings};
use super::kernel::{self, MILLI, Nanos, Poller, Ready, Watch};
use super::plan::{self, FromWorker, Outcome, Plan, Progress, Reasons, ToWorker};
use super::schedule::{Schedule, is_stalled, opening};
use super::stamp::Scanner;
use super::tally::{Tally, to_sparse};
use crate::limits::{BENCH_OPENING, BENCH_READ_BYTES, BENCH_SOURCE_CONNECTIONS, BENCH_STALLED_RECEIVE_BYTES};

/// How often progress is reported.
const PROGRESS: Nanos = 250 * MILLI;
/// Longest wait: what the parent says is looked at this often.
const TICK: Nanos = 20 * MILLI;
/// How long stalled connections are read at the end, to see which of them the server has ended.
const REVIVE: Nanos = 1_000 * MILLI;

/// One connection of this worker.
#[derive(Debug)]
struct Slot {
    /// None once it has ended.
    stream: Option<TcpStream>,
    subscriber: Subscriber,
    phase: Phase,
    stalled: bool,
}

/// What a connection is counted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The TCP handshake is under way.
    Connecting,
    /// The request was sent.
    Opening,
    /// Subscribed.
    Live,
    /// Over.
    Ended,
}

/// Runs a worker in this process: commands come in on `control`, what it finds goes out on `reports`.
///
/// # Errors
/// When a pipe breaks, because the parent is gone, or the kernel refuses an epoll set.
pub fn run(control: impl Read + Send + 'static, mut reports: impl Write) -> io::Result<()> {
    let mut control = BufReader::new(control);
    let Some(ToWorker::Open(plan)) = plan::receive(&mut control)? else { return Ok(()) };
    let (sender, commands) = mpsc::channel();
    // A blocking reader of its own keeps the pipe out of the measured loop. It ends with the pipe.
    std::thread::spawn(move || {
        while let Ok(Some(command)) = plan::receive(&mut control) {
            if sender.send(command).is_err() {
                return;
            }
        }
    });
    let mut worker = match Worker::new(plan) {
        Ok(worker) => worker,
        Err(error) => return plan::send(&mut reports, &FromWorker::Failed(error.to_string())),
    };
    match worker.work(&commands, &mut reports)? {
        Some(outcome) => plan::send(&mut reports, &FromWorker::Outcome(Box::new(outcome))),
        None => Ok(()),
    }
}

struct Worker {
    plan: Plan,
    poller: Poller,
    slots: Vec<Slot>,
    scanner: Scanner,
    tally: Tally,
    /// Connections that are being established.
    pending: usize,
    progress: Progress,
    failures: Reasons,
    disconnects: Reasons,
    buffer: Vec<u8>,
    answer: Vec<u8>,
}

/// The end of a run, once the parent has announced it.
struct Ending {
    published: u64,
    refused: Vec<u64>,
    deadline: Nanos,
    next_look: Nanos,
}

impl Worker {
    fn new(plan: Plan) -> io::Result<Self> {
        Ok(Self {
            poller: Poller::new()?,
            slots: Vec::with_capacity(plan.connections),
            scanner: Scanner::default(),
            tally: Tally::new(plan.run, plan.connections, plan.publishers),
            pending: 0,
            progress: Progress::default(),
            failures: Reasons::default(),
            disconnects: Reasons::default(),
            buffer: vec![0; BENCH_READ_BYTES],
            answer: Vec::new(),
            plan,
        })
    }

    /// Works until the run is over; none when the parent left before that.
    fn work(&mut self, commands: &Receiver<ToWorker>, reports: &mut impl Write) -> io::Result<Option<Outcome>> {
        let began = kernel::now();
        let settled_by = opening(began, self.plan.connections, self.plan.connect_rate) + self.plan.settle;
        let mut settled = false;
        let mut next_progress = began;
        let mut schedule: Option<Schedule> = None;
        let mut ending: Option<Ending> = None;
        let mut cpu = CpuWindow::default();
        let mut ready = Vec::new();
        loop {
            let now = kernel::now();
            match commands.try_recv() {
                Ok(ToWorker::Open(_)) | Err(TryRecvError::Empty) => {}
                Ok(ToWorker::Start(given)) => {
                    self.tally.start(given);
                    schedule = Some(given);
                }
                Ok(ToWorker::Finish { published, refused }) => {
                    ending = Some(Ending { published, refused, deadline: now + self.plan.drain, next_look: now });
                }
                Err(TryRecvError::Disconnected) => return Ok(None),
            }
            self.open_due(began, now);
            if !settled && self.is_settled(now, settled_by) {
                settled = true;
                plan::send(reports, &FromWorker::Opened(self.progress()))?;
            }
            if now >= next_progress {
                next_progress = now + PROGRESS;
                plan::send(reports, &FromWorker::Progress(self.progress()))?;
            }
            if let Some(schedule) = &schedule {
                cpu.look(schedule, now);
                if let Some(ending) = &mut ending
                    && now >= ending.next_look
                {
                    ending.next_look = now + TICK;
                    if now >= ending.deadline || self.is_complete(ending.published, schedule) {
                        return self.finish(ending, schedule, cpu.seconds()).map(Some);
                    }
                }
            }
            self.poller.wait(&mut ready, self.patience(began, now))?;
            for event in ready.drain(..) {
                self.handle(event);
            }
        }
    }

    /// How long to wait for readiness: until the next connection is due to be opened, at most [`TICK`].
    fn patience(&self, began: Nanos, now: Nanos) -> Nanos {
        if self.slots.len() == self.plan.connections || self.pending >= BENCH_OPENING {
            return TICK;
        }
        opening(began, self.slots.len(), self.plan.connect_rate).saturating_sub(now).min(TICK)
    }

    /// Opens the connections whose time has come, as far as not too many are being established.
    fn open_due(&mut self, began: Nanos, now: Nanos) {
        while self.slots.len() < self.plan.connections
            && self.pending < BENCH_OPENING
            && opening(began, self.slots.len(), self.plan.connect_rate) <= now
        {
            let number = self.slots.len();
            let global = self.plan.first + number;
            let stalled = is_stalled(global, self.plan.stalled_percent);
            let subscriber = Subscriber::new(number, (global % self.plan.channels as usize) as u32);
            self.slots.push(Slot { stream: None, subscriber, phase: Phase::Connecting, stalled });
            self.pending += 1;
            let opened = connect(self.plan.target, global, stalled).and_then(|stream| {
                self.poller.add(&stream, number as u64, Watch::Write)?;
                Ok(stream)
            });
            match opened {
                Ok(stream) => self.slots[number].stream = Some(stream),
                Err(error) => self.end(number, &End::Socket(format!("connect: {error}"))),
            }
        }
    }

    /// Whether every connection is established or has failed. Those that are still pending at the deadline are given
    /// up.
    fn is_settled(&mut self, now: Nanos, deadline: Nanos) -> bool {
        if self.slots.len() < self.plan.connections && now < deadline {
            return false;
        }
        if self.pending > 0 && now >= deadline {
            for number in 0..self.slots.len() {
                if matches!(self.slots[number].phase, Phase::Connecting | Phase::Opening) {
                    self.slots[number].phase = Phase::Ended;
                    self.slots[number].stream = None;
                    self.pending -= 1;
                    self.progress.never += 1;
                }
            }
            self.progress.never += self.plan.connections - self.slots.len();
            self.plan.connections = self.slots.len();
        }
        self.pending == 0
    }

    fn handle(&mut self, event: Ready) {
        let number = event.token as usize;
        let slot = &mut self.slots[number];
        match slot.phase {
            Phase::Connecting if event.writable => self.send_request(number),
            Phase::Live if slot.stalled && event.ended => self.end(number, &End::Eof),
            Phase::Opening | Phase::Live => self.read(number),
            Phase::Connecting | Phase::Ended => {}
        }
    }

    fn send_request(&mut self, number: usize) {
        let slot = &mut self.slots[number];
        let Some(stream) = &mut slot.stream else { return };
        let request = slot.subscriber.request(&self.plan);
        let sent = match stream.take_error() {
            Ok(None) => send_whole(stream, &request),
            Ok(Some(error)) | Err(error) => Err(error),
        };
        match sent.and_then(|()| self.poller.change(stream, number as u64, Watch::Read)) {
            Ok(()) => slot.phase = Phase::Opening,
            Err(error) => self.end(number, &End::Socket(format!("connect: {error}"))),
        }
    }

    /// Reads once: the set is level-triggered, so what is left comes again, after the others had their turn.
    fn read(&mut self, number: usize) {
        let slot = &mut self.slots[number];
        let Some(stream) = &mut slot.stream else { return };
        let received = match stream.read(&mut self.buffer) {
            Ok(0) => Err(End::Eof),
            Ok(_) if slot.stalled && slot.phase == Phase::Live => Ok(()),
            Ok(count) => {
                let mut around = Surroundings {
                    plan: &self.plan,
                    scanner: &self.scanner,
                    tally: &mut self.tally,
                    answer: &mut self.answer,
                    now: kernel::now(),
                };
                slot.subscriber.receive(&mut self.buffer[..count], &mut around)
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(()),
            Err(error) => Err(End::Socket(error.to_string())),
        };
        let answered = received.and_then(|()| {
            let result = if self.answer.is_empty() { Ok(()) } else { send_whole(stream, &self.answer) };
            result.map_err(|error| End::Socket(format!("answer: {error}")))
        });
        self.answer.clear();
        if let Err(end) = answered {
            return self.end(number, &end);
        }
        if slot.phase == Phase::Opening && slot.subscriber.is_live() {
            slot.phase = Phase::Live;
            self.pending -= 1;
            self.progress.established += 1;
            if slot.stalled {
                self.progress.stalled += 1;
                if let Err(error) = self.poller.change(stream, number as u64, Watch::End) {
                    self.end(number, &End::Socket(error.to_string()));
                }
            }
        }
    }

    fn end(&mut self, number: usize, reason: &End) {
        let slot = &mut self.slots[number];
        match slot.phase {
            Phase::Ended => return,
            Phase::Connecting | Phase::Opening => {
                self.pending -= 1;
                self.progress.failed += 1;
                self.failures.count(reason.to_string());
            }
            Phase::Live if slot.stalled => self.progress.shed += 1,
            Phase::Live => {
                self.progress.disconnected += 1;
                self.disconnects.count(reason.to_string());
            }
        }
        slot.phase = Phase::Ended;
        slot.stream = None;
    }

    fn readers(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(|slot| slot.phase == Phase::Live && !slot.stalled)
    }

    fn is_complete(&self, published: u64, schedule: &Schedule) -> bool {
        self.readers()
            .all(|slot| self.tally.is_complete(slot.subscriber.number, slot.subscriber.channel, published, schedule))
    }

    fn progress(&self) -> Progress {
        Progress { counts: self.tally.counts(), ..self.progress }
    }

    fn finish(&mut self, ending: &Ending, schedule: &Schedule, cpu_seconds: f64) -> io::Result<Outcome> {
        let mut refused = vec![Vec::new(); self.plan.channels as usize];
        for &index in &ending.refused {
            let stamp = schedule.stamp(index);
            refused[stamp.channel as usize].push((stamp.publisher, stamp.sequence));
        }
        for slot in self.slots.iter().filter(|slot| slot.phase == Phase::Live && !slot.stalled) {
            let Subscriber { number, channel, .. } = slot.subscriber;
            self.tally.finish(number, channel, ending.published, schedule, &refused[channel as usize]);
        }
        // From here on nothing is counted as delivered or disconnected: readers may go.
        for slot in self.slots.iter_mut().filter(|slot| !slot.stalled) {
            slot.phase = Phase::Ended;
            slot.stream = None;
        }
        self.revive_stalled()?;
        Ok(Outcome {
            progress: self.progress(),
            latency: to_sparse(self.tally.latency()),
            cpu_seconds,
            failures: std::mem::take(&mut self.failures),
            disconnects: std::mem::take(&mut self.disconnects),
        })
    }

    /// Reads from the stalled connections for a while. One that the server has shed ends as soon as its receive buffer
    /// is empty; before that its end cannot be seen.
    fn revive_stalled(&mut self) -> io::Result<()> {
        let deadline = kernel::now() + REVIVE;
        for (number, slot) in self.slots.iter().enumerate() {
            if let Some(stream) = &slot.stream {
                self.poller.change(stream, number as u64, Watch::Read)?;
            }
        }
        let mut ready = Vec::new();
        loop {
            let left = deadline.saturating_sub(kernel::now());
            if left == 0 || self.progress.shed == self.progress.stalled {
                return Ok(());
            }
            self.poller.wait(&mut ready, left)?;
            for event in ready.drain(..) {
                self.read(event.token as usize);
            }
        }
    }
}

/// This thread's CPU time at both ends of the measured window, as well as the loop can meet them.
#[derive(Debug, Default)]
struct CpuWindow {
    from: Option<f64>,
    until: Option<f64>,
}

impl CpuWindow {
    fn look(&mut self, schedule: &Schedule, now: Nanos) {
        if self.from.is_none() && now >= schedule.measure_from() {
            self.from = Some(kernel::thread_cpu_seconds());
        }
        if self.until.is_none() && now >= schedule.measure_until() {
            self.until = Some(kernel::thread_cpu_seconds());
        }
    }

    fn seconds(&self) -> f64 {
        self.from.zip(self.until).map_or(0.0, |(from, until)| until - from)
    }
}

/// Starts to connect. `global` is the connection's number in the run: on a loopback IPv4 target every
/// [`BENCH_SOURCE_CONNECTIONS`] connections get a source address of their own, since one has about 28,000 ports.
fn connect(target: SocketAddr, global: usize, stalled: bool) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    if stalled {
        socket.set_recv_buffer_size(BENCH_STALLED_RECEIVE_BYTES)?;
    }
    let source = global / BENCH_SOURCE_CONNECTIONS;
    if let IpAddr::V4(ip) = target.ip()
        && ip.is_loopback()
        && source > 0
    {
        kernel::choose_port_at_connect(&socket)?;
        let address = Ipv4Addr::from_bits(Ipv4Addr::LOCALHOST.to_bits() + source as u32);
        socket.bind(&SocketAddr::from((address, 0)).into())?;
    }
    match socket.connect(&target.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) => return Err(error),
    }
    Ok(socket.into())
}

/// Sends a small message whole. The send buffer of a connection that sends so little has room, or its peer reads
/// nothing.
fn send_whole(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    if stream.write(bytes)? == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn each_block_of_connections_comes_from_an_address_of_its_own() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap();
        for (global, source) in [
            (0, [127, 0, 0, 1]),
            (BENCH_SOURCE_CONNECTIONS - 1, [127, 0, 0, 1]),
            (BENCH_SOURCE_CONNECTIONS, [127, 0, 0, 2]),
            (3 * BENCH_SOURCE_CONNECTIONS - 1, [127, 0, 0, 3]),
        ] {
            let _client = connect(target, global, false).unwrap();
            assert_eq!(listener.accept().unwrap().1.ip(), IpAddr::from(source), "connection {global}");
        }
    }

    #[test]
    fn a_worker_ends_when_its_parent_is_gone() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let plan = Plan {
            target: listener.local_addr().unwrap(),
            authority: "h".into(),
            protocol: plan::Protocol::Sse,
            subscribe_path: "/".into(),
            channel_prefix: "c".into(),
            run: 1,
            first: 0,
            connections: 1,
            channels: 1,
            publishers: 1,
            stalled_percent: 0.0,
            connect_rate: 1e3,
            settle: kernel::SECOND,
            drain: 0,
        };
        let (control, mut parent) = io::pipe().unwrap();
        let worker = std::thread::spawn(move || run(control, io::sink()));
        plan::send(&mut parent, &ToWorker::Open(plan)).unwrap();
        let connection = listener.accept().unwrap();
        drop(parent);
        worker.join().unwrap().unwrap();
        drop(connection);
    }
}
