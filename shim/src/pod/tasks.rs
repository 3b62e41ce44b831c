//! What the Task service asks of a pod.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::Mount;
use kiln_agent_api::proto;
use kiln_uvm::timeline::Timeline;

use super::container::Exec;
use super::{Container, Kind, Phase, Pod, Process, lock};
use crate::bootstrap::is_identifier;
use crate::error::{Error, Result};
use crate::events::{Event, Exit};
use crate::refusal;
use crate::rootfs::{Storage, Wanted};
use crate::spec::{Role, Spec};
use crate::stdio::StdioPaths;
use crate::time::UnixNanos;
use crate::uvm::Uvm;

/// How long `Delete` waits for output that its reader hasn't taken yet.
const DRAIN: Duration = Duration::from_secs(10);
const SIGKILL: u32 = 9;

/// What `Create` is asked.
#[derive(Debug, Clone)]
pub struct CreateTask {
    /// The container's id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The mounts that make its root file system.
    pub rootfs: Vec<Mount>,
    /// Its streams.
    pub stdio: StdioPaths,
}

/// What `State` answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskState {
    /// The container's bundle.
    pub bundle: PathBuf,
    /// The process id on the host.
    pub pid: u32,
    /// Where the process is in its life.
    pub phase: Phase,
    /// Its streams.
    pub stdio: StdioPaths,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
}

impl Pod {
    /// Makes a container. The first one of a pod brings its μVM.
    pub async fn create(self: &Arc<Self>, task: CreateTask) -> Result<u32> {
        if !is_identifier(&task.id) {
            return Err(Error::InvalidArgument(format!(
                "container id {:?} is no id",
                task.id
            )));
        }
        if lock(&self.containers).contains_key(&task.id) {
            return Err(Error::AlreadyExists(format!("container {}", task.id)));
        }
        let spec = Spec::load(&task.bundle)?;
        spec.check(self.config.host_namespaces)?;
        let process = Arc::new(Process::new(&task.id, "", task.stdio.clone())?);
        let (kind, uvm) = match spec.role() {
            Role::Sandbox => (Kind::Pause, self.launch(self.setup_for(&spec)?).await?),
            Role::Alone => (Kind::Guest, self.launch(self.setup_for(&spec)?).await?),
            Role::Member => (Kind::Guest, self.uvm()?),
        };
        let container = Arc::new(Container::new(
            &task.id,
            task.bundle.clone(),
            kind,
            process,
            self.stand_in(uvm.as_ref(), &task.id)?,
            &spec,
        ));
        if kind == Kind::Guest {
            let creating = self.create_in_guest(&uvm, &container, &spec, &task.rootfs);
            container.timeline.of("create", creating).await?;
        }
        lock(&self.containers).insert(task.id.clone(), Arc::clone(&container));
        self.adjust_oom_score();
        let pid = container.pid();
        self.publisher.publish(&Event::Create {
            container: task.id,
            bundle: task.bundle.display().to_string(),
            rootfs: task.rootfs,
            stdio: task.stdio,
            pid,
        });
        if kind == Kind::Guest {
            let init = Arc::clone(&container.init);
            self.watch_process(uvm, container, init);
        }
        Ok(pid)
    }

    async fn create_in_guest(
        &self,
        uvm: &Arc<dyn Uvm>,
        container: &Container,
        spec: &Spec,
        rootfs: &[Mount],
    ) -> Result<()> {
        let wanted = Wanted {
            id: &container.id,
            bundle: &container.bundle,
            spec,
            rootfs,
            pod_files: lock(&self.sandbox).is_some(),
            own: &self.volumes,
            timeline: &container.timeline,
        };
        let (pid_namespace, pid_namespace_container) = self.pid_namespace(spec)?;
        self.make_room(uvm.as_ref(), spec.limits()).await?;
        let (storage, guest) = Storage::prepare(&wanted, &self.config, uvm).await?;
        let (tty_width, tty_height) = spec.console_size();
        let request = proto::CreateContainerRequest {
            container_id: container.id.clone(),
            spec: guest.spec,
            stdio: Some(container.init.agent_stdio()).into(),
            mounts: guest.mounts,
            rootfs: guest.rootfs,
            pid_namespace: pid_namespace.into(),
            pid_namespace_container,
            tty_width,
            tty_height,
            ..Default::default()
        };
        if let Err(error) = uvm.guest().create(request, &container.timeline).await {
            storage.release(Some(uvm.as_ref())).await;
            return Err(error.into());
        }
        let connecting = container.init.connect(uvm.guest());
        let connected = container.timeline.of("guest.stdio", connecting).await;
        if let Err(error) = connected {
            if let Err(also) = uvm.guest().delete(&container.id, "").await {
                tracing::warn!(
                    %also,
                    "a half-made container could not be removed"
                );
            }
            storage.release(Some(uvm.as_ref())).await;
            return Err(error);
        }
        *lock(&container.storage) = Some(storage);
        Ok(())
    }

    /// Starts a container's first process, or an exec.
    pub async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let _step = process.step.lock().await;
        if process.phase() != Phase::Created {
            return Err(Error::FailedPrecondition(format!(
                "{} was started before",
                process.name()
            )));
        }
        let pid = container.pid();
        if exec.is_empty() {
            if container.kind == Kind::Guest {
                let (uvm, timeline) = (self.uvm()?, &container.timeline);
                timeline
                    .of("start", self.start_in_guest(id, timeline))
                    .await?;
                uvm.keep_trace(id, &container.name, timeline);
            }
            process.set_phase(Phase::Running);
            self.publisher.publish(&Event::Start {
                container: id.to_owned(),
                pid,
            });
        } else {
            self.start_exec(&container, exec).await?;
            process.set_phase(Phase::Running);
            self.publisher.publish(&Event::ExecStarted {
                container: id.to_owned(),
                exec: exec.to_owned(),
                pid,
            });
        }
        Ok(pid)
    }

    /// The caller holds the exec's step, so its end is told after its start.
    async fn start_exec(self: &Arc<Self>, container: &Arc<Container>, exec: &str) -> Result<()> {
        if container.init.phase() != Phase::Running {
            return Err(Error::FailedPrecondition(format!(
                "container {} is not running, so nothing can be started in it",
                container.id
            )));
        }
        let uvm = self.uvm()?;
        let Exec { process, spec } = container.exec(exec)?;
        uvm.guest()
            .exec(proto::ExecRequest {
                container_id: container.id.clone(),
                exec_id: exec.to_owned(),
                process: spec.to_vec(),
                stdio: Some(process.agent_stdio()).into(),
                ..Default::default()
            })
            .await?;
        if let Err(error) = process.connect(uvm.guest()).await {
            if let Err(also) = uvm.guest().delete(&container.id, exec).await {
                tracing::warn!(
                    %also,
                    "a half-made exec could not be removed"
                );
            }
            return Err(error);
        }
        self.watch_process(uvm, Arc::clone(container), process);
        Ok(())
    }

    /// Registers an exec; it runs from `start`.
    pub fn exec(&self, id: &str, exec: &str, stdio: StdioPaths, spec: &[u8]) -> Result<()> {
        let container = self.container(id)?;
        if !is_identifier(exec) {
            return Err(Error::InvalidArgument(format!("exec id {exec:?} is no id")));
        }
        if container.kind == Kind::Pause {
            return Err(Error::FailedPrecondition(format!(
                "{id} is the pod's sandbox, which has no file system to run anything in"
            )));
        }
        let parsed: serde_json::Value = serde_json::from_slice(spec)
            .map_err(|e| Error::InvalidArgument(format!("the process of exec {exec}: {e}")))?;
        refusal::check_process(&parsed).map_err(Error::from)?;
        let process = Arc::new(Process::new(id, exec, stdio)?);
        container.add_exec(Exec {
            process,
            spec: spec.into(),
        })?;
        self.publisher.publish(&Event::ExecAdded {
            container: id.to_owned(),
            exec: exec.to_owned(),
        });
        Ok(())
    }

    /// Sends a signal.
    pub async fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        if process.phase() == Phase::Stopped {
            return Err(Error::NotFound(format!(
                "{} has ended; its process",
                process.name()
            )));
        }
        if container.kind == Kind::Pause {
            self.kill_pause(&container, signal).await;
            return Ok(());
        }
        if process.phase() == Phase::Created && !exec.is_empty() {
            return Err(Error::FailedPrecondition(format!(
                "{} was not started",
                process.name()
            )));
        }
        Ok(self.uvm()?.guest().kill(id, exec, signal, all).await?)
    }

    /// The pause program ends by SIGTERM and SIGINT with status 0, by SIGKILL as killed, and
    /// ignores what else it is sent. Its end is the pod's.
    async fn kill_pause(&self, container: &Arc<Container>, signal: u32) {
        let status = match signal {
            SIGKILL => 128 + SIGKILL,
            2 | 15 => 0,
            _ => return,
        };
        self.finish(
            container,
            &container.init,
            Exit {
                status,
                at: UnixNanos::now(),
            },
        )
        .await;
        if let Some(uvm) = self.uvm.get().cloned() {
            // containerd needn't wait for the μVM's end here: Delete does.
            tokio::spawn(async move { uvm.stop().await });
        }
    }

    /// Waits for the end of a process.
    pub async fn wait(&self, id: &str, exec: &str) -> Result<Exit> {
        let process = self.container(id)?.process(exec)?;
        Ok(process.wait().await)
    }

    /// Ends the books on a process that has ended (or was never started).
    pub async fn delete(&self, id: &str, exec: &str) -> Result<(u32, Exit)> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        let _step = process.step.lock().await;
        let started = match process.phase() {
            Phase::Running | Phase::Paused => {
                return Err(Error::FailedPrecondition(format!(
                    "{} is running; kill it before deleting it",
                    process.name()
                )));
            }
            Phase::Stopped => true,
            Phase::Created => false,
        };
        let pid = container.pid();
        process
            .drain(if started { DRAIN } else { Duration::ZERO })
            .await;
        // The agent knows an exec only once it was started.
        let uvm = self.uvm.get().filter(|_| self.ended.borrow().is_none());
        if let (Some(uvm), Kind::Guest, true) = (uvm, container.kind, started || exec.is_empty()) {
            if exec.is_empty() {
                uvm.forget_trace(id);
            }
            match uvm.guest().delete(id, exec).await.map_err(Error::from) {
                Ok(()) | Err(Error::NotFound(_) | Error::Unavailable(_)) => {}
                Err(error) => tracing::warn!(error = error.chain(), "the guest kept a process"),
            }
        }
        process.set_exit(Exit::killed_now());
        let exit = process.exit().unwrap_or_else(Exit::killed_now);
        if !exec.is_empty() {
            container.remove_exec(exec);
            return Ok((pid, exit));
        }
        let storage = lock(&container.storage).take();
        if let Some(storage) = storage {
            storage.release(uvm.map(AsRef::as_ref)).await;
        }
        lock(&self.containers).remove(id);
        self.adjust_oom_score();
        if id == self.id
            && let Some(uvm) = self.uvm.get()
        {
            uvm.stop().await;
        }
        self.publisher.publish(&Event::Delete {
            container: id.to_owned(),
            pid,
            exit,
        });
        self.shut_down_at_last();
        Ok((pid, exit))
    }

    /// The first thing many programs do is to count CPUs and memory.
    async fn start_in_guest(&self, id: &str, timeline: &Timeline) -> Result<()> {
        let uvm = self.uvm()?;
        timeline.of("guest.grown", uvm.grown()).await?;
        Ok(uvm.guest().start(id, timeline).await?)
    }

    /// Freezes a container.
    pub async fn pause(&self, id: &str) -> Result<()> {
        let container = self.running_in_guest(id)?;
        self.uvm()?.guest().pause(id).await?;
        container.init.set_phase(Phase::Paused);
        self.publisher.publish(&Event::Paused {
            container: id.to_owned(),
        });
        Ok(())
    }

    /// Thaws it.
    pub async fn resume(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        if container.init.phase() != Phase::Paused {
            return Err(Error::FailedPrecondition(format!(
                "container {id} is not paused"
            )));
        }
        self.uvm()?.guest().unpause(id).await?;
        container.init.set_phase(Phase::Running);
        self.publisher.publish(&Event::Resumed {
            container: id.to_owned(),
        });
        Ok(())
    }

    pub(super) fn running_in_guest(&self, id: &str) -> Result<Arc<Container>> {
        let container = self.container(id)?;
        if container.kind == Kind::Pause {
            return Err(Error::FailedPrecondition(format!(
                "{id} is the pod's sandbox; pause and resume work on containers"
            )));
        }
        if container.init.phase() != Phase::Running {
            return Err(Error::FailedPrecondition(format!(
                "container {id} is not running"
            )));
        }
        Ok(container)
    }

    /// Where a process is in its life.
    pub fn state(&self, id: &str, exec: &str) -> Result<TaskState> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        Ok(TaskState {
            bundle: container.bundle.clone(),
            pid: container.pid(),
            phase: process.phase(),
            stdio: process.stdio().clone(),
            exit: process.exit(),
        })
    }

    /// The processes of a container. They have no ids on the host; the first one goes by that of the process that stands for
    /// the container, as in every other answer, the others by the guest's.
    pub async fn pids(&self, id: &str) -> Result<Vec<u32>> {
        let container = self.container(id)?;
        let mut processes = vec![container.pid()];
        if container.kind == Kind::Guest && container.init.phase() != Phase::Stopped {
            let mut inside = self.uvm()?.guest().pids(id).await?;
            inside.sort_unstable();
            // The oldest is the first process.
            processes.extend(inside.into_iter().skip(1));
        }
        Ok(processes)
    }

    /// Changes a terminal's size.
    pub async fn resize_pty(&self, id: &str, exec: &str, w: u32, h: u32) -> Result<()> {
        self.container(id)?.process(exec)?;
        Ok(self.uvm()?.guest().resize_tty(id, exec, (w, h)).await?)
    }

    /// `CloseIO`.
    pub fn close_stdin(&self, id: &str, exec: &str) -> Result<()> {
        self.container(id)?.process(exec)?.close_stdin();
        Ok(())
    }

    /// Usage of a container; of the whole pod for its sandbox.
    pub async fn stats(
        self: &Arc<Self>,
        id: &str,
    ) -> Result<(proto::StatsResponse, proto::NetworkState)> {
        let container = self.container(id)?;
        self.account_writes();
        let asked = if container.kind == Kind::Pause {
            ""
        } else {
            id
        };
        self.usage(asked).await
    }

    pub(super) async fn usage(
        &self,
        of: &str,
    ) -> Result<(proto::StatsResponse, proto::NetworkState)> {
        let uvm = self.uvm()?;
        let guest = uvm.guest();
        Ok((guest.stats(of).await?, guest.network().await?))
    }

    /// Whether a container is known.
    pub(super) fn has_container(&self, id: &str) -> bool {
        lock(&self.containers).contains_key(id)
    }

    /// A container's process id on the node; 0 for one that is not known.
    pub fn pid_of(&self, id: &str) -> u32 {
        lock(&self.containers).get(id).map_or(0, |c| c.pid())
    }
}
