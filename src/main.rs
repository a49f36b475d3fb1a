//! The command line of weir.

use std::io::{IsTerminal as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser as _;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, fmt, reload};
use weir::control::admin::{FORMS, Place, client};
use weir::control::config::{self, ConfigErrors, Loaded, Overrides};
use weir::control::doctor::diagnose;
use weir::control::handover::process;
use weir::control::handover::taking::{Inheritance, TakeError};
use weir::control::node::{Node, NodeError, Sources};
use weir::control::parts;
use weir::control::signals::Signals;
use weir::settings::{LogConfig, LogFormat, Settings};

mod cli;

use cli::{CheckArgs, Cli, Command, DoctorArgs, OperateArgs};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        None => serve(cli.serve.into_sources()),
        Some(Command::Serve(args)) => serve(args.into_sources()),
        Some(Command::Check(args)) => check(args),
        Some(Command::Drain(args)) => operate(args, "/admin/drain"),
        Some(Command::Reload(args)) => operate(args, "/admin/reload"),
        Some(Command::Upgrade(args)) => operate(args, "/admin/upgrade"),
        Some(Command::Status(args)) => operate(args, "/admin/status"),
        Some(Command::Doctor(args)) => doctor(args),
        Some(Command::Subscribe(args)) => weir::client::subscribe::run(args),
        Some(Command::Publish(args)) => weir::client::publish::run(args),
        Some(Command::Bench(args)) => weir::client::bench::run(args),
        Some(Command::Simulate(args)) => weir::client::simulate::run(&args),
    }
}

/// Reads the configuration from everywhere it may come from.
fn load((file, flags): (Option<PathBuf>, Overrides)) -> Result<Loaded, ConfigErrors> {
    // A name or value that is not Unicode cannot be a key's.
    let environment =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    config::load(file.as_deref(), environment, &flags)
}

/// As [`load`]; what is wrong is said here.
fn load_or_complain(sources: (Option<PathBuf>, Overrides)) -> Option<Loaded> {
    load(sources).inspect_err(|errors| eprintln!("{errors}")).ok()
}

fn check(args: CheckArgs) -> ExitCode {
    if args.example {
        return print(&config::example());
    }
    load_or_complain(args.into_sources()).map_or(ExitCode::FAILURE, |loaded| print(&loaded.to_toml()))
}

/// Asks a running node to do something, and prints what it says.
fn operate(args: OperateArgs, path: &str) -> ExitCode {
    let (place, sources) = args.into_parts();
    let Some(Loaded { settings, .. }) = load_or_complain(sources) else { return ExitCode::FAILURE };
    let text = place.unwrap_or(settings.admin.listen);
    let Some(place) = Place::find(&text, settings.listen.port()) else {
        eprintln!("--admin {text} is not allowed; allowed: {FORMS}");
        return ExitCode::FAILURE;
    };
    let method = if path == "/admin/status" { "GET" } else { "POST" };
    match client::ask(&place, method, path) {
        Ok(answer) => print(&format!("{answer:#}\n")),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn doctor(args: DoctorArgs) -> ExitCode {
    let Some(Loaded { settings, .. }) = load_or_complain(args.serve.into_sources()) else { return ExitCode::from(2) };
    let diagnosis = diagnose(&settings);
    let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    print(&if args.json { diagnosis.to_json() } else { diagnosis.to_text(colours) });
    ExitCode::from(diagnosis.exit_code(args.strict))
}

/// Prints to stdout; a reader that has gone, such as `head`, is no error.
fn print(text: &str) -> ExitCode {
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

fn serve(sources: (Option<PathBuf>, Overrides)) -> ExitCode {
    let Some(Loaded { settings, .. }) = load_or_complain(sources.clone()) else { return ExitCode::FAILURE };
    let set_log_filter = start_log(&settings.log);
    match run(settings, Sources { load: Box::new(move || load(sources.clone())), set_log_filter }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "ended");
            ExitCode::FAILURE
        }
    }
}

fn run(settings: Settings, sources: Sources) -> Result<(), NodeError> {
    let signals = Signals::block().map_err(|source| NodeError::Resource { what: "a signal descriptor", source })?;
    let mut inheritance = inherited()?;
    let succeeds = inheritance.is_some();
    let node = Node::start_after(inheritance.as_mut(), settings, parts::of);
    let mut node = match (node, inheritance) {
        (Ok(mut node), Some(inheritance)) => {
            node.take_over(inheritance)?;
            node
        }
        (Err(error), Some(inheritance)) => {
            inheritance.decline(&error.to_string());
            return Err(error);
        }
        (node, None) => node?,
    };
    node.take_commands(succeeds)?;
    node.reload_from(sources);
    tracing::info!(address = %node.address(), version = env!("CARGO_PKG_VERSION"), "listening");
    if std::io::stdout().is_terminal() {
        print(&where_to_look(node.address()));
    }
    node.run(&signals)
}

/// What a running process offers to hand over, when one has started this.
fn inherited() -> Result<Option<Inheritance>, TakeError> {
    process::inherited().map_err(TakeError::new)?.map(Inheritance::accept).transpose()
}

/// The first things to try.
fn where_to_look(address: SocketAddr) -> String {
    let ip = match address.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let url = format!("http://{}", SocketAddr::new(ip, address.port()));
    format!(
        "subscribe:  curl -N '{url}/sse?channel=news'\n\
         publish:    curl -d 'hello' '{url}/publish/news'\n\
         look:       {url}/  {url}/health/ready  {url}/metrics\n"
    )
}

/// Sends log lines to stderr: stdout is for what was asked for. Returns what changes which are written.
fn start_log(log: &LogConfig) -> Box<dyn Fn(&str)> {
    let parse = |filter: &str| EnvFilter::try_new(filter).expect("the configuration checked the filter");
    let (filter, handle) = reload::Layer::new(parse(&log.filter));
    let registry = tracing_subscriber::registry().with(filter);
    let lines = fmt::layer().with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => registry.with(lines.with_ansi(std::io::stderr().is_terminal())).init(),
        LogFormat::Json => registry.with(lines.json()).init(),
    }
    Box::new(move |filter| {
        // It fails only when the subscriber is gone, and this one lives as long as the process.
        let _ = handle.reload(parse(filter));
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_can_be_opened() {
        for (listens, shown) in [
            ("0.0.0.0:80", "http://127.0.0.1:80/sse"),
            ("[::]:80", "http://[::1]:80/sse"),
            ("10.0.0.1:8080", "http://10.0.0.1:8080/sse"),
        ] {
            assert!(where_to_look(listens.parse().expect("an address")).contains(shown), "{listens}");
        }
    }
}
