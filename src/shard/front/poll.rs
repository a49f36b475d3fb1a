//! `GET /poll`: what is new since a cursor, answered here when there is something and by the engine when it waits.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use super::origin::Origin;
use super::reply::Reply;
use super::session::Outcome;
use super::stream::{add_channel, bad};
use super::{Entrance, NodeView};
use crate::log::position::parse_cursor;
use crate::settings::Settings;
use crate::shard::poll::{Form, Poll};
use crate::wire::http1::{AllowOrigin, Head, Status};

/// A poll as it was asked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PollRequest {
    /// The channels, each once, in the order of the request.
    pub(super) channels: Vec<Arc<str>>,
    /// The rest of it.
    pub(super) poll: Poll,
}

/// Reads a poll: `channel` once for each channel, the `cursor` of the last answer or a stream's last event id, and `wait` in
/// seconds. Other names are left alone.
///
/// # Errors
/// The answer 400, which says what was wrong.
pub(super) fn parse(head: &Head, origin: Origin<'_>, settings: &Settings) -> Result<PollRequest, Reply> {
    let most = settings.limits.channels;
    let mut channels = Vec::new();
    let mut cursor = Cow::Borrowed("");
    let mut wait = Duration::ZERO;
    for pair in head.query() {
        let (name, value) = pair.map_err(|error| bad(format_args!("the query: {error}")))?;
        match &*name {
            "channel" => add_channel(&mut channels, &value, most)?,
            "cursor" => cursor = value,
            "wait" => wait = parse_wait(&value)?.min(settings.poll.wait),
            _ => {}
        }
    }
    if channels.is_empty() {
        return Err(bad("name at least one channel: /poll?channel=NAME&channel=NAME"));
    }
    // Nobody waits for the head of an answer.
    let wait = if head.method() == "HEAD" { Duration::ZERO } else { wait };
    let known: Vec<&str> = head.headers().all("if-none-match").collect();
    let origin = match origin.allow() {
        AllowOrigin::Only(origin) => Some(origin.into()),
        AllowOrigin::Any | AllowOrigin::None => None,
    };
    let poll = Poll {
        cursor: parse_cursor(&cursor, most).map_err(bad)?,
        wait,
        known: (!known.is_empty()).then(|| known.join(",").into()),
        origin,
    };
    Ok(PollRequest { channels, poll })
}

fn parse_wait(value: &str) -> Result<Duration, Reply> {
    let seconds = value.bytes().all(|byte| byte.is_ascii_digit()).then(|| value.parse::<u32>().ok()).flatten();
    let wait = seconds.map(|seconds| Duration::from_secs(seconds.into()));
    wait.ok_or_else(|| bad(format_args!("wait is a whole number of seconds, such as wait=20; this one is {value:?}")))
}

/// Answers a poll, or finds that it waits.
///
/// # Errors
/// The answer when it is malformed or the node cannot serve it now.
pub(super) async fn answer<E: Entrance>(
    head: &Head,
    origin: Origin<'_>,
    entrance: &E,
    settings: &Settings,
    node: &NodeView,
) -> Result<Outcome<E::Reservation>, Reply> {
    let PollRequest { channels, poll } = parse(head, origin, settings)?;
    let channels = entrance.open(&channels).await.map_err(Reply::unavailable)?;
    entrance.fetch(&channels, &poll.cursor).await.map_err(Reply::unavailable)?;
    let answer = entrance.poll(&channels, &poll.cursor).await.map_err(Reply::unavailable)?;
    if !answer.news && !poll.wait.is_zero() {
        return Ok(Outcome::Poll { channels, poll });
    }
    let form = Form { waited: false, keep_alive: head.keep_alive(), head_only: head.method() == "HEAD" };
    let mut response = Vec::with_capacity(answer.body.len() + 512);
    let status = poll.write_answer(&mut response, &answer, form, settings);
    if status == Status::Ok && !form.head_only {
        node.metrics.deliveries.add(answer.publications);
    }
    Ok(Outcome::Answered { status, response })
}
