//! What a guest sends that means harm, or nothing.

use std::os::unix::fs::MetadataExt;

use super::guest::{Guest, op, raw, u64_at};
use super::*;

/// Everything that takes arguments, with the bytes of those that come before names.
const WITH_ARGUMENTS: [(u32, usize); 33] = [
    (op::LOOKUP, 0),
    (op::GETATTR, 16),
    (op::SETATTR, 88),
    (op::SYMLINK, 0),
    (op::MKNOD, 16),
    (op::MKDIR, 8),
    (op::UNLINK, 0),
    (op::RMDIR, 0),
    (op::RENAME, 8),
    (op::RENAME2, 16),
    (op::LINK, 8),
    (op::OPEN, 8),
    (op::READ, 24),
    (op::WRITE, 40),
    (op::RELEASE, 8),
    (op::FSYNC, 12),
    (op::SETXATTR, 16),
    (op::GETXATTR, 8),
    (op::LISTXATTR, 8),
    (op::REMOVEXATTR, 0),
    (op::FLUSH, 24),
    (op::INIT, 16),
    (op::READDIR, 20),
    (op::READDIRPLUS, 20),
    (op::RELEASEDIR, 8),
    (op::GETLK, 44),
    (op::SETLK, 44),
    (op::SETLKW, 44),
    (op::ACCESS, 4),
    (op::CREATE, 16),
    (op::FALLOCATE, 28),
    (op::LSEEK, 20),
    (op::COPY_FILE_RANGE, 56),
];

fn start() -> (tempfile::TempDir, Guest) {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::new(dir.path());
    (dir, guest)
}

#[test]
fn requests_that_end_too_early_are_not_served() {
    let (dir, mut guest) = start();
    std::fs::write(dir.path().join("f"), b"x").unwrap();
    for (opcode, needed) in WITH_ARGUMENTS {
        for len in 0..needed {
            // An error that comes before the end is as good an answer.
            let told = guest.ask(opcode, 1, &vec![0; len]);
            assert!(told.is_err(), "{opcode} with {len} bytes: {told:?}");
        }
    }
    // A name without an end, and a count of more than there are.
    assert_eq!(guest.ask(op::LOOKUP, 1, b"f"), Err(0));
    assert_eq!(guest.ask(op::LOOKUP, 1, &[b'f'; 100_000]), Err(0));
    assert_eq!(guest.ask(op::LOOKUP, 1, &vec![b'f'; 200 << 10]), Err(0));
    assert_eq!(
        guest.ask(op::BATCH_FORGET, 0, &raw![u32::MAX, 0u32, 1u64, 1u64]),
        Err(0)
    );
    assert_eq!(
        guest.ask(op::SETXATTR, 1, &raw![u32::MAX, 0u32, 0u32, 0u32, "user.x"]),
        Err(0)
    );
    let long = "n".repeat(256);
    assert_eq!(guest.lookup(1, &long), Err(libc::ENAMETOOLONG));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    assert!(guest.lookup(1, "f").is_ok());
}

#[test]
fn names_that_are_none_are_refused_wherever_there_is_one() {
    let (dir, mut guest) = start();
    std::fs::write(dir.path().join("f"), b"x").unwrap();
    let (node, _) = guest.lookup(1, "f").unwrap();
    for bad in ["", ".", "..", "a/b", "/", "../x", "./x"] {
        let requests = [
            (op::SYMLINK, raw![bad, "x"]),
            (op::MKNOD, raw![0o600u32, 0u32, 0u32, 0u32, bad]),
            (op::MKDIR, raw![0o700u32, 0u32, bad]),
            (op::UNLINK, raw![bad]),
            (op::RMDIR, raw![bad]),
            (op::RENAME, raw![1u64, bad, "x"]),
            (op::RENAME, raw![1u64, "f", bad]),
            (op::RENAME2, raw![1u64, 2u32, 0u32, bad, "f"]),
            (op::RENAME2, raw![1u64, 0u32, 0u32, "f", bad]),
            (op::LINK, raw![node, bad]),
            (op::CREATE, raw![libc::O_RDWR, 0o600u32, 0u32, 0u32, bad]),
        ];
        for (opcode, body) in requests {
            assert_eq!(
                guest.ask(opcode, 1, &body),
                Err(libc::EINVAL),
                "{opcode} {bad:?}"
            );
        }
    }
    guest.ask(op::MKDIR, 1, &raw![0o700u32, 0u32, "d"]).unwrap();
    let (folder, _) = guest.lookup(1, "d").unwrap();
    assert_eq!(guest.lookup(folder, ".."), Err(libc::EINVAL));
    assert_eq!(guest.lookup(1, "."), guest.lookup(1, ".."));
    assert_eq!(guest.lookup(node, "x"), Err(libc::ENOTDIR));
}

#[test]
fn numbers_that_were_never_given_or_are_given_up_stand_for_nothing() {
    let (dir, mut guest) = start();
    std::fs::write(dir.path().join("f"), b"x").unwrap();
    std::fs::write(dir.path().join("g"), b"x").unwrap();
    let (node, _) = guest.lookup(1, "f").unwrap();
    let (other, _) = guest.lookup(1, "g").unwrap();
    let (handle, _) = guest.open(node, libc::O_RDWR).unwrap();
    // A handle of another file's.
    assert_eq!(guest.read(other, handle, 0, 10), Err(libc::EBADF));
    assert_eq!(guest.write(other, handle, 0, b"x", 0, 0), Err(libc::EBADF));
    assert_eq!(guest.release(other, handle), Err(libc::EBADF));
    assert_eq!(
        guest.ask(op::READDIR, node, &raw![handle, 0u64, 100u32]),
        Err(libc::EBADF)
    );
    for unknown in [0, 2, 999, u64::MAX]
        .into_iter()
        .filter(|id| *id != node && *id != other)
    {
        assert_eq!(guest.getattr(unknown), Err(libc::ESTALE));
        assert_eq!(guest.lookup(unknown, "f"), Err(libc::ESTALE));
        assert_eq!(guest.open(unknown, libc::O_RDONLY), Err(libc::ESTALE));
        assert_eq!(
            guest.ask(op::LINK, 1, &raw![unknown, "x"]),
            Err(libc::ESTALE)
        );
        assert_eq!(
            guest.ask(op::RENAME, 1, &raw![unknown, "f", "x"]),
            Err(libc::ESTALE)
        );
    }
    guest.forget(other, u64::MAX);
    assert_eq!(guest.getattr(other), Err(libc::ESTALE));
    // The same file has another number then, and the old one never comes again.
    let (again, _) = guest.lookup(1, "g").unwrap();
    assert!(again > other);
    // What is open outlives what is forgotten.
    guest.forget(node, 1);
    assert_eq!(guest.read(node, handle, 0, 10), Ok(b"x".to_vec()));
    assert_eq!(guest.release(node, handle), Ok(Vec::new()));
    // The root is not forgotten.
    guest.forget(1, u64::MAX);
    assert!(guest.getattr(1).is_ok());
}

#[test]
fn offsets_and_sizes_that_are_too_large_are_errors() {
    let (_dir, mut guest) = start();
    let (node, handle) = guest.create(1, "f", libc::O_RDWR, 0o600).unwrap();
    for offset in [1 << 63, u64::MAX] {
        assert_eq!(guest.read(node, handle, offset, 10), Err(libc::EINVAL));
        assert_eq!(
            guest.write(node, handle, offset, b"x", 0, 0),
            Err(libc::EINVAL)
        );
        let body = raw![handle, offset, 1u64, 0u32, 0u32];
        assert_eq!(guest.ask(op::FALLOCATE, node, &body), Err(libc::EINVAL));
        let body = raw![handle, offset, 3u32, 0u32];
        assert_eq!(guest.ask(op::LSEEK, node, &body), Err(libc::EINVAL));
    }
    assert_eq!(
        guest.write(node, handle, i64::MAX as u64, b"xx", 0, 0),
        Err(libc::EINVAL)
    );
    // More than there is room for, or data: as much as there is, or nothing.
    guest.write(node, handle, 0, &[7; 300_000], 0, 0).unwrap();
    assert_eq!(
        guest.read(node, handle, 0, u32::MAX).unwrap().len(),
        (1 << 17) - 16
    );
    let body = raw![
        handle,
        0u64,
        1000u32,
        0u32,
        0u64,
        0u32,
        0u32,
        &[1u8; 999][..]
    ];
    assert_eq!(guest.ask(op::WRITE, node, &body), Err(0));
    let huge = raw![u32::MAX, 0u32, "user.x"];
    assert_eq!(guest.ask(op::GETXATTR, node, &huge), Err(libc::ENODATA));
    assert!(
        guest
            .ask(op::LISTXATTR, node, &raw![u32::MAX, 0u32])
            .is_ok()
    );
    assert_eq!(guest.open(node, libc::O_ACCMODE), Err(libc::EINVAL));
}

#[test]
fn what_nobody_serves_is_answered_so() {
    let (_dir, mut guest) = start();
    assert_eq!(guest.ask(op::IOCTL, 1, &[0; 32]), Err(libc::ENOTTY));
    for opcode in [0, 7, 19, 37, 40, 41, 48, 49, 53, 4096, u32::MAX] {
        assert_eq!(
            guest.ask(opcode, 1, &[0; 64]),
            Err(libc::ENOSYS),
            "{opcode}"
        );
    }
}

#[test]
fn what_waits_or_is_a_device_is_never_opened() {
    let (dir, mut guest) = start();
    let path =
        |name: &str| std::ffi::CString::new(dir.path().join(name).to_str().unwrap()).unwrap();
    // SAFETY: strings that live through the calls.
    unsafe {
        assert_eq!(libc::mkfifo(path("pipe").as_ptr(), 0o666), 0);
        // The memory device that gives zeros.
        let zero = libc::makedev(1, 5);
        if libc::mknod(path("device").as_ptr(), libc::S_IFCHR | 0o666, zero) != 0 {
            return eprintln!("skipped: no devices can be made here");
        }
    }
    let socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    let before = std::fs::metadata(dir.path().join("device")).unwrap();
    for name in ["pipe", "device", "socket"] {
        let (node, _) = guest.lookup(1, name).unwrap();
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_TRUNC] {
            assert_eq!(guest.open(node, flags), Err(libc::ENXIO), "{name}");
            // As if the guest did not know that it is there.
            assert_eq!(
                guest.create(1, name, flags, 0o600),
                Err(libc::ENXIO),
                "{name}"
            );
        }
        assert_eq!(
            guest.ask(op::OPENDIR, node, &raw![0u32, 0u32]),
            Err(libc::ENOTDIR)
        );
        assert_eq!(
            guest.setattr(node, 1 << 3, 0, (0, 0, 0, 0)),
            Err(libc::ENXIO)
        );
        // What takes no opening is served.
        assert!(guest.setattr(node, 1, 0, (0, 0o600, 0, 0)).is_ok());
        let list = raw![100u32, 0u32, "system.posix_acl_access"];
        assert_eq!(guest.ask(op::GETXATTR, node, &list), Err(libc::ENODATA));
    }
    let after = std::fs::metadata(dir.path().join("device")).unwrap();
    assert_eq!(after.rdev(), before.rdev());
    drop(socket);
}

#[test]
fn a_link_that_takes_a_files_place_is_not_followed_by_what_makes_files() {
    let (dir, mut guest) = start();
    let secret = tempfile::NamedTempFile::new().unwrap();
    std::os::unix::fs::symlink(secret.path(), dir.path().join("l")).unwrap();
    for flags in [libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC] {
        assert_eq!(guest.create(1, "l", flags, 0o600), Err(libc::ELOOP));
    }
    let (link, _) = guest.lookup(1, "l").unwrap();
    assert_eq!(
        guest.setattr(link, 1 << 3, 0, (0, 0, 0, 0)),
        Err(libc::ELOOP)
    );
    // Owners and times are the link's own.
    guest.setattr(link, 0b110110, 0, (0, 0, 42, 42)).unwrap();
    assert_eq!(secret.as_file().metadata().unwrap().uid(), 0);
    assert!(guest.setattr(link, 1, 0, (0, 0o777, 0, 0)).is_err());
    let body = raw![1u32, 0u32, 0u32, 0u32, "user.x", &b"x"[..]];
    assert_eq!(guest.ask(op::SETXATTR, link, &body), Err(libc::EPERM));
    assert_eq!(
        guest
            .ask(op::LINK, 1, &raw![link, "l2"])
            .map(|e| u64_at(&e, 0)),
        Ok(link)
    );
    assert!(
        std::fs::symlink_metadata(dir.path().join("l2"))
            .unwrap()
            .is_symlink()
    );
}

#[test]
fn answers_without_room_are_errors_and_harm_nothing() {
    let (dir, mut guest) = start();
    std::fs::write(dir.path().join("f"), b"x").unwrap();
    let memory = guest.place(0)[0];
    let header = raw![42u32, op::LOOKUP, 7u64, 1u64, 0u32, 0u32, 0u32, 0u32, "f"];
    let place = guest.place(1)[1];
    // SAFETY: the place is mapped, and nobody else uses it.
    unsafe { std::ptr::copy_nonoverlapping(header.as_ptr(), place.addr as *mut u8, 42) };
    let request = Span {
        addr: place.addr,
        len: 42,
    };
    for room in [0, 1, 15, 16, 143] {
        let to = Span {
            addr: memory.addr,
            len: room,
        };
        let handled = guest.server.handle(&guest.view, 0, &[request], &[to]);
        assert!(matches!(handled, Err(ServerError::Request(_))), "{room}");
    }
    // The length that it says is not what there is of it.
    for said in [0u32, 39, 43, u32::MAX] {
        // SAFETY: as above.
        unsafe {
            std::ptr::copy_nonoverlapping(said.to_le_bytes().as_ptr(), place.addr as *mut u8, 4)
        };
        let handled = guest
            .server
            .handle(&guest.view, 0, &[request], &guest.place(0));
        assert!(matches!(handled, Err(ServerError::Request(_))), "{said}");
    }
}

#[test]
fn more_files_are_known_than_descriptors_are_open() {
    let (dir, mut guest) = start();
    guest.server.keep_open(40);
    let deep = dir.path().join("a/b/c");
    std::fs::create_dir_all(&deep).unwrap();
    for n in 0..300 {
        std::fs::write(deep.join(format!("f{n}")), n.to_string()).unwrap();
    }
    let mut folder = 1;
    for name in ["a", "b", "c"] {
        folder = guest.lookup(folder, name).unwrap().0;
    }
    let mut nodes = Vec::new();
    for n in 0..300 {
        nodes.push(guest.lookup(folder, &format!("f{n}")).unwrap().0);
    }
    let (known, open) = guest.server.known();
    assert_eq!(known, 304);
    assert!(open <= 40, "{open}");
    // Each is still itself.
    for (n, node) in nodes.iter().enumerate() {
        let (handle, _) = guest.open(*node, libc::O_RDONLY).unwrap();
        assert_eq!(
            guest.read(*node, handle, 0, 10),
            Ok(n.to_string().into_bytes())
        );
        guest.release(*node, handle).unwrap();
        assert_eq!(guest.lookup(folder, &format!("f{n}")).unwrap().0, *node);
    }
    assert!(guest.server.known().1 <= 40);
    // One that is gone, one that was replaced, and one that the guest has moved: only that is found.
    let old = |n: usize| deep.join(format!("f{n}"));
    std::fs::remove_file(old(0)).unwrap();
    std::fs::remove_file(old(1)).unwrap();
    std::fs::write(old(1), b"another").unwrap();
    guest
        .ask(op::RENAME, folder, &raw![1u64, "f2", "moved"])
        .unwrap();
    for node in &nodes[100..200] {
        guest.getattr(*node).unwrap();
    }
    assert_eq!(guest.getattr(nodes[0]), Err(libc::ESTALE));
    assert_eq!(guest.getattr(nodes[1]), Err(libc::ESTALE));
    assert_eq!(guest.getattr(nodes[2]).unwrap().size, 1);
    let (replaced, _) = guest.lookup(folder, "f1").unwrap();
    assert_ne!(replaced, nodes[1]);
    assert_eq!(guest.getattr(nodes[1]), Err(libc::ESTALE));
    for node in nodes {
        guest.forget(node, 2);
    }
    guest.forget(replaced, 1);
    assert_eq!(guest.server.known().0, 4 + 1 - 1);
}

#[test]
fn open_files_without_end_come_to_an_end_that_is_an_error() {
    let (dir, mut guest) = start();
    guest.server.keep_open(20);
    for n in 0..30 {
        std::fs::write(dir.path().join(format!("f{n}")), b"x").unwrap();
    }
    let mut opened = Vec::new();
    let error = (0..30).find_map(|n| {
        let (node, _) = match guest.lookup(1, &format!("f{n}")) {
            Ok(found) => found,
            Err(error) => return Some(error),
        };
        opened.push((node, guest.open(node, libc::O_RDONLY).unwrap().0));
        None
    });
    assert_eq!(error, Some(libc::ENFILE));
    assert!(opened.len() > 15);
    for (node, handle) in opened {
        assert_eq!(guest.read(node, handle, 0, 9), Ok(b"x".to_vec()));
        guest.release(node, handle).unwrap();
    }
    assert!(guest.lookup(1, "f29").is_ok());
}

#[test]
fn a_second_mount_knows_nothing_of_the_first() {
    let (dir, mut guest) = start();
    std::fs::write(dir.path().join("f"), b"x").unwrap();
    let (node, _) = guest.lookup(1, "f").unwrap();
    let (handle, _) = guest.open(node, libc::O_RDONLY).unwrap();
    guest
        .ask(op::INIT, 0, &raw![7u32, 38u32, 0u32, u32::MAX])
        .unwrap();
    assert_eq!(guest.getattr(node), Err(libc::ESTALE));
    assert_eq!(guest.read(node, handle, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.server.known(), (1, 1));
    assert!(guest.lookup(1, "f").unwrap().0 > node);
}

#[test]
fn requests_made_by_chance_harm_nothing_outside() {
    const MANY: usize = 30_000;
    let outer = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let outer = outer.unwrap();
    let dir = outer.path().join("served");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(outer.path().join("secret"), b"untouched").unwrap();
    std::os::unix::fs::symlink(outer.path().join("secret"), dir.join("a")).unwrap();
    std::os::unix::fs::symlink("..", dir.join("b")).unwrap();
    let mut guest = Guest::new(&dir);
    guest.server.keep_open(50);
    let mut random = model::Random(model::seed());
    let words = [0, 0, 0, 1, 1, 2, 3, 4, 7, 13, 64, 4096, 1 << 16];
    let names = [
        "a",
        "b",
        "c",
        "d",
        "..",
        ".",
        "",
        "/",
        "../secret",
        "user.x",
    ];
    let mut answered = 0;
    for n in 0..MANY {
        let opcode = random.below(56) as u32;
        if opcode == op::SYNCFS || opcode == op::INIT && random.below(50) > 0 {
            continue;
        }
        (guest.uid, guest.gid) = (random.below(3) as u32, random.below(3) as u32);
        let mut body = Vec::new();
        for at in 0..random.below(24) {
            // Half of a number of 64 bits now and then makes a very large one.
            let large = at % 2 == 1 && random.below(30) == 0;
            let word = if large {
                u32::MAX
            } else {
                words[random.below(words.len())]
            };
            body.extend(word.to_le_bytes());
        }
        for _ in 0..random.below(3) {
            body.extend(names[random.below(names.len())].as_bytes());
            body.push(0);
        }
        let (outcome, _) = guest.start(opcode, 1 + random.below(12) as u64, &body, n % 8);
        if let Ok(Outcome::Done(len)) = outcome {
            assert!(len == 0 || len >= 16);
            answered += 1;
        }
        guest.server.finished(&guest.view);
    }
    assert!(answered > MANY / 4, "{answered}");
    guest.server.forget_all();
    (guest.uid, guest.gid) = (0, 0);
    assert!(guest.getattr(1).is_ok());
    // SAFETY: no arguments.
    assert_eq!(unsafe { (libc::geteuid(), libc::getegid()) }, (0, 0));
    let secret = outer.path().join("secret");
    assert_eq!(std::fs::read(&secret).unwrap(), b"untouched");
    assert_eq!(std::fs::metadata(&secret).unwrap().mode() & 0o7777, 0o644);
    assert_eq!(std::fs::read_dir(outer.path()).unwrap().count(), 2);
}
