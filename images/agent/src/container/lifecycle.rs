//! What is done to containers: create, start, exec, kill, pause, update, delete.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use kiln_agent_api::proto;
use libcontainer::oci_spec::runtime::{self as oci, Capability, Spec};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use super::cgroup::Cgroup;
use super::device_filter;
use super::process::{Process, resize, size, wanted};
use super::spec::{Guest, adapt, adapt_process, home_in};
use super::{
    Container, Containers, Event, Mutable, Phase, checked_id, owner_of, read_in_root, usage,
};
use crate::error::{Action, AgentError};
use crate::helper::{CreateJob, ExecJob, Fault, HelperError};
use crate::reaper::Exit;
use crate::spans::Spans;
use crate::stdio::Stdio;
use crate::storage::Placed;
use crate::users::{Users, keep, map_of};
use crate::{modprobe, storage, sys};

type Result<T> = std::result::Result<T, AgentError>;

/// A container's processes end by this.
const SIGKILL: i32 = libc::SIGKILL;

/// What was made for a container that is not one yet; undone when dropped.
#[derive(Debug)]
struct Unfinished<'a> {
    containers: &'a Containers,
    id: &'a str,
    bundle: PathBuf,
    files: Placed,
    cgroup: Option<Cgroup>,
    finished: bool,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        self.containers.lock().containers.remove(self.id);
        let state = self
            .containers
            .runtime_state()
            .join(self.bundle.file_name().unwrap_or_default());
        let (bundle, files) = (self.bundle.clone(), std::mem::take(&mut self.files));
        let cgroup = self.cgroup.take();
        // The error that led here is the one to report; what can't be undone is logged.
        tokio::spawn(async move {
            if let Err(error) = clean(cgroup.as_ref(), files, &[bundle, state]).await {
                tracing::error!(%error, "a container that was not made left something behind");
            }
        });
    }
}

/// Removes what a container had: processes, cgroup, mounts, folders.
async fn clean(cgroup: Option<&Cgroup>, files: Placed, folders: &[PathBuf]) -> Result<()> {
    if let Some(cgroup) = cgroup.filter(|cgroup| cgroup.path().exists()) {
        cgroup.kill()?;
        cgroup.remove().await?;
    }
    blocking(move || Ok(files.remove()?)).await?;
    for folder in folders {
        match fs::remove_dir_all(folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).action(&format!("remove {}", folder.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether a process of the container may have the right to change the pod's network.
fn changes_network(spec: &Spec) -> bool {
    let capabilities = spec
        .process()
        .as_ref()
        .and_then(|p| p.capabilities().as_ref());
    let bounding = capabilities.and_then(|sets| sets.bounding().as_ref());
    bounding.is_some_and(|set| set.contains(&Capability::NetAdmin))
}

/// Runs what may block on another thread.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| AgentError::Internal(format!("a task of the agent failed: {error}")))?
}

impl Containers {
    /// Makes a container, up to the point where its first process waits to be started.
    pub(crate) async fn create(
        self: &Arc<Self>,
        request: &proto::CreateContainerRequest,
        boot_id: Option<PathBuf>,
        spans: &mut Spans,
    ) -> Result<Arc<Container>> {
        let id = checked_id("container id", &request.container_id)?;
        let streams = wanted(request.stdio.as_ref())?;
        let spec: Spec =
            serde_json::from_slice(&request.spec).map_err(super::spec::SpecError::from)?;
        self.reserve(id)?;
        let name = self.name();
        let bundle = self.bundle(&name);
        let (cgroup, inner) = self.hierarchy().container(&name);
        let mut unfinished = Unfinished {
            containers: self,
            id,
            bundle: bundle.clone(),
            files: Placed::default(),
            cgroup: None,
            finished: false,
        };

        let users = self.users_of(&spec).await?;
        let mounts = request.mounts.clone();
        unfinished.files = Placed::by(&mounts);
        if !mounts.is_empty() {
            let users = users.clone();
            let add = move || Ok(storage::add(&mounts, users.as_ref())?);
            let each = spans.of("mount", blocking(add)).await?;
            spans.within("mount", each);
        }
        let rootfs = self.rootfs(request);
        let guest = Guest {
            home: home(&spec, &rootfs),
            pid_namespace: self.pid_namespace(request, users.as_ref()).await?,
            user_namespace: users.as_ref().map(|users| users.path.clone()),
            cgroup: inner,
            apparmor: self.environment.apparmor,
            boot_id,
            rootfs: rootfs.clone(),
        };
        let resources = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().clone());
        let adapted = adapt(spec, &guest)?;
        for what in &adapted.dropped {
            tracing::info!(container = id, what, "dropped from the spec");
        }
        for (sysctl, value) in &adapted.pod_sysctls {
            set_sysctl(sysctl, value)?;
        }
        if changes_network(&adapted.spec) {
            blocking(|| {
                modprobe::prepare_firewalls();
                Ok(())
            })
            .await?;
        }
        fs::create_dir_all(&bundle).action("make the bundle")?;
        fs::create_dir_all(self.runtime_state()).action("make libcontainer's folder")?;
        let json = serde_json::to_vec(&adapted.spec).map_err(super::spec::SpecError::from)?;
        fs::write(bundle.join("config.json"), json).action("write config.json")?;

        cgroup.make()?;
        unfinished.cgroup = Some(cgroup.clone());
        if let Some(resources) = &resources {
            spans.now("resources", || self.hierarchy().apply(&cgroup, resources))?;
            let rules = resources.devices().as_deref().unwrap_or_default();
            let mounts = adapted.spec.mounts().as_deref().unwrap_or_default();
            device_filter::attach(&cgroup, rules, mounts)?;
        }

        let process = adapted.spec.process().as_ref();
        let terminal = process.and_then(oci::Process::terminal).unwrap_or(false);
        let (started, status) = pipe2(OFlag::O_CLOEXEC).action("make the status pipe")?;
        let mut fds: Vec<BorrowedFd<'_>> = vec![status.as_fd()];
        let pipes = (!terminal)
            .then(|| Stdio::pipes(streams))
            .transpose()
            .action("make pipes")?;
        if let (Some((_, ends)), Some(process)) = (&pipes, process) {
            let (uid, gid) = owner_of(process, users.as_ref().map(|users| &users.map))?;
            ends.give_to(uid, gid).action("own the pipes")?;
            fds.extend(ends.borrow());
        }
        let job = CreateJob {
            rlimits: adapted.rlimits,
            name: name.clone(),
            bundle,
            state: self.runtime_state(),
            terminal,
        };
        let launch = self.environment.reaper.launch();
        let made = spans
            .of("libcontainer", self.environment.helper.create(job, &fds))
            .await?;
        let exit = launch.claim(made.pid);
        let stdio = match (pipes, &made.terminal) {
            (Some((stdio, _ends)), _) => stdio,
            (None, Some(master)) => {
                resize(master, request.tty_width, request.tty_height)?;
                Stdio::terminal(streams, master).action("watch the terminal")?
            }
            (None, None) => return Err(AgentError::Internal("no terminal came back".to_owned())),
        };
        let capabilities = process.and_then(|process| process.capabilities().clone());
        let seccomp = adapted
            .spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.seccomp().clone());
        let init = Process::new((id, ""), made.pid, made.terminal, stdio, exit);
        let container = Arc::new(Container {
            id: id.to_owned(),
            name,
            init: Arc::new(init),
            cgroup,
            files: unfinished.files.clone(),
            seccomp,
            capabilities,
            namespaces: adapted.namespaces,
            users: users.map(|users| users.map),
            rootfs,
            mutable: Mutex::new(Mutable {
                phase: Phase::Created,
                execs: Default::default(),
                started: Some(started),
                oom_told: 0,
            }),
        });
        // From here on the container's own deletion cleans up.
        unfinished.finished = true;
        self.lock()
            .containers
            .insert(id.to_owned(), Some(container.clone()));
        self.watch(&container, container.init.clone());
        self.watch_memory(&container);
        Ok(container)
    }

    fn reserve(&self, id: &str) -> Result<()> {
        let mut table = self.lock();
        if table.containers.contains_key(id) {
            return Err(AgentError::Exists(format!("container {id}")));
        }
        table.containers.insert(id.to_owned(), None);
        Ok(())
    }

    fn rootfs(&self, request: &proto::CreateContainerRequest) -> PathBuf {
        if request.rootfs.is_empty() {
            self.environment
                .state
                .join("containers")
                .join(&request.container_id)
                .join("rootfs")
        } else {
            PathBuf::from(&request.rootfs)
        }
    }

    /// The user namespace of a spec's container.
    async fn users_of(self: &Arc<Self>, spec: &Spec) -> Result<Option<Users>> {
        let Some(map) = map_of(spec) else {
            return Ok(None);
        };
        let this = self.clone();
        let make = move || this.users.namespace(map, &this.namespaces());
        let users = blocking(move || make().action("make the container's user namespace")).await?;
        Ok(Some(users))
    }

    async fn pid_namespace(
        &self,
        request: &proto::CreateContainerRequest,
        users: Option<&Users>,
    ) -> Result<Option<PathBuf>> {
        let pid = match request.pid_namespace.enum_value_or_default() {
            proto::PidNamespace::PID_OWN => return Ok(None),
            proto::PidNamespace::PID_POD => {
                let pid = self.pod_init(users).await?;
                if users.is_some() {
                    return Ok(Some(self.pod_pid_namespace(pid)?));
                }
                pid
            }
            proto::PidNamespace::PID_CONTAINER => {
                let target = self.get(&request.pid_namespace_container)?;
                if target.phase() == Phase::Stopped {
                    return Err(AgentError::State(format!(
                        "container {} has stopped",
                        target.id
                    )));
                }
                target.init.pid
            }
        };
        Ok(Some(PathBuf::from(format!("/proc/{pid}/ns/pid"))))
    }

    /// The pod's PID namespace as a file: by its process's number, which is nobody's in there, the root of a user
    /// namespace could not open it.
    fn pod_pid_namespace(&self, pid: i32) -> Result<PathBuf> {
        let path = self.namespaces().join(format!("pid-{pid}"));
        if !path.exists() {
            fs::File::open(format!("/proc/{pid}/ns/pid"))
                .and_then(|namespace| keep(namespace.as_fd(), &path))
                .action("keep the pod's PID namespace")?;
        }
        Ok(path)
    }

    /// The first process of the pod's shared PID namespace; made when first needed.
    async fn pod_init(&self, users: Option<&Users>) -> Result<i32> {
        let users = users.map(|users| users.path.clone());
        let mut init = self.pod_init.lock().await;
        if let Some(pid) = init.get(&users) {
            return Ok(*pid);
        }
        let made = self.environment.helper.pod_init(users.clone()).await?;
        init.insert(users, made.pid);
        Ok(made.pid)
    }

    /// Starts a created container: its first process executes its program.
    pub(crate) async fn start(&self, id: &str) -> Result<Arc<Container>> {
        let container = self.get(id)?;
        let started = {
            let mut mutable = container.lock();
            if mutable.phase != Phase::Created {
                return Err(AgentError::State(format!(
                    "container {id} has been started already"
                )));
            }
            mutable.started.take()
        };
        let Some(started) = started else {
            return Err(AgentError::State(format!(
                "container {id} is being started"
            )));
        };
        if let Some(exit) = container.init.exit() {
            let code = exit.code;
            return Err(AgentError::State(format!(
                "container {id} ended before its start, with {code}"
            )));
        }
        let socket = self
            .runtime_state()
            .join(&container.name)
            .join("notify.sock");
        // libcontainer's first process waits for a connection that ends.
        drop(UnixStream::connect(&socket).action("reach the container's first process")?);
        let mut told = Vec::new();
        read_to_end(started, &mut told)
            .await
            .action("learn how the start went")?;
        if let Some(fault) = Fault::told(&told) {
            return Err(HelperError::from(fault).into());
        }
        let mut mutable = container.lock();
        if mutable.phase == Phase::Created {
            mutable.phase = Phase::Running;
        }
        drop(mutable);
        Ok(container)
    }

    /// Runs one more process.
    pub(crate) async fn exec(
        self: &Arc<Self>,
        request: &proto::ExecRequest,
        spans: &mut Spans,
    ) -> Result<Arc<Process>> {
        let exec = checked_id("exec id", &request.exec_id)?;
        let streams = wanted(request.stdio.as_ref())?;
        let mut process: oci::Process =
            serde_json::from_slice(&request.process).map_err(super::spec::SpecError::from)?;
        let container = match request.container_id.as_str() {
            "" => None,
            id => Some(self.get(id)?),
        };
        self.reserve_exec(container.as_deref(), exec)?;
        let passwd = |root: &Path| {
            let passwd = read_in_root(root, "etc/passwd")?;
            home_in(&passwd, process.user().uid())
        };
        let root = container
            .as_ref()
            .map_or(Path::new("/"), |container| container.rootfs.as_path());
        let home = passwd(root);
        adapt_process(&mut process, home.as_deref(), false, &mut Vec::new());
        let terminal = process.terminal().unwrap_or(false);
        if let Some(container) = &container
            && process.capabilities().is_none()
        {
            process.set_capabilities(container.capabilities.clone());
        }
        let pipes = (!terminal)
            .then(|| Stdio::pipes(streams))
            .transpose()
            .action("make pipes")?;
        let mut fds = Vec::new();
        if let Some((_, ends)) = &pipes {
            let users = container
                .as_ref()
                .and_then(|container| container.users.as_ref());
            let (uid, gid) = owner_of(&process, users)?;
            ends.give_to(uid, gid).action("own the pipes")?;
            fds.extend(ends.borrow());
        }
        let job = ExecJob {
            terminal_size: size(request.tty_width, request.tty_height),
            process,
            seccomp: container
                .as_ref()
                .and_then(|container| container.seccomp.clone()),
            container_pid: container.as_ref().map(|container| container.init.pid),
            namespaces: container
                .as_ref()
                .map_or(0, |container| container.namespaces),
            cgroup: container.as_ref().map_or_else(
                || self.hierarchy().pod_extra(),
                |container| container.cgroup.path().to_owned(),
            ),
        };
        let launch = self.environment.reaper.launch();
        let made = spans
            .of("exec", self.environment.helper.exec(job, &fds))
            .await?;
        let exit = launch.claim(made.pid);
        let stdio = match (pipes, &made.terminal) {
            (Some((stdio, _ends)), _) => stdio,
            (None, Some(master)) => {
                Stdio::terminal(streams, master).action("watch the terminal")?
            }
            (None, None) => return Err(AgentError::Internal("no terminal came back".to_owned())),
        };
        let names = (request.container_id.as_str(), exec);
        let process = Arc::new(Process::new(names, made.pid, made.terminal, stdio, exit));
        match &container {
            Some(container) => {
                container
                    .lock()
                    .execs
                    .insert(exec.to_owned(), process.clone());
                self.watch(container, process.clone());
            }
            None => {
                self.lock()
                    .guest_execs
                    .insert(exec.to_owned(), process.clone());
                self.watch_guest(process.clone());
            }
        }
        Ok(process)
    }

    fn reserve_exec(&self, container: Option<&Container>, exec: &str) -> Result<()> {
        let taken = match container {
            Some(container) => {
                if container.phase() != Phase::Running {
                    let phase = format!("{:?}", container.phase()).to_lowercase();
                    let id = &container.id;
                    return Err(AgentError::State(format!(
                        "container {id} is {phase}, not running"
                    )));
                }
                container.lock().execs.contains_key(exec)
            }
            None => self.lock().guest_execs.contains_key(exec),
        };
        if taken {
            Err(AgentError::Exists(format!("exec {exec}")))
        } else {
            Ok(())
        }
    }

    /// Tells of a process's end when it comes.
    fn watch(self: &Arc<Self>, container: &Arc<Container>, process: Arc<Process>) {
        let (containers, container) = (self.clone(), container.clone());
        tokio::spawn(async move {
            let exit = process.ended().await;
            containers.check_memory(&container);
            process.set_oom_killed(container.cgroup.oom_kills() > 0);
            if process.exec.is_empty() {
                container.lock().phase = Phase::Stopped;
                // In a shared PID namespace nobody else ends what the first process leaves.
                drop(container.cgroup.kill());
            }
            containers.tell_exit(&process, exit);
        });
    }

    fn watch_guest(self: &Arc<Self>, process: Arc<Process>) {
        let containers = self.clone();
        tokio::spawn(async move {
            let exit = process.ended().await;
            containers.tell_exit(&process, exit);
        });
    }

    fn tell_exit(&self, process: &Process, exit: Exit) {
        self.tell(Event::Exit {
            container: process.container.clone(),
            exec: process.exec.clone(),
            pid: process.pid,
            status: process.status(exit),
        });
    }

    /// Tells of OOM kills as they come.
    fn watch_memory(self: &Arc<Self>, container: &Arc<Container>) {
        if !container.cgroup.path().join("memory.events").exists() {
            // A kernel without the memory controller, which was warned of at the start.
            return;
        }
        let mut changes = match container.cgroup.memory_changes() {
            Ok(changes) => changes,
            Err(error) => {
                tracing::warn!(%error, "OOM kills will be told only when a process ends");
                return;
            }
        };
        let (containers, container) = (self.clone(), container.clone());
        tokio::spawn(async move {
            while container.phase() != Phase::Stopped {
                let ended = container.init.ended();
                tokio::select! {
                    change = changes.next() => if change.is_err() { return },
                    _ = ended => {}
                }
                containers.check_memory(&container);
            }
        });
    }

    fn check_memory(&self, container: &Container) {
        let kills = container.cgroup.oom_kills();
        let mut mutable = container.lock();
        if kills > mutable.oom_told {
            mutable.oom_told = kills;
            drop(mutable);
            self.tell(Event::Oom {
                container: container.id.clone(),
                kills,
            });
        }
    }

    /// Signals one process, or all of a container.
    pub(crate) fn kill(&self, request: &proto::KillRequest) -> Result<()> {
        let signal = i32::try_from(request.signal)
            .map_err(|_| AgentError::Invalid(format!("{} is not a signal", request.signal)))?;
        if !request.all {
            return self
                .process(&request.container_id, &request.exec_id)?
                .kill(signal);
        }
        let container = self.get(&request.container_id)?;
        if signal == SIGKILL {
            return Ok(container.cgroup.kill()?);
        }
        for pid in container.cgroup.pids()? {
            match sys::process::kill(pid, signal) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(error).action(&format!("signal process {pid}"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Freezes or thaws a container.
    pub(crate) async fn pause(&self, id: &str, paused: bool) -> Result<()> {
        let container = self.get(id)?;
        let (from, to) = if paused {
            (Phase::Running, Phase::Paused)
        } else {
            (Phase::Paused, Phase::Running)
        };
        if container.phase() != from {
            let (phase, wanted) = (container.phase(), from);
            return Err(AgentError::State(format!(
                "container {id} is {phase:?}, not {wanted:?}"
            )));
        }
        container.cgroup.freeze(paused).await?;
        container.lock().phase = to;
        Ok(())
    }

    /// Changes a container's limits.
    pub(crate) fn update(&self, request: &proto::UpdateRequest) -> Result<()> {
        let container = self.get(&request.container_id)?;
        let resources: oci::LinuxResources =
            serde_json::from_slice(&request.resources).map_err(super::spec::SpecError::from)?;
        Ok(self.hierarchy().apply(&container.cgroup, &resources)?)
    }

    /// What a container, or the pod, has used.
    pub(crate) fn stats(&self, id: &str) -> Result<proto::StatsResponse> {
        let now = sys::now_ns();
        if id.is_empty() {
            return Ok(usage::of(&self.hierarchy().pod(), now));
        }
        Ok(usage::of(&self.get(id)?.cgroup, now))
    }

    /// The processes in a container.
    pub(crate) fn pids(&self, id: &str) -> Result<proto::PidsResponse> {
        let container = self.get(id)?;
        let known = container.processes();
        let mut response = proto::PidsResponse::new();
        for pid in container.cgroup.pids()? {
            let mut process = proto::pids_response::Process::new();
            process.pid = pid.cast_unsigned();
            if let Some(known) = known.iter().find(|known| known.pid == pid) {
                process.exec_id.clone_from(&known.exec);
            }
            response.processes.push(process);
        }
        Ok(response)
    }

    /// Ends the books on a process, or on a container and all that was made for it.
    pub(crate) async fn delete(&self, request: &proto::DeleteRequest) -> Result<proto::ExitStatus> {
        let (id, exec) = (request.container_id.as_str(), request.exec_id.as_str());
        if id.is_empty() || !exec.is_empty() {
            return self.delete_exec(id, exec, request.force).await;
        }
        let container = self.get(id)?;
        let phase = container.phase();
        if !request.force && !matches!(phase, Phase::Stopped | Phase::Created) {
            return Err(AgentError::State(format!(
                "container {id} is {phase:?}; stop it first"
            )));
        }
        container.cgroup.kill()?;
        let exit = container.init.ended().await;
        let folders = [
            self.bundle(&container.name),
            self.runtime_state().join(&container.name),
        ];
        clean(Some(&container.cgroup), container.files.clone(), &folders).await?;
        self.lock().containers.remove(id);
        Ok(container.init.status(exit))
    }

    async fn delete_exec(&self, id: &str, exec: &str, force: bool) -> Result<proto::ExitStatus> {
        let process = self.process(id, exec)?;
        if process.exit().is_none() {
            if !force {
                return Err(AgentError::State(format!("exec {exec} is still running")));
            }
            // It may end by itself in this moment.
            drop(process.kill(SIGKILL));
        }
        let exit = process.ended().await;
        if id.is_empty() {
            self.lock().guest_execs.remove(exec);
        } else {
            self.get(id)?.lock().execs.remove(exec);
        }
        Ok(process.status(exit))
    }
}

/// The home of a spec's user by the image's `/etc/passwd`.
fn home(spec: &Spec, rootfs: &Path) -> Option<String> {
    let uid = spec.process().as_ref()?.user().uid();
    home_in(&read_in_root(rootfs, "etc/passwd")?, uid)
}

/// Sets a sysctl of the guest's own namespaces.
pub(crate) fn set_sysctl(name: &str, value: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if !name.chars().all(plain) || name.split('.').any(str::is_empty) {
        return Err(AgentError::Invalid(format!(
            "{name:?} is not the name of a sysctl"
        )));
    }
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    fs::write(&path, value).action(&format!("set {name} to {value:?}"))
}

/// Reads from a pipe until its last writer is gone.
async fn read_to_end(pipe: OwnedFd, bytes: &mut Vec<u8>) -> std::io::Result<()> {
    sys::set_nonblocking(&pipe)?;
    let pipe = sys::watch(pipe)?;
    let mut buffer = [0; 1024];
    loop {
        let mut ready = pipe.readable().await?;
        match ready.try_io(|pipe| Ok(nix::unistd::read(pipe, &mut buffer)?)) {
            Ok(Ok(0)) => return Ok(()),
            Ok(Ok(length)) => bytes.extend_from_slice(&buffer[..length]),
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}
