//! The server on FUSE messages made by hand.

use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use super::*;

mod guest;
mod hostile;
mod locking;
mod model;
mod operations;

const PAGE: usize = 4096;

/// Two pages: a request goes into the first, its answer into the second.
struct Message {
    memory: NonNull<u8>,
    view: View,
}

impl Message {
    fn new() -> Self {
        // SAFETY: a new anonymous mapping, which stays for the life of the test process.
        let memory = unsafe {
            let (prot, flags) = (
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            libc::mmap(std::ptr::null_mut(), 2 * PAGE, prot, flags, -1, 0)
        };
        assert_ne!(memory, libc::MAP_FAILED);
        let memory = NonNull::new(memory.cast::<u8>()).unwrap();
        // SAFETY: just mapped, and accessed only by copying, below.
        let view = unsafe { View::new(&[(memory, 2 * PAGE)]) }.unwrap();
        Message { memory, view }
    }

    /// Sends a request; gives the error and the body of the answer.
    fn send(&mut self, server: &mut Server, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        let mut raw = Vec::new();
        raw.extend((40 + body.len() as u32).to_le_bytes());
        raw.extend(opcode.to_le_bytes());
        raw.extend(7u64.to_le_bytes());
        raw.extend(node.to_le_bytes());
        raw.extend([0; 16]);
        raw.extend(body);
        // SAFETY: both pages are mapped; nobody else uses them now.
        unsafe { std::ptr::copy_nonoverlapping(raw.as_ptr(), self.memory.as_ptr(), raw.len()) };
        let start = self.memory.as_ptr() as usize;
        let readable = [
            Span {
                addr: start,
                len: 40,
            },
            Span {
                addr: start + 40,
                len: body.len() as u32,
            },
        ];
        let writable = [Span {
            addr: start + PAGE,
            len: PAGE as u32,
        }];
        let outcome = server.handle(&self.view, 0, &readable, &writable).unwrap();
        let Outcome::Done(len) = outcome else {
            panic!("the request waits");
        };
        // SAFETY: as above.
        let answer =
            unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(PAGE), len) }.to_vec();
        let error = i32::from_le_bytes(answer[4..8].try_into().unwrap());
        assert_eq!(
            u32::from_le_bytes(answer[..4].try_into().unwrap()) as usize,
            len
        );
        assert_eq!(u64::from_le_bytes(answer[8..16].try_into().unwrap()), 7);
        (error, answer[16..].to_vec())
    }

    fn init(&mut self, server: &mut Server) {
        let mut body = Vec::new();
        body.extend(7u32.to_le_bytes());
        body.extend(38u32.to_le_bytes());
        body.extend([0; 8]);
        assert_eq!(self.send(server, 26, 0, &body).0, 0);
    }
}

fn serve(dir: &tempfile::TempDir) -> Server {
    let root = dir.path().to_str().unwrap().to_owned();
    Server::new(&Options {
        root,
        ..Options::default()
    })
    .unwrap()
}

#[test]
fn a_file_is_found_opened_and_read() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("hello"), b"contents").unwrap();
    let mut server = serve(&dir);
    let mut message = Message::new();
    message.init(&mut server);
    let (error, entry) = message.send(&mut server, 1, 1, b"hello\0");
    assert_eq!(error, 0);
    let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
    let (error, open) = message.send(&mut server, 14, node, &[0; 8]);
    assert_eq!(error, 0);
    let mut read = open[..8].to_vec();
    read.extend(2u64.to_le_bytes());
    read.extend(100u32.to_le_bytes());
    read.extend([0; 20]);
    assert_eq!(
        message.send(&mut server, 15, node, &read),
        (0, b"ntents".to_vec())
    );
    server.forget_all();
    assert_eq!(message.send(&mut server, 15, node, &read).0, -libc::EBADF);
    assert_eq!(message.send(&mut server, 1, 1, b"hello\0").0, 0);
}

#[test]
fn a_guest_that_can_is_offered_requests_of_a_mebibyte() {
    const BIG_WRITES: u32 = 1 << 5;
    const MAX_PAGES: u32 = 1 << 22;
    let dir = tempfile::tempdir().unwrap();
    let offered = |capable: u32| {
        let mut body = Vec::new();
        for number in [7, 38, 0, capable] {
            body.extend(u32::to_le_bytes(number));
        }
        let (error, out) = Message::new().send(&mut serve(&dir), 26, 0, &body);
        assert_eq!(error, 0);
        let field = |at: usize| u32::from_le_bytes(out[at..at + 4].try_into().unwrap());
        // flags, max_write, max_pages
        (field(12), field(20), field(28) & 0xffff)
    };
    let (flags, max_write, max_pages) = offered(BIG_WRITES | MAX_PAGES);
    assert_eq!(flags & (BIG_WRITES | MAX_PAGES), BIG_WRITES | MAX_PAGES);
    assert_eq!((max_write, max_pages), (1 << 20, 256));
    let (flags, max_write, max_pages) = offered(0);
    assert_eq!((flags, max_write, max_pages), (0, 4096, 0));
}

#[test]
fn names_that_lead_out_of_the_folder_are_refused() {
    let outer = tempfile::tempdir().unwrap();
    std::fs::write(outer.path().join("secret"), b"").unwrap();
    let inner = tempfile::tempdir_in(outer.path()).unwrap();
    let mut server = serve(&inner);
    let mut message = Message::new();
    message.init(&mut server);
    for name in [&b"../secret\0"[..], b"/etc\0", b"a/b\0"] {
        assert_eq!(message.send(&mut server, 1, 1, name).0, -libc::EINVAL);
    }
    // Up from the root is the root.
    let (error, entry) = message.send(&mut server, 1, 1, b"..\0");
    assert_eq!((error, &entry[..8]), (0, &1u64.to_le_bytes()[..]));
    let mut mkdir = vec![0xff, 1, 0, 0, 0, 0, 0, 0];
    mkdir.extend(b"../new\0");
    assert_eq!(message.send(&mut server, 9, 1, &mkdir).0, -libc::EINVAL);
    assert!(!outer.path().join("new").exists());
}

#[test]
fn a_link_out_of_the_folder_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
    let mut server = serve(&dir);
    let mut message = Message::new();
    message.init(&mut server);
    let (_, entry) = message.send(&mut server, 1, 1, b"link\0");
    let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
    assert_eq!(
        message.send(&mut server, 5, node, &[]),
        (0, b"/etc/passwd".to_vec())
    );
    assert_ne!(message.send(&mut server, 14, node, &[0; 8]).0, 0);
}

#[test]
fn buffers_outside_the_view_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = serve(&dir);
    let message = Message::new();
    let outside = Span {
        addr: 0x1000,
        len: 40,
    };
    assert!(matches!(
        server.handle(&message.view, 0, &[outside], &[]),
        Err(ServerError::Request(_))
    ));
    let start = message.memory.as_ptr() as usize;
    let across = Span {
        addr: start + PAGE,
        len: PAGE as u32 + 1,
    };
    assert!(server.handle(&message.view, 0, &[across], &[]).is_err());
    let many = vec![
        Span {
            addr: start,
            len: 1
        };
        1025
    ];
    assert!(matches!(
        server.handle(&message.view, 0, &many, &[]),
        Err(ServerError::View(ViewError::TooMany(1025)))
    ));
}

#[test]
fn a_folder_that_is_not_there_is_an_error_that_names_it() {
    let options = Options {
        root: "/no/such/folder".to_owned(),
        ..Options::default()
    };
    let error = Server::new(&options).unwrap_err();
    assert!(error.to_string().contains("/no/such/folder"));
}

#[test]
fn a_confined_thread_sees_its_folder_only() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("inside"), b"").unwrap();
    let fd: OwnedFd = std::fs::File::open(dir.path()).unwrap().into();
    let seen = std::thread::spawn(move || {
        let (mut server, left) = Prepared::new(&Options::default())?.enter(fd, &[])?;
        let mut message = Message::new();
        // Before the guest has mounted it, too: node 1 is the folder from the start.
        let before = message.send(&mut server, 1, 1, b"etc\0").0;
        message.init(&mut server);
        let inside = message.send(&mut server, 1, 1, b"inside\0").0;
        let outside = message.send(&mut server, 1, 1, b"etc\0").0;
        let names: Vec<_> = std::fs::read_dir("/")
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        Ok::<_, ServerError>((left, (before, inside, outside, names)))
    })
    .join()
    .unwrap();
    match seen {
        Ok((_left, seen)) => assert_eq!(
            seen,
            (-libc::ENOENT, 0, -libc::ENOENT, vec!["inside".into()])
        ),
        Err(e) => eprintln!("skipped: {e}"),
    }
    // The rest of the process is where it was.
    assert!(std::path::Path::new("/etc").exists());
}

/// What the shim relies on: it mounts volumes below the pod's folder after the VMM was given the folder, and the
/// VMM is in another mount namespace.
#[test]
fn a_mount_made_later_in_the_folders_namespace_is_seen_by_the_confined_thread() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("volume")).unwrap();
    let (ready, started) = std::sync::mpsc::channel::<OwnedFd>();
    let (mounted, go) = std::sync::mpsc::channel::<bool>();
    let (over, end) = std::sync::mpsc::channel::<()>();
    let path = std::ffi::CString::new(dir.path().join("volume").to_str().unwrap()).unwrap();
    // A namespace of the client's own, private, in which it mounts after handing the folder over.
    let client = std::thread::spawn({
        let dir = dir.path().to_owned();
        move || {
            let none = std::ptr::null();
            // SAFETY: constant strings and flags.
            let own = unsafe {
                libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) == 0
                    && libc::mount(
                        none,
                        c"/".as_ptr(),
                        none,
                        libc::MS_REC | libc::MS_PRIVATE,
                        none.cast(),
                    ) == 0
            };
            ready
                .send(std::fs::File::open(&dir).unwrap().into())
                .unwrap();
            // SAFETY: strings that live through the call.
            let done = own
                && unsafe {
                    libc::mount(
                        c"none".as_ptr(),
                        path.as_ptr(),
                        c"tmpfs".as_ptr(),
                        0,
                        none.cast(),
                    )
                } == 0;
            if done {
                std::fs::write(dir.join("volume/late"), b"").unwrap();
            }
            mounted.send(done).unwrap();
            // The namespace and its mounts end with its last thread.
            let _ = end.recv();
        }
    });
    let folder = started.recv().unwrap();
    let server = std::thread::spawn(move || {
        let (mut server, left) = Prepared::new(&Options::default())?.enter(folder, &[])?;
        let done = go.recv().unwrap();
        let mut message = Message::new();
        message.init(&mut server);
        let (error, entry) = message.send(&mut server, 1, 1, b"volume\0");
        assert_eq!(error, 0);
        let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
        let found = message.send(&mut server, 1, node, b"late\0").0;
        Ok::<_, ServerError>((left, done, found))
    });
    let served = server.join().unwrap();
    drop(over);
    match served {
        Ok((_left, true, found)) => assert_eq!(found, 0),
        Ok((_left, false, _)) => eprintln!("skipped: no mount namespace of one's own here"),
        Err(e) => eprintln!("skipped: {e}"),
    }
    client.join().unwrap();
    // Here, it is not mounted.
    assert!(!dir.path().join("volume/late").exists());
}

/// Device and inode of what a descriptor stands for.
fn identity(fd: i32) -> (u64, u64) {
    // SAFETY: all-zero is a valid stat, which the kernel fills in.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        assert_eq!(libc::fstat(fd, &raw mut stat), 0);
        (stat.st_dev, stat.st_ino)
    }
}

/// Runs `look` on a thread that is confined to a folder, which has one file, `inside`.
fn confined<R: Send + 'static>(
    keep: Vec<RawFd>,
    look: impl FnOnce(&Server) -> R + Send + 'static,
) -> R {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("inside"), b"").unwrap();
    let folder: OwnedFd = File::open(dir.path()).unwrap().into();
    let thread = std::thread::spawn(move || {
        let prepared = Prepared::new(&Options::default()).unwrap();
        let (server, left) = prepared.enter(folder, &keep).unwrap();
        (look(&server), left)
    });
    thread.join().unwrap().0
}

#[test]
fn no_descriptor_leads_out_of_the_folder() {
    let outside = File::open("/").unwrap();
    let open = confined(Vec::new(), |_| {
        // SAFETY: numbers that may or may not be descriptors.
        let open = (0..1024).filter(|n| unsafe { libc::fcntl(*n, libc::F_GETFD) } >= 0);
        let open: Vec<RawFd> = open.collect();
        for n in &open {
            for path in [c"../../../etc/passwd", c"..", c"../.."] {
                // SAFETY: a constant path and a number.
                let got = unsafe { libc::openat(*n, path.as_ptr(), libc::O_PATH) };
                // The folder itself, or the root of a mount of its own.
                assert!(
                    got < 0 || identity(got) == identity(*n),
                    "descriptor {n} leads out by {path:?}"
                );
            }
        }
        open.len()
    });
    // Standard ones, a mount of descriptors, and the folder.
    assert_eq!(open, 5);
    drop(outside);
}

#[test]
fn a_file_that_others_have_open_for_reading_cannot_be_opened_for_writing() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let shared = File::open(file.path()).unwrap();
    let secret = identity(shared.as_raw_fd());
    let own = confined(Vec::new(), move |server| {
        let own = File::open("/inside").unwrap();
        let numbers = server.numbers();
        let again = (0..1024).filter_map(|number: RawFd| {
            let path = std::ffi::CString::new(number.to_string()).unwrap();
            // SAFETY: a string that lives through the call.
            let opened = unsafe { libc::openat(numbers, path.as_ptr(), libc::O_RDWR) };
            (opened >= 0).then(|| identity(opened))
        });
        let again: Vec<_> = again.collect();
        assert!(!again.contains(&secret));
        again.contains(&identity(own.as_raw_fd()))
    });
    // Its own can be: that is how files are opened.
    assert!(own);
    assert!(shared.metadata().is_ok());
}

#[test]
fn a_confined_thread_keeps_the_descriptors_that_it_is_told_to() {
    let (output, input) = std::io::pipe().unwrap();
    let number = input.as_raw_fd();
    let written = confined(vec![number], move |_| {
        // SAFETY: a constant of that length.
        unsafe { libc::write(number, b"x".as_ptr().cast(), 1) }
    });
    assert_eq!(written, 1);
    drop((input, output));
}
