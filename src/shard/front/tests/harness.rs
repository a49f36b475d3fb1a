//! A front on a thread of its own, a fake shard, and a blocking client.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use monoio::{IoUringDriver, LegacyDriver, RuntimeBuilder};

use super::super::{Entrance, NodeView, Parking, serve};
use crate::log::position::{CursorEntry, Epoch, Position};
use crate::metrics::ShardMetrics;
use crate::settings::Settings;
use crate::shard::front::Current;
use crate::shard::gate::OpenError;
use crate::shard::mailbox::{Mailbox, Publish, RequestError};
use crate::shard::poll::{Answer, Poll};
use crate::shard::start::NodeReport;
use crate::wire::http1::{BodyDecoder, ResponseHead, parse_response_head};

/// Long enough for a loaded machine; a test that hangs fails after it.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy)]
pub(super) enum Driver {
    Uring,
    Epoll,
}

pub(super) fn default_settings() -> Settings {
    Settings::default()
}

pub(super) fn get(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n")
}

pub(super) fn post(target: &str, body: &str) -> String {
    format!("POST {target} HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// What the fake shard was asked, and what it is told to answer.
#[derive(Debug, Default)]
struct Log {
    published: Vec<Publish>,
    opened: Vec<Vec<String>>,
    resumed: Vec<CursorEntry>,
    polled: Vec<CursorEntry>,
    waiting: Vec<Poll>,
    fetched: Vec<CursorEntry>,
    publish_error: Option<RequestError>,
    fetch_error: Option<RequestError>,
    open_error: bool,
    unready: Option<String>,
}

/// A shard that takes everything down, counts offsets over all channels, and speaks one sentence on each stream.
#[derive(Debug, Clone, Default)]
pub(super) struct FakeShard(Arc<Mutex<Log>>);

impl FakeShard {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap()
    }

    pub(super) fn published(&self) -> Vec<Published> {
        let copy = |publish: &Publish| Published {
            channel: publish.channel.to_string(),
            data: publish.data.clone(),
            idempotency_key: publish.idempotency_key.as_deref().map(Into::into),
        };
        self.log().published.iter().map(copy).collect()
    }

    pub(super) fn opened(&self) -> Vec<Vec<String>> {
        self.log().opened.clone()
    }

    pub(super) fn resumed(&self) -> Vec<CursorEntry> {
        self.log().resumed.clone()
    }

    pub(super) fn polled(&self) -> Vec<CursorEntry> {
        self.log().polled.clone()
    }

    pub(super) fn waiting(&self) -> Vec<Poll> {
        self.log().waiting.clone()
    }

    pub(super) fn fail_publishes(&self, error: RequestError) {
        self.log().publish_error = Some(error);
    }

    pub(super) fn fetched(&self) -> Vec<CursorEntry> {
        self.log().fetched.clone()
    }

    pub(super) fn fail_fetches(&self, error: RequestError) {
        self.log().fetch_error = Some(error);
    }

    pub(super) fn fail_opens(&self) {
        self.log().open_error = true;
    }

    pub(super) fn set_unready(&self, reason: &str) {
        self.log().unready = Some(reason.into());
    }

    fn speak(socket: OwnedFd, parts: [&[u8]; 2]) {
        let mut stream = TcpStream::from(socket);
        stream.set_nonblocking(false).unwrap();
        for part in parts {
            stream.write_all(part).unwrap();
        }
    }
}

/// A [`Publish`] that can be compared.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Published {
    pub(super) channel: String,
    pub(super) data: Bytes,
    pub(super) idempotency_key: Option<String>,
}

impl Entrance for FakeShard {
    type Reservation = ();

    async fn open(&self, names: &[Arc<str>]) -> Result<(), OpenError> {
        if self.log().open_error {
            return Err(OpenError::TimedOut);
        }
        self.log().opened.push(names.iter().map(ToString::to_string).collect());
        Ok(())
    }

    async fn publish(&self, publish: Publish) -> Result<Position, RequestError> {
        let mut log = self.log();
        if let Some(error) = &log.publish_error {
            return Err(error.clone());
        }
        log.published.push(publish);
        Ok(Position { epoch: Epoch(0x1f), offset: log.published.len() as u64 })
    }

    async fn fetch(&self, (): &(), cursor: &[CursorEntry]) -> Result<(), RequestError> {
        let mut log = self.log();
        log.fetched.extend(cursor);
        log.fetch_error.clone().map_or(Ok(()), Err)
    }

    /// One publication is new for whoever has a cursor of offset 0 or none; nothing is for all others.
    async fn poll(&self, (): &(), cursor: &[CursorEntry]) -> Result<Answer, OpenError> {
        self.log().polled.extend(cursor);
        let news = cursor.iter().all(|entry| entry.position.offset == 0);
        let body = format!("{{\"news\":{news}}}").into_bytes();
        Ok(Answer { body, tag: format!("\"{news}\""), publications: u64::from(news), news })
    }

    fn establish_sse(&self, socket: OwnedFd, (): (), resume: Vec<CursorEntry>, head: Bytes) {
        self.log().resumed.extend(resume);
        Self::speak(socket, [&head, b"data: from the engine\n\n"]);
    }

    fn establish_websocket(&self, socket: OwnedFd, (): (), head: Bytes, early: Bytes) {
        Self::speak(socket, [&head, &early]);
    }

    fn establish_poll(&self, socket: OwnedFd, (): (), poll: Poll) {
        self.log().waiting.push(poll);
        Self::speak(socket, [b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", b"\"later\""]);
    }
}

impl NodeReport for FakeShard {
    fn ready(&self) -> Result<(), String> {
        self.log().unready.clone().map_or(Ok(()), Err)
    }

    fn metrics_text(&self) -> String {
        "weir_test 1\n".into()
    }
}

/// A front on a thread of its own. The thread ends with the process.
pub(super) struct Server {
    pub(super) shard: FakeShard,
    pub(super) metrics: Arc<ShardMetrics>,
    pub(super) settings: Arc<Settings>,
    address: SocketAddr,
}

impl Server {
    pub(super) fn start(driver: Driver, settings: Settings) -> Self {
        let (shard, metrics, settings) = (FakeShard::default(), Arc::new(ShardMetrics::default()), Arc::new(settings));
        let node = Arc::new(shard.clone());
        let (tell, told) = std::sync::mpsc::channel();
        let entrance = shard.clone();
        let (of_view, metrics_of_view) = (Arc::clone(&settings), Arc::clone(&metrics));
        let front = async move |entrance: FakeShard| {
            let view = NodeView { settings: Current::new(of_view), metrics: metrics_of_view, node };
            let listener = monoio::net::TcpListener::bind("127.0.0.1:0").unwrap();
            tell.send(listener.local_addr().unwrap()).unwrap();
            let parking = Parking::new(Arc::new(Mailbox::new().unwrap()), true);
            serve(listener, entrance, Rc::new(view), parking).await;
        };
        std::thread::spawn(move || match driver {
            Driver::Uring => {
                let runtime = RuntimeBuilder::<IoUringDriver>::new().with_entries(256).enable_timer().build();
                runtime.unwrap().block_on(front(entrance));
            }
            Driver::Epoll => {
                let runtime = RuntimeBuilder::<LegacyDriver>::new().enable_timer().build();
                runtime.unwrap().block_on(front(entrance));
            }
        });
        Self { shard, metrics, settings, address: told.recv_timeout(PATIENCE).unwrap() }
    }

    pub(super) fn connect(&self) -> Client {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Client { stream, received: Vec::new() }
    }

    /// Waits until the gauge says that no connection is left.
    pub(super) fn wait_for_no_connections(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.metrics.http.get() != 0 {
            assert!(Instant::now() < deadline, "{} connections are left", self.metrics.http.get());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

pub(super) struct Client {
    pub(super) stream: TcpStream,
    received: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct Received {
    pub(super) status: u16,
    pub(super) head: ResponseHead,
    body: Vec<u8>,
}

impl Received {
    pub(super) fn text(&self) -> &str {
        str::from_utf8(&self.body).unwrap()
    }

    pub(super) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
}

impl Client {
    pub(super) fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    /// Reads a response head; what follows it stays for [`Client::rest`].
    pub(super) fn reply_head(&mut self) -> Received {
        loop {
            if let Some((head, length)) = parse_response_head(&self.received).unwrap() {
                self.received.drain(..length);
                return Received { status: head.status, head, body: Vec::new() };
            }
            assert!(self.fill(), "the connection ended before a response head: {:?}", self.received);
        }
    }

    /// Reads a response with its body.
    pub(super) fn reply(&mut self, method: &str) -> Received {
        let mut reply = self.reply_head();
        let mut decoder = BodyDecoder::new(reply.head.framing(method), usize::MAX).unwrap();
        loop {
            let used = decoder.feed(&self.received, &mut reply.body).unwrap();
            self.received.drain(..used);
            if decoder.is_done() {
                return reply;
            }
            assert!(self.fill(), "the connection ended within a body");
        }
    }

    /// Everything up to the end of the connection.
    pub(super) fn rest(&mut self) -> String {
        while self.fill() {}
        String::from_utf8(std::mem::take(&mut self.received)).unwrap()
    }

    /// Whether the server closed, with nothing more to say.
    pub(super) fn is_at_end(&mut self) -> bool {
        self.received.is_empty() && !self.fill()
    }

    fn fill(&mut self) -> bool {
        let mut piece = [0; 4096];
        match self.stream.read(&mut piece) {
            Ok(0) => false,
            Ok(count) => {
                self.received.extend_from_slice(&piece[..count]);
                true
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("reading: {error}"),
        }
    }
}
