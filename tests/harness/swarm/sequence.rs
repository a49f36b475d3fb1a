//! Judges the numbers that one client receives on one channel.

use std::ops::Range;

/// What was found. Sums over clients are sums of the fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Verdicts {
    /// Publications received.
    pub received: u64,
    /// Publications that never came, and nothing was said: the one thing that must not happen.
    pub lost: u64,
    /// Publications that came again.
    pub duplicates: u64,
    /// Publications that came after a later one.
    pub reordered: u64,
    /// Gaps announced.
    pub gaps: u64,
    /// Publications that a gap was announced for.
    pub announced: u64,
    /// Publications that came again after a gap: a history that was begun anew may have some of the old one.
    pub repeated: u64,
}

impl Verdicts {
    /// Adds another client's.
    pub fn add(&mut self, other: &Self) {
        self.received += other.received;
        self.lost += other.lost;
        self.duplicates += other.duplicates;
        self.reordered += other.reordered;
        self.gaps += other.gaps;
        self.announced += other.announced;
        self.repeated += other.repeated;
    }
}

/// The numbers 1, 2, 3, … of one channel as one client receives them.
#[derive(Debug, Default)]
pub struct Sequence {
    /// The last number in order.
    last: u64,
    /// The largest number.
    highest: u64,
    missing: Vec<Range<u64>>,
    /// A gap was announced, and nothing came since.
    after_gap: bool,
    verdicts: Verdicts,
}

impl Sequence {
    /// Takes the number of a publication; 0 is not part of the sequence.
    pub fn take(&mut self, number: u64) {
        if number == 0 {
            return;
        }
        self.verdicts.received += 1;
        if std::mem::take(&mut self.after_gap) {
            self.verdicts.announced += number.saturating_sub(self.last + 1);
            self.verdicts.repeated += u64::from(number <= self.highest);
            self.last = number;
        } else if number > self.last {
            if number > self.last + 1 {
                self.missing.push(self.last + 1..number);
            }
            // Where the history was begun anew below the old one's end, its numbers come again.
            self.verdicts.repeated += u64::from(number <= self.highest);
            self.last = number;
        } else if let Some(at) = self.missing.iter().position(|range| range.contains(&number)) {
            self.verdicts.reordered += 1;
            let range = self.missing.swap_remove(at);
            self.missing
                .extend([range.start..number, number + 1..range.end].into_iter().filter(|part| !part.is_empty()));
        } else {
            self.verdicts.duplicates += 1;
        }
        self.highest = self.highest.max(number);
    }

    /// A gap was announced: what comes next need not follow.
    pub fn gap(&mut self) {
        self.verdicts.gaps += 1;
        self.after_gap = true;
    }

    /// The largest number received.
    pub fn highest(&self) -> u64 {
        self.highest
    }

    /// What was found so far.
    pub fn verdicts(&self) -> Verdicts {
        Verdicts { lost: self.missing.iter().map(|range| range.end - range.start).sum(), ..self.verdicts }
    }
}

/// The judge is judged itself.
#[cfg(test)]
mod tests {
    use super::*;

    fn judged(steps: &[Option<u64>]) -> Verdicts {
        let mut sequence = Sequence::default();
        for step in steps {
            match step {
                Some(number) => sequence.take(*number),
                None => sequence.gap(),
            }
        }
        sequence.verdicts()
    }

    fn numbers(numbers: &[u64]) -> Verdicts {
        judged(&numbers.iter().copied().map(Some).collect::<Vec<_>>())
    }

    #[test]
    fn each_fault_is_counted_as_what_it_is() {
        let all = |received| Verdicts { received, ..Verdicts::default() };
        assert_eq!(numbers(&[1, 2, 3]), all(3));
        assert_eq!(numbers(&[3]), Verdicts { lost: 2, ..all(1) }, "the first is 1");
        assert_eq!(numbers(&[1, 5]), Verdicts { lost: 3, ..all(2) });
        assert_eq!(numbers(&[1, 5, 3]), Verdicts { lost: 2, reordered: 1, ..all(3) });
        assert_eq!(numbers(&[1, 5, 3, 3]), Verdicts { lost: 2, reordered: 1, duplicates: 1, ..all(4) });
        assert_eq!(numbers(&[1, 2, 2, 1, 3]), Verdicts { duplicates: 2, ..all(5) });
    }

    #[test]
    fn what_a_gap_announces_is_not_lost() {
        let gap = |received| Verdicts { received, gaps: 1, ..Verdicts::default() };
        assert_eq!(judged(&[Some(1), None, Some(5), Some(6)]), Verdicts { announced: 3, ..gap(3) });
        assert_eq!(judged(&[Some(1), None, Some(2), Some(4)]), Verdicts { lost: 1, ..gap(3) }, "only what follows it");
        assert_eq!(judged(&[Some(1), Some(2), None, Some(1), Some(2), Some(3)]), Verdicts { repeated: 2, ..gap(5) });
        assert_eq!(judged(&[Some(1), Some(2), None, Some(3)]), gap(3));
    }
}
