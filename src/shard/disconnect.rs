//! Why an established connection ended: one closed enum with the close code, the text a client sees, the metric label
//! and whether the client comes back.

use crate::metrics::{DISCONNECT_REASONS, ShardMetrics};
use crate::wire::centrifugo::{DisconnectCode, reconnects};

/// Why an established connection ended. The order is that of [`DISCONNECT_REASONS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Disconnect {
    /// The peer vanished: end of stream or reset without a close frame. Nothing can be sent to it.
    ClientGone,
    /// The client closed in order.
    ClientClosed,
    /// The node stops.
    Shutdown,
    /// It fell further behind than the bounds of `lag` allow.
    Slow,
    /// A WebSocket that did not send its `connect` command in time.
    Stale,
    /// A ping was not answered in time.
    NoPong,
    /// A command that cannot be understood or is not allowed at this point.
    BadRequest,
    /// The WebSocket framing rules were broken (RFC 6455).
    ProtocolError,
    /// A message of more bytes than allowed.
    MessageTooBig,
    /// A text message that is not UTF-8.
    InvalidUtf8,
    /// The node failed; the log says how.
    InternalError,
    /// The node cannot go on where the client is: a gap or another epoch.
    InsufficientState,
    /// The node has as many connections as it takes.
    ConnectionLimit,
    /// The kernel refused to send for a reason other than a full buffer or a vanished peer.
    WriteError,
    /// A poll that waited has its answer.
    Answered,
}

impl Disconnect {
    /// Every reason, in order.
    pub const ALL: [Self; DISCONNECT_REASONS.len()] = [
        Self::ClientGone,
        Self::ClientClosed,
        Self::Shutdown,
        Self::Slow,
        Self::Stale,
        Self::NoPong,
        Self::BadRequest,
        Self::ProtocolError,
        Self::MessageTooBig,
        Self::InvalidUtf8,
        Self::InternalError,
        Self::InsufficientState,
        Self::ConnectionLimit,
        Self::WriteError,
        Self::Answered,
    ];

    /// Its code in the Centrifugo client protocol; none for faults of the framing, which have codes of RFC 6455.
    const fn centrifugo(self) -> Option<DisconnectCode> {
        Some(match self {
            Self::ClientGone | Self::ClientClosed | Self::Answered => DisconnectCode::ConnectionClosed,
            Self::Shutdown => DisconnectCode::Shutdown,
            Self::Slow => DisconnectCode::Slow,
            Self::Stale => DisconnectCode::Stale,
            Self::NoPong => DisconnectCode::NoPong,
            Self::BadRequest => DisconnectCode::BadRequest,
            Self::InternalError => DisconnectCode::ServerError,
            Self::InsufficientState => DisconnectCode::InsufficientState,
            Self::ConnectionLimit => DisconnectCode::ConnectionLimit,
            Self::WriteError => DisconnectCode::WriteError,
            Self::ProtocolError | Self::MessageTooBig | Self::InvalidUtf8 => return None,
        })
    }

    /// The WebSocket close code: RFC 6455 section 7.4.1 for faults of the framing, else the Centrifugo client protocol's.
    #[must_use]
    pub fn code(self) -> u16 {
        match (self.centrifugo(), self) {
            (Some(code), _) => code.number(),
            (None, Self::InvalidUtf8) => 1007,
            (None, Self::MessageTooBig) => 1009,
            (None, _) => 1002,
        }
    }

    /// The reason as the client reads it, short enough for a close frame (123 bytes, RFC 6455 section 5.5).
    #[must_use]
    pub fn reason(self) -> &'static str {
        match (self.centrifugo(), self) {
            (Some(code), _) => code.text(),
            (None, Self::InvalidUtf8) => "invalid UTF-8",
            (None, Self::MessageTooBig) => "message too big",
            (None, _) => "protocol error",
        }
    }

    /// The value of the metric's `reason` label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        DISCONNECT_REASONS[self as usize]
    }

    /// Whether clients come back after this code by themselves. They do not after 1009, since the same message would be too
    /// big again.
    #[must_use]
    pub fn reconnect(self) -> bool {
        self != Self::MessageTooBig && reconnects(self.code())
    }

    /// Counts one ended connection.
    pub fn count(self, metrics: &ShardMetrics) {
        metrics.disconnects[self as usize].add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_follow_the_names() {
        for (index, reason) in Disconnect::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
            let mut snake = String::new();
            for letter in format!("{reason:?}").chars() {
                if letter.is_ascii_uppercase() && !snake.is_empty() {
                    snake.push('_');
                }
                snake.push(letter.to_ascii_lowercase());
            }
            assert_eq!(reason.label(), snake);
            assert!(reason.reason().len() <= 123);
        }
    }

    #[test]
    fn who_cannot_succeed_by_retrying_is_told_to_stay_away() {
        let away: Vec<_> = Disconnect::ALL.into_iter().filter(|reason| !reason.reconnect()).collect();
        assert_eq!(
            away,
            [Disconnect::Stale, Disconnect::BadRequest, Disconnect::MessageTooBig, Disconnect::ConnectionLimit]
        );
    }

    #[test]
    fn counting_reaches_the_right_label() {
        let metrics = ShardMetrics::default();
        Disconnect::Slow.count(&metrics);
        let index = DISCONNECT_REASONS.iter().position(|label| *label == "slow").unwrap();
        assert_eq!(metrics.disconnects[index].get(), 1);
    }
}
