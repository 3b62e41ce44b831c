//! Starting a pod's μVM: the launcher's work, beside what only a pod has: a cgroup, a network namespace, a record of what
//! has to be cleaned up.
//!
//! Three things run side by side, since none needs the others: the VMM's process comes up (which
//! makes its VM meanwhile), the network is wired, and the store's files are opened. Growing to the
//! pod's size is asked for with the resume and waited for only when a container starts.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use kiln_node::inspect::About;
use kiln_store::private;
use kiln_uvm::baked::Baked;
use kiln_uvm::guest::{Agent, Identity};
use kiln_uvm::launch::{HostSide, Order, Tap, launch};
use kiln_uvm::machine::{Machine, Start};
use kiln_uvm::scratch::{Scratch, join_budget, spill_file};
use kiln_uvm::share::{self, Share};
use kiln_uvm::timeline::{Timeline, Trace, step};
use kiln_uvm::words::{self, LastWords};
use kiln_uvm::{Flush, jail, pick};

use super::inspect;
use super::running::{RunningUvm, save};
use super::{Launcher, PodSetup, Uvm};
use crate::cgroup::{self, OomKills};
use crate::error::{Error, Result, chain};
use crate::log;
use crate::network::{self, Forwarder, NetworkError, PodNetwork};
use crate::oom::Scored;
use crate::record::{PodDir, ProcessRef, Record, Stay};
use kiln_node::config::Config;

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

    /// Opens what the store has for the pod, and what the pod's writes lie on.
    fn open(&self, setup: &PodSetup) -> Result<(Baked, Scratch)> {
        let baked =
            Baked::open(pick::lease(&self.store, setup.size).map_err(kiln_uvm::Error::from)?)?;
        let spill = spill_file(&self.spill).map_err(kiln_uvm::Error::from)?;
        let seat = join_budget(&self.dir.overlay_budget(), self.node_ram, setup.overlay.ram)?;
        let scratch = Scratch {
            limits: setup.overlay,
            flush: setup.overlay_flush,
            spill: Some(spill.into()),
            seat: Some(seat.into()),
        };
        Ok((baked, scratch))
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
    fn spawn(
        &self,
        setup: &PodSetup,
        (log, words): (File, LastWords),
        timeline: &Timeline,
    ) -> Result<(Machine, Scored)> {
        let stay = self.stay()?;
        let mut kills = None;
        if let Some(directory) = setup.cgroup.as_deref().and_then(cgroup::directory) {
            self.note(&stay, |r| r.cgroup = Some(directory.clone()))?;
            timeline
                .time("host.cgroup", || {
                    cgroup::enter(&directory, std::process::id())
                })
                .map_err(|e| {
                    Error::failed(format!("enter the cgroup {}", directory.display()), e)
                })?;
            kills = Some(OomKills::since_now(&directory));
        }
        let jail = jail::at(self.vmm_ids, self.dir.empty_root())?;
        let machine = timeline.time(step::SPAWN, || {
            Machine::start(Start {
                program: &self.vmm,
                jail: Some(jail),
                log,
                words: Some(words),
                oom_kills: Box::new(|| kills.is_some_and(|kills| kills.any())),
            })
        })?;
        let process = i32::try_from(machine.pid()).ok().and_then(ProcessRef::of);
        self.note(&stay, |r| r.vmm = process)?;
        let scored =
            Scored::new(machine.pid()).map_err(|e| Error::failed("find the VMM's process", e))?;
        if let Err(error) = scored.set(setup.oom_score_adj) {
            tracing::warn!(%error, "the pod's VMM keeps the shim's OOM score, so others are killed before it");
        }
        Ok((machine, scored))
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
            .time("host.network.read", || network::inspect(&netns))
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
            .time("host.network.wire", || network::connect(&netns, &network))
            .map_err(failed)?;
        Ok(Wired { network, taps })
    }

    /// What the store has for the pod, and the pod's host side but for its network.
    fn prepare(&self, setup: &PodSetup) -> Result<(Baked, Arc<Share>, HostSide)> {
        let (baked, scratch) = self.open(setup)?;
        let (share, host) = self.host_side(scratch)?;
        if let Some(library) = baked.modules() {
            share.offer_modules(library)?;
        }
        Ok((baked, share, host))
    }

    /// The pod's host side but for its network.
    fn host_side(&self, scratch: Scratch) -> Result<(Arc<Share>, HostSide)> {
        let _stay = self.stay()?;
        let share = Share::make()?;
        let path = self.dir.vsock();
        let listener = private::listen(&path).map_err(|e| {
            let what = format!(
                "listen on {} for the guest; a shorter `state_dir` may help",
                path.display()
            );
            Error::failed(what, e)
        })?;
        let host = HostSide {
            vsock: (path, listener),
            scratch,
            share: Some(share.open()?),
            taps: Vec::new(),
            console: None,
        };
        Ok((Arc::new(share), host))
    }

    /// Runs a step of the launch on a thread that may wait.
    fn aside<T: Send + 'static>(
        &self,
        setup: &PodSetup,
        timeline: &Timeline,
        step: impl FnOnce(&Self, &PodSetup, &Timeline) -> Result<T> + Send + 'static,
    ) -> tokio::task::JoinHandle<Result<T>> {
        let (this, setup, timeline) = (self.clone(), setup.clone(), timeline.clone());
        tokio::task::spawn_blocking(move || step(&this, &setup, &timeline))
    }

    async fn try_launch(&self, setup: &PodSetup, timeline: &Timeline) -> Result<RunningUvm> {
        let pod = setup.id.clone();
        let log = words::pipe(move |line| log::vmm(&pod, line))
            .map_err(|e| Error::failed("make a pipe for the VMM's log", e))?;
        let spawning = self.aside(setup, timeline, move |this, setup, timeline| {
            this.spawn(setup, log, timeline)
        });
        let wiring = self.aside(setup, timeline, Self::wire);
        // It waits for the disk, and for the memory's rebuild if this is its first use since the node was started.
        let preparing = self.aside(setup, timeline, |this, setup, timeline| {
            timeline.time(step::FILES, || this.prepare(setup))
        });
        // All are waited for, whatever becomes of the others: nothing may go on behind an error.
        let (spawned, wired, prepared) = tokio::join!(spawning, wiring, preparing);
        let (machine, scored) = joined(spawned)?;
        let (baked, share, mut host) = joined(prepared)?;
        let Wired { network, taps } = joined(wired)?;
        host.taps = taps;
        let Some(spill) = host.scratch.spill.clone() else {
            return Err(Error::failed(
                "make room for the pod's writes",
                "there is no spill file",
            ));
        };
        let order = Order {
            size: setup.size,
            identity: Identity {
                hostname: setup.hostname.clone(),
                network: setup.netns.as_ref().map(|_| network.for_agent()),
                sysctls: setup.sysctls.clone(),
                mounts: vec![share::guest_mount()],
                scratch_limit: setup.overlay.content(),
                scratch_flush: setup.overlay_flush == Flush::Disk,
            },
            patient: false,
        };
        let uvm = launch(machine, baked, host, order, timeline).await?;
        let events = timeline.of("guest.events", uvm.agent().events()).await?;
        let forwarder = self.forward(setup, uvm.agent().clone());
        let about = About {
            pod: setup.id.clone(),
            uvm: uvm
                .baked()
                .map(|lease| lease.id().to_string())
                .unwrap_or_default(),
            vmm_pid: uvm.pid(),
        };
        if let Err(error) = inspect::serve(&self.dir.inspect(), uvm.control().clone(), about) {
            tracing::warn!(%error, "kiln inspect will not work for this pod");
        }
        Ok(RunningUvm {
            uvm,
            netns: setup.netns.clone(),
            events: tokio::sync::Mutex::new(events),
            share,
            scored,
            spill,
            forwarder,
            trace: Arc::new(Trace::new(self.dir.trace(), timeline.clone())),
        })
    }

    /// Opens the way for port forwarding, in the background: no pod waits for it.
    fn forward(&self, setup: &PodSetup, guest: Agent) -> Arc<Mutex<Option<Forwarder>>> {
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
    }
}

#[async_trait]
impl Launcher for StoreLauncher {
    async fn launch(&self, setup: &PodSetup) -> Result<Arc<dyn Uvm>> {
        let timeline = Timeline::default();
        let launched = timeline
            .of(step::LAUNCH, self.try_launch(setup, &timeline))
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
            pid = uvm.uvm.pid(),
            us = timeline.now(),
            "the μVM runs"
        );
        save(&uvm.trace);
        Ok(Arc::new(uvm))
    }
}
