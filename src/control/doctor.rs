//! `weir doctor`: checks the host and Redis against what a configuration needs, and says how to mend what is wrong.
//!
//! Each check is a pure judge: facts in, a [`Finding`] out. [`facts`] collects those of the host, and
//! [`crate::backbone::redis::examine`] those of Redis. Nothing is changed on the host; on Redis the publishing step is loaded, as
//! any node that starts would do, and a channel that nobody else can name is published to and deleted.

pub mod facts;
mod host;
mod memory;
mod network;
mod redis;

use std::fmt::Write as _;

use serde::Serialize;

use self::facts::Host;
use crate::backbone::redis::examine::examine;
use crate::settings::Settings;

/// How a check came out. The order is that of gravity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// The node runs, with less than it could have or at a risk that is said.
    Warn,
    /// The node does not start, or does not do what it is configured to do.
    Fail,
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check. It stays the same from version to version, so that scripts may look for it.
    pub name: &'static str,
    /// How it came out.
    pub verdict: Verdict,
    /// What was seen, with units.
    pub seen: String,
    /// Why it matters.
    pub why: &'static str,
    /// What to do about it; none when nothing is wrong.
    pub mend: Option<String>,
}

/// A check's name and why it matters: what its findings have in common.
#[derive(Debug, Clone, Copy)]
struct Check(&'static str, &'static str);

impl Check {
    fn ok(self, seen: impl Into<String>) -> Finding {
        Finding { name: self.0, verdict: Verdict::Ok, seen: seen.into(), why: self.1, mend: None }
    }

    fn warn(self, seen: impl Into<String>, mend: impl Into<String>) -> Finding {
        Finding { verdict: Verdict::Warn, mend: Some(mend.into()), ..self.ok(seen) }
    }

    fn fail(self, seen: impl Into<String>, mend: impl Into<String>) -> Finding {
        Finding { verdict: Verdict::Fail, mend: Some(mend.into()), ..self.ok(seen) }
    }
}

/// Everything that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// The gravest verdict.
    pub verdict: Verdict,
    /// Every check, in a fixed order.
    pub findings: Vec<Finding>,
}

impl Diagnosis {
    fn new(findings: Vec<Finding>) -> Self {
        let verdict = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
        Self { verdict, findings }
    }

    /// The exit code for scripts: 0 when the node will do what it is configured to do, 1 when there are warnings and `strict`
    /// says that they count, 2 when anything fails.
    #[must_use]
    pub fn exit_code(&self, strict: bool) -> u8 {
        match self.verdict {
            Verdict::Fail => 2,
            Verdict::Warn if strict => 1,
            Verdict::Warn | Verdict::Ok => 0,
        }
    }

    /// For people: a line for each check, and below it, when something is wrong, why that matters and how to mend it.
    #[must_use]
    pub fn to_text(&self, colours: bool) -> String {
        let mut text = String::new();
        let width = self.findings.iter().map(|finding| finding.name.len()).max().unwrap_or(0);
        let mut counts = [0; 3];
        for finding in &self.findings {
            let (word, colour) = match finding.verdict {
                Verdict::Ok => ("ok  ", "\x1b[32m"),
                Verdict::Warn => ("warn", "\x1b[33m"),
                Verdict::Fail => ("FAIL", "\x1b[31m"),
            };
            counts[finding.verdict as usize] += 1;
            let (before, after) = if colours { (colour, "\x1b[0m") } else { ("", "") };
            let _ = writeln!(text, "{before}{word}{after}  {:width$}  {}", finding.name, finding.seen);
            if let Some(mend) = &finding.mend {
                let _ = writeln!(text, "      {:width$}  why:  {}\n      {:width$}  mend: {mend}", "", finding.why, "");
            }
        }
        let _ = writeln!(text, "{} ok, {} warnings, {} failures", counts[0], counts[1], counts[2]);
        text
    }

    /// For programs: one JSON object.
    ///
    /// # Panics
    /// Never: texts and words are always JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("texts and words are always JSON") + "\n"
    }
}

/// Checks this host, and Redis when it is configured, against the settings. Takes up to some seconds when Redis does not answer.
#[must_use]
pub fn diagnose(settings: &Settings) -> Diagnosis {
    let host = Host::collect(settings.listen);
    let mut findings = judge_host(&host, settings);
    findings.extend(match &settings.redis {
        None => vec![redis::embedded()],
        Some(config) => redis::judge(&config.url, &examine(config)),
    });
    Diagnosis::new(findings)
}

/// Every check of the host.
fn judge_host(host: &Host, settings: &Settings) -> Vec<Finding> {
    let need = host::Need::of(host, settings);
    vec![
        host::kernel(host),
        host::driver(host, settings.driver),
        host::descriptors(host, settings, &need),
        host::locked_memory(host, &need),
        host::cores(host, settings, &need),
        host::quota(host, &need),
        host::clock_source(host),
        host::clock_sync(host),
        memory::memory(host, &need),
        memory::tcp_memory(host, &need),
        memory::swap(host),
        memory::overcommit(host),
        memory::huge_pages(host),
        network::port(host, settings.listen),
        network::port_range(host, settings.listen),
        network::backlog(host),
        network::tracking(host, &need),
    ]
}

/// Bytes with the unit that a person would use.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (count.max(1).ilog2() / 10).min(4);
    if unit == 0 {
        format!("{count} B")
    } else {
        format!("{:.1} {}", count as f64 / f64::from(1u32 << 10).powi(unit as i32), UNITS[unit as usize])
    }
}

#[cfg(test)]
mod tests;
