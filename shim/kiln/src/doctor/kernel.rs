//! What the host's kernel offers besides KVM.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use super::{Check, System};

/// Only root may set up pods, and only root sees all that the checks look at.
pub(super) fn user() -> Check {
    // SAFETY: a system call without arguments that cannot fail.
    user_with(unsafe { libc::geteuid() })
}

fn user_with(uid: u32) -> Check {
    if uid == 0 {
        Check::ok("user", "root")
    } else {
        Check::warn(
            "user",
            format!("uid {uid}: some checks may see less than containerd, which is root, does"),
            "run `sudo kiln doctor`",
        )
    }
}

/// Taps connect a μVM to its pod's network.
pub(super) fn tun(system: &System) -> Check {
    if system.at("/dev/net/tun").exists() {
        Check::ok("tun", "/dev/net/tun")
    } else {
        Check::fail(
            "tun",
            "there is no /dev/net/tun: pods would have no network",
            "`modprobe tun`, and `echo tun > /etc/modules-load.d/tun.conf` to keep it",
        )
    }
}

/// Serves the memory of a μVM whose flat file is not there yet.
pub(super) fn userfaultfd(system: &System) -> Check {
    let unprivileged = system.read("/proc/sys/vm/unprivileged_userfaultfd");
    let device = system.at("/dev/userfaultfd").exists();
    userfaultfd_with(try_userfaultfd(), unprivileged.as_deref(), device)
}

fn try_userfaultfd() -> io::Result<()> {
    // SAFETY: a system call that takes flags only and returns a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the descriptor was made above and belongs to nobody else.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(())
}

fn userfaultfd_with(tried: io::Result<()>, unprivileged: Option<&str>, device: bool) -> Check {
    const NAME: &str = "userfaultfd";
    let setting = unprivileged.map_or("unknown", str::trim);
    match tried {
        Ok(()) => Check::ok(
            NAME,
            format!(
                "available (vm.unprivileged_userfaultfd={setting}{})",
                if device { ", /dev/userfaultfd" } else { "" }
            ),
        ),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Check::warn(
            NAME,
            format!("this user may not use it (vm.unprivileged_userfaultfd={setting})"),
            "run as root, or `sysctl vm.unprivileged_userfaultfd=1`; pods run without it, but only \
             from flat memory files",
        ),
        Err(error) => Check::warn(
            NAME,
            format!("not available: {error}"),
            "use a kernel with CONFIG_USERFAULTFD; pods run without it, but only from flat memory \
             files",
        ),
    }
}

const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Pods are limited, counted and killed by cgroup v2.
pub(super) fn cgroup(system: &System) -> Check {
    const NAME: &str = "cgroup";
    const MOUNT: &str = "/sys/fs/cgroup";
    let mounts = system.read("/proc/self/mounts").unwrap_or_default();
    let kind = mounts.lines().rev().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        (fields.next() == Some(MOUNT)).then(|| fields.next().unwrap_or_default().to_owned())
    });
    if kind.as_deref() != Some("cgroup2") {
        return Check::fail(
            NAME,
            match kind {
                Some(_) => format!("{MOUNT} holds cgroup v1"),
                None => format!("nothing is mounted on {MOUNT}"),
            },
            "boot with `systemd.unified_cgroup_hierarchy=1` on the kernel's command line, or \
             without systemd: `mount -t cgroup2 none /sys/fs/cgroup`",
        );
    }
    let list = |file: &str| -> Vec<String> {
        let text = system.read(format!("{MOUNT}/{file}")).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    };
    let missing = |there: &[String]| -> Vec<&str> {
        CONTROLLERS
            .into_iter()
            .filter(|name| !there.iter().any(|t| t == name))
            .collect()
    };
    let absent = missing(&list("cgroup.controllers"));
    if !absent.is_empty() {
        return Check::fail(
            NAME,
            format!("cgroup v2 without the controllers {}", absent.join(", ")),
            "a controller that cgroup v1 holds is not there for v2: unmount v1, and look for \
             `cgroup_disable=` and `cgroup_no_v1=` on the kernel's command line",
        );
    }
    let withheld = missing(&list("cgroup.subtree_control"));
    if !withheld.is_empty() {
        let enable: Vec<String> = withheld.iter().map(|name| format!("+{name}")).collect();
        return Check::warn(
            NAME,
            format!(
                "cgroup v2; {} not handed on to children",
                withheld.join(", ")
            ),
            format!(
                "`echo {} > {MOUNT}/cgroup.subtree_control`",
                enable.join(" ")
            ),
        );
    }
    Check::ok(NAME, format!("v2, with {}", CONTROLLERS.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::super::tests::Fixture;
    use super::*;

    #[test]
    fn only_root_is_sure_to_see_everything() {
        assert_eq!(user_with(0).status, Status::Ok);
        assert_eq!(user_with(1000).status, Status::Warn);
    }

    #[test]
    fn network_needs_tun() {
        let fixture = Fixture::new();
        assert_eq!(tun(&fixture.system).status, Status::Fail);
        fixture.file("dev/net/tun", "");
        assert_eq!(tun(&fixture.system).status, Status::Ok);
    }

    #[test]
    fn userfaultfd_is_never_fatal() {
        assert_eq!(
            userfaultfd_with(Ok(()), Some("0\n"), true).status,
            Status::Ok
        );
        let refused = io::Error::from_raw_os_error(libc::EPERM);
        let check = userfaultfd_with(Err(refused), Some("0\n"), false);
        assert_eq!(check.status, Status::Warn);
        assert!(check.remedy.unwrap().contains("sysctl"));
        let absent = io::Error::from_raw_os_error(libc::ENOSYS);
        assert_eq!(
            userfaultfd_with(Err(absent), None, false).status,
            Status::Warn
        );
    }

    fn cgroup_fixture(mounts: &str, controllers: &str, subtree: &str) -> Check {
        let fixture = Fixture::new();
        fixture.file("proc/self/mounts", mounts);
        fixture.file("sys/fs/cgroup/cgroup.controllers", controllers);
        fixture.file("sys/fs/cgroup/cgroup.subtree_control", subtree);
        cgroup(&fixture.system)
    }

    #[test]
    fn cgroup_v2_with_its_controllers_is_needed() {
        let v2 = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n";
        let all = "cpuset cpu io memory pids\n";
        assert_eq!(
            cgroup_fixture(v2, all, "cpu memory pids\n").status,
            Status::Ok
        );
        let withheld = cgroup_fixture(v2, all, "memory\n");
        assert_eq!(withheld.status, Status::Warn);
        assert!(withheld.remedy.unwrap().contains("+cpu +pids"));
        let absent = cgroup_fixture(v2, "cpu pids\n", "");
        assert_eq!(absent.status, Status::Fail);
        assert!(absent.found.contains("memory"));
        let v1 = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                  cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert!(cgroup_fixture(v1, all, all).found.contains("v1"));
        assert_eq!(cgroup_fixture("", "", "").status, Status::Fail);
    }
}
