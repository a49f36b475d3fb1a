//! A TCP connection with a receive buffer and deadlines.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use socket2::{Domain, Socket, Type};

use super::{DEADLINE, Deadline};

/// A connection to the node and what was read from it but not yet taken.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    /// Connects.
    pub fn open(address: SocketAddr) -> Self {
        Self::try_open(address).unwrap_or_else(|error| panic!("connect to {address}: {error}"))
    }

    /// Connects, or says why not.
    pub fn try_open(address: SocketAddr) -> std::io::Result<Self> {
        Self::around(TcpStream::connect_timeout(&address, DEADLINE)?)
    }

    /// Connects with a receive buffer of about `bytes`, so that the kernel takes little of what is not read.
    pub fn open_with_receive_buffer(address: SocketAddr, bytes: usize) -> Self {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).expect("make a socket");
        // Before connecting: the window scale is agreed in the handshake.
        socket.set_recv_buffer_size(bytes).expect("set the receive buffer");
        socket
            .connect_timeout(&address.into(), DEADLINE)
            .unwrap_or_else(|error| panic!("connect to {address}: {error}"));
        Self::around(socket.into()).expect("set timeouts")
    }

    fn around(stream: TcpStream) -> std::io::Result<Self> {
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    /// Writes everything.
    #[track_caller]
    pub fn write(&mut self, bytes: &[u8]) {
        self.try_write(bytes).unwrap_or_else(|error| panic!("write {} bytes: {error}", bytes.len()));
    }

    /// Writes everything, or says why not: an abusive client may find the connection gone.
    pub fn try_write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// What was read and not yet taken.
    pub fn buffered(&self) -> &[u8] {
        &self.buffer
    }

    /// Removes the first `count` buffered bytes and returns them.
    pub fn take(&mut self, count: usize) -> Vec<u8> {
        let rest = self.buffer.split_off(count);
        std::mem::replace(&mut self.buffer, rest)
    }

    /// Reads once. False means that the peer ended the connection, in order or by a reset.
    ///
    /// # Panics
    /// When nothing comes within [`DEADLINE`].
    #[track_caller]
    pub fn fill(&mut self) -> bool {
        let mut chunk = [0; 16 * 1024];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(count) => {
                    self.buffer.extend_from_slice(&chunk[..count]);
                    return count > 0;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                    return false;
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    panic!("nothing to read within {DEADLINE:?}; buffered: {:?}", self.excerpt());
                }
                Err(error) => panic!("read: {error}; buffered: {:?}", self.excerpt()),
            }
        }
    }

    /// Reads until `find` gives a value, which it takes from what is buffered. None means that the peer ended first.
    #[track_caller]
    pub fn read_until<T>(&mut self, mut find: impl FnMut(&mut Vec<u8>) -> Option<T>) -> Option<T> {
        let deadline = Deadline::start();
        loop {
            if let Some(value) = find(&mut self.buffer) {
                return Some(value);
            }
            deadline.check("what is read for");
            if !self.fill() {
                return None;
            }
        }
    }

    /// Reads to the end of the connection and returns everything buffered.
    #[track_caller]
    pub fn read_to_end(&mut self) -> Vec<u8> {
        while self.fill() {}
        std::mem::take(&mut self.buffer)
    }

    /// Reads, if anything is there, without waiting. False means that the peer ended the connection.
    pub fn fill_without_waiting(&mut self) -> bool {
        self.stream.set_nonblocking(true).expect("set non-blocking");
        let mut chunk = [0; 16 * 1024];
        let open = loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => break false,
                Ok(count) => self.buffer.extend_from_slice(&chunk[..count]),
                Err(error) => break error.kind() == ErrorKind::WouldBlock,
            }
        };
        self.stream.set_nonblocking(false).expect("set blocking");
        open
    }

    /// Says that nothing more will be written.
    pub fn end_writing(&mut self) {
        self.stream.shutdown(Shutdown::Write).expect("shut down the write half");
    }

    /// Closes with a reset instead of an orderly end.
    pub fn reset(self) {
        let socket = Socket::from(self.stream);
        socket.set_linger(Some(std::time::Duration::ZERO)).expect("set linger");
    }

    fn excerpt(&self) -> String {
        String::from_utf8_lossy(&self.buffer[..self.buffer.len().min(400)]).into_owned()
    }
}
