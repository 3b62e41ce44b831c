//! What a pod in a μVM can't have is refused by its name, with the remedy; what it can have in the guest's own way works.

use anyhow::{Context, Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::plain::{Plain, PlainSpec};
use kiln_e2e::{Container, ContainerSpec, PodSpec, Test, cases};
use serde_json::{Value, json};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        pods_that_ask_for_the_nodes_namespaces_are_refused.only_with("kiln", "refusals"),
        parts_of_a_specification_are_refused_by_name.only_with("kiln", "refusals"),
        devices_and_hugepages_of_the_node_are_refused_by_name.only_with("kiln", "refusals"),
        containers_with_fuse_and_tun_have_devices_that_work,
        device_nodes_that_a_container_makes_open_nothing,
        null_device_can_be_mounted_over_a_file,
    ]
}

/// The shape of all refusals.
fn is_refusal<T>(result: Result<T>, named: &str) -> Result<()> {
    let error = result
        .err()
        .with_context(|| format!("{named} was not refused"))?;
    let text = format!("{error:#}");
    let refusal = text.split("kiln: ").last().unwrap_or_default();
    let (what, rest) = refusal
        .split_once(" is refused: ")
        .with_context(|| format!("no refusal: {text}"))?;
    ensure!(what.contains(named), "{what:?} does not name {named:?}");
    ensure!(rest.contains(". "), "no remedy: {text}");
    Ok(())
}

async fn pods_that_ask_for_the_nodes_namespaces_are_refused(test: Test) -> Result<()> {
    let pods = [
        (PodSpec::new().host_network(), "hostNetwork"),
        (PodSpec::new().host_processes(), "hostPID"),
        (PodSpec::new().host_ipc(), "hostIPC"),
    ];
    for (spec, named) in pods {
        is_refusal(test.run_pod(&spec).await, named)?;
    }
    Ok(())
}

async fn parts_of_a_specification_are_refused_by_name(test: Test) -> Result<()> {
    let hook = json!([{"path": "/bin/true"}]);
    let parts: [(&str, Value, &str); 8] = [
        ("/process/apparmorProfile", json!("mine"), "AppArmor"),
        ("/process/selinuxLabel", json!("u:r:mine_t:s0"), "mine_t"),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_FIFO", "priority": 1}),
            "scheduler",
        ),
        ("/hooks", json!({"createRuntime": hook}), "createRuntime"),
        ("/linux/intelRdt", json!({"closID": "gold"}), "intelRdt"),
        ("/linux/netDevices", json!({"eth7": {}}), "eth7"),
        (
            "/linux/resources/blockIO",
            json!({"weight": 100}),
            "blockIO",
        ),
        (
            "/linux/fromTheFuture",
            json!({"level": 1}),
            "linux.fromTheFuture",
        ),
    ];
    for (pointer, value, named) in parts {
        let spec = PlainSpec::shell("true").change(pointer, value);
        is_refusal(Plain::create(&test, &spec).await, named)?;
    }
    // What engines put in by themselves where the node has AppArmor or SELinux.
    let spec = PlainSpec::shell("exit 7")
        .change(
            "/process/apparmorProfile",
            json!("cri-containerd.apparmor.d"),
        )
        .change(
            "/linux/mountLabel",
            json!("system_u:object_r:container_file_t:s0"),
        );
    let task = Plain::run(&test, &spec).await?;
    same!(task.wait("").await?, 7);
    Ok(())
}

async fn devices_and_hugepages_of_the_node_are_refused_by_name(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let device = |name: &str, path: &str| ContainerSpec::pause(name).device(path, path, "rwm");
    is_refusal(pod.start(&device("log", "/dev/kmsg")).await, "/dev/kmsg")?;
    // Its number is the guest's, too, but a guest has no guests.
    is_refusal(pod.start(&device("vms", "/dev/kvm")).await, "/dev/kvm")?;
    let pages = ContainerSpec::pause("pages").hugepages(2 << 20);
    is_refusal(pod.start(&pages).await, "hugepages-2Mi")?;
    // The kubelet says of each size that a container gets none.
    let none = ContainerSpec::pause("none").hugepages(0);
    pod.start(&none).await?;
    Ok(())
}

async fn opens(container: &Container, device: &str) -> Result<()> {
    let said = container
        .shell(&format!("exec 3<>{device} && echo opened"))
        .await?;
    same!(said, "opened", "{device}");
    Ok(())
}

async fn containers_with_fuse_and_tun_have_devices_that_work(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let spec = ContainerSpec::pause("main")
        .device("/dev/fuse", "/dev/fuse", "rwm")
        .device("/dev/net/tun", "/dev/net/tun", "rwm");
    let container = pod.start(&spec).await?;
    opens(&container, "/dev/fuse").await?;
    opens(&container, "/dev/net/tun").await
}

async fn device_nodes_that_a_container_makes_open_nothing(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let container = pod
        .start(&ContainerSpec::pause("main").capabilities(&["MKNOD"], &[]))
        .await?;
    // A disk of the kernel that the container runs on, whichever that is.
    let script = "cd /tmp; dev=$(cat /sys/class/block/*/dev | head -n 1); mknod disk b ${dev%:*} ${dev#*:}; \
                  mknod log c 1 11; mknod null c 1 3; \
                  for node in disk log null; do head -c 1 $node > /dev/null 2>&1 && echo $node; done; true";
    same!(container.shell(script).await?, "null");
    Ok(())
}

async fn null_device_can_be_mounted_over_a_file(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let spec = ContainerSpec::pause("main").mount("/dev/null", "/etc/masked");
    let container = pod.start(&spec).await?;
    let script = "echo gone > /etc/masked; cat /etc/masked; stat -c '%t:%T' /etc/masked";
    same!(container.shell(script).await?, "1:3");
    Ok(())
}
