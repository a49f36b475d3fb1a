use std::collections::HashSet;
use std::time::Duration;

use super::*;
use crate::settings::{DriverChoice, LogFormat, RedisConfig};

fn of_toml(text: &str) -> Result<Loaded, ConfigErrors> {
    let mut loader = Loader::new();
    loader.read_toml("weir.toml", text);
    loader.finish()
}

fn of_variables(variables: &[(&str, &str)]) -> Result<Loaded, ConfigErrors> {
    load(None, variables.iter().map(|(name, value)| ((*name).into(), (*value).into())), &Overrides::default())
}

fn texts(result: Result<Loaded, ConfigErrors>) -> Vec<String> {
    result.expect_err("must be refused").0.iter().map(ToString::to_string).collect()
}

#[test]
fn nothing_gives_the_defaults() {
    let loaded = load(None, std::iter::empty(), &Overrides::default()).expect("the defaults are valid");
    assert_eq!(loaded.settings, Settings::default());
}

#[test]
fn the_example_names_every_key_with_its_default() {
    let file = include_str!("../../../weir.example.toml");
    assert_eq!(file, example(), "write it again: weir check --example > weir.example.toml");
    let loaded = of_toml(file).expect("the example is valid");
    assert_eq!(loaded.settings, Settings::default());
    assert_eq!(loaded.origins.len(), KEYS.len(), "the example sets every key");
}

#[test]
fn keys_and_variables_have_one_name_each() {
    let names: HashSet<_> = KEYS.iter().map(|key| key.name).collect();
    let variables: HashSet<_> = KEYS.iter().map(Key::variable).collect();
    assert_eq!((names.len(), variables.len()), (KEYS.len(), KEYS.len()));
    for key in KEYS {
        let reserved = key.variable().split('_').any(|word| word == "PORT" || word == "SERVICE");
        assert!(!reserved && key.variable() != "WEIR_CONFIG", "{}: a variable that is ignored", key.name);
    }
}

/// Sets every key to something that is allowed and is not its default; a setting that was added without a key shows in the
/// count.
#[test]
fn every_setting_has_a_key_that_reaches_it() {
    let default = Settings::default();
    for key in KEYS {
        let value = match key.name {
            "listen" => "[::1]:9",
            "shards" | "max_connections" | "limits.channels" => "7",
            "pin" => "false",
            "driver" => "epoll",
            "allow_origins" => "https://a.example, https://b.example",
            "redis.url" => "redis://h:1",
            "redis.prefix" => "other:",
            "history.messages" => "2000",
            "lag.messages" => "99",
            "history.bytes" => "8MiB",
            "lag.bytes" => "2MiB",
            "limits.body_bytes" | "websocket.message_bytes" => "100000",
            "limits.publication_bytes" => "1KiB",
            "websocket.client_publish" => "true",
            "log.filter" => "weir=debug",
            "log.format" => "json",
            "admin.listen" => "unix:/run/other.sock",
            "history.age" => "20s",
            _ => "9s",
        };
        let mut flags = Overrides::default();
        flags.set("--set", key.name, value);
        if key.name == "redis.prefix" {
            flags.set("--set", "redis.url", "redis://h:1");
        }
        if key.name == "websocket.ping" {
            flags.set("--set", "websocket.pong", "8s");
        }
        let loaded = load(None, std::iter::empty(), &flags).unwrap_or_else(|error| panic!("{}: {error}", key.name));
        assert_ne!(loaded.settings, default, "{} reaches nothing", key.name);
        let again = of_toml(&loaded.to_toml()).expect("what check prints can be loaded");
        assert_eq!(again.settings, loaded.settings, "{} is lost when printed", key.name);
    }
    let leaves = leaves_of(&format!("{:?}", Draft::from(&Settings::default())));
    assert_eq!(leaves, KEYS.len(), "a setting without a key, or two keys for one");
}

/// Counts the values of a debug text that are not structs: each `name: value` whose value has no fields of its own.
/// `settings.redis` is `None` there and stands for the draft's own table.
fn leaves_of(debug: &str) -> usize {
    let fields = debug.match_indices(": ").filter(|(at, _)| {
        debug[..*at].chars().next_back().is_some_and(|letter| letter.is_ascii_lowercase() || letter == '_')
    });
    let leaves = fields.filter(|(at, _)| {
        let value = &debug[at + 2..];
        let word: String = value.chars().take_while(char::is_ascii_alphanumeric).collect();
        !value[word.len()..].starts_with(" {") && word != "None"
    });
    leaves.count()
}

#[test]
fn a_later_source_wins() {
    let dir = std::env::temp_dir().join(format!("weir-config-{}", std::process::id()));
    std::fs::write(&dir, "shards = 1\n[websocket]\nping = '30s'\npong = '5s'\n").expect("a temporary file");
    let variables = [("WEIR_SHARDS", "2"), ("WEIR_WEBSOCKET_PING", "40s"), ("PATH", "/bin")];
    let mut flags = Overrides::default();
    flags.set("--shards", "shards", "3");
    flags.set("--set", "shards", "4");
    let loaded = load(Some(&dir), variables.iter().map(|(n, v)| ((*n).into(), (*v).into())), &flags);
    let _ = std::fs::remove_file(&dir);
    let loaded = loaded.expect("all of it is valid");
    assert_eq!(loaded.settings.shards, 4);
    assert_eq!(loaded.settings.websocket.ping, Duration::from_secs(40));
    assert_eq!(loaded.settings.websocket.pong, Duration::from_secs(5));
    let shown = loaded.to_toml();
    assert!(shown.contains("shards = 4 # --set\n"), "{shown}");
    assert!(shown.contains("ping = \"40s\" # environment WEIR_WEBSOCKET_PING\n"), "{shown}");
    assert!(shown.contains(&format!("pong = \"5s\" # {}:4\n", dir.display())), "{shown}");
}

#[test]
fn values_are_typed() {
    let loaded = of_toml(
        "listen = '[::]:80'\nshards = 0x10\npin = false\ndriver = 'uring'\nallow_origins = ['https://a.example']\n\
         redis = { url = 'unix:///run/redis.sock', prefix = 'w:' }\nlog.format = 'json'\n\
         [history]\nbytes = 5_000_000\n[lag]\nbytes = '256KiB'\n[limits]\n",
    )
    .expect("all of it is valid");
    let settings = loaded.settings;
    assert_eq!(settings.listen.port(), 80);
    assert_eq!((settings.shards, settings.pin, settings.driver), (16, false, DriverChoice::Uring));
    assert_eq!(settings.allow_origins, ["https://a.example"]);
    assert_eq!(settings.redis, Some(RedisConfig { url: "unix:///run/redis.sock".into(), prefix: "w:".into() }));
    assert_eq!((settings.history.bytes, settings.lag.bytes), (5_000_000, 262_144));
    assert_eq!(settings.log.format, LogFormat::Json);
}

#[test]
fn every_error_is_reported_with_its_line() {
    let errors = texts(of_toml(
        "listen = 'localhost:80'\nshards = '4'\nbogus = 1\npin = 1\n\n[websocket]\nping = 25\npong = '2h'\npin = true\n\
         [lag]\nage = 'soon'\n[empty]\n",
    ));
    let expected = [
        "weir.toml:1: listen = 'localhost:80' is not allowed; allowed: an IP address and a port, such as 0.0.0.0:8080 or \
         [::]:8080",
        "weir.toml:2: shards = '4' is not allowed; allowed: a whole number from 0 to 512",
        "weir.toml:3: unknown key bogus; `weir check --example` prints all keys",
        "weir.toml:4: pin = 1 is not allowed; allowed: true or false",
        "weir.toml:7: websocket.ping = 25 is not allowed; allowed: a duration from 1s to 1h: a whole number and one of ms, \
         s, m, h, d",
        "weir.toml:8: websocket.pong = '2h' is not allowed; allowed: a duration from 1s to 1h: a whole number and one of \
         ms, s, m, h, d",
        "weir.toml:9: unknown key websocket.pin; the nearest is pin",
        "weir.toml:11: lag.age = 'soon' is not allowed; allowed: a duration from 100ms to 7d: a whole number and one of \
         ms, s, m, h, d",
        "weir.toml:12: unknown key empty; `weir check --example` prints all keys",
    ];
    assert_eq!(errors, expected);
}

#[test]
fn unknown_names_suggest_the_nearest() {
    for (text, suggestion) in [
        ("lisen = 'x'", "the nearest is listen"),
        ("ping = '5s'", "the nearest is websocket.ping"),
        ("[websockets]\npong = '5s'", "the nearest is websocket.pong"),
        ("[limits]\npublication_byte = 1", "the nearest is limits.publication_bytes"),
        ("redis = 'redis://h'", "it is a table of redis.url, redis.prefix"),
    ] {
        let errors = texts(of_toml(text));
        assert!(errors.len() == 1 && errors[0].ends_with(suggestion), "{text}: {errors:?}");
    }
    let errors = texts(of_variables(&[("WEIR_REDIS_URI", "redis://h")]));
    assert_eq!(errors, ["environment WEIR_REDIS_URI: unknown key WEIR_REDIS_URI; the nearest is WEIR_REDIS_URL"]);
}

#[test]
fn variables_of_an_orchestrator_are_not_keys() {
    let loaded = of_variables(&[
        ("WEIR_PORT", "tcp://10.0.0.1:80"),
        ("WEIR_SERVICE_HOST", "10.0.0.1"),
        ("WEIR_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("WEIR_REDIS_SERVICE_PORT", "6379"),
        ("WEIR_CONFIG", "/etc/weir.toml"),
    ]);
    assert_eq!(loaded.expect("they are ignored").settings, Settings::default());
}

#[test]
fn syntax_errors_have_lines_and_hide_their_consequences() {
    let errors = texts(of_toml("shards = \n[lag]\nage = '10s\nbytes = 1\n"));
    assert!(errors.iter().all(|error| error.contains(": not TOML: ")), "{errors:?}");
    assert!(errors[0].starts_with("weir.toml:1: "), "{errors:?}");
    assert!(errors.iter().any(|error| error.starts_with("weir.toml:3: ")), "{errors:?}");
    let errors = texts(of_toml("shards = 1\nshards = 2\n"));
    assert!(errors.len() == 1 && errors[0].starts_with("weir.toml:2: not TOML: "), "{errors:?}");
}

#[test]
fn values_must_fit_together() {
    let errors = texts(of_variables(&[("WEIR_LAG_MESSAGES", "5000"), ("WEIR_WEBSOCKET_PONG", "26s")]));
    assert_eq!(
        errors,
        [
            "lag.messages = 5000 (environment WEIR_LAG_MESSAGES) must be at most history.messages = 1024 (the default): \
             whoever may lag must still be in the log",
            "websocket.pong = \"26s\" (environment WEIR_WEBSOCKET_PONG) must be at most websocket.ping = \"25s\" (the \
             default): a ping must be answered by the time the next is sent",
        ]
    );
    let errors = texts(of_variables(&[("WEIR_LAG_MESSAGES", "5000"), ("WEIR_HISTORY_MESSAGES", "many")]));
    assert_eq!(errors.len(), 1, "a refused value has no relations: {errors:?}");
}

#[test]
fn a_missing_file_is_named() {
    let errors = texts(load(Some(Path::new("/nonexistent/weir.toml")), std::iter::empty(), &Overrides::default()));
    assert!(errors.len() == 1 && errors[0].starts_with("/nonexistent/weir.toml: cannot be read: "), "{errors:?}");
}

#[test]
fn passwords_are_neither_printed_nor_complained_about() {
    let loaded = of_variables(&[("WEIR_REDIS_URL", "redis://u:hunter2@h:1")]).expect("a good URL");
    assert!(loaded.to_toml().contains("url = \"redis://u:***@h:1\""), "{}", loaded.to_toml());
    let errors = texts(of_variables(&[("WEIR_REDIS_URL", "rediss://u:hunter2@h:1")]));
    assert!(errors[0].contains("rediss://u:***@h:1") && !errors[0].contains("hunter2"), "{errors:?}");
    let errors = texts(of_toml("redis.url = 'http://u:hunter2@h'"));
    assert!(!errors[0].contains("hunter2"), "{errors:?}");
}

/// What a node would store in Redis and a later read could not give back, or `publish.lua` would refuse.
#[test]
fn a_history_that_the_backbone_cannot_keep_is_refused() {
    let errors = texts(of_variables(&[("WEIR_HISTORY_MESSAGES", "1000001"), ("WEIR_HISTORY_AGE", "8d")]));
    let expected = [
        "environment WEIR_HISTORY_AGE: history.age = 8d is not allowed; allowed: a duration from 100ms to 7d: a whole \
         number and one of ms, s, m, h, d",
        "environment WEIR_HISTORY_MESSAGES: history.messages = 1000001 is not allowed; allowed: a whole number from 1 to \
         1000000",
    ];
    assert_eq!(errors, expected);
}
