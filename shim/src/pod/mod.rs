//! The state machine: a pod, its containers and their processes, without RPC and without KVM.
//!
//! Everything containerd can ask is a plain function here; the services translate. The rules it
//! keeps:
//!
//! - events are told in the order create, start, exit, delete (exec-added, exec-started, exit for
//!   an exec), however short a process lives, and a container's first process ends last;
//! - the end of the μVM is the end of every process in it, told as killed;
//! - what was made is undone, whichever step failed.

mod container;
mod message;
mod on_node;
mod out_of_memory;
mod process;
mod resize;
mod sandbox;
mod tasks;
mod written;

#[cfg(test)]
mod tests;

pub use container::{Container, Kind};
pub use process::{Phase, Process};
pub use sandbox::{Dns, SandboxRequest, SandboxStatus};
pub use tasks::{CreateTask, TaskState};

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_uvm::scratch::ScratchLimits;
use tokio::sync::{OnceCell, watch};

use crate::error::{Error, Result};
use crate::events::{Event, Exit};
use crate::oom;
use crate::publisher::Publisher;
use crate::refusal;
use crate::rootfs::OwnVolumes;
use crate::size::{Limits, size_of};
use crate::spec::{Role, Spec};
use crate::time::UnixNanos;
use crate::uvm::{End, Launcher, PodSetup, Uvm};
use kiln_node::config::{Config, PodOverrides};

/// How long the VMM of a guest that no longer answers has to end before the guest alone is taken as gone.
const LAST_BREATH: Duration = Duration::from_secs(2);
/// How long execs get to end after the first process of their container did.
const EXEC_GRACE: Duration = Duration::from_secs(2);

/// A pod: one shim, one μVM.
pub struct Pod {
    id: String,
    config: Config,
    publisher: Publisher,
    launcher: Arc<dyn Launcher>,
    uvm: OnceCell<Arc<dyn Uvm>>,
    /// What the μVM was launched for, and how big it is now.
    setup: Mutex<Option<Launched>>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// What the VMM's OOM score was set to since the launch.
    oom_score_adj: Mutex<Option<i32>>,
    sandbox: Mutex<Option<sandbox::Sandbox>>,
    accounting: Mutex<written::Accounting>,
    /// Those of its volumes that the guest has to itself.
    volumes: OwnVolumes,
    /// Set when the μVM is gone for good.
    ended: watch::Sender<Option<Exit>>,
    shutdown: watch::Sender<bool>,
    /// containerd has asked for the end when its last reason to was there, but other tasks of the pod, too.
    shutdown_put_off: AtomicBool,
}

#[derive(Debug, Clone)]
struct Launched {
    setup: PodSetup,
    /// What CRI said of the pod's limits.
    asked: Limits,
    overrides: PodOverrides,
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pod")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Pod {
    /// A pod with nothing in it yet.
    pub fn new(
        id: &str,
        config: Config,
        publisher: Publisher,
        launcher: Arc<dyn Launcher>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id: id.to_owned(),
            config,
            publisher,
            launcher,
            uvm: OnceCell::new(),
            setup: Mutex::new(None),
            containers: Mutex::default(),
            oom_score_adj: Mutex::new(None),
            sandbox: Mutex::new(None),
            accounting: Mutex::default(),
            volumes: OwnVolumes::default(),
            ended: watch::channel(None).0,
            shutdown: watch::channel(false).0,
            shutdown_put_off: AtomicBool::new(false),
        })
    }

    /// The pod's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Begins to resume the μVM before containerd asks for it, if the bundle tells enough. Whoever
    /// needs the μVM later waits for this, and reports its failure by trying again.
    pub fn launch_ahead(self: &Arc<Self>, spec: &Spec) {
        if spec.role() == Role::Member || spec.check(self.config.host_namespaces).is_err() {
            return;
        }
        let Ok(launched) = self.setup_for(spec) else {
            return;
        };
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = pod.launch(launched).await {
                tracing::warn!(
                    error = error.chain(),
                    "the μVM could not be resumed ahead of time"
                );
            }
        });
    }

    /// What a sandbox or a lone container needs its μVM to be.
    fn setup_for(&self, spec: &Spec) -> Result<Launched> {
        let limits = match spec.role() {
            Role::Sandbox => spec.sandbox_limits(),
            Role::Member | Role::Alone => spec.limits(),
        };
        let netns = match spec.network_namespace() {
            Some(path) => path,
            // No network namespace of its own means the host's, and a VM can't be in that.
            None => return Err(refusal::host_network().into()),
        };
        let users = spec.user_namespace()?;
        if spec.role() == Role::Sandbox && users.is_some() && netns.is_none() {
            return Err(Error::InvalidArgument(
                "kiln: a user namespace (hostUsers: false) is refused: this containerd leaves it to the runtime to make \
                 the pod's network namespace, and connects it only after the μVM has begun. Use containerd 2.1 or \
                 later"
                    .into(),
            ));
        }
        // A sandbox's spec has the pause program's score, which is not the pod's.
        let own_score = match spec.role() {
            Role::Sandbox => 0,
            Role::Member | Role::Alone => spec.oom_score_adj().unwrap_or(0),
        };
        // A lone container without a namespace to join gets a μVM without a network.
        let setup = PodSetup {
            id: self.id.clone(),
            size: size_of(limits, &PodOverrides::default(), &self.config),
            overlay: self.config.overlay,
            overlay_flush: self.config.overlay_flush,
            hostname: spec.hostname().unwrap_or_default().to_owned(),
            netns,
            sysctls: spec.sysctls(),
            cgroup: spec.cgroups_path().map(str::to_owned),
            oom_score_adj: oom::of_pod(spec.cgroups_path(), own_score),
        };
        self.with_overrides(setup, limits, spec.annotations())
    }

    fn with_overrides(
        &self,
        mut setup: PodSetup,
        limits: Limits,
        annotations: &std::collections::BTreeMap<String, String>,
    ) -> Result<Launched> {
        let overrides = self
            .config
            .pod_overrides(annotations)
            .map_err(|e| Error::InvalidArgument(e.to_string()))?;
        if overrides.debug == Some(true) {
            crate::log::debug();
        }
        setup.size = size_of(limits, &overrides, &self.config);
        setup.overlay = ScratchLimits {
            ram: overrides.overlay_ram.unwrap_or(self.config.overlay.ram),
            disk: overrides.overlay_disk.unwrap_or(self.config.overlay.disk),
        };
        setup.overlay_flush = overrides.overlay_flush.unwrap_or(self.config.overlay_flush);
        Ok(Launched {
            setup,
            asked: limits,
            overrides,
        })
    }

    /// The μVM, resumed now if it isn't yet.
    async fn launch(self: &Arc<Self>, launched: Launched) -> Result<Arc<dyn Uvm>> {
        let uvm = self
            .uvm
            .get_or_try_init(|| async {
                let uvm = self.launcher.launch(&launched.setup).await?;
                *lock(&self.setup) = Some(launched);
                self.follow(&uvm);
                Ok::<_, Error>(uvm)
            })
            .await?;
        Ok(Arc::clone(uvm))
    }

    /// The running μVM.
    fn uvm(&self) -> Result<Arc<dyn Uvm>> {
        self.uvm.get().cloned().ok_or_else(|| {
            Error::FailedPrecondition(format!("the sandbox of pod {} was not started", self.id))
        })
    }

    /// Looks after a μVM: its end and its events.
    fn follow(self: &Arc<Self>, uvm: &Arc<dyn Uvm>) {
        let (pod, vm) = (Arc::clone(self), Arc::clone(uvm));
        tokio::spawn(async move {
            let end = vm.ended().await;
            let reason = &end.reason;
            if end.out_of_memory {
                tracing::error!(pod = pod.id, %reason, "the μVM has ended; its containers are told as OOMKilled");
            } else {
                tracing::info!(pod = pod.id, %reason, "the μVM has ended");
            }
            pod.all_ended(&end).await;
        });
        tokio::spawn(Arc::clone(self).follow_events(Arc::clone(uvm)));
    }

    /// The μVM is gone, and all that ran in it.
    async fn all_ended(self: &Arc<Self>, end: &End) {
        self.forget_writes();
        let exit = Exit::killed_now();
        let containers: Vec<_> = lock(&self.containers).values().cloned().collect();
        for container in containers {
            self.finish_with(&container, &container.init, exit, Some(end))
                .await;
        }
        self.set_ended(exit);
    }

    /// Records the end of the μVM; the first record stays.
    fn set_ended(&self, exit: Exit) {
        self.ended.send_if_modified(|known| {
            let first = known.is_none();
            known.get_or_insert(exit);
            first
        });
    }

    /// Waits, in the background, for a process of the guest to end.
    fn watch_process(self: &Arc<Self>, uvm: Arc<dyn Uvm>, c: Arc<Container>, p: Arc<Process>) {
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            match uvm.guest().wait(&c.id, p.exec_id()).await {
                Ok(status) => {
                    let exit = Exit {
                        status: status.exit_code,
                        at: UnixNanos(status.exited_at_ns),
                    };
                    pod.finish(&c, &p, exit).await;
                }
                Err(error) => {
                    let error = error.into();
                    pod.finish_unseen(uvm.as_ref(), &c, &p, &error).await;
                }
            }
        });
    }

    /// A process whose end the guest can't tell. It mostly went with the VMM, and how that ended decides what is told.
    async fn finish_unseen(&self, uvm: &dyn Uvm, c: &Container, p: &Arc<Process>, error: &Error) {
        let gone = matches!(error, Error::Unavailable(_));
        let (process, error) = (p.name(), error.chain());
        tracing::warn!(process, error, "end not seen, taken as killed");
        let end = match gone {
            true => tokio::time::timeout(LAST_BREATH, uvm.ended()).await.ok(),
            false => None,
        };
        self.finish_with(c, p, Exit::killed_now(), end.as_ref())
            .await;
    }

    /// Records and tells the end of a process.
    async fn finish(&self, container: &Container, process: &Arc<Process>, exit: Exit) {
        self.finish_with(container, process, exit, None).await;
    }

    async fn finish_with(
        &self,
        container: &Container,
        process: &Arc<Process>,
        exit: Exit,
        end: Option<&End>,
    ) {
        if process.exec_id().is_empty() {
            self.finish_execs(container).await;
        }
        let _step = process.step.lock().await;
        // Before the exit: containerd reads the reason for it from what it was told until then.
        if let Some(end) = end
            && process.exit().is_none()
            && process.exec_id().is_empty()
        {
            container.leave_message(end);
            if end.out_of_memory {
                self.tell_killed_for_memory(container, process);
            }
        }
        if process.set_exit(exit) {
            self.adjust_oom_score();
            if process.exec_id().is_empty() {
                container.end_stand_in();
            }
            self.publisher.publish(&Event::Exit {
                container: container.id.clone(),
                exec: process.exec_id().to_owned(),
                pid: container.pid(),
                exit,
            });
        }
    }

    /// A container's first process has ended: its execs are ended, and told, before it.
    async fn finish_execs(&self, container: &Container) {
        let running: Vec<_> = container
            .execs()
            .into_iter()
            .filter(|p| matches!(p.phase(), Phase::Running | Phase::Paused))
            .collect();
        let deadline = tokio::time::Instant::now() + EXEC_GRACE;
        for process in running {
            // In a PID namespace of the pod they outlive the first process unless they are killed.
            if let Some(uvm) = self.uvm.get() {
                let kill = uvm.guest().kill(&container.id, process.exec_id(), 9, false);
                // An exec that is gone already can't be killed, which is as good.
                let _ = tokio::time::timeout_at(deadline, kill).await;
            }
            if tokio::time::timeout_at(deadline, process.wait())
                .await
                .is_err()
            {
                let _step = process.step.lock().await;
                let exit = Exit::killed_now();
                if process.set_exit(exit) {
                    self.publisher.publish(&Event::Exit {
                        container: container.id.clone(),
                        exec: process.exec_id().to_owned(),
                        pid: container.pid(),
                        exit,
                    });
                }
            }
        }
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        lock(&self.containers)
            .get(id)
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    /// `Shutdown`: containerd calls it after every task it deletes, so it only counts when nothing
    /// is left. From 2.0 on it does not call it after a container of a sandbox: if the sandbox's own task went first, as
    /// it may when the μVM died, nobody calls again, and the end comes with the last container.
    pub fn shutdown_if_idle(&self) {
        let sandbox = lock(&self.sandbox).is_some();
        let (idle, own) = {
            let containers = lock(&self.containers);
            (containers.is_empty(), containers.contains_key(&self.id))
        };
        if idle && !sandbox {
            self.shut_down();
        } else if !own && !sandbox {
            self.shutdown_put_off.store(true, Ordering::SeqCst);
        }
    }

    /// Does what was put off, if nothing is left now.
    fn shut_down_at_last(&self) {
        if self.shutdown_put_off.load(Ordering::SeqCst) {
            self.shutdown_if_idle();
        }
    }

    /// Ends the shim.
    pub fn shut_down(&self) {
        self.shutdown.send_replace(true);
    }

    /// Returns when the shim is to end.
    pub async fn until_shutdown(&self) {
        // The sender lives in `self`.
        let _ = self.shutdown.subscribe().wait_for(|down| *down).await;
    }

    /// Ends the μVM and releases what containers still hold. The last thing a shim does.
    pub async fn close(&self) {
        if let Some(uvm) = self.uvm.get() {
            uvm.stop().await;
        }
        drop(lock(&self.sandbox).take());
        let containers: Vec<_> = lock(&self.containers).drain().map(|(_, c)| c).collect();
        for container in containers {
            container.end_stand_in();
            let storage = lock(&container.storage).take();
            if let Some(storage) = storage {
                storage.release(None).await;
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
