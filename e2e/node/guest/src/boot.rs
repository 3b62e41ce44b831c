//! From the initramfs to the node's own system.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};

/// Files that the host puts in the initramfs for the node; they move to the node's system as they are.
const OVERLAY: &str = "/overlay";
const DRIVERS: &str = "/drivers";
const ROOT: &str = "/root";
const DISK: &str = "/dev/vda";
const DISK_PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn in_initramfs() -> bool {
    Path::new(DRIVERS).is_dir()
}

/// Mounts the disk, moves into it and runs this same program there. Returns only with an error.
pub(crate) fn enter_system() -> Result<()> {
    mount_at("devtmpfs", "/dev", "devtmpfs", MsFlags::empty(), None)?;
    load_drivers()?;
    wait_for(Path::new(DISK))?;
    mount_at(DISK, ROOT, "ext4", MsFlags::MS_NOATIME, None)?;
    copy_tree(Path::new(OVERLAY), Path::new(ROOT))?;
    mount_at("/dev", "/root/dev", "", MsFlags::MS_MOVE, None)?;

    std::env::set_current_dir(ROOT).context("entering the node's system")?;
    mount_at(".", "/", "", MsFlags::MS_MOVE, None)?;
    nix::unistd::chroot(".").context("chroot into the node's system")?;
    std::env::set_current_dir("/").context("entering the node's system")?;
    let init = CString::new("/kiln-node/init")?;
    let error = nix::unistd::execv(&init, &[&init]).unwrap_err();
    Err(error).context("running /kiln-node/init in the node's system")
}

/// The mounts that every system has.
pub(crate) fn mount_api_filesystems() -> Result<()> {
    let secure = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount_at("proc", "/proc", "proc", secure, None)?;
    mount_at("sysfs", "/sys", "sysfs", secure, None)?;
    mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", secure, None)?;
    mount_at(
        "tmpfs",
        "/run",
        "tmpfs",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=755"),
    )?;
    mount_at(
        "tmpfs",
        "/tmp",
        "tmpfs",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=1777"),
    )?;
    mount_at(
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID,
        Some("ptmxmode=666,mode=620"),
    )?;
    mount_at(
        "tmpfs",
        "/dev/shm",
        "tmpfs",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        None,
    )?;
    mount_at("mqueue", "/dev/mqueue", "mqueue", secure, None)
}

pub(crate) fn power_off() -> ExitCode {
    nix::unistd::sync();
    let Err(error) = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF);
    eprintln!("kiln-node-init: powering off: {error}");
    ExitCode::FAILURE
}

fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MsFlags,
    options: Option<&str>,
) -> Result<()> {
    if !Path::new(target).exists() {
        fs::create_dir_all(target).with_context(|| format!("creating {target}"))?;
    }
    mount(Some(source), target, Some(kind), flags, options)
        .with_context(|| format!("mounting {source} at {target}"))
}

fn load_drivers() -> Result<()> {
    let mut drivers: Vec<_> = fs::read_dir(DRIVERS)?.collect::<std::io::Result<Vec<_>>>()?;
    // Their names begin with a number: the order in which they depend on each other.
    drivers.sort_by_key(fs::DirEntry::file_name);
    for driver in drivers {
        let path = driver.path();
        let file = File::open(&path)?;
        // SAFETY: finit_module reads the file behind a descriptor that is open for the whole call, and
        // an empty parameter string that lives as long as the program.
        let result = unsafe {
            nix::libc::syscall(
                nix::libc::SYS_finit_module,
                file.as_raw_fd(),
                c"".as_ptr(),
                0,
            )
        };
        if result != 0 {
            bail!(
                "loading {}: {}",
                path.display(),
                std::io::Error::last_os_error()
            );
        }
    }
    Ok(())
}

fn wait_for(device: &Path) -> Result<()> {
    let start = Instant::now();
    while !device.exists() {
        if start.elapsed() > DISK_PATIENCE {
            bail!(
                "{} did not appear within {DISK_PATIENCE:?}",
                device.display()
            );
        }
        sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            fs::create_dir_all(&target)?;
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)
                .with_context(|| format!("copying to {}", target.display()))?;
        }
    }
    Ok(())
}
