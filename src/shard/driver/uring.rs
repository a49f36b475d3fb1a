//! The io_uring driver. The only file that speaks to a ring.
//!
//! Sockets live in the ring's file table and nowhere else. A send is executed inside the submitting system call or fails
//! at once (`MSG_DONTWAIT`), a short one is a failure that says how far it came (`MSG_WAITALL`), and success is silent
//! (`CQE_SKIP_SUCCESS`): a batch over healthy sockets has no completions at all. Needs kernel 6.1 or later
//! (`DEFER_TASKRUN`).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use io_uring::squeue::{Entry, Flags};
use io_uring::types::Fixed;
use io_uring::{IoUring, cqueue, opcode};

use super::{Clock, SEND_FLAGS, message_of, push_iovecs};
use crate::limits::{BATCH_MESSAGES, BATCH_PIECES, PIECES_PER_SEND, RING_COMPLETIONS, RING_SUBMISSIONS};
use crate::log::channel_table::Slot;
use crate::log::frame::Micros;
use crate::shard::buffers::{Buffers, GROUP};
use crate::shard::mailbox::Mailbox;
use crate::shard::sink::{Event, Order, Piece, Short, Sink, Staged, Ticket};

/// What a completion is of; the top byte of its user data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Send = 1,
    Receive = 2,
    Writable = 3,
    Close = 4,
    Shutdown = 5,
    /// A descriptor made of a socket in the table.
    Duplicate = 7,
    /// Socket options: nobody waits for them.
    Ignored = 6,
}

/// User data: kind, ticket (24 bits), slot (32 bits). Slots need no generation: one is used again only after everything
/// of it in the kernel has come home.
fn user_data(kind: Kind, ticket: Ticket, slot: Slot) -> u64 {
    (kind as u64) << 56 | u64::from(ticket & 0xff_ffff) << 32 | u64::from(slot)
}

#[derive(Debug, Clone, Copy)]
struct Completion {
    data: u64,
    result: i32,
    flags: u32,
}

impl Completion {
    fn kind(self) -> Kind {
        match self.data >> 56 {
            1 => Kind::Send,
            2 => Kind::Receive,
            3 => Kind::Writable,
            4 => Kind::Close,
            5 => Kind::Shutdown,
            7 => Kind::Duplicate,
            _ => Kind::Ignored,
        }
    }

    fn slot(self) -> Slot {
        self.data as u32
    }

    fn ticket(self) -> Ticket {
        (self.data >> 32) as u32 & 0xff_ffff
    }
}

/// What of a slot is in the kernel.
#[derive(Debug, Clone, Copy, Default)]
struct InKernel {
    receive: bool,
    writable: bool,
    /// Shutdowns under way. The kernel hands each to a worker thread, which looks the slot up only then: if the slot were
    /// used again before, the shutdown would hit the next connection's socket.
    shutdowns: u8,
    /// The socket is to be closed once all of them are home.
    closing: bool,
    /// There is a socket, and it is not being closed.
    open: bool,
}

impl InKernel {
    fn is_home(self) -> bool {
        !self.receive && !self.writable && self.shutdowns == 0
    }
}

/// A staged payload: one run of memory, or a message header that owns its list.
enum Payload {
    Run(libc::iovec),
    List { _iovecs: Box<[libc::iovec]>, message: Box<libc::msghdr> },
}

/// `SO_LINGER` with no time: closing resets the connection.
static NO_LINGER: libc::linger = libc::linger { l_onoff: 1, l_linger: 0 };

/// See the module.
pub struct Uring {
    // Dropped in this order: the buffers outlive the ring.
    ring: IoUring,
    buffers: Buffers,
    mailbox: Arc<Mailbox>,
    clock: Clock,
    slots: Vec<InKernel>,
    staged: Vec<Payload>,
    /// Lists of connections' own sends. Reserved once: sends point into them until the batch is settled.
    iovecs: Vec<libc::iovec>,
    messages: Vec<libc::msghdr>,
    shorts: Vec<Short>,
    /// Completions that came while a batch was settled and are told by the next reap.
    waiting: Vec<Completion>,
    /// Nothing is received: see [`super::Driver::pause`].
    paused: bool,
    /// Slots with a receive in the kernel.
    receiving: usize,
    duplicates: Vec<(Slot, i32)>,
}

impl Uring {
    /// Sets up a ring with a file table of `slots`.
    ///
    /// # Errors
    /// When the kernel or the sandbox refuses.
    pub fn new(slots: u32, mailbox: &Arc<Mailbox>, clock: Clock) -> io::Result<Self> {
        let ring: IoUring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_cqsize(RING_COMPLETIONS)
            .dontfork()
            .build(RING_SUBMISSIONS)?;
        ring.submitter().register_files_sparse(slots)?;
        // With DEFER_TASKRUN the ring's own descriptor does not wake a poller: the eventfd does (kernel 6.18).
        ring.submitter().register_eventfd(mailbox.bell().as_raw_fd())?;
        let buffers = Buffers::register(&ring.submitter())?;
        Ok(Self {
            ring,
            buffers,
            mailbox: mailbox.clone(),
            clock,
            slots: vec![InKernel::default(); slots as usize],
            staged: Vec::new(),
            iovecs: Vec::with_capacity(BATCH_PIECES),
            messages: Vec::with_capacity(BATCH_MESSAGES),
            shorts: Vec::new(),
            waiting: Vec::new(),
            paused: false,
            receiving: 0,
            duplicates: Vec::new(),
        })
    }

    /// See [`super::Driver::wake_fd`].
    pub fn wake_fd(&self) -> RawFd {
        self.mailbox.bell().as_raw_fd()
    }

    /// See [`super::Driver::adopt`].
    pub fn adopt(&mut self, slot: Slot, socket: OwnedFd) -> io::Result<()> {
        // A ring refuses to wait for a socket in non-blocking mode, which one that comes from an epoll node is in.
        socket2::SockRef::from(&socket).set_nonblocking(false)?;
        self.ring.submitter().register_files_update(slot, &[socket.as_raw_fd()])?;
        // From here on the socket lives in the table alone and counts against no descriptor limit.
        drop(socket);
        self.slots[slot as usize] = InKernel { open: true, ..InKernel::default() };
        if !self.paused {
            self.receive(slot);
        }
        Ok(())
    }

    fn receive(&mut self, slot: Slot) {
        self.slots[slot as usize].receive = true;
        self.receiving += 1;
        let receive = opcode::RecvMulti::new(Fixed(slot), GROUP).build();
        self.push(receive.user_data(user_data(Kind::Receive, 0, slot)));
    }

    /// See [`super::Driver::order`].
    pub fn order(&mut self, order: Order) {
        match order {
            Order::AwaitWritable(slot) => {
                self.slots[slot as usize].writable = true;
                let poll = opcode::PollAdd::new(Fixed(slot), libc::POLLOUT as u32).build();
                self.push(poll.user_data(user_data(Kind::Writable, 0, slot)));
            }
            Order::HalfClose(slot) => self.shut(slot, libc::SHUT_WR),
            Order::Close { slot, abort } => {
                if abort {
                    let value = (&raw const NO_LINGER).cast();
                    let (level, name) = (libc::SOL_SOCKET as u32, libc::SO_LINGER as u32);
                    let length = size_of::<libc::linger>() as u32;
                    let option = opcode::SetSockOpt::new(Fixed(slot), level, name, value, length).build();
                    self.push(option.flags(Flags::SKIP_SUCCESS).user_data(user_data(Kind::Ignored, 0, slot)));
                }
                self.slots[slot as usize].closing = true;
                self.slots[slot as usize].open = false;
                // Terminate, join, close: the shutdown makes the receive and the poll come home.
                let InKernel { receive, writable, .. } = self.slots[slot as usize];
                if receive || writable {
                    self.shut(slot, libc::SHUT_RDWR);
                } else {
                    self.close_when_home(slot);
                }
            }
            Order::Forget(slot) => {
                self.slots[slot as usize].closing = true;
                self.slots[slot as usize].open = false;
                // Not shut down: that would end the stream for the other process too.
                let InKernel { receive, writable, .. } = self.slots[slot as usize];
                if receive {
                    self.cancel(Kind::Receive, slot);
                }
                if writable {
                    self.cancel(Kind::Writable, slot);
                }
                self.close_when_home(slot);
            }
        }
    }

    fn cancel(&mut self, kind: Kind, slot: Slot) {
        let cancel = opcode::AsyncCancel::new(user_data(kind, 0, slot)).build();
        self.push(cancel.flags(Flags::SKIP_SUCCESS).user_data(user_data(Kind::Ignored, 0, slot)));
    }

    /// See [`super::Driver::pause`].
    pub fn pause(&mut self) {
        self.paused = true;
        for slot in 0..self.slots.len() as Slot {
            if self.slots[slot as usize].receive && !self.slots[slot as usize].closing {
                self.cancel(Kind::Receive, slot);
            }
        }
    }

    /// See [`super::Driver::resume`].
    pub fn resume(&mut self) {
        self.paused = false;
        for slot in 0..self.slots.len() as Slot {
            // A receive that is still being cancelled begins anew when it comes home.
            if self.slots[slot as usize].open && !self.slots[slot as usize].receive {
                self.receive(slot);
            }
        }
    }

    /// See [`super::Driver::receiving`].
    pub fn receiving(&self) -> usize {
        self.receiving
    }

    /// See [`super::Driver::duplicate`].
    pub fn duplicate(&mut self, slots: &[Slot]) -> io::Result<Vec<OwnedFd>> {
        for &slot in slots {
            let install = opcode::FixedFdInstall::new(Fixed(slot), 0).build();
            self.push(install.user_data(user_data(Kind::Duplicate, 0, slot)));
        }
        while self.duplicates.len() < slots.len() {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN | libc::EINTR)) => {}
                Err(error) => panic!("io_uring_enter on a ring of our own: {error}"),
            }
            self.collect();
        }
        let mut made: Vec<(Slot, io::Result<OwnedFd>)> = self
            .duplicates
            .drain(..)
            .map(|(slot, result)| match result {
                // SAFETY: the kernel has just made the descriptor for this process; nobody else knows it.
                fd @ 0.. => (slot, Ok(unsafe { OwnedFd::from_raw_fd(fd) })),
                error => (slot, Err(io::Error::from_raw_os_error(-error))),
            })
            .collect();
        // Told in any order, and wanted in that of the slots.
        let take = |&slot: &Slot| {
            let at = made.iter().position(|(of, _)| *of == slot).expect("one for each slot");
            made.swap_remove(at).1
        };
        slots.iter().map(take).collect()
    }

    fn shut(&mut self, slot: Slot, how: i32) {
        self.slots[slot as usize].shutdowns += 1;
        let shut = opcode::Shutdown::new(Fixed(slot), how).build();
        self.push(shut.user_data(user_data(Kind::Shutdown, 0, slot)));
    }

    fn close(&mut self, slot: Slot) {
        let close = opcode::Close::new(Fixed(slot)).build();
        self.push(close.user_data(user_data(Kind::Close, 0, slot)));
    }

    /// Queues an entry, handing the full queue to the kernel first if need be.
    fn push(&mut self, entry: Entry) {
        // SAFETY: what entries point to stays: sends by the contract of `Sink`, the socket option is static, and the rest
        // point to nothing.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.submit();
        }
    }

    /// See [`super::Driver::submit`]. Runs what the kernel has deferred too; no system call when there is neither.
    pub fn submit(&mut self) {
        loop {
            let submission = self.ring.submission();
            let idle = submission.is_empty() && !submission.taskrun() && !submission.cq_overflow();
            drop(submission);
            if idle {
                self.collect();
                return;
            }
            match self.ring.submit() {
                Ok(_) => {}
                // The completion queue has no room: it is emptied below and the rest submitted after.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN | libc::EINTR)) => {}
                Err(error) => panic!("io_uring_enter on a ring of our own: {error}"),
            }
            self.collect();
        }
    }

    /// Sorts what has completed into short sends and the rest.
    fn collect(&mut self) {
        let Self { ring, shorts, waiting, duplicates, .. } = self;
        for entry in ring.completion() {
            let entry = Completion { data: entry.user_data(), result: entry.result(), flags: entry.flags() };
            match entry.kind() {
                Kind::Send => shorts.push(Short {
                    slot: entry.slot(),
                    ticket: entry.ticket(),
                    taken: match entry.result {
                        taken @ 0.. => Ok(taken as usize),
                        error if error == -libc::EAGAIN => Ok(0),
                        error => Err(io::Error::from_raw_os_error(-error)),
                    },
                }),
                Kind::Ignored => {}
                Kind::Duplicate => duplicates.push((entry.slot(), entry.result)),
                Kind::Receive | Kind::Writable | Kind::Shutdown | Kind::Close => waiting.push(entry),
            }
        }
    }

    /// See [`super::Driver::pending`].
    pub fn pending(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// See [`super::Driver::reap`].
    pub fn reap(&mut self, on: &mut dyn FnMut(Event<'_>)) {
        self.submit();
        let mut waiting = std::mem::take(&mut self.waiting);
        for completion in waiting.drain(..) {
            let slot = completion.slot();
            match completion.kind() {
                Kind::Receive => self.received(slot, completion, on),
                Kind::Writable => {
                    self.slots[slot as usize].writable = false;
                    if self.slots[slot as usize].closing {
                        self.close_when_home(slot);
                    } else {
                        on(Event::Writable(slot));
                    }
                }
                Kind::Shutdown => {
                    self.slots[slot as usize].shutdowns -= 1;
                    if self.slots[slot as usize].closing {
                        self.close_when_home(slot);
                    }
                }
                Kind::Close => {
                    self.slots[slot as usize] = InKernel::default();
                    on(Event::Gone(slot));
                }
                Kind::Send | Kind::Duplicate | Kind::Ignored => {}
            }
        }
        // Re-armed receives may have put new completions there meanwhile; the memory is kept either way.
        waiting.append(&mut self.waiting);
        self.waiting = waiting;
    }

    fn received(&mut self, slot: Slot, completion: Completion, on: &mut dyn FnMut(Event<'_>)) {
        let Completion { result, flags, .. } = completion;
        let closing = self.slots[slot as usize].closing;
        if let Some(id) = cqueue::buffer_select(flags) {
            if result > 0 && !closing {
                on(Event::Received(slot, self.buffers.bytes(id, result as usize)));
            }
            self.buffers.give_back(id);
        }
        if cqueue::more(flags) {
            return;
        }
        self.slots[slot as usize].receive = false;
        self.receiving -= 1;
        if closing {
            self.close_when_home(slot);
        } else if result > 0 || matches!(-result, libc::ENOBUFS | libc::ECANCELED) {
            // The multishot receive stopped for want of a buffer or of room, or was stopped: it goes on, or will.
            if !self.paused {
                self.receive(slot);
            }
        } else {
            on(Event::Ended(slot));
        }
    }

    fn close_when_home(&mut self, slot: Slot) {
        if self.slots[slot as usize].is_home() {
            self.close(slot);
        }
    }

    fn send_entry(&mut self, entry: Entry, slot: Slot, ticket: Ticket) {
        self.push(entry.flags(Flags::SKIP_SUCCESS).user_data(user_data(Kind::Send, ticket, slot)));
    }
}

const FLAGS: i32 = SEND_FLAGS | libc::MSG_WAITALL;

fn send_run(slot: Slot, run: libc::iovec) -> Entry {
    opcode::Send::new(Fixed(slot), run.iov_base.cast(), run.iov_len as u32).flags(FLAGS).build()
}

fn send_message(slot: Slot, message: &libc::msghdr) -> Entry {
    opcode::SendMsg::new(Fixed(slot), message).flags(FLAGS as u32).build()
}

impl Sink for Uring {
    unsafe fn stage(&mut self, pieces: &[Piece]) -> Staged {
        let mut iovecs = Vec::new();
        push_iovecs(pieces, &mut iovecs);
        self.staged.push(match iovecs[..] {
            [run] => Payload::Run(run),
            _ => {
                let iovecs = iovecs.into_boxed_slice();
                let message = Box::new(message_of(iovecs.as_ptr(), iovecs.len()));
                Payload::List { _iovecs: iovecs, message }
            }
        });
        Staged(self.staged.len() as u32 - 1)
    }

    fn send(&mut self, slot: Slot, staged: Staged, ticket: Ticket) {
        let entry = match &self.staged[staged.0 as usize] {
            Payload::Run(run) => send_run(slot, *run),
            Payload::List { message, .. } => send_message(slot, message),
        };
        self.send_entry(entry, slot, ticket);
    }

    unsafe fn send_own(&mut self, slot: Slot, pieces: &[Piece], ticket: Ticket) -> bool {
        debug_assert!(pieces.len() <= PIECES_PER_SEND);
        let start = self.iovecs.len();
        if BATCH_PIECES - start < pieces.len() || self.messages.len() == BATCH_MESSAGES {
            return false;
        }
        push_iovecs(pieces, &mut self.iovecs);
        let entry = match self.iovecs[start..] {
            [run] => send_run(slot, run),
            ref list => {
                self.messages.push(message_of(list.as_ptr(), list.len()));
                send_message(slot, &self.messages[self.messages.len() - 1])
            }
        };
        self.send_entry(entry, slot, ticket);
        true
    }

    fn settle(&mut self, shorts: &mut Vec<Short>) {
        self.submit();
        shorts.append(&mut self.shorts);
        self.staged.clear();
        self.iovecs.clear();
        self.messages.clear();
    }

    fn now(&self) -> Micros {
        (self.clock)()
    }
}
