//! Processes of the node that stand for containers.
//!
//! A container's processes are in the guest, but on the node a container is known by a process. cAdvisor and people with
//! `nsenter` look for the pod's network where that process is, containerd says by its number whose PID namespace a
//! container is to join (`kubectl debug --target`), and whoever kills it means the container. The VMM is none of this: it has
//! a network namespace of its own, and there is one of it for all containers.
//!
//! So each container has a process that does nothing, in the pod's network namespace. It holds about as much memory as the
//! kernel needs for a process, and ends with the shim, however that ends: it waits for the end of a pipe.

mod launch;
mod program;

use std::fs::File;
use std::io;
use std::path::Path;

use kiln_uvm::machine::process_ended;

use crate::error::{Error, Result};
use launch::Process;

/// A process that stands for a container, or for a pod. It ends when this is dropped.
#[derive(Debug)]
pub struct StandIn {
    process: Process,
}

impl StandIn {
    /// Starts one in a network namespace; without one, in the shim's.
    pub fn start(id: &str, netns: Option<&Path>) -> Result<Self> {
        let start = || {
            let netns = netns.map(File::open).transpose()?;
            let program = program::executable()?;
            Process::start(program, &format!("kiln-container {id}"), netns.as_ref())
        };
        let process = start().map_err(|e| {
            Error::failed(
                format!("start the process that stands for {id} on the node"),
                e,
            )
        })?;
        Ok(Self { process })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid.unsigned_abs()
    }

    /// Returns when somebody has ended it, or it was dropped. Has to be called within a runtime.
    pub fn ended(&self) -> io::Result<impl Future<Output = ()> + Send + use<>> {
        process_ended(self.process.handle.try_clone()?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;

    use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

    use super::*;

    fn command_line(pid: u32) -> String {
        fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default()
    }

    /// One that waits for its end.
    fn running() -> StandIn {
        let stand_in = StandIn::start("c1", None).unwrap();
        let call = format!("/proc/{}/syscall", stand_in.pid());
        // read(0, …)
        while !fs::read_to_string(&call).unwrap().starts_with("0 0x0 ") {
            std::thread::yield_now();
        }
        stand_in
    }

    #[test]
    fn it_has_the_containers_name_and_ends_when_it_is_dropped() {
        let stand_in = running();
        let pid = stand_in.pid();
        assert_eq!(command_line(pid), "kiln-container c1\0");
        let directory = fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
        assert_eq!(directory, Path::new("/"));
        drop(stand_in);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn it_ends_with_the_pipe_of_whoever_started_it() {
        let mut stand_in = running();
        stand_in.process.stdin = None;
        let ended = waitid(
            Id::PIDFd(stand_in.process.handle.as_fd()),
            WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT,
        );
        assert!(matches!(ended, Ok(WaitStatus::Exited(_, 0))), "{ended:?}");
    }

    #[test]
    fn it_holds_hardly_any_memory() {
        let stand_in = running();
        let status = fs::read_to_string(format!("/proc/{}/status", stand_in.pid())).unwrap();
        let resident = status.lines().find_map(|line| {
            let number = line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?;
            number.trim().parse::<u32>().ok()
        });
        assert!(resident.unwrap() <= 64, "{status}");
    }

    #[tokio::test]
    async fn its_end_is_seen() {
        let stand_in = StandIn::start("c1", None).unwrap();
        let ended = stand_in.ended().unwrap();
        let pid = i32::try_from(stand_in.pid()).unwrap();
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGTERM,
        )
        .unwrap();
        ended.await;
    }

    #[test]
    fn nothing_of_the_shims_is_open_in_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let stand_in = running();
        for entry in fs::read_dir(format!("/proc/{}/fd", stand_in.pid())).unwrap() {
            let to = fs::read_link(entry.unwrap().path()).unwrap();
            assert_ne!(to, file.path());
        }
    }

    #[test]
    fn namespace_that_is_not_there_is_an_error_that_names_the_container() {
        let error = StandIn::start("c1", Some(Path::new("/no/such/namespace"))).unwrap_err();
        assert!(error.chain().contains("stands for c1"), "{}", error.chain());
    }
}
