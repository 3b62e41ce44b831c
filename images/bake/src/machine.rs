//! A `kiln-vmm` process in the hands of a bake: boots a guest or resumes one, has it saved, ends it.
//!
//! The control client blocks, so its calls run on threads of their own; a [`Machine`] that is dropped
//! ends the process, and with it every call that is under way.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_agent_api::{READY_LINE, slots};
use kiln_store::private::{self, PrivateError};
use kiln_store::{Class, Kind};
use kiln_vmm_control::{
    DeviceKind, DeviceSpec, End, Jail, MachineSpec, Reply, Request, ScratchLimits, Spawn, Vmm,
    VmmError,
};
use tokio::sync::watch;
use tokio::time::timeout;

/// How much of the guest's console is kept, for the case that it says why it failed.
const CONSOLE: usize = 64 << 10;
/// How many lines of it a message shows.
const CONSOLE_LINES: usize = 12;

/// An empty directory that is the root of every jail: nobody can put anything there, so it may be shared.
const EMPTY_ROOT: &str = "/run/kiln/empty";
/// User ids of jailed VMMs begin here. The id of the process that starts one is added, so that no two
/// VMMs of a node have one id at a time.
const FIRST_UID: u32 = 1_801_000_000;

/// Why a machine did not do what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// A file or a directory it needs cannot be had.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was to be done.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// kiln's own directory below `/run` is not kiln's.
    #[error(transparent)]
    Private(#[from] PrivateError),
    /// A thread or a pipe cannot be made.
    #[error("cannot {action}")]
    System {
        /// What was to be done.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A number of the size class is more than any machine has.
    #[error("{what} cannot be {number}: at most {most} is possible")]
    Size {
        /// Which number.
        what: &'static str,
        /// What it is.
        number: u32,
        /// What it may be.
        most: u32,
    },
    /// The VMM could not be started, or broke off.
    #[error("the VMM could not {action}")]
    Vmm {
        /// What it was to do.
        action: &'static str,
        /// What happened.
        #[source]
        source: VmmError,
    },
    /// It ended.
    #[error("the VMM ended: {said}{}", console_text(console))]
    Ended {
        /// Its last words.
        said: String,
        /// The end of the guest's console.
        console: String,
    },
    /// It took too long.
    #[error("the VMM did not {action} within {} s{}", limit.as_secs(), console_text(console))]
    Slow {
        /// What it was to do.
        action: &'static str,
        /// How long it was given.
        limit: Duration,
        /// The end of the guest's console.
        console: String,
    },
}

fn console_text(console: &str) -> String {
    let last: Vec<&str> = console.lines().rev().take(CONSOLE_LINES).collect();
    if last.is_empty() {
        return String::new();
    }
    let lines: Vec<&str> = last.into_iter().rev().collect();
    format!(
        "\nthe end of the guest's console:\n  {}",
        lines.join("\n  ")
    )
}

/// What to boot.
#[derive(Debug)]
pub struct Boot<'a> {
    /// The kernel.
    pub kernel: &'a Path,
    /// The initramfs.
    pub initramfs: &'a Path,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// The size class.
    pub class: &'a Class,
    /// The disk of the writable layers, which the guest mounts.
    pub scratch: &'a File,
}

/// MiB of room for memory to be plugged in: the VMM has it in whole GiB.
fn hotplug_mib(class: &Class) -> u32 {
    class
        .max_memory_mib
        .saturating_sub(class.memory_mib)
        .next_multiple_of(1024)
}

/// The machine of a size class, with the devices every baked μVM has.
fn spec(class: &Class) -> Result<MachineSpec, MachineError> {
    let small = |what, number: u32, most: u8| {
        u8::try_from(number)
            .ok()
            .filter(|number| *number <= most)
            .ok_or(MachineError::Size {
                what,
                number,
                most: most.into(),
            })
    };
    let device = |slot, kind| DeviceSpec { slot, kind };
    let mut devices = vec![
        device(
            slots::VSOCK,
            DeviceKind::Vsock {
                cid: slots::GUEST_CID,
            },
        ),
        device(slots::RNG, DeviceKind::Rng),
        device(
            slots::NET,
            DeviceKind::Net {
                pairs: 1,
                mac: slots::PLACEHOLDER_MAC,
            },
        ),
        device(
            slots::FS,
            DeviceKind::Fs {
                tag: slots::FS_TAG.to_owned(),
            },
        ),
    ];
    let hotplug = u64::from(hotplug_mib(class)) << 20;
    if hotplug > 0 {
        devices.push(device(slots::MEM, DeviceKind::Mem));
    }
    let disks = small("--slots", class.slots, slots::MAX_DISKS)?;
    for slot in (slots::FIRST_DISK..).take(disks.into()) {
        let id = slots::disk_id(slot);
        devices.push(device(slot, DeviceKind::Block { id, queues: 1 }));
    }
    devices.push(device(
        slots::SCRATCH,
        DeviceKind::Block {
            id: slots::disk_id(slots::SCRATCH),
            queues: 1,
        },
    ));
    devices.sort_by_key(|device| device.slot);
    Ok(MachineSpec {
        cpus: small("--cpus", class.cpus, u8::MAX)?,
        max_cpus: small("--max-cpus", class.max_cpus, u8::MAX)?,
        memory: u64::from(class.memory_mib) << 20,
        hotplug,
        serial: true,
        devices,
    })
}

/// Where a VMM is locked in, if there is the right to do so.
pub fn jail() -> Result<Option<Jail>, MachineError> {
    // SAFETY: geteuid takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Ok(None);
    }
    let root = PathBuf::from(EMPTY_ROOT);
    private::directory(root.parent().unwrap_or(&root))?;
    // Nobody but root gets as far as this; the VMM changes its root before its user.
    match fs::DirBuilder::new().mode(0o555).create(&root) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            return Err(MachineError::File {
                action: "make",
                path: root,
                source,
            });
        }
        _ => {}
    }
    let id = FIRST_UID + std::process::id();
    Ok(Some(Jail {
        uid: id,
        gid: id,
        root,
    }))
}

fn open(path: &Path) -> Result<File, MachineError> {
    File::open(path).map_err(|source| MachineError::File {
        action: "open",
        path: path.to_owned(),
        source,
    })
}

fn listen(path: &Path) -> Result<UnixListener, MachineError> {
    UnixListener::bind(path).map_err(|source| MachineError::File {
        action: "listen on",
        path: path.to_owned(),
        source,
    })
}

/// What came out of a pipe of late.
#[derive(Debug, Clone, Default)]
struct Tail(Arc<Mutex<Vec<u8>>>);

impl Tail {
    fn text(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept).replace('\r', "")
    }

    /// Keeps the end of what is written to the returned file, and tells when it contains `wanted`.
    fn collect(
        &self,
        name: &'static str,
        wanted: Option<(&'static [u8], watch::Sender<bool>)>,
    ) -> Result<File, MachineError> {
        let failed = |source| MachineError::System {
            action: "read what the VMM writes",
            source,
        };
        let (mut reader, writer) = io::pipe().map_err(failed)?;
        let kept = self.0.clone();
        let read = move || {
            let mut buffer = [0; 4096];
            // Ends with the last writer: the VMM.
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(&buffer[..length]);
                if let Some((wanted, tell)) = &wanted
                    && kept.windows(wanted.len()).any(|part| part == *wanted)
                {
                    tell.send_replace(true);
                }
                let surplus = kept.len().saturating_sub(CONSOLE);
                kept.drain(..surplus);
            }
        };
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(read)
            .map_err(failed)?;
        Ok(File::from(OwnedFd::from(writer)))
    }
}

/// A running machine. Dropping it ends it.
#[derive(Debug)]
pub struct Machine {
    vmm: Arc<Vmm>,
    console: Tail,
    log: Tail,
    ready: watch::Receiver<bool>,
    exit: watch::Receiver<Option<i32>>,
}

impl Machine {
    /// Boots a guest whose agent is reached through the Unix socket `vsock`.
    pub async fn boot(
        vmm: &Path,
        boot: &Boot<'_>,
        vsock: &Path,
        limit: Duration,
    ) -> Result<Machine, MachineError> {
        let request = Request::Boot {
            machine: spec(boot.class)?,
            kernel: 2,
            initrd: Some(3),
            cmdline: boot.command_line.to_owned(),
            console: Some(0),
            ends: vec![
                (slots::VSOCK, End::Listener(1)),
                (
                    slots::SCRATCH,
                    End::Disk {
                        fd: 4,
                        read_only: false,
                    },
                ),
            ],
        };
        let scratch = boot.scratch.try_clone();
        let files = [
            open(boot.kernel)?,
            open(boot.initramfs)?,
            scratch.map_err(|source| MachineError::System {
                action: "hold the scratch disk",
                source,
            })?,
        ];
        Machine::start(vmm, request, vsock, files, "start the guest", limit).await
    }

    /// Resumes what [`Machine::save`] left in a directory, and reads the memory file only where the guest does.
    pub async fn resume(
        vmm: &Path,
        dir: &Path,
        vsock: &Path,
        limit: Duration,
    ) -> Result<Machine, MachineError> {
        let path = dir.join(Kind::Scratch.name());
        let scratch = open(&path)?;
        let size = scratch
            .metadata()
            .map_err(|source| MachineError::File {
                action: "look at",
                path,
                source,
            })?
            .len();
        // A guest that is tried out writes next to nothing.
        let limits = ScratchLimits {
            disk: 0,
            ..ScratchLimits::default()
        };
        let request = Request::Resume {
            state: 2,
            memory: 3,
            console: Some(0),
            ends: vec![
                (slots::VSOCK, End::Listener(1)),
                (slots::SCRATCH, End::scratch(4, size, None, None, limits)),
            ],
            touched: Vec::new(),
            one_by_one: true,
        };
        let files = [
            open(&dir.join(Kind::State.name()))?,
            open(&dir.join(Kind::Memory.name()))?,
            scratch,
        ];
        Machine::start(vmm, request, vsock, files, "resume the guest", limit).await
    }

    /// The request's descriptors are the console, the listener, and the files.
    async fn start(
        program: &Path,
        request: Request,
        vsock: &Path,
        files: [File; 3],
        action: &'static str,
        limit: Duration,
    ) -> Result<Machine, MachineError> {
        let listener = listen(vsock)?;
        let (console, log) = (Tail::default(), Tail::default());
        let (tell_ready, ready) = watch::channel(false);
        let console_end =
            console.collect("console", Some((READY_LINE.trim_ascii_end(), tell_ready)))?;
        let spawn = Spawn {
            program: program.to_owned(),
            jail: jail()?,
            log: Some(log.collect("vmm-log", None)?),
        };
        let vmm = Vmm::spawn(spawn).map_err(|source| MachineError::Vmm { action, source })?;
        let vmm = Arc::new(vmm);
        let (tell_exit, exit) = watch::channel(None);
        let waiting = vmm.clone();
        std::thread::Builder::new()
            .name("vmm-exit".to_owned())
            .spawn(move || tell_exit.send_replace(Some(waiting.wait().unwrap_or(-1))))
            .map_err(|source| MachineError::System {
                action: "wait for the VMM",
                source,
            })?;
        let machine = Machine {
            vmm,
            console,
            log,
            ready,
            exit,
        };
        let mut fds = vec![OwnedFd::from(console_end), listener.into()];
        fds.extend(files.map(OwnedFd::from));
        machine.ask(action, request, fds, limit).await?;
        Ok(machine)
    }

    /// The VMM's process id.
    pub fn pid(&self) -> u32 {
        self.vmm.pid()
    }

    /// What the guest wrote to its console of late.
    pub fn console(&self) -> String {
        self.console.text()
    }

    /// Comes back when the agent has written on the console that it is ready; never, if it doesn't.
    pub async fn ready(&self) {
        let mut ready = self.ready.clone();
        if ready.wait_for(|ready| *ready).await.is_err() {
            std::future::pending().await
        }
    }

    /// Comes back only if the machine ends by itself.
    pub async fn ended(&self) -> MachineError {
        let mut exit = self.exit.clone();
        let code = match exit.wait_for(Option::is_some).await {
            Ok(code) => code.unwrap_or(-1),
            Err(_) => -1,
        };
        // The threads that read the pipes may be a moment behind.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let log = self.log.text();
        let said = match log.lines().rfind(|line| !line.trim().is_empty()) {
            Some(line) => line.strip_prefix("kiln-vmm: ").unwrap_or(line).to_owned(),
            None => format!("exit code {code}, and nothing in its log"),
        };
        MachineError::Ended {
            said,
            console: self.console(),
        }
    }

    /// Saves the machine, which does not go on afterwards. `digest` is kept in the state's header.
    pub async fn save(
        &self,
        state: File,
        memory: File,
        digest: [u8; 32],
        limit: Duration,
    ) -> Result<(), MachineError> {
        let request = Request::Snapshot {
            state: 0,
            memory: 1,
            digest,
            go_on: false,
        };
        let fds = vec![state.into(), memory.into()];
        self.ask("save the guest", request, fds, limit).await?;
        Ok(())
    }

    /// Gives the guest a disk that is only read, in a slot it was baked with.
    pub async fn attach(&self, slot: u8, disk: File, limit: Duration) -> Result<(), MachineError> {
        let request = Request::AttachBlock {
            slot: Some(slot),
            fd: 0,
            read_only: true,
        };
        self.ask("attach a disk", request, vec![disk.into()], limit)
            .await?;
        Ok(())
    }

    /// Ends the machine.
    pub async fn stop(self) -> Result<(), MachineError> {
        self.ask("stop", Request::Stop, Vec::new(), Duration::from_secs(10))
            .await?;
        Ok(())
    }

    async fn ask(
        &self,
        action: &'static str,
        request: Request,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Reply, MachineError> {
        let vmm = self.vmm.clone();
        let call = tokio::task::spawn_blocking(move || {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            vmm.call(&request, &fds)
        });
        let answer = match timeout(limit, call).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(source)) => {
                return Err(MachineError::System {
                    action: "run a thread",
                    source: io::Error::other(source),
                });
            }
            Err(_) => {
                return Err(MachineError::Slow {
                    action,
                    limit,
                    console: self.console(),
                });
            }
        };
        match answer {
            Err(VmmError::Gone | VmmError::Socket(_)) => Err(self.ended().await),
            other => other.map_err(|source| MachineError::Vmm { action, source }),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Threads that wait for the VMM hold it too: it has to be ended by name.
        self.vmm.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn class() -> Class {
        Class {
            cpus: 1,
            max_cpus: 8,
            memory_mib: 256,
            max_memory_mib: 4096,
            slots: 8,
        }
    }

    /// A program in the VMM's place.
    fn script(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        for kind in [Kind::State, Kind::Memory, Kind::Scratch] {
            fs::write(dir.path().join(kind.name()), "").unwrap();
        }
        (dir, path)
    }

    /// A script that was just written may be busy while another test forks.
    async fn resume(dir: &Path, program: &Path, limit: Duration) -> Result<Machine, MachineError> {
        for _ in 0..100 {
            let socket = dir.join("vsock");
            let _ = fs::remove_file(&socket);
            match Machine::resume(program, dir, &socket, limit).await {
                Err(MachineError::Vmm {
                    source: VmmError::Spawn { source, .. },
                    ..
                }) if source.kind() == io::ErrorKind::ExecutableFileBusy => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                machine => return machine,
            }
        }
        panic!("{} stays busy", program.display());
    }

    #[test]
    fn every_machine_has_the_devices_of_the_contract() {
        let spec = spec(&class()).unwrap();
        let of = |slot: u8| {
            let mut devices = spec.devices.iter();
            &devices.find(|device| device.slot == slot).unwrap().kind
        };
        assert!(matches!(of(slots::VSOCK), DeviceKind::Vsock { .. }));
        assert!(matches!(of(slots::RNG), DeviceKind::Rng));
        assert!(matches!(of(slots::MEM), DeviceKind::Mem));
        assert!(matches!(of(slots::NET), DeviceKind::Net { pairs: 1, .. }));
        assert!(matches!(of(slots::FS), DeviceKind::Fs { tag } if tag == slots::FS_TAG));
        let disk = |kind: &DeviceKind| matches!(kind, DeviceKind::Block { .. });
        let disks: Vec<u8> = spec
            .devices
            .iter()
            .filter(|device| disk(&device.kind))
            .map(|device| device.slot)
            .collect();
        assert_eq!(disks, (slots::SCRATCH..16).collect::<Vec<u8>>());
        assert_eq!((spec.memory, spec.hotplug), (256 << 20, 4 << 30));
    }

    #[test]
    fn class_that_cannot_grow_has_no_hotplug() {
        let mut fixed = class();
        fixed.max_memory_mib = fixed.memory_mib;
        let spec = spec(&fixed).unwrap();
        assert_eq!(spec.hotplug, 0);
        assert!(spec.devices.iter().all(|d| d.kind != DeviceKind::Mem));
    }

    #[test]
    fn numbers_no_machine_has_are_refused_by_option() {
        let mut class = class();
        class.slots = 25;
        let error = spec(&class).unwrap_err().to_string();
        assert!(error.contains("--slots") && error.contains("24"), "{error}");
    }

    #[tokio::test]
    async fn end_of_the_vmm_shows_its_last_words() {
        let (dir, path) = script("echo 'kiln-vmm: /dev/kvm is gone' >&2; exit 1");
        let error = resume(dir.path(), &path, Duration::from_secs(20)).await;
        let text = error.unwrap_err().to_string();
        assert!(text.contains("ended: /dev/kvm is gone"), "{text}");
    }

    #[tokio::test]
    async fn silence_is_given_up_at_the_limit_and_the_vmm_killed() {
        let (dir, path) = script("echo $$ > \"${0%/*}/pid\"; exec sleep 60");
        let error = resume(dir.path(), &path, Duration::from_millis(300)).await;
        assert!(matches!(error.unwrap_err(), MachineError::Slow { .. }));
        let pid = fs::read_to_string(dir.path().join("pid")).unwrap();
        // Killed and reaped before the error came back.
        assert!(!Path::new("/proc").join(pid.trim()).exists());
    }

    #[tokio::test]
    async fn missing_vmm_is_named() {
        let (dir, _) = script("");
        let error = resume(dir.path(), Path::new("/no/vmm"), Duration::from_secs(1)).await;
        let error = chain(&error.unwrap_err());
        assert!(error.contains("/no/vmm"), "{error}");
    }

    fn chain(error: &dyn std::error::Error) -> String {
        let mut text = error.to_string();
        let mut next = error.source();
        while let Some(cause) = next {
            text += &format!(": {cause}");
            next = cause.source();
        }
        text
    }
}
