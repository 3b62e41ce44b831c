//! A small HTTP server and client.
//!
//! `GET /` answers the host name, `/report` the report, `/bytes/N` N known bytes, `/hash` the
//! SHA-256 of the request's body, `/peer` the client's address.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::files::{Content, hex};
use crate::report;
use crate::text::say;

/// Seed of what `/bytes/N` answers.
const BYTES_SEED: u64 = 1;

/// Serves on all addresses of both families; prints `listening PORT`.
pub(crate) fn serve(port: u16) -> Result<()> {
    listen(port, answer)
}

/// Answers connections, a thread for each; prints `listening PORT`.
pub(crate) fn listen(
    port: u16,
    answer: impl Fn(&TcpStream) -> Result<()> + Clone + Send + 'static,
) -> Result<()> {
    let listener = TcpListener::bind(("::", port))
        .or_else(|_| TcpListener::bind(("0.0.0.0", port)))
        .with_context(|| format!("cannot listen on port {port}"))?;
    say(&format!(
        "listening {}",
        listener.local_addr().context("no address")?.port()
    ))?;
    for connection in listener.incoming() {
        let connection = connection.context("cannot accept a connection")?;
        let answer = answer.clone();
        std::thread::Builder::new()
            .name("connection".to_owned())
            .spawn(move || {
                if let Err(error) = answer(&connection) {
                    eprintln!("testprog: connection: {error:#}");
                }
            })
            .context("cannot start a thread")?;
    }
    Ok(())
}

fn answer(connection: &TcpStream) -> Result<()> {
    let peer = connection.peer_addr().context("no peer address")?;
    let mut input = BufReader::new(connection);
    while let Some(request) = Request::read(&mut input)? {
        respond(&request, peer, connection)?;
        if request.close {
            break;
        }
    }
    Ok(())
}

fn respond(request: &Request, peer: SocketAddr, mut out: &TcpStream) -> Result<()> {
    let bytes = request
        .path
        .strip_prefix("/bytes/")
        .and_then(|count| count.parse::<u64>().ok());
    if let Some(bytes) = bytes {
        write!(out, "HTTP/1.1 200 OK\r\nContent-Length: {bytes}\r\n\r\n")?;
        for piece in Content::new(bytes, BYTES_SEED) {
            out.write_all(&piece)?;
        }
        return Ok(out.flush()?);
    }
    let (status, body) = match request.path.as_str() {
        "/" => ("200 OK", report::hostname()),
        "/report" => ("200 OK", report::report().to_string()),
        "/peer" => ("200 OK", peer.ip().to_canonical().to_string()),
        "/hash" => ("200 OK", hex(&Sha256::digest(&request.body))),
        path => ("404 Not Found", format!("nothing at {path}")),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    out.write_all(format!("{head}{body}").as_bytes())?;
    Ok(out.flush()?)
}

#[derive(Debug, PartialEq)]
struct Request {
    path: String,
    body: Vec<u8>,
    close: bool,
}

impl Request {
    /// The next request of a connection; `None` at its end.
    fn read(input: &mut impl BufRead) -> Result<Option<Request>> {
        let mut first = String::new();
        if input.read_line(&mut first)? == 0 {
            return Ok(None);
        }
        let mut words = first.split_whitespace();
        let (Some(_method), Some(path), Some(version)) = (words.next(), words.next(), words.next())
        else {
            bail!("{first:?} is no HTTP request");
        };
        let mut request = Request {
            path: path.to_owned(),
            body: Vec::new(),
            close: version == "HTTP/1.0",
        };
        let mut length = 0usize;
        for header in headers(input)? {
            match (header.0.as_str(), header.1.as_str()) {
                ("content-length", value) => length = value.parse().context("content-length")?,
                ("connection", "close") => request.close = true,
                _ => {}
            }
        }
        if length > 64 << 20 {
            bail!("a body of {length} bytes is more than this server keeps");
        }
        request.body.resize(length, 0);
        input.read_exact(&mut request.body)?;
        Ok(Some(request))
    }
}

/// Header lines up to the empty one, names in lower case.
fn headers(input: &mut impl BufRead) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    loop {
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            bail!("the connection ended within the headers");
        }
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(found);
        }
        if let Some((name, value)) = line.split_once(':') {
            found.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
}

/// Gets `path` from `address` and prints the body; exit code 22 (as curl's) unless the status is 200.
pub(crate) fn get(address: &str, path: &str) -> Result<ExitCode> {
    let mut connection =
        TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    write!(
        connection,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut input = BufReader::new(connection);
    let mut status = String::new();
    input.read_line(&mut status)?;
    headers(&mut input)?;
    let mut body = Vec::new();
    input.read_to_end(&mut body)?;
    std::io::stdout()
        .write_all(&body)
        .context("cannot write to stdout")?;
    if status.split_whitespace().nth(1) == Some("200") {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("testprog: {address}{path} answered {status:?}");
    Ok(ExitCode::from(22))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Option<Request>> {
        Request::read(&mut BufReader::new(text.as_bytes()))
    }

    #[test]
    fn a_request_is_read_with_its_body() {
        let request = read("POST /hash HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcd").unwrap();
        let expected = Request {
            path: "/hash".into(),
            body: b"abc".to_vec(),
            close: false,
        };
        assert_eq!(request, Some(expected));
    }

    #[test]
    fn what_is_not_http_is_an_error_and_the_end_is_the_end() {
        assert!(read("hello\r\n\r\n").is_err());
        assert!(read("GET / HTTP/1.1\r\n").is_err());
        assert_eq!(read("").unwrap(), None);
    }

    #[test]
    fn server_and_client_understand_each_other() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                answer(&connection.unwrap()).unwrap();
            }
        });
        assert_eq!(get(&address, "/peer").unwrap(), ExitCode::SUCCESS);
        assert_eq!(get(&address, "/nowhere").unwrap(), ExitCode::from(22));
    }
}
