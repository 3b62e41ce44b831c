//! Standard streams, terminals, execs in numbers, and ports.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_agent_api::client::ConnectError;
use kiln_agent_api::proto;
use kiln_agent_api::stream::{Kind, Status};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use ttrpc::context::Context;

use crate::world::{PATIENCE, World, header, process, type_in};

pub(crate) async fn output_waits_for_its_reader(world: Arc<World>) {
    let id = world.new_id("late");
    world
        .start(&id, world.spec(&["print", "all of it", "and this"]))
        .await;
    assert_eq!(world.wait(&id, "").await.exit_code, 0);
    // The process is long gone.
    assert_eq!(world.read(&id, "", Kind::Stdout).await, "all of it");
    assert_eq!(world.read(&id, "", Kind::Stderr).await, "and this");
    world.delete(&id).await;
}

pub(crate) async fn input_ends_when_the_host_says_so(world: Arc<World>) {
    let id = world.new_id("echo");
    world.start(&id, world.spec(&["echo"])).await;
    type_in(world.stream(&id, "", Kind::Stdin).await, "typed").await;
    let (code, out, _) = world.finish(&id).await;
    assert_eq!((code, out.as_str()), (0, "typed"));
    world.delete(&id).await;

    let id = world.new_id("echo");
    world.start(&id, world.spec(&["echo"])).await;
    let mut stdin = world.stream(&id, "", Kind::Stdin).await;
    stdin.write_all(b"typed").await.expect("type");
    let request = proto::CloseStdinRequest {
        container_id: id.clone(),
        ..Default::default()
    };
    world
        .agent
        .close_stdin(Context::default(), &request)
        .await
        .expect("close");
    assert_eq!(world.finish(&id).await.1, "typed");
    world.delete(&id).await;
}

pub(crate) async fn fifty_thousand_lines_arrive(world: Arc<World>) {
    const LINES: usize = 50_000;
    let id = world.new_id("lines");
    let start = Instant::now();
    world
        .start(&id, world.spec(&["lines", &LINES.to_string()]))
        .await;
    let (code, out, _) = world.finish(&id).await;
    let took = start.elapsed();
    assert_eq!(code, 0);
    let mut count = 0;
    for (number, line) in out.lines().enumerate() {
        assert_eq!(
            line,
            format!("line {number} of the output that must not be lost")
        );
        count += 1;
    }
    assert_eq!(count, LINES);
    println!("{LINES} lines, {} bytes in {took:?}", out.len());
    world.delete(&id).await;
}

pub(crate) async fn a_hundred_execs_run_side_by_side(world: Arc<World>) {
    const EXECS: usize = 100;
    let id = world.new_id("execs");
    world.start(&id, world.spec(&["sleep"])).await;
    let start = Instant::now();
    let mut tasks = Vec::new();
    for number in 0..EXECS {
        let (world, id) = (world.clone(), id.clone());
        tasks.push(tokio::spawn(async move {
            let (exec, text) = (format!("e{number}"), format!("number {number}"));
            let echo = process(&["echo"]);
            world.exec(&id, &exec, echo).await.expect("exec");
            type_in(world.stream(&id, &exec, Kind::Stdin).await, &text).await;
            assert_eq!(world.read(&id, &exec, Kind::Stdout).await, text);
            assert_eq!(world.wait(&id, &exec).await.exit_code, 0);
            let request = proto::DeleteRequest {
                container_id: id.clone(),
                exec_id: exec,
                ..Default::default()
            };
            world
                .agent
                .delete(Context::default(), &request)
                .await
                .expect("delete");
        }));
    }
    for task in tasks {
        task.await.expect("every exec");
    }
    println!("{EXECS} execs in {:?}", start.elapsed());
    world.delete(&id).await;
}

/// Reads lines of a terminal until one contains `wanted`.
async fn expect(lines: &mut BufReader<UnixStream>, wanted: &str) {
    let read = async {
        let mut seen = String::new();
        loop {
            let mut line = String::new();
            let length = lines.read_line(&mut line).await.expect("read");
            assert!(length > 0, "{wanted:?} did not come: {seen:?}");
            if line.contains(wanted) {
                return;
            }
            seen += &line;
        }
    };
    tokio::time::timeout(PATIENCE, read).await.expect("in time");
}

async fn try_terminal(world: &World, id: &str, exec: &str) {
    let mut out = BufReader::new(world.stream(id, exec, Kind::Stdout).await);
    let mut input = world.stream(id, exec, Kind::Stdin).await;
    expect(&mut out, "size 80x24 controlling true").await;
    let request = proto::ResizeTtyRequest {
        container_id: id.to_owned(),
        exec_id: exec.to_owned(),
        width: 132,
        height: 50,
        ..Default::default()
    };
    world
        .agent
        .resize_tty(Context::default(), &request)
        .await
        .expect("resize");
    input.write_all(b"\n").await.expect("type");
    expect(&mut out, "size 132x50 controlling true").await;
    // Ctrl-D on an empty line is the end of input.
    input.write_all(b"\x04").await.expect("type");
    let mut rest = String::new();
    out.read_to_string(&mut rest).await.expect("the end");
    assert_eq!(world.wait(id, exec).await.exit_code, 0);
}

pub(crate) async fn a_terminal_is_a_terminal(world: Arc<World>) {
    let id = world.new_id("tty");
    let mut spec = world.spec(&["terminal"]);
    spec["process"]["terminal"] = json!(true);
    let mut request = world.request(&id, spec.clone());
    (request.tty_width, request.tty_height) = (80, 24);
    world
        .try_start(request)
        .await
        .unwrap_or_else(|error| panic!("{error}\n{}", world.log()));
    try_terminal(&world, &id, "").await;
    world.delete(&id).await;

    // Ctrl-C reaches the foreground process; as PID 1 of a namespace of its own it would not.
    let id = world.new_id("tty");
    let mut request = world.request(&id, spec);
    request.pid_namespace = protobuf::EnumOrUnknown::new(proto::PidNamespace::PID_POD);
    (request.tty_width, request.tty_height) = (80, 24);
    world.try_start(request).await.expect("start");
    let mut out = BufReader::new(world.stream(&id, "", Kind::Stdout).await);
    expect(&mut out, "size").await;
    world
        .stream(&id, "", Kind::Stdin)
        .await
        .write_all(b"\x03")
        .await
        .expect("type");
    assert_eq!(world.wait(&id, "").await.exit_code, 130);
    world.delete(&id).await;
}

pub(crate) async fn an_exec_can_have_a_terminal(world: Arc<World>) {
    let id = world.new_id("tty-exec");
    world.start(&id, world.spec(&["sleep"])).await;
    let mut terminal = process(&["terminal"]);
    terminal["terminal"] = json!(true);
    world
        .exec(&id, "t", terminal)
        .await
        .unwrap_or_else(|e| panic!("{e}\n{}", world.log()));
    try_terminal(&world, &id, "t").await;
    world.delete(&id).await;
}

pub(crate) async fn a_wrong_token_opens_nothing(world: Arc<World>) {
    let id = world.new_id("token");
    world.start(&id, world.spec(&["sleep"])).await;
    let mut wrong = header(&id, "", Kind::Stdout);
    wrong.token[0] ^= 1;
    let refused = |result: Result<UnixStream, ConnectError>| match result {
        Err(ConnectError::Stream(status)) => status,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(world.vsock.stream(&wrong).await), Status::BadToken);
    let nobody = header("nobody", "", Kind::Stdout);
    assert_eq!(refused(world.vsock.stream(&nobody).await), Status::NotFound);
    let first = world.stream(&id, "", Kind::Stdout).await;
    let second = world.vsock.stream(&header(&id, "", Kind::Stdout)).await;
    assert_eq!(refused(second), Status::Busy);
    drop(first);
    world.delete(&id).await;
}

pub(crate) async fn a_port_of_the_pod_is_reached(world: Arc<World>) {
    let id = world.new_id("port");
    world.start(&id, world.spec(&["serve", "4343"])).await;
    let mut out = BufReader::new(world.stream(&id, "", Kind::Stdout).await);
    expect(&mut out, "listening").await;
    let mut text = String::new();
    let mut port = world.stream("", "", Kind::Tcp(4343)).await;
    port.read_to_string(&mut text).await.expect("read");
    assert_eq!(text, "hello from the pod");
    let closed = world.vsock.stream(&header("", "", Kind::Tcp(4344))).await;
    assert!(
        matches!(closed, Err(ConnectError::Stream(Status::Refused))),
        "{closed:?}"
    );
    world.delete(&id).await;
}

pub(crate) async fn a_user_may_reopen_its_output(world: Arc<World>) {
    let mut spec = world.spec(&["reopen"]);
    spec["process"]["user"] = json!({"uid": 33, "gid": 33});
    let run = tokio::time::timeout(Duration::from_secs(60), world.run(spec));
    let (code, out, _) = run.await.expect("in time");
    assert_eq!((code, out.as_str()), (0, "again\n"));
}
