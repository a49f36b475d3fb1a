use clap::Parser as _;

use super::backoff::Random;
use super::*;

#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

fn args(line: &str) -> Args {
    let words = format!("simulate {line}");
    Line::try_parse_from(words.split_whitespace()).unwrap_or_else(|error| panic!("{error}")).args
}

#[test]
fn every_client_ends_connected_exactly_once() {
    for event in ["crash", "rolling"] {
        for client in ["eventsource", "centrifuge"] {
            for balance in ["random", "two-choices"] {
                for seed in 1..4 {
                    let args = args(&format!(
                        "{event} --nodes 6 --clients 6001 --client {client} --balance {balance} --seed {seed} --accept 300 --backlog 200 \
                         --drain 5 --jitter 4 --restart 2 --parallel 2 --detect 3"
                    ));
                    for (form, drain, jitter) in args.forms() {
                        let mut fleet = Fleet::new(&args, drain, jitter);
                        fleet.run_to_the_end();
                        // This asserts of every client that it is at one node and that the node knows it.
                        assert_eq!(fleet.waiting(), 0, "{args:?} {form}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_seed_repeats_a_run_and_another_does_not() {
    let run = |seed: u32| {
        let args = args(&format!("crash --nodes 5 --clients 5000 --client centrifuge --accept 100 --seed {seed}"));
        Fleet::new(&args, 0, 0).run()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn no_node_accepts_more_than_it_can() {
    let args = args("crash --nodes 3 --clients 30000 --accept 500 --backlog 100000");
    let outcome = Fleet::new(&args, 0, 0).run();
    assert_eq!(outcome.peak_reconnects_at_one, 500);
    assert_eq!(outcome.peak_reconnects, 1_000);
    assert_eq!(outcome.moves, 10_000);
    // 5,000 at each survivor take ten seconds; those that came to the dead node first take their second wait besides.
    assert!(outcome.offline_max >= 10.0, "{outcome:?}");
}

#[test]
fn a_full_accept_queue_costs_attempts_and_loses_nobody() {
    let roomy =
        Fleet::new(&args("crash --nodes 3 --clients 30000 --accept 500 --backlog 100000 --detect 0"), 0, 0).run();
    let tight = Fleet::new(&args("crash --nodes 3 --clients 30000 --accept 500 --backlog 100 --detect 0"), 0, 0).run();
    assert_eq!((roomy.failed_attempts, roomy.still_waiting), (0, 0));
    assert!(tight.failed_attempts > 0 && tight.peak_queue <= 100, "{tight:?}");
    assert_eq!(tight.still_waiting, 0);
}

#[test]
fn a_dead_node_costs_attempts_until_it_is_noticed() {
    let run = |detect: u32| {
        Fleet::new(&args(&format!("crash --nodes 2 --clients 2000 --accept 10000 --detect {detect}")), 0, 0).run()
    };
    assert_eq!(run(0).failed_attempts, 0);
    assert!(run(10).failed_attempts > 0);
}

#[test]
fn pacing_spreads_a_drain_over_its_window() {
    let args = args("rolling --nodes 4 --clients 40000 --accept 100000 --backlog 100000 --restart 1 --balance random");
    let (at_once, paced) = (Fleet::new(&args, 0, 0).run(), Fleet::new(&args, 50, 0).run());
    // Everybody of a node comes back in the same step; paced, a fiftieth of them in any second.
    assert!(at_once.peak_reconnects >= 10_000, "{at_once:?}");
    let most_of_a_node = paced.peak_connections_at_one;
    assert!(paced.peak_reconnects <= most_of_a_node / 50 + 10, "{paced:?}");
    assert!(paced.seconds > at_once.seconds + 4.0 * 49.0, "{paced:?}");
}

#[test]
fn jitter_spreads_what_comes_back() {
    let args = args("crash --nodes 4 --clients 40000 --accept 100000 --backlog 100000 --detect 0");
    let (bare, spread) = (Fleet::new(&args, 0, 0).run(), Fleet::new(&args, 0, 20).run());
    assert_eq!(bare.peak_reconnects, 10_000, "all at once");
    assert!(spread.peak_reconnects < 700, "about 500 a second: {spread:?}");
    assert!(bare.offline_max <= 2.1 && spread.offline_max > 20.0, "{bare:?} {spread:?}");
}

#[test]
fn two_choices_hold_fewer_connections_at_one_node_than_any() {
    let most = |balance: &str| {
        let args = args(&format!("rolling --nodes 30 --clients 30000 --balance {balance} --accept 10000 --restart 1"));
        Fleet::new(&args, 0, 0).run().peak_connections_at_one
    };
    let (random, two) = (most("random"), most("two-choices"));
    // Under random choice whoever is drained last has taken its part of everybody before: e times its share.
    assert!(random > 2_300, "{random}");
    assert!(two * 10 < random * 7, "{two} is much less than {random}");
}

#[test]
fn waits_are_those_of_the_clients() {
    let mut random = Random::new(7);
    let mut waits = |kind: ClientKind, failures, advised| {
        let all: Vec<u64> = (0..10_000).map(|_| kind.wait(failures, advised, &mut random)).collect();
        (*all.iter().min().expect("some"), *all.iter().max().expect("some"))
    };
    assert_eq!(waits(ClientKind::EventSource, 9, 500), (2_500, 2_500));
    assert_eq!(waits(ClientKind::Centrifuge, 0, 500), (500, 999));
    let (least, most) = waits(ClientKind::Centrifuge, 3, 0);
    assert!(least < 520 && (4_400..4_500).contains(&most), "{least} {most}");
    let (_, most) = waits(ClientKind::Centrifuge, 60, 0);
    assert_eq!(most, 20_000);
}

#[test]
fn forms_fit_the_event() {
    let names = |line: &str| args(line).forms().into_iter().map(|(name, ..)| name).collect::<Vec<_>>();
    assert_eq!(names("rolling"), ["as it comes", "paced", "jitter", "paced, jitter"]);
    assert_eq!(names("crash"), ["as it comes", "jitter"]);
    assert_eq!(names("rolling --client centrifuge"), ["as it comes", "paced"]);
    assert_eq!(names("crash --client centrifuge"), ["as it comes"]);
    assert!(Line::try_parse_from(["simulate", "crash", "--nodes", "1"]).is_err());
}

#[test]
fn a_report_has_a_row_for_each_form() {
    let report = args("rolling --nodes 3 --clients 300 --drain 2 --restart 1").simulate();
    assert!(report.all_back());
    assert_eq!(report.to_string().lines().count(), 2 + 4);
    let json: serde_json::Value = serde_json::from_str(&report.to_json()).expect("JSON");
    assert_eq!(json["rows"].as_array().map(Vec::len), Some(4));
    assert_eq!(json["rows"][1]["form"], "paced");
    assert_eq!(json["rows"][1]["still_waiting"], 0);
}
