//! The VMM alone, without containerd: every device with a real guest, before and after a resume.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::uvm::{Baked, Kit, Shape, Uvm, slots};
use kiln_e2e::{Test, cases};
use kiln_vmm_control::End;

use super::same;

pub(crate) fn cases() -> Vec<Case> {
    let all = cases![a_folder_given_at_resume_is_the_guests_with_owners_and_later_mounts];
    all.into_iter()
        .map(|c| c.only_with("kiln", "vmm"))
        .collect()
}

/// Made once and left for the run: not in a test's own folder.
const SHARED: &str = "/var/lib/kiln-e2e/vmm";

/// A machine with all devices, baked once.
fn baked() -> Result<Baked> {
    static DONE: Mutex<bool> = Mutex::new(false);
    let mut done = DONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = Path::new(SHARED);
    if !*done {
        let kit = Kit::make("", dir)?;
        let uvm = Uvm::boot(dir, &kit, Shape::default())?;
        uvm.sh("echo 3 > /proc/sys/vm/drop_caches")?;
        uvm.snapshot(dir, false)?;
        *done = true;
    }
    Ok(Baked::in_dir(dir))
}

/// Runs a test's body, which waits in system calls, off the async threads.
async fn blocking(
    test: Test,
    body: impl FnOnce(&Path) -> Result<()> + Send + 'static,
) -> Result<()> {
    tokio::task::spawn_blocking(move || body(test.scratch())).await?
}

fn folder(parent: &Path, name: &str) -> Result<PathBuf> {
    let path = parent.join(name);
    std::fs::create_dir_all(&path).with_context(|| format!("{}", path.display()))?;
    Ok(path)
}

async fn a_folder_given_at_resume_is_the_guests_with_owners_and_later_mounts(
    test: Test,
) -> Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    blocking(test, |dir| {
        let shared = folder(dir, "shared")?;
        std::fs::write(shared.join("hello"), "from the node")?;
        std::os::unix::fs::symlink("/etc/hostname", shared.join("absolute"))?;
        folder(&shared, "volume")?;
        std::fs::write(dir.join("secret"), "not for guests")?;
        std::os::unix::fs::symlink("../secret", shared.join("out"))?;
        // The VMM runs as nobody: what it may do here, it may do by its rights.
        std::fs::set_permissions(&shared, PermissionsExt::from_mode(0o711))?;
        let handle = File::open(&shared)?;
        let uvm = Uvm::resume(
            dir,
            &baked()?,
            vec![(slots::FS, End::Directory(0))],
            &[handle.as_fd()],
        )?;
        uvm.sh("mount -t virtiofs kiln /mnt")?;
        same!(uvm.sh("cat /mnt/hello")?, "from the node");
        // The guest follows links in its own tree; the node's files are out of reach.
        ensure!(uvm.run("cat /mnt/out")?.0 != 0, "a link led out of the folder");
        uvm.sh("mkdir /mnt/d && echo written > /mnt/d/f && chown 1234:5678 /mnt/d/f && chmod 4750 /mnt/d/f")?;
        let f = shared.join("d/f");
        same!(std::fs::read_to_string(&f)?, "written\n");
        let meta = f.metadata()?;
        same!(
            (meta.uid(), meta.gid(), meta.mode() & 0o7777),
            (1234, 5678, 0o4750)
        );
        same!(shared.join("d").metadata()?.uid(), 0);
        // Somebody else's file, made by that somebody.
        uvm.sh("mkdir -p /etc; echo nobody:x:99:98::/:/bin/sh > /etc/passwd; chmod 777 /mnt/d")?;
        uvm.sh("su -s /bin/sh nobody -c 'echo theirs > /mnt/d/theirs'")?;
        let meta = shared.join("d/theirs").metadata()?;
        same!((meta.uid(), meta.gid()), (99, 98));
        // A mount made later, here, is seen there.
        mount_tmpfs(&shared.join("volume"))?;
        let seen = (|| {
            std::fs::write(shared.join("volume/late"), "late")?;
            same!(uvm.sh("cat /mnt/volume/late")?, "late");
            uvm.sh("echo back > /mnt/volume/answer")?;
            same!(std::fs::read_to_string(shared.join("volume/answer"))?, "back\n");
            // Many files, renamed and removed.
            uvm.sh("cd /mnt/volume; for i in $(seq 200); do echo $i > n$i; done; \
                    for i in $(seq 200); do mv n$i m$i; done; rm m1??")?;
            same!(std::fs::read_dir(shared.join("volume"))?.count(), 2 + 99 + 1);
            let sum = uvm.sh("cp /bin/busybox /mnt/volume/b && sync && sha256sum < /bin/busybox")?;
            same!(uvm.sh("echo 3 > /proc/sys/vm/drop_caches; sha256sum < /mnt/volume/b")?, sum);
            Ok(())
        })();
        let unmounted = unmount(&shared.join("volume"));
        seen.map_err(|e| uvm.explain(&e))?;
        unmounted?;
        // Mounted, it can't be saved, and says so; unmounted, it can.
        let refused = uvm.snapshot(&dir.join("again"), true);
        ensure!(refused.is_err(), "a mounted folder was saved");
        uvm.sh("umount /mnt")?;
        uvm.snapshot(&dir.join("again"), true)?;
        uvm.sh("mount -t virtiofs kiln /mnt && cat /mnt/hello")?;
        Ok(())
    })
    .await
}

fn mount_tmpfs(at: &Path) -> Result<()> {
    let path = c_path(at)?;
    // SAFETY: strings that live through the call.
    let done = unsafe {
        libc::mount(
            c"none".as_ptr(),
            path.as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    ensure!(done == 0, "mounting: {}", std::io::Error::last_os_error());
    Ok(())
}

fn unmount(at: &Path) -> Result<()> {
    let path = c_path(at)?;
    // SAFETY: a string that lives through the call.
    let done = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    ensure!(done == 0, "unmounting: {}", std::io::Error::last_os_error());
    Ok(())
}

fn c_path(path: &Path) -> Result<std::ffi::CString> {
    use std::os::unix::ffi::OsStrExt;
    Ok(std::ffi::CString::new(path.as_os_str().as_bytes())?)
}
