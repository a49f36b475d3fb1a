//! A request to a running node's admin listener.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::Value;

use super::Place;
use crate::limits::ADMIN_ANSWER_MILLIS;

/// Why a node did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody is reached there.
    #[error("no node takes commands at {0}: {1}")]
    Unreachable(Place, io::Error),
    /// The connection ended before the answer.
    #[error("the node at {0} did not answer: {1}")]
    NoAnswer(Place, io::Error),
    /// The node refused.
    #[error("the node refused: {0}")]
    Refused(String),
}

/// Sends one request and returns the answer's JSON.
///
/// # Errors
/// See [`AskError`].
pub fn ask(place: &Place, method: &str, path: &str) -> Result<Value, AskError> {
    let unreachable = |error| AskError::Unreachable(place.clone(), error);
    // A little longer than the node takes for an answer itself.
    let patience = Some(Duration::from_millis(ADMIN_ANSWER_MILLIS + 1_000));
    let answer = match place {
        Place::Off => {
            return Err(unreachable(io::Error::new(io::ErrorKind::NotFound, "admin.listen is off")));
        }
        Place::Unix(path_of_socket) => {
            let stream = UnixStream::connect(path_of_socket).map_err(unreachable)?;
            stream.set_read_timeout(patience).map_err(unreachable)?;
            exchange(stream, method, path)
        }
        Place::Tcp(address) => {
            let stream = TcpStream::connect(address).map_err(unreachable)?;
            stream.set_read_timeout(patience).map_err(unreachable)?;
            exchange(stream, method, path)
        }
    };
    let (status, body) = answer.map_err(|error| AskError::NoAnswer(place.clone(), error))?;
    let json: Option<Value> = serde_json::from_slice(&body).ok();
    match json {
        Some(json) if status < 300 => Ok(json),
        json => {
            let text = json.as_ref().and_then(|json| json["error"].as_str());
            Err(AskError::Refused(text.map_or_else(|| format!("status {status}"), str::to_owned)))
        }
    }
}

fn exchange(mut stream: impl Read + Write, method: &str, path: &str) -> io::Result<(u16, Vec<u8>)> {
    // In one piece, and in HTTP/1.0: the answer ends with the connection.
    stream.write_all(format!("{method} {path} HTTP/1.0\r\nHost: weir\r\nContent-Length: 0\r\n\r\n").as_bytes())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response.parse(&bytes).map_err(io::Error::other)?;
    let (httparse::Status::Complete(head), Some(status)) = (parsed, response.code) else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    Ok((status, bytes.split_off(head)))
}
