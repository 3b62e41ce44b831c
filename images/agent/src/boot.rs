//! What the guest needs before anything can run in it. All of it happens once, before the bake.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kiln_agent_api::{GUEST_SCRATCH, GUEST_SHM, GUEST_STATE_DIR};
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::statfs::statfs;

use crate::storage::make_folder;
use crate::{network, resources, scratch, sys};

/// Modules to load, one a line: a path, then parameters; in order. `#` starts a comment.
const MODULES: &str = "/etc/kiln/modules";
/// Files that a container may have open unless its spec says otherwise.
const OPEN_FILES: u64 = 1 << 20;

/// source, target, type, flags, options
type Entry = (
    &'static str,
    &'static str,
    &'static str,
    MsFlags,
    &'static str,
);

const FIRST: [Entry; 3] = [
    ("proc", "/proc", "proc", SAFE, ""),
    ("sysfs", "/sys", "sysfs", SAFE, ""),
    (
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MsFlags::MS_NOSUID,
        "mode=755",
    ),
];

const SECOND: [Entry; 7] = [
    (
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        "gid=5,mode=620,ptmxmode=666",
    ),
    (
        "tmpfs",
        "/dev/shm",
        "tmpfs",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        "mode=1777",
    ),
    ("mqueue", "/dev/mqueue", "mqueue", SAFE, ""),
    (
        "tmpfs",
        "/run",
        "tmpfs",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        "mode=755",
    ),
    (
        "tmpfs",
        "/tmp",
        "tmpfs",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        "mode=1777",
    ),
    (
        "cgroup2",
        "/sys/fs/cgroup",
        "cgroup2",
        SAFE,
        "nsdelegate,memory_recursiveprot",
    ),
    ("tmpfs", GUEST_SHM, "tmpfs", SAFE, "mode=1777,size=64m"),
];

const SAFE: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// Settings of the kernel that suit a guest.
const SYSCTLS: [(&str, &str); 5] = [
    // The agent: see `modprobe`.
    ("kernel/modprobe", "/init"),
    // The host's side has made sure that addresses are unique; waiting for it again costs a second.
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("kernel/pid_max", "4194304"),
    ("fs/inotify/max_user_instances", "8192"),
];

/// Sets the guest up. What fails without making it useless is a warning.
pub(crate) fn set_up() -> anyhow::Result<Vec<String>> {
    use anyhow::Context;

    let mut warnings = Vec::new();
    leave_initramfs().context("give the root a mount of its own")?;
    for entry in FIRST {
        mount_entry(&entry).with_context(|| format!("mount {}", entry.1))?;
    }
    load_modules(Path::new(MODULES), &mut warnings);
    for entry in SECOND {
        if let Err(error) = mount_entry(&entry) {
            // mqueue is a module on some kernels; without cgroups the agent does not start anyway.
            warnings.push(format!("mount {}: {error}", entry.1));
        }
    }
    make_folder(Path::new(GUEST_STATE_DIR), 0o755).context("make the agent's folder")?;
    make_folder(Path::new("/etc"), 0o755).context("make /etc")?;
    if let Err(error) = leave_order_to_the_host() {
        warnings.push(format!("take the I/O schedulers away: {error}"));
    }
    if let Err(error) = scratch::mount_it() {
        warnings.push(format!("mount {GUEST_SCRATCH}: {error}"));
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ] {
        if let Err(error) = std::os::unix::fs::symlink(target, Path::new("/dev").join(name))
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            warnings.push(format!("link /dev/{name}: {error}"));
        }
    }
    for (name, value) in SYSCTLS {
        if let Err(error) = fs::write(Path::new("/proc/sys").join(name), value) {
            warnings.push(format!("set {}: {error}", name.replace('/', ".")));
        }
    }
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES).context("raise the file limit")?;
    network::loopback_up().context("bring the loopback interface up")?;
    if let Err(error) = resources::online_new_memory_by_itself() {
        warnings.push(error.to_string());
    }
    Ok(warnings)
}

/// The host orders what reaches a disk. A scheduler in front of that costs time, and the requests that it keeps at hand
/// for each disk cost memory in every snapshot.
fn leave_order_to_the_host() -> io::Result<()> {
    for disk in fs::read_dir("/sys/block")? {
        fs::write(disk?.path().join("queue/scheduler"), "none")?;
    }
    Ok(())
}

/// An initramfs has no mount below its root, so `pivot_root` can't leave it, and containers need
/// that. A second mount of the same file system on top can be left.
fn leave_initramfs() -> io::Result<()> {
    const RAMFS: i64 = 0x8584_58f6;
    const TMPFS: i64 = 0x0102_1994;
    const ON_TOP: &str = "/.root";

    if !matches!(statfs("/")?.filesystem_type().0, RAMFS | TMPFS) {
        return Ok(());
    }
    fs::create_dir_all(ON_TOP)?;
    let nothing = None::<&str>;
    mount(Some("/"), ON_TOP, nothing, MsFlags::MS_BIND, nothing)?;
    nix::unistd::chdir(ON_TOP)?;
    mount(Some("."), "/", nothing, MsFlags::MS_MOVE, nothing)?;
    nix::unistd::chroot(".")?;
    nix::unistd::chdir("/")?;
    fs::remove_dir(ON_TOP)
}

fn mount_entry((source, target, kind, flags, options): &Entry) -> io::Result<()> {
    fs::create_dir_all(target)?;
    match mount(Some(*source), *target, Some(*kind), *flags, Some(*options)) {
        // The kernel, or whoever made the initramfs, was first.
        Ok(()) | Err(nix::Error::EBUSY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// One line of the list.
#[derive(Debug, PartialEq, Eq)]
struct Module {
    path: PathBuf,
    parameters: String,
}

fn parse_modules(text: &str) -> Vec<Module> {
    text.lines()
        .filter_map(|line| {
            let line = line.split('#').next().unwrap_or_default().trim();
            let (path, parameters) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            (!path.is_empty()).then(|| Module {
                path: PathBuf::from(path),
                parameters: parameters.trim().to_owned(),
            })
        })
        .collect()
}

fn load_modules(list: &Path, warnings: &mut Vec<String>) {
    let text = match fs::read_to_string(list) {
        Ok(text) => text,
        // A kernel with everything built in needs none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return warnings.push(format!("read {}: {error}", list.display())),
    };
    for module in parse_modules(&text) {
        if let Err(error) = load(&module) {
            warnings.push(format!("load {}: {error}", module.path.display()));
        }
        // Its file lies in memory, and the kernel has a copy now. One that is missing was a warning.
        drop(fs::remove_file(&module.path));
    }
}

fn load(module: &Module) -> io::Result<()> {
    use std::os::fd::AsFd;

    let file = fs::File::open(&module.path)?;
    let compressed = module.path.extension().is_some_and(|end| end != "ko");
    match sys::load_module(file.as_fd(), &module.parameters, compressed) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_read_in_order_with_their_parameters() {
        let text = "# first\n/lib/modules/a.ko\n\n  /lib/b.ko  x=1 y=2 # why\n";
        let module = |path: &str, parameters: &str| Module {
            path: path.into(),
            parameters: parameters.into(),
        };
        assert_eq!(
            parse_modules(text),
            [
                module("/lib/modules/a.ko", ""),
                module("/lib/b.ko", "x=1 y=2")
            ]
        );
    }

    #[test]
    fn a_missing_list_is_no_warning_but_a_missing_module_is() {
        let folder = tempfile::tempdir().expect("folder");
        let mut warnings = Vec::new();
        load_modules(&folder.path().join("none"), &mut warnings);
        assert!(warnings.is_empty());
        let list = folder.path().join("modules");
        fs::write(&list, "/nonexistent.ko\n").expect("write");
        load_modules(&list, &mut warnings);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
    }
}
