//! The receive buffers of a ring: provided to the kernel, borrowed for one completion, given back.
//!
//! An idle connection owns no buffer. The kernel picks one when bytes arrive (provided-buffer rings, kernel 5.19).

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::Submitter;
use io_uring::types::BufRingEntry;

use crate::limits::{RECEIVE_BUFFER_BYTES, RECEIVE_BUFFERS};

/// The only buffer group of a ring.
pub const GROUP: u16 = 0;

const PAGE: usize = 4096;

/// The ring of buffer descriptors and the buffers.
pub struct Buffers {
    entries: NonNull<BufRingEntry>,
    memory: NonNull<u8>,
    tail: u16,
}

fn entries_layout() -> Layout {
    Layout::from_size_align(RECEIVE_BUFFERS as usize * size_of::<BufRingEntry>(), PAGE).expect("a constant layout")
}

fn memory_layout() -> Layout {
    Layout::from_size_align(RECEIVE_BUFFERS as usize * RECEIVE_BUFFER_BYTES, PAGE).expect("a constant layout")
}

fn allocate(layout: Layout) -> NonNull<u8> {
    // SAFETY: the layouts of this file have a size above zero.
    NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout))
}

impl Buffers {
    /// Allocates the buffers and provides all of them to the ring. They must outlive it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn register(submitter: &Submitter<'_>) -> io::Result<Self> {
        let entries = allocate(entries_layout()).cast();
        let mut buffers = Self { entries, memory: allocate(memory_layout()), tail: 0 };
        // SAFETY: the entries are page-aligned, hold RECEIVE_BUFFERS descriptors, and live until this value is dropped,
        // which the driver does after the ring.
        unsafe {
            submitter.register_buf_ring_with_flags(entries.as_ptr() as u64, RECEIVE_BUFFERS, GROUP, 0)?;
        }
        for id in 0..RECEIVE_BUFFERS {
            buffers.push(id);
        }
        buffers.publish();
        Ok(buffers)
    }

    /// The bytes the kernel wrote into a buffer it picked. The buffer is ours until [`Buffers::give_back`].
    pub fn bytes(&mut self, id: u16, len: usize) -> &mut [u8] {
        assert!(id < RECEIVE_BUFFERS && len <= RECEIVE_BUFFER_BYTES, "the kernel names a buffer it was provided");
        // SAFETY: the buffer lies inside `memory`, was zeroed at the start, and the kernel writes to it no more until it is
        // provided again; `&mut self` keeps another borrow from being made meanwhile.
        unsafe {
            let start = self.memory.as_ptr().add(usize::from(id) * RECEIVE_BUFFER_BYTES);
            std::slice::from_raw_parts_mut(start, len)
        }
    }

    /// Provides a buffer again.
    pub fn give_back(&mut self, id: u16) {
        self.push(id);
        self.publish();
    }

    fn push(&mut self, id: u16) {
        let index = usize::from(self.tail & (RECEIVE_BUFFERS - 1));
        // SAFETY: the index is below RECEIVE_BUFFERS, and the kernel does not read an entry at or past the published tail.
        // The tail shares its memory with the first entry's reserved field, which these setters leave alone.
        unsafe {
            let entry = &mut *self.entries.as_ptr().add(index);
            entry.set_addr(self.memory.as_ptr().add(usize::from(id) * RECEIVE_BUFFER_BYTES) as u64);
            entry.set_len(RECEIVE_BUFFER_BYTES as u32);
            entry.set_bid(id);
        }
        self.tail = self.tail.wrapping_add(1);
    }

    fn publish(&mut self) {
        // SAFETY: the tail lies in the first entry, is aligned to two bytes, and the kernel only reads it. Release makes the
        // entries visible before it.
        unsafe {
            let tail = BufRingEntry::tail(self.entries.as_ptr()).cast_mut().cast::<AtomicU16>();
            (*tail).store(self.tail, Ordering::Release);
        }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: both were allocated with these layouts, and the ring that knew them is gone.
        unsafe {
            dealloc(self.entries.as_ptr().cast(), entries_layout());
            dealloc(self.memory.as_ptr(), memory_layout());
        }
    }
}
