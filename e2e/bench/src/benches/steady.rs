//! What a running pod's network and disk give, the runtimes taking turns.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use kiln_e2e::pod::STEP;
use kiln_e2e::{Container, ContainerSpec, PodSpec, Test, setup};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::Settings;
use crate::result::Measured;

/// Requests of one sample, one after the other on one connection.
const REQUESTS: u32 = 200;
/// Connections that ask at the same time.
const CONNECTIONS: usize = 8;
/// What a sample writes and reads.
const MIB: u32 = 64;
const FIGURES: [&str; 4] = ["request", "8 at once, request", "write", "read"];

/// A pod that answers HTTP.
struct Server {
    test: Test,
    container: Container,
    address: String,
}

impl Server {
    async fn start(runtime: &str) -> Result<Self> {
        let test = Test::new("steady", runtime).await?;
        // All of what is written stays in kiln's overlay's RAM; runc's goes to the node's page cache.
        let spec = PodSpec::new().annotation("kiln.dev/overlay-ram", "256Mi");
        let pod = test.run_pod(&spec).await?;
        let container = pod
            .start(&ContainerSpec::testprog("server", &["http", "80"]))
            .await?;
        container.log().wait_for("listening", STEP).await?;
        let address = format!("{}:80", pod.ip().await?);
        Ok(Server {
            test,
            container,
            address,
        })
    }

    /// How long a request takes when one connection asks again and again.
    async fn requests(&self) -> Result<Duration> {
        let connection = TcpStream::connect(&self.address).await?;
        connection.set_nodelay(true)?;
        let mut connection = BufReader::new(connection);
        let begin = Instant::now();
        for _ in 0..REQUESTS {
            request(&mut connection)
                .await
                .with_context(|| format!("asking {}", self.address))?;
        }
        Ok(begin.elapsed() / REQUESTS)
    }

    async fn shell(&self, script: &str) -> Result<Duration> {
        let begin = Instant::now();
        self.container.read(&["sh", "-c", script]).await?;
        Ok(begin.elapsed())
    }

    /// The samples of [`FIGURES`], in milliseconds.
    async fn sample(&self) -> Result<[Duration; 4]> {
        let one = self.requests().await?;
        let begin = Instant::now();
        try_join_all((0..CONNECTIONS).map(|_| self.requests())).await?;
        let many = begin.elapsed() / (REQUESTS * u32::try_from(CONNECTIONS)?);
        let write =
            format!("dd if=/dev/zero of=/file bs=1M count={MIB} conv=fsync 2>&1 && rm -f /last");
        let write = self.shell(&write).await?;
        let read = self.shell("dd if=/file of=/dev/null bs=1M 2>&1").await?;
        // So that the next sample writes a file anew.
        self.shell("mv /file /last").await?;
        Ok([one, many, write, read])
    }
}

async fn request(connection: &mut BufReader<TcpStream>) -> Result<()> {
    connection.write_all(b"GET / HTTP/1.1\r\n\r\n").await?;
    let (mut line, mut length) = (String::new(), 0);
    loop {
        line.clear();
        connection.read_line(&mut line).await?;
        match line.trim_end().split_once(": ") {
            Some(("Content-Length", value)) => length = value.parse()?,
            None if line.starts_with("HTTP/1.1 200") => {}
            None if line == "\r\n" => break,
            _ => anyhow::bail!("the answer has the line {line:?}"),
        }
    }
    let mut body = vec![0; length];
    connection.read_exact(&mut body).await?;
    ensure!(!body.is_empty(), "an empty answer");
    Ok(())
}

pub(crate) async fn run(settings: Settings) -> Result<Measured> {
    let first = settings.runtimes.first().context("no runtime to measure")?;
    let test = Test::new("steady", first).await?;
    setup::import(test.client(), &setup::Images::make()?).await?;
    if settings.runtimes.iter().any(|name| setup::needs_bake(name)) {
        setup::bake()?;
    }
    let mut servers = Vec::new();
    for runtime in &settings.runtimes {
        servers.push(Server::start(runtime).await?);
    }
    let mut measured = Measured::default();
    // Run 0 reads programs from the disk and the like: it is not counted.
    for run in 0..=settings.runs {
        for server in &servers {
            let runtime = server.test.handler();
            let sample = server.sample().await;
            let sample = sample.with_context(|| format!("run {run} with {runtime}"))?;
            for (figure, took) in FIGURES.iter().zip(sample).filter(|_| run > 0) {
                let millis = took.as_secs_f64() * 1000.0;
                measured.add(&format!("{runtime} {figure}"), "ms", millis);
            }
        }
        println!("  run {run} of {}", settings.runs);
    }
    for server in &servers {
        server.test.clean_up().await?;
    }
    if let Some((base, others)) = settings.runtimes.split_first() {
        for other in others {
            for figure in FIGURES {
                let (of, to) = (format!("{other} {figure}"), format!("{base} {figure}"));
                measured.ratio(&format!("{other}/{base} {figure}"), &of, &to)?;
            }
        }
    }
    Ok(measured)
}
