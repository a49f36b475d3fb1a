//! Every verdict of every judge.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use super::*;
use crate::backbone::redis::examine::Server;
use crate::settings::DriverChoice;

/// A host on which nothing is wrong.
fn good_host() -> Host {
    Host {
        kernel: Some((6, 18)),
        uring: Ok(()),
        uring_disabled: Some(0),
        seccomp: false,
        descriptors: 1 << 20,
        lockable: None,
        cores: vec![0, 1, 2, 3],
        parallelism: 4,
        quota: None,
        clock_source: Some("tsc".into()),
        clock_synchronised: Some(true),
        memory: Some(64 << 30),
        memory_group: None,
        swap: Some(0),
        swappiness: Some(60),
        overcommit: Some(0),
        huge_pages: Some("madvise".into()),
        tcp_memory: Some(16 << 30),
        backlog: Some(4_096),
        local_ports: Some((32_768, 60_999)),
        reserved_ports: Vec::new(),
        tracked: None,
        listen: Ok(()),
    }
}

fn settings() -> Settings {
    Settings { max_connections: 200_000, ..Settings::default() }
}

/// What the named check finds after `change`.
fn host(name: &str, change: impl FnOnce(&mut Host, &mut Settings)) -> Finding {
    let (mut host, mut settings) = (good_host(), settings());
    change(&mut host, &mut settings);
    judge_host(&host, &settings).into_iter().find(|finding| finding.name == name).expect("there is such a check")
}

/// Asserts a verdict, and that what is wrong comes with a way to mend it that contains `mend`.
#[track_caller]
fn expect(finding: &Finding, verdict: Verdict, mend: &str) {
    assert_eq!(finding.verdict, verdict, "{finding:?}");
    assert_eq!(finding.mend.is_some(), verdict != Verdict::Ok, "{finding:?}");
    assert!(finding.mend.as_deref().unwrap_or_default().contains(mend), "{finding:?}");
}

#[test]
fn a_good_host_has_nothing_to_mend() {
    for finding in judge_host(&good_host(), &settings()) {
        expect(&finding, Verdict::Ok, "");
    }
}

#[test]
fn names_are_unique_and_silence_is_no_bad_news() {
    let silent = Host {
        kernel: None,
        uring_disabled: None,
        clock_source: None,
        clock_synchronised: None,
        memory: None,
        swap: None,
        swappiness: None,
        overcommit: None,
        huge_pages: None,
        tcp_memory: None,
        backlog: None,
        local_ports: None,
        ..good_host()
    };
    let mut findings = judge_host(&silent, &settings());
    assert!(findings.iter().all(|finding| finding.verdict == Verdict::Ok), "{findings:?}");
    findings.extend(redis::judge("redis://h", &Ok(good_server())));
    let names: std::collections::BTreeSet<_> = findings.iter().map(|finding| finding.name).collect();
    assert_eq!(names.len(), findings.len());
}

#[test]
fn io_uring_is_judged_by_what_was_asked_for() {
    let refused = |host: &mut Host| host.uring = Err("io_uring_setup: Operation not permitted".into());
    let auto = host("io_uring", |h, _| {
        refused(h);
        h.uring_disabled = Some(2);
    });
    expect(&auto, Verdict::Warn, "kernel.io_uring_disabled=0");
    let group = host("io_uring", |h, _| {
        refused(h);
        h.uring_disabled = Some(1);
    });
    expect(&group, Verdict::Warn, "io_uring_group");
    let demanded = host("io_uring", |h, s| {
        refused(h);
        h.seccomp = true;
        s.driver = DriverChoice::Uring;
    });
    expect(&demanded, Verdict::Fail, "seccomp");
    let unknown = host("io_uring", |h, s| {
        refused(h);
        s.driver = DriverChoice::Uring;
    });
    expect(&unknown, Verdict::Fail, "CONFIG_IO_URING");
    let unused = host("io_uring", |h, s| {
        refused(h);
        s.driver = DriverChoice::Epoll;
    });
    expect(&unused, Verdict::Ok, "");
}

#[test]
fn old_kernels_are_named() {
    expect(&host("kernel", |h, _| h.kernel = Some((6, 0))), Verdict::Warn, "6.1");
    expect(&host("kernel", |h, _| h.kernel = Some((6, 1))), Verdict::Ok, "");
}

#[test]
fn rings_must_fit_into_locked_memory_also_during_an_upgrade() {
    let lockable = |bytes| host("locked-memory", |h, _| h.lockable = Some(bytes));
    expect(&lockable(4 << 20), Verdict::Ok, "");
    expect(&lockable((4 << 20) - 1), Verdict::Warn, "LimitMEMLOCK=4194304");
    expect(&lockable(2 << 20), Verdict::Warn, "ulimit -l 4096");
    expect(&lockable((2 << 20) - 1), Verdict::Fail, "driver = epoll");
    let unused = host("locked-memory", |h, s| {
        h.lockable = Some(0);
        s.driver = DriverChoice::Epoll;
    });
    expect(&unused, Verdict::Ok, "");
}

#[test]
fn descriptors_must_hold_the_configured_connections() {
    expect(&host("descriptors", |h, _| h.descriptors = 50_000), Verdict::Ok, "");
    expect(&host("descriptors", |h, _| h.descriptors = 49_999), Verdict::Fail, "LimitNOFILE=50000");
    let epoll = |descriptors| {
        move |h: &mut Host, s: &mut Settings| {
            h.descriptors = descriptors;
            s.driver = DriverChoice::Epoll;
        }
    };
    expect(&host("descriptors", epoll(202_048)), Verdict::Ok, "");
    expect(&host("descriptors", epoll(202_047)), Verdict::Fail, "LimitNOFILE=202048");
    let few = host("descriptors", |h, s| {
        h.descriptors = 1_024;
        s.max_connections = 0;
    });
    expect(&few, Verdict::Warn, "hard limit");
}

#[test]
fn shards_want_cores_of_their_own() {
    expect(&host("cores", |_, s| s.shards = 5), Verdict::Warn, "number of cores");
    expect(&host("cores", |h, _| h.parallelism = 2), Verdict::Warn, "cpuset");
    expect(&host("cores", |_, s| s.pin = false), Verdict::Ok, "");
    expect(&host("cpu-quota", |h, _| h.quota = Some(3.5)), Verdict::Warn, "cpu.max");
    expect(&host("cpu-quota", |h, _| h.quota = Some(4.0)), Verdict::Ok, "");
}

#[test]
fn clocks_are_fast_and_right() {
    expect(&host("clock-source", |h, _| h.clock_source = Some("hpet".into())), Verdict::Warn, "TSC");
    expect(&host("clock-source", |h, _| h.clock_source = Some("kvm-clock".into())), Verdict::Ok, "");
    expect(&host("clock-sync", |h, _| h.clock_synchronised = Some(false)), Verdict::Warn, "chrony");
}

#[test]
fn memory_is_needed_by_the_process_and_by_the_kernel() {
    // 200,000 connections: 48.8 MiB, 915.5 MiB, and 544 MiB beside them.
    let with = |memory: u64| host("memory", |h, _| h.memory = Some(memory));
    expect(&with(4 << 30), Verdict::Ok, "");
    expect(&with(1_700 << 20), Verdict::Warn, "max_connections = ");
    expect(&with(1 << 30), Verdict::Fail, "max_connections = ");
    let seen = with(1 << 30).seen;
    for part in ["48.8 MiB of the process", "915.5 MiB of the kernel", "544.0 MiB beside"] {
        assert!(seen.contains(part), "{part:?} is not in {seen}");
    }
    let group = host("memory", |h, _| h.memory_group = Some(1 << 30));
    expect(&group, Verdict::Fail, "");
    assert!(group.seen.contains("memory.max"), "{group:?}");
    let unbounded = host("memory", |h, s| {
        h.memory = Some(1 << 30);
        s.max_connections = 0;
    });
    expect(&unbounded, Verdict::Warn, "max_connections = ");
    expect(&host("tcp-memory", |h, _| h.tcp_memory = Some(1 << 20)), Verdict::Warn, "net.ipv4.tcp_mem");
}

#[test]
fn the_rest_of_memory() {
    expect(&host("swap", |h, _| h.swap = Some(1 << 30)), Verdict::Warn, "swappiness");
    let little = host("swap", |h, _| {
        h.swap = Some(1 << 30);
        h.swappiness = Some(1);
    });
    expect(&little, Verdict::Ok, "");
    expect(&host("overcommit", |h, _| h.overcommit = Some(2)), Verdict::Warn, "overcommit_memory=0");
    expect(&host("huge-pages", |h, _| h.huge_pages = Some("always".into())), Verdict::Warn, "madvise");
}

#[test]
fn the_port_must_be_free_and_permitted() {
    for (kind, mend) in [
        (io::ErrorKind::AddrInUse, "ss -ltnp"),
        (io::ErrorKind::PermissionDenied, "CAP_NET_BIND_SERVICE"),
        (io::ErrorKind::AddrNotAvailable, "ip address"),
        (io::ErrorKind::OutOfMemory, "set listen"),
    ] {
        expect(&host("listen", |h, _| h.listen = Err(kind)), Verdict::Fail, mend);
    }
}

#[test]
fn the_port_is_not_taken_by_outgoing_connections() {
    let outgoing = |s: &mut Settings| s.listen = SocketAddr::from(([0, 0, 0, 0], 40_000));
    expect(&host("port-range", |_, s| outgoing(s)), Verdict::Warn, "ip_local_reserved_ports=40000");
    let reserved = host("port-range", |h, s| {
        outgoing(s);
        h.reserved_ports = vec![(39_000, 41_000)];
    });
    expect(&reserved, Verdict::Ok, "");
}

#[test]
fn queues_of_the_kernel_are_long_enough() {
    expect(&host("accept-queue", |h, _| h.backlog = Some(128)), Verdict::Warn, "somaxconn=4096");
    expect(&host("conntrack", |h, _| h.tracked = Some(199_999)), Verdict::Warn, "nf_conntrack_max=400000");
    expect(&host("conntrack", |h, _| h.tracked = Some(200_000)), Verdict::Ok, "");
}

/// A server on which nothing is wrong.
fn good_server() -> Server {
    let texts = |pairs: &[(&str, &str)]| pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    let info: BTreeMap<_, _> = texts(&[
        ("redis_version", "7.2.4"),
        ("cluster_enabled", "0"),
        ("maxmemory", "1073741824"),
        ("maxmemory_policy", "noeviction"),
        ("aof_enabled", "1"),
        ("role", "master"),
        ("master_repl_offset", "5000000"),
        ("slave0", "ip=10.0.0.2,port=6379,state=online,offset=4999990,lag=1"),
        ("slave_expires_tracked_keys", "0"),
    ]);
    let limit = "normal 0 0 0 slave 268435456 67108864 60 pubsub 134217728 33554432 60";
    Server {
        info,
        config: texts(&[("client-output-buffer-limit", limit), ("appendfsync", "everysec"), ("save", "")]),
        pings: vec![Duration::from_micros(100); 20],
        function: Ok(true),
        publishes: Ok(vec![Duration::from_micros(200); 10]),
    }
}

fn server(name: &str, change: impl FnOnce(&mut Server)) -> Finding {
    let mut server = good_server();
    change(&mut server);
    let findings = redis::judge("redis://u:secret@h:1", &Ok(server));
    findings.into_iter().find(|finding| finding.name == name).expect("there is such a check")
}

fn with_info(name: &str, pairs: &[(&str, &str)]) -> Finding {
    server(name, |s| s.info.extend(pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))))
}

#[test]
fn a_good_server_has_nothing_to_mend() {
    for finding in redis::judge("redis://u:secret@h:1", &Ok(good_server())) {
        expect(&finding, Verdict::Ok, "");
        assert!(!finding.seen.contains("secret"), "{finding:?}");
    }
    assert_eq!(redis::embedded().verdict, Verdict::Ok);
}

#[test]
fn a_server_that_is_not_there_fails_alone() {
    let findings = redis::judge("redis://u:secret@h:1", &Err("Connection refused".into()));
    let [only] = &findings[..] else { panic!("{findings:?}") };
    expect(only, Verdict::Fail, "start it");
    assert!(only.seen.contains("refused") && !only.seen.contains("secret"), "{only:?}");
}

#[test]
fn versions_and_forms_of_servers() {
    expect(&with_info("redis-version", &[("redis_version", "6.0.16")]), Verdict::Fail, "upgrade");
    expect(&with_info("redis-version", &[("redis_version", "6.2.0")]), Verdict::Warn, "upgrade");
    expect(&with_info("redis-version", &[("redis_version", "?")]), Verdict::Warn, "compatible");
    assert!(with_info("redis-version", &[("valkey_version", "8.1.0")]).seen.contains("Valkey 8.1.0"));
    expect(&with_info("redis-cluster", &[("cluster_enabled", "1")]), Verdict::Fail, "cluster-enabled no");
    expect(&server("redis-functions", |s| s.function = Ok(false)), Verdict::Warn, "+fcall");
    expect(&server("redis-functions", |s| s.function = Err("NOPERM".into())), Verdict::Fail, "ACL SETUSER");
    let old = server("redis-functions", |s| {
        s.function = Ok(false);
        s.info.insert("redis_version".into(), "6.2.0".into());
    });
    expect(&old, Verdict::Ok, "");
}

#[test]
fn slow_servers_are_named() {
    let slow = || vec![Duration::from_millis(20); 20];
    expect(&server("redis-round-trip", |s| s.pings = slow()), Verdict::Warn, "same zone");
    expect(&server("redis-publish", |s| s.publishes = Ok(slow())), Verdict::Warn, "SLOWLOG");
    expect(&server("redis-publish", |s| s.publishes = Err("READONLY".into())), Verdict::Fail, "replica");
    expect(&server("redis-round-trip", |s| s.pings.clear()), Verdict::Warn, "");
}

#[test]
fn what_a_server_may_throw_away() {
    for policy in ["allkeys-lru", "volatile-ttl"] {
        expect(&with_info("redis-eviction", &[("maxmemory_policy", policy)]), Verdict::Warn, "noeviction");
        let unbounded = with_info("redis-eviction", &[("maxmemory_policy", policy), ("maxmemory", "0")]);
        expect(&unbounded, Verdict::Ok, "");
    }
    let limit = |text: &'static str| {
        server("redis-output-buffer", move |s| {
            s.config.insert("client-output-buffer-limit".into(), text.into());
        })
    };
    expect(&limit("normal 0 0 0 pubsub 33554432 8388608 60"), Verdict::Warn, "client-output-buffer-limit");
    expect(&limit("pubsub 0 0 0"), Verdict::Warn, "pubsub");
    expect(&limit("pubsub 0 33554432 60"), Verdict::Ok, "");
    expect(&server("redis-output-buffer", |s| s.config.clear()), Verdict::Warn, "");
}

#[test]
fn what_a_restart_loses_is_said() {
    let persistence = |aof: &'static str, key: &'static str, value: &'static str| {
        server("redis-persistence", move |s| {
            s.info.insert("aof_enabled".into(), aof.into());
            s.config.insert(key.into(), value.into());
        })
    };
    expect(&persistence("1", "appendfsync", "no"), Verdict::Warn, "everysec");
    expect(&persistence("1", "appendfsync", "always"), Verdict::Ok, "");
    expect(&persistence("0", "save", ""), Verdict::Warn, "appendonly yes");
    assert!(persistence("0", "save", "3600 1").seen.contains("3600 1"));
}

#[test]
fn replicas_keep_up() {
    expect(&with_info("redis-replication", &[("role", "slave")]), Verdict::Fail, "primary");
    for replica in
        ["state=online,offset=1,lag=0", "state=wait_bgsave,offset=5000000,lag=0", "state=online,offset=5000000,lag=9"]
    {
        let replica = format!("ip=10.0.0.3,port=6379,{replica}");
        let finding = with_info("redis-replication", &[("slave1", &replica)]);
        expect(&finding, Verdict::Warn, "min-replicas");
        assert!(finding.seen.contains("ip=10.0.0.3,port=6379"), "{finding:?}");
    }
    let alone = server("redis-replication", |s| {
        s.info.remove("slave0");
    });
    expect(&alone, Verdict::Ok, "");
}

#[test]
fn the_gravest_verdict_is_the_exit_code() {
    let check = Check("x", "y");
    let (ok, warn, fail) = (check.ok("1"), check.warn("2", "m"), check.fail("3", "m"));
    for (findings, code, strict) in
        [(vec![], 0, 0), (vec![ok.clone()], 0, 0), (vec![warn.clone(), ok.clone()], 0, 1), (vec![ok, fail, warn], 2, 2)]
    {
        let diagnosis = Diagnosis::new(findings);
        assert_eq!((diagnosis.exit_code(false), diagnosis.exit_code(true)), (code, strict), "{diagnosis:?}");
    }
}

#[test]
fn both_forms_say_the_same() {
    let check = Check("port", "it matters");
    let diagnosis = Diagnosis::new(vec![check.ok("free"), check.fail("taken", "free it")]);
    let text = diagnosis.to_text(false);
    assert_eq!(
        text,
        "ok    port  free\nFAIL  port  taken\n            why:  it matters\n            mend: free it\n\
         1 ok, 0 warnings, 1 failures\n"
    );
    assert!(diagnosis.to_text(true).contains("\x1b[31mFAIL\x1b[0m"));
    let json: serde_json::Value = serde_json::from_str(&diagnosis.to_json()).expect("JSON");
    assert_eq!(json["verdict"], "fail");
    assert_eq!(json["findings"][1]["mend"], "free it");
    assert_eq!(json["findings"][0]["verdict"], "ok");
}

#[test]
fn sizes_have_units() {
    for (count, text) in
        [(0, "0 B"), (1_023, "1023 B"), (1_536, "1.5 KiB"), (1 << 30, "1.0 GiB"), (u64::MAX, "16777216.0 TiB")]
    {
        assert_eq!(bytes(count), text);
    }
}
