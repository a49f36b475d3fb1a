//! How many instructions the hot path takes, counted by valgrind: a number that does not depend on the machine's mood, so a
//! change that makes weir slower fails here. The counts that hold are in `benches/instructions.toml`.
//!
//! ```text
//! cargo bench --bench instructions                compares, and fails when a count grew
//! cargo bench --bench instructions -- --bless     writes the counts of now
//! ```

use std::collections::BTreeMap;
use std::env;
use std::hint::black_box;
use std::path::Path;
use std::process::{Command, ExitCode};

use paper::{EPOCH, PAYLOAD_BYTES, Shard, frame, payload};
use weir::limits::{CHANNELS_PER_CONNECTION, LOG_MESSAGES};
use weir::log::channel_log::{Bounds, ChannelLog};
use weir::log::frame::{ChannelBlocks, FrameEncoder, FrameKind};
use weir::log::position::Position;
use weir::settings::Settings;

#[expect(dead_code, reason = "shared with another bench, which uses more of it")]
mod paper;

/// Counts this much above the kept ones fail, in percent: what another patch release of the compiler may move.
const TOLERANCE_PERCENT: f64 = 5.0;
/// Subscribers: so many that what a turn costs once does not show.
const SUBSCRIBERS: usize = 1_000;
/// Publications measured, after one that warms up.
const ROUNDS: u64 = 4;

/// A scenario: what its count is divided by, and what prepares it and gives the code to measure.
struct Scenario {
    name: &'static str,
    per: u64,
    prepare: fn() -> Box<dyn FnMut()>,
}

const SCENARIOS: [Scenario; 7] = [
    Scenario {
        name: "append to a full log, a publication",
        per: 1,
        prepare: || {
            let bounds = Bounds::from(&Settings::default().history);
            let mut log = ChannelLog::new(Position { epoch: EPOCH, offset: 0 });
            let frame = frame("news", 1);
            let mut append = move || {
                black_box(log.append(frame.clone(), 0, bounds));
            };
            (0..LOG_MESSAGES).for_each(|_| append());
            Box::new(append)
        },
    },
    Scenario {
        name: "encode in every format, a publication",
        per: 1,
        prepare: || {
            let data = payload(PAYLOAD_BYTES);
            let (mut encoder, mut blocks) = (FrameEncoder::default(), ChannelBlocks::default());
            let mut offset = 100;
            Box::new(move || {
                offset += 1;
                let position = Position { epoch: EPOCH, offset };
                black_box(encoder.encode(&mut blocks, "news", FrameKind::Publication, position, &data, 0));
            })
        },
    },
    Scenario {
        name: "caught up on SSE, a delivery",
        per: SUBSCRIBERS as u64,
        prepare: || publishing(Shard::with_streams(1, SUBSCRIBERS)),
    },
    Scenario {
        name: "caught up on WebSocket, a delivery",
        per: SUBSCRIBERS as u64,
        prepare: || publishing(Shard::with_websockets(SUBSCRIBERS)),
    },
    Scenario {
        name: "fall behind by 32 and catch up on SSE, a delivery",
        per: 32 * SUBSCRIBERS as u64,
        prepare: || lagging(Shard::with_streams(1, SUBSCRIBERS)),
    },
    Scenario {
        name: "fall behind by 32 and catch up on WebSocket, a delivery",
        per: 32 * SUBSCRIBERS as u64,
        prepare: || lagging(Shard::with_websockets(SUBSCRIBERS)),
    },
    Scenario {
        name: "streams of the most channels, a delivery",
        per: SUBSCRIBERS as u64,
        prepare: || publishing(Shard::with_streams(CHANNELS_PER_CONNECTION, SUBSCRIBERS)),
    },
];

fn publishing(mut shard: Shard) -> Box<dyn FnMut()> {
    Box::new(move || {
        shard.publish(0);
        shard.drain();
    })
}

fn lagging(mut shard: Shard) -> Box<dyn FnMut()> {
    Box::new(move || {
        shard.fall_behind(32);
        shard.catch_up();
    })
}

/// The only code that valgrind counts, found by its name.
#[unsafe(no_mangle)]
#[inline(never)]
fn weir_counted(code: &mut dyn FnMut()) {
    (0..ROUNDS).for_each(|_| code());
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let Some(place) = arguments.iter().position(|argument| argument == "--scenario") {
        let scenario =
            SCENARIOS.iter().find(|scenario| Some(&scenario.name) == arguments.get(place + 1).map(|a| &**a).as_ref());
        let mut code = (scenario.expect("a scenario's name").prepare)();
        code();
        weir_counted(&mut *code);
        return ExitCode::SUCCESS;
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/instructions.toml");
    let kept = match std::fs::read_to_string(&file) {
        Ok(text) => toml::from_str(&text).expect("benches/instructions.toml is a table of counts"),
        Err(_) => BTreeMap::<String, f64>::new(),
    };
    let counted: Vec<(&str, f64)> = SCENARIOS.iter().map(|scenario| (scenario.name, count(scenario))).collect();
    if arguments.iter().any(|argument| argument == "--bless") {
        let mut text = String::from(
            "# Instructions, counted by valgrind. Written by: cargo bench --bench instructions -- --bless\n",
        );
        counted.iter().for_each(|(name, count)| text.push_str(&format!("\"{name}\" = {count:.1}\n")));
        std::fs::write(&file, &text).expect("benches/instructions.toml can be written");
        print!("{text}");
        return ExitCode::SUCCESS;
    }
    let mut failed = false;
    println!("{:>12} {:>12} {:>8}  scenario", "kept", "counted", "change");
    for (name, count) in counted {
        let before = kept.get(name).copied().unwrap_or(f64::NAN);
        let change = (count / before - 1.0) * 100.0;
        // A scenario that has no kept count fails too: a gate that compares with nothing holds nothing back.
        let grew = change.is_nan() || change > TOLERANCE_PERCENT;
        println!("{before:>12.1} {count:>12.1} {change:>+7.1}%  {name}{}", if grew { "  <-- GREW" } else { "" });
        failed |= grew;
    }
    if failed {
        println!(
            "a count grew by more than {TOLERANCE_PERCENT} %: make it cheaper, or say why in the commit that runs --bless"
        );
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Runs a scenario in a process of its own under valgrind.
fn count(scenario: &Scenario) -> f64 {
    let me = env::current_exe().expect("the path of this bench");
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=weir_counted"]);
    let output = command.arg(me).args(["--scenario", scenario.name]).output();
    let output = output.unwrap_or_else(|error| panic!("valgrind counts the instructions and cannot be run: {error}"));
    let text = String::from_utf8_lossy(&output.stderr);
    let collected = text.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse::<f64>().ok());
    let collected = collected.filter(|&count| output.status.success() && count > 0.0);
    collected.unwrap_or_else(|| panic!("valgrind counted nothing for {:?}:\n{text}", scenario.name))
        / (ROUNDS * scenario.per) as f64
}
