//! `kubectl`, as people type it.

use std::process::{ExitStatus, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::config::Layout;

/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(180);
/// What kubectl learns of the API it keeps here, so that not each command has to ask.
const HOME: &str = "/var/lib/kiln-k8s/home";

/// `kubectl` with the rights of an administrator, in one namespace.
#[derive(Debug, Clone)]
pub struct Kubectl {
    namespace: String,
}

impl Kubectl {
    /// In this namespace.
    pub fn new(namespace: &str) -> Self {
        Kubectl {
            namespace: namespace.to_owned(),
        }
    }

    /// The command, ready to be started. It ends with whoever started it.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("kubectl");
        command
            .arg(format!("--namespace={}", self.namespace))
            .args(arguments)
            .env("KUBECONFIG", Layout::default().kubeconfig("admin"))
            .env("HOME", HOME)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Runs it to its end, with something to read.
    pub async fn output(&self, arguments: &[&str], input: &str) -> Result<Output> {
        finish(self.command(arguments), arguments, input).await
    }

    /// Starts it with somebody in front of it.
    pub fn talk(&self, arguments: &[&str]) -> Result<Talk> {
        Talk::start(self.command(arguments))
    }

    /// Runs it to its end; what it wrote. An error unless it succeeds.
    pub async fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.output(arguments, "").await?;
        if !output.status.success() {
            bail!(
                "kubectl {}: {}: {}{}",
                arguments.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr),
                String::from_utf8_lossy(&output.stdout)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// A command that is talked with.
pub struct Talk {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
    seen: String,
}

impl Talk {
    fn start(mut command: Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("cannot start kubectl")?;
        let stdout = child.stdout.take().context("kubectl without an output")?;
        Ok(Talk {
            stdin: child.stdin.take(),
            child,
            stdout,
            seen: String::new(),
        })
    }

    /// Waits until `text` was said; what was said before it, since the last time.
    pub async fn hear(&mut self, text: &str) -> Result<String> {
        let heard = tokio::time::timeout(LIMIT, async {
            while !self.seen.contains(text) {
                let mut bytes = [0; 4096];
                let count = self.stdout.read(&mut bytes).await?;
                if count == 0 {
                    bail!(
                        "kubectl ended before it said {text:?}, but said {:?}",
                        self.seen
                    );
                }
                let said = bytes.get(..count).unwrap_or_default();
                self.seen.push_str(&String::from_utf8_lossy(said));
            }
            Ok(())
        });
        match heard.await {
            Ok(heard) => heard?,
            Err(_) => bail!(
                "not said in {} s: {text:?}; said: {:?}",
                LIMIT.as_secs(),
                self.seen
            ),
        }
        let (before, after) = self.seen.split_once(text).unwrap_or_default();
        let (before, after) = (before.to_owned(), after.to_owned());
        self.seen = after;
        Ok(before)
    }

    /// Says something.
    pub async fn say(&mut self, text: &str) -> Result<()> {
        let stdin = self
            .stdin
            .as_mut()
            .context("nothing can be said any more")?;
        stdin.write_all(text.as_bytes()).await?;
        stdin.flush().await.context("kubectl does not listen")
    }

    /// Says nothing more, and waits for the end; its status and what else it said.
    pub async fn end(mut self) -> Result<(ExitStatus, String)> {
        self.stdin = None;
        let mut rest = self.seen;
        let both = async {
            self.stdout.read_to_string(&mut rest).await?;
            self.child.wait().await
        };
        match tokio::time::timeout(LIMIT, both).await {
            Ok(status) => Ok((status?, rest)),
            Err(_) => bail!("kubectl has not ended after {} s", LIMIT.as_secs()),
        }
    }
}

async fn finish(mut command: Command, arguments: &[&str], input: &str) -> Result<Output> {
    let words = || format!("kubectl {}", arguments.join(" "));
    let mut child = command
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", words()))?;
    let stdin = child.stdin.take();
    let talk = async {
        if let Some(mut stdin) = stdin {
            // One that has ended reads nothing more; its exit code says what that means.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        anyhow::Ok(())
    };
    let both = async { tokio::join!(talk, child.wait_with_output()).1 };
    match tokio::time::timeout(LIMIT, both).await {
        Ok(output) => output.with_context(words),
        Err(_) => bail!("{} has not ended after {} s", words(), LIMIT.as_secs()),
    }
}
