//! The descriptor that wakes the engine, awaited so that the shard's other tasks are never starved.

use std::future::{Future as _, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::task::Poll;

use monoio::net::TcpStream;

/// See the module.
pub(super) struct Wake(TcpStream);

impl Wake {
    /// Watches a descriptor.
    ///
    /// # Errors
    /// When the runtime cannot watch it.
    pub(super) fn new(descriptor: OwnedFd) -> io::Result<Self> {
        // monoio watches a descriptor for readability only as one of its sockets; nothing is ever read through this one.
        Ok(Self(TcpStream::from_std(std::net::TcpStream::from(descriptor))?))
    }

    /// Waits until it is readable. Whoever of the shard's tasks can run has run before this returns, and the runtime has
    /// looked for what the sockets of the others have to tell.
    ///
    /// On io_uring that is so because readability is told by a completion. On epoll, monoio's `readable` never leaves the
    /// future while the descriptor is readable, so that a shard with more work than time would accept nobody and answer no
    /// request. Waking ourselves would be no way out: monoio polls a main future that is woken before its tasks, and puts a
    /// task that wakes itself in front of the others. A task of its own goes behind them.
    ///
    /// # Errors
    /// When the descriptor cannot be watched.
    pub(super) async fn wait(&self) -> io::Result<()> {
        let mut readable = pin!(self.0.readable(false));
        match poll_fn(|context| Poll::Ready(readable.as_mut().poll(context))).await {
            Poll::Pending => readable.await,
            Poll::Ready(told) => {
                told?;
                monoio::spawn(async {}).await;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::Future;
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;

    use monoio::io::AsyncReadRent as _;
    use monoio::net::TcpListener;

    use super::*;

    /// Accepting and reading one byte take no more rounds than this on either driver.
    const ROUNDS: usize = 100;

    /// A client is accepted and read from although the engine is never out of work.
    async fn a_busy_engine_lets_the_others_run() {
        let (mut bell, descriptor) = UnixStream::pair().unwrap();
        bell.write_all(b"x").unwrap();
        let wake = Wake::new(descriptor.into()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.write_all(b"y").unwrap();
        let served = Rc::new(Cell::new(false));
        let serves = Rc::clone(&served);
        monoio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            monoio::spawn(async move {
                let (read, buffer) = stream.read(Vec::with_capacity(1)).await;
                assert_eq!((read.unwrap(), &buffer[..]), (1, &b"y"[..]));
                serves.set(true);
            });
        });
        for _ in 0..ROUNDS {
            wake.wait().await.unwrap();
            if served.get() {
                return;
            }
        }
        panic!("nobody served the client in {ROUNDS} rounds");
    }

    fn on<D: monoio::Driver>(runtime: io::Result<monoio::Runtime<D>>, test: impl Future<Output = ()>) {
        runtime.unwrap().block_on(test);
    }

    #[test]
    fn a_busy_engine_starves_nobody_on_epoll() {
        on(monoio::RuntimeBuilder::<monoio::LegacyDriver>::new().build(), a_busy_engine_lets_the_others_run());
    }

    #[test]
    fn a_busy_engine_starves_nobody_on_a_ring() {
        on(monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().build(), a_busy_engine_lets_the_others_run());
    }
}
