//! Many clients that read whatever arrives, in a process of their own: so their descriptors and their CPU time are not the
//! server's.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use weir::control::host;

use super::DEADLINE;

/// Clients in another process. It ends when this value is dropped.
pub struct Crowd {
    /// The order goes over it, and "done" comes back.
    line: UnixStream,
    /// Bytes the clients have read so far; shared with their process.
    received: &'static AtomicU64,
    process: libc::pid_t,
}

impl Crowd {
    /// Forks a process that will open `count` streams, each with `open`, once [`Crowd::open`] tells it where. Its readers
    /// run on `core`. Call it before the first thread.
    pub fn fork(count: usize, core: Option<usize>, open: impl Fn(SocketAddr) -> TcpStream) -> Self {
        let (line, theirs) = UnixStream::pair().expect("a socket pair");
        let received = shared_counter();
        // SAFETY: the process has one thread, so the child may do what it likes.
        let process = unsafe { libc::fork() };
        assert!(process >= 0, "fork: {}", std::io::Error::last_os_error());
        if process == 0 {
            // SAFETY: takes a number. An aborted benchmark must not leave its crowd behind.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            drop(line);
            if let Some(core) = core {
                host::pin_thread(core).expect("pin to an allowed core");
            }
            host::raise_descriptor_limit().expect("raise the descriptor limit");
            serve(theirs, received, count, open);
            std::process::exit(0);
        }
        Self { line, received, process }
    }

    /// Opens the streams and returns once all are established.
    pub fn open(&mut self, address: SocketAddr) {
        writeln!(self.line, "{address}").expect("the crowd is there");
        let mut done = [0];
        self.line.read_exact(&mut done).expect("the crowd has opened its streams");
    }

    /// Bytes read so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Acquire)
    }

    /// Waits until nothing arrives any more, and says how much has.
    pub fn settled(&self) -> u64 {
        let mut last = (self.received(), Instant::now());
        while last.1.elapsed() < Duration::from_millis(300) {
            std::thread::sleep(Duration::from_millis(5));
            let now = self.received();
            if now != last.0 {
                last = (now, Instant::now());
            }
        }
        last.0
    }

    /// Waits until exactly `bytes` have been read.
    pub fn wait_for(&self, bytes: u64) {
        let begun = Instant::now();
        while self.received() < bytes {
            assert!(begun.elapsed() < DEADLINE, "{} of {bytes} bytes arrived", self.received());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.received(), bytes, "no more than what was due");
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        let _ = self.line.shutdown(std::net::Shutdown::Both);
        // SAFETY: waits for a child of this process; no status is asked for.
        unsafe { libc::waitpid(self.process, std::ptr::null_mut(), 0) };
    }
}

/// A counter that a forked process shares. It is never unmapped.
fn shared_counter() -> &'static AtomicU64 {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new anonymous mapping, zeroed, of one page.
    unsafe {
        let memory = libc::mmap(std::ptr::null_mut(), size_of::<AtomicU64>(), protection, flags, -1, 0);
        assert_ne!(memory, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        &*memory.cast::<AtomicU64>()
    }
}

/// The process of the clients: opens them when told to, then reads until the line ends.
fn serve(mut line: UnixStream, received: &AtomicU64, count: usize, open: impl Fn(SocketAddr) -> TcpStream) {
    let mut order = String::new();
    let mut byte = [0];
    while !order.ends_with('\n') {
        match line.read(&mut byte) {
            Ok(1) => order.push(char::from(byte[0])),
            _ => return,
        }
    }
    let address = order.trim().parse().expect("an address");
    let clients: Vec<TcpStream> = (0..count).map(|_| open(address)).collect();

    // SAFETY: a new descriptor without another owner.
    let epoll = unsafe { OwnedFd::from_raw_fd(libc::epoll_create1(libc::EPOLL_CLOEXEC)) };
    watch(&epoll, line.as_raw_fd());
    for client in &clients {
        client.set_nonblocking(true).expect("set O_NONBLOCK");
        watch(&epoll, client.as_raw_fd());
    }
    line.write_all(b".").expect("the benchmark is there");

    let mut buffer = vec![0u8; 1 << 17];
    let mut events = vec![libc::epoll_event { events: 0, u64: 0 }; 1024];
    loop {
        // SAFETY: at most as many events as the vector is long.
        let ready = unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), events.len() as i32, -1) };
        let mut bytes = 0;
        for event in &events[..ready.max(0) as usize] {
            let descriptor = event.u64 as RawFd;
            if descriptor == line.as_raw_fd() {
                return;
            }
            // SAFETY: reads at most the buffer's length into it.
            let read = unsafe { libc::recv(descriptor, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            assert!(read > 0, "the server ended a stream");
            bytes += read as u64;
        }
        received.fetch_add(bytes, Ordering::Release);
    }
}

fn watch(epoll: &OwnedFd, descriptor: RawFd) {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: descriptor as u64 };
    // SAFETY: the event outlives the call.
    let added = unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, descriptor, &raw mut event) };
    assert_eq!(added, 0, "epoll_ctl: {}", std::io::Error::last_os_error());
}
