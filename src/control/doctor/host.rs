//! Judges of the kernel, io_uring, descriptors, cores and clocks.

use super::facts::Host;
use super::{Check, Finding, bytes};
use crate::control::host::{ShardPlan, plan_shards, slots_per_shard};
use crate::limits::{RESERVED_DESCRIPTORS, SHARD_LOCKED_BYTES};
use crate::settings::{DriverChoice, Settings};
use crate::shard::start::DriverKind;

/// The oldest kernel on which the ring works as the engine uses it (`IORING_SETUP_DEFER_TASKRUN`).
const URING_KERNEL: (u32, u32) = (6, 1);

/// Clock sources that are read without leaving user space or the virtual machine.
const FAST_CLOCKS: [&str; 5] =
    ["tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page", "riscv_clocksource"];

/// What the configuration comes to on this host.
#[derive(Debug, Clone)]
pub struct Need {
    /// Shards and their cores.
    pub plan: ShardPlan,
    /// The driver that will be used, where one can be.
    pub driver: DriverKind,
    /// Established connections to provide for.
    pub connections: u64,
    /// Established connections that descriptors allow.
    pub possible: u64,
    /// Whether the operator gave their number.
    pub configured: bool,
}

impl Need {
    /// Computes it as a node that starts does.
    #[must_use]
    pub fn of(host: &Host, settings: &Settings) -> Self {
        let plan = plan_shards(settings.shards, settings.pin, &host.cores, host.parallelism);
        let uring = settings.driver != DriverChoice::Epoll && host.uring.is_ok();
        let driver = if uring { DriverKind::Uring } else { DriverKind::Epoll };
        let shards = plan.cores.len();
        let possible = u64::from(slots_per_shard(driver, 0, shards, host.descriptors)) * shards as u64;
        let configured = settings.max_connections > 0;
        let connections = if configured { settings.max_connections as u64 } else { possible };
        Self { plan, driver, connections, possible, configured }
    }

    fn shards(&self) -> usize {
        self.plan.cores.len()
    }
}

pub fn kernel(host: &Host) -> Finding {
    let check =
        Check("kernel", "io_uring is used with deferred task work, which came with Linux 6.1; older kernels get epoll");
    match host.kernel {
        Some(kernel @ (major, minor)) if kernel < URING_KERNEL => {
            check.warn(format!("Linux {major}.{minor}"), "run Linux 6.1 or later")
        }
        Some((major, minor)) => check.ok(format!("Linux {major}.{minor}")),
        None => check.ok("the version is not told"),
    }
}

pub fn driver(host: &Host, choice: DriverChoice) -> Finding {
    let check =
        Check("io_uring", "the epoll driver takes more CPU for each delivery, and a descriptor for each connection");
    let reason = match (&host.uring, choice) {
        (Ok(()), DriverChoice::Epoll) => return check.ok("allowed, not used: driver = epoll"),
        (Ok(()), _) => return check.ok("allowed, with everything needed"),
        (Err(_), DriverChoice::Epoll) => return check.ok("not allowed, not used: driver = epoll"),
        (Err(reason), _) => reason,
    };
    let mend = match host.uring_disabled {
        Some(2) => "sysctl -w kernel.io_uring_disabled=0".into(),
        Some(1) => "sysctl -w kernel.io_uring_disabled=0, or run as a member of the group kernel.io_uring_group".into(),
        _ if host.seccomp => "allow io_uring_setup, io_uring_enter and io_uring_register in the seccomp profile of the container \
                              or service (docker: --security-opt seccomp=PROFILE.json; systemd: SystemCallFilter=@io-event \
                              io_uring_setup io_uring_enter io_uring_register)"
            .to_owned(),
        _ => "run a kernel of 6.1 or later with CONFIG_IO_URING, or ask who runs the sandbox".into(),
    };
    match choice {
        DriverChoice::Uring => {
            check.fail(format!("driver = uring, but {reason}"), format!("{mend}; or set driver to auto or epoll"))
        }
        _ => check.warn(format!("epoll will be used: {reason}"), mend),
    }
}

pub fn descriptors(host: &Host, settings: &Settings, need: &Need) -> Finding {
    let check =
        Check("descriptors", "connections past what descriptors allow are refused, whatever max_connections says");
    let seen = format!(
        "{} descriptors hold {} connections on {}; max_connections is {}",
        host.descriptors,
        need.possible,
        need.driver.label(),
        settings.max_connections
    );
    let shards = need.shards() as u64;
    // A ring's table is bounded by the limit for each shard; under epoll all shards share it.
    let enough = match need.driver {
        DriverKind::Uring => need.connections.div_ceil(shards).max(2 * RESERVED_DESCRIPTORS),
        DriverKind::Epoll => need.connections + RESERVED_DESCRIPTORS,
    };
    if need.connections > need.possible {
        let mend = format!(
            "LimitNOFILE={enough} in the unit, ulimit -Hn {enough} in a shell, or max_connections = {}",
            need.possible
        );
        check.fail(seen, mend)
    } else if host.descriptors < 2 * RESERVED_DESCRIPTORS {
        check.warn(
            seen,
            format!(
                "raise the hard limit to {} or more: half of so few are kept for handshakes and files",
                2 * RESERVED_DESCRIPTORS
            ),
        )
    } else {
        check.ok(seen)
    }
}

pub fn locked_memory(host: &Host, need: &Need) -> Finding {
    let check = Check(
        "locked-memory",
        "without CAP_IPC_LOCK the kernel charges rings to the user's locked memory, and a node that cannot make its rings does not start",
    );
    if need.driver == DriverKind::Epoll {
        return check.ok("not used by epoll");
    }
    let Some(lockable) = host.lockable else { return check.ok("not limited") };
    let shards = need.shards() as u64;
    let start = shards * SHARD_LOCKED_BYTES;
    // Until an upgrade is done both processes, which are one user's, have their rings.
    let upgrade = 2 * start;
    let seen = format!("{} may be locked; {shards} shards take {}", bytes(lockable), bytes(start));
    let mend = format!(
        "LimitMEMLOCK={upgrade} in the unit, ulimit -l {} in a shell, docker: --ulimit memlock={upgrade}",
        upgrade.div_ceil(1_024)
    );
    if lockable < start {
        check.fail(seen, format!("{mend}; or driver = epoll"))
    } else if lockable < upgrade {
        check.warn(format!("{seen}, and as much again during an upgrade"), mend)
    } else {
        check.ok(seen)
    }
}

pub fn cores(host: &Host, settings: &Settings, need: &Need) -> Finding {
    let check = Check("cores", "a shard is one thread that expects a core to itself");
    let (shards, cores) = (need.shards(), host.cores.len());
    let seen = format!("{shards} shards on {cores} cores");
    match &need.plan.unpinned_because {
        _ if cores > 0 && shards > cores => {
            check.warn(format!("{seen}: they take turns"), "set shards to 0, or to the number of cores at the most")
        }
        Some(reason) => check.warn(
            format!("{seen}, not pinned: {reason}"),
            "give whole cores (cpuset) instead of a quota, or set pin = false",
        ),
        None if settings.pin => check.ok(format!("{seen}, pinned")),
        None => check.ok(format!("{seen}, not pinned: pin = false")),
    }
}

pub fn quota(host: &Host, need: &Need) -> Finding {
    let check = Check(
        "cpu-quota",
        "a shard that used up its quota stands still for the rest of the period, some ten milliseconds",
    );
    match host.quota {
        None => check.ok("none"),
        Some(quota) if quota < need.shards() as f64 => {
            let mend = format!(
                "raise cpu.max to {} cores or remove it (Kubernetes: no CPU limit, or whole CPUs with the static policy)",
                need.shards()
            );
            check.warn(format!("{quota:.2} cores for {} shards", need.shards()), mend)
        }
        Some(quota) => check.ok(format!("{quota:.2} cores")),
    }
}

pub fn clock_source(host: &Host) -> Finding {
    let check = Check(
        "clock-source",
        "the clock is read several times a turn; a slow source makes each a system call or a trap",
    );
    match host.clock_source.as_deref() {
        None => check.ok("not told"),
        Some(source) if FAST_CLOCKS.contains(&source) => check.ok(source),
        Some(source) => check.warn(source, "boot with a stable TSC (tsc=reliable on machines known to have one), or take another kind of virtual machine"),
    }
}

pub fn clock_sync(host: &Host) -> Finding {
    let check = Check("clock-sync", "logs of several nodes are compared by time; positions do not depend on it");
    match host.clock_synchronised {
        Some(false) => check.warn("not synchronised", "run chrony or systemd-timesyncd on the host"),
        Some(true) => check.ok("synchronised"),
        None => check.ok("not told"),
    }
}
