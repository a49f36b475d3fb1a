//! A TCP proxy that injects faults between a client and a server.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::SockRef;
use weir::client::bench::kernel::{MILLI, Poller, Ready, Watch};

/// What happens to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Everything passes.
    None,
    /// This many bytes from the server pass, counted from the connection's first; then both sides are closed, the
    /// client's in order so that it reads exactly those bytes.
    CutAfter(u64),
    /// Both sides are taken from and given nothing, not even an end: the connection is half-open.
    Swallow,
    /// Everything passes this much later.
    Delay(Duration),
    /// Both sides are reset now.
    Reset,
}

/// Chooses the fault of the connection with this number, from 0 in the order they came.
type Rule = Box<dyn FnMut(u64) -> Fault + Send>;

enum Order {
    Present(Fault),
    Coming(Rule),
    Target(SocketAddr),
}

/// Bytes that wait for one side at most; then the other is not read from.
const QUEUED: usize = 256 * 1024;
/// How often orders and delayed bytes are looked at.
const TICK: Duration = Duration::from_millis(2);
/// Token of the listener; connections have twice their key and one more for the server's side.
const LISTENER: u64 = u64::MAX;

/// A proxy on a port of its own; its connections end when it is dropped. What it is told holds once the call returns.
pub struct Proxy {
    address: SocketAddr,
    /// Each with a way to say that it took effect.
    orders: Option<Sender<(Order, Sender<()>)>>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Starts a proxy that passes everything to `target`.
    pub fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind the proxy's port");
        listener.set_nonblocking(true).expect("set non-blocking");
        let address = listener.local_addr().expect("a bound listener has an address");
        let (orders, inbox) = channel();
        let thread = std::thread::spawn(move || Server::new(listener, target).run(&inbox));
        Self { address, orders: Some(orders), thread: Some(thread) }
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A fault for the connections there are and those to come.
    pub fn set(&self, fault: Fault) {
        self.set_coming(move |_| fault);
        self.set_present(fault);
    }

    /// A fault for the connections there are.
    pub fn set_present(&self, fault: Fault) {
        self.order(Order::Present(fault));
    }

    /// Faults for the connections to come.
    pub fn set_coming(&self, rule: impl FnMut(u64) -> Fault + Send + 'static) {
        self.order(Order::Coming(Box::new(rule)));
    }

    /// Where the connections to come are passed to.
    pub fn set_target(&self, target: SocketAddr) {
        self.order(Order::Target(target));
    }

    fn order(&self, order: Order) {
        let orders = self.orders.as_ref().expect("taken only when dropped");
        let (done, wait) = channel();
        orders.send((order, done)).expect("the proxy's thread lives; see above");
        wait.recv().expect("the proxy's thread lives; see above");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.orders = None;
        let ended = self.thread.take().expect("taken only here").join();
        assert!(ended.is_ok() || std::thread::panicking(), "the proxy failed; see above");
    }
}

/// One side of a connection and what waits for it.
struct Side {
    /// None once it ended.
    stream: Option<TcpStream>,
    watch: Watch,
    outgoing: VecDeque<(Instant, Vec<u8>)>,
    queued: usize,
}

impl Side {
    fn new(stream: TcpStream, poller: &Poller, token: u64) -> Self {
        stream.set_nonblocking(true).expect("set non-blocking");
        stream.set_nodelay(true).expect("set TCP_NODELAY");
        poller.add(&stream, token, Watch::Read).expect("watch a connection");
        Self { stream: Some(stream), watch: Watch::Read, outgoing: VecDeque::new(), queued: 0 }
    }

    fn push(&mut self, due: Instant, bytes: &[u8]) {
        self.queued += bytes.len();
        self.outgoing.push_back((due, bytes.to_vec()));
    }

    /// Writes what is due. False when the peer is gone.
    fn flush(&mut self, now: Instant) -> bool {
        let Some(stream) = &mut self.stream else { return false };
        while let Some((due, bytes)) = self.outgoing.front_mut()
            && *due <= now
        {
            match stream.write(bytes) {
                Ok(count) => {
                    self.queued -= count;
                    bytes.drain(..count);
                    if bytes.is_empty() {
                        self.outgoing.pop_front();
                    }
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return true,
                Err(_) => return false,
            }
        }
        true
    }

    fn reset(&mut self) {
        if let Some(stream) = self.stream.take() {
            // A peer that was faster has reset it already.
            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        }
    }
}

/// A client's connection and the server's that belongs to it.
struct Pair {
    fault: Fault,
    /// The client's side, then the server's.
    sides: [Side; 2],
    /// Bytes taken from the server.
    from_server: u64,
    /// Closes when everything is written.
    ending: bool,
}

struct Server {
    listener: TcpListener,
    target: SocketAddr,
    rule: Rule,
    poller: Poller,
    pairs: slab::Slab<Pair>,
    accepted: u64,
    buffer: Vec<u8>,
}

impl Server {
    fn new(listener: TcpListener, target: SocketAddr) -> Self {
        let poller = Poller::new().expect("make an epoll set");
        poller.add(&listener, LISTENER, Watch::Read).expect("watch the listener");
        let rule = Box::new(|_| Fault::None);
        Self { listener, target, rule, poller, pairs: slab::Slab::new(), accepted: 0, buffer: vec![0; 64 * 1024] }
    }

    fn run(mut self, orders: &Receiver<(Order, Sender<()>)>) {
        let mut ready: Vec<Ready> = Vec::new();
        loop {
            loop {
                let (order, done) = match orders.try_recv() {
                    Ok(order) => order,
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                };
                match order {
                    // Who connected before the order is there, accepted or not.
                    Order::Present(fault) => {
                        self.accept();
                        self.pairs.iter_mut().for_each(|(_, pair)| pair.fault = fault);
                    }
                    Order::Coming(rule) => self.rule = rule,
                    Order::Target(target) => self.target = target,
                }
                // Whoever waits may have given up.
                let _ = done.send(());
            }
            self.poller.wait(&mut ready, TICK.as_millis() as u64 * MILLI).expect("wait for events");
            for event in ready.drain(..) {
                match event.token {
                    LISTENER => self.accept(),
                    token => self.read((token / 2) as usize, (token % 2) as usize),
                }
            }
            let now = Instant::now();
            let poller = &self.poller;
            self.pairs.retain(|key, pair| settle(poller, key, pair, now));
        }
    }

    fn accept(&mut self) {
        while let Ok((client, _)) = self.listener.accept() {
            let fault = (self.rule)(self.accepted);
            self.accepted += 1;
            // A server that is down: the client is closed at once.
            let Ok(server) = TcpStream::connect(self.target) else { continue };
            let entry = self.pairs.vacant_entry();
            let token = entry.key() as u64 * 2;
            let sides = [Side::new(client, &self.poller, token), Side::new(server, &self.poller, token + 1)];
            entry.insert(Pair { fault, sides, from_server: 0, ending: false });
        }
    }

    fn read(&mut self, key: usize, from: usize) {
        let Some(pair) = self.pairs.get_mut(key) else { return };
        let Some(stream) = &mut pair.sides[from].stream else { return };
        let count = match stream.read(&mut self.buffer) {
            Ok(count) => count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return,
            Err(_) => 0,
        };
        if count == 0 {
            pair.sides[from].stream = None;
            pair.ending |= pair.fault != Fault::Swallow;
            return;
        }
        let (mut due, mut passes) = (Instant::now(), count);
        match pair.fault {
            Fault::None | Fault::Reset => {}
            Fault::Delay(delay) => due += delay,
            Fault::Swallow => passes = 0,
            Fault::CutAfter(most) if from == 1 => {
                passes = usize::try_from(most.saturating_sub(pair.from_server)).map_or(count, |left| left.min(count));
                pair.ending |= pair.from_server + passes as u64 >= most;
            }
            Fault::CutAfter(_) => {}
        }
        pair.from_server += if from == 1 { passes as u64 } else { 0 };
        if passes > 0 {
            pair.sides[1 - from].push(due, &self.buffer[..passes]);
        }
    }
}

/// Writes what is due and decides what is read next. False when the pair is over.
fn settle(poller: &Poller, key: usize, pair: &mut Pair, now: Instant) -> bool {
    match pair.fault {
        Fault::Reset => {
            pair.sides.iter_mut().for_each(Side::reset);
            return false;
        }
        // What was taken before is lost with the rest.
        Fault::Swallow => pair.sides.iter_mut().for_each(|side| {
            side.outgoing.clear();
            side.queued = 0;
        }),
        Fault::CutAfter(0) => pair.ending = true,
        Fault::CutAfter(_) | Fault::Delay(_) | Fault::None => {}
    }
    let flushed = [pair.sides[0].flush(now), pair.sides[1].flush(now)];
    if pair.fault == Fault::Swallow {
        // One side that ended is not told to the other.
        return pair.sides.iter().any(|side| side.stream.is_some());
    }
    let client_has_all = !flushed[0] || pair.sides[0].queued == 0;
    let server_has_all = !flushed[1] || pair.sides[1].queued == 0;
    if (pair.ending && client_has_all && (server_has_all || matches!(pair.fault, Fault::CutAfter(_))))
        || flushed == [false, false]
    {
        return false;
    }
    for from in 0..2 {
        let reads = !pair.ending && pair.sides[1 - from].queued < QUEUED;
        let side = &mut pair.sides[from];
        let wants_to_write = side.outgoing.front().is_some_and(|(due, _)| *due <= now);
        let watch = match (reads, wants_to_write) {
            (true, false) => Watch::Read,
            (true, true) => Watch::ReadWrite,
            (false, true) => Watch::Write,
            (false, false) => Watch::End,
        };
        if let Some(stream) = &side.stream
            && watch != side.watch
        {
            side.watch = watch;
            poller.change(stream, key as u64 * 2 + from as u64, watch).expect("watch a connection");
        }
    }
    true
}

/// The proxy decides what a test injects, so it is tested itself.
#[cfg(test)]
mod tests {
    use super::*;

    /// A connection through a proxy, and the server's end of it.
    fn through(fault: Fault) -> (Proxy, TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy::start(listener.local_addr().unwrap());
        proxy.set(fault);
        let client = TcpStream::connect(proxy.address()).unwrap();
        let server = listener.accept().unwrap().0;
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        }
        (proxy, client, server)
    }

    #[test]
    fn everything_passes_both_ways_and_so_does_the_end() {
        let (_proxy, mut client, mut server) = through(Fault::None);
        let bulk = vec![b'x'; 3 * QUEUED];
        let mut received = vec![0; bulk.len()];
        std::thread::scope(|scope| {
            scope.spawn(|| server.write_all(&bulk).unwrap());
            client.read_exact(&mut received).unwrap();
        });
        assert_eq!(received, bulk);
        client.write_all(b"bye").unwrap();
        drop(client);
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"bye");
    }

    #[test]
    fn a_cut_connection_gives_exactly_its_bytes() {
        let (_proxy, mut client, mut server) = through(Fault::CutAfter(5));
        server.write_all(b"hello world").unwrap();
        let mut received = Vec::new();
        client.read_to_end(&mut received).unwrap();
        assert_eq!(received, b"hello");
    }

    #[test]
    fn a_half_open_connection_is_silent_and_open() {
        let (proxy, mut client, mut server) = through(Fault::None);
        server.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        proxy.set_present(Fault::Swallow);
        server.write_all(b"swallowed").unwrap();
        assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(client);
        assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        proxy.set_present(Fault::Reset);
        assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }

    #[test]
    fn delayed_bytes_come_later_and_the_next_connection_may_go_elsewhere() {
        let (proxy, mut client, mut server) = through(Fault::Delay(Duration::from_millis(50)));
        let began = Instant::now();
        server.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        assert!(began.elapsed() >= Duration::from_millis(50));
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        proxy.set_target(other.local_addr().unwrap());
        proxy.set(Fault::None);
        let _client = TcpStream::connect(proxy.address()).unwrap();
        other.accept().unwrap();
    }
}
