//! An agent in namespaces of its own, and what the tests say to it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kiln_agent_api::client::Vsock;
use kiln_agent_api::proto::{self, AgentClient};
use kiln_agent_api::stream::{Header, Kind, TOKEN_LEN};
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::RwLock;
use ttrpc::context::Context;

pub(crate) const TOKEN: [u8; TOKEN_LEN] = *b"0123456789abcdef";
/// Long enough for an emulated machine with other things to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// The agent's world. Everything in it ends with it.
pub(crate) struct World {
    folder: PathBuf,
    cgroup: Option<PathBuf>,
    process: Child,
    pub(crate) vsock: Vsock,
    pub(crate) agent: AgentClient,
    /// What a container's creation said before there was an identity.
    pub(crate) before_identity: ttrpc::Error,
    pub(crate) identity: proto::SetIdentityResponse,
    next: AtomicU32,
    /// Held for writing by a test that disturbs others.
    pub(crate) turn: Arc<RwLock<()>>,
}

/// Why the tests can't run here.
pub(crate) fn missing() -> Option<String> {
    // SAFETY: the call cannot fail and touches no memory.
    if unsafe { libc::geteuid() } != 0 {
        return Some("it takes root to make namespaces and cgroups".to_owned());
    }
    if Command::new("unshare").arg("--version").output().is_err() {
        return Some("the program unshare (util-linux) is not installed".to_owned());
    }
    None
}

/// Whether limits can be tested: cgroup v2 with its controllers.
pub(crate) fn has_controllers() -> bool {
    fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control").is_ok_and(|text| {
        ["memory", "pids", "cpu"]
            .iter()
            .all(|one| text.contains(one))
    })
}

impl World {
    pub(crate) async fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("kiln-agent-test-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("folder");
        let cgroup = has_controllers().then(|| {
            let name = format!("/sys/fs/cgroup/kiln-agent-test-{}", std::process::id());
            fs::create_dir_all(&name).expect("cgroup");
            PathBuf::from(name)
        });
        let log = fs::File::create(folder.join("log")).expect("log");
        let process = Command::new("unshare")
            .args([
                "--mount",
                "--pid",
                "--net",
                "--uts",
                "--ipc",
                "--fork",
                "--kill-child",
            ])
            .args(["--propagation", "private"])
            .arg(std::env::current_exe().expect("this program"))
            .arg("--set-up")
            .env("FOLDER", &folder)
            .env("CGROUP", cgroup.clone().unwrap_or_default())
            .env("AGENT", agent_program())
            .env("KILN_LOG", "info")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("unshare");
        let socket = folder.join("agent.sock");
        let vsock = Vsock::direct(&socket);
        let agent = connect(&vsock, &folder).await;
        let mut world = Self {
            folder,
            cgroup,
            process,
            vsock,
            agent,
            before_identity: ttrpc::Error::Eof,
            identity: proto::SetIdentityResponse::new(),
            next: AtomicU32::new(1),
            turn: Arc::default(),
        };
        world.prepare_root();
        let request = world.request("early", world.spec(&["exit", "0"]));
        let refused = world
            .agent
            .create_container(Context::default(), &request)
            .await;
        world.before_identity = refused.expect_err("no container without an identity");
        world.identity = world.identify().await;
        world
    }

    async fn identify(&self) -> proto::SetIdentityResponse {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let request = proto::SetIdentityRequest {
            generation: "test-1".into(),
            entropy: (0..64).map(|number: u8| number.wrapping_mul(37)).collect(),
            wall_clock_ns: i64::try_from(now.expect("clock").as_nanos()).expect("clock"),
            machine_id: "0123456789abcdef0123456789abcdef".into(),
            hostname: "pod-of-tests".into(),
            ..Default::default()
        };
        self.agent
            .set_identity(Context::default(), &request)
            .await
            .expect("identity")
    }

    /// The image: this program and little else.
    fn prepare_root(&self) {
        let root = self.image();
        for folder in [
            "bin", "etc", "proc", "sys", "dev", "tmp", "work", "home/web",
        ] {
            fs::create_dir_all(root.join(folder)).expect("image");
        }
        let program = root.join("bin/inside");
        fs::copy("/proc/self/exe", &program).expect("image");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("image");
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).expect("image");
        let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:web:/home/web:/bin/sh\n";
        fs::write(root.join("etc/passwd"), passwd).expect("image");
        fs::write(root.join("etc/plain"), "no program").expect("image");
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.folder.join("image")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// A path that the tests and the agent see alike.
    pub(crate) fn shared(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The pod's cgroup, as seen from outside.
    pub(crate) fn pod_cgroup(&self) -> Option<PathBuf> {
        self.cgroup.as_ref().map(|cgroup| cgroup.join("pod"))
    }

    pub(crate) fn new_id(&self, what: &str) -> String {
        format!("{what}-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// A spec as containerd would write it for `args`.
    pub(crate) fn spec(&self, args: &[&str]) -> Value {
        let mut arguments = vec!["/bin/inside".to_owned(), "--inside".to_owned()];
        arguments.extend(args.iter().map(ToString::to_string));
        let capabilities = json!([
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FSETID",
            "CAP_FOWNER",
            "CAP_MKNOD",
            "CAP_NET_RAW",
            "CAP_SETGID",
            "CAP_SETUID",
            "CAP_SETFCAP",
            "CAP_SETPCAP",
            "CAP_NET_BIND_SERVICE",
            "CAP_SYS_CHROOT",
            "CAP_KILL",
            "CAP_AUDIT_WRITE"
        ]);
        json!({
            "ociVersion": "1.1.0",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": arguments,
                "env": ["PATH=/usr/bin:/bin", "MARK=set"],
                "cwd": "/",
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities
                }
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid", "noexec", "nodev", "relatime"]}
            ],
            "linux": {
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "cgroupsPath": "/kubepods/besteffort/x",
                "namespaces": [
                    {"type": "pid"},
                    {"type": "ipc", "path": "/proc/4711/ns/ipc"},
                    {"type": "uts", "path": "/proc/4711/ns/uts"},
                    {"type": "mount"},
                    {"type": "network", "path": "/run/netns/cni-x"},
                    {"type": "cgroup"}
                ],
                "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
            }
        })
    }

    /// A request for a container of `spec` with all streams.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "specs are made for one request"
    )]
    pub(crate) fn request(&self, id: &str, spec: Value) -> proto::CreateContainerRequest {
        proto::CreateContainerRequest {
            container_id: id.to_owned(),
            spec: serde_json::to_vec(&spec).expect("spec"),
            rootfs: self.image().display().to_string(),
            stdio: Some(all_streams()).into(),
            ..Default::default()
        }
    }

    /// Creates and starts a container.
    pub(crate) async fn start(&self, id: &str, spec: Value) -> u32 {
        self.try_start(self.request(id, spec))
            .await
            .unwrap_or_else(|error| {
                panic!("start {id}: {error}\n{}", self.log());
            })
    }

    pub(crate) async fn try_start(
        &self,
        mut request: proto::CreateContainerRequest,
    ) -> ttrpc::Result<u32> {
        request.start = true;
        Ok(self
            .agent
            .create_container(Context::default(), &request)
            .await?
            .pid)
    }

    /// Runs a container to its end: exit code, stdout, stderr.
    pub(crate) async fn run(&self, spec: Value) -> (u32, String, String) {
        let id = self.new_id("run");
        self.start(&id, spec).await;
        let result = self.finish(&id).await;
        self.delete(&id).await;
        result
    }

    /// Reads a container's output to its end and waits for it.
    pub(crate) async fn finish(&self, id: &str) -> (u32, String, String) {
        let read = async {
            tokio::join!(
                self.read(id, "", Kind::Stdout),
                self.read(id, "", Kind::Stderr)
            )
        };
        let (out, err) = tokio::time::timeout(PATIENCE, read)
            .await
            .expect("output in time");
        (self.wait(id, "").await.exit_code, out, err)
    }

    pub(crate) async fn stream(&self, id: &str, exec: &str, kind: Kind) -> UnixStream {
        self.vsock
            .stream(&header(id, exec, kind))
            .await
            .expect("stream")
    }

    pub(crate) async fn read(&self, id: &str, exec: &str, kind: Kind) -> String {
        let mut text = Vec::new();
        self.stream(id, exec, kind)
            .await
            .read_to_end(&mut text)
            .await
            .expect("read");
        String::from_utf8_lossy(&text).into_owned()
    }

    pub(crate) async fn wait(&self, id: &str, exec: &str) -> proto::ExitStatus {
        let request = proto::WaitRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        let wait = self.agent.wait(Context::default(), &request);
        tokio::time::timeout(PATIENCE, wait)
            .await
            .expect("exit in time")
            .expect("wait")
    }

    pub(crate) async fn kill(&self, id: &str, signal: i32) -> ttrpc::Result<proto::KillResponse> {
        let request = proto::KillRequest {
            container_id: id.to_owned(),
            signal: signal.unsigned_abs(),
            ..Default::default()
        };
        self.agent.kill(Context::default(), &request).await
    }

    pub(crate) async fn delete(&self, id: &str) {
        let request = proto::DeleteRequest {
            container_id: id.to_owned(),
            force: true,
            ..Default::default()
        };
        self.agent
            .delete(Context::default(), &request)
            .await
            .unwrap_or_else(|error| {
                panic!("delete {id}: {error}\n{}", self.log());
            });
    }

    /// Starts an exec of `args` in a container.
    pub(crate) async fn exec(
        &self,
        id: &str,
        exec: &str,
        process: Value,
    ) -> ttrpc::Result<proto::ExecResponse> {
        let request = proto::ExecRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            process: serde_json::to_vec(&process).expect("process"),
            stdio: Some(all_streams()).into(),
            tty_width: 80,
            tty_height: 24,
            ..Default::default()
        };
        self.agent.exec(Context::default(), &request).await
    }

    /// Whether the agent still answers.
    pub(crate) async fn answers(&self) -> proto::HelloResponse {
        let request = proto::HelloRequest::new();
        let hello = self.agent.hello(Context::default(), &request);
        tokio::time::timeout(PATIENCE, hello)
            .await
            .expect("in time")
            .expect("hello")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // unshare kills the agent with itself.
        drop(self.process.kill());
        drop(self.process.wait());
        let until = Instant::now() + Duration::from_secs(20);
        if let Some(cgroup) = &self.cgroup {
            while !remove_tree(cgroup) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        drop(fs::remove_dir_all(&self.folder));
    }
}

fn remove_tree(folder: &Path) -> bool {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    fs::remove_dir(folder).is_ok()
}

/// In the new namespaces: mounts, then the agent in this process's place, as their PID 1.
pub(crate) fn set_up() -> std::io::Result<()> {
    let variable = |name| std::env::var(name).unwrap_or_default();
    let (folder, cgroup) = (PathBuf::from(variable("FOLDER")), variable("CGROUP"));
    let (flags, nothing) = (MsFlags::empty(), None::<&str>);
    mount(Some("proc"), "/proc", Some("proc"), flags, nothing)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), flags, nothing)?;
    fs::create_dir_all("/run/kiln")?;
    let hierarchy = if cgroup.is_empty() {
        let own = folder.join("cgroup2");
        fs::create_dir_all(&own)?;
        mount(Some("cgroup2"), &own, Some("cgroup2"), flags, nothing)?;
        let below = own.join("kiln-agent-test");
        fs::create_dir_all(&below)?;
        below
    } else {
        PathBuf::from(cgroup)
    };
    mount(
        Some(&hierarchy),
        "/sys/fs/cgroup",
        nothing,
        MsFlags::MS_BIND,
        nothing,
    )?;
    let veth = [
        "link", "add", "eth7", "type", "veth", "peer", "name", "peer7",
    ];
    // Without it the network's test looks at less.
    drop(Command::new("ip").args(veth).status());
    let socket = folder.join("agent.sock");
    Err(Command::new(variable("AGENT"))
        .args(["--listen", &format!("unix:{}", socket.display())])
        .arg("--state")
        .arg(folder.join("state"))
        .exec())
}

async fn connect(vsock: &Vsock, folder: &Path) -> AgentClient {
    let until = Instant::now() + PATIENCE;
    loop {
        match vsock.agent().await {
            Ok(agent) => return agent,
            Err(error) if Instant::now() > until => {
                let log = fs::read_to_string(folder.join("log")).unwrap_or_default();
                panic!("no agent: {error}\n{log}");
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

pub(crate) fn all_streams() -> proto::Stdio {
    proto::Stdio {
        stdin: true,
        stdout: true,
        stderr: true,
        token: TOKEN.to_vec(),
        ..Default::default()
    }
}

pub(crate) fn header(id: &str, exec: &str, kind: Kind) -> Header {
    Header {
        kind,
        token: TOKEN,
        container_id: id.to_owned(),
        exec_id: exec.to_owned(),
    }
}

/// A process object for an exec.
pub(crate) fn process(args: &[&str]) -> Value {
    let mut arguments = vec!["/bin/inside".to_owned(), "--inside".to_owned()];
    arguments.extend(args.iter().map(ToString::to_string));
    json!({"args": arguments, "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}})
}

/// Types `text` and ends the input.
pub(crate) async fn type_in(mut stdin: UnixStream, text: &str) {
    stdin.write_all(text.as_bytes()).await.expect("type");
    stdin.shutdown().await.expect("half-close");
}

/// The agent to test: the one beside this test, or on another machine what `KILN_AGENT` names.
fn agent_program() -> std::ffi::OsString {
    std::env::var_os("KILN_AGENT").unwrap_or_else(|| env!("CARGO_BIN_EXE_kiln-agent").into())
}
