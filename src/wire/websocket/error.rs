//! What a peer can do wrong, and the close code that answers it. Sections are of RFC 6455.

use crate::limits::CONTROL_FRAME_BYTES;

/// How a peer broke the protocol. The connection cannot go on. The texts are short enough for a close frame's reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Section 5.1: clients mask.
    #[error("a client's frames must be masked")]
    Unmasked,
    /// Section 5.1: servers do not.
    #[error("a server's frames must not be masked")]
    Masked,
    /// Section 5.2: no extension was negotiated that would give the bits a meaning.
    #[error("reserved bits must be 0: no extension was negotiated")]
    ReservedBits,
    /// Section 5.2: 3 to 7 and 11 to 15.
    #[error("opcode {0} is reserved; known are 0, 1, 2, 8, 9 and 10")]
    ReservedOpcode(u8),
    /// Section 5.5.
    #[error("a control frame must not be fragmented")]
    FragmentedControl,
    /// Section 5.5.
    #[error("a control frame has at most {CONTROL_FRAME_BYTES} bytes")]
    ControlTooLong,
    /// Section 5.2: the shortest form of the length must be used.
    #[error("a frame's length must be in its shortest form")]
    LengthNotMinimal,
    /// Section 5.2: a 64-bit length has its highest bit 0.
    #[error("a frame's length must be below 2^63")]
    LengthTooLarge,
    /// Section 5.4: a continuation frame without a message to continue.
    #[error("a continuation frame must follow a fragment of a message")]
    UnexpectedContinuation,
    /// Section 5.4: a new message before the last one's final fragment.
    #[error("a fragmented message must end before the next begins")]
    ExpectedContinuation,
    /// Section 5.5.1: one byte is half a code.
    #[error("a close frame is empty or begins with a two-byte code")]
    CloseTruncated,
    /// Section 7.4: below 1000, reserved, or one that must not travel.
    #[error("close code {0} must not be sent; allowed are 1000-1003, 1007-1014 and 3000-4999")]
    CloseCode(u16),
    /// Section 8.1: in a text message or a close frame's reason.
    #[error("text must be UTF-8")]
    InvalidUtf8,
    /// The message, over all its fragments, is larger than this side takes.
    #[error("the message is too big")]
    TooBig,
}

impl ProtocolError {
    /// The code of the close frame that answers it: 1002, 1007 or 1009 (RFC 6455, section 7.4.1). The error's text is the reason.
    pub fn close_code(self) -> u16 {
        match self {
            Self::InvalidUtf8 => 1007,
            Self::TooBig => 1009,
            _ => 1002,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_fits_a_close_frame() {
        for error in [
            ProtocolError::Unmasked,
            ProtocolError::Masked,
            ProtocolError::ReservedBits,
            ProtocolError::ReservedOpcode(15),
            ProtocolError::FragmentedControl,
            ProtocolError::ControlTooLong,
            ProtocolError::LengthNotMinimal,
            ProtocolError::LengthTooLarge,
            ProtocolError::UnexpectedContinuation,
            ProtocolError::ExpectedContinuation,
            ProtocolError::CloseTruncated,
            ProtocolError::CloseCode(u16::MAX),
            ProtocolError::InvalidUtf8,
            ProtocolError::TooBig,
        ] {
            let text = error.to_string();
            assert!(text.len() <= CONTROL_FRAME_BYTES - 2, "{} bytes: {text}", text.len());
        }
    }
}
