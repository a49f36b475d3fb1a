//! The operator's side of a node: a few HTTP requests on a listener of its own, which only this machine reaches.
//!
//! It runs on a thread of its own and asks the main thread by [`Command`], so that nothing of it is in the way of a shard.

use std::future::IntoFuture as _;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use std::{fs, io};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::oneshot;

use crate::limits::{ADMIN_ANSWER_MILLIS, ADMIN_FAREWELL_MILLIS};
use crate::shard::mailbox::Bell;

pub mod client;
mod place;

pub use place::{FORMS, Place};

/// What is asked of the main thread.
#[derive(Debug)]
pub enum Command {
    /// Drain, or hasten the drain under way; answered with what that means.
    Drain(oneshot::Sender<Value>),
    /// Read the configuration again; answered with what changed.
    Reload(oneshot::Sender<Result<Value, String>>),
    /// Hand over to a new process; answered when that is over.
    Upgrade(oneshot::Sender<Result<Value, String>>),
}

/// Puts commands to the main thread.
#[derive(Debug, Clone)]
pub struct Commander {
    /// Its queue.
    pub commands: mpsc::Sender<Command>,
    /// What wakes it.
    pub bell: Arc<Bell>,
}

/// What the routes need of the node.
pub trait Operated: Send + Sync + 'static {
    /// Where the node is in its life, and with how many connections.
    fn status(&self) -> Value;
}

struct Shared {
    commander: Commander,
    node: Arc<dyn Operated>,
}

/// Why the admin listener cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for commands on {place}: {source}{hint}")]
pub struct AdminError {
    place: Place,
    source: io::Error,
    hint: &'static str,
}

/// An admin listener; its socket's file is removed with it.
#[derive(Debug)]
pub struct Admin {
    place: Place,
    end: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Admin {
    /// Listens at a place and answers from a thread of its own. `succeeds` says that a process that hands over to this one listens
    /// there: its socket is replaced.
    ///
    /// # Errors
    /// When another node listens there, or the system refuses.
    pub fn start(
        place: Place,
        succeeds: bool,
        commander: Commander,
        node: Arc<dyn Operated>,
    ) -> Result<Self, AdminError> {
        let refused = |hint| {
            let place = place.clone();
            move |source| AdminError { place, source, hint }
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(refused(""))?;
        let shared = Arc::new(Shared { commander, node });
        let routes = Router::new()
            .route("/admin/status", get(status))
            .route("/admin/drain", post(drain))
            .route("/admin/reload", post(reload))
            .route("/admin/upgrade", post(upgrade))
            .fallback(nothing_here)
            .with_state(shared);
        // Listening begins here and not on the thread, so that who is told that the node runs can reach it.
        let listener = match &place {
            Place::Off => return Ok(Self { place, end: None, thread: None }),
            Place::Tcp(address) => std::net::TcpListener::bind(address).map(Listener::Tcp),
            Place::Unix(path) => bind(path, succeeds).map(Listener::Unix),
        };
        let listener = listener.map_err(refused("; see admin.listen"))?;
        let (end, ended) = oneshot::channel();
        let body = move || {
            let served = runtime.block_on(listener.serve(routes, ended));
            if let Err(error) = served {
                tracing::error!(%error, "no commands are taken any more");
            }
        };
        let thread = std::thread::Builder::new().name("admin".into()).spawn(body).map_err(refused(""))?;
        Ok(Self { place, end: Some(end), thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Leaves the socket's file to the process that replaced it.
    pub fn leave(mut self) {
        self.place = Place::Off;
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        drop(self.end.take());
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
        if let Place::Unix(path) = &self.place {
            let _ = fs::remove_file(path);
        }
    }
}

/// A listening socket.
enum Listener {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

impl Listener {
    /// Answers until `ended` is dropped, and what was asked before for a moment longer: the answer to an upgrade is given by a
    /// process that is about to end.
    async fn serve(self, routes: Router, ended: oneshot::Receiver<()>) -> io::Result<()> {
        let (told, mut telling) = tokio::sync::watch::channel(());
        let stop = async move { drop(telling.changed().await) };
        let ended = async move {
            drop(ended.await);
            drop(told);
            tokio::time::sleep(Duration::from_millis(ADMIN_FAREWELL_MILLIS)).await;
        };
        match self {
            Self::Tcp(listener) => {
                listener.set_nonblocking(true)?;
                let serving = axum::serve(TcpListener::from_std(listener)?, routes).with_graceful_shutdown(stop);
                tokio::select! { () = ended => Ok(()), outcome = serving.into_future() => outcome }
            }
            Self::Unix(listener) => {
                listener.set_nonblocking(true)?;
                let serving = axum::serve(UnixListener::from_std(listener)?, routes).with_graceful_shutdown(stop);
                tokio::select! { () = ended => Ok(()), outcome = serving.into_future() => outcome }
            }
        }
    }
}

/// Binds a socket that only this user may open.
fn bind(path: &Path, succeeds: bool) -> io::Result<std::os::unix::net::UnixListener> {
    if let Some(directory) = path.parent()
        && !directory.exists()
    {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    if !succeeds && UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another node answers there"));
    }
    // Bound under another name and renamed: it is never there with other permissions, and a client finds the old one or the new
    // one but never none. What a killed node left there is replaced too.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let hidden = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let _ = fs::remove_file(&hidden);
    let listener = std::os::unix::net::UnixListener::bind(&hidden)?;
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600))?;
    if let Ok(there) = fs::symlink_metadata(path)
        && there.uid() != user()
    {
        let _ = fs::remove_file(&hidden);
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the file there is another user's"));
    }
    fs::rename(&hidden, path)?;
    Ok(listener)
}

async fn status(State(shared): State<Arc<Shared>>) -> Json<Value> {
    Json(shared.node.status())
}

async fn drain(State(shared): State<Arc<Shared>>) -> Response {
    let (reply, answer) = oneshot::channel();
    match ask(&shared.commander, Command::Drain(reply), answer).await {
        Ok(told) => (StatusCode::ACCEPTED, Json(told)).into_response(),
        Err(refusal) => refusal,
    }
}

async fn reload(State(shared): State<Arc<Shared>>) -> Response {
    attempt(&shared.commander, Command::Reload).await
}

async fn upgrade(State(shared): State<Arc<Shared>>) -> Response {
    attempt(&shared.commander, Command::Upgrade).await
}

/// Has something done that may fail.
async fn attempt(
    commander: &Commander,
    command: impl FnOnce(oneshot::Sender<Result<Value, String>>) -> Command,
) -> Response {
    let (reply, answer) = oneshot::channel();
    match ask(commander, command(reply), answer).await {
        Ok(Ok(outcome)) => Json(outcome).into_response(),
        Ok(Err(reason)) => error(StatusCode::CONFLICT, &reason),
        Err(refusal) => refusal,
    }
}

async fn nothing_here() -> Response {
    error(
        StatusCode::NOT_FOUND,
        "allowed: GET /admin/status, POST /admin/drain, POST /admin/reload, POST /admin/upgrade",
    )
}

/// Puts a command to the main thread and waits for its answer.
async fn ask<T>(commander: &Commander, command: Command, answer: oneshot::Receiver<T>) -> Result<T, Response> {
    let gone = || error(StatusCode::SERVICE_UNAVAILABLE, "the node is stopping");
    commander.commands.send(command).map_err(|_| gone())?;
    commander.bell.ring();
    match tokio::time::timeout(Duration::from_millis(ADMIN_ANSWER_MILLIS), answer).await {
        Ok(answer) => answer.map_err(|_| gone()),
        Err(_) => Err(error(StatusCode::GATEWAY_TIMEOUT, "the node did not answer in time; its log says more")),
    }
}

fn error(status: StatusCode, message: &str) -> Response {
    (status, Json(json!({ "error": message }))).into_response()
}

/// Who this process acts as.
fn user() -> u32 {
    // SAFETY: geteuid only reads.
    unsafe { libc::geteuid() }
}

/// The directories where the socket of `auto` may be, the likeliest first: what systemd gives, what a session has, and a place of
/// this user's own.
fn directories() -> Vec<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    let own = std::env::temp_dir().join(format!("weir-{}", user()));
    let session = from("XDG_RUNTIME_DIR").map(|path| path.join("weir"));
    [from("RUNTIME_DIRECTORY"), session, Some(own)].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests;
