//! What the machine offers this process: descriptors, cores and io_uring. Asked once, at start.

use std::io;

use io_uring::{IoUring, Probe, opcode};

use crate::limits::{MOST_SLOTS, RESERVED_DESCRIPTORS};
use crate::settings::DriverChoice;
use crate::shard::start::DriverKind;

/// File descriptors this process may open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptors {
    /// The limit now in force.
    pub soft: u64,
    /// What it was before.
    pub before: u64,
}

/// Raises the soft descriptor limit to the hard one. Service managers set the soft one to 1,024 for programs that still use
/// `select(2)` and expect others to do this.
///
/// # Errors
/// When the kernel refuses, which it has no reason to.
pub fn raise_descriptor_limit() -> io::Result<Descriptors> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes one rlimit into a live local.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let before = limit.rlim_cur;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: reads one live rlimit.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Descriptors { soft: limit.rlim_cur, before })
}

/// The cores this process may run on, ascending. Empty when the kernel does not say, as on machines with more cores than
/// `cpu_set_t` has bits (1,024).
#[must_use]
pub fn allowed_cores() -> Vec<usize> {
    // SAFETY: an all-zero cpu_set_t is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: writes at most the given size into a live local of that size; 0 is the calling thread.
    if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) } != 0 {
        return Vec::new();
    }
    // SAFETY: every index is below CPU_SETSIZE, the number of bits in the set.
    (0..libc::CPU_SETSIZE as usize).filter(|core| unsafe { libc::CPU_ISSET(*core, &set) }).collect()
}

/// Pins the calling thread to a core of [`allowed_cores`].
///
/// # Errors
/// When the core was taken away from the process in the meantime.
pub fn pin_thread(core: usize) -> io::Result<()> {
    // SAFETY: an all-zero cpu_set_t is the empty set, and `core` came out of one, so it is a bit of it.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        set
    };
    // SAFETY: reads a live set of the given size; 0 is the calling thread.
    if unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// How many shards there are and where each runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlan {
    /// One entry a shard: the core it is pinned to.
    pub cores: Vec<Option<usize>>,
    /// Why shards are not pinned although that was asked for.
    pub unpinned_because: Option<String>,
}

/// Decides on shards. `wanted` and `pin` are the settings, `cores` is [`allowed_cores`], and `parallelism` is how many
/// threads the system lets run at once, which a cgroup's CPU quota makes fewer than the cores.
#[must_use]
pub fn plan_shards(wanted: usize, pin: bool, cores: &[usize], parallelism: usize) -> ShardPlan {
    let shards = if wanted == 0 { parallelism.max(1) } else { wanted };
    let because = if !pin {
        None
    } else if shards > cores.len() {
        Some(format!("{shards} shards are more than {} cores", cores.len()))
    } else if parallelism < cores.len() {
        // With a quota, every node on the machine would choose the same first cores.
        Some(format!("a CPU quota of {parallelism} is less than {} cores", cores.len()))
    } else {
        let cores = cores[..shards].iter().copied().map(Some).collect();
        return ShardPlan { cores, unpinned_because: None };
    };
    ShardPlan { cores: vec![None; shards], unpinned_because: because }
}

/// Why io_uring cannot be used here.
#[derive(Debug, thiserror::Error)]
pub enum UringError {
    /// No ring can be made.
    #[error("io_uring_setup: {0}{hint}", hint = setup_hint(.0))]
    Setup(io::Error),
    /// A ring can be made but not used as needed.
    #[error("io_uring_register ({what}): {source}")]
    Register {
        /// What was to be registered.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The kernel is too old.
    #[error("the kernel lacks {0}")]
    Missing(String),
}

fn setup_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => {
            "; a seccomp profile (Docker's default has one) or the sysctl kernel.io_uring_disabled forbids it"
        }
        Some(libc::ENOSYS) => "; the kernel has no io_uring",
        Some(libc::EINVAL) => "; the kernel is older than 6.1",
        Some(libc::ENOMEM) => "; RLIMIT_MEMLOCK is too small",
        _ => "",
    }
}

/// The operations the engine submits.
const NEEDED: [(&str, u8); 10] = [
    ("SEND", opcode::Send::CODE),
    ("SENDMSG", opcode::SendMsg::CODE),
    ("RECV", opcode::Recv::CODE),
    ("READ", opcode::Read::CODE),
    ("POLL_ADD", opcode::PollAdd::CODE),
    ("POLL_REMOVE", opcode::PollRemove::CODE),
    ("ASYNC_CANCEL", opcode::AsyncCancel::CODE),
    ("SHUTDOWN", opcode::Shutdown::CODE),
    ("CLOSE", opcode::Close::CODE),
    ("FILES_UPDATE", opcode::FilesUpdate::CODE),
];

/// Tries io_uring as the engine uses it: a ring with deferred task work (Linux 6.1), a sparse file table, an eventfd, the
/// operations needed, and completions only for what went wrong.
///
/// # Errors
/// What is refused or missing.
pub fn probe_uring() -> Result<(), UringError> {
    let ring: IoUring =
        IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(8).map_err(UringError::Setup)?;
    let refused = |what| move |source| UringError::Register { what, source };
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(refused("probe"))?;
    ring.submitter().register_files_sparse(8).map_err(refused("files"))?;
    let bell = crate::shard::mailbox::Bell::new().map_err(refused("eventfd"))?;
    ring.submitter().register_eventfd(std::os::fd::AsRawFd::as_raw_fd(&bell)).map_err(refused("eventfd"))?;

    let mut missing: Vec<_> =
        NEEDED.iter().filter(|(_, code)| !probe.is_supported(*code)).map(|(name, _)| *name).collect();
    if !ring.params().is_feature_skip_cqe_on_success() {
        missing.push("CQE_SKIP_SUCCESS");
    }
    if missing.is_empty() { Ok(()) } else { Err(UringError::Missing(missing.join(", "))) }
}

/// io_uring was demanded and cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("driver = \"uring\" cannot be used here: {0}; allow io_uring, or set driver to auto or epoll")]
pub struct DriverError(#[source] pub UringError);

/// Decides on the driver, with the reason for the log. `probe` is only called when its answer matters.
///
/// # Errors
/// When io_uring was demanded and cannot be had.
pub fn choose_driver(
    choice: DriverChoice,
    probe: impl FnOnce() -> Result<(), UringError>,
) -> Result<(DriverKind, String), DriverError> {
    match choice {
        DriverChoice::Epoll => Ok((DriverKind::Epoll, "configured".into())),
        DriverChoice::Uring => match probe() {
            Ok(()) => Ok((DriverKind::Uring, "configured".into())),
            Err(error) => Err(DriverError(error)),
        },
        DriverChoice::Auto => Ok(match probe() {
            Ok(()) => (DriverKind::Uring, "io_uring has everything needed".into()),
            Err(error) => (DriverKind::Epoll, error.to_string()),
        }),
    }
}

/// Established sockets a shard takes at most: the node's share, within what descriptors allow. A socket in a ring's file
/// table counts against no process limit, but the table is bounded by it; under epoll every socket is a descriptor, and
/// [`RESERVED_DESCRIPTORS`], but no more than half, are kept for everything else.
#[must_use]
pub fn slots_per_shard(driver: DriverKind, max_connections: usize, shards: usize, descriptors: u64) -> u32 {
    let most = match driver {
        DriverKind::Uring => descriptors,
        DriverKind::Epoll => (descriptors - RESERVED_DESCRIPTORS.min(descriptors / 2)) / shards as u64,
    };
    let wanted = if max_connections == 0 { u64::MAX } else { max_connections.div_ceil(shards) as u64 };
    wanted.min(most).clamp(1, u64::from(MOST_SLOTS)) as u32
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

    use super::*;

    /// Runs a probe on a thread where io_uring_setup fails with `errno`, as under a container's seccomp profile.
    fn probe_under_filter(errno: i32) -> UringError {
        let thread = std::thread::spawn(move || {
            let rules = BTreeMap::from([(libc::SYS_io_uring_setup, vec![])]);
            let arch = std::env::consts::ARCH.try_into().expect("a known architecture");
            let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno as u32), arch)
                .expect("a filter");
            let program: BpfProgram = filter.try_into().expect("a program");
            seccompiler::apply_filter(&program).expect("the filter applies to this thread");
            probe_uring()
        });
        thread.join().expect("the thread ends").expect_err("the filter refuses")
    }

    #[test]
    fn slots_follow_the_setting_and_the_descriptors() {
        assert_eq!(slots_per_shard(DriverKind::Uring, 0, 2, 20_000), 20_000);
        assert_eq!(slots_per_shard(DriverKind::Uring, 1_001, 2, 20_000), 501);
        assert_eq!(slots_per_shard(DriverKind::Epoll, 0, 2, 20_000), (20_000 - RESERVED_DESCRIPTORS as u32) / 2);
        assert_eq!(slots_per_shard(DriverKind::Epoll, 0, 2, 100), 25);
        assert_eq!(slots_per_shard(DriverKind::Uring, 0, 1, u64::MAX), MOST_SLOTS);
    }

    #[test]
    fn a_seccomp_filter_means_epoll_with_the_reason() {
        for (errno, hint) in [(libc::EPERM, "seccomp"), (libc::ENOSYS, "no io_uring")] {
            let error = probe_under_filter(errno);
            assert!(matches!(&error, UringError::Setup(e) if e.raw_os_error() == Some(errno)), "{error}");
            let (kind, reason) = choose_driver(DriverChoice::Auto, || Err(error)).expect("auto falls back");
            assert_eq!(kind, DriverKind::Epoll);
            assert!(reason.contains("io_uring_setup") && reason.contains(hint), "{reason}");
        }
    }

    #[test]
    fn what_was_demanded_is_used_or_refused() {
        let never = || unreachable!("epoll needs no probe");
        assert_eq!(choose_driver(DriverChoice::Epoll, never).expect("always there").0, DriverKind::Epoll);
        assert_eq!(choose_driver(DriverChoice::Uring, || Ok(())).expect("it is there").0, DriverKind::Uring);
        assert_eq!(choose_driver(DriverChoice::Auto, || Ok(())).expect("it is there").0, DriverKind::Uring);
        let missing = || Err(UringError::Missing("SENDMSG".into()));
        let error = choose_driver(DriverChoice::Uring, missing).expect_err("it is not there").to_string();
        assert!(error.contains("SENDMSG") && error.contains("epoll"), "{error}");
    }

    #[test]
    fn shards_follow_cores_and_quota() {
        let pinned = |wanted, cores: &[usize], parallelism| plan_shards(wanted, true, cores, parallelism);
        assert_eq!(pinned(0, &[2, 5], 2).cores, [Some(2), Some(5)], "one for each core");
        assert_eq!(pinned(1, &[2, 5], 2).cores, [Some(2)], "fewer than cores");
        let crowded = pinned(3, &[2, 5], 2);
        assert_eq!((crowded.cores.len(), crowded.cores[0]), (3, None));
        assert_eq!(crowded.unpinned_because.as_deref(), Some("3 shards are more than 2 cores"));
        let quota = pinned(0, &[0, 1, 2, 3], 2);
        assert_eq!((quota.cores.len(), quota.cores[0]), (2, None));
        assert_eq!(quota.unpinned_because.as_deref(), Some("a CPU quota of 2 is less than 4 cores"));
        let unasked = plan_shards(2, false, &[0, 1], 2);
        assert_eq!((unasked.cores, unasked.unpinned_because), (vec![None, None], None));
        assert_eq!(pinned(0, &[], 0).cores, [None], "at least one, also when the kernel says nothing");
    }

    #[test]
    fn a_pinned_thread_runs_on_its_core_alone() {
        let all = allowed_cores();
        let core = *all.last().expect("this process runs somewhere");
        let after = std::thread::spawn(move || pin_thread(core).map(|()| allowed_cores()));
        assert_eq!(after.join().expect("the thread ends").expect("the core is allowed"), [core]);
        assert_eq!(allowed_cores(), all, "other threads are as free as before");
    }

    #[test]
    fn the_descriptor_limit_is_raised_once() {
        let first = raise_descriptor_limit().expect("the kernel allows it");
        let second = raise_descriptor_limit().expect("and again");
        assert_eq!((second.before, second.soft), (first.soft, first.soft));
    }
}
