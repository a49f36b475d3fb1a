//! Request targets (RFC 9112, section 3.2), percent-encoding (RFC 3986, section 2.1) and query strings
//! (application/x-www-form-urlencoded, WHATWG URL, section 5).

use std::borrow::Cow;

/// Why a request target cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Not a path, an absolute http or https URL, or `*`.
    #[error("it is neither a path nor an http URL")]
    Form,
    /// A `%` without two hexadecimal digits.
    #[error("a % is followed by two hexadecimal digits; a plain % is written %25")]
    Percent,
    /// Decoded, it is not text.
    #[error("percent-encoded bytes are UTF-8")]
    Utf8,
}

/// The path and the query of a request target, both still encoded.
pub(super) fn split(target: &str) -> Result<(&str, &str), TargetError> {
    // A server must take the absolute form too (RFC 9112, section 3.2.2); what a proxy would need of it is not ours.
    let local = match target.strip_prefix("http://").or_else(|| target.strip_prefix("https://")) {
        Some(rest) => &rest[rest.find(['/', '?']).unwrap_or(rest.len())..],
        None if target.starts_with('/') || target == "*" => target,
        None => return Err(TargetError::Form),
    };
    let (path, query) = local.split_once('?').unwrap_or((local, &local[local.len()..]));
    Ok((if path.is_empty() { "/" } else { path }, query))
}

/// Decodes `%41` and, in a query, `+` for a space.
///
/// # Errors
/// When a `%` is malformed or the result is not UTF-8.
pub fn percent_decode(text: &str, plus_is_space: bool) -> Result<Cow<'_, str>, TargetError> {
    if !text.bytes().any(|byte| byte == b'%' || (plus_is_space && byte == b'+')) {
        return Ok(Cow::Borrowed(text));
    }
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit =
                    || bytes.next().and_then(|byte| char::from(byte).to_digit(16)).ok_or(TargetError::Percent);
                (digit()? << 4 | digit()?) as u8
            }
            b'+' if plus_is_space => b' ',
            other => other,
        });
    }
    String::from_utf8(decoded).map(Cow::Owned).map_err(|_| TargetError::Utf8)
}

/// Encodes everything but letters, digits and `-._~`: the result stands in a path segment and in a query.
#[must_use]
pub fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            let digit = |value: u8| char::from(b"0123456789ABCDEF"[usize::from(value & 15)]);
            encoded.extend(['%', digit(byte >> 4), digit(byte)]);
        }
    }
    encoded
}

/// The pairs of a query string, decoded. A name without `=` has the empty value.
pub fn pairs(query: &str) -> impl Iterator<Item = Result<(Cow<'_, str>, Cow<'_, str>), TargetError>> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        Ok((percent_decode(name, true)?, percent_decode(value, true)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forms_of_a_target() {
        assert_eq!(split("/a?b=c?d"), Ok(("/a", "b=c?d")));
        assert_eq!(split("/"), Ok(("/", "")));
        assert_eq!(split("http://h:80/a?b"), Ok(("/a", "b")));
        assert_eq!(split("http://h?b"), Ok(("/", "b")));
        assert_eq!(split("https://h"), Ok(("/", "")));
        assert_eq!(split("*"), Ok(("*", "")));
        for target in ["", "a", "h:443", "ftp://h/", "?a"] {
            assert_eq!(split(target), Err(TargetError::Form), "{target}");
        }
    }

    #[test]
    fn percent_encoding_goes_both_ways() {
        for text in ["", "news", "a b/c?d&e=f+g%", "räume:köln", "\u{0}\u{1F600}"] {
            assert_eq!(percent_decode(&percent_encode(text), false).unwrap(), text);
            assert_eq!(percent_decode(&percent_encode(text), true).unwrap(), text);
        }
        assert_eq!(percent_decode("a+b%2B", false).unwrap(), "a+b+");
        assert_eq!(percent_decode("a+b%2b", true).unwrap(), "a b+");
        for text in ["%", "%4", "%4g", "%%41", "a%", "%+1"] {
            assert_eq!(percent_decode(text, false), Err(TargetError::Percent), "{text}");
        }
        assert_eq!(percent_decode("%ff", false), Err(TargetError::Utf8));
        assert_eq!(percent_decode("%C3%BC", false).unwrap(), "ü");
    }

    #[test]
    fn pairs_of_a_query() {
        let all = |query| pairs(query).collect::<Result<Vec<_>, _>>();
        let pair = |name: &'static str, value: &'static str| (Cow::from(name), Cow::from(value));
        assert_eq!(
            all("channel=a&channel=b%26c&&x&y=1=2&=z").unwrap(),
            [pair("channel", "a"), pair("channel", "b&c"), pair("x", ""), pair("y", "1=2"), pair("", "z")]
        );
        assert_eq!(all("").unwrap(), []);
        assert_eq!(all("a=%zz"), Err(TargetError::Percent));
    }
}
