//! Answers with a body: JSON for programs, text for people.

use std::borrow::Cow;
use std::fmt::Display;

use serde::Serialize;

use crate::limits::RETRY_AFTER_SECONDS;
use crate::wire::http1::{AllowOrigin, ResponseWriter, Status};

const JSON: &str = "application/json";

/// One complete answer.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: Status,
    headers: Vec<(&'static str, Cow<'static, str>)>,
    body: Vec<u8>,
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    error: &'a str,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    allowed: &'a [&'a str],
}

impl Reply {
    /// A JSON answer.
    pub(super) fn json(status: Status, body: &impl Serialize) -> Self {
        let body = serde_json::to_vec(body).expect("maps with text keys are JSON and a Vec takes every write");
        Self { status, headers: vec![("Content-Type", JSON.into())], body }
    }

    /// An answer in text.
    pub(super) fn text(content_type: &'static str, body: String) -> Self {
        Self { status: Status::Ok, headers: vec![("Content-Type", content_type.into())], body: body.into_bytes() }
    }

    /// An answer without a body.
    pub(super) fn no_content() -> Self {
        Self { status: Status::NoContent, headers: Vec::new(), body: Vec::new() }
    }

    /// A refusal that says what was wrong.
    pub(super) fn error(status: Status, message: impl Display) -> Self {
        Self::refuse(status, message, &[])
    }

    /// A refusal that says what was wrong and what is allowed.
    pub(super) fn refuse(status: Status, message: impl Display, allowed: &[&str]) -> Self {
        Self::json(status, &ErrorBody { error: &message.to_string(), allowed })
    }

    /// Not now: tells when to come back.
    pub(super) fn unavailable(message: impl Display) -> Self {
        Self::error(Status::ServiceUnavailable, message).retry_after()
    }

    /// Adds when to come back, drawn at random so that clients do not come back as one.
    pub(super) fn retry_after(self) -> Self {
        // Without randomness every client gets the same advice, which is bad advice and no reason to fail.
        let seconds = 1 + getrandom::u32().unwrap_or(0) % RETRY_AFTER_SECONDS;
        self.header("Retry-After", seconds.to_string()).header("Access-Control-Expose-Headers", "Retry-After")
    }

    /// Adds a header.
    pub(super) fn header(mut self, name: &'static str, value: impl Into<Cow<'static, str>>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// The bytes to send. An answer to `HEAD` has the head only, with the length of the body it leaves out.
    pub(super) fn render(self, head_only: bool, keep_alive: bool, allow_origin: AllowOrigin<'_>) -> Vec<u8> {
        let mut out = Vec::with_capacity(256 + self.body.len());
        let mut writer = ResponseWriter::new(&mut out, self.status).allow_origin(allow_origin);
        for (name, value) in &self.headers {
            writer = writer.header(name, value);
        }
        if self.status == Status::NoContent {
            writer.without_body(keep_alive);
            return out;
        }
        writer
            .header("Cache-Control", "no-store")
            .header("X-Content-Type-Options", "nosniff")
            .with_length(self.body.len(), keep_alive);
        if !head_only {
            out.extend_from_slice(&self.body);
        }
        out
    }
}
