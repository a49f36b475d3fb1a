//! What is sent to Redis and how its answers are read.

use std::sync::Arc;

use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{Cmd, ErrorKind, RedisError, Value};

use super::library::{self, Publishing};
use crate::backbone::interface::{BackboneError, Page, Read, Stored, Tag};
use crate::limits::{IDEMPOTENCY_SECONDS, META_SECONDS, PAST_EPOCHS};
use crate::log::position::{Epoch, Position};
use crate::settings::HistoryConfig;
use crate::shard::mailbox::Publish;

/// Begins a new epoch that continues the old one, if the channel is still in the epoch given.
/// KEYS meta. ARGV old epoch, new epoch, seconds meta is kept, characters of `was` kept.
const RENEW: &str = "if redis.call('HGET', KEYS[1], 'epoch') == ARGV[1] then \
     local was = (redis.call('HGET', KEYS[1], 'was') or '') .. ARGV[1] \
     redis.call('HSET', KEYS[1], 'epoch', ARGV[2], 'was', string.sub(was, -tonumber(ARGV[4]))) \
     redis.call('EXPIRE', KEYS[1], ARGV[3]) end \
     return redis.call('HMGET', KEYS[1], 'epoch', 'offset', 't', 'was')";

/// Begins an epoch when the channel has none. A stream that is there all the same is of an epoch whose meta was evicted: what
/// has offsets in it goes, what a plain XADD put there stays.
/// KEYS meta, stream. ARGV new epoch, seconds meta is kept, the first id that is a time.
const CREATE: &str = "if redis.call('HSETNX', KEYS[1], 'epoch', ARGV[1]) == 1 then \
     redis.call('XTRIM', KEYS[2], 'MINID', '=', ARGV[3]) \
     if redis.call('XLEN', KEYS[2]) == 0 then redis.call('DEL', KEYS[2]) end end \
     redis.call('EXPIRE', KEYS[1], ARGV[2])";

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

    /// The keys that a channel's position and history are stored under.
    #[must_use]
    pub fn of_channel(&self, channel: &str) -> [String; 2] {
        [self.meta(channel), self.stream(channel)]
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
    /// Whether the server has to be a primary.
    primary: bool,
}

impl Commands {
    /// Commands over `connection`, after making sure that the publishing step is there and, if `primary`, that the server is one.
    ///
    /// # Errors
    /// When the server cannot be asked, or is a replica.
    pub async fn prepare(
        mut connection: MultiplexedConnection,
        primary: bool,
        keys: Arc<Keys>,
        history: Arc<HistoryConfig>,
    ) -> Result<Self, BackboneError> {
        if primary {
            let role = redis::cmd("ROLE").query_async(&mut connection).await;
            check_role(role.map_err(|error| failure(&error))?)?;
        }
        let publishing = library::ensure(&mut connection).await.map_err(|error| failure(&error))?;
        Ok(Self { connection, keys, history, publishing, primary })
    }

    /// Whether the publishing step is a function, and not a script.
    #[must_use]
    pub fn by_function(&self) -> bool {
        matches!(self.publishing, Publishing::Function)
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
        let position = |pipeline: &mut redis::Pipeline| {
            pipeline.cmd("HMGET").arg(&meta).arg("epoch").arg("offset").arg("t").arg("was");
        };
        let range = |pipeline: &mut redis::Pipeline| {
            // Offsets end below TIME_IDS; entries above it have no offset yet.
            if read.reverse {
                let newest = read.since.map_or(TIME_IDS, |since| since.min(TIME_IDS));
                pipeline.cmd("XREVRANGE").arg(&stream).arg(format!("({newest}-0")).arg("-");
            } else {
                let oldest = read.since.unwrap_or(0);
                pipeline.cmd("XRANGE").arg(&stream).arg(format!("({oldest}-0")).arg(format!("({TIME_IDS}-0"));
            }
            pipeline.arg("COUNT").arg(read.limit);
        };
        let mut pipeline = redis::pipe();
        // What lies before a position does not grow, so it is read without a transaction, in two commands instead of four. The
        // position comes after it: when that is still in the epoch that is asked about, so was the range.
        let settled = read.reverse && read.since.is_some() && read.limit > 0;
        if settled {
            range(&mut pipeline);
            position(&mut pipeline);
        } else {
            pipeline.atomic();
            if read.create {
                pipeline.cmd("EVAL").arg(CREATE).arg(2).arg(&meta).arg(&stream);
                pipeline.arg(random_epoch()?.to_string()).arg(META_SECONDS).arg(TIME_IDS).ignore();
            }
            position(&mut pipeline);
            if read.limit > 0 {
                range(&mut pipeline);
            }
        }
        let mut answer: Vec<Value> =
            pipeline.query_async(&mut self.connection).await.map_err(|error| failure(&error))?;
        if settled {
            answer.reverse();
        }
        let publications = if read.limit > 0 { answer.pop().map(stored).transpose()? } else { None };
        let mut page = head(answer.pop().ok_or_else(|| malformed("a position"))?)?;
        page.publications = publications.unwrap_or_default();
        // When the position was evicted, the stream is still that of the epoch before.
        page.publications.retain(|stored| stored.offset <= page.head.offset);
        Ok(page)
    }

    /// See [`crate::backbone::interface::Backbone::renew`].
    ///
    /// # Errors
    /// See [`BackboneError`].
    pub async fn renew(mut self, channel: Arc<str>, epoch: Epoch) -> Result<Page, BackboneError> {
        let mut command = redis::cmd("EVAL");
        command.arg(RENEW).arg(1).arg(self.keys.meta(&channel));
        command.arg(epoch.to_string()).arg(random_epoch()?.to_string()).arg(META_SECONDS).arg(8 * PAST_EPOCHS);
        head(command.query_async(&mut self.connection).await.map_err(|error| failure(&error))?)
    }

    /// Publishes a node's message to itself. A server that has to be a primary is asked whether it still is.
    ///
    /// # Errors
    /// When it was not sent or not answered in time, or the server is a replica now.
    pub async fn beat(&mut self, topic: &str, sent: u64) -> Result<(), BackboneError> {
        let mut pipeline = redis::pipe();
        pipeline.cmd("PUBLISH").arg(topic).arg(sent).ignore();
        if self.primary {
            pipeline.cmd("ROLE");
        }
        let mut answer: Vec<Value> =
            pipeline.query_async(&mut self.connection).await.map_err(|error| failure(&error))?;
        answer.pop().map_or(Ok(()), check_role)
    }
}

/// Checks the answer of `ROLE`.
fn check_role(answer: Value) -> Result<(), BackboneError> {
    let role = match answer {
        Value::Array(parts) => parts.into_iter().next(),
        _ => None,
    };
    match role.map(redis::from_redis_value::<String>) {
        Some(Ok(role)) if role == "master" => Ok(()),
        Some(Ok(role)) => Err(BackboneError::Refused(format!("the server is no primary, it says of itself `{role}`"))),
        _ => Err(malformed("a role")),
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

/// Reads the answer of `HMGET meta epoch offset t was`: a page without publications.
fn head(answer: Value) -> Result<Page, BackboneError> {
    let (epoch, offset, tag, was): (Option<String>, Option<u64>, Option<u64>, Option<String>) =
        redis::from_redis_value(answer).map_err(|_| malformed("a position"))?;
    let head = match epoch {
        Some(epoch) => Position { epoch: epoch_of(&epoch)?, offset: offset.unwrap_or(0) },
        None => Position::default(),
    };
    let was = was.unwrap_or_default();
    let continues =
        was.as_bytes().chunks(8).filter_map(|epoch| std::str::from_utf8(epoch).ok()?.parse().ok()).collect();
    Ok(Page { head, tag: tag.map(Tag), continues, publications: Vec::new() })
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
    let (mut payload, mut tag, mut previous) = (None, None, None);
    while let (Some(Value::BulkString(name)), Some(Value::BulkString(data))) = (fields.next(), fields.next()) {
        match name.as_slice() {
            b"t" if payload.is_some() => tag = number(&data),
            b"p" if payload.is_some() => previous = number(&data),
            b"d" => payload = Some(data),
            _ => payload = payload.or(Some(data)),
        }
    }
    Some(Stored { offset, tag, previous, data: Bytes::from(payload?) })
}

fn number(text: &[u8]) -> Option<Tag> {
    std::str::from_utf8(text).ok()?.parse().ok().map(Tag)
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

    #[test]
    fn only_a_primary_is_one() {
        let role = |name: &str| Value::Array(vec![Value::BulkString(name.into()), Value::Int(7)]);
        assert_eq!(check_role(role("master")), Ok(()));
        assert!(check_role(role("slave")).unwrap_err().to_string().contains("no primary, it says of itself `slave`"));
        for other in [Value::Nil, Value::Array(vec![]), Value::Okay] {
            assert!(check_role(other).is_err());
        }
    }

    #[test]
    fn an_entry_is_read_whatever_else_it_has() {
        let fields = |pairs: &[(&str, &str)]| {
            let text = |text: &str| Value::BulkString(text.into());
            pairs.iter().flat_map(|(name, data)| [text(name), text(data)]).collect::<Vec<_>>()
        };
        let data = Bytes::from_static(b"x");
        let ours = entry("7-0", fields(&[("d", "x"), ("t", "12"), ("p", "11")]));
        assert_eq!(ours, Some(Stored { offset: 7, tag: Some(Tag(12)), previous: Some(Tag(11)), data: data.clone() }));
        // Another hand's: its first field is the payload, whatever it is called.
        let other = entry("7-0", fields(&[("t", "x"), ("n", "1")]));
        assert_eq!(other, Some(Stored { offset: 7, tag: None, previous: None, data }));
        assert_eq!(entry("7-1", fields(&[("d", "x")])), None);
    }
}
