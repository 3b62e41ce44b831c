//! Each operation as a guest means it.

use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use super::guest::{Guest, known, op, raw, u32_at, u64_at};

const KILL: u32 = 1 << 2;
const NOTHING: (u64, u32, u32, u32) = (0, 0, 0, 0);

fn start() -> (tempfile::TempDir, Guest) {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::new(dir.path());
    (dir, guest)
}

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn what_is_offered_is_what_both_can_do() {
    let (_dir, mut guest) = start();
    let offered = guest
        .ask(op::INIT, 0, &raw![7u32, 38u32, 0u32, u32::MAX])
        .unwrap();
    let flags = u32_at(&offered, 12);
    // Locks, truncation at opening, lists of who may access, and bits that set ids.
    for bit in [1, 3, 10, 20, 28] {
        assert_ne!(flags & 1 << bit, 0, "{bit}");
    }
    // A cache of what is not written yet would hide what others write.
    assert_eq!(flags & 1 << 16, 0);
    assert_eq!(offered.len(), 64);
    let none = guest
        .ask(op::INIT, 0, &raw![7u32, 38u32, 0u32, 0u32])
        .unwrap();
    assert_eq!(u32_at(&none, 12), 0);
    assert_eq!(
        guest.ask(op::INIT, 0, &raw![6u32, 38u32, 0u32, 0u32]),
        Err(libc::EPROTO)
    );
}

#[test]
fn files_are_made_written_read_and_closed() {
    let (dir, mut guest) = start();
    let (node, handle) = guest.create(1, "new", libc::O_RDWR, 0o640).unwrap();
    assert_eq!(mode(&dir.path().join("new")), 0o640);
    assert_eq!(guest.write(node, handle, 3, b"abc", 0, 0), Ok(3));
    assert_eq!(guest.read(node, handle, 0, 100), Ok(b"\0\0\0abc".to_vec()));
    assert_eq!(guest.read(node, handle, 6, 100), Ok(Vec::new()));
    assert_eq!(guest.flush(node, handle, 1), Ok(Vec::new()));
    for how in [0u32, 1] {
        let synced = guest.ask(op::FSYNC, node, &raw![handle, how, 0u32]);
        assert_eq!(synced, Ok(Vec::new()));
    }
    assert_eq!(guest.release(node, handle), Ok(Vec::new()));
    assert_eq!(guest.read(node, handle, 0, 100), Err(libc::EBADF));
    // There already: the same file, opened; or an error, if it must not be.
    let (again, handle) = guest.create(1, "new", libc::O_RDONLY, 0o600).unwrap();
    assert_eq!(again, node);
    assert_eq!(guest.read(node, handle, 3, 2), Ok(b"ab".to_vec()));
    assert_eq!(
        guest.create(1, "new", libc::O_EXCL, 0o600),
        Err(libc::EEXIST)
    );
    assert_eq!(guest.write(node, handle, 0, b"x", 0, 0), Err(libc::EBADF));
    let (_, cut) = (guest.open(node, libc::O_RDWR | libc::O_TRUNC).unwrap(), ());
    assert_eq!(cut, ());
    assert_eq!(guest.getattr(node).unwrap().size, 0);
}

#[test]
fn what_is_appended_goes_to_the_end_that_the_host_knows() {
    let (dir, mut guest) = start();
    let (node, handle) = guest
        .create(1, "log", libc::O_WRONLY | libc::O_APPEND, 0o600)
        .unwrap();
    std::fs::write(dir.path().join("log"), b"other").unwrap();
    assert_eq!(
        guest.write(node, handle, 0, b"mine", 0, libc::O_APPEND),
        Ok(4)
    );
    assert_eq!(std::fs::read(dir.path().join("log")).unwrap(), b"othermine");
    // Without the flag, which a process may take away again, where it says.
    assert_eq!(guest.write(node, handle, 0, b"O", 0, 0), Ok(1));
    assert_eq!(std::fs::read(dir.path().join("log")).unwrap(), b"Othermine");
}

#[test]
fn a_file_is_opened_without_the_hosts_cache_if_the_host_can() {
    let (dir, mut guest) = start();
    let flags = libc::O_RDWR | libc::O_DIRECT;
    let (node, handle) = guest.create(1, "f", flags, 0o600).unwrap();
    // What is not aligned is the host's to refuse.
    let written = guest.write(node, handle, 0, b"odd", 0, 0);
    assert!([Ok(3), Err(libc::EINVAL)].contains(&written), "{written:?}");
    std::fs::write(dir.path().join("f"), b"x").unwrap();
    let (again, _) = guest.open(node, libc::O_RDONLY | libc::O_DIRECT).unwrap();
    assert_ne!(again, handle);
}

#[test]
fn a_mebibyte_is_written_at_once() {
    let (dir, mut guest) = start();
    let (node, handle) = guest.create(1, "big", libc::O_WRONLY, 0o600).unwrap();
    let data: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
    assert_eq!(guest.write(node, handle, 0, &data, 0, 0), Ok(1 << 20));
    assert_eq!(std::fs::read(dir.path().join("big")).unwrap(), data);
}

#[test]
fn folders_links_pipes_and_sockets_are_made() {
    let (dir, mut guest) = start();
    guest
        .ask(op::MKDIR, 1, &raw![0o1777u32, 0o027u32, "d"])
        .unwrap();
    assert_eq!(mode(&dir.path().join("d")), 0o1750);
    let (folder, _) = guest.lookup(1, "d").unwrap();
    guest
        .ask(op::SYMLINK, folder, &raw!["l", "to/somewhere"])
        .unwrap();
    let (link, _) = guest.lookup(folder, "l").unwrap();
    assert_eq!(
        guest.ask(op::READLINK, link, &[]),
        Ok(b"to/somewhere".to_vec())
    );
    assert_eq!(guest.ask(op::READLINK, folder, &[]), Err(libc::EINVAL));
    for (name, kind) in [
        ("p", libc::S_IFIFO),
        ("s", libc::S_IFSOCK),
        ("f", libc::S_IFREG),
    ] {
        let made = raw![kind | 0o666, 0u32, 0o022u32, 0u32, name];
        guest.ask(op::MKNOD, folder, &made).unwrap();
        assert_eq!(mode(&dir.path().join("d").join(name)), 0o644);
    }
    let kind = std::fs::metadata(dir.path().join("d/p"))
        .unwrap()
        .file_type();
    assert!(kind.is_fifo());
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        let made = guest.ask(
            op::MKNOD,
            folder,
            &raw![kind | 0o666, 0x101u32, 0u32, 0u32, "x"],
        );
        assert_eq!(made, Err(libc::EPERM));
    }
    assert_eq!(guest.ask(op::RMDIR, 1, &raw!["d"]), Err(libc::ENOTEMPTY));
    for name in ["l", "p", "s", "f"] {
        assert_eq!(guest.ask(op::UNLINK, folder, &raw![name]), Ok(Vec::new()));
    }
    assert_eq!(guest.ask(op::UNLINK, 1, &raw!["d"]), Err(libc::EISDIR));
    assert_eq!(guest.ask(op::RMDIR, 1, &raw!["d"]), Ok(Vec::new()));
    assert!(!dir.path().join("d").exists());
}

#[test]
fn what_is_made_is_the_users_and_the_thread_is_itself_again() {
    let (dir, mut guest) = start();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    (guest.uid, guest.gid) = (1234, 5678);
    guest.create(1, "f", libc::O_RDWR, 0o600).unwrap();
    guest.ask(op::MKDIR, 1, &raw![0o700u32, 0u32, "d"]).unwrap();
    guest.ask(op::SYMLINK, 1, &raw!["l", "x"]).unwrap();
    // What fails must leave the thread as it was, too.
    assert_eq!(guest.create(1, "f", libc::O_EXCL, 0o600), Err(libc::EEXIST));
    for name in ["f", "d", "l"] {
        let found = std::fs::symlink_metadata(dir.path().join(name)).unwrap();
        assert_eq!((found.uid(), found.gid()), (1234, 5678), "{name}");
    }
    // SAFETY: no arguments.
    assert_eq!(unsafe { (libc::geteuid(), libc::getegid()) }, (0, 0));
    // "As it is" would be root.
    guest.uid = u32::MAX;
    assert_eq!(
        guest.create(1, "root", libc::O_RDWR, 0o600),
        Err(libc::EINVAL)
    );
}

#[test]
fn names_are_changed_exchanged_and_not_replaced() {
    let (dir, mut guest) = start();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("a"), b"a").unwrap();
    std::fs::write(at("b"), b"b").unwrap();
    std::fs::create_dir(at("d")).unwrap();
    let (folder, _) = guest.lookup(1, "d").unwrap();
    let (node, _) = guest.lookup(1, "a").unwrap();
    assert_eq!(
        guest.ask(op::RENAME2, 1, &raw![1u64, 1u32, 0u32, "a", "b"]),
        Err(libc::EEXIST)
    );
    assert_eq!(
        guest.ask(op::RENAME2, 1, &raw![1u64, 2u32, 0u32, "a", "b"]),
        Ok(Vec::new())
    );
    assert_eq!(std::fs::read(at("a")).unwrap(), b"b");
    assert_eq!(guest.lookup(1, "b").unwrap().0, node);
    // One that leaves a device node behind.
    assert_eq!(
        guest.ask(op::RENAME2, 1, &raw![1u64, 4u32, 0u32, "a", "c"]),
        Err(libc::EINVAL)
    );
    assert_eq!(
        guest.ask(op::RENAME, 1, &raw![folder, "b", "c"]),
        Ok(Vec::new())
    );
    assert_eq!(std::fs::read(at("d/c")).unwrap(), b"a");
    assert_eq!(
        guest
            .ask(op::LINK, 1, &raw![node, "again"])
            .map(|e| u64_at(&e, 0)),
        Ok(node)
    );
    assert_eq!(std::fs::metadata(at("again")).unwrap().nlink(), 2);
    assert_eq!(
        guest.ask(op::LINK, 1, &raw![folder, "no"]),
        Err(libc::EPERM)
    );
    assert_eq!(guest.ask(op::LINK, 1, &raw![node, "a"]), Err(libc::EEXIST));
}

#[test]
fn attributes_are_told_and_changed() {
    let (dir, mut guest) = start();
    let path = dir.path().join("f");
    std::fs::write(&path, b"12345").unwrap();
    let (node, found) = guest.lookup(1, "f").unwrap();
    let real = std::fs::metadata(&path).unwrap();
    assert_eq!(
        (found.ino, found.size, found.mode),
        (real.ino(), 5, real.mode())
    );
    let changed = guest.setattr(node, 0b1111, 0, (3, 0o4755, 77, 88)).unwrap();
    assert_eq!((changed.size, changed.mode & 0o7777), (3, 0o4755));
    assert_eq!((changed.uid, changed.gid), (77, 88));
    guest.setattr(node, 0b110000, 0, NOTHING).unwrap();
    let real = std::fs::metadata(&path).unwrap();
    assert_eq!((real.atime(), real.mtime()), (1000, 2000));
    assert_eq!((real.atime_nsec(), real.mtime_nsec()), (1, 2));
    guest.setattr(node, 1 << 5 | 1 << 8, 0, NOTHING).unwrap();
    let real = std::fs::metadata(&path).unwrap();
    assert!(real.mtime() > 1_000_000_000 && real.atime() == 1000);
    // By what is open, and by what is open for reading only.
    let (writing, _) = guest.open(node, libc::O_WRONLY).unwrap();
    let (reading, _) = guest.open(node, libc::O_RDONLY).unwrap();
    for (handle, size) in [(writing, 9), (reading, 7)] {
        let cut = guest.setattr(node, 1 << 3 | 1 << 6, handle, (size, 0, 0, 0));
        assert_eq!(cut.unwrap().size, size);
    }
    assert_eq!(
        guest.setattr(node, 1 << 3 | 1 << 6, 99, NOTHING),
        Err(libc::EBADF)
    );
    assert_eq!(
        guest.setattr(node, 1 << 3, 0, (u64::MAX, 0, 0, 0)),
        Err(libc::EFBIG)
    );
    let told = guest
        .ask(op::GETATTR, node, &raw![1u32, 0u32, reading])
        .unwrap();
    assert_eq!(known(&told[16..]).size, 7);
    let told = guest
        .ask(op::STATX, node, &raw![0u32, 0u32, 0u64, 0u32, 0xfffu32])
        .unwrap();
    assert_eq!(told.len(), 288);
    // Its mask has the time of birth.
    assert_ne!(u32_at(&told, 32) & 0x800, 0);
    assert_eq!(u64_at(&told, 32 + 40), 7);
    let born = real
        .created()
        .unwrap()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    assert_eq!(u64_at(&told, 32 + 80), born.as_secs());
}

#[test]
fn file_systems_are_told_as_the_host_has_them() {
    let (dir, mut guest) = start();
    let told = guest.ask(op::STATFS, 1, &[]).unwrap();
    let path = std::ffi::CString::new(dir.path().to_str().unwrap()).unwrap();
    // SAFETY: a string that lives through the call; all-zero is a valid statfs.
    let real = unsafe {
        let mut real: libc::statfs = std::mem::zeroed();
        assert_eq!(libc::statfs(path.as_ptr(), &raw mut real), 0);
        real
    };
    assert_eq!((told.len(), u64_at(&told, 0)), (80, real.f_blocks));
    assert_eq!(u64::from(u32_at(&told, 40)), real.f_bsize as u64);
    assert_eq!(guest.ask(op::STATFS, 99, &[]), Err(libc::ESTALE));
}

#[test]
fn access_goes_by_the_mode() {
    let (dir, mut guest) = start();
    std::fs::write(dir.path().join("f"), b"").unwrap();
    std::fs::set_permissions(dir.path().join("f"), std::fs::Permissions::from_mode(0o640)).unwrap();
    let (node, _) = guest.lookup(1, "f").unwrap();
    assert_eq!(
        guest.ask(op::ACCESS, node, &raw![6u32, 0u32]),
        Ok(Vec::new())
    );
    assert_eq!(
        guest.ask(op::ACCESS, node, &raw![1u32, 0u32]),
        Err(libc::EACCES)
    );
    guest.uid = 5;
    assert_eq!(
        guest.ask(op::ACCESS, node, &raw![4u32, 0u32]),
        Ok(Vec::new())
    );
    guest.gid = 5;
    assert_eq!(
        guest.ask(op::ACCESS, node, &raw![4u32, 0u32]),
        Err(libc::EACCES)
    );
}

#[test]
fn bits_that_set_ids_go_when_somebody_else_writes_and_stay_when_root_does() {
    let (dir, mut guest) = start();
    let path = dir.path().join("f");
    std::fs::write(&path, b"x").unwrap();
    let (node, _) = guest.lookup(1, "f").unwrap();
    let (handle, _) = guest.open(node, libc::O_RDWR).unwrap();
    let set = || std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o6755)).unwrap();
    set();
    guest.write(node, handle, 0, b"x", 0, 0).unwrap();
    assert_eq!(mode(&path), 0o6755);
    guest.write(node, handle, 0, b"x", KILL, 0).unwrap();
    assert_eq!(mode(&path), 0o755);
    set();
    guest.setattr(node, 1 << 3, 0, NOTHING).unwrap();
    assert_eq!(mode(&path), 0o6755);
    guest
        .setattr(node, 1 << 3 | 1 << 11, 0, (5, 0, 0, 0))
        .unwrap();
    assert_eq!(mode(&path), 0o755);
    set();
    guest.open(node, libc::O_WRONLY | libc::O_TRUNC).unwrap();
    assert_eq!(mode(&path), 0o6755);
    guest
        .ask(op::OPEN, node, &raw![libc::O_WRONLY | libc::O_TRUNC, 1u32])
        .unwrap();
    assert_eq!(mode(&path), 0o755);
    // The right is back.
    set();
    guest.write(node, handle, 0, b"x", 0, 0).unwrap();
    assert_eq!(mode(&path), 0o6755);
}

#[test]
fn a_file_without_a_name_is_given_one() {
    let (dir, mut guest) = start();
    let body = raw![libc::O_RDWR, 0o600u32, 0u32, 0u32, "/"];
    let told = match guest.ask(op::TMPFILE, 1, &body) {
        Err(libc::EOPNOTSUPP) => return eprintln!("skipped: no files without names here"),
        told => told.unwrap(),
    };
    let (node, handle) = (u64_at(&told, 0), u64_at(&told, 128));
    guest.write(node, handle, 0, b"hidden", 0, 0).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert_eq!(guest.getattr(node).unwrap().links, 0);
    guest.ask(op::LINK, 1, &raw![node, "shown"]).unwrap();
    assert_eq!(std::fs::read(dir.path().join("shown")).unwrap(), b"hidden");
    assert_eq!(guest.lookup(1, "shown").unwrap().0, node);
}

#[test]
fn space_is_allocated_punched_collapsed_and_inserted() {
    let (dir, mut guest) = start();
    let (node, handle) = guest.create(1, "f", libc::O_RDWR, 0o600).unwrap();
    let allocate = |guest: &mut Guest, mode: i32, offset: u64, len: u64| {
        guest.ask(op::FALLOCATE, node, &raw![handle, offset, len, mode, 0u32])
    };
    assert_eq!(allocate(&mut guest, 0, 0, 16384), Ok(Vec::new()));
    assert_eq!(guest.getattr(node).unwrap().size, 16384);
    guest.write(node, handle, 0, &[1; 16384], 0, 0).unwrap();
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    if allocate(&mut guest, punch, 4096, 4096).is_err() {
        return eprintln!("skipped: no holes here");
    }
    let seek = |guest: &mut Guest, offset: u64, whence: i32| {
        let body = raw![handle, offset, whence, 0u32];
        guest
            .ask(op::LSEEK, node, &body)
            .map(|told| u64_at(&told, 0))
    };
    assert_eq!(seek(&mut guest, 0, libc::SEEK_HOLE), Ok(4096));
    assert_eq!(seek(&mut guest, 4096, libc::SEEK_DATA), Ok(8192));
    assert_eq!(seek(&mut guest, 16384, libc::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(&mut guest, 0, libc::SEEK_SET), Err(libc::EINVAL));
    for (mode, size) in [
        (libc::FALLOC_FL_COLLAPSE_RANGE, 12288),
        (libc::FALLOC_FL_INSERT_RANGE, 16384),
    ] {
        match allocate(&mut guest, mode, 0, 4096) {
            Err(libc::EOPNOTSUPP) => eprintln!("skipped: mode {mode} is not of this file system"),
            done => {
                assert_eq!(done, Ok(Vec::new()));
                assert_eq!(guest.getattr(node).unwrap().size, size);
            }
        }
    }
    assert_eq!(allocate(&mut guest, 1 << 30, 0, 1), Err(libc::EOPNOTSUPP));
    assert_eq!(allocate(&mut guest, 0, 0, 0), Err(libc::EINVAL));
    let file = std::fs::File::open(dir.path().join("f")).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 12288).unwrap();
    assert_eq!(byte, [1]);
}

#[test]
fn ranges_are_copied_by_the_host() {
    let (dir, mut guest) = start();
    std::fs::write(dir.path().join("from"), b"0123456789").unwrap();
    let (from, _) = guest.lookup(1, "from").unwrap();
    let (source, _) = guest.open(from, libc::O_RDONLY).unwrap();
    let (to, target) = guest.create(1, "to", libc::O_RDWR, 0o600).unwrap();
    let body = raw![source, 2u64, to, target, 1u64, 5u64, 0u64];
    let told = guest.ask(op::COPY_FILE_RANGE, from, &body).unwrap();
    assert_eq!(u32_at(&told, 0), 5);
    assert_eq!(std::fs::read(dir.path().join("to")).unwrap(), b"\x0023456");
    let flagged = raw![source, 0u64, to, target, 0u64, 5u64, 1u64];
    assert_eq!(
        guest.ask(op::COPY_FILE_RANGE, from, &flagged),
        Err(libc::EINVAL)
    );
    let swapped = raw![target, 0u64, to, source, 0u64, 5u64, 0u64];
    assert_eq!(
        guest.ask(op::COPY_FILE_RANGE, from, &swapped),
        Err(libc::EBADF)
    );
}

#[test]
fn a_folder_of_thousands_is_listed_whole_while_it_shrinks() {
    let (dir, mut guest) = start();
    for n in 0..5000 {
        std::fs::write(dir.path().join(format!("file-{n}")), b"").unwrap();
    }
    for (size, plus) in [(4096, false), (4096, true), (1 << 16, true), (512, false)] {
        let mut names = guest.list(1, size, plus).unwrap();
        assert_eq!(names.len(), 5002);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 5002);
        assert!(names.contains(&("file-4999".to_owned(), 8)));
        assert!(names.contains(&("..".to_owned(), 4)));
    }
    // Each is removed when it was seen, and half of those that were not.
    let opened = guest.ask(op::OPENDIR, 1, &raw![0u32, 0u32]).unwrap();
    let handle = u64_at(&opened, 0);
    let (mut offset, mut seen) = (0, std::collections::HashSet::new());
    loop {
        let part = guest.list_part(1, handle, offset, 4096, true).unwrap();
        let Some(last) = part.last() else {
            break;
        };
        offset = last.2;
        for (name, _, _) in part {
            assert!(seen.insert(name.clone()), "{name} comes twice");
            if name.starts_with('f') {
                let _ = std::fs::remove_file(dir.path().join(name));
            }
        }
        if seen.len() < 200 {
            for n in (0..5000).step_by(2) {
                let _ = std::fs::remove_file(dir.path().join(format!("file-{n}")));
            }
        }
    }
    for n in (1..5000).step_by(2) {
        assert!(seen.contains(&format!("file-{n}")));
    }
    // From the beginning, it is as it is now.
    let part = guest.list_part(1, handle, 0, 4096, false).unwrap();
    assert_eq!(part.len(), 2);
    assert_eq!(guest.list_part(1, handle, 0, 16, false), Err(libc::EINVAL));
    assert_eq!(
        guest.ask(op::FSYNCDIR, 1, &raw![handle, 0u32, 0u32]),
        Ok(Vec::new())
    );
    assert_eq!(guest.ask(op::SYNCFS, 1, &raw![0u64]), Ok(Vec::new()));
}

#[test]
fn attributes_of_three_kinds_are_served_and_no_others() {
    let (dir, mut guest) = start();
    std::fs::write(dir.path().join("f"), b"").unwrap();
    let (node, _) = guest.lookup(1, "f").unwrap();
    let set = |guest: &mut Guest, name: &str, value: &[u8], flags: u32| {
        let body = raw![value.len() as u32, flags, 0u32, 0u32, name, value];
        guest.ask(op::SETXATTR, node, &body)
    };
    match set(&mut guest, "user.one", b"value", 0) {
        Err(libc::EOPNOTSUPP) => return eprintln!("skipped: no attributes here"),
        done => assert_eq!(done, Ok(Vec::new())),
    }
    let get = |guest: &mut Guest, name: &str, size: u32| {
        guest.ask(op::GETXATTR, node, &raw![size, 0u32, name])
    };
    assert_eq!(get(&mut guest, "user.one", 0), Ok(raw![5u32, 0u32]));
    assert_eq!(get(&mut guest, "user.one", 4), Err(libc::ERANGE));
    assert_eq!(get(&mut guest, "user.one", 5), Ok(b"value".to_vec()));
    assert_eq!(get(&mut guest, "user.two", 5), Err(libc::ENODATA));
    assert_eq!(set(&mut guest, "user.one", b"v", 1), Err(libc::EEXIST));
    assert_eq!(set(&mut guest, "trusted.x", b"v", 0), Err(libc::EPERM));
    assert_eq!(get(&mut guest, "trusted.x", 9), Err(libc::ENODATA));
    assert_eq!(
        set(&mut guest, "security.selinux", b"v", 0),
        Err(libc::EOPNOTSUPP)
    );
    assert_eq!(
        set(&mut guest, "system.other", b"v", 0),
        Err(libc::EOPNOTSUPP)
    );
    assert_eq!(set(&mut guest, "", b"v", 0), Err(libc::EOPNOTSUPP));
    assert_eq!(
        get(&mut guest, "system.posix_acl_access", 100),
        Err(libc::ENODATA)
    );
    // CAP_NET_BIND_SERVICE, permitted and effective, by the second version.
    let capability = raw![0x0200_0001u32, 0x400u32, 0u32, 0u32, 0u32];
    assert_eq!(
        set(&mut guest, "security.capability", &capability, 0),
        Ok(Vec::new())
    );
    assert_eq!(get(&mut guest, "security.capability", 64), Ok(capability));
    // One that the host has and the guest is not told of.
    let path = std::ffi::CString::new(dir.path().join("f").to_str().unwrap()).unwrap();
    // SAFETY: strings that live through the call, and a byte.
    let hidden = unsafe {
        let value = b"x".as_ptr().cast();
        libc::setxattr(path.as_ptr(), c"trusted.hidden".as_ptr(), value, 1, 0)
    };
    assert_eq!(hidden, 0);
    let list = |guest: &mut Guest, size: u32| guest.ask(op::LISTXATTR, node, &raw![size, 0u32]);
    let names = list(&mut guest, 1000).unwrap();
    let mut sorted: Vec<_> = names.split(|b| *b == 0).filter(|n| !n.is_empty()).collect();
    sorted.sort_unstable();
    assert_eq!(sorted, [&b"security.capability"[..], b"user.one"]);
    assert_eq!(list(&mut guest, 0), Ok(raw![names.len() as u32, 0u32]));
    assert_eq!(list(&mut guest, names.len() as u32), Ok(names.clone()));
    assert_eq!(list(&mut guest, names.len() as u32 - 1), Err(libc::ERANGE));
    for (name, removed) in [
        ("user.one", Ok(Vec::new())),
        ("user.one", Err(libc::ENODATA)),
    ] {
        assert_eq!(guest.ask(op::REMOVEXATTR, node, &raw![name]), removed);
    }
    // A write takes a file's capabilities away.
    let (handle, _) = guest.open(node, libc::O_WRONLY).unwrap();
    guest.write(node, handle, 0, b"x", 0, 0).unwrap();
    assert_eq!(
        get(&mut guest, "security.capability", 64),
        Err(libc::ENODATA)
    );
}

/// A list that gives one user more than the mode's others.
fn access_list(user: u32) -> Vec<u8> {
    let entry = |tag: u16, rights: u16, id: u32| {
        let half = [tag.to_le_bytes(), rights.to_le_bytes()].concat();
        [half, id.to_le_bytes().to_vec()].concat()
    };
    let none = u32::MAX;
    let entries = [
        entry(1, 6, none),
        entry(2, 6, user),
        entry(4, 0, none),
        entry(16, 6, none),
        entry(32, 0, none),
    ];
    [2u32.to_le_bytes().to_vec(), entries.concat()].concat()
}

#[test]
fn a_folders_default_list_takes_the_place_of_the_mask() {
    let (dir, mut guest) = start();
    let list = access_list(1000);
    let body = raw![
        list.len() as u32,
        0u32,
        0u32,
        0u32,
        "system.posix_acl_default",
        &list[..]
    ];
    match guest.ask(op::SETXATTR, 1, &body) {
        Err(libc::EOPNOTSUPP) => return eprintln!("skipped: no lists here"),
        done => assert_eq!(done, Ok(Vec::new())),
    }
    let made = guest.ask(
        op::CREATE,
        1,
        &raw![libc::O_RDWR, 0o666u32, 0o077u32, 0u32, "f"],
    );
    let node = u64_at(&made.unwrap(), 0);
    // Group bits show the list's mask, which the user's mask has not cut.
    assert_eq!(mode(&dir.path().join("f")), 0o660);
    let told = guest.ask(
        op::GETXATTR,
        node,
        &raw![100u32, 0u32, "system.posix_acl_access"],
    );
    assert_eq!(told, Ok(list));
}

#[test]
fn a_cache_is_kept_only_while_nobody_has_changed_the_file() {
    const KEEP_CACHE: u32 = 1 << 1;
    const NO_FLUSH: u32 = 1 << 5;
    let (dir, mut guest) = start();
    std::fs::write(dir.path().join("f"), b"x").unwrap();
    let (node, _) = guest.lookup(1, "f").unwrap();
    let how = |guest: &mut Guest, flags: i32| guest.open(node, flags).unwrap().1;
    // Changed just now: another change may have the same time.
    assert_eq!(how(&mut guest, libc::O_RDONLY), NO_FLUSH);
    assert_eq!(how(&mut guest, libc::O_RDONLY), NO_FLUSH);
    std::thread::sleep(std::time::Duration::from_millis(4100));
    assert_eq!(how(&mut guest, libc::O_RDONLY), NO_FLUSH);
    assert_eq!(how(&mut guest, libc::O_RDONLY), NO_FLUSH | KEEP_CACHE);
    assert_eq!(how(&mut guest, libc::O_RDWR), KEEP_CACHE);
    std::fs::write(dir.path().join("f"), b"y").unwrap();
    assert_eq!(how(&mut guest, libc::O_RDONLY), NO_FLUSH);
}

#[test]
fn names_of_files_are_asked_for_anew_and_those_of_folders_hold() {
    let (dir, mut guest) = start();
    std::fs::write(dir.path().join("f"), b"").unwrap();
    std::fs::create_dir(dir.path().join("d")).unwrap();
    for (name, seconds) in [("f", 0), ("d", 1)] {
        let entry = guest.ask(op::LOOKUP, 1, &raw![name]).unwrap();
        assert_eq!(
            (u64_at(&entry, 16), u64_at(&entry, 24)),
            (seconds, 1),
            "{name}"
        );
    }
}
