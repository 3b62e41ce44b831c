//! Cleaning up after a shim that can't do it itself.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::Duration;

use kiln_overlay::Budget;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::network;
use crate::record::{PodDir, ProcessRef, Record};
use crate::{bootstrap, cgroup};

/// How long a killed process may take to be gone.
const KILL_WAIT: Duration = Duration::from_secs(2);

/// Removes everything that is left of a pod: VMM, network devices, cgroup, socket, directory. What
/// can't be removed is told to the log and does not stop the rest. Idempotent.
pub fn pod(dir: &PodDir, address: &str) {
    let note = |what: &str, result: io::Result<()>| {
        if let Err(error) = result {
            tracing::warn!(pod = %dir.path().display(), %error, "cleaning up: {what}");
        }
    };
    // Its shim first: it may be making more, which the end waits for.
    if let Some(record) = dir.load() {
        processes(&[record.shim], &note);
    }
    if let Some(record) = dir.end() {
        processes(&[record.shim, record.vmm], &note);
        resources(&record, &note);
    }
    note(
        "give its place in the overlays' budget back",
        Budget::bury_at(&dir.overlay_budget()).map_err(io::Error::other),
    );
    note("remove the socket", bootstrap::remove(address));
    note("remove the pod's directory", dir.remove());
}

/// Removes other pods that nobody else will: a shim that is killed between its answer and containerd's first call is
/// forgotten by containerd, which removes the bundle and asks for nothing more.
pub fn orphans(own: &PodDir) {
    for other in own.others() {
        let Some(record) = other.last_record() else {
            continue;
        };
        let forgotten = record.bundle.as_ref().is_some_and(|b| !b.exists());
        let address = record.address.unwrap_or_default();
        let lives = record.shim.is_some_and(|shim| shim.is_alive());
        if forgotten && !lives && !bootstrap::is_alive(&address) {
            tracing::warn!(pod = %other.path().display(), "removing what a killed shim left");
            pod(&other, &address);
        }
    }
}

type Note<'a> = &'a dyn Fn(&str, io::Result<()>);

fn processes(all: &[Option<ProcessRef>], note: Note<'_>) {
    let own = i32::try_from(std::process::id()).ok();
    for process in all.iter().copied().flatten() {
        // A shim that ends in good order cleans up after itself by the same record.
        if Some(process.pid) != own {
            note("kill a process", kill(process));
        }
    }
}

fn resources(record: &Record, note: Note<'_>) {
    if let Some(netns) = &record.netns {
        // A namespace that is gone took its devices along.
        if let Ok(netns) = File::open(netns) {
            let removed = network::remove(&netns, &record.redirected, &record.taps);
            note("remove network devices", removed.map_err(io::Error::other));
        }
    }
    if let Some(directory) = &record.cgroup {
        note("remove the cgroup", cgroup::remove(directory));
    }
}

/// Kills a process and waits until it is gone.
pub fn kill(process: ProcessRef) -> io::Result<()> {
    let Some(pidfd) = pidfd_open(process.pid)? else {
        return Ok(());
    };
    // Checked after the descriptor is held: from here on the number can't be another process's.
    if !process.is_alive() {
        return Ok(());
    }
    pidfd_kill(&pidfd)?;
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(KILL_WAIT).map_err(io::Error::other)?;
    if poll(&mut fds, timeout)? == 0 {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "a killed process stays",
        ));
    }
    Ok(())
}

/// A descriptor for a process; `None` if there is no such process.
pub fn pidfd_open(pid: i32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: the call takes two numbers and returns a new descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        // EINVAL: the number is a thread's now, or that of a process that is just being reaped.
        return if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) {
            Ok(None)
        } else {
            Err(error)
        };
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}

pub fn pidfd_kill(pidfd: &OwnedFd) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open, and a null pointer stands for "no siginfo".
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ESRCH) {
        Ok(())
    } else {
        Err(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::process::Command;
    use std::thread;

    #[test]
    fn what_a_killed_shim_left_is_removed_and_twice_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        let mut vmm = Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessRef::of(i32::try_from(vmm.id()).unwrap()).unwrap();
        let reaper = thread::spawn(move || vmm.wait().unwrap());
        let pod_dir = PodDir::new(dir.path(), "n", "p");
        pod_dir.create().unwrap();
        pod_dir
            .save(&Record {
                vmm: Some(process),
                ..Record::default()
            })
            .unwrap();
        let address = format!("unix://{}/s", dir.path().display());
        drop(UnixListener::bind(bootstrap::path_of(&address)).unwrap());

        pod(&pod_dir, &address);
        assert!(!reaper.join().unwrap().success());
        assert!(!pod_dir.path().exists());
        assert!(!bootstrap::path_of(&address).exists());
        pod(&pod_dir, &address);
    }

    #[test]
    fn only_what_nobody_will_ask_for_is_an_orphan() {
        let dir = tempfile::tempdir().unwrap();
        let own = ProcessRef::of(i32::try_from(std::process::id()).unwrap());
        let dead = own.map(|own| ProcessRef {
            started: own.started + 1,
            ..own
        });
        let bundle = dir.path().join("bundle");
        std::fs::create_dir(&bundle).unwrap();
        let make = |name: &str, shim, bundle: &Path| {
            let pod = PodDir::new(dir.path(), "n", name);
            pod.create().unwrap();
            let address = format!("unix://{}/{name}.sock", dir.path().display());
            drop(UnixListener::bind(bootstrap::path_of(&address)).unwrap());
            pod.save(&Record {
                shim,
                bundle: Some(bundle.to_owned()),
                address: Some(address),
                ..Record::default()
            })
            .unwrap();
            pod
        };
        let gone = dir.path().join("gone");
        let ours = make("ours", own, &bundle);
        let orphan = make("orphan", dead, &gone);
        let half_removed = make("half-removed", dead, &gone);
        half_removed.end();
        let stays = [
            make("known", dead, &bundle),
            make("lives", own, &gone),
            make("begins", None, &bundle),
        ];
        orphans(&ours);
        assert!(!orphan.path().exists() && !half_removed.path().exists());
        assert!(!dir.path().join("orphan.sock").exists());
        assert!(stays.iter().chain([&ours]).all(|pod| pod.path().exists()));
    }

    #[test]
    fn a_shim_that_cleans_up_its_own_pod_survives_it() {
        let dir = tempfile::tempdir().unwrap();
        let own = ProcessRef::of(i32::try_from(std::process::id()).unwrap());
        let pod_dir = PodDir::new(dir.path(), "n", "p");
        pod_dir.create().unwrap();
        pod_dir
            .save(&Record {
                shim: own,
                ..Record::default()
            })
            .unwrap();
        pod(&pod_dir, &format!("unix://{}/s", dir.path().display()));
        assert!(!pod_dir.path().exists());
    }

    #[test]
    fn a_reused_process_id_is_not_killed() {
        let mut other = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(other.id()).unwrap();
        let mut process = ProcessRef::of(pid).unwrap();
        process.started -= 1;
        kill(process).unwrap();
        assert!(
            other.try_wait().unwrap().is_none(),
            "the wrong process was killed"
        );
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
