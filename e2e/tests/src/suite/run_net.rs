//! `kiln run --net` and `kiln trace`.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kiln_e2e::cni::ip;
use kiln_e2e::harness::Case;
use kiln_e2e::{ContainerSpec, Test, cases, wait};
use tokio::process::Command;

use super::kiln_run::{Kiln, send};
use super::same;

pub(crate) fn cases() -> Vec<Case> {
    let all = cases![
        container_talks_through_the_tap_it_is_given,
        trace_shows_where_the_time_of_a_start_went,
    ];
    let named = |case: Case| case.only_with("kiln", "run");
    all.into_iter().map(named).collect()
}

const STEP: Duration = Duration::from_secs(40);

/// A tap of the node, removed with the test.
struct Tap(String);

impl Tap {
    fn make(name: &str, addresses: &[&str]) -> Result<Tap> {
        ip(&format!("tuntap add {name} mode tap"))?;
        let tap = Tap(name.to_owned());
        ip(&format!("link set {name} mtu 1400 up"))?;
        for address in addresses {
            ip(&format!("addr add {address} dev {name} nodad"))?;
        }
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // The node's cleanliness is looked at after every test.
        drop(
            std::process::Command::new("ip")
                .args(["link", "del", &self.0])
                .status(),
        );
    }
}

async fn container_talks_through_the_tap_it_is_given(test: Test) -> Result<()> {
    let kiln = Kiln::new(&test)?;
    let name = "kiln-e2e-t0";
    let tap = Tap::make(name, &["10.123.0.1/24", "fd00:123::1/64"])?;
    let net = format!("tap:{name}");
    let options = [
        "--net",
        &net,
        "--ip",
        "10.123.0.2/24",
        "--ip",
        "fd00:123::2/64",
        "--gateway",
        "10.123.0.1",
        "--dns",
        "10.123.0.1",
    ];
    let script = "cat /etc/resolv.conf; cat /sys/class/net/eth0/mtu; ip route | grep default; \
                  ping -c 1 10.123.0.1 > /dev/null && echo pinged; echo ready; exec testprog http 8080";
    let (mut run, _) = kiln.command(&options, &["sh", "-c", script]);
    let mut child = run.spawn()?;
    let mut stdout = child.stdout.take().context("no output")?;
    let mut seen = Vec::new();
    let reading = async {
        while !String::from_utf8_lossy(&seen).contains("ready\n") {
            let read = tokio::io::AsyncReadExt::read_buf(&mut stdout, &mut seen).await?;
            ensure!(read > 0, "it ended");
        }
        anyhow::Ok(())
    };
    let read = tokio::time::timeout(STEP, reading).await;
    let text = String::from_utf8_lossy(&seen).into_owned();
    read.map_err(anyhow::Error::from)
        .and_then(|read| read)
        .with_context(|| text.clone())?;
    same!(
        text.lines().map(str::trim).take(4).collect::<Vec<_>>(),
        [
            "nameserver 10.123.0.1",
            "1400",
            "default via 10.123.0.1 dev eth0",
            "pinged"
        ]
    );
    // And the other way, by both kinds of address.
    for address in ["10.123.0.2:8080", "[fd00:123::2]:8080"] {
        wait::until(&format!("an answer from {address}"), STEP, || async {
            Ok(tokio::net::TcpStream::connect(address).await.ok())
        })
        .await?;
    }
    // The tap is one container's at a time.
    let output = kiln.run(&options, &["true"]).await?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    same!(output.status.code(), Some(125), "{errors}");
    ensure!(errors.contains("does something else use it"), "{errors}");
    child.stdout = Some(stdout);
    child.kill().await?;
    // It is still there afterwards, for the next one.
    let again = wait::until("the tap to be free", STEP, || async {
        let output = kiln
            .run(&options, &["ping", "-c", "1", "10.123.0.1"])
            .await?;
        Ok(output.status.success().then_some(()))
    });
    again.await?;
    drop(tap);
    let output = kiln.run(&options, &["true"]).await?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(errors.contains("ip tuntap add"), "{errors}");
    Ok(())
}

async fn trace(arguments: &[&str]) -> Result<String> {
    let output = Command::new("kiln")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .await?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{arguments:?}: {errors}");
    Ok(String::from_utf8(output.stdout)?)
}

async fn trace_shows_where_the_time_of_a_start_went(test: Test) -> Result<()> {
    let kiln = Kiln::new(&test)?;
    let script = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.1; done";
    let (mut child, name) = kiln.started(&[], script).await?;
    let text = trace(&["trace", &name]).await?;
    for step in [
        "launch",
        "vmm.resume",
        "guest.identity",
        "host.image",
        "guest.create",
    ] {
        ensure!(text.contains(step), "no {step} in\n{text}");
    }
    let steps: Vec<serde_json::Value> =
        serde_json::from_str(&trace(&["--json", "trace", &name]).await?)?;
    let of = |name: &str| {
        let step = steps.iter().find(|step| step["name"] == name);
        let number = |key: &str| step.and_then(|step| step[key].as_u64());
        number("start_us")
            .zip(number("duration_us"))
            .with_context(|| format!("no {name}"))
    };
    let ((resume, took), (start, _)) = (of("vmm.resume")?, of("guest.create")?);
    ensure!(took > 0 && resume + took <= start, "{steps:?}");
    send(&child, libc::SIGTERM)?;
    same!(child.wait().await?.code(), Some(0));
    // A pod's start has one as well, and the start of each of its containers.
    let pod = test.pod().await?;
    let id = &pod.id()[..12];
    let text = trace(&["trace", id]).await?;
    ensure!(text.contains("STEP") && text.lines().count() > 3, "{text}");
    for name in ["first", "second"] {
        pod.start(&ContainerSpec::shell(name, "exec sleep 600"))
            .await?;
    }
    let text = wait::until("timelines of both containers", STEP, || async {
        let text = trace(&["trace", id]).await?;
        Ok(text.contains("container second").then_some(text))
    });
    let text = text.await?;
    let (_, containers) = text
        .split_once("container first")
        .with_context(|| format!("no first container in {text}"))?;
    let (first, second) = containers
        .split_once("container second")
        .with_context(|| format!("no second container in {text}"))?;
    for steps in [first, second] {
        for step in [
            "host.volumes",
            "host.image",
            "vmm.plug-root",
            "guest.create.mount",
            "guest.start",
        ] {
            ensure!(steps.contains(step), "no {step} in\n{text}");
        }
    }
    ensure!(second.contains("host.image.find"), "made twice:\n{text}");
    Ok(())
}
