//! The bake itself: boots the guest, lets it settle, saves it, tries it out, enters it.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_agent_api::PROTOCOL_VERSION;
use kiln_store::{
    Basis, Class, Description, Digest, Host, Kernel, Kind, Manifest, Staging, Storage, Store,
};
use ttrpc::context;

use crate::boot::boot_and_save;
use crate::class::ClassError;
use crate::kernel::{self, GuestKernel, KernelError};
use crate::modules::{GUEST, ModuleError, Modules};
use crate::recipe::Recipe;
use crate::scratch::ScratchError;
use crate::try_out::try_out;
use crate::{cpu, elf, initramfs, library, scratch};

/// The command line every guest kernel gets. The serial console is there while baking, and for
/// whoever debugs a resumed guest.
///
/// Without debugfs there is nearly 1 MiB less in every μVM.
pub const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 cryptomgr.notests debugfs=off";

const CALL_LIMIT: Duration = Duration::from_secs(30);

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
    /// User ids of jailed VMMs begin here.
    pub vmm_ids: u32,
    /// Bake even if the store has a μVM of the same recipe.
    pub again: bool,
    /// How it is stored.
    pub storage: Storage,
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
    /// There is no such machine.
    #[error(transparent)]
    Class(#[from] ClassError),
    /// The system refused something.
    #[error("cannot {action}")]
    System {
        /// What was to be done.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The machine failed, or its agent does not answer.
    #[error("{stage}: {what}{console}")]
    Machine {
        /// What was being done.
        stage: &'static str,
        /// What happened, with its causes.
        what: String,
        /// The end of the guest's console.
        console: String,
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
pub(crate) struct Prepared {
    pub(crate) kernel: GuestKernel,
    initramfs: Vec<u8>,
    modules: usize,
    pub(crate) recipe: Recipe,
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

    if let Basis::Of(id) = order.storage.basis {
        store.check_parent(id)?;
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
    write_library(&prepared.kernel, &staging)?;
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
    let about = Description {
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
        saved: None,
    };
    Ok(Baked::New(staging.commit_as(about, order.storage)?))
}

/// The modules that the guest may load later.
fn write_library(kernel: &GuestKernel, staging: &Staging) -> Result<(), BakeError> {
    let entries = library::entries(&Modules::open(&kernel.modules)?)?;
    let mut file = BufWriter::new(staging.create(Kind::Modules)?);
    kiln_agent_api::modules::write(&entries, &mut file)
        .and_then(|()| file.flush())
        .map_err(|source| BakeError::Output {
            path: staging.path(Kind::Modules),
            source,
        })
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
pub(crate) struct Work {
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

    pub(crate) fn path(&self, name: &'static str) -> PathBuf {
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

pub(crate) fn deadline() -> context::Context {
    context::with_duration(CALL_LIMIT)
}

pub(crate) fn refused(stage: &'static str) -> impl Fn(ttrpc::Error) -> BakeError {
    move |source| BakeError::Refused { stage, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_agent_and_vmm_are_named() {
        let error = digest_of("the VMM", Path::new("/no/kiln-vmm"))
            .unwrap_err()
            .to_string();
        assert_eq!(error, "reading the VMM /no/kiln-vmm");
    }
}
