//! Judges of memory: what the configuration may take, of the process and of the kernel, against what is there.

use super::facts::Host;
use super::host::Need;
use super::{Check, Finding, bytes};
use crate::limits::{
    BACKBONE_QUEUE_BYTES, CONNECTION_KERNEL_BYTES, CONNECTION_SEND_BYTES, CONNECTION_USER_BYTES,
    FRONT_CONNECTION_BYTES, FRONT_CONNECTIONS, MEMORY_COMFORT_PERCENT, NODE_LOG_BYTES,
};

/// Bytes the node takes whatever the number of established connections: its log and queue when full, and every shard's
/// handshakes and requests.
fn fixed(need: &Need) -> u64 {
    (NODE_LOG_BYTES + BACKBONE_QUEUE_BYTES) as u64
        + need.plan.cores.len() as u64 * FRONT_CONNECTIONS * FRONT_CONNECTION_BYTES
}

pub fn memory(host: &Host, need: &Need) -> Finding {
    let check =
        Check("memory", "the kernel ends a node that takes more than there is, and all its clients come back at once");
    let available = [host.memory, host.memory_group].into_iter().flatten().min();
    let Some(available) = available else { return check.ok("not told") };
    let (user, kernel) = (need.connections * CONNECTION_USER_BYTES, need.connections * CONNECTION_KERNEL_BYTES);
    let total = user + kernel + fixed(need);
    let seen = format!(
        "{} connections need {} of the process and {} of the kernel, and {} beside them at the most; {} of {} available{}",
        need.connections,
        bytes(user),
        bytes(kernel),
        bytes(fixed(need)),
        bytes(total),
        bytes(available),
        if host.memory_group.is_some_and(|group| group == available) { " (memory.max)" } else { "" },
    );
    let each = CONNECTION_USER_BYTES + CONNECTION_KERNEL_BYTES;
    let fitting = (available * MEMORY_COMFORT_PERCENT / 100).saturating_sub(fixed(need)) / each;
    let mend =
        format!("give it {} or more, or set max_connections = {fitting}", bytes(total * 100 / MEMORY_COMFORT_PERCENT));
    if total > available && need.configured {
        check.fail(seen, mend)
    } else if total * 100 > available * MEMORY_COMFORT_PERCENT {
        check.warn(seen, mend)
    } else {
        check.ok(seen)
    }
}

pub fn tcp_memory(host: &Host, need: &Need) -> Finding {
    let check =
        Check("tcp-memory", "at the limit the kernel shrinks every connection's buffers and drops what arrives");
    let Some(most) = host.tcp_memory else { return check.ok("not told") };
    let burst = need.connections * CONNECTION_SEND_BYTES;
    let seen = format!(
        "{} for all buffers; one frame in each of {} connections takes {}",
        bytes(most),
        need.connections,
        bytes(burst)
    );
    if burst > most {
        // The sysctl counts pages; 4 KiB is the size on all but a few machines.
        let pages = burst.div_ceil(4_096) * 2;
        check.warn(seen, format!("sysctl -w net.ipv4.tcp_mem='{} {} {pages}'", pages / 2, pages * 3 / 4))
    } else {
        check.ok(seen)
    }
}

pub fn swap(host: &Host) -> Finding {
    let check = Check("swap", "a shard that waits for a page from disk stands still with all its connections");
    match (host.swap, host.swappiness) {
        (Some(0) | None, _) => check.ok("none"),
        (Some(swap), Some(swappiness)) if swappiness > 10 => check.warn(
            format!("{} with vm.swappiness = {swappiness}", bytes(swap)),
            "sysctl -w vm.swappiness=1, or MemorySwapMax=0 in the unit, or swapoff",
        ),
        (Some(swap), swappiness) => {
            check.ok(format!("{} with vm.swappiness = {}", bytes(swap), swappiness.unwrap_or(0)))
        }
    }
}

pub fn overcommit(host: &Host) -> Finding {
    let check = Check(
        "overcommit",
        "with strict accounting an allocation may be refused while memory is free, and the process ends",
    );
    match host.overcommit {
        Some(2) => check.warn("vm.overcommit_memory = 2 (strict)", "sysctl -w vm.overcommit_memory=0"),
        Some(mode) => check.ok(format!("vm.overcommit_memory = {mode}")),
        None => check.ok("not told"),
    }
}

pub fn huge_pages(host: &Host) -> Finding {
    let check = Check(
        "huge-pages",
        "huge pages for everyone make the process larger than what it uses, and compacting them stalls shards",
    );
    match host.huge_pages.as_deref() {
        Some("always") => check.warn("always", "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"),
        Some(mode) => check.ok(mode),
        None => check.ok("not told"),
    }
}
