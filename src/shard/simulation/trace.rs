//! What happened in a run: a hash that two runs of one seed share, counts that show what was met, and on demand every line.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use super::random::mix;

/// How often each kind of event was met.
pub type Counts = BTreeMap<&'static str, u64>;

/// The events of one run.
#[derive(Debug)]
pub struct Trace {
    hash: Cell<u64>,
    counts: RefCell<Counts>,
    print: bool,
}

impl Trace {
    pub fn new(print: bool) -> Self {
        Self { hash: Cell::new(0), counts: RefCell::default(), print }
    }

    /// Notes an event and two numbers that tell it from others of its kind.
    pub fn event(&self, what: &'static str, a: impl Into<u64>, b: impl Into<u64>) {
        let (a, b) = (a.into(), b.into());
        let name = what.bytes().fold(what.len() as u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        self.hash.set(mix(self.hash.get() ^ mix(name ^ mix(a ^ mix(b)))));
        *self.counts.borrow_mut().entry(what).or_default() += 1;
        if self.print {
            eprintln!("{what} {a} {b}");
        }
    }

    /// Mixes bytes into the hash.
    pub fn bytes(&self, bytes: &[u8]) {
        self.hash.set(mix(bytes
            .iter()
            .fold(self.hash.get(), |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))));
    }

    /// Prints what a client was told.
    pub fn said(&self, what: &dyn std::fmt::Debug) {
        if self.print {
            eprintln!("    {what:?}");
        }
    }

    pub fn hash(&self) -> u64 {
        self.hash.get()
    }

    pub fn counts(&self) -> Counts {
        self.counts.borrow().clone()
    }
}
