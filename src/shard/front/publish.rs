//! Publishing over HTTP: one payload as it is, or a batch in JSON.

use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use super::reply::Reply;
use super::{Entrance, NodeView};
use crate::limits::{IDEMPOTENCY_KEY_BYTES, PUBLICATIONS_PER_REQUEST};
use crate::log::position::{ChannelTag, CursorEntry, Position};
use crate::settings::Settings;
use crate::shard::mailbox::{Publish, RequestError};
use crate::wire::channel_name;
use crate::wire::http1::{Head, Status};

/// Where a publication went.
#[derive(Debug, Serialize)]
struct Published<'a> {
    channel: &'a str,
    epoch: String,
    offset: u64,
    /// What to resume after, as an event's id has it.
    cursor: String,
}

impl<'a> Published<'a> {
    fn new(channel: &'a str, position: Position) -> Self {
        let cursor = CursorEntry { tag: ChannelTag::of(channel), position }.to_string();
        Self { channel, epoch: position.epoch.to_string(), offset: position.offset, cursor }
    }
}

/// `POST /publish/{channel}`: the body is the payload.
pub(super) async fn one<E: Entrance>(
    channel: &str,
    head: &Head,
    body: Vec<u8>,
    entrance: &E,
    node: &NodeView,
) -> Reply {
    let publish = match check_one(channel, head, body) {
        Ok(publish) => publish,
        Err(reply) => {
            node.metrics.publishes_refused.add(1);
            return reply;
        }
    };
    match publish_counted(publish, entrance, node).await {
        Ok(position) => Reply::json(Status::Ok, &Published::new(channel, position)),
        Err(error) => Reply::unavailable(error),
    }
}

fn check_one(channel: &str, head: &Head, body: Vec<u8>) -> Result<Publish, Reply> {
    let bad = |message: &dyn std::fmt::Display| Reply::error(Status::BadRequest, message);
    channel_name::check(channel).map_err(|error| bad(&error))?;
    let key = head.header("idempotency-key");
    check_key(key).map_err(|error| bad(&error))?;
    let data = String::from_utf8(body).map_err(|error| {
        bad(&format_args!("a payload is UTF-8 text; this one is not at byte {}", error.utf8_error().valid_up_to()))
    })?;
    Ok(Publish { channel: channel.into(), data: data.into(), idempotency_key: key.map(Into::into) })
}

fn check_key(key: Option<&str>) -> Result<(), String> {
    match key {
        Some(key) if key.is_empty() || key.len() > IDEMPOTENCY_KEY_BYTES => {
            Err(format!("an idempotency key has 1 to {IDEMPOTENCY_KEY_BYTES} bytes; this one has {}", key.len()))
        }
        _ => Ok(()),
    }
}

async fn publish_counted<E: Entrance>(
    publish: Publish,
    entrance: &E,
    node: &NodeView,
) -> Result<Position, RequestError> {
    let result = entrance.publish(publish).await;
    let counter = if result.is_ok() { &node.metrics.publishes_ok } else { &node.metrics.publishes_refused };
    counter.add(1);
    result
}

/// The body of `POST /api/publish`: one publication, or `publications` and nothing else.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request<'a> {
    #[serde(borrow, default)]
    channel: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    channels: Option<Vec<Cow<'a, str>>>,
    /// Any JSON. It is published byte for byte: to parse and write it again would change numbers and the order of keys.
    #[serde(borrow, default, deserialize_with = "present")]
    data: Option<&'a RawValue>,
    /// Plain text instead.
    #[serde(borrow, default)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    idempotency_key: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    publications: Option<Vec<Request<'a>>>,
}

impl Request<'_> {
    fn is_empty(&self) -> bool {
        let named = self.channel.is_some() || self.channels.is_some();
        !(named || self.data.is_some() || self.text.is_some() || self.idempotency_key.is_some())
    }
}

/// A field that is there, be it `null`: an `Option` alone would take `null` for absent.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// One publication of a batch, for one channel: ready to go, or why not.
type Checked = (Arc<str>, Result<Publish, String>);

#[derive(Serialize)]
#[serde(untagged)]
enum Outcome<'a> {
    Published(Published<'a>),
    Refused { channel: &'a str, error: &'a str },
}

impl<'a> Outcome<'a> {
    fn new(channel: &'a str, result: &'a Result<Position, String>) -> Self {
        match result {
            Ok(position) => Self::Published(Published::new(channel, *position)),
            Err(error) => Self::Refused { channel, error },
        }
    }
}

#[derive(Serialize)]
struct Results<'a> {
    results: Vec<Outcome<'a>>,
}

/// `POST /api/publish`: all publications are on their way to the backbone at the same time and in order; each has its
/// own result. A malformed request publishes nothing.
pub(super) async fn batch<E: Entrance>(body: &[u8], entrance: &E, settings: &Settings, node: &Rc<NodeView>) -> Reply {
    let checked = match check_batch(body, settings.limits.publication_bytes) {
        Ok(checked) => checked,
        Err(message) => {
            node.metrics.publishes_refused.add(1);
            return Reply::error(Status::BadRequest, message);
        }
    };
    // Tasks start in the order they were spawned, and the queue to the backbone keeps that order.
    let start = |(channel, publish): Checked| {
        let task = publish.map(|publish| {
            let (entrance, node) = (entrance.clone(), Rc::clone(node));
            monoio::spawn(async move { publish_counted(publish, &entrance, &node).await })
        });
        (channel, task)
    };
    let tasks: Vec<_> = checked.into_iter().map(start).collect();
    let (mut done, mut unavailable) = (Vec::with_capacity(tasks.len()), false);
    for (channel, task) in tasks {
        let result = match task {
            Ok(task) => task.await.map_err(|error| {
                unavailable = true;
                error.to_string()
            }),
            Err(error) => {
                node.metrics.publishes_refused.add(1);
                Err(error)
            }
        };
        done.push((channel, result));
    }
    let none_published = done.iter().all(|(_, result)| result.is_err());
    let results = Results { results: done.iter().map(|(channel, result)| Outcome::new(channel, result)).collect() };
    // A publisher that looks at the status alone must not take a node without its backbone for a success.
    if none_published && unavailable {
        return Reply::json(Status::ServiceUnavailable, &results).retry_after();
    }
    Reply::json(Status::Ok, &results)
}

/// The publications of a request, one an entry and channel.
///
/// # Errors
/// Says what is malformed, and in which entry.
fn check_batch(body: &[u8], most_bytes: usize) -> Result<Vec<Checked>, String> {
    let text = std::str::from_utf8(body).map_err(|error| format!("not UTF-8 at byte {}", error.valid_up_to()))?;
    // The parser would take an array for a struct as well, field by field.
    if !text.trim_start().starts_with('{') {
        return Err("a publish request is a JSON object".into());
    }
    let mut request: Request<'_> = serde_json::from_str(text).map_err(|error| {
        format!(
            "not a publish request: {error}; allowed: channel or channels, data (JSON) or text, idempotency_key; or \
             publications, a list of these"
        )
    })?;
    let entries = match request.publications.take() {
        None => vec![request],
        Some(_) if !request.is_empty() => {
            return Err("publications stands alone: move the other fields into its entries".into());
        }
        Some(entries) => entries,
    };
    let mut checked = Vec::new();
    for (index, entry) in entries.into_iter().enumerate() {
        check_entry(entry, most_bytes, &mut checked).map_err(|error| format!("publication {index}: {error}"))?;
        if checked.len() > PUBLICATIONS_PER_REQUEST {
            return Err(format!(
                "a request has at most {PUBLICATIONS_PER_REQUEST} publications, counted once a channel"
            ));
        }
    }
    if checked.is_empty() {
        return Err("there is nothing to publish: no channel is named".into());
    }
    Ok(checked)
}

fn check_entry(entry: Request<'_>, most_bytes: usize, checked: &mut Vec<Checked>) -> Result<(), &'static str> {
    if entry.publications.is_some() {
        return Err("publications cannot be nested");
    }
    let channels = match (entry.channel, entry.channels) {
        (Some(channel), None) => vec![channel],
        (None, Some(channels)) => channels,
        _ => return Err("either channel or channels is needed"),
    };
    let data = match (entry.data, &entry.text) {
        (Some(data), None) => data.get(),
        (None, Some(text)) => text,
        _ => return Err("either data or text is needed"),
    };
    let key = entry.idempotency_key.as_deref();
    let fault = if data.len() > most_bytes {
        Err(format!("a payload has at most {most_bytes} bytes; this one has {}", data.len()))
    } else {
        check_key(key)
    };
    let data = Bytes::copy_from_slice(data.as_bytes());
    for channel in channels {
        let channel: Arc<str> = channel.into();
        let fault = fault.clone().and_then(|()| channel_name::check(&channel).map_err(|error| error.to_string()));
        let publish =
            |()| Publish { channel: Arc::clone(&channel), data: data.clone(), idempotency_key: key.map(Into::into) };
        let publish = fault.map(publish);
        checked.push((channel, publish));
    }
    Ok(())
}
