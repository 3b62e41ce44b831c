//! Containers without a pod, through containerd's own API: what `ctr run` and other clients do.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use containerd_client::Client;
use containerd_client::services::v1::snapshots::{PrepareSnapshotRequest, RemoveSnapshotRequest};
use containerd_client::services::v1::{
    CloseIoRequest, Container, CreateContainerRequest, CreateTaskRequest, DeleteContainerRequest,
    DeleteProcessRequest, DeleteResponse, DeleteTaskRequest, ExecProcessRequest, GetImageRequest,
    GetRequest, KillRequest, ListContainersRequest, ListPidsRequest, ListTasksRequest,
    PauseTaskRequest, ReadContentRequest, ResizePtyRequest, ResumeTaskRequest, StartRequest,
    WaitRequest, container::Runtime,
};
use containerd_client::types::Mount;
use containerd_client::types::v1::Process;
use kiln_test_images::catalog;
use prost_types::Any;
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::api::{PLAIN_NAMESPACE, SNAPSHOTTER, request};
use crate::test::LABEL;
use crate::{Test, wait};

/// How long a stream may take to say something, a process to end.
const STEP: Duration = Duration::from_secs(30);

/// What to run.
#[derive(Debug, Clone)]
pub struct PlainSpec {
    args: Vec<String>,
    terminal: bool,
    stdin: bool,
    netns: Option<PathBuf>,
    image: String,
    snapshotter: String,
    changes: Vec<(String, Value)>,
}

impl PlainSpec {
    /// A container that runs `testprog` with these arguments.
    pub fn testprog(arguments: &[&str]) -> Self {
        let mut args = vec!["/bin/testprog".to_owned()];
        args.extend(arguments.iter().map(ToString::to_string));
        Self::new(args)
    }

    /// A container that runs a shell script.
    pub fn shell(script: &str) -> Self {
        Self::new(["/bin/sh", "-c", script].map(str::to_owned).to_vec())
    }

    fn new(args: Vec<String>) -> Self {
        PlainSpec {
            args,
            terminal: false,
            stdin: false,
            netns: None,
            image: catalog::BUSYBOX.to_owned(),
            snapshotter: SNAPSHOTTER.to_owned(),
            changes: Vec::new(),
        }
    }

    /// With another value in its specification, at a JSON pointer whose last word may be new.
    pub fn change(mut self, pointer: &str, value: Value) -> Self {
        self.changes.push((pointer.to_owned(), value));
        self
    }

    /// Of another image, by a snapshotter that has it unpacked.
    pub fn image(mut self, name: &str, snapshotter: &str) -> Self {
        name.clone_into(&mut self.image);
        snapshotter.clone_into(&mut self.snapshotter);
        self
    }

    /// With a terminal.
    pub fn terminal(mut self) -> Self {
        self.terminal = true;
        self
    }

    /// With standard input.
    pub fn stdin(mut self) -> Self {
        self.stdin = true;
        self
    }

    /// In a network namespace that exists already.
    pub fn netns(mut self, path: &Path) -> Self {
        self.netns = Some(path.to_owned());
        self
    }

    fn process(&self) -> Value {
        let capabilities = [
            "CAP_CHOWN",
            "CAP_KILL",
            "CAP_SETUID",
            "CAP_SETGID",
            "CAP_DAC_OVERRIDE",
        ];
        json!({
            "terminal": self.terminal,
            "user": {"uid": 0, "gid": 0},
            "args": self.args,
            "env": ["PATH=/bin", "TERM=xterm"],
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        })
    }

    fn oci(&self, id: &str) -> Value {
        let mount = |target: &str, kind: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": kind, "options": options});
        let mut namespaces =
            Vec::from(["pid", "ipc", "uts", "mount"].map(|kind| json!({"type": kind})));
        namespaces.push(match &self.netns {
            Some(path) => json!({"type": "network", "path": path}),
            None => json!({"type": "network"}),
        });
        let mut spec = json!({
            "ociVersion": "1.1.0",
            "process": self.process(),
            "root": {"path": "rootfs", "readonly": false},
            "hostname": id,
            "mounts": [
                mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
                mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
                mount("/dev/pts", "devpts",
                    &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
                mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777"]),
                mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
                mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            ],
            "linux": {
                "cgroupsPath": format!("/{PLAIN_NAMESPACE}/{id}"),
                "namespaces": namespaces,
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
                "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
            },
        });
        for (pointer, value) in &self.changes {
            let (parent, name) = pointer.rsplit_once('/').unwrap_or_default();
            if let Some(parent) = spec.pointer_mut(parent) {
                parent[name] = value.clone();
            }
        }
        spec
    }
}

fn any(kind: &str, value: &Value) -> Any {
    let type_url = format!("types.containerd.io/opencontainers/runtime-spec/1/{kind}");
    Any {
        type_url,
        value: value.to_string().into_bytes(),
    }
}

/// The ends of a process's streams. They are named pipes, as containerd's clients use them.
#[derive(Debug)]
pub struct Streams {
    stdin: Option<PathBuf>,
    stdout: Reader,
    stderr: Option<Reader>,
    input: Mutex<Option<File>>,
}

/// A pipe that is read from the moment it is opened until its end.
#[derive(Debug)]
struct Reader {
    path: PathBuf,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    bytes: Vec<u8>,
    ended: bool,
}

impl Reader {
    fn new(path: PathBuf) -> Result<Self> {
        make_fifo(&path)?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (from, into) = (path.clone(), Arc::clone(&seen));
        // A thread, because opening a pipe blocks until the other end is opened too.
        std::thread::Builder::new()
            .name("reader".to_owned())
            .spawn(move || {
                let mut buffer = vec![0; 64 << 10];
                let mut file = File::open(from);
                loop {
                    let got = file
                        .as_mut()
                        .map_or(0, |file| file.read(&mut buffer).unwrap_or(0));
                    let Ok(mut seen) = into.lock() else { return };
                    if got == 0 {
                        seen.ended = true;
                        return;
                    }
                    seen.bytes.extend_from_slice(&buffer[..got]);
                }
            })?;
        Ok(Reader { path, seen })
    }

    fn text(&self) -> String {
        self.seen
            .lock()
            .map(|seen| String::from_utf8_lossy(&seen.bytes).into_owned())
            .unwrap_or_default()
    }

    fn ended(&self) -> bool {
        self.seen.lock().is_ok_and(|seen| seen.ended)
    }

    async fn end(&self) -> Result<String> {
        let what = format!("end of {}", self.path.display());
        wait::until(&what, STEP, || async {
            Ok(self.ended().then(|| self.text()))
        })
        .await
    }

    async fn wait_for(&self, text: &str) -> Result<String> {
        let what = format!("{text:?} in {}", self.path.display());
        let found = wait::until(&what, STEP, || async {
            let seen = self.text();
            Ok(seen.contains(text).then_some(seen))
        });
        found
            .await
            .with_context(|| format!("there is {:?}", self.text()))
    }
}

fn make_fifo(path: &Path) -> Result<()> {
    let name = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the pointer is to a string that ends with a zero byte and lives through the call.
    if unsafe { libc::mkfifo(name.as_ptr(), 0o600) } != 0 {
        let error = std::io::Error::last_os_error();
        return Err(error).with_context(|| format!("cannot make pipe {}", path.display()));
    }
    Ok(())
}

impl Streams {
    fn new(folder: &Path, name: &str, spec: &PlainSpec) -> Result<Self> {
        let path = |stream: &str| folder.join(format!("{name}-{stream}"));
        let stdin = spec.stdin.then(|| path("stdin"));
        if let Some(stdin) = &stdin {
            make_fifo(stdin)?;
        }
        Ok(Streams {
            stdin,
            stdout: Reader::new(path("stdout"))?,
            // A terminal has one output only.
            stderr: if spec.terminal {
                None
            } else {
                Some(Reader::new(path("stderr"))?)
            },
            input: Mutex::new(None),
        })
    }

    fn paths(&self) -> (String, String, String) {
        let text = |path: Option<&PathBuf>| {
            path.map(|path| path.display().to_string())
                .unwrap_or_default()
        };
        (
            text(self.stdin.as_ref()),
            text(Some(&self.stdout.path)),
            text(self.stderr.as_ref().map(|reader| &reader.path)),
        )
    }

    /// Writes to standard input.
    pub async fn write(&self, bytes: &[u8]) -> Result<()> {
        let path = self
            .stdin
            .clone()
            .context("this process was given no stdin")?;
        let taken = self.input.lock().ok().and_then(|mut input| input.take());
        let bytes = bytes.to_vec();
        let written = tokio::task::spawn_blocking(move || -> std::io::Result<File> {
            let mut file = match taken {
                Some(file) => file,
                None => File::options().write(true).open(path)?,
            };
            file.write_all(&bytes)?;
            Ok(file)
        });
        let file = tokio::time::timeout(STEP, written)
            .await
            .context("stdin takes nothing")???;
        if let Ok(mut input) = self.input.lock() {
            *input = Some(file);
        }
        Ok(())
    }

    /// Closes our end of standard input.
    pub fn close_input(&self) {
        if let Ok(mut input) = self.input.lock() {
            input.take();
        }
    }

    /// Standard output so far.
    pub fn output(&self) -> String {
        self.stdout.text()
    }

    /// All of standard output, when it has ended.
    pub async fn all_output(&self) -> Result<String> {
        self.stdout.end().await
    }

    /// All of standard error, when it has ended.
    pub async fn all_errors(&self) -> Result<String> {
        self.stderr
            .as_ref()
            .context("a terminal has no stderr")?
            .end()
            .await
    }

    /// Waits until standard output has this text in it and returns all of it.
    pub async fn wait_for(&self, text: &str) -> Result<String> {
        self.stdout.wait_for(text).await
    }
}

/// A container with its task.
pub struct Plain {
    client: Client,
    id: String,
    snapshotter: String,
    folder: PathBuf,
    /// The first process's streams.
    pub streams: Streams,
    /// The first process's id on the node.
    pub pid: u32,
}

fn call<T>(message: T) -> Result<tonic::Request<T>, Status> {
    request(PLAIN_NAMESPACE, message)
}

impl Plain {
    /// Makes snapshot, container and task; the process waits for [`Plain::start`].
    pub async fn create(test: &Test, spec: &PlainSpec) -> Result<Self> {
        let client = Client::from(test.client().channel());
        let id = test.unique("plain");
        test.made(&id);
        let rootfs = prepare_rootfs(&client, &id, spec)
            .await
            .context("cannot prepare a snapshot")?;
        let container = Container {
            id: id.clone(),
            labels: test.labels(),
            image: spec.image.clone(),
            runtime: Some(Runtime {
                name: test.runtime(),
                options: None,
            }),
            spec: Some(any("Spec", &spec.oci(&id))),
            snapshotter: spec.snapshotter.clone(),
            snapshot_key: id.clone(),
            ..Default::default()
        };
        let message = CreateContainerRequest {
            container: Some(container),
        };
        client
            .containers()
            .create(call(message)?)
            .await
            .context("containers.create")?;
        let folder = test.scratch().to_owned();
        let streams = Streams::new(&folder, &id, spec)?;
        let (stdin, stdout, stderr) = streams.paths();
        let message = CreateTaskRequest {
            container_id: id.clone(),
            rootfs,
            stdin,
            stdout,
            stderr,
            terminal: spec.terminal,
            ..Default::default()
        };
        let pid = client
            .tasks()
            .create(call(message)?)
            .await
            .context("tasks.create")?;
        let pid = pid.into_inner().pid;
        Ok(Plain {
            client,
            id,
            snapshotter: spec.snapshotter.clone(),
            folder,
            streams,
            pid,
        })
    }

    /// Makes and starts it.
    pub async fn run(test: &Test, spec: &PlainSpec) -> Result<Self> {
        let plain = Self::create(test, spec).await?;
        plain.start().await?;
        Ok(plain)
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Starts the first process.
    pub async fn start(&self) -> Result<()> {
        let message = StartRequest {
            container_id: self.id.clone(),
            exec_id: String::new(),
        };
        self.client
            .tasks()
            .start(call(message)?)
            .await
            .context("tasks.start")?;
        Ok(())
    }

    /// The first process's state.
    pub async fn state(&self) -> Result<Process> {
        let message = GetRequest {
            container_id: self.id.clone(),
            exec_id: String::new(),
        };
        let answer = self
            .client
            .tasks()
            .get(call(message)?)
            .await
            .context("tasks.get")?;
        answer
            .into_inner()
            .process
            .context("tasks.get sent no process")
    }

    /// Waits for a process's end: its exit status. An empty id is the first process.
    pub async fn wait(&self, exec_id: &str) -> Result<u32> {
        let message = WaitRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        };
        let answer = self
            .client
            .tasks()
            .wait(call(message)?)
            .await
            .context("tasks.wait")?;
        Ok(answer.into_inner().exit_status)
    }

    /// Sends a signal to a process, or to all of the container.
    pub async fn kill(&self, exec_id: &str, signal: i32, all: bool) -> Result<()> {
        let message = KillRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            signal: signal.unsigned_abs(),
            all,
        };
        self.client
            .tasks()
            .kill(call(message)?)
            .await
            .context("tasks.kill")?;
        Ok(())
    }

    /// Says that no more comes on standard input.
    pub async fn close_stdin(&self, exec_id: &str, streams: &Streams) -> Result<()> {
        streams.close_input();
        let message = CloseIoRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            stdin: true,
        };
        self.client
            .tasks()
            .close_io(call(message)?)
            .await
            .context("tasks.close_io")?;
        Ok(())
    }

    /// Sets the size of a process's terminal.
    pub async fn resize(&self, exec_id: &str, width: u32, height: u32) -> Result<()> {
        let message = ResizePtyRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            width,
            height,
        };
        self.client
            .tasks()
            .resize_pty(call(message)?)
            .await
            .context("tasks.resize_pty")?;
        Ok(())
    }

    /// Adds a process to the container and starts it.
    pub async fn exec(&self, exec_id: &str, spec: &PlainSpec) -> Result<Streams> {
        let streams = Streams::new(&self.folder, &format!("{}-{exec_id}", self.id), spec)?;
        let (stdin, stdout, stderr) = streams.paths();
        let message = ExecProcessRequest {
            container_id: self.id.clone(),
            stdin,
            stdout,
            stderr,
            terminal: spec.terminal,
            spec: Some(any("Process", &spec.process())),
            exec_id: exec_id.to_owned(),
        };
        self.client
            .tasks()
            .exec(call(message)?)
            .await
            .context("tasks.exec")?;
        let message = StartRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        };
        self.client
            .tasks()
            .start(call(message)?)
            .await
            .context("tasks.start of an exec")?;
        Ok(streams)
    }

    /// Removes a finished exec.
    pub async fn delete_exec(&self, exec_id: &str) -> Result<DeleteResponse> {
        let message = DeleteProcessRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        };
        let answer = self.client.tasks().delete_process(call(message)?).await;
        Ok(answer.context("tasks.delete_process")?.into_inner())
    }

    /// Ids of all its processes.
    pub async fn pids(&self) -> Result<Vec<u32>> {
        let message = ListPidsRequest {
            container_id: self.id.clone(),
        };
        let answer = self.client.tasks().list_pids(call(message)?).await;
        let processes = answer.context("tasks.list_pids")?.into_inner().processes;
        Ok(processes.into_iter().map(|process| process.pid).collect())
    }

    /// Freezes its processes.
    pub async fn pause(&self) -> Result<()> {
        let message = PauseTaskRequest {
            container_id: self.id.clone(),
        };
        self.client
            .tasks()
            .pause(call(message)?)
            .await
            .context("tasks.pause")?;
        Ok(())
    }

    /// Lets them go on.
    pub async fn resume(&self) -> Result<()> {
        let message = ResumeTaskRequest {
            container_id: self.id.clone(),
        };
        self.client
            .tasks()
            .resume(call(message)?)
            .await
            .context("tasks.resume")?;
        Ok(())
    }

    /// Removes the task, which must have ended: what containerd says of its end.
    pub async fn delete(&self) -> Result<DeleteResponse> {
        let message = DeleteTaskRequest {
            container_id: self.id.clone(),
        };
        let answer = self.client.tasks().delete(call(message)?).await;
        Ok(answer.context("tasks.delete")?.into_inner())
    }

    /// Removes all of it, now and not at the test's end.
    pub async fn remove(&self) -> Result<()> {
        remove(&self.client, &self.id, &self.snapshotter).await
    }
}

/// A snapshot on top of the image, which is there already.
async fn prepare_rootfs(client: &Client, id: &str, spec: &PlainSpec) -> Result<Vec<Mount>> {
    let message = PrepareSnapshotRequest {
        snapshotter: spec.snapshotter.clone(),
        key: id.to_owned(),
        parent: top_layer(client, spec).await?,
        // Until the container is made nothing refers to it, and containerd's garbage collection would take it.
        labels: HashMap::from([("containerd.io/gc.root".to_owned(), id.to_owned())]),
    };
    Ok(client
        .snapshots()
        .prepare(call(message)?)
        .await?
        .into_inner()
        .mounts)
}

/// Name of the image's uppermost snapshot: a label of its configuration has it.
async fn top_layer(client: &Client, spec: &PlainSpec) -> Result<String> {
    let message = GetImageRequest {
        name: spec.image.clone(),
    };
    let image = client
        .images()
        .get(call(message)?)
        .await?
        .into_inner()
        .image;
    let target = image
        .and_then(|image| image.target)
        .context("an image without a target")?;
    let manifest = read_content(client, &target.digest).await?;
    let manifest: Value = serde_json::from_slice(&manifest)?;
    let config = manifest["config"]["digest"]
        .as_str()
        .context("a manifest without config")?;
    let message = containerd_client::services::v1::InfoRequest {
        digest: config.to_owned(),
    };
    let info = client
        .content()
        .info(call(message)?)
        .await?
        .into_inner()
        .info;
    let labels = info.map(|info| info.labels).unwrap_or_default();
    let label = format!("containerd.io/gc.ref.snapshot.{}", spec.snapshotter);
    labels
        .get(&label)
        .cloned()
        .with_context(|| format!("{} is not unpacked for {}", spec.image, spec.snapshotter))
}

async fn read_content(client: &Client, digest: &str) -> Result<Vec<u8>> {
    let message = ReadContentRequest {
        digest: digest.to_owned(),
        offset: 0,
        size: 0,
    };
    let mut stream = client.content().read(call(message)?).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(piece) = stream.message().await? {
        bytes.extend_from_slice(&piece.data);
    }
    Ok(bytes)
}

fn unless_gone<T>(answer: Result<T, Status>) -> Result<(), Status> {
    match answer {
        Err(status) if status.code() != Code::NotFound => Err(status),
        _ => Ok(()),
    }
}

/// How often a removal that fails is tried again.
const REMOVALS: u32 = 20;

/// Removes the plain containers of one run of a test, or of all.
pub(crate) async fn remove_all(client: &Client, run: Option<&str>) -> Result<()> {
    let message = ListContainersRequest {
        filters: Vec::new(),
    };
    let list = client
        .containers()
        .list(call(message)?)
        .await?
        .into_inner()
        .containers;
    for container in list {
        let ours = match (container.labels.get(LABEL), run) {
            (Some(label), Some(run)) => label == run,
            (label, _) => label.is_some() && run.is_none(),
        };
        if ours {
            remove_in_the_end(client, &container)
                .await
                .with_context(|| format!("cannot remove container {}", container.id))?;
        }
    }
    Ok(())
}

/// Where a shim was killed, containerd may need a moment to see it.
async fn remove_in_the_end(client: &Client, container: &Container) -> Result<()> {
    let (id, snapshotter) = (&container.id, &container.snapshotter);
    for _ in 0..REMOVALS {
        match remove(client, id, snapshotter).await {
            Ok(()) => return Ok(()),
            Err(_) => tokio::time::sleep(Duration::from_millis(500)).await,
        }
    }
    remove(client, id, snapshotter).await
}

/// Removes a container's snapshot, if there is one. One whose container was never made, because containerd was killed in
/// between, is kept by its label and named by nothing else.
pub(crate) async fn remove_snapshot(client: &Client, id: &str) -> Result<()> {
    let message = RemoveSnapshotRequest {
        snapshotter: SNAPSHOTTER.to_owned(),
        key: id.to_owned(),
    };
    Ok(unless_gone(
        client.snapshots().remove(call(message)?).await,
    )?)
}

/// Makes an empty snapshot that stays until it is removed.
pub(crate) async fn keep_snapshot(client: &Client, key: &str) -> Result<()> {
    let message = PrepareSnapshotRequest {
        snapshotter: SNAPSHOTTER.to_owned(),
        key: key.to_owned(),
        labels: HashMap::from([("containerd.io/gc.root".to_owned(), key.to_owned())]),
        ..Default::default()
    };
    client.snapshots().prepare(call(message)?).await?;
    Ok(())
}

async fn remove(client: &Client, id: &str, snapshotter: &str) -> Result<()> {
    let container_id = id.to_owned();
    let kill = KillRequest {
        container_id: container_id.clone(),
        signal: libc::SIGKILL.unsigned_abs(),
        all: true,
        ..Default::default()
    };
    // An ended task, or none at all, cannot be killed and need not be.
    let _ = client.tasks().kill(call(kill)?).await;
    let wait = WaitRequest {
        container_id: container_id.clone(),
        exec_id: String::new(),
    };
    unless_gone(client.tasks().wait(call(wait)?).await).context("tasks.wait")?;
    let message = DeleteTaskRequest {
        container_id: container_id.clone(),
    };
    unless_gone(client.tasks().delete(call(message)?).await).context("tasks.delete")?;
    let message = DeleteContainerRequest {
        id: container_id.clone(),
    };
    unless_gone(client.containers().delete(call(message)?).await)?;
    let message = RemoveSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        key: container_id,
    };
    unless_gone(client.snapshots().remove(call(message)?).await)?;
    Ok(())
}

/// Plain containers and all tasks, in words.
pub(crate) async fn describe(client: &Client) -> Result<String> {
    let mut text = String::new();
    for namespace in [PLAIN_NAMESPACE, crate::api::CRI_NAMESPACE] {
        let message = request(
            namespace,
            ListTasksRequest {
                filter: String::new(),
            },
        )?;
        for task in client.tasks().list(message).await?.into_inner().tasks {
            writeln!(text, "{namespace}: {task:?}")?;
        }
    }
    let message = ListContainersRequest {
        filters: Vec::new(),
    };
    for container in client
        .containers()
        .list(call(message)?)
        .await?
        .into_inner()
        .containers
    {
        writeln!(
            text,
            "{PLAIN_NAMESPACE}: {} {:?}",
            container.id, container.labels
        )?;
    }
    Ok(text)
}
