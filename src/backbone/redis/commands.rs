//! What is sent to Redis and how its answers are read.

use std::sync::Arc;

use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{Cmd, ErrorKind, RedisError, RedisResult, Value};

use super::library::{self, Publishing};
use crate::backbone::interface::{BackboneError, Page, Read, Stored};
use crate::limits::{IDEMPOTENCY_SECONDS, META_SECONDS};
use crate::log::position::{Epoch, Position};
use crate::settings::HistoryConfig;
use crate::shard::mailbox::Publish;

/// Begins a new epoch with an empty history, if the channel is still in the epoch given.
/// KEYS meta, stream. ARGV old epoch, new epoch, seconds meta is kept.
const RENEW: &str = "if redis.call('HGET', KEYS[1], 'epoch') == ARGV[1] then \
     redis.call('DEL', KEYS[2]) redis.call('HSET', KEYS[1], 'epoch', ARGV[2], 'offset', 0) \
     redis.call('EXPIRE', KEYS[1], ARGV[3]) end \
     return redis.call('HMGET', KEYS[1], 'epoch', 'offset')";

/// First stream id that is a time and no offset: `XADD` with `*` made it. See `publish.lua`.
const TIME_IDS: u64 = 1_000_000_000_000;

/// The names of a channel's keys. `publish.lua` documents them.
#[derive(Debug)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// Names that start with `prefix`.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// The channel's pub/sub channel.
    #[must_use]
    pub fn topic(&self, channel: &str) -> String {
        format!("{}{{{channel}}}", self.prefix)
    }

    /// Where a node publishes to itself. Not the form of any channel's topic.
    #[must_use]
    pub fn heartbeat(&self, node: u64) -> String {
        format!("{}heartbeat:{node:016x}", self.prefix)
    }

    /// Turns a topic into its channel's name.
    #[must_use]
    pub fn channel_of(&self, mut topic: Vec<u8>) -> Option<String> {
        let start = self.prefix.len() + 1;
        if topic.len() < start + 1 || !topic.starts_with(self.prefix.as_bytes()) || topic[start - 1] != b'{' {
            return None;
        }
        if topic.pop() != Some(b'}') {
            return None;
        }
        topic.drain(..start);
        String::from_utf8(topic).ok()
    }

    fn meta(&self, channel: &str) -> String {
        format!("{}{{{channel}}}:meta", self.prefix)
    }

    fn stream(&self, channel: &str) -> String {
        format!("{}{{{channel}}}:stream", self.prefix)
    }

    fn once(&self, channel: &str, key: &str) -> String {
        format!("{}{{{channel}}}:once:{key}", self.prefix)
    }
}

/// The connection that commands go over. Cheap to clone; commands of all clones are pipelined.
#[derive(Debug, Clone)]
pub struct Commands {
    connection: MultiplexedConnection,
    keys: Arc<Keys>,
    history: Arc<HistoryConfig>,
    publishing: Publishing,
}

impl Commands {
    /// Commands over `connection`, after making sure that the publishing step is there.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn prepare(
        mut connection: MultiplexedConnection,
        keys: Arc<Keys>,
        history: Arc<HistoryConfig>,
    ) -> RedisResult<Self> {
        let publishing = library::ensure(&mut connection).await?;
        Ok(Self { connection, keys, history, publishing })
    }

    /// Publishes.
    ///
    /// # Errors
    /// See [`BackboneError`].
    pub async fn publish(mut self, publish: Publish) -> Result<Position, BackboneError> {
        let meta = self.keys.meta(&publish.channel);
        let stream = self.keys.stream(&publish.channel);
        let once = publish.idempotency_key.as_deref().map(|key| self.keys.once(&publish.channel, key));
        let command = |mut command: Cmd| {
            command.arg(2 + usize::from(once.is_some())).arg(&meta).arg(&stream);
            if let Some(once) = &once {
                command.arg(once);
            }
            command.arg(self.keys.topic(&publish.channel)).arg(&publish.data[..]);
            command.arg(self.history.messages).arg(self.history.age.as_secs().max(1)).arg(IDEMPOTENCY_SECONDS);
            command
        };
        let first = command(self.publishing.call());
        let mut answer = first.query_async(&mut self.connection).await;
        if let Err(error) = &answer
            && library::is_missing(error)
        {
            let again = command(self.publishing.restore(&mut self.connection).await.map_err(|error| failure(&error))?);
            answer = again.query_async(&mut self.connection).await;
        }
        let (epoch, offset, _duplicate): (String, u64, u8) = answer.map_err(|error| failure(&error))?;
        Ok(Position { epoch: epoch_of(&epoch)?, offset })
    }

    /// Reads from a channel's history.
    ///
    /// # Errors
    /// See [`BackboneError`].
    pub async fn read(mut self, read: Read) -> Result<Page, BackboneError> {
        let (meta, stream) = (self.keys.meta(&read.channel), self.keys.stream(&read.channel));
        let mut pipeline = redis::pipe();
        pipeline.atomic();
        if read.create {
            pipeline.cmd("HSETNX").arg(&meta).arg("epoch").arg(random_epoch()?.to_string()).ignore();
            pipeline.cmd("EXPIRE").arg(&meta).arg(META_SECONDS).ignore();
        }
        pipeline.cmd("HMGET").arg(&meta).arg("epoch").arg("offset");
        if read.limit > 0 {
            // Offsets end below TIME_IDS; entries above it have no offset yet.
            if read.reverse {
                let newest = read.since.map_or(TIME_IDS, |since| since.min(TIME_IDS));
                pipeline.cmd("XREVRANGE").arg(&stream).arg(format!("({newest}-0")).arg("-");
            } else {
                let oldest = read.since.unwrap_or(0);
                pipeline.cmd("XRANGE").arg(&stream).arg(format!("({oldest}-0")).arg(format!("({TIME_IDS}-0"));
            }
            pipeline.arg("COUNT").arg(read.limit);
        }
        let mut answer: Vec<Value> =
            pipeline.query_async(&mut self.connection).await.map_err(|error| failure(&error))?;
        let publications = if read.limit > 0 { answer.pop().map(stored).transpose()? } else { None };
        let head = position(answer.pop().ok_or_else(|| malformed("a position"))?)?;
        let mut publications = publications.unwrap_or_default();
        // When the position was evicted and begun anew, the stream is still that of the epoch before.
        publications.retain(|stored| stored.offset <= head.offset);
        Ok(Page { head, publications })
    }

    /// See [`crate::backbone::interface::Backbone::renew`].
    ///
    /// # Errors
    /// See [`BackboneError`].
    pub async fn renew(mut self, channel: Arc<str>, epoch: Epoch) -> Result<Page, BackboneError> {
        let mut command = redis::cmd("EVAL");
        command.arg(RENEW).arg(2).arg(self.keys.meta(&channel)).arg(self.keys.stream(&channel));
        command.arg(epoch.to_string()).arg(random_epoch()?.to_string()).arg(META_SECONDS);
        let answer: Value = command.query_async(&mut self.connection).await.map_err(|error| failure(&error))?;
        Ok(Page { head: position(answer)?, publications: Vec::new() })
    }

    /// Publishes a node's message to itself.
    ///
    /// # Errors
    /// When it was not sent or not answered in time.
    pub async fn beat(&mut self, topic: &str, sent: u64) -> RedisResult<()> {
        redis::cmd("PUBLISH").arg(topic).arg(sent).query_async::<u64>(&mut self.connection).await.map(drop)
    }
}

fn random_epoch() -> Result<Epoch, BackboneError> {
    match getrandom::u32() {
        Ok(random) => Ok(Epoch(random.max(1))),
        Err(error) => Err(BackboneError::Refused(format!("the system gave no random number: {error}"))),
    }
}

fn epoch_of(text: &str) -> Result<Epoch, BackboneError> {
    text.parse().map_err(|_| malformed("an epoch of eight hexadecimal digits"))
}

/// Reads the answer of `HMGET meta epoch offset`.
fn position(answer: Value) -> Result<Position, BackboneError> {
    let (epoch, offset): (Option<String>, Option<u64>) =
        redis::from_redis_value(answer).map_err(|_| malformed("a position"))?;
    match epoch {
        Some(epoch) => Ok(Position { epoch: epoch_of(&epoch)?, offset: offset.unwrap_or(0) }),
        None => Ok(Position::default()),
    }
}

/// Reads the answer of `XRANGE`: entries of an id and fields. An entry whose id is no offset is left out.
fn stored(answer: Value) -> Result<Vec<Stored>, BackboneError> {
    let entries: Vec<(String, Vec<Value>)> =
        redis::from_redis_value(answer).map_err(|_| malformed("stream entries"))?;
    Ok(entries.into_iter().filter_map(|(id, fields)| entry(&id, fields)).collect())
}

/// The payload is field `d`, or the first field of an entry that another hand wrote.
fn entry(id: &str, fields: Vec<Value>) -> Option<Stored> {
    let offset = id.strip_suffix("-0")?.parse().ok()?;
    let mut fields = fields.into_iter();
    let mut payload = None;
    while let (Some(Value::BulkString(name)), Some(Value::BulkString(data))) = (fields.next(), fields.next()) {
        if name == b"d" || payload.is_none() {
            payload = Some(data);
        }
    }
    Some(Stored { offset, data: Bytes::from(payload?) })
}

fn malformed(wanted: &str) -> BackboneError {
    BackboneError::Refused(format!("the answer is not {wanted}"))
}

/// Sorts the crate's errors: an error the server answered with, or no answer.
#[must_use]
pub fn failure(error: &RedisError) -> BackboneError {
    match error.kind() {
        ErrorKind::Server(_) | ErrorKind::Extension => BackboneError::Refused(error.to_string()),
        _ => BackboneError::Unanswered(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_names_its_channel() {
        let keys = Keys::new("weir:");
        for name in ["news", "a}b", "{x}", "räume"] {
            assert_eq!(keys.channel_of(keys.topic(name).into_bytes()).as_deref(), Some(name));
        }
        for topic in ["weir:news", "weir:{news", "other:{news}", "weir:{", "", "weir:heartbeat:0000000000000001"] {
            assert_eq!(keys.channel_of(topic.as_bytes().to_vec()), None, "{topic}");
        }
        assert_eq!(keys.channel_of(keys.heartbeat(1).into_bytes()), None);
    }

    #[test]
    fn the_publishing_step_has_the_same_limits() {
        let most = crate::limits::HISTORY_MESSAGES_MOST;
        assert!(library::SOURCE.contains(&format!("whole(args[3], 1024, 0, {most})")));
        assert!(library::SOURCE.contains(&format!("local META_SECONDS = {META_SECONDS}\n")));
        assert!(library::SOURCE.contains(&format!("local TIME_IDS = '{TIME_IDS}'\n")));
    }
}
