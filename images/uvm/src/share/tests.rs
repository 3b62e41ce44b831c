use super::*;
use std::fs;
use std::os::fd::AsRawFd;
use std::thread;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Runs a test in a mount namespace of its own, in which everything is shared as systemd has it.
fn isolated(test: impl FnOnce(&Path) + Send) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    thread::scope(|scope| {
        scope.spawn(move || {
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            // SAFETY: this thread ends with the test, and opens nothing before.
            if unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.is_err()
                || mount_change("/", private).is_err()
            {
                eprintln!("skipped: no mount namespaces here (needs root)");
                return;
            }
            mount_tmpfs(path);
            mount_change(path, MountPropagationFlags::SHARED).unwrap();
            test(path);
        });
    });
}

fn mount_tmpfs(on: &Path) {
    mount("t", on, "tmpfs", MountFlags::empty(), None).unwrap();
}

fn volume(source: &Path) -> Volume {
    Volume {
        source: source.to_owned(),
        access: Access::Write,
        whole: true,
        follows_host: true,
        owners: None,
    }
}

fn read_only(source: &Path) -> Volume {
    Volume {
        access: Access::ReadAll,
        ..volume(source)
    }
}

/// The directory, and where a path of the guest is in it.
struct View(File);

impl View {
    fn of(share: &Share) -> Self {
        Self(share.open().unwrap())
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }

    fn at(&self, guest: &str) -> PathBuf {
        let name = guest.strip_prefix(&guest_mount_point()).unwrap();
        self.path().join(name.trim_start_matches('/'))
    }

    fn add(&self, share: &Share, volume: &Volume) -> PathBuf {
        self.at(&share.add(volume).unwrap())
    }
}

#[test]
fn volumes_are_shared_and_the_hosts_files_survive_the_end() {
    isolated(|root| {
        let data = root.join("data");
        fs::create_dir(&data).unwrap();
        fs::write(data.join("precious"), "x").unwrap();
        let share = Share::make().unwrap();
        let view = View::of(&share);
        let path = view.add(&share, &volume(&data));
        assert_eq!(fs::read(path.join("precious")).unwrap(), b"x");
        fs::write(path.join("new"), "y").unwrap();
        share.close();
        assert!(!path.join("precious").exists());
        assert_eq!(fs::read(data.join("precious")).unwrap(), b"x");
        assert_eq!(fs::read(data.join("new")).unwrap(), b"y");
        assert!(matches!(share.add(&volume(&data)), Err(ShareError::Closed)));
    });
}

#[test]
fn mounts_of_the_host_arrive_and_are_never_taken_along() {
    isolated(|root| {
        let data = root.join("data");
        fs::create_dir_all(data.join("sub")).unwrap();
        let share = Share::make().unwrap();
        let view = View::of(&share);
        let path = view.add(&share, &volume(&data));
        mount_tmpfs(&data.join("sub"));
        fs::write(data.join("sub/late"), "z").unwrap();
        assert_eq!(fs::read(path.join("sub/late")).unwrap(), b"z");
        share.release(&volume(&data));
        share.close();
        assert_eq!(fs::read(data.join("sub/late")).unwrap(), b"z");
    });
}

#[test]
fn one_mount_serves_all_containers_until_the_last_releases_it() {
    isolated(|root| {
        let file = root.join("hosts");
        fs::write(&file, "h").unwrap();
        let share = Share::make().unwrap();
        let view = View::of(&share);
        let first = share.add(&volume(&file)).unwrap();
        assert_eq!(share.add(&volume(&file)).unwrap(), first);
        let path = view.at(&first);
        share.release(&volume(&file));
        assert_eq!(fs::read(&path).unwrap(), b"h");
        share.release(&volume(&file));
        assert!(!path.exists());
        // A name that the guest may remember is not used for something else.
        assert_ne!(share.add(&volume(&file)).unwrap(), first);
        share.close();
        assert_eq!(fs::read(&file).unwrap(), b"h");
    });
}

#[test]
fn read_only_is_kept_on_the_host_too_and_below() {
    isolated(|root| {
        let data = root.join("data");
        fs::create_dir_all(data.join("below")).unwrap();
        mount_tmpfs(&data.join("below"));
        let share = Share::make().unwrap();
        let view = View::of(&share);
        let path = view.add(&share, &read_only(&data));
        assert!(fs::write(path.join("x"), "").is_err());
        assert!(fs::write(path.join("below/x"), "").is_err());
        let path = view.add(&share, &volume(&data));
        fs::write(path.join("x"), "").unwrap();
        fs::write(path.join("below/x"), "").unwrap();
        share.close();
    });
}

#[test]
fn read_only_without_what_is_below_leaves_that_as_the_host_has_it() {
    isolated(|root| {
        let data = root.join("data");
        for name in ["below", "fixed", "later"] {
            fs::create_dir_all(data.join(name)).unwrap();
        }
        mount_tmpfs(&data.join("below"));
        mount_tmpfs(&data.join("fixed"));
        let fixed = File::open(data.join("fixed")).unwrap();
        mounts::set(&fixed, Reach::Top, mounts::READ_ONLY).unwrap();
        let share = Share::make().unwrap();
        let view = View::of(&share);
        let wanted = Volume {
            access: Access::Read,
            ..volume(&data)
        };
        let path = view.add(&share, &wanted);
        mount_tmpfs(&data.join("later"));
        assert!(fs::write(path.join("x"), "").is_err());
        assert!(fs::write(path.join("fixed/x"), "").is_err());
        fs::write(path.join("below/x"), "").unwrap();
        fs::write(path.join("later/x"), "").unwrap();
        share.close();
    });
}

#[test]
fn what_is_mounted_below_is_seen_only_if_it_belongs_to_the_volume() {
    isolated(|root| {
        let data = root.join("data");
        fs::create_dir_all(data.join("below")).unwrap();
        mount_tmpfs(&data.join("below"));
        fs::write(data.join("below/file"), "").unwrap();
        let share = Share::make().unwrap();
        let view = View::of(&share);
        let alone = Volume {
            whole: false,
            follows_host: false,
            ..volume(&data)
        };
        let path = view.add(&share, &alone);
        assert!(path.join("below").exists() && !path.join("below/file").exists());
        let path = view.add(&share, &volume(&data));
        assert!(path.join("below/file").exists());
        share.close();
    });
}

#[test]
fn owners_are_mapped_both_ways() {
    use std::os::unix::fs::{MetadataExt, chown};

    use kiln_agent_api::users::IdRange;

    isolated(|root| {
        let data = root.join("data");
        fs::create_dir(&data).unwrap();
        fs::write(data.join("roots"), "").unwrap();
        fs::write(data.join("strangers"), "").unwrap();
        chown(data.join("strangers"), Some(5000), Some(5000)).unwrap();
        let share = Share::make().unwrap();
        let view = View::of(&share);
        let range = IdRange {
            inside: 0,
            outside: 65_536,
            count: 1000,
        };
        let map = IdMap {
            users: vec![range],
            groups: vec![range],
        };
        let mapped = Volume {
            owners: Some(Owners { map, below: false }),
            ..volume(&data)
        };
        let path = match share.add(&mapped) {
            Ok(path) => view.at(&path),
            Err(ShareError::Owners { source, .. })
                if source.kind() == io::ErrorKind::InvalidInput =>
            {
                eprintln!("skipped: this kernel has no idmapped tmpfs (6.3)");
                share.close();
                return;
            }
            Err(error) => panic!("{error:?}"),
        };
        let owner = |path: PathBuf| {
            let file = fs::metadata(path).unwrap();
            (file.uid(), file.gid())
        };
        assert_eq!(owner(path.join("roots")), (65_536, 65_536));
        assert_eq!(owner(path.join("strangers")), (65_534, 65_534), "nobody");
        chown(path.join("roots"), Some(65_541), Some(65_542)).unwrap();
        assert_eq!(owner(data.join("roots")), (5, 6));
        // Who is nobody there can't make anything there.
        assert!(chown(path.join("roots"), Some(0), None).is_err());
        assert!(fs::write(path.join("new"), "").is_err());
        share.close();
    });
}

#[test]
fn missing_volume_is_named_and_leaves_nothing() {
    isolated(|_| {
        let share = Share::make().unwrap();
        let view = View::of(&share);
        let error = share
            .add(&volume(Path::new("/no/such/volume")))
            .unwrap_err();
        assert!(error.to_string().contains("/no/such/volume"), "{error:?}");
        assert_eq!(fs::read_dir(view.path()).unwrap().count(), 0);
        share.close();
    });
}

#[test]
fn no_name_in_the_directory_can_be_changed_from_where_the_guest_looks() {
    use rustix::fs::{RenameFlags, mkdirat, renameat_with, symlinkat, unlinkat};

    isolated(|root| {
        let data = root.join("data");
        fs::create_dir(&data).unwrap();
        let share = Share::make().unwrap();
        share.add(&volume(&data)).unwrap();
        let view = share.open().unwrap();
        let refused = |result: rustix::io::Result<()>| assert_eq!(result, Err(Errno::ROFS));
        refused(symlinkat("/etc", &view, "x"));
        refused(mkdirat(&view, "1", Mode::RWXU));
        refused(renameat_with(&view, "0", &view, "1", RenameFlags::empty()));
        refused(unlinkat(&view, "0", AtFlags::REMOVEDIR));
        refused(rustix::fs::fchmod(&view, Mode::RWXU | Mode::RWXO));
        share.close();
    });
}

/// What a guest could do if it had the right to change names: between any two steps of ours, a link is where the mount
/// point was.
#[test]
fn a_mount_point_that_is_swapped_for_a_link_leads_nowhere() {
    use rustix::fs::{RenameFlags, renameat_with, symlinkat};

    isolated(|root| {
        let (data, target) = (root.join("data"), root.join("target"));
        for made in [&data, &target] {
            fs::create_dir(made).unwrap();
        }
        fs::write(data.join("evil"), "").unwrap();
        let share = Share::make().unwrap();
        let view = View::of(&share);
        let state = share.lock();
        let place = state.place.as_ref().unwrap();
        let inside = &place.inside;
        symlinkat(&target, inside, "link").unwrap();
        let swap = |name: &str| {
            renameat_with(inside, "link", inside, name, RenameFlags::EXCHANGE).unwrap();
        };
        let tree = Tree::of(&volume(&data)).unwrap();

        // Before it is opened: refused.
        make_point(inside, "a", true).unwrap();
        swap("a");
        assert!(place.point("a").is_err());
        swap("a");
        // After it was opened: the mount goes to what was opened, whatever that is called now.
        let point = place.point("a").unwrap();
        swap("a");
        place
            .apart
            .run(move || mounts::put(tree.mount, point))
            .unwrap()
            .unwrap();
        assert!(view.path().join("link/evil").exists());
        assert!(!target.join("evil").exists());
        // Before it is unmounted: nothing of the host's goes.
        mount_tmpfs(&target);
        fs::write(target.join("precious"), "").unwrap();
        assert!(place.take_away("a").is_err());
        assert!(target.join("precious").exists());
        let resolved = rustix::fs::readlinkat(inside, "a", Vec::new()).unwrap();
        assert_eq!(resolved.to_bytes(), target.as_os_str().as_encoded_bytes());
        drop(state);
        share.close();
    });
}

#[test]
fn nothing_of_it_is_on_the_host_or_keeps_anything_there() {
    isolated(|root| {
        let below = root.join("data/below");
        fs::create_dir_all(&below).unwrap();
        mount_tmpfs(&below);
        fs::write(below.join("file"), "").unwrap();
        let mounted = || fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let before = mounted();
        let share = Share::make().unwrap();
        let view = View::of(&share);
        let kept = Volume {
            follows_host: false,
            ..volume(&root.join("data"))
        };
        let path = view.add(&share, &kept);
        assert!(path.join("below/file").exists());
        assert_eq!(mounted(), before);

        unmount(&below, UnmountFlags::NOFOLLOW).unwrap();
        assert!(path.join("below/file").exists(), "still the guest's");
        fs::remove_dir(&below).unwrap();
        assert!(!path.join("below").exists());
        share.close();
    });
}

#[test]
fn only_the_volumes_are_mounted_where_they_are() {
    isolated(|root| {
        let data = root.join("data");
        fs::create_dir(&data).unwrap();
        let share = Share::make().unwrap();
        share.add(&volume(&data)).unwrap();
        let state = share.lock();
        let place = state.place.as_ref().unwrap();
        let task = rustix::thread::gettid();
        let of_thread = place.apart.run(rustix::thread::gettid).unwrap();
        assert_ne!(task, of_thread);
        let table = format!("/proc/self/task/{}/mountinfo", of_thread.as_raw_nonzero());
        let table = fs::read_to_string(table).unwrap();
        let points: Vec<_> = table
            .lines()
            .map(|l| l.split(' ').nth(4).unwrap())
            .collect();
        assert_eq!(points, ["/", "/0"], "{table}");
    });
}

/// A guest that asks for a name again and again finds the volume as it is to be, or nothing.
#[test]
fn a_read_only_volume_is_never_seen_writable() {
    use std::sync::atomic::{AtomicBool, Ordering};

    isolated(|root| {
        let data = root.join("data");
        fs::create_dir(&data).unwrap();
        fs::write(data.join("file"), "as it was").unwrap();
        let share = Share::make().unwrap();
        let (view, over) = (share.open().unwrap(), AtomicBool::new(false));
        let written = thread::scope(|scope| {
            let guest = scope.spawn(|| {
                let mut written = 0;
                let mut next = 0;
                while !over.load(Ordering::Relaxed) {
                    let path = format!("{next}/file");
                    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
                    match rustix::fs::openat(&view, &path, flags, Mode::empty()) {
                        Ok(_) => written += 1,
                        Err(Errno::ROFS) => next += 1,
                        Err(_) => {}
                    }
                }
                written
            });
            for _ in 0..300 {
                share.add(&read_only(&data)).unwrap();
                thread::yield_now();
                share.release(&read_only(&data));
            }
            over.store(true, Ordering::Relaxed);
            guest.join().unwrap()
        });
        assert_eq!(written, 0);
        share.close();
    });
}
