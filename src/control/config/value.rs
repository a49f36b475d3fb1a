//! One value of the configuration: where it is stored, how it is read from text or TOML, what is allowed and how it is shown.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use toml::de::DeValue;

use crate::settings::{DriverChoice, LogFormat};

/// A value as it was given.
#[derive(Clone, Copy)]
pub(super) enum Raw<'a> {
    /// In the environment or on the command line.
    Text(&'a str),
    /// In a file.
    Toml(&'a DeValue<'a>),
}

/// Where one key's value is stored, with the values it may have.
pub(super) enum Place<'a> {
    /// An IP address and a port.
    Address(&'a mut SocketAddr),
    /// A whole number.
    Count(&'a mut dyn Whole, RangeInclusive<u64>),
    /// A number of bytes.
    Size(&'a mut dyn Whole, RangeInclusive<u64>),
    /// A duration, between two numbers of milliseconds.
    Time(&'a mut Duration, RangeInclusive<u64>),
    /// True or false.
    Switch(&'a mut bool),
    /// One of some words.
    Word(&'a mut dyn Word),
    /// A text with a rule of its own.
    Text(&'a mut String, &'static Rule),
    /// A list of texts with a rule of their own.
    List(&'a mut Vec<String>, &'static Rule),
}

/// What a text must look like.
pub(super) struct Rule {
    /// The rule in words.
    pub allowed: &'static str,
    /// Whether a text keeps it.
    pub check: fn(&str) -> bool,
    /// What may be shown of a text: without secrets.
    pub show: fn(&str) -> String,
}

/// A whole number of any width.
pub(super) trait Whole {
    fn value(&self) -> u64;
    fn set(&mut self, value: u64);
}

impl Whole for u64 {
    fn value(&self) -> u64 {
        *self
    }
    fn set(&mut self, value: u64) {
        *self = value;
    }
}

impl Whole for usize {
    fn value(&self) -> u64 {
        *self as u64
    }
    fn set(&mut self, value: u64) {
        // Every range in the table is far below 2^32.
        *self = value as usize;
    }
}

/// One of a closed list of words.
pub(super) trait Word {
    fn words(&self) -> &'static [&'static str];
    fn index(&self) -> usize;
    fn choose(&mut self, index: usize);
}

impl Word for DriverChoice {
    fn words(&self) -> &'static [&'static str] {
        &["auto", "uring", "epoll"]
    }
    fn index(&self) -> usize {
        *self as usize
    }
    fn choose(&mut self, index: usize) {
        *self = [Self::Auto, Self::Uring, Self::Epoll][index];
    }
}

impl Word for LogFormat {
    fn words(&self) -> &'static [&'static str] {
        &["text", "json"]
    }
    fn index(&self) -> usize {
        *self as usize
    }
    fn choose(&mut self, index: usize) {
        *self = [Self::Text, Self::Json][index];
    }
}

impl Place<'_> {
    /// Takes the value of the same key's place in other settings; says whether it is another one.
    ///
    /// # Panics
    /// When the places are not of one key.
    pub fn take(&mut self, other: Place<'_>) -> bool {
        fn replace<T: PartialEq + Clone>(old: &mut T, new: &T) -> bool {
            let differs = old != new;
            old.clone_from(new);
            differs
        }
        match (self, other) {
            (Self::Address(old), Place::Address(new)) => replace(*old, new),
            (Self::Count(old, _) | Self::Size(old, _), Place::Count(new, _) | Place::Size(new, _)) => {
                let differs = old.value() != new.value();
                old.set(new.value());
                differs
            }
            (Self::Time(old, _), Place::Time(new, _)) => replace(*old, new),
            (Self::Switch(old), Place::Switch(new)) => replace(*old, new),
            (Self::Word(old), Place::Word(new)) => {
                let differs = old.index() != new.index();
                old.choose(new.index());
                differs
            }
            (Self::Text(old, _), Place::Text(new, _)) => replace(*old, new),
            (Self::List(old, _), Place::List(new, _)) => replace(*old, new),
            _ => unreachable!("both places are of one key"),
        }
    }

    /// Stores a value, or leaves the old one and returns `None` when it is not [`Place::allowed`].
    pub fn store(&mut self, raw: Raw<'_>) -> Option<()> {
        if let Self::List(list, rule) = self {
            let items = list_of(raw)?;
            if !items.iter().all(|item| (rule.check)(item)) {
                return None;
            }
            **list = items;
            return Some(());
        }
        let text = self.text_of(raw)?;
        match self {
            Self::Address(address) => **address = text.parse().ok()?,
            Self::Count(number, range) => number.set(whole(&text).filter(|value| range.contains(value))?),
            Self::Size(number, range) => number.set(parse_size(&text).filter(|value| range.contains(value))?),
            Self::Time(time, range) => {
                **time = Duration::from_millis(parse_millis(&text).filter(|value| range.contains(value))?);
            }
            Self::Switch(switch) => **switch = text.parse().ok()?,
            Self::Word(word) => {
                let index = word.words().iter().position(|known| *known == text)?;
                word.choose(index);
            }
            Self::Text(value, rule) => {
                if !(rule.check)(&text) {
                    return None;
                }
                **value = text.into_owned();
            }
            Self::List(..) => unreachable!("handled above"),
        }
        Some(())
    }

    /// The text of a value, when TOML gave it the type this place has.
    fn text_of<'a>(&self, raw: Raw<'a>) -> Option<Cow<'a, str>> {
        let value = match raw {
            Raw::Text(text) => return Some(Cow::Borrowed(text.trim())),
            Raw::Toml(value) => value,
        };
        match (self, value) {
            (Self::Count(..) | Self::Size(..), DeValue::Integer(number)) => {
                let value = i64::from_str_radix(number.as_str(), number.radix()).ok()?;
                Some(Cow::Owned(value.to_string()))
            }
            (Self::Switch(_), DeValue::Boolean(value)) => Some(Cow::Borrowed(if *value { "true" } else { "false" })),
            (Self::Count(..) | Self::Switch(_), _) => None,
            (_, DeValue::String(text)) => Some(Cow::Borrowed(text)),
            _ => None,
        }
    }

    /// Which values are allowed, in words that fit after "allowed: ".
    pub fn allowed(&self) -> String {
        match self {
            Self::Address(_) => "an IP address and a port, such as 0.0.0.0:8080 or [::]:8080".into(),
            Self::Count(_, range) => format!("a whole number from {} to {}", range.start(), range.end()),
            Self::Size(_, range) => {
                format!(
                    "bytes from {} to {}, as a number or with KiB, MiB or GiB",
                    size(*range.start()),
                    size(*range.end())
                )
            }
            Self::Time(_, range) => {
                let (least, most) = (millis(*range.start()), millis(*range.end()));
                format!("a duration from {least} to {most}: a whole number and one of ms, s, m, h, d")
            }
            Self::Switch(_) => "true or false".into(),
            Self::Word(word) => {
                let (last, rest) = word.words().split_last().expect("a closed list has words");
                format!("{} or {last}", rest.join(", "))
            }
            Self::Text(_, rule) => rule.allowed.into(),
            Self::List(_, rule) => format!("a list (separated by commas outside the file) of {}", rule.allowed),
        }
    }

    /// The value as TOML, without secrets.
    pub fn show(&self) -> String {
        match self {
            Self::Address(address) => quote(&address.to_string()),
            Self::Count(number, _) => number.value().to_string(),
            Self::Size(number, _) => quote(&size(number.value())),
            Self::Time(time, _) => quote(&millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))),
            Self::Switch(switch) => switch.to_string(),
            Self::Word(word) => quote(word.words()[word.index()]),
            Self::Text(text, rule) => quote(&(rule.show)(text)),
            Self::List(list, rule) => {
                let items: Vec<_> = list.iter().map(|item| quote(&(rule.show)(item))).collect();
                format!("[{}]", items.join(", "))
            }
        }
    }

    /// A value that was refused, as its source wrote it but without secrets.
    pub fn show_given(&self, written: &str) -> String {
        match self {
            Self::Text(_, rule) => (rule.show)(written),
            _ => written.into(),
        }
    }
}

fn list_of(raw: Raw<'_>) -> Option<Vec<String>> {
    match raw {
        Raw::Text(text) => {
            Some(text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(String::from).collect())
        }
        Raw::Toml(DeValue::Array(items)) => {
            items.iter().map(|item| item.get_ref().as_str().map(String::from)).collect()
        }
        Raw::Toml(_) => None,
    }
}

/// A TOML basic string.
pub(super) fn quote(text: &str) -> String {
    toml::Value::String(text.into()).to_string()
}

/// Digits alone: no sign, which `u64::from_str` would take.
fn whole(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Units of a duration with their milliseconds, largest first.
const TIME_UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];
/// Units of a size with their bytes, largest first.
const SIZE_UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

fn parse_unit(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    whole(number)?.checked_mul(*factor)
}

/// Milliseconds of a duration such as `25s`, `500ms` or `5m`.
fn parse_millis(text: &str) -> Option<u64> {
    parse_unit(text, &TIME_UNITS)
}

/// Bytes of a size such as `65536` or `64KiB`.
fn parse_size(text: &str) -> Option<u64> {
    whole(text).filter(|_| !text.is_empty()).or_else(|| parse_unit(text, &SIZE_UNITS))
}

fn with_unit(value: u64, units: &[(&str, u64)]) -> Option<String> {
    let (name, factor) = units.iter().find(|(_, factor)| value != 0 && value.is_multiple_of(*factor))?;
    Some(format!("{}{name}", value / factor))
}

fn millis(value: u64) -> String {
    with_unit(value, &TIME_UNITS).unwrap_or_else(|| "0s".into())
}

fn size(value: u64) -> String {
    with_unit(value, &SIZE_UNITS).unwrap_or_else(|| "0B".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_back_as_they_are_shown() {
        for (text, expected) in [("500ms", 500), ("25s", 25_000), ("5m", 300_000), ("90s", 90_000), ("7d", 604_800_000)]
        {
            assert_eq!(parse_millis(text), Some(expected), "{text}");
            assert_eq!(parse_millis(&millis(expected)), Some(expected), "{text}");
        }
        for text in ["", "s", "5", "1.5s", "-1s", "+1s", "5 minutes", "5S", "99999999999999999999s", "300000000000d"] {
            assert_eq!(parse_millis(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_read_back_as_they_are_shown() {
        for (text, expected) in [("65536", 65_536), ("64KiB", 65_536), ("64 KiB", 65_536), ("1MiB", 1 << 20), ("7B", 7)]
        {
            assert_eq!(parse_size(text), Some(expected), "{text}");
            assert_eq!(parse_size(&size(expected)), Some(expected), "{text}");
        }
        for text in ["", "KiB", "64KB", "64k", "1.5MiB", "-1", "+1", "99999999999GiB"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn words_and_their_variants_agree() {
        let mut driver = DriverChoice::Auto;
        for (word, expected) in
            [("uring", DriverChoice::Uring), ("epoll", DriverChoice::Epoll), ("auto", DriverChoice::Auto)]
        {
            Place::Word(&mut driver).store(Raw::Text(word)).expect("a known word");
            assert_eq!(driver, expected);
            assert_eq!(Place::Word(&mut driver).show(), format!("\"{word}\""));
        }
        assert!(Place::Word(&mut driver).store(Raw::Text("Uring")).is_none());
        assert_eq!(Place::Word(&mut driver).allowed(), "auto, uring or epoll");
    }
}
