//! The pods' network: with each other, with the node, within the pod.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kiln_e2e::cni::{Namespace, ip};
use kiln_e2e::harness::Case;
use kiln_e2e::plain::{Plain, PlainSpec};
use kiln_e2e::pod::STEP;
use kiln_e2e::{Container, ContainerSpec, Pod, Test, cases};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        pods_reach_each_other_and_the_node_reaches_them,
        interface_has_what_cni_gave_it,
        large_transfers_are_complete_both_ways,
        many_connections_at_once_are_answered,
        udp_and_ping_work,
        every_interface_of_a_namespace_is_the_containers.alone(),
    ]
}

async fn server(test: &Test) -> Result<(Pod, Container, String)> {
    let pod = test.pod().await?;
    let container = pod
        .start(&ContainerSpec::testprog("server", &["http", "80"]))
        .await?;
    container.log().wait_for("listening", STEP).await?;
    let address = format!("{}:80", pod.ip().await?);
    Ok((pod, container, address))
}

/// One request from the node; the answer's body.
pub(super) async fn fetch(address: &str, request: &[u8]) -> Result<Vec<u8>> {
    let exchange = async {
        let mut connection = TcpStream::connect(address).await?;
        connection.write_all(request).await?;
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).await?;
        anyhow::Ok(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(30), exchange)
        .await
        .with_context(|| format!("no answer from {address}"))?
        .with_context(|| format!("request to {address}"))?;
    ensure!(
        answer.starts_with(b"HTTP/1.1 200"),
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
    let end = answer
        .windows(4)
        .position(|part| part == b"\r\n\r\n")
        .context("no end of headers")?;
    Ok(answer[end + 4..].to_vec())
}

pub(super) fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n").into_bytes()
}

async fn pods_reach_each_other_and_the_node_reaches_them(test: Test) -> Result<()> {
    let (first, container, address) = server(&test).await?;
    let (second, other, other_address) = server(&test).await?;
    same!(
        fetch(&address, &get("/")).await?,
        first.config().hostname.as_bytes()
    );
    // Each sees the other under the other's own address: nothing translates between pods.
    let seen = other.read(&["testprog", "get", &address, "/peer"]).await?;
    same!(seen, second.ip().await?);
    let seen = container
        .read(&["testprog", "get", &other_address, "/peer"])
        .await?;
    same!(seen, first.ip().await?);
    // And itself under its own.
    same!(
        container.read(&["testprog", "get", &address, "/"]).await?,
        first.config().hostname
    );
    // A stopped pod's address answers no more.
    second.stop().await?;
    let gone = container
        .exec(&["timeout", "3", "testprog", "get", &other_address, "/"])
        .await?;
    ensure!(gone.code != 0, "a stopped pod answers");
    Ok(())
}

async fn interface_has_what_cni_gave_it(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let container = pod.start(&ContainerSpec::pause("main")).await?;
    let ip = pod.ip().await?;
    let addresses = container
        .read(&["ip", "-4", "address", "show", "eth0"])
        .await?;
    ensure!(addresses.contains(&format!("inet {ip}/16")), "{addresses}");
    ensure!(addresses.contains("UP"), "{addresses}");
    let routes = container.read(&["ip", "route"]).await?;
    ensure!(
        routes.contains("default via 10.88.0.1 dev eth0"),
        "{routes}"
    );
    let mtu = container.read(&["cat", "/sys/class/net/eth0/mtu"]).await?;
    same!(mtu, "1500");
    let interfaces = container.read(&["ls", "/sys/class/net"]).await?;
    ensure!(
        interfaces.split_whitespace().any(|name| name == "lo"),
        "{interfaces}"
    );
    same!(
        container
            .exec(&["ping", "-c", "1", "-W", "5", "127.0.0.1"])
            .await?
            .code,
        0
    );
    let hosts = container.read(&["cat", "/etc/hosts"]).await?;
    ensure!(hosts.contains("127.0.0.1"), "{hosts}");
    Ok(())
}

async fn large_transfers_are_complete_both_ways(test: Test) -> Result<()> {
    const SIZE: usize = 16 << 20;
    let (_pod, container, address) = server(&test).await?;
    let body = fetch(&address, &get(&format!("/bytes/{SIZE}"))).await?;
    same!(body.len(), SIZE);
    container
        .read(&["testprog", "write", "/tmp/same", &SIZE.to_string(), "1"])
        .await?;
    let expected = container.read(&["testprog", "hash", "/tmp/same"]).await?;
    let hash: String = {
        use sha2::{Digest, Sha256};
        Sha256::digest(&body)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    };
    same!(hash, expected);
    let head =
        format!("POST /hash HTTP/1.1\r\nConnection: close\r\nContent-Length: {SIZE}\r\n\r\n");
    let mut request = head.into_bytes();
    request.extend_from_slice(&body);
    same!(fetch(&address, &request).await?, expected.as_bytes());
    // From pod to pod.
    let client = test
        .pod()
        .await?
        .start(&ContainerSpec::pause("client"))
        .await?;
    let path = format!("/bytes/{SIZE}");
    let script = format!("testprog get {address} {path} | sha256sum | cut -d' ' -f1");
    same!(client.shell(&script).await?, expected);
    Ok(())
}

async fn many_connections_at_once_are_answered(test: Test) -> Result<()> {
    let (pod, _container, address) = server(&test).await?;
    let hostname = pod.config().hostname.clone();
    let mut answers = Vec::new();
    for _ in 0..60 {
        let address = address.clone();
        answers.push(tokio::spawn(
            async move { fetch(&address, &get("/")).await },
        ));
    }
    for answer in answers {
        same!(answer.await??, hostname.as_bytes());
    }
    Ok(())
}

async fn udp_and_ping_work(test: Test) -> Result<()> {
    let first = test.pod().await?;
    let server = first
        .start(&ContainerSpec::testprog("server", &["udp", "5000"]))
        .await?;
    server.log().wait_for("listening 5000", STEP).await?;
    let address = first.ip().await?;
    let second = test.pod().await?;
    let client = second.start(&ContainerSpec::pause("client")).await?;
    same!(
        client
            .exec(&["ping", "-c", "2", "-W", "5", &address])
            .await?
            .code,
        0
    );
    same!(
        client
            .exec(&["ping", "-c", "1", "-W", "5", "10.88.0.1"])
            .await?
            .code,
        0
    );
    let answer = client
        .read(&["testprog", "ask", &format!("{address}:5000"), "hello"])
        .await?;
    same!(answer, format!("hello from {}", second.ip().await?));
    Ok(())
}

/// As plug-ins for several networks leave it; their names are in nobody's order.
async fn every_interface_of_a_namespace_is_the_containers(test: Test) -> Result<()> {
    let namespace = Namespace::make(&test, "several")?;
    let interfaces = [
        ("net1", "several1", "10.91.1"),
        ("eth2", "several2", "10.91.2"),
        ("eth0", "several0", "10.91.0"),
    ];
    for (interface, node, subnet) in interfaces {
        namespace.cable(node, interface, 1400)?;
        ip(&format!("addr add {subnet}.1/24 dev {node}"))?;
        namespace.ip(&format!("addr add {subnet}.2/24 dev {interface}"))?;
    }
    for route in [
        "default via 10.91.0.1",
        "192.0.2.0/24 via 10.91.1.1 dev net1",
    ] {
        namespace.ip(&format!("route add {route}"))?;
    }
    let spec = PlainSpec::testprog(&["http", "8080"]).netns(&namespace.path());
    let task = Plain::run(&test, &spec).await?;
    task.streams.wait_for("listening").await?;
    for (interface, _, subnet) in interfaces {
        let show = PlainSpec::shell(&format!("ip -4 address show {interface}"));
        let seen = task.exec(interface, &show).await?;
        same!(task.wait(interface).await?, 0);
        let seen = seen.all_output().await?;
        ensure!(seen.contains(&format!("inet {subnet}.2/24")), "{seen}");
        ensure!(seen.contains("mtu 1400"), "{seen}");
        task.delete_exec(interface).await?;
        let address = format!("{subnet}.2:8080");
        let peer = fetch(&address, &get("/peer")).await?;
        same!(String::from_utf8(peer)?, format!("{subnet}.1"));
    }
    let routes = task
        .exec("routes", &PlainSpec::shell("ip route"))
        .await?
        .all_output()
        .await?;
    for route in [
        "default via 10.91.0.1 dev eth0",
        "192.0.2.0/24 via 10.91.1.1 dev net1",
    ] {
        ensure!(routes.contains(route), "{routes}");
    }
    task.wait("routes").await?;
    task.delete_exec("routes").await?;
    task.kill("", libc::SIGKILL, true).await?;
    same!(task.wait("").await?, 137);
    task.delete().await?;
    Ok(())
}
