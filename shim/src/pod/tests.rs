//! The state machine against a scripted μVM: it answers what it is told to and keeps a list of what
//! it was asked, so that tests choose the order in which things happen.

mod on_node;
mod writes;

use super::*;
use crate::stand_in::StandIn;
use crate::uvm::{End, Guest, GuestDisk, GuestEvent, Written};
use async_trait::async_trait;
use containerd_shim_protos::api::{Empty, ForwardRequest, Mount};
use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::shim_async::{Events, create_events};
use kiln_agent_api::proto;
use kiln_agent_api::stream::{Header, Kind as StreamKind};
use kiln_uvm::guest::GuestError;
use kiln_uvm::share::Volume;
use kiln_uvm::size::Size;
use kiln_uvm::timeline::Timeline;
use protobuf::Message;
use serde_json::json;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc};
use ttrpc::asynchronous::{Server, TtrpcContext};

const SECOND: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Scripted {
    calls: Mutex<Vec<String>>,
    /// Which PID namespace each container was to be in.
    pid_namespaces: Mutex<Vec<(String, String)>>,
    exits: Mutex<HashMap<String, watch::Sender<Option<u32>>>>,
    streams: Mutex<HashMap<String, UnixStream>>,
    /// Calls that fail.
    failing: Mutex<Vec<&'static str>>,
    dead: watch::Sender<bool>,
    /// Why it is dead, if it is.
    out_of_memory: Mutex<bool>,
    /// What its guest said last.
    console: Mutex<Vec<String>>,
    /// `start` returns only when it may.
    hold_start: Mutex<Option<Arc<Notify>>>,
    events: tokio::sync::Mutex<Option<mpsc::Receiver<GuestEvent>>>,
    written: Mutex<Written>,
}

impl Scripted {
    fn call(&self, name: &'static str, detail: &str) -> Result<()> {
        self.calls
            .lock()
            .unwrap()
            .push(format!("{name} {detail}").trim_end().to_owned());
        if *self.dead.borrow() {
            return Err(Error::Unavailable("the μVM has ended".into()));
        }
        if self.failing.lock().unwrap().contains(&name) {
            return Err(Error::failed(name, "told to fail"));
        }
        Ok(())
    }

    fn ask(&self, name: &'static str, detail: &str) -> Result<(), GuestError> {
        self.call(name, detail).map_err(|error| match error {
            Error::Unavailable(_) => gone(),
            error => GuestError::Refused {
                what: name.to_owned(),
                kind: kiln_agent_api::RefusalKind::REFUSAL_FAILED,
                text: error.chain(),
            },
        })
    }

    fn exit_of(&self, container: &str, exec: &str) -> watch::Sender<Option<u32>> {
        let key = format!("{container}/{exec}");
        self.exits
            .lock()
            .unwrap()
            .entry(key)
            .or_insert_with(|| watch::channel(None).0)
            .clone()
    }

    fn end(&self, container: &str, exec: &str, status: u32) {
        self.exit_of(container, exec).send_replace(Some(status));
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    fn was_called(&self, call: &str) -> bool {
        self.calls().iter().any(|c| c == call)
    }

    fn fail(&self, call: &'static str) {
        self.failing.lock().unwrap().push(call);
    }
}

fn gone() -> GuestError {
    GuestError::Gone {
        what: "be asked".into(),
        why: "the μVM has ended".into(),
    }
}

#[async_trait]
impl Guest for Scripted {
    async fn create(
        &self,
        r: proto::CreateContainerRequest,
        _: &Timeline,
    ) -> Result<(), GuestError> {
        use proto::PidNamespace as Namespace;
        let namespace = match r.pid_namespace.enum_value_or_default() {
            Namespace::PID_OWN => "own".to_owned(),
            Namespace::PID_POD => "pod".to_owned(),
            Namespace::PID_CONTAINER => r.pid_namespace_container.clone(),
        };
        let asked = (r.container_id.clone(), namespace);
        self.pid_namespaces.lock().unwrap().push(asked);
        self.ask("create", &r.container_id)
    }
    async fn start(&self, container: &str, _: &Timeline) -> Result<(), GuestError> {
        let hold = self.hold_start.lock().unwrap().clone();
        if let Some(hold) = hold {
            hold.notified().await;
        }
        self.ask("start", container)
    }
    async fn exec(&self, r: proto::ExecRequest) -> Result<(), GuestError> {
        self.ask("exec", &r.exec_id)
    }
    async fn kill(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        _: bool,
    ) -> Result<(), GuestError> {
        self.ask("kill", &format!("{container}/{exec} {signal}"))
    }
    async fn wait(&self, container: &str, exec: &str) -> Result<proto::ExitStatus, GuestError> {
        let mut exit = self.exit_of(container, exec).subscribe();
        let mut dead = self.dead.subscribe();
        tokio::select! {
            status = exit.wait_for(Option::is_some) => {
                Ok(proto::ExitStatus {
                    exit_code: status.unwrap().unwrap(),
                    exited_at_ns: 1,
                    ..Default::default()
                })
            }
            _ = dead.wait_for(|d| *d) => Err(gone()),
        }
    }
    async fn pause(&self, container: &str) -> Result<(), GuestError> {
        self.ask("pause", container)
    }
    async fn unpause(&self, container: &str) -> Result<(), GuestError> {
        self.ask("unpause", container)
    }
    async fn update(&self, container: &str, _: Vec<u8>) -> Result<(), GuestError> {
        self.ask("update", container)
    }
    async fn stats(&self, container: &str) -> Result<proto::StatsResponse, GuestError> {
        self.ask("stats", container)
            .map(|()| proto::StatsResponse::new())
    }
    async fn pids(&self, _: &str) -> Result<Vec<u32>, GuestError> {
        Ok(vec![12, 7])
    }
    async fn network(&self) -> Result<proto::NetworkState, GuestError> {
        Ok(proto::NetworkState::new())
    }
    async fn resize_tty(
        &self,
        container: &str,
        _: &str,
        (w, h): (u32, u32),
    ) -> Result<(), GuestError> {
        self.ask("resize_tty", &format!("{container} {w}x{h}"))
    }
    async fn delete(&self, container: &str, exec: &str) -> Result<(), GuestError> {
        self.end(container, exec, 137);
        self.ask("delete", &format!("{container}/{exec}"))
    }
    async fn stream(&self, header: &Header) -> Result<UnixStream, GuestError> {
        let name = match header.kind {
            StreamKind::Stdin => "stdin",
            StreamKind::Stdout => "stdout",
            _ => "stderr",
        };
        self.ask("stream", name)?;
        let (ours, guests) = UnixStream::pair().unwrap();
        self.streams.lock().unwrap().insert(name.to_owned(), guests);
        Ok(ours)
    }
    async fn write_file(&self, path: String, _: String) -> Result<(), GuestError> {
        self.ask("write", &path)
    }
    async fn mount(&self, mounts: Vec<proto::Mount>) -> Result<(), GuestError> {
        let targets: Vec<_> = mounts.into_iter().map(|mount| mount.target).collect();
        self.ask("mount", &targets.join(" "))
    }
    async fn written(&self, _: &[String]) -> Result<proto::WrittenResponse, GuestError> {
        unreachable!("pods ask the μVM, which knows the host's share")
    }
}

#[async_trait]
impl Uvm for Scripted {
    fn stand_in(&self, id: &str) -> Result<StandIn> {
        StandIn::start(id, None)
    }
    fn keep_trace(&self, container: &str, name: &str, timeline: &Timeline) {
        let steps = timeline.steps();
        let steps: Vec<_> = steps.iter().map(|step| &*step.name).collect();
        let _ = self.call("trace", &format!("{container} {name}: {}", steps.join(" ")));
    }
    async fn written(&self, containers: &[String]) -> Result<Written> {
        self.call("written", &containers.join(" "))?;
        Ok(self.written.lock().unwrap().clone())
    }
    fn spill(&self) -> Option<Arc<File>> {
        None
    }
    fn guest(&self) -> &dyn Guest {
        self
    }
    async fn grown(&self) -> Result<()> {
        Ok(())
    }
    fn forget_trace(&self, _: &str) {}
    async fn next_event(&self) -> Option<GuestEvent> {
        match self.events.lock().await.as_mut() {
            Some(events) => events.recv().await,
            None => std::future::pending().await,
        }
    }
    fn share(&self, volume: &Volume) -> Result<String> {
        self.call("share", &volume.source.display().to_string())?;
        Ok("/run/kiln/shared/0".into())
    }
    fn unshare(&self, volume: &Volume) {
        let call = format!("unshare {}", volume.source.display());
        self.calls.lock().unwrap().push(call);
    }
    async fn attach_disk(&self, _: File, read_only: bool) -> Result<GuestDisk> {
        self.call("attach", if read_only { "ro" } else { "rw" })?;
        Ok(GuestDisk {
            slot: 0,
            path: "/dev/vda".into(),
            size: 4096,
        })
    }
    async fn detach_disk(&self, disk: &GuestDisk) -> Result<()> {
        self.call("detach", &disk.path)
    }
    async fn resize(&self, size: Size) -> Result<()> {
        self.call("resize", &format!("{} {}", size.cpus, size.memory >> 20))
    }
    async fn stop(&self) {
        self.calls.lock().unwrap().push("stop".into());
        self.dead.send_replace(true);
    }
    fn set_oom_score(&self, score: i32) -> Result<()> {
        self.call("oom-score", &score.to_string())
    }
    async fn ended(&self) -> End {
        let _ = self.dead.subscribe().wait_for(|d| *d).await;
        End {
            reason: "told to".into(),
            out_of_memory: *self.out_of_memory.lock().unwrap(),
            wanted: false,
            console: self.console.lock().unwrap().clone(),
        }
    }
}

struct ScriptedLauncher {
    uvm: Arc<Scripted>,
    setups: Mutex<Vec<PodSetup>>,
}

#[async_trait]
impl Launcher for ScriptedLauncher {
    async fn launch(&self, setup: &PodSetup) -> Result<Arc<dyn Uvm>> {
        self.setups.lock().unwrap().push(setup.clone());
        self.uvm.call("launch", &setup.id)?;
        Ok(self.uvm.clone())
    }
}

/// containerd's side of the events: their topics, and these with the container where a test wants to know it.
#[derive(Default)]
struct Sink(Mutex<Vec<String>>, Mutex<Vec<String>>);

#[async_trait]
impl Events for Sink {
    async fn forward(&self, _: &TtrpcContext, r: ForwardRequest) -> ttrpc::Result<Empty> {
        let topic = r.envelope.topic.trim_start_matches("/tasks/").to_owned();
        let value = &r.envelope.event.value;
        let container = match topic.as_str() {
            "oom" => TaskOOM::parse_from_bytes(value).unwrap().container_id,
            "exit" => TaskExit::parse_from_bytes(value).unwrap().container_id,
            _ => String::new(),
        };
        self.1.lock().unwrap().push(format!("{topic} {container}"));
        self.0.lock().unwrap().push(topic);
        Ok(Empty::new())
    }
}

struct Bed {
    pod: Arc<Pod>,
    uvm: Arc<Scripted>,
    launcher: Arc<ScriptedLauncher>,
    sink: Arc<Sink>,
    publisher: Publisher,
    dir: TempDir,
    _server: Server,
}

impl Bed {
    async fn new(id: &str) -> Self {
        Self::with_events(id, None).await
    }

    async fn with_events(id: &str, events: Option<mpsc::Receiver<GuestEvent>>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("events.sock");
        let sink = Arc::new(Sink::default());
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .unwrap()
            .register_service(create_events(sink.clone()));
        server.start().await.unwrap();
        let publisher = Publisher::start(socket.to_str().unwrap(), "n");
        let uvm = Arc::new(Scripted {
            events: tokio::sync::Mutex::new(events),
            ..Default::default()
        });
        let launcher = Arc::new(ScriptedLauncher {
            uvm: Arc::clone(&uvm),
            setups: Mutex::default(),
        });
        let config = Config {
            store: dir.path().join("store"),
            max_cpus: 8,
            ..Config::default()
        };
        let pod = Pod::new(id, config, publisher.clone(), launcher.clone());
        Self {
            pod,
            uvm,
            launcher,
            sink,
            publisher,
            dir,
            _server: server,
        }
    }

    fn bundle(&self, id: &str, kind: Option<&str>) -> PathBuf {
        self.bundle_with(id, kind, &json!({}))
    }

    /// A bundle whose first process is described by `process`.
    fn bundle_with(&self, id: &str, kind: Option<&str>, process: &serde_json::Value) -> PathBuf {
        let bundle = self.dir.path().join(id);
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let mut annotations = json!({});
        if let Some(kind) = kind {
            annotations["io.kubernetes.cri.container-type"] = kind.into();
            annotations["io.kubernetes.cri.sandbox-id"] = "sb".into();
        }
        let spec = json!({
            "annotations": annotations,
            "process": process,
            "linux": {
                "cgroupsPath": "/kubepods/burstable/pod1/sb",
                "namespaces": [{"type": "network", "path": "/run/netns/x"}, {"type": "pid"},
                               {"type": "ipc"}, {"type": "uts"}],
                "resources": {"cpu": {"quota": 100_000, "period": 100_000},
                              "memory": {"limit": 128 << 20}},
            },
        });
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    async fn create(&self, id: &str, kind: Option<&str>) -> Result<u32> {
        self.create_with(id, kind, StdioPaths::default()).await
    }

    async fn create_with(&self, id: &str, kind: Option<&str>, stdio: StdioPaths) -> Result<u32> {
        self.create_on(id, kind, stdio, vec![]).await
    }

    async fn create_on(
        &self,
        id: &str,
        kind: Option<&str>,
        stdio: StdioPaths,
        rootfs: Vec<Mount>,
    ) -> Result<u32> {
        self.create_from(self.bundle(id, kind), id, stdio, rootfs)
            .await
    }

    async fn create_from(
        &self,
        bundle: PathBuf,
        id: &str,
        stdio: StdioPaths,
        rootfs: Vec<Mount>,
    ) -> Result<u32> {
        self.pod
            .create(CreateTask {
                id: id.into(),
                bundle,
                rootfs,
                stdio,
            })
            .await
    }

    async fn events(&self) -> Vec<String> {
        assert!(self.publisher.flush(5 * SECOND).await);
        self.sink.0.lock().unwrap().clone()
    }

    fn fifo(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path
    }
}

use crate::stdio::StdioPaths;

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_lone_container_lives_and_leaves_nothing() {
    let bed = Bed::new("c").await;
    let pid = bed.create("c", None).await.unwrap();
    assert_eq!(bed.pod.state("c", "").unwrap().phase, Phase::Created);
    bed.pod.start("c", "").await.unwrap();
    let steps = "create host.volumes host.image.make vmm.plug-root guest.stdio start guest.grown";
    assert!(bed.uvm.was_called(&format!("trace c c: {steps}")));
    bed.uvm.end("c", "", 3);
    assert_eq!(bed.pod.wait("c", "").await.unwrap().status, 3);
    let (deleted, exit) = bed.pod.delete("c", "").await.unwrap();
    assert_eq!((deleted, exit.status), (pid, 3));
    assert_eq!(bed.events().await, ["create", "start", "exit", "delete"]);
    assert!(
        bed.uvm.was_called("detach /dev/vda"),
        "{:?}",
        bed.uvm.calls()
    );
    assert!(bed.uvm.was_called("stop"));
    bed.pod.shutdown_if_idle();
    tokio::time::timeout(SECOND, bed.pod.until_shutdown())
        .await
        .unwrap();
}

#[tokio::test]
async fn exit_of_a_process_that_ends_during_start_is_told_after_the_start() {
    let bed = Bed::new("c").await;
    bed.create("c", None).await.unwrap();
    let hold = Arc::new(Notify::new());
    *bed.uvm.hold_start.lock().unwrap() = Some(Arc::clone(&hold));
    let start = {
        let pod = Arc::clone(&bed.pod);
        tokio::spawn(async move { pod.start("c", "").await })
    };
    tokio::task::yield_now().await;
    bed.uvm.end("c", "", 0);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(bed.pod.state("c", "").unwrap().exit, None);
    hold.notify_one();
    start.await.unwrap().unwrap();
    bed.pod.wait("c", "").await.unwrap();
    assert_eq!(bed.events().await, ["create", "start", "exit"]);
    assert_eq!(bed.pod.state("c", "").unwrap().phase, Phase::Stopped);
}

#[tokio::test]
async fn execs_end_before_their_container() {
    let bed = Bed::new("c").await;
    bed.create("c", None).await.unwrap();
    bed.pod.start("c", "").await.unwrap();
    bed.pod
        .exec("c", "e1", StdioPaths::default(), b"{}")
        .unwrap();
    bed.pod.start("c", "e1").await.unwrap();
    bed.pod
        .exec("c", "e2", StdioPaths::default(), b"{}")
        .unwrap();
    bed.pod.start("c", "e2").await.unwrap();
    bed.uvm.end("c", "e1", 1);
    assert_eq!(bed.pod.wait("c", "e1").await.unwrap().status, 1);
    // e2 never answers its kill: it is told as killed, and before the container.
    bed.uvm.end("c", "", 0);
    assert_eq!(bed.pod.wait("c", "").await.unwrap().status, 0);
    assert_eq!(bed.pod.wait("c", "e2").await.unwrap().status, 137);
    assert!(bed.uvm.was_called("kill c/e2 9"));
    assert_eq!(
        bed.events().await,
        [
            "create",
            "start",
            "exec-added",
            "exec-started",
            "exec-added",
            "exec-started",
            "exit",
            "exit",
            "exit"
        ]
    );
}

#[tokio::test]
async fn exec_rules() {
    let bed = Bed::new("c").await;
    bed.create("c", None).await.unwrap();
    bed.pod
        .exec("c", "e", StdioPaths::default(), b"{}")
        .unwrap();
    let again = bed.pod.exec("c", "e", StdioPaths::default(), b"{}");
    assert!(matches!(again, Err(Error::AlreadyExists(_))));
    let early = bed.pod.start("c", "e").await;
    assert!(
        matches!(early, Err(Error::FailedPrecondition(_))),
        "container not running"
    );
    assert!(matches!(
        bed.pod.start("c", "no").await,
        Err(Error::NotFound(_))
    ));
    // Never started: deleted without the guest knowing of it.
    bed.pod.delete("c", "e").await.unwrap();
    assert!(!bed.uvm.calls().iter().any(|c| c == "delete c/e"));
    assert!(matches!(bed.pod.state("c", "e"), Err(Error::NotFound(_))));
}

#[tokio::test]
async fn running_container_is_not_deleted_and_an_ended_one_not_killed() {
    let bed = Bed::new("c").await;
    bed.create("c", None).await.unwrap();
    bed.pod.start("c", "").await.unwrap();
    assert!(matches!(
        bed.pod.delete("c", "").await,
        Err(Error::FailedPrecondition(_))
    ));
    assert!(matches!(
        bed.pod.start("c", "").await,
        Err(Error::FailedPrecondition(_))
    ));
    bed.uvm.end("c", "", 0);
    bed.pod.wait("c", "").await.unwrap();
    assert!(matches!(
        bed.pod.kill("c", "", 15, false).await,
        Err(Error::NotFound(_))
    ));
}

#[tokio::test]
async fn container_that_was_never_started_can_be_deleted() {
    let bed = Bed::new("c").await;
    bed.create("c", None).await.unwrap();
    let (_, exit) = bed.pod.delete("c", "").await.unwrap();
    assert_eq!(exit.status, 137);
    assert_eq!(bed.events().await, ["create", "delete"]);
}

#[tokio::test]
async fn pod_of_cri_shares_one_uvm_and_ends_with_its_sandbox() {
    let bed = Bed::new("sb").await;
    let early = bed.create("c1", Some("container")).await;
    assert!(
        matches!(early, Err(Error::FailedPrecondition(_))),
        "no sandbox yet"
    );
    bed.create("sb", Some("sandbox")).await.unwrap();
    bed.pod.start("sb", "").await.unwrap();
    for id in ["c1", "c2"] {
        bed.create(id, Some("container")).await.unwrap();
        bed.pod.start(id, "").await.unwrap();
    }
    assert_eq!(bed.launcher.setups.lock().unwrap().len(), 1);
    // The sandbox runs nothing in the guest.
    assert!(
        !bed.uvm
            .calls()
            .iter()
            .any(|c| c.ends_with(" sb") && !c.starts_with("launch"))
    );
    bed.uvm.end("c1", "", 0);
    bed.pod.wait("c1", "").await.unwrap();
    bed.pod.delete("c1", "").await.unwrap();
    bed.pod.shutdown_if_idle();
    let idle = tokio::time::timeout(Duration::from_millis(50), bed.pod.until_shutdown()).await;
    assert!(idle.is_err(), "a pod with containers must not shut down");

    bed.pod.kill("sb", "", 9, false).await.unwrap();
    assert_eq!(bed.pod.wait("sb", "").await.unwrap().status, 137);
    // The μVM goes with its sandbox, and takes c2 along.
    assert_eq!(bed.pod.wait("c2", "").await.unwrap().status, 137);
    bed.pod.delete("c2", "").await.unwrap();
    bed.pod.delete("sb", "").await.unwrap();
    bed.pod.shutdown_if_idle();
    tokio::time::timeout(SECOND, bed.pod.until_shutdown())
        .await
        .unwrap();
}

#[tokio::test]
async fn shim_ends_with_its_last_container_if_the_sandbox_was_deleted_before() {
    let bed = Bed::new("sb").await;
    bed.create("sb", Some("sandbox")).await.unwrap();
    bed.pod.start("sb", "").await.unwrap();
    bed.create("c", Some("container")).await.unwrap();
    bed.pod.start("c", "").await.unwrap();
    bed.uvm.dead.send_replace(true);
    for id in ["sb", "c"] {
        bed.pod.wait(id, "").await.unwrap();
    }
    // The μVM died, and containerd took up the sandbox's end first. It asks for the shim's end only then.
    bed.pod.delete("sb", "").await.unwrap();
    bed.pod.shutdown_if_idle();
    let idle = tokio::time::timeout(Duration::from_millis(50), bed.pod.until_shutdown()).await;
    assert!(idle.is_err(), "a container is still there");
    bed.pod.delete("c", "").await.unwrap();
    tokio::time::timeout(SECOND, bed.pod.until_shutdown())
        .await
        .unwrap();
}

#[tokio::test]
async fn end_of_the_uvm_ends_everything_once() {
    let bed = Bed::new("sb").await;
    bed.create("sb", Some("sandbox")).await.unwrap();
    bed.pod.start("sb", "").await.unwrap();
    bed.create("c", Some("container")).await.unwrap();
    bed.pod.start("c", "").await.unwrap();
    bed.uvm.dead.send_replace(true);
    for id in ["sb", "c"] {
        let wait = tokio::time::timeout(SECOND, bed.pod.wait(id, ""));
        assert_eq!(wait.await.unwrap().unwrap().status, 137);
    }
    for id in ["c", "sb"] {
        bed.pod.delete(id, "").await.unwrap();
    }
    let events = bed.events().await;
    assert_eq!(
        events.iter().filter(|e| *e == "exit").count(),
        2,
        "{events:?}"
    );
}

#[tokio::test]
async fn failed_create_undoes_what_it_did() {
    for failing in ["create", "stream", "attach"] {
        let bed = Bed::new("c").await;
        bed.uvm.fail(failing);
        let out = bed.fifo("out");
        let _reader = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&out)
            .unwrap();
        let stdio = StdioPaths {
            stdout: text(&out),
            ..Default::default()
        };
        assert!(
            bed.create_with("c", None, stdio).await.is_err(),
            "{failing}"
        );
        assert!(matches!(bed.pod.state("c", ""), Err(Error::NotFound(_))));
        let attached = bed.uvm.was_called("attach ro") && failing != "attach";
        assert_eq!(bed.uvm.was_called("detach /dev/vda"), attached, "{failing}");
        assert_eq!(bed.uvm.was_called("delete c/"), failing == "stream");
        assert!(bed.events().await.is_empty());
    }
}

#[tokio::test]
async fn output_is_complete_when_delete_returns_and_input_arrives() {
    let bed = Bed::new("c").await;
    let (out, input) = (bed.fifo("out"), bed.fifo("in"));
    let reader = {
        let out = out.clone();
        std::thread::spawn(move || {
            let mut all = String::new();
            File::open(out).unwrap().read_to_string(&mut all).unwrap();
            all
        })
    };
    let stdio = StdioPaths {
        stdin: text(&input),
        stdout: text(&out),
        ..Default::default()
    };
    bed.create_with("c", None, stdio).await.unwrap();
    bed.pod.start("c", "").await.unwrap();
    let mut client = std::fs::OpenOptions::new()
        .write(true)
        .open(&input)
        .unwrap();
    client.write_all(b"ping").unwrap();
    drop(client);
    bed.pod.close_stdin("c", "").unwrap();
    let (mut stdin, mut stdout) = {
        let mut streams = bed.uvm.streams.lock().unwrap();
        (
            streams.remove("stdin").unwrap(),
            streams.remove("stdout").unwrap(),
        )
    };
    let mut got = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut stdin, &mut got)
        .await
        .unwrap();
    assert_eq!(got, "ping");
    tokio::io::AsyncWriteExt::write_all(&mut stdout, b"pong")
        .await
        .unwrap();
    bed.uvm.end("c", "", 0);
    bed.pod.wait("c", "").await.unwrap();
    drop(stdout);
    bed.pod.delete("c", "").await.unwrap();
    assert_eq!(reader.join().unwrap(), "pong");
}

#[tokio::test]
async fn oom_is_told_for_containers_that_are_known() {
    let (tell, events) = mpsc::channel(9);
    let bed = Bed::with_events("c", Some(events)).await;
    bed.create("c", None).await.unwrap();
    for container in ["stranger", "c"] {
        let container = container.to_owned();
        tell.send(GuestEvent::Oom { container }).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(bed.events().await, ["create", "oom"]);
}

#[tokio::test]
async fn pause_and_resume_are_told_and_kept_in_order() {
    let bed = Bed::new("c").await;
    bed.create("c", None).await.unwrap();
    assert!(matches!(
        bed.pod.pause("c").await,
        Err(Error::FailedPrecondition(_))
    ));
    bed.pod.start("c", "").await.unwrap();
    bed.pod.pause("c").await.unwrap();
    assert_eq!(bed.pod.state("c", "").unwrap().phase, Phase::Paused);
    bed.pod.resume("c").await.unwrap();
    assert_eq!(bed.events().await, ["create", "start", "paused", "resumed"]);
}

#[tokio::test]
async fn uvm_grows_before_limits_and_shrinks_after_them() {
    let bed = Bed::new("sb").await;
    bed.create("sb", Some("sandbox")).await.unwrap();
    bed.create("c", Some("container")).await.unwrap();
    bed.uvm.calls.lock().unwrap().clear();
    // The sandbox said nothing of limits, so the μVM has the default size: 1 CPU, 256 + 64 MiB.
    let more = br#"{"cpu":{"quota":200000,"period":100000},"memory":{"limit":536870912}}"#;
    bed.pod.update("c", more).await.unwrap();
    assert_eq!(bed.uvm.calls(), ["resize 2 576", "update c"]);
    bed.uvm.calls.lock().unwrap().clear();
    let less = br#"{"cpu":{"quota":100000,"period":100000},"memory":{"limit":134217728}}"#;
    bed.pod.update("c", less).await.unwrap();
    assert_eq!(bed.uvm.calls(), ["update c", "resize 1 192"]);
}

#[tokio::test]
async fn uvm_has_room_for_a_container_without_limits_beside_one_that_has_some() {
    let bed = Bed::new("sb").await;
    let bundle = |id: &str, kind: &str, edit: fn(&mut serde_json::Value)| {
        let bundle = bed.bundle(id, Some(kind));
        let path = bundle.join("config.json");
        let mut spec = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(&mut spec);
        std::fs::write(path, spec.to_string()).unwrap();
        bundle
    };
    let sandbox = bundle("sb", "sandbox", |spec| {
        spec["annotations"]["io.kubernetes.cri.sandbox-memory"] = "134217728".into();
    });
    let none = StdioPaths::default;
    bed.create_from(sandbox, "sb", none(), vec![])
        .await
        .unwrap();
    bed.create("limited", Some("container")).await.unwrap();
    assert!(
        !bed.uvm
            .calls()
            .iter()
            .any(|call| call.starts_with("resize"))
    );
    for id in ["free", "another"] {
        let free = bundle(id, "container", |spec| {
            spec["linux"]["resources"] = json!({})
        });
        bed.create_from(free, id, none(), vec![]).await.unwrap();
    }
    // What the sandbox said, the default once, and the guest's own.
    let calls = bed.uvm.calls();
    let resizes: Vec<_> = calls
        .iter()
        .filter(|call| call.starts_with("resize"))
        .collect();
    assert_eq!(resizes, ["resize 1 448"]);
}

#[tokio::test]
async fn refused_growth_leaves_the_limits_alone() {
    let bed = Bed::new("sb").await;
    bed.create("sb", Some("sandbox")).await.unwrap();
    bed.create("c", Some("container")).await.unwrap();
    bed.uvm.fail("resize");
    let more = br#"{"cpu":{"quota":200000,"period":100000}}"#;
    assert!(bed.pod.update("c", more).await.is_err());
    assert!(!bed.uvm.was_called("update c"));
}

fn sandbox_request() -> SandboxRequest {
    SandboxRequest {
        id: "sb".into(),
        netns: Some("/run/netns/x".into()),
        hostname: "web".into(),
        cgroup_parent: Some("/kubepods/p".into()),
        ..Default::default()
    }
}

#[tokio::test]
async fn sandbox_api_starts_stops_and_shuts_down() {
    let bed = Bed::new("sb").await;
    bed.pod.create_sandbox(sandbox_request()).unwrap();
    assert!(!bed.pod.sandbox_status("sb").unwrap().ready());
    assert!(bed.pod.start_sandbox("sb").await.unwrap().ready());
    let setup = bed.launcher.setups.lock().unwrap()[0].clone();
    assert_eq!(
        (setup.hostname.as_str(), setup.cgroup.as_deref()),
        ("web", Some("/kubepods/p/sb"))
    );
    bed.create("c", Some("container")).await.unwrap();
    bed.pod.start("c", "").await.unwrap();
    bed.pod.stop_sandbox("sb").await.unwrap();
    let exit = tokio::time::timeout(SECOND, bed.pod.wait_sandbox("sb"))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(exit.status, 0);
    assert_eq!(bed.pod.wait("c", "").await.unwrap().status, 137);
    bed.pod.delete("c", "").await.unwrap();
    bed.pod.shutdown_if_idle();
    let idle = tokio::time::timeout(Duration::from_millis(50), bed.pod.until_shutdown()).await;
    assert!(idle.is_err(), "the sandbox is still there");
    bed.pod.shutdown_sandbox("sb").await.unwrap();
    tokio::time::timeout(SECOND, bed.pod.until_shutdown())
        .await
        .unwrap();
}

#[tokio::test]
async fn host_network_is_refused_before_anything_is_started() {
    let bed = Bed::new("sb").await;
    let error = bed
        .pod
        .create_sandbox(SandboxRequest {
            netns: None,
            ..sandbox_request()
        })
        .unwrap_err();
    assert!(error.to_string().contains("hostNetwork"), "{error}");
    assert!(bed.uvm.calls().is_empty());
}

#[tokio::test]
async fn launch_ahead_is_the_launch_that_create_waits_for() {
    let bed = Bed::new("c").await;
    let spec = Spec::load(&bed.bundle("c", None)).unwrap();
    bed.pod.launch_ahead(&spec);
    bed.create("c", None).await.unwrap();
    assert_eq!(bed.launcher.setups.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn vmm_has_the_score_of_the_safest_live_container() {
    let bed = Bed::new("sb").await;
    let create = async |id: &str, kind, score: i32| {
        let bundle = bed.bundle_with(id, Some(kind), &json!({"oomScoreAdj": score}));
        let stdio = StdioPaths::default();
        bed.create_from(bundle, id, stdio, vec![]).await.unwrap();
    };
    create("sb", "sandbox", -998).await;
    assert_eq!(bed.launcher.setups.lock().unwrap()[0].oom_score_adj, 999);
    create("c1", "container", 900).await;
    create("c2", "container", 700).await;
    create("c3", "container", 800).await;
    bed.pod.start("c2", "").await.unwrap();
    bed.uvm.end("c2", "", 0);
    bed.pod.wait("c2", "").await.unwrap();
    for id in ["c2", "c3", "c1"] {
        bed.pod.delete(id, "").await.unwrap();
    }
    let scores: Vec<_> = bed
        .uvm
        .calls()
        .into_iter()
        .filter(|c| c.starts_with("oom"))
        .collect();
    let expected = [900, 700, 800, 900, 999].map(|score| format!("oom-score {score}"));
    assert_eq!(scores, expected);
}

#[tokio::test]
async fn vmm_killed_for_want_of_memory_is_an_oom_of_each_running_container_before_its_exit() {
    let bed = Bed::new("sb").await;
    bed.create("sb", Some("sandbox")).await.unwrap();
    bed.pod.start("sb", "").await.unwrap();
    for id in ["runs", "waits"] {
        bed.create(id, Some("container")).await.unwrap();
    }
    bed.pod.start("runs", "").await.unwrap();
    *bed.uvm.out_of_memory.lock().unwrap() = true;
    bed.uvm.dead.send_replace(true);
    for id in ["sb", "runs", "waits"] {
        let exit = tokio::time::timeout(5 * SECOND, bed.pod.wait(id, ""));
        assert_eq!(exit.await.unwrap().unwrap().status, 137);
    }
    let topics = bed.events().await;
    assert_eq!(topics.iter().filter(|topic| *topic == "oom").count(), 1);
    let told = bed.sink.1.lock().unwrap().clone();
    let place = |wanted: &str| told.iter().position(|event| event == wanted).unwrap();
    assert!(place("oom runs") < place("exit runs"), "{told:?}");
}
