//! The bake itself: boots the guest, lets it settle, saves it, tries it out, enters it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kiln_agent_api::client::{ConnectError, Vsock};
use kiln_agent_api::proto;
use kiln_agent_api::{MIN_ENTROPY, PROTOCOL_VERSION, slots};
use kiln_store::{
    Class, Description, Digest, Host, Kernel, Kind, Manifest, Staging, Store, WorkingSet,
};
use kiln_vmm_control::VmmError;
use tokio::time::{sleep, timeout};
use ttrpc::context;

use crate::kernel::{self, GuestKernel, KernelError};
use crate::machine::{Boot, Machine, MachineError};
use crate::modules::{GUEST, ModuleError, Modules};
use crate::recipe::Recipe;
use crate::scratch::ScratchError;
use crate::touched::Watch;
use crate::{cpu, elf, initramfs, rehearsal, scratch};

/// The command line every guest kernel gets. The serial console is there while baking, and for
/// whoever debugs a resumed guest.
///
/// Without debugfs there is nearly 1 MiB less in every μVM.
pub const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests debugfs=off";

/// How long a guest may take to boot. Machines that emulate take long.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
const SAVE_LIMIT: Duration = Duration::from_secs(120);
const RESUME_LIMIT: Duration = Duration::from_secs(30);
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// A broken connection to the guest is often the first sign of its end.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How often an agent that does not listen yet is tried.
const RETRY: Duration = Duration::from_millis(50);
/// When a booting agent is tried first if it has not said that it is ready.
const FIRST_TRY: Duration = Duration::from_secs(5);
const TRY_LIMIT: Duration = Duration::from_secs(2);

/// What to bake, as a person asks for it.
#[derive(Debug, Clone)]
pub struct Order {
    /// The size class.
    pub class: Class,
    /// The kernel image, unless the best installed one will do.
    pub kernel: Option<PathBuf>,
    /// Its modules, unless they are where the kernel's release says.
    pub modules: Option<PathBuf>,
    /// The agent.
    pub agent: PathBuf,
    /// The VMM.
    pub vmm: PathBuf,
    /// Bake even if the store has a μVM of the same recipe.
    pub again: bool,
}

/// What the bake is at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// The guest was put together.
    Prepared {
        /// The kernel's release.
        kernel: String,
        /// How many modules it loads.
        modules: usize,
        /// Bytes of the initramfs.
        initramfs: u64,
    },
    /// The guest boots.
    Booting,
    /// The agent answered, this long after the start.
    Ready(Duration),
    /// The guest gave back what it does not need; it uses this many bytes.
    Settled {
        /// Bytes in use.
        used: u64,
    },
    /// State and memory are written.
    Saved {
        /// Bytes on disk.
        bytes: u64,
    },
    /// A copy was resumed, took its identity, had a container, and was ended.
    Tried {
        /// This long from start to the identity's answer.
        took: Duration,
        /// Bytes of memory it touched meanwhile.
        touched: u64,
    },
}

/// What came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Baked {
    /// A new μVM.
    New(Digest),
    /// The store had one of the same recipe.
    Already(Digest),
}

/// Why nothing was baked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BakeError {
    /// There is no kernel.
    #[error("no kernel to bake with")]
    Kernel(#[from] KernelError),
    /// Its modules cannot be used.
    #[error("the kernel's modules cannot be used")]
    Modules(#[from] ModuleError),
    /// A file that goes in cannot be read.
    #[error("reading {what} {}", path.display())]
    Input {
        /// What it is.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of the bake cannot be written.
    #[error("writing {}", path.display())]
    Output {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The machine failed.
    #[error("{stage}")]
    Machine {
        /// What was being done.
        stage: &'static str,
        /// What happened.
        #[source]
        source: MachineError,
    },
    /// The agent did not answer.
    #[error("{stage}: the agent does not answer; the guest's console ends with:\n{console}")]
    Silent {
        /// What was being done.
        stage: &'static str,
        /// The end of the console.
        console: String,
        /// The last try.
        #[source]
        source: ConnectError,
    },
    /// The agent refused something.
    #[error("{stage}: the agent refused")]
    Refused {
        /// What was being done.
        stage: &'static str,
        /// Its answer.
        #[source]
        source: ttrpc::Error,
    },
    /// The guest is not what it should be.
    #[error("{stage}: {problem}")]
    Wrong {
        /// What was being done.
        stage: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// The disk of the writable layers cannot be made.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// The store refused.
    #[error("the store did not take the μVM")]
    Store(#[from] kiln_store::Error),
}

/// The guest's parts, and the digest of all that goes in.
struct Prepared {
    kernel: GuestKernel,
    initramfs: Vec<u8>,
    modules: usize,
    recipe: Recipe,
}

/// Bakes what is ordered, unless the store has it. `tell` hears how it goes.
///
/// Dropping the future ends the guest and throws away what was written so far.
pub async fn bake(
    store: &Store,
    order: &Order,
    tell: &mut (dyn FnMut(Progress) + Send),
) -> Result<Baked, BakeError> {
    let prepared = prepare(order)?;
    tell(Progress::Prepared {
        kernel: prepared.kernel.release.clone(),
        modules: prepared.modules,
        initramfs: prepared.initramfs.len() as u64,
    });
    let recipe = prepared.recipe.digest();
    if !order.again
        && let Some(id) = baked_already(store, recipe)?
    {
        return Ok(Baked::Already(id));
    }

    // A guest's memory is at most this long on disk; most of it will be holes.
    let staging = store.begin(0)?;
    let work = Work::new(staging.dir())?;
    let initramfs = work.path("initramfs");
    fs::write(&initramfs, &prepared.initramfs).map_err(|source| BakeError::Output {
        path: initramfs.clone(),
        source,
    })?;
    scratch::make(
        &staging.create(Kind::Scratch)?,
        &staging.path(Kind::Scratch),
    )?;
    let facts = boot_and_save(order, &prepared, &initramfs, &staging, &work, tell).await?;
    let bytes = [Kind::State, Kind::Memory, Kind::Scratch]
        .iter()
        .map(|kind| on_disk(&staging.path(*kind)))
        .sum();
    tell(Progress::Saved { bytes });
    let (took, set) = try_out(order, &staging, &work).await?;
    tell(Progress::Tried {
        took,
        touched: set.pages() << 12,
    });
    let path = staging.path(Kind::WorkingSet);
    fs::write(&path, set.encode()).map_err(|source| BakeError::Output { path, source })?;
    drop(work);

    let recipe = prepared.recipe;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let id = staging.commit(Description {
        recipe: recipe.digest(),
        baked_at: now.as_secs(),
        kiln_version: env!("CARGO_PKG_VERSION").to_owned(),
        class: recipe.class,
        kernel: recipe.kernel,
        initramfs: recipe.initramfs,
        agent_version: facts.agent_version,
        protocol: facts.protocol,
        cpu: recipe.cpu,
        guest_used_kib: facts.used >> 10,
    })?;
    Ok(Baked::New(id))
}

/// A μVM of the same recipe that can be resumed here.
fn baked_already(store: &Store, recipe: Digest) -> Result<Option<Digest>, BakeError> {
    let host = Host::this(PROTOCOL_VERSION);
    let found = store
        .find(|uvm: &Manifest| uvm.about.recipe == recipe && uvm.resumes_here(&host).is_ok())?;
    Ok(found)
}

fn on_disk(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| {
        std::os::unix::fs::MetadataExt::blocks(&meta) * 512
    })
}

fn prepare(order: &Order) -> Result<Prepared, BakeError> {
    let kernel = kernel::choose(
        Path::new("/"),
        order.kernel.as_deref(),
        order.modules.as_deref(),
    )?;
    let agent = fs::read(&order.agent).map_err(|source| BakeError::Input {
        what: "the agent",
        path: order.agent.clone(),
        source,
    })?;
    let modules = Modules::open(&kernel.modules)?.resolve(&GUEST)?;
    let initramfs = initramfs::build(&elf::stripped(agent), &modules);
    let recipe = Recipe {
        class: order.class.clone(),
        kernel: Kernel {
            release: kernel.release.clone(),
            digest: digest_of("the kernel", &kernel.image)?,
            command_line: COMMAND_LINE.to_owned(),
        },
        initramfs: Digest::of_bytes(&initramfs),
        vmm: digest_of("the VMM", &order.vmm)?,
        cpu: cpu::this(Path::new("/")),
    };
    Ok(Prepared {
        kernel,
        initramfs,
        modules: modules.len(),
        recipe,
    })
}

fn digest_of(what: &'static str, path: &Path) -> Result<Digest, BakeError> {
    File::open(path)
        .and_then(|file| kiln_store::of_file(&file))
        .map(|scan| scan.digest)
        .map_err(|source| BakeError::Input {
            what,
            path: path.to_owned(),
            source,
        })
}

/// Files that are needed while baking only: beside the μVM's, so that they go with it.
struct Work {
    dir: PathBuf,
    made: [&'static str; 3],
}

impl Work {
    fn new(staging: &Path) -> Result<Work, BakeError> {
        let made = ["initramfs", "boot.vsock", "try.vsock"];
        Ok(Work {
            dir: staging.to_owned(),
            made,
        })
    }

    fn path(&self, name: &'static str) -> PathBuf {
        debug_assert!(self.made.contains(&name));
        self.dir.join(name)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        for name in self.made {
            // Some were never made; the rest goes with the staging directory in any case.
            let _ = fs::remove_file(self.dir.join(name));
        }
    }
}

/// What the guest told about itself.
struct Facts {
    agent_version: String,
    protocol: u32,
    used: u64,
}

async fn boot_and_save(
    order: &Order,
    prepared: &Prepared,
    initramfs: &Path,
    staging: &Staging,
    work: &Work,
    tell: &mut (dyn FnMut(Progress) + Send),
) -> Result<Facts, BakeError> {
    const STAGE: &str = "booting the guest";
    let socket = work.path("boot.vsock");
    let start = Instant::now();
    tell(Progress::Booting);
    let path = staging.path(Kind::Scratch);
    let scratch = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|source| BakeError::Output { path, source })?;
    let boot = Boot {
        kernel: &prepared.kernel.image,
        initramfs,
        command_line: COMMAND_LINE,
        class: &order.class,
        scratch: &scratch,
    };
    let on_machine = |source| BakeError::Machine {
        stage: STAGE,
        source,
    };
    let machine = Machine::boot(&order.vmm, &boot, &socket, BOOT_LIMIT)
        .await
        .map_err(on_machine)?;
    let agent = reach(&machine, &socket, Start::Booted, STAGE).await?;
    let hello = agent
        .hello(deadline(), &hello_request())
        .await
        .map_err(refused(STAGE))?;
    tell(Progress::Ready(start.elapsed()));
    check_hello(&hello, &prepared.kernel.release)?;

    const SETTLING: &str = "settling the guest";
    let settle = proto::SettleRequest {
        drop_caches: true,
        compact_memory: true,
        ..Default::default()
    };
    let settled = match agent.settle(deadline(), &settle).await {
        Ok(settled) => settled,
        // A guest that broke down says more than the connection to it.
        Err(error) => match timeout(END_LIMIT, machine.ended()).await {
            Ok(source) => {
                return Err(BakeError::Machine {
                    stage: SETTLING,
                    source,
                });
            }
            Err(_) => return Err(refused(SETTLING)(error)),
        },
    };
    let resources = settled.resources.unwrap_or_default();
    let used = resources
        .mem_total_bytes
        .saturating_sub(resources.mem_available_bytes);
    tell(Progress::Settled { used });
    // A guest that is saved with a connection would have to be told at every resume that the
    // connection is gone; it needs a moment to hear of it.
    drop(agent);
    sleep(RETRY).await;

    let on_machine = |source| BakeError::Machine {
        stage: "saving the guest",
        source,
    };
    let state = staging.create(Kind::State)?;
    let memory = staging.create(Kind::Memory)?;
    let digest = *prepared.recipe.digest().as_bytes();
    let saved = machine.save(state, memory, digest, SAVE_LIMIT).await;
    saved.map_err(|source| match source {
        MachineError::Vmm { source, .. } if is_full_disk(&source) => BakeError::Output {
            path: staging.path(Kind::Memory),
            source: io::ErrorKind::StorageFull.into(),
        },
        source => on_machine(source),
    })?;
    machine.stop().await.map_err(on_machine)?;
    Ok(Facts {
        agent_version: hello.agent_version,
        protocol: hello.protocol_version,
        used,
    })
}

/// The VMM writes the files, and tells its errors as text.
fn is_full_disk(error: &VmmError) -> bool {
    let number = format!("(os error {})", libc::ENOSPC);
    matches!(error, VmmError::Refused(text) if text.contains(&number))
}

fn check_hello(hello: &proto::HelloResponse, release: &str) -> Result<(), BakeError> {
    let wrong = |problem: String| {
        Err(BakeError::Wrong {
            stage: "booting the guest",
            problem,
        })
    };
    if hello.protocol_version != PROTOCOL_VERSION {
        return wrong(format!(
            "the agent speaks version {} of its protocol, this kiln version {PROTOCOL_VERSION}: \
             install agent and kiln of one release",
            hello.protocol_version
        ));
    }
    if hello.kernel_release != release {
        return wrong(format!(
            "the guest runs kernel {}, not {release}: are the modules those of the kernel?",
            hello.kernel_release
        ));
    }
    if let Some(warning) = hello.warnings.first() {
        return wrong(format!("the agent warns: {warning}"));
    }
    Ok(())
}

/// Resumes what was saved, gives it an identity, starts a container, and ends it. Returns how long that took, and the pages it needed.
async fn try_out(
    order: &Order,
    staging: &Staging,
    work: &Work,
) -> Result<(Duration, WorkingSet), BakeError> {
    const STAGE: &str = "trying out the baked guest";
    let socket = work.path("try.vsock");
    let start = Instant::now();
    let on_machine = |source| BakeError::Machine {
        stage: STAGE,
        source,
    };
    let path = staging.path(Kind::Memory);
    let on_memory = |source| BakeError::Input {
        what: "which pages were touched of",
        path: path.clone(),
        source,
    };
    let watch = File::open(&path)
        .and_then(Watch::begin)
        .map_err(on_memory)?;
    let machine = Machine::resume(&order.vmm, staging.dir(), &socket, RESUME_LIMIT)
        .await
        .map_err(on_machine)?;
    let agent = reach(&machine, &socket, Start::Resumed, STAGE).await?;
    let identity = identity(STAGE)?;
    let answer = agent
        .set_identity(deadline(), &identity)
        .await
        .map_err(refused(STAGE))?;
    let took = start.elapsed();
    if answer.generation != identity.generation {
        let problem = "it answered for another generation than it was given".to_owned();
        return Err(BakeError::Wrong {
            stage: STAGE,
            problem,
        });
    }
    let image = match order.class.slots {
        0 => None,
        _ => Some(rehearsal::image(&order.agent, staging.dir())?),
    };
    let size = match image {
        None => None,
        Some((disk, size)) => {
            let attached = machine.attach(slots::FIRST_DISK, disk, RESUME_LIMIT).await;
            attached.map_err(on_machine)?;
            Some(size)
        }
    };
    match rehearsal::container(&agent, size, deadline()).await {
        Ok(0) => {}
        Ok(code) => {
            let problem = format!("a container's program ended with {code}");
            return Err(BakeError::Wrong {
                stage: STAGE,
                problem,
            });
        }
        Err(error) => return Err(refused(STAGE)(error)),
    }
    let set = watch.end(machine.pid()).map_err(on_memory)?;
    drop(agent);
    machine.stop().await.map_err(on_machine)?;
    Ok((took, set))
}

/// Random bytes from the kernel. `stage` is what they are for.
pub fn random<const N: usize>(stage: &'static str) -> Result<[u8; N], BakeError> {
    let mut bytes = [0; N];
    // SAFETY: the buffer is as long as it is said to be.
    let read = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    // Up to 256 bytes are never cut short.
    if usize::try_from(read) == Ok(N) {
        return Ok(bytes);
    }
    Err(BakeError::Machine {
        stage,
        source: MachineError::System {
            action: "read random bytes",
            source: io::Error::last_os_error(),
        },
    })
}

/// An identity that no other μVM has. `stage` is what it is for.
pub fn identity(stage: &'static str) -> Result<proto::SetIdentityRequest, BakeError> {
    let entropy: [u8; 2 * MIN_ENTROPY] = random(stage)?;
    let (generation, machine): ([u8; 16], [u8; 16]) = (random(stage)?, random(stage)?);
    let hex = |bytes: [u8; 16]| bytes.map(|byte| format!("{byte:02x}")).concat();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let wall_clock_ns = i64::try_from(now.as_nanos()).map_err(|_| BakeError::Wrong {
        stage,
        problem: "the host's clock is beyond the year 2262".to_owned(),
    })?;
    Ok(proto::SetIdentityRequest {
        generation: hex(generation),
        entropy: entropy.to_vec(),
        wall_clock_ns,
        machine_id: hex(machine),
        hostname: "kiln".to_owned(),
        ..Default::default()
    })
}

fn hello_request() -> proto::HelloRequest {
    proto::HelloRequest {
        protocol_version: PROTOCOL_VERSION,
        ..Default::default()
    }
}

fn deadline() -> context::Context {
    context::with_duration(CALL_LIMIT)
}

fn refused(stage: &'static str) -> impl Fn(ttrpc::Error) -> BakeError {
    move |source| BakeError::Refused { stage, source }
}

/// How the guest came to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Booted,
    Resumed,
}

/// A connection to the agent, as soon as it listens; an error as soon as the machine ends.
async fn reach(
    machine: &Machine,
    socket: &Path,
    how: Start,
    stage: &'static str,
) -> Result<proto::AgentClient, BakeError> {
    let limit = match how {
        Start::Booted => BOOT_LIMIT,
        Start::Resumed => RESUME_LIMIT,
    };
    let vsock = Vsock::new(socket);
    let connect = async {
        let start = Instant::now();
        if how == Start::Booted {
            // A kernel may have no console that we see: then it is tried now and then.
            tokio::select! {
                () = machine.ready() => {}
                () = sleep(FIRST_TRY) => {}
            }
        }
        loop {
            // A guest without a driver yet never answers: each try has a limit of its own.
            let failed = match timeout(TRY_LIMIT, vsock.agent()).await {
                Ok(Ok(agent)) => return Ok(agent),
                Ok(Err(error)) => error,
                Err(_) => ConnectError::Timeout {
                    port: kiln_agent_api::RPC_PORT,
                },
            };
            if start.elapsed() > limit {
                return Err(failed);
            }
            sleep(RETRY).await;
        }
    };
    tokio::select! {
        ended = machine.ended() => Err(BakeError::Machine { stage, source: ended }),
        agent = connect => agent.map_err(|source| BakeError::Silent {
            stage,
            console: machine.console(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_of_another_release_or_with_warnings_is_not_baked() {
        let good = proto::HelloResponse {
            protocol_version: PROTOCOL_VERSION,
            kernel_release: "6.12".into(),
            ..Default::default()
        };
        check_hello(&good, "6.12").unwrap();
        let mut old = good.clone();
        old.protocol_version += 1;
        assert!(
            check_hello(&old, "6.12")
                .unwrap_err()
                .to_string()
                .contains("one release")
        );
        assert!(
            check_hello(&good, "6.1")
                .unwrap_err()
                .to_string()
                .contains("6.12")
        );
        let mut warned = good;
        warned
            .warnings
            .push("load virtio_net.ko: No such file".into());
        assert!(
            check_hello(&warned, "6.12")
                .unwrap_err()
                .to_string()
                .contains("virtio_net")
        );
    }

    #[test]
    fn full_disk_is_known_by_the_systems_number() {
        let text = format!(
            "writing memory: {}",
            io::Error::from_raw_os_error(libc::ENOSPC)
        );
        assert!(is_full_disk(&VmmError::Refused(text)));
        assert!(!is_full_disk(&VmmError::Refused("no".into())));
        assert!(!is_full_disk(&VmmError::Gone));
    }

    #[test]
    fn no_two_identities_are_alike() {
        let (a, b) = (identity("x").unwrap(), identity("x").unwrap());
        assert!(a.entropy.len() >= MIN_ENTROPY);
        assert_eq!(a.machine_id.len(), 32);
        assert!(a.entropy != b.entropy && a.machine_id != b.machine_id);
        assert_ne!(a.generation, b.generation);
    }

    #[test]
    fn missing_agent_and_vmm_are_named() {
        let error = digest_of("the VMM", Path::new("/no/kiln-vmm"))
            .unwrap_err()
            .to_string();
        assert_eq!(error, "reading the VMM /no/kiln-vmm");
    }
}
