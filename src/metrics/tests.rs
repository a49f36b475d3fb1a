//! A small reader of the text format checks what is rendered.

use std::collections::{BTreeMap, HashSet};

use super::*;

/// Reads the text format line by line and refuses what a scraper would: a sample before its HELP and TYPE, a family
/// twice, a sample twice, a name or label outside the grammar.
fn parse(text: &str) -> BTreeMap<String, (String, f64)> {
    let mut families: HashSet<String> = HashSet::new();
    let mut current: Option<(String, Option<String>)> = None;
    let mut samples = BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a HELP line has a text");
            assert!(!help.trim().is_empty() && families.insert(name.into()), "family {name} twice or without help");
            current = Some((name.into(), None));
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a TYPE line has a type");
            let (family, slot) = current.as_mut().expect("TYPE follows HELP");
            assert_eq!(family, name);
            assert!(slot.replace(kind.into()).is_none(), "{name}: TYPE twice");
        } else {
            let (series, value) = line.rsplit_once(' ').expect("a sample has a value");
            let name = series.split('{').next().unwrap_or_default();
            let (family, kind) = current.as_ref().expect("a sample follows HELP");
            let kind = kind.clone().expect("a sample follows TYPE");
            let base = if kind == "histogram" {
                ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).expect("a histogram part")
            } else {
                name
            };
            assert_eq!(base, family, "a sample of another family");
            assert!(name.starts_with("weir_") && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
            if let Some(labels) = series.strip_prefix(name).filter(|labels| !labels.is_empty()) {
                let inner = labels.strip_prefix('{').and_then(|l| l.strip_suffix('}')).expect("labels in braces");
                for label in inner.split(',') {
                    let (key, value) = label.split_once('=').expect("label=value");
                    assert!(key.bytes().all(|b| b.is_ascii_lowercase()), "label {key}");
                    assert!(value.len() > 2 && value.starts_with('"') && value.ends_with('"'), "label value {value}");
                }
            }
            let value: f64 = value.parse().expect("a number");
            assert!(samples.insert(series.into(), (kind, value)).is_none(), "{series} twice");
        }
    }
    samples
}

fn value(samples: &BTreeMap<String, (String, f64)>, series: &str) -> f64 {
    samples.get(series).unwrap_or_else(|| panic!("{series} is missing")).1
}

#[test]
fn every_family_is_well_formed_and_shown_once() {
    let metrics = Metrics::new(2);
    let node =
        NodeSnapshot { mailbox_overflows: vec![0, 3], backbone_heartbeat_micros: 1_500, ..NodeSnapshot::default() };
    let samples = parse(&metrics.render(&node, "1.2.3"));
    assert_eq!(value(&samples, "weir_build_info{version=\"1.2.3\"}"), 1.0);
    assert_eq!(value(&samples, "weir_mailbox_overflows_total{shard=\"1\"}"), 3.0);
    assert_eq!(value(&samples, "weir_backbone_heartbeat_seconds"), 0.0015);
    for family in FAMILIES {
        assert!(samples.keys().any(|series| series.starts_with(family.name)), "{} has no sample", family.name);
    }
    let reasons = samples.keys().filter(|series| series.starts_with("weir_disconnects_total{shard=\"1\"")).count();
    assert_eq!(reasons, DISCONNECT_REASONS.len());
}

#[test]
fn what_a_shard_counts_is_what_is_shown() {
    let metrics = Metrics::new(2);
    let shard = &metrics.shards[1];
    shard.sse.add(5);
    shard.sse.sub(2);
    shard.websocket.set(7);
    shard.deliveries.add(41);
    shard.deliveries.add(1);
    shard.disconnects[3].add(1);
    [101, 200, 204, 404, 503, 999].into_iter().for_each(|status| shard.count_response(status));
    let samples = parse(&metrics.render(&NodeSnapshot { ready: true, ..NodeSnapshot::default() }, "0"));
    for (series, expected) in [
        ("weir_connections{shard=\"1\",protocol=\"sse\"}", 3.0),
        ("weir_connections{shard=\"1\",protocol=\"websocket\"}", 7.0),
        ("weir_connections{shard=\"0\",protocol=\"sse\"}", 0.0),
        ("weir_deliveries_total{shard=\"1\"}", 42.0),
        ("weir_disconnects_total{shard=\"1\",reason=\"slow\"}", 1.0),
        ("weir_http_requests_total{shard=\"1\",status=\"2xx\"}", 2.0),
        ("weir_http_requests_total{shard=\"1\",status=\"5xx\"}", 2.0),
        ("weir_ready", 1.0),
    ] {
        assert_eq!(value(&samples, series), expected, "{series}");
    }
}

#[test]
fn histograms_are_cumulative_over_buckets_and_shards() {
    let metrics = Metrics::new(2);
    let mut recorders: Vec<_> = metrics.shards.iter().map(|shard| ShardRecorder::new(Arc::clone(shard))).collect();
    recorders[0].latency.saturating_record_n(80, 10);
    recorders[1].latency.saturating_record_n(2_000, 5);
    recorders[1].latency.saturating_record(3_600_000_000);
    let name = "weir_delivery_latency_seconds";
    let before = parse(&metrics.render(&NodeSnapshot::default(), "0"));
    assert_eq!(value(&before, &format!("{name}_count")), 0.0, "nothing was published yet");

    recorders.iter_mut().for_each(ShardRecorder::publish);
    let samples = parse(&metrics.render(&NodeSnapshot::default(), "0"));
    let bucket = |le: &str| value(&samples, &format!("{name}_bucket{{le=\"{le}\"}}"));
    assert_eq!(
        [bucket("0.00005"), bucket("0.0001"), bucket("0.001"), bucket("0.0025"), bucket("10"), bucket("+Inf")],
        [0.0, 10.0, 10.0, 15.0, 15.0, 16.0]
    );
    assert_eq!(value(&samples, &format!("{name}_count")), 16.0);
    let exact = (10.0 * 80.0 + 5.0 * 2_000.0) / 1e6 + HISTOGRAM_MICROS as f64 / 1e6;
    let sum = value(&samples, &format!("{name}_sum"));
    assert!((sum - exact).abs() / exact < 0.02, "sum {sum} is not within two digits of {exact}");

    let again = parse(&metrics.render(&NodeSnapshot::default(), "0"));
    assert_eq!(value(&again, &format!("{name}_count")), 16.0, "a second scrape sees the same");
}

#[test]
fn counters_never_fall_between_scrapes() {
    let metrics = Metrics::new(1);
    let mut recorder = ShardRecorder::new(Arc::clone(&metrics.shards[0]));
    let mut last = parse(&metrics.render(&NodeSnapshot::default(), "0"));
    for round in 1..=20u64 {
        recorder.metrics.sends.add(round);
        recorder.metrics.disconnects[round as usize % DISCONNECT_REASONS.len()].add(1);
        recorder.turn.saturating_record_n(round * 37, round);
        if round % 3 == 0 {
            recorder.publish();
        }
        let now = parse(&metrics.render(&NodeSnapshot::default(), "0"));
        assert_eq!(now.keys().collect::<Vec<_>>(), last.keys().collect::<Vec<_>>(), "series come and go");
        for (series, (kind, value)) in &now {
            assert!(kind == "gauge" || *value >= last[series].1, "{series} fell");
        }
        last = now;
    }
    assert_eq!(value(&last, "weir_sends_total{shard=\"0\"}"), 210.0);
    assert!(value(&last, "weir_turn_seconds_count") > 0.0);
}
