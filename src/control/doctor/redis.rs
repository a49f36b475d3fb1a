//! Judges of Redis or Valkey.

use std::time::Duration;

use super::{Check, Finding, bytes};
use crate::backbone::redis::address::without_password;
use crate::backbone::redis::examine::Server;
use crate::limits::{PUBSUB_BUFFER_LEAST_BYTES, REPLICA_LAG_BYTES, REPLICA_LAG_SECONDS, ROUND_TRIP_MICROS};

/// The oldest version whose commands suffice (exclusive ranges of streams).
const LEAST_VERSION: (u32, u32) = (6, 2);
/// The first version with functions.
const FUNCTIONS_VERSION: (u32, u32) = (7, 0);

/// No Redis is configured.
pub fn embedded() -> Finding {
    Check("redis", "without it nodes do not share channels, and a restart begins every channel anew")
        .ok("not configured: the embedded backbone, one node")
}

/// Every check of a server, or only that it cannot be reached.
pub fn judge(url: &str, server: &Result<Server, String>) -> Vec<Finding> {
    let check = Check("redis", "a node without its backbone is not ready, delivers nothing and takes no publications");
    let url = without_password(url);
    let server = match server {
        Ok(server) => server,
        Err(reason) => {
            let mend =
                "start it, open the way to it (bind, protected-mode, firewall), or correct redis.url and its password";
            return vec![check.fail(format!("{url}: {reason}"), mend)];
        }
    };
    vec![
        check.ok(format!("{url} answers")),
        version(server),
        cluster(server),
        functions(server),
        publishing(server),
        eviction(server),
        buffer(server),
        persistence(server),
        replication(server),
        round_trip(server),
    ]
}

/// Major and minor number, of Valkey as the Redis it is compatible with.
fn numbers(server: &Server) -> Option<(u32, u32)> {
    let mut numbers = server.field("redis_version").split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn version(server: &Server) -> Finding {
    let check = Check("redis-version", "weir needs RESP3, exclusive ranges of streams (6.2), and for functions 7.0");
    let seen = match server.field("valkey_version") {
        "" => format!("Redis {}", server.field("redis_version")),
        valkey => format!("Valkey {valkey} (as Redis {})", server.field("redis_version")),
    };
    match numbers(server) {
        Some(version) if version < LEAST_VERSION => check.fail(seen, "upgrade to Redis 7 or Valkey"),
        Some(version) if version < FUNCTIONS_VERSION => {
            check.warn(seen, "upgrade to Redis 7 or Valkey: scripts do not survive a restart and are sent again")
        }
        Some(_) => check.ok(seen),
        None => {
            check.warn(format!("no version that can be read: {seen}"), "make sure that it is compatible with Redis 7")
        }
    }
}

fn cluster(server: &Server) -> Finding {
    let check = Check("redis-cluster", "the node keeps all channels on one server and does not follow redirections");
    match server.field("cluster_enabled") {
        "1" => check.fail("cluster mode", "use a server with cluster-enabled no"),
        _ => check.ok("a single server"),
    }
}

fn functions(server: &Server) -> Finding {
    let check = Check("redis-functions", "positions come from one atomic step that the server runs");
    match &server.function {
        Ok(true) => check.ok("the library weir is loaded"),
        Ok(false) if numbers(server).is_some_and(|version| version < FUNCTIONS_VERSION) => {
            check.ok("published by script: this version has no functions")
        }
        Ok(false) => {
            check.warn("published by script: functions are denied to this user", "ACL SETUSER … +function +fcall")
        }
        Err(reason) => check
            .fail(reason.clone(), "allow FUNCTION and FCALL, or SCRIPT, EVAL and EVALSHA, to this user (ACL SETUSER)"),
    }
}

fn publishing(server: &Server) -> Finding {
    let check = Check("redis-publish", "each publication waits for this step before it is delivered");
    match &server.publishes {
        Ok(taken) => pace(check, "publishing", taken, "look for slow commands (SLOWLOG GET), slow disks with appendfsync always, and other load on the server"),
        Err(reason) => check.fail(
            reason.clone(),
            "a replica or a full server refuses writes, and a user needs FCALL, DEL, and the keys and channels of redis.prefix",
        ),
    }
}

fn round_trip(server: &Server) -> Finding {
    let check = Check("redis-round-trip", "it is part of every publication's way to every subscriber");
    pace(
        check,
        "PING",
        &server.pings,
        "run Redis in the same zone as the nodes; look for load with redis-cli --latency",
    )
}

fn pace(check: Check, what: &str, ascending: &[Duration], mend: &str) -> Finding {
    let (Some(median), Some(worst)) = (ascending.get(ascending.len() / 2), ascending.last()) else {
        return check.warn(format!("{what}: not measured"), mend);
    };
    let micros = median.as_micros();
    let seen = format!("{what}: p50 {micros} µs, most {} µs, of {}", worst.as_micros(), ascending.len());
    if micros > u128::from(ROUND_TRIP_MICROS) { check.warn(seen, mend) } else { check.ok(seen) }
}

fn eviction(server: &Server) -> Finding {
    let check =
        Check("redis-eviction", "an evicted position begins a new epoch: every client of the channel is told of a gap");
    let (most, policy) = (server.number("maxmemory"), server.field("maxmemory_policy"));
    match (most, policy) {
        (0, policy) => check.ok(format!("maxmemory is not set, so nothing is evicted ({policy})")),
        (most, "noeviction") => {
            check.ok(format!("noeviction at {}: publishing is refused when it is full", bytes(most)))
        }
        // Every key of weir has a time to live, so the volatile policies take them as well.
        (most, policy) => check.warn(
            format!("{policy} at {} evicts positions and histories", bytes(most)),
            "CONFIG SET maxmemory-policy noeviction, on a server of weir's own",
        ),
    }
}

/// Hard and soft limit in bytes and the soft one's seconds, of the class `pubsub`.
fn pubsub_limit(setting: &str) -> Option<[u64; 3]> {
    let words: Vec<_> = setting.split_whitespace().collect();
    let [hard, soft, seconds] = words.chunks(4).find_map(|class| class.strip_prefix(&["pubsub"]))? else { return None };
    Some([hard.parse().ok()?, soft.parse().ok()?, seconds.parse().ok()?])
}

fn buffer(server: &Server) -> Finding {
    let check = Check(
        "redis-output-buffer",
        "Redis cuts a node's subscription that is further behind; the node reads every channel anew",
    );
    let least = PUBSUB_BUFFER_LEAST_BYTES;
    let mend = format!("CONFIG SET client-output-buffer-limit 'pubsub {} {least} 60'", 4 * least);
    match server.config.get("client-output-buffer-limit").and_then(|setting| pubsub_limit(setting)) {
        None => check.warn("CONFIG GET is refused: the limit is not known", mend),
        Some([0, 0, _]) => check.warn("pubsub has no limit: a node that stops reading fills the memory of Redis", mend),
        Some([hard, soft, seconds]) => {
            let seen = format!("pubsub: {} at once, {} for {seconds} s", bytes(hard), bytes(soft));
            let low = |limit: u64| limit != 0 && limit < least;
            if low(hard) || low(soft) { check.warn(seen, mend) } else { check.ok(seen) }
        }
    }
}

fn persistence(server: &Server) -> Finding {
    let check = Check(
        "redis-persistence",
        "after a restart with less, channels go on in a new epoch and clients are told of a gap",
    );
    let mend = "CONFIG SET appendonly yes, with appendfsync everysec";
    if server.number("aof_enabled") == 1 {
        return match server.config.get("appendfsync").map(String::as_str) {
            Some("no") => check.warn("append only, written when the system likes: about 30 s may be lost", mend),
            Some("always") => check.ok("append only, appendfsync always: nothing answered is lost"),
            Some(mode) => check.ok(format!("append only, appendfsync {mode}: about 1 s may be lost")),
            None => check.ok("append only; appendfsync is not known"),
        };
    }
    match server.config.get("save").map(String::as_str) {
        Some("") => check.warn("none: a restart loses everything", mend),
        Some(save) => check.warn(format!("snapshots only (save {save}): everything since the last one is lost"), mend),
        None => check.warn("no append-only file: a restart loses what came after the last snapshot", mend),
    }
}

/// One replica as its primary sees it.
struct Replica<'a> {
    online: bool,
    address: &'a str,
    bytes: u64,
    seconds: u64,
}

fn replicas(server: &Server) -> Vec<Replica<'_>> {
    let head = server.number("master_repl_offset");
    let is_replica = |name: &str| {
        name.strip_prefix("slave")
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
    };
    let of = |line: &'_ str, name: &str| -> String {
        let pair = line.split(',').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        pair.unwrap_or_default().to_owned()
    };
    let listed = server.info.iter().filter(|(name, _)| is_replica(name));
    listed
        .map(|(_, line)| Replica {
            online: of(line, "state") == "online",
            address: line.split(",state=").next().unwrap_or_default(),
            bytes: head.saturating_sub(of(line, "offset").parse().unwrap_or(0)),
            seconds: of(line, "lag").parse().unwrap_or(0),
        })
        .collect()
}

fn replication(server: &Server) -> Finding {
    let check = Check(
        "redis-replication",
        "a failover loses what the replica does not have, and gives its offsets to other publications",
    );
    if server.field("role") == "slave" {
        let seen = format!("a replica of {}", server.field("master_host"));
        return check.fail(seen, "set redis.url to the primary: a replica takes no publications");
    }
    let replicas = replicas(server);
    let behind = replicas.iter().find(|r| !r.online || r.bytes > REPLICA_LAG_BYTES || r.seconds > REPLICA_LAG_SECONDS);
    match behind {
        _ if replicas.is_empty() => check.ok("a primary without replicas: nothing to fail over to"),
        None => check.ok(format!("a primary with {} replicas in step", replicas.len())),
        Some(replica) => check.warn(
            format!(
                "the replica {} is {}, {} and {} s behind",
                replica.address,
                if replica.online { "online" } else { "not in sync" },
                bytes(replica.bytes),
                replica.seconds
            ),
            "look at its load and its network; CONFIG SET min-replicas-to-write 1 bounds what a failover can lose",
        ),
    }
}
