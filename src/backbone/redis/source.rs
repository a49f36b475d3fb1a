//! Which server a session is made with: a fixed one, or the one that sentinels name.

use redis::Client;

use super::address::{self, Address, AddressError};
use super::sentinel::Sentinels;
use crate::settings::RedisConfig;

/// See the module.
#[derive(Debug)]
pub enum Source {
    /// Always this one.
    Fixed(Client),
    /// The primary of the moment.
    Sentinels(Sentinels),
}

/// A server to make a session with.
#[derive(Debug)]
pub struct Target {
    /// Connects to it.
    pub client: Client,
    /// Whether it has to say of itself that it is a primary, at first and all the time: what is written to another is lost.
    pub primary: bool,
}

impl Source {
    /// Starts looking, on the current tokio runtime.
    ///
    /// # Errors
    /// When the configured address is malformed.
    pub fn start(config: &RedisConfig) -> Result<Self, AddressError> {
        match address::parse(&config.url)? {
            Address::Server(info) => {
                let client = Client::open(info).map_err(|error| AddressError::new(&config.url, &error.to_string()))?;
                Ok(Source::Fixed(client))
            }
            Address::Sentinels(group) => Ok(Source::Sentinels(Sentinels::start(group))),
        }
    }

    /// The server for the next session.
    ///
    /// # Errors
    /// Says why there is none.
    pub async fn find(&mut self) -> Result<Target, String> {
        match self {
            Source::Fixed(client) => Ok(Target { client: client.clone(), primary: false }),
            Source::Sentinels(sentinels) => Ok(Target { client: sentinels.find().await?, primary: true }),
        }
    }

    /// Waits until another server than the last one found should be used, and says which.
    pub async fn switched(&mut self) -> String {
        match self {
            Source::Fixed(_) => std::future::pending().await,
            Source::Sentinels(sentinels) => sentinels.switched().await,
        }
    }
}
