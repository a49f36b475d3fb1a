//! What a client sends: commands, parsed without copying what needs no unescaping.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use super::code::DisconnectCode;

/// One command of a client.
#[derive(Debug)]
pub struct Command<'a> {
    /// What the reply must carry; 0 only on [`Method::Send`] and on the pong.
    pub id: u32,
    /// What it asks for.
    pub method: Method<'a>,
}

/// What a command asks for. Fields this server does not use are not parsed.
#[derive(Debug)]
pub enum Method<'a> {
    /// The first command of a connection.
    Connect(Connect<'a>),
    /// Starts a subscription.
    Subscribe(Subscribe<'a>),
    /// Ends a subscription.
    Unsubscribe {
        /// Which; not yet checked to be a channel name.
        channel: Cow<'a, str>,
    },
    /// Publishes into a channel.
    Publish(Publish<'a>),
    /// Reads from a channel's history.
    History(History<'a>),
    /// Asks who is in a channel.
    Presence {
        /// Which; not yet checked to be a channel name.
        channel: Cow<'a, str>,
    },
    /// Asks how many are in a channel.
    PresenceStats {
        /// Which; not yet checked to be a channel name.
        channel: Cow<'a, str>,
    },
    /// `{}`, the answer to a ping of the server; with an id it is a ping of the client, answered with an empty reply.
    Ping,
    /// Calls a procedure.
    Rpc {
        /// Its name.
        method: Cow<'a, str>,
    },
    /// A message without a reply.
    Send,
    /// A new token for the connection.
    Refresh {
        /// The token.
        token: Cow<'a, str>,
    },
    /// A new token for a subscription.
    SubRefresh {
        /// Which; not yet checked to be a channel name.
        channel: Cow<'a, str>,
        /// The token.
        token: Cow<'a, str>,
    },
    /// None of the above.
    Unknown,
}

/// Fields of `connect`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Connect<'a> {
    /// Proof of who the client is; empty when it has none.
    #[serde(borrow)]
    pub token: Cow<'a, str>,
    /// The client library's or application's name.
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    /// Its version.
    #[serde(borrow)]
    pub version: Cow<'a, str>,
}

/// Fields of `subscribe`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Subscribe<'a> {
    /// Which; not yet checked to be a channel name.
    #[serde(borrow)]
    pub channel: Cow<'a, str>,
    /// Proof that the client may; empty when it has none.
    #[serde(borrow)]
    pub token: Cow<'a, str>,
    /// Whether the client asks for what it missed after `epoch` and `offset`.
    pub recover: bool,
    /// The epoch of the client's position, as this server once said it or not.
    #[serde(borrow)]
    pub epoch: Cow<'a, str>,
    /// The last offset the client saw.
    pub offset: u64,
    /// Whether the client asks for positions.
    pub positioned: bool,
    /// Whether the client asks for recovery.
    pub recoverable: bool,
    /// Whether the client asks for pushes of who joins and leaves.
    pub join_leave: bool,
}

/// Fields of `publish`.
#[derive(Debug, Deserialize)]
pub struct Publish<'a> {
    /// Which; not yet checked to be a channel name.
    #[serde(borrow)]
    pub channel: Cow<'a, str>,
    /// The payload, as the client wrote it: valid JSON.
    #[serde(borrow)]
    pub data: &'a RawValue,
}

/// Fields of `history`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct History<'a> {
    /// Which; not yet checked to be a channel name.
    #[serde(borrow)]
    pub channel: Cow<'a, str>,
    /// Most publications to return: 0 asks for the position alone, below 0 for as many as the server gives.
    pub limit: i32,
    /// Only what came after (or, reversed, before) this position.
    #[serde(borrow)]
    pub since: Option<Since<'a>>,
    /// Newest first.
    pub reverse: bool,
}

/// A position as the client sends it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Since<'a> {
    /// The epoch, as this server once said it or not.
    #[serde(borrow)]
    pub epoch: Cow<'a, str>,
    /// The offset.
    pub offset: u64,
}

/// Why a frame is not made of commands. The connection ends with [`CommandError::disconnect`].
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Not JSON, or a field of the wrong type.
    #[error("not a command: {0}")]
    Json(#[from] serde_json::Error),
    /// JSON of another kind.
    #[error("a command is a JSON object")]
    NoObject,
    /// More than one method in one command.
    #[error("a command has one method; this one has {0}")]
    ManyMethods(usize),
    /// A method that is answered, without an id to answer to.
    #[error("a command has an id above 0, except send")]
    NoId,
}

impl CommandError {
    /// The code the connection ends with.
    #[must_use]
    pub fn disconnect(&self) -> DisconnectCode {
        match self {
            Self::Json(_) | Self::NoObject | Self::ManyMethods(_) | Self::NoId => DisconnectCode::BadRequest,
        }
    }
}

/// Reads the commands of one frame. The frame is over after the first error.
pub fn commands(frame: &str) -> impl Iterator<Item = Result<Command<'_>, CommandError>> {
    // A stream of JSON values needs no particular separator: newlines, a trailing one, and indented JSON all pass.
    let mut values = serde_json::Deserializer::from_str(frame).into_iter::<WireCommand<'_>>();
    let mut failed = false;
    std::iter::from_fn(move || {
        if failed {
            return None;
        }
        // The parser would take an array for a struct as well, field by field.
        let is_object = frame[values.byte_offset()..].trim_start().starts_with('{');
        let command = match values.next()? {
            Ok(_) if !is_object => Err(CommandError::NoObject),
            parsed => parsed.map_err(CommandError::Json).and_then(WireCommand::into_command),
        };
        failed = command.is_err();
        Some(command)
    })
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WireCommand<'a> {
    id: u32,
    #[serde(borrow)]
    connect: Option<Connect<'a>>,
    #[serde(borrow)]
    subscribe: Option<Subscribe<'a>>,
    #[serde(borrow)]
    unsubscribe: Option<ChannelOnly<'a>>,
    #[serde(borrow)]
    publish: Option<Publish<'a>>,
    #[serde(borrow)]
    history: Option<History<'a>>,
    #[serde(borrow)]
    presence: Option<ChannelOnly<'a>>,
    #[serde(borrow)]
    presence_stats: Option<ChannelOnly<'a>>,
    ping: Option<IgnoredAny>,
    #[serde(borrow)]
    rpc: Option<Rpc<'a>>,
    send: Option<IgnoredAny>,
    #[serde(borrow)]
    refresh: Option<Refresh<'a>>,
    #[serde(borrow)]
    sub_refresh: Option<Refresh<'a>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ChannelOnly<'a> {
    #[serde(borrow)]
    channel: Cow<'a, str>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Rpc<'a> {
    #[serde(borrow)]
    method: Cow<'a, str>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Refresh<'a> {
    #[serde(borrow)]
    channel: Cow<'a, str>,
    #[serde(borrow)]
    token: Cow<'a, str>,
}

impl<'a> WireCommand<'a> {
    fn into_command(self) -> Result<Command<'a>, CommandError> {
        let candidates = [
            self.connect.map(Method::Connect),
            self.subscribe.map(Method::Subscribe),
            self.unsubscribe.map(|of| Method::Unsubscribe { channel: of.channel }),
            self.publish.map(Method::Publish),
            self.history.map(Method::History),
            self.presence.map(|of| Method::Presence { channel: of.channel }),
            self.presence_stats.map(|of| Method::PresenceStats { channel: of.channel }),
            self.ping.map(|_| Method::Ping),
            self.rpc.map(|rpc| Method::Rpc { method: rpc.method }),
            self.send.map(|_| Method::Send),
            self.refresh.map(|refresh| Method::Refresh { token: refresh.token }),
            self.sub_refresh.map(|refresh| Method::SubRefresh { channel: refresh.channel, token: refresh.token }),
        ];
        let mut methods = candidates.into_iter().flatten();
        let method = match (methods.next(), methods.count()) {
            (Some(method), 0) => method,
            (None, _) if self.id == 0 => Method::Ping,
            (None, _) => Method::Unknown,
            (Some(_), others) => return Err(CommandError::ManyMethods(others + 1)),
        };
        if self.id == 0 && !matches!(method, Method::Send | Method::Ping) {
            return Err(CommandError::NoId);
        }
        Ok(Command { id: self.id, method })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(frame: &str) -> Result<Command<'_>, CommandError> {
        let mut all = commands(frame);
        let first = all.next().expect("a command");
        assert!(all.next().is_none());
        first
    }

    #[test]
    fn several_commands_in_one_frame() {
        let frame = "{\"id\":1,\"connect\":{\"token\":\"t\\u00fc\",\"name\":\"js\",\"subs\":{}}}\n\
            {\"id\":2,\"subscribe\":{\"channel\":\"chat:1\",\"recover\":true,\"epoch\":\"0000001f\",\"offset\":40}}\n{}\n";
        let all: Vec<_> = commands(frame).collect::<Result<_, _>>().unwrap();
        assert_eq!(all.len(), 3);
        let Method::Connect(connect) = &all[0].method else { panic!("{:?}", all[0]) };
        assert_eq!((all[0].id, &*connect.token, &*connect.name, &*connect.version), (1, "tü", "js", ""));
        let Method::Subscribe(subscribe) = &all[1].method else { panic!("{:?}", all[1]) };
        assert_eq!((&*subscribe.channel, subscribe.recover, &*subscribe.epoch), ("chat:1", true, "0000001f"));
        assert_eq!((subscribe.offset, &*subscribe.token), (40, ""));
        assert!(matches!(&subscribe.channel, Cow::Borrowed(_)), "nothing to unescape, nothing to copy");
        assert!(matches!(all[2], Command { id: 0, method: Method::Ping }));
    }

    #[test]
    fn every_method_has_its_variant() {
        let publish = one(r#"{"id":3,"publish":{"channel":"a","data": {"t" : [1,2]} }}"#).unwrap();
        let Method::Publish(publish) = publish.method else { panic!("{publish:?}") };
        assert_eq!((&*publish.channel, publish.data.get()), ("a", r#"{"t" : [1,2]}"#));
        let history =
            one(r#"{"id":4,"history":{"channel":"a","limit":-1,"since":{"offset":7,"epoch":"x"},"reverse":true}}"#);
        let Method::History(history) = history.unwrap().method else { panic!() };
        let since = history.since.unwrap();
        assert_eq!((history.limit, since.offset, &*since.epoch, history.reverse), (-1, 7, "x", true));
        let is = |frame, wanted: fn(&Method<'_>) -> bool| {
            let command = one(frame).unwrap();
            assert!(wanted(&command.method), "{frame}: {command:?}");
        };
        is(
            r#"{"id":1,"unsubscribe":{"channel":"a"}}"#,
            |m| matches!(m, Method::Unsubscribe { channel } if channel == "a"),
        );
        is(r#"{"id":1,"presence":{"channel":"a"}}"#, |m| matches!(m, Method::Presence { channel } if channel == "a"));
        is(r#"{"id":1,"presence_stats":{"channel":"a"}}"#, |m| matches!(m, Method::PresenceStats { .. }));
        is(r#"{"id":1,"rpc":{"method":"m","data":1}}"#, |m| matches!(m, Method::Rpc { method } if method == "m"));
        is(r#"{"send":{"data":{}}}"#, |m| matches!(m, Method::Send));
        is(r#"{"id":1,"refresh":{"token":"t"}}"#, |m| matches!(m, Method::Refresh { token } if token == "t"));
        is(r#"{"id":1,"sub_refresh":{"channel":"a","token":"t"}}"#, |m| matches!(m, Method::SubRefresh { .. }));
        is(r#"{"id":1,"ping":{}}"#, |m| matches!(m, Method::Ping));
        is(r#"{"id":1,"levitate":{}}"#, |m| matches!(m, Method::Unknown));
        is(r#"{"id":1}"#, |m| matches!(m, Method::Unknown));
    }

    #[test]
    fn what_is_no_command_ends_the_frame() {
        assert!(matches!(one(r#"{"subscribe":{"channel":"a"}}"#), Err(CommandError::NoId)));
        assert!(matches!(one(r#"{"id":1,"connect":{},"send":{}}"#), Err(CommandError::ManyMethods(2))));
        for frame in ["[1]", "[]", "[1,{}]", "{}\n[0]"] {
            assert!(matches!(commands(frame).last(), Some(Err(CommandError::NoObject))), "{frame}");
        }
        for frame in [
            "x",
            "7",
            "{",
            r#"{"id":-1,"connect":{}}"#,
            r#"{"id":4294967296,"connect":{}}"#,
            r#"{"id":1,"publish":{"channel":"a"}}"#,
            r#"{"id":1,"subscribe":{"channel":5}}"#,
            "{} x {}",
        ] {
            let last = commands(frame).last().unwrap();
            assert!(matches!(last, Err(CommandError::Json(_))), "{frame}: {last:?}");
            assert_eq!(last.unwrap_err().disconnect(), DisconnectCode::BadRequest);
        }
        assert_eq!(commands(" \n").count(), 0);
        let deep = format!(r#"{{"id":1,"publish":{{"channel":"a","data":{}}}}}"#, "[".repeat(60_000));
        assert!(one(&deep).is_err(), "deep nesting is refused, not a stack overflow");
    }
}
