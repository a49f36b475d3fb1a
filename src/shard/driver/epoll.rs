//! The epoll driver, for kernels and sandboxes that refuse io_uring (Docker's default seccomp profile does). The only file
//! that speaks to epoll. A batch is carried out send by send as it is queued.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use super::{Clock, SEND_FLAGS, message_of, push_iovecs};
use crate::limits::{EPOLL_EVENTS, EPOLL_READ_BYTES};
use crate::log::channel_table::Slot;
use crate::log::frame::Micros;
use crate::shard::mailbox::Mailbox;
use crate::shard::sink::{Event, Order, Piece, Short, Sink, Staged, Ticket};

/// The bell's place among the slots.
const BELL: u64 = u64::MAX;

/// A socket and what the kernel is asked to tell of it.
struct Socket {
    fd: OwnedFd,
    /// Whether it takes bytes again.
    writable: bool,
    /// What epoll knows of now: 0 when it does not have the socket.
    watched: i32,
}

/// See the module.
pub struct Epoll {
    epoll: OwnedFd,
    clock: Clock,
    sockets: Vec<Option<Socket>>,
    buffer: Box<[u8]>,
    /// Lists of the staged payloads, one after the other, and where each ends.
    iovecs: Vec<libc::iovec>,
    staged: Vec<(usize, usize)>,
    shorts: Vec<Short>,
    gone: Vec<Slot>,
    /// Nothing is received: see [`super::Driver::pause`].
    paused: bool,
}

impl Epoll {
    /// Makes an epoll instance for `slots` sockets.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(slots: u32, mailbox: &Arc<Mailbox>, clock: Clock) -> io::Result<Self> {
        // SAFETY: takes no pointers.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and has no other owner.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        let this = Self {
            epoll,
            clock,
            sockets: (0..slots).map(|_| None).collect(),
            buffer: vec![0; EPOLL_READ_BYTES].into_boxed_slice(),
            iovecs: Vec::new(),
            staged: Vec::new(),
            shorts: Vec::new(),
            gone: Vec::new(),
            paused: false,
        };
        this.control(libc::EPOLL_CTL_ADD, mailbox.bell().as_raw_fd(), libc::EPOLLIN, BELL)?;
        Ok(this)
    }

    fn control(&self, operation: i32, fd: RawFd, events: i32, data: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: events as u32, u64: data };
        // SAFETY: the event outlives the call.
        match unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, fd, &raw mut event) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// See [`super::Driver::wake_fd`].
    pub fn wake_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// See [`super::Driver::adopt`].
    pub fn adopt(&mut self, slot: Slot, socket: OwnedFd) -> io::Result<()> {
        // Receives pass MSG_DONTWAIT as sends do, so the socket's own blocking mode does not matter.
        let mut socket = Socket { fd: socket, writable: false, watched: 0 };
        self.watch(slot, &mut socket)?;
        self.sockets[slot as usize] = Some(socket);
        Ok(())
    }

    /// Tells the kernel what is wanted of a socket, if that has changed.
    fn watch(&self, slot: Slot, socket: &mut Socket) -> io::Result<()> {
        let wanted = if self.paused { 0 } else { libc::EPOLLIN } | if socket.writable { libc::EPOLLOUT } else { 0 };
        let operation = match (socket.watched, wanted) {
            (before, after) if before == after => return Ok(()),
            (0, _) => libc::EPOLL_CTL_ADD,
            // Asked for nothing epoll would still tell of errors, again and again.
            (_, 0) => libc::EPOLL_CTL_DEL,
            (..) => libc::EPOLL_CTL_MOD,
        };
        self.control(operation, socket.fd.as_raw_fd(), wanted, u64::from(slot))?;
        socket.watched = wanted;
        Ok(())
    }

    fn watch_all(&mut self) {
        for slot in 0..self.sockets.len() as Slot {
            self.rewatch(slot, |_| {});
        }
    }

    /// See [`super::Driver::pause`].
    pub fn pause(&mut self) {
        self.paused = true;
        self.watch_all();
    }

    /// See [`super::Driver::resume`].
    pub fn resume(&mut self) {
        self.paused = false;
        self.watch_all();
    }

    /// See [`super::Driver::duplicate`].
    pub fn duplicate(&mut self, slots: &[Slot]) -> io::Result<Vec<OwnedFd>> {
        let duplicate = |&slot: &Slot| match &self.sockets[slot as usize] {
            Some(socket) => socket.fd.try_clone(),
            None => unreachable!("a slot without a socket"),
        };
        slots.iter().map(duplicate).collect()
    }

    /// Takes a socket out. Closing is not enough for epoll while another process has the socket too.
    fn take(&mut self, slot: Slot) -> Option<OwnedFd> {
        let Socket { fd, watched, .. } = self.sockets[slot as usize].take()?;
        if watched != 0
            && let Err(error) = self.control(libc::EPOLL_CTL_DEL, fd.as_raw_fd(), 0, 0)
        {
            panic!("epoll_ctl on a socket of our own: {error}");
        }
        Some(fd)
    }

    /// See [`super::Driver::order`].
    pub fn order(&mut self, order: Order) {
        match order {
            Order::AwaitWritable(slot) => self.rewatch(slot, |socket| socket.writable = true),
            Order::HalfClose(slot) => {
                if let Some(socket) = &self.sockets[slot as usize] {
                    // SAFETY: takes no pointers. An error says that the peer is gone, which receiving will tell too.
                    unsafe { libc::shutdown(socket.fd.as_raw_fd(), libc::SHUT_WR) };
                }
            }
            Order::Close { slot, abort } => {
                if let Some(socket) = self.take(slot) {
                    if abort {
                        let _ = socket2::SockRef::from(&socket).set_linger(Some(std::time::Duration::ZERO));
                    }
                    self.gone.push(slot);
                }
            }
            Order::Forget(slot) => {
                if self.take(slot).is_some() {
                    self.gone.push(slot);
                }
            }
        }
    }

    /// Changes what is wanted of a socket.
    fn rewatch(&mut self, slot: Slot, change: impl FnOnce(&mut Socket)) {
        let Some(mut socket) = self.sockets[slot as usize].take() else { return };
        change(&mut socket);
        if let Err(error) = self.watch(slot, &mut socket) {
            panic!("epoll_ctl on a socket of our own: {error}");
        }
        self.sockets[slot as usize] = Some(socket);
    }

    /// See [`super::Driver::pending`].
    pub fn pending(&self) -> bool {
        !self.gone.is_empty()
    }

    /// See [`super::Driver::reap`].
    pub fn reap(&mut self, on: &mut dyn FnMut(Event<'_>)) {
        for slot in self.gone.drain(..) {
            on(Event::Gone(slot));
        }
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EPOLL_EVENTS];
        // SAFETY: the kernel writes at most EPOLL_EVENTS events into the array. What does not fit is told next time: level
        // triggered, and the descriptor stays readable.
        let count = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), EPOLL_EVENTS as i32, 0) };
        for event in &events[..count.max(0) as usize] {
            let (flags, data) = (event.events as i32, event.u64);
            if data == BELL {
                continue;
            }
            let slot = data as Slot;
            if flags & libc::EPOLLOUT != 0 {
                self.rewatch(slot, |socket| socket.writable = false);
                on(Event::Writable(slot));
            }
            if !self.paused && flags & (libc::EPOLLIN | libc::EPOLLHUP | libc::EPOLLERR) != 0 {
                self.receive(slot, on);
            }
        }
    }

    fn receive(&mut self, slot: Slot, on: &mut dyn FnMut(Event<'_>)) {
        let Some(socket) = &self.sockets[slot as usize] else { return };
        // SAFETY: the kernel writes at most the buffer's length into it.
        let read = unsafe {
            let buffer = self.buffer.as_mut_ptr().cast();
            libc::recv(socket.fd.as_raw_fd(), buffer, self.buffer.len(), libc::MSG_DONTWAIT)
        };
        match read {
            1.. => on(Event::Received(slot, &mut self.buffer[..read as usize])),
            0 => on(Event::Ended(slot)),
            _ => match io::Error::last_os_error().kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                _ => on(Event::Ended(slot)),
            },
        }
    }

    fn send_now(&mut self, slot: Slot, (start, end): (usize, usize), ticket: Ticket) {
        let Some(socket) = &self.sockets[slot as usize] else { return };
        let iovecs = &self.iovecs[start..end];
        let due: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
        let message = message_of(iovecs.as_ptr(), iovecs.len());
        // SAFETY: the list and, by the contract of `Sink`, what it points to are live.
        let taken = match unsafe { libc::sendmsg(socket.fd.as_raw_fd(), &raw const message, SEND_FLAGS) } {
            taken @ 0.. => Ok(taken as usize),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                error => Err(error),
            },
        };
        if !matches!(taken, Ok(taken) if taken == due) {
            self.shorts.push(Short { slot, ticket, taken });
        }
    }
}

impl Sink for Epoll {
    unsafe fn stage(&mut self, pieces: &[Piece]) -> Staged {
        let start = self.iovecs.len();
        push_iovecs(pieces, &mut self.iovecs);
        self.staged.push((start, self.iovecs.len()));
        Staged(self.staged.len() as u32 - 1)
    }

    fn send(&mut self, slot: Slot, staged: Staged, ticket: Ticket) {
        self.send_now(slot, self.staged[staged.0 as usize], ticket);
    }

    unsafe fn send_own(&mut self, slot: Slot, pieces: &[Piece], ticket: Ticket) -> bool {
        let start = self.iovecs.len();
        push_iovecs(pieces, &mut self.iovecs);
        self.send_now(slot, (start, self.iovecs.len()), ticket);
        self.iovecs.truncate(start);
        true
    }

    fn settle(&mut self, shorts: &mut Vec<Short>) {
        shorts.append(&mut self.shorts);
        self.staged.clear();
        self.iovecs.clear();
    }

    fn now(&self) -> Micros {
        (self.clock)()
    }
}
