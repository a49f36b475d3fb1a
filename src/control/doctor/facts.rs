//! What `weir doctor` knows about the host: plain data for the judges, and where it is read.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};

use crate::control::host::{allowed_cores, probe_uring, raise_descriptor_limit};

/// Facts about the host. None means that the kernel does not say, which no judge takes for bad news.
#[derive(Debug, Clone)]
pub struct Host {
    /// Major and minor number of the kernel's version.
    pub kernel: Option<(u32, u32)>,
    /// Whether io_uring has all that the engine needs, or why not.
    pub uring: Result<(), String>,
    /// The sysctl `kernel.io_uring_disabled` (Linux 6.6): 0 allows, 1 only to a group, 2 forbids.
    pub uring_disabled: Option<u64>,
    /// Whether a seccomp filter is in force (`/proc/self/status`).
    pub seccomp: bool,
    /// Descriptors a process may open at most (`RLIMIT_NOFILE`, the hard limit).
    pub descriptors: u64,
    /// Bytes that this process's user may lock (`RLIMIT_MEMLOCK`), which rings are charged to (io_uring_setup(2)). None when
    /// nothing bounds it: no limit, or CAP_IPC_LOCK.
    pub lockable: Option<u64>,
    /// Cores this process may run on.
    pub cores: Vec<usize>,
    /// Threads the system lets run at once, which a quota makes fewer than the cores.
    pub parallelism: usize,
    /// Cores' worth of time a control group allows (`cpu.max`), the least of all it is inside of.
    pub quota: Option<f64>,
    /// The kernel's clock source.
    pub clock_source: Option<String>,
    /// Whether something keeps the clock right (`adjtimex(2)`).
    pub clock_synchronised: Option<bool>,
    /// Bytes a new process may use without swapping (`MemAvailable`).
    pub memory: Option<u64>,
    /// Bytes left below the control groups' `memory.max`, the least of all it is inside of.
    pub memory_group: Option<u64>,
    /// Bytes of swap.
    pub swap: Option<u64>,
    /// The sysctl `vm.swappiness`.
    pub swappiness: Option<u64>,
    /// The sysctl `vm.overcommit_memory`.
    pub overcommit: Option<u64>,
    /// The mode of transparent huge pages.
    pub huge_pages: Option<String>,
    /// Bytes all TCP buffers may have (the third number of `net.ipv4.tcp_mem`).
    pub tcp_memory: Option<u64>,
    /// The sysctl `net.core.somaxconn`.
    pub backlog: Option<u64>,
    /// Ports that outgoing connections take (`net.ipv4.ip_local_port_range`).
    pub local_ports: Option<(u16, u16)>,
    /// Those of them that are left out, as ranges (`net.ipv4.ip_local_reserved_ports`).
    pub reserved_ports: Vec<(u16, u16)>,
    /// Connections the firewall can track (`net.netfilter.nf_conntrack_max`); none when it tracks nothing.
    pub tracked: Option<u64>,
    /// Whether the configured address can be listened on, or why not.
    pub listen: Result<(), io::ErrorKind>,
}

impl Host {
    /// Asks the kernel. Raises this process's soft descriptor limit, as a node does when it starts.
    #[must_use]
    pub fn collect(listen: SocketAddr) -> Self {
        let pressure = meminfo();
        let field = |name| pressure.as_deref().and_then(|text| kilobytes(text, name));
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self {
            kernel: text("/proc/sys/kernel/osrelease").and_then(|release| version(&release)),
            uring: probe_uring().map_err(|error| error.to_string()),
            uring_disabled: number("/proc/sys/kernel/io_uring_disabled"),
            seccomp: status.lines().any(|line| line.starts_with("Seccomp:") && !line.ends_with('0')),
            descriptors: raise_descriptor_limit().map_or(0, |limit| limit.soft),
            lockable: if may_lock(&status) { None } else { lock_limit() },
            cores: allowed_cores(),
            parallelism: std::thread::available_parallelism().map_or(1, usize::from),
            quota: groups().iter().filter_map(|group| quota(&text(&format!("{group}/cpu.max"))?)).reduce(f64::min),
            clock_source: text("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            clock_synchronised: clock_synchronised(),
            memory: field("MemAvailable:"),
            memory_group: groups().iter().filter_map(|group| group_memory(group)).min(),
            swap: field("SwapTotal:"),
            swappiness: number("/proc/sys/vm/swappiness"),
            overcommit: number("/proc/sys/vm/overcommit_memory"),
            huge_pages: text("/sys/kernel/mm/transparent_hugepage/enabled").and_then(|modes| chosen(&modes)),
            tcp_memory: text("/proc/sys/net/ipv4/tcp_mem")
                .and_then(|pages| pages.split_whitespace().nth(2)?.parse::<u64>().ok())
                .map(|pages| pages.saturating_mul(page_bytes())),
            backlog: number("/proc/sys/net/core/somaxconn"),
            local_ports: text("/proc/sys/net/ipv4/ip_local_port_range").and_then(|range| {
                let mut ends = range.split_whitespace().map(str::parse);
                Some((ends.next()?.ok()?, ends.next()?.ok()?))
            }),
            reserved_ports: text("/proc/sys/net/ipv4/ip_local_reserved_ports").map_or(Vec::new(), |list| ranges(&list)),
            tracked: number("/proc/sys/net/netfilter/nf_conntrack_max"),
            // Without SO_REUSEPORT, which would join a node that already listens there.
            listen: TcpListener::bind(listen).map(drop).map_err(|error| error.kind()),
        }
    }
}

fn text(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn number(path: &str) -> Option<u64> {
    text(path)?.parse().ok()
}

fn meminfo() -> Option<String> {
    text("/proc/meminfo")
}

/// A field of `/proc/meminfo`, in bytes. The file's unit is 1,024 bytes and is written `kB`.
fn kilobytes(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1_024)
}

/// Major and minor number of `6.18.0-something`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-', '+']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// The word in brackets of `always [madvise] never`.
fn chosen(modes: &str) -> Option<String> {
    Some(modes.split_once('[')?.1.split_once(']')?.0.to_owned())
}

/// Whether the effective capabilities of a `/proc/self/status` have CAP_IPC_LOCK (capabilities(7)), which no limit binds.
fn may_lock(status: &str) -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set >> CAP_IPC_LOCK & 1 == 1)
}

/// The soft limit of locked memory, in bytes; none when there is no limit or the kernel does not say.
fn lock_limit() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes one rlimit into a live local.
    let answered = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } == 0;
    (answered && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// Port ranges such as `8080,9148-9150`.
fn ranges(list: &str) -> Vec<(u16, u16)> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
    };
    list.split(',').filter_map(range).collect()
}

/// Cores' worth of a `cpu.max` (control groups, version 2): microseconds and a period, or `max`.
fn quota(limit: &str) -> Option<f64> {
    let (micros, period) = limit.split_once(' ')?;
    let (micros, period): (f64, f64) = (micros.parse().ok()?, period.parse().ok()?);
    (period > 0.0).then_some(micros / period)
}

fn group_memory(group: &str) -> Option<u64> {
    let most: u64 = number(&format!("{group}/memory.max"))?;
    Some(most.saturating_sub(number(&format!("{group}/memory.current")).unwrap_or(0)))
}

/// Directories of the control groups (version 2) that this process is inside of, itself first.
fn groups() -> Vec<String> {
    let file = text("/proc/self/cgroup").unwrap_or_default();
    let path = file.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    std::path::Path::new(path)
        .ancestors()
        .map(|group| format!("/sys/fs/cgroup{}", group.display()).trim_end_matches('/').to_owned())
        .collect()
}

/// Whether the kernel thinks that its clock is disciplined; reading it needs no privilege. None when it is not to be asked.
fn clock_synchronised() -> Option<bool> {
    // SAFETY: an all-zero timex is a valid one, and modes 0 asks without changing anything.
    let mut clock: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: writes one timex into a live local.
    let state = unsafe { libc::adjtimex(&raw mut clock) };
    (state >= 0).then_some(state != libc::TIME_ERROR && clock.status & libc::STA_UNSYNC == 0)
}

fn page_bytes() -> u64 {
    // SAFETY: reads a constant of the system.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4_096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_texts_are_read() {
        assert_eq!(version("6.18.0-rc1-cloud"), Some((6, 18)));
        assert_eq!(version("6.1-x"), Some((6, 1)));
        assert_eq!(version("unknown"), None);
        assert_eq!(chosen("always [madvise] never").as_deref(), Some("madvise"));
        assert_eq!(chosen("always"), None);
        assert_eq!(ranges("8080,9148-9150"), [(8080, 8080), (9148, 9150)]);
        assert!(ranges("").is_empty());
        assert!(may_lock("CapPrm:\t0\nCapEff:\t0000000000004000\n"));
        assert!(!may_lock("CapPrm:\t0000000000004000\nCapEff:\tffffffffffffbfff\n") && !may_lock(""));
        assert_eq!(quota("150000 100000"), Some(1.5));
        assert_eq!(quota("max 100000"), None);
        assert_eq!(kilobytes("MemTotal:  9 kB\nMemAvailable:    3 kB", "MemAvailable:"), Some(3_072));
        assert_eq!(kilobytes("MemTotal:  9 kB", "MemAvailable:"), None);
    }

    #[test]
    fn this_host_is_read() {
        let host = Host::collect("127.0.0.1:0".parse().expect("an address"));
        assert!(host.kernel.is_some_and(|kernel| kernel >= (4, 0)), "{host:?}");
        assert!(host.memory.is_some_and(|memory| memory > 0), "{host:?}");
        assert!(!host.cores.is_empty() && host.descriptors > 0 && host.listen.is_ok(), "{host:?}");
    }
}
