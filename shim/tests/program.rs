//! The program as containerd runs it: its command line, standard input and output, its socket, and
//! what it leaves behind. No μVM is involved.

#![expect(
    clippy::unwrap_used,
    reason = "a test that can't go on should say where"
)]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    ConnectRequest, CreateTaskRequest, DeleteResponse, ShutdownRequest,
};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, Extension};
use containerd_shim_protos::sandbox_api::PlatformRequest;
use containerd_shim_protos::sandbox_sync::SandboxClient;
use containerd_shim_protos::shim_sync::{Client, TaskClient};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use tempfile::TempDir;
use ttrpc::context::with_timeout;

const TIMEOUT: i64 = 5_000_000_000;

/// A containerd without a containerd: bundles, a socket directory, and a configuration that keeps
/// everything in a temporary directory.
struct Bed {
    dir: TempDir,
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let config = format!(
            "store = {:?}\nstate_dir = {:?}\n",
            path("store"),
            path("state")
        );
        fs::write(path("config.toml"), config).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn bundle(&self, id: &str, sandbox: Option<&str>) -> PathBuf {
        let bundle = self.path(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let mut annotations = json!({});
        if let Some(sandbox) = sandbox {
            let kind = if sandbox == id {
                "sandbox"
            } else {
                "container"
            };
            annotations["io.kubernetes.cri.sandbox-id"] = sandbox.into();
            annotations["io.kubernetes.cri.container-type"] = kind.into();
        }
        let namespaces = ["network", "pid", "ipc", "uts"].map(|kind| json!({"type": kind}));
        let spec = json!({
            "annotations": annotations,
            "linux": {"namespaces": namespaces},
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    /// The options that name the configuration, as CRI sends them.
    fn options(&self) -> Any {
        let path = self.path("config.toml").display().to_string();
        let mut value = vec![0x12, u8::try_from(path.len()).unwrap()];
        value.extend_from_slice(path.as_bytes());
        Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value,
            ..Default::default()
        }
    }

    fn run(&self, id: &str, bundle: &Path, action: &str, input: &[u8]) -> Output {
        let grpc = self.path("no-containerd.sock");
        let mut child = Command::new(env!("CARGO_BIN_EXE_containerd-shim-kiln-v2"))
            .args([
                "-namespace",
                "test",
                "-id",
                id,
                "-publish-binary",
                "/bin/false",
                "-address",
            ])
            .arg(&grpc)
            .args(if action == "delete" {
                vec!["-bundle"]
            } else {
                vec![]
            })
            .args(if action == "delete" {
                vec![bundle]
            } else {
                vec![]
            })
            .arg(action)
            .current_dir(bundle)
            .env("TTRPC_ADDRESS", "")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }

    /// The new protocol, with the socket in our own directory.
    fn start(&self, id: &str, bundle: &Path) -> BootstrapResult {
        let params = BootstrapParams {
            instance_id: id.into(),
            namespace: "test".into(),
            containerd_version: "2.3.4".into(),
            containerd_grpc_address: self.path("no-containerd.sock").display().to_string(),
            socket_dir: Some(self.path("s").display().to_string()),
            extensions: vec![Extension {
                value: Some(self.options()).into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let output = self.run(id, bundle, "start", &params.write_to_bytes().unwrap());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        assert_eq!(
            said, "",
            "containerd reads standard error as part of the answer"
        );
        BootstrapResult::parse_from_bytes(&output.stdout).unwrap()
    }
}

fn tasks(address: &str) -> TaskClient {
    TaskClient::new(Client::connect(address).unwrap())
}

fn shim_pid(address: &str) -> u32 {
    let request = ConnectRequest {
        id: "x".into(),
        ..Default::default()
    };
    tasks(address)
        .connect(with_timeout(TIMEOUT), &request)
        .unwrap()
        .shim_pid
}

fn until_gone(path: &Path) {
    let end = Instant::now() + Duration::from_secs(10);
    while path.exists() {
        assert!(Instant::now() < end, "{} stays", path.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn socket(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap())
}

#[test]
fn shim_starts_serves_all_its_services_and_leaves_nothing() {
    let bed = Bed::new();
    let bundle = bed.bundle("c1", None);
    let result = bed.start("c1", &bundle);
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    assert_eq!(
        fs::read_to_string(bundle.join("address")).unwrap(),
        result.address
    );

    let sandbox = SandboxClient::new(Client::connect(&result.address).unwrap());
    let platform = sandbox
        .platform(with_timeout(TIMEOUT), &PlatformRequest::new())
        .unwrap();
    assert_eq!(platform.platform.os, "linux");

    // No μVM was ever baked: the error says what to do, and nothing is left of the container.
    let create = CreateTaskRequest {
        id: "c1".into(),
        bundle: bundle.display().to_string(),
        ..Default::default()
    };
    let client = tasks(&result.address);
    let error = client
        .create(with_timeout(TIMEOUT), &create)
        .unwrap_err()
        .to_string();
    assert!(error.contains("kiln bake"), "{error}");

    let request = ShutdownRequest {
        id: "c1".into(),
        ..Default::default()
    };
    client.shutdown(with_timeout(TIMEOUT), &request).unwrap();
    until_gone(socket(&result.address));
    until_gone(&bed.path("state/pods/test"));
}

#[test]
fn task_service_answers_under_its_old_name() {
    let bed = Bed::new();
    let result = bed.start("c1", &bed.bundle("c1", None));
    let client = Client::connect(&result.address).unwrap();
    let ask = |service: &str| {
        let mut request = ttrpc::Request::new();
        request.set_service(service.to_owned());
        request.set_method("Connect".to_owned());
        request.set_payload(ConnectRequest::new().write_to_bytes().unwrap());
        request.set_timeout_nano(TIMEOUT);
        client.request(request)
    };
    assert!(ask("containerd.task.v2.Task").is_ok());
    assert!(ask("containerd.task.v3.Task").is_ok());
    assert!(ask("containerd.task.v4.Task").is_err());
    tasks(&result.address)
        .shutdown(with_timeout(TIMEOUT), &ShutdownRequest::new())
        .unwrap();
    until_gone(socket(&result.address));
}

#[test]
fn containers_of_a_pod_are_sent_to_the_shim_of_its_sandbox() {
    let bed = Bed::new();
    let sandbox = bed.start("sb", &bed.bundle("sb", Some("sb")));
    let pid = shim_pid(&sandbox.address);
    let member = bed.start("c1", &bed.bundle("c1", Some("sb")));
    assert_eq!(member.address, sandbox.address);
    assert_eq!(shim_pid(&member.address), pid);
    // Deleting one container must not harm the others' shim.
    let output = bed.run("c1", &bed.path("c1"), "delete", b"");
    assert!(output.status.success());
    assert_eq!(shim_pid(&sandbox.address), pid);
    tasks(&sandbox.address)
        .shutdown(with_timeout(TIMEOUT), &ShutdownRequest::new())
        .unwrap();
    until_gone(socket(&sandbox.address));
}

#[test]
fn delete_cleans_up_after_a_killed_shim() {
    let bed = Bed::new();
    let bundle = bed.bundle("c1", None);
    let result = bed.start("c1", &bundle);
    let pid = i32::try_from(shim_pid(&result.address)).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    while std::os::unix::net::UnixStream::connect(socket(&result.address)).is_ok() {
        assert!(Instant::now() < end, "the shim survives SIGKILL");
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = bed.run("c1", &bundle, "delete", b"");
    assert!(output.status.success());
    let response = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(response.exit_status, 137);
    assert!(response.exited_at.seconds > 0);
    assert!(!socket(&result.address).exists());
}

#[test]
fn an_old_containerd_gets_a_bare_address_without_a_newline() {
    let bed = Bed::new();
    let bundle = bed.bundle("old", None);
    let options = bed.options().write_to_bytes().unwrap();
    let output = bed.run("old", &bundle, "start", &options);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let address = String::from_utf8(output.stdout).unwrap();
    assert!(
        address.starts_with("unix:///run/containerd/s/"),
        "{address}"
    );
    assert_eq!(address.trim(), address);
    tasks(&address)
        .shutdown(with_timeout(TIMEOUT), &ShutdownRequest::new())
        .unwrap();
    until_gone(socket(&address));
}

#[test]
fn info_is_a_runtime_info_and_v_is_for_people() {
    let run = |flag: &str| {
        Command::new(env!("CARGO_BIN_EXE_containerd-shim-kiln-v2"))
            .arg(flag)
            .stdin(Stdio::null())
            .output()
            .unwrap()
            .stdout
    };
    let info = RuntimeInfo::parse_from_bytes(&run("-info")).unwrap();
    assert_eq!(info.name, "io.containerd.kiln.v2");
    assert!(
        String::from_utf8(run("-v"))
            .unwrap()
            .contains(env!("CARGO_PKG_VERSION"))
    );
}
