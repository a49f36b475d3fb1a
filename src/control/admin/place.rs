//! Where a node takes commands.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use super::directories;

/// The forms of `admin.listen`, as an error names them.
pub const FORMS: &str = "auto, off, unix:/path/of/a/socket, or a loopback address such as 127.0.0.1:8081";

/// The directory that systemd makes for the unit, where a client looks too.
const SYSTEM_DIRECTORY: &str = "/run/weir";

/// Where a node takes commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Nowhere.
    Off,
    /// A socket in the file system.
    Unix(PathBuf),
    /// A port of loopback.
    Tcp(SocketAddr),
}

impl Place {
    /// Reads `admin.listen` of a node that listens on `port`. None when it has no allowed form.
    #[must_use]
    pub fn parse(text: &str, port: u16) -> Option<Self> {
        match text {
            "auto" => Some(Self::Unix(directories().first()?.join(file(port)))),
            "off" => Some(Self::Off),
            _ => match text.strip_prefix("unix:") {
                Some(path) => path.starts_with('/').then(|| Self::Unix(path.into())),
                // Who reaches it is the operator: until it asks for a key, that is who is on this machine.
                None => text.parse().ok().filter(|address: &SocketAddr| address.ip().is_loopback()).map(Self::Tcp),
            },
        }
    }

    /// Where a client finds the node that listens on `port`: `auto` is wherever there is a socket, since the node may run under
    /// systemd and the client not.
    #[must_use]
    pub fn find(text: &str, port: u16) -> Option<Self> {
        if text != "auto" {
            return Self::parse(text, port);
        }
        let system = PathBuf::from(SYSTEM_DIRECTORY);
        let there = directories().into_iter().chain([system]).map(|at| at.join(file(port))).find(|path| path.exists());
        there.map(Self::Unix).or_else(|| Self::parse(text, port))
    }
}

fn file(port: u16) -> String {
    format!("{port}.sock")
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_allowed() {
        for good in ["auto", "off", "unix:/run/weir.sock", "127.0.0.1:1", "127.9.9.9:1", "[::1]:1"] {
            assert!(Place::parse(good, 8080).is_some(), "{good}");
        }
        for bad in ["", "on", "unix:", "unix:relative", "0.0.0.0:1", "10.0.0.1:1", "[::]:1", "localhost:1", "127.0.0.1"]
        {
            assert_eq!(Place::parse(bad, 8080), None, "{bad}");
        }
    }

    #[test]
    fn two_nodes_of_a_machine_have_two_places() {
        assert_ne!(Place::parse("auto", 8080), Place::parse("auto", 8081));
        assert_eq!(Place::parse("off", 1).expect("allowed").to_string(), "off");
    }
}
