//! μVMs without containerd: a VMM started and driven through its control API, with a guest that runs shell
//! scripts. For tests and benches of the VMM alone.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kiln_bake::cpio::Archive;
use kiln_bake::kernel::{self, GuestKernel};
use kiln_bake::modules::{GUEST, Modules, Wanted};
use kiln_uvm::control::{Boot, Control, Resume};
use kiln_uvm::ends::Ends;
use kiln_uvm::jail::Jail;
use kiln_uvm::machine::{Machine, Start};
use kiln_uvm::save::{self, Afterwards, Files, Stood};
use kiln_uvm::touched::Watch;
use kiln_uvm::{DeviceKind, DeviceSpec, MachineSpec, PageRun, Span};

/// Where a node has the VMM.
const PROGRAM: &str = "/usr/local/bin/kiln-vmm";
const BUSYBOX: &str = "/bin/busybox";
/// The guest's scripts come in here.
const PORT: u32 = 1024;
/// What the guest's kernel is told.
pub const CMDLINE: &str =
    "console=ttyS0 panic=-1 no_timer_check memhp_default_state=online_movable";
/// What the guest says on its console when it takes scripts.
const READY: &str = "guest: ready";
/// How long a resumed guest takes after its answer until it only waits.
const COMES_TO_REST: Duration = Duration::from_millis(200);
/// How long a guest may take to boot, on an emulated machine with other work.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// How long one answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// No machine here has more.
const MOST_MEMORY: u64 = 16 << 30;
/// `nobody`, whom the VMM becomes.
const NOBODY: u32 = 65534;

/// Slots of the machines made here.
pub mod slots {
    /// vsock.
    pub const VSOCK: u8 = 1;
    /// Entropy.
    pub const RNG: u8 = 2;
    /// Memory hot-plug.
    pub const MEM: u8 = 3;
    /// The network card.
    pub const NET: u8 = 4;
    /// The shared folder, tag `kiln`.
    pub const FS: u8 = 5;
    /// The first of the disks.
    pub const DISK: u8 = 8;
    /// How many disks.
    pub const DISKS: u8 = 4;
}

/// What a guest boots from.
#[derive(Debug, Clone)]
pub struct Kit {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

impl Kit {
    /// Makes an initramfs for the installed kernel whose release starts with `release` (the best one for an
    /// empty string) in a folder.
    pub fn make(release: &str, dir: &Path) -> Result<Self> {
        let kernel = kernel::installed(Path::new("/"))
            .into_iter()
            .find(|k| k.release.starts_with(release))
            .with_context(|| format!("no kernel {release}* in /boot with its modules"))?;
        std::fs::create_dir_all(dir)?;
        let initrd = dir.join(format!("initrd-{}", kernel.release));
        std::fs::write(&initrd, initramfs(&kernel)?)?;
        Ok(Self {
            kernel: kernel.image,
            initrd,
        })
    }
}

fn initramfs(kernel: &GuestKernel) -> Result<Vec<u8>> {
    let testprog = crate::setup::testprog_path()?;
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("{}", path.display()));
    let mut archive = Archive::new();
    for dir in ["bin", "dev", "lib", "mnt", "proc", "run", "sys", "tmp"] {
        archive.dir(dir, 0o755);
    }
    archive.char_device("dev/console", 0o600, 5, 1);
    archive.file("bin/busybox", 0o755, &read(Path::new(BUSYBOX))?);
    archive.link("bin/sh", "busybox");
    archive.file("bin/testprog", 0o755, &read(&testprog)?);
    let mut init = String::from(
        "#!/bin/sh\n/bin/busybox --install -s /bin\nexport PATH=/bin\n\
         mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp\n",
    );
    // By which a panic is told from a reset.
    let panic = Wanted {
        name: "pvpanic_mmio",
        needed_for: None,
    };
    let wanted: Vec<Wanted> = GUEST.into_iter().chain([panic]).collect();
    for module in Modules::open(&kernel.modules)?.resolve(&wanted)? {
        let path = format!("lib/{}.ko", module.name);
        archive.file(&path, 0o644, &module.content);
        init += &format!(
            "insmod /{path} || echo 'guest: {} is missing'\n",
            module.name
        );
    }
    // For VMMs that the guest's port does not lead to: lines on the console, for ever.
    let filled = format!(
        "[ -z \"$FILL\" ] || {{ {}; exec testprog pace 200 1000000000 12; }}\n",
        fill_script("$FILL")
    );
    archive.file(
        "init",
        0o755,
        format!("{init}{filled}exec testprog guest {PORT}\n").as_bytes(),
    );
    Ok(archive.finish())
}

/// A script that fills so many MiB of a guest's memory with a file whose every page has other bytes.
pub fn fill_script(mib: &str) -> String {
    format!(
        "mount -o remount,size=100% /tmp && head -c 1048576 /dev/urandom > /tmp/seed && \
         for i in $(seq {mib}); do echo $i; cat /tmp/seed; done > /tmp/fill && rm /tmp/seed"
    )
}

/// A machine's size; its devices are those of [`slots`].
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// vCPUs at boot.
    pub cpus: u8,
    /// vCPUs at most.
    pub max_cpus: u8,
    /// Base RAM in MiB.
    pub memory: u64,
    /// Hot-plug room in GiB.
    pub hotplug: u64,
    /// Whether it has the devices besides vsock and entropy.
    pub devices: bool,
    /// Whether its kernel keeps its messages off the console.
    pub quiet: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            cpus: 1,
            max_cpus: 4,
            memory: 256,
            hotplug: 2,
            devices: true,
            quiet: false,
        }
    }
}

impl Shape {
    fn spec(self) -> MachineSpec {
        let mut devices = vec![
            (slots::VSOCK, DeviceKind::Vsock { cid: 3 }),
            (slots::RNG, DeviceKind::Rng),
        ];
        if self.devices {
            devices.extend([
                (slots::MEM, DeviceKind::Mem),
                (
                    slots::NET,
                    DeviceKind::Net {
                        pairs: 1,
                        mac: [2, 0, 0, 0, 0, 1],
                    },
                ),
                (
                    slots::FS,
                    DeviceKind::Fs {
                        tag: "kiln".to_owned(),
                    },
                ),
            ]);
            devices.extend((0..slots::DISKS).map(|i| {
                let id = format!("slot{i}");
                (slots::DISK + i, DeviceKind::Block { id, queues: 1 })
            }));
        }
        MachineSpec {
            cpus: self.cpus,
            max_cpus: self.max_cpus,
            memory: self.memory << 20,
            hotplug: self.hotplug << 30,
            serial: true,
            devices: devices
                .into_iter()
                .map(|(slot, kind)| DeviceSpec { slot, kind })
                .collect(),
        }
    }
}

/// A saved machine's files.
#[derive(Debug, Clone)]
pub struct Baked {
    /// The state file.
    pub state: PathBuf,
    /// The memory file.
    pub memory: PathBuf,
    /// The pages of it that a copy is resumed with.
    pub touched: Vec<PageRun>,
}

impl Baked {
    /// In a folder.
    pub fn in_dir(dir: &Path) -> Self {
        Self {
            state: dir.join("state"),
            memory: dir.join("memory"),
            touched: Vec::new(),
        }
    }

    /// Resumes a copy in `dir` until it has answered and come to rest, to learn which pages copies touch first. What they
    /// touch after their answer is in the way of others that have yet to give theirs.
    pub fn learn(&mut self, dir: &Path) -> Result<()> {
        let watch = Watch::begin(File::open(&self.memory)?)?;
        let vmm = Uvm::spawn(dir)?;
        let uvm = Uvm::resume_as(vmm, dir, self, Ends::new(), true)?;
        let _answer = uvm.ask()?;
        std::thread::sleep(COMES_TO_REST);
        self.touched = watch.end(uvm.vmm().pid())?.into_runs();
        Ok(())
    }
}

/// A running μVM. Dropping it ends it.
#[derive(Debug)]
pub struct Uvm {
    vmm: Machine,
    dir: PathBuf,
    /// What the VMM said when it had started.
    pub steps: Vec<Span>,
}

impl Uvm {
    /// Starts a VMM, in its jail, whose files (log, console, sockets) are in `dir`.
    pub fn spawn(dir: &Path) -> Result<Machine> {
        let root = dir.join("empty");
        std::fs::create_dir_all(&root)?;
        let jail = Jail {
            uid: NOBODY,
            gid: NOBODY,
            root,
        };
        Ok(Machine::start(Start {
            program: Path::new(PROGRAM),
            jail: Some(jail),
            log: File::create(dir.join("vmm.log"))?,
            words: None,
            oom_kills: Box::new(|| false),
        })?)
    }

    /// Boots a machine and waits until its guest takes scripts.
    pub fn boot(dir: &Path, kit: &Kit, shape: Shape) -> Result<Self> {
        let vmm = Self::spawn(dir)?;
        let mut uvm = Self {
            vmm,
            dir: dir.to_owned(),
            steps: Vec::new(),
        };
        let started = uvm.try_boot(kit, shape);
        started.map_err(|e| uvm.explain(&e))?;
        Ok(uvm)
    }

    fn try_boot(&mut self, kit: &Kit, shape: Shape) -> Result<()> {
        let kernel = File::open(&kit.kernel)?;
        let initrd = File::open(&kit.initrd)?;
        let console = File::create(self.dir.join("console"))?;
        let listener = self.listen()?;
        let command_line = if shape.quiet {
            format!("{CMDLINE} quiet")
        } else {
            CMDLINE.to_owned()
        };
        let boot = Boot {
            machine: shape.spec(),
            kernel: &kernel,
            initramfs: &initrd,
            command_line: &command_line,
            console: Some(&console),
        };
        let mut ends = Ends::new();
        ends.listener(slots::VSOCK, &listener);
        self.steps = self.vmm().boot(&boot, ends)?;
        let deadline = Instant::now() + BOOT_LIMIT;
        while !self.console().contains(READY) {
            ensure!(
                Instant::now() < deadline,
                "the guest is not up: no {READY:?} on its console in {BOOT_LIMIT:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        self.ask().map(drop).context("the guest is not up")
    }

    /// Resumes a machine. `ends` are the host sides besides that of its sockets.
    pub fn resume(dir: &Path, baked: &Baked, ends: Ends<'_>) -> Result<Self> {
        Self::resume_in(Self::spawn(dir)?, dir, baked, ends)
    }

    /// Resumes a machine in a VMM that was started before.
    pub fn resume_in(vmm: Machine, dir: &Path, baked: &Baked, ends: Ends<'_>) -> Result<Self> {
        Self::resume_as(vmm, dir, baked, ends, false)
    }

    fn resume_as(
        vmm: Machine,
        dir: &Path,
        baked: &Baked,
        ends: Ends<'_>,
        one_by_one: bool,
    ) -> Result<Self> {
        let mut uvm = Self {
            vmm,
            dir: dir.to_owned(),
            steps: Vec::new(),
        };
        let state = File::open(&baked.state)?;
        let memory = File::open(&baked.memory)?;
        let console = File::create(dir.join("console"))?;
        let listener = uvm.listen()?;
        // A shorter borrow than the caller's.
        let mut ends: Ends<'_> = ends;
        ends.listener(slots::VSOCK, &listener);
        let resume = Resume {
            state: &state,
            memory: &memory,
            touched: &baked.touched,
            one_by_one,
            console: Some(&console),
        };
        match uvm.vmm().resume(&resume, ends) {
            Ok(steps) => {
                uvm.steps = steps;
                Ok(uvm)
            }
            Err(e) => {
                let said = uvm.explain(&anyhow!("the resume failed"));
                Err(anyhow::Error::from(e).context(said))
            }
        }
    }

    fn listen(&self) -> Result<UnixListener> {
        let path = self.dir.join("vsock");
        // Of an earlier machine in the same folder, if any.
        let _ = std::fs::remove_file(&path);
        UnixListener::bind(&path).with_context(|| format!("{}", path.display()))
    }

    /// What its VMM can be told.
    pub fn vmm(&self) -> &Control {
        self.vmm.control()
    }

    /// Waits for an answer of the guest's, the quickest there is.
    ///
    /// The connection it came by stays for as long as what is returned.
    pub fn ask(&self) -> Result<UnixStream> {
        let mut socket = self.send("")?;
        let mut text = Vec::new();
        let mut buffer = [0; 64];
        while !text.ends_with(b"exit=0\n") {
            let length = socket.read(&mut buffer).context("the guest's answer")?;
            ensure!(
                length > 0,
                "the guest took no connection: {:?}",
                String::from_utf8_lossy(&text)
            );
            text.extend_from_slice(&buffer[..length]);
        }
        Ok(socket)
    }

    /// Sends a script to the guest, which may not even run yet.
    fn send(&self, script: &str) -> Result<UnixStream> {
        let mut socket = UnixStream::connect(self.dir.join("vsock"))?;
        socket.set_read_timeout(Some(ANSWER_LIMIT))?;
        // All at once: the VMM takes its line off, and the guest gets the rest.
        let length = script.len();
        socket.write_all(format!("CONNECT {PORT}\n{length}\n{script}").as_bytes())?;
        Ok(socket)
    }

    /// Runs a script in the guest; what it prints, without the line's end. A code other than 0 is an error.
    pub fn sh(&self, script: &str) -> Result<String> {
        let (code, text) = self.run(script)?;
        ensure!(code == 0, "{script:?} ended with {code}: {text}");
        Ok(text)
    }

    /// Runs a script in the guest: its exit code and what it prints.
    pub fn run(&self, script: &str) -> Result<(i32, String)> {
        let mut text = String::new();
        self.send(script)?
            .read_to_string(&mut text)
            .with_context(|| format!("the answer to {script:?}"))?;
        let text = match text.split_once('\n') {
            Some((ok, text)) if ok.starts_with("OK ") => text,
            _ => bail!("the guest took no connection for {script:?}: {text:?}"),
        };
        let (text, code) = text
            .rsplit_once("\nexit=")
            .with_context(|| format!("{script:?} was cut off: {text:?}"))?;
        Ok((code.trim().parse()?, text.trim_end().to_owned()))
    }

    /// A connection to the guest's port for scripts.
    pub fn connect(&self) -> Result<UnixStream> {
        let mut socket = UnixStream::connect(self.dir.join("vsock"))?;
        socket.set_read_timeout(Some(ANSWER_LIMIT))?;
        socket.write_all(format!("CONNECT {PORT}\n").as_bytes())?;
        let mut line = Vec::new();
        let mut byte = [0];
        while socket.read(&mut byte)? == 1 && byte != *b"\n" {
            line.push(byte[0]);
        }
        ensure!(
            line.starts_with(b"OK "),
            "the guest took no connection: {:?}",
            String::from_utf8_lossy(&line)
        );
        Ok(socket)
    }

    /// Saves the machine into a folder.
    pub fn snapshot(&self, into: &Path, go_on: bool) -> Result<Baked> {
        std::fs::create_dir_all(into)?;
        let baked = Baked::in_dir(into);
        let (state, memory) = (File::create(&baked.state)?, File::create(&baked.memory)?);
        self.vmm().save(&state, &memory, [1; 32], go_on)?;
        Ok(baked)
    }

    /// Saves the machine, which was resumed from `from` unless it was booted, into a folder, and lets it go on: its memory
    /// is copied while it runs.
    pub fn save(&self, into: &Path, from: Option<&Baked>) -> Result<(Baked, Stood)> {
        std::fs::create_dir_all(into)?;
        let saved = Baked::in_dir(into);
        let files = Files {
            state: File::create(&saved.state)?,
            memory: File::create(&saved.memory)?,
            scratch: None,
        };
        let from = from.map(|from| File::open(&from.memory)).transpose()?;
        let prepared = save::prepare(self.vmm(), files, from, MOST_MEMORY)?;
        let stood = save::finish(self.vmm(), prepared, [1; 32], Afterwards::GoesOn)?;
        Ok((saved, stood))
    }

    /// Waits for the VMM's end, but not for ever: its exit code.
    pub fn wait(&self, limit: Duration) -> Result<i32> {
        let deadline = Instant::now() + limit;
        // A zombie until it is waited for; gone if something else has.
        let stat = format!("/proc/{}/stat", self.vmm.pid());
        loop {
            let over = std::fs::read_to_string(&stat).map_or(true, |s| s.contains(") Z "));
            if over {
                return Ok(self.vmm().wait()?);
            }
            if Instant::now() > deadline {
                return Err(self.explain(&anyhow!("the VMM has not ended in {limit:?}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What the VMM logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("vmm.log")).unwrap_or_default()
    }

    /// What the guest wrote to its console.
    pub fn console(&self) -> String {
        let bytes = std::fs::read(self.dir.join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// An error with the last lines of log and console.
    pub fn explain(&self, error: &anyhow::Error) -> anyhow::Error {
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        let last = lines
            .get(lines.len().saturating_sub(15)..)
            .unwrap_or_default();
        anyhow!(
            "{error:#}\nthe VMM's log:\n{}\nthe console's end:\n{}",
            self.log(),
            last.join("\n")
        )
    }
}
