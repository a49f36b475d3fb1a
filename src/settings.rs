//! Everything an operator may set, as plain data with its defaults. `control::config` fills it from the TOML file, the
//! environment and flags; every layer may read its part.

use std::net::SocketAddr;
use std::time::Duration;

use crate::limits;

/// Everything an operator may set. Each field is a key of the TOML file, `WEIR_<TABLE>_<KEY>` in the environment and a flag.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Where clients and publishers connect.
    pub listen: SocketAddr,
    /// Shards, one pinned thread each; 0 means one a core.
    pub shards: usize,
    /// Whether each shard is pinned to its core.
    pub pin: bool,
    /// Which driver the engines use.
    pub driver: DriverChoice,
    /// Established connections on this node, over all shards; 0 means as many as descriptor limits allow.
    pub max_connections: usize,
    /// Redis; none means the embedded backbone.
    pub redis: Option<RedisConfig>,
    /// What a channel's history keeps, in the node's log and in the backbone.
    pub history: HistoryConfig,
    /// How far a subscription may fall behind before its connection is shed.
    pub lag: LagConfig,
    /// Server-sent events.
    pub sse: SseConfig,
    /// WebSocket.
    pub websocket: WebSocketConfig,
    /// Polling.
    pub poll: PollConfig,
    /// What one client may ask for.
    pub limits: ClientLimits,
    /// How the node ends.
    pub drain: DrainConfig,
    /// Where the operator connects; see [`crate::control::admin`].
    pub admin: AdminConfig,
    /// How long a channel's backbone subscription outlives its last local subscriber.
    pub linger: Duration,
    /// Logging.
    pub log: LogConfig,
    /// Origins that browsers may connect from; `*` means any.
    pub allow_origins: Vec<String>,
}

/// A Redis or Valkey server.
#[derive(Debug, Clone, PartialEq)]
pub struct RedisConfig {
    /// `redis://[user:password@]host:port[/db]`, `unix:///path`, or `redis+sentinel://host:port,host:port/primary`; all forms are
    /// those of `backbone::redis::address`.
    pub url: String,
    /// What every key and channel name starts with.
    pub prefix: String,
}

/// What a channel's history keeps.
#[derive(Debug, Clone, PartialEq)]
pub struct HistoryConfig {
    /// Publications a channel.
    pub messages: usize,
    /// Bytes a channel, per wire format, in the node's log.
    pub bytes: usize,
    /// Age of the oldest publication kept.
    pub age: Duration,
}

/// How far a subscription may fall behind.
#[derive(Debug, Clone, PartialEq)]
pub struct LagConfig {
    /// Publications.
    pub messages: u64,
    /// Bytes.
    pub bytes: u64,
    /// Age of its oldest unsent publication.
    pub age: Duration,
}

/// Server-sent events.
#[derive(Debug, Clone, PartialEq)]
pub struct SseConfig {
    /// Silence after which a comment is sent.
    pub heartbeat: Duration,
    /// The reconnect delay every stream is told at its start.
    pub retry: Duration,
}

/// WebSocket.
#[derive(Debug, Clone, PartialEq)]
pub struct WebSocketConfig {
    /// Interval of the server's pings.
    pub ping: Duration,
    /// How long a pong may take before the connection is ended.
    pub pong: Duration,
    /// Whether clients may publish into channels they are subscribed to.
    pub client_publish: bool,
    /// Bytes in one message from a client.
    pub message_bytes: usize,
}

/// Polling.
#[derive(Debug, Clone, PartialEq)]
pub struct PollConfig {
    /// The longest that a request may wait when nothing is new; zero answers each at once.
    pub wait: Duration,
    /// How long caches may give one answer to all who ask the same, in whole seconds; zero makes them ask each time.
    pub max_age: Duration,
}

/// What one client may ask for.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientLimits {
    /// Channels on one connection.
    pub channels: usize,
    /// Bytes in one publication.
    pub publication_bytes: usize,
    /// Bytes in a request body.
    pub body_bytes: usize,
    /// Time for a complete request head.
    pub head_time: Duration,
    /// Time for a complete request body.
    pub body_time: Duration,
    /// Idle time of a kept-alive HTTP connection.
    pub keep_alive: Duration,
}

/// How the node ends.
#[derive(Debug, Clone, PartialEq)]
pub struct DrainConfig {
    /// How long it is not ready before anybody is told to go.
    pub unready: Duration,
    /// How long telling everybody takes.
    pub window: Duration,
}

/// Where the operator connects.
#[derive(Debug, Clone, PartialEq)]
pub struct AdminConfig {
    /// `auto`, `off`, `unix:/path` or an address of loopback.
    pub listen: String,
}

/// Logging.
#[derive(Debug, Clone, PartialEq)]
pub struct LogConfig {
    /// A `tracing` filter such as `info` or `weir=debug`.
    pub filter: String,
    /// Text or JSON lines.
    pub format: LogFormat,
}

/// Form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// How the engines talk to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DriverChoice {
    /// io_uring where the kernel and the sandbox allow it, else epoll.
    #[default]
    Auto,
    /// io_uring or refuse to start.
    Uring,
    /// epoll.
    Epoll,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            shards: 0,
            pin: true,
            driver: DriverChoice::Auto,
            max_connections: 0,
            redis: None,
            history: HistoryConfig {
                messages: limits::LOG_MESSAGES,
                bytes: limits::LOG_BYTES,
                age: Duration::from_millis(limits::LOG_MILLIS),
            },
            lag: LagConfig {
                messages: limits::LAG_MESSAGES,
                bytes: limits::LAG_BYTES,
                age: Duration::from_millis(limits::LAG_MILLIS),
            },
            sse: SseConfig { heartbeat: Duration::from_secs(25), retry: Duration::from_secs(2) },
            websocket: WebSocketConfig {
                ping: Duration::from_secs(25),
                pong: Duration::from_secs(10),
                client_publish: false,
                message_bytes: limits::CLIENT_MESSAGE_BYTES,
            },
            poll: PollConfig {
                wait: Duration::from_millis(limits::POLL_WAIT_MILLIS),
                max_age: Duration::from_millis(limits::POLL_MAX_AGE_MILLIS),
            },
            limits: ClientLimits {
                channels: limits::CHANNELS_PER_CONNECTION,
                publication_bytes: limits::PUBLICATION_BYTES,
                body_bytes: limits::REQUEST_BODY_BYTES,
                head_time: Duration::from_millis(limits::REQUEST_HEAD_MILLIS),
                body_time: Duration::from_millis(limits::REQUEST_BODY_MILLIS),
                keep_alive: Duration::from_millis(limits::KEEP_ALIVE_MILLIS),
            },
            drain: DrainConfig {
                unready: Duration::from_millis(limits::DRAIN_UNREADY_MILLIS),
                window: Duration::from_millis(limits::DRAIN_WINDOW_MILLIS),
            },
            admin: AdminConfig { listen: "auto".into() },
            linger: Duration::from_millis(limits::LINGER_MILLIS),
            log: LogConfig { filter: "info".into(), format: LogFormat::Text },
            allow_origins: vec!["*".into()],
        }
    }
}
