//! What may be written on the command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use weir::control::config::{self, Overrides};

/// An edge broadcast node: SSE, WebSocket and polling fan-out, from memory or a Redis backbone.
#[derive(Debug, Parser)]
#[command(name = "weir", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to do; `serve` when nothing is said.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Flags of `serve`.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a node (the default).
    #[command(after_long_help = config::help())]
    Serve(ServeArgs),
    /// Check a configuration: print what would be in force, or everything that is wrong.
    Check(CheckArgs),
    /// Have a running node send its clients elsewhere at an even pace, and end.
    Drain(OperateArgs),
    /// Have a running node read its configuration again, and say what changed and what needs a restart.
    Reload(OperateArgs),
    /// Have a running node hand over its connections to a new process of the program as it is now.
    Upgrade(OperateArgs),
    /// Say where a running node is in its life, and with how many connections.
    Status(OperateArgs),
    /// Check this host and Redis against what a configuration needs, and say how to mend what is wrong.
    ///
    /// Exits with 0 when the node will do what it is configured to do, with 1 when there are warnings and --strict is given, and
    /// with 2 when anything fails or the configuration is wrong.
    Doctor(DoctorArgs),
    /// Follow channels and print what arrives.
    Subscribe(weir::client::subscribe::Args),
    /// Publish into a channel.
    Publish(weir::client::publish::Args),
    /// Measure a node: open connections, publish on a fixed schedule, check every delivery.
    Bench(weir::client::bench::Args),
    /// Simulate a crash or a rolling deploy over a fleet: reconnects a second at the survivors.
    Simulate(weir::client::simulate::Args),
}

/// Flags of `serve`. Those with a key of their own are short for `--set KEY=VALUE`; later ones win over earlier sources.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE", env = "WEIR_CONFIG")]
    config: Option<PathBuf>,
    /// Address and port to listen on, such as 0.0.0.0:8080.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Number of shards; 0 means one for each core.
    #[arg(long, value_name = "COUNT")]
    shards: Option<String>,
    /// auto, uring or epoll.
    #[arg(long, value_name = "DRIVER")]
    driver: Option<String>,
    /// Redis or Valkey that the nodes share, such as redis://127.0.0.1:6379.
    #[arg(long, value_name = "URL")]
    redis: Option<String>,
    /// Which log lines are written, such as info or weir=debug.
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// text or json.
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// Any other key; may be given more than once. `weir check --example` lists the keys.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_and_value)]
    set: Vec<(String, String)>,
}

/// Flags of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Configuration file (TOML); without one, the environment and flags alone are checked.
    #[arg(env = "WEIR_CONFIG")]
    pub file: Option<PathBuf>,
    /// A key to set over the file; may be given more than once.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_and_value)]
    set: Vec<(String, String)>,
    /// Print an example file with every key, its meaning and its default instead.
    #[arg(long, conflicts_with = "set")]
    pub example: bool,
}

/// Flags of the commands to a running node.
#[derive(Debug, Args)]
pub struct OperateArgs {
    /// The configuration file of the node.
    #[arg(long, value_name = "FILE", env = "WEIR_CONFIG")]
    config: Option<PathBuf>,
    /// Where it listens: the port names the socket where it takes commands.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Where it takes commands: unix:/path or an address of loopback.
    #[arg(long, value_name = "PLACE")]
    admin: Option<String>,
}

impl OperateArgs {
    /// Where the node takes commands, if it was said, and the sources of its configuration.
    pub fn into_parts(self) -> (Option<String>, (Option<PathBuf>, Overrides)) {
        let mut overrides = Overrides::default();
        if let Some(listen) = self.listen {
            overrides.set("--listen", "listen", listen);
        }
        (self.admin, (self.config, overrides))
    }
}

/// Flags of `doctor`: those of `serve`, and how to answer.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub serve: ServeArgs,
    /// Print one JSON object instead.
    #[arg(long)]
    pub json: bool,
    /// Let warnings count: exit with 1.
    #[arg(long)]
    pub strict: bool,
}

impl ServeArgs {
    /// The file and what the flags say over it.
    pub fn into_sources(self) -> (Option<PathBuf>, Overrides) {
        let mut overrides = Overrides::default();
        for (flag, key, value) in [
            ("--listen", "listen", self.listen),
            ("--shards", "shards", self.shards),
            ("--driver", "driver", self.driver),
            ("--redis", "redis.url", self.redis),
            ("--log", "log.filter", self.log),
            ("--log-format", "log.format", self.log_format),
        ] {
            if let Some(value) = value {
                overrides.set(flag, key, value);
            }
        }
        add_pairs(&mut overrides, self.set);
        (self.config, overrides)
    }
}

impl CheckArgs {
    /// The file and what the flags say over it.
    pub fn into_sources(self) -> (Option<PathBuf>, Overrides) {
        let mut overrides = Overrides::default();
        add_pairs(&mut overrides, self.set);
        (self.file, overrides)
    }
}

fn add_pairs(overrides: &mut Overrides, pairs: Vec<(String, String)>) {
    for (key, value) in pairs {
        overrides.set("--set", key, value);
    }
}

fn key_and_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("allowed: KEY=VALUE, such as websocket.ping=30s")?;
    Ok((key.trim().into(), value.trim().into()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use weir::control::config::load;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_reaches_its_key() {
        let line = "weir --listen [::1]:9 --shards 3 --driver epoll --redis redis://h:1 --log warn --log-format json \
                    --set websocket.ping=30s --set=linger=1s --config /etc/weir.toml";
        let cli = Cli::try_parse_from(line.split_whitespace()).expect("all flags exist without a subcommand");
        assert!(cli.command.is_none());
        let (file, overrides) = cli.serve.into_sources();
        assert_eq!(file, Some(PathBuf::from("/etc/weir.toml")));
        let shown = load(None, std::iter::empty(), &overrides).expect("all values are allowed").to_toml();
        for line in [
            "listen = \"[::1]:9\" # --listen",
            "shards = 3 # --shards",
            "driver = \"epoll\" # --driver",
            "linger = \"1s\" # --set",
            "url = \"redis://h:1\" # --redis",
            "ping = \"30s\" # --set",
            "filter = \"warn\" # --log",
            "format = \"json\" # --log-format",
        ] {
            assert!(shown.lines().any(|shown| shown == line), "{line} is not in {shown}");
        }
    }

    #[test]
    fn a_pair_without_a_value_is_refused() {
        let error = Cli::try_parse_from(["weir", "serve", "--set", "linger"]).expect_err("no value").to_string();
        assert!(error.contains("KEY=VALUE"), "{error}");
    }
}
