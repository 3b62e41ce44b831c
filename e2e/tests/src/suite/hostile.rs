//! Guests, VMMs and users of the node that mean harm.

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::inventory::Inventory;
use kiln_e2e::node::{busybox, text};
use kiln_e2e::pod::STEP;
use kiln_e2e::{Container, ContainerSpec, Pod, PodSpec, Test, cases, wait};

use super::faults::shim_of;
use super::same;

/// The tests' own program, as a program of the node.
const TESTPROG: &str = "/opt/kiln-e2e/kiln-testprog";
/// What nobody but the node's owner changes.
const NODES_OWN: [&str; 5] = [
    "/etc",
    "/root",
    "/usr/local/bin",
    "/usr/lib/cni",
    "/opt/kiln",
];
/// Where pods come and go: their volumes, sandboxes, network namespaces.
const PODS_OWN: [&str; 4] = [
    "/run/containerd/",
    "/run/netns/",
    "/var/run/netns/",
    "/var/lib/containerd/",
];

pub(crate) fn cases() -> Vec<Case> {
    let all = cases![
        guest_changes_nothing_of_the_node_by_its_volumes
            .alone()
            .limit(300),
        guest_changes_nothing_however_long_each_step_of_the_shim_takes
            .alone()
            .limit(400),
        vmm_that_was_taken_over_stays_in_its_jail.alone().limit(300),
        user_of_the_node_holds_up_no_pod.alone(),
    ];
    let named = |case: Case| case.only_with("kiln", "hostile");
    all.into_iter().map(named).collect()
}

/// A child that ends with its test.
struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        // One that has ended can't be killed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What attacks aim at.
struct Targets {
    dir: PathBuf,
    file: PathBuf,
    mount: PathBuf,
}

impl Targets {
    fn make(test: &Test) -> Result<Self> {
        let at = |name: &str| test.scratch().join("targets").join(name);
        let targets = Targets {
            dir: at("dir"),
            file: at("file"),
            mount: at("mount"),
        };
        for dir in [&targets.dir, &targets.mount] {
            std::fs::create_dir_all(dir)?;
        }
        busybox(&["mount", "-t", "tmpfs", "target", &text(&targets.mount)])?;
        for file in [
            &targets.file,
            &targets.dir.join("canary"),
            &targets.mount.join("canary"),
        ] {
            std::fs::write(file, "as it was\n")?;
        }
        Ok(targets)
    }

    fn all(&self) -> [String; 3] {
        [&self.dir, &self.file, &self.mount].map(|path| text(path))
    }
}

impl Drop for Targets {
    fn drop(&mut self) {
        for target in self.all() {
            // As often as something was mounted there.
            while busybox(&["umount", &target]).is_ok() {}
        }
    }
}

/// Looks at the targets all the time: what an attack did there may be undone by the time that a container has started.
struct Watch {
    over: Arc<AtomicBool>,
    seen: JoinHandle<BTreeSet<String>>,
}

impl Watch {
    fn begin(targets: &Targets) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (ended, dir, canary) = (
            over.clone(),
            targets.dir.with_file_name(""),
            targets.mount.join("canary"),
        );
        let seen = std::thread::spawn(move || {
            let mut seen = BTreeSet::new();
            while !ended.load(Ordering::SeqCst) {
                let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
                let at_target = |line: &&str| {
                    line.split(' ')
                        .nth(4)
                        .is_some_and(|at| Path::new(at).starts_with(&dir))
                        && !line.contains(" - tmpfs target ")
                };
                seen.extend(table.lines().filter(at_target).map(str::to_owned));
                if !canary.exists() {
                    seen.insert(format!("{} is gone", canary.display()));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            seen
        });
        Watch { over, seen }
    }

    /// What should not have been.
    fn end(self) -> Result<Vec<String>> {
        self.over.store(true, Ordering::SeqCst);
        let seen = self.seen.join().map_err(|_| anyhow!("the watch died"))?;
        Ok(seen.into_iter().collect())
    }
}

/// A privileged container that has mounted the file system of its pod's volumes itself, and does `what` to it.
async fn attacker(pod: &Pod, name: &str, what: &str) -> Result<Container> {
    let script = format!(
        "mkdir -p /volumes && mount -t virtiofs kiln /volumes && exec /bin/testprog {what}"
    );
    let container = pod
        .start(&ContainerSpec::shell(name, &script).privileged())
        .await?;
    container.log().wait_for("ready", STEP).await?;
    Ok(container)
}

async fn guest_changes_nothing_of_the_node_by_its_volumes(test: Test) -> Result<()> {
    volumes_come_and_go_under_attack(&test, 6, false).await
}

/// The same without luck: every step in which the shim makes, changes, moves or removes a mount waits long enough for the
/// guest to make its move.
async fn guest_changes_nothing_however_long_each_step_of_the_shim_takes(test: Test) -> Result<()> {
    volumes_come_and_go_under_attack(&test, 2, true).await
}

async fn volumes_come_and_go_under_attack(test: &Test, rounds: u32, slowly: bool) -> Result<()> {
    let targets = Targets::make(test)?;
    let evil = test.scratch().join("evil");
    std::fs::create_dir(&evil)?;
    std::fs::write(evil.join("evil"), "put there by a guest\n")?;
    let evil_file = test.write("evil-file", "put there by a guest\n")?;
    let kept = test.scratch().join("kept");
    std::fs::create_dir(&kept)?;
    std::fs::write(kept.join("file"), "as it was\n")?;

    let pod = test.run_pod(&PodSpec::new().privileged()).await?;
    let swap = format!("swap /volumes 200 {}", targets.all().join(" "));
    let scribble = "scribble /volumes file 200".to_owned();
    let attackers = [
        attacker(&pod, "swap", &swap).await?,
        attacker(&pod, "scribble", &scribble).await?,
    ];
    let inventory = || {
        let roots = NODES_OWN.map(Path::new);
        let targets = test.scratch().join("targets");
        let all: Vec<&Path> = roots
            .into_iter()
            .chain([targets.as_path(), kept.as_path()])
            .collect();
        Inventory::take(&all, &PODS_OWN)
    };
    let before = inventory()?;
    let slowed = match slowly {
        true => Some(slow_down(&pod).await?),
        false => None,
    };
    for round in 0..rounds {
        let spec = ContainerSpec::pause(&format!("victim-{round}"))
            .mount(&evil, "/evil")
            .mount(&evil_file, "/evil-file")
            .mount_read_only(&kept, "/kept");
        let watch = Watch::begin(&targets);
        let victim = pod.start(&spec).await;
        // First, for an attack that succeeds may keep the container from starting.
        let mut changes = before.changes(&inventory()?);
        changes.extend(watch.end()?);
        ensure!(changes.is_empty(), "the node is changed: {changes:#?}");
        let victim = victim?;
        same!(victim.read(&["cat", "/kept/file"]).await?, "as it was");
        victim.remove().await?;
    }
    let changes = before.changes(&inventory()?);
    ensure!(changes.is_empty(), "the node is changed: {changes:#?}");
    drop(slowed);
    for container in attackers {
        container.shell("touch /stop").await?;
        same!(container.wait().await?.exit_code, 0);
        // That it tried, and that nothing came of it.
        let said = container.log().stdout()?;
        let vain = |line: &String| line.contains(" 0 refused ") && !line.ends_with(" refused 0");
        ensure!(
            said.iter().any(vain),
            "not as an attack goes in vain: {said:?}"
        );
    }
    Ok(())
}

/// Has each system call by which the pod's shim changes mounts or makes places for them wait before it is made.
async fn slow_down(pod: &Pod) -> Result<Helper> {
    const CALLS: &str =
        "mount,umount2,open_tree,move_mount,mount_setattr,mkdir,mkdirat,openat2,unlinkat,rmdir";
    let shim = shim_of(pod.id())?.context("no shim")?;
    let tracer = Command::new("strace")
        .args(["-f", "-qq", "-o", "/dev/null", "-p", &shim.to_string()])
        .args(["-e", &format!("trace={CALLS}")])
        .args(["-e", &format!("inject={CALLS}:delay_enter=150000")])
        .stderr(Stdio::null())
        .spawn()
        .map(Helper)
        .context("strace")?;
    wait::until("the tracer", STEP, || async {
        let status = std::fs::read_to_string(format!("/proc/{shim}/status"))?;
        let mut lines = status.lines();
        Ok(lines
            .any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
            .then_some(()))
    })
    .await?;
    Ok(tracer)
}

async fn vmm_that_was_taken_over_stays_in_its_jail(test: Test) -> Result<()> {
    const KINDS: [&str; 4] = ["Control", "Devices", "Vcpu", "Files"];
    let neighbour = test.pod().await?;
    let others = neighbour
        .start(&ContainerSpec::testprog("main", &["started"]))
        .await?;
    let roots = NODES_OWN.map(Path::new);
    let before = Inventory::take(&roots, &PODS_OWN)?;
    let log = Path::new("/var/log/containerd.log");
    let start = std::fs::metadata(log)?.len();

    let pod = test
        .run_pod(&PodSpec::new().handler("kiln-hostile"))
        .await?;
    let volume = test.write("volume/file", "as it was\n")?;
    let spec = ContainerSpec::pause("main")
        .mount_read_only(volume.parent().context("no parent")?, "/data");
    let container = pod.start(&spec).await?;
    let said = wait::until("the end of the attacks", STEP, || async {
        let text = std::fs::read(log)?;
        let new = text.get(usize::try_from(start)?..).unwrap_or_default();
        let new = String::from_utf8_lossy(new).into_owned();
        Ok(new.contains("attacks done").then_some(new))
    })
    .await?;
    let attacks: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("attack"))
        .collect();
    let succeeded: Vec<_> = attacks
        .iter()
        .filter(|line| line.contains("SUCCEEDED"))
        .collect();
    ensure!(succeeded.is_empty(), "{succeeded:#?}");
    for kind in KINDS {
        let refused = attacks
            .iter()
            .filter(|line| line.contains(&format!("attack {kind} ")) && line.contains("refused"));
        ensure!(refused.count() >= 10, "{kind} has hardly tried: {said}");
    }
    let sum = attacks.iter().find(|line| line.contains("attacks done"));
    let sum = sum.context("no sum")?;
    ensure!(sum.contains(" 0 succeeded"), "{sum}");

    // Its own pod, others and new ones go on, and what they write has room.
    same!(container.read(&["cat", "/data/file"]).await?, "as it was");
    let next = test.pod().await?;
    let new = next
        .start(&ContainerSpec::testprog("main", &["started"]))
        .await?;
    for container in [&others, &new] {
        let put = ["/bin/testprog", "put", "/file", "33554432", "1"];
        container.read(&put).await?;
        let check = ["/bin/testprog", "check", "/file", "33554432", "1"];
        same!(container.read(&check).await?, "right");
    }
    let changes = before.changes(&Inventory::take(&roots, &PODS_OWN)?);
    ensure!(changes.is_empty(), "the node is changed: {changes:#?}");
    same!(std::fs::read_to_string(&volume)?, "as it was\n");
    Ok(())
}

async fn user_of_the_node_holds_up_no_pod(test: Test) -> Result<()> {
    const NOBODY: u32 = 65534;
    // Something of kiln's is there already.
    let first = test.pod().await?;
    let output = test.scratch().join("locks");
    std::fs::set_permissions(
        test.scratch(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    let locks = Command::new(TESTPROG)
        .args(["locks", "/run/kiln", "600"])
        .uid(NOBODY)
        .gid(NOBODY)
        .stdout(std::fs::File::create(&output)?)
        .spawn()
        .map(Helper)
        .context(TESTPROG)?;
    let said = || std::fs::read_to_string(&output).context("what it locked");
    wait::until("the locks", STEP, || async {
        Ok(said()?.contains("ready").then_some(()))
    })
    .await?;
    for _ in 0..2 {
        let pod = test.pod().await?;
        let (code, _) = pod
            .finish(&ContainerSpec::testprog("main", &["exit", "7"]))
            .await?;
        same!(code, 7);
        pod.remove().await?;
    }
    first.remove().await?;
    drop(locks);
    same!(said()?, "ready\n");
    Ok(())
}
