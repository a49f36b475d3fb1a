//! The signals that a node obeys, as a descriptor.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A signal that arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM: end in order.
    Terminate,
    /// SIGINT: end soon, somebody waits.
    Interrupt,
    /// SIGHUP: read the configuration again.
    Reload,
    /// SIGUSR2: hand over to a new process.
    Upgrade,
}

impl Signal {
    const ALL: [Self; 4] = [Self::Terminate, Self::Interrupt, Self::Reload, Self::Upgrade];

    const fn number(self) -> libc::c_int {
        match self {
            Self::Terminate => libc::SIGTERM,
            Self::Interrupt => libc::SIGINT,
            Self::Reload => libc::SIGHUP,
            Self::Upgrade => libc::SIGUSR2,
        }
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Terminate => "SIGTERM",
            Self::Interrupt => "SIGINT",
            Self::Reload => "SIGHUP",
            Self::Upgrade => "SIGUSR2",
        }
    }
}

/// Every [`Signal`], taken off a descriptor instead of interrupting a thread.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks them in this thread, and so in every thread it starts afterwards, and opens their descriptor. Call it
    /// before the first thread is started: a thread that does not block them would die of them, and the process with it.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set before anything reads it; the numbers are valid.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in Signal::ALL {
                libc::sigaddset(set.as_mut_ptr(), signal.number());
            }
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

    /// A signal that arrived, if one did. Does not wait: poll the descriptor for that.
    pub fn take(&self) -> Option<Signal> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: writes at most `size` bytes into a live local of that size.
        let read = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if read != size as isize {
            return None;
        }
        // SAFETY: the kernel wrote the whole struct.
        let number = unsafe { info.assume_init() }.ssi_signo;
        Signal::ALL.into_iter().find(|signal| signal.number() as u32 == number)
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
        assert_eq!(taken.join().expect("the thread ends"), (None, Some(Signal::Terminate), None));
    }
}
