//! One connection's bytes: reads with deadlines into a bounded buffer, writes, and the ways to part with the socket.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use monoio::buf::{IoBuf, IoBufMut};
use monoio::io::{AsyncReadRent, AsyncWriteRent, AsyncWriteRentExt, CancelableAsyncReadRent, CancelableAsyncWriteRent};
use monoio::net::TcpStream;
use monoio::time::{Instant, timeout_at};

use super::parking::{Parked, Parking};
use crate::limits::{FRONT_READ_BYTES, LINGER_CLOSE_BYTES, LINGER_CLOSE_MILLIS};
use crate::shard::handover::Request;

/// Why a read or write is the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The peer closed or the connection broke.
    Closed,
    /// The deadline passed. The operation was cancelled; what it read is lost.
    TimedOut,
    /// The shard leaves: the connection is to be parked. Nothing is lost and nothing is under way.
    Parked,
}

/// A connection and what was received on it and not used yet.
#[derive(Debug)]
pub(super) struct Transport {
    stream: TcpStream,
    buffer: Vec<u8>,
    parking: Parking,
    /// Where it is, for whoever goes on with it when it is parked.
    at: Request,
}

impl Transport {
    pub(super) fn new(stream: TcpStream, parking: Parking) -> Self {
        Self { stream, buffer: Vec::new(), parking, at: Request::default() }
    }

    /// Puts what another process, or this one before, has read and not used in front of what is read.
    pub(super) fn restore(&mut self, received: Vec<u8>) {
        self.buffer = received;
    }

    /// Whether the node ends, so that the client is to come back elsewhere.
    pub(super) fn ends(&self) -> bool {
        self.parking.is_shut()
    }

    /// Fails when the shard leaves; `deadline` is that of what is interrupted.
    pub(super) fn check_open(&mut self, deadline: Instant) -> Result<(), Ended> {
        if self.parking.is_open() { Ok(()) } else { Err(self.interrupted(deadline)) }
    }

    fn interrupted(&mut self, deadline: Instant) -> Ended {
        self.at.left = deadline.saturating_duration_since(Instant::now()).as_millis() as u64;
        Ended::Parked
    }

    /// Parks the connection. `read` is what was used of a request that is not whole, as it is to be read again.
    pub(super) fn park(self, mut read: Vec<u8>, invited: bool, last: bool) {
        read.extend_from_slice(&self.buffer);
        let request = Request { received: read, invited, last, ..self.at };
        // SAFETY: `into_raw_fd` gives up ownership of an open descriptor; nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(self.stream.into_raw_fd()) };
        self.parking.park(Parked { socket, request });
    }

    /// What was received and not used yet.
    pub(super) fn received(&self) -> &[u8] {
        &self.buffer
    }

    /// Forgets the first bytes of [`Transport::received`].
    pub(super) fn consume(&mut self, bytes: usize) {
        self.buffer.drain(..bytes);
    }

    /// Reads once, behind what is there.
    pub(super) async fn fill(&mut self, deadline: Instant) -> Result<(), Ended> {
        // What was there when the others were interrupted is used first, and nothing is waited for after it.
        self.check_open(deadline)?;
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.reserve(FRONT_READ_BYTES);
        let (start, end) = (buffer.len(), buffer.capacity());
        let read = self.stream.cancelable_read(buffer.slice_mut(start..end), self.parking.handle());
        let Ok((result, buffer)) = timeout_at(deadline, read).await else {
            return Err(Ended::TimedOut);
        };
        self.buffer = buffer.into_inner();
        match result {
            Ok(1..) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => Err(self.interrupted(deadline)),
            Ok(0) | Err(_) => Err(Ended::Closed),
        }
    }

    /// Writes an answer. What is left of it when the shard leaves is kept for whoever goes on.
    pub(super) async fn answer(&mut self, bytes: Vec<u8>, deadline: Instant) -> Result<(), Ended> {
        let (mut bytes, mut sent) = (bytes, 0);
        while sent < bytes.len() {
            if let Err(parked) = self.check_open(deadline) {
                self.at.unsent = bytes.split_off(sent);
                return Err(parked);
            }
            let end = bytes.len();
            let write = self.stream.cancelable_write(bytes.slice(sent..end), self.parking.handle());
            let Ok((result, slice)) = timeout_at(deadline, write).await else { return Err(Ended::TimedOut) };
            bytes = slice.into_inner();
            match result {
                Ok(written @ 1..) => sent += written,
                Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => {
                    self.at.unsent = bytes.split_off(sent);
                    return Err(self.interrupted(deadline));
                }
                Ok(0) | Err(_) => return Err(Ended::Closed),
            }
        }
        Ok(())
    }

    /// Writes all of `bytes`.
    pub(super) async fn send(&mut self, bytes: Vec<u8>, deadline: Instant) -> Result<(), Ended> {
        match timeout_at(deadline, self.stream.write_all(bytes)).await {
            Ok((Ok(_), _)) => Ok(()),
            Ok((Err(_), _)) => Err(Ended::Closed),
            Err(_) => Err(Ended::TimedOut),
        }
    }

    /// Closes so that the peer can still read what was sent: closing while it sends would reset the connection and
    /// take the answer with it (RFC 9112, section 9.6).
    pub(super) async fn linger(mut self) {
        if self.stream.shutdown().await.is_err() {
            return;
        }
        let deadline = Instant::now() + Duration::from_millis(LINGER_CLOSE_MILLIS);
        let mut read_over = 0;
        while read_over < LINGER_CLOSE_BYTES {
            let buffer = Vec::with_capacity(FRONT_READ_BYTES);
            match timeout_at(deadline, self.stream.read(buffer)).await {
                Ok((Ok(read @ 1..), _)) => read_over += read,
                Ok((Ok(0) | Err(_), _)) | Err(_) => return,
            }
        }
    }

    /// Parts with the socket, and with what was received and not used. No read may have timed out before: its
    /// cancelled operation would still hold the socket.
    pub(super) fn into_socket(self) -> (OwnedFd, Vec<u8>) {
        // SAFETY: `into_raw_fd` gives up ownership of an open descriptor; nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(self.stream.into_raw_fd()) };
        (socket, self.buffer)
    }
}
