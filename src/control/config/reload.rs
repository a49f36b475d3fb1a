//! A configuration read again while the node runs: what changes at once, and what waits for a restart.

use serde::Serialize;

use super::keys::{Draft, KEYS};
use super::{ConfigErrors, Loaded, relations};
use crate::settings::Settings;

/// A key whose value is another one now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The key.
    pub key: &'static str,
    /// Its value so far, as TOML; a password is not shown.
    pub from: String,
    /// Its new value.
    pub to: String,
}

/// What a reload comes to.
#[derive(Debug, Clone, PartialEq)]
pub struct Reload {
    /// The settings from now on: the running ones with every live key's new value.
    pub settings: Settings,
    /// What changed at once.
    pub live: Vec<Change>,
    /// What a restart would change.
    pub restart: Vec<Change>,
}

/// Compares a configuration that was read again with the one in force.
///
/// # Errors
/// When a new value and one that stays until a restart cannot be together, such as a lag bound that goes with a longer history:
/// nothing is changed then.
pub fn reload(running: &Settings, next: &Loaded) -> Result<Reload, ConfigErrors> {
    let mut draft = Draft::from(running);
    let mut wanted = Draft::from(&next.settings);
    let (mut live, mut restart) = (Vec::new(), Vec::new());
    // What a key's value would be, for keys that keep the one they have.
    let mut scratch = draft.clone();
    for key in KEYS {
        let from = (key.place)(&mut draft).show();
        if (key.place)(&mut scratch).take((key.place)(&mut wanted)) {
            let change = Change { key: key.name, from, to: (key.place)(&mut wanted).show() };
            if key.live {
                (key.place)(&mut draft).take((key.place)(&mut wanted));
                live.push(change);
            } else {
                restart.push(change);
            }
        }
    }
    let errors = relations::broken(&mut draft, &next.origins, |_| false);
    if errors.is_empty() { Ok(Reload { settings: draft.finish(), live, restart }) } else { Err(ConfigErrors(errors)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::config::{Overrides, load};

    fn loaded(pairs: &[(&str, &str)]) -> Loaded {
        let mut overrides = Overrides::default();
        for (key, value) in pairs {
            overrides.set("--set", *key, *value);
        }
        load(None, std::iter::empty(), &overrides).expect("a valid configuration")
    }

    fn keys(changes: &[Change]) -> Vec<&str> {
        changes.iter().map(|change| change.key).collect()
    }

    /// Another allowed value for each key, in the order of the table.
    const OTHERS: &[(&str, &str)] = &[
        ("listen", "127.0.0.1:1"),
        ("shards", "3"),
        ("pin", "false"),
        ("driver", "epoll"),
        ("max_connections", "9"),
        ("linger", "9s"),
        ("allow_origins", "https://a.example"),
        ("redis.url", "redis://h"),
        ("redis.prefix", "x:"),
        ("history.messages", "2000"),
        ("history.bytes", "8MiB"),
        ("history.age", "9m"),
        ("lag.messages", "9"),
        ("lag.bytes", "2MiB"),
        ("lag.age", "9s"),
        ("sse.heartbeat", "9s"),
        ("sse.retry", "9s"),
        ("websocket.ping", "26s"),
        ("websocket.pong", "9s"),
        ("websocket.client_publish", "true"),
        ("websocket.message_bytes", "9KiB"),
        ("poll.wait", "9s"),
        ("poll.max_age", "9s"),
        ("limits.channels", "9"),
        ("limits.publication_bytes", "9KiB"),
        ("limits.body_bytes", "2MiB"),
        ("limits.head_time", "9s"),
        ("limits.body_time", "9s"),
        ("limits.keep_alive", "9s"),
        ("drain.unready", "9s"),
        ("drain.window", "9s"),
        ("admin.listen", "off"),
        ("log.filter", "debug"),
        ("log.format", "json"),
    ];

    #[test]
    fn every_key_is_found_when_it_changes_and_only_live_ones_change() {
        assert_eq!(
            OTHERS.iter().map(|(key, _)| *key).collect::<Vec<_>>(),
            KEYS.iter().map(|k| k.name).collect::<Vec<_>>()
        );
        // The prefix is only kept together with a URL.
        let base = loaded(&[("redis.url", "redis://base")]);
        for ((name, value), key) in OTHERS.iter().zip(KEYS) {
            let next = loaded(&[("redis.url", "redis://base"), (name, value)]);
            let reload = reload(&base.settings, &next).unwrap_or_else(|errors| panic!("{name}: {errors}"));
            assert_eq!(keys(if key.live { &reload.live } else { &reload.restart }), [*name]);
            assert!(if key.live { reload.restart.is_empty() } else { reload.live.is_empty() }, "{name}");
            let now = if key.live { &next.settings } else { &base.settings };
            assert_eq!(&reload.settings, now, "{name}");
        }
    }

    #[test]
    fn nothing_changes_when_nothing_was_changed() {
        let base = loaded(&[("lag.age", "7s")]);
        let reload = reload(&base.settings, &base).expect("the same");
        assert_eq!((&reload.settings, reload.live.len(), reload.restart.len()), (&base.settings, 0, 0));
    }

    #[test]
    fn a_lag_bound_that_goes_with_a_longer_history_is_refused_with_the_reason() {
        let next = loaded(&[("history.messages", "5000"), ("lag.messages", "4000")]);
        let errors = reload(&loaded(&[]).settings, &next).expect_err("the log is as short as before").to_string();
        assert!(
            errors.contains("lag.messages = 4000 (--set)") && errors.contains("history.messages = 1024"),
            "{errors}"
        );
    }

    #[test]
    fn a_changed_password_is_a_change_and_is_not_shown() {
        let (old, new) = (loaded(&[("redis.url", "redis://:one@h")]), loaded(&[("redis.url", "redis://:two@h")]));
        let reload = reload(&old.settings, &new).expect("allowed");
        assert_eq!(keys(&reload.restart), ["redis.url"]);
        assert!(!format!("{:?}", reload.restart).contains("two"), "{:?}", reload.restart);
    }
}
