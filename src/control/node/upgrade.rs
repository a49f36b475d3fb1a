//! Upgrades: the node starts its successor and hands over, on a thread of its own, while the main thread goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread::JoinHandle;

use serde_json::json;

use super::lifecycle::Phase;
use super::{Node, NodeError};
use crate::control::admin::Admin;
use crate::control::clock::monotonic_micros;
use crate::control::handover::leaving::{Leaver, Patience, hand_over};
use crate::control::handover::message::Facts;
use crate::control::handover::taking::{Heir, Inheritance, TakeError};
use crate::control::handover::{HandoverError, Moved, Step};
use crate::settings::Settings;

/// A hand-over under way.
pub(super) struct UnderWay {
    thread: JoinHandle<()>,
    outcome: Receiver<Result<Moved, HandoverError>>,
    abort: Arc<AtomicBool>,
}

/// Refuses to go on with another backbone: positions would mean nothing there.
pub(super) fn check_backbone(facts: &Facts, settings: &Settings) -> Result<(), NodeError> {
    let prefix = settings.redis.as_ref().map(|redis| &redis.prefix);
    if facts.redis_prefix.as_ref() == prefix {
        return Ok(());
    }
    let name = |prefix: Option<&String>| match prefix {
        Some(prefix) => format!("Redis with the prefix {prefix:?}"),
        None => "the embedded backbone".into(),
    };
    let (theirs, ours) = (name(facts.redis_prefix.as_ref()), name(prefix));
    Err(TakeError::new(format!("it uses {theirs}, the configuration now says {ours}: that takes a restart")).into())
}

impl Node {
    /// Starts the program anew and begins to hand over to it: the end is told by [`Node::upgrade_ended`].
    ///
    /// # Errors
    /// When one is under way, the node is stopping, or the program cannot be started.
    pub fn begin_upgrade(&mut self) -> Result<(), String> {
        if self.succession.under_way.is_some() {
            return Err("an upgrade is under way".into());
        }
        if self.state.phase() != Phase::Serving {
            return Err(format!("the node is {}", self.state.phase().label()));
        }
        self.succession.round += 1;
        let listeners = self.succession.listeners.iter().map(std::os::fd::OwnedFd::try_clone);
        let listeners = listeners.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
        let (child, link) = self.succession.program.start().map_err(|error| error.to_string())?;
        tracing::info!(pid = std::process::id(), next = child.id(), "handing over");
        let abort = Arc::new(AtomicBool::new(false));
        let leaver = Leaver {
            successor: child,
            link,
            listeners,
            facts: Facts {
                shards: self.mailboxes.len(),
                redis_prefix: self.succession.redis_prefix.clone(),
                node: self.succession.node,
                tally: *self.state.tally(),
            },
            mailboxes: self.mailboxes.clone(),
            backbone: self.succession.backbone.clone(),
            round: self.succession.round,
            clock: monotonic_micros,
            abort: Arc::clone(&abort),
            patience: Patience::default(),
        };
        let (told, outcome) = channel();
        let bell = Arc::clone(&self.ends.bell);
        let thread = std::thread::Builder::new().name("handover".into()).spawn(move || {
            let ended = hand_over(leaver);
            // The receiver is kept until this thread has ended.
            let _ = told.send(ended);
            bell.ring();
        });
        let thread = thread.map_err(|error| error.to_string())?;
        self.succession.under_way = Some(UnderWay { thread, outcome, abort });
        Ok(())
    }

    /// How the hand-over ended, once it has. After a success the shards serve nobody any more and end.
    pub fn upgrade_ended(&mut self) -> Option<Result<Moved, HandoverError>> {
        let outcome = match self.succession.under_way.as_ref()?.outcome.try_recv() {
            Ok(outcome) => outcome,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => {
                // It panicked, which dropped every verdict: the shards serve on.
                Err(HandoverError { step: Step::Starting, reason: "its thread panicked".into() })
            }
        };
        if let Some(ended) = self.succession.under_way.take() {
            let _ = ended.thread.join();
        }
        match &outcome {
            Ok(Moved { pid, connections, pause }) => {
                tracing::info!(pid = std::process::id(), next = pid, connections, pause_micros = pause, "handed over");
            }
            Err(error) => {
                self.state.tally().failed += 1;
                tracing::error!(%error, "this process goes on");
            }
        }
        Some(outcome)
    }

    /// Tells whoever asked for the upgrade, and the service manager, how it ended. True when it succeeded.
    pub(super) fn has_moved(&mut self, outcome: Result<Moved, HandoverError>) -> bool {
        let moved = outcome.is_ok();
        let reply = self.ending.upgrade.take();
        let told = match outcome {
            Ok(Moved { pid, connections, pause }) => {
                self.notifier.succeeded_by(pid);
                Ok(json!({ "pid": pid, "connections": connections, "pause_micros": pause }))
            }
            Err(error) => Err(error.to_string()),
        };
        if let Some(reply) = reply {
            // Who asked may have gone.
            let _ = reply.send(told);
        }
        if moved {
            // The file of the operator's socket is the successor's by now, or soon.
            self.admin.take().into_iter().for_each(Admin::leave);
        }
        moved
    }

    /// Has a hand-over fail, if one is under way, and waits for its end; one that was just about to succeed may.
    pub(super) fn abort_upgrade(&mut self) -> Option<Result<Moved, HandoverError>> {
        let under_way = self.succession.under_way.as_ref()?;
        under_way.abort.store(true, Ordering::Relaxed);
        while !under_way.thread.is_finished() {
            std::thread::sleep(super::RETRY);
        }
        self.upgrade_ended()
    }

    /// Takes over from the running process; from then on this node serves.
    ///
    /// # Errors
    /// Why not. The other process goes on, and this one has to end.
    pub fn take_over(&mut self, inheritance: Inheritance) -> Result<Moved, NodeError> {
        let before = inheritance.predecessor.clone();
        let heir = Heir {
            mailboxes: self.mailboxes.clone(),
            backbone: self.succession.backbone.clone(),
            clock: monotonic_micros,
        };
        let (moved, tally) = inheritance.take(heir)?;
        *self.state.tally() = tally;
        let Moved { pid, connections, pause } = moved;
        let (last, version) = (before.pid, before.version);
        tracing::info!(pid, before = last, version, connections, pause_micros = pause, "took over");
        Ok(moved)
    }
}
