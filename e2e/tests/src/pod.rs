//! Pods and their containers, as kubelet makes them through CRI.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_cri::v1 as api;

use crate::log::LogFile;
use crate::{Cri, wait};

/// How long a pod, a container or a process may take for one step.
pub const STEP: Duration = Duration::from_secs(40);

/// CPU and memory of a pod or a container.
#[derive(Debug, Clone, Copy, Default)]
pub struct Resources {
    /// Memory limit in bytes; 0 for none.
    pub memory: i64,
    /// CPU limit in thousandths of a CPU; 0 for none.
    pub cpu_millis: i64,
    /// How soon the kernel kills it when memory runs out, as kubelet has it by the pod's class.
    pub oom_score_adj: i64,
    /// Process limit by cgroup; 0 for none. (CRI has no field of its own for it.)
    pub pids: i64,
}

impl Resources {
    /// As CRI's message, with kubelet's way of counting: 100 ms periods, 1024 shares for a CPU.
    pub fn to_api(self) -> api::LinuxContainerResources {
        const PERIOD: i64 = 100_000;
        let mut resources = api::LinuxContainerResources {
            memory_limit_in_bytes: self.memory,
            oom_score_adj: self.oom_score_adj,
            ..Default::default()
        };
        if self.cpu_millis > 0 {
            resources.cpu_period = PERIOD;
            resources.cpu_quota = self.cpu_millis * PERIOD / 1000;
            resources.cpu_shares = (self.cpu_millis * 1024 / 1000).max(2);
        }
        if self.pids > 0 {
            resources
                .unified
                .insert("pids.max".to_owned(), self.pids.to_string());
        }
        resources
    }
}

/// What to run as a pod.
#[derive(Debug, Clone, Default)]
pub struct PodSpec {
    pub(crate) hostname: Option<String>,
    pub(crate) annotations: HashMap<String, String>,
    pub(crate) sysctls: HashMap<String, String>,
    pub(crate) resources: Resources,
    pub(crate) share_processes: bool,
    pub(crate) host_network: bool,
    pub(crate) host_processes: bool,
    pub(crate) host_ipc: bool,
    pub(crate) users_at: Option<u32>,
    pub(crate) privileged: bool,
    pub(crate) dns: Vec<String>,
    pub(crate) port_mappings: Vec<(i32, i32)>,
    pub(crate) handler: Option<String>,
    pub(crate) class: Option<String>,
    pub(crate) uid: Option<String>,
}

impl PodSpec {
    /// A pod with nothing special.
    pub fn new() -> Self {
        Self::default()
    }

    /// Its host name, unless it is the pod's name.
    pub fn hostname(mut self, name: &str) -> Self {
        self.hostname = Some(name.to_owned());
        self
    }

    /// Its uid, by which the kubelet calls its folder.
    pub fn uid(mut self, uid: &str) -> Self {
        self.uid = Some(uid.to_owned());
        self
    }

    /// An annotation.
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.annotations.insert(name.to_owned(), value.to_owned());
        self
    }

    /// A sysctl of the pod's namespaces.
    pub fn sysctl(mut self, name: &str, value: &str) -> Self {
        self.sysctls.insert(name.to_owned(), value.to_owned());
        self
    }

    /// The sum of its containers' limits, as kubelet hands it over.
    pub fn resources(mut self, resources: Resources) -> Self {
        self.resources = resources;
        self
    }

    /// Lets its containers see each other's processes.
    pub fn share_processes(mut self) -> Self {
        self.share_processes = true;
        self
    }

    /// Uses the node's network.
    pub fn host_network(mut self) -> Self {
        self.host_network = true;
        self
    }

    /// Sees the node's processes.
    pub fn host_processes(mut self) -> Self {
        self.host_processes = true;
        self
    }

    /// Uses the node's IPC.
    pub fn host_ipc(mut self) -> Self {
        self.host_ipc = true;
        self
    }

    /// A user namespace whose root is this user of the node, as `hostUsers: false` has it.
    pub fn users_at(mut self, first: u32) -> Self {
        self.users_at = Some(first);
        self
    }

    /// Allows privileged containers.
    pub fn privileged(mut self) -> Self {
        self.privileged = true;
        self
    }

    /// A name server for `/etc/resolv.conf`.
    pub fn name_server(mut self, address: &str) -> Self {
        self.dns.push(address.to_owned());
        self
    }

    /// A port of the node that leads to a port of the pod.
    pub fn port_mapping(mut self, host: i32, container: i32) -> Self {
        self.port_mappings.push((host, container));
        self
    }

    /// Another runtime handler than the one under test.
    pub fn handler(mut self, handler: &str) -> Self {
        self.handler = Some(handler.to_owned());
        self
    }

    /// Lies in the cgroup that kubelet has for pods of this class: `besteffort`, `burstable`, or nothing for the others.
    pub fn class(mut self, class: &str) -> Self {
        self.class = Some(class.to_owned());
        self
    }

    /// As CRI's message.
    pub(crate) fn to_api(&self, identity: &Identity) -> api::PodSandboxConfig {
        let namespaces = api::NamespaceOption {
            network: mode(if self.host_network {
                Mode::Node
            } else {
                Mode::Pod
            }),
            pid: mode(match (self.host_processes, self.share_processes) {
                (true, _) => Mode::Node,
                (false, true) => Mode::Pod,
                (false, false) => Mode::Container,
            }),
            ipc: mode(if self.host_ipc { Mode::Node } else { Mode::Pod }),
            userns_options: self.users_at.map(user_namespace),
            ..Default::default()
        };
        let security = api::LinuxSandboxSecurityContext {
            namespace_options: Some(namespaces),
            privileged: self.privileged,
            ..Default::default()
        };
        let servers = if self.dns.is_empty() {
            vec!["127.0.0.1".to_owned()]
        } else {
            self.dns.clone()
        };
        let hostname = self
            .hostname
            .clone()
            .unwrap_or_else(|| identity.name.clone());
        api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: identity.name.clone(),
                uid: identity.uid.clone(),
                namespace: "kiln-e2e".to_owned(),
                attempt: 0,
            }),
            // CRI: no host name of its own for a pod on the node's network.
            hostname: if self.host_network {
                String::new()
            } else {
                hostname
            },
            log_directory: identity.logs.clone(),
            dns_config: Some(api::DnsConfig {
                servers,
                searches: vec!["kiln.test".to_owned()],
                options: Vec::new(),
            }),
            port_mappings: self
                .port_mappings
                .iter()
                .map(|(host, container)| api::PortMapping {
                    protocol: api::Protocol::Tcp.into(),
                    container_port: *container,
                    host_port: *host,
                    host_ip: String::new(),
                })
                .collect(),
            labels: identity.labels.clone(),
            annotations: self.annotations.clone(),
            linux: Some(api::LinuxPodSandboxConfig {
                cgroup_parent: identity.cgroup.clone(),
                security_context: Some(security),
                sysctls: self.sysctls.clone(),
                resources: Some(self.resources.to_api()),
                ..Default::default()
            }),
            windows: None,
        }
    }
}

/// What tells one pod of a test from all others.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) labels: HashMap<String, String>,
    pub(crate) logs: String,
    pub(crate) cgroup: String,
}

use api::NamespaceMode as Mode;

fn mode(mode: Mode) -> i32 {
    mode.into()
}

/// How many users a pod has of its own, as kubelet counts.
const USERS: u32 = 65_536;

fn mappings(first: u32) -> Vec<api::IdMapping> {
    vec![api::IdMapping {
        host_id: first,
        container_id: 0,
        length: USERS,
    }]
}

fn user_namespace(first: u32) -> api::UserNamespace {
    api::UserNamespace {
        mode: mode(Mode::Pod),
        uids: mappings(first),
        gids: mappings(first),
    }
}

/// A running pod. It is removed when its test ends, or by [`Pod::remove`].
#[derive(Debug, Clone)]
pub struct Pod {
    cri: Cri,
    id: String,
    config: Arc<api::PodSandboxConfig>,
}

impl Pod {
    /// Runs a pod of this configuration (see [`crate::Test::pod_config`]).
    pub async fn run(cri: Cri, config: api::PodSandboxConfig, handler: &str) -> Result<Self> {
        let request = api::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        let id = cri.run_pod_sandbox(request).await?.pod_sandbox_id;
        Ok(Pod {
            cri,
            id,
            config: Arc::new(config),
        })
    }

    /// The sandbox's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The client it was made with.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// The configuration it was made from.
    pub fn config(&self) -> &api::PodSandboxConfig {
        &self.config
    }

    /// What CRI says of it.
    pub async fn status(&self) -> Result<api::PodSandboxStatus> {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        self.cri
            .pod_sandbox_status(request)
            .await?
            .status
            .context("CRI sent no status of the pod")
    }

    /// The process that stands for it on the node.
    pub async fn pid(&self) -> Result<u32> {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: true,
        };
        let answer = self.cri.pod_sandbox_status(request).await?;
        let info = answer.info.get("info").context("CRI tells nothing more")?;
        let info: serde_json::Value = serde_json::from_str(info)?;
        let pid = info["pid"].as_u64().context("CRI tells no process")?;
        Ok(pid.try_into()?)
    }

    /// Its first address.
    pub async fn ip(&self) -> Result<String> {
        let network = self
            .status()
            .await?
            .network
            .context("CRI says nothing of a network")?;
        if network.ip.is_empty() {
            bail!("pod {} has no address", self.id);
        }
        Ok(network.ip)
    }

    /// Creates a container in it.
    pub async fn create(&self, spec: &ContainerSpec) -> Result<Container> {
        let config = spec.to_api();
        let request = api::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config.clone()),
            sandbox_config: Some((*self.config).clone()),
        };
        let id = self
            .cri
            .create_container(request)
            .await
            .with_context(|| format!("container {:?}", spec.name))?
            .container_id;
        let log = Path::new(&self.config.log_directory).join(&config.log_path);
        Ok(Container {
            cri: self.cri.clone(),
            id,
            log: LogFile::new(log),
        })
    }

    /// Creates and starts a container in it.
    pub async fn start(&self, spec: &ContainerSpec) -> Result<Container> {
        let container = self.create(spec).await?;
        container
            .start()
            .await
            .with_context(|| format!("container {:?}", spec.name))?;
        Ok(container)
    }

    /// Starts a container and waits for its end: exit code and log.
    pub async fn finish(&self, spec: &ContainerSpec) -> Result<(i32, LogFile)> {
        let container = self.start(spec).await?;
        let status = container.wait().await?;
        Ok((status.exit_code, container.log))
    }

    /// Stops all its processes and takes its network away.
    pub async fn stop(&self) -> Result<()> {
        let request = api::StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.cri.stop_pod_sandbox(request).await?;
        Ok(())
    }

    /// Stops and removes it with its containers.
    pub async fn remove(&self) -> Result<()> {
        self.stop().await?;
        let request = api::RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.cri.remove_pod_sandbox(request).await?;
        Ok(())
    }
}

/// What kubelet hides from containers that are not privileged.
const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
/// What kubelet lets them only read.
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// What to run as a container.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    name: String,
    image: String,
    command: Vec<String>,
    args: Vec<String>,
    env: Vec<(String, String)>,
    workdir: String,
    mounts: Vec<api::Mount>,
    devices: Vec<api::Device>,
    resources: Resources,
    hugepages: Option<u64>,
    security: api::LinuxContainerSecurityContext,
    attempt: u32,
    stdin: bool,
    stdin_once: bool,
    tty: bool,
}

impl ContainerSpec {
    /// A container of the test image that runs `command`.
    pub fn new(name: &str, command: &[&str]) -> Self {
        ContainerSpec {
            name: name.to_owned(),
            image: kiln_test_images::catalog::BUSYBOX.to_owned(),
            command: command.iter().map(ToString::to_string).collect(),
            args: Vec::new(),
            env: Vec::new(),
            workdir: String::new(),
            mounts: Vec::new(),
            devices: Vec::new(),
            resources: Resources::default(),
            hugepages: None,
            security: api::LinuxContainerSecurityContext {
                namespace_options: Some(api::NamespaceOption {
                    network: mode(Mode::Pod),
                    pid: mode(Mode::Container),
                    ipc: mode(Mode::Pod),
                    ..Default::default()
                }),
                masked_paths: MASKED.map(str::to_owned).to_vec(),
                readonly_paths: READ_ONLY.map(str::to_owned).to_vec(),
                ..Default::default()
            },
            attempt: 0,
            stdin: false,
            stdin_once: false,
            tty: false,
        }
    }

    /// A container whose `testprog` gets these arguments.
    pub fn testprog(name: &str, arguments: &[&str]) -> Self {
        let mut command = vec!["/bin/testprog"];
        command.extend_from_slice(arguments);
        Self::new(name, &command)
    }

    /// A container that runs a shell script.
    pub fn shell(name: &str, script: &str) -> Self {
        Self::new(name, &["/bin/sh", "-c", script])
    }

    /// A container that only waits, for exec.
    pub fn pause(name: &str) -> Self {
        Self::testprog(name, &["pause"])
    }

    /// Another image.
    pub fn image(mut self, image: &str) -> Self {
        image.clone_into(&mut self.image);
        self
    }

    /// Arguments after the command.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args = args.iter().map(ToString::to_string).collect();
        self
    }

    /// An environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The working directory.
    pub fn workdir(mut self, path: &str) -> Self {
        path.clone_into(&mut self.workdir);
        self
    }

    /// A file or directory of the node.
    pub fn mount(self, host: impl AsRef<Path>, path: &str) -> Self {
        self.add_mount(
            host.as_ref(),
            path,
            false,
            api::MountPropagation::PropagationPrivate,
        )
    }

    /// A file or directory of the node that must not be written to.
    pub fn mount_read_only(self, host: impl AsRef<Path>, path: &str) -> Self {
        self.add_mount(
            host.as_ref(),
            path,
            true,
            api::MountPropagation::PropagationPrivate,
        )
    }

    /// A directory of the node; mounts made below it later appear in the container.
    pub fn mount_following_host(self, host: impl AsRef<Path>, path: &str) -> Self {
        let mode = api::MountPropagation::PropagationHostToContainer;
        self.add_mount(host.as_ref(), path, false, mode)
    }

    /// A directory of the node that must not be written to, nor what is mounted below it.
    pub fn mount_all_read_only(self, host: impl AsRef<Path>, path: &str) -> Self {
        let private = api::MountPropagation::PropagationPrivate;
        let mut spec = self.add_mount(host.as_ref(), path, true, private);
        if let Some(mount) = spec.mounts.last_mut() {
            mount.recursive_read_only = true;
        }
        spec
    }

    /// A directory of the node that shares mounts with it both ways.
    pub fn mount_both_ways(self, host: impl AsRef<Path>, path: &str) -> Self {
        let mode = api::MountPropagation::PropagationBidirectional;
        self.add_mount(host.as_ref(), path, false, mode)
    }

    /// Runs in its pod's user namespace ([`PodSpec::users_at`]), with the volumes so far as its own.
    pub fn users_at(mut self, first: u32) -> Self {
        if let Some(namespaces) = &mut self.security.namespace_options {
            namespaces.userns_options = Some(user_namespace(first));
        }
        for mount in &mut self.mounts {
            mount.uid_mappings = mappings(first);
            mount.gid_mappings = mappings(first);
        }
        self
    }

    fn add_mount(
        mut self,
        host: &Path,
        path: &str,
        readonly: bool,
        propagation: api::MountPropagation,
    ) -> Self {
        self.mounts.push(api::Mount {
            container_path: path.to_owned(),
            host_path: host.display().to_string(),
            readonly,
            propagation: propagation.into(),
            ..Default::default()
        });
        self
    }

    /// A device of the node; `permissions` as in a device cgroup (`rwm`).
    pub fn device(mut self, host: &str, path: &str, permissions: &str) -> Self {
        self.devices.push(api::Device {
            container_path: path.to_owned(),
            host_path: host.to_owned(),
            permissions: permissions.to_owned(),
        });
        self
    }

    /// CPU, memory and process limits.
    pub fn resources(mut self, resources: Resources) -> Self {
        self.resources = resources;
        self
    }

    /// A memory limit in MiB.
    pub fn memory_mib(mut self, mib: i64) -> Self {
        self.resources.memory = mib << 20;
        self
    }

    /// User and group, by number.
    pub fn user(mut self, uid: i64, gid: i64) -> Self {
        self.security.run_as_user = Some(api::Int64Value { value: uid });
        self.security.run_as_group = Some(api::Int64Value { value: gid });
        self
    }

    /// User by name, as the image's `/etc/passwd` has it.
    pub fn user_name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.security.run_as_username);
        self
    }

    /// Further groups.
    pub fn groups(mut self, groups: &[i64]) -> Self {
        self.security.supplemental_groups = groups.to_vec();
        self
    }

    /// Capabilities to add and to drop, by name without `CAP_`.
    pub fn capabilities(mut self, add: &[&str], drop: &[&str]) -> Self {
        let list = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        self.security.capabilities = Some(api::Capability {
            add_capabilities: list(add),
            drop_capabilities: list(drop),
            ..Default::default()
        });
        self
    }

    /// All capabilities, devices and so on.
    pub fn privileged(mut self) -> Self {
        self.security.privileged = true;
        self.security.masked_paths.clear();
        self.security.readonly_paths.clear();
        self
    }

    /// A root file system that cannot be written to.
    pub fn read_only_root(mut self) -> Self {
        self.security.readonly_rootfs = true;
        self
    }

    /// Forbids gaining privileges, as `allowPrivilegeEscalation: false` does.
    pub fn no_new_privileges(mut self) -> Self {
        self.security.no_new_privs = true;
        self
    }

    /// containerd's default seccomp profile.
    pub fn default_seccomp(mut self) -> Self {
        self.security.seccomp = Some(api::SecurityProfile {
            profile_type: api::security_profile::ProfileType::RuntimeDefault.into(),
            localhost_ref: String::new(),
        });
        self
    }

    /// Sees the processes of the pod's other containers.
    pub fn share_processes(mut self) -> Self {
        if let Some(namespaces) = &mut self.security.namespace_options {
            namespaces.pid = mode(Mode::Pod);
        }
        self
    }

    /// Sees the processes of one other container, and is seen there.
    pub fn target(mut self, container: &Container) -> Self {
        if let Some(namespaces) = &mut self.security.namespace_options {
            namespaces.pid = mode(Mode::Target);
            container.id().clone_into(&mut namespaces.target_id);
        }
        self
    }

    /// Hugepages of 2 MiB, in bytes.
    pub fn hugepages(mut self, bytes: u64) -> Self {
        self.hugepages = Some(bytes);
        self
    }

    /// Which start of this container it is: restarts count up.
    pub fn attempt(mut self, attempt: u32) -> Self {
        self.attempt = attempt;
        self
    }

    /// Keeps standard input open for attach.
    pub fn stdin(mut self) -> Self {
        self.stdin = true;
        self
    }

    /// Standard input ends with the first client that attached.
    pub fn stdin_once(mut self) -> Self {
        self.stdin = true;
        self.stdin_once = true;
        self
    }

    /// A terminal.
    pub fn tty(mut self) -> Self {
        self.tty = true;
        self
    }

    fn to_api(&self) -> api::ContainerConfig {
        let image = api::ImageSpec {
            image: self.image.clone(),
            ..Default::default()
        };
        let mut resources = self.resources.to_api();
        let limits = self.hugepages.map(|limit| api::HugepageLimit {
            page_size: "2MB".to_owned(),
            limit,
        });
        resources.hugepage_limits.extend(limits);
        api::ContainerConfig {
            metadata: Some(api::ContainerMetadata {
                name: self.name.clone(),
                attempt: self.attempt,
            }),
            image: Some(image),
            command: self.command.clone(),
            args: self.args.clone(),
            working_dir: self.workdir.clone(),
            envs: self
                .env
                .iter()
                .map(|(key, value)| api::KeyValue {
                    key: key.clone(),
                    value: value.clone(),
                })
                .collect(),
            mounts: self.mounts.clone(),
            devices: self.devices.clone(),
            log_path: format!("{}/{}.log", self.name, self.attempt),
            stdin: self.stdin,
            stdin_once: self.stdin_once,
            tty: self.tty,
            linux: Some(api::LinuxContainerConfig {
                resources: Some(resources),
                security_context: Some(self.security.clone()),
            }),
            ..Default::default()
        }
    }
}

/// What a finished exec has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A container of a pod.
#[derive(Debug, Clone)]
pub struct Container {
    cri: Cri,
    id: String,
    log: LogFile,
}

impl Container {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its log.
    pub fn log(&self) -> &LogFile {
        &self.log
    }

    /// Starts it.
    pub async fn start(&self) -> Result<()> {
        let request = api::StartContainerRequest {
            container_id: self.id.clone(),
        };
        self.cri.start_container(request).await?;
        Ok(())
    }

    /// What CRI says of it.
    pub async fn status(&self) -> Result<api::ContainerStatus> {
        let request = api::ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        let answer = self.cri.container_status(request).await?;
        answer.status.context("CRI sent no status of the container")
    }

    /// Its state.
    pub async fn state(&self) -> Result<api::ContainerState> {
        Ok(self.status().await?.state())
    }

    /// Waits until it has exited.
    pub async fn wait(&self) -> Result<api::ContainerStatus> {
        self.wait_for(STEP).await
    }

    /// Waits until it has exited, but not longer than `limit`.
    pub async fn wait_for(&self, limit: Duration) -> Result<api::ContainerStatus> {
        wait::until(&format!("end of container {}", self.id), limit, || async {
            let status = self.status().await?;
            Ok((status.state() == api::ContainerState::ContainerExited).then_some(status))
        })
        .await
    }

    /// Asks it to stop, and kills it after `grace`.
    pub async fn stop(&self, grace: Duration) -> Result<()> {
        Ok(self.cri.stop_with_grace(&self.id, grace).await?)
    }

    /// Removes it.
    pub async fn remove(&self) -> Result<()> {
        let request = api::RemoveContainerRequest {
            container_id: self.id.clone(),
        };
        self.cri.remove_container(request).await?;
        Ok(())
    }

    /// Runs a command in it and waits for the end.
    pub async fn exec(&self, command: &[&str]) -> Result<Output> {
        self.exec_limited(command, 0).await
    }

    /// Runs a command in it; CRI is to end it after `seconds` (0: never).
    pub async fn exec_limited(&self, command: &[&str], seconds: i64) -> Result<Output> {
        let request = api::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout: seconds,
        };
        let answer = self
            .cri
            .exec_sync(request, STEP)
            .await
            .with_context(|| format!("exec of {command:?}"))?;
        Ok(Output {
            code: answer.exit_code,
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
        })
    }

    /// Runs a command in it that must succeed, and returns its standard output, trimmed.
    pub async fn read(&self, command: &[&str]) -> Result<String> {
        let output = self.exec(command).await?;
        if output.code != 0 {
            bail!(
                "{command:?} ended with {}: {:?}",
                output.code,
                output.stderr
            );
        }
        Ok(output.stdout.trim_end().to_owned())
    }

    /// Runs a shell script in it that must succeed, and returns its standard output, trimmed.
    pub async fn shell(&self, script: &str) -> Result<String> {
        self.read(&["/bin/sh", "-c", script]).await
    }

    /// What `testprog report` says in it.
    pub async fn report(&self) -> Result<serde_json::Value> {
        let text = self.read(&["/bin/testprog", "report"]).await?;
        serde_json::from_str(&text).with_context(|| format!("testprog's report: {text:?}"))
    }

    /// CPU, memory and so on, as CRI counts.
    pub async fn stats(&self) -> Result<api::ContainerStats> {
        let request = api::ContainerStatsRequest {
            container_id: self.id.clone(),
        };
        self.cri
            .container_stats(request)
            .await?
            .stats
            .context("CRI sent no statistics")
    }
}
