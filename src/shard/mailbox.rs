//! What crosses threads: the relay's words to a shard, a shard's requests to the relay, and the bounded queues between.
//!
//! Both directions are bounded and neither side ever waits for the other. When a shard's mailbox is full the relay drops the
//! publication *for that shard*, counts it, remembers the channel, and sends [`ToShard::Missed`] as soon as there is
//! room, with the frames the shard lacks: nothing is lost silently, and no other shard notices.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use crossbeam::queue::ArrayQueue;

use super::handover::{Arriving, Expected, Leaving};
use crate::limits::MAILBOX_MESSAGES;
use crate::log::frame::Frame;
use crate::log::position::{Offset, Position};
use crate::settings::Settings;

/// A shard's own small number for a channel it asked for. The relay hands it back, so no shard hashes a name for a
/// publication. It is used again only after [`ToShard::Released`].
pub type LocalChannel = u32;

/// Names a waiting request of one shard; handed back with the reply.
pub type RequestId = u64;

/// From the relay to one shard. Messages about one channel arrive in the order they were sent.
#[derive(Debug)]
pub enum ToShard {
    /// A channel asked for is live: `frames` is what the node holds of its history, oldest first, and `position` its head.
    /// Publications follow.
    Live { channel: LocalChannel, position: Position, frames: Vec<Arc<Frame>> },
    /// The next publication of a live channel.
    Publication { channel: LocalChannel, frame: Arc<Frame> },
    /// This shard's mailbox was full for a while: the frames it missed on the channel, oldest first. When the first of
    /// them does not follow what the shard has, the rest is gone and the relay put a gap frame first.
    Missed { channel: LocalChannel, frames: Vec<Arc<Frame>> },
    /// The node follows as many channels as it can ([`crate::limits::RELAY_CHANNELS`]): this one will not be live. Its number
    /// is given back as always, by [`ToRelay::Disinterest`] and [`ToShard::Released`].
    Refused { channel: LocalChannel },
    /// The backbone has no interest of this shard in the channel any more: the number may be used again.
    Released { channel: LocalChannel },
    /// The answer to a request.
    Reply { request: RequestId, reply: Reply },
    /// Give every connection away to another process.
    Leave(Leaving),
    /// Hold channels for connections that will come from another process.
    Expect(Expected),
    /// Take connections in from another process.
    Arrive(Arriving),
    /// These settings are in force from now on.
    Reload(Arc<Settings>),
    /// Take nobody in any more, and part with everyone with "shutdown" at an even pace over `window`. Told again, the rest
    /// goes at the new pace.
    Drain { window: Duration },
    /// Part with whoever is left at once, then end the thread.
    Stop,
}

/// From a shard to the relay.
#[derive(Debug)]
pub enum ToRelay {
    /// This shard has subscribers of a channel: answer [`ToShard::Live`] when it is live, or [`ToShard::Refused`].
    Interest { shard: usize, channel: LocalChannel, name: Arc<str> },
    /// It has none any more: answer [`ToShard::Released`].
    Disinterest { shard: usize, channel: LocalChannel, name: Arc<str> },
    /// Publish: answered with [`Reply::Published`].
    Publish { shard: usize, request: RequestId, publish: Publish },
    /// Read from a channel's history: answered with [`Reply::History`].
    History { shard: usize, request: RequestId, query: HistoryQuery },
}

/// One publication on its way to the backbone.
#[derive(Debug, Clone)]
pub struct Publish {
    /// A checked channel name.
    pub channel: Arc<str>,
    /// The payload, UTF-8 (checked at the edge).
    pub data: Bytes,
    /// A retry with the same key within the window gets the first publication's position and publishes nothing.
    pub idempotency_key: Option<Box<str>>,
}

/// Which part of a channel's history to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryQuery {
    /// A checked channel name.
    pub channel: Arc<str>,
    /// What came after this position,
    pub since: Position,
    /// up to this offset of the same epoch.
    pub upto: Offset,
}

/// A backbone's answer to one request.
#[derive(Debug)]
pub enum Reply {
    /// The publication's position, once the backbone has it.
    Published(Result<Position, RequestError>),
    /// What the history has of the publications asked for, oldest first: those that lead up to the last one without a hole.
    /// None when that one is gone, or the history is in another epoch.
    History(Result<Vec<Arc<Frame>>, RequestError>),
}

/// Why a request to the backbone failed. Nothing was done half.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The backbone cannot be reached or refused; try again later.
    #[error("the backbone is unavailable: {0}")]
    Unavailable(String),
    /// The queue towards the backbone is full ([`crate::limits::RELAY_REQUESTS`]); try again later.
    #[error("too many requests wait for the backbone")]
    Overloaded,
}

/// An eventfd that several sources signal and one thread waits on.
#[derive(Debug)]
pub struct Bell {
    fd: OwnedFd,
    rung: AtomicBool,
}

impl Bell {
    /// Makes a bell.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> std::io::Result<Self> {
        use std::os::fd::FromRawFd;
        // SAFETY: eventfd takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and has no other owner.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, rung: AtomicBool::new(false) })
    }

    /// Wakes the waiting thread; between two [`Bell::quiet`] calls only the first ring costs a system call.
    pub fn ring(&self) {
        if !self.rung.swap(true, Ordering::SeqCst) {
            let one = 1u64;
            // SAFETY: writes eight bytes from a live u64. It can only fail when the counter is full, and then the thread wakes anyway.
            unsafe { libc::write(self.fd.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }

    /// Takes the signal back; the caller looks for work after this. The counter is read before the flag falls: the other
    /// way round a ring between the two would be swallowed and leave the flag up, and no later ring would wake anyone.
    /// The swap makes what a ringer posted before its ring visible to the caller.
    pub fn quiet(&self) {
        let mut count = 0u64;
        // SAFETY: reads eight bytes into a live u64; EAGAIN when nobody rang is fine.
        unsafe { libc::read(self.fd.as_raw_fd(), (&raw mut count).cast(), 8) };
        self.rung.swap(false, Ordering::SeqCst);
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A shard's mailbox: bounded, many writers, one reader, and the reader's bell.
#[derive(Debug)]
pub struct Mailbox {
    queue: ArrayQueue<ToShard>,
    bell: Bell,
}

impl Mailbox {
    /// Makes an empty mailbox of [`MAILBOX_MESSAGES`].
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> std::io::Result<Self> {
        Self::of(MAILBOX_MESSAGES)
    }

    /// Makes an empty mailbox of another size.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn of(messages: usize) -> std::io::Result<Self> {
        Ok(Self { queue: ArrayQueue::new(messages), bell: Bell::new()? })
    }

    /// Posts without waiting and without waking the shard: call [`Mailbox::ring`] after a batch.
    ///
    /// # Errors
    /// Gives the message back when the mailbox is full.
    pub fn post(&self, message: ToShard) -> Result<(), ToShard> {
        self.queue.push(message)
    }

    /// Wakes the shard.
    pub fn ring(&self) {
        self.bell.ring();
    }

    /// Takes the oldest message. Only the shard calls this.
    pub fn take(&self) -> Option<ToShard> {
        self.queue.pop()
    }

    /// Messages waiting.
    pub fn depth(&self) -> usize {
        self.queue.len()
    }

    /// Whether there is no room for another message.
    pub fn is_full(&self) -> bool {
        self.queue.is_full()
    }

    /// The shard's bell; its engine registers the descriptor with its ring as well.
    pub fn bell(&self) -> &Bell {
        &self.bell
    }
}
