//! QEMU as a peer: the same guest, saved by it and restored by its `-incoming`. The guest writes to its serial
//! port every five milliseconds; the first line after the start is the answer.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kiln_e2e::uvm::{CMDLINE, Kit};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Here `e2e/bench/pack-qemu` puts it.
const FOLDER: &str = "/opt/kiln-e2e/qemu";
/// Several times what each step takes here. On the counted clock a guest that hangs counts too.
const LIMIT: Duration = Duration::from_secs(40);
/// How often a guest may hang in a step, as one does now and then on an emulated CPU (docs/node.md).
const TRIES: u32 = 3;

/// What the guest's lines have in common.
const BEAT: &str = " xxx";
/// As long as the guests of kiln's have until they are saved.
const SETTLE: Duration = Duration::from_secs(3);

/// A guest that QEMU has saved.
#[derive(Debug)]
pub(crate) struct Saved {
    kit: Kit,
    mib: u64,
    stream: PathBuf,
}

/// A process that ends with its owner.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn machine(kit: &Kit, mib: u64) -> Command {
    let folder = Path::new(FOLDER);
    let mut command = Command::new(folder.join("ld.so"));
    command
        .arg("--library-path")
        .arg(folder)
        .arg(folder.join("qemu"))
        .arg("-L")
        .arg(folder.join("share"));
    // The least of its machines, and the quickest to start.
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-machine", "microvm,accel=kvm,rtc=off,pit=off,pic=off"])
        .args(["-cpu", "host", "-smp", "1", "-m", &mib.to_string()])
        .arg("-kernel")
        .arg(&kit.kernel)
        .arg("-initrd")
        .arg(&kit.initrd);
    command
}

/// Does something again that a hung guest made fail.
fn patiently<T>(act: impl Fn() -> Result<T>) -> Result<T> {
    let mut tries = 1;
    loop {
        match act() {
            Err(error) if tries < TRIES => println!("  QEMU, once more: {error:#}"),
            result => return result,
        }
        tries += 1;
    }
}

fn is_readable(file: &impl AsFd, limit: Duration) -> Result<bool> {
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(limit).context("the limit is too long")?;
    Ok(poll(&mut fds, limit)? > 0)
}

/// Whether this node has it.
pub(crate) fn is_here() -> bool {
    Path::new(FOLDER).join("qemu").exists()
}

impl Saved {
    /// Boots the guest with `mib` of memory, has it fill `fill` of them, and saves it in `dir`.
    pub(crate) fn make(dir: &Path, kit: &Kit, mib: u64, fill: u64) -> Result<Self> {
        patiently(|| Self::try_make(dir, kit, mib, fill))
    }

    fn try_make(dir: &Path, kit: &Kit, mib: u64, fill: u64) -> Result<Self> {
        let (console, stream) = (dir.join("qemu-console"), dir.join("qemu-stream"));
        let mut command = machine(kit, mib);
        command
            .arg("-append")
            .arg(format!("{CMDLINE} quiet FILL={fill}"))
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .args(["-monitor", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(File::create(dir.join("qemu-log"))?);
        let begin = Instant::now();
        let child = command.spawn().context("starting QEMU")?;
        let mut process = Process(child);
        let mut deadline = begin + LIMIT;
        let said = || std::fs::read_to_string(&console).unwrap_or_default();
        while !said().contains(BEAT) {
            ensure!(
                Instant::now() < deadline && process.0.try_wait()?.is_none(),
                "QEMU's guest does not come up: {} {}",
                said(),
                std::fs::read_to_string(dir.join("qemu-log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        println!(
            "  QEMU's guest is up after {:.1} s",
            begin.elapsed().as_secs_f64()
        );
        std::thread::sleep(SETTLE);
        // The monitor takes a command when the one before is done.
        let mut monitor = process.0.stdin.take().context("no monitor")?;
        let commands = format!(
            "migrate_set_parameter max-bandwidth 100G\nmigrate file:{}\nquit\n",
            stream.display()
        );
        monitor.write_all(commands.as_bytes())?;
        deadline = Instant::now() + LIMIT;
        while process.0.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "QEMU does not end its migration");
            std::thread::sleep(Duration::from_millis(50));
        }
        let length = std::fs::metadata(&stream)?.len();
        ensure!(length > fill << 20, "QEMU saved {length} bytes only");
        println!("  and saved after {:.1} s", begin.elapsed().as_secs_f64());
        Ok(Self {
            kit: kit.clone(),
            mib,
            stream,
        })
    }

    /// From QEMU's start to the guest's next line.
    pub(crate) fn restore(&self, dir: &Path) -> Result<Duration> {
        patiently(|| self.try_restore(dir))
    }

    fn try_restore(&self, dir: &Path) -> Result<Duration> {
        let mut command = machine(&self.kit, self.mib);
        command
            .arg("-incoming")
            .arg(format!("file:{}", self.stream.display()))
            .args(["-serial", "stdio", "-monitor", "none"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(dir.join("qemu-log"))?);
        let begin = Instant::now();
        let mut process = Process(command.spawn().context("starting QEMU")?);
        let mut out = process.0.stdout.take().context("no console")?;
        ensure!(
            is_readable(&out, LIMIT)?,
            "QEMU's restored guest is silent for {LIMIT:?}"
        );
        let length = out.read(&mut [0; 64])?;
        let took = begin.elapsed();
        let log = std::fs::read_to_string(dir.join("qemu-log")).unwrap_or_default();
        ensure!(length > 0, "QEMU's restored guest is silent: {log}");
        Ok(took)
    }
}
