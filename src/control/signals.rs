//! The signals that stop a node, as a descriptor.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// SIGTERM and SIGINT, taken off a descriptor instead of interrupting a thread.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks both signals in this thread, and so in every thread it starts afterwards, and opens their descriptor. Call it
    /// before the first thread is started: a thread that does not block them would die of them, and the process with it.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set before anything reads it; both signal numbers are valid.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
            libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
            libc::sigaddset(set.as_mut_ptr(), libc::SIGUSR2);
            set.assume_init()
        };
        // SAFETY: reads an initialised set; the old mask is not asked for.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: reads an initialised set; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and has no other owner.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The name of a signal that arrived, if one did. Does not wait: poll the descriptor for that.
    pub fn take(&self) -> Option<&'static str> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: writes at most `size` bytes into a live local of that size.
        let read = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if read != size as isize {
            return None;
        }
        // SAFETY: the kernel wrote the whole struct.
        let signal = unsafe { info.assume_init() }.ssi_signo;
        Some(match signal as libc::c_int {
            libc::SIGINT => "SIGINT",
            libc::SIGUSR2 => "SIGUSR2",
            _ => "SIGTERM",
        })
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_taken_once() {
        // On a thread of its own: the block outlives the test, and other tests start threads.
        let taken = std::thread::spawn(|| {
            let signals = Signals::block().expect("a descriptor");
            let before = signals.take();
            // SAFETY: sends a signal that this thread blocks to this thread alone.
            unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGTERM) };
            (before, signals.take(), signals.take())
        });
        assert_eq!(taken.join().expect("the thread ends"), (None, Some("SIGTERM"), None));
    }
}
