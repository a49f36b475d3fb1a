//! The old process's side of a hand-over. It runs on a thread of its own: the node goes on serving until the shards are told to
//! stand still, and again when it fails.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::link::{Link, LinkError, Received};
use super::message::{Facts, Identity, Message};
use super::process::Successor;
use super::{HandoverError, Moved, Step, pieces};
use crate::backbone::handover::{Place, ToBackbone};
use crate::limits::{
    HANDOVER_DESCRIPTORS, HANDOVER_FREEZE_MILLIS, HANDOVER_PREPARE_MILLIS, HANDOVER_START_MILLIS, HANDOVER_STEP_MILLIS,
    HANDOVER_WINDOW, MAILBOX_RETRY_MILLIS,
};
use crate::log::frame::Micros;
use crate::shard::handover::{Carried, Leaving, Verdict};
use crate::shard::mailbox::{Mailbox, ToShard};

/// How long each step may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// The new process's first word, and its threads.
    pub start: Duration,
    /// Its relay and channels.
    pub prepare: Duration,
    /// This process's shards.
    pub freeze: Duration,
    /// Each step while nothing is delivered.
    pub step: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            start: Duration::from_millis(HANDOVER_START_MILLIS),
            prepare: Duration::from_millis(HANDOVER_PREPARE_MILLIS),
            freeze: Duration::from_millis(HANDOVER_FREEZE_MILLIS),
            step: Duration::from_millis(HANDOVER_STEP_MILLIS),
        }
    }
}

/// What the old process has to give, and to whom.
pub struct Leaver<S> {
    /// The new process.
    pub successor: S,
    /// The connection to it.
    pub link: Link,
    /// Every listener.
    pub listeners: Vec<OwnedFd>,
    /// About the node.
    pub facts: Facts,
    /// The shards, by their index.
    pub mailboxes: Vec<Arc<Mailbox>>,
    /// The backbone thread.
    pub backbone: mpsc::Sender<ToBackbone>,
    /// Names this attempt; no other has the same number.
    pub round: u64,
    /// The machine's monotonic clock.
    pub clock: fn() -> Micros,
    /// Raised by whoever wants the hand-over to fail: the node is to be drained.
    pub abort: Arc<AtomicBool>,
    /// How long each step may take.
    pub patience: Patience,
}

/// A shard that was told to stand still.
struct Frozen {
    carried: Receiver<Carried>,
    verdict: Sender<Verdict>,
    connections: usize,
}

/// Why a step failed.
type Reason = String;

/// Hands everything over. When this fails the new process is dead and the shards serve as before.
///
/// # Errors
/// Where and why it failed.
pub fn hand_over<S: Successor>(leaver: Leaver<S>) -> Result<Moved, HandoverError> {
    let mut leave = Leave { leaver, step: Step::Starting, began: Instant::now(), shards: Vec::new(), since: 0 };
    match leave.run() {
        Ok(connections) => Ok(leave.moved(connections)),
        Err(reason) => {
            // Told so that its log says it too; then there is no doubt that it serves nobody.
            let last = Message::Failed { reason: reason.clone() };
            let _ = leave.leaver.link.say(&last, Instant::now() + Duration::from_millis(1));
            leave.leaver.successor.kill();
            let _ = leave.leaver.backbone.blocking_send(ToBackbone::Release);
            // A verdict that is dropped lets a shard go on.
            leave.shards.clear();
            Err(HandoverError { step: leave.step, reason })
        }
    }
}

struct Leave<S> {
    leaver: Leaver<S>,
    step: Step,
    began: Instant,
    shards: Vec<Frozen>,
    since: Micros,
}

impl<S: Successor> Leave<S> {
    fn run(&mut self) -> Result<usize, Reason> {
        self.greet()?;
        self.enter(Step::Seeding)?;
        self.pass(self.leaver.patience.prepare)?;
        self.say(&Message::Seeded, self.leaver.patience.step)?;
        self.enter(Step::Preparing)?;
        let beat = match self.hear(self.leaver.patience.prepare)? {
            Received { message: Message::Prepared { beat }, .. } => beat,
            other => return Err(unexpected(&other.message, "prepared")),
        };
        self.settle(beat, self.leaver.patience.prepare)?;
        // What came meanwhile, so that the last pass is short.
        self.pass(self.leaver.patience.prepare)?;
        self.enter(Step::Freezing)?;
        self.freeze()?;
        self.enter(Step::Settling)?;
        self.settle(beat, self.leaver.patience.step)?;
        let (reply, held) = channel();
        let beat = self.ask(ToBackbone::Hold { reply }, &held, self.leaver.patience.step)?;
        self.pass(self.leaver.patience.step)?;
        self.say(&Message::Frozen { beat, since: self.since }, self.leaver.patience.step)?;
        self.enter(Step::Carrying)?;
        let connections = self.carry()?;
        self.enter(Step::Arriving)?;
        self.say(&Message::Sent { connections }, self.leaver.patience.step)?;
        match self.hear(self.leaver.patience.step)?.message {
            Message::Arrived { connections: arrived } if arrived == connections => {}
            Message::Arrived { connections: arrived } => {
                return Err(format!("{arrived} of {connections} connections arrived"));
            }
            other => return Err(unexpected(&other, "arrived")),
        }
        self.enter(Step::Committing)?;
        self.commit()?;
        Ok(connections)
    }

    /// Begins a step.
    fn enter(&mut self, step: Step) -> Result<(), Reason> {
        tracing::debug!(step = self.step.label(), micros = self.began.elapsed().as_micros() as u64, "hand-over");
        (self.step, self.began) = (step, Instant::now());
        self.wanted()
    }

    fn wanted(&self) -> Result<(), Reason> {
        if self.leaver.abort.load(Ordering::Relaxed) { Err("the node is being stopped".into()) } else { Ok(()) }
    }

    fn greet(&mut self) -> Result<(), Reason> {
        let own = Identity::own();
        match self.hear(self.leaver.patience.start)?.message {
            Message::Hello(other) => own.agree(&other)?,
            other => return Err(unexpected(&other, "hello")),
        }
        self.enter(Step::Greeting)?;
        let deadline = Instant::now() + self.leaver.patience.start;
        let listeners: Vec<BorrowedFd<'_>> = self.leaver.listeners.iter().map(AsFd::as_fd).collect();
        for some in listeners.chunks(HANDOVER_DESCRIPTORS) {
            self.leaver.link.send(&Message::Listeners, &[], some, deadline).map_err(|error| error.to_string())?;
        }
        let welcome = Message::Welcome { identity: own, facts: self.leaver.facts.clone() };
        self.say(&welcome, self.leaver.patience.start)?;
        match self.hear(self.leaver.patience.start)?.message {
            Message::Started => Ok(()),
            other => Err(unexpected(&other, "started")),
        }
    }

    /// Gives what changed in the backbone thread since the last pass.
    fn pass(&mut self, patience: Duration) -> Result<(), Reason> {
        let mut next = Some(Place::Channels(0));
        let mut window = 0;
        while let Some(from) = next {
            self.wanted()?;
            let (reply, pieces) = channel();
            let order = ToBackbone::Export { round: self.leaver.round, from, reply };
            let piece = self.ask(order, &pieces, patience)?;
            next = piece.next;
            let (head, body) = pieces::split(&piece);
            if window == HANDOVER_WINDOW {
                self.hear_taken(patience)?;
                window -= 1;
            }
            let deadline = Instant::now() + patience;
            let sent = self.leaver.link.send(&Message::Piece(head), &body, &[], deadline);
            sent.map_err(|error| self.why(error))?;
            window += 1;
        }
        (0..window).try_for_each(|_| self.hear_taken(patience))
    }

    fn settle(&mut self, beat: Micros, patience: Duration) -> Result<Micros, Reason> {
        let (reply, settled) = channel();
        self.ask(ToBackbone::Settle { beat, delivered: false, reply }, &settled, patience)
            .map_err(|reason| format!("the relay does not settle: {reason}"))
    }

    /// Has every shard stand still.
    fn freeze(&mut self) -> Result<(), Reason> {
        let deadline = Instant::now() + self.leaver.patience.freeze;
        let mut waiting = Vec::new();
        for mailbox in &self.leaver.mailboxes {
            let (give, carried) = sync_channel(HANDOVER_DESCRIPTORS);
            let (frozen, standing) = channel();
            let (verdict, told) = channel();
            let mut message = ToShard::Leave(Leaving { carried: give, frozen, verdict: told });
            while let Err(refused) = mailbox.post(message) {
                if Instant::now() >= deadline {
                    return Err("a shard's mailbox stays full".into());
                }
                message = refused;
                std::thread::sleep(Duration::from_millis(MAILBOX_RETRY_MILLIS));
            }
            mailbox.ring();
            self.shards.push(Frozen { carried, verdict, connections: 0 });
            waiting.push(standing);
        }
        // Which one is first does not matter for the pause: it is counted from the first answer that is looked at at the
        // latest, and they are looked at in turn.
        let mut left: Vec<usize> = (0..waiting.len()).collect();
        while !left.is_empty() {
            let mut failed = None;
            left.retain(|&shard| match waiting[shard].try_recv() {
                Ok(connections) => {
                    self.shards[shard].connections = connections;
                    false
                }
                Err(std::sync::mpsc::TryRecvError::Disconnected) => {
                    failed = Some(shard);
                    false
                }
                Err(std::sync::mpsc::TryRecvError::Empty) => true,
            });
            if let Some(shard) = failed {
                return Err(format!("shard {shard} could not finish what it was answering"));
            }
            if self.since == 0 && left.len() < waiting.len() {
                self.since = (self.leaver.clock)();
            }
            if Instant::now() >= deadline {
                return Err(format!("shard {} does not stand still", left[0]));
            }
            if !left.is_empty() {
                std::thread::sleep(FREEZE_LOOK);
            }
        }
        Ok(())
    }

    /// Sends every connection; returns how many.
    fn carry(&mut self) -> Result<usize, Reason> {
        let (mut total, mut window) = (0, 0);
        for shard in 0..self.shards.len() {
            let mut sent = 0;
            loop {
                let deadline = Instant::now() + self.leaver.patience.step;
                let batch = gather(&self.shards[shard].carried, deadline)?;
                if batch.is_empty() {
                    break;
                }
                if window == HANDOVER_WINDOW {
                    self.hear_taken(self.leaver.patience.step)?;
                    window -= 1;
                }
                let states = batch.iter().map(|one| one.state.len()).collect();
                let body: Vec<u8> = batch.iter().flat_map(|one| one.state.iter().copied()).collect();
                let sockets: Vec<BorrowedFd<'_>> = batch.iter().map(|one| one.socket.as_fd()).collect();
                let message = Message::Connections { shard, states };
                let given = self.leaver.link.send(&message, &body, &sockets, deadline);
                given.map_err(|error| self.why(error))?;
                window += 1;
                sent += batch.len();
            }
            if sent != self.shards[shard].connections {
                return Err(format!("shard {shard} gave {sent} of {} connections", self.shards[shard].connections));
            }
            total += sent;
        }
        (0..window).try_for_each(|_| self.hear_taken(self.leaver.patience.step))?;
        Ok(total)
    }

    /// Gives up the right to serve, exactly if the new process took it.
    fn commit(&mut self) -> Result<(), Reason> {
        self.say(&Message::Commit, self.leaver.patience.step)?;
        let answer = match self.leaver.link.receive(Instant::now() + self.leaver.patience.step) {
            Err(LinkError::TimedOut) => {
                // It must not say it while it is looked whether it did.
                self.leaver.successor.suspend();
                let said = self.leaver.link.receive(Instant::now() + LAST_LOOK);
                if said.as_ref().is_ok_and(|received| received.message == Message::Mine) {
                    self.leaver.successor.resume();
                }
                said
            }
            answer => answer,
        };
        match answer.map_err(|error| self.why(error))?.message {
            Message::Mine => Ok(()),
            other => Err(unexpected(&other, "mine")),
        }
    }

    /// The new process serves.
    fn moved(&mut self, connections: usize) -> Moved {
        for shard in self.shards.drain(..) {
            // A shard that has ended has nothing left to forget.
            let _ = shard.verdict.send(Verdict::Moved);
        }
        let pause = (self.leaver.clock)().saturating_sub(self.since);
        Moved { pid: self.leaver.successor.pid(), connections, pause }
    }

    fn say(&self, message: &Message, patience: Duration) -> Result<(), Reason> {
        self.leaver.link.say(message, Instant::now() + patience).map_err(|error| self.why(error))
    }

    fn hear(&self, patience: Duration) -> Result<Received, Reason> {
        let received = self.leaver.link.receive(Instant::now() + patience).map_err(|error| error.to_string())?;
        match received.message {
            Message::Failed { reason } => Err(format!("the new process says: {reason}")),
            message => Ok(Received { message, ..received }),
        }
    }

    fn hear_taken(&self, patience: Duration) -> Result<(), Reason> {
        match self.hear(patience)?.message {
            Message::Taken => Ok(()),
            other => Err(unexpected(&other, "taken")),
        }
    }

    /// Why something could not be said: the new process may have said so before it went.
    fn why(&self, error: LinkError) -> Reason {
        let soon = Instant::now() + LAST_LOOK;
        while let Ok(received) = self.leaver.link.receive(soon) {
            if let Message::Failed { reason } = received.message {
                return format!("the new process says: {reason}");
            }
        }
        error.to_string()
    }

    fn ask<T>(&self, order: ToBackbone, answer: &Receiver<T>, patience: Duration) -> Result<T, Reason> {
        ask(&self.leaver.backbone, order, answer, patience)
    }
}

/// Between two looks at the shards that are to stand still.
const FREEZE_LOOK: Duration = Duration::from_micros(200);

/// What was said before is in the socket already.
const LAST_LOOK: Duration = Duration::from_millis(20);

/// Up to as many connections as go into one message; none when there are no more.
fn gather(carried: &Receiver<Carried>, deadline: Instant) -> Result<Vec<Carried>, Reason> {
    let mut batch = Vec::new();
    while batch.len() < HANDOVER_DESCRIPTORS {
        match carried.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(one) => batch.push(one),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => return Err("a shard stopped giving its connections".into()),
        }
    }
    Ok(batch)
}

/// Asks the backbone thread and waits for its answer.
///
/// # Errors
/// When it has ended or does not answer in time.
pub(super) fn ask<T>(
    backbone: &mpsc::Sender<ToBackbone>,
    order: ToBackbone,
    answer: &Receiver<T>,
    patience: Duration,
) -> Result<T, Reason> {
    // Questions are asked one after the other, so that there is room unless the thread is stuck.
    backbone.try_send(order).map_err(|_| "the backbone thread takes no questions")?;
    answer.recv_timeout(patience).map_err(|error| match error {
        RecvTimeoutError::Timeout => "the backbone thread did not answer in time".into(),
        RecvTimeoutError::Disconnected => "the backbone thread has ended".into(),
    })
}

fn unexpected(message: &Message, expected: &str) -> Reason {
    format!("the new process says {:?} instead of {expected:?}", message.name())
}
