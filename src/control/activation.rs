//! Listening sockets that a service manager made and passes in (socket activation, sd_listen_fds(3)). They outlive this
//! process: whoever connects while no node runs waits in the socket's queue for the next one.

use std::ffi::OsString;
use std::io;
use std::net::TcpListener;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use socket2::{Domain, Protocol, SockRef, Type};

use crate::limits::ACTIVATION_LISTENERS;

/// The first descriptor that is passed in (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// The variables of the protocol. They speak of one process, so a child must not see them.
pub const VARIABLES: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// Why the sockets that were passed in cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ActivationError {
    /// A variable has a value that the protocol does not know.
    #[error("{name} is {value:?}; allowed: {allowed}")]
    Variable {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: OsString,
        /// What it may be.
        allowed: String,
    },
    /// One of the descriptors is something else.
    #[error(
        "descriptor {descriptor}, passed in as LISTEN_FDS says, {found}; allowed: a listening TCP socket \
         (in a .socket unit: ListenStream= with a port, and Accept=no)"
    )]
    Descriptor {
        /// Its number.
        descriptor: RawFd,
        /// What it is.
        found: String,
    },
}

/// Takes the listeners that were passed in to this process, in their order; none if none were. They can be taken once: later
/// calls give none.
///
/// # Errors
/// See [`ActivationError`]; the sockets are closed then.
pub fn listeners() -> Result<Vec<TcpListener>, ActivationError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let variable = |name| std::env::var_os(name);
    let count = passed(variable("LISTEN_PID"), variable("LISTEN_FDS"), std::process::id())?;
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    // All are owned before the first is judged, so that an error leaves none open.
    let owned: Vec<_> = (FIRST..FIRST + count as RawFd).map(|descriptor| (descriptor, own(descriptor))).collect();
    let judged = owned.into_iter().map(|(descriptor, socket)| {
        let listener = socket.map_err(|error| format!("is not open: {error}")).and_then(listener);
        listener.map_err(|found| ActivationError::Descriptor { descriptor, found })
    });
    // Collected first for the same reason.
    judged.collect::<Vec<_>>().into_iter().collect()
}

/// How many descriptors were passed in to the process with the id `own`. Variables that speak of another process were left
/// over in the environment, and mean nothing.
fn passed(pid: Option<OsString>, count: Option<OsString>, own: u32) -> Result<usize, ActivationError> {
    let (Some(pid), Some(count)) = (pid, count) else { return Ok(0) };
    let refused = |name, value: &OsString, allowed| ActivationError::Variable { name, value: value.clone(), allowed };
    let number = |value: &OsString| value.to_str().and_then(|text| text.parse::<usize>().ok());
    let of = number(&pid).ok_or_else(|| refused("LISTEN_PID", &pid, "the id of a process".into()))?;
    if of != own as usize {
        return Ok(0);
    }
    number(&count)
        .filter(|count| *count <= ACTIVATION_LISTENERS)
        .ok_or_else(|| refused("LISTEN_FDS", &count, format!("a number up to {ACTIVATION_LISTENERS}")))
}

/// Takes possession of a descriptor that was open when the program began, and keeps it from its children.
fn own(descriptor: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: sets a flag of a number that may be no descriptor; then the call fails.
    if unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and nobody else in this process owns it: it was passed in for this purpose, and is taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// The listener that a descriptor is, or what it is instead.
fn listener(descriptor: OwnedFd) -> Result<TcpListener, String> {
    let socket = SockRef::from(&descriptor);
    let kind = socket.r#type().map_err(|error| format!("is no socket: {error}"))?;
    let known = |error: io::Error| format!("cannot be asked what it is: {error}");
    let domain = socket.domain().map_err(known)?;
    let found = if domain == Domain::UNIX {
        "is a Unix socket"
    } else if ![Domain::IPV4, Domain::IPV6].contains(&domain) {
        "is not of IPv4 or IPv6"
    } else if kind != Type::STREAM || socket.protocol().map_err(known)? != Some(Protocol::TCP) {
        "is not of TCP"
    } else if !socket.is_listener().map_err(known)? {
        "does not listen"
    } else {
        return Ok(descriptor.into());
    };
    Err(found.into())
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn asked(pid: &str, count: &str) -> Result<usize, String> {
        passed(Some(pid.into()), Some(count.into()), 77).map_err(|error| error.to_string())
    }

    #[test]
    fn only_the_process_that_is_meant_takes_them() {
        assert_eq!(asked("77", "2"), Ok(2));
        assert_eq!(asked("77", "0"), Ok(0));
        assert_eq!(asked("78", "2"), Ok(0), "an ancestor's");
        assert_eq!(asked("78", "nonsense"), Ok(0));
        assert_eq!(passed(None, Some("2".into()), 77), Ok(0));
        assert_eq!(passed(Some("77".into()), None, 77), Ok(0));
    }

    #[test]
    fn variables_that_mean_nothing_are_named() {
        for (pid, count, named) in [
            ("x", "1", "LISTEN_PID is \"x\""),
            ("77", "", "LISTEN_FDS is \"\""),
            ("77", "-1", "LISTEN_FDS is \"-1\""),
            ("77", "100000", "LISTEN_FDS is \"100000\"; allowed: a number up to"),
        ] {
            let error = asked(pid, count).expect_err("it is refused");
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_listening_tcp_socket_is_taken_as_it_is() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(socket) = TcpListener::bind(address) else { continue };
            let bound = socket.local_addr().expect("it is bound");
            let taken = listener(socket.into()).expect("it listens");
            assert_eq!(taken.local_addr().expect("still bound"), bound);
        }
    }

    #[test]
    fn everything_else_is_refused_by_name() {
        let stream = socket2::Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        let udp = UdpSocket::bind("127.0.0.1:0").expect("loopback has free ports");
        let directory = std::env::temp_dir().join(format!("weir-activation-{}", std::process::id()));
        let unix = UnixListener::bind(&directory).expect("a free path");
        let (pipe, _writer) = io::pipe().expect("a pipe");
        let descriptors = [stream.as_fd(), udp.as_fd(), unix.as_fd(), pipe.as_fd()];
        let said = ["does not listen", "is not of TCP", "is a Unix socket", "is no socket"];
        for (descriptor, said) in descriptors.into_iter().zip(said) {
            let found = listener(descriptor.try_clone_to_owned().expect("room")).expect_err("it is refused");
            assert!(found.starts_with(said), "{found}");
        }
        std::fs::remove_file(directory).expect("it was made above");
    }

    #[test]
    fn a_number_that_is_no_descriptor_is_refused() {
        assert_eq!(own(1_000_000).expect_err("not open").raw_os_error(), Some(libc::EBADF));
    }
}
