//! Brings the publishing step (`publish.lua`) to the server: as a function library, or as a script where there are none.

use redis::aio::MultiplexedConnection;
use redis::{Cmd, ErrorKind, RedisError, RedisResult, ServerErrorKind, Value};

/// The publishing step as a function library.
pub const SOURCE: &str = include_str!("../publish.lua");

/// What stands before the version number in the source, ours and any other version's.
const VERSION: &str = "weir publishing contract, version ";

/// How this server publishes.
#[derive(Debug, Clone)]
pub enum Publishing {
    /// `FCALL weir_publish`.
    Function,
    /// `EVALSHA` of the script with this SHA-1.
    Script(String),
}

impl Publishing {
    /// The command up to its keys.
    #[must_use]
    pub fn call(&self) -> Cmd {
        let mut command = Cmd::new();
        match self {
            Publishing::Function => command.arg("FCALL").arg("weir_publish"),
            Publishing::Script(sha) => command.arg("EVALSHA").arg(sha),
        };
        command
    }

    /// The command to send when the server lost the step (it was flushed, or the server is another one).
    ///
    /// # Errors
    /// When the library cannot be loaded.
    pub async fn restore(&self, connection: &mut MultiplexedConnection) -> RedisResult<Cmd> {
        match self {
            Publishing::Function => {
                load(connection).await?;
                Ok(self.call())
            }
            Publishing::Script(_) => {
                let mut command = Cmd::new();
                command.arg("EVAL").arg(script());
                Ok(command)
            }
        }
    }
}

/// Whether an answer says that the publishing step is not on the server.
#[must_use]
pub fn is_missing(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)
        || error.detail().is_some_and(|detail| detail.contains("Function not found"))
}

/// Makes sure that the server has the publishing step, of this version or a later one: a fleet is updated node by node, and
/// an older node must not undo the newer one's step.
///
/// # Errors
/// When the server cannot be asked. A server without functions, or that denies them to this user, gets the script.
pub async fn ensure(connection: &mut MultiplexedConnection) -> RedisResult<Publishing> {
    match ensure_library(connection).await {
        Ok(()) => Ok(Publishing::Function),
        Err(error) => match error.kind() {
            ErrorKind::Server(ServerErrorKind::ResponseError | ServerErrorKind::NoPerm) => {
                tracing::info!(%error, "redis takes no function library: publishing by script");
                let mut command = redis::cmd("SCRIPT");
                command.arg("LOAD").arg(script());
                Ok(Publishing::Script(command.query_async(connection).await?))
            }
            _ => Err(error),
        },
    }
}

async fn ensure_library(connection: &mut MultiplexedConnection) -> RedisResult<()> {
    let mut list = redis::cmd("FUNCTION");
    list.arg("LIST").arg("LIBRARYNAME").arg("weir").arg("WITHCODE");
    let answer: Value = list.query_async(connection).await?;
    let mut there = None;
    find_code(&answer, &mut |code| there = Some((version(code), code == SOURCE.as_bytes())));
    match there {
        Some((_, true)) => Ok(()),
        Some((theirs, false)) if theirs > version(SOURCE.as_bytes()) => Ok(()),
        _ => load(connection).await,
    }
}

async fn load(connection: &mut MultiplexedConnection) -> RedisResult<()> {
    let mut command = redis::cmd("FUNCTION");
    command.arg("LOAD").arg("REPLACE").arg(SOURCE);
    command.query_async::<Value>(connection).await.map(drop)
}

/// The script form: without the line that names the library.
fn script() -> &'static str {
    SOURCE.split_once('\n').map_or(SOURCE, |(_, rest)| rest)
}

/// The version a source says it has; 0 when it says none.
fn version(source: &[u8]) -> u32 {
    let Some(start) = memchr::memmem::find(source, VERSION.as_bytes()) else { return 0 };
    source[start + VERSION.len()..]
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .fold(0u32, |number, digit| number.saturating_mul(10).saturating_add(u32::from(digit - b'0')))
}

/// Finds the `library_code` of a `FUNCTION LIST` answer, whatever it is wrapped in: a map in RESP3, pairs in RESP2.
fn find_code<'a>(value: &'a Value, found: &mut impl FnMut(&'a [u8])) {
    let mut pair = |name: &'a Value, value: &'a Value| match (name, value) {
        (Value::BulkString(name), Value::BulkString(code)) if name == b"library_code" => found(code),
        _ => {}
    };
    match value {
        Value::Map(pairs) => pairs.iter().for_each(|(name, value)| pair(name, value)),
        Value::Array(items) => {
            items.windows(2).for_each(|window| pair(&window[0], &window[1]));
            items.iter().for_each(|item| find_code(item, found));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(version(SOURCE.as_bytes()), 2);
        assert_eq!(version(b"#!lua name=weir\n-- weir publishing contract, version 12\n"), 12);
        assert_eq!(version(b"#!lua name=weir\n"), 0);
    }

    #[test]
    fn the_script_has_no_library_line() {
        assert!(SOURCE.starts_with("#!lua name=weir\n"));
        assert!(script().starts_with("-- weir publishing contract"));
    }
}
