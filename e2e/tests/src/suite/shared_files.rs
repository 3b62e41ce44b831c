//! A folder of the node that several pods and the node itself work in at once.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use k8s_cri::v1::ContainerState;
use kiln_e2e::harness::Case;
use kiln_e2e::pod::{Container, Pod, STEP};
use kiln_e2e::{ContainerSpec, Test, cases, node, setup};
use tokio::process::Command;

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    cases![
        what_is_counted_under_a_lock_is_counted_once,
        waiter_for_a_lock_holds_nobody_up_and_can_be_killed,
        pod_ends_while_it_waits_for_a_lock,
        shared_folder_has_all_that_programs_do_with_files,
        what_the_node_writes_is_there_at_the_next_open,
        shared_folder_is_as_full_as_the_nodes_file_system,
        attributes_and_lists_are_the_same_inside_and_outside,
    ]
}

const HOWS: [&str; 2] = ["flock", "fcntl"];

fn shared(test: &Test) -> Result<PathBuf> {
    let folder = test.scratch().join("shared");
    fs::create_dir(&folder)?;
    for how in HOWS {
        fs::write(folder.join(how), "0\n")?;
    }
    Ok(folder)
}

/// A pod with a container that has the folder as `/shared`.
async fn sharing(test: &Test) -> Result<(PathBuf, Pod, Container)> {
    let folder = shared(test)?;
    let pod = test.pod().await?;
    let spec = ContainerSpec::pause("main").mount(&folder, "/shared");
    let container = pod.start(&spec).await?;
    Ok((folder, pod, container))
}

/// A lock that the node holds, and a container that waits for it.
async fn waiting(folder: &Path, pod: &Pod) -> Result<(File, Container)> {
    let held = File::open(folder.join("flock"))?;
    held.lock()?;
    let spec = ContainerSpec::testprog("waiter", &["count", "/shared/flock", "1", "flock"])
        .mount(folder, "/shared");
    let waiter = pod.start(&spec).await?;
    waiter.log().wait_for("counting", STEP).await?;
    Ok((held, waiter))
}

async fn what_is_counted_under_a_lock_is_counted_once(test: Test) -> Result<()> {
    const TIMES: u64 = 100;
    let times = TIMES.to_string();
    let folder = shared(&test)?;
    let pods = [test.pod().await?, test.pod().await?];
    for how in HOWS {
        let inside = format!("/shared/{how}");
        let mut containers = Vec::new();
        // Two in one pod are kept apart by the same means as two in two.
        for (pod, name) in [(&pods[0], "a"), (&pods[0], "b"), (&pods[1], "c")] {
            let name = format!("{name}-{how}");
            let spec = ContainerSpec::testprog(&name, &["count", &inside, &times, how])
                .mount(&folder, "/shared");
            containers.push(pod.start(&spec).await?);
        }
        let outside = folder.join(how);
        let counted = Command::new(setup::testprog_path()?)
            .arg("count")
            .arg(&outside)
            .args([&times, how])
            .stdout(Stdio::null())
            .status()
            .await?;
        ensure!(counted.success(), "{counted}");
        for container in &containers {
            same!(container.wait_for(STEP).await?.exit_code, 0);
        }
        same!(
            fs::read_to_string(&outside)?.trim(),
            (4 * TIMES).to_string()
        );
    }
    Ok(())
}

async fn waiter_for_a_lock_holds_nobody_up_and_can_be_killed(test: Test) -> Result<()> {
    let (folder, pod, other) = sharing(&test).await?;
    let (held, waiter) = waiting(&folder, &pod).await?;
    for round in 0..20 {
        fs::write(folder.join("fcntl"), format!("{round}\n"))?;
        same!(
            other.read(&["cat", "/shared/fcntl"]).await?,
            round.to_string()
        );
    }
    same!(waiter.state().await?, ContainerState::ContainerRunning);
    waiter.stop(std::time::Duration::ZERO).await?;
    same!(waiter.wait_for(STEP).await?.exit_code, 137);
    // Nobody got it after all.
    drop(held);
    File::open(folder.join("flock"))?
        .try_lock()
        .context("the lock of a waiter that was killed")?;
    same!(fs::read_to_string(folder.join("flock"))?, "0\n");
    Ok(())
}

async fn pod_ends_while_it_waits_for_a_lock(test: Test) -> Result<()> {
    let folder = shared(&test)?;
    let pod = test.pod().await?;
    let (held, _waiter) = waiting(&folder, &pod).await?;
    pod.remove().await?;
    drop(held);
    File::open(folder.join("flock"))?.try_lock()?;
    Ok(())
}

async fn shared_folder_has_all_that_programs_do_with_files(test: Test) -> Result<()> {
    let (_folder, _pod, container) = sharing(&test).await?;
    let found = container.read(&["testprog", "features", "/shared"]).await?;
    if test.handler() == "runc" {
        same!(found, "all");
    } else {
        // The guest's kernel passes neither on, whatever the file server could do.
        let refused = "Operation not supported (os error 95)";
        same!(
            found,
            format!("no collapse: {refused}\nno insert: {refused}")
        );
    }
    Ok(())
}

async fn what_the_node_writes_is_there_at_the_next_open(test: Test) -> Result<()> {
    let (folder, _pod, container) = sharing(&test).await?;
    let file = folder.join("file");
    for round in 0..20 {
        // As long as before, longer, shorter, another file of the name, none.
        let text = match round % 5 {
            0 => format!("first {round:02}"),
            1 => format!("other {round:02}"),
            2 => format!("longer than it was before {round:02}"),
            3 => format!("{round:02}"),
            _ => format!("new {round:02}"),
        };
        if round % 5 == 4 {
            fs::write(folder.join("new"), &text)?;
            fs::rename(folder.join("new"), &file)?;
        } else {
            fs::write(&file, &text)?;
        }
        same!(container.read(&["cat", "/shared/file"]).await?, text);
        if round % 5 == 4 {
            fs::remove_file(&file)?;
            ensure!(container.exec(&["cat", "/shared/file"]).await?.code != 0);
        }
    }
    Ok(())
}

async fn shared_folder_is_as_full_as_the_nodes_file_system(test: Test) -> Result<()> {
    let (folder, _pod, container) = sharing(&test).await?;
    let of = |path: &str| ["stat", "-f", "-c", "%S %b %c %l", path].map(str::to_owned);
    let outside = of(&folder.display().to_string());
    let outside = node::busybox(&outside.each_ref().map(String::as_str))?;
    let inside = of("/shared");
    let inside = container
        .read(&inside.each_ref().map(String::as_str))
        .await?;
    same!(inside, outside.trim());
    Ok(())
}

async fn attributes_and_lists_are_the_same_inside_and_outside(test: Test) -> Result<()> {
    let (folder, pod, container) = sharing(&test).await?;
    // A folder's default list is what files made in it get, whoever makes them.
    let list = posix_list(&[
        (1, 7, u32::MAX),
        (2, 6, 4321),
        (4, 5, u32::MAX),
        (16, 7, u32::MAX),
        (32, 0, u32::MAX),
    ]);
    let set = |path: &Path, name: &str, value: &[u8]| {
        rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty())
    };
    set(&folder, "system.posix_acl_default", &list)?;
    set(&folder, "user.from-node", b"1")?;
    container.shell("echo new > /shared/new").await?;
    let mut found = [0; 256];
    let len = rustix::fs::getxattr(folder.join("new"), "system.posix_acl_access", &mut found)
        .context("a file made in the pod has no list")?;
    ensure!(len > 28, "a list of {len} bytes");
    // The user that it names may write, and no other.
    let user = ContainerSpec::pause("user")
        .mount(&folder, "/shared")
        .user(4321, 4321);
    let user = pod.start(&user).await?;
    user.shell("echo more >> /shared/new").await?;
    let stranger = ContainerSpec::pause("stranger")
        .mount(&folder, "/shared")
        .user(4322, 4322);
    let stranger = pod.start(&stranger).await?;
    ensure!(stranger.exec(&["cat", "/shared/new"]).await?.code != 0);
    same!(fs::read_to_string(folder.join("new"))?, "new\nmore\n");
    Ok(())
}

/// A list as it is in the attribute: version 2; a tag, rights and an id each.
fn posix_list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2_u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        value.extend_from_slice(&tag.to_le_bytes());
        value.extend_from_slice(&rights.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    value
}
