//! A primary, its replicas, and the sentinels that watch them.

use std::process::{Child, Command, Stdio};

use super::{Persistence, Redis, TempDir, die_with_parent, eventually, free_port};

/// What the sentinels call the group.
const NAME: &str = "main";
/// Milliseconds of silence after which a sentinel holds the primary for dead.
const DOWN_AFTER: u32 = 1_000;

/// One `redis-server --sentinel`; killed when dropped.
struct Sentinel {
    _directory: TempDir,
    port: u16,
    child: Child,
}

impl Sentinel {
    fn start(primary: u16, quorum: usize) -> Self {
        let (directory, port) = (TempDir::new(), free_port());
        // A file, because a sentinel writes down there what it learns.
        let file = directory.path().join("sentinel.conf");
        let text = format!(
            "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor {NAME} 127.0.0.1 {primary} {quorum}\n\
             sentinel down-after-milliseconds {NAME} {DOWN_AFTER}\nsentinel failover-timeout {NAME} 10000\n",
            directory.path().display()
        );
        std::fs::write(&file, text).expect("write a sentinel's configuration");
        let mut command = Command::new("redis-server");
        command.arg(&file).arg("--sentinel");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        die_with_parent(&mut command);
        let child = command.spawn().expect("start a sentinel (tests/run.sh installs redis-server)");
        Self { _directory: directory, port, child }
    }

    fn cli(&self, arguments: &[&str]) -> Option<String> {
        let output =
            Command::new("redis-cli").args(["-p", &self.port.to_string(), "-e", "--raw"]).args(arguments).output();
        let output = output.expect("run redis-cli (tests/run.sh installs it)");
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    }

    /// Whether it knows so many replicas and other sentinels.
    fn knows(&self, replicas: usize, others: usize) -> bool {
        let Some(answer) = self.cli(&["SENTINEL", "MASTER", NAME]) else { return false };
        let fields: Vec<&str> = answer.lines().collect();
        let number =
            |name: &str| fields.iter().position(|field| *field == name).and_then(|at| fields[at + 1].parse().ok());
        number("num-slaves") == Some(replicas) && number("num-other-sentinels") == Some(others)
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A primary, replicas, and three sentinels of which two have to agree.
pub struct Group {
    /// The first is the primary at first.
    pub servers: Vec<Redis>,
    sentinels: Vec<Sentinel>,
}

impl Group {
    /// Starts a primary with so many replicas, and waits until the sentinels know all of them.
    #[track_caller]
    pub fn start(replicas: usize) -> Self {
        let servers: Vec<Redis> = (0..=replicas).map(|_| Redis::start(Persistence::None)).collect();
        let primary = servers[0].address();
        servers[1..].iter().for_each(|replica| replica.follow(primary));
        let sentinels: Vec<Sentinel> = (0..3).map(|_| Sentinel::start(primary.port(), 2)).collect();
        eventually("the sentinels know each other and the replicas", || {
            sentinels.iter().all(|sentinel| sentinel.knows(replicas, 2)).then_some(())
        });
        Self { servers, sentinels }
    }

    /// How a node is told of it.
    pub fn url(&self) -> String {
        self.url_of(NAME)
    }

    /// The same for another name.
    pub fn url_of(&self, name: &str) -> String {
        let hosts: Vec<String> = self.sentinels.iter().map(|sentinel| format!("127.0.0.1:{}", sentinel.port)).collect();
        // The first does not exist: that one of several is away changes nothing.
        format!("redis+sentinel://127.0.0.1:1,{}/{name}", hosts.join(","))
    }

    /// Waits until a sentinel names another primary than the first server, and returns which.
    #[track_caller]
    pub fn wait_switched(&self) -> &Redis {
        let first = self.servers[0].address().port();
        let port: u16 = eventually("a sentinel names another primary", || {
            self.sentinels.iter().find_map(|sentinel| {
                let answer = sentinel.cli(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME])?;
                answer.lines().nth(1)?.parse().ok().filter(|port| *port != first)
            })
        });
        self.servers.iter().find(|server| server.address().port() == port).expect("one of ours")
    }

    /// Ends the sentinels (SIGKILL).
    pub fn kill_sentinels(&mut self) {
        self.sentinels.clear();
    }
}
