//! Keeps the connections: connects, watches that messages really come back, and connects anew with growing random waits.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, PushInfo, PushKind, RedisError};
use tokio::sync::{Notify, mpsc};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::commands::{Commands, failure};
use super::source::{Source, Target};
use super::{BackboneEvent, Context, Inbox, Link, Outcome, SubscriptionChange};
use crate::backbone::interface::BackboneError;
use crate::limits::{
    BACKBONE_COMMANDS, BACKBONE_CONNECT_MILLIS, BACKBONE_QUEUE, BACKOFF_LEAST_MILLIS, BACKOFF_MOST_MILLIS,
    HEARTBEAT_MILLIS, HEARTBEAT_STALE_MILLIS, PUBLISH_MILLIS,
};

const STALE: Duration = Duration::from_millis(HEARTBEAT_STALE_MILLIS);

/// Keeps a session up for ever.
pub(super) async fn keep(context: Context, mut source: Source) {
    let mut attempt = 0;
    loop {
        let reason = match source.find().await {
            Ok(target) => tokio::select! {
                reason = hold(&context, &target, &mut attempt) => reason,
                // Also while connecting: a primary that hangs takes connections and does not answer.
                primary = source.switched() => {
                    context.left.send_modify(|left| *left += 1);
                    format!("the primary is {primary} now")
                }
            },
            Err(reason) => reason,
        };
        if context.outcomes.send(Outcome::Event(BackboneEvent::Disconnected(reason))).is_err() {
            return;
        }
        let random = || getrandom::u64().unwrap_or(u64::MAX);
        tokio::select! {
            () = sleep(backoff(attempt, random())) => attempt += 1,
            _ = source.switched() => {
                attempt = 0;
                sleep(backoff(attempt, random())).await;
            }
        }
    }
}

/// Makes a session and serves it until it breaks. Says why.
async fn hold(context: &Context, target: &Target, attempt: &mut u32) -> String {
    match connect(context, target).await {
        Ok(connections) => {
            *attempt = 0;
            serve(context, connections).await
        }
        Err(error) => error.to_string(),
    }
}

/// The wait before a reconnect: a random part of a span that doubles, so that a fleet does not come back at once.
pub(super) fn backoff(attempt: u32, random: u64) -> Duration {
    let most =
        BACKOFF_LEAST_MILLIS.saturating_mul(1u64.checked_shl(attempt).unwrap_or(u64::MAX)).min(BACKOFF_MOST_MILLIS);
    Duration::from_millis(random % (most + 1))
}

/// A session's connections.
struct Connections {
    commands: Commands,
    pubsub: MultiplexedConnection,
    pushes: mpsc::Receiver<PushInfo>,
    inbox: Arc<Inbox>,
    /// Told when the pub/sub connection closes.
    lost: Arc<Notify>,
}

async fn connect(context: &Context, target: &Target) -> Result<Connections, BackboneError> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(Duration::from_millis(BACKBONE_CONNECT_MILLIS)))
        .set_response_timeout(Some(Duration::from_millis(PUBLISH_MILLIS)))
        .set_pipeline_buffer_size(BACKBONE_COMMANDS);
    let unanswered = |error: RedisError| failure(&error);
    let connection = target.client.get_multiplexed_async_connection_with_config(&config).await.map_err(unanswered)?;
    let (keys, history) = (context.keys.clone(), context.history.clone());
    let commands = Commands::prepare(connection, target.primary, keys, history).await?;
    let (inbox, pushes) = Inbox::new(BACKBONE_QUEUE);
    let lost = Arc::new(Notify::new());
    let (closed, filled) = (lost.clone(), inbox.clone());
    let config = config.set_push_sender(move |push: PushInfo| {
        match push.kind {
            PushKind::Message => filled.push(push),
            PushKind::Disconnection => closed.notify_one(),
            _ => {}
        }
        Ok::<(), Infallible>(())
    });
    let mut pubsub = target.client.get_multiplexed_async_connection_with_config(&config).await.map_err(unanswered)?;
    pubsub.subscribe(&context.beats).await.map_err(unanswered)?;
    Ok(Connections { commands, pubsub, pushes, inbox, lost })
}

/// Serves a session until it breaks, and says why.
async fn serve(context: &Context, connections: Connections) -> String {
    let Connections { commands, pubsub, pushes, inbox, lost } = connections;
    let (subscriptions, changes) = mpsc::unbounded_channel();
    context.beat.store((context.clock)(), Ordering::Relaxed);
    let left = *context.left.borrow();
    let link = Link { commands: commands.clone(), subscriptions, pushes, inbox, left };
    if context.outcomes.send(Outcome::Up(link)).is_err() {
        return "the node is stopping".into();
    }
    tokio::select! {
        () = lost.notified() => "the pub/sub connection closed".into(),
        reason = watch(context, commands) => reason,
        reason = change_subscriptions(context, pubsub, changes) => reason,
    }
}

/// Publishes to itself and watches that it comes back: a connection that is open but delivers nothing must be noticed.
async fn watch(context: &Context, mut commands: Commands) -> String {
    let mut ticks = interval(Duration::from_millis(HEARTBEAT_MILLIS));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now = (context.clock)();
        let silent = Duration::from_micros(now.saturating_sub(context.beat.load(Ordering::Relaxed)));
        if silent > STALE {
            return format!("nothing came back over pub/sub for {} ms", silent.as_millis());
        }
        match timeout(STALE, commands.beat(&context.beats[0], now)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error.to_string(),
            Err(_) => return format!("a command was not answered within {HEARTBEAT_STALE_MILLIS} ms"),
        }
    }
}

async fn change_subscriptions(
    context: &Context,
    mut pubsub: MultiplexedConnection,
    mut changes: mpsc::UnboundedReceiver<SubscriptionChange>,
) -> String {
    let topics = |channels: &[Arc<str>]| channels.iter().map(|name| context.keys.topic(name)).collect::<Vec<_>>();
    while let Some(change) = changes.recv().await {
        let done = match change {
            SubscriptionChange::Subscribe(ticket, channels) => {
                let subscribed = pubsub.subscribe(topics(&channels)).await;
                if subscribed.is_ok() {
                    let _ = context.outcomes.send(Outcome::Event(BackboneEvent::Subscribed(ticket)));
                }
                subscribed
            }
            SubscriptionChange::Unsubscribe(channels) => pubsub.unsubscribe(topics(&channels)).await,
        };
        if let Err(error) = done {
            return failure(&error).to_string();
        }
    }
    "the node is stopping".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_grows_to_its_bound_and_is_random() {
        assert_eq!(backoff(0, 0), Duration::ZERO);
        assert_eq!(backoff(0, BACKOFF_LEAST_MILLIS), Duration::from_millis(BACKOFF_LEAST_MILLIS));
        assert_eq!(backoff(1, 2 * BACKOFF_LEAST_MILLIS), Duration::from_millis(2 * BACKOFF_LEAST_MILLIS));
        for attempt in [10, 63, 64, 1_000] {
            assert_eq!(backoff(attempt, BACKOFF_MOST_MILLIS), Duration::from_millis(BACKOFF_MOST_MILLIS));
        }
    }
}
