//! The shared folder.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::uvm::{Uvm, slots};
use kiln_e2e::{Test, cases};
use kiln_uvm::RefusalKind;
use kiln_uvm::ends::Ends;

use super::{baked, blocking, folder, refusal};
use crate::suite::same;

pub(super) fn cases() -> Vec<Case> {
    cases![a_folder_given_at_resume_is_the_guests_with_owners_and_later_mounts]
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
        let mut ends = Ends::new();
        ends.directory(slots::FS, &handle);
        let uvm = Uvm::resume(dir, &baked()?, ends)?;
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
            // A program that is run is mapped.
            uvm.sh("mv /mnt/volume/b /mnt/volume/busybox && chmod 755 /mnt/volume/busybox && /mnt/volume/busybox true")?;
            Ok(())
        })();
        let unmounted = unmount(&shared.join("volume"));
        seen.map_err(|e| uvm.explain(&e))?;
        unmounted?;
        // Mounted, it can't be saved, and says so; unmounted, it can.
        let refused = uvm.snapshot(&dir.join("again"), true);
        let error = refused.err().context("a mounted folder was saved")?;
        same!(refusal(&error), Some(RefusalKind::Busy));
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
