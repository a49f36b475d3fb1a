//! Which request means what.

use super::NodeView;
use super::reply::Reply;
use crate::metrics;
use crate::wire::http1::{Head, Status};

/// Seconds a browser may remember a preflight's answer.
const PREFLIGHT_SECONDS: &str = "600";

/// What a path is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route<'a> {
    /// What this is and how to use it.
    Index,
    /// A stream of server-sent events.
    Sse,
    /// What is new since a cursor.
    Poll,
    /// The Centrifugo client protocol.
    WebSocket,
    /// One publication into this channel, not yet checked.
    Publish(&'a str),
    /// Publications in JSON.
    ApiPublish,
    /// Whether the process answers.
    Live,
    /// Whether the node takes traffic.
    Ready,
    /// Prometheus text.
    Metrics,
}

/// Every path, as an error names them.
const PATHS: [&str; 9] = [
    "/",
    "/sse?channel=NAME",
    "/poll?channel=NAME",
    "/connection/websocket",
    "/publish/NAME",
    "/api/publish",
    "/health/live",
    "/health/ready",
    "/metrics",
];

impl<'a> Route<'a> {
    /// What a path is for.
    pub(super) fn of(path: &'a str) -> Option<Self> {
        Some(match path {
            "/" => Self::Index,
            "/sse" => Self::Sse,
            "/poll" => Self::Poll,
            "/connection/websocket" => Self::WebSocket,
            "/api/publish" => Self::ApiPublish,
            "/health/live" => Self::Live,
            "/health/ready" => Self::Ready,
            "/metrics" => Self::Metrics,
            other => Self::Publish(other.strip_prefix("/publish/")?),
        })
    }

    /// What its `Allow` header says.
    fn allow(self) -> &'static str {
        match self {
            Self::Publish(_) | Self::ApiPublish => "POST, OPTIONS",
            Self::WebSocket => "GET, OPTIONS",
            _ => "GET, HEAD, OPTIONS",
        }
    }

    /// Whether a page of a foreign origin may not use it.
    pub(super) fn is_guarded(self) -> bool {
        matches!(self, Self::Sse | Self::Poll | Self::WebSocket | Self::Publish(_) | Self::ApiPublish)
    }
}

/// Finds what a request asks for.
///
/// # Errors
/// The answer, when it is 404, 405, or that of a preflight.
pub(super) fn find(head: &Head) -> Result<Route<'_>, Reply> {
    let Some(route) = Route::of(head.path()) else {
        if head.method() == "OPTIONS" && head.path() == "*" {
            return Err(Reply::no_content());
        }
        let message = format_args!("there is nothing at {}", head.path());
        return Err(Reply::refuse(Status::NotFound, message, &PATHS));
    };
    let allow = route.allow();
    if head.method() == "OPTIONS" {
        let preflight = Reply::no_content().header("Allow", allow).header("Access-Control-Allow-Methods", allow);
        return Err(preflight
            .header(
                "Access-Control-Allow-Headers",
                "Content-Type, Cache-Control, Idempotency-Key, If-None-Match, Last-Event-ID",
            )
            .header("Access-Control-Max-Age", PREFLIGHT_SECONDS));
    }
    let allowed: Vec<_> = allow.split(", ").collect();
    if !allowed.contains(&head.method()) {
        let message = format_args!("{} is not a method of {}", head.method(), head.path());
        return Err(Reply::refuse(Status::MethodNotAllowed, message, &allowed).header("Allow", allow));
    }
    Ok(route)
}

/// `/`: what this is, for whoever opens it in a browser or with curl.
pub(super) fn index(head: &Head) -> Reply {
    let host = head.header("host").unwrap_or("localhost");
    let text = format!(
        "weir {}: an edge broadcast node. Publish once, deliver to every subscriber.\n\n\
         Follow a channel:\n  curl -N 'http://{host}/sse?channel=news'\n\n\
         Ask for what is new, with the cursor of the last answer, waiting up to 20 seconds for it:\n  \
         curl 'http://{host}/poll?channel=news&cursor=CURSOR&wait=20'\n\n\
         Publish into it:\n  curl -d 'hello' http://{host}/publish/news\n  \
         curl -d '{{\"channels\":[\"news\",\"sport\"],\"data\":{{\"title\":\"hello\"}}}}' http://{host}/api/publish\n\n\
         WebSocket (Centrifugo client protocol, any centrifuge SDK):\n  ws://{host}/connection/websocket\n\n\
         Operate it:\n  curl http://{host}/health/ready\n  curl http://{host}/metrics\n",
        env!("CARGO_PKG_VERSION")
    );
    Reply::text("text/plain; charset=utf-8", text)
}

/// `/health/live`: the process answers.
pub(super) fn live() -> Reply {
    Reply::json(Status::Ok, &serde_json::json!({"status": "live"}))
}

/// `/health/ready`: the node takes traffic, else why not.
pub(super) fn ready(node: &NodeView) -> Reply {
    match node.node.ready() {
        Ok(()) => Reply::json(Status::Ok, &serde_json::json!({"status": "ready"})),
        Err(reason) => Reply::unavailable(format_args!("not ready: {reason}")),
    }
}

/// `/metrics`.
pub(super) fn metrics(node: &NodeView) -> Reply {
    Reply::text(metrics::CONTENT_TYPE, node.node.metrics_text())
}
