//! Looks at a server as a node would use it, for `weir doctor`: what it is, how it is set, how fast it answers.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, RedisResult};

use super::commands::{Commands, Keys, failure};
use super::source::Source;
use crate::limits::{BACKBONE_CONNECT_MILLIS, EXAMINE_PINGS, EXAMINE_PUBLISHES, PUBLISH_MILLIS};
use crate::settings::{HistoryConfig, RedisConfig};
use crate::shard::mailbox::Publish;

/// What was seen of a server that answers.
#[derive(Debug, Clone)]
pub struct Server {
    /// Every field of `INFO`, by its name.
    pub info: BTreeMap<String, String>,
    /// Settings that `CONFIG GET` gave. Services that run Redis for others often refuse it.
    pub config: BTreeMap<String, String>,
    /// How long each of [`EXAMINE_PINGS`] took, ascending.
    pub pings: Vec<Duration>,
    /// Whether the publishing step runs as a function and not as a script; an error says why it cannot run at all.
    pub function: Result<bool, String>,
    /// How long each of [`EXAMINE_PUBLISHES`] through the publishing step took, ascending, or why one failed.
    pub publishes: Result<Vec<Duration>, String>,
}

impl Server {
    /// A field of `INFO`; empty when the server does not have it.
    #[must_use]
    pub fn field(&self, name: &str) -> &str {
        self.info.get(name).map_or("", String::as_str)
    }

    /// A number in `INFO`; 0 when it is not there.
    #[must_use]
    pub fn number(&self, name: &str) -> u64 {
        self.field(name).parse().unwrap_or(0)
    }
}

/// Settings that are asked for.
const SETTINGS: [&str; 3] = ["client-output-buffer-limit", "appendfsync", "save"];

/// Connects and looks. Loads the publishing step if it is missing, as every node does; publishes to a channel with a random
/// name and deletes it.
///
/// # Errors
/// Why the server cannot be used, for an operator: the address, the connection, or its refusal of what was asked.
pub fn examine(config: &RedisConfig) -> Result<Server, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("no runtime: {error}"))?;
    runtime.block_on(look(config))
}

async fn look(config: &RedisConfig) -> Result<Server, String> {
    let mut source = Source::start(config).map_err(|error| error.to_string())?;
    let found = tokio::time::timeout(Duration::from_millis(BACKBONE_CONNECT_MILLIS), source.find()).await;
    let client = found.map_err(|_| format!("no primary was named within {BACKBONE_CONNECT_MILLIS} ms"))??.client;
    let limits = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(Duration::from_millis(BACKBONE_CONNECT_MILLIS)))
        .set_response_timeout(Some(Duration::from_millis(PUBLISH_MILLIS)));
    let connection = client.get_multiplexed_async_connection_with_config(&limits).await;
    let mut connection = connection.map_err(|error| failure(&error).to_string())?;

    let info: RedisResult<String> = redis::cmd("INFO").query_async(&mut connection).await;
    let mut server = Server {
        info: fields(&info.map_err(|error| format!("INFO: {error}"))?),
        config: BTreeMap::new(),
        pings: Vec::with_capacity(EXAMINE_PINGS),
        function: Ok(true),
        publishes: Ok(Vec::new()),
    };
    for setting in SETTINGS {
        let mut ask = redis::cmd("CONFIG");
        let answer: RedisResult<HashMap<String, String>> =
            ask.arg("GET").arg(setting).query_async(&mut connection).await;
        server.config.extend(answer.unwrap_or_default());
    }
    for _ in 0..EXAMINE_PINGS {
        let start = Instant::now();
        let pong: RedisResult<String> = redis::cmd("PING").query_async(&mut connection).await;
        pong.map_err(|error| format!("PING: {error}"))?;
        server.pings.push(start.elapsed());
    }
    server.pings.sort_unstable();
    let keys = Arc::new(Keys::new(&config.prefix));
    // Nothing is kept, and what was published is nothing that anybody waits for.
    let history = Arc::new(HistoryConfig { messages: 0, bytes: 0, age: Duration::from_secs(1) });
    match Commands::prepare(connection.clone(), false, keys.clone(), history).await {
        Err(error) => {
            server.function = Err(error.to_string());
            server.publishes = Err("the publishing step cannot be loaded".into());
        }
        Ok(commands) => {
            server.function = Ok(commands.by_function());
            server.publishes = publish(&commands, &keys, &mut connection).await;
        }
    }
    Ok(server)
}

/// Publishes a few times and measures each.
async fn publish(
    commands: &Commands,
    keys: &Keys,
    connection: &mut MultiplexedConnection,
) -> Result<Vec<Duration>, String> {
    let random = getrandom::u64().map_err(|error| format!("the system gave no random number: {error}"))?;
    let channel: Arc<str> = format!("doctor-{random:016x}").into();
    let mut taken = Vec::with_capacity(EXAMINE_PUBLISHES);
    let mut failed = None;
    for _ in 0..EXAMINE_PUBLISHES {
        let publication = Publish { channel: channel.clone(), data: Bytes::from_static(b"{}"), idempotency_key: None };
        let start = Instant::now();
        match commands.clone().publish(publication).await {
            Ok(_) => taken.push(start.elapsed()),
            Err(error) => failed = Some(error.to_string()),
        }
    }
    let mut delete = redis::cmd("DEL");
    let deleted: RedisResult<u64> = delete.arg(&keys.of_channel(&channel)).query_async(connection).await;
    taken.sort_unstable();
    match (failed, deleted) {
        (Some(reason), _) => Err(reason),
        (None, Err(error)) => Err(format!("DEL: {error}")),
        (None, Ok(_)) => Ok(taken),
    }
}

/// The fields of an `INFO` answer.
fn fields(info: &str) -> BTreeMap<String, String> {
    let pairs = info.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(':'));
    pairs.map(|(name, value)| (name.to_owned(), value.trim_end().to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backbone::redis::testing::Server as RealServer;

    #[test]
    fn a_server_is_examined_and_left_as_it_was() {
        let real = RealServer::start(&["--appendonly", "yes", "--appendfsync", "everysec"]);
        let server = examine(&real.config()).expect("it answers");
        assert_eq!((server.field("role"), server.number("aof_enabled")), ("master", 1));
        assert_eq!(server.config["appendfsync"], "everysec");
        assert!(server.config["client-output-buffer-limit"].contains("pubsub"), "{server:?}");
        assert_eq!((server.pings.len(), server.function.clone()), (EXAMINE_PINGS, Ok(true)));
        assert_eq!(server.publishes.map(|taken| taken.len()), Ok(EXAMINE_PUBLISHES));
        assert_eq!(real.query::<u64>(&["DBSIZE"]), 0, "nothing is left behind");
    }

    #[test]
    fn a_server_that_refuses_is_told_apart_from_none() {
        let real = RealServer::start(&[]);
        let _: () = real.query(&["CONFIG", "SET", "requirepass", "secret"]);
        let error = examine(&real.config()).expect_err("no password was given");
        assert!(error.to_lowercase().contains("auth"), "{error}");
        let nowhere = RedisConfig { url: "unix:///nonexistent/redis.sock".into(), prefix: "weir:".into() };
        let error = examine(&nowhere).expect_err("nothing is there");
        assert!(error.to_lowercase().contains("no such file"), "{error}");
    }

    #[test]
    fn fields_are_read() {
        let info = fields("# Server\r\nredis_version:7.0.15\r\n\r\n# Replication\r\nslave0:ip=::1,lag=0\r\n");
        assert_eq!(info["redis_version"], "7.0.15");
        assert_eq!(info["slave0"], "ip=::1,lag=0");
        assert_eq!(info.len(), 2);
    }
}
