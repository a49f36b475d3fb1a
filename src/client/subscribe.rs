//! `weir subscribe`: prints what is published, and comes back by itself without losing its place.

mod events;
mod messages;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use serde_json::value::RawValue;

use super::http::{BaseUrl, Connection, HttpError, Response};
use crate::limits::{CHANNELS_PER_CONNECTION, CLIENT_RECONNECT_MILLIS, CLIENT_SILENCE_MILLIS};
use crate::wire::channel_name;

/// Subscribe to channels and print what is published.
///
/// Prints channel, position and data, separated by tabs; further lines of the data are indented by two tabs. Comes back
/// by itself after a loss, resumes where it left off, and says so on standard error. Ctrl-C ends it with 0.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Where the node is.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    pub url: BaseUrl,
    /// Use a WebSocket and the Centrifugo protocol, not server-sent events.
    #[arg(long)]
    pub websocket: bool,
    /// Begin after this position: an event's id, or what `weir publish` printed.
    #[arg(long, value_name = "CURSOR")]
    pub last_event_id: Option<String>,
    /// Print one JSON object a publication. Over WebSocket its data is the JSON that was published, else a string.
    #[arg(long)]
    pub json: bool,
    /// End after this many publications.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// The channels.
    #[arg(required = true, value_name = "CHANNEL", value_parser = channel)]
    pub channels: Vec<String>,
}

fn channel(name: &str) -> Result<String, channel_name::NameError> {
    channel_name::check(name).map(|()| name.into())
}

/// Why a stream is over.
#[derive(Debug)]
enum Stop {
    /// As many publications as were asked for.
    Counted,
    /// Standard output is gone.
    Output(io::Error),
    /// It may be had again.
    Lost {
        /// What happened.
        reason: String,
        /// How long the server wants the client to wait.
        advice: Option<Duration>,
    },
    /// It cannot be had; another attempt would meet the same.
    Refused(String),
}

impl Stop {
    fn lost(reason: impl Into<String>) -> Self {
        Self::Lost { reason: reason.into(), advice: None }
    }

    /// Sorts a response that opens no stream: overload and broken upstreams pass, the rest does not.
    fn of_response(response: &Response) -> Self {
        let reason = response.complaint();
        match response.head.status {
            408 | 429 | 500..=599 => {
                let seconds = response.head.header("retry-after").and_then(|value| value.trim().parse().ok());
                Self::Lost { reason, advice: seconds.map(Duration::from_secs) }
            }
            _ => Self::Refused(reason),
        }
    }
}

impl From<HttpError> for Stop {
    fn from(error: HttpError) -> Self {
        match error {
            HttpError::Head(_) | HttpError::Body(_) => Self::Refused(error.to_string()),
            HttpError::Io(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Self::lost(format!("nothing was heard for {} s", CLIENT_SILENCE_MILLIS / 1000))
            }
            _ => Self::lost(error.to_string()),
        }
    }
}

/// What is printed of a publication.
#[derive(Serialize)]
struct Line<'a> {
    channel: &'a str,
    /// The cursor after it, over server-sent events.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    /// Its offset, over WebSocket; none when it has no position.
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    data: Data<'a>,
}

/// The payload in the form the stream has it in.
#[derive(Serialize)]
#[serde(untagged)]
enum Data<'a> {
    Text(&'a str),
    Json(&'a RawValue),
}

/// Where publications and remarks go.
struct Printer<Out, Notes> {
    json: bool,
    left: Option<u64>,
    out: Out,
    notes: Notes,
}

impl<Out: Write, Notes: Write> Printer<Out, Notes> {
    /// Prints a publication at once, whole.
    fn publication(&mut self, line: &Line<'_>) -> Result<(), Stop> {
        let mut text = if self.json {
            serde_json::to_string(line).map_err(|error| Stop::Output(error.into()))?
        } else {
            let position = match (line.id, line.offset) {
                (Some(id), _) => id.to_owned(),
                (None, Some(offset)) => offset.to_string(),
                (None, None) => String::new(),
            };
            let data = match line.data {
                Data::Text(text) => text,
                Data::Json(json) => json.get(),
            };
            format!("{}\t{position}\t{}", line.channel, data.replace('\n', "\n\t\t"))
        };
        text.push('\n');
        self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()).map_err(Stop::Output)?;
        if let Some(left) = &mut self.left {
            *left -= 1;
            if *left == 0 {
                return Err(Stop::Counted);
            }
        }
        Ok(())
    }

    /// Says something that is no publication. Losing standard error is no reason to stop.
    fn note(&mut self, text: &str) {
        let _ = writeln!(self.notes, "weir subscribe: {text}");
    }
}

/// Subscribes until it is interrupted, has printed enough, or is refused.
#[must_use]
pub fn run(args: Args) -> ExitCode {
    exit_on_interrupt();
    match subscribe(&args, io::stdout(), io::stderr()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("weir subscribe: {reason}");
            ExitCode::FAILURE
        }
    }
}

/// Makes Ctrl-C end the process with 0. Every publication is written whole, so there is nothing to clean up.
fn exit_on_interrupt() {
    extern "C" fn interrupted(_: libc::c_int) {
        // SAFETY: _exit is async-signal-safe.
        unsafe { libc::_exit(0) };
    }
    let handler: extern "C" fn(libc::c_int) = interrupted;
    // SAFETY: the handler has the signature signal(2) asks for and only calls an async-signal-safe function.
    unsafe { libc::signal(libc::SIGINT, handler as libc::sighandler_t) };
}

/// One way to subscribe: keeps its place between attempts.
enum Stream {
    Events(events::Events),
    Messages(messages::Messages),
}

fn subscribe(args: &Args, out: impl Write, notes: impl Write) -> Result<(), String> {
    if args.channels.len() > CHANNELS_PER_CONNECTION {
        let asked = args.channels.len();
        return Err(format!("{asked} channels; allowed: {CHANNELS_PER_CONNECTION} on one connection"));
    }
    let mut printer = Printer { json: args.json, left: args.count, out, notes };
    let mut stream = if args.websocket {
        Stream::Messages(messages::Messages::new(args)?)
    } else {
        Stream::Events(events::Events::new(args))
    };
    let mut failures = 0;
    loop {
        let mut opened = false;
        let stop = match &mut stream {
            Stream::Events(events) => events.follow(args, &mut printer, &mut opened),
            Stream::Messages(messages) => messages.follow(args, &mut printer, &mut opened),
        };
        match stop {
            Stop::Counted => return Ok(()),
            // Whoever read this has read enough: `weir subscribe … | head`.
            Stop::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Stop::Output(error) => return Err(format!("standard output: {error}")),
            Stop::Refused(reason) => return Err(reason),
            Stop::Lost { reason, advice } => {
                failures = if opened { 1 } else { failures + 1 };
                let wait = advice.unwrap_or_else(|| backoff(failures));
                let place = match &stream {
                    Stream::Events(events) => events.place(),
                    Stream::Messages(messages) => messages.place(),
                };
                printer.note(&format!("{reason}; again in {:.1} s, {place}", wait.as_secs_f64()));
                std::thread::sleep(wait);
            }
        }
    }
}

/// How long to wait after the given number of failures in a row, when the server advises nothing: a random part of a
/// time that doubles, so that clients that lost the same node do not come back together.
fn backoff(failures: u32) -> Duration {
    let (first, longest) = CLIENT_RECONNECT_MILLIS;
    let ceiling = first.saturating_mul(1 << failures.clamp(1, 16)).min(longest);
    // Without randomness the whole time is waited: late, but right.
    let random = getrandom::u64().unwrap_or(u64::MAX);
    Duration::from_millis(first + (u128::from(random) * u128::from(ceiling - first) / u128::from(u64::MAX)) as u64)
}

/// Connects with the silence after which a stream is taken for dead.
fn connect(args: &Args) -> Result<Connection, HttpError> {
    let connection = Connection::open(&args.url)?;
    connection.stream().set_read_timeout(Some(Duration::from_millis(CLIENT_SILENCE_MILLIS)))?;
    Ok(connection)
}

#[cfg(test)]
mod tests;
