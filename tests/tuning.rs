//! The knobs of `tuning/`: applied, shown and reverted on a root directory made for it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::harness::{Persistence, Redis, TempDir};

fn project(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

/// What the files below the root say: path, content before.
const MACHINE: [(&str, &str); 12] = [
    ("proc/sys/fs/nr_open", "1048576"),
    ("proc/sys/net/core/somaxconn", "4096"),
    ("proc/sys/net/ipv4/tcp_max_syn_backlog", "32768"),
    ("proc/sys/net/ipv4/tcp_rmem", "4096\t131072\t33554432"),
    ("proc/sys/net/ipv4/tcp_wmem", "4096\t16384\t4194304"),
    ("proc/sys/net/ipv4/tcp_mem", "287901\t383869\t575802"),
    ("proc/sys/net/ipv4/ip_local_port_range", "32768\t60999"),
    ("proc/sys/net/core/busy_poll", "50"),
    ("proc/sys/net/core/busy_read", "0"),
    ("sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never"),
    ("proc/meminfo", "MemTotal:       24683724 kB"),
    ("proc/sys/kernel/io_uring_disabled", "2"),
];

/// A root directory with the files of a kernel.
struct Machine(TempDir);

impl Machine {
    fn new() -> Self {
        let machine = Self(TempDir::new());
        for (path, content) in MACHINE {
            machine.put(path, content);
        }
        machine
    }

    fn put(&self, path: &str, content: &str) {
        let path = self.0.path().join(path);
        std::fs::create_dir_all(path.parent().expect("it has one")).expect("make a directory");
        std::fs::write(path, format!("{content}\n")).expect("write a file");
    }

    fn get(&self, path: &str) -> String {
        std::fs::read_to_string(self.0.path().join(path)).expect("it is there").trim_end().to_owned()
    }

    fn has(&self, path: &str) -> bool {
        self.0.path().join(path).exists()
    }

    fn run(&self, arguments: &[&str]) -> Output {
        apply(&[arguments, &["--root", &self.0.path().display().to_string()]].concat())
    }

    #[track_caller]
    fn succeed(&self, arguments: &[&str]) -> String {
        succeeded(&self.run(arguments))
    }

    fn contents(&self) -> Vec<String> {
        MACHINE.iter().map(|(path, _)| self.get(path)).collect()
    }
}

fn apply(arguments: &[&str]) -> Output {
    Command::new(project("tuning/apply")).args(arguments).stdin(Stdio::null()).output().expect("run it")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[track_caller]
fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", text(output));
    text(output)
}

/// Numbers separated by whatever the kernel or the file separates them with.
fn numbers(text: &str) -> Vec<u64> {
    text.split_whitespace().map(|word| word.parse().unwrap_or_else(|_| panic!("no number in {text:?}"))).collect()
}

#[test]
fn what_is_applied_is_reverted_exactly() {
    let machine = Machine::new();
    let before = machine.contents();
    machine.succeed(&["apply"]);
    assert_eq!(machine.get("proc/sys/net/core/somaxconn"), "16384");
    assert_eq!(machine.get("proc/sys/net/ipv4/tcp_wmem"), "4096 16384 262144");
    assert_eq!(machine.get("proc/sys/net/core/busy_poll"), "0");
    assert_eq!(machine.get("proc/sys/kernel/io_uring_disabled"), "0");
    assert_eq!(machine.get("sys/kernel/mm/transparent_hugepage/enabled"), "madvise");
    let said = machine.succeed(&["status"]);
    assert!(said.lines().all(|line| line.starts_with("ok ") || line.starts_with("applied before")), "{said}");
    // A second time, for more connections: what was there before the first is what counts.
    machine.succeed(&["apply", "--connections", "300000"]);
    assert_eq!(machine.get("proc/sys/net/ipv4/tcp_mem"), "600000 800000 1200000");
    machine.succeed(&["revert"]);
    let normal = |text: &String| text.replace('\t', " ").replace("[always] madvise never", "always");
    assert_eq!(
        machine.contents().iter().map(normal).collect::<Vec<_>>(),
        before.iter().map(normal).collect::<Vec<_>>()
    );
    assert!(!machine.has("var/lib/weir"), "nothing is left to revert");
    assert!(machine.succeed(&["revert"]).contains("nothing to revert"));
}

#[test]
fn dry_run_says_everything_and_changes_nothing() {
    let machine = Machine::new();
    let before = machine.contents();
    let said = machine.succeed(&["apply", "--dry-run"]);
    assert!(said.contains("would set net.core.somaxconn = 16384 (now 4096)"), "{said}");
    assert!(said.contains("would set /sys/kernel/mm/transparent_hugepage/enabled = madvise (now always)"), "{said}");
    assert_eq!(machine.contents(), before);
    assert!(!machine.has("var"));
    machine.succeed(&["apply"]);
    let applied = machine.contents();
    let said = machine.succeed(&["revert", "--dry-run"]);
    assert!(said.contains("would restore /proc/sys/net/core/somaxconn = 4096"), "{said}");
    assert_eq!(machine.contents(), applied);
    assert!(machine.has("var/lib/weir/tuning.state"));
}

#[test]
fn limits_that_are_higher_are_not_lowered() {
    let machine = Machine::new();
    let said = machine.succeed(&["apply", "--connections", "1000"]);
    assert!(said.contains("kept net.ipv4.tcp_max_syn_backlog = 32768"), "{said}");
    assert!(said.contains("kept net.ipv4.tcp_mem = 287901 383869 575802"), "{said}");
    assert_eq!(machine.get("proc/sys/net/ipv4/tcp_max_syn_backlog"), "32768");
    let file = machine.succeed(&["print", "--connections", "1000"]);
    assert!(!file.contains("\n-net.ipv4.tcp_mem") && file.contains("\n# net.ipv4.tcp_mem: "), "nor by a file: {file}");
}

#[test]
fn values_follow_the_number_of_connections() {
    let machine = Machine::new();
    let said = machine.succeed(&["apply", "--connections", "2000000"]);
    assert_eq!(machine.get("proc/sys/fs/nr_open"), "2202048");
    assert_eq!(machine.get("proc/sys/net/ipv4/tcp_mem"), "4000000 5333333 8000000");
    assert!(said.contains("warning: buffers of 2000000 connections may take 31250 MiB"), "{said}");
    let file = machine.succeed(&["print", "--connections", "3000000"]);
    assert!(file.contains("\n-fs.nr_open = 3302048\n"), "{file}");
}

#[test]
fn one_knob_alone_and_what_the_kernel_lacks() {
    let machine = Machine::new();
    std::fs::remove_file(machine.0.path().join("proc/sys/kernel/io_uring_disabled")).expect("it was made");
    let said = machine.succeed(&["apply", "--only", "85-io-uring", "--only", "20-backlog"]);
    assert!(said.contains("skipped kernel.io_uring_disabled: this kernel has no"), "{said}");
    assert!(said.contains("set net.core.somaxconn") && !said.contains("tcp_mem"), "{said}");
}

#[test]
fn a_value_that_is_refused_ends_it_and_what_was_done_is_reverted() {
    let machine = Machine::new();
    // A directory in place of the file: it can be neither read nor written, by root either.
    let path = machine.0.path().join("proc/sys/net/ipv4/tcp_wmem");
    std::fs::remove_file(&path).expect("it was made");
    std::fs::create_dir(&path).expect("a directory");
    let output = machine.run(&["apply"]);
    assert!(!output.status.success(), "{}", text(&output));
    assert_eq!(machine.get("proc/sys/net/core/somaxconn"), "16384");
    std::fs::remove_dir(&path).expect("it was made");
    machine.put("proc/sys/net/ipv4/tcp_wmem", "4096 16384 4194304");
    machine.succeed(&["revert"]);
    assert_eq!(machine.get("proc/sys/net/core/somaxconn"), "4096");
}

#[test]
fn an_interface_is_steered_by_its_queues() {
    let machine = Machine::new();
    for core in 0..4 {
        machine.put(&format!("sys/devices/system/cpu/cpu{core}/online"), "1");
    }
    // One queue for four cores: the work is spread behind the interrupt.
    machine.put("sys/class/net/one0/queues/rx-0/rps_cpus", "0");
    machine.put("sys/class/net/one0/queues/tx-0/xps_cpus", "0");
    // A queue a core: an interrupt and a transmit queue each.
    for queue in 0..4 {
        machine.put(&format!("sys/class/net/many0/queues/rx-{queue}/rps_cpus"), "f");
        machine.put(&format!("sys/class/net/many0/queues/tx-{queue}/xps_cpus"), "0");
        let interrupt = 40 + queue;
        machine.put(&format!("sys/class/net/many0/device/msi_irqs/{interrupt}"), "msix");
        machine.put(&format!("proc/irq/{interrupt}/smp_affinity_list"), "0-3");
    }
    machine.succeed(&["apply", "--nic", "one0"]);
    assert_eq!(machine.get("sys/class/net/one0/queues/rx-0/rps_cpus"), "0000000f");
    assert_eq!(machine.get("sys/class/net/one0/queues/tx-0/xps_cpus"), "0", "there is nothing to choose");
    machine.succeed(&["apply", "--nic", "many0"]);
    for queue in 0..4 {
        assert_eq!(machine.get(&format!("sys/class/net/many0/queues/rx-{queue}/rps_cpus")), "0");
        let mask = format!("{:08x}", 1 << queue);
        assert_eq!(machine.get(&format!("sys/class/net/many0/queues/tx-{queue}/xps_cpus")), mask);
        assert_eq!(machine.get(&format!("proc/irq/{}/smp_affinity_list", 40 + queue)), queue.to_string());
    }
    // The kernel pads with as many zeros as it has cores.
    machine.put("sys/class/net/one0/queues/rx-0/rps_cpus", "f");
    assert!(machine.succeed(&["status", "--nic", "one0"]).contains("ok    one0 rx-0 rps_cpus = f"));
    machine.succeed(&["revert"]);
    assert_eq!(machine.get("sys/class/net/many0/queues/rx-3/rps_cpus"), "f");
    assert_eq!(machine.get("proc/irq/43/smp_affinity_list"), "0-3");
}

#[test]
fn buffer_limit_of_a_real_redis_is_set_and_restored() {
    let redis = Redis::start(Persistence::None);
    let limit = || redis.cli(&["config", "get", "client-output-buffer-limit"]);
    let machine = Machine::new();
    let before = limit();
    assert!(before.contains("pubsub 33554432 8388608 60"), "the default: {before}");
    machine.succeed(&["apply", "--only", "20-backlog", "--redis", &redis.url(), "--dry-run"]);
    assert_eq!(limit(), before);
    machine.succeed(&["apply", "--only", "20-backlog", "--redis", &redis.url()]);
    assert!(limit().contains("pubsub 268435456 67108864 60"), "{}", limit());
    machine.succeed(&["revert"]);
    assert_eq!(limit(), before);
}

#[test]
fn every_knob_says_what_why_how_to_see_and_how_to_undo() {
    let mut count = 0;
    for entry in std::fs::read_dir(project("tuning")).expect("list the knobs").flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == "apply" {
            continue;
        }
        count += 1;
        let text = std::fs::read_to_string(&path).expect("read a knob");
        for part in ["What", "Why", "See", "Undo"] {
            let (comment, paragraph) = (format!("# {part}"), format!("**{part}"));
            assert!(
                text.lines().any(|line| line.starts_with(&comment) || line.starts_with(&paragraph)),
                "{name}: {part}"
            );
        }
        assert!(
            text.contains("Source") || text.contains("Documentation/") || name == "90-redis.md",
            "{name}: says from where"
        );
    }
    assert!(count >= 10, "{count}");
}

#[test]
fn files_hold_what_is_computed_for_the_default_and_this_kernel_knows_the_keys() {
    let file = succeeded(&apply(&["print", "--root", "/nonexistent"]));
    for entry in std::fs::read_dir(project("tuning")).expect("list the knobs").flatten() {
        if entry.path().extension().is_none_or(|extension| extension != "conf") {
            continue;
        }
        let text = std::fs::read_to_string(entry.path()).expect("read a knob");
        for (key, value) in text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(" = "))
        {
            assert!(file.contains(&format!("\n-{key} = {value}\n")), "{key} = {value} is not in:\n{file}");
            let path = Path::new("/proc/sys").join(key.replace('.', "/"));
            // This one came with Linux 6.6; the others are older than what weir needs.
            if path.exists() || key != "kernel.io_uring_disabled" {
                let now = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                assert_eq!(numbers(&now).len(), numbers(value).len(), "{key}: {now:?} and {value:?}");
            }
        }
    }
}

#[test]
fn wrong_arguments_are_refused_by_name() {
    for (arguments, named) in [
        (&[][..], "allowed: apply, revert, status, print"),
        (&["aply"], "allowed: apply, revert, status, print"),
        (&["apply", "--conections", "5"], "unknown argument --conections"),
        (&["apply", "--connections", "many"], "--connections is many; allowed"),
        (&["apply", "--connections"], "--connections needs a value"),
        (&["apply", "--only", "nothing"], "--only is nothing; allowed: 10-descriptors"),
        (&["apply", "--dry-run", "--nic", "absent0"], "there is no /sys/class/net/absent0/queues"),
        (&["apply", "--dry-run", "--nic", "../x"], "no interface's name"),
    ] {
        let output = apply(arguments);
        assert!(!output.status.success() && text(&output).contains(named), "{arguments:?}: {}", text(&output));
    }
}
