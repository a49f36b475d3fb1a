//! Messages with descriptors between two processes, over a Unix stream socket (unix(7), `SCM_RIGHTS`).
//!
//! A message is a header, a JSON head and one block of bytes. Its descriptors travel with the header, so that a reader that asks
//! for exactly a header's bytes gets them with it.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::message::Message;
use crate::limits::{HANDOVER_DESCRIPTORS, HANDOVER_MESSAGE_BYTES};

/// Bytes of a header: descriptors, bytes of the head, bytes of the body, each a little-endian `u32`.
const HEADER: usize = 12;

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The other process is gone, or has closed its end.
    #[error("the other process is gone")]
    Gone,
    /// Nothing came, or nothing was taken, in time.
    #[error("the other process did not answer in time")]
    TimedOut,
    /// What came is no message.
    #[error("the other process sent something that is no message: {0}")]
    Malformed(String),
    /// The system refused.
    #[error("the connection to the other process failed: {0}")]
    System(io::Error),
}

impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::TimedOut,
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::Gone,
            _ => Self::System(error),
        }
    }
}

/// A message that arrived.
#[derive(Debug)]
pub struct Received {
    /// What it says.
    pub message: Message,
    /// The bytes that belong to it.
    pub body: Bytes,
    /// The descriptors that belong to it.
    pub descriptors: Vec<OwnedFd>,
}

/// One end of the connection between two processes.
#[derive(Debug)]
pub struct Link(UnixStream);

impl Link {
    /// An end of a pair of sockets.
    #[must_use]
    pub fn new(socket: UnixStream) -> Self {
        Self(socket)
    }

    /// Two connected ends; both are closed when a program is executed.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = UnixStream::pair()?;
        Ok((Self(one), Self(other)))
    }

    /// Sends a message that is nothing but words.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn say(&self, message: &Message, deadline: Instant) -> Result<(), LinkError> {
        self.send(message, &[], &[], deadline)
    }

    /// Sends a message with at most [`HANDOVER_DESCRIPTORS`] descriptors. After an error the connection is of no use.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn send(
        &self,
        message: &Message,
        body: &[u8],
        descriptors: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), LinkError> {
        assert!(descriptors.len() <= HANDOVER_DESCRIPTORS, "the kernel takes no more in one message");
        let head = serde_json::to_vec(message).map_err(|error| LinkError::Malformed(error.to_string()))?;
        let mut header = Vec::with_capacity(HEADER);
        for length in [descriptors.len(), head.len(), body.len()] {
            let length = u32::try_from(length).map_err(|_| LinkError::Malformed("it is too long".into()))?;
            header.extend_from_slice(&length.to_le_bytes());
        }
        self.0.set_write_timeout(Some(left(deadline)?))?;
        send_with_descriptors(self.0.as_raw_fd(), &header, descriptors)?;
        for mut rest in [&head[..], body] {
            while !rest.is_empty() {
                self.0.set_write_timeout(Some(left(deadline)?))?;
                match (&self.0).write(rest) {
                    Ok(0) => return Err(LinkError::Gone),
                    Ok(written) => rest = &rest[written..],
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn receive(&self, deadline: Instant) -> Result<Received, LinkError> {
        let mut header = [0; HEADER];
        let mut descriptors = Vec::new();
        let mut filled = 0;
        while filled < HEADER {
            self.0.set_read_timeout(Some(left(deadline)?))?;
            match receive_with_descriptors(self.0.as_raw_fd(), &mut header[filled..], &mut descriptors)? {
                0 => return Err(LinkError::Gone),
                read => filled += read,
            }
        }
        let field = |index: usize| {
            let bytes = [0, 1, 2, 3].map(|byte| header[4 * index + byte]);
            u32::from_le_bytes(bytes) as usize
        };
        let (expected, head, body) = (field(0), field(1), field(2));
        if head.saturating_add(body) > HANDOVER_MESSAGE_BYTES {
            return Err(LinkError::Malformed(format!("{head} and {body} bytes; most {HANDOVER_MESSAGE_BYTES}")));
        }
        if expected != descriptors.len() {
            // The kernel leaves out those for which the process has no room.
            let got = descriptors.len();
            return Err(LinkError::Malformed(format!("{got} descriptors instead of {expected}; see RLIMIT_NOFILE")));
        }
        let head = self.fill(head, deadline)?;
        let body = self.fill(body, deadline)?.into();
        let message = serde_json::from_slice(&head).map_err(|error| LinkError::Malformed(error.to_string()))?;
        Ok(Received { message, body, descriptors })
    }

    fn fill(&self, length: usize, deadline: Instant) -> Result<Vec<u8>, LinkError> {
        let mut bytes = Vec::new();
        while bytes.len() < length {
            self.0.set_read_timeout(Some(left(deadline)?))?;
            let missing = (length - bytes.len()).min(READ_BYTES);
            let start = bytes.len();
            bytes.resize(start + missing, 0);
            let read = match (&self.0).read(&mut bytes[start..]) {
                Ok(0) => return Err(LinkError::Gone),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error.into()),
            };
            bytes.truncate(start + read);
        }
        Ok(bytes)
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Bytes read at once: a length that is a lie reserves no more than this.
const READ_BYTES: usize = 256 * 1024;

fn left(deadline: Instant) -> Result<Duration, LinkError> {
    // A timeout of zero would mean none.
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(LinkError::TimedOut) } else { Ok(left.max(Duration::from_millis(1))) }
}

/// Bytes of control messages for the most descriptors.
// SAFETY: CMSG_SPACE only computes.
const CONTROL: usize = unsafe { libc::CMSG_SPACE((HANDOVER_DESCRIPTORS * size_of::<RawFd>()) as u32) } as usize;

/// Room for control messages, aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control(MaybeUninit<[u8; CONTROL]>);

fn send_with_descriptors(socket: RawFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
    let mut control = Control(MaybeUninit::zeroed());
    let mut piece = IoSlice::new(bytes);
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = (&raw mut piece).cast();
    message.msg_iovlen = 1;
    if !descriptors.is_empty() {
        let size = size_of_val(descriptors) as u32;
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE only computes.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(size) } as _;
        // SAFETY: the control buffer has room for one header and the most descriptors, and it is zeroed.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size) as _;
            // A BorrowedFd has the form of the number it stands for.
            let data = libc::CMSG_DATA(header);
            std::ptr::copy_nonoverlapping(descriptors.as_ptr().cast::<u8>(), data, size as usize);
        }
    }
    loop {
        // SAFETY: everything the message points to is alive.
        let sent = unsafe { libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL) };
        if sent >= 0 {
            // A header is far smaller than what a stream socket takes or refuses as a whole.
            return if sent as usize == bytes.len() { Ok(()) } else { Err(LinkError::TimedOut) };
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error.into());
        }
    }
}

fn receive_with_descriptors(
    socket: RawFd,
    bytes: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> Result<usize, LinkError> {
    let mut control = Control(MaybeUninit::zeroed());
    let mut piece = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = CONTROL as _;
    let read = loop {
        // SAFETY: everything the message points to is alive and writable for the lengths given.
        let read = unsafe { libc::recvmsg(socket, &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        if read >= 0 {
            break read as usize;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error.into());
        }
    };
    // SAFETY: the kernel wrote whole control messages and their length.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let size = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for index in 0..size / size_of::<RawFd>() {
                    // The descriptor was made for this process just now.
                    descriptors.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn a_message_arrives_with_its_bytes_and_descriptors() {
        let (one, other) = Link::pair().expect("descriptors");
        let (near, far) = UnixStream::pair().expect("descriptors");
        let many: Vec<_> = std::iter::repeat_n(far.as_fd(), HANDOVER_DESCRIPTORS).collect();
        let body = vec![7; 3 * READ_BYTES + 1];
        let reader = std::thread::spawn(move || {
            let first = other.receive(soon()).expect("it was sent");
            (first, other.receive(soon()).expect("it was sent"))
        });
        one.send(&Message::Started, &body, &many, soon()).expect("room");
        one.say(&Message::Mine, soon()).expect("room");
        let (first, second) = reader.join().expect("no panic");
        assert_eq!((first.message, &first.body[..]), (Message::Started, &body[..]));
        assert_eq!((first.descriptors.len(), second.descriptors.len()), (HANDOVER_DESCRIPTORS, 0));
        assert_eq!(second.message, Message::Mine);
        drop(far);
        (&UnixStream::from(first.descriptors.into_iter().next().expect("some")))
            .write_all(b"x")
            .expect("it is a socket");
        let mut byte = [0];
        (&near).read_exact(&mut byte).expect("the same socket");
    }

    #[test]
    fn an_end_a_silence_and_rubbish_are_told_apart() {
        let (one, other) = Link::pair().expect("descriptors");
        let short = || Instant::now() + Duration::from_millis(20);
        assert!(matches!(one.receive(short()), Err(LinkError::TimedOut)));
        (&other.0).write_all(&[0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, b'{', b'}']).expect("room");
        assert!(matches!(one.receive(soon()), Err(LinkError::Malformed(_))));
        (&other.0).write_all(&[0xff; HEADER]).expect("room");
        assert!(matches!(one.receive(soon()), Err(LinkError::Malformed(_))));
        drop(other);
        assert!(matches!(one.receive(soon()), Err(LinkError::Gone)));
        assert!(matches!(one.say(&Message::Mine, soon()), Err(LinkError::Gone)));
    }

    #[test]
    fn a_reader_that_hangs_is_noticed_in_the_middle_of_a_message() {
        let (one, _other) = Link::pair().expect("descriptors");
        let body = vec![0; 16 * 1024 * 1024];
        let deadline = Instant::now() + Duration::from_millis(50);
        assert!(matches!(one.send(&Message::Started, &body, &[], deadline), Err(LinkError::TimedOut)));
    }

    #[test]
    fn the_last_word_of_a_process_that_died_is_heard() {
        let (one, other) = Link::pair().expect("descriptors");
        other.say(&Message::Mine, soon()).expect("room");
        drop(other);
        assert_eq!(one.receive(soon()).expect("it was said").message, Message::Mine);
        assert!(matches!(one.receive(soon()), Err(LinkError::Gone)));
    }
}
