//! The address of a Redis server as an operator writes it: what it may be, and what may be shown of it.

use redis::{ConnectionInfo, IntoConnectionInfo, ProtocolVersion};

/// The forms of an address.
pub const FORMS: &str = "redis://[user:password@]host[:port][/db] or unix:///path[?db=n]; TLS is not supported";

/// Why a text is no address. A password in it is not repeated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{url}` is not a redis address ({reason}); allowed: {FORMS}")]
pub struct AddressError {
    url: String,
    reason: String,
}

impl AddressError {
    pub(super) fn new(url: &str, reason: &redis::RedisError) -> Self {
        Self { url: without_password(url), reason: reason.to_string() }
    }
}

/// Reads an address. Connections to it speak RESP3, where messages and answers share one connection.
///
/// # Errors
/// Says what is wrong with it.
pub fn parse(url: &str) -> Result<ConnectionInfo, AddressError> {
    let info = url.into_connection_info().map_err(|error| AddressError::new(url, &error))?;
    let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    Ok(info.set_redis_settings(settings))
}

/// The address with its password replaced, also when the rest is wrong: it ends up in logs.
#[must_use]
pub fn without_password(url: &str) -> String {
    let start = url.find("://").map_or(0, |at| at + 3);
    let Some(end) = url[start..].rfind('@').map(|at| start + at) else { return url.into() };
    let user = url[start..end].split(':').next().unwrap_or_default();
    format!("{}{user}:***{}", &url[..start], &url[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_shown() {
        for (given, shown) in [
            ("redis://:hunter2@h:6379", "redis://:***@h:6379"),
            ("redis://user:p@ss@h", "redis://user:***@h"),
            ("user:secret@h", "user:***@h"),
            ("redis://h:6379/1", "redis://h:6379/1"),
        ] {
            assert_eq!(without_password(given), shown);
        }
        let error = parse("redys://me:secret@host:1").unwrap_err().to_string();
        assert!(error.contains("redys://me:***@host:1") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn addresses_are_checked() {
        for good in ["redis://127.0.0.1", "redis://u:p@h:1/2", "unix:///run/redis.sock", "redis://[::1]:6379"] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in ["", "127.0.0.1:6379", "http://h", "rediss://h", "redis://", "redis://h:port"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
