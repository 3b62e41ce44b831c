//! `kiln save` and `kiln run --from`: a container that ran goes on, as often as wanted.

use std::collections::BTreeSet;
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use kiln_e2e::harness::Case;
use kiln_e2e::{Test, cases, wait};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::kiln_run::Kiln;
use super::same;

pub(crate) fn cases() -> Vec<Case> {
    let all = cases![
        saved_container_goes_on_where_it_was.limit(300),
        container_goes_on_while_it_is_saved.limit(300),
        copies_of_one_run_at_once_and_are_different.limit(300),
        size_and_written_files_come_along.limit(300),
        what_cannot_be_saved_or_resumed_is_told_by_name.limit(300),
        saved_one_stays_in_the_store_until_it_is_removed.limit(300),
        save_that_is_killed_or_finds_the_disk_full_costs_nothing.limit(600),
    ];
    let named = |case: Case| case.only_with("kiln", "run");
    all.into_iter().map(named).collect()
}

/// How long anything may take that is waited for.
const LIMIT: Duration = Duration::from_secs(60);

/// Counts to the output and to a file until it is to end.
const COUNT: &str = "trap 'exit 0' TERM; echo ready; i=0; while :; do i=$((i+1)); echo $i >> /count; echo $i; usleep 20000; done";
/// Waits until it is to end.
const WAIT: &str = "trap 'exit 0' TERM; echo ready; while :; do usleep 50000; done";

async fn kiln(arguments: &[&str]) -> Result<Output> {
    Command::new("kiln")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .await
        .context("kiln is not on the PATH")
}

/// Has to succeed; what it prints.
async fn done(arguments: &[&str]) -> Result<String> {
    let output = kiln(arguments).await?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{arguments:?}: {errors}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Has to fail; why.
async fn refused(arguments: &[&str]) -> Result<String> {
    let output = kiln(arguments).await?;
    ensure!(!output.status.success(), "{arguments:?} was done");
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A saved μVM, which goes with the test.
struct Saved(String);

impl Saved {
    fn name(test: &Test) -> Saved {
        Saved(test.unique("saved"))
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        // One that was refused or removed is not there.
        drop(
            std::process::Command::new("kiln")
                .args(["rm", &self.0])
                .output(),
        );
    }
}

/// A container that goes on.
struct Resumed {
    child: Child,
    name: String,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Resumed {
    fn start(test: &Test, saved: &Saved, options: &[&str]) -> Result<Resumed> {
        let name = test.unique("again");
        test.made(&name);
        let mut run = Command::new("kiln");
        run.args(["run", "--name", &name, "--from", &saved.0])
            .args(options);
        let mut child = run
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdout = child.stdout.take().context("no output")?;
        let lines = BufReader::new(stdout).lines();
        Ok(Resumed { child, name, lines })
    }

    /// The next number that it counts to.
    async fn count(&mut self) -> Result<u64> {
        match self.lines.next_line().await? {
            Some(line) => line
                .parse()
                .with_context(|| format!("{line:?} is no number")),
            None => {
                let mut why = String::new();
                if let Some(errors) = self.child.stderr.as_mut() {
                    tokio::io::AsyncReadExt::read_to_string(errors, &mut why).await?;
                }
                Err(anyhow::anyhow!("it says nothing more: {why}"))
            }
        }
    }

    /// Saves it, which ends it.
    async fn save(self, saved: &Saved) -> Result<()> {
        let told = done(&["save", "--as", &saved.0, &self.name]).await;
        let output = self.child.wait_with_output().await?;
        let errors = String::from_utf8_lossy(&output.stderr);
        told.with_context(|| format!("{}: {errors}", output.status))?;
        same!(output.status.code(), Some(0), "{errors}");
        Ok(())
    }

    /// Ends it.
    async fn end(self) -> Result<()> {
        end(self.child).await
    }

    async fn exec(&self, script: &str) -> Result<String> {
        done(&["exec", &self.name, "--", "sh", "-c", script]).await
    }
}

/// Ends a container whose program ends when it is told to.
async fn end(run: Child) -> Result<()> {
    super::kiln_run::send(&run, libc::SIGTERM)?;
    let output = tokio::time::timeout(LIMIT, run.wait_with_output()).await??;
    let errors = String::from_utf8_lossy(&output.stderr);
    same!(output.status.code(), Some(0), "{errors}");
    Ok(())
}

/// The numbers that were printed.
fn numbers(output: &[u8]) -> Result<Vec<u64>> {
    let text = String::from_utf8_lossy(output);
    let lines = text.lines().filter(|line| *line != "ready");
    lines
        .map(|line| {
            line.parse()
                .with_context(|| format!("{line:?} is no number"))
        })
        .collect()
}

fn ascending(numbers: &[u64]) -> bool {
    numbers.windows(2).all(|pair| pair[1] == pair[0] + 1)
}

async fn saved_container_goes_on_where_it_was(test: Test) -> Result<()> {
    let image = Kiln::new(&test)?;
    let saved = Saved::name(&test);
    let (child, name) = image.started(&[], COUNT).await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let told = done(&["save", "--as", &saved.0, &name]).await?;
    ensure!(
        told.contains("it has ended") && told.contains(&saved.0),
        "{told}"
    );
    let output = child.wait_with_output().await?;
    same!(output.status.code(), Some(0));
    let before = numbers(&output.stdout)?;
    ensure!(before.len() > 3 && ascending(&before), "{before:?}");
    let last = *before.last().context("nothing was counted")?;

    // Twice, one after the other, from the same moment: what was said is not said again, and nothing is left out.
    for _ in 0..2 {
        let mut again = Resumed::start(&test, &saved, &[])?;
        let mut after = vec![last];
        for _ in 0..20 {
            after.push(again.count().await?);
        }
        ensure!(ascending(&after), "{after:?}");
        let file = again.exec("cat /count").await?;
        let file = numbers(file.as_bytes())?;
        ensure!(ascending(&file) && file.first() == Some(&1), "{file:?}");
        ensure!(file.last() >= after.last(), "{file:?}");
        // As any: it has a name, a place in the list, and an end.
        ensure!(done(&["ps"]).await?.contains(&again.name));
        again.end().await?;
    }
    Ok(())
}

async fn container_goes_on_while_it_is_saved(test: Test) -> Result<()> {
    let image = Kiln::new(&test)?;
    let saved = Saved::name(&test);
    let (child, name) = image.started(&[], COUNT).await?;
    let told = done(&["save", "--leave-running", "--as", &saved.0, &name]).await?;
    ensure!(told.contains("stood still for"), "{told}");
    // It answers, and goes on counting.
    let ask = ["exec", &name, "--", "tail", "-n", "1", "/count"];
    let then: u64 = done(&ask).await?.trim().parse()?;
    counts_on(&name).await?;
    let mut again = Resumed::start(&test, &saved, &[])?;
    let from = again.count().await?;
    ensure!(
        from <= then,
        "the copy begins at {from}, and not before {then}"
    );
    end(child).await?;
    again.end().await
}

async fn copies_of_one_run_at_once_and_are_different(test: Test) -> Result<()> {
    const COPIES: usize = 5;
    let image = Kiln::new(&test)?;
    let saved = Saved::name(&test);
    let (_child, name) = image.started(&[], COUNT).await?;
    done(&["save", "--as", &saved.0, &name]).await?;
    let copies = (0..COPIES).map(|_| Resumed::start(&test, &saved, &[]));
    let mut copies = copies.collect::<Result<Vec<_>>>()?;
    try_join_all(copies.iter_mut().map(Resumed::count)).await?;
    let ask = "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id; \
               head -c 16 /dev/urandom | od -An -tx1; date +%s";
    let answers = try_join_all(copies.iter().map(|copy| copy.exec(ask))).await?;
    let column = |line: usize| -> BTreeSet<&str> {
        answers
            .iter()
            .filter_map(|text| text.lines().nth(line))
            .collect()
    };
    for (line, what) in ["uuid", "boot id", "random bytes"].into_iter().enumerate() {
        same!(column(line).len(), COPIES, "{what}: {answers:?}");
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    for clock in column(3) {
        let clock: u64 = clock.parse()?;
        ensure!(
            now.as_secs().abs_diff(clock) <= 60,
            "{clock} is not {now:?}"
        );
    }
    let ends = copies.into_iter().map(Resumed::end);
    try_join_all(ends).await.map(drop)
}

async fn size_and_written_files_come_along(test: Test) -> Result<()> {
    let image = Kiln::new(&test)?;
    let saved = Saved::name(&test);
    let size = ["--cpus", "2", "--memory", "640Mi", "--overlay-ram", "8Mi"];
    // More than the overlay's RAM holds, in the file system and in memory.
    let script = "dd if=/dev/urandom of=/big bs=1M count=24 2>/dev/null; sha256sum /big > /sum; \
                  dd if=/dev/urandom of=/dev/shm/held bs=1M count=8 2>/dev/null; \
                  sha256sum /dev/shm/held >> /sum; ";
    let (_child, name) = image.started(&size, &format!("{script}{WAIT}")).await?;
    done(&["save", "--as", &saved.0, &name]).await?;
    let again = Resumed::start(&test, &saved, &[])?;
    runs(&again.name).await?;
    let text = again.exec("nproc; grep MemTotal /proc/meminfo; sha256sum -c /sum; sync; echo more >> /big; wc -c < /big").await?;
    let lines: Vec<_> = text.lines().collect();
    same!(lines.first(), Some(&"2"), "{text}");
    let total: u64 = lines
        .get(1)
        .and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .with_context(|| text.clone())?;
    ensure!(total > 550 << 10, "{text}");
    ensure!(
        text.contains("/big: OK") && text.contains("/dev/shm/held: OK"),
        "{text}"
    );
    same!(
        lines.last(),
        Some(&(24_u64 * (1 << 20) + 5).to_string().as_str()),
        "{text}"
    );

    // What goes on can be saved again, and then goes on from there.
    let later = Saved::name(&test);
    again.save(&later).await?;
    let third = Resumed::start(&test, &later, &[])?;
    runs(&third.name).await?;
    same!(third.exec("tail -c 5 /big").await?, "more\n");
    third.end().await
}

async fn what_cannot_be_saved_or_resumed_is_told_by_name(test: Test) -> Result<()> {
    let image = Kiln::new(&test)?;
    let saved = Saved::name(&test);
    let shown = test.scratch().join("shown");
    std::fs::create_dir(&shown)?;
    let volume = format!("{}:/shown", shown.display());
    let (child, name) = image.started(&["-v", &volume], COUNT).await?;
    let why = refused(&["save", &name]).await?;
    ensure!(why.contains("files of this machine (-v)"), "{why}");
    end(child).await?;
    let why = refused(&["save", "nobody"]).await?;
    ensure!(why.contains("kiln ps"), "{why}");

    let (child, name) = image.started(&[], COUNT).await?;
    for other in ["latest", "a/b"] {
        let why = refused(&["save", "--as", other, &name]).await?;
        ensure!(
            why.contains("choose another name") || why.contains("is no name"),
            "{why}"
        );
    }
    done(&["save", "--leave-running", "--as", &saved.0, &name]).await?;
    let why = refused(&["save", "--leave-running", "--as", &saved.0, &name]).await?;
    ensure!(why.contains("choose another name"), "{why}");

    let why = refused(&["run", "--from", "nothing-saved"]).await?;
    ensure!(why.contains("nothing-saved"), "{why}");
    let why = refused(&["run", "-i", "--from", &saved.0]).await?;
    ensure!(why.contains("(-i)"), "{why}");
    let baked = done(&["--json", "list"]).await?;
    let baked: Vec<serde_json::Value> = serde_json::from_str(&baked)?;
    let baked = baked
        .iter()
        .find(|one| one["kind"] == "uvm" && one["saved"].is_null())
        .and_then(|one| one["id"].as_str())
        .context("nothing is baked")?;
    let why = refused(&["run", "--from", baked]).await?;
    ensure!(why.contains("was baked, not saved"), "{why}");
    end(child).await
}

async fn saved_one_stays_in_the_store_until_it_is_removed(test: Test) -> Result<()> {
    let image = Kiln::new(&test)?;
    let saved = Saved::name(&test);
    let (_child, name) = image.started(&[], COUNT).await?;
    done(&["save", "--as", &saved.0, &name]).await?;
    let stored = |text: &str| -> Result<serde_json::Value> {
        let listed: Vec<serde_json::Value> = serde_json::from_str(text)?;
        let found = listed
            .into_iter()
            .find(|one| one["saved"]["name"] == saved.0.as_str());
        found.context("it is not listed")
    };
    let listed = stored(&done(&["--json", "list"]).await?)?;
    let objects = listed["objects"].as_array().context("no objects")?;
    let memory = objects
        .iter()
        .find(|one| one["kind"] == "memory")
        .context("no memory")?;
    let data = memory["data"].as_u64().context("no data")?;
    let alone = listed["stored"]["alone"].as_u64().context("not stored")?;
    println!(
        "{alone} bytes stored for {data} bytes of memory: {:.4}",
        alone as f64 / data as f64
    );
    // Most of it is its bake's.
    same!(
        listed["parents"].as_array().map(Vec::len),
        Some(1),
        "{listed}"
    );
    ensure!(
        alone < data / 5,
        "{alone} bytes stored for {data} bytes of memory"
    );

    // Nobody resumes it for a container of its own, and nobody collects it.
    done(&["gc"]).await?;
    same!(
        image.shell(&[], "test -e /count || echo fresh").await?,
        "fresh\n"
    );
    done(&["verify"]).await?;
    let bake = listed["saved"]["bake"].as_str().context("no bake")?;
    let why = refused(&["rm", bake]).await?;
    ensure!(why.contains("child") || why.contains("differs"), "{why}");
    // In use it stays; then it goes, with what only it needed.
    let mut again = Resumed::start(&test, &saved, &[])?;
    again.count().await?;
    let why = refused(&["rm", &saved.0]).await?;
    ensure!(why.contains("in use"), "{why}");
    again.end().await?;
    done(&["rm", &saved.0]).await?;
    ensure!(stored(&done(&["--json", "list"]).await?).is_err());
    Ok(())
}

async fn save_that_is_killed_or_finds_the_disk_full_costs_nothing(test: Test) -> Result<()> {
    const KILLS: u32 = 6;
    let image = Kiln::new(&test)?;
    let saved = Saved::name(&test);
    for kill in 0..KILLS {
        let (mut child, name) = image.started(&[], COUNT).await?;
        let mut save = Command::new("kiln")
            .args(["save", "--as", &saved.0, &name])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        tokio::time::sleep(Duration::from_millis(u64::from(kill) * 400)).await;
        // The process that does it, with its VMM.
        child.kill().await.ok();
        drop(save.wait().await);
        if done(&["list"]).await?.contains(&saved.0) {
            done(&["rm", &saved.0]).await?;
        }
    }
    done(&["verify"]).await?;

    // No room is a refusal, and the container goes on.
    let store = test.scratch().join("store");
    let store = store.to_str().context("a path without a name")?;
    let of = |arguments: &[&'static str]| {
        let mut all = vec!["--store", store];
        all.extend(arguments);
        all
    };
    done(&of(&["bake"])).await?;
    done(&of(&["pin", "latest"])).await?;
    let script = "dd if=/dev/urandom of=/dev/shm/held bs=1M count=8 2>/dev/null; i=0; \
                  while :; do i=$((i+1)); echo $i >> /count; [ $i = 1 ] && echo ready; usleep 20000; done";
    let (mut run, name) = image.command(&[], &["sh", "-c", script]);
    let mut child = run.env("KILN_STORE", store).spawn()?;
    let stdout = child.stdout.take().context("no output")?;
    same!(
        BufReader::new(stdout).lines().next_line().await?.as_deref(),
        Some("ready")
    );
    let used = done(&of(&["--json", "gc", "-n"])).await?;
    let used: serde_json::Value = serde_json::from_str(&used)?;
    let budget = used["used"].as_u64().context("nothing is used")? + (4 << 20);
    done(&["--store", store, "gc", "--set-budget", &budget.to_string()]).await?;
    for option in ["--leave-running", "--as=full"] {
        let why = refused(&["save", option, &name]).await?;
        ensure!(why.contains("budget"), "{why}");
        counts_on(&name).await?;
    }
    done(&of(&["verify"])).await?;
    done(&of(&["gc", "--set-budget", "none"])).await?;
    done(&["save", "--as", "roomy", &name]).await?;
    same!(child.wait().await?.code(), Some(0));
    ensure!(done(&of(&["list"])).await?.contains("roomy"));
    Ok(())
}

/// The container's counter grows.
async fn counts_on(name: &str) -> Result<()> {
    let now = async || -> Result<u64> {
        let last = done(&["exec", name, "--", "tail", "-n", "1", "/count"]).await?;
        Ok(last.trim().parse()?)
    };
    let first = now().await?;
    wait::until("it counts on", LIMIT, async || {
        Ok((now().await? > first + 3).then_some(()))
    })
    .await
}

/// It is listed as running.
async fn runs(name: &str) -> Result<()> {
    wait::until("it runs", LIMIT, async || {
        Ok(done(&["ps"]).await?.contains(name).then_some(()))
    })
    .await
}
