//! Which publication is due when, in which channel, from which publisher: a closed form, so that the publisher and
//! every worker know it without telling each other.

use serde::{Deserialize, Serialize};

use super::kernel::{MILLI, Nanos, SECOND};
use super::stamp::Stamp;

/// The fixed schedule of a run. Publication `i` is due at `start + i / rate`, in channel `i % channels`, from publisher
/// `(i / channels) % publishers`, whether or not the ones before it were sent in time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// The run's number.
    pub run: u32,
    /// Publications a second, over all channels.
    pub rate: f64,
    /// Channels.
    pub channels: u32,
    /// Publishing connections.
    pub publishers: u16,
    /// When the first publication is due.
    pub start: Nanos,
    /// How long after `start` measuring begins.
    pub warmup: Nanos,
    /// How long measuring, and with it publishing, goes on after that.
    pub duration: Nanos,
}

impl Schedule {
    /// Publications of the whole run.
    #[must_use]
    pub fn total(&self) -> u64 {
        ((self.warmup + self.duration) as f64 / SECOND as f64 * self.rate).ceil() as u64
    }

    /// Whether what happens at `time` is measured.
    #[must_use]
    pub fn measures(&self, time: Nanos) -> bool {
        (self.measure_from()..self.measure_until()).contains(&time)
    }

    /// When measuring begins.
    #[must_use]
    pub fn measure_from(&self) -> Nanos {
        self.start + self.warmup
    }

    /// When measuring ends.
    #[must_use]
    pub fn measure_until(&self) -> Nanos {
        self.start + self.warmup + self.duration
    }

    /// When publication `index` is due.
    #[must_use]
    pub fn due(&self, index: u64) -> Nanos {
        self.start + (index as f64 * SECOND as f64 / self.rate) as Nanos
    }

    /// The stamp of publication `index`.
    #[must_use]
    pub fn stamp(&self, index: u64) -> Stamp {
        let (channels, publishers) = (u64::from(self.channels), u64::from(self.publishers));
        Stamp {
            run: self.run,
            publisher: (index / channels % publishers) as u16,
            channel: (index % channels) as u32,
            sequence: (index / (channels * publishers) + 1) as u32,
            intended: self.due(index),
        }
    }

    /// The sequence number of the last of the first `published` publications that `publisher` sent into `channel`; 0
    /// for none.
    #[must_use]
    pub fn last_sequence(&self, published: u64, publisher: u16, channel: u32) -> u32 {
        let round = u64::from(self.channels) * u64::from(self.publishers);
        let place = u64::from(publisher) * u64::from(self.channels) + u64::from(channel);
        (published / round + u64::from(published % round > place)) as u32
    }
}

/// Whether connection `index` never reads: `percent` of the connections, spread evenly over them.
#[must_use]
pub fn is_stalled(index: usize, percent: f64) -> bool {
    let stalled_before = |index: usize| (index as f64 * percent / 100.0 + 1e-9).floor();
    stalled_before(index + 1) > stalled_before(index)
}

/// When connection `index` of a worker is opened, at `rate` connections a second.
#[must_use]
pub fn opening(start: Nanos, index: usize, rate: f64) -> Nanos {
    start + (index as f64 * SECOND as f64 / rate) as Nanos
}

/// Nanoseconds of a number of seconds.
#[must_use]
pub fn seconds(seconds: f64) -> Nanos {
    (seconds * 1e3).round() as Nanos * MILLI
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn every_publisher_and_channel_counts_without_a_hole() {
        for (channels, publishers) in [(1, 1), (3, 1), (1, 4), (3, 2), (7, 5)] {
            let schedule =
                Schedule { run: 1, rate: 1000.0, channels, publishers, start: 5, warmup: 0, duration: SECOND / 10 };
            let mut last = HashMap::new();
            for index in 0..schedule.total() {
                let stamp = schedule.stamp(index);
                let before = last.entry((stamp.publisher, stamp.channel)).or_insert(0);
                assert_eq!(stamp.sequence, *before + 1);
                *before = stamp.sequence;
                assert_eq!(schedule.last_sequence(index + 1, stamp.publisher, stamp.channel), stamp.sequence);
            }
            for publisher in 0..publishers {
                for channel in 0..channels {
                    let counted = last.get(&(publisher, channel)).copied().unwrap_or(0);
                    assert_eq!(schedule.last_sequence(schedule.total(), publisher, channel), counted);
                }
            }
        }
    }

    #[test]
    fn stalled_connections_are_the_share_asked_for() {
        for (percent, of_a_thousand) in [(0.0, 0), (0.5, 5), (10.0, 100), (33.3, 333), (100.0, 1000)] {
            assert_eq!((0..1000).filter(|&index| is_stalled(index, percent)).count(), of_a_thousand, "{percent}");
        }
    }
}
