//! Locks: between guests, and between a guest and the host.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::guest::{Guest, Told, op, raw, u32_at, u64_at};
use super::*;

const READ: u32 = libc::F_RDLCK as u32;
const WRITE: u32 = libc::F_WRLCK as u32;
const UNLOCK: u32 = libc::F_UNLCK as u32;
const ALL: (u64, u64) = (0, i64::MAX as u64);
const WHOLE: u32 = 1;
/// Where the answer to what waits goes.
const TICKET: usize = 3;

struct Scene {
    dir: tempfile::TempDir,
    one: Guest,
    other: Guest,
    node: u64,
    handle: u64,
    others_node: u64,
    others_handle: u64,
}

/// Two guests that have a file open.
fn scene() -> Scene {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), b"0123456789").unwrap();
    let (mut one, mut other) = (Guest::new(dir.path()), Guest::new(dir.path()));
    let (node, _) = one.lookup(1, "f").unwrap();
    let (others_node, _) = other.lookup(1, "f").unwrap();
    let (handle, _) = one.open(node, libc::O_RDWR).unwrap();
    let (others_handle, _) = other.open(others_node, libc::O_RDWR).unwrap();
    Scene {
        dir,
        one,
        other,
        node,
        handle,
        others_node,
        others_handle,
    }
}

fn request(handle: u64, owner: u64, (start, end): (u64, u64), kind: u32, flags: u32) -> Vec<u8> {
    raw![handle, owner, start, end, kind, 77u32, flags, 0u32]
}

impl Scene {
    fn lock(&mut self, owner: u64, range: (u64, u64), kind: u32) -> Told {
        let body = request(self.handle, owner, range, kind, 0);
        self.one.ask(op::SETLK, self.node, &body)
    }

    fn others(&mut self, owner: u64, range: (u64, u64), kind: u32) -> Told {
        let body = request(self.others_handle, owner, range, kind, 0);
        self.other.ask(op::SETLK, self.others_node, &body)
    }

    fn whole(&mut self, kind: u32) -> Told {
        let body = request(self.handle, 1, ALL, kind, WHOLE);
        self.one.ask(op::SETLK, self.node, &body)
    }

    fn others_whole(&mut self, kind: u32) -> Told {
        let body = request(self.others_handle, 1, ALL, kind, WHOLE);
        self.other.ask(op::SETLK, self.others_node, &body)
    }

    /// Begins to wait for a lock. Gives the request's number.
    fn wait(&mut self, kind: u32, flags: u32) -> u64 {
        let body = request(self.others_handle, 5, ALL, kind, flags);
        let (outcome, unique) = self
            .other
            .start(op::SETLKW, self.others_node, &body, TICKET);
        assert_eq!(outcome.unwrap(), Outcome::Later);
        assert!(self.other.server.wait().is_some());
        unique
    }

    /// What the one that waits is told.
    fn told(&mut self) -> Told {
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(5) {
            let finished = self.other.server.finished(&self.other.view);
            if let Some(finished) = finished.into_iter().next() {
                assert_eq!(finished.ticket, TICKET);
                assert_eq!(self.other.server.wait(), None);
                return self.other.told(TICKET, finished.result.unwrap());
            }
            std::thread::sleep(self.other.server.wait().unwrap());
        }
        panic!("it waits still");
    }
}

fn host_range(file: &File, kind: i32) -> bool {
    // SAFETY: all-zero is a valid flock, which the kernel reads.
    unsafe {
        let mut range: libc::flock = std::mem::zeroed();
        range.l_type = kind as libc::c_short;
        libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut range) == 0
    }
}

fn host_whole(file: &File, operation: i32) -> bool {
    // SAFETY: numbers only.
    unsafe { libc::flock(file.as_raw_fd(), operation | libc::LOCK_NB) == 0 }
}

const TAKEN: Told = Err(libc::EAGAIN);
const GIVEN: Told = Ok(Vec::new());

#[test]
fn ranges_exclude_owners_of_one_guest_and_of_two() {
    let mut s = scene();
    assert_eq!(s.lock(1, (0, 4), WRITE), GIVEN);
    assert_eq!(s.lock(2, (4, 9), READ), TAKEN);
    assert_eq!(s.lock(2, (5, 9), READ), GIVEN);
    assert_eq!(s.others(1, (0, 0), READ), TAKEN);
    assert_eq!(s.others(1, (5, 5), READ), GIVEN);
    assert_eq!(s.others(1, (5, 5), WRITE), TAKEN);
    // An owner's own locks are no hindrance to it.
    assert_eq!(s.lock(1, (2, 3), READ), GIVEN);
    assert_eq!(s.others(1, (2, 3), READ), GIVEN);
    assert_eq!(s.lock(1, ALL, UNLOCK), GIVEN);
    assert_eq!(s.others(1, (0, 4), WRITE), GIVEN);
}

#[test]
fn what_is_in_the_way_is_told() {
    let mut s = scene();
    let ask = |s: &mut Scene| {
        let body = request(s.others_handle, 1, (0, 100), WRITE, 0);
        let told = s.other.ask(op::GETLK, s.others_node, &body).unwrap();
        (
            u64_at(&told, 0),
            u64_at(&told, 8),
            u32_at(&told, 16),
            u32_at(&told, 20),
        )
    };
    assert_eq!(ask(&mut s).2, UNLOCK);
    s.lock(1, (10, 19), READ).unwrap();
    assert_eq!(ask(&mut s), (10, 19, READ, 0));
    s.lock(1, (30, ALL.1), WRITE).unwrap();
    s.lock(1, (10, 19), UNLOCK).unwrap();
    assert_eq!(ask(&mut s), (30, ALL.1, WRITE, 0));
}

#[test]
fn an_owner_that_closes_the_file_has_no_locks_on_it_any_more() {
    let mut s = scene();
    s.lock(1, ALL, WRITE).unwrap();
    s.one.flush(s.node, s.handle, 2).unwrap();
    assert_eq!(s.others(1, ALL, READ), TAKEN);
    s.one.flush(s.node, s.handle, 1).unwrap();
    assert_eq!(s.others(1, ALL, READ), GIVEN);
    s.others(1, ALL, UNLOCK).unwrap();
    s.lock(1, ALL, WRITE).unwrap();
    s.one.release(s.node, s.handle).unwrap();
    assert_eq!(s.others(1, ALL, READ), GIVEN);
}

#[test]
fn a_lock_takes_the_access_that_the_file_is_open_for() {
    let mut s = scene();
    let (reading, _) = s.one.open(s.node, libc::O_RDONLY).unwrap();
    let by = |s: &mut Scene, handle: u64, kind: u32| {
        let body = request(handle, 1, ALL, kind, 0);
        s.one.ask(op::SETLK, s.node, &body)
    };
    assert_eq!(by(&mut s, reading, WRITE), Err(libc::EBADF));
    assert_eq!(by(&mut s, reading, READ), GIVEN);
    assert_eq!(s.others(1, ALL, WRITE), TAKEN);
    // Its own lock for reading becomes one for writing by the other open file.
    let writing = s.handle;
    assert_eq!(by(&mut s, writing, WRITE), GIVEN);
    assert_eq!(s.others(1, ALL, READ), TAKEN);
    assert_eq!(by(&mut s, reading, UNLOCK), GIVEN);
    assert_eq!(s.others(1, ALL, WRITE), GIVEN);
}

#[test]
fn whole_files_are_locked_by_what_is_open() {
    let mut s = scene();
    assert_eq!(s.whole(READ), GIVEN);
    assert_eq!(s.others_whole(READ), GIVEN);
    assert_eq!(s.whole(WRITE), TAKEN);
    assert_eq!(s.others_whole(UNLOCK), GIVEN);
    assert_eq!(s.whole(WRITE), GIVEN);
    assert_eq!(s.others_whole(READ), TAKEN);
    // The two kinds of locks have nothing to do with each other.
    assert_eq!(s.others(1, ALL, WRITE), GIVEN);
    s.one.release(s.node, s.handle).unwrap();
    assert_eq!(s.others_whole(WRITE), GIVEN);
}

#[test]
fn the_host_and_a_guest_exclude_each_other() {
    let mut s = scene();
    let path = s.dir.path().join("f");
    let file = File::options().read(true).write(true).open(&path).unwrap();
    s.lock(1, ALL, WRITE).unwrap();
    assert!(!host_range(&file, libc::F_RDLCK));
    s.lock(1, ALL, UNLOCK).unwrap();
    assert!(host_range(&file, libc::F_WRLCK));
    assert_eq!(s.lock(1, ALL, READ), TAKEN);
    assert!(host_whole(&file, libc::LOCK_EX));
    assert_eq!(s.whole(READ), TAKEN);
    drop(file);
    assert_eq!(s.lock(1, ALL, READ), GIVEN);
    assert_eq!(s.whole(READ), GIVEN);
    // A process that locks as most do.
    let python =
        "import fcntl,sys; fcntl.lockf(open(sys.argv[1],'r+'), fcntl.LOCK_EX|fcntl.LOCK_NB)";
    let run = |path: &std::path::Path| {
        std::process::Command::new("python3")
            .args(["-c", python])
            .arg(path)
            .stderr(std::process::Stdio::null())
            .status()
    };
    match run(&path) {
        Err(_) => eprintln!("skipped: no python3 here"),
        Ok(status) => {
            assert!(!status.success());
            s.lock(1, ALL, UNLOCK).unwrap();
            assert!(run(&path).unwrap().success());
        }
    }
}

#[test]
fn one_that_waits_is_told_when_another_guest_gives_up() {
    let mut s = scene();
    s.lock(1, ALL, WRITE).unwrap();
    s.wait(READ, 0);
    assert!(s.other.server.finished(&s.other.view).is_empty());
    s.lock(1, ALL, UNLOCK).unwrap();
    assert_eq!(s.told(), GIVEN);
    assert_eq!(s.lock(1, ALL, WRITE), TAKEN);
    // And of the whole file, which the host has locked.
    let file = File::open(s.dir.path().join("f")).unwrap();
    assert!(host_whole(&file, libc::LOCK_EX));
    s.wait(WRITE, WHOLE);
    std::thread::sleep(Duration::from_millis(20));
    assert!(s.other.server.finished(&s.other.view).is_empty());
    drop(file);
    assert_eq!(s.told(), GIVEN);
    assert_eq!(s.whole(READ), TAKEN);
}

#[test]
fn one_that_waits_is_told_at_once_when_its_own_guest_gives_up() {
    let mut s = scene();
    s.others(1, ALL, WRITE).unwrap();
    s.wait(WRITE, 0);
    // Long enough for the next try to be a while away.
    for _ in 0..8 {
        std::thread::sleep(s.other.server.wait().unwrap());
        assert!(s.other.server.finished(&s.other.view).is_empty());
    }
    assert!(s.other.server.wait().unwrap() > Duration::from_millis(5));
    s.others(1, ALL, UNLOCK).unwrap();
    assert_eq!(s.other.server.wait(), Some(Duration::ZERO));
    let finished = s.other.server.finished(&s.other.view);
    assert_eq!(finished.len(), 1);
}

fn question(waits: &[kiln_lockwatch::Wait], command: u32) -> Vec<u8> {
    const LEN: u32 = kiln_lockwatch::LEN as u32;
    let mut body = raw![0u64, 1u32 << 4, command, 0u64, LEN, LEN];
    body.extend_from_slice(&kiln_lockwatch::encode(waits));
    body
}

#[test]
fn agent_is_told_who_waits_long_and_ends_it() {
    const WATCH: usize = 5;
    const COMMAND: u32 = kiln_lockwatch::COMMAND;
    let mut s = scene();
    let ask = |s: &mut Scene, waits: &[kiln_lockwatch::Wait]| {
        let body = question(waits, COMMAND);
        s.other.start(op::IOCTL, 1, &body, WATCH).0.unwrap()
    };
    assert_eq!(ask(&mut s, &[]), Outcome::Later);
    // One is enough, and while nobody waits nothing needs to be looked at.
    let again = question(&[], COMMAND);
    assert_eq!(s.other.ask(op::IOCTL, 1, &again), Err(libc::EBUSY));
    assert_eq!(s.other.server.wait(), None);
    s.lock(1, ALL, WRITE).unwrap();
    let unique = s.wait(WRITE, 0);
    let told = loop {
        let finished = s.other.server.finished(&s.other.view);
        if let Some(one) = finished.first() {
            assert_eq!((finished.len(), one.ticket), (1, WATCH));
            let len = one.result.as_ref().unwrap();
            break s.other.told(WATCH, *len).unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let message = told[16..].try_into().unwrap();
    let waits = kiln_lockwatch::decode(message);
    assert_eq!((waits.len(), waits[0].unique), (1, unique));
    // Told to end it, the server does.
    assert_eq!(ask(&mut s, &waits), Outcome::Later);
    assert_eq!(s.told(), Err(libc::EINTR));
    assert_eq!(s.other.server.wait(), None);
    // A session's end answers who watches, too.
    s.other.ask(op::DESTROY, 0, &[]).unwrap();
    let ended = s.other.server.finished(&s.other.view);
    assert_eq!((ended.len(), ended[0].ticket), (1, WATCH));
}

#[test]
fn nobody_but_the_agent_is_told_who_waits() {
    let mut s = scene();
    let node = s.others_node;
    let right = question(&[], kiln_lockwatch::COMMAND);
    let wrong = question(&[], kiln_lockwatch::COMMAND + 1);
    let mut short = right.clone();
    short.truncate(40);
    assert_eq!(s.other.ask(op::IOCTL, node, &right), Err(libc::ENOTTY));
    assert_eq!(s.other.ask(op::IOCTL, 1, &wrong), Err(libc::ENOTTY));
    // It has less than it says.
    assert_eq!(s.other.ask(op::IOCTL, 1, &short), Err(0));
    s.other.uid = 1000;
    assert_eq!(s.other.ask(op::IOCTL, 1, &right), Err(libc::ENOTTY));
}

#[test]
fn one_that_waits_can_be_interrupted() {
    let mut s = scene();
    s.lock(1, ALL, WRITE).unwrap();
    let unique = s.wait(WRITE, 0);
    // Nobody waits by that number; the guest is to ask again.
    assert_eq!(
        s.other.ask(op::INTERRUPT, 0, &raw![unique + 1]),
        Err(libc::EAGAIN)
    );
    assert_eq!(s.other.ask(op::INTERRUPT, 0, &raw![unique]), Ok(Vec::new()));
    assert_eq!(s.other.server.wait(), Some(Duration::ZERO));
    assert_eq!(s.told(), Err(libc::EINTR));
    s.lock(1, ALL, UNLOCK).unwrap();
    assert!(s.other.server.finished(&s.other.view).is_empty());
    assert_eq!(s.lock(1, ALL, WRITE), GIVEN);
}

#[test]
fn one_that_waits_ends_with_the_session_or_with_what_it_has_open() {
    let mut s = scene();
    s.lock(1, ALL, WRITE).unwrap();
    s.wait(WRITE, 0);
    assert_eq!(s.other.server.forget_all(), [TICKET]);
    assert_eq!(s.other.server.wait(), None);
    assert!(s.other.server.finished(&s.other.view).is_empty());
    let mut s = scene();
    s.lock(1, ALL, WRITE).unwrap();
    s.wait(WRITE, 0);
    s.other.release(s.others_node, s.others_handle).unwrap();
    assert_eq!(s.told(), Err(libc::EBADF));
    let mut s = scene();
    s.lock(1, ALL, WRITE).unwrap();
    s.wait(WRITE, 0);
    assert_eq!(s.other.ask(op::DESTROY, 0, &[]), GIVEN);
    assert_eq!(s.told(), Err(libc::EINTR));
}

#[test]
fn locks_without_sense_are_refused() {
    let mut s = scene();
    assert_eq!(s.lock(1, (5, 4), READ), Err(libc::EINVAL));
    assert_eq!(s.lock(1, (0, u64::MAX), READ), Err(libc::EINVAL));
    assert_eq!(s.lock(1, (1 << 63, u64::MAX), READ), Err(libc::EINVAL));
    assert_eq!(s.lock(1, ALL, 17), Err(libc::EINVAL));
    s.handle = 4444;
    assert_eq!(s.lock(1, ALL, READ), Err(libc::EBADF));
    assert_eq!(s.whole(READ), Err(libc::EBADF));
}
