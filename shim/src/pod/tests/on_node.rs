//! Processes of the node that stand for containers, and namespaces that are said by them.

use super::*;
use crate::refusal::Refusal;

impl Bed {
    /// A container whose PID and IPC namespaces are these.
    async fn create_in(&self, id: &str, pid: serde_json::Value, ipc: &str) -> Result<u32> {
        let bundle = self.bundle(id, Some("container"));
        let path = bundle.join("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let mut spec: serde_json::Value = serde_json::from_str(&text).unwrap();
        spec["linux"]["namespaces"] =
            json!([pid, {"type": "ipc", "path": ipc}, {"type": "uts"}, {"type": "network"}]);
        std::fs::write(path, spec.to_string()).unwrap();
        let stdio = StdioPaths::default();
        self.create_from(bundle, id, stdio, vec![]).await
    }
}

fn is_there(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn processes_are_the_guests_with_the_first_under_the_pid_that_all_answers_have() {
    let bed = Bed::new("c").await;
    let pid = bed.create("c", None).await.unwrap();
    assert_eq!(bed.pod.start("c", "").await.unwrap(), pid);
    assert_eq!(bed.pod.state("c", "").unwrap().pid, pid);
    assert_eq!(bed.pod.pid_of("c"), pid);
    assert_eq!(bed.pod.pids("c").await.unwrap(), [pid, 12]);
    assert!(is_there(pid));
    bed.uvm.end("c", "", 0);
    bed.pod.wait("c", "").await.unwrap();
    assert_eq!(bed.pod.pids("c").await.unwrap(), [pid]);
    assert!(!is_there(pid), "it has nothing to stand for any more");
}

#[tokio::test]
async fn each_container_has_a_process_of_its_own() {
    let bed = Bed::new("sb").await;
    let sandbox = bed.create("sb", Some("sandbox")).await.unwrap();
    let one = bed.create("one", Some("container")).await.unwrap();
    let two = bed.create("two", Some("container")).await.unwrap();
    assert!(sandbox != one && one != two && two != sandbox);
    bed.pod.close().await;
    assert!(![sandbox, one, two].into_iter().any(is_there));
}

#[tokio::test]
async fn container_ends_with_the_process_that_stands_for_it() {
    let bed = Bed::new("sb").await;
    bed.create("sb", Some("sandbox")).await.unwrap();
    let pid = bed.create("c", Some("container")).await.unwrap();
    bed.pod.start("c", "").await.unwrap();
    kill(pid);
    let killed = async {
        while !bed.uvm.was_called("kill c/ 9") {
            tokio::time::sleep(SECOND / 100).await;
        }
    };
    tokio::time::timeout(5 * SECOND, killed).await.unwrap();
    bed.uvm.end("c", "", 137);
    assert_eq!(bed.pod.wait("c", "").await.unwrap().status, 137);
    assert!(!bed.uvm.was_called("stop"), "the pod goes on");
}

#[tokio::test]
async fn pod_ends_with_the_process_that_stands_for_it() {
    let bed = Bed::new("sb").await;
    bed.pod.create_sandbox(sandbox_request()).unwrap();
    let pid = bed.pod.start_sandbox("sb").await.unwrap().pid;
    assert!(is_there(pid));
    kill(pid);
    let exit = tokio::time::timeout(5 * SECOND, bed.pod.wait_sandbox("sb"));
    assert_eq!(exit.await.unwrap().unwrap().status, 137);
    assert!(bed.uvm.was_called("stop"));
}

#[tokio::test]
async fn container_joins_the_pid_namespace_that_the_path_names() {
    let bed = Bed::new("sb").await;
    let sandbox = bed.create("sb", Some("sandbox")).await.unwrap();
    let ipc = format!("/proc/{sandbox}/ns/ipc");
    let app = bed
        .create_in("app", json!({"type": "pid"}), &ipc)
        .await
        .unwrap();
    let of = |pid: u32| json!({"type": "pid", "path": format!("/proc/{pid}/ns/pid")});
    bed.create_in("shared", of(sandbox), &ipc).await.unwrap();
    bed.create_in("debugger", of(app), &ipc).await.unwrap();
    let asked = bed.uvm.pid_namespaces.lock().unwrap().clone();
    let expected = [("app", "own"), ("shared", "pod"), ("debugger", "app")];
    assert_eq!(
        asked,
        expected.map(|(id, of)| (id.to_owned(), of.to_owned()))
    );
}

#[tokio::test]
async fn namespaces_of_others_are_refused_by_their_names() {
    let bed = Bed::new("sb").await;
    let sandbox = bed.create("sb", Some("sandbox")).await.unwrap();
    let ipc = format!("/proc/{sandbox}/ns/ipc");
    let refused = async |pid: serde_json::Value, ipc: &str| match bed.create_in("c", pid, ipc).await
    {
        Err(Error::Refused(Refusal { what, .. })) => what,
        other => panic!("{other:?}"),
    };
    let of_init = json!({"type": "pid", "path": "/proc/1/ns/pid"});
    assert_eq!(
        refused(of_init, &ipc).await,
        "the pid namespace /proc/1/ns/pid"
    );
    let own = json!({"type": "pid"});
    assert_eq!(
        refused(own, "/proc/1/ns/ipc").await,
        "the ipc namespace /proc/1/ns/ipc"
    );
    assert_eq!(bed.uvm.pid_namespaces.lock().unwrap().len(), 0);
}

#[tokio::test]
async fn pod_that_asks_for_the_nodes_processes_is_refused_before_anything_is_started() {
    let bed = Bed::new("sb").await;
    let request = SandboxRequest {
        host_namespaces: vec!["pid"],
        ..sandbox_request()
    };
    let error = bed.pod.create_sandbox(request).unwrap_err();
    assert!(error.to_string().contains("hostPID"), "{error}");
    assert!(bed.uvm.calls().is_empty());
}
