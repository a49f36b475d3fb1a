//! The configuration of a node: a TOML file, the environment and flags, each over the one before, checked as a whole. All
//! errors are reported, each with where the value came from and what is allowed.

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::handover::process::DESCRIPTOR_VARIABLE;
use crate::settings::Settings;

mod keys;
mod relations;
pub mod reload;
mod value;

use keys::{Draft, KEYS, Key};
use value::Raw;

/// Values given on the command line, in order: a later one wins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides(Vec<(Origin, String, String)>);

impl Overrides {
    /// Adds the value of a flag such as `--listen` for a key.
    pub fn set(&mut self, flag: &'static str, key: impl Into<String>, value: impl Into<String>) {
        self.0.push((Origin::Flag(flag), key.into(), value.into()));
    }
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// A line of the file.
    File {
        /// The file, as it was named.
        path: String,
        /// Line, from 1.
        line: usize,
    },
    /// A variable of the environment.
    Variable(String),
    /// A flag.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("the default"),
            Self::File { path, line } => write!(f, "{path}:{line}"),
            Self::Variable(name) => write!(f, "environment {name}"),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// One thing that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: cannot be read: {reason}")]
    Unreadable {
        /// The file.
        path: String,
        /// The system's reason.
        reason: String,
    },
    /// The file is not TOML.
    #[error("{origin}: not TOML: {reason}")]
    Syntax {
        /// Where.
        origin: Origin,
        /// The parser's reason.
        reason: String,
    },
    /// No such key.
    #[error("{origin}: unknown key {key}; {hint}")]
    UnknownKey {
        /// Where.
        origin: Origin,
        /// What was written.
        key: String,
        /// The nearest key, or how to see all.
        hint: String,
    },
    /// A value that the key cannot have.
    #[error("{origin}: {key} = {value} is not allowed; allowed: {allowed}")]
    BadValue {
        /// Where.
        origin: Origin,
        /// The key.
        key: &'static str,
        /// The value as it was written, without secrets.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// Two values that are allowed alone but not together.
    #[error(
        "{left} = {left_value} ({left_origin}) must be {relation} {right} = {right_value} ({right_origin}): {reason}"
    )]
    Relation {
        /// The key that is at fault, as far as one is.
        left: &'static str,
        /// Its value.
        left_value: String,
        /// Where that came from.
        left_origin: Origin,
        /// What it must be to the other.
        relation: &'static str,
        /// The other key.
        right: &'static str,
        /// Its value.
        right_value: String,
        /// Where that came from.
        right_origin: Origin,
        /// Why.
        reason: &'static str,
    },
}

/// Everything that is wrong with a configuration, in the order it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if index == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// A valid configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The settings.
    pub settings: Settings,
    origins: BTreeMap<&'static str, Origin>,
}

impl Loaded {
    /// Every key with its value and, unless it is the default, where that came from: TOML that gives the same settings when
    /// loaded, but for the Redis password, which is not shown.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let mut draft = Draft::from(&self.settings);
        write_tables(|out, key| {
            let (_, name) = key.split();
            let value = (key.place)(&mut draft).show();
            let _ = match self.origins.get(key.name) {
                Some(origin) => writeln!(out, "{name} = {value} # {origin}"),
                None => writeln!(out, "{name} = {value}"),
            };
        })
    }
}

/// The example file: every key with its meaning, what is allowed and its default.
#[must_use]
pub fn example() -> String {
    let mut draft = Draft::from(&Settings::default());
    let head = "# Every key of weir with its default. Each may also be set as WEIR_<TABLE>_<KEY> in the environment, or\n\
                # with --set table.key=value; the environment wins over this file and flags win over both.\n\
                # `weir check FILE` says what is wrong with a file. This one was written by `weir check --example`.\n\n";
    let mut first_of_table = None;
    let body = write_tables(|out, key| {
        let (table, name) = key.split();
        if first_of_table.replace(table) == Some(table) {
            out.push('\n');
        }
        let place = (key.place)(&mut draft);
        wrap(out, key.about);
        wrap(out, &format!("Allowed: {}.", place.allowed()));
        let _ = writeln!(out, "{name} = {}", place.show());
    });
    format!("{head}{body}")
}

/// The names of all keys with their meaning, for `--help`.
#[must_use]
pub fn help() -> String {
    let mut out = String::from("Keys for --set, with their defaults:\n");
    let mut draft = Draft::from(&Settings::default());
    for key in KEYS {
        let _ = writeln!(out, "  {} = {}", key.name, (key.place)(&mut draft).show());
    }
    out.push_str("`weir check --example` prints them all with their meaning and what is allowed.");
    out
}

/// Calls `write` for each key, below the head of its table.
fn write_tables(mut write: impl FnMut(&mut String, &Key)) -> String {
    let mut out = String::new();
    let mut open = "";
    for key in KEYS {
        let (table, _) = key.split();
        if table != open {
            let _ = writeln!(out, "\n[{table}]");
            open = table;
        }
        write(&mut out, key);
    }
    out
}

/// Columns of the example file.
const COLUMNS: usize = 110;

fn wrap(out: &mut String, text: &str) {
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > COLUMNS {
            let _ = writeln!(out, "{line}");
            line = String::from("#");
        }
        let _ = write!(line, " {word}");
    }
    let _ = writeln!(out, "{line}");
}

/// Reads a configuration: the file, then variables named `WEIR_…`, then flags; a later source wins.
///
/// # Errors
/// All that is wrong with it. A variable that names no key is an error too, except those that Kubernetes sets for a
/// service named weir (`WEIR_PORT…`, `WEIR_SERVICE_…`), `WEIR_CONFIG`, which names the file, and [`DESCRIPTOR_VARIABLE`].
pub fn load(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    flags: &Overrides,
) -> Result<Loaded, ConfigErrors> {
    let mut loader = Loader::new();
    if let Some(path) = file {
        loader.read_file(path);
    }
    let mut variables: Vec<_> = environment.filter(|(name, _)| name.starts_with("WEIR_")).collect();
    variables.sort_unstable();
    for (name, value) in &variables {
        loader.read_variable(name, value);
    }
    for (origin, key, value) in &flags.0 {
        match find(key) {
            Some(known) => loader.store(known, origin.clone(), Raw::Text(value), value),
            None => loader.unknown(origin.clone(), key, hint(key)),
        }
    }
    loader.finish()
}

struct Loader {
    draft: Draft,
    origins: BTreeMap<&'static str, Origin>,
    errors: Vec<ConfigError>,
}

impl Loader {
    fn new() -> Self {
        Self { draft: Draft::from(&Settings::default()), origins: BTreeMap::new(), errors: Vec::new() }
    }

    fn read_file(&mut self, path: &Path) {
        let name = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => self.read_toml(&name, &text),
            Err(error) => self.errors.push(ConfigError::Unreadable { path: name, reason: error.to_string() }),
        }
    }

    fn read_toml(&mut self, path: &str, text: &str) {
        let line_at = |at: usize| {
            let line = 1 + text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count();
            Origin::File { path: path.into(), line }
        };
        let (document, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            let origin = line_at(error.span().map_or(0, |span| span.start));
            self.errors.push(ConfigError::Syntax { origin, reason: error.message().into() });
        }
        // Values next to a syntax error are guesses: complaining about them would only hide what is wrong.
        if !errors.is_empty() {
            return;
        }
        let mut entries = Vec::new();
        flatten("", document.get_ref(), &mut entries);
        entries.sort_unstable_by_key(|entry| entry.at);
        for entry in entries {
            let origin = line_at(entry.at);
            let known = find(&entry.key).filter(|_| !entry.value.get_ref().is_table());
            match known {
                Some(key) => {
                    let span = entry.value.span();
                    self.store(key, origin, Raw::Toml(entry.value.get_ref()), &text[span]);
                }
                None => self.unknown(origin, &entry.key, hint(&entry.key)),
            }
        }
    }

    fn read_variable(&mut self, name: &str, value: &str) {
        let by_orchestrator = name.split('_').any(|word| word == "PORT" || word == "SERVICE");
        if name == "WEIR_CONFIG" || name == DESCRIPTOR_VARIABLE || by_orchestrator {
            return;
        }
        let origin = Origin::Variable(name.into());
        match KEYS.iter().find(|key| key.variable() == name) {
            Some(key) => self.store(key, origin, Raw::Text(value), value),
            None => {
                let nearest = nearest(name, Key::variable);
                self.unknown(origin, name, nearest.map_or_else(see_all, |near| format!("the nearest is {near}")));
            }
        }
    }

    fn store(&mut self, key: &Key, origin: Origin, raw: Raw<'_>, written: &str) {
        let mut place = (key.place)(&mut self.draft);
        if place.store(raw).is_none() {
            let (value, allowed) = (place.show_given(written), place.allowed());
            self.errors.push(ConfigError::BadValue { origin: origin.clone(), key: key.name, value, allowed });
        }
        self.origins.insert(key.name, origin);
    }

    fn unknown(&mut self, origin: Origin, key: &str, hint: String) {
        self.errors.push(ConfigError::UnknownKey { origin, key: key.into(), hint });
    }

    fn finish(mut self) -> Result<Loaded, ConfigErrors> {
        let refused =
            |key: &str| self.errors.iter().any(|e| matches!(e, ConfigError::BadValue { key: k, .. } if *k == key));
        let broken = relations::broken(&mut self.draft.clone(), &self.origins, refused);
        self.errors.extend(broken);
        if self.errors.is_empty() {
            Ok(Loaded { settings: self.draft.finish(), origins: self.origins })
        } else {
            Err(ConfigErrors(self.errors))
        }
    }
}

/// One key and value of a file.
struct Entry<'a> {
    key: String,
    at: usize,
    value: &'a Spanned<DeValue<'a>>,
}

/// Lists the values of a table and the tables in it. An empty table that is no known one is listed as a value.
fn flatten<'a>(prefix: &str, table: &'a DeTable<'a>, entries: &mut Vec<Entry<'a>>) {
    for (name, value) in table {
        let key = if prefix.is_empty() { name.get_ref().to_string() } else { format!("{prefix}.{}", name.get_ref()) };
        match value.get_ref() {
            DeValue::Table(inner) if !inner.is_empty() => flatten(&key, inner, entries),
            DeValue::Table(_) if KEYS.iter().any(|known| known.split().0 == key) => {}
            _ => entries.push(Entry { key, at: name.span().start, value }),
        }
    }
}

fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

fn see_all() -> String {
    "`weir check --example` prints all keys".into()
}

/// What was probably meant by a key that does not exist.
fn hint(given: &str) -> String {
    let inside: Vec<_> = KEYS.iter().filter(|key| key.split().0 == given).map(|key| key.name).collect();
    if !inside.is_empty() {
        return format!("it is a table of {}", inside.join(", "));
    }
    let (_, last) = given.rsplit_once('.').unwrap_or(("", given));
    let same_name: Vec<_> = KEYS.iter().filter(|key| key.split().1 == last).map(|key| key.name).collect();
    if let [only] = same_name[..] {
        return format!("the nearest is {only}");
    }
    nearest(given, |key| key.name.into()).map_or_else(see_all, |near| format!("the nearest is {near}"))
}

/// The name that is at most a third of its letters away from what was given.
fn nearest(given: &str, name: impl Fn(&Key) -> String) -> Option<String> {
    let distance = |name: &String| strsim::osa_distance(name, given);
    let best = KEYS.iter().map(name).min_by_key(distance)?;
    (distance(&best) * 3 <= best.len()).then_some(best)
}

#[cfg(test)]
mod tests;
