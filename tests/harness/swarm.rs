//! Many clients in one thread, each of which checks that it misses nothing, and comes back when it is cut.

mod client;
mod sequence;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use weir::client::bench::kernel::{self, MILLI, Poller, Ready, Watch};

use self::client::{Client, Speaks};
pub use self::sequence::Verdicts;
use super::{DEADLINE, eventually};

/// Clients of all swarms of this process at the same time. A large one waits for the others: together they would be short of
/// descriptors, and slow each other down.
const SEATS: usize = 12_000;
/// How often orders are looked at.
const TICK: Duration = Duration::from_millis(5);
/// How long a client waits after a refusal, at most.
const RETRY: Duration = Duration::from_millis(200);

/// What a swarm is made of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where its clients connect.
    pub address: SocketAddr,
    /// Clients; client `i` has channel `i % channels.len()`.
    pub clients: usize,
    /// How many of them speak WebSocket, about.
    pub websockets: usize,
    /// The first so many take little from the network beyond what they read.
    pub narrow: usize,
    /// The channels. Their payloads begin with a line that is a number: 1, 2, 3, …
    pub channels: Vec<String>,
    /// The clients come within this time, and one that was cut comes back after a random part of it.
    pub spread: Duration,
    /// A client that heard nothing for so long takes its connection for dead and makes another.
    pub silence: Option<Duration>,
}

impl Plan {
    /// A client for each channel, over server-sent events, that comes back at once.
    pub fn new(address: SocketAddr, channels: &[&str]) -> Self {
        Self {
            address,
            clients: channels.len(),
            websockets: 0,
            narrow: 0,
            channels: channels.iter().map(|&channel| channel.to_owned()).collect(),
            spread: Duration::ZERO,
            silence: None,
        }
    }
}

/// What the clients have seen.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    /// The verdicts over all clients.
    pub verdicts: Verdicts,
    /// Clients that are subscribed and know their position.
    pub live: usize,
    /// The largest number that every client has received.
    pub least: u64,
    /// The fewest gaps that a client was told of.
    pub least_gaps: u64,
    /// Connections that were made after the first.
    pub returns: u64,
    /// Connections that clients gave up: because they were told to, or heard nothing.
    pub given_up: u64,
    /// Connections that the other side ended.
    pub ended: u64,
    /// Connections that were not opened, by what was answered.
    pub refused: BTreeMap<String, u64>,
}

impl Counts {
    /// Fails if anything was lost, repeated or reordered, or a gap was announced.
    #[track_caller]
    pub fn assert_whole(&self) {
        let expected = Verdicts { received: self.verdicts.received, ..Verdicts::default() };
        assert_eq!(self.verdicts, expected, "each publication once and in order: {self:?}");
    }

    /// Fails if anything is missing that was not announced, or came twice or out of order without a gap.
    #[track_caller]
    pub fn assert_nothing_silent(&self) {
        let Verdicts { lost, duplicates, reordered, .. } = self.verdicts;
        assert_eq!((lost, duplicates, reordered), (0, 0, 0), "{self:?}");
    }
}

enum Order {
    /// Whoever connects from now on connects there.
    Move(SocketAddr),
    /// Every connection is reset.
    Cut,
    /// The first so many clients stop reading, or all read; answered once it holds.
    Pause(usize, Sender<()>),
}

/// A running swarm.
pub struct Swarm {
    clients: usize,
    orders: Sender<Order>,
    counts: Arc<Mutex<Counts>>,
    thread: Option<JoinHandle<()>>,
    _seats: Seats,
}

impl Swarm {
    /// Starts the clients and waits until all are live.
    #[track_caller]
    pub fn open(plan: Plan) -> Self {
        let seats = Seats::take(plan.clients);
        let limit = kernel::raise_descriptor_limit();
        assert!(limit > plan.clients as u64 + 500, "{} clients need more than {limit} descriptors", plan.clients);
        let counts = Arc::new(Mutex::new(Counts::default()));
        let (orders, inbox) = channel();
        let clients = plan.clients;
        let thread = std::thread::spawn({
            let counts = Arc::clone(&counts);
            move || Worker::new(plan).run(&inbox, &counts)
        });
        let swarm = Self { clients, orders, counts, thread: Some(thread), _seats: seats };
        swarm.wait_live();
        swarm
    }

    /// What the clients have seen so far.
    #[track_caller]
    pub fn counts(&self) -> Counts {
        assert!(self.thread.as_ref().is_some_and(|thread| !thread.is_finished()), "the swarm failed; see above");
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Resets every connection at once and returns when none is left. The clients come back.
    #[track_caller]
    pub fn cut(&self) {
        let before = self.counts();
        self.order(Order::Cut);
        let all = before.given_up + self.clients as u64;
        eventually("every client is cut", || (self.counts().given_up >= all).then_some(()));
    }

    /// Sends whoever connects from now on to another node, as a balancer does.
    pub fn move_to(&self, address: SocketAddr) {
        self.order(Order::Move(address));
    }

    /// Lets the first `count` clients stop reading; 0 lets all read. It holds once the call returns.
    pub fn pause(&self, count: usize) {
        let (done, wait) = channel();
        self.order(Order::Pause(count, done));
        wait.recv().expect("the swarm's thread lives; see above");
    }

    /// Waits until every client is subscribed and knows its position.
    #[track_caller]
    pub fn wait_live(&self) {
        self.wait("every client is live", |counts| counts.live == self.clients);
    }

    /// Waits until every client has received this number.
    #[track_caller]
    pub fn wait_received(&self, number: u64) {
        self.wait(&format!("every client has received {number}"), |counts| counts.least >= number);
    }

    /// Waits until the counts are as said.
    #[track_caller]
    pub fn wait(&self, what: &str, done: impl Fn(&Counts) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let counts = self.counts();
            if done(&counts) {
                return;
            }
            assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}; {counts:?}");
            std::thread::sleep(TICK);
        }
    }

    fn order(&self, order: Order) {
        self.orders.send(order).expect("the swarm's thread lives; see above");
    }
}

impl Drop for Swarm {
    fn drop(&mut self) {
        // The thread ends when its orders do.
        self.orders = channel().0;
        let ended = self.thread.take().expect("taken only here").join();
        assert!(ended.is_ok() || std::thread::panicking(), "the swarm failed; see above");
    }
}

/// The part of [`SEATS`] that one swarm takes.
struct Seats(usize);

static TAKEN: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

impl Seats {
    fn take(count: usize) -> Self {
        assert!(count <= SEATS, "{count} clients are more than {SEATS}");
        let taken = TAKEN.0.lock().unwrap_or_else(PoisonError::into_inner);
        let free = |taken: &mut usize| *taken + count > SEATS;
        *TAKEN.1.wait_while(taken, free).unwrap_or_else(PoisonError::into_inner) += count;
        Self(count)
    }
}

impl Drop for Seats {
    fn drop(&mut self) {
        *TAKEN.0.lock().unwrap_or_else(PoisonError::into_inner) -= self.0;
        TAKEN.1.notify_all();
    }
}

/// A client and its connection.
struct Member {
    client: Client,
    /// None while it waits to come back.
    stream: Option<TcpStream>,
    /// What is not written yet.
    outgoing: Vec<u8>,
    /// When it comes back, or last heard something.
    since: Instant,
    connections: u64,
}

struct Worker {
    plan: Plan,
    members: Vec<Member>,
    paused: usize,
    poller: Poller,
    counts: Counts,
    random: u64,
    buffer: Vec<u8>,
}

impl Worker {
    fn new(plan: Plan) -> Self {
        let now = Instant::now();
        let step = plan.spread / u32::try_from(plan.clients).expect("few clients");
        let every = plan.clients.checked_div(plan.websockets).unwrap_or(usize::MAX);
        let member = |index: usize| {
            // Rounds of the channels, not every so many clients: a common factor would put all WebSockets on a few channels.
            let websocket = plan.websockets > 0 && (index / plan.channels.len()).is_multiple_of(every);
            let speaks = if websocket { Speaks::WebSocket } else { Speaks::Sse };
            let client = Client::new(speaks, plan.channels[index % plan.channels.len()].clone());
            Member { client, stream: None, outgoing: Vec::new(), since: now + step * index as u32, connections: 0 }
        };
        let members = (0..plan.clients).map(member).collect();
        let poller = Poller::new().expect("make an epoll set");
        Self {
            plan,
            members,
            paused: 0,
            poller,
            counts: Counts::default(),
            random: 0x9e37_79b9_7f4a_7c15,
            buffer: vec![0; 64 * 1024],
        }
    }

    fn run(mut self, orders: &Receiver<Order>, shared: &Mutex<Counts>) {
        let mut ready: Vec<Ready> = Vec::new();
        let mut next_look = Instant::now();
        loop {
            match orders.try_recv() {
                Ok(Order::Move(address)) => self.plan.address = address,
                Ok(Order::Cut) => (0..self.members.len()).for_each(|index| self.give_up(index)),
                Ok(Order::Pause(count, done)) => {
                    self.pause(count);
                    // Whoever waits for it may be gone: the test has failed.
                    let _ = done.send(());
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return,
            }
            self.poller.wait(&mut ready, TICK.as_millis() as u64 * MILLI).expect("wait for events");
            for event in ready.drain(..) {
                self.handle(event);
            }
            if Instant::now() >= next_look {
                self.look_at_all();
                *shared.lock().unwrap_or_else(PoisonError::into_inner) = self.counts.clone();
                next_look = Instant::now() + 2 * TICK;
            }
        }
    }

    /// Connects whoever's time has come, and sums up.
    fn look_at_all(&mut self) {
        let now = Instant::now();
        for index in 0..self.members.len() {
            let member = &self.members[index];
            let silent = self.plan.silence.is_some_and(|most| now > member.since + most);
            match member.stream {
                None if now >= member.since => self.connect(index),
                Some(_) if silent => self.give_up(index),
                _ => {}
            }
        }
        let counts = &mut self.counts;
        counts.verdicts = Verdicts::default();
        (counts.live, counts.least, counts.least_gaps) = (0, u64::MAX, u64::MAX);
        for Member { client, .. } in &self.members {
            let verdicts = client.sequence.verdicts();
            counts.verdicts.add(&verdicts);
            counts.live += usize::from(client.is_live());
            counts.least = counts.least.min(client.sequence.highest());
            counts.least_gaps = counts.least_gaps.min(verdicts.gaps);
        }
    }

    fn connect(&mut self, index: usize) {
        let socket = Socket::new(Domain::for_address(self.plan.address), Type::STREAM, None).expect("make a socket");
        socket.set_nonblocking(true).expect("set non-blocking");
        if index < self.plan.narrow {
            socket.set_recv_buffer_size(4096).expect("set the receive buffer");
        }
        match socket.connect(&self.plan.address.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
                return self.end(index, Some(format!("connect: {error}")));
            }
            _ => {}
        }
        let stream = TcpStream::from(socket);
        self.poller.add(&stream, index as u64, Watch::Write).expect("watch a connection");
        let member = &mut self.members[index];
        member.outgoing = member.client.connect();
        member.stream = Some(stream);
        member.since = Instant::now();
        self.counts.returns += u64::from(member.connections > 0);
        member.connections += 1;
    }

    fn handle(&mut self, event: Ready) {
        let index = event.token as usize;
        if !self.members[index].outgoing.is_empty() && event.writable && !self.write(index) {
            return;
        }
        if index >= self.paused {
            self.read(index);
        }
    }

    /// Writes what waits. False when the connection is over.
    fn write(&mut self, index: usize) -> bool {
        let member = &mut self.members[index];
        let Some(stream) = &mut member.stream else { return false };
        match stream.write(&member.outgoing) {
            Ok(count) => drop(member.outgoing.drain(..count)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => {
                let refused = (!member.client.is_live()).then(|| error.to_string());
                self.end(index, refused);
                return false;
            }
        }
        self.watch(index);
        true
    }

    fn watch(&self, index: usize) {
        let member = &self.members[index];
        let watch = match (member.outgoing.is_empty(), index < self.paused) {
            (true, false) => Watch::Read,
            (true, true) => Watch::End,
            (false, false) => Watch::ReadWrite,
            (false, true) => Watch::Write,
        };
        if let Some(stream) = &member.stream {
            self.poller.change(stream, index as u64, watch).expect("watch a connection");
        }
    }

    fn pause(&mut self, count: usize) {
        let changed = self.paused.max(count);
        self.paused = count;
        (0..changed).for_each(|index| self.watch(index));
    }

    fn read(&mut self, index: usize) {
        let member = &mut self.members[index];
        let Some(stream) = &mut member.stream else { return };
        let outcome = match stream.read(&mut self.buffer) {
            Ok(0) => Err(None),
            Ok(count) => {
                member.since = Instant::now();
                let had = member.outgoing.len();
                let received = member.client.receive(&self.buffer[..count], &mut member.outgoing);
                let more = member.outgoing.len() > had;
                received.map(|()| more).map_err(|refused| Some(format!("{refused:?}")))
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(false),
            Err(_) => Err(None),
        };
        match outcome {
            Ok(true) => drop(self.write(index)),
            Ok(false) => {}
            // It had what it wanted: the end is an end, whether a close frame came before it or not.
            Err(_) if self.members[index].client.is_live() => self.end(index, None),
            Err(refused) => self.end(index, Some(refused.unwrap_or_else(|| "ended before it was live".into()))),
        }
    }

    /// The connection ended from the other side; `refused` says why it was not opened.
    fn end(&mut self, index: usize, refused: Option<String>) {
        match refused {
            Some(why) => {
                *self.counts.refused.entry(why).or_default() += 1;
                self.leave(index, RETRY);
            }
            None => {
                self.counts.ended += 1;
                // What the node advised goes before the client's own habit, as with EventSource.
                match self.members[index].client.advice() {
                    Some(delay) => self.leave_for(index, delay),
                    None => self.leave(index, self.plan.spread),
                }
            }
        }
    }

    /// The client resets its connection.
    fn give_up(&mut self, index: usize) {
        self.counts.given_up += 1;
        if let Some(stream) = &self.members[index].stream {
            // A peer that was faster has ended it already.
            let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
        self.leave(index, self.plan.spread);
    }

    /// The client comes back after a random part of `spread`.
    fn leave(&mut self, index: usize, spread: Duration) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.leave_for(index, spread.mul_f64((self.random >> 11) as f64 / (1u64 << 53) as f64));
    }

    fn leave_for(&mut self, index: usize, delay: Duration) {
        let member = &mut self.members[index];
        member.stream = None;
        member.outgoing.clear();
        member.client.disconnected();
        member.since = Instant::now() + delay;
    }
}
