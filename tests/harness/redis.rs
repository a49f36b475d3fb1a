//! A Redis of a scenario's own.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use super::{TempDir, die_with_parent, eventually, free_port};

/// What survives a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Persistence {
    /// Nothing.
    None,
    /// Every write that was answered.
    AppendOnly,
}

/// A running `redis-server` on a free port and a Unix socket, in a directory of its own; killed when dropped.
pub struct Redis {
    directory: TempDir,
    persistence: Persistence,
    port: u16,
    child: Option<Child>,
}

impl Redis {
    /// Starts one.
    #[track_caller]
    pub fn start(persistence: Persistence) -> Self {
        let mut redis = Self::stopped(persistence);
        redis.run();
        redis
    }

    /// Reserves a place for one that is started later by [`Redis::run`].
    pub fn stopped(persistence: Persistence) -> Self {
        Self { directory: TempDir::new(), persistence, port: free_port(), child: None }
    }

    /// Starts the process, on the same port, socket and directory each time, and waits until it answers.
    #[track_caller]
    pub fn run(&mut self) {
        assert!(self.child.is_none(), "already running");
        let append_only = if self.persistence == Persistence::AppendOnly { "yes" } else { "no" };
        let mut command = Command::new("redis-server");
        command.current_dir(self.directory.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.args(["--port", &self.port.to_string(), "--bind", "127.0.0.1", "--unixsocket", &self.socket()]);
        command.args(["--dir", &self.directory.path().display().to_string(), "--save", ""]);
        command.args(["--appendonly", append_only, "--appendfsync", "always", "--daemonize", "no"]);
        // A replica that attaches is served at once; by default others are waited for.
        command.args(["--repl-diskless-sync-delay", "0"]);
        die_with_parent(&mut command);
        self.child = Some(command.spawn().expect("start redis-server (tests/run.sh installs it)"));
        eventually("redis-server answers", || self.try_cli(&["PING"]).filter(|reply| reply == "PONG"));
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// The URL of its port.
    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// The URL of its Unix socket.
    pub fn unix_url(&self) -> String {
        format!("unix://{}", self.socket())
    }

    fn socket(&self) -> String {
        self.directory.path().join("redis.sock").display().to_string()
    }

    /// Runs one command through `redis-cli` and returns the raw reply.
    #[track_caller]
    pub fn cli(&self, arguments: &[&str]) -> String {
        self.try_cli(arguments).unwrap_or_else(|| panic!("redis-cli {arguments:?} failed"))
    }

    /// As [`Redis::cli`]; none when the server does not answer or answers with an error.
    pub fn try_cli(&self, arguments: &[&str]) -> Option<String> {
        let output = Command::new("redis-cli").args(["-s", &self.socket(), "-e", "--raw"]).args(arguments).output();
        let output = output.expect("run redis-cli (tests/run.sh installs it)");
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    }

    /// Runs many commands through one `redis-cli`.
    #[track_caller]
    pub fn cli_lines(&self, lines: &[String]) {
        let mut child = Command::new("redis-cli")
            .args(["-s", &self.socket(), "-e"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("run redis-cli (tests/run.sh installs it)");
        let mut input = child.stdin.take().expect("piped");
        let text = lines.join("\n") + "\n";
        // From a thread of its own: redis-cli answers each line, and both pipes could be full.
        let writer = std::thread::spawn(move || input.write_all(text.as_bytes()));
        let output = child.wait_with_output().expect("wait for redis-cli");
        writer.join().expect("the writer does not panic").expect("write to redis-cli");
        assert!(output.status.success(), "redis-cli: {}", String::from_utf8_lossy(&output.stdout));
    }

    /// Publishes as any program may: by the node's function.
    #[track_caller]
    pub fn fcall(&self, channel: &str, data: &str) -> String {
        let (meta, stream, topic) = names(channel);
        self.cli(&["FCALL", "weir_publish", "2", &meta, &stream, &topic, data])
    }

    /// [`Redis::fcall`] for many payloads without spaces or quotes.
    #[track_caller]
    pub fn fcall_all(&self, channel: &str, data: impl IntoIterator<Item = String>) {
        let (meta, stream, topic) = names(channel);
        let line = |text: String| format!("FCALL weir_publish 2 {meta} {stream} {topic} {text}");
        self.cli_lines(&data.into_iter().map(line).collect::<Vec<_>>());
    }

    /// How many connections subscribe to a channel.
    #[track_caller]
    pub fn subscribers(&self, channel: &str) -> u64 {
        let reply = self.cli(&["PUBSUB", "NUMSUB", &names(channel).2]);
        let count = reply.lines().last().and_then(|count| count.parse().ok());
        count.unwrap_or_else(|| panic!("not a count: {reply:?}"))
    }

    /// How often each command was called since the start. Those of a function or a transaction count by themselves.
    #[track_caller]
    pub fn calls(&self) -> BTreeMap<String, u64> {
        let calls = |line: &str| {
            let (name, rest) = line.trim().strip_prefix("cmdstat_")?.split_once(":calls=")?;
            Some((name.to_owned(), rest.split(',').next()?.parse().ok()?))
        };
        self.cli(&["INFO", "commandstats"]).lines().filter_map(calls).collect()
    }

    /// Makes it a replica of another and waits until it has everything.
    #[track_caller]
    pub fn follow(&self, primary: SocketAddr) {
        self.cli(&["REPLICAOF", &primary.ip().to_string(), &primary.port().to_string()]);
        eventually("the replica is in sync", || {
            self.cli(&["INFO", "replication"]).contains("master_link_status:up").then_some(())
        });
    }

    /// Waits until a replica has everything that this server has now.
    #[track_caller]
    pub fn wait_replicated(&self) {
        // WAIT answers for the writes of its own connection: without one before it, it would wait for nothing.
        self.cli_lines(&["SET weir-test:replicated 1".to_owned(), "WAIT 1 10000".to_owned()]);
    }

    /// Makes a replica a primary.
    #[track_caller]
    pub fn promote(&self) {
        self.cli(&["REPLICAOF", "NO", "ONE"]);
    }

    /// Kills it (SIGKILL).
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("running");
        child.kill().expect("kill redis-server");
        child.wait().expect("wait for redis-server");
    }

    /// Removes what it has written; only while it does not run.
    pub fn forget(&self) {
        assert!(self.child.is_none(), "still running");
        for entry in std::fs::read_dir(self.directory.path()).expect("list the directory").flatten() {
            let path = entry.path();
            let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            removed.unwrap_or_else(|error| panic!("remove {}: {error}", path.display()));
        }
    }

    /// Freezes it: connections stay open and nothing answers.
    pub fn freeze(&self) {
        self.signal(libc::SIGSTOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal(libc::SIGCONT);
    }

    fn signal(&self, signal: libc::c_int) {
        let pid = self.child.as_ref().expect("running").id();
        // SAFETY: kill takes no pointers, and the child was not waited for, so the id is still its own.
        let rc = unsafe { libc::kill(pid as libc::pid_t, signal) };
        assert_eq!(rc, 0, "signal {signal}: {}", std::io::Error::last_os_error());
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The keys and the pub/sub channel of a channel: meta, stream, topic.
pub fn names(channel: &str) -> (String, String, String) {
    (format!("weir:{{{channel}}}:meta"), format!("weir:{{{channel}}}:stream"), format!("weir:{{{channel}}}"))
}
