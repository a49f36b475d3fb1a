//! The publisher: sends the schedule's publications when they are due, over kept-alive, pipelined HTTP connections.
//!
//! The schedule never waits for the server. What could not be sent in time is sent late and counted from when it was
//! due all the same, so a server that stalls is seen by every publication it held up and not only by the one it was
//! busy with.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use hdrhistogram::Histogram;

use super::kernel::{self, MILLI, Nanos, Poller, SECOND, Watch};
use super::plan::Reasons;
use super::schedule::Schedule;
use super::stamp::write_payload;
use super::tally::latency_histogram;
use crate::client::http::{self, HttpError};
use crate::limits::{BENCH_PIPELINE, CLIENT_CONNECT_MILLIS, CLIENT_RESPONSE_BODY_BYTES};
use crate::wire::http1::{self, BodyDecoder, Framing};

/// How long after the end of the schedule the publisher goes on to send what is late and to wait for answers.
const GRACE: Nanos = 5 * SECOND;
/// Pause before a lost connection is opened again.
const RECONNECT: Nanos = 100 * MILLI;

/// What the publisher needs to know.
#[derive(Debug, Clone)]
pub struct PublisherPlan {
    /// The server.
    pub target: SocketAddr,
    /// Request heads up to the blank line, by channel.
    pub heads: Vec<Vec<u8>>,
    /// Bytes of a payload.
    pub size: usize,
    /// When to send what.
    pub schedule: Schedule,
}

/// What became of the publications.
#[derive(Debug)]
pub struct Published {
    /// Publications of the schedule that were sent.
    pub sent: u64,
    /// Publications of the schedule that were not, because the server fell too far behind.
    pub unsent: u64,
    /// Sent publications that the server answered with success.
    pub accepted: u64,
    /// Those among the sent that it refused or did not answer, in order.
    pub refused: Vec<u64>,
    /// Why.
    pub reasons: Reasons,
    /// Publications sent while measuring.
    pub measured: u64,
    /// How late publications were sent, in nanoseconds; those due while measuring.
    pub slip: Histogram<u64>,
    /// From when a publication was due until the server's answer, in nanoseconds; those due while measuring.
    pub answered: Histogram<u64>,
    /// CPU seconds of the publishing thread over its whole life.
    pub cpu_seconds: f64,
}

/// One connection.
#[derive(Debug, Default)]
struct Peer {
    stream: Option<TcpStream>,
    retry_at: Nanos,
    out: Vec<u8>,
    /// Bytes of `out` that were sent.
    written: usize,
    input: Vec<u8>,
    /// Publications that were sent and not answered, oldest first.
    waiting: VecDeque<u64>,
    watches_writable: bool,
}

struct Publisher<'a> {
    plan: &'a PublisherPlan,
    poller: Poller,
    peers: Vec<Peer>,
    payload: Vec<u8>,
    published: Published,
}

/// Sends the whole schedule and waits for the answers.
///
/// # Errors
/// When a connection cannot be opened at the start, or the kernel refuses an epoll set. Later losses are counted.
pub fn publish(plan: &PublisherPlan) -> io::Result<Published> {
    kernel::sharpen_timers();
    let mut publisher = Publisher {
        plan,
        poller: Poller::new()?,
        peers: Vec::new(),
        payload: Vec::new(),
        published: Published {
            sent: 0,
            unsent: 0,
            accepted: 0,
            refused: Vec::new(),
            reasons: Reasons::default(),
            measured: 0,
            slip: latency_histogram(),
            answered: latency_histogram(),
            cpu_seconds: 0.0,
        },
    };
    for number in 0..usize::from(plan.schedule.publishers) {
        publisher.peers.push(Peer::default());
        publisher.connect(number)?;
    }
    publisher.work()?;
    let mut published = publisher.published;
    published.refused.sort_unstable();
    published.cpu_seconds = kernel::thread_cpu_seconds();
    Ok(published)
}

impl Publisher<'_> {
    fn work(&mut self) -> io::Result<()> {
        let schedule = self.plan.schedule;
        let total = schedule.total();
        let deadline = schedule.measure_until() + GRACE;
        let mut ready = Vec::new();
        let mut next = 0;
        loop {
            let now = kernel::now();
            self.reconnect(now);
            while next < total && schedule.due(next) <= now && now < deadline && self.send(next) {
                next += 1;
            }
            for number in 0..self.peers.len() {
                self.flush(number);
            }
            let waiting = self.peers.iter().any(|peer| !peer.waiting.is_empty());
            if now >= deadline || (next == total && !waiting) {
                break;
            }
            // With a full pipeline the next publication is overdue: only an answer or a new connection helps.
            let due = if next < total { schedule.due(next) } else { deadline };
            let patience = if due <= now { MILLI } else { due - now };
            self.poller.wait(&mut ready, patience.min(RECONNECT))?;
            for event in ready.drain(..) {
                self.receive(event.token as usize);
            }
        }
        for number in 0..self.peers.len() {
            self.lose(number, "no answer before the run ended");
        }
        self.published.sent = next;
        self.published.unsent = total - next;
        Ok(())
    }

    /// Queues publication `index` on its connection; false when that connection takes no more now.
    fn send(&mut self, index: u64) -> bool {
        let stamp = self.plan.schedule.stamp(index);
        let peer = &mut self.peers[usize::from(stamp.publisher)];
        if peer.stream.is_none() || peer.waiting.len() >= BENCH_PIPELINE {
            return false;
        }
        self.payload.clear();
        write_payload(&mut self.payload, stamp, self.plan.size);
        peer.out.extend_from_slice(&self.plan.heads[stamp.channel as usize]);
        peer.out.extend_from_slice(&self.payload);
        peer.waiting.push_back(index);
        let now = kernel::now();
        self.published.measured += u64::from(self.plan.schedule.measures(now));
        if self.plan.schedule.measures(stamp.intended) {
            self.published.slip.saturating_record(now.saturating_sub(stamp.intended).max(1));
        }
        true
    }

    fn flush(&mut self, number: usize) {
        let peer = &mut self.peers[number];
        let Some(stream) = &mut peer.stream else { return };
        while peer.written < peer.out.len() {
            match stream.write(&peer.out[peer.written..]) {
                Ok(count) => peer.written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return self.lose(number, &error.to_string()),
            }
        }
        let blocked = peer.written < peer.out.len();
        if !blocked {
            peer.out.clear();
            peer.written = 0;
        }
        if blocked != peer.watches_writable {
            let watch = if blocked { Watch::ReadWrite } else { Watch::Read };
            peer.watches_writable = blocked;
            if let Err(error) = self.poller.change(stream, number as u64, watch) {
                self.lose(number, &error.to_string());
            }
        }
    }

    fn receive(&mut self, number: usize) {
        let peer = &mut self.peers[number];
        let Some(stream) = &mut peer.stream else { return };
        let mut part = [0; 16 * 1024];
        match stream.read(&mut part) {
            Ok(0) => return self.lose(number, "the server closed the connection"),
            Ok(count) => peer.input.extend_from_slice(&part[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return,
            Err(error) => return self.lose(number, &error.to_string()),
        }
        let now = kernel::now();
        let mut used = 0;
        while let Some(peer) = self.peers.get_mut(number) {
            let answer = match read_answer(&peer.input[used..]) {
                Ok(Some(answer)) => answer,
                Ok(None) => {
                    peer.input.drain(..used);
                    return;
                }
                Err(problem) => return self.lose(number, &problem.to_string()),
            };
            used += answer.length;
            let Some(index) = peer.waiting.pop_front() else {
                return self.lose(number, "an answer to no request");
            };
            if answer.accepted {
                self.published.accepted += 1;
                let due = self.plan.schedule.due(index);
                if self.plan.schedule.measures(due) {
                    self.published.answered.saturating_record(now.saturating_sub(due).max(1));
                }
            } else {
                self.published.refused.push(index);
                self.published.reasons.count(answer.text);
            }
            if answer.last {
                return self.lose(number, "the server closed the connection");
            }
        }
    }

    /// Gives a connection up. Whether the server took what it did not answer is not known.
    fn lose(&mut self, number: usize, reason: &str) {
        let peer = &mut self.peers[number];
        let unanswered = std::mem::take(&mut peer.waiting);
        *peer = Peer { retry_at: kernel::now() + RECONNECT, ..Peer::default() };
        for index in unanswered {
            self.published.refused.push(index);
            self.published.reasons.count(format!("not answered: {reason}"));
        }
    }

    fn reconnect(&mut self, now: Nanos) {
        for number in 0..self.peers.len() {
            if self.peers[number].stream.is_none()
                && now >= self.peers[number].retry_at
                && let Err(error) = self.connect(number)
            {
                self.lose(number, &error.to_string());
            }
        }
    }

    fn connect(&mut self, number: usize) -> io::Result<()> {
        let stream = TcpStream::connect_timeout(&self.plan.target, Duration::from_millis(CLIENT_CONNECT_MILLIS))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        self.poller.add(&stream, number as u64, Watch::Read)?;
        self.peers[number].stream = Some(stream);
        Ok(())
    }
}

/// One response.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    /// Bytes of it.
    length: usize,
    accepted: bool,
    /// Status and the start of the body, when it is a refusal.
    text: String,
    /// The connection ends after it.
    last: bool,
}

/// Reads the response at the start of `bytes`; none while it is incomplete.
fn read_answer(bytes: &[u8]) -> Result<Option<Answer>, HttpError> {
    let Some((head, mut length)) = http1::parse_response_head(bytes)? else { return Ok(None) };
    let framing = head.framing("POST");
    let mut decoder = BodyDecoder::new(framing, CLIENT_RESPONSE_BODY_BYTES)?;
    let mut body = Vec::new();
    length += decoder.feed(&bytes[length..], &mut body)?;
    // A body that ends with the connection is answer enough: whatever follows, the connection is given up.
    if !decoder.is_done() && framing != Framing::UntilClose {
        return Ok(None);
    }
    let accepted = (200..300).contains(&head.status);
    let text = if accepted { String::new() } else { http::complaint(head.status, &body) };
    Ok(Some(Answer { length, accepted, text, last: !head.keep_alive() || framing == Framing::UntilClose }))
}
