//! The address of a Redis server as an operator writes it: what it may be, and what may be shown of it.

use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, RedisConnectionInfo};

use crate::limits::SENTINELS_MOST;

/// The forms of an address.
pub const FORMS: &str = "redis://[user:password@]host[:port][/db] or unix:///path[?db=n] or \
     redis+sentinel://[user:password@]host[:port][,host[:port]...]/primary[/db][?password=p][&user=u] (the user before @ is \
     for the primary, the one after ? for the sentinels); TLS is not supported";

/// What an address through sentinels begins with.
const SENTINEL: &str = "redis+sentinel://";
/// Where a sentinel listens unless it is told otherwise.
const SENTINEL_PORT: u16 = 26_379;

/// Where the backbone is.
#[derive(Debug, Clone)]
pub enum Address {
    /// On this server.
    Server(ConnectionInfo),
    /// On the server that these name.
    Sentinels(SentinelGroup),
}

/// Sentinels, and whom to ask them for.
#[derive(Debug, Clone)]
pub struct SentinelGroup {
    /// At least one.
    pub sentinels: Vec<ConnectionInfo>,
    /// What they call the primary and its replicas.
    pub name: String,
    /// How to introduce oneself to the primary.
    pub settings: RedisConnectionInfo,
}

/// Why a text is no address. A password in it is not repeated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{url}` is not a redis address ({reason}); allowed: {FORMS}")]
pub struct AddressError {
    url: String,
    reason: String,
}

impl AddressError {
    pub(super) fn new(url: &str, reason: &str) -> Self {
        Self { url: without_password(url), reason: reason.to_owned() }
    }
}

/// Reads an address. Connections to it speak RESP3, where messages and answers share one connection.
///
/// # Errors
/// Says what is wrong with it.
pub fn parse(url: &str) -> Result<Address, AddressError> {
    let address = match url.strip_prefix(SENTINEL) {
        Some(rest) => sentinels(rest).map(Address::Sentinels),
        None => server(url).map(Address::Server),
    };
    address.map_err(|reason| AddressError::new(url, &reason))
}

fn server(url: &str) -> Result<ConnectionInfo, String> {
    let info = url.into_connection_info().map_err(|error| error.to_string())?;
    let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    Ok(info.set_redis_settings(settings))
}

/// Reads `[user:password@]host[:port][,host[:port]...]/primary[/db][?password=p][&user=u]`. Users, passwords, hosts and
/// numbers are read as in an address of the plain form.
fn sentinels(rest: &str) -> Result<SentinelGroup, String> {
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (user, rest) = match rest.rfind('@') {
        Some(at) => rest.split_at(at + 1),
        None => ("", rest),
    };
    let (hosts, path) = rest.split_once('/').ok_or("the primary's name is missing")?;
    let (name, db) = path.split_once('/').unwrap_or((path, "0"));
    if name.is_empty() {
        return Err("the primary's name is missing".into());
    }
    let settings = server(&format!("redis://{user}primary/{db}"))?.redis_settings().clone();
    let (mut user, mut password) = ("", "");
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("user", text)) => user = text,
            Some(("password", text)) => password = text,
            _ => return Err(format!("`{}` is no option", pair.split('=').next().unwrap_or_default())),
        }
    }
    let own = if password.is_empty() { String::new() } else { format!("{user}:{password}@") };
    let sentinels: Vec<_> = hosts.split(',').map(|host| sentinel(&own, host)).collect::<Result<_, _>>()?;
    if sentinels.len() > SENTINELS_MOST {
        return Err(format!("{} sentinels, at most {SENTINELS_MOST} are asked", sentinels.len()));
    }
    Ok(SentinelGroup { sentinels, name: name.into(), settings })
}

fn sentinel(user: &str, host: &str) -> Result<ConnectionInfo, String> {
    let info = server(&format!("redis://{user}{host}"))?;
    // The plain form would add the port of a server.
    let has_port = host.rsplit_once(':').is_some_and(|(name, _)| !name.contains(':') || name.ends_with(']'));
    match info.addr().clone() {
        ConnectionAddr::Tcp(name, _) if !has_port => Ok(info.set_addr(ConnectionAddr::Tcp(name, SENTINEL_PORT))),
        _ => Ok(info),
    }
}

/// The address with its passwords replaced, also when the rest is wrong: it ends up in logs.
#[must_use]
pub fn without_password(url: &str) -> String {
    let start = url.find("://").map_or(0, |at| at + 3);
    let mut shown = url.to_owned();
    if let Some(at) = url.rfind("password=").filter(|_| url.starts_with(SENTINEL)).map(|at| at + "password=".len()) {
        let end = url[at..].find('&').map_or(url.len(), |length| at + length);
        shown.replace_range(at..end, "***");
    }
    let Some(end) = shown[start..].rfind('@').map(|at| start + at) else { return shown };
    let user = shown[start..end].split(':').next().unwrap_or_default();
    format!("{}{user}:***{}", &shown[..start], &shown[end..])
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
            ("redis+sentinel://u:p@a,b/main?password=s&user=v", "redis+sentinel://u:***@a,b/main?password=***&user=v"),
            ("redis+sentinel://a/main?user=v&password=p@ss", "redis+sentinel://a/main?user=v&password=***"),
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

    fn group(url: &str) -> SentinelGroup {
        match parse(url) {
            Ok(Address::Sentinels(group)) => group,
            other => panic!("{url}: {other:?}"),
        }
    }

    #[test]
    fn sentinels_are_read() {
        let plain = group("redis+sentinel://one,two:7000,[::1]:7001,[::1]/main");
        let addresses: Vec<String> = plain.sentinels.iter().map(|info| info.addr().to_string()).collect();
        assert_eq!(addresses, ["one:26379", "two:7000", "::1:7001", "::1:26379"].map(String::from));
        assert_eq!((plain.name.as_str(), plain.settings.db(), plain.settings.password()), ("main", 0, None));
        let full = group("redis+sentinel://u:p%40ss@one:7000/main/3?user=v&password=s");
        let settings = &full.settings;
        assert_eq!((settings.username(), settings.password(), settings.db()), (Some("u"), Some("p@ss"), 3));
        let own = full.sentinels[0].redis_settings();
        assert_eq!((own.username(), own.password(), own.db()), (Some("v"), Some("s"), 0));
        assert_eq!((own.protocol(), settings.protocol()), (ProtocolVersion::RESP3, ProtocolVersion::RESP3));
        for (bad, reason) in [
            ("redis+sentinel://one", "name is missing"),
            ("redis+sentinel://one/", "name is missing"),
            ("redis+sentinel:///main", ""),
            ("redis+sentinel://one,/main", ""),
            ("redis+sentinel://one/main/x", ""),
            ("redis+sentinel://one:port/main", ""),
            ("redis+sentinel://one/main?passwort=secret", "`passwort` is no option"),
        ] {
            let error = parse(bad).map(|address| panic!("{bad}: {address:?}")).unwrap_err();
            assert!(error.reason.contains(reason), "{bad}: {error}");
        }
        let many = format!("redis+sentinel://{}/main", ["h"; SENTINELS_MOST + 1].join(","));
        assert!(parse(&many).unwrap_err().reason.contains("at most"));
    }
}
