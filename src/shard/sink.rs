//! What fan-out asks of a driver. The drivers are one side of it, the simulation and the tests another.

use std::io;

use crate::log::channel_table::Slot;
use crate::log::frame::Micros;

/// A run of bytes to send. It borrows nothing, so whoever makes one keeps the bytes where they are until the batch is
/// settled.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// First byte.
    pub start: *const u8,
    /// How many.
    pub len: usize,
}

impl From<&[u8]> for Piece {
    fn from(bytes: &[u8]) -> Self {
        Self { start: bytes.as_ptr(), len: bytes.len() }
    }
}

/// Pieces prepared once to be sent to many.
#[derive(Debug, Clone, Copy)]
pub struct Staged(pub u32);

/// The caller's number of a send within a batch.
pub type Ticket = u32;

/// A send that did not take all it was given.
#[derive(Debug)]
pub struct Short {
    /// To whom.
    pub slot: Slot,
    /// Which send.
    pub ticket: Ticket,
    /// The bytes taken (0 for a full socket), or why the socket is dead.
    pub taken: io::Result<usize>,
}

/// Sends in batches. A batch holds at most one send a slot; what it could not send whole is known when it is settled.
pub trait Sink {
    /// Prepares pieces, at most [`crate::limits::PIECES_PER_SEND`], for any number of sends of this batch.
    ///
    /// # Safety
    /// The bytes stay where they are, unchanged, until [`Sink::settle`] returns.
    unsafe fn stage(&mut self, pieces: &[Piece]) -> Staged;

    /// Queues a send of what was staged in this batch.
    fn send(&mut self, slot: Slot, staged: Staged, ticket: Ticket);

    /// Queues a send of pieces of one connection's own, at most [`crate::limits::PIECES_PER_SEND`]. False when the batch
    /// has no room: settle it first.
    ///
    /// # Safety
    /// As for [`Sink::stage`].
    unsafe fn send_own(&mut self, slot: Slot, pieces: &[Piece], ticket: Ticket) -> bool;

    /// Carries the batch out and appends what was not sent whole. No byte of it is referred to afterwards, and everything
    /// staged is forgotten.
    fn settle(&mut self, shorts: &mut Vec<Short>);

    /// The node's monotonic clock.
    fn now(&self) -> Micros;
}

/// What the shard asks of the driver besides sending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Say when the socket takes bytes again.
    AwaitWritable(Slot),
    /// Shut our half: the peer reads to the end of the stream.
    HalfClose(Slot),
    /// Bring home what is in the kernel, close the socket, and say when the slot is free.
    Close {
        /// Which.
        slot: Slot,
        /// Reset the connection, so that the kernel does not go on holding bytes for a peer that does not read.
        abort: bool,
    },
    /// Bring home what is in the kernel and let the socket go without a word to the peer: another process has it too. Say
    /// when the slot is free.
    Forget(Slot),
}

/// What the driver tells the shard.
#[derive(Debug)]
pub enum Event<'a> {
    /// Bytes from the peer. They may be changed in place (unmasking).
    Received(Slot, &'a mut [u8]),
    /// The peer shut its half, or the connection broke.
    Ended(Slot),
    /// The socket takes bytes again.
    Writable(Slot),
    /// The slot is free.
    Gone(Slot),
}
