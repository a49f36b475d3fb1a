//! The command line: configuration errors, and the clients that come with the node.

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use crate::harness::{Driver, Persistence, Redis, TempDir, Weir, die_with_parent, eventually, free_address};

scenarios! {
    each_driver: [
        subscribe_prints_what_publish_sends,
        subscribe_comes_back_after_a_restart_and_misses_nothing,
        bench_reports_a_clean_run,
    ],
}

fn weir_command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
    command.args(arguments).stdin(Stdio::null());
    crate::harness::without_settings(&mut command);
    die_with_parent(&mut command);
    command
}

fn run(arguments: &[&str]) -> Output {
    weir_command(arguments).output().expect("run weir")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn check(configuration: &str) -> (bool, String) {
    let directory = TempDir::new();
    let file = directory.path().join("weir.toml");
    std::fs::write(&file, configuration).expect("write the configuration");
    let output = run(&["check", &file.display().to_string()]);
    (output.status.success(), text(&output))
}

#[test]
fn check_accepts_a_good_configuration_and_prints_what_is_in_force() {
    let (good, text) = check("listen = \"127.0.0.1:9999\"\n[sse]\nheartbeat = \"7s\"\n");
    assert!(good, "{text}");
    assert!(text.contains("127.0.0.1:9999") && text.contains("7s"), "{text}");
}

#[test]
fn check_names_every_error_at_once() {
    let (good, text) = check(
        "listen = \"nowhere\"\nshrads = 2\ndriver = \"kqueue\"\n[sse]\nheartbeat = \"soon\"\n[limits]\nchannels = -1\n\
         [redis]\nurl = \"http://x\"\n",
    );
    assert!(!good, "{text}");
    for part in [
        "listen",
        "nowhere",
        "shrads",
        "shards",
        "driver",
        "kqueue",
        "sse.heartbeat",
        "soon",
        "limits.channels",
        "redis.url",
    ] {
        assert!(text.contains(part), "names {part:?}: {text}");
    }
}

#[test]
fn check_refuses_relations_that_cannot_hold() {
    let (good, text) = check("[history]\nmessages = 10\n[lag]\nmessages = 100\n");
    assert!(!good, "who may lag must still be in the log: {text}");
    assert!(text.contains("lag.messages") && text.contains("history.messages"), "{text}");
}

#[test]
fn check_says_what_is_wrong_with_the_file_itself() {
    let (good, text) = check("listen = \n");
    assert!(!good && text.contains("weir.toml"), "{text}");
    let output = run(&["check", "/nonexistent/weir.toml"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(self::text(&output).contains("/nonexistent/weir.toml"), "{}", self::text(&output));
}

#[test]
fn bad_flag_and_bad_environment_are_named() {
    let (status, text) = Weir::command(Driver::Epoll).flags(&["--set", "sse.heartbaet=1s"]).run_to_refusal();
    assert!(!status.success() && text.contains("sse.heartbaet") && text.contains("sse.heartbeat"), "{text}");
    let output = weir_command(&["serve"]).env("WEIR_LISTEN", "nowhere").output().expect("run weir");
    assert!(!output.status.success() && self::text(&output).contains("WEIR_LISTEN"), "{}", self::text(&output));
}

#[test]
fn address_in_use_is_named() {
    // A listener without SO_REUSEPORT: the node cannot share it.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = taken.local_addr().expect("bound");
    let (status, text) = Weir::command(Driver::Epoll).listen(address).run_to_refusal();
    assert!(!status.success());
    assert!(text.contains(&address.to_string()) && text.to_lowercase().contains("in use"), "{text}");
}

#[test]
fn version_is_printed() {
    let output = run(&["--version"]);
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), concat!("weir ", env!("CARGO_PKG_VERSION")));
}

/// A `weir subscribe` that is running, and the lines it prints.
struct Subscriber {
    child: std::process::Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Subscriber {
    fn start(weir: &Weir, flags: &[&str]) -> Self {
        let mut command = weir_command(&["subscribe", "--url", &weir.url()]);
        let mut child = command.args(flags).stdout(Stdio::piped()).spawn().expect("run weir subscribe");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { child, lines }
    }

    #[track_caller]
    fn expect(&self, data: &str) {
        let line = self.lines.recv_timeout(crate::harness::DEADLINE);
        let line = line.unwrap_or_else(|error| panic!("{data:?} was not printed: {error}"));
        assert!(line.contains(data), "{line:?} is not {data:?}");
    }

    #[track_caller]
    fn expect_success(mut self) {
        let child = &mut self.child;
        let status = eventually("weir subscribe ends", || child.try_wait().expect("wait"));
        assert!(status.success(), "{status}");
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[track_caller]
fn wait_for_stream(weir: &Weir, protocol: &str) {
    let label = format!("protocol=\"{protocol}\"");
    eventually("the subscriber is connected", || (weir.metrics().sum("weir_subscriptions", "") >= 1.0).then_some(()));
    assert_eq!(weir.metrics().sum("weir_connections", &label), 1.0);
}

fn subscribe_prints_what_publish_sends(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    for (protocol, flags) in
        [("sse", &["--count", "3", "news"][..]), ("websocket", &["--websocket", "--count", "3", "news"])]
    {
        let subscriber = Subscriber::start(&weir, flags);
        wait_for_stream(&weir, protocol);
        for data in ["first", "{\"n\":2}", "third"] {
            let output = run(&["publish", "--url", &weir.url(), "news", data]);
            assert!(output.status.success(), "{}", text(&output));
            subscriber.expect(data);
        }
        subscriber.expect_success();
        eventually("it has left", || (weir.metrics().sum("weir_subscriptions", "") == 0.0).then_some(()));
    }
    let refused = run(&["publish", "--url", &weir.url(), "bad\nname", "x"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused).contains("control"), "{}", text(&refused));
}

fn subscribe_comes_back_after_a_restart_and_misses_nothing(driver: Driver) {
    let redis = Redis::start(Persistence::None);
    let (address, redis_url) = (free_address(), redis.url());
    let flags = ["--redis", &redis_url, "--set", "sse.retry=200ms"];
    let mut weir = Weir::command(driver).flags(&flags).listen(address).start();
    let subscriber = Subscriber::start(&weir, &["--count", "4", "news"]);
    wait_for_stream(&weir, "sse");
    weir.publish("news", "one");
    subscriber.expect("one");
    weir.kill();
    redis.fcall("news", "two");
    redis.fcall("news", "three");
    let weir = Weir::command(driver).flags(&flags).listen(address).start();
    subscriber.expect("two");
    subscriber.expect("three");
    weir.publish("news", "four");
    subscriber.expect("four");
    subscriber.expect_success();
}

fn bench_reports_a_clean_run(driver: Driver) {
    let weir = Weir::start(driver, &[]);
    for protocol in ["sse", "websocket"] {
        let output = run(&[
            "bench",
            "--url",
            &weir.url(),
            "--protocol",
            protocol,
            "--connections",
            "20",
            "--channels",
            "2",
            "--rate",
            "20",
            "--size",
            "200",
            "--warmup",
            "1",
            "--duration",
            "2",
            "--json",
        ]);
        assert!(output.status.success(), "{}", text(&output));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("not JSON ({error}): {}", text(&output)));
        let counts = &report["counts"];
        assert!(counts["deliveries"].as_u64().is_some_and(|count| count > 0), "{report}");
        for fault in ["gaps", "duplicates", "reorders", "undelivered", "misrouted", "malformed", "refused"] {
            assert_eq!(counts[fault], 0, "{report}");
        }
    }
}
