//! The agent as a whole: gate, containers, and what concerns both.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use kiln_agent_api::stream::{FIXED_LEN, Fixed, Header, Kind, Status};
use kiln_agent_api::{PROTOCOL_VERSION, proto};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_stream::StreamExt;

use crate::container::{Containers, Event, blocking, set_sysctl};
use crate::error::{Action, AgentError};
use crate::gate::Gate;
use crate::listen::Connections;
use crate::service::gate_state;
use crate::spans::Spans;
use crate::stdio::{self, Connection, answer};
use crate::uevent::{self, Uevents};
use crate::{clearing, network, resources, scratch, storage, sys};

type Result<T> = std::result::Result<T, AgentError>;

/// How long the header of a stream may take.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest time that a shutdown waits for containers.
const MAX_GRACE: Duration = Duration::from_secs(600);

/// What is known about this boot.
#[derive(Debug, Default)]
pub(crate) struct Boot {
    pub(crate) started_us: u64,
    pub(crate) ready_us: u64,
    pub(crate) warnings: Vec<String>,
    /// PID 1 of a guest, which ends with it.
    pub(crate) owns_guest: bool,
}

/// The agent.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) gate: Gate,
    pub(crate) containers: Arc<Containers>,
    pub(crate) boot: Boot,
}

impl Agent {
    /// Who this is and how it stands.
    pub(crate) fn hello(&self) -> Result<proto::HelloResponse> {
        let (open, generation) = self.gate.state();
        let network = network::state()?;
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").action("read the release")?;
        Ok(proto::HelloResponse {
            protocol_version: PROTOCOL_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: kernel.trim().to_owned(),
            gate: gate_state(open),
            generation,
            started_us: self.boot.started_us,
            ready_us: self.boot.ready_us,
            resources: Some(resources::state()?).into(),
            features: features(),
            warnings: self.boot.warnings.clone(),
            mac_addresses: network.interfaces.into_iter().map(|one| one.mac).collect(),
            ..Default::default()
        })
    }

    /// Makes the guest small and shuts the gate: what is snapshotted next has no identity.
    pub(crate) async fn settle(
        &self,
        request: &proto::SettleRequest,
    ) -> Result<proto::SettleResponse> {
        if !self.containers.is_empty() {
            let text = "the μVM has containers; only an empty one can be baked";
            return Err(AgentError::State(text.to_owned()));
        }
        self.gate.shut();
        let (drop_caches, compact) = (request.drop_caches, request.compact_memory);
        blocking(move || {
            nix::unistd::sync();
            if drop_caches {
                resources::give_back_caches().action("give back caches")?;
            }
            if compact {
                fs::write("/proc/sys/vm/compact_memory", "1").action("compact memory")?;
            }
            clearing::clear_free_memory().action("clear free memory")?;
            // After the caches are gone.
            scratch::rehearse().action("rehearse a container's writable layer")?;
            Ok(())
        })
        .await?;
        let resources = resources::state()?;
        Ok(proto::SettleResponse {
            resources: Some(resources).into(),
            ..Default::default()
        })
    }

    /// The gate, and what may come with it.
    pub(crate) async fn set_identity(
        &self,
        request: proto::SetIdentityRequest,
    ) -> Result<proto::SetIdentityResponse> {
        let mut spans = Spans::new();
        let mut response = self.gate.open(&request, &mut spans)?;
        if let Some(network) = request.network.as_ref() {
            let state = spans.now("network", || network::configure(network))?;
            response.network = Some(state).into();
        }
        for (name, value) in &request.sysctls {
            set_sysctl(name, value)?;
        }
        if request.scratch_flush {
            scratch::flush().action("have what containers sync flushed")?;
        }
        if request.scratch_limit_bytes > 0 {
            scratch::limit(request.scratch_limit_bytes)
                .action("limit the containers' writable layers")?;
        }
        if let Some(wanted) = request.resources.into_option() {
            let state = spans.of("resources", self.set_resources(wanted)).await?;
            response.resources = Some(state).into();
        }
        let mounts = request.mounts;
        if !mounts.is_empty() {
            let each = spans
                .of("mount", blocking(move || Ok(storage::add(&mounts, None)?)))
                .await?;
            spans.within("mount", each);
        }
        // Frozen since the kernel told of the resume, if anything ran then.
        let pod = self.containers.hierarchy().pod();
        if self.containers.all().iter().any(|_| true) {
            pod.freeze(false).await?;
        }
        response.spans = spans.finish();
        Ok(response)
    }

    /// CPUs and memory; the pod's limit follows.
    pub(crate) async fn set_resources(
        &self,
        wanted: proto::Resources,
    ) -> Result<proto::ResourceState> {
        let state = blocking(move || Ok(resources::set(&wanted)?)).await?;
        self.containers
            .hierarchy()
            .limit_pod_memory(state.mem_total_bytes)?;
        Ok(state)
    }

    /// Ends all containers, then the guest.
    pub(crate) async fn shutdown(&self, request: &proto::ShutdownRequest) -> Result<()> {
        let grace = Duration::from_millis(request.grace_ms.into()).min(MAX_GRACE);
        let containers = self.containers.all();
        if !grace.is_zero() {
            for container in &containers {
                // One that has ended already needs no signal.
                drop(container.init.kill(libc::SIGTERM));
            }
            let all = async {
                for container in &containers {
                    container.init.ended().await;
                }
            };
            drop(tokio::time::timeout(grace, all).await);
        }
        self.containers.hierarchy().pod().kill()?;
        let (reboot, owns_guest) = (request.reboot, self.boot.owns_guest);
        tokio::spawn(async move {
            // The answer is on its way first.
            tokio::time::sleep(Duration::from_millis(5)).await;
            end(owns_guest, reboot);
        });
        Ok(())
    }

    /// Carries streams for ever.
    pub(crate) async fn serve_streams(self: Arc<Self>, mut connections: Connections) {
        while let Some(connection) = connections.next().await {
            if let Ok(connection) = connection {
                let agent = self.clone();
                tokio::spawn(async move { agent.serve_stream(connection).await });
            }
        }
    }

    async fn serve_stream(&self, mut connection: Box<dyn Connection>) {
        let read = tokio::time::timeout(HEADER_TIMEOUT, read_header(&mut connection)).await;
        let header = match read {
            Ok(Ok(Some(header))) => header,
            Ok(Ok(None)) => return answer(&mut connection, Status::BadHeader).await,
            // The connection is gone, or may as well be.
            Ok(Err(_)) | Err(_) => return,
        };
        if self.gate.check().is_err() {
            return answer(&mut connection, Status::GateShut).await;
        }
        let identities = self.gate.identities();
        if let Kind::Tcp(port) = header.kind {
            let gone = stdio::replaced(identities);
            return tokio::select! {
                () = forward(connection, port) => {}
                () = gone => {}
            };
        }
        let Ok(process) = self
            .containers
            .process(&header.container_id, &header.exec_id)
        else {
            return answer(&mut connection, Status::NotFound).await;
        };
        if !process.stdio.admits(&header.token) {
            return answer(&mut connection, Status::BadToken).await;
        }
        let gone = stdio::replaced(identities);
        process.stdio.carry(header.kind, connection, gone).await;
    }

    /// Listens for new VM generations for ever.
    pub(crate) async fn watch_generation(self: Arc<Self>) -> io::Result<()> {
        let socket = sys::watch(Uevents::listen()?.into_socket())?;
        loop {
            let mut ready = socket.readable().await?;
            let message = match ready.try_io(|socket| next_message(socket.get_ref())) {
                Ok(message) => message?,
                Err(_would_block) => continue,
            };
            if uevent::says(&message, "NEW_VMGENID=1") && self.gate.resumed() {
                tracing::warn!("the μVM was resumed; it needs a new identity");
                if let Err(error) = self
                    .containers
                    .hierarchy()
                    .pod()
                    .write("cgroup.freeze", "1")
                {
                    tracing::error!(%error, "containers go on running without an identity");
                }
                self.containers.tell(Event::Resumed);
            }
        }
    }
}

fn next_message(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    uevent::receive(socket)?.ok_or_else(|| io::ErrorKind::WouldBlock.into())
}

/// The header of a stream; `None` if it is none.
async fn read_header(connection: &mut Box<dyn Connection>) -> io::Result<Option<Header>> {
    let mut fixed = [0; FIXED_LEN];
    connection.read_exact(&mut fixed).await?;
    let Ok(fixed) = Fixed::parse(&fixed) else {
        return Ok(None);
    };
    let mut ids = vec![0; fixed.ids_len()];
    connection.read_exact(&mut ids).await?;
    Ok(fixed.with_ids(&ids).ok())
}

/// Carries a TCP connection to the pod's localhost.
async fn forward(mut connection: Box<dyn Connection>, port: u16) {
    let stream = match TcpStream::connect(("127.0.0.1", port)).await {
        Ok(stream) => Ok(stream),
        Err(_) => TcpStream::connect(("::1", port)).await,
    };
    match stream {
        Ok(mut stream) => {
            if connection
                .write_all(&[Status::Accepted as u8])
                .await
                .is_ok()
            {
                // Either end may hang up at any time; there is nobody to tell.
                drop(tokio::io::copy_bidirectional(&mut connection, &mut stream).await);
            }
        }
        Err(_) => answer(&mut connection, Status::Refused).await,
    }
}

/// Ends the guest, or outside a VM only the agent.
fn end(owns_guest: bool, reboot: bool) {
    use nix::sys::reboot::{RebootMode, reboot as call};

    if !owns_guest {
        std::process::exit(0);
    }
    nix::unistd::sync();
    let mode = if reboot {
        RebootMode::RB_AUTOBOOT
    } else {
        RebootMode::RB_POWER_OFF
    };
    let Err(error) = call(mode);
    tracing::error!(%error, "the kernel won't end");
}

/// What the kernel has that a host may want to know.
fn features() -> Vec<String> {
    const FILE_SYSTEMS: [&str; 8] = [
        "erofs", "ext4", "xfs", "btrfs", "squashfs", "overlay", "virtiofs", "tmpfs",
    ];
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let known: Vec<&str> = known
        .lines()
        .filter_map(|line| line.split_whitespace().last())
        .collect();
    let mut features: Vec<String> = FILE_SYSTEMS
        .iter()
        .filter(|name| known.contains(name))
        .map(ToString::to_string)
        .collect();
    if fs::exists("/proc/sys/kernel/seccomp").unwrap_or(false) {
        features.push("seccomp".to_owned());
    }
    if apparmor_enabled() {
        features.push("apparmor".to_owned());
    }
    features
}

/// Whether AppArmor can confine anything.
pub(crate) fn apparmor_enabled() -> bool {
    fs::read_to_string("/sys/module/apparmor/parameters/enabled")
        .is_ok_and(|text| text.trim() == "Y")
}

/// Microseconds since the kernel started.
pub(crate) fn now_us() -> u64 {
    sys::since_boot_us()
}
