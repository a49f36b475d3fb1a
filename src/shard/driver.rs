//! How an engine talks to the kernel: io_uring, or epoll where io_uring is not to be had. Both mean the same by every call.

pub mod epoll;
pub mod uring;

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;

use super::mailbox::Mailbox;
use super::sink::{Event, Order, Piece};
use super::start::DriverKind;
use crate::log::channel_table::Slot;
use crate::log::frame::Micros;
use epoll::Epoll;
use uring::Uring;

/// Reads the node's monotonic clock.
pub type Clock = fn() -> Micros;

/// A shard's driver.
#[expect(clippy::large_enum_variant, reason = "one a shard")]
pub enum Driver {
    /// io_uring.
    Uring(Uring),
    /// epoll.
    Epoll(Epoll),
}

impl Driver {
    /// Makes a driver for up to `slots` sockets, woken by the mailbox's bell.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new(kind: DriverKind, slots: u32, mailbox: &Arc<Mailbox>, clock: Clock) -> io::Result<Self> {
        Ok(match kind {
            DriverKind::Uring => Self::Uring(Uring::new(slots, mailbox, clock)?),
            DriverKind::Epoll => Self::Epoll(Epoll::new(slots, mailbox, clock)?),
        })
    }

    /// The descriptor that becomes readable when there is something to do.
    pub fn wake_fd(&self) -> RawFd {
        match self {
            Self::Uring(uring) => uring.wake_fd(),
            Self::Epoll(epoll) => epoll.wake_fd(),
        }
    }

    /// Takes over a socket at a free slot and begins to receive on it, unless the driver is paused.
    ///
    /// # Errors
    /// When the kernel refuses; the socket is closed then.
    pub fn adopt(&mut self, slot: Slot, socket: OwnedFd) -> io::Result<()> {
        match self {
            Self::Uring(uring) => uring.adopt(slot, socket),
            Self::Epoll(epoll) => epoll.adopt(slot, socket),
        }
    }

    /// Stops receiving, on sockets that are taken over later too. What is on its way is told as always until
    /// [`Driver::receiving`] is 0; what comes after that stays in the kernel.
    pub fn pause(&mut self) {
        match self {
            Self::Uring(uring) => uring.pause(),
            Self::Epoll(epoll) => epoll.pause(),
        }
    }

    /// Receives again.
    pub fn resume(&mut self) {
        match self {
            Self::Uring(uring) => uring.resume(),
            Self::Epoll(epoll) => epoll.resume(),
        }
    }

    /// Sockets with a receive that is not home yet.
    pub fn receiving(&self) -> usize {
        match self {
            Self::Uring(uring) => uring.receiving(),
            Self::Epoll(_) => 0,
        }
    }

    /// Makes a further descriptor of the socket at each of these slots, in their order.
    ///
    /// # Errors
    /// When the process is out of descriptors. Those that were made are closed.
    pub fn duplicate(&mut self, slots: &[Slot]) -> io::Result<Vec<OwnedFd>> {
        match self {
            Self::Uring(uring) => uring.duplicate(slots),
            Self::Epoll(epoll) => epoll.duplicate(slots),
        }
    }

    /// Carries out an order.
    pub fn order(&mut self, order: Order) {
        match self {
            Self::Uring(uring) => uring.order(order),
            Self::Epoll(epoll) => epoll.order(order),
        }
    }

    /// Tells what has happened since the last call.
    pub fn reap(&mut self, on: &mut dyn FnMut(Event<'_>)) {
        match self {
            Self::Uring(uring) => uring.reap(on),
            Self::Epoll(epoll) => epoll.reap(on),
        }
    }

    /// Hands what was ordered to the kernel.
    pub fn submit(&mut self) {
        match self {
            Self::Uring(uring) => uring.submit(),
            Self::Epoll(_) => {}
        }
    }

    /// Whether [`Driver::reap`] has something to tell although nothing will wake the shard for it.
    pub fn pending(&self) -> bool {
        match self {
            Self::Uring(uring) => uring.pending(),
            Self::Epoll(epoll) => epoll.pending(),
        }
    }
}

/// The flags of every send: never block, tell a short send, raise no signal.
const SEND_FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

/// Appends pieces as the kernel takes them, those that lie side by side in memory as one: consecutive frames of a channel
/// usually do.
fn push_iovecs(pieces: &[Piece], out: &mut Vec<libc::iovec>) {
    let start = out.len();
    for piece in pieces {
        if let Some(last) = out[start..].last_mut()
            && last.iov_base.cast_const().wrapping_byte_add(last.iov_len) == piece.start.cast()
        {
            last.iov_len += piece.len;
            continue;
        }
        out.push(libc::iovec { iov_base: piece.start.cast_mut().cast(), iov_len: piece.len });
    }
}

fn message_of(iovecs: *const libc::iovec, len: usize) -> libc::msghdr {
    // SAFETY: all-zero is a valid msghdr: no name, no control data, no flags.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.cast_mut();
    message.msg_iovlen = len;
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_one_piece() {
        let memory = *b"abcdefghij";
        let piece = |range: std::ops::Range<usize>| Piece::from(&memory[range]);
        let mut out = Vec::new();
        push_iovecs(&[piece(0..2), piece(2..5), piece(6..8), piece(8..10)], &mut out);
        let lens: Vec<usize> = out.iter().map(|iovec| iovec.iov_len).collect();
        assert_eq!(lens, [5, 4]);
        push_iovecs(&[piece(0..1)], &mut out);
        assert_eq!(out.len(), 3, "another send's pieces are another's");
    }
}
