//! The shards' listening sockets.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::NodeError;
use crate::limits::{ACCEPT_BACKLOG, LISTEN_PAUSE_MILLIS, LISTEN_RETRY_MILLIS};

/// Binds one listener a shard to the same address (`SO_REUSEPORT`: the kernel spreads connections over them) and says which
/// address that is, with the real port when 0 was asked for.
///
/// # Errors
/// [`NodeError::Listen`], also when another process listens there: with `SO_REUSEPORT` alone the kernel would let both and
/// give each some of the clients.
pub(super) fn bind(address: SocketAddr, shards: usize) -> Result<(SocketAddr, Vec<TcpListener>), NodeError> {
    let refused = |source: io::Error| NodeError::Listen { address, hint: hint(&source), source };
    if address.port() != 0 {
        claim(address).map_err(refused)?;
    }
    let first = listener(address).map_err(refused)?;
    let bound = first.local_addr().map_err(refused)?;
    let mut listeners = vec![first];
    for _ in 1..shards {
        listeners.push(listener(bound).map_err(refused)?);
    }
    Ok((bound, listeners))
}

/// Spreads the listeners of a process that hands over on shards. All of them must be accepted on, since each has a queue of
/// connections of its own: a shard may get several. More shards than listeners share them.
///
/// # Errors
/// [`NodeError::Listen`] when one of them is no listener.
pub(super) fn inherit(
    inherited: &mut Vec<TcpListener>,
    wanted: SocketAddr,
    shards: usize,
) -> Result<Opened, NodeError> {
    let refused = |source: io::Error| NodeError::Listen { address: wanted, hint: "; it was inherited", source };
    let address = match inherited.first() {
        Some(first) => first.local_addr().map_err(refused)?,
        None => return Err(refused(io::Error::other("there is none"))),
    };
    let same = wanted.port() == 0 || wanted == address;
    if !same {
        tracing::warn!(%address, configured = %wanted, "the listeners of the process before are kept; a restart changes them");
    }
    for listener in inherited.iter() {
        if !SockRef::from(listener).is_listener().map_err(refused)? {
            return Err(refused(io::Error::other("it does not listen")));
        }
    }
    Ok((address, spread(inherited.drain(..), shards).map_err(refused)?))
}

/// Opens the shards' listeners: those that a service manager passed in, or else new ones. The address is then the first one's:
/// who made the sockets has decided it, and `wanted` is not used.
///
/// # Errors
/// [`NodeError::Listen`], see [`bind`].
pub(super) fn open(passed_in: Vec<TcpListener>, wanted: SocketAddr, shards: usize) -> Result<Opened, NodeError> {
    let Some(first) = passed_in.first() else {
        let (address, listeners) = bind(wanted, shards)?;
        return Ok((address, listeners.into_iter().map(|listener| vec![listener]).collect()));
    };
    let refused = |source: io::Error| NodeError::Listen { address: wanted, hint: "; it was passed in", source };
    let address = first.local_addr().map_err(refused)?;
    tracing::info!(%address, sockets = passed_in.len(), configured = %wanted, "the service manager's sockets are used");
    Ok((address, spread(passed_in.into_iter(), shards).map_err(refused)?))
}

/// The address of the first listener, and every shard's listeners.
type Opened = (SocketAddr, Vec<Vec<TcpListener>>);

/// Gives every listener to a shard, because each has a queue of its own that somebody must empty, and every shard a listener
/// of each address, because a shard that is left out has nothing to do. So a shard may get several of one address, and
/// several shards may share one: the kernel wakes one of those that wait (`EPOLLEXCLUSIVE` within a ring), and who comes too
/// late finds nothing and waits on.
fn spread(listeners: impl Iterator<Item = TcpListener>, shards: usize) -> io::Result<Vec<Vec<TcpListener>>> {
    let mut addresses: BTreeMap<SocketAddr, Vec<TcpListener>> = BTreeMap::new();
    for listener in listeners {
        addresses.entry(listener.local_addr()?).or_default().push(listener);
    }
    let mut spread: Vec<Vec<TcpListener>> = (0..shards).map(|_| Vec::new()).collect();
    for alike in addresses.into_values() {
        let count = alike.len();
        for (index, listener) in alike.into_iter().enumerate() {
            for shard in (index..shards).step_by(count).skip(1) {
                spread[shard].push(listener.try_clone()?);
            }
            spread[index % shards].push(listener);
        }
    }
    Ok(spread)
}

/// Duplicates of listeners, each once although shards may share it.
///
/// # Errors
/// When the process is out of descriptors.
pub(super) fn duplicate(listeners: &[Vec<TcpListener>]) -> io::Result<Vec<OwnedFd>> {
    let mut seen = HashSet::new();
    let mut duplicates = Vec::new();
    for listener in listeners.iter().flatten() {
        // SO_COOKIE names a socket however many descriptors it has.
        if seen.insert(SockRef::from(listener).cookie()?) {
            duplicates.push(listener.try_clone()?.into());
        }
    }
    Ok(duplicates)
}

/// Fails when another process listens there, but not for the rest of a killed one: the kernel takes a ring apart in the
/// background, so the listeners of a node that was killed outlive its process for a moment.
fn claim(address: SocketAddr) -> io::Result<()> {
    let deadline = Instant::now() + Duration::from_millis(LISTEN_RETRY_MILLIS);
    loop {
        match socket(address, false) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(LISTEN_PAUSE_MILLIS));
            }
            other => return other.map(drop),
        }
    }
}

fn listener(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket(address, true)?;
    socket.listen(ACCEPT_BACKLOG)?;
    Ok(socket.into())
}

fn socket(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        // [::] means every address, whatever the sysctl net.ipv6.bindv6only says.
        socket.set_only_v6(false)?;
    }
    // Without this a restart would have to wait for the old connections' TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "; another process listens there",
        io::ErrorKind::AddrNotAvailable => "; no interface of this machine has that address",
        io::ErrorKind::PermissionDenied => "; ports below 1024 need CAP_NET_BIND_SERVICE",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

    #[test]
    fn shards_share_one_port() {
        let (address, listeners) = bind(ANY_PORT, 3).expect("loopback has free ports");
        assert_ne!(address.port(), 0);
        assert!(listeners.len() == 3 && listeners.iter().all(|one| one.local_addr().is_ok_and(|it| it == address)));
        for listener in &listeners {
            listener.set_nonblocking(true).expect("a socket option");
        }
        let clients: Vec<_> = (0..30).map(|_| TcpStream::connect(address).expect("somebody listens")).collect();
        let accepted: usize = listeners.iter().map(|one| std::iter::from_fn(|| one.accept().ok()).count()).sum();
        assert_eq!(accepted, clients.len());
    }

    #[test]
    fn every_inherited_listener_has_a_shard_and_every_shard_a_listener() {
        for (before, after) in [(1, 1), (3, 3), (3, 2), (5, 2), (1, 3), (2, 5)] {
            let (address, listeners) = bind(ANY_PORT, before).expect("loopback has free ports");
            let mut inherited = listeners;
            let (same, spread) = inherit(&mut inherited, ANY_PORT, after).expect("they listen");
            assert_eq!((same, spread.len()), (address, after));
            assert!(spread.iter().all(|shard| !shard.is_empty()), "{before} to {after}: {spread:?}");
            assert_eq!(duplicate(&spread).expect("room").len(), before, "each is given on once");
        }
    }

    #[test]
    fn every_shard_listens_on_every_address_that_was_passed_in() {
        let make = || TcpListener::bind(ANY_PORT).expect("loopback has free ports");
        for shards in 1..5 {
            let passed_in = vec![make(), make()];
            let wanted: Vec<_> = passed_in.iter().map(|one| one.local_addr().expect("bound")).collect();
            let (address, spread) = open(passed_in, "127.0.0.1:1".parse().expect("an address"), shards).expect("room");
            assert_eq!((address, spread.len()), (wanted[0], shards));
            for shard in spread {
                let has = |address| shard.iter().any(|one| one.local_addr().is_ok_and(|it| it == address));
                assert!(wanted.iter().all(|address| has(*address)), "{shards} shards: {shard:?}");
            }
        }
    }

    #[test]
    fn what_does_not_listen_is_not_inherited() {
        let socket = socket(ANY_PORT, true).expect("a socket");
        let error = inherit(&mut vec![socket.into()], ANY_PORT, 1).expect_err("it does not listen").to_string();
        assert!(error.contains("does not listen"), "{error}");
        assert!(inherit(&mut Vec::new(), ANY_PORT, 1).is_err());
    }

    #[test]
    fn a_second_node_on_the_same_port_is_refused() {
        let (address, _listeners) = bind(ANY_PORT, 2).expect("loopback has free ports");
        let error = bind(address, 2).expect_err("it is taken").to_string();
        assert!(
            error.starts_with(&format!("cannot listen on {address}: ")) && error.contains("another process"),
            "{error}"
        );
    }

    #[test]
    fn a_port_is_free_again_at_once() {
        let (address, listeners) = bind(ANY_PORT, 1).expect("loopback has free ports");
        let client = TcpStream::connect(address).expect("somebody listens");
        let (served, _) = listeners[0].accept().expect("a client is there");
        drop((served, listeners));
        drop(client);
        bind(address, 1).expect("TIME_WAIT does not matter");
    }
}
