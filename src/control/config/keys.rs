//! The table of keys: everything else about the configuration (file, environment, `--set`, `check`, the example file) is
//! made from it, so that they cannot drift apart.

use std::ops::RangeInclusive;

use super::value::{Place, Rule};
use crate::backbone::redis::address;
use crate::control::admin;
use crate::limits;
use crate::settings::{RedisConfig, Settings};

/// Settings while they are being read: Redis is a table of texts here, and absent when its URL stays empty.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Draft {
    pub settings: Settings,
    pub redis: RedisConfig,
}

impl From<&Settings> for Draft {
    fn from(settings: &Settings) -> Self {
        let none = RedisConfig { url: String::new(), prefix: "weir:".into() };
        Self { settings: settings.clone(), redis: settings.redis.clone().unwrap_or(none) }
    }
}

impl Draft {
    /// The finished settings.
    pub fn finish(self) -> Settings {
        Settings { redis: Some(self.redis).filter(|redis| !redis.url.is_empty()), ..self.settings }
    }
}

/// One key.
pub(super) struct Key {
    /// Its table and name in the file, joined by a dot.
    pub name: &'static str,
    /// What it sets.
    pub about: &'static str,
    /// Where its value is stored.
    pub place: fn(&mut Draft) -> Place<'_>,
    /// Whether a running node takes a new value up when its configuration is read again.
    pub live: bool,
}

impl Key {
    /// The same, for a key that is read at the start only.
    const fn at_start(self) -> Self {
        Self { live: false, ..self }
    }

    /// Its name in the environment.
    pub fn variable(&self) -> String {
        format!("WEIR_{}", self.name.replace('.', "_").to_ascii_uppercase())
    }

    /// Its table (empty at the top level) and its name in that.
    pub fn split(&self) -> (&'static str, &'static str) {
        self.name.split_once('.').unwrap_or(("", self.name))
    }
}

/// A key that a running node takes up.
const fn key(name: &'static str, about: &'static str, place: fn(&mut Draft) -> Place<'_>) -> Key {
    Key { name, about, place, live: true }
}

/// From one second up to the longest interval.
const SECONDS: RangeInclusive<u64> = 1_000..=limits::INTERVAL_MILLIS_MOST;
/// From one byte up to the largest payload.
const PAYLOAD: RangeInclusive<u64> = 1..=limits::PAYLOAD_BYTES_MOST as u64;
/// From one byte up to the largest log.
const LOG_BYTES: RangeInclusive<u64> = 1..=limits::LOG_BYTES_MOST as u64;
/// From one publication up to the longest log.
const LOG_MESSAGES: RangeInclusive<u64> = 1..=limits::LOG_MESSAGES_MOST as u64;
/// From a tenth of a second up to the oldest log.
const LOG_AGE: RangeInclusive<u64> = 100..=limits::LOG_MILLIS_MOST;

/// From a tenth of a second up to the longest interval.
const CLIENT_TIME: RangeInclusive<u64> = 100..=limits::INTERVAL_MILLIS_MOST;

/// Every key. Those of one table stand together, the top level first: the order of the example file.
pub(super) const KEYS: &[Key] = &[
    key("listen", "Where clients and publishers connect. Port 0 takes a free one; the log says which.", |d| {
        Place::Address(&mut d.settings.listen)
    })
    .at_start(),
    key("shards", "Shards, one thread each. 0 means one for each core the process may use.", |d| {
        Place::Count(&mut d.settings.shards, 0..=limits::SHARDS_MOST as u64)
    })
    .at_start(),
    key(
        "pin",
        "Whether each shard is pinned to a core. Ignored, with a line in the log, where it would do harm: more shards \
         than cores, or a CPU quota.",
        |d| Place::Switch(&mut d.settings.pin),
    )
    .at_start(),
    key(
        "driver",
        "How the shards talk to the kernel. auto takes io_uring where the kernel and the sandbox allow it, else epoll; \
         uring refuses to start without it.",
        |d| Place::Word(&mut d.settings.driver),
    )
    .at_start(),
    key(
        "max_connections",
        "Established connections on this node. 0 means as many as the descriptor limit allows.",
        |d| Place::Count(&mut d.settings.max_connections, 0..=limits::CONNECTIONS_MOST as u64),
    )
    .at_start(),
    key(
        "linger",
        "How long a channel's backbone subscription outlives its last local subscriber, so that a reconnect finds it.",
        |d| Place::Time(&mut d.settings.linger, 0..=limits::INTERVAL_MILLIS_MOST),
    )
    .at_start(),
    key("allow_origins", "Origins that browsers may connect from. \"*\" means any.", |d| {
        Place::List(&mut d.settings.allow_origins, &ORIGIN)
    }),
    key(
        "redis.url",
        "The Redis or Valkey server that the nodes share, or the sentinels that name it. Empty means the embedded backbone: one \
         node.",
        |d| Place::Text(&mut d.redis.url, &REDIS_URL),
    )
    .at_start(),
    key("redis.prefix", "What every key and channel name in Redis starts with.", |d| {
        Place::Text(&mut d.redis.prefix, &PREFIX)
    })
    .at_start(),
    key("history.messages", "Publications kept for each channel, here and in Redis.", |d| {
        Place::Count(&mut d.settings.history.messages, LOG_MESSAGES)
    })
    .at_start(),
    key("history.bytes", "Bytes kept for each channel and wire format, in this node's log.", |d| {
        Place::Size(&mut d.settings.history.bytes, LOG_BYTES)
    })
    .at_start(),
    key("history.age", "How long a publication is kept.", |d| Place::Time(&mut d.settings.history.age, LOG_AGE))
        .at_start(),
    key("lag.messages", "Publications a subscription may be behind before its connection is closed as slow.", |d| {
        Place::Count(&mut d.settings.lag.messages, LOG_MESSAGES)
    }),
    key("lag.bytes", "Bytes a subscription may be behind before its connection is closed as slow.", |d| {
        Place::Size(&mut d.settings.lag.bytes, LOG_BYTES)
    }),
    key("lag.age", "Age of the oldest unsent publication at which a connection is closed as slow.", |d| {
        Place::Time(&mut d.settings.lag.age, LOG_AGE)
    }),
    key("sse.heartbeat", "Silence on a stream after which a comment is sent, so that proxies keep it open.", |d| {
        Place::Time(&mut d.settings.sse.heartbeat, SECONDS)
    }),
    key("sse.retry", "The reconnect delay that every stream is told at its start.", |d| {
        Place::Time(&mut d.settings.sse.retry, 1..=limits::INTERVAL_MILLIS_MOST)
    }),
    key("websocket.ping", "Interval of the pings to each WebSocket client.", |d| {
        Place::Time(&mut d.settings.websocket.ping, SECONDS)
    })
    .at_start(),
    key("websocket.pong", "How long the answer to a ping may take before the connection is closed.", |d| {
        Place::Time(&mut d.settings.websocket.pong, SECONDS)
    }),
    key("websocket.client_publish", "Whether clients may publish into channels they are subscribed to.", |d| {
        Place::Switch(&mut d.settings.websocket.client_publish)
    }),
    key("websocket.message_bytes", "Bytes in one message from a client.", |d| {
        Place::Size(&mut d.settings.websocket.message_bytes, PAYLOAD)
    }),
    key(
        "poll.wait",
        "The longest that a poll may wait when nothing is new; a longer wait is cut to it. 0s answers each at once.",
        |d| Place::Time(&mut d.settings.poll.wait, 0..=limits::INTERVAL_MILLIS_MOST),
    ),
    key(
        "poll.max_age",
        "How long a cache may give one answer to all who poll with the same address. Whole seconds: the rest of a second \
         is left out. 0s makes caches ask each time.",
        |d| Place::Time(&mut d.settings.poll.max_age, 0..=limits::INTERVAL_MILLIS_MOST),
    ),
    key("limits.channels", "Channels on one connection.", |d| {
        Place::Count(&mut d.settings.limits.channels, 1..=limits::CHANNELS_PER_CONNECTION_MOST as u64)
    }),
    key("limits.publication_bytes", "Bytes in one publication.", |d| {
        Place::Size(&mut d.settings.limits.publication_bytes, PAYLOAD)
    }),
    key("limits.body_bytes", "Bytes in a request body: one batch of publications.", |d| {
        Place::Size(&mut d.settings.limits.body_bytes, PAYLOAD)
    }),
    key("limits.head_time", "Time a client may take to send a complete request head.", |d| {
        Place::Time(&mut d.settings.limits.head_time, CLIENT_TIME)
    }),
    key("limits.body_time", "Time a client may take to send a complete request body.", |d| {
        Place::Time(&mut d.settings.limits.body_time, CLIENT_TIME)
    }),
    key("limits.keep_alive", "How long an idle HTTP connection is kept.", |d| {
        Place::Time(&mut d.settings.limits.keep_alive, CLIENT_TIME)
    }),
    key(
        "drain.unready",
        "How long /health/ready says no before a drain parts with anybody, so that balancers notice. SIGINT skips it.",
        |d| Place::Time(&mut d.settings.drain.unready, 0..=limits::INTERVAL_MILLIS_MOST),
    ),
    key(
        "drain.window",
        "Time over which a drain (SIGTERM, weir drain) tells every client to go elsewhere, at an even pace. A service manager          must wait longer than both together.",
        |d| Place::Time(&mut d.settings.drain.window, 0..=limits::INTERVAL_MILLIS_MOST),
    ),
    key(
        "admin.listen",
        "Where weir drain and other commands reach a running node. auto is a socket that only this user may open, in the runtime          directory, named after the port of listen.",
        |d| Place::Text(&mut d.settings.admin.listen, &ADMIN),
    )
    .at_start(),
    key("log.filter", "Which log lines are written.", |d| Place::Text(&mut d.settings.log.filter, &FILTER)),
    key("log.format", "Lines for people, or one JSON object a line.", |d| Place::Word(&mut d.settings.log.format))
        .at_start(),
];

static ORIGIN: Rule = Rule { allowed: "* or scheme://host[:port] without a path", check: is_origin, show: as_is };
static REDIS_URL: Rule = Rule { allowed: address::FORMS, check: is_redis_url, show: address::without_password };
static PREFIX: Rule = Rule { allowed: "1 to 64 letters, digits or any of : . _ -", check: is_prefix, show: as_is };
static ADMIN: Rule = Rule { allowed: admin::FORMS, check: is_admin, show: as_is };
static FILTER: Rule = Rule {
    allowed: "a level (error, warn, info, debug, trace) or target=level pairs joined by commas",
    check: is_filter,
    show: as_is,
};

fn as_is(text: &str) -> String {
    text.into()
}

fn is_origin(text: &str) -> bool {
    let plain = |part: &str| part.bytes().all(|byte| byte.is_ascii_graphic() && !br#"/\?#@,""#.contains(&byte));
    text == "*"
        || text
            .split_once("://")
            .is_some_and(|(scheme, host)| !scheme.is_empty() && !host.is_empty() && plain(scheme) && plain(host))
}

fn is_redis_url(text: &str) -> bool {
    text.is_empty() || address::parse(text).is_ok()
}

fn is_admin(text: &str) -> bool {
    admin::Place::parse(text, 0).is_some()
}

fn is_prefix(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b":._-".contains(&byte))
}

fn is_filter(text: &str) -> bool {
    !text.is_empty() && tracing_subscriber::EnvFilter::try_new(text).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_checked() {
        for good in ["*", "https://example.org", "http://localhost:3000", "capacitor://localhost"] {
            assert!(is_origin(good), "{good}");
        }
        for bad in ["", "example.org", "https://", "https://a/b", "https://a b", "://a"] {
            assert!(!is_origin(bad), "{bad}");
        }
    }
}
