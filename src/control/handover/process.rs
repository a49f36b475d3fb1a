//! The next process: which program it is, how it is started, and how it is stopped when the hand-over fails.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use super::link::Link;
use crate::control::activation;

/// The environment variable that names the descriptor on which the old process waits.
pub const DESCRIPTOR_VARIABLE: &str = "WEIR_HANDOVER_FD";

/// What this process was started as. The file there may be another one by now: that is what an upgrade is.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
}

impl Program {
    /// This process's program, as it was called: an absolute or relative path, or a name found in `PATH`. A symbolic link stays
    /// one, because it may point to a new version later. Ask for it at the start, before the working directory can change.
    #[must_use]
    pub fn own() -> Self {
        let mut arguments = std::env::args_os();
        let called = PathBuf::from(arguments.next().unwrap_or_default());
        let path = resolve(&called, &std::env::var_os("PATH").unwrap_or_default());
        let path = path.or_else(|| std::env::current_exe().ok()).unwrap_or(called);
        Self { path, arguments: arguments.collect() }
    }

    /// Starts it, connected with this process.
    ///
    /// # Errors
    /// Names what the system refused.
    pub fn start(&self) -> io::Result<(Child, Link)> {
        let (near, far) = UnixStream::pair()?;
        let descriptor = far.as_raw_fd();
        let mut command = Command::new(&self.path);
        command.args(&self.arguments).env(DESCRIPTOR_VARIABLE, descriptor.to_string());
        // What a service manager said to this process alone. Without the id the rest of the watchdog's variables holds for
        // whoever is the main process (sd_watchdog_enabled(3)), and that the next one will be.
        for name in activation::VARIABLES.iter().chain(&["WATCHDOG_PID"]) {
            command.env_remove(name);
        }
        // SAFETY: between fork and exec this makes one system call and allocates nothing. The descriptor is open: `far`
        // lives until the child was started.
        unsafe {
            command.pre_exec(move || match libc::fcntl(descriptor, libc::F_SETFD, 0) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let child = command.spawn();
        drop(far);
        let child = child
            .map_err(|error| io::Error::new(error.kind(), format!("cannot start {}: {error}", self.path.display())))?;
        Ok((child, Link::new(near)))
    }
}

/// The absolute path of a program called like this.
fn resolve(called: &Path, search: &std::ffi::OsStr) -> Option<PathBuf> {
    if called.as_os_str().is_empty() {
        return None;
    }
    if called.components().count() > 1 || called.is_absolute() {
        return std::path::absolute(called).ok();
    }
    std::env::split_paths(search).map(|directory| directory.join(called)).find(|path| path.is_file())
}

/// The descriptor that an old process left to this one, if one did.
///
/// # Errors
/// When the variable is set but its value is no open descriptor of a socket.
pub fn inherited() -> Result<Option<Link>, String> {
    let Some(value) = std::env::var_os(DESCRIPTOR_VARIABLE) else { return Ok(None) };
    let refused = |why: &str| format!("{DESCRIPTOR_VARIABLE} is {value:?}, which is {why}");
    let descriptor: RawFd =
        value.to_str().and_then(|text| text.parse().ok()).ok_or_else(|| refused("no descriptor number"))?;
    if descriptor <= libc::STDERR_FILENO {
        return Err(refused("an output or input, no descriptor that was left to this process"));
    }
    // SAFETY: reads flags of a number that may be no descriptor, and sets them.
    if unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(refused("not open"));
    }
    // SAFETY: it is open, and nobody else in this process owns it: it was there before the first line of the program ran.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(descriptor) });
    socket.local_addr().map_err(|error| refused(&format!("no Unix socket: {error}")))?;
    Ok(Some(Link::new(socket)))
}

/// The new process, as far as the old one has power over it. A test has its own.
pub trait Successor {
    /// Its process id.
    fn pid(&self) -> u32;

    /// Stops it and waits until it stands still, or has ended: no thread of it runs then.
    fn suspend(&mut self);

    /// Lets it go on.
    fn resume(&mut self);

    /// Kills it and waits for its end.
    fn kill(&mut self);
}

impl Successor for Child {
    fn pid(&self) -> u32 {
        self.id()
    }

    fn suspend(&mut self) {
        let pid = self.id();
        // SAFETY: signals a child that was not waited for, so the id is still its own.
        unsafe { libc::kill(pid as libc::pid_t, libc::SIGSTOP) };
        loop {
            // SAFETY: an all-zero siginfo_t is valid; the call writes one into a live local. An end is only looked at
            // (WNOWAIT): it is reaped by `kill`.
            let waited = unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                libc::waitid(libc::P_PID, pid, &raw mut info, libc::WSTOPPED | libc::WEXITED | libc::WNOWAIT)
            };
            if waited == 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return;
            }
        }
    }

    fn resume(&mut self) {
        // SAFETY: as above.
        unsafe { libc::kill(self.id() as libc::pid_t, libc::SIGCONT) };
    }

    fn kill(&mut self) {
        // It may have ended by itself.
        let _ = Child::kill(self);
        let _ = self.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_program_is_found_as_it_was_called() {
        let here = std::env::current_dir().expect("there is one");
        let found = |called: &str| resolve(Path::new(called), "/nowhere:/bin".as_ref());
        assert_eq!(found("/usr/bin/weir"), Some("/usr/bin/weir".into()));
        assert_eq!(found("bin/weir"), Some(here.join("bin/weir")));
        assert_eq!(found("./weir"), Some(here.join("weir")));
        assert_eq!(found("sh"), Some("/bin/sh".into()));
        assert_eq!((found(""), found("no-such-program")), (None, None));
    }

    #[test]
    fn a_program_that_is_gone_is_named() {
        let program = Program { path: "/no/such/weir".into(), arguments: Vec::new() };
        let error = program.start().expect_err("it is not there").to_string();
        assert!(error.contains("/no/such/weir"), "{error}");
    }

    #[test]
    fn a_child_finds_the_descriptor_and_its_death_is_heard() {
        let script = format!("printf '%s' \"hello\" >&\"${DESCRIPTOR_VARIABLE}\"; exec sleep 1000");
        let program = Program { path: "/bin/bash".into(), arguments: vec!["-c".into(), script.into()] };
        let (mut child, link) = program.start().expect("there is bash, which knows descriptors above 9");
        // SAFETY: the link owns the descriptor for the whole test.
        let mut socket = UnixStream::from(
            unsafe { std::os::fd::BorrowedFd::borrow_raw(link.as_raw_fd()) }.try_clone_to_owned().expect("room"),
        );
        let mut word = [0; 5];
        io::Read::read_exact(&mut socket, &mut word).expect("the child writes");
        assert_eq!(&word, b"hello");
        child.suspend();
        child.resume();
        Successor::kill(&mut child);
        let gone = link.receive(Instant::now() + Duration::from_secs(10)).expect_err("it is dead");
        assert!(matches!(gone, super::super::link::LinkError::Gone), "{gone}");
    }
}
