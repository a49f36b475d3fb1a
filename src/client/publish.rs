//! `weir publish`: one publication, or one for each line of standard input.

use std::io::{self, BufRead, Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use serde::Deserialize;

use super::http::{BaseUrl, Connection, HttpError};
use crate::limits::{CLIENT_ANSWER_MILLIS, PUBLICATION_BYTES};
use crate::wire::channel_name::{self, NameError};
use crate::wire::http1;

/// Publish to a channel and print the publication's position.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Where the node is.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    pub url: BaseUrl,
    /// A retry with the same key gets the first publication's position and publishes nothing. With --lines, the number
    /// of the line is added to it.
    #[arg(long, value_name = "K")]
    pub idempotency_key: Option<String>,
    /// Publish every line of standard input by itself.
    #[arg(long, conflicts_with = "data")]
    pub lines: bool,
    /// Print the node's answers as they are, JSON, and not the cursors alone.
    #[arg(long)]
    pub json: bool,
    /// The channel.
    pub channel: String,
    /// What to publish; standard input when it is - or absent.
    #[arg(allow_hyphen_values = true)]
    pub data: Option<String>,
}

/// Why a publication failed.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Not a channel name.
    #[error("{0}")]
    Name(#[from] NameError),
    /// Standard input or output failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Too much on standard input. The node has the last word below that.
    #[error("the publication has more than {INPUT_BYTES} bytes")]
    TooLarge,
    /// The node was not reached or did not answer. Whether it published is unknown once the request was sent.
    #[error("{0}")]
    Http(#[from] HttpError),
    /// The node refused.
    #[error("{0}")]
    Refused(String),
    /// The node's answer has no position.
    #[error("the answer has no position: {0}")]
    Answer(serde_json::Error),
}

/// Bytes taken from standard input for one publication: what the largest configured limit of a node can be.
const INPUT_BYTES: usize = 64 * PUBLICATION_BYTES;

/// The part of a node's answer that is printed.
#[derive(Deserialize)]
struct Published {
    cursor: String,
}

/// Publishes; exits with 1 and says why when it fails.
#[must_use]
pub fn run(args: Args) -> ExitCode {
    let mut line = 0;
    match publish(&args, &mut io::stdin().lock(), &mut io::stdout().lock(), &mut line) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if args.lines => {
            eprintln!("weir publish: line {line}: {error}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("weir publish: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Publishes from `input` and prints to `output`; `line` is the number of the line that is being published.
fn publish(
    args: &Args,
    input: &mut impl BufRead,
    output: &mut impl Write,
    line: &mut usize,
) -> Result<(), PublishError> {
    channel_name::check(&args.channel)?;
    let mut publisher = Publisher { args, connection: None };
    if args.lines {
        while let Some(data) = read_line(input)? {
            *line += 1;
            let key = args.idempotency_key.as_ref().map(|key| format!("{key}-{line}"));
            publisher.publish(&data, key.as_deref(), output)?;
        }
        return Ok(());
    }
    let data = match args.data.as_deref() {
        Some("-") | None => read_all(input)?,
        Some(data) => data.as_bytes().into(),
    };
    publisher.publish(&data, args.idempotency_key.as_deref(), output)
}

/// Reads a line without its end (LF or CRLF); none at the end of the input.
fn read_line(input: &mut impl BufRead) -> Result<Option<Vec<u8>>, PublishError> {
    let mut line = Vec::new();
    if input.take(INPUT_BYTES as u64 + 1).read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.len() > INPUT_BYTES {
        return Err(PublishError::TooLarge);
    }
    if line.pop_if(|last| *last == b'\n').is_some() {
        line.pop_if(|last| *last == b'\r');
    }
    Ok(Some(line))
}

fn read_all(input: &mut impl BufRead) -> Result<Vec<u8>, PublishError> {
    let mut data = Vec::new();
    input.take(INPUT_BYTES as u64 + 1).read_to_end(&mut data)?;
    if data.len() > INPUT_BYTES { Err(PublishError::TooLarge) } else { Ok(data) }
}

struct Publisher<'a> {
    args: &'a Args,
    /// Kept from one line to the next.
    connection: Option<Connection>,
}

impl Publisher<'_> {
    fn publish(&mut self, data: &[u8], key: Option<&str>, output: &mut impl Write) -> Result<(), PublishError> {
        let url = &self.args.url;
        let target = format!("{}/publish/{}", url.prefix, http1::percent_encode(&self.args.channel));
        let authority = url.authority();
        let mut headers = vec![("Host", authority.as_str())];
        headers.extend(key.map(|key| ("Idempotency-Key", key)));
        let mut request = Vec::new();
        http1::write_request(&mut request, "POST", &target, &headers, Some(data.len()));
        request.extend_from_slice(data);

        let mut connection = match self.connection.take().filter(|connection| !connection.is_stale()) {
            Some(connection) => connection,
            None => {
                let connection = Connection::open(url)?;
                let timeout = Some(Duration::from_millis(CLIENT_ANSWER_MILLIS));
                connection.stream().set_read_timeout(timeout).map_err(HttpError::Io)?;
                connection
            }
        };
        let response = connection.exchange(&request, "POST")?;
        if response.head.keep_alive() {
            self.connection = Some(connection);
        }
        if !response.is_success() {
            return Err(PublishError::Refused(response.complaint()));
        }
        let Published { cursor } = serde_json::from_slice(&response.body).map_err(PublishError::Answer)?;
        if self.args.json {
            output.write_all(response.body.trim_ascii_end())?;
        } else {
            output.write_all(cursor.as_bytes())?;
        }
        output.write_all(b"\n")?;
        Ok(output.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::net::TcpListener;

    #[derive(Parser)]
    struct CommandLine {
        #[command(flatten)]
        args: Args,
    }

    /// Answers each request with the next of `answers`, after which it closes the connection when the answer says so;
    /// gives the requests back.
    fn server(answers: &'static [&'static str]) -> (String, std::thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/edge", listener.local_addr().unwrap());
        let thread = std::thread::spawn(move || {
            let mut requests = Vec::new();
            let (mut stream, _) = listener.accept().unwrap();
            for (number, answer) in answers.iter().enumerate() {
                let mut request = vec![0; 4096];
                // A request this small arrives in one piece on loopback.
                let count = stream.read(&mut request).unwrap();
                requests.push(String::from_utf8(request[..count].into()).unwrap());
                stream.write_all(answer.as_bytes()).unwrap();
                if answer.contains("Connection: close") && number + 1 < answers.len() {
                    stream = listener.accept().unwrap().0;
                }
            }
            requests
        });
        (url, thread)
    }

    fn publish_with(url: &str, options: &[&str], input: &str) -> (Result<(), PublishError>, String, usize) {
        let line = CommandLine::try_parse_from(["publish", "--url", url].iter().chain(options)).unwrap();
        let (mut output, mut number) = (Vec::new(), 0);
        let result = publish(&line.args, &mut input.as_bytes(), &mut output, &mut number);
        (result, String::from_utf8(output).unwrap(), number)
    }

    const FIRST: &str = "HTTP/1.1 200 OK\r\nContent-Length: 25\r\n\r\n{\"cursor\":\"a.b.1\",\"x\":0}\n";
    const SECOND: &str = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 18\r\n\r\n{\"cursor\":\"a.b.2\"}";
    const REFUSAL: &str =
        "HTTP/1.1 413 Content Too Large\r\nContent-Length: 33\r\n\r\n{\"error\":\"big\",\"allowed\":\"small\"}";

    #[test]
    fn prints_the_position() {
        let (url, thread) = server(&[FIRST]);
        let (result, output, _) = publish_with(&url, &["--idempotency-key", "k1", "räume/1", "{\"a\":1}"], "");
        result.unwrap();
        assert_eq!(output, "a.b.1\n");
        let requests = thread.join().unwrap();
        assert!(requests[0].starts_with("POST /edge/publish/r%C3%A4ume%2F1 HTTP/1.1\r\n"), "{}", requests[0]);
        assert!(requests[0].contains("\r\nIdempotency-Key: k1\r\n"));
        assert!(requests[0].ends_with("\r\nContent-Length: 7\r\n\r\n{\"a\":1}"));
    }

    #[test]
    fn standard_input_is_published_as_it_is() {
        for data in [&["c", "-"][..], &["c"]] {
            let (url, thread) = server(&[FIRST]);
            let (result, output, _) = publish_with(&url, &[&["--json"], data].concat(), "two\nlines\n");
            result.unwrap();
            assert_eq!(output, "{\"cursor\":\"a.b.1\",\"x\":0}\n");
            assert!(thread.join().unwrap()[0].ends_with("\r\n\r\ntwo\nlines\n"));
        }
    }

    #[test]
    fn each_line_is_published_over_one_connection_until_one_is_refused() {
        let (url, thread) = server(&[FIRST, SECOND, REFUSAL]);
        let (result, output, line) =
            publish_with(&url, &["--lines", "--idempotency-key", "k", "c"], "1\r\n\nxxx\nnever");
        assert_eq!(result.unwrap_err().to_string(), "HTTP 413: big (allowed: small)");
        assert_eq!((output.as_str(), line), ("a.b.1\na.b.2\n", 3));
        let requests = thread.join().unwrap();
        for (request, (key, body)) in requests.iter().zip([("k-1", "1"), ("k-2", ""), ("k-3", "xxx")]) {
            assert!(request.contains(&format!("\r\nIdempotency-Key: {key}\r\n")));
            assert!(request.ends_with(&format!("\r\n\r\n{body}")));
        }
    }

    #[test]
    fn a_bad_name_is_refused_before_anything_is_sent() {
        let (result, ..) = publish_with("http://127.0.0.1:1", &["a\nb", "x"], "");
        assert!(matches!(result, Err(PublishError::Name(NameError::Control(10)))));
    }
}
