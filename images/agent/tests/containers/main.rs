//! Containers for real: the agent in namespaces of its own, on a machine with root and cgroup v2.
//!
//! `cargo test -p kiln-agent --test containers`; in the node VM, copy the test's binary and the
//! agent's there (see `docs/agent.md`).

mod inside;
mod limits;
mod plain;
mod streams;
mod users;
mod world;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Trial};

use crate::world::World;

/// A test: its name, whether it needs cgroup controllers, and what it does.
type Case = (&'static str, bool, fn(Arc<World>) -> futures_of::Test);

/// The boxed future of a test.
mod futures_of {
    use std::pin::Pin;

    pub(crate) type Test = Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// A row of the table of tests.
macro_rules! case {
    ($module:ident :: $name:ident) => {
        (stringify!($name), false, |world| {
            Box::pin($module::$name(world))
        })
    };
    ($module:ident :: $name:ident, controllers) => {
        (stringify!($name), true, |world| {
            Box::pin($module::$name(world))
        })
    };
}

const CASES: &[Case] = &[
    case!(plain::nothing_runs_before_the_identity),
    case!(plain::exit_codes_and_signals_come_through),
    case!(plain::very_short_processes_never_lose_their_exit),
    case!(plain::a_container_sees_what_its_spec_says),
    case!(plain::capabilities_are_the_specs),
    case!(plain::users_and_groups_are_the_specs),
    case!(plain::a_filter_holds_for_the_container_and_for_execs),
    case!(plain::a_read_only_root_is_read_only),
    case!(plain::masked_paths_are_empty_and_readonly_paths_hold),
    case!(plain::a_program_that_is_missing_is_named),
    case!(plain::containers_of_a_pod_share_what_pods_share),
    case!(plain::a_pid_namespace_can_be_shared),
    case!(plain::volumes_are_mounted),
    case!(plain::signals_are_not_inherited),
    case!(plain::a_deleted_container_leaves_nothing),
    case!(plain::the_helper_comes_back),
    case!(plain::the_network_becomes_the_pods),
    case!(plain::an_identity_is_given_once),
    case!(streams::output_waits_for_its_reader),
    case!(streams::input_ends_when_the_host_says_so),
    case!(streams::fifty_thousand_lines_arrive),
    case!(streams::a_hundred_execs_run_side_by_side),
    case!(streams::a_terminal_is_a_terminal),
    case!(streams::an_exec_can_have_a_terminal),
    case!(streams::a_wrong_token_opens_nothing),
    case!(streams::a_port_of_the_pod_is_reached),
    case!(streams::a_user_may_reopen_its_output),
    case!(users::a_user_namespace_has_the_specs_map_and_the_images_owners),
    case!(users::a_file_that_is_not_mapped_is_nobodys),
    case!(users::containers_and_execs_of_a_pod_share_the_user_namespace),
    case!(users::a_shared_pid_namespace_is_the_user_namespaces),
    case!(users::a_terminal_belongs_to_a_user_of_the_namespace),
    case!(users::a_user_outside_of_the_map_is_refused_by_name),
    case!(users::a_mount_of_the_pod_has_no_users_to_map),
    case!(limits::a_paused_container_stands_still),
    case!(limits::memory_runs_out_for_one_container_only, controllers),
    case!(limits::a_quota_limits_the_cpu, controllers),
    case!(limits::processes_are_limited, controllers),
    case!(limits::a_fork_bomb_leaves_the_agent_alone, controllers),
    case!(limits::limits_can_be_changed, controllers),
    case!(limits::stats_tell_what_was_used, controllers),
];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == "--inside") {
        return ExitCode::from(inside::run(&words[1..]).to_le_bytes()[0]);
    }
    if words.first().is_some_and(|word| word == "--set-up") {
        let Err(error) = world::set_up() else {
            return ExitCode::SUCCESS;
        };
        eprintln!("set up the world: {error}");
        return ExitCode::FAILURE;
    }
    let arguments = Arguments::from_args();
    let missing = world::missing();
    if let Some(why) = &missing {
        println!("skipped: {why}");
    }
    let controllers = world::has_controllers();
    if !controllers && missing.is_none() {
        println!("tests of limits are skipped: /sys/fs/cgroup is not cgroup v2 with controllers");
    }
    let listing = arguments.list || missing.is_some();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("runtime");
    let world = (!listing).then(|| Arc::new(runtime.block_on(World::new())));
    let handle = runtime.handle().clone();
    let trials = CASES
        .iter()
        .map(|&(name, needs_controllers, case)| {
            let (world, handle) = (world.clone(), handle.clone());
            let alone = name == "the_helper_comes_back";
            let ignored = missing.is_some() || (needs_controllers && !controllers);
            Trial::test(name, move || {
                let world = world.ok_or("there is no world to test in")?;
                let task = handle.spawn(async move {
                    let turn = world.turn.clone();
                    // Whoever kills the helper also kills the jobs of others.
                    let _exclusive = if alone {
                        Some(turn.write().await)
                    } else {
                        None
                    };
                    let _shared = if alone { None } else { Some(turn.read().await) };
                    case(world).await;
                });
                handle.block_on(task).map_err(|error| {
                    let panic = error.try_into_panic().map(|panic| {
                        let text = panic.downcast_ref::<String>().cloned();
                        text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
                    });
                    panic
                        .ok()
                        .flatten()
                        .unwrap_or_else(|| "it panicked".to_owned())
                        .into()
                })
            })
            .with_ignored_flag(ignored)
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(world);
    conclusion.exit_code()
}
