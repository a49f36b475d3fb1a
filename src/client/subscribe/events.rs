//! Subscribing over server-sent events.

use std::io::Write;
use std::time::Duration;

use super::{Args, Data, Line, Printer, Stop, connect};
use crate::client::http::{self, Response};
use crate::limits::CLIENT_EVENT_BYTES;
use crate::wire::http1::{self, BodyDecoder};
use crate::wire::sse::{EventParser, Item};

/// Event types that are the node's own words and no publications. No channel of a stream of several has such a name.
const OWN_WORDS: [&str; 3] = ["open", "gap", "error"];

/// The subscription between attempts.
pub(super) struct Events {
    parser: EventParser,
    /// The position given on the command line, until the stream has named one.
    given: Option<String>,
    retry: Option<Duration>,
}

impl Events {
    pub(super) fn new(args: &Args) -> Self {
        Self { parser: EventParser::new(CLIENT_EVENT_BYTES), given: args.last_event_id.clone(), retry: None }
    }

    fn last_event_id(&self) -> Option<&str> {
        match self.parser.last_event_id() {
            "" => self.given.as_deref(),
            id => Some(id),
        }
    }

    /// Where the next attempt begins, for people.
    pub(super) fn place(&self) -> String {
        self.last_event_id().map_or_else(|| "from now on".into(), |id| format!("after {id}"))
    }

    /// Opens the stream and follows it to its end; sets `opened` once the node has accepted it.
    pub(super) fn follow<O: Write, N: Write>(
        &mut self,
        args: &Args,
        printer: &mut Printer<O, N>,
        opened: &mut bool,
    ) -> Stop {
        match self.try_follow(args, printer, opened) {
            Ok(()) => Stop::Lost { reason: "the stream ended".into(), advice: self.retry },
            Err(Stop::Lost { reason, advice }) if *opened => Stop::Lost { reason, advice: advice.or(self.retry) },
            Err(stop) => stop,
        }
    }

    fn try_follow<O: Write, N: Write>(
        &mut self,
        args: &Args,
        printer: &mut Printer<O, N>,
        opened: &mut bool,
    ) -> Result<(), Stop> {
        let channels: Vec<String> =
            args.channels.iter().map(|name| format!("channel={}", http1::percent_encode(name))).collect();
        let target = format!("{}/sse?{}", args.url.prefix, channels.join("&"));
        let mut connection = connect(args)?;
        connection.send(&http::event_stream_request(&args.url.authority(), &target, self.last_event_id()))?;
        let head = connection.read_head()?;
        if head.status != 200 {
            let body = connection.read_body(&head, "GET")?;
            return Err(Stop::of_response(&Response { head, body }));
        }
        let kind = head.header("content-type").unwrap_or("none");
        if !kind.starts_with("text/event-stream") {
            return Err(Stop::Refused(format!("the answer is no event stream but of type {kind}")));
        }
        *opened = true;
        self.parser.restart();
        let mut decoder = BodyDecoder::new(head.framing("GET"), usize::MAX).map_err(http::HttpError::Body)?;
        let (mut coded, mut plain) = (Vec::new(), Vec::new());
        loop {
            let part = connection.read_part()?;
            if part.is_empty() {
                return Ok(());
            }
            coded.extend_from_slice(&part);
            let used = decoder.feed(&coded, &mut plain).map_err(http::HttpError::Body)?;
            coded.drain(..used);
            self.take(&plain, args, printer)?;
            plain.clear();
            if decoder.is_done() {
                return Ok(());
            }
        }
    }

    fn take<O: Write, N: Write>(&mut self, bytes: &[u8], args: &Args, printer: &mut Printer<O, N>) -> Result<(), Stop> {
        let mut outcome = Ok(());
        let retry = &mut self.retry;
        let parsed = self.parser.feed(bytes, |item| match item {
            _ if outcome.is_err() => {}
            Item::Retry(millis) => *retry = Some(Duration::from_millis(millis)),
            Item::Comment(_) => {}
            Item::Event { name, data, .. } if OWN_WORDS.contains(&name) => {
                if name != "open" {
                    printer.note(&format!("{name}: {data}"));
                }
            }
            Item::Event { name, data, id } => {
                let channel = if args.channels.len() == 1 { args.channels[0].as_str() } else { name };
                let id = (!id.is_empty()).then_some(id);
                outcome = printer.publication(&Line { channel, id, offset: None, data: Data::Text(data) });
            }
        });
        outcome.and(parsed.map_err(|error| Stop::Refused(error.to_string())))
    }
}
