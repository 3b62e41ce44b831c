//! What people do to pods with `kubectl`.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use kiln_e2e::cases;
use kiln_e2e::terminal::Terminal;
use kiln_k8s::{Test, pods};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Case, same};

pub(crate) fn cases() -> Vec<Case> {
    cases![
        exec_has_input_an_exit_code_and_a_terminal.short(),
        attach_talks_to_the_first_process,
        cp_brings_files_there_and_back,
        port_forward_reaches_what_listens_on_either_loopback_address.short(),
        debug_adds_a_container_of_its_own,
        debug_of_a_target_sees_its_processes.short(),
    ]
}

/// A pod that does nothing until it is asked to end.
const IDLE: &str = r#"
containers:
- name: main
  command: [testprog, started]
"#;

async fn exec_has_input_an_exit_code_and_a_terminal(test: Test) -> Result<()> {
    test.run(IDLE).await?;
    let kubectl = test.kubectl();
    let copied = kubectl
        .output(&["exec", "-i", "pod", "--", "cat"], "one\ntwo")
        .await?;
    ensure!(copied.status.success(), "{copied:?}");
    same!(String::from_utf8_lossy(&copied.stdout), "one\ntwo");

    let failed = kubectl
        .output(
            &[
                "exec",
                "pod",
                "--",
                "sh",
                "-c",
                "echo out; echo err >&2; exit 7",
            ],
            "",
        )
        .await?;
    same!(failed.status.code(), Some(7));
    same!(String::from_utf8_lossy(&failed.stdout), "out\n");
    let said = String::from_utf8_lossy(&failed.stderr);
    ensure!(said.starts_with("err\n"), "{said:?}");

    let script = "tty; echo ready; read line; echo got $line; exit 5";
    let mut terminal = Terminal::new(80, 24)?;
    let command = kubectl.command(&["exec", "-it", "pod", "--", "sh", "-c", script]);
    let mut child = terminal.start(command)?;
    terminal.wait_for("/dev/pts/").await?;
    terminal.wait_for("ready").await?;
    terminal.type_keys("words\n")?;
    terminal.wait_for("got words").await?;
    same!(child.wait().await?.code(), Some(5));
    Ok(())
}

async fn attach_talks_to_the_first_process(test: Test) -> Result<()> {
    test.run(
        r#"
restartPolicy: Never
containers:
- name: main
  stdin: true
  stdinOnce: true
  command: [sh, -c, "while read line; do echo got $line; done; echo end"]
"#,
    )
    .await?;
    let mut talk = test.kubectl().talk(&["attach", "-i", "-q", "pod"])?;
    talk.say("one\n").await?;
    talk.hear("got one\n").await?;
    talk.say("two\n").await?;
    let (status, rest) = talk.end().await?;
    ensure!(status.success(), "{status}");
    same!(rest, "got two\nend\n");
    let pod = test.ended("pod").await?;
    same!(pods::phase(&pod), "Succeeded");
    Ok(())
}

async fn cp_brings_files_there_and_back(test: Test) -> Result<()> {
    test.run(IDLE).await?;
    let folder = test.scratch().join("sent");
    std::fs::create_dir_all(folder.join("below"))?;
    let content: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(folder.join("below/long"), &content)?;
    std::fs::write(folder.join("short"), "short")?;
    let back = test.scratch().join("back");
    let kubectl = test.kubectl();
    let pathname = |path: &std::path::Path| path.display().to_string();
    kubectl
        .run(&["cp", &pathname(&folder), "pod:/tmp/sent"])
        .await?;
    same!(test.exec("cat /tmp/sent/short").await?, "short");
    kubectl
        .run(&["cp", "pod:/tmp/sent", &pathname(&back)])
        .await?;
    ensure!(
        std::fs::read(back.join("below/long"))? == content,
        "another content came back"
    );
    Ok(())
}

async fn port_forward_reaches_what_listens_on_either_loopback_address(test: Test) -> Result<()> {
    test.run(
        r#"
containers:
- name: main
  command:
  - sh
  - -c
  - |
    echo four > /tmp/four; mkdir /tmp/6; echo six > /tmp/6/six
    httpd -p 127.0.0.1:8004 -h /tmp
    httpd -p [::1]:8006 -h /tmp/6
    exec testprog http 8000
"#,
    )
    .await?;
    test.logged("pod", None, "listening").await?;
    let mut talk = test.kubectl().talk(&[
        "port-forward",
        "--address=127.0.0.1,::1",
        "pod/pod",
        ":8000",
        ":8004",
        ":8006",
    ])?;
    let mut forwarded = Vec::new();
    for _ in 0..6 {
        talk.hear("Forwarding from ").await?;
        let from: SocketAddr = talk.hear(" -> ").await?.trim().parse()?;
        let port: u16 = talk.hear("\n").await?.trim().parse()?;
        forwarded.push((from, port));
    }
    for (from, port) in forwarded {
        let (path, answer) = match port {
            8000 => ("/", "pod"),
            8004 => ("/four", "four"),
            8006 => ("/six", "six"),
            other => anyhow::bail!("port {other} was not asked for"),
        };
        let body = get(from, path)
            .await
            .with_context(|| format!("port {port} by {from}"))?;
        same!(body.trim(), answer);
    }
    Ok(())
}

/// The body of a page.
async fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: pod\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("not HTTP: {answer:?}"))?;
    ensure!(head.contains(" 200 "), "{head}");
    Ok(body.to_owned())
}

async fn debug_adds_a_container_of_its_own(test: Test) -> Result<()> {
    test.run(IDLE).await?;
    let script = "hostname; echo processes $(ps | grep -c 'testprog started$'); echo end";
    debug(&test, &[], script).await?;
    let log = test.log("pod", Some("debugger")).await?;
    same!(log, "pod\nprocesses 0\nend\n");
    Ok(())
}

async fn debug_of_a_target_sees_its_processes(test: Test) -> Result<()> {
    test.run(IDLE).await?;
    let script = "tr '\\0' ' ' < /proc/1/cmdline; echo; cat /proc/1/root/etc/layered/overridden";
    debug(&test, &["--target=main"], script).await?;
    let log = test.log("pod", Some("debugger")).await?;
    same!(log, "testprog started \nfrom the layer above\n");
    Ok(())
}

/// Adds a container by `kubectl debug` and waits until it has ended.
async fn debug(test: &Test, more: &[&str], script: &str) -> Result<()> {
    let image = format!("--image={}", kiln_k8s::IMAGE);
    let mut words = vec![
        "debug",
        "pod",
        image.as_str(),
        "--container=debugger",
        "--quiet",
    ];
    words.extend(["--image-pull-policy=IfNotPresent", "--profile=general"]);
    words.extend(more);
    words.extend(["--", "sh", "-c", script]);
    test.kubectl().run(&words).await?;
    let pod = test
        .until(
            "pod",
            "to have had a debugger",
            |pod: Option<&pods::Pod>| {
                pod.is_some_and(|pod| pods::terminated(pod, "debugger").is_some())
            },
        )
        .await?;
    let end = pods::terminated(&pod, "debugger").context("no end")?;
    same!(end.exit_code, 0);
    Ok(())
}
