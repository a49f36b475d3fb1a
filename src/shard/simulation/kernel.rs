//! The simulated kernel: sockets with bounded buffers between the shard and its clients.

use std::collections::VecDeque;
use std::io;
use std::rc::Rc;

use super::random::{Random, mix};
use super::trace::Trace;
use crate::limits::PIECES_PER_SEND;
use crate::log::channel_table::Slot;
use crate::log::frame::Micros;
use crate::shard::sink::{Event, Order, Piece, Short, Sink, Staged, Ticket};

/// Names a socket for as long as the world lives.
pub type SocketId = usize;

/// The other end of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Open,
    /// It has sent its last byte and still reads.
    Shut,
    /// It is gone without a word.
    Reset,
}

/// What a client finds when it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// So many bytes, perhaps none.
    Bytes(usize),
    /// The node's end of the stream.
    End,
    /// The node has reset the connection.
    Reset,
}

#[derive(Debug)]
struct Socket {
    /// Bytes the kernel holds towards the client.
    capacity: usize,
    outbound: VecDeque<u8>,
    inbound: VecDeque<u8>,
    peer: Peer,
    /// The shard was told that the peer has ended.
    told: bool,
    awaits_writable: bool,
    half_closed: bool,
    /// Turns until the slot is free, once the shard has asked for it.
    closing: Option<usize>,
    aborted: bool,
}

/// Bytes as they were when they were handed over. They must be the same when they are sent.
struct Kept {
    piece: Piece,
    sum: u64,
}

enum What {
    Staged(Staged),
    Own(Vec<Kept>),
}

/// See the module.
pub struct Kernel {
    now: Micros,
    /// No more faults: everything the shard asks for happens soon.
    pub calm: bool,
    random: Random,
    trace: Rc<Trace>,
    sockets: Vec<Socket>,
    slots: Vec<Option<SocketId>>,
    staged: Vec<Vec<Kept>>,
    batch: Vec<(Slot, What, Ticket)>,
    /// Sends of connections' own that one batch takes.
    room: usize,
    /// Batches of this turn with sends of connections' own.
    own_batches: usize,
}

impl Kernel {
    pub fn new(random: Random, trace: Rc<Trace>, room: usize) -> Self {
        Self {
            now: 0,
            calm: false,
            random,
            trace,
            sockets: Vec::new(),
            slots: Vec::new(),
            staged: Vec::new(),
            batch: Vec::new(),
            room,
            own_batches: 0,
        }
    }

    pub fn begin_turn(&mut self, now: Micros) {
        self.now = now;
        self.own_batches = 0;
    }

    /// A new socket whose shard's end is at `slot`.
    pub fn adopt(&mut self, slot: Slot, capacity: usize) -> SocketId {
        let slot = slot as usize;
        if self.slots.len() <= slot {
            self.slots.resize(slot + 1, None);
        }
        assert_eq!(self.slots[slot], None, "slot {slot} is still in use");
        let id = self.sockets.len();
        self.slots[slot] = Some(id);
        self.sockets.push(Socket {
            capacity,
            outbound: VecDeque::new(),
            inbound: VecDeque::new(),
            peer: Peer::Open,
            told: false,
            awaits_writable: false,
            half_closed: false,
            closing: None,
            aborted: false,
        });
        id
    }

    /// The sockets of a shard that leaves, by its slots.
    pub fn give_away(&mut self, slots: &[Slot]) -> Vec<SocketId> {
        let take = |&slot: &Slot| {
            let id = self.slots[slot as usize].take().expect("a socket to give away");
            self.sockets[id].awaits_writable = false;
            // Whoever goes on is told again.
            self.sockets[id].told = false;
            id
        };
        let sockets = slots.iter().map(take).collect();
        assert!(self.slots.iter().all(Option::is_none), "a socket stays behind");
        sockets
    }

    /// Another shard goes on with a socket.
    pub fn take_over(&mut self, slot: Slot, id: SocketId) {
        let slot = slot as usize;
        if self.slots.len() <= slot {
            self.slots.resize(slot + 1, None);
        }
        assert_eq!(self.slots[slot], None, "slot {slot} is still in use");
        self.slots[slot] = Some(id);
    }

    /// The client reads at most `most` bytes.
    pub fn read(&mut self, id: SocketId, most: usize, into: &mut Vec<u8>) -> Read {
        let socket = &mut self.sockets[id];
        if socket.aborted {
            return Read::Reset;
        }
        if socket.outbound.is_empty() && (socket.half_closed || socket.closing.is_some()) {
            return Read::End;
        }
        let taken = most.min(socket.outbound.len());
        into.extend(socket.outbound.drain(..taken));
        Read::Bytes(taken)
    }

    /// What the client never read.
    pub fn unread(&mut self, id: SocketId) -> Vec<u8> {
        self.sockets[id].outbound.drain(..).collect()
    }

    /// The client sends.
    pub fn write(&mut self, id: SocketId, bytes: &[u8]) {
        if self.sockets[id].peer == Peer::Open {
            self.sockets[id].inbound.extend(bytes);
        }
    }

    /// The client sends no more.
    pub fn shut(&mut self, id: SocketId) {
        if self.sockets[id].peer == Peer::Open {
            self.sockets[id].peer = Peer::Shut;
        }
    }

    /// The client vanishes. What it has sent may be lost.
    pub fn reset(&mut self, id: SocketId) {
        self.sockets[id].peer = Peer::Reset;
        if self.random.once_in(2) {
            self.sockets[id].inbound.clear();
        }
    }

    /// Whether nothing is on its way on any socket.
    pub fn quiet(&self) -> bool {
        self.slots.iter().flatten().all(|&id| {
            let socket = &self.sockets[id];
            let untold = socket.peer != Peer::Open && !socket.told;
            let still = socket.inbound.is_empty() && socket.outbound.is_empty() && !untold;
            still && !socket.awaits_writable && socket.closing.is_none()
        })
    }

    /// Whether the shard still sends on a socket.
    pub fn is_open(&self, id: SocketId) -> bool {
        self.slots.contains(&Some(id)) && !self.sockets[id].half_closed
    }

    /// Whether the shard will be told when the socket at `slot` takes bytes again.
    pub fn awaits_writable(&self, slot: Slot) -> bool {
        self.slots[slot as usize].is_some_and(|id| self.sockets[id].awaits_writable)
    }

    /// Carries out an order of the shard.
    pub fn order(&mut self, order: Order) {
        let (Order::AwaitWritable(slot) | Order::HalfClose(slot) | Order::Close { slot, .. } | Order::Forget(slot)) =
            order;
        let id = self.slots[slot as usize].expect("an order for a socket that is not there");
        let socket = &mut self.sockets[id];
        // An order given before the close in the same turn finds the socket still open.
        assert_eq!(socket.closing, None, "{order:?} after the socket's close");
        match order {
            Order::AwaitWritable(_) => {
                assert!(!socket.awaits_writable, "asked twice to await writability of slot {slot}");
                socket.awaits_writable = true;
            }
            Order::HalfClose(_) => socket.half_closed = true,
            Order::Close { abort, .. } => {
                socket.closing = Some(self.random.below(4));
                socket.aborted = abort;
                self.trace.event("closed", slot, abort);
            }
            Order::Forget(_) => unreachable!("a core that has left is not asked any more"),
        }
    }

    /// Tells the shard what has happened on its sockets.
    pub fn events(&mut self, mut on: impl FnMut(Event<'_>)) {
        for slot in 0..self.slots.len() {
            let Some(id) = self.slots[slot] else { continue };
            let Self { sockets, random, trace, calm, .. } = self;
            let (socket, slot, calm) = (&mut sockets[id], slot as Slot, *calm);
            match &mut socket.closing {
                Some(0) => {
                    self.slots[slot as usize] = None;
                    on(Event::Gone(slot));
                    continue;
                }
                Some(turns) => *turns -= 1,
                None => {}
            }
            // What was under way when the close was asked for may still be told.
            if socket.closing.is_some() && !random.once_in(4) {
                continue;
            }
            if !socket.inbound.is_empty() && (calm || random.once_in(2)) {
                let most = if random.once_in(3) { 1 + random.below(7) } else { 1 + random.below(4096) };
                let mut bytes: Vec<u8> = socket.inbound.drain(..most.min(socket.inbound.len())).collect();
                trace.event("received", slot, bytes.len() as u64);
                on(Event::Received(slot, &mut bytes));
            }
            let ended = socket.peer != Peer::Open && socket.inbound.is_empty() && !socket.told;
            if ended && (calm || random.once_in(4)) {
                socket.told = true;
                trace.event("ended", slot, 0u64);
                on(Event::Ended(slot));
            }
            let writable = socket.outbound.len() < socket.capacity || socket.peer == Peer::Reset;
            if socket.awaits_writable && writable && (calm || random.once_in(3)) {
                socket.awaits_writable = false;
                trace.event("writable", slot, 0u64);
                on(Event::Writable(slot));
            }
        }
    }

    /// How many of `due` bytes a socket takes.
    fn taken(&mut self, id: SocketId, due: usize) -> io::Result<usize> {
        let Self { sockets, random, calm, .. } = self;
        let socket = &sockets[id];
        // A client that reads all there is gets a larger window.
        let capacity = if *calm { 1 << 20 } else { socket.capacity };
        let room = capacity.saturating_sub(socket.outbound.len()).min(due);
        if socket.peer == Peer::Reset && random.once_in(2) {
            return Err(io::Error::from_raw_os_error(*random.pick(&[libc::EPIPE, libc::ECONNRESET])));
        }
        if *calm {
            return Ok(room);
        }
        Ok(match random.below(400) {
            0..20 => 0,
            20..60 => random.below(room + 1),
            60 => return Err(io::Error::from_raw_os_error(libc::ENOMEM)),
            _ => room,
        })
    }

    fn kept(pieces: &[Piece]) -> Vec<Kept> {
        assert!(!pieces.is_empty() && pieces.len() <= PIECES_PER_SEND, "{} pieces in one send", pieces.len());
        pieces.iter().map(|&piece| Kept { piece, sum: sum(bytes_of(&piece)) }).collect()
    }
}

/// The bytes of a piece, as they are now.
fn bytes_of(piece: &Piece) -> &[u8] {
    // SAFETY: whoever made the piece keeps its bytes where they are until the batch is settled.
    unsafe { std::slice::from_raw_parts(piece.start, piece.len) }
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(bytes.len() as u64, |sum, &byte| mix(sum).wrapping_add(byte.into()))
}

impl Sink for Kernel {
    unsafe fn stage(&mut self, pieces: &[Piece]) -> Staged {
        self.staged.push(Self::kept(pieces));
        Staged(self.staged.len() as u32 - 1)
    }

    fn send(&mut self, slot: Slot, staged: Staged, ticket: Ticket) {
        self.batch.push((slot, What::Staged(staged), ticket));
    }

    unsafe fn send_own(&mut self, slot: Slot, pieces: &[Piece], ticket: Ticket) -> bool {
        let own = self.batch.iter().filter(|(_, what, _)| matches!(what, What::Own(_))).count();
        if own == self.room {
            self.trace.event("no room", slot, 0u64);
            return false;
        }
        self.batch.push((slot, What::Own(Self::kept(pieces)), ticket));
        true
    }

    fn settle(&mut self, shorts: &mut Vec<Short>) {
        let batch = std::mem::take(&mut self.batch);
        let staged = std::mem::take(&mut self.staged);
        let mut slots: Vec<Slot> = batch.iter().map(|(slot, ..)| *slot).collect();
        slots.sort_unstable();
        self.own_batches += usize::from(batch.iter().any(|(_, what, _)| matches!(what, What::Own(_))));
        if self.own_batches > 1 && self.room == usize::MAX {
            self.trace.event("ids fill a batch", 0u64, 0u64);
        }
        assert!(slots.windows(2).all(|pair| pair[0] != pair[1]), "two sends of one connection in one batch");
        for pieces in &staged {
            check(pieces);
        }
        for (slot, what, ticket) in batch {
            let pieces = match &what {
                What::Staged(number) => &staged[number.0 as usize],
                What::Own(pieces) => {
                    check(pieces);
                    pieces
                }
            };
            let id = self.slots[slot as usize].expect("a send to a socket that is not there");
            assert!(!self.sockets[id].half_closed, "a send after the end of the stream");
            assert_eq!(self.sockets[id].closing, None, "a send after the socket's close");
            let due = pieces.iter().map(|kept| kept.piece.len).sum();
            assert!(due > 0, "a send of nothing");
            let taken = self.taken(id, due);
            let mut left = *taken.as_ref().unwrap_or(&0);
            for kept in pieces {
                let part = left.min(kept.piece.len);
                self.sockets[id].outbound.extend(&bytes_of(&kept.piece)[..part]);
                left -= part;
            }
            match &taken {
                Ok(taken) if *taken == due => continue,
                Ok(taken) => self.trace.event("short", slot, *taken as u64),
                Err(_) => self.trace.event("refused", slot, due as u64),
            }
            shorts.push(Short { slot, ticket, taken });
        }
    }

    fn now(&self) -> Micros {
        self.now
    }
}

fn check(pieces: &[Kept]) {
    assert!(pieces.iter().all(|kept| kept.sum == sum(bytes_of(&kept.piece))), "bytes changed before they were sent");
}
