//! What a worker has seen: every delivery checked against the sequence it belongs to, and its latency.

use hdrhistogram::Histogram;
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use super::kernel::{Nanos, SECOND};
use super::schedule::Schedule;
use super::stamp::Stamp;
use crate::limits::BENCH_MISSING_RANGES;

/// Counts of one worker, or of all together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Publications received, of the whole run.
    pub deliveries: u64,
    /// Publications received while measuring.
    pub measured: u64,
    /// Publications that were skipped over: later ones of the same sequence arrived, they did not.
    pub gaps: u64,
    /// Publications received again.
    pub duplicates: u64,
    /// Publications that arrived after later ones.
    pub reorders: u64,
    /// Publications that had not arrived when the run ended.
    pub undelivered: u64,
    /// Missing publications that the server had refused to take: not counted as gaps or undelivered.
    pub refused: u64,
    /// Publications of a channel the connection is not subscribed to.
    pub misrouted: u64,
    /// Publications of another run; not an error.
    pub foreign: u64,
    /// Publications whose stamp cannot be read.
    pub malformed: u64,
}

impl Counts {
    /// Adds another worker's counts.
    pub fn add(&mut self, other: &Counts) {
        self.deliveries += other.deliveries;
        self.measured += other.measured;
        self.gaps += other.gaps;
        self.duplicates += other.duplicates;
        self.reorders += other.reorders;
        self.undelivered += other.undelivered;
        self.refused += other.refused;
        self.misrouted += other.misrouted;
        self.foreign += other.foreign;
        self.malformed += other.malformed;
    }

    /// Whether every connection that read got every publication once, in order and whole.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.gaps + self.duplicates + self.reorders + self.undelivered + self.misrouted + self.malformed == 0
    }
}

/// Sequence numbers `first..=last`.
type Span = (u32, u32);

/// Checks deliveries. Memory per connection is four bytes a publisher.
#[derive(Debug)]
pub struct Tally {
    run: u32,
    publishers: usize,
    schedule: Option<Schedule>,
    /// The next sequence number, by connection and publisher.
    expected: Vec<u32>,
    /// What was skipped over, by the same place; bounded by [`BENCH_MISSING_RANGES`], past which a gap is only counted.
    missing: FxHashMap<usize, Vec<Span>>,
    spans: usize,
    counts: Counts,
    latency: Histogram<u64>,
}

/// Longest latency that is told apart from longer ones.
const LONGEST: Nanos = 600 * SECOND;

/// An empty histogram of nanoseconds, three significant digits, as every worker and the report use it.
#[must_use]
pub fn latency_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LONGEST, 3).expect("the bounds are valid")
}

impl Tally {
    /// Starts counting for connections numbered from 0.
    #[must_use]
    pub fn new(run: u32, connections: usize, publishers: u16) -> Self {
        Self {
            run,
            publishers: usize::from(publishers),
            schedule: None,
            expected: vec![1; connections * usize::from(publishers)],
            missing: FxHashMap::default(),
            spans: 0,
            counts: Counts::default(),
            latency: latency_histogram(),
        }
    }

    /// Says when to measure.
    pub fn start(&mut self, schedule: Schedule) {
        self.schedule = Some(schedule);
    }

    /// Takes what `connection`, subscribed to `channel`, received at `now`; `None` is an unreadable stamp.
    pub fn deliver(&mut self, connection: usize, channel: u32, stamp: Option<Stamp>, now: Nanos) {
        let Some(stamp) = stamp else {
            self.counts.malformed += 1;
            return;
        };
        if stamp.run != self.run {
            self.counts.foreign += 1;
            return;
        }
        if stamp.channel != channel {
            self.counts.misrouted += 1;
            return;
        }
        if usize::from(stamp.publisher) >= self.publishers {
            self.counts.malformed += 1;
            return;
        }
        self.counts.deliveries += 1;
        if let Some(schedule) = &self.schedule {
            self.counts.measured += u64::from(schedule.measures(now));
            if schedule.measures(stamp.intended) {
                self.latency.saturating_record(now.saturating_sub(stamp.intended).max(1));
            }
        }
        let place = connection * self.publishers + usize::from(stamp.publisher);
        let expected = self.expected[place];
        if stamp.sequence == expected {
            self.expected[place] = expected + 1;
        } else if stamp.sequence > expected {
            self.skip(place, (expected, stamp.sequence - 1));
            self.expected[place] = stamp.sequence + 1;
        } else if self.found_late(place, stamp.sequence) {
            self.counts.gaps -= 1;
            self.counts.reorders += 1;
        } else {
            self.counts.duplicates += 1;
        }
    }

    fn skip(&mut self, place: usize, span: Span) {
        self.counts.gaps += u64::from(span.1 - span.0 + 1);
        if self.spans < BENCH_MISSING_RANGES {
            self.spans += 1;
            self.missing.entry(place).or_default().push(span);
        }
    }

    /// Takes `sequence` out of what is missing at `place`, if it is missing there.
    fn found_late(&mut self, place: usize, sequence: u32) -> bool {
        let Some(spans) = self.missing.get_mut(&place) else { return false };
        let Some(at) = spans.iter().position(|&(first, last)| (first..=last).contains(&sequence)) else { return false };
        let (first, last) = spans.swap_remove(at);
        self.spans -= 1;
        if first < sequence {
            spans.push((first, sequence - 1));
            self.spans += 1;
        }
        if sequence < last {
            spans.push((sequence + 1, last));
            self.spans += 1;
        }
        true
    }

    /// Whether `connection` has received everything of `channel` up to the end of the run.
    #[must_use]
    pub fn is_complete(&self, connection: usize, channel: u32, published: u64, schedule: &Schedule) -> bool {
        (0..self.publishers).all(|publisher| {
            let last = schedule.last_sequence(published, publisher as u16, channel);
            self.expected[connection * self.publishers + publisher] > last
        })
    }

    /// Counts, at the end of the run, what `connection` lacks of `channel`, and takes back what the server had
    /// `refused`: sorted `(publisher, sequence)` of this channel.
    pub fn finish(
        &mut self,
        connection: usize,
        channel: u32,
        published: u64,
        schedule: &Schedule,
        refused: &[(u16, u32)],
    ) {
        for publisher in 0..self.publishers {
            let place = connection * self.publishers + publisher;
            let last = schedule.last_sequence(published, publisher as u16, channel);
            self.counts.undelivered += u64::from((last + 1).saturating_sub(self.expected[place]));
        }
        for &(publisher, sequence) in refused {
            let place = connection * self.publishers + usize::from(publisher);
            if sequence >= self.expected[place] {
                self.counts.undelivered -= 1;
                self.counts.refused += 1;
            } else if self.found_late(place, sequence) {
                self.counts.gaps -= 1;
                self.counts.refused += 1;
            }
        }
    }

    /// The counts so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Latencies in nanoseconds of the publications that were due while measuring, from when they were due.
    #[must_use]
    pub fn latency(&self) -> &Histogram<u64> {
        &self.latency
    }
}

/// The filled buckets of a histogram: a value of each and its count.
pub type SparseHistogram = Vec<(u64, u64)>;

/// Lists the filled buckets.
#[must_use]
pub fn to_sparse(histogram: &Histogram<u64>) -> SparseHistogram {
    histogram.iter_recorded().map(|bucket| (bucket.value_iterated_to(), bucket.count_at_value())).collect()
}

/// Adds buckets that [`to_sparse`] listed, losing nothing when both histograms are of [`latency_histogram`].
pub fn add_sparse(histogram: &mut Histogram<u64>, sparse: &[(u64, u64)]) {
    for &(value, count) in sparse {
        histogram.saturating_record_n(value, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: u32 = 9;

    fn schedule() -> Schedule {
        Schedule { run: RUN, rate: 10.0, channels: 1, publishers: 1, start: 0, warmup: SECOND / 10, duration: SECOND }
    }

    fn tally_of(sequences: &[u32]) -> Tally {
        let mut tally = Tally::new(RUN, 1, 1);
        for &sequence in sequences {
            let stamp = Stamp { run: RUN, publisher: 0, channel: 0, sequence, intended: 0 };
            tally.deliver(0, 0, Some(stamp), 1);
        }
        tally
    }

    #[test]
    fn gaps_duplicates_and_reorders_are_told_apart() {
        let seen = |sequences: &[u32]| {
            let counts = tally_of(sequences).counts();
            (counts.gaps, counts.duplicates, counts.reorders)
        };
        assert_eq!(seen(&[1, 2, 3]), (0, 0, 0));
        assert_eq!(seen(&[1, 4]), (2, 0, 0));
        assert_eq!(seen(&[2]), (1, 0, 0));
        assert_eq!(seen(&[1, 1, 2]), (0, 1, 0));
        assert_eq!(seen(&[1, 3, 2, 4]), (0, 0, 1));
        assert_eq!(seen(&[1, 3, 2, 2]), (0, 1, 1));
        assert_eq!(seen(&[1, 6, 3, 5, 2, 4, 4]), (0, 1, 4));
    }

    #[test]
    fn what_never_arrived_is_counted_at_the_end_unless_it_was_refused() {
        let total = schedule().total();
        assert_eq!(total, 11);
        let mut tally = tally_of(&[1, 2, 4, 6, 7]);
        assert!(!tally.is_complete(0, 0, total, &schedule()));
        tally.finish(0, 0, total, &schedule(), &[(0, 5), (0, 7), (0, 11)]);
        let counts = tally.counts();
        assert_eq!((counts.gaps, counts.undelivered, counts.refused), (1, 3, 2), "7 was refused and came all the same");
        assert!(!counts.is_clean());
        assert!(tally_of(&(1..=11).collect::<Vec<_>>()).is_complete(0, 0, total, &schedule()));
    }

    #[test]
    fn latency_counts_from_when_the_publication_was_due_and_only_while_measuring() {
        let mut tally = Tally::new(RUN, 1, 1);
        tally.start(schedule());
        for index in 0..11 {
            let stamp = schedule().stamp(index);
            tally.deliver(0, 0, Some(stamp), stamp.intended + 5_000);
        }
        assert_eq!(tally.latency().len(), 10, "the first one was due before measuring began");
        assert!((4_990..5_010).contains(&tally.latency().max()));
        assert_eq!(tally.counts().measured, 10);
    }

    #[test]
    fn strangers_are_counted_apart() {
        let mut tally = tally_of(&[1]);
        let stamp = Stamp { run: RUN, publisher: 0, channel: 0, sequence: 2, intended: 0 };
        tally.deliver(0, 0, Some(Stamp { run: 1, ..stamp }), 1);
        tally.deliver(0, 0, Some(Stamp { channel: 5, ..stamp }), 1);
        tally.deliver(0, 0, None, 1);
        let counts = tally.counts();
        assert_eq!((counts.foreign, counts.misrouted, counts.malformed, counts.deliveries), (1, 1, 1, 1));
    }

    #[test]
    fn a_histogram_survives_the_pipe() {
        let mut histogram = latency_histogram();
        for value in [1, 2, 999, 1_000_000, 123_456_789, 123_456_789] {
            histogram.record(value).unwrap();
        }
        let mut copy = latency_histogram();
        add_sparse(&mut copy, &to_sparse(&histogram));
        assert_eq!(copy, histogram);
    }
}
