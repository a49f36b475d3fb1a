//! The new process's side of a hand-over. It touches no socket before the old process has told it to serve.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::leaving::ask;
use super::link::{Link, LinkError, Received};
use super::message::{Facts, Identity, Message};
use super::pieces::{self, PieceHead};
use super::{Moved, Step, Tally};
use crate::backbone::handover::ToBackbone;
use crate::limits::{HANDOVER_DESCRIPTORS, HANDOVER_PREPARE_MILLIS, HANDOVER_START_MILLIS, MAILBOX_RETRY_MILLIS};
use crate::log::frame::Micros;
use crate::shard::handover::{Arriving, Carried, Expected, Verdict};
use crate::shard::mailbox::{Mailbox, ToShard};

/// Why this process does not take over. The old one goes on.
#[derive(Debug, thiserror::Error)]
#[error("cannot take over from the running process: {0}")]
pub struct TakeError(String);

impl TakeError {
    /// For this reason.
    #[must_use]
    pub fn new(reason: String) -> Self {
        Self(reason)
    }
}

impl From<LinkError> for TakeError {
    fn from(error: LinkError) -> Self {
        Self(error.to_string())
    }
}

impl From<String> for TakeError {
    fn from(reason: String) -> Self {
        Self(reason)
    }
}

/// What a running process offers.
#[derive(Debug)]
pub struct Inheritance {
    link: Link,
    /// Who it is.
    pub predecessor: Identity,
    /// What its node is.
    pub facts: Facts,
    /// Its listeners.
    pub listeners: Vec<TcpListener>,
}

/// Where what is inherited goes.
pub struct Heir {
    /// The shards, by their index.
    pub mailboxes: Vec<Arc<Mailbox>>,
    /// The backbone thread.
    pub backbone: mpsc::Sender<ToBackbone>,
    /// The machine's monotonic clock.
    pub clock: fn() -> Micros,
}

/// How long anything may take on this side. The old process counts too, and kills this one when it is too slow.
const PATIENCE: Duration = Duration::from_millis(HANDOVER_PREPARE_MILLIS);

impl Inheritance {
    /// Says hello to the old process and hears what it offers.
    ///
    /// # Errors
    /// When its release is too far from this one, or it is gone.
    pub fn accept(link: Link) -> Result<Self, TakeError> {
        let own = Identity::own();
        let deadline = Instant::now() + Duration::from_millis(HANDOVER_START_MILLIS);
        link.say(&Message::Hello(own.clone()), deadline)?;
        let mut listeners = Vec::new();
        loop {
            let received = link.receive(deadline)?;
            match received.message {
                Message::Listeners => listeners.extend(received.descriptors.into_iter().map(TcpListener::from)),
                Message::Welcome { identity, facts } => {
                    own.agree(&identity)?;
                    if listeners.is_empty() {
                        return Err(TakeError("it offers no listener".into()));
                    }
                    return Ok(Self { link, predecessor: identity, facts, listeners });
                }
                other => return Err(unexpected(other, "welcome")),
            }
        }
    }

    /// Tells the old process why this one does not start.
    pub fn decline(&self, reason: &str) {
        let last = Message::Failed { reason: reason.into() };
        // It may be gone; then nobody has to be told.
        let _ = self.link.say(&last, Instant::now() + Duration::from_secs(1));
    }

    /// Takes everything over: call it once all threads run, none of them accepting. When it returns, the shards serve.
    ///
    /// # Errors
    /// Why not; the old process knows it too. No socket was touched, and this process is of no use any more.
    pub fn take(self, heir: Heir) -> Result<(Moved, Tally), TakeError> {
        let expected = vec![BTreeSet::new(); heir.mailboxes.len()];
        let mut take = Take { heir, link: self.link, expected, fresh: Vec::new() };
        match take.run() {
            Ok((connections, since)) => {
                let pause = (take.heir.clock)().saturating_sub(since);
                let Tally { moved, failed, .. } = self.facts.tally;
                let moved = Tally { moved: moved + 1, failed, pause };
                Ok((Moved { pid: std::process::id(), connections, pause }, moved))
            }
            Err(error) => {
                let last = Message::Failed { reason: error.0.clone() };
                let _ = take.link.say(&last, Instant::now() + Duration::from_secs(1));
                Err(error)
            }
        }
    }
}

/// Ends this process as `SIGKILL` does when the file that `HANDOVER_FAULT` names says that it is to die in this step. Only in
/// builds with debug assertions: the end-to-end tests have no other way to meet a step of a few milliseconds.
fn fault(step: Step) {
    #[cfg(debug_assertions)]
    if let Some(file) = std::env::var_os("HANDOVER_FAULT")
        && std::fs::read_to_string(file).is_ok_and(|text| text.trim() == step.label())
    {
        // SAFETY: signals this process itself.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
    #[cfg(not(debug_assertions))]
    let _ = step;
}

struct Take {
    heir: Heir,
    link: Link,
    /// By shard: the channels it was told to hold.
    expected: Vec<BTreeSet<Arc<str>>>,
    /// Those that it is still to be told, with their shards.
    fresh: Vec<(usize, Arc<str>)>,
}

/// A shard that takes connections in.
struct Receiving {
    carried: Option<SyncSender<Carried>>,
    arrived: Receiver<Result<usize, String>>,
    verdict: Sender<Verdict>,
}

impl Take {
    /// Returns the connections taken over and since when they stood still.
    fn run(&mut self) -> Result<(usize, Micros), TakeError> {
        fault(Step::Greeting);
        self.say(&Message::Started)?;
        let since = self.seed()?;
        let shards = self.open()?;
        let (shards, connections) = self.carry(shards)?;
        self.say(&Message::Arrived { connections })?;
        match self.hear()?.message {
            Message::Commit => fault(Step::Committing),
            other => return Err(unexpected(other, "commit")),
        }
        // From here on this process serves, whatever happens. If the word cannot be said the old process is gone: it keeps its
        // end open until this one is dead or has spoken.
        let said = self.say(&Message::Mine);
        for shard in &shards {
            let _ = shard.verdict.send(Verdict::Moved);
        }
        if let Err(error) = said {
            tracing::warn!(%error, "the old process was gone at the last moment");
        }
        Ok((connections, since))
    }

    /// Takes the old relay's channels in until its last word.
    fn seed(&mut self) -> Result<Micros, TakeError> {
        loop {
            let received = self.hear()?;
            match received.message {
                Message::Piece(head) => {
                    fault(Step::Seeding);
                    self.import(head, received.body)?;
                    self.say(&Message::Taken)?;
                }
                Message::Seeded => {
                    fault(Step::Preparing);
                    self.hold()?;
                    let (reply, prepared) = channel();
                    let beat = self.ask(ToBackbone::Prepare { reply }, &prepared)?;
                    self.say(&Message::Prepared { beat })?;
                }
                Message::Frozen { beat, since } => {
                    fault(Step::Settling);
                    self.hold()?;
                    let (reply, finished) = channel();
                    self.ask(ToBackbone::Finish { beat, reply }, &finished)?;
                    let (reply, settled) = channel();
                    self.ask(ToBackbone::Settle { beat: 0, delivered: true, reply }, &settled)?;
                    return Ok(since);
                }
                other => return Err(unexpected(other, "piece, seeded or frozen")),
            }
        }
    }

    fn import(&mut self, head: PieceHead, body: Bytes) -> Result<(), TakeError> {
        let piece = pieces::join(head, body)?;
        for channel in &piece.channels {
            for shard in &channel.shards {
                let shard = shard % self.expected.len();
                if self.expected[shard].insert(channel.name.clone()) {
                    self.fresh.push((shard, channel.name.clone()));
                }
            }
        }
        let (reply, imported) = channel();
        Ok(self.ask(ToBackbone::Import { piece, reply }, &imported)??)
    }

    /// Has the shards hold the channels that they do not hold yet.
    fn hold(&mut self) -> Result<(), TakeError> {
        let mut channels = vec![Vec::new(); self.expected.len()];
        for (shard, name) in self.fresh.drain(..) {
            channels[shard].push(name);
        }
        let mut waiting = Vec::new();
        for (mailbox, channels) in self.heir.mailboxes.iter().zip(channels) {
            if !channels.is_empty() {
                let (live, told) = channel();
                post(mailbox, ToShard::Expect(Expected { channels, live }))?;
                waiting.push(told);
            }
        }
        for told in waiting {
            told.recv_timeout(PATIENCE).map_err(|_| "a shard did not get its channels live".to_owned())??;
        }
        Ok(())
    }

    /// Opens the shards for arrivals.
    fn open(&mut self) -> Result<Vec<Receiving>, TakeError> {
        let mut shards = Vec::new();
        for mailbox in &self.heir.mailboxes {
            let (give, carried) = sync_channel(HANDOVER_DESCRIPTORS);
            let (arrived, told) = channel();
            let (verdict, told_verdict) = channel();
            post(mailbox, ToShard::Arrive(Arriving { carried, arrived, verdict: told_verdict }))?;
            shards.push(Receiving { carried: Some(give), arrived: told, verdict });
        }
        Ok(shards)
    }

    /// Passes connections on to the shards until all have arrived; returns how many.
    fn carry(&self, mut shards: Vec<Receiving>) -> Result<(Vec<Receiving>, usize), TakeError> {
        let mut received = 0;
        let announced = loop {
            let Received { message, body, descriptors } = self.hear()?;
            match message {
                Message::Connections { shard, states } => {
                    fault(Step::Carrying);
                    received += descriptors.len();
                    let to = shard % shards.len();
                    for one in join(states, body, descriptors)? {
                        let given = shards[to].carried.as_ref().map(|carried| carried.send(one));
                        if !matches!(given, Some(Ok(()))) {
                            // Why is in its last answer.
                            arrived(&shards[to])?;
                            return Err(TakeError(format!("shard {to} takes no more connections")));
                        }
                    }
                    self.say(&Message::Taken)?;
                }
                Message::Sent { connections } => break connections,
                other => return Err(unexpected(other, "connections")),
            }
        };
        fault(Step::Arriving);
        let mut taken = 0;
        for shard in &mut shards {
            shard.carried = None;
            taken += arrived(shard)?;
        }
        if taken != announced || received != announced {
            return Err(TakeError(format!(
                "{announced} connections were sent, {received} came, {taken} were taken in"
            )));
        }
        Ok((shards, taken))
    }

    fn say(&self, message: &Message) -> Result<(), TakeError> {
        Ok(self.link.say(message, Instant::now() + PATIENCE)?)
    }

    fn hear(&self) -> Result<Received, TakeError> {
        Ok(self.link.receive(Instant::now() + PATIENCE)?)
    }

    fn ask<T>(&self, order: ToBackbone, answer: &Receiver<T>) -> Result<T, TakeError> {
        Ok(ask(&self.heir.backbone, order, answer, PATIENCE)?)
    }
}

fn post(mailbox: &Mailbox, mut message: ToShard) -> Result<(), TakeError> {
    let deadline = Instant::now() + PATIENCE;
    while let Err(refused) = mailbox.post(message) {
        if Instant::now() >= deadline {
            return Err(TakeError("a shard's mailbox stays full".into()));
        }
        message = refused;
        mailbox.ring();
        std::thread::sleep(Duration::from_millis(MAILBOX_RETRY_MILLIS));
    }
    mailbox.ring();
    Ok(())
}

fn arrived(shard: &Receiving) -> Result<usize, TakeError> {
    let told = shard.arrived.recv_timeout(PATIENCE);
    Ok(told.map_err(|_| "a shard did not take its connections in".to_owned())??)
}

/// Puts sockets and states together.
fn join(states: Vec<usize>, mut body: Bytes, sockets: Vec<OwnedFd>) -> Result<Vec<Carried>, TakeError> {
    let whole = states.iter().try_fold(0usize, |sum, &state| sum.checked_add(state)) == Some(body.len());
    if states.len() != sockets.len() || !whole {
        let reason = format!("{} states of {} bytes for {} sockets", states.len(), body.len(), sockets.len());
        return Err(TakeError(reason));
    }
    let carried = sockets.into_iter().zip(states).map(|(socket, state)| {
        // A copy: each connection would keep the whole batch's memory.
        Carried { socket, state: Bytes::copy_from_slice(&body.split_to(state)) }
    });
    Ok(carried.collect())
}

fn unexpected(message: Message, expected: &str) -> TakeError {
    match message {
        Message::Failed { reason } => TakeError(format!("it says: {reason}")),
        other => TakeError(format!("it says {:?} instead of {expected}", other.name())),
    }
}
