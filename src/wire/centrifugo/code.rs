//! The protocol's numbers: replies that refuse, unsubscribe pushes, close codes.

macro_rules! codes {
    ($(#[$doc:meta])* $name:ident: $number:ty { $($(#[$variant_doc:meta])* $variant:ident = $code:literal, $text:literal;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr($number)]
        pub enum $name {
            $($(#[$variant_doc])* $variant = $code,)*
        }

        impl $name {
            /// Every code, in the order of the numbers.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The number on the wire.
            #[must_use]
            pub fn number(self) -> $number {
                self as $number
            }

            /// The text on the wire.
            #[must_use]
            pub fn text(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }
        }
    };
}

codes! {
    /// Why a command was refused; the connection goes on (centrifugal/centrifuge: errors.go).
    ErrorCode: u16 {
        /// The server failed; the client may try again.
        Internal = 100, "internal server error";
        /// The client did not say who it is.
        Unauthorized = 101, "unauthorized";
        /// The channel's kind is not configured.
        UnknownChannel = 102, "unknown channel";
        /// The client may not do this.
        PermissionDenied = 103, "permission denied";
        /// No such command, or not offered by this server.
        MethodNotFound = 104, "method not found";
        /// The connection has this subscription already.
        AlreadySubscribed = 105, "already subscribed";
        /// A bound of the server, such as channels per connection.
        LimitExceeded = 106, "limit exceeded";
        /// The command is malformed, such as a channel name that is none.
        BadRequest = 107, "bad request";
        /// The server does not offer this.
        NotAvailable = 108, "not available";
        /// The token has expired: the client gets a new one and tries again.
        TokenExpired = 109, "token expired";
        /// The connection or subscription has expired.
        Expired = 110, "expired";
        /// Slow down; the client may try again.
        TooManyRequests = 111, "too many requests";
        /// The position asked for is no longer in the history.
        UnrecoverablePosition = 112, "unrecoverable position";
    }
}

impl ErrorCode {
    /// Whether the same command may succeed later.
    #[must_use]
    pub fn temporary(self) -> bool {
        matches!(self, Self::Internal | Self::TooManyRequests)
    }
}

codes! {
    /// Why the server ended a subscription (centrifugal/centrifuge: unsubscribe.go). From 2500 on the client
    /// subscribes again by itself.
    UnsubscribeCode: u16 {
        /// The server wants it so.
        Server = 2000, "server unsubscribe";
        /// The server lost track of the position: publications may be missing.
        InsufficientState = 2500, "insufficient state";
        /// The subscription's token has expired.
        Expired = 2501, "expired";
        /// What the subscription was granted on has changed.
        StateInvalidated = 2502, "state invalidated";
    }
}

codes! {
    /// Why the server ended a connection: the WebSocket close code and reason (centrifugal/centrifuge: disconnect.go).
    /// [`reconnects`] tells which the client comes back after.
    DisconnectCode: u16 {
        /// The connection was closed without a reason.
        ConnectionClosed = 3000, "connection closed";
        /// The node stops.
        Shutdown = 3001, "shutdown";
        /// The server failed.
        ServerError = 3004, "internal server error";
        /// The connection's credentials have expired.
        Expired = 3005, "connection expired";
        /// A subscription's credentials have expired.
        SubscriptionExpired = 3006, "subscription expired";
        /// The client reads too slowly.
        Slow = 3008, "slow";
        /// The connection could not be written to.
        WriteError = 3009, "write error";
        /// The server lost track of a position: publications may be missing.
        InsufficientState = 3010, "insufficient state";
        /// The server asks the client to connect again.
        ForceReconnect = 3011, "force reconnect";
        /// The client did not answer a ping.
        NoPong = 3012, "no pong";
        /// The client asks too much.
        TooManyRequests = 3013, "too many requests";
        /// What the connection was granted on has changed.
        StateInvalidated = 3014, "state invalidated";
        /// The token is not valid.
        InvalidToken = 3500, "invalid token";
        /// The client broke the protocol.
        BadRequest = 3501, "bad request";
        /// The client did not connect in time.
        Stale = 3502, "stale";
        /// The server wants the client gone.
        ForceDisconnect = 3503, "force disconnect";
        /// The node or the user has too many connections.
        ConnectionLimit = 3504, "connection limit";
        /// The connection has too many channels.
        ChannelLimit = 3505, "channel limit";
        /// A message of a kind that this transport does not carry.
        InappropriateProtocol = 3506, "inappropriate protocol";
        /// The client may not connect.
        PermissionDenied = 3507, "permission denied";
        /// The server does not offer this.
        NotAvailable = 3508, "not available";
        /// Too many commands of the client failed.
        TooManyErrors = 3509, "too many errors";
    }
}

impl DisconnectCode {
    /// Whether the client connects again by itself.
    #[must_use]
    pub fn reconnects(self) -> bool {
        reconnects(self.number())
    }
}

/// Whether a client of this protocol connects again by itself after a close with this code: it stays away after
/// 3500–3999 and 4500–4999.
#[must_use]
pub fn reconnects(close_code: u16) -> bool {
    !matches!(close_code, 3500..=3999 | 4500..=4999)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_back() {
        for code in DisconnectCode::ALL {
            assert_eq!(code.reconnects(), code.number() < 3500, "{code:?}");
            // What a close frame holds: 125 bytes less the code (RFC 6455, section 5.5).
            assert!(code.text().len() <= 123, "{code:?}");
        }
        assert!(reconnects(1006) && reconnects(4000) && reconnects(4499) && reconnects(5000));
        assert!(!reconnects(4500) && !reconnects(4999) && !reconnects(3999));
    }

    #[test]
    fn numbers_rise() {
        assert!(ErrorCode::ALL.windows(2).all(|pair| pair[0].number() < pair[1].number()));
        assert!(DisconnectCode::ALL.windows(2).all(|pair| pair[0].number() < pair[1].number()));
    }
}
