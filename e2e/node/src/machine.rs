//! The node as a QEMU process. Everything it gets is an inherited descriptor or a cached file, and its
//! disk's changes go to a file without a name: when the process ends, nothing of it is left.

use std::ffi::CString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use kiln_node_channel::PORT_NAME;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::cleanup;
use crate::emulator::Emulator;
use crate::image::Image;
use crate::initramfs::Initramfs;
use crate::parts;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Clock {
    /// Two CPUs in parallel: for tests.
    Wall,
    /// One CPU on which an instruction takes one nanosecond: figures repeat whatever else the machine does.
    Counted,
}

/// What runs the node's own CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Engine {
    Kvm,
    Emulation { because: String },
}

pub(crate) struct Machine {
    qemu: Child,
    // QEMU ends when this end closes.
    _serial: Option<ChildStdin>,
    console: Arc<Mutex<Vec<String>>>,
    pub(crate) channel: UnixStream,
}

pub(crate) struct Options<'a> {
    pub(crate) image: &'a Image,
    pub(crate) clock: Clock,
    pub(crate) engine: &'a Engine,
    pub(crate) emulator: &'a Emulator,
    pub(crate) memory_mib: u32,
    /// Files for the node: path in it, permissions, content.
    pub(crate) files: Vec<(String, u32, Vec<u8>)>,
    /// Read-only disks, which the node finds by their serial numbers.
    pub(crate) parts: &'a [parts::Disk],
    /// A tar archive, unpacked over the node's system.
    pub(crate) payload: &'a [u8],
    pub(crate) init: &'a [u8],
    pub(crate) show_console: bool,
}

const CONSOLE_LINES_KEPT: usize = 400;

impl Machine {
    pub(crate) fn boot(options: &Options) -> Result<Machine> {
        let initramfs = memory_file("initramfs", &initramfs(options)?)?;
        let mut padded = options.payload.to_vec();
        padded.resize(padded.len().next_multiple_of(512).max(512), 0);
        let payload = memory_file("payload", &padded)?;
        let (ours, theirs) = UnixStream::pair().context("making the command channel")?;
        let theirs = OwnedFd::from(theirs);

        let mut command = options.emulator.command();
        command.args(machine_arguments(options.clock, options.engine));
        command
            .args(["-m", &format!("{}M", options.memory_mib)])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
            ])
            .args(["-serial", "stdio"])
            .arg("-kernel")
            .arg(&options.image.kernel)
            .arg("-initrd")
            .arg(format!("/proc/self/fd/{}", initramfs.as_raw_fd()))
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 apparmor=0 mitigations=off no_timer_check",
            ])
            .arg("-drive")
            .arg(format!(
                "file={},format=raw,if=none,id=system,snapshot=on,cache=unsafe",
                options.image.disk.display()
            ))
            .args(["-device", "virtio-blk-pci,drive=system"])
            .args(read_only_disk("payload", &payload, ""))
            .args(options.parts.iter().flat_map(|part| {
                let serial = format!(",serial={}", part.name);
                read_only_disk(&format!("part-{}", part.name), &part.file, &serial)
            }))
            .args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"])
            .arg("-chardev")
            .arg(format!("socket,id=channel,fd={}", theirs.as_raw_fd()))
            .arg("-device")
            .arg(format!("virtserialport,chardev=channel,name={PORT_NAME}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());

        let mut inherited = vec![
            initramfs.as_raw_fd(),
            payload.as_raw_fd(),
            theirs.as_raw_fd(),
        ];
        inherited.extend(options.parts.iter().map(|part| part.file.as_raw_fd()));
        // SAFETY: the closure makes only system calls that are safe between fork and exec, and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                cleanup::unblock_signals()?;
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
                for fd in &inherited {
                    if nix::libc::fcntl(*fd, nix::libc::F_SETFD, 0) != 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let mut qemu = command
            .spawn()
            .context("running qemu-system-x86_64; `make setup` installs it")?;
        let console = Arc::new(Mutex::new(Vec::new()));
        if let Some(stdout) = qemu.stdout.take() {
            collect(stdout, &console, options.show_console);
        }
        if let Some(stderr) = qemu.stderr.take() {
            collect(stderr, &console, options.show_console);
        }
        let serial = qemu.stdin.take();
        Ok(Machine {
            qemu,
            _serial: serial,
            console,
            channel: ours,
        })
    }

    /// The last lines of the node's console and of QEMU's own messages.
    pub(crate) fn console(&self) -> String {
        self.console
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .join("\n")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The node keeps nothing, so there is nothing to shut down in order.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Finds out what can run a node that must itself offer KVM.
pub(crate) fn choose_engine(clock: Clock) -> Engine {
    let emulation = |because: &str| Engine::Emulation {
        because: because.to_owned(),
    };
    if clock == Clock::Counted {
        return emulation("the counted clock counts emulated instructions");
    }
    if std::env::var_os("KILN_NODE_EMULATE").is_some() {
        return emulation("KILN_NODE_EMULATE is set");
    }
    match kiln_kvm_probe::probe() {
        kiln_kvm_probe::Report::Usable { .. } if nested_virtualization() => Engine::Kvm,
        kiln_kvm_probe::Report::Usable { .. } => {
            emulation("this machine's KVM offers its guests no virtualization of their own")
        }
        other => emulation(&format!("KVM: {other}")),
    }
}

fn nested_virtualization() -> bool {
    ["kvm_intel", "kvm_amd"].iter().any(|module| {
        std::fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|value| matches!(value.trim(), "1" | "Y"))
    })
}

fn machine_arguments(clock: Clock, engine: &Engine) -> Vec<&'static str> {
    let mut arguments = vec!["-machine", "q35"];
    // An emulated CPU has no fast string instructions: it would take these byte by byte, and a kernel that finds them uses
    // nothing else to copy and to clear. Nor, for tests, AVX2, which is emulated at half the speed of what is older.
    arguments.extend(match (engine, clock) {
        (Engine::Kvm, _) => ["-accel", "kvm", "-smp", "2", "-cpu", "host"].as_slice(),
        (Engine::Emulation { .. }, Clock::Wall) => &[
            "-accel",
            "tcg,thread=multi,tb-size=1024",
            // The first of them runs none of the node's programs; `system/setup` says why.
            "-smp",
            "3",
            "-cpu",
            "max,+svm,+npt,-la57,-erms,-fsrm,-avx2",
        ],
        (Engine::Emulation { .. }, Clock::Counted) => &[
            "-accel",
            "tcg,thread=single,tb-size=1024",
            "-icount",
            "shift=0,sleep=on",
            "-smp",
            "1",
            "-cpu",
            "max,+svm,+npt,-erms,-fsrm",
        ],
    });
    arguments
}

/// The node names disks in the order in which they come here.
fn read_only_disk(id: &str, file: &std::fs::File, properties: &str) -> [String; 4] {
    let fd = file.as_raw_fd();
    [
        "-drive".to_owned(),
        format!("file=/proc/self/fd/{fd},format=raw,if=none,id={id},readonly=on,file.locking=off"),
        "-device".to_owned(),
        format!("virtio-blk-pci,drive={id}{properties}"),
    ]
}

fn initramfs(options: &Options) -> Result<Vec<u8>> {
    let driver = std::fs::read(&options.image.disk_driver)
        .with_context(|| format!("reading {}", options.image.disk_driver.display()))?;
    let mut initramfs = Initramfs::default();
    for folder in ["dev", "proc", "root"] {
        initramfs.folder(folder);
    }
    initramfs.file("init", 0o755, options.init);
    initramfs.file("drivers/10-virtio_blk.ko", 0o644, &driver);
    initramfs.file("overlay/kiln-node/init", 0o755, options.init);
    for (path, permissions, content) in &options.files {
        initramfs.file(&format!("overlay/{path}"), *permissions, content);
    }
    Ok(initramfs.finish())
}

fn memory_file(name: &str, content: &[u8]) -> Result<std::fs::File> {
    let name = CString::new(name)?;
    let fd =
        memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC).context("making a file in memory")?;
    let mut file = std::fs::File::from(fd);
    file.write_all(content)
        .context("filling a file in memory")?;
    Ok(file)
}

fn collect(from: impl Read + Send + 'static, console: &Arc<Mutex<Vec<String>>>, show: bool) {
    let console = Arc::clone(console);
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while from
            .read_until(b'\n', &mut line)
            .is_ok_and(|length| length > 0)
        {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if show {
                eprintln!("console: {text}");
            }
            let mut console = console.lock().unwrap_or_else(PoisonError::into_inner);
            if console.len() >= CONSOLE_LINES_KEPT {
                console.remove(0);
            }
            console.push(text);
            line.clear();
        }
    });
}

/// Refuses early what QEMU would only say in its own words.
pub(crate) fn check_memory(memory_mib: u32) -> Result<()> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let available: u64 = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .context("/proc/meminfo has no MemAvailable")?;
    // Emulated memory is only taken when touched; half of it is what the tests touch.
    if available / 1024 < u64::from(memory_mib) / 2 {
        bail!(
            "a node of {memory_mib} MiB needs at least {} MiB of free memory, here are {} MiB: \
             end something, or choose less with --memory",
            memory_mib / 2,
            available / 1024
        );
    }
    Ok(())
}
