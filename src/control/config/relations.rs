//! What values must be to each other.

use std::collections::BTreeMap;

use super::keys::Draft;
use super::{ConfigError, Origin, find};

/// One relation between two keys.
struct Relation {
    left: &'static str,
    relation: &'static str,
    right: &'static str,
    reason: &'static str,
    holds: fn(&Draft) -> bool,
}

/// A lag bound may not reach past what the log holds.
const IN_THE_LOG: &str = "whoever may lag must still be in the log";

const RELATIONS: &[Relation] = &[
    Relation {
        left: "lag.messages",
        relation: "at most",
        right: "history.messages",
        reason: IN_THE_LOG,
        holds: |d| d.settings.lag.messages <= d.settings.history.messages as u64,
    },
    Relation {
        left: "lag.bytes",
        relation: "at most",
        right: "history.bytes",
        reason: IN_THE_LOG,
        holds: |d| d.settings.lag.bytes <= d.settings.history.bytes as u64,
    },
    Relation {
        left: "lag.age",
        relation: "at most",
        right: "history.age",
        reason: IN_THE_LOG,
        holds: |d| d.settings.lag.age <= d.settings.history.age,
    },
    Relation {
        left: "limits.publication_bytes",
        relation: "at most half of",
        right: "history.bytes",
        reason: "the log must hold the largest publication in any wire format",
        holds: |d| d.settings.limits.publication_bytes.saturating_mul(2) <= d.settings.history.bytes,
    },
    Relation {
        left: "limits.publication_bytes",
        relation: "at most half of",
        right: "lag.bytes",
        reason: "one large publication must not make every subscriber too slow",
        holds: |d| d.settings.limits.publication_bytes.saturating_mul(2) as u64 <= d.settings.lag.bytes,
    },
    Relation {
        left: "limits.publication_bytes",
        relation: "at most",
        right: "limits.body_bytes",
        reason: "a publication arrives in a request body",
        holds: |d| d.settings.limits.publication_bytes <= d.settings.limits.body_bytes,
    },
    Relation {
        left: "websocket.pong",
        relation: "at most",
        right: "websocket.ping",
        reason: "a ping must be answered by the time the next is sent",
        holds: |d| d.settings.websocket.pong <= d.settings.websocket.ping,
    },
];

/// The relations that do not hold, but for those of a key whose value was refused already.
pub(super) fn broken(
    draft: &mut Draft,
    origins: &BTreeMap<&'static str, Origin>,
    refused: impl Fn(&str) -> bool,
) -> Vec<ConfigError> {
    let mut errors = Vec::new();
    for relation in RELATIONS {
        let Relation { left, right, .. } = *relation;
        if refused(left) || refused(right) || (relation.holds)(draft) {
            continue;
        }
        let mut value = |name| (find(name).expect("relations name keys").place)(draft).show();
        let origin = |name| origins.get(name).cloned().unwrap_or(Origin::Default);
        errors.push(ConfigError::Relation {
            left,
            left_value: value(left),
            left_origin: origin(left),
            relation: relation.relation,
            right,
            right_value: value(right),
            right_origin: origin(right),
            reason: relation.reason,
        });
    }
    errors
}
