//! `kiln bake`: what comes out, and what is left when it is interrupted.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::future::try_join;
use kiln_e2e::harness::Case;
use kiln_e2e::{Test, cases};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};

use super::{kiln_run, same};

pub(crate) fn cases() -> Vec<Case> {
    let all = cases![
        baked_guest_is_small_and_says_what_it_uses,
        store_is_clean_after_fifty_kills_of_a_bake.limit(1800),
        full_disk_in_the_middle_of_a_bake_leaves_nothing.limit(300),
        interrupted_bake_cleans_up_and_says_so,
        second_bake_is_stored_as_what_differs_from_the_first.limit(300),
    ];
    let named = |case: Case| case.only_with("kiln", "run");
    all.into_iter().map(named).collect()
}

/// A store of the test's own.
struct Store(PathBuf);

impl Store {
    fn new(test: &Test) -> Self {
        Store(test.scratch().join("store"))
    }

    fn kiln(&self, arguments: &[&str]) -> Command {
        let mut kiln = Command::new("kiln");
        kiln.arg("--store").arg(&self.0).args(arguments);
        kiln.stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        kiln
    }

    /// Has to succeed.
    async fn done(&self, arguments: &[&str]) -> Result<Output> {
        let output = self.kiln(arguments).output().await?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{arguments:?}: {text}{errors}");
        Ok(output)
    }

    /// A bake, and the lines that it tells its progress by.
    fn bake(&self) -> Result<(Child, Lines<BufReader<ChildStderr>>)> {
        let mut bake = self.kiln(&["bake", "--again"]).spawn()?;
        let stderr = bake.stderr.take().context("no progress")?;
        Ok((bake, BufReader::new(stderr).lines()))
    }
}

/// The size on disk that a settled μVM of the default class may have with Debian's cloud kernel.
const MOST: u64 = 66 << 20;

/// Bakes; what that takes on the disk.
async fn bake_and_measure(store: &Store) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;

    let output = store.done(&["bake", "--again"]).await?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(told.contains("in use"), "{told}");
    let output = store.done(&["--json", "inspect"]).await?;
    let uvm: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let about = &uvm;
    ensure!(
        about["kernel"]["release"].to_string().contains("cloud"),
        "{about}"
    );
    same!(about["class"]["memory_mib"], 320);
    let used = about["guest_used_kib"].as_u64().context("no use")?;
    let objects = uvm["objects"].as_array().context("no objects")?;
    let memory = objects
        .iter()
        .find(|object| object["kind"] == "memory")
        .context("no memory")?;
    let digest = memory["digest"].as_str().context("no digest")?;
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let flat = store.0.join("flat").join(boot.trim_end()).join(digest);
    let pack = store.0.join("packs").join(&digest[..2]).join(digest);
    let look =
        |path: &Path| std::fs::metadata(path).with_context(|| format!("no {}", path.display()));
    let (file, packed) = (look(&flat)?, look(&pack)?.len());
    same!(file.len(), memory["length"].as_u64().unwrap_or(0));
    let on_disk = file.blocks() * 512;
    println!(
        "memory file {:.1} MiB on disk, {:.1} MiB packed, {:.1} MiB in use in the guest",
        on_disk as f64 / f64::from(1 << 20),
        packed as f64 / f64::from(1 << 20),
        used as f64 / 1024.0
    );
    ensure!(used > 0 && used << 10 < on_disk, "{used} KiB in use");
    ensure!(packed < on_disk / 2, "{packed} bytes of {on_disk}");
    Ok(on_disk)
}

async fn baked_guest_is_small_and_says_what_it_uses(test: Test) -> Result<()> {
    let store = Store::new(&test);
    let on_disk = bake_and_measure(&store).await?;
    ensure!(on_disk <= MOST, "{on_disk} bytes on disk");
    // The same inputs again: nothing to do.
    let output = store.done(&["bake"]).await?;
    ensure!(
        String::from_utf8_lossy(&output.stdout).contains("nothing to do"),
        "{output:?}"
    );
    Ok(())
}

/// A phase of a bake: it begins with the line of progress that begins with this word.
#[derive(Debug, Clone)]
struct Phase {
    word: String,
    length: Duration,
}

/// How many of the kills fall into each phase. The late ones cost a whole bake each; those that write to the
/// store get several all the same.
const KILLS: [(&str, u32); 7] = [
    ("", 15),
    ("guest", 12),
    ("boot", 5),
    ("ready", 3),
    ("settled", 6),
    ("saved", 4),
    ("tried", 5),
];

/// Bakes once, undisturbed, and notes how long each phase takes.
async fn phases(store: &Store) -> Result<Vec<Phase>> {
    let (mut bake, mut lines) = store.bake()?;
    let mut phases = Vec::new();
    let mut said = Vec::new();
    let (mut word, mut since) = (String::new(), Instant::now());
    loop {
        let line = lines.next_line().await?;
        said.extend(line.clone());
        phases.push(Phase {
            word: std::mem::take(&mut word),
            length: since.elapsed(),
        });
        since = Instant::now();
        match line {
            Some(line) => word = line.split(' ').next().unwrap_or_default().to_owned(),
            None => break,
        }
    }
    ensure!(bake.wait().await?.success(), "{}", said.join("\n"));
    let words: Vec<&str> = phases.iter().map(|phase| &*phase.word).collect();
    same!(words, KILLS.map(|(word, _)| word).to_vec());
    Ok(phases)
}

/// A bake that is killed this long after a phase has begun.
async fn kill(store: &Store, word: &str, after: Duration) -> Result<()> {
    let (mut bake, mut lines) = store.bake()?;
    let begun = async {
        while !word.is_empty() {
            match lines.next_line().await? {
                Some(line) if !line.starts_with(word) => {}
                _ => break,
            }
        }
        tokio::time::sleep(after).await;
        anyhow::Ok(())
    };
    begun.await?;
    // A bake that was quicker than the one before has ended, and that is a moment too.
    bake.kill().await?;
    store.done(&["verify"]).await?;
    // One that was killed after its entry was made leaves a whole μVM. It was read just now; each later kill would again.
    if std::fs::read_dir(store.0.join("uvms"))?.count() > 0 {
        store.done(&["gc", "--all"]).await?;
    }
    Ok(())
}

async fn store_is_clean_after_fifty_kills_of_a_bake(test: Test) -> Result<()> {
    let store = Store::new(&test);
    let phases = phases(&store).await?;
    let random: [u8; 8] = kiln_uvm::random::bytes()?;
    let seed = u64::from_le_bytes(random) | 1;
    println!("moments of the kills: seed {seed:#x}, phases {phases:?}");
    let mut moments = Vec::new();
    let mut state = seed;
    for (phase, (word, kills)) in phases.iter().zip(KILLS) {
        for _ in 0..kills {
            // xorshift
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let share = (state >> 11) as f64 / (1u64 << 53) as f64;
            moments.push((word, phase.length.mul_f64(share)));
        }
    }
    same!(moments.len(), 50);
    // Two at a time: whoever bakes or verifies meets another one's remains, and its work.
    let lane = |first: usize| {
        let (store, moments) = (&store, &moments);
        async move {
            for (number, (word, after)) in moments.iter().enumerate().skip(first).step_by(2) {
                kill(store, word, *after)
                    .await
                    .with_context(|| format!("kill {number}, {after:?} into {word:?}"))?;
            }
            anyhow::Ok(())
        }
    };
    try_join(lane(0), lane(1)).await?;
    store.done(&["bake", "--again"]).await?;
    store.done(&["verify"]).await?;
    nothing_in(&store.0.join("tmp"))
}

fn nothing_in(dir: &Path) -> Result<()> {
    let left: Vec<_> = std::fs::read_dir(dir)?.collect();
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

async fn full_disk_in_the_middle_of_a_bake_leaves_nothing(test: Test) -> Result<()> {
    // A disk with room for the initramfs and a part of the memory.
    let small = test.scratch().join("small");
    std::fs::create_dir(&small)?;
    let script = "busybox mount -t tmpfs -o size=40m none $1 && kiln --store $1/s bake; code=$?; \
                  kiln --store $1/s verify > /dev/null && busybox find $1/s/tmp $1/s/uvms -mindepth 1 && \
                  busybox mount -o remount,size=200m $1 && kiln --store $1/s bake >&2 && \
                  kiln --store $1/s verify >&2 && exit $code";
    let mut unshare = Command::new("unshare");
    unshare.args(["-m", "sh", "-c", script, "sh"]).arg(&small);
    let output = unshare.stdin(Stdio::null()).output().await?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    same!(output.status.code(), Some(5), "{errors}");
    let left = String::from_utf8_lossy(&output.stdout).into_owned();
    same!(left, String::new(), "left on the full disk");
    Ok(())
}

async fn interrupted_bake_cleans_up_and_says_so(test: Test) -> Result<()> {
    let store = Store::new(&test);
    let (mut bake, mut lines) = store.bake()?;
    let mut told = String::new();
    while let Some(line) = lines.next_line().await? {
        told = line;
        if told.starts_with("boot") {
            tokio::time::sleep(Duration::from_secs(1)).await;
            kiln_run::send(&bake, libc::SIGINT)?;
        }
    }
    same!(bake.wait().await?.code(), Some(1), "{told}");
    ensure!(told.contains("nothing was baked"), "{told}");
    nothing_in(&store.0.join("tmp"))?;
    nothing_in(&store.0.join("packs"))?;
    nothing_in(&store.0.join("objects"))
}

/// A μVM of `kiln list`.
struct Listed {
    id: String,
    parents: usize,
    /// Bytes on disk that nobody else needs, for each byte of data.
    alone: f64,
}

impl Store {
    /// The newest first.
    async fn list(&self) -> Result<Vec<Listed>> {
        let output = self.done(&["--json", "list"]).await?;
        let listed: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)?;
        let uvms = listed.iter().filter(|entry| entry["kind"] == "uvm");
        uvms.map(|entry| {
            let objects = entry["objects"].as_array().context("no objects")?;
            let data: u64 = objects.iter().filter_map(|o| o["data"].as_u64()).sum();
            let alone = entry["stored"]["alone"].as_u64().context("not stored")?;
            Ok(Listed {
                id: entry["id"].as_str().context("no id")?.to_owned(),
                parents: entry["parents"].as_array().map_or(0, Vec::len),
                alone: alone as f64 / data as f64,
            })
        })
        .collect()
    }
}

async fn second_bake_is_stored_as_what_differs_from_the_first(test: Test) -> Result<()> {
    let store = Store::new(&test);
    store.done(&["bake"]).await?;
    // Later it shares what it has with its children.
    let [Listed { alone, .. }] = store.list().await?[..] else {
        bail!("not one μVM");
    };
    store.done(&["bake", "--memory", "512Mi"]).await?;
    store.done(&["bake", "--memory", "768Mi", "--lean"]).await?;
    let listed = store.list().await?;
    let [lean, second, first] = listed.as_slice() else {
        bail!("{} μVMs", listed.len());
    };
    println!(
        "stored alone, for each byte of data: {:.3}, then {:.3}, and {:.3} lean",
        alone, second.alone, lean.alone
    );
    same!([first.parents, second.parents, lean.parents], [0, 1, 1]);
    ensure!(second.alone < 0.4 * alone, "{}", second.alone);
    ensure!(lean.alone < 0.2 * alone, "{}", lean.alone);

    let refused = store.kiln(&["rm", &first.id]).output().await?;
    let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success(), "a parent was removed");
    ensure!(
        [lean, second]
            .iter()
            .any(|child| errors.contains(&child.id[..12])),
        "names no child: {errors}"
    );

    // As after a start of the machine: parent and child are rebuilt for whoever comes first.
    let image = kiln_run::Kiln::new(&test)?;
    for memory in ["400Mi", "600Mi", "800Mi"] {
        std::fs::remove_dir_all(store.0.join("flat"))?;
        let run = [
            "run",
            "-m",
            memory,
            image.archive(),
            "--",
            "echo",
            "it runs",
        ];
        let output = store.done(&run).await?;
        same!(String::from_utf8_lossy(&output.stdout), "it runs\n");
    }
    store.done(&["verify"]).await?;
    Ok(())
}
