//! Finds the primary through Redis Sentinel, and notices when it becomes another one.
//!
//! A task for each sentinel asks it every [`SENTINEL_ASK_MILLIS`] which server is the primary, and at once when the sentinel
//! announces a switch (`+switch-master`). What they answer are views; the one with the highest configuration epoch counts, since
//! each fail-over has a higher one than those before it: a sentinel that was cut off from the others is outvoted by
//! any that was not. The tasks last as long as the backbone, not as long as a session, so that a session that cannot be made is
//! given up as soon as another primary is named.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ConnectionAddr, IntoConnectionInfo, PushInfo, PushKind, RedisResult};
use rustc_hash::FxHashMap;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::address::SentinelGroup;
use super::commands::failure;
use super::session::backoff;
use crate::limits::{SENTINEL_ANSWER_MILLIS, SENTINEL_ASK_MILLIS};

/// The announcement of a fail-over's end. See the Redis documentation of Sentinel, "Pub/Sub messages".
const SWITCH: &str = "+switch-master";

/// Which server is the primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Primary {
    host: String,
    port: u16,
    /// Grows with every fail-over.
    epoch: u64,
}

impl fmt::Display for Primary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Primary {
    fn is_at(&self, other: &Primary) -> bool {
        (&self.host, self.port) == (&other.host, other.port)
    }
}

/// What a sentinel said last; or why it says nothing, if it was asked at all.
type View = Option<Result<Primary, String>>;

/// The sentinels of a group, being asked. Dropping it ends that.
#[derive(Debug)]
pub struct Sentinels {
    group: Arc<SentinelGroup>,
    views: watch::Receiver<Vec<View>>,
    /// The primary that was given out last.
    current: Option<Primary>,
    _tasks: JoinSet<()>,
}

impl Sentinels {
    /// Starts asking, on the current tokio runtime.
    pub fn start(group: SentinelGroup) -> Self {
        let group = Arc::new(group);
        let (sender, views) = watch::channel(vec![None; group.sentinels.len()]);
        let sender = Arc::new(sender);
        let mut tasks = JoinSet::new();
        for index in 0..group.sentinels.len() {
            tasks.spawn(follow(index, group.clone(), sender.clone()));
        }
        Self { group, views, current: None, _tasks: tasks }
    }

    /// A client of the primary. Waits until most sentinels have answered, or all that will. When none answers, the primary
    /// that was known last is still worth a try: without sentinels nobody fails over.
    ///
    /// # Errors
    /// Says what each sentinel said, when there is no primary to be had.
    pub async fn find(&mut self) -> Result<Client, String> {
        let answered = Duration::from_millis(2 * SENTINEL_ANSWER_MILLIS);
        let _ = timeout(answered, self.views.wait_for(|views| is_decided(views))).await;
        let best = best(&self.views.borrow_and_update(), self.current.as_ref());
        let Some(primary) = best.or_else(|| self.current.clone()) else {
            return Err(self.nothing());
        };
        tracing::debug!(%primary, name = self.group.name, "the sentinels name the primary");
        let info = ConnectionAddr::Tcp(primary.host.clone(), primary.port).into_connection_info();
        self.current = Some(primary);
        let info = info.map_err(|error| error.to_string())?.set_redis_settings(self.group.settings.clone());
        Client::open(info).map_err(|error| error.to_string())
    }

    /// Waits until the sentinels name another primary than the one found last.
    pub async fn switched(&mut self) -> String {
        loop {
            let best = best(&self.views.borrow_and_update(), self.current.as_ref());
            if let Some(best) = best.filter(|best| !self.current.as_ref().is_some_and(|current| current.is_at(best))) {
                return best.to_string();
            }
            if self.views.changed().await.is_err() {
                // The tasks never end before this.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Why there is no primary.
    fn nothing(&self) -> String {
        let views = self.views.borrow();
        let reasons = self.group.sentinels.iter().zip(views.iter()).map(|(sentinel, view)| match view {
            Some(Err(reason)) => format!("{}: {reason}", sentinel.addr()),
            Some(Ok(primary)) => format!("{}: {primary}", sentinel.addr()),
            None => format!("{}: no answer yet", sentinel.addr()),
        });
        format!("no sentinel names the primary of `{}`: {}", self.group.name, reasons.collect::<Vec<_>>().join("; "))
    }
}

/// Whether most sentinels have named a primary, or every one was asked.
fn is_decided(views: &[View]) -> bool {
    let named = views.iter().filter(|view| matches!(view, Some(Ok(_)))).count();
    2 * named > views.len() || views.iter().all(Option::is_some)
}

/// What the views with the highest epoch name: `current`, if one of them does.
fn best(views: &[View], current: Option<&Primary>) -> Option<Primary> {
    let named = || views.iter().filter_map(|view| view.as_ref()?.as_ref().ok());
    let epoch = named().map(|primary| primary.epoch).max()?;
    let mut newest = named().filter(|primary| primary.epoch == epoch);
    let first = newest.clone().next();
    newest.find(|primary| current.is_some_and(|current| current.is_at(primary))).or(first).cloned()
}

/// Asks one sentinel for ever.
async fn follow(index: usize, group: Arc<SentinelGroup>, views: Arc<watch::Sender<Vec<View>>>) {
    let note = |view: Result<Primary, String>| {
        views.send_if_modified(|views| {
            let view = Some(view);
            let news = views[index] != view;
            views[index] = view;
            news
        })
    };
    let mut attempt = 0;
    loop {
        let error = match connect(&group, index).await {
            Ok((mut connection, switched)) => loop {
                match ask(&mut connection, &group.name).await {
                    Ok(primary) => note(Ok(primary)),
                    Err(error) => break error,
                };
                attempt = 0;
                tokio::select! {
                    () = sleep(Duration::from_millis(SENTINEL_ASK_MILLIS)) => {}
                    () = switched.notified() => {}
                }
            },
            Err(error) => error,
        };
        tracing::debug!(sentinel = %group.sentinels[index].addr(), %error, "a sentinel names no primary");
        note(Err(failure(&error).to_string()));
        sleep(backoff(attempt, getrandom::u64().unwrap_or(u64::MAX))).await;
        attempt += 1;
    }
}

/// Connects to a sentinel. The second part is told when it announces a switch, of whatever primary.
async fn connect(group: &SentinelGroup, index: usize) -> RedisResult<(MultiplexedConnection, Arc<Notify>)> {
    let switched = Arc::new(Notify::new());
    let told = switched.clone();
    let answer = Some(Duration::from_millis(SENTINEL_ANSWER_MILLIS));
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(answer)
        .set_response_timeout(answer)
        .set_push_sender(move |push: PushInfo| {
            if push.kind == PushKind::Message {
                told.notify_one();
            }
            Ok::<(), Infallible>(())
        });
    let client = Client::open(group.sentinels[index].clone())?;
    let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
    if let Err(error) = connection.subscribe(SWITCH).await {
        tracing::debug!(%error, "a sentinel does not announce switches: it is asked from time to time");
    }
    Ok((connection, switched))
}

/// Asks a sentinel for the primary.
async fn ask(connection: &mut MultiplexedConnection, name: &str) -> RedisResult<Primary> {
    let mut pipeline = redis::pipe();
    // The address that this one names is the new primary's as soon as there is one; `MASTER` has the epoch.
    pipeline.cmd("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(name);
    pipeline.cmd("SENTINEL").arg("MASTER").arg(name);
    let ((host, port), master): ((String, u16), FxHashMap<String, String>) = pipeline.query_async(connection).await?;
    let epoch = master.get("config-epoch").and_then(|epoch| epoch.parse().ok()).unwrap_or(0);
    Ok(Primary { host, port, epoch })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn primary(host: &str, epoch: u64) -> Primary {
        Primary { host: host.into(), port: 6379, epoch }
    }

    fn names(host: &str, epoch: u64) -> View {
        Some(Ok(primary(host, epoch)))
    }

    fn down() -> View {
        Some(Err("refused".into()))
    }

    #[test]
    fn the_latest_failover_counts() {
        assert_eq!(best(&[names("old", 3), names("new", 4), names("old", 3)], None), Some(primary("new", 4)));
        assert_eq!(best(&[down(), names("old", 3), None], None), Some(primary("old", 3)));
        assert_eq!(best(&[down(), None], None), None);
        // One epoch and two addresses: no reason to leave.
        let both = [names("a", 3), names("b", 3)];
        assert_eq!(best(&both, None), Some(primary("a", 3)));
        assert_eq!(best(&both, Some(&primary("b", 2))), Some(primary("b", 3)));
    }

    #[test]
    fn a_majority_or_everyone_decides() {
        assert!(!is_decided(&[None, None, None]));
        assert!(!is_decided(&[names("a", 1), None, None]));
        assert!(is_decided(&[names("a", 1), names("a", 1), None]));
        assert!(!is_decided(&[names("a", 1), down(), None]));
        assert!(is_decided(&[names("a", 1), down(), down()]));
        assert!(is_decided(&[down(), down(), down()]));
    }
}
