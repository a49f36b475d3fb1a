//! What the service manager is told (sd_notify(3)): that the node is ready, what it is doing, and that it is alive. Without
//! a service manager nothing is told to anybody.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// Talks to the service manager.
#[derive(Debug)]
pub struct Notifier {
    /// Half of what the unit's `WatchdogSec` allows between two signs of life.
    interval: Option<Duration>,
    fed: Instant,
    /// What each thread had done when it was last fed.
    progress: Vec<u64>,
    status: String,
}

impl Notifier {
    /// Reads from the environment what the service manager wants to hear.
    #[must_use]
    pub fn new() -> Self {
        Self::every(sd_notify::watchdog_enabled().map(|most| most / 2))
    }

    fn every(interval: Option<Duration>) -> Self {
        Self { interval, fed: Instant::now(), progress: Vec::new(), status: String::new() }
    }

    /// The node serves.
    pub fn ready(&mut self) {
        tell(&[NotifyState::Ready]);
    }

    /// The configuration is read again; [`Notifier::ready`] says when that is done.
    pub fn reloading(&self) {
        // Both belong together (Type=notify-reload); without the time the manager cannot tell an old word from a new one.
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            tell(&[NotifyState::Reloading, now]);
        }
    }

    /// The node ends.
    pub fn stopping(&self) {
        tell(&[NotifyState::Stopping]);
    }

    /// Another process serves in this one's place: it is the service from now on.
    pub fn succeeded_by(&self, pid: u32) {
        tell(&[NotifyState::MainPid(pid)]);
    }

    /// What `systemctl status` shows; told when it changed.
    pub fn status(&mut self, status: String) {
        if status != self.status {
            tell(&[NotifyState::Status(&status)]);
            self.status = status;
        }
    }

    /// Gives a sign of life when it is time for one and every thread has done something since the last: `progress` has a
    /// number for each that grows with its work. So a service manager restarts a node of which one shard is wedged, though
    /// its main thread is well. Returns whether a sign was given.
    pub fn feed(&mut self, progress: Vec<u64>, now: Instant) -> bool {
        let Some(interval) = self.interval else { return false };
        let stuck = progress.len() == self.progress.len()
            && progress.iter().zip(&self.progress).any(|(now, before)| now == before);
        if now.duration_since(self.fed) < interval || stuck {
            return false;
        }
        tell(&[NotifyState::Watchdog]);
        (self.fed, self.progress) = (now, progress);
        true
    }

    /// How soon [`Notifier::feed`] is to be called again.
    #[must_use]
    pub fn next_look(&self) -> Option<Duration> {
        // Several times an interval: who is found stuck at one look may only have been slow.
        Some(self.interval? / 4)
    }
}

impl Default for Notifier {
    fn default() -> Self {
        Self::new()
    }
}

fn tell(what: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(what) {
        tracing::debug!(%error, "the service manager was not told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wedged_thread_starves_the_watchdog() {
        let second = Duration::from_secs(1);
        let mut notifier = Notifier::every(Some(second));
        let begun = Instant::now();
        let mut feed = |seconds, progress: [u64; 3]| notifier.feed(progress.to_vec(), begun + second * seconds);
        assert!(!feed(0, [1, 1, 1]), "too early");
        assert!(feed(2, [2, 2, 2]));
        assert!(feed(4, [3, 3, 3]));
        assert!(!feed(6, [4, 3, 4]), "the second one has done nothing");
        assert!(!feed(9, [5, 3, 5]));
        assert!(feed(10, [6, 4, 6]), "it was only slow");
    }

    #[test]
    fn without_a_watchdog_nothing_is_fed() {
        let mut notifier = Notifier::every(None);
        assert!(!notifier.feed(vec![1], Instant::now() + Duration::from_secs(9)) && notifier.next_look().is_none());
    }
}
