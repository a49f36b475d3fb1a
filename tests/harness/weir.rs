//! The node under test: starting, watching and stopping the real binary.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use seccompiler::BpfProgram;
use serde_json::Value;

use super::{
    Centrifugo, Connection, DEADLINE, Driver, Http, Response, Samples, Sse, die_with_parent, eventually, percent_encode,
};

/// The lines a node wrote, on both outputs.
#[derive(Default)]
struct Output {
    lines: Mutex<Vec<String>>,
    more: Condvar,
}

impl Output {
    fn collect(self: &Arc<Self>, stream: impl Read + Send + 'static) {
        let output = Arc::clone(self);
        std::thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                let mut lines = output.lines.lock().expect("no holder panics");
                lines.push(String::from_utf8_lossy(&line).into_owned());
                output.more.notify_all();
            }
        });
    }

    fn text(&self) -> String {
        self.lines.lock().expect("no holder panics").join("\n")
    }

    /// Waits until `find` gives something for a line.
    fn wait<T>(&self, patience: Duration, find: impl Fn(&str) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + patience;
        let mut lines = self.lines.lock().expect("no holder panics");
        let mut seen = 0;
        loop {
            if let Some(found) = lines[seen..].iter().find_map(|line| find(line)) {
                return Some(found);
            }
            seen = lines.len();
            let left = deadline.checked_duration_since(Instant::now())?;
            lines = self.more.wait_timeout(lines, left).expect("no holder panics").0;
        }
    }
}

impl Default for WeirCommand {
    fn default() -> Self {
        Self {
            driver: "auto",
            listen: String::new(),
            flags: Vec::new(),
            filter: None,
            program: env!("CARGO_BIN_EXE_weir").into(),
            launcher: Vec::new(),
            passed_in: Vec::new(),
            environment: Vec::new(),
            file: None,
        }
    }
}

/// A node that is about to be started.
pub struct WeirCommand {
    driver: &'static str,
    listen: String,
    flags: Vec<String>,
    filter: Option<BpfProgram>,
    program: PathBuf,
    /// A program and its arguments that start the node; none starts it directly.
    launcher: Vec<OsString>,
    passed_in: Vec<OwnedFd>,
    environment: Vec<(&'static str, PathBuf)>,
    file: Option<PathBuf>,
}

impl WeirCommand {
    /// Leaves driver and shards to a configuration file.
    pub fn configured_by(mut self, file: &Path) -> Self {
        self.file = Some(file.to_owned());
        self
    }

    /// Runs another file than the one that was built.
    pub fn program(mut self, program: &Path) -> Self {
        self.program = program.to_owned();
        self
    }

    /// Has another program start the node: it is called with these arguments, then the node's program and arguments.
    pub fn launched_by(mut self, launcher: &[&str]) -> Self {
        self.launcher = launcher.iter().map(OsString::from).collect();
        self
    }

    /// Passes descriptors in as a service manager does: from number 3 on, for the process that is named. A shell moves them
    /// there and names itself, since only after the fork the process id is known.
    pub fn activated<'a>(mut self, descriptors: impl IntoIterator<Item = BorrowedFd<'a>>) -> Self {
        let duplicate = |fd: BorrowedFd<'_>| {
            // Above all the numbers that are written to.
            // SAFETY: the descriptor is borrowed, so it is open.
            let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 100) };
            assert!(copy >= 0, "{}", std::io::Error::last_os_error());
            // SAFETY: it was just made and has no other owner.
            unsafe { OwnedFd::from_raw_fd(copy) }
        };
        self.passed_in = descriptors.into_iter().map(duplicate).collect();
        let moves = |(index, fd): (usize, &OwnedFd)| format!("{}<&{1} {1}<&- ", index + 3, fd.as_raw_fd());
        let moves: String = self.passed_in.iter().enumerate().map(moves).collect();
        let count = self.passed_in.len();
        let script = format!("export LISTEN_PID=$$ LISTEN_FDS={count}; exec \"$0\" \"$@\" {moves}");
        self.launched_by(&["/bin/bash", "-c", &script])
    }

    /// Adds a variable to its environment.
    pub fn environment(mut self, name: &'static str, value: &Path) -> Self {
        self.environment.push((name, value.to_owned()));
        self
    }

    /// Adds flags.
    pub fn flags(mut self, flags: &[&str]) -> Self {
        self.flags.extend(flags.iter().map(|&flag| flag.to_owned()));
        self
    }

    /// Listens on this address instead of a free port.
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.listen = address.to_string();
        self
    }

    /// The value of `--driver`, for tests of the choice itself.
    pub fn driver(mut self, driver: &'static str) -> Self {
        self.driver = driver;
        self
    }

    /// Runs the node under a seccomp filter.
    pub fn seccomp(mut self, filter: BpfProgram) -> Self {
        self.filter = Some(filter);
        self
    }

    /// Starts the node and waits until it is ready.
    #[track_caller]
    pub fn start(self) -> Weir {
        let weir = self.start_unready();
        weir.wait_ready();
        weir
    }

    /// Starts the node and waits until it listens.
    #[track_caller]
    pub fn start_unready(self) -> Weir {
        let (child, output) = self.spawn();
        let mut starting = Starting(Some(child));
        let address = eventually("the node logs that it is listening", || {
            let address = output.wait(Duration::from_millis(100), bound_address);
            let ended = starting.0.as_mut().expect("not taken yet").try_wait().expect("wait for the node");
            if let (None, Some(status)) = (address, ended) {
                panic!("the node ended with {status} instead of listening:\n{}", output.text());
            }
            address
        });
        let child = starting.0.take().expect("not taken yet");
        Weir { child, output, address, successor: None }
    }

    /// Runs a node that is expected to refuse to start; returns its status and what it wrote.
    #[track_caller]
    pub fn run_to_refusal(self) -> (ExitStatus, String) {
        let (child, output) = self.spawn();
        let mut starting = Starting(Some(child));
        let status = eventually("the node refuses to start", || {
            starting.0.as_mut().expect("not taken").try_wait().expect("wait for the node")
        });
        // The pipes end with the process; their readers may need a moment more.
        let mut text = output.text();
        eventually("the output is complete", || {
            let previous = std::mem::replace(&mut text, output.text());
            (previous == text && !text.is_empty()).then_some(())
        });
        (status, text)
    }

    /// Runs to the end a launcher that does not come as far as to start the node; returns its status.
    pub fn run_to_end(self) -> ExitStatus {
        let mut starting = Starting(Some(self.spawn().0));
        eventually("the launcher ends", || starting.0.as_mut().expect("not taken").try_wait().expect("wait for it"))
    }

    fn spawn(self) -> (Child, Arc<Output>) {
        let mut launcher = self.launcher.iter();
        let mut command = Command::new(launcher.next().map_or(self.program.as_os_str(), OsString::as_os_str));
        if !self.launcher.is_empty() {
            command.args(launcher).arg(&self.program);
        }
        let passed_in: Vec<_> = self.passed_in.iter().map(AsRawFd::as_raw_fd).collect();
        // SAFETY: clears a flag of descriptors that are open, and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                let cleared = passed_in.iter().all(|fd| libc::fcntl(*fd, libc::F_SETFD, 0) == 0);
                if cleared { Ok(()) } else { Err(std::io::Error::last_os_error()) }
            });
        }
        command.args(["serve", "--listen", &self.listen, "--log-format", "json"]);
        // A test that stops a node rarely wants to wait until its clients were spread over a minute.
        command.args(["--set=drain.unready=0s", "--set=drain.window=0s"]);
        match &self.file {
            Some(file) => command.arg("--config").arg(file),
            None => command.args(["--driver", self.driver, "--shards", "2"]),
        };
        command.args(&self.flags);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        without_settings(&mut command);
        command.envs(self.environment);
        die_with_parent(&mut command);
        if let Some(filter) = self.filter {
            // SAFETY: applying a filter makes two system calls and allocates nothing.
            unsafe {
                command
                    .pre_exec(move || seccompiler::apply_filter(&filter).map_err(|_| std::io::Error::last_os_error()));
            }
        }
        let mut child = command.spawn().expect("start the node");
        let output = Arc::new(Output::default());
        output.collect(child.stdout.take().expect("piped"));
        output.collect(child.stderr.take().expect("piped"));
        (child, output)
    }
}

/// Kills a child whose start failed.
struct Starting(Option<Child>);

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Removes the node's settings from a child's environment: a developer's own must not change a test.
pub fn without_settings(command: &mut Command) {
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("WEIR_")) {
        command.env_remove(name);
    }
}

fn bound_address(line: &str) -> Option<SocketAddr> {
    let value: Value = serde_json::from_str(line).ok()?;
    let fields = value.get("fields").unwrap_or(&value);
    (fields["message"] == "listening").then(|| fields["address"].as_str()?.parse().ok())?
}

/// Where a publication went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The channel's epoch.
    pub epoch: String,
    /// The offset it took.
    pub offset: u64,
    /// The position as a stream's `Last-Event-ID`.
    pub cursor: String,
}

/// How an upgrade ended, from the log of the process that serves now.
#[derive(Debug, Clone, Copy)]
pub struct Upgrade {
    /// Connections that went over.
    pub connections: u64,
    /// How long nothing was delivered.
    pub pause: Duration,
}

/// A running node; killed when dropped.
pub struct Weir {
    child: Child,
    /// The process that serves now, when it is not the child any more.
    successor: Option<u32>,
    output: Arc<Output>,
    address: SocketAddr,
}

impl Weir {
    /// A node with this driver, on a free port of 127.0.0.1, with two shards.
    pub fn command(driver: Driver) -> WeirCommand {
        WeirCommand { driver: driver.flag(), listen: "127.0.0.1:0".into(), ..WeirCommand::default() }
    }

    /// Starts a node with flags.
    #[track_caller]
    pub fn start(driver: Driver, flags: &[&str]) -> Self {
        Self::command(driver).flags(flags).start()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its base URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Its process id; after an upgrade that of the process that serves now.
    pub fn pid(&self) -> u32 {
        self.successor.unwrap_or_else(|| self.child.id())
    }

    /// Runs a command of the operator, such as `drain`; its answer, or what it complained of.
    pub fn operate(&self, command: &str) -> Result<Value, String> {
        let mut run = Command::new(env!("CARGO_BIN_EXE_weir"));
        without_settings(&mut run);
        let output = run.args([command, "--listen", &self.address.to_string()]).output().expect("run weir");
        if output.status.success() {
            Ok(serde_json::from_slice(&output.stdout).expect("JSON"))
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// Another process serves now, which is to be killed in the end.
    pub fn follow(&mut self, pid: u32) {
        self.successor = Some(pid);
    }

    /// Has it hand over to a new process.
    #[track_caller]
    pub fn upgrade(&mut self) -> Upgrade {
        let before = self.pid();
        self.signal(libc::SIGUSR2);
        let field = |line: &str, message: &str| {
            let value: Value = serde_json::from_str(line).ok()?;
            (value["fields"]["message"] == message).then(|| value["fields"].clone())
        };
        let is = |fields: &Value, name: &str| fields[name].as_u64() == Some(u64::from(before));
        let took = self.output.wait(DEADLINE, |line| field(line, "took over").filter(|fields| is(fields, "before")));
        let took = took.unwrap_or_else(|| panic!("{before} was not taken over from; the log:\n{}", self.output.text()));
        self.successor = took["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        eventually("the old process ends", || self.has_ended(before).then_some(()));
        let number = |name: &str| took[name].as_u64().unwrap_or_else(|| panic!("no {name}: {took}"));
        let pause = Duration::from_micros(number("pause_micros"));
        Upgrade { connections: number("connections"), pause }
    }

    /// Has it try to hand over, and fail; returns why. `tries` counts those that failed before, and this one.
    #[track_caller]
    pub fn upgrade_in_vain(&self, tries: usize) -> String {
        self.signal(libc::SIGUSR2);
        eventually("the upgrade fails", || {
            let failed = self.output.text();
            let mut failed = failed.lines().filter(|line| line.contains("this process goes on"));
            failed.nth(tries - 1).map(str::to_owned)
        })
    }

    /// Whether a process of this node has ended, in order if it is the first.
    pub fn has_ended(&mut self, pid: u32) -> bool {
        if pid != self.child.id() {
            // Its state is Z until whoever it was left to has waited for it.
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            return stat.map_or(true, |stat| stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")));
        }
        let status = self.child.try_wait().expect("wait for the node");
        assert!(status.is_none_or(|status| status.success()), "{status:?}");
        status.is_some()
    }

    /// Waits until it says that it is ready.
    #[track_caller]
    pub fn wait_ready(&self) {
        eventually("the node is ready", || (self.get("/health/ready").status == 200).then_some(()));
    }

    /// Waits until it says that it is not ready, and returns why.
    #[track_caller]
    pub fn wait_not_ready(&self) -> String {
        eventually("the node is not ready", || {
            let response = self.get("/health/ready");
            (response.status == 503).then(|| response.text().to_owned())
        })
    }

    /// One GET on a connection of its own.
    #[track_caller]
    pub fn get(&self, target: &str) -> Response {
        Http::open(self.address).send("GET", target, &[], b"")
    }

    /// One POST on a connection of its own.
    #[track_caller]
    pub fn post(&self, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        Http::open(self.address).send("POST", target, headers, body)
    }

    /// Publishes one payload.
    #[track_caller]
    pub fn publish(&self, channel: &str, data: &str) -> Published {
        self.publish_with(channel, data, &[])
    }

    /// Publishes one payload with request headers.
    #[track_caller]
    pub fn publish_with(&self, channel: &str, data: &str, headers: &[(&str, &str)]) -> Published {
        let target = format!("/publish/{}", percent_encode(channel));
        published(&self.post(&target, headers, data.as_bytes()).expect(200).json())
    }

    /// Publishes many texts into one channel, in order, by batch requests on one connection.
    #[track_caller]
    pub fn publish_all<'a>(&self, channel: &str, data: impl IntoIterator<Item = &'a str>) -> Vec<Published> {
        let publications: Vec<Value> =
            data.into_iter().map(|text| serde_json::json!({ "channel": channel, "text": text })).collect();
        let mut http = Http::open(self.address);
        let mut positions = Vec::new();
        for batch in publications.chunks(100) {
            let body = serde_json::json!({ "publications": batch }).to_string();
            let headers = [("Content-Type", "application/json")];
            let reply = http.send("POST", "/api/publish", &headers, body.as_bytes()).expect(200).json();
            let results = reply["results"].as_array().unwrap_or_else(|| panic!("no results: {reply}"));
            assert_eq!(results.len(), batch.len(), "{reply}");
            positions.extend(results.iter().map(published));
        }
        positions
    }

    /// Opens a stream.
    #[track_caller]
    pub fn sse(&self, channels: &[&str]) -> Sse {
        Sse::open(self.address, channels, None)
    }

    /// Opens a stream that resumes.
    #[track_caller]
    pub fn sse_from(&self, channels: &[&str], last_id: &str) -> Sse {
        Sse::open(self.address, channels, Some(last_id))
    }

    /// Opens a stream whose socket takes little beyond what is read.
    #[track_caller]
    pub fn sse_narrow(&self, channels: &[&str]) -> Sse {
        Sse::open_on(Connection::open_with_receive_buffer(self.address, 4096), channels, None)
    }

    /// Opens a Centrifugo connection.
    #[track_caller]
    pub fn centrifugo(&self) -> Centrifugo {
        Centrifugo::open(self.address)
    }

    /// Scrapes the metrics.
    #[track_caller]
    pub fn metrics(&self) -> Samples {
        Samples::parse(self.get("/metrics").expect(200).text())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: kill takes no pointers, and the child was not waited for, so the id is still its own.
        let rc = unsafe { libc::kill(self.pid() as libc::pid_t, signal) };
        assert_eq!(rc, 0, "signal {signal}: {}", std::io::Error::last_os_error());
    }

    /// Waits until the process ends.
    #[track_caller]
    pub fn wait_end(&mut self) -> ExitStatus {
        let child = &mut self.child;
        eventually("the node ends", || child.try_wait().expect("wait for the node"))
    }

    /// Kills the process (SIGKILL) and waits for its end.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill the node");
        self.child.wait().expect("wait for the node");
    }

    /// Waits for a line of its log that `find` accepts.
    #[track_caller]
    pub fn wait_log(&self, what: &str, find: impl Fn(&str) -> bool) -> String {
        let line = self.output.wait(DEADLINE, |line| find(line).then(|| line.to_owned()));
        line.unwrap_or_else(|| panic!("not logged: {what}; the log:\n{}", self.output.text()))
    }

    /// Its open descriptors: what each link in `/proc/PID/fd` points to.
    pub fn descriptors(&self) -> Vec<String> {
        let directory = format!("/proc/{}/fd", self.pid());
        let entries = std::fs::read_dir(&directory).unwrap_or_else(|error| panic!("{directory}: {error}"));
        // A descriptor may be closed between the listing and the look.
        entries
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .map(|to| to.display().to_string())
            .collect()
    }
}

impl Drop for Weir {
    fn drop(&mut self) {
        if let Some(pid) = self.successor {
            // SAFETY: takes no pointers. It was the node's own process when it was last heard of, and nobody ends it but this.
            unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) };
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the node at {} wrote:\n{}", self.address, self.output.text());
        }
    }
}

#[track_caller]
fn published(value: &Value) -> Published {
    let text = |name: &str| value[name].as_str().unwrap_or_else(|| panic!("no {name}: {value}")).to_owned();
    let offset = value["offset"].as_u64().unwrap_or_else(|| panic!("no offset: {value}"));
    Published { epoch: text("epoch"), offset, cursor: text("cursor") }
}
