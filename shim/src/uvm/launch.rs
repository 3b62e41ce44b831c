//! Starting μVMs: one of the store is chosen, resumed in a `kiln-vmm` of the pod's own, and made the
//! pod's.
//!
//! Three things run side by side, since none needs the others: the VMM's process comes up (which
//! makes its VM meanwhile), the network is wired, and the store's files are opened. Growing to the
//! pod's size is asked for with the resume and waited for only when a container starts.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use kiln_agent_api::client::Vsock;
use kiln_agent_api::{PROTOCOL_VERSION, proto, slots};
use kiln_overlay::{Budget, BudgetError, Seat};
use kiln_store::{Host, Kind, Lease, Store, Wanted, private};
use kiln_uvm::share::{self, Share};
use kiln_vmm_control::{
    BudgetSeat, End, Flush, Jail, PageRun, Reply, Request, ScratchLimits, Spawn, Vmm, VmmError,
    spill_file,
};
use tokio::sync::watch;

use super::inspect::{self, About};
use super::log;
use super::running::{Grown, Life, Parts, RunningUvm, resize_request, vmm_error};
use super::{Guest, Launcher, PodSetup, Uvm};
use crate::cgroup::{self, OomKills};
use crate::config::Config;
use crate::error::{Error, Result, chain};
use crate::network::{self, Forwarder, NetworkError, PodNetwork, Tap};
use crate::oom::Scored;
use crate::record::{PodDir, ProcessRef, Record, Stay};
use crate::size::{MIB, Size};
use crate::timeline::{Timeline, Trace};

/// Launches μVMs from the store.
#[derive(Debug, Clone)]
pub struct StoreLauncher {
    store: PathBuf,
    vmm: PathBuf,
    vmm_ids: u32,
    spill: PathBuf,
    node_ram: u64,
    dir: PodDir,
    /// Changed by steps that run side by side.
    record: Arc<Mutex<()>>,
}

/// What the network's half of a launch comes to.
#[derive(Debug, Default)]
struct Wired {
    network: PodNetwork,
    taps: Vec<Tap>,
}

/// Ends a VMM whose launch fails: the thread that follows its end keeps it otherwise.
#[derive(Debug)]
struct Launching(Option<Arc<Vmm>>);

impl Launching {
    fn launched(&mut self) {
        self.0 = None;
    }
}

impl Drop for Launching {
    fn drop(&mut self) {
        if let Some(vmm) = &self.0 {
            vmm.kill();
        }
    }
}

/// What the VMM is to resume.
#[derive(Debug)]
struct Baked {
    lease: Lease,
    state: File,
    memory: File,
    touched: Vec<PageRun>,
    scratch: Scratch,
}

/// A VMM that waits for its first request.
#[derive(Debug)]
struct Spawned {
    vmm: Arc<Vmm>,
    scored: Scored,
    /// In the pod's cgroup, since before the VMM was there.
    kills: Option<OomKills>,
}

/// The disk of the containers' writable layers.
#[derive(Debug)]
struct Scratch {
    /// As it was baked.
    base: File,
    size: u64,
    /// Where what has no room in RAM goes.
    spill: Arc<File>,
    /// The VMM's place in the node's budget of RAM for all pods' writes.
    seat: Arc<Seat>,
    limits: ScratchLimits,
    flush: Flush,
}

fn joined<T>(result: std::result::Result<Result<T>, tokio::task::JoinError>) -> Result<T> {
    result.map_err(|e| Error::failed("launch the μVM", e))?
}

impl StoreLauncher {
    /// Uses the store and the VMM that the configuration names, and the pod's directory.
    pub fn new(config: &Config, dir: PodDir) -> Self {
        Self {
            store: config.store.clone(),
            vmm: config.vmm.clone(),
            vmm_ids: config.vmm_ids,
            spill: config.overlay_dir.clone(),
            node_ram: config.overlay_node_ram,
            dir,
            record: Arc::default(),
        }
    }

    /// Takes a lease on a μVM that can be grown to this size.
    fn pick(&self, size: Size) -> Result<Lease> {
        let bake = || {
            format!(
                "bake one that can grow to {} vCPUs and {} MiB: kiln bake",
                size.cpus,
                size.memory.div_ceil(MIB)
            )
        };
        let store = Store::open(&self.store).map_err(|e| {
            Error::FailedPrecondition(format!(
                "there is no μVM to resume ({}); {}",
                chain(&e),
                bake()
            ))
        })?;
        let found = store
            .pick(&Host::this(PROTOCOL_VERSION), &wanted(size))
            .map_err(|e| Error::failed("look through the μVM store", e))?;
        let id = found.map_err(|miss| {
            Error::FailedPrecondition(format!(
                "no μVM in {} fits this pod: {miss}; {}",
                self.store.display(),
                bake()
            ))
        })?;
        store
            .lease(id)
            .map_err(|e| Error::failed("hold a μVM of the store", e))
    }

    fn open(&self, setup: &PodSetup) -> Result<Baked> {
        let lease = self.pick(setup.size)?;
        let open = |kind| {
            lease
                .open(kind)
                .map_err(|e| Error::failed("open a μVM of the store; bake it again: kiln bake", e))
        };
        let (state, memory, base) = (
            open(Kind::State)?,
            open(Kind::Memory)?,
            open(Kind::Scratch)?,
        );
        let touched = lease.touched_first(&memory).map_err(|e| {
            Error::failed("read what a μVM needs first; bake it again: kiln bake", e)
        })?;
        let size = base
            .metadata()
            .map_err(|e| Error::failed("look at a μVM of the store", e))?
            .len();
        let spill = spill_file(&self.spill)
            .map_err(|e| Error::failed("make room for the pod's writes", e))?
            .into();
        let seat = self
            .join_budget(setup.overlay.ram)
            .map_err(|e| Error::failed("take part in the node's budget for pods' writes", e))?;
        Ok(Baked {
            lease,
            state,
            memory,
            touched,
            scratch: Scratch {
                base,
                size,
                spill,
                seat: Arc::new(seat),
                limits: setup.overlay,
                flush: setup.overlay_flush,
            },
        })
    }

    /// Takes a place in the node's budget of RAM, which is what the configuration says now.
    fn join_budget(&self, limit: u64) -> std::result::Result<Seat, BudgetError> {
        let budget = Budget::open_or_make(&self.dir.overlay_budget(), self.node_ram)?;
        budget.set_total(self.node_ram);
        budget.join(limit)
    }

    /// Before anything is made that has to be cleaned up.
    fn stay(&self) -> Result<Stay> {
        let stay = self.dir.stay();
        stay.map_err(|e| Error::failed("make what the pod needs", e))
    }

    /// Changes the pod's record.
    fn note(&self, _: &Stay, change: impl FnOnce(&mut Record)) -> Result<()> {
        let _turn = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let mut record = self.dir.load().unwrap_or_default();
        change(&mut record);
        self.dir
            .save(&record)
            .map_err(|e| Error::failed("write the pod's record", e))
    }

    /// Enters the pod's cgroup and starts a VMM in it.
    fn spawn(&self, setup: &PodSetup, log: File, timeline: &Timeline) -> Result<Spawned> {
        let stay = self.stay()?;
        let mut kills = None;
        if let Some(directory) = setup.cgroup.as_deref().and_then(cgroup::directory) {
            self.note(&stay, |r| r.cgroup = Some(directory.clone()))?;
            timeline
                .time("shim.cgroup", || {
                    cgroup::enter(&directory, std::process::id())
                })
                .map_err(|e| {
                    Error::failed(format!("enter the cgroup {}", directory.display()), e)
                })?;
            kills = Some(OomKills::since_now(&directory));
        }
        let root = self.dir.empty_root();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o555)
            .create(&root)
            .map_err(|e| Error::failed("make the VMM's empty root", e))?;
        // The shim lives as long as its VMM, so no other pod's VMM has this id.
        let id = self.vmm_ids.saturating_add(std::process::id());
        let vmm = timeline
            .time("shim.spawn", || {
                Vmm::spawn(Spawn {
                    program: self.vmm.clone(),
                    jail: Some(Jail {
                        uid: id,
                        gid: id,
                        root,
                    }),
                    log: Some(log),
                })
            })
            .map_err(|e| {
                Error::failed("start the VMM; `vmm` in kiln's configuration names it", e)
            })?;
        let process = i32::try_from(vmm.pid()).ok().and_then(ProcessRef::of);
        self.note(&stay, |r| r.vmm = process)?;
        let scored =
            Scored::new(vmm.pid()).map_err(|e| Error::failed("find the VMM's process", e))?;
        if let Err(error) = scored.set(setup.oom_score_adj) {
            tracing::warn!(%error, "the pod's VMM keeps the shim's OOM score, so others are killed before it");
        }
        Ok(Spawned {
            vmm: Arc::new(vmm),
            scored,
            kills,
        })
    }

    /// Reads the pod's network and connects it to taps.
    fn wire(&self, setup: &PodSetup, timeline: &Timeline) -> Result<Wired> {
        let Some(path) = &setup.netns else {
            return Ok(Wired::default());
        };
        let failed = |e| Error::failed("connect the pod's network", e);
        let netns = File::open(path).map_err(|e| {
            Error::failed(
                format!("open the pod's network namespace {}", path.display()),
                e,
            )
        })?;
        let network = timeline
            .time("shim.network.read", || network::inspect(&netns))
            .map_err(failed)?;
        let stay = self.stay()?;
        self.note(&stay, |r| {
            r.netns = Some(path.clone());
            r.redirected = network.interfaces.iter().map(|i| i.name.clone()).collect();
            r.taps = (0..network.interfaces.len())
                .map(network::tap_name)
                .collect();
        })?;
        let taps = timeline
            .time("shim.network.wire", || network::connect(&netns, &network))
            .map_err(failed)?;
        Ok(Wired { network, taps })
    }

    fn listen(&self) -> Result<UnixListener> {
        let path = self.dir.vsock();
        private::listen(&path).map_err(|e| {
            let what = format!(
                "listen on {} for the guest; a shorter `state_dir` may help",
                path.display()
            );
            Error::failed(what, e)
        })
    }

    async fn try_launch(&self, setup: &PodSetup, timeline: &Timeline) -> Result<RunningUvm> {
        let (log, last) =
            log::pipe(&setup.id).map_err(|e| Error::failed("make a pipe for the VMM's log", e))?;
        let spawning = {
            let (this, setup, timeline) = (self.clone(), setup.clone(), timeline.clone());
            tokio::task::spawn_blocking(move || this.spawn(&setup, log, &timeline))
        };
        let wiring = {
            let (this, setup, timeline) = (self.clone(), setup.clone(), timeline.clone());
            tokio::task::spawn_blocking(move || this.wire(&setup, &timeline))
        };
        let prepared = timeline.time("shim.files", || {
            let baked = self.open(setup)?;
            let _stay = self.stay()?;
            let share = Share::create(self.dir.shared())?;
            Ok::<_, Error>((baked, Arc::new(share), self.listen()?))
        });
        // Both are waited for, whatever becomes of the others: nothing may go on behind an error.
        let (spawned, wired) = (joined(spawning.await), joined(wiring.await));
        let (baked, share, listener) = prepared?;
        let Spawned { vmm, scored, kills } = spawned?;
        let wired = wired?;
        let mut launching = Launching(Some(Arc::clone(&vmm)));

        let class = &baked.lease.manifest().about.class;
        let base = Size {
            cpus: class.cpus,
            memory: u64::from(class.memory_mib) * MIB,
        };
        let size = Size {
            cpus: setup.size.cpus.max(base.cpus),
            memory: setup.size.memory.max(base.memory),
        };
        let directory = share.open()?;
        let seat = Arc::clone(&baked.scratch.seat);
        let life = Life::follow(&vmm, scored, kills, last, seat)
            .map_err(|e| Error::failed("watch the VMM", e))?;
        let spill = Arc::clone(&baked.scratch.spill);
        let resuming = {
            let (vmm, timeline, taps) = (vmm.clone(), timeline.clone(), wired.taps);
            let Baked {
                lease,
                state,
                memory,
                touched,
                scratch,
            } = baked;
            let grow = (size != base).then_some(size);
            tokio::task::spawn_blocking(move || {
                let ends = Ends {
                    listener: &listener,
                    taps: &taps,
                    directory: &directory,
                    scratch: &scratch,
                };
                timeline.time("vmm.resume", || {
                    resume(&vmm, (&state, &memory, touched), &ends, &timeline)
                })?;
                // The agent waits for those that it is told of and does not have yet.
                for tap in taps.get(1..).unwrap_or_default() {
                    timeline
                        .time("vmm.plug-net", || vmm.plug_net(tap.fd.as_fd(), tap.mac))
                        .map_err(vmm_error("plug the pod's other network cards"))?;
                }
                if let Some(size) = grow {
                    timeline
                        .time("vmm.grow", || vmm.call(&resize_request(size, 0), &[]))
                        .map_err(vmm_error("grow the μVM to the pod's size"))?;
                }
                Ok(lease)
            })
        };
        let lease = joined(resuming.await)?;

        let vsock = Vsock::new(self.dir.vsock());
        let guest = timeline.of("guest.connect", Guest::connect(vsock)).await?;
        let network = setup.netns.as_ref().map(|_| wired.network.for_agent());
        let (step, asked) = ("guest.identity", timeline.now());
        let identity = guest.set_identity(setup, network, vec![shared_mount()]);
        let identity = timeline.of(step, identity).await?;
        timeline.add_guest(step, asked, &identity.spans);
        let events = timeline.of("guest.events", guest.events()).await?;
        let grown = follow_growth(guest.clone(), size, timeline.clone());
        let forwarder = self.forward(setup, guest.clone());
        let about = About {
            pod: setup.id.clone(),
            uvm: lease.id().to_string(),
            vmm_pid: vmm.pid(),
        };
        if let Err(error) = inspect::serve(&self.dir.inspect(), Arc::clone(&vmm), about) {
            tracing::warn!(%error, "kiln inspect will not work for this pod");
        }
        launching.launched();
        Ok(RunningUvm::new(Parts {
            vmm,
            guest,
            events,
            grown,
            share,
            life,
            spill,
            baked: base,
            lease,
            forwarder,
            trace: Trace::new(self.dir.trace(), timeline.clone()),
        }))
    }

    /// Opens the way for port forwarding, in the background: no pod waits for it.
    fn forward(&self, setup: &PodSetup, guest: Guest) -> Arc<Mutex<Option<Forwarder>>> {
        let slot = Arc::new(Mutex::new(None));
        let Some(path) = setup.netns.clone() else {
            return slot;
        };
        let filled = Arc::downgrade(&slot);
        tokio::spawn(async move {
            let catching = tokio::task::spawn_blocking(move || {
                let netns = File::open(&path).map_err(NetworkError::Enter)?;
                network::catch(&netns)
            });
            let forwarder = match catching.await {
                Ok(Ok((listener, link))) => {
                    Forwarder::start(listener, link, guest).map_err(NetworkError::Forward)
                }
                Ok(Err(error)) => Err(error),
                Err(_) => Err(NetworkError::Thread),
            };
            match (forwarder, filled.upgrade()) {
                (Ok(forwarder), Some(slot)) => {
                    *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(forwarder);
                }
                (Ok(_), None) => {}
                (Err(error), _) => tracing::warn!(
                    error = chain(&error),
                    "port forwarding to this pod will not work; it needs sk_lookup programs (BPF)"
                ),
            }
        });
        slot
    }

    /// Takes back what a failed launch did, so that the next one finds nothing in its way.
    fn undo(&self) {
        let Some(record) = self.dir.load() else {
            return;
        };
        if let Some(Ok(netns)) = record.netns.as_ref().map(File::open)
            && let Err(error) = network::remove(&netns, &record.redirected, &record.taps)
        {
            tracing::warn!(
                error = chain(&error),
                "network devices of a failed start stay"
            );
        }
        if let Err(error) = share::remove(self.dir.shared()) {
            tracing::warn!(%error, "the shared directory of a failed start stays");
        }
    }
}

/// The host's sides of the devices.
#[derive(Debug)]
struct Ends<'a> {
    listener: &'a UnixListener,
    taps: &'a [Tap],
    directory: &'a File,
    scratch: &'a Scratch,
}

/// Resumes the μVM in a VMM that waits for it.
fn resume(
    vmm: &Vmm,
    (state, memory, touched): (&File, &File, Vec<PageRun>),
    ends: &Ends<'_>,
    timeline: &Timeline,
) -> Result<()> {
    let mut fds: Vec<BorrowedFd<'_>> = vec![
        state.as_fd(),
        memory.as_fd(),
        ends.listener.as_fd(),
        ends.directory.as_fd(),
        ends.scratch.base.as_fd(),
        ends.scratch.spill.as_fd(),
        ends.scratch.seat.view(),
        ends.scratch.seat.page(),
    ];
    let seat = BudgetSeat {
        view: 6,
        page: 7,
        number: ends.scratch.seat.number(),
    };
    let mut by_slot = vec![
        (slots::VSOCK, End::Listener(2)),
        (slots::FS, End::Directory(3)),
        (
            slots::SCRATCH,
            End::scratch(
                4,
                ends.scratch.size,
                Some(5),
                Some(seat),
                ends.scratch.limits,
            )
            .flushing(ends.scratch.flush),
        ),
    ];
    if let Some(tap) = ends.taps.first() {
        fds.push(tap.fd.as_fd());
        by_slot.push((slots::NET, End::Tap(vec![8])));
    }
    let asked = timeline.now();
    let reply = vmm
        .call(
            &Request::Resume {
                state: 0,
                memory: 1,
                console: None,
                ends: by_slot,
                touched,
                one_by_one: false,
            },
            &fds,
        )
        .map_err(|e| match e {
            VmmError::Refused(why) => Error::FailedPrecondition(format!(
                "the VMM can't resume the baked μVM ({why}); if kiln or the node's CPU has changed, \
                 bake again: kiln bake"
            )),
            e => vmm_error("resume the μVM")(e),
        })?;
    let Reply::Started { steps, .. } = reply else {
        return Err(vmm_error("resume the μVM")(VmmError::Protocol));
    };
    // The VMM counts from its own start; only the lengths of its steps can be told exactly.
    let first = steps.first().map_or(0, |s| s.start_ns);
    for step in steps {
        let start = asked.saturating_add(step.start_ns.saturating_sub(first) / 1000);
        timeline.add(step.name, start, step.duration_ns / 1000);
    }
    Ok(())
}

/// The shared directory's mount, for the life of the pod.
fn shared_mount() -> proto::Mount {
    proto::Mount {
        source: slots::FS_TAG.to_owned(),
        target: share::guest_mount_point(),
        type_: "virtiofs".into(),
        make_target: true,
        target_mode: 0o700,
        ..Default::default()
    }
}

/// Waits, in the background, until the guest has what was plugged.
fn follow_growth(guest: Guest, size: Size, timeline: Timeline) -> watch::Receiver<Grown> {
    let (tell, grown) = watch::channel(None);
    tokio::spawn(async move {
        let online = guest.set_resources(size.cpus, size.memory);
        let result = timeline.of("guest.grow", online).await.map_err(|e| {
            format!(
                "the μVM could not grow to {} vCPUs and {} MiB: {}",
                size.cpus,
                size.memory / MIB,
                e.chain()
            )
        });
        tell.send_replace(Some(result));
    });
    grown
}

/// What a pod of this size can be resumed from.
fn wanted(size: Size) -> Wanted {
    Wanted {
        cpus: size.cpus,
        memory: Some(size.memory),
        scratch: true,
    }
}

#[async_trait]
impl Launcher for StoreLauncher {
    async fn launch(&self, setup: &PodSetup) -> Result<Arc<dyn Uvm>> {
        let timeline = Timeline::default();
        let launched = timeline
            .of("launch", self.try_launch(setup, &timeline))
            .await;
        let uvm = match launched {
            Ok(uvm) => uvm,
            Err(error) => {
                let this = self.clone();
                // A failure to clean up is told to the log; the launch's own is the one to report.
                let _ = tokio::task::spawn_blocking(move || this.undo()).await;
                return Err(error);
            }
        };
        tracing::info!(
            pod = setup.id,
            pid = uvm.pid(),
            us = timeline.now(),
            "the μVM runs"
        );
        uvm.save_trace();
        Ok(Arc::new(uvm))
    }
}

#[cfg(test)]
mod tests;
