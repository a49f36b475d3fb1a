//! Which strings name a channel.

use crate::limits::CHANNEL_NAME_BYTES;

/// Why a string is not a channel name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Zero bytes.
    #[error("a channel name has 1 to {CHANNEL_NAME_BYTES} bytes; this one is empty")]
    Empty,
    /// More than [`CHANNEL_NAME_BYTES`].
    #[error("a channel name has 1 to {CHANNEL_NAME_BYTES} bytes; this one has {0}")]
    TooLong(usize),
    /// A C0 or C1 control character or DEL: such a name could forge lines of an event stream or of a log.
    #[error("a channel name has no control characters; this one has U+{0:04X}")]
    Control(u32),
}

/// Checks a channel name: 1 to [`CHANNEL_NAME_BYTES`] bytes of UTF-8 without control characters.
///
/// # Errors
/// Says which rule was broken.
pub fn check(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > CHANNEL_NAME_BYTES {
        return Err(NameError::TooLong(name.len()));
    }
    match name.chars().find(|c| c.is_control()) {
        Some(c) => Err(NameError::Control(c as u32)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_and_control_characters() {
        assert_eq!(check("news"), Ok(()));
        assert_eq!(check("räume:köln"), Ok(()));
        assert_eq!(check(""), Err(NameError::Empty));
        assert_eq!(check(&"x".repeat(CHANNEL_NAME_BYTES)), Ok(()));
        assert_eq!(check(&"x".repeat(CHANNEL_NAME_BYTES + 1)), Err(NameError::TooLong(CHANNEL_NAME_BYTES + 1)));
        assert_eq!(check("a\nb"), Err(NameError::Control(10)));
        assert_eq!(check("a\u{7f}"), Err(NameError::Control(127)));
        assert_eq!(check("a\u{85}"), Err(NameError::Control(133)));
    }
}
