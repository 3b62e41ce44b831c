//! What a container is: its processes, its view, its rights.

use std::fs;
use std::sync::Arc;

use kiln_agent_api::proto;
use kiln_agent_api::stream::Kind;
use kiln_agent_api::{Refusal, RefusalKind};
use protobuf::EnumOrUnknown;
use serde_json::json;
use ttrpc::context::Context;

use crate::inside::status;
use crate::world::{World, process};

fn refusal(error: &ttrpc::Error) -> Refusal {
    kiln_agent_api::refusal(error).expect("a refusal")
}

pub(crate) async fn nothing_runs_before_the_identity(world: Arc<World>) {
    assert_eq!(
        refusal(&world.before_identity).kind,
        RefusalKind::REFUSAL_STATE
    );
    assert!(world.before_identity.to_string().contains("SetIdentity"));
    assert_eq!(world.identity.generation, "test-1");
    assert_eq!(world.identity.boot_id.len(), 36);
    let hello = world.answers().await;
    assert_eq!(
        hello.gate.enum_value_or_default(),
        proto::GateState::GATE_OPEN
    );
}

pub(crate) async fn an_identity_is_given_once(world: Arc<World>) {
    let request = proto::SetIdentityRequest {
        generation: "test-1".into(),
        entropy: (0..64).collect(),
        wall_clock_ns: 1_800_000_000_000_000_000,
        machine_id: "f".repeat(32),
        hostname: "another".into(),
        ..Default::default()
    };
    let again = world
        .agent
        .set_identity(Context::default(), &request)
        .await
        .expect("same");
    assert_eq!(again.boot_id, world.identity.boot_id);
    let (_, host, _) = world.run(world.spec(&["host"])).await;
    assert_eq!(host, "pod-of-tests\n", "a repeated call changes nothing");
}

pub(crate) async fn exit_codes_and_signals_come_through(world: Arc<World>) {
    assert_eq!(world.run(world.spec(&["exit", "0"])).await.0, 0);
    assert_eq!(world.run(world.spec(&["exit", "42"])).await.0, 42);
    for (signal, expected) in [(libc::SIGKILL, 137), (libc::SIGTERM, 143)] {
        let id = world.new_id("signal");
        // As PID 1 of its namespace a process only gets what it handles; in a shared one it gets all.
        let mut request = world.request(&id, world.spec(&["sleep"]));
        request.pid_namespace = EnumOrUnknown::new(proto::PidNamespace::PID_POD);
        world.try_start(request).await.expect("start");
        world.kill(&id, signal).await.expect("kill");
        assert_eq!(world.wait(&id, "").await.exit_code, expected);
        let error = world.kill(&id, signal).await.expect_err("it is gone");
        assert_eq!(refusal(&error).kind, RefusalKind::REFUSAL_NOT_FOUND);
        world.delete(&id).await;
    }
}

pub(crate) async fn very_short_processes_never_lose_their_exit(world: Arc<World>) {
    let mut events = world
        .agent
        .events(Context::default(), &Default::default())
        .await
        .expect("events");
    for round in 0..20_u32 {
        let id = world.new_id("short");
        world
            .start(&id, world.spec(&["exit", &round.to_string()]))
            .await;
        assert_eq!(world.wait(&id, "").await.exit_code, round);
        let event = loop {
            let event = events.recv().await.expect("event").expect("more events");
            if event.has_exit() && event.exit().container_id == id {
                break event;
            }
        };
        assert_eq!(event.exit().status.exit_code, round);
        world.delete(&id).await;
    }
}

pub(crate) async fn a_container_sees_what_its_spec_says(world: Arc<World>) {
    let mut spec = world.spec(&["environment"]);
    spec["process"]["env"] = json!(["PATH=/bin", "A=1=2", "EMPTY=", "=odd"]);
    let (code, out, err) = world.run(spec).await;
    assert_eq!(code, 0, "{out}{err}");
    let mut seen: Vec<&str> = out.lines().collect();
    seen.sort_unstable();
    assert_eq!(seen, ["A=1=2", "EMPTY=", "HOME=/root", "PATH=/bin"]);

    let mut spec = world.spec(&["where"]);
    spec["process"]["cwd"] = json!("/work");
    assert_eq!(world.run(spec).await.1, "/work\n");

    let (_, pids, _) = world.run(world.spec(&["list", "/proc"])).await;
    let pids: Vec<&str> = pids
        .lines()
        .filter(|name| name.parse::<u32>().is_ok())
        .collect();
    assert_eq!(pids, ["1"], "a PID namespace of its own");

    let (_, text, _) = world.run(world.spec(&["print", "out", "err"])).await;
    assert_eq!(text, "out");

    let mut spec = world.spec(&["status"]);
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 512, "soft": 256}]);
    spec["process"]["oomScoreAdj"] = json!(333);
    spec["process"]["args"] = json!(["/bin/inside", "--inside", "cat", "/proc/self/oom_score_adj"]);
    assert_eq!(world.run(spec.clone()).await.1, "333\n");
    spec["process"]["args"] = json!(["/bin/inside", "--inside", "cat", "/proc/self/limits"]);
    let (_, limits, _) = world.run(spec).await;
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .expect("limit");
    assert_eq!(
        files.split_whitespace().skip(3).take(2).collect::<Vec<_>>(),
        ["256", "512"]
    );
}

pub(crate) async fn capabilities_are_the_specs(world: Arc<World>) {
    let mut spec = world.spec(&["status"]);
    let two = json!(["CAP_CHOWN", "CAP_NET_BIND_SERVICE"]);
    spec["process"]["capabilities"] = json!({"bounding": two, "effective": two, "permitted": two});
    spec["process"]["noNewPrivileges"] = json!(true);
    let (_, out, _) = world.run(spec.clone()).await;
    let seen = status(&out);
    for set in ["CapBnd", "CapEff", "CapPrm"] {
        assert_eq!(seen[set], "0000000000000401", "{set}");
    }
    assert_eq!(seen["CapAmb"], "0000000000000000");
    assert_eq!(seen["NoNewPrivs"], "1");

    // An exec has its own, or the container's if it names none.
    let id = world.new_id("caps");
    spec["process"]["args"] = json!(["/bin/inside", "--inside", "sleep"]);
    world.start(&id, spec).await;
    let one = json!(["CAP_CHOWN"]);
    let mut own = process(&["status"]);
    own["capabilities"] = json!({"bounding": one, "effective": one, "permitted": one});
    for (exec, process, expected) in [
        ("none", process(&["status"]), "0000000000000401"),
        ("own", own, "0000000000000001"),
    ] {
        world.exec(&id, exec, process).await.expect("exec");
        let seen = status(&world.read(&id, exec, Kind::Stdout).await);
        assert_eq!(seen["CapEff"], expected, "{exec}");
        assert_eq!(seen["CapBnd"], expected, "{exec}");
    }
    world.delete(&id).await;
}

pub(crate) async fn users_and_groups_are_the_specs(world: Arc<World>) {
    let mut spec = world.spec(&["status"]);
    spec["process"]["user"] =
        json!({"uid": 33, "gid": 34, "additionalGids": [34, 1000, 2000], "umask": 0o27});
    let (_, out, _) = world.run(spec.clone()).await;
    let seen = status(&out);
    assert_eq!(seen["Uid"], "33\t33\t33\t33");
    assert_eq!(seen["Gid"], "34\t34\t34\t34");
    assert_eq!(seen["Groups"], "34 1000 2000");
    assert_eq!(seen["Umask"], "0027");
    spec["process"]["args"] = json!(["/bin/inside", "--inside", "environment"]);
    assert!(world.run(spec.clone()).await.1.contains("HOME=/home/web\n"));

    let id = world.new_id("user");
    spec["process"]["args"] = json!(["/bin/inside", "--inside", "sleep"]);
    world.start(&id, spec).await;
    let mut as_other = process(&["status"]);
    as_other["user"] = json!({"uid": 1234, "gid": 5678, "additionalGids": [9], "umask": 0o77});
    world.exec(&id, "who", as_other).await.expect("exec");
    let seen = status(&world.read(&id, "who", Kind::Stdout).await);
    assert_eq!(seen["Uid"], "1234\t1234\t1234\t1234");
    assert_eq!(seen["Groups"], "9");
    assert_eq!(seen["Umask"], "0077");
    world.delete(&id).await;
}

pub(crate) async fn a_filter_holds_for_the_container_and_for_execs(world: Arc<World>) {
    let filter = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]
    });
    for no_new_privileges in [true, false] {
        let mut spec = world.spec(&["mkdir", "/tmp/made"]);
        spec["linux"]["seccomp"] = filter.clone();
        spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        let (code, out, _) = world.run(spec.clone()).await;
        assert_eq!(code, 95, "no_new_privs {no_new_privileges}: {out}");

        let id = world.new_id("filter");
        spec["process"]["args"] = json!(["/bin/inside", "--inside", "sleep"]);
        world.start(&id, spec).await;
        let mut command = process(&["mkdir", "/tmp/made"]);
        command["noNewPrivileges"] = json!(no_new_privileges);
        world.exec(&id, "mkdir", command).await.expect("exec");
        let status = world.wait(&id, "mkdir").await;
        assert_eq!(
            status.exit_code, 95,
            "an exec is under the container's filter"
        );
        world.delete(&id).await;
    }
    let (code, out, _) = world.run(world.spec(&["mkdir", "/tmp/made"])).await;
    assert_eq!(code, 0, "without a filter it works: {out}");
    drop(fs::remove_dir(world.image().join("tmp/made")));
}

pub(crate) async fn a_read_only_root_is_read_only(world: Arc<World>) {
    let mut spec = world.spec(&["write", "/work/file", "x"]);
    spec["root"]["readonly"] = json!(true);
    let (code, out, _) = world.run(spec).await;
    assert_eq!(code, u32::try_from(libc::EROFS).expect("errno"), "{out}");
    assert_eq!(
        world.run(world.spec(&["write", "/work/file", "x"])).await.0,
        0
    );
    fs::remove_file(world.image().join("work/file")).expect("the file is in the image");
}

pub(crate) async fn masked_paths_are_empty_and_readonly_paths_hold(world: Arc<World>) {
    assert_eq!(world.run(world.spec(&["cat", "/proc/keys"])).await.1, "");
    assert_eq!(
        world.run(world.spec(&["list", "/sys/firmware"])).await.1,
        ""
    );
    let (code, out, _) = world
        .run(world.spec(&["write", "/proc/sys/kernel/msgmax", "9"]))
        .await;
    assert_eq!(code, u32::try_from(libc::EROFS).expect("errno"), "{out}");
    let mut open = world.spec(&["cat", "/proc/timer_list"]);
    open["linux"]["maskedPaths"] = json!([]);
    let (_, text, _) = world.run(open).await;
    assert!(!text.is_empty(), "it is the mask that hides it");
}

pub(crate) async fn a_program_that_is_missing_is_named(world: Arc<World>) {
    let start = |args: serde_json::Value| {
        let world = world.clone();
        async move {
            let mut spec = world.spec(&[]);
            spec["process"]["args"] = args;
            let id = world.new_id("missing");
            refusal(
                &world
                    .try_start(world.request(&id, spec))
                    .await
                    .expect_err("no program"),
            )
        }
    };
    let error = start(json!(["nope"])).await;
    assert_eq!(error.kind, RefusalKind::REFUSAL_PROGRAM_NOT_FOUND);
    assert!(
        error
            .text
            .contains(r#"exec: "nope": executable file not found in $PATH"#),
        "{error:?}"
    );
    let error = start(json!(["/bin/nope"])).await;
    assert_eq!(error.kind, RefusalKind::REFUSAL_PROGRAM_NOT_FOUND);
    assert!(
        error.text.contains("no such file or directory"),
        "{error:?}"
    );
    let error = start(json!(["/etc/plain"])).await;
    assert_eq!(error.kind, RefusalKind::REFUSAL_PROGRAM_NOT_EXECUTABLE);
    assert!(error.text.contains("permission denied"), "{error:?}");

    let id = world.new_id("missing");
    world.start(&id, world.spec(&["sleep"])).await;
    let mut missing = process(&[]);
    missing["args"] = json!(["nope"]);
    let error = refusal(&world.exec(&id, "x", missing).await.expect_err("no program"));
    assert_eq!(error.kind, RefusalKind::REFUSAL_PROGRAM_NOT_FOUND);
    assert!(
        error
            .text
            .contains(r#"exec: "nope": executable file not found in $PATH"#),
        "{error:?}"
    );
    let mut plain = process(&[]);
    plain["args"] = json!(["/etc/plain"]);
    let error = refusal(&world.exec(&id, "x", plain).await.expect_err("no program"));
    assert_eq!(error.kind, RefusalKind::REFUSAL_PROGRAM_NOT_EXECUTABLE);
    let mut nowhere = process(&["exit", "0"]);
    nowhere["cwd"] = json!("/nowhere");
    let error = refusal(&world.exec(&id, "x", nowhere).await.expect_err("no folder"));
    assert_eq!(error.kind, RefusalKind::REFUSAL_FAILED);
    assert!(error.text.contains("/nowhere"), "{error:?}");
    world.delete(&id).await;
}

pub(crate) async fn containers_of_a_pod_share_what_pods_share(world: Arc<World>) {
    let (server, client) = (world.new_id("server"), world.new_id("client"));
    world.start(&server, world.spec(&["serve", "4242"])).await;
    let mut out = world.stream(&server, "", Kind::Stdout).await;
    let mut line = [0; 10];
    tokio::io::AsyncReadExt::read_exact(&mut out, &mut line)
        .await
        .expect("listening");
    world.start(&client, world.spec(&["ask", "4242"])).await;
    assert_eq!(world.finish(&client).await.1, "hello from the pod");
    assert_eq!(world.wait(&server, "").await.exit_code, 0);
    world.delete(&server).await;
    world.delete(&client).await;
    assert_eq!(world.run(world.spec(&["host"])).await.1, "pod-of-tests\n");
}

pub(crate) async fn a_pid_namespace_can_be_shared(world: Arc<World>) {
    let (one, two, own) = (
        world.new_id("one"),
        world.new_id("two"),
        world.new_id("own"),
    );
    for id in [&one, &two] {
        let mut request = world.request(id, world.spec(&["sleep"]));
        request.pid_namespace = EnumOrUnknown::new(proto::PidNamespace::PID_POD);
        world.try_start(request).await.expect("start");
    }
    world
        .exec(&one, "list", process(&["list", "/proc"]))
        .await
        .expect("exec");
    let seen = world.read(&one, "list", Kind::Stdout).await;
    let count = seen
        .lines()
        .filter(|name| name.parse::<u32>().is_ok())
        .count();
    assert!(
        count >= 4,
        "pause, two containers and the exec itself: {seen}"
    );

    // kubectl debug --target
    world.start(&own, world.spec(&["sleep"])).await;
    let id = world.new_id("debug");
    let mut request = world.request(&id, world.spec(&["cat", "/proc/1/cmdline"]));
    request.pid_namespace = EnumOrUnknown::new(proto::PidNamespace::PID_CONTAINER);
    request.pid_namespace_container.clone_from(&own);
    world.try_start(request).await.expect("start");
    assert!(world.finish(&id).await.1.contains("sleep"));
    for id in [&one, &two, &own, &id] {
        world.delete(id).await;
    }
}

pub(crate) async fn volumes_are_mounted(world: Arc<World>) {
    let volume = world.shared("volume");
    fs::create_dir_all(&volume).expect("volume");
    fs::write(volume.join("key"), "value").expect("file");
    let mut spec = world.spec(&["cat", "/data/key"]);
    let mount = |options: &[&str], destination: &str, source: &std::path::Path| json!({"destination": destination, "type": "bind", "source": source, "options": options});
    spec["mounts"]
        .as_array_mut()
        .expect("mounts")
        .push(mount(&["rbind", "ro"], "/data", &volume));
    assert_eq!(world.run(spec.clone()).await.1, "value");
    spec["process"]["args"] = json!(["/bin/inside", "--inside", "write", "/data/key", "x"]);
    assert_eq!(
        world.run(spec).await.0,
        u32::try_from(libc::EROFS).expect("errno")
    );

    // One file.
    let mut spec = world.spec(&["cat", "/etc/single"]);
    let file = volume.join("key");
    spec["mounts"]
        .as_array_mut()
        .expect("mounts")
        .push(mount(&["bind"], "/etc/single", &file));
    assert_eq!(world.run(spec).await.1, "value");

    // Made by the agent for the container, and gone with it.
    let id = world.new_id("tmpfs");
    let target = world.shared("scratch");
    let mut spec = world.spec(&["write", "/scratch/file", "x"]);
    spec["mounts"]
        .as_array_mut()
        .expect("mounts")
        .push(mount(&["bind"], "/scratch", &target));
    let mut request = world.request(&id, spec);
    request.mounts.push(proto::Mount {
        target: target.display().to_string(),
        type_: "tmpfs".into(),
        options: vec!["size=1m".into(), "nosuid".into()],
        make_target: true,
        ..Default::default()
    });
    world.try_start(request).await.expect("start");
    assert_eq!(world.finish(&id).await.0, 0);
    world.delete(&id).await;
    assert_eq!(fs::read_dir(&target).expect("folder").count(), 0);
}

pub(crate) async fn signals_are_not_inherited(world: Arc<World>) {
    let id = world.new_id("signals");
    world.start(&id, world.spec(&["sleep"])).await;
    // Before Rust's own start-up a program's ignored signals are what it was executed with; the
    // shell-free way to see them is a process that has not started: the container's first one is
    // looked at through what an exec inherits.
    world
        .exec(&id, "status", process(&["pipe-signal"]))
        .await
        .expect("exec");
    let seen = status(&world.read(&id, "status", Kind::Stdout).await);
    // Rust ignores SIGPIPE (bit 12) itself; nothing else may be ignored or blocked.
    let ignored = u64::from_str_radix(&seen["SigIgn"], 16).expect("mask");
    assert_eq!(ignored & !(1 << 12), 0, "{}", seen["SigIgn"]);
    assert_eq!(seen["SigBlk"], "0000000000000000");
    world.delete(&id).await;
}

pub(crate) async fn a_deleted_container_leaves_nothing(world: Arc<World>) {
    let id = world.new_id("gone");
    world.start(&id, world.spec(&["sleep"])).await;
    world
        .exec(&id, "e", process(&["sleep"]))
        .await
        .expect("exec");
    world.delete(&id).await;
    let error = world.kill(&id, libc::SIGKILL).await.expect_err("gone");
    assert_eq!(refusal(&error).kind, RefusalKind::REFUSAL_NOT_FOUND);
    let list = world
        .agent
        .list_containers(Context::default(), &Default::default())
        .await;
    let left = list.expect("list").processes;
    assert!(left.iter().all(|process| process.container_id != id));
    // The same id can be had again, also after a creation that failed.
    let mut broken = world.spec(&[]);
    broken["process"]["args"] = json!(["/nope"]);
    world
        .try_start(world.request(&id, broken))
        .await
        .expect_err("no program");
    world.start(&id, world.spec(&["exit", "7"])).await;
    assert_eq!(world.wait(&id, "").await.exit_code, 7);
    let twice = world
        .try_start(world.request(&id, world.spec(&["sleep"])))
        .await;
    assert_eq!(
        refusal(&twice.expect_err("twice")).kind,
        RefusalKind::REFUSAL_ALREADY_EXISTS
    );
    world.delete(&id).await;
}

pub(crate) async fn the_helper_comes_back(world: Arc<World>) {
    let folder = world.shared("").display().to_string();
    let status_of =
        |pid: i32| fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let command_of =
        |pid: &str| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let helper = fs::read_dir("/proc")
        .expect("proc")
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().parse::<i32>().ok())
        .filter(|pid| command_of(&pid.to_string()).starts_with("kiln-agent-helper\0"))
        // A worker's parent is the helper; the helper's is this world's agent, which is also that of
        // the shared PID namespace's first process, but that one has another name.
        .find(|pid| {
            let seen = status(&status_of(*pid));
            let parent = seen.get("PPid").cloned().unwrap_or_default();
            seen.get("Name").is_some_and(|name| name != "pause")
                && command_of(&parent).contains(&folder)
        });
    let helper = helper.expect("a helper");
    // SAFETY: no pointers; the number is that of a helper seen just now.
    unsafe { libc::kill(helper, libc::SIGKILL) };
    // A job that reached the helper before the signal did would end with it.
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(30);
    let lives = || {
        let seen = status(&status_of(helper));
        seen.get("State")
            .is_some_and(|state| !state.starts_with('Z'))
    };
    while lives() {
        assert!(std::time::Instant::now() < limit, "the helper lives on");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert_eq!(world.run(world.spec(&["exit", "3"])).await.0, 3);
}

pub(crate) async fn the_network_becomes_the_pods(world: Arc<World>) {
    let state = world
        .agent
        .get_network(Context::default(), &Default::default())
        .await;
    let interfaces = state.expect("state").interfaces;
    let Some(veth) = interfaces.iter().find(|one| one.name == "eth7") else {
        println!("no veth in this kernel: only the loopback interface is looked at");
        assert!(interfaces.iter().any(|one| one.name == "lo" && one.up));
        return;
    };
    let request = proto::Network {
        interfaces: vec![
            proto::Interface {
                find_mac: veth.mac.clone(),
                name: "pod0".into(),
                mac: "02:00:00:00:00:07".into(),
                mtu: 1400,
                addresses: vec!["10.77.0.7/24".into(), "fd77::7/64".into()],
                ..Default::default()
            },
            proto::Interface {
                find_mac: interfaces
                    .iter()
                    .find(|one| one.name == "peer7")
                    .expect("peer")
                    .mac
                    .clone(),
                ..Default::default()
            },
        ],
        neighbours: vec![proto::Neighbour {
            address: "10.77.0.1".into(),
            mac: "02:00:00:00:00:01".into(),
            device: "pod0".into(),
            ..Default::default()
        }],
        routes: vec![
            proto::Route {
                gateway: "10.77.0.1".into(),
                device: "pod0".into(),
                ..Default::default()
            },
            proto::Route {
                gateway: "fd77::1".into(),
                device: "pod0".into(),
                ..Default::default()
            },
            proto::Route {
                destination: "10.88.0.0/16".into(),
                device: "pod0".into(),
                ..Default::default()
            },
            proto::Route {
                gateway: "169.254.1.1".into(),
                destination: "10.99.0.0/16".into(),
                device: "pod0".into(),
                onlink: true,
                ..Default::default()
            },
        ],
        dns: Some(proto::Dns {
            nameservers: vec!["10.96.0.10".into()],
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let state = world
        .agent
        .configure_network(Context::default(), &request)
        .await
        .expect("network");
    let pod = state
        .interfaces
        .iter()
        .find(|one| one.name == "pod0")
        .expect("renamed");
    assert!(pod.up);
    assert_eq!((pod.mac.as_str(), pod.mtu), ("02:00:00:00:00:07", 1400));
    assert!(
        pod.addresses.contains(&"10.77.0.7/24".to_owned()),
        "{:?}",
        pod.addresses
    );
    assert!(
        pod.addresses.contains(&"fd77::7/64".to_owned()),
        "{:?}",
        pod.addresses
    );
    let (_, routes, _) = world.run(world.spec(&["cat", "/proc/net/route"])).await;
    // Destination and gateway in the kernel's own notation.
    assert!(routes.contains("pod0\t00000000\t01004D0A"), "{routes}");
    assert!(routes.contains("pod0\t0000580A\t00000000"), "{routes}");
    assert!(routes.contains("pod0\t0000630A\t0101FEA9"), "{routes}");
    let (_, addresses, _) = world.run(world.spec(&["cat", "/proc/net/if_inet6"])).await;
    let global = addresses
        .lines()
        .find(|line| line.starts_with("fd77"))
        .expect("IPv6 address");
    let flags = global
        .split_whitespace()
        .nth(4)
        .and_then(|text| u8::from_str_radix(text, 16).ok());
    assert_eq!(
        flags.expect("flags") & 0x40,
        0,
        "usable at once, not tentative: {global}"
    );

    let wrong = proto::Network {
        routes: vec![proto::Route {
            gateway: "x".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let error = world
        .agent
        .configure_network(Context::default(), &wrong)
        .await
        .expect_err("wrong");
    assert_eq!(refusal(&error).kind, RefusalKind::REFUSAL_USAGE);
}
