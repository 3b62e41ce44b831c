//! `kiln run -t`, `kiln exec -t` and `kiln console`, from a terminal: what a person types, sees, and gets back.

use std::ops::{Deref, DerefMut};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::terminal::Terminal;
use kiln_e2e::{Test, cases, wait};
use tokio::process::{Child, Command};

use super::kiln_run::Kiln;
use super::same;

pub(crate) fn cases() -> Vec<Case> {
    let all = cases![
        shell_in_a_terminal_is_one_to_work_in,
        exec_has_a_terminal_of_its_own,
        console_shows_what_the_guests_kernel_says,
    ];
    let named = |case: Case| case.only_with("kiln", "run");
    all.into_iter().map(named).collect()
}

/// How long an answer may take.
const STEP: Duration = Duration::from_secs(40);
/// A first process that ends when it is asked to, from the moment that it says so.
const FIRST: &str = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.1; done";
const CTRL_C: &str = "\x03";
const CTRL_Z: &str = "\x1a";

/// A terminal in which a shell runs.
struct Shell(Terminal);

impl Deref for Shell {
    type Target = Terminal;

    fn deref(&self) -> &Terminal {
        &self.0
    }
}

impl DerefMut for Shell {
    fn deref_mut(&mut self) -> &mut Terminal {
        &mut self.0
    }
}

impl Shell {
    fn new(columns: u16, rows: u16) -> Result<Self> {
        Terminal::new(columns, rows).map(Shell)
    }

    /// Waits until the shell asks for a line.
    async fn prompt(&mut self) -> Result<()> {
        self.wait_for("/ # ").await
    }

    /// Types a line and waits for what it prints.
    async fn ask(&mut self, line: &str, answer: &str) -> Result<()> {
        self.type_keys(&format!("{line}\n"))?;
        self.wait_for(answer)
            .await
            .with_context(|| format!("after {line:?}"))
    }

    async fn sees_size(&mut self, columns: u16, rows: u16) -> Result<()> {
        let wanted = format!("{rows} {columns}\r\n");
        let start = Instant::now();
        // The new size is on its way; nothing tells the test when it has arrived.
        loop {
            let before = self.read_to();
            self.ask("stty size; echo do''ne", "done\r\n").await?;
            let seen = self.text_since(before);
            self.prompt().await?;
            if seen.contains(&wanted) {
                return Ok(());
            }
            ensure!(start.elapsed() < STEP, "{wanted:?} is not in {seen:?}");
        }
    }
}

/// The exit code, and the terminal as it was before.
async fn ended(mut child: Child, terminal: &Terminal, modes: [u32; 4]) -> Result<Option<i32>> {
    let Ok(status) = tokio::time::timeout(STEP, child.wait()).await else {
        bail!("it still runs; the terminal says {:?}", terminal.rest());
    };
    same!(terminal.modes()?, modes, "the terminal's modes");
    Ok(status?.code())
}

async fn shell_in_a_terminal_is_one_to_work_in(test: Test) -> Result<()> {
    let kiln = Kiln::new(&test)?;
    let mut terminal = Shell::new(90, 25)?;
    let modes = terminal.modes()?;
    let (command, _) = kiln.command(&["-it"], &["sh"]);
    let child = terminal.start(command)?;
    terminal.prompt().await?;
    ensure!(
        terminal.modes()? != modes,
        "keys are not passed on as they are typed"
    );
    terminal
        .ask("test -t 0 && test -t 2 && tty", "/dev/pts/0\r\n")
        .await?;
    terminal.prompt().await?;
    terminal.sees_size(90, 25).await?;
    terminal.resize(101, 33)?;
    terminal.sees_size(101, 33).await?;

    // Ctrl-C ends what is in front, and the shell goes on. The words are in pieces, so that the echo of the
    // line is no answer.
    let line = "sh -c 'echo run''ning; exec sleep 1000'";
    terminal.ask(line, "running\r\n").await?;
    terminal.type_keys(CTRL_C)?;
    terminal.prompt().await?;
    terminal
        .ask("echo ended with $?", "ended with 130\r\n")
        .await?;
    terminal.prompt().await?;

    // Stopped, listed, in front again, ended.
    terminal.ask("testprog signals INT=77", "ready\r\n").await?;
    terminal.type_keys(CTRL_Z)?;
    terminal.wait_for("Stopped").await?;
    terminal.prompt().await?;
    terminal.ask("jobs", "Stopped").await?;
    terminal.prompt().await?;
    terminal.ask("fg", "signal CONT\r\n").await?;
    terminal.type_keys(CTRL_C)?;
    terminal.wait_for("signal INT\r\n").await?;
    terminal.prompt().await?;
    terminal
        .ask("echo ended with $?", "ended with 77\r\n")
        .await?;
    terminal.prompt().await?;
    terminal.ask("sleep 1000 &", "/ # ").await?;
    terminal.ask("jobs", "Running").await?;
    terminal.prompt().await?;
    terminal
        .ask("kill %1; wait %1; echo killed $?", "killed 143\r\n")
        .await?;
    terminal.prompt().await?;

    terminal.type_keys("exit 7\n")?;
    same!(ended(child, &terminal, modes).await?, Some(7));

    // Ctrl-C reaches a first process too, which asked for it.
    let mut terminal = Shell::new(80, 24)?;
    let script = "trap 'exit 9' INT; echo ready; while :; do sleep 0.1; done";
    let (command, _) = kiln.command(&["-it"], &["sh", "-c", script]);
    let child = terminal.start(command)?;
    terminal.wait_for("ready\r\n").await?;
    terminal.type_keys(CTRL_C)?;
    same!(ended(child, &terminal, modes).await?, Some(9));

    // Without a terminal there is nothing to lend.
    let output = kiln.run(&["-t"], &["true"]).await?;
    same!(output.status.code(), Some(125));
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(errors.contains("needs a terminal"), "{errors}");
    Ok(())
}

async fn exec_has_a_terminal_of_its_own(test: Test) -> Result<()> {
    let kiln = Kiln::new(&test)?;
    let (mut child, name) = kiln.started(&[], FIRST).await?;
    let mut terminal = Shell::new(70, 20)?;
    let modes = terminal.modes()?;
    let mut command = Command::new("kiln");
    command.args(["exec", "-it", "-e", "PLACE=here", "-w", "/tmp", &name, "sh"]);
    command.kill_on_drop(true);
    let shell = terminal.start(command)?;
    terminal.wait_for(" # ").await?;
    terminal
        .ask("echo $PLACE $PWD $(tty); cd /", "here /tmp /dev/pts/0\r\n")
        .await?;
    terminal.prompt().await?;
    terminal.sees_size(70, 20).await?;
    terminal.resize(120, 40)?;
    terminal.sees_size(120, 40).await?;
    terminal.ask("testprog signals INT=6", "ready\r\n").await?;
    terminal.type_keys(CTRL_C)?;
    terminal.prompt().await?;
    // The end of input is the end of a shell, with the code of what ran last.
    terminal.type_keys("\x04")?;
    same!(ended(shell, &terminal, modes).await?, Some(6));
    super::kiln_run::send(&child, libc::SIGTERM)?;
    let ended = tokio::time::timeout(STEP, child.wait()).await;
    same!(ended.context("it still runs")??.code(), Some(0));
    Ok(())
}

async fn console_shows_what_the_guests_kernel_says(test: Test) -> Result<()> {
    let kiln = Kiln::new(&test)?;
    // The kernel tells of every process that it kills for want of memory.
    let script = "testprog fill 200 4 > /dev/null 2>&1; echo child $?; trap 'exit 0' TERM; \
                  echo ready; while :; do sleep 0.1; done";
    let (child, name) = kiln.started(&["--memory", "64Mi"], script).await?;
    let mut follow = Command::new("kiln");
    follow
        .args(["console", "--follow", &name])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let follow = follow.spawn()?;
    wait::until("the kernel's words on the console", STEP, || async {
        let output = Command::new("kiln")
            .args(["console", &name])
            .output()
            .await?;
        ensure!(output.status.success(), "{output:?}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.contains("Killed process").then_some(()))
    })
    .await?;
    super::kiln_run::send(&child, libc::SIGTERM)?;
    let output = tokio::time::timeout(STEP, child.wait_with_output()).await??;
    same!(output.status.code(), Some(0));
    // Whoever follows it sees the same, and its end.
    let output = tokio::time::timeout(STEP, follow.wait_with_output()).await??;
    ensure!(
        output.status.success()
            && String::from_utf8_lossy(&output.stdout).contains("Killed process"),
        "{output:?}"
    );
    let output = Command::new("kiln")
        .args(["console", &name])
        .output()
        .await?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !output.status.success() && errors.contains("kiln ps"),
        "{errors}"
    );
    Ok(())
}
