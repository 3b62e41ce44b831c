//! What of its kernel a container gets by asking for it.

use anyhow::{Context, Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::{ContainerSpec, Test, cases};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        container_with_the_right_makes_bridges_and_tunnels,
        protocol_that_nobody_used_before_is_there,
        what_no_kernel_has_is_refused_as_ever,
    ]
}

async fn container_with_the_right_makes_bridges_and_tunnels(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let spec = ContainerSpec::pause("admin").capabilities(&["NET_ADMIN", "NET_RAW"], &[]);
    let admin = pod.start(&spec).await?;
    for kind in ["dummy", "bridge", "wireguard", "ifb"] {
        let name = format!("k-{kind}");
        admin
            .shell(&format!(
                "ip link add {name} type {kind} && ip link set {name} up"
            ))
            .await
            .with_context(|| format!("an interface of the kind {kind}"))?;
        let shown = admin.read(&["ip", "link", "show", &name]).await?;
        ensure!(shown.contains(&name), "{shown}");
    }
    admin
        .shell("brctl addbr k-old && brctl addif k-old k-dummy")
        .await?;
    Ok(())
}

async fn protocol_that_nobody_used_before_is_there(test: Test) -> Result<()> {
    // By a process without any right.
    let spec = ContainerSpec::testprog("main", &["sctp"]).user(4321, 5432);
    let (code, log) = test.pod().await?.finish(&spec).await?;
    let lines = log.lines()?;
    same!(
        (code, &*lines.first().context("no line")?.text),
        (0, "opened")
    );
    Ok(())
}

async fn what_no_kernel_has_is_refused_as_ever(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let spec = ContainerSpec::pause("admin").capabilities(&["NET_ADMIN"], &[]);
    let admin = pod.start(&spec).await?;
    let result = admin
        .exec(&["ip", "link", "add", "x", "type", "no-such-kind"])
        .await?;
    ensure!(result.code != 0, "it was made");
    Ok(())
}
