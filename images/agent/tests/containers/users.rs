//! Containers in a user namespace.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_agent_api::proto;
use kiln_agent_api::stream::Kind;
use protobuf::EnumOrUnknown;
use serde_json::{Value, json};

use crate::world::{World, header, process, type_in};

/// What root of the namespaces in these tests is outside.
const ROOT: u32 = 200_000;

/// A spec with a user namespace, as containerd writes it for a pod with `hostUsers: false`.
fn spec(world: &World, args: &[&str]) -> Value {
    let mut spec = world.spec(args);
    let mappings = json!([{"containerID": 0, "hostID": ROOT, "size": 65_536}]);
    spec["linux"]["uidMappings"] = mappings.clone();
    spec["linux"]["gidMappings"] = mappings;
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    let namespaces = namespaces.expect("namespaces");
    namespaces.push(json!({"type": "user"}));
    // The guest's own message queues may not be mounted where this runs.
    for namespace in namespaces.iter_mut().filter(|n| n["type"] == "ipc") {
        *namespace = json!({"type": "ipc"});
    }
    spec
}

/// A request for it whose root is the image with its owners mapped.
fn request(world: &World, id: &str, spec: Value) -> proto::CreateContainerRequest {
    let target = world.shared(&format!("root-{id}")).display().to_string();
    let mut request = world.request(id, spec);
    request.mounts.push(proto::Mount {
        source: request.rootfs.clone(),
        target: target.clone(),
        type_: "bind".into(),
        make_target: true,
        idmapped: true,
        ..Default::default()
    });
    request.rootfs = target;
    request
}

async fn start(world: &World, what: &str, spec: Value) -> String {
    let id = world.new_id(what);
    let started = world.try_start(request(world, &id, spec)).await;
    started.unwrap_or_else(|error| panic!("start {id}: {error}\n{}", world.log()));
    id
}

async fn run(world: &World, spec: Value) -> (u32, String, String) {
    let id = start(world, "mapped", spec).await;
    let result = world.finish(&id).await;
    world.delete(&id).await;
    result
}

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

pub(crate) async fn a_user_namespace_has_the_specs_map_and_the_images_owners(world: Arc<World>) {
    let map = run(&world, spec(&world, &["cat", "/proc/self/uid_map"])).await;
    assert_eq!(words(&map.1), ["0", "200000", "65536"], "{map:?}");
    let map = run(&world, spec(&world, &["cat", "/proc/self/gid_map"])).await;
    assert_eq!(words(&map.1), ["0", "200000", "65536"]);
    let owner = run(&world, spec(&world, &["owner", "/etc/passwd"])).await;
    assert_eq!(owner.1, "0 0\n");
    // Root's own, and what root makes is root's in the image as well.
    let made = run(
        &world,
        spec(&world, &["write", "/made-in-a-namespace", "x"]),
    )
    .await;
    assert_eq!(made.0, 0, "{made:?}");
    let made = fs::metadata(world.image().join("made-in-a-namespace")).expect("made");
    assert_eq!((made.uid(), made.gid()), (0, 0));
}

pub(crate) async fn a_file_that_is_not_mapped_is_nobodys(world: Arc<World>) {
    let volume = world.shared("unmapped");
    fs::create_dir_all(&volume).expect("volume");
    fs::write(volume.join("roots"), "x").expect("file");
    let mut spec = spec(&world, &["owner", "/data/roots"]);
    let mounts = spec["mounts"].as_array_mut().expect("mounts");
    mounts.push(
        json!({"destination": "/data", "type": "bind", "source": volume, "options": ["rbind"]}),
    );
    assert_eq!(run(&world, spec.clone()).await.1, "65534 65534\n");
    spec["process"]["args"] = json!(["/bin/inside", "--inside", "write", "/data/roots", "y"]);
    let refused = run(&world, spec).await;
    assert_eq!(refused.0, u32::try_from(libc::EACCES).expect("errno"));
}

pub(crate) async fn containers_and_execs_of_a_pod_share_the_user_namespace(world: Arc<World>) {
    const OWN: &str = "/proc/self/ns/user";
    let first = start(&world, "first", spec(&world, &["sleep"])).await;
    let second = run(&world, spec(&world, &["link", OWN])).await.1;
    let ask = |name: &'static str, uid: u32, args: &'static [&'static str]| {
        let mut process = process(args);
        process["user"] = json!({"uid": uid, "gid": uid, "additionalGids": [7]});
        process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 100}]);
        let (world, first) = (world.clone(), first.clone());
        async move {
            let asked = world.exec(&first, name, process).await;
            asked.unwrap_or_else(|error| panic!("exec {name}: {error}\n{}", world.log()));
            let said = world.read(&first, name, Kind::Stdout).await;
            (said, world.wait(&first, name).await.exit_code)
        }
    };
    assert_eq!(ask("same", 0, &["link", OWN]).await, (second.clone(), 0));
    assert_eq!(ask("user", 33, &["link", OWN]).await, (second.clone(), 0));
    let outside = fs::read_link(OWN).expect("own").display().to_string();
    assert_ne!(second.trim(), outside);
    let reopened = ask("reopen", 33, &["reopen"]).await;
    assert_eq!(reopened, ("again\n".to_owned(), 0));
    world.delete(&first).await;
}

pub(crate) async fn a_shared_pid_namespace_is_the_user_namespaces(world: Arc<World>) {
    let mut ids = Vec::new();
    for what in ["one", "two"] {
        let id = world.new_id(what);
        let mut request = request(&world, &id, spec(&world, &["sleep"]));
        request.pid_namespace = EnumOrUnknown::new(proto::PidNamespace::PID_POD);
        let started = world.try_start(request).await;
        started.unwrap_or_else(|error| panic!("start {id}: {error}\n{}", world.log()));
        ids.push(id);
    }
    let id = world.new_id("debug");
    let mut debug = request(&world, &id, spec(&world, &["list", "/proc"]));
    debug.pid_namespace = EnumOrUnknown::new(proto::PidNamespace::PID_CONTAINER);
    debug.pid_namespace_container.clone_from(&ids[0]);
    let started = world.try_start(debug).await;
    started.unwrap_or_else(|error| panic!("start {id}: {error}\n{}", world.log()));
    let seen = world.finish(&id).await.1;
    let numbers = seen.lines().filter(|name| name.parse::<u32>().is_ok());
    assert!(numbers.count() >= 4, "pause, two and this one: {seen}");
    ids.push(id);
    for id in &ids {
        world.delete(id).await;
    }
}

pub(crate) async fn a_terminal_belongs_to_a_user_of_the_namespace(world: Arc<World>) {
    let id = start(&world, "terminal", spec(&world, &["sleep"])).await;
    let mut process = process(&["terminal"]);
    process["terminal"] = json!(true);
    process["user"] = json!({"uid": 33, "gid": 33});
    let started = world.exec(&id, "t", process).await;
    started.unwrap_or_else(|error| panic!("exec: {error}\n{}", world.log()));
    let output = world.stream(&id, "t", Kind::Stdout).await;
    type_in(
        world
            .vsock
            .stream(&header(&id, "t", Kind::Stdin))
            .await
            .expect("stream"),
        "\u{4}",
    )
    .await;
    drop(output);
    assert_eq!(world.wait(&id, "t").await.exit_code, 0);
    world.delete(&id).await;
}

pub(crate) async fn a_user_outside_of_the_map_is_refused_by_name(world: Arc<World>) {
    let mut spec = spec(&world, &["exit", "0"]);
    spec["process"]["user"] = json!({"uid": 70_000, "gid": 0});
    let id = world.new_id("stranger");
    let refused = world.try_start(request(&world, &id, spec)).await;
    let text = refused.expect_err("refused").to_string();
    assert!(text.contains("user 70000"), "{text}");
}

pub(crate) async fn a_mount_of_the_pod_has_no_users_to_map(world: Arc<World>) {
    let mut request = proto::AddMountsRequest::new();
    request.mounts.push(proto::Mount {
        target: world.shared("no-users").display().to_string(),
        type_: "tmpfs".into(),
        make_target: true,
        idmapped: true,
        ..Default::default()
    });
    let refused = world.agent.add_mounts(Default::default(), &request).await;
    let text = refused.expect_err("refused").to_string();
    assert!(text.contains("no-users"), "{text}");
    assert!(!PathBuf::from(&request.mounts[0].target).exists());
}
