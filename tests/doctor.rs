//! `weir doctor` on hosts and servers with something wrong.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use serde_json::Value;

use crate::harness::{Persistence, Redis, die_with_parent, free_address};

/// What the doctor printed as JSON, and its exit code.
struct Visit {
    diagnosis: Value,
    code: i32,
}

impl Visit {
    fn finding(&self, name: &str) -> &Value {
        let findings = self.diagnosis["findings"].as_array().expect("a list of findings");
        let finding = findings.iter().find(|finding| finding["name"] == name);
        finding.unwrap_or_else(|| panic!("no finding {name}: {}", self.diagnosis))
    }

    #[track_caller]
    fn expect(&self, name: &str, verdict: &str, mend: &str) {
        let finding = self.finding(name);
        assert_eq!(finding["verdict"], verdict, "{finding}");
        assert!(finding["mend"].as_str().unwrap_or_default().contains(mend), "{finding}");
    }
}

fn command(flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
    command.arg("doctor").args(flags).stdin(Stdio::null());
    crate::harness::without_settings(&mut command);
    die_with_parent(&mut command);
    command
}

#[track_caller]
fn run(mut command: Command) -> Visit {
    let output = command.arg("--json").output().expect("run weir doctor");
    let diagnosis = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!(
            "not JSON ({error}): {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    });
    Visit { diagnosis, code: output.status.code().expect("it was not killed") }
}

#[track_caller]
fn visit(flags: &[&str]) -> Visit {
    // A connection count of one's own, and a port that nobody else takes: the verdict is not to depend on the machine.
    let listen = free_address().to_string();
    run(command(&[&["--listen", &listen, "--set", "max_connections=100"], flags].concat()))
}

#[test]
fn healthy_host_with_the_embedded_backbone_passes() {
    let visit = visit(&[]);
    assert_eq!(visit.code, 0, "{}", visit.diagnosis);
    visit.expect("listen", "ok", "");
    visit.expect("redis", "ok", "");
}

#[test]
fn port_in_use_fails() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = taken.local_addr().expect("bound").to_string();
    let visit = visit(&["--set", &format!("listen={address}")]);
    assert_eq!(visit.code, 2);
    visit.expect("listen", "fail", "ss -ltnp");
}

#[test]
fn too_few_descriptors_fail_with_the_number_needed() {
    let mut command = command(&["--listen", "127.0.0.1:0", "--driver", "epoll", "--set", "max_connections=5000"]);
    let limit = libc::rlimit { rlim_cur: 4_096, rlim_max: 4_096 };
    // SAFETY: setrlimit is async-signal-safe and reads one live rlimit.
    unsafe {
        command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let visit = run(command);
    assert_eq!(visit.code, 2);
    visit.expect("descriptors", "fail", "LimitNOFILE=7048");
}

#[test]
fn io_uring_forbidden_by_seccomp_warns_or_fails_as_configured() {
    let filter = || -> BpfProgram {
        let rules = BTreeMap::from([(libc::SYS_io_uring_setup, vec![])]);
        let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
        let architecture = std::env::consts::ARCH.try_into().expect("an architecture that seccomp knows");
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, architecture).expect("a filter");
        filter.try_into().expect("the filter compiles")
    };
    for (driver, verdict, code) in [("auto", "warn", 1), ("uring", "fail", 2), ("epoll", "ok", 0)] {
        let mut command = command(&["--listen", "127.0.0.1:0", "--driver", driver, "--set", "max_connections=100"]);
        let program = filter();
        // SAFETY: the program is made; applying it is two system calls.
        unsafe {
            command.pre_exec(move || seccompiler::apply_filter(&program).map_err(|_| std::io::Error::last_os_error()));
        }
        command.arg("--strict");
        let visit = run(command);
        visit.expect("io_uring", verdict, if verdict == "ok" { "" } else { "seccomp" });
        // Other warnings of the machine that runs the test may raise a 0 to a 1.
        assert!(visit.code == code || (code, visit.code) == (0, 1), "{driver}: {}: {}", visit.code, visit.diagnosis);
    }
}

#[test]
fn redis_that_would_lose_or_evict_is_named() {
    let redis = Redis::start(Persistence::None);
    for pair in [["maxmemory", "100mb"], ["maxmemory-policy", "allkeys-lru"]] {
        redis.cli(&["CONFIG", "SET", pair[0], pair[1]]);
    }
    redis.cli(&["CONFIG", "SET", "client-output-buffer-limit", "pubsub 1mb 512kb 10"]);
    let visit = visit(&["--redis", &redis.url()]);
    assert_eq!(visit.code, 0, "warnings alone: {}", visit.diagnosis);
    visit.expect("redis", "ok", "");
    visit.expect("redis-functions", "ok", "");
    visit.expect("redis-publish", "ok", "");
    visit.expect("redis-eviction", "warn", "noeviction");
    visit.expect("redis-output-buffer", "warn", "client-output-buffer-limit");
    visit.expect("redis-persistence", "warn", "appendonly yes");
    assert_eq!(redis.cli(&["DBSIZE"]), "0", "nothing is left behind");
}

#[test]
fn redis_replica_fails_and_its_primary_passes() {
    let primary = Redis::start(Persistence::AppendOnly);
    let replica = Redis::start(Persistence::None);
    replica.follow(primary.address());
    let visit_replica = visit(&["--redis", &replica.url()]);
    assert_eq!(visit_replica.code, 2);
    visit_replica.expect("redis-replication", "fail", "primary");
    let visit_primary = visit(&["--redis", &primary.url()]);
    assert_eq!(visit_primary.code, 0, "{}", visit_primary.diagnosis);
    visit_primary.expect("redis-persistence", "ok", "");
    assert!(visit_primary.finding("redis-replication")["seen"].as_str().is_some_and(|seen| seen.contains("replica")));
}

#[test]
fn redis_not_there_fails_without_its_password() {
    let url = format!("redis://user:hunter2@{}", free_address());
    let visit = visit(&["--redis", &url]);
    assert_eq!(visit.code, 2);
    visit.expect("redis", "fail", "start it");
    assert!(!visit.diagnosis.to_string().contains("hunter2"), "{}", visit.diagnosis);
}

#[test]
fn bad_configuration_is_an_error_of_its_own() {
    let output = command(&["--set", "shrads=2"]).output().expect("run weir doctor");
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty() && String::from_utf8_lossy(&output.stderr).contains("shards"));
}

#[test]
fn text_has_no_colours_unless_on_a_terminal() {
    let output = command(&["--listen", "127.0.0.1:0"]).output().expect("run weir doctor");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("io_uring") && text.contains("failures"), "{text}");
    assert!(!text.contains('\x1b'), "{text:?}");
}
