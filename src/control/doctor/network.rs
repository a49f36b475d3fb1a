//! Judges of the network: the address, ports, the accept queue and connection tracking.

use std::io;
use std::net::SocketAddr;

use super::facts::Host;
use super::host::Need;
use super::{Check, Finding};
use crate::limits::ACCEPT_BACKLOG;

pub fn port(host: &Host, listen: SocketAddr) -> Finding {
    let check = Check("listen", "a node that cannot listen does not start");
    match host.listen {
        Ok(()) => check.ok(format!("{listen} is free")),
        Err(io::ErrorKind::AddrInUse) => check.fail(
            format!("{listen} is in use"),
            format!("stop what listens there (ss -ltnp sport = :{}), or set listen to another port", listen.port()),
        ),
        Err(io::ErrorKind::PermissionDenied) => check.fail(
            format!("{listen} is not permitted"),
            "AmbientCapabilities=CAP_NET_BIND_SERVICE in the unit, sysctl -w net.ipv4.ip_unprivileged_port_start, or a port from 1024 on",
        ),
        Err(io::ErrorKind::AddrNotAvailable) => check.fail(
            format!("{} is no address of this host", listen.ip()),
            "set listen to one of those that `ip address` shows, or to 0.0.0.0 or [::]",
        ),
        Err(other) => check.fail(format!("{listen}: {other}"), "set listen to an address of this host and a free port"),
    }
}

pub fn port_range(host: &Host, listen: SocketAddr) -> Finding {
    let check = Check("port-range", "an outgoing connection may hold the port when the node starts");
    let port = listen.port();
    let within = |(first, last): (u16, u16)| (first..=last).contains(&port);
    match host.local_ports {
        Some((first, last)) if within((first, last)) && !host.reserved_ports.iter().copied().any(within) => check.warn(
            format!("{port} is among the ports of outgoing connections ({first}-{last})"),
            format!("sysctl -w net.ipv4.ip_local_reserved_ports={port}, or listen below {first}"),
        ),
        Some((first, last)) => check.ok(format!("outgoing connections take {first}-{last}")),
        None => check.ok("not told"),
    }
}

pub fn backlog(host: &Host) -> Finding {
    let check =
        Check("accept-queue", "connections past the queue are dropped, and their clients try again a second later");
    match host.backlog {
        Some(backlog) if backlog < ACCEPT_BACKLOG.unsigned_abs().into() => check.warn(
            format!("net.core.somaxconn = {backlog} cuts the queue of {ACCEPT_BACKLOG} for each shard"),
            format!("sysctl -w net.core.somaxconn={ACCEPT_BACKLOG}"),
        ),
        Some(backlog) => check.ok(format!("net.core.somaxconn = {backlog}")),
        None => check.ok("not told"),
    }
}

pub fn tracking(host: &Host, need: &Need) -> Finding {
    let check = Check("conntrack", "new connections are dropped when the firewall's table is full");
    match host.tracked {
        Some(most) if most < need.connections => check.warn(
            format!("net.netfilter.nf_conntrack_max = {most} for {} connections", need.connections),
            format!("sysctl -w net.netfilter.nf_conntrack_max={}, or exempt the port (notrack)", need.connections * 2),
        ),
        Some(most) => check.ok(format!("net.netfilter.nf_conntrack_max = {most}")),
        None => check.ok("nothing is tracked"),
    }
}
