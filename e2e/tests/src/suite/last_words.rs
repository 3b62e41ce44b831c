//! What a guest that ends by itself says last is the message of the containers that ended with it.

use anyhow::{Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::pod::STEP;
use kiln_e2e::{ContainerSpec, PodSpec, Test, cases};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        panic_of_the_guest_is_in_the_message_of_its_containers.only_with("kiln", "last-words"),
        container_that_is_stopped_has_no_message_but_its_own,
    ]
}

/// The kubelet's place for a container's last message, and where it mounts it.
const FILE: &str = "pods/5a3c/containers/main/0f1e2d3c";
const MESSAGE: &str = "/dev/termination-log";

async fn panic_of_the_guest_is_in_the_message_of_its_containers(test: Test) -> Result<()> {
    let file = test.write(FILE, "")?;
    let pod = test.run_pod(&PodSpec::new().privileged()).await?;
    let spec = ContainerSpec::shell("main", "echo c > /proc/sysrq-trigger; sleep 1000")
        .privileged()
        .mount(&file, MESSAGE);
    let container = pod.start(&spec).await?;
    same!(container.wait().await?.exit_code, 137);
    let message = std::fs::read_to_string(&file)?;
    ensure!(
        message.contains("the guest's kernel panicked"),
        "{message:?}"
    );
    ensure!(
        message.contains("Kernel panic - not syncing"),
        "{message:?}"
    );
    Ok(())
}

async fn container_that_is_stopped_has_no_message_but_its_own(test: Test) -> Result<()> {
    let file = test.write(FILE, "")?;
    let pod = test.pod().await?;
    let script = "echo done > /dev/termination-log; exec testprog started";
    let spec = ContainerSpec::shell("main", script).mount(&file, MESSAGE);
    let container = pod.start(&spec).await?;
    container.log().wait_for("started", STEP).await?;
    container.stop(STEP).await?;
    pod.stop().await?;
    same!(std::fs::read_to_string(&file)?, "done\n");
    Ok(())
}
