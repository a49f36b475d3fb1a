//! Redis or Valkey as the backbone: one connection for commands, one for pub/sub, and a task that keeps them.
//!
//! Everything runs on the backbone thread's runtime. Operations are started here and answered through
//! [`RedisBackbone::next`]; commands of all operations are pipelined on one connection.

pub mod address;
mod commands;
mod envelope;
pub mod examine;
mod library;
mod sentinel;
mod session;
mod source;
#[cfg(test)]
pub mod testing;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use bytes::Bytes;
use redis::{PushInfo, Value};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use self::address::AddressError;
use self::commands::{Commands, Keys};
use self::source::Source;
use super::interface::{BackboneError, BackboneEvent, Message, Read, Ticket};
use crate::limits::BACKBONE_QUEUE_BYTES;
use crate::log::frame::Micros;
use crate::log::position::Epoch;
use crate::settings::{HistoryConfig, RedisConfig};
use crate::shard::mailbox::Publish;

/// What the session and started operations tell the backbone.
enum Outcome {
    Up(Link),
    Event(BackboneEvent),
}

/// A session's connections, while they last.
#[derive(Debug)]
struct Link {
    commands: Commands,
    subscriptions: mpsc::UnboundedSender<SubscriptionChange>,
    pushes: mpsc::Receiver<PushInfo>,
    inbox: Arc<Inbox>,
    /// How many servers had been left when it was made.
    left: u64,
}

/// A change of the node's subscriptions. One task carries them out one after the other, so that an unsubscribe and a new
/// subscribe of the same channel cannot overtake each other.
#[derive(Debug)]
enum SubscriptionChange {
    Subscribe(Ticket, Vec<Arc<str>>),
    Unsubscribe(Vec<Arc<str>>),
}

/// What a pub/sub connection and the backbone share. The queue is bounded: a message that finds it full is dropped and
/// `overrun` makes the relay read every channel anew. Each session has its own, which ends with it: a message that came over
/// a lost connection may be of a server that lost it too, and must not reach the relay after it was told of the loss.
#[derive(Debug)]
struct Inbox {
    queue: mpsc::Sender<PushInfo>,
    bytes: AtomicUsize,
    overrun: AtomicBool,
}

impl Inbox {
    /// An empty one of so many messages, and the end it is read from.
    fn new(messages: usize) -> (Arc<Self>, mpsc::Receiver<PushInfo>) {
        let (queue, pushes) = mpsc::channel(messages);
        (Arc::new(Self { queue, bytes: AtomicUsize::new(0), overrun: AtomicBool::new(false) }), pushes)
    }

    fn push(&self, message: PushInfo) {
        let size = size_of_push(&message);
        if self.bytes.fetch_add(size, Ordering::Relaxed) + size > BACKBONE_QUEUE_BYTES
            || self.queue.try_send(message).is_err()
        {
            self.bytes.fetch_sub(size, Ordering::Relaxed);
            self.overrun.store(true, Ordering::Relaxed);
        }
    }
}

fn size_of_push(push: &PushInfo) -> usize {
    let bytes = |value: &Value| if let Value::BulkString(bytes) = value { bytes.len() } else { 0 };
    size_of::<PushInfo>() + push.data.iter().map(bytes).sum::<usize>()
}

/// What a session needs, over all its connections.
struct Context {
    keys: Arc<Keys>,
    history: Arc<HistoryConfig>,
    /// The topic of the node's own heartbeat, and that of the process it takes over from.
    beats: Vec<String>,
    outcomes: mpsc::UnboundedSender<Outcome>,
    /// When the last heartbeat came back.
    beat: Arc<AtomicU64>,
    /// How many servers were left because another one is the primary. What is under way on one of them is not waited for: a
    /// server that hangs answers nothing, and what one that was replaced says is not to be trusted.
    left: watch::Sender<u64>,
    clock: fn() -> Micros,
}

/// The Redis backbone. Dropping it closes its connections.
pub struct RedisBackbone {
    link: Option<Link>,
    reason: String,
    keys: Arc<Keys>,
    heartbeat: String,
    predecessor: Option<String>,
    outcomes: mpsc::UnboundedReceiver<Outcome>,
    started: mpsc::UnboundedSender<Outcome>,
    beat: Arc<AtomicU64>,
    left: watch::Receiver<u64>,
    clock: fn() -> Micros,
    session: JoinHandle<()>,
}

impl fmt::Debug for RedisBackbone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisBackbone").field("link", &self.link).finish_non_exhaustive()
    }
}

impl RedisBackbone {
    /// Starts connecting, on the current tokio runtime. `node` is random: it names the node's heartbeat. `predecessor` is that
    /// of the process that this one takes over from: its heartbeats come in the order of the messages around them.
    ///
    /// # Errors
    /// When the address is malformed. That nothing answers there is no error: connecting goes on.
    pub fn start(
        config: &RedisConfig,
        history: HistoryConfig,
        node: u64,
        predecessor: Option<u64>,
        clock: fn() -> Micros,
    ) -> Result<Self, AddressError> {
        let keys = Arc::new(Keys::new(&config.prefix));
        let heartbeat = keys.heartbeat(node);
        let predecessor = predecessor.map(|node| keys.heartbeat(node));
        let (started, outcomes) = mpsc::unbounded_channel();
        let beat = Arc::new(AtomicU64::new(clock()));
        let (leaving, left) = watch::channel(0);
        let context = Context {
            keys: keys.clone(),
            history: Arc::new(history),
            beats: std::iter::once(&heartbeat).chain(&predecessor).cloned().collect(),
            outcomes: started.clone(),
            beat: beat.clone(),
            left: leaving,
            clock,
        };
        let session = tokio::spawn(session::keep(context, Source::start(config)?));
        Ok(Self {
            link: None,
            reason: "not connected yet".into(),
            keys,
            heartbeat,
            predecessor,
            outcomes,
            started,
            beat,
            left,
            clock,
            session,
        })
    }

    /// See [`super::interface::Backbone::publish`].
    pub fn publish(&mut self, ticket: Ticket, publish: Publish) {
        self.run(|commands| commands.publish(publish), move |result| BackboneEvent::Published(ticket, result));
    }

    /// See [`super::interface::Backbone::read`].
    pub fn read(&mut self, ticket: Ticket, read: Read) {
        self.run(|commands| commands.read(read), move |result| BackboneEvent::Page(ticket, result));
    }

    /// See [`super::interface::Backbone::renew`].
    pub fn renew(&mut self, ticket: Ticket, channel: Arc<str>, epoch: Epoch) {
        self.run(|commands| commands.renew(channel, epoch), move |result| BackboneEvent::Page(ticket, result));
    }

    /// See [`super::interface::Backbone::subscribe`].
    pub fn subscribe(&mut self, ticket: Ticket, channels: Vec<Arc<str>>) {
        self.change(SubscriptionChange::Subscribe(ticket, channels));
    }

    /// See [`super::interface::Backbone::unsubscribe`].
    pub fn unsubscribe(&mut self, channels: Vec<Arc<str>>) {
        self.change(SubscriptionChange::Unsubscribe(channels));
    }

    fn change(&mut self, change: SubscriptionChange) {
        if let Some(link) = &self.link {
            // It fails only when the session has ended, and then a Disconnected is on its way.
            let _ = link.subscriptions.send(change);
        }
    }

    /// Starts an operation. Its task sends the answer; the runtime polls new tasks in their order, so commands are queued on
    /// the connection in the order they were started.
    fn run<T, F>(
        &mut self,
        operation: impl FnOnce(Commands) -> F,
        answer: impl FnOnce(Result<T, BackboneError>) -> BackboneEvent + Send + 'static,
    ) where
        F: Future<Output = Result<T, BackboneError>> + Send + 'static,
        T: Send + 'static,
    {
        let started = self.started.clone();
        match &self.link {
            Some(link) => {
                let operation = operation(link.commands.clone());
                let (mut left, before) = (self.left.clone(), link.left);
                tokio::spawn(async move {
                    let result = tokio::select! {
                        biased;
                        result = operation => result,
                        Ok(_) = left.wait_for(|now| *now > before) => {
                            Err(BackboneError::Unanswered("another server is the primary now".into()))
                        }
                    };
                    let _ = started.send(Outcome::Event(answer(result)));
                });
            }
            None => {
                let error = BackboneError::Disconnected(self.reason.clone());
                let _ = started.send(Outcome::Event(answer(Err(error))));
            }
        }
    }

    /// See [`super::interface::Backbone::try_next`].
    pub fn try_next(&mut self) -> Option<BackboneEvent> {
        if let Ok(outcome) = self.outcomes.try_recv() {
            return Some(self.take_outcome(outcome));
        }
        while let Some(push) = self.link.as_mut().and_then(|link| link.pushes.try_recv().ok()) {
            if let Some(event) = self.take_push(push) {
                return Some(event);
            }
        }
        // Only once the queue is empty: what was dropped came after what was in it.
        self.link.as_ref()?.inbox.overrun.swap(false, Ordering::Relaxed).then_some(BackboneEvent::Overrun)
    }

    /// See [`super::interface::Backbone::next`].
    pub async fn next(&mut self) -> BackboneEvent {
        loop {
            if let Some(event) = self.try_next() {
                return event;
            }
            tokio::select! {
                Some(outcome) = self.outcomes.recv() => return self.take_outcome(outcome),
                Some(push) = next_push(&mut self.link) => if let Some(event) = self.take_push(push) {
                    return event;
                },
            }
        }
    }

    fn take_outcome(&mut self, outcome: Outcome) -> BackboneEvent {
        match outcome {
            Outcome::Up(link) => {
                self.link = Some(link);
                BackboneEvent::Connected
            }
            Outcome::Event(event) => {
                if let BackboneEvent::Disconnected(reason) = &event {
                    self.link = None;
                    self.reason.clone_from(reason);
                }
                event
            }
        }
    }

    /// Reads a message: its topic, then its payload.
    fn take_push(&mut self, push: PushInfo) -> Option<BackboneEvent> {
        if let Some(link) = &self.link {
            link.inbox.bytes.fetch_sub(size_of_push(&push), Ordering::Relaxed);
        }
        let mut data = push.data.into_iter();
        let (Some(Value::BulkString(topic)), Some(Value::BulkString(payload))) = (data.next(), data.next()) else {
            return None;
        };
        if topic == self.heartbeat.as_bytes() {
            self.beat.store((self.clock)(), Ordering::Relaxed);
            let sent = std::str::from_utf8(&payload).ok()?.parse().ok()?;
            return Some(BackboneEvent::Heartbeat(sent));
        }
        if self.predecessor.as_ref().is_some_and(|predecessor| topic == predecessor.as_bytes()) {
            let sent = std::str::from_utf8(&payload).ok()?.parse().ok()?;
            return Some(BackboneEvent::PredecessorBeat(sent));
        }
        let channel = self.keys.channel_of(topic)?;
        let (header, start) = envelope::split(&payload);
        let (position, tag) = (header.map(|header| header.position), header.and_then(|header| header.tag));
        Some(BackboneEvent::Message(Message { channel, position, tag, data: Bytes::from(payload).slice(start..) }))
    }
}

/// The next message of a session; never, without one or when its connection has closed.
async fn next_push(link: &mut Option<Link>) -> Option<PushInfo> {
    match link {
        Some(link) => link.pushes.recv().await,
        None => std::future::pending().await,
    }
}

impl Drop for RedisBackbone {
    fn drop(&mut self) {
        self.session.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use redis::PushKind;

    use super::*;

    #[test]
    fn a_message_that_finds_the_queue_full_is_reported() {
        let (inbox, mut pushes) = Inbox::new(2);
        let message = |bytes| PushInfo { kind: PushKind::Message, data: vec![Value::BulkString(vec![0; bytes])] };
        inbox.push(message(1));
        inbox.push(message(1));
        assert!(!inbox.overrun.load(Ordering::Relaxed));
        inbox.push(message(1));
        assert!(inbox.overrun.swap(false, Ordering::Relaxed));
        assert_eq!(inbox.bytes.load(Ordering::Relaxed), 2 * size_of_push(&message(1)));
        pushes.try_recv().unwrap();
        inbox.push(message(BACKBONE_QUEUE_BYTES));
        assert!(inbox.overrun.load(Ordering::Relaxed));
        assert!(pushes.try_recv().is_ok() && pushes.try_recv().is_err());
    }

    /// The server behind the next connection may never have had it: after the loss it would stand for another publication.
    #[test]
    fn what_came_over_a_lost_connection_is_gone_with_it() {
        let mut server = testing::Server::start(&[]);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let history = crate::settings::Settings::default().history;
            let mut backbone = RedisBackbone::start(&server.config(), history, 1, None, || 0).unwrap();
            while backbone.next().await != BackboneEvent::Connected {}
            backbone.subscribe(Ticket(1), vec!["news".into()]);
            while backbone.next().await != BackboneEvent::Subscribed(Ticket(1)) {}
            while backbone.try_next().is_some() {}
            server.cli_publish("news", "1");
            while backbone.link.as_ref().unwrap().pushes.is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            server.kill();
            while backbone.outcomes.is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            assert!(matches!(backbone.try_next(), Some(BackboneEvent::Disconnected(_))));
            while let Some(event) = backbone.try_next() {
                assert!(matches!(event, BackboneEvent::Disconnected(_)), "{event:?}");
            }
        });
    }
}
