//! A μVM of the store, resumed for a person: the lease on it, its VMM, its size.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use kiln_agent_api::{PROTOCOL_VERSION, slots};
use kiln_overlay::{Budget, Seat};
use kiln_store::{Class, Host, Kind, Lease, Store, Wanted};
use kiln_vmm_control::{
    BudgetSeat, End, Reply, Request, ScratchLimits, Spawn, Step, Vmm, VmmError,
};
use tokio::sync::watch;

use super::place::{Place, STATE};

/// A guest that has not grown by then has trouble.
const RESIZE_LIMIT_MS: u32 = 30_000;
/// How much later than its connections a VMM may end.
const END_LIMIT: Duration = Duration::from_millis(500);
/// How much of the VMM's log a message shows.
const LAST_WORDS: u64 = 8192;

/// How big a μVM is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) cpus: u32,
    /// Bytes; `None` leaves what it was baked with.
    pub(crate) memory: Option<u64>,
}

/// Holds a baked μVM that can become this big.
pub(crate) fn lease(root: &Path, size: Size) -> Result<Lease> {
    let store = Store::open(root)?;
    let host = Host::this(PROTOCOL_VERSION);
    let wanted = Wanted {
        cpus: size.cpus,
        memory: size.memory,
        scratch: true,
    };
    let found = store.pick(&host, &wanted)?;
    let id = found.map_err(|miss| {
        let memory = size.memory.map_or_else(String::new, |bytes| {
            format!(" --max-memory {}M", bytes.div_ceil(1 << 20))
        });
        anyhow!(
            "no μVM in {} can be resumed: {miss}; bake one (kiln bake --max-cpus {}{memory})",
            root.display(),
            size.cpus
        )
    })?;
    Ok(store.lease(id)?)
}

/// Takes a place in the node's budget of RAM for what containers write, which is what the pods' shims made it. `limit`
/// is how much of it this μVM may ever have.
fn join_budget(limit: u64) -> Result<Seat> {
    let path = Path::new(STATE).join(Budget::FILE_NAME);
    let budget = Budget::open_or_make(&path, Budget::half_of_memory());
    budget
        .and_then(|budget| budget.join(limit))
        .with_context(|| {
            format!(
                "joining the node's budget for containers' writes in {}",
                path.display()
            )
        })
}

/// A running μVM. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Uvm {
    vmm: Arc<Vmm>,
    log: PathBuf,
    exit: watch::Receiver<Option<i32>>,
    class: Class,
    /// Where the time of the resume went, as the VMM saw it.
    pub(crate) steps: Vec<Step>,
    _lease: Lease,
}

/// Descriptors of a request and their numbers.
#[derive(Default)]
struct Descriptors(Vec<OwnedFd>);

impl Descriptors {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> u8 {
        self.0.push(fd.into());
        // A request has a handful.
        (self.0.len() - 1) as u8
    }
}

/// What a resumed μVM is given by its host.
#[derive(Debug)]
pub(crate) struct Ends {
    /// The root file system's image.
    pub(crate) root: File,
    /// The directory that the guest sees by virtio-fs.
    pub(crate) share: Option<File>,
    /// Where what the container writes goes when there is no more RAM for it.
    pub(crate) spill: File,
    /// How much it may write.
    pub(crate) scratch: ScratchLimits,
    /// The tap that the network card is connected to.
    pub(crate) cable: Option<OwnedFd>,
}

impl Uvm {
    /// Resumes the leased μVM; its socket, console and log are in `place`.
    pub(crate) async fn resume(
        program: &Path,
        lease: Lease,
        place: &Place,
        ends: Ends,
    ) -> Result<Uvm> {
        let log = place.path("vmm.log");
        let make = |path: &Path| {
            OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .open(path)
                .with_context(|| format!("making {}", path.display()))
        };
        let spawn = Spawn {
            program: program.to_owned(),
            jail: kiln_bake::jail()?,
            log: Some(make(&log)?),
        };
        let socket = place.path("vsock");
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("listening on {}", socket.display()))?;
        let mut fds = Descriptors::default();
        let mut host = vec![(slots::VSOCK, End::Listener(fds.add(listener)))];
        let scratch = lease.open(Kind::Scratch)?;
        let size = scratch.metadata().context("reading the store")?.len();
        let (base, spill) = (fds.add(scratch), fds.add(ends.spill));
        // The budget is root's, as the pods are that share it.
        let seat = match spawn.jail {
            Some(_) => Some(join_budget(ends.scratch.ram)?),
            None => None,
        };
        let place_in_budget = match &seat {
            Some(seat) => Some(BudgetSeat {
                view: fds.add(seat.view().try_clone_to_owned()?),
                page: fds.add(seat.page().try_clone_to_owned()?),
                number: seat.number(),
            }),
            None => None,
        };
        host.push((
            slots::SCRATCH,
            End::scratch(base, size, Some(spill), place_in_budget, ends.scratch),
        ));
        if let Some(share) = ends.share {
            host.push((slots::FS, End::Directory(fds.add(share))));
        }
        if let Some(cable) = ends.cable {
            host.push((slots::NET, End::Tap(vec![fds.add(cable)])));
        }
        let memory = lease.open(Kind::Memory)?;
        let touched = lease.touched_first(&memory)?;
        let request = Request::Resume {
            state: fds.add(lease.open(Kind::State)?),
            memory: fds.add(memory),
            console: Some(fds.add(make(&place.path("console"))?)),
            ends: host,
            touched,
            one_by_one: false,
        };
        let vmm = Arc::new(Vmm::spawn(spawn)?);
        let (tell, exit) = watch::channel(None);
        let waiting = vmm.clone();
        std::thread::Builder::new()
            .name("vmm-exit".to_owned())
            .spawn(move || {
                let code = waiting.wait().unwrap_or(-1);
                drop(seat);
                tell.send_replace(Some(code))
            })
            .context("starting a thread")?;
        let mut uvm = Uvm {
            vmm,
            log,
            exit,
            class: lease.manifest().about.class.clone(),
            steps: Vec::new(),
            _lease: lease,
        };
        let started = uvm.call(request, fds).await;
        match started.with_context(|| {
            format!(
                "μVM {} cannot be resumed; if it was baked by another version of kiln, bake again \
                 (kiln bake)",
                uvm._lease.id().short()
            )
        })? {
            Reply::Started { steps, .. } => uvm.steps = steps,
            other => return Err(anyhow!("the VMM answered {other:?} to a resume")),
        }
        let mut fds = Descriptors::default();
        let disk = Request::AttachBlock {
            slot: Some(slots::FIRST_DISK),
            fd: fds.add(ends.root),
            read_only: true,
        };
        uvm.call(disk, fds)
            .await
            .context("the root file system cannot be attached")?;
        Ok(uvm)
    }

    async fn call(&self, request: Request, fds: Descriptors) -> Result<Reply> {
        let vmm = self.vmm.clone();
        let call = tokio::task::spawn_blocking(move || {
            let fds: Vec<BorrowedFd<'_>> = fds.0.iter().map(AsFd::as_fd).collect();
            vmm.call(&request, &fds)
        });
        match call.await.context("a thread died")? {
            Err(VmmError::Gone | VmmError::Socket(_)) => Err(self.ended().await),
            other => Ok(other?),
        }
    }

    /// Grows to `size` and returns when the guest has taken it. What was baked in stays in any case.
    pub(crate) async fn resize(&self, size: Size) -> Result<()> {
        let base = u64::from(self.class.memory_mib) << 20;
        let memory = size
            .memory
            .unwrap_or(base)
            .max(base)
            .next_multiple_of(2 << 20);
        let cpus = size.cpus.max(self.class.cpus);
        if memory == base && cpus == self.class.cpus {
            return Ok(());
        }
        let request = Request::Resize {
            cpus: u8::try_from(cpus).context("so many CPUs are impossible")?,
            memory,
            timeout_ms: RESIZE_LIMIT_MS,
        };
        self.call(request, Descriptors::default())
            .await
            .context("the μVM cannot grow to the size asked for")?;
        Ok(())
    }

    /// What it was baked as.
    pub(crate) fn class(&self) -> &Class {
        &self.class
    }

    /// The VMM's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.vmm.pid()
    }

    /// Comes back only if the machine ends by itself, and says why.
    pub(crate) async fn ended(&self) -> anyhow::Error {
        let mut exit = self.exit.clone();
        let code = match exit.wait_for(Option::is_some).await {
            Ok(code) => code.unwrap_or(-1),
            Err(_) => -1,
        };
        match last_words(&self.log).unwrap_or_default().trim() {
            said if !said.is_empty() => anyhow!("the μVM ended: {said}"),
            _ => anyhow!("the μVM ended: its VMM was killed, or ended with code {code}"),
        }
    }

    /// The reason of a failure: a guest that does not answer may be one whose machine has ended.
    pub(crate) async fn reason(&self, error: anyhow::Error) -> anyhow::Error {
        tokio::time::timeout(END_LIMIT, self.ended())
            .await
            .unwrap_or(error)
    }

    /// Ends it now.
    pub(crate) fn end(&self) {
        self.vmm.kill();
    }
}

impl Drop for Uvm {
    fn drop(&mut self) {
        // A thread waits for the VMM and holds it too.
        self.end();
    }
}

fn last_words(log: &Path) -> io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LAST_WORDS)))?;
    let mut bytes = Vec::new();
    file.take(LAST_WORDS).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Waits no longer than a guest that works may take.
pub(crate) async fn in_time<T>(
    what: &str,
    limit: Duration,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(anyhow!(
            "the guest did not {what} within {} s",
            limit.as_secs()
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use kiln_store::{Cpu, Description, Digest, Kernel};
    use kiln_vmm_control::cpu::Fingerprint;

    use super::*;

    fn class() -> Class {
        Class {
            cpus: 1,
            max_cpus: 4,
            memory_mib: 256,
            max_memory_mib: 1024,
            slots: 8,
        }
    }

    /// Enters a μVM of [`class`] that was baked here, but for what `change` does to it.
    fn bake(store: &Store, name: &str, change: impl FnOnce(&mut Description)) -> Digest {
        let staging = store.begin(0).unwrap();
        for kind in [Kind::State, Kind::Memory, Kind::Scratch] {
            let mut file = staging.create(kind).unwrap();
            file.write_all(name.as_bytes()).unwrap();
        }
        let digest = Digest::of_bytes(name.as_bytes());
        let mut about = Description {
            recipe: digest,
            baked_at: 1,
            kiln_version: "0.1.0".into(),
            class: class(),
            kernel: Kernel {
                release: "6.12".into(),
                digest,
                command_line: String::new(),
            },
            initramfs: digest,
            agent_version: "0.1.0".into(),
            protocol: PROTOCOL_VERSION,
            cpu: Cpu {
                vendor: "v".into(),
                model: "m".into(),
                features: Fingerprint::of_this_cpu(),
            },
            guest_used_kib: 0,
        };
        change(&mut about);
        staging.commit(about).unwrap()
    }

    fn foreign_cpu(about: &mut Description) {
        about.baked_at = 3;
        about.cpu.features.0[9] ^= 1 << 16;
    }

    fn old_protocol(about: &mut Description) {
        about.baked_at = 2;
        about.protocol = PROTOCOL_VERSION - 1;
    }

    #[test]
    fn only_a_uvm_of_this_cpu_and_protocol_is_held_and_others_are_explained() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(dir.path().join("store")).unwrap();
        let want = Size {
            cpus: 1,
            memory: None,
        };
        let held = || lease(store.root(), want);
        let said = || held().unwrap_err().to_string();
        bake(&store, "protocol", old_protocol);
        let old = format!("its agent speaks protocol {}", PROTOCOL_VERSION - 1);
        assert!(said().contains(&old), "{}", said());
        bake(&store, "cpu", foreign_cpu);
        assert!(
            said().contains("another CPU (cpuid leaf 0x7.0 ebx"),
            "{}",
            said()
        );
        let good = bake(&store, "good", |_| {});
        assert_eq!(held().unwrap().id(), good);
    }
}
