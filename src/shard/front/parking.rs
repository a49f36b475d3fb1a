//! Where the front's connections are put when the shard leaves: nothing is accepted, and whoever waits for its client
//! stops in a place that another process can go on from.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use monoio::io::{CancelHandle, Canceller};
use tokio::sync::Notify;

use crate::shard::handover::Request;
use crate::shard::mailbox::Mailbox;

/// A connection that is not established, out of its task.
#[derive(Debug)]
pub struct Parked {
    /// The socket; no operation on it is under way.
    pub socket: OwnedFd,
    /// Where it is.
    pub request: Request,
}

/// The front's switch. Cheap to clone; stays on its thread.
#[derive(Clone)]
pub struct Parking(Rc<Shared>);

struct Shared {
    open: Cell<bool>,
    opened: Notify,
    /// Nobody is accepted any more, for good.
    shut: Cell<bool>,
    /// Every accept hangs on this one.
    door: RefCell<Canceller>,
    /// Every read and write that may be interrupted hangs on this one.
    canceller: RefCell<Canceller>,
    /// Tasks that have neither ended nor parked.
    busy: Cell<usize>,
    parked: RefCell<Vec<Parked>>,
    mailbox: Arc<Mailbox>,
}

impl fmt::Debug for Parking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parking").field("open", &self.0.open).field("busy", &self.0.busy).finish_non_exhaustive()
    }
}

impl Parking {
    /// The switch of the shard that owns `mailbox`, whose bell tells the engine of every change. While it is not `open`,
    /// nothing is accepted.
    #[must_use]
    pub fn new(mailbox: Arc<Mailbox>, open: bool) -> Self {
        Self(Rc::new(Shared {
            open: Cell::new(open),
            opened: Notify::new(),
            shut: Cell::new(false),
            door: RefCell::default(),
            canceller: RefCell::default(),
            busy: Cell::new(0),
            parked: RefCell::default(),
            mailbox,
        }))
    }

    /// Stops accepting, and interrupts everyone who waits for a client.
    pub fn close(&self) {
        self.0.open.set(false);
        for canceller in [&self.0.canceller, &self.0.door] {
            let interrupted = canceller.take().cancel();
            canceller.replace(interrupted);
        }
    }

    /// Lets the listeners go: nobody is accepted any more, and each client is told with its next answer that its connection
    /// ends.
    pub fn shut(&self) {
        if !self.0.shut.replace(true) {
            let interrupted = self.0.door.take().cancel();
            self.0.door.replace(interrupted);
        }
    }

    /// Whether the listeners were let go.
    #[must_use]
    pub fn is_shut(&self) -> bool {
        self.0.shut.get()
    }

    /// What an accept hangs on.
    pub(super) fn door(&self) -> CancelHandle {
        self.0.door.borrow().handle()
    }

    /// Accepts and serves.
    pub fn open(&self) {
        self.0.open.set(true);
        self.0.opened.notify_waiters();
    }

    /// Whether connections are accepted and served.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.0.open.get()
    }

    /// Tasks that have neither ended nor parked. Those that only wait for their client to close are not counted.
    #[must_use]
    pub fn busy(&self) -> usize {
        self.0.busy.get()
    }

    /// Takes out who has parked.
    #[must_use]
    pub fn take(&self) -> Vec<Parked> {
        self.0.parked.take()
    }

    /// Waits until connections are accepted.
    pub(in crate::shard) async fn opened(&self) {
        while !self.is_open() {
            self.0.opened.notified().await;
        }
    }

    /// What an operation that may be interrupted hangs on.
    pub(super) fn handle(&self) -> CancelHandle {
        self.0.canceller.borrow().handle()
    }

    pub(super) fn park(&self, parked: Parked) {
        self.0.parked.borrow_mut().push(parked);
    }

    /// Counts a task for as long as the value lives.
    pub(super) fn enter(&self) -> Busy {
        self.0.busy.set(self.0.busy.get() + 1);
        Busy(self.clone())
    }
}

/// A task that is counted.
pub(super) struct Busy(Parking);

impl Drop for Busy {
    fn drop(&mut self) {
        let Parking(shared) = &self.0;
        shared.busy.set(shared.busy.get() - 1);
        if !shared.open.get() {
            shared.mailbox.ring();
        }
    }
}
