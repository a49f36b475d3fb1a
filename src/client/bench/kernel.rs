//! What the load generator asks of the kernel: readiness, the monotonic clock, CPU time, memory and descriptor limits.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Nanoseconds of `CLOCK_MONOTONIC`, which every process of one machine shares.
pub type Nanos = u64;

/// Nanoseconds in a second.
pub const SECOND: Nanos = 1_000_000_000;
/// Nanoseconds in a millisecond.
pub const MILLI: Nanos = 1_000_000;

/// Reads `CLOCK_MONOTONIC`.
#[must_use]
pub fn now() -> Nanos {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec into a live local. The call cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as Nanos * SECOND + time.tv_nsec as Nanos
}

/// CPU seconds, user and system together, this thread has used.
#[must_use]
pub fn thread_cpu_seconds() -> f64 {
    // SAFETY: an all-zero rusage is a valid value of that plain struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: writes one rusage into a live local. The call cannot fail for RUSAGE_THREAD.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Lets this thread's timed waits end on time: the kernel's default slack is 50 µs.
pub fn sharpen_timers() {
    // SAFETY: PR_SET_TIMERSLACK takes a number; it affects this thread alone.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong) };
}

/// Raises the soft limit of open descriptors to the hard one and returns it.
#[must_use]
pub fn raise_descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes one rlimit into a live local.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return 0;
    }
    let raised = libc::rlimit { rlim_cur: limit.rlim_max, rlim_max: limit.rlim_max };
    // SAFETY: reads one rlimit from a live local. When it is refused the soft limit still holds.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } == 0 {
        limit.rlim_max
    } else {
        limit.rlim_cur
    }
}

/// What another process has used so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProcessSample {
    /// CPU seconds, user and system together, of all its threads; the kernel counts in ticks of 10 ms.
    pub cpu_seconds: f64,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
}

/// Samples a process: fields 14 and 15 of `proc_pid_stat(5)`, and `Rss` of `/proc/PID/smaps_rollup`, which unlike the
/// counters of `stat` is exact.
///
/// # Errors
/// When there is no such process or its memory map may not be read.
pub fn sample_process(pid: u32) -> io::Result<ProcessSample> {
    let unreadable = |what| io::Error::new(io::ErrorKind::InvalidData, format!("no {what} in /proc/{pid}"));
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field, the command name, may hold spaces and parentheses: count from its end.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let mut times = fields.split_ascii_whitespace().skip(11).map_while(|field| field.parse::<u64>().ok());
    let (Some(user), Some(system)) = (times.next(), times.next()) else { return Err(unreadable("CPU times")) };
    let map = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let resident =
        map.lines().find_map(|line| line.strip_prefix("Rss:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    // SAFETY: sysconf takes a number and returns one.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(ProcessSample {
        cpu_seconds: (user + system) as f64 / ticks.max(1) as f64,
        resident_bytes: resident.ok_or_else(|| unreadable("resident memory"))? * 1024,
    })
}

/// Lets a socket that is bound to a source address choose its port at `connect`, when the whole four-tuple is known:
/// else the ports of one source address are used up by all destinations together.
///
/// # Errors
/// What `setsockopt(2)` says.
pub fn choose_port_at_connect(socket: &impl AsRawFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: reads one c_int from a live local, of the length given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What a descriptor is watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Watch {
    /// Readable, or ended.
    Read,
    /// Writable, or ended.
    Write,
    /// Either.
    ReadWrite,
    /// Only that the peer is gone: nothing is read.
    End,
}

impl Watch {
    fn bits(self) -> u32 {
        let bits = match self {
            Watch::Read => libc::EPOLLIN,
            Watch::Write => libc::EPOLLOUT,
            Watch::ReadWrite => libc::EPOLLIN | libc::EPOLLOUT,
            Watch::End => 0,
        };
        (bits | libc::EPOLLRDHUP) as u32
    }
}

/// One descriptor that is ready.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    /// The number it was added under.
    pub token: u64,
    /// Writable, or failed.
    pub writable: bool,
    /// The peer sent its last byte, or the socket failed.
    pub ended: bool,
}

/// A level-triggered epoll set.
#[derive(Debug)]
pub struct Poller {
    fd: OwnedFd,
    events: Vec<libc::epoll_event>,
}

/// Ready descriptors taken in one system call.
const BATCH: usize = 512;

impl Poller {
    /// Makes an empty set.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and has no other owner.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, events: Vec::with_capacity(BATCH) })
    }

    /// Watches a descriptor; closing it ends that.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` says.
    pub fn add(&self, source: &impl AsRawFd, token: u64, watch: Watch) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, source, token, watch)
    }

    /// Changes what a descriptor is watched for.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` says.
    pub fn change(&self, source: &impl AsRawFd, token: u64, watch: Watch) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, source, token, watch)
    }

    fn control(&self, operation: libc::c_int, source: &impl AsRawFd, token: u64, watch: Watch) -> io::Result<()> {
        let mut event = libc::epoll_event { events: watch.bits(), u64: token };
        // SAFETY: reads one epoll_event from a live local; both descriptors are open while their owners are borrowed.
        let result = unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), operation, source.as_raw_fd(), &raw mut event) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Waits until something is ready, or `timeout` has passed, and appends what is ready to `ready`, at most 512 at a
    /// time.
    ///
    /// # Errors
    /// What `epoll_pwait2(2)` says; an interrupting signal is no error.
    pub fn wait(&mut self, ready: &mut Vec<Ready>, timeout: Nanos) -> io::Result<()> {
        let time = libc::timespec { tv_sec: (timeout / SECOND) as _, tv_nsec: (timeout % SECOND) as _ };
        // SAFETY: the kernel writes at most BATCH events into the vector's capacity of BATCH, and reads one timespec;
        // no signal mask is given.
        let count = unsafe {
            libc::syscall(
                libc::SYS_epoll_pwait2,
                self.fd.as_raw_fd(),
                self.events.as_mut_ptr(),
                BATCH as libc::c_int,
                &raw const time,
                std::ptr::null::<libc::sigset_t>(),
                0usize,
            )
        };
        if count < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
        }
        // SAFETY: the kernel just wrote the first `count` events.
        unsafe { self.events.set_len(count as usize) };
        ready.extend(self.events.drain(..).map(|event| Ready {
            token: event.u64,
            writable: event.events & (libc::EPOLLOUT | libc::EPOLLERR | libc::EPOLLHUP) as u32 != 0,
            ended: event.events & (libc::EPOLLRDHUP | libc::EPOLLERR | libc::EPOLLHUP) as u32 != 0,
        }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn this_process_can_be_sampled() {
        let sample = sample_process(std::process::id()).unwrap();
        assert!(sample.resident_bytes > 100_000, "{sample:?}");
        assert!(sample_process(u32::MAX).is_err());
    }

    #[test]
    fn a_pipe_becomes_readable_and_then_ends() {
        let mut poller = Poller::new().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        poller.add(&reader, 7, Watch::Read).unwrap();
        let mut ready = Vec::new();
        poller.wait(&mut ready, MILLI).unwrap();
        assert!(ready.is_empty());
        writer.write_all(b"x").unwrap();
        poller.wait(&mut ready, SECOND).unwrap();
        assert_eq!((ready.len(), ready[0].token, ready[0].ended), (1, 7, false));
        drop(writer);
        ready.clear();
        poller.wait(&mut ready, SECOND).unwrap();
        assert!(ready[0].ended);
    }
}
