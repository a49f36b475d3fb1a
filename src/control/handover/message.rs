//! What two processes say to each other. Unknown fields are ignored and missing ones have a default, so that the two newest
//! versions understand each other; see [`PROTOCOL`].

use serde::{Deserialize, Serialize};

use super::Tally;
use super::pieces::PieceHead;
use crate::log::frame::Micros;

/// The version of the messages. A process understands its own, the one before and the one after.
pub const PROTOCOL: u32 = 1;

/// What a process is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Identity {
    /// Its [`PROTOCOL`].
    pub protocol: u32,
    /// Its [`crate::shard::handover::STATE_VERSION`].
    pub state: u32,
    /// Its release.
    pub version: String,
    /// Its process id.
    pub pid: u32,
}

impl Default for Identity {
    fn default() -> Self {
        Self { protocol: 0, state: 0, version: "unknown".into(), pid: 0 }
    }
}

impl Identity {
    /// This process.
    #[must_use]
    pub fn own() -> Self {
        Self {
            protocol: PROTOCOL,
            state: crate::shard::handover::STATE_VERSION,
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
        }
    }

    /// Whether two processes understand each other.
    ///
    /// # Errors
    /// Says which of their versions are too far apart.
    pub fn agree(&self, other: &Self) -> Result<(), String> {
        for (what, ours, theirs) in
            [("protocol", self.protocol, other.protocol), ("connection state", self.state, other.state)]
        {
            if ours.abs_diff(theirs) > 1 {
                return Err(format!(
                    "release {} has {what} {theirs}, release {} has {ours}; allowed: the same, one more or one less",
                    other.version, self.version
                ));
            }
        }
        Ok(())
    }
}

/// What the new process has to know of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// Shards of the old process.
    pub shards: usize,
    /// The prefix of its names in Redis; none with the embedded backbone.
    pub redis_prefix: Option<String>,
    /// Names its heartbeat.
    pub node: u64,
    /// How earlier hand-overs ended.
    pub tally: Tally,
}

/// One word of the conversation. Each says who says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum Message {
    /// New: I am here.
    Hello(Identity),
    /// Old: these are my listeners, or some of them.
    Listeners,
    /// Old: so am I, and you have all listeners.
    Welcome {
        /// Who says it.
        identity: Identity,
        /// What the node is.
        facts: Facts,
    },
    /// New: my threads run and nobody is accepted.
    Started,
    /// Old: part of what my relay holds. Bytes come with it.
    Piece(PieceHead),
    /// New: I took your last piece or batch in.
    Taken,
    /// Old: everything is seeded. Get ready.
    Seeded,
    /// New: every channel is subscribed to and held, since before this heartbeat of yours.
    Prepared {
        /// The heartbeat.
        beat: Micros,
    },
    /// Old: my shards stand still, and you have all that my relay had.
    Frozen {
        /// The last heartbeat seen.
        beat: Micros,
        /// When the first shard stood still.
        since: Micros,
    },
    /// Old: connections of one shard. Their sockets and states come with it.
    Connections {
        /// The shard.
        shard: usize,
        /// Bytes of each one's state.
        states: Vec<usize>,
    },
    /// Old: these were all.
    Sent {
        /// So many.
        connections: usize,
    },
    /// New: my shards have taken them in.
    Arrived {
        /// So many.
        connections: usize,
    },
    /// Old: serve them.
    Commit,
    /// New: I do.
    Mine,
    /// Either: it will not do, for this reason.
    Failed {
        /// The reason.
        reason: String,
    },
}

impl Message {
    /// Its name, for the log and errors.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Listeners => "listeners",
            Self::Welcome { .. } => "welcome",
            Self::Started => "started",
            Self::Piece(_) => "piece",
            Self::Taken => "taken",
            Self::Seeded => "seeded",
            Self::Prepared { .. } => "prepared",
            Self::Frozen { .. } => "frozen",
            Self::Connections { .. } => "connections",
            Self::Sent { .. } => "sent",
            Self::Arrived { .. } => "arrived",
            Self::Commit => "commit",
            Self::Mine => "mine",
            Self::Failed { .. } => "failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_agree_and_others_do_not() {
        let own = Identity { protocol: 5, state: 3, ..Identity::own() };
        for (protocol, state) in [(5, 3), (4, 3), (6, 3), (5, 2), (6, 4)] {
            let other = Identity { protocol, state, ..own.clone() };
            assert_eq!((own.agree(&other), other.agree(&own)), (Ok(()), Ok(())), "{protocol} {state}");
        }
        for (protocol, state, word) in
            [(3, 3, "protocol 3"), (7, 3, "protocol 7"), (5, 1, "state 1"), (5, 5, "state 5")]
        {
            let other = Identity { protocol, state, ..own.clone() };
            let reason = own.agree(&other).expect_err("too far apart");
            assert!(reason.contains(word) && reason.contains("allowed"), "{reason}");
            assert!(other.agree(&own).is_err());
        }
    }

    #[test]
    fn fields_of_other_versions_do_no_harm() {
        let text =
            r#"{"say":"welcome","identity":{"protocol":2,"colour":"blue"},"facts":{"shards":3,"moon":{}},"x":1}"#;
        let Message::Welcome { identity, facts } = serde_json::from_str(text).expect("it is understood") else {
            panic!("another message");
        };
        assert_eq!((identity.protocol, identity.version.as_str(), facts.shards), (2, "unknown", 3));
        assert_eq!(facts.tally, Tally::default());
        assert!(serde_json::from_str::<Message>(r#"{"say":"sing"}"#).is_err());
    }
}
