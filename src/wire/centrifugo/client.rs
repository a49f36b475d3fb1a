//! The client's side of the protocol, as far as our own tools speak it.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::reply::Object;

/// Appends a `connect` command. `token` may be empty.
pub fn write_connect_command(out: &mut Vec<u8>, id: u32, token: &str, name: &str) {
    command(out, id, "connect", |connect| {
        connect.text("token", token).text("name", name);
    });
}

/// Appends a `subscribe` command; with a position (epoch, offset) it asks for what came after it.
pub fn write_subscribe_command(out: &mut Vec<u8>, id: u32, channel: &str, recover: Option<(&str, u64)>) {
    command(out, id, "subscribe", |subscribe| {
        subscribe.text("channel", channel);
        if let Some((epoch, offset)) = recover {
            subscribe.flag("recover", true).text("epoch", epoch).number("offset", offset);
        }
    });
}

/// Appends the answer to a ping of the server.
pub fn write_pong(out: &mut Vec<u8>) {
    out.extend_from_slice(b"{}");
}

fn command(out: &mut Vec<u8>, id: u32, method: &str, fill: impl FnOnce(&mut Object<'_>)) {
    let mut command = Object::open(out);
    command.number("id", id.into()).object(method, fill);
    command.close();
}

/// One message of the server.
#[derive(Debug)]
pub enum ServerMessage<'a> {
    /// The reply to `connect`.
    Connected {
        /// The command's id.
        id: u32,
        /// The connection's name.
        client: Cow<'a, str>,
        /// Interval of the server's pings, in seconds.
        ping: u32,
        /// Whether each wants an answer.
        pong: bool,
    },
    /// The reply to `subscribe`.
    Subscribed {
        /// The command's id.
        id: u32,
        /// The channel's epoch.
        epoch: Cow<'a, str>,
        /// The channel's head once `publications` are seen.
        offset: u64,
        /// Whether nothing is missing since the position the client named.
        recovered: bool,
        /// Whether recovery was asked for.
        was_recovering: bool,
        /// What recovery found, oldest first.
        publications: Vec<Publication<'a>>,
    },
    /// A publication of a subscribed channel.
    Publication {
        /// Which channel.
        channel: Cow<'a, str>,
        /// What was published.
        publication: Publication<'a>,
    },
    /// The server's ping.
    Ping,
    /// A command was refused.
    Error {
        /// The command's id.
        id: u32,
        /// See [`super::ErrorCode`].
        code: u32,
        /// For people.
        message: Cow<'a, str>,
        /// Whether the same command may succeed later.
        temporary: bool,
    },
    /// The server ends the connection (transports without close codes).
    Disconnect {
        /// See [`super::DisconnectCode`].
        code: u32,
        /// For people.
        reason: Cow<'a, str>,
    },
    /// The server ended a subscription.
    Unsubscribe {
        /// Which channel.
        channel: Cow<'a, str>,
        /// See [`super::UnsubscribeCode`].
        code: u32,
        /// For people.
        reason: Cow<'a, str>,
    },
    /// Anything else.
    Other,
}

/// One publication.
#[derive(Debug, Deserialize)]
pub struct Publication<'a> {
    /// Its offset; 0 when it has no position.
    #[serde(default)]
    pub offset: u64,
    /// The payload as JSON.
    #[serde(borrow)]
    pub data: &'a RawValue,
}

/// Reads the messages of one frame.
pub fn server_messages(frame: &str) -> impl Iterator<Item = Result<ServerMessage<'_>, serde_json::Error>> {
    serde_json::Deserializer::from_str(frame)
        .into_iter::<WireMessage<'_>>()
        .map(|message| message.map(WireMessage::into_message))
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WireMessage<'a> {
    id: u32,
    #[serde(borrow)]
    connect: Option<WireConnected<'a>>,
    #[serde(borrow)]
    subscribe: Option<WireSubscribed<'a>>,
    #[serde(borrow)]
    error: Option<WireError<'a>>,
    #[serde(borrow)]
    push: Option<WirePush<'a>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WireConnected<'a> {
    #[serde(borrow)]
    client: Cow<'a, str>,
    ping: u32,
    pong: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WireSubscribed<'a> {
    #[serde(borrow)]
    epoch: Cow<'a, str>,
    offset: u64,
    recovered: bool,
    was_recovering: bool,
    #[serde(borrow)]
    publications: Vec<Publication<'a>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WireError<'a> {
    code: u32,
    #[serde(borrow)]
    message: Cow<'a, str>,
    temporary: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WirePush<'a> {
    #[serde(borrow)]
    channel: Cow<'a, str>,
    #[serde(borrow, rename = "pub")]
    publication: Option<Publication<'a>>,
    #[serde(borrow)]
    unsubscribe: Option<WireEnd<'a>>,
    #[serde(borrow)]
    disconnect: Option<WireEnd<'a>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WireEnd<'a> {
    code: u32,
    #[serde(borrow)]
    reason: Cow<'a, str>,
}

impl<'a> WireMessage<'a> {
    fn into_message(self) -> ServerMessage<'a> {
        let id = self.id;
        if let Some(WirePush { channel, publication, unsubscribe, disconnect }) = self.push {
            return match (publication, unsubscribe, disconnect) {
                (Some(publication), ..) => ServerMessage::Publication { channel, publication },
                (_, Some(end), _) => ServerMessage::Unsubscribe { channel, code: end.code, reason: end.reason },
                (.., Some(end)) => ServerMessage::Disconnect { code: end.code, reason: end.reason },
                (None, None, None) => ServerMessage::Other,
            };
        }
        if let Some(WireError { code, message, temporary }) = self.error {
            return ServerMessage::Error { id, code, message, temporary };
        }
        if let Some(WireConnected { client, ping, pong }) = self.connect {
            return ServerMessage::Connected { id, client, ping, pong };
        }
        if let Some(WireSubscribed { epoch, offset, recovered, was_recovering, publications }) = self.subscribe {
            return ServerMessage::Subscribed { id, epoch, offset, recovered, was_recovering, publications };
        }
        // Every reply has an id and every push says so: what has neither is the empty object.
        if id == 0 { ServerMessage::Ping } else { ServerMessage::Other }
    }
}

#[cfg(test)]
mod tests {
    use super::super::command::{Method, commands};
    use super::super::{code, reply};
    use super::*;

    #[test]
    fn the_server_understands_our_client() {
        let mut out = Vec::new();
        write_connect_command(&mut out, 1, "", "weir");
        out.push(b'\n');
        write_subscribe_command(&mut out, 2, "a", Some(("0000001f", 7)));
        out.push(b'\n');
        write_subscribe_command(&mut out, 3, "b", None);
        out.push(b'\n');
        write_pong(&mut out);
        let text = String::from_utf8(out).unwrap();
        let all: Vec<_> = commands(&text).collect::<Result<_, _>>().unwrap();
        assert!(matches!(&all[0].method, Method::Connect(c) if c.name == "weir" && c.token.is_empty()));
        let Method::Subscribe(first) = &all[1].method else { panic!("{:?}", all[1]) };
        assert_eq!((&*first.channel, first.recover, &*first.epoch, first.offset), ("a", true, "0000001f", 7));
        assert!(matches!(&all[2].method, Method::Subscribe(s) if s.channel == "b" && !s.recover));
        assert!(matches!(all[3].method, Method::Ping));
        assert_eq!(all.iter().map(|command| command.id).collect::<Vec<_>>(), [1, 2, 3, 0]);
    }

    #[test]
    fn our_client_understands_the_server() {
        let mut out = Vec::new();
        let connect = reply::ConnectResult { client: "c", version: "1", ping: 25, pong: true, session: "s", node: "n" };
        reply::write_connect(&mut out, 1, &connect);
        out.push(b'\n');
        let subscribe = reply::SubscribeResult {
            recoverable: true,
            positioned: true,
            epoch: "0000001f",
            offset: 9,
            recovered: true,
            was_recovering: true,
        };
        let mut push = Vec::new();
        let object = reply::write_publication_push(&mut push, "a", Some(9), "{\"x\":\n1}");
        reply::write_subscribe(&mut out, 2, &subscribe, [&push[object]]);
        out.push(b'\n');
        out.extend_from_slice(&push);
        reply::write_ping(&mut out);
        reply::write_error(&mut out, 4, code::ErrorCode::TooManyRequests);
        reply::write_disconnect_push(&mut out, code::DisconnectCode::Slow);
        reply::write_unsubscribe_push(&mut out, "a", code::UnsubscribeCode::Server);
        reply::write_publish(&mut out, 5);
        out.extend_from_slice(b"{\"push\":{\"channel\":\"a\",\"join\":{}}}");
        let text = String::from_utf8(out).unwrap();
        let all: Vec<_> = server_messages(&text).collect::<Result<_, _>>().unwrap();
        assert_eq!(all.len(), 9);
        assert!(matches!(&all[0], ServerMessage::Connected { id: 1, client, ping: 25, pong: true } if client == "c"));
        let ServerMessage::Subscribed { id: 2, epoch, offset: 9, recovered: true, was_recovering: true, publications } =
            &all[1]
        else {
            panic!("{:?}", all[1])
        };
        assert_eq!((&**epoch, publications[0].offset, publications[0].data.get()), ("0000001f", 9, r#"{"x": 1}"#));
        let ServerMessage::Publication { channel, publication } = &all[2] else { panic!("{:?}", all[2]) };
        assert_eq!((&**channel, publication.offset, publication.data.get()), ("a", 9, r#"{"x": 1}"#));
        assert!(matches!(all[3], ServerMessage::Ping));
        assert!(matches!(all[4], ServerMessage::Error { id: 4, code: 111, temporary: true, .. }));
        assert!(matches!(&all[5], ServerMessage::Disconnect { code: 3008, reason } if reason == "slow"));
        assert!(matches!(&all[6], ServerMessage::Unsubscribe { channel, code: 2000, .. } if channel == "a"));
        assert!(matches!(all[7], ServerMessage::Other));
        assert!(matches!(all[8], ServerMessage::Other));
    }
}
