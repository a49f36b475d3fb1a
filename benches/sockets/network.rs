//! A loopback of the benchmark's own, so that the machine's settings and other traffic do not change the numbers.

use std::io;

/// Which network the sockets are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// A network namespace of this process: no packet steering, no other traffic.
    Private,
    /// The machine's: the process may not make its own.
    Machine,
}

impl Network {
    /// Moves this process, and the threads and processes it will start, into a network namespace of its own if it may.
    /// Call it before the first thread.
    pub fn enter() -> Self {
        // SAFETY: takes flags alone. Without privileges a new user namespace brings the right to make a network.
        let entered = unsafe {
            libc::unshare(libc::CLONE_NEWNET) == 0 || libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET) == 0
        };
        if !entered {
            return Self::Machine;
        }
        raise_loopback().expect("a new network's loopback goes up");
        // Reno paces nothing, so a send does all of its work in the thread that sends. It is built into every kernel.
        let _ = std::fs::write(CONGESTION_CONTROL, "reno");
        Self::Private
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let which = match self {
            Self::Private => "a private network namespace",
            Self::Machine => "the machine's loopback",
        };
        let control = std::fs::read_to_string(CONGESTION_CONTROL).unwrap_or_else(|_| "unknown".into());
        write!(f, "{which}, congestion control {}", control.trim())
    }
}

const CONGESTION_CONTROL: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

fn raise_loopback() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: an all-zero ifreq is a valid value of that plain struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: reads one live ifreq; the descriptor is a socket's.
    if unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), libc::SIOCSIFFLAGS, &raw const request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
