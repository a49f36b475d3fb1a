//! Runs a script of `tests/web` under Node.js and talks with it line by line.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use serde_json::Value;

use super::die_with_parent;

/// A browser's first start on a loaded machine takes its time.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running script. It writes one JSON object a line, each with a `step`; the last one is `done`.
pub struct NodeScript {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    name: String,
}

impl NodeScript {
    /// Starts a script.
    #[track_caller]
    pub fn start(name: &str, arguments: &[&str]) -> Self {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/web");
        let modules = std::path::Path::new(directory).join("node_modules");
        assert!(modules.is_dir(), "tests/web/node_modules is missing: tests/run.sh or `npm ci` in tests/web makes it");
        let mut command = Command::new("node");
        command.current_dir(directory).arg(name).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        die_with_parent(&mut command);
        let mut child = command.spawn().expect("run node (tests/run.sh installs it)");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self { child, input, lines, name: name.to_owned() }
    }

    /// Waits for the next line, which must be of `step`, and returns it.
    #[track_caller]
    pub fn expect(&mut self, step: &str) -> Value {
        let line = match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => panic!("{} did not reach {step:?} within {PATIENCE:?}", self.name),
            Err(RecvTimeoutError::Disconnected) => panic!("{} ended before {step:?}; its errors are above", self.name),
        };
        let value: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{} wrote {line:?}", self.name));
        assert_eq!(value["step"], step, "{} wrote {line}", self.name);
        value
    }

    /// Tells the script to go on.
    #[track_caller]
    pub fn go_on(&mut self) {
        self.input.write_all(b"go on\n").expect("write to the script");
    }
}

impl Drop for NodeScript {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
