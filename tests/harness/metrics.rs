//! Reading the node's metrics (Prometheus text format 0.0.4).

/// One scrape.
pub struct Samples(Vec<(String, f64)>);

impl Samples {
    /// Parses the text.
    pub fn parse(text: &str) -> Self {
        let samples = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| {
                let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("not a sample: {line:?}"));
                let value = value.parse().unwrap_or_else(|_| panic!("not a number: {line:?}"));
                (name.to_owned(), value)
            })
            .collect();
        Self(samples)
    }

    /// The sum over all label sets of a metric, or only those whose text holds `label`, such as `reason="slow"`.
    ///
    /// # Panics
    /// When there is no such metric: a test must not pass because a name was misspelt.
    #[track_caller]
    pub fn sum(&self, name: &str, label: &str) -> f64 {
        let mut found = false;
        let mut sum = 0.0;
        for (sample, value) in &self.0 {
            let (base, labels) = sample.split_once('{').unwrap_or((sample, ""));
            if base == name && labels.contains(label) {
                found = true;
                sum += value;
            }
        }
        assert!(found, "no metric {name} with {label:?}; there are: {}", self.names().join(" "));
        sum
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.0.iter().map(|(sample, _)| sample.clone()).collect();
        names.sort();
        names.dedup();
        names
    }
}
