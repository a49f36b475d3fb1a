//! A Redis server of a test's own: on a Unix socket in a directory of its own, stopped with it.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use redis::{Connection, FromRedisValue};

use crate::settings::RedisConfig;

static SERVERS: AtomicU32 = AtomicU32::new(0);

/// A running server.
pub struct Server {
    directory: PathBuf,
    options: Vec<String>,
    child: Child,
}

impl Server {
    /// Starts a server that keeps nothing on disk unless `options` say so.
    pub fn start(options: &[&str]) -> Self {
        let number = SERVERS.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("weir-redis-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory for the server");
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        let child = spawn(&directory, &options);
        let server = Self { directory, options, child };
        server.wait();
        server
    }

    /// Where a node finds it.
    pub fn config(&self) -> RedisConfig {
        RedisConfig { url: format!("unix://{}", self.socket().display()), prefix: "weir:".into() }
    }

    fn client(&self) -> redis::Client {
        redis::Client::open(self.config().url).expect("an address")
    }

    /// A connection of the test's own.
    pub fn connect(&self) -> Connection {
        self.client().get_connection().expect("a connection")
    }

    /// Runs one command given as words.
    pub fn query<T: FromRedisValue>(&self, words: &[&str]) -> T {
        let mut command = redis::Cmd::new();
        command.arg(words);
        command.query(&mut self.connect()).unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    /// Runs `redis-cli`, as an operator would, and returns what it printed.
    pub fn cli(&self, words: &[&str]) -> String {
        let output = Command::new("redis-cli").arg("-s").arg(self.socket()).args(words).output();
        String::from_utf8(output.expect("redis-cli is installed").stdout).expect("redis-cli prints text")
    }

    /// Publishes with `FCALL` through `redis-cli`.
    pub fn cli_publish(&self, channel: &str, data: &str) -> String {
        let key = |suffix: &str| format!("weir:{{{channel}}}{suffix}");
        self.cli(&["FCALL", "weir_publish", "2", &key(":meta"), &key(":stream"), &key(""), data])
    }

    /// Ends it without warning (SIGKILL).
    pub fn kill(&mut self) {
        self.child.kill().expect("the server is ours");
        self.child.wait().expect("the server is ours");
    }

    /// Starts it again on what it left on disk.
    pub fn restart(&mut self) {
        self.child = spawn(&self.directory, &self.options);
        self.wait();
    }

    /// Another way to it, which can be closed: a server that runs is then not found there.
    pub fn door(&self) -> Door {
        let door = Door { path: self.directory.join("door"), socket: self.socket() };
        door.open();
        door
    }

    /// Stops its execution (`SIGSTOP`) or lets it go on (`SIGCONT`): its connections stay open meanwhile.
    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: no pointers; the process is our child and was not waited for, so its id is not another's.
        assert_eq!(unsafe { libc::kill(self.child.id() as libc::pid_t, signal) }, 0);
    }

    /// Puts a [`Proxy`] in front of it.
    pub fn proxy(&self) -> Proxy {
        Proxy::start(self.directory.join("proxy"), self.socket())
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("socket")
    }

    fn wait(&self) {
        let client = self.client();
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let pong = client.get_connection().and_then(|mut connection| redis::cmd("PING").exec(&mut connection));
            match pong {
                Ok(()) => return,
                Err(error) => assert!(Instant::now() < until, "redis-server does not answer: {error}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn spawn(directory: &Path, options: &[String]) -> Child {
    Command::new("redis-server")
        .args(["--port", "0", "--save", "", "--unixsocket", "socket", "--dir"])
        .arg(directory)
        .args(options)
        .current_dir(directory)
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is installed")
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A name of the server's socket.
pub struct Door {
    path: PathBuf,
    socket: PathBuf,
}

impl Door {
    /// Where a node finds the server while the door is open.
    pub fn config(&self) -> RedisConfig {
        RedisConfig { url: format!("unix://{}", self.path.display()), prefix: "weir:".into() }
    }

    /// Lets new connections in.
    pub fn open(&self) {
        std::os::unix::fs::symlink(&self.socket, &self.path).expect("a name of our own");
    }

    /// Lets no new connections in.
    pub fn close(&self) {
        std::fs::remove_file(&self.path).expect("a name of our own");
    }
}

/// Stands between a node and the server, and can make pub/sub connections half-open: nothing comes back over them any more,
/// but they stay connected.
pub struct Proxy {
    path: PathBuf,
    deaf: Arc<AtomicBool>,
}

impl Proxy {
    fn start(path: PathBuf, server: PathBuf) -> Self {
        let listener = UnixListener::bind(&path).expect("a socket of our own");
        let deaf = Arc::new(AtomicBool::new(false));
        let switch = deaf.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                // The threads end with their connections.
                if let (Ok(client), Ok(server)) = (client, UnixStream::connect(&server)) {
                    connect(client, server, &switch);
                }
            }
        });
        Self { path, deaf }
    }

    /// Where a node finds it.
    pub fn config(&self) -> RedisConfig {
        RedisConfig { url: format!("unix://{}", self.path.display()), prefix: "weir:".into() }
    }

    /// Makes pub/sub connections half-open, or mends those that come from now on.
    pub fn set_deaf(&self, deaf: bool) {
        self.deaf.store(deaf, Ordering::SeqCst);
    }
}

fn connect(client: UnixStream, server: UnixStream, deaf: &Arc<AtomicBool>) {
    let subscribed = Arc::new(AtomicBool::new(false));
    let both = |stream: &UnixStream| stream.try_clone().expect("a descriptor");
    let (up, seen) = ((both(&client), both(&server)), subscribed.clone());
    std::thread::spawn(move || {
        pump(up.0, up.1, |bytes| {
            if memchr::memmem::find(bytes, b"SUBSCRIBE").is_some() {
                seen.store(true, Ordering::SeqCst);
            }
            true
        });
    });
    let deaf = deaf.clone();
    std::thread::spawn(move || {
        let mut passing = true;
        pump(server, client, |_| {
            passing &= !(subscribed.load(Ordering::SeqCst) && deaf.load(Ordering::SeqCst));
            passing
        });
    });
}

/// Copies what `pass` lets through, until one side closes; then closes both.
fn pump(mut from: UnixStream, mut to: UnixStream, mut pass: impl FnMut(&[u8]) -> bool) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if pass(&buffer[..count]) && to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
