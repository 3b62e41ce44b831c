//! Streams through CRI: exec and attach with input, output and terminals, port-forward.

use anyhow::{Result, ensure};
use k8s_cri::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use kiln_e2e::harness::Case;
use kiln_e2e::pod::STEP;
use kiln_e2e::stream::Stream;
use kiln_e2e::{Container, ContainerSpec, Pod, Test, cases};

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        exec_stream_carries_input_output_and_exit_code,
        exec_with_a_terminal_follows_its_size,
        attach_talks_to_the_first_process,
        attach_with_a_terminal_works_like_a_console,
        port_forward_reaches_a_server_on_localhost,
    ]
}

async fn exec(test: &Test, container: &Container, command: &[&str], tty: bool) -> Result<Stream> {
    let request = ExecRequest {
        container_id: container.id().to_owned(),
        cmd: command.iter().map(ToString::to_string).collect(),
        tty,
        stdin: true,
        stdout: true,
        stderr: !tty,
    };
    Stream::open(&test.cri().exec(request).await?.url).await
}

async fn attach(test: &Test, container: &Container, tty: bool) -> Result<Stream> {
    let request = AttachRequest {
        container_id: container.id().to_owned(),
        stdin: true,
        tty,
        stdout: true,
        stderr: !tty,
    };
    Stream::open(&test.cri().attach(request).await?.url).await
}

async fn exec_stream_carries_input_output_and_exit_code(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let container = pod.start(&ContainerSpec::pause("main")).await?;
    let script = "while read line; do [ \"$line\" = end ] && exit 7; echo \"got $line\"; \
                  echo \"err $line\" >&2; done; exit 99";
    let mut stream = exec(&test, &container, &["sh", "-c", script], false).await?;
    for word in ["one", "two"] {
        stream.send(0, format!("{word}\n").as_bytes()).await?;
        stream.wait_for(1, &format!("got {word}\n")).await?;
        stream.wait_for(2, &format!("err {word}\n")).await?;
    }
    stream.send(0, b"end\n").await?;
    same!(stream.exit_code().await?, 7);
    same!(stream.text(1), "got one\ngot two\n");
    same!(stream.text(2), "err one\nerr two\n");
    // A large answer, complete.
    let mut stream = exec(
        &test,
        &container,
        &["testprog", "lines", "30000", "50"],
        false,
    )
    .await?;
    same!(stream.exit_code().await?, 0);
    same!(stream.seen(1).len(), 30000 * 51);
    Ok(())
}

async fn exec_with_a_terminal_follows_its_size(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let container = pod.start(&ContainerSpec::pause("main")).await?;
    let mut stream = exec(&test, &container, &["testprog", "tty"], true).await?;
    stream
        .wait_for(1, "tty stdin=true stdout=true stderr=true")
        .await?;
    stream.resize(101, 33).await?;
    stream.wait_for(1, "size 101x33").await?;
    stream.resize(44, 55).await?;
    stream.wait_for(1, "size 44x55").await?;
    // Ctrl-C reaches the process as a signal, through the terminal.
    stream.send(0, &[3]).await?;
    same!(stream.exit_code().await?, 0);
    Ok(())
}

async fn attach_talks_to_the_first_process(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let script = "echo ready; while read line; do echo \"got $line\"; echo \"err $line\" >&2; done";
    let container = pod
        .start(&ContainerSpec::shell("main", script).stdin())
        .await?;
    container.log().wait_for("ready", STEP).await?;
    for word in ["first", "second"] {
        // Each time another client: the process stays.
        let mut stream = attach(&test, &container, false).await?;
        stream.knock(b"\n", 2, "err \n").await?;
        stream.send(0, format!("{word}\n").as_bytes()).await?;
        stream.wait_for(1, &format!("got {word}\n")).await?;
        stream.wait_for(2, &format!("err {word}\n")).await?;
    }
    // What was attached to is in the log as well, if not as soon.
    container.log().wait_for("got second", STEP).await?;
    let mut lines = container.log().stdout()?;
    lines.retain(|line| line.trim_end() != "got");
    same!(lines, ["ready", "got first", "got second"]);
    Ok(())
}

async fn attach_with_a_terminal_works_like_a_console(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let spec = ContainerSpec::new("main", &["sh"]).stdin().tty();
    let container = pod.start(&spec).await?;
    let mut stream = attach(&test, &container, true).await?;
    stream.knock(b"\n", 1, "# ").await?;
    stream.resize(90, 20).await?;
    stream.send(0, b"echo $((6*7)); stty size; tty\n").await?;
    stream.wait_for(1, "42\r\n").await?;
    stream.wait_for(1, "20 90\r\n").await?;
    stream.wait_for(1, "/dev/pts/0\r\n").await?;
    stream.send(0, b"exit 5\n").await?;
    same!(container.wait().await?.exit_code, 5);
    Ok(())
}

async fn forward(test: &Test, pod: &Pod, port: i32) -> Result<Stream> {
    let request = PortForwardRequest {
        pod_sandbox_id: pod.id().to_owned(),
        port: vec![port],
    };
    let url = test.cri().port_forward(request).await?.url;
    // The ports of a web socket stand in its address, as in Kubernetes' API.
    let mut stream = Stream::open(&format!("{url}?port={port}")).await?;
    let number = u16::try_from(port)?.to_le_bytes();
    for channel in [0, 1] {
        stream.wait_for_bytes(channel, 2).await?;
        same!(stream.seen(channel), number);
    }
    Ok(stream)
}

async fn port_forward_reaches_a_server_on_localhost(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let server = pod
        .start(&ContainerSpec::testprog("server", &["http", "8080"]))
        .await?;
    server.log().wait_for("listening", STEP).await?;
    let mut stream = forward(&test, &pod, 8080).await?;
    stream.send(0, b"GET /peer HTTP/1.1\r\n\r\n").await?;
    stream.wait_for(0, "127.0.0.1").await?;
    // The connection stays open, and takes much in one go.
    stream
        .send(0, b"GET /bytes/300000 HTTP/1.1\r\n\r\n")
        .await?;
    stream.wait_for_bytes(0, 300_000).await?;
    // A port where nobody listens.
    let mut stream = forward(&test, &pod, 8081).await?;
    let refused = stream.wait_for_bytes(1, 3).await;
    ensure!(
        refused.is_err() || stream.text(1).contains("refused"),
        "a port without a server: {:?}",
        stream.text(1)
    );
    Ok(())
}
