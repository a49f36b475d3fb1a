//! The opening handshake's headers, both sides (RFC 6455, section 4).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha1_smol::Sha1;

/// The only protocol version there is. A refusal with [`UpgradeError::Version`] must name it in a
/// `Sec-WebSocket-Version` response header (RFC 6455, section 4.4).
pub const VERSION: &str = "13";

/// What the key is hashed with: proof that the answer comes from a WebSocket server and not from a cache (RFC 6455, section 1.3).
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Characters of a `Sec-WebSocket-Key`: 16 bytes in base64, the last two being padding.
const KEY_CHARACTERS: usize = 24;

/// Why a request is not a WebSocket upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UpgradeError {
    /// No `Upgrade` header names `websocket`.
    #[error("a WebSocket request has the header \"Upgrade: websocket\"")]
    Upgrade,
    /// No `Connection` header names `Upgrade`: usual behind a proxy that was not told to forward upgrades.
    #[error("a WebSocket request has the header \"Connection: Upgrade\"; a proxy in between must forward it")]
    Connection,
    /// Another `Sec-WebSocket-Version` than [`VERSION`], or none.
    #[error("a WebSocket request has the header \"Sec-WebSocket-Version: {VERSION}\"; no other version is spoken here")]
    Version,
    /// `Sec-WebSocket-Key` is missing or is not 16 bytes in base64.
    #[error("a WebSocket request has a \"Sec-WebSocket-Key\" header of 16 bytes in base64")]
    Key,
}

impl UpgradeError {
    /// The HTTP status of the refusal: 426 when another request would be understood, with `Upgrade: websocket` and
    /// `Sec-WebSocket-Version` headers (RFC 9110, section 15.5.22; RFC 6455, section 4.2.2), else 400.
    pub fn status(self) -> u16 {
        match self {
            Self::Upgrade | Self::Version => 426,
            Self::Connection | Self::Key => 400,
        }
    }
}

/// Checks the headers of a `GET` request over HTTP/1.1 and returns the value of `Sec-WebSocket-Accept` (RFC 6455, section 4.2.1).
///
/// `upgrade` and `connection` are all values of headers that may be repeated; each value may be a comma-separated list.
/// An `Option<&str>` will do for either.
///
/// # Errors
/// Says which header is missing or wrong.
pub fn check_upgrade<'a>(
    upgrade: impl IntoIterator<Item = &'a str>,
    connection: impl IntoIterator<Item = &'a str>,
    version: Option<&str>,
    key: Option<&str>,
) -> Result<String, UpgradeError> {
    if !names(upgrade, "websocket") {
        return Err(UpgradeError::Upgrade);
    }
    if !names(connection, "upgrade") {
        return Err(UpgradeError::Connection);
    }
    if version.map(str::trim) != Some(VERSION) {
        return Err(UpgradeError::Version);
    }
    let key = key.map(str::trim).filter(|key| is_key(key)).ok_or(UpgradeError::Key)?;
    Ok(accept_key(key))
}

/// The `Sec-WebSocket-Accept` value that answers a `Sec-WebSocket-Key` (RFC 6455, section 4.2.2, item 5.4). A client compares.
pub fn accept_key(key: &str) -> String {
    let mut hash = Sha1::new();
    hash.update(key.as_bytes());
    hash.update(GUID);
    STANDARD.encode(hash.digest().bytes())
}

/// Whether a comma-separated list names `token`, in any letter case.
fn names<'a>(values: impl IntoIterator<Item = &'a str>, token: &str) -> bool {
    values.into_iter().flat_map(|value| value.split(',')).any(|item| item.trim().eq_ignore_ascii_case(token))
}

/// By shape and not by decoding: the key is never decoded, and clients exist that leave stray bits in its last character.
fn is_key(key: &str) -> bool {
    let in_alphabet = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'+' || byte == b'/';
    key.len() == KEY_CHARACTERS && key.strip_suffix("==").is_some_and(|digits| digits.bytes().all(in_alphabet))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
    const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

    #[test]
    fn the_example_of_rfc_6455_section_1_3() {
        assert_eq!(accept_key(KEY), ACCEPT);
        assert_eq!(check_upgrade(Some("websocket"), Some("Upgrade"), Some("13"), Some(KEY)).unwrap(), ACCEPT);
    }

    #[test]
    fn lists_repeated_headers_and_letter_case() {
        let accepted = check_upgrade(["h2c, WebSocket"], ["keep-alive", "x , upgrade"], Some(" 13 "), Some(KEY));
        assert_eq!(accepted.unwrap(), ACCEPT);
    }

    #[test]
    fn each_missing_or_wrong_header_is_named() {
        let check = |upgrade, connection, version, key| check_upgrade(upgrade, connection, version, key).unwrap_err();
        let (upgrade, connection, version, key) = (Some("websocket"), Some("Upgrade"), Some("13"), Some(KEY));
        assert_eq!(check(None, connection, version, key), UpgradeError::Upgrade);
        assert_eq!(check(Some("websockets"), connection, version, key), UpgradeError::Upgrade);
        assert_eq!(check(upgrade, None, version, key), UpgradeError::Connection);
        assert_eq!(check(upgrade, Some("close"), version, key), UpgradeError::Connection);
        assert_eq!(check(upgrade, connection, None, key), UpgradeError::Version);
        assert_eq!(check(upgrade, connection, Some("8"), key), UpgradeError::Version);
        for bad in [
            None,
            Some(""),
            Some("dGhlIHNhbXBsZSBub25jZQ"),
            Some("dGhlIHNhbXBsZSBub25jZQ==="),
            Some("dGhlIHNhbXBsZSBub25j ZQ="),
        ] {
            assert_eq!(check(upgrade, connection, version, bad), UpgradeError::Key, "{bad:?}");
        }
        assert_eq!(UpgradeError::Version.status(), 426);
        assert_eq!(UpgradeError::Key.status(), 400);
    }
}
