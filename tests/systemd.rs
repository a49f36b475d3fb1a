//! The systemd units and the installation: what they promise is checked by systemd's own tools, and the node runs under the
//! system calls that the unit allows.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use seccompiler::BpfProgram;

use crate::harness::{Place, TempDir, Weir};

scenarios! {
    each_backbone: [
        node_needs_no_system_call_that_the_unit_forbids,
    ],
}

fn project(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[track_caller]
fn run(program: impl AsRef<Path>, arguments: &[&str]) -> Output {
    let program = program.as_ref();
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    output.unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

#[track_caller]
fn succeed(program: impl AsRef<Path>, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    text(&output)
}

/// The values of a key of the unit, in order.
fn unit(key: &str) -> Vec<String> {
    let unit = std::fs::read_to_string(project("systemd/weir.service")).expect("the unit is there");
    unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).map(str::to_owned).collect()
}

/// A machine's root directory with weir installed. Another program stands for weir where it is not run.
fn install(root: &Path, more: &[&str]) -> String {
    let root = root.display().to_string();
    let arguments = ["--root", &root, "--binary", "/bin/true"];
    succeed(project("systemd/install.sh"), &[&arguments[..], more].concat())
}

fn uninstall(root: &Path, more: &[&str]) -> String {
    let root = root.display().to_string();
    succeed(project("systemd/install.sh"), &[&["--uninstall", "--root", &root][..], more].concat())
}

/// Every path below a directory, relative to it.
fn tree(root: &Path) -> BTreeSet<PathBuf> {
    fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).expect("list a directory").flatten() {
            found.push(entry.path());
            if entry.file_type().expect("its type").is_dir() {
                walk(&entry.path(), found);
            }
        }
    }
    let mut found = Vec::new();
    walk(root, &mut found);
    found.into_iter().map(|path| path.strip_prefix(root).expect("below the root").to_owned()).collect()
}

#[test]
fn units_as_installed_are_what_systemd_accepts() {
    for prefix in ["/usr/local", "/usr"] {
        let root = TempDir::new();
        install(root.path(), &["--prefix", prefix]);
        // The units of the system that weir's refer to, and the program of ExecReload.
        std::fs::create_dir_all(root.path().join("usr/lib/systemd")).expect("a directory");
        let system = root.path().join("usr/lib/systemd/").display().to_string();
        succeed("/bin/cp", &["-a", "/usr/lib/systemd/system", &system]);
        std::fs::create_dir_all(root.path().join("bin")).expect("a directory");
        std::fs::copy("/bin/true", root.path().join("bin/kill")).expect("a program");
        let root = format!("--root={}", root.path().display());
        let said = succeed("systemd-analyze", &["verify", "--man=no", &root, "weir.service", "weir.socket"]);
        assert_eq!(said, "", "nothing to complain of");
    }
}

#[test]
fn unit_is_as_closed_as_promised() {
    let unit = project("systemd/weir.service").display().to_string();
    let said = succeed("systemd-analyze", &["security", "--offline=true", "--no-pager", &unit]);
    let exposure = said.lines().find_map(|line| line.split("Overall exposure level for weir.service: ").nth(1));
    let exposure: f64 =
        exposure.and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("{said}"));
    assert!(exposure <= 2.0, "{exposure}:\n{said}");
}

#[test]
fn unit_waits_for_the_end_of_a_drain() {
    let weir = succeed(env!("CARGO_BIN_EXE_weir"), &["check", "--set", "log.format=text"]);
    let table = weir.split("\n[drain]\n").nth(1).unwrap_or_default().split("\n[").next().unwrap_or_default();
    let seconds = |line: &str| {
        let value = line.split(" = ").nth(1)?.trim_matches('"');
        let (number, unit) = value.split_at(value.find(|letter: char| !letter.is_ascii_digit())?);
        Some(number.parse::<u64>().ok()? * if unit == "m" { 60 } else { 1 })
    };
    let drain: u64 = table.lines().filter_map(seconds).sum();
    let patience: u64 = unit("TimeoutStopSec")[0].parse().expect("seconds");
    assert!(patience > drain + weir::limits::STOP_MILLIS / 1_000, "{drain} s of {patience} s");
}

/// The names of the system calls that the unit allows.
fn allowed() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for word in unit("SystemCallFilter").iter().flat_map(|line| line.split_whitespace()) {
        if word.starts_with('@') {
            let group = succeed("systemd-analyze", &["syscall-filter", "--no-pager", word]);
            let lines = group.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', '@']));
            names.extend(lines.map(str::to_owned));
        } else {
            names.insert(word.to_owned());
        }
    }
    names
}

/// A filter that kills the process at the first system call that the unit does not allow. The unit itself has such a call fail,
/// which a test might not notice.
fn filter() -> BpfProgram {
    let architecture: seccompiler::TargetArch = std::env::consts::ARCH.try_into().expect("one that seccomp knows");
    let compile = |names: &[&String]| {
        let calls: Vec<_> = names.iter().map(|name| serde_json::json!({ "syscall": name })).collect();
        let filter = serde_json::json!({ "main": {
            "mismatch_action": "kill_process", "match_action": "allow", "filter": calls,
        }});
        seccompiler::compile_from_json(filter.to_string().as_bytes(), architecture).ok()?.remove("main")
    };
    let allowed = allowed();
    // A name that only other architectures have means nothing here, as for systemd.
    let known: Vec<_> = allowed.iter().filter(|name| compile(&[name]).is_some()).collect();
    for needed in ["io_uring_setup", "io_uring_enter", "io_uring_register", "epoll_pwait", "clone3", "execve"] {
        assert!(known.iter().any(|name| *name == needed), "{needed} is allowed, and known by that name");
    }
    compile(&known).expect("each compiles alone")
}

fn node_needs_no_system_call_that_the_unit_forbids(place: &Place) {
    let mut command = Weir::command(place.driver).seccomp(filter());
    if let Some(redis) = &place.redis {
        // By name, so that it has to be resolved.
        command = command.flags(&["--redis", &redis.url().replace("127.0.0.1", "localhost")]);
    }
    let mut weir = command.start();
    let mut stream = weir.sse(&["news"]);
    let mut client = weir.centrifugo();
    client.subscribe("news");
    let position = weir.publish("news", "1");
    assert_eq!(stream.next().data, "1");
    assert_eq!(client.next_data(1), [1]);
    let poll = weir.get(&format!("/poll?channel=news&cursor={}&wait=1", position.cursor));
    assert_eq!(poll.status, 200, "{poll:?}");
    // The next process starts under the same filter, and the connections come from the one before.
    weir.upgrade();
    weir.publish("news", "2");
    assert_eq!(stream.next().data, "2");
    assert_eq!(client.next_data(1), [2]);
    assert!(weir.metrics().sum("weir_connections", "") >= 2.0);
    weir.signal(libc::SIGTERM);
    stream.read_to_end();
}

#[test]
fn filter_forbids_what_an_intruder_wants() {
    let allowed = allowed();
    for forbidden in [
        "ptrace",
        "process_vm_readv",
        "bpf",
        "mount",
        "unshare",
        "setns",
        "init_module",
        "kexec_load",
        "keyctl",
        "mlock",
        "mlock2",
        "mlockall",
    ] {
        assert!(!allowed.contains(forbidden), "{forbidden}");
    }
    assert_eq!(unit("SystemCallErrorNumber"), ["EPERM"]);
    let killed = Weir::command(crate::harness::Driver::Epoll).seccomp(filter());
    let status = killed.launched_by(&["/usr/bin/unshare", "--net"]).run_to_end();
    assert_eq!(status.signal(), Some(libc::SIGSYS), "the filter of these tests has teeth");
}

#[test]
fn removal_leaves_nothing() {
    let root = TempDir::new();
    install(root.path(), &[]);
    let first = tree(root.path());
    for file in [
        "usr/local/bin/weir",
        "usr/local/lib/systemd/system/weir.service",
        "usr/local/lib/systemd/system/weir.socket",
        "usr/local/lib/sysusers.d/weir.conf",
        "usr/local/lib/tmpfiles.d/weir.conf",
        "usr/local/lib/sysctl.d/60-weir.conf",
        "etc/weir/weir.toml",
    ] {
        assert!(first.contains(Path::new(file)), "{file}: {first:?}");
    }
    install(root.path(), &[]);
    assert_eq!(tree(root.path()), first, "a second installation adds nothing");
    uninstall(root.path(), &[]);
    assert_eq!(tree(root.path()), BTreeSet::new());
}

#[test]
fn removal_leaves_what_belongs_to_others() {
    let root = TempDir::new();
    std::fs::create_dir_all(root.path().join("usr/local/bin")).expect("a directory");
    std::fs::write(root.path().join("usr/local/bin/other"), "").expect("a file");
    let before = tree(root.path());
    install(root.path(), &[]);
    // Somebody else begins to use a directory that the installation made.
    std::fs::write(root.path().join("usr/local/lib/sysctl.d/99-other.conf"), "").expect("a file");
    uninstall(root.path(), &[]);
    let mut expected = before;
    expected
        .extend(["usr/local/lib", "usr/local/lib/sysctl.d", "usr/local/lib/sysctl.d/99-other.conf"].map(PathBuf::from));
    assert_eq!(tree(root.path()), expected);
}

#[test]
fn changed_configuration_survives_installation_and_removal() {
    let root = TempDir::new();
    let configuration = root.path().join("etc/weir/weir.toml");
    install(root.path(), &[]);
    let installed = std::fs::read_to_string(&configuration).expect("it is installed");
    succeed(env!("CARGO_BIN_EXE_weir"), &["check", &configuration.display().to_string()]);
    let set = |line: &&str| !line.is_empty() && !line.starts_with(['#', '[']);
    assert_eq!(installed.lines().find(set), None, "nothing is set, so that defaults may change with a version");
    std::fs::write(&configuration, "shards = 3\n").expect("it is changed");
    install(root.path(), &[]);
    let said = uninstall(root.path(), &[]);
    assert!(said.contains("kept /etc/weir/weir.toml"), "{said}");
    assert_eq!(std::fs::read_to_string(&configuration).expect("it is there"), "shards = 3\n");
    install(root.path(), &[]);
    assert_eq!(std::fs::read_to_string(&configuration).expect("it is there"), "shards = 3\n");
    uninstall(root.path(), &["--purge"]);
    assert!(!root.path().join("usr/local/bin/weir").exists());
}

#[test]
fn dry_run_changes_nothing() {
    let root = TempDir::new();
    let said = install(root.path(), &["--dry-run"]);
    assert!(said.contains("weir.service") && !said.contains("installed"), "{said}");
    assert_eq!(tree(root.path()), BTreeSet::new());
    install(root.path(), &[]);
    let before = tree(root.path());
    let said = uninstall(root.path(), &["--dry-run"]);
    assert!(said.contains("would run: rm") && !said.contains("removed"), "{said}");
    assert_eq!(tree(root.path()), before);
}

#[test]
fn the_user_is_made_by_systemd() {
    let root = TempDir::new();
    install(root.path(), &[]);
    let file = root.path().join("usr/local/lib/sysusers.d/weir.conf").display().to_string();
    succeed("systemd-sysusers", &[&format!("--root={}", root.path().display()), &file]);
    let users = std::fs::read_to_string(root.path().join("etc/passwd")).expect("users were made");
    let weir = users.lines().find(|line| line.starts_with("weir:")).unwrap_or_else(|| panic!("{users}"));
    assert!(weir.ends_with("/nologin"), "{weir}");
    assert_eq!([unit("User"), unit("Group")], [["weir"], ["weir"]]);
}

#[test]
fn wrong_arguments_are_refused_by_name() {
    for (arguments, named) in [
        (&["--prefix", "usr"][..], "--prefix is usr"),
        (&["--rot", "/"], "unknown argument --rot"),
        (&["--root", "/nonexistent"], "/nonexistent"),
        (&["--root", "/tmp", "--binary", "/nonexistent"], "no program at /nonexistent"),
        (&["--root", "/tmp", "--prefix", "/nonexistent", "--uninstall"], "nothing is installed"),
    ] {
        let output = run(project("systemd/install.sh"), arguments);
        assert!(!output.status.success() && text(&output).contains(named), "{arguments:?}: {}", text(&output));
    }
}
