//! `kiln run`: containers in μVMs without containerd. What a person at a terminal, or a script, relies on.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::future::try_join_all;
use kiln_e2e::harness::Case;
use kiln_e2e::{Test, cases, setup, wait};
use kiln_test_images::catalog;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    let all = cases![
        size_asked_for_is_what_the_guest_sees.limit(300),
        exit_codes_and_streams_are_the_commands,
        signals_reach_the_command,
        twenty_at_once_are_all_different.limit(600).alone(),
        nothing_is_left_when_the_vmm_is_killed,
        command_that_cannot_be_started_is_told_apart,
        volumes_are_the_hosts_own_files,
    ];
    let named = |case: Case| case.only_with("kiln", "run");
    all.into_iter().map(named).collect()
}

/// Where running μVMs have their directories.
const PLACES: &str = "/run/kiln/run";

/// The test image as an archive, and a name that starts with the test's id.
pub(crate) struct Kiln<'a> {
    test: &'a Test,
    image: PathBuf,
}

impl<'a> Kiln<'a> {
    pub(crate) fn new(test: &'a Test) -> Result<Self> {
        let image = test.scratch().join("busybox.tar");
        let file = std::fs::File::create(&image)?;
        setup::Images::make()?
            .busybox
            .write_archive(catalog::BUSYBOX, file)?;
        Ok(Kiln { test, image })
    }

    /// Where the image is.
    pub(crate) fn archive(&self) -> &str {
        self.image.to_str().unwrap_or_default()
    }

    /// `kiln run`, ready to be started; the name of the μVM goes with it.
    pub(crate) fn command(&self, options: &[&str], command: &[&str]) -> (Command, String) {
        let name = self.test.unique("run");
        self.test.made(&name);
        let mut run = Command::new("kiln");
        run.arg("run").args(["--name", &name]).args(options);
        run.arg(&self.image).arg("--").args(command);
        run.stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        (run, name)
    }

    pub(crate) async fn run(&self, options: &[&str], command: &[&str]) -> Result<Output> {
        let (mut run, _) = self.command(options, command);
        run.output().await.context("kiln is not on the PATH")
    }

    /// What the script prints; it has to succeed.
    pub(crate) async fn shell(&self, options: &[&str], script: &str) -> Result<String> {
        let output = self.run(options, &["sh", "-c", script]).await?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            bail!("{script}: {}\n{text}{errors}", output.status);
        }
        Ok(text)
    }

    /// Starts a script that prints `ready`, and comes back when it has.
    pub(crate) async fn started(&self, options: &[&str], script: &str) -> Result<(Child, String)> {
        let (mut run, name) = self.command(options, &["sh", "-c", script]);
        let mut child = run.spawn().context("kiln is not on the PATH")?;
        let mut stdout = child.stdout.take().context("no output")?;
        let mut seen = Vec::new();
        while !seen.ends_with(b"ready\n") {
            let read = tokio::io::AsyncReadExt::read_buf(&mut stdout, &mut seen).await?;
            if read == 0 {
                let output = child.wait_with_output().await?;
                bail!("{}", String::from_utf8_lossy(&output.stderr));
            }
        }
        // The rest is not read; it is little.
        child.stdout = Some(stdout);
        Ok((child, name))
    }
}

pub(crate) fn send(child: &Child, signal: i32) -> Result<()> {
    let pid = child.id().context("it has ended")?;
    // SAFETY: kill takes numbers; the process is a child of ours that nobody has waited for.
    let sent = unsafe { libc::kill(pid.cast_signed(), signal) };
    ensure!(sent == 0, "{}", std::io::Error::last_os_error());
    Ok(())
}

async fn size_asked_for_is_what_the_guest_sees(test: Test) -> Result<()> {
    let kiln = Kiln::new(&test)?;
    let script = "nproc; grep -E '^(MemTotal|MemAvailable):' /proc/meminfo";
    // Not less than was baked.
    for (cpus, mib) in [("1", 320), ("1", 1024), ("2", 512)] {
        let memory = format!("{mib}Mi");
        let text = kiln
            .shell(&["--cpus", cpus, "--memory", &memory], script)
            .await?;
        let mut lines = text.lines();
        same!(lines.next(), Some(cpus), "vCPUs of {mib} MiB");
        let total = lines
            .next()
            .and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
            .with_context(|| text.clone())?;
        // The kernel keeps a part to itself before it counts: itself, and its table of pages.
        let (most, least) = (mib << 10, (mib << 10) - (64 << 10));
        ensure!(
            (least..=most).contains(&total),
            "{mib} MiB asked for, {total} kB seen"
        );
    }
    // Less than any μVM has: the container's own limit.
    let limit = kiln
        .shell(&["--memory", "64Mi"], "cat /sys/fs/cgroup/memory.max")
        .await?;
    same!(limit.trim(), (64 << 20).to_string());
    Ok(())
}

async fn exit_codes_and_streams_are_the_commands(test: Test) -> Result<()> {
    let kiln = Kiln::new(&test)?;
    for code in [0, 1, 42, 255] {
        let script = format!("echo out; echo err >&2; exit {code}");
        let output = kiln.run(&[], &["sh", "-c", &script]).await?;
        same!(output.status.code(), Some(code));
        same!(&*output.stdout, b"out\n");
        same!(&*output.stderr, b"err\n");
    }
    // Input goes in and comes out whole, and its end is passed on.
    let (mut run, _) = kiln.command(&["-i"], &["cat"]);
    let mut child = run.stdin(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("no input")?;
    let sent: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
    let write = {
        let sent = sent.clone();
        tokio::spawn(async move {
            stdin.write_all(&sent).await?;
            stdin.shutdown().await
        })
    };
    let output = child.wait_with_output().await?;
    write.await??;
    ensure!(
        output.stdout == sent,
        "{} of {} bytes came back, or others: {}",
        output.stdout.len(),
        sent.len(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

async fn signals_reach_the_command(test: Test) -> Result<()> {
    let kiln = Kiln::new(&test)?;
    for (signal, name) in [(libc::SIGTERM, "TERM"), (libc::SIGINT, "INT")] {
        let script = format!(
            "trap 'echo got {name}; exit 33' {name}; echo ready; while :; do sleep 0.1; done"
        );
        let (child, _) = kiln.started(&[], &script).await?;
        send(&child, signal)?;
        let output = child.wait_with_output().await?;
        same!(output.status.code(), Some(33), "{name}");
        same!(&*output.stdout, format!("got {name}\n").as_bytes());
    }
    // The shell's child has no handler: the signal that the shell hands on ends it, and the code says so. Before it runs
    // its program it has the shell's.
    let script = "trap 'kill $!; wait $!; exit $?' TERM; sleep 600 & \
                  until grep -q ^sleep /proc/$!/cmdline; do :; done; echo ready; wait";
    let (child, _) = kiln.started(&[], script).await?;
    send(&child, libc::SIGTERM)?;
    let output = child.wait_with_output().await?;
    same!(output.status.code(), Some(128 + libc::SIGTERM));
    // Who ignores a signal gets an end from whoever insists.
    let (mut child, _) = kiln
        .started(&[], "trap '' INT; echo ready; exec sleep 600")
        .await?;
    let start = Instant::now();
    let status = loop {
        send(&child, libc::SIGINT)?;
        // Signals that come while one is pending are one.
        if let Ok(status) = tokio::time::timeout(Duration::from_secs(1), child.wait()).await {
            break status?;
        }
        ensure!(start.elapsed() < Duration::from_secs(60), "it still runs");
    };
    same!(status.code(), Some(128 + libc::SIGKILL));
    Ok(())
}

async fn twenty_at_once_are_all_different(test: Test) -> Result<()> {
    const MANY: usize = 20;
    let kiln = Kiln::new(&test)?;
    // The root file system is made before, so that the μVMs really are resumed at the same time.
    kiln.shell(&[], "true").await?;
    // Machine id: the guest's own; a container has its image's. The boot id is every container's.
    let script = "od -An -N16 -tx1 /dev/urandom | tr -d ' '; cat /proc/sys/kernel/random/boot_id; \
                  cat /sys/class/net/e*/address; hostname; cat /proc/sys/kernel/random/uuid; date +%s";
    let before = seconds()?;
    let all = try_join_all((0..MANY).map(|_| kiln.shell(&[], script))).await?;
    let after = seconds()?;
    let kinds = [
        "random bytes",
        "boot id",
        "MAC address",
        "host name",
        "UUID",
    ];
    for (position, kind) in kinds.into_iter().enumerate() {
        let values: BTreeSet<&str> = all
            .iter()
            .filter_map(|text| text.lines().nth(position))
            .filter(|value| !value.is_empty())
            .collect();
        same!(values.len(), MANY, "different values of {kind}: {values:?}");
    }
    // The clock is no clone's: it was baked at another time.
    for text in &all {
        let clock: u64 = text.lines().nth(kinds.len()).unwrap_or_default().parse()?;
        ensure!(
            (before..=after + 1).contains(&clock),
            "the guest has {clock}, between {before} and {after}"
        );
    }
    Ok(())
}

fn seconds() -> Result<u64> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    Ok(now.as_secs())
}

async fn nothing_is_left_when_the_vmm_is_killed(test: Test) -> Result<()> {
    let kiln = Kiln::new(&test)?;
    let (child, name) = kiln.started(&[], "echo ready; exec sleep 600").await?;
    let listed = Command::new("kiln").args(["--json", "ps"]).output().await?;
    let listed: Vec<serde_json::Value> = serde_json::from_slice(&listed.stdout)?;
    let own = listed
        .iter()
        .find(|one| one["name"] == *name)
        .with_context(|| format!("{name} is not in {listed:?}"))?;
    let vmm = own["vmm"].as_i64().context("no VMM")?;
    // SAFETY: kill takes numbers; the VMM is a child of the `kiln run` that is ours.
    ensure!(unsafe { libc::kill(i32::try_from(vmm)?, libc::SIGKILL) } == 0);
    let output = child.wait_with_output().await?;
    same!(output.status.code(), Some(125));
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(errors.contains("the μVM ended"), "{errors}");
    let place = std::path::Path::new(PLACES).join(&name);
    ensure!(!place.exists(), "{} is left", place.display());

    // And when it is `kiln run` itself: its VMM goes with it, and the next command sweeps up.
    let (mut child, name) = kiln.started(&[], "echo ready; exec sleep 600").await?;
    child.kill().await?;
    wait::until("the VMM's end", Duration::from_secs(20), || async {
        let left = kiln_e2e::node::processes()?;
        let parent = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/status"));
        let orphans = left.iter().filter(|process| {
            process.command.contains("kiln-vmm serve")
                && parent(process.pid).is_ok_and(|status| status.contains("\nPPid:\t1\n"))
        });
        Ok((orphans.count() == 0).then_some(()))
    })
    .await?;
    kiln.shell(&[], "true").await?;
    ensure!(!std::path::Path::new(PLACES).join(name).exists());
    Ok(())
}

async fn command_that_cannot_be_started_is_told_apart(test: Test) -> Result<()> {
    let kiln = Kiln::new(&test)?;
    for (command, code) in [("no-such-command", 127), ("/etc/passwd", 126)] {
        let output = kiln.run(&[], &[command]).await?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        same!(output.status.code(), Some(code), "{errors}");
        ensure!(
            errors.contains(command) && errors.lines().count() == 1,
            "{errors}"
        );
    }
    Ok(())
}

async fn volumes_are_the_hosts_own_files(test: Test) -> Result<()> {
    let kiln = Kiln::new(&test)?;
    let file = test.write("volume/in", "from the host\n")?;
    let folder = file.parent().context("no folder")?;
    let volume = format!("{}:/data", folder.display());
    let only = format!("{}:/only:ro", folder.display());
    let options = ["-v", &volume, "-v", &only];
    let script = "cat /data/in; echo from the guest > /data/out; echo no 2>/dev/null > /only/x || echo refused";
    let text = kiln.shell(&options, script).await?;
    same!(
        text.lines().collect::<Vec<_>>(),
        ["from the host", "refused"]
    );
    same!(
        std::fs::read_to_string(folder.join("out"))?,
        "from the guest\n"
    );
    Ok(())
}
