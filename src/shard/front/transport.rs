//! One connection's bytes: reads with deadlines into a bounded buffer, writes, and the ways to part with the socket.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use monoio::buf::IoBufMut;
use monoio::io::{AsyncReadRent, AsyncWriteRent, AsyncWriteRentExt};
use monoio::net::TcpStream;
use monoio::time::{Instant, timeout_at};

use crate::limits::{FRONT_READ_BYTES, LINGER_CLOSE_BYTES, LINGER_CLOSE_MILLIS};

/// Why a read or write is the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The peer closed or the connection broke.
    Closed,
    /// The deadline passed. The operation was cancelled; what it read is lost.
    TimedOut,
}

/// A connection and what was received on it and not used yet.
#[derive(Debug)]
pub(super) struct Transport {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Transport {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, buffer: Vec::new() }
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
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.reserve(FRONT_READ_BYTES);
        let (start, end) = (buffer.len(), buffer.capacity());
        let Ok((result, buffer)) = timeout_at(deadline, self.stream.read(buffer.slice_mut(start..end))).await else {
            return Err(Ended::TimedOut);
        };
        self.buffer = buffer.into_inner();
        match result {
            Ok(0) | Err(_) => Err(Ended::Closed),
            Ok(_) => Ok(()),
        }
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
            self.buffer.clear();
            if self.fill(deadline).await.is_err() {
                return;
            }
            read_over += self.buffer.len();
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
