//! Limits hold, are reported, and hit nobody else.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_agent_api::proto;
use kiln_agent_api::stream::Kind;
use serde_json::json;
use tokio::io::AsyncReadExt;
use ttrpc::context::Context;

use crate::world::{PATIENCE, World, process};

pub(crate) async fn a_paused_container_stands_still(world: Arc<World>) {
    let id = world.new_id("paused");
    world.start(&id, world.spec(&["sleep"])).await;
    let pause = proto::PauseRequest {
        container_id: id.clone(),
        ..Default::default()
    };
    world
        .agent
        .pause(Context::default(), &pause)
        .await
        .expect("pause");
    let state = proto::StateRequest {
        container_id: id.clone(),
        ..Default::default()
    };
    let seen = world
        .agent
        .state(Context::default(), &state)
        .await
        .expect("state");
    assert_eq!(
        seen.phase.enum_value_or_default(),
        proto::Phase::PHASE_PAUSED
    );
    let refused = world.exec(&id, "e", process(&["exit", "0"])).await;
    assert!(
        refused
            .expect_err("no exec while paused")
            .to_string()
            .contains("paused")
    );
    let unpause = proto::UnpauseRequest {
        container_id: id.clone(),
        ..Default::default()
    };
    world
        .agent
        .unpause(Context::default(), &unpause)
        .await
        .expect("unpause");
    world
        .exec(&id, "e", process(&["exit", "5"]))
        .await
        .expect("exec");
    assert_eq!(world.wait(&id, "e").await.exit_code, 5);
    world
        .agent
        .pause(Context::default(), &pause)
        .await
        .expect("pause again");
    world.kill(&id, libc::SIGKILL).await.expect("kill");
    assert_eq!(world.wait(&id, "").await.exit_code, 137);
    world.delete(&id).await;
}

pub(crate) async fn memory_runs_out_for_one_container_only(world: Arc<World>) {
    let mut events = world
        .agent
        .events(Context::default(), &Default::default())
        .await
        .expect("events");
    let (victim, neighbour) = (world.new_id("victim"), world.new_id("neighbour"));
    world.start(&neighbour, world.spec(&["sleep"])).await;
    let mut spec = world.spec(&["fill", "256"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 33_554_432, "swap": 33_554_432});
    world.start(&victim, spec).await;
    let status = world.wait(&victim, "").await;
    assert_eq!(status.exit_code, 137);
    assert!(status.oom_killed, "the reason is told");
    let mut told = false;
    loop {
        let event = tokio::time::timeout(PATIENCE, events.recv())
            .await
            .expect("in time");
        let event = event.expect("event").expect("more events");
        if event.has_oom() && event.oom().container_id == victim {
            assert!(event.oom().kills >= 1);
            told = true;
        }
        if event.has_exit() && event.exit().container_id == victim {
            break;
        }
    }
    assert!(told, "an OOM event comes before the exit");
    let state = proto::StateRequest {
        container_id: neighbour.clone(),
        ..Default::default()
    };
    let seen = world
        .agent
        .state(Context::default(), &state)
        .await
        .expect("state");
    assert_eq!(
        seen.phase.enum_value_or_default(),
        proto::Phase::PHASE_RUNNING
    );
    let mut enough = world.spec(&["fill", "16"]);
    enough["linux"]["resources"]["memory"] = json!({"limit": 67_108_864});
    assert_eq!(world.run(enough).await.1, "filled 16\n");
    world.delete(&victim).await;
    world.delete(&neighbour).await;
}

async fn stats(world: &World, id: &str) -> proto::StatsResponse {
    let request = proto::StatsRequest {
        container_id: id.to_owned(),
        ..Default::default()
    };
    world
        .agent
        .stats(Context::default(), &request)
        .await
        .expect("stats")
}

pub(crate) async fn a_quota_limits_the_cpu(world: Arc<World>) {
    let id = world.new_id("quota");
    let mut spec = world.spec(&["burn", "3000"]);
    spec["linux"]["resources"]["cpu"] = json!({"quota": 20_000, "period": 100_000, "shares": 512});
    let start = Instant::now();
    world.start(&id, spec).await;
    assert_eq!(world.wait(&id, "").await.exit_code, 0);
    let took = start.elapsed().as_secs_f64();
    let cpu = stats(&world, &id).await.cpu.unwrap_or_default();
    let used = cpu.usage_usec as f64 / 1e6;
    assert!(cpu.nr_throttled > 0);
    assert!(
        used / took < 0.3,
        "{used} s of {took} s with a fifth of a CPU"
    );
    world.delete(&id).await;
}

pub(crate) async fn processes_are_limited(world: Arc<World>) {
    let mut spec = world.spec(&["spawn", "50"]);
    spec["linux"]["resources"]["pids"] = json!({"limit": 20});
    let (code, out, _) = world.run(spec).await;
    assert_eq!(code, u32::try_from(libc::EAGAIN).expect("errno"), "{out}");
    let count: u32 = out
        .trim()
        .rsplit(' ')
        .next()
        .and_then(|n| n.parse().ok())
        .expect("count");
    assert!((10..20).contains(&count), "{count}");
}

pub(crate) async fn a_fork_bomb_leaves_the_agent_alone(world: Arc<World>) {
    let id = world.new_id("bomb");
    let mut spec = world.spec(&["bomb"]);
    spec["linux"]["resources"]["pids"] = json!({"limit": 512});
    world.start(&id, spec).await;
    let mut word = [0; 4];
    world
        .stream(&id, "", Kind::Stdout)
        .await
        .read_exact(&mut word)
        .await
        .expect("bomb");
    let start = Instant::now();
    assert_eq!(
        world.run(world.spec(&["exit", "4"])).await.0,
        4,
        "others still start"
    );
    world.answers().await;
    println!("a container beside a fork bomb in {:?}", start.elapsed());
    world.delete(&id).await;
}

pub(crate) async fn limits_can_be_changed(world: Arc<World>) {
    let id = world.new_id("update");
    let mut spec = world.spec(&["sleep"]);
    spec["linux"]["resources"]["memory"] = json!({"limit": 67_108_864});
    world.start(&id, spec).await;
    assert_eq!(stats(&world, &id).await.memory.max, 67_108_864);
    let resources = json!({
        "memory": {"limit": 134_217_728}, "cpu": {"quota": 50_000, "period": 100_000},
        "pids": {"limit": 77}, "unified": {"memory.high": "100000000"}
    });
    let request = proto::UpdateRequest {
        container_id: id.clone(),
        resources: serde_json::to_vec(&resources).expect("json"),
        ..Default::default()
    };
    world
        .agent
        .update(Context::default(), &request)
        .await
        .expect("update");
    let seen = stats(&world, &id).await;
    assert_eq!((seen.memory.max, seen.pids.max), (134_217_728, 77));
    let pod = world.pod_cgroup().expect("controllers");
    let high = fs::read_dir(pod)
        .expect("cgroups")
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("memory.high")).ok())
        .any(|text| text.trim() == "99999744" || text.trim() == "100000000");
    assert!(high, "unified keys are written");
    world.delete(&id).await;
}

pub(crate) async fn stats_tell_what_was_used(world: Arc<World>) {
    let id = world.new_id("stats");
    world.start(&id, world.spec(&["sleep"])).await;
    world
        .exec(&id, "burn", process(&["burn", "300"]))
        .await
        .expect("exec");
    world.wait(&id, "burn").await;
    let seen = stats(&world, &id).await;
    assert!(seen.cpu.usage_usec >= 100_000, "{}", seen.cpu.usage_usec);
    assert!(seen.memory.current > 0 && seen.memory.stat.contains_key("anon"));
    assert_eq!(seen.pids.current, 1);
    let pod = stats(&world, "").await;
    assert!(pod.cpu.usage_usec >= seen.cpu.usage_usec && pod.pids.current >= 1);
    let request = proto::PidsRequest {
        container_id: id.clone(),
        ..Default::default()
    };
    let pids = world
        .agent
        .pids(Context::default(), &request)
        .await
        .expect("pids")
        .processes;
    assert_eq!(pids.len(), 1);
    tokio::time::sleep(Duration::from_millis(1)).await;
    world.delete(&id).await;
}
