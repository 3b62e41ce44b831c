//! A file server behind its filter: each thing it is asked for, once, by system calls that are on its list.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::ptr::NonNull;

use kiln_vmm_fs::{Options, Outcome, Prepared, Server, Span, View};

use super::*;

const HALF: usize = 1 << 16;

struct Session {
    server: Server,
    view: View,
    memory: NonNull<u8>,
}

/// Numbers of 32 bits, one after the other. One of 64 is two.
fn raw(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn with(numbers: &[u32], more: &[u8]) -> Vec<u8> {
    [&raw(numbers), more].concat()
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

impl Session {
    fn new(server: Server) -> Self {
        let memory = Box::leak(vec![0u8; 2 * HALF].into_boxed_slice());
        let memory = NonNull::from(memory).cast::<u8>();
        // SAFETY: it is leaked, and accessed only by copying, below.
        let view = unsafe { View::new(&[(memory, 2 * HALF)]) }.unwrap();
        Session {
            server,
            view,
            memory,
        }
    }

    /// Asks for something that must succeed, if not for one of these errors.
    fn ask(&mut self, opcode: u32, node: u32, user: u32, body: &[u8], errors: &[i32]) -> Vec<u8> {
        let len = 40 + body.len() as u32;
        let header = raw(&[len, opcode, 8, 0, node, 0, user, user, 1, 0]);
        let request = [&header, body].concat();
        let start = self.memory.as_ptr() as usize;
        let answer = start + HALF;
        let part = |addr, len| [Span { addr, len }];
        // SAFETY: the memory is larger, and nobody else uses it now.
        let (outcome, told) = unsafe {
            std::ptr::copy_nonoverlapping(request.as_ptr(), self.memory.as_ptr(), request.len());
            let (from, to) = (part(start, len), part(answer, HALF as u32));
            let outcome = self.server.handle(&self.view, 0, &from, &to).unwrap();
            let len = match outcome {
                Outcome::Done(len) => len,
                Outcome::Later => 0,
            };
            (
                outcome,
                std::slice::from_raw_parts(answer as *const u8, len).to_vec(),
            )
        };
        assert_ne!(outcome, Outcome::Later);
        if told.is_empty() {
            return told;
        }
        let error = -(number(&told, 4) as i32);
        assert!(
            error == 0 || errors.contains(&error),
            "{opcode}: error {error}"
        );
        told[16..].to_vec()
    }
}

fn serve_all(session: &mut Session) {
    const SOMEBODY: u32 = 1000;
    let mut ask = |opcode, node, body: &[u8]| session.ask(opcode, node, 0, body, &[]);
    ask(26, 0, &raw(&[7, 45, 0, u32::MAX, u32::MAX]));
    let file = number(&ask(1, 1, b"inside\0"), 0);
    let open = number(&ask(14, file, &raw(&[2, 0])), 0);
    let lock = |kind: u32, flags: u32| raw(&[open, 0, 5, 0, 0, 0, 9, 0, kind, 0, flags, 0]);
    // Written where it says, at the end, and by somebody who may not keep the bits that set ids.
    for (how, flags) in [(0, 0), (0, 0o2000), (4, 0)] {
        ask(
            16,
            file,
            &with(&[open, 0, 0, 0, 1, how, 0, 0, flags, 0], b"x"),
        );
    }
    ask(15, file, &raw(&[open, 0, 0, 0, 9, 0, 0, 0, 0, 0]));
    for flags in [0, 1] {
        ask(32, file, &lock(1, flags));
        ask(32, file, &lock(0, flags));
        ask(32, file, &lock(2, flags));
    }
    ask(31, file, &lock(1, 0));
    ask(25, file, &raw(&[open, 0, 0, 0, 5, 0]));
    ask(20, file, &raw(&[open, 0, 0, 0]));
    ask(20, file, &raw(&[open, 0, 1, 0]));
    ask(43, file, &raw(&[open, 0, 0, 0, 4096, 0, 0, 0]));
    ask(46, file, &raw(&[open, 0, 0, 0, 4, 0]));
    ask(3, file, &raw(&[0, 0, 0, 0]));
    ask(52, file, &raw(&[1, 0, open, 0, 0, 0]));
    let mut set = vec![0; 22];
    // Size, owner, mode and times; and the size by somebody who may not keep bits.
    (set[0], set[17], set[19], set[20]) = (0b111111, 0o4755, 7, 7);
    ask(4, file, &raw(&set));
    set[0] = 1 << 3 | 1 << 11;
    ask(4, file, &raw(&set));
    ask(17, file, &[]);
    ask(34, file, &raw(&[4, 0]));
    let copied = [open, 0, 0, 0, file, 0, open, 0, 4096, 0, 1, 0, 0, 0];
    ask(47, file, &raw(&copied));
    let folder = number(&ask(27, 1, &raw(&[0, 0])), 0);
    for opcode in [28, 44] {
        ask(opcode, 1, &raw(&[folder, 0, 0, 0, 4096, 0, 0, 0, 0, 0]));
    }
    ask(30, 1, &raw(&[folder, 0, 0, 0]));
    ask(29, 1, &raw(&[folder, 0, 0, 0, 0, 0]));
    ask(50, 1, &raw(&[0, 0]));
    let mut ask = |opcode, node, body: &[u8], errors: &[i32]| {
        session.ask(opcode, node, SOMEBODY, body, errors)
    };
    let unknown = &[libc::EOPNOTSUPP, libc::ENODATA];
    // A program's capability, by the second version; one that a user made up; a list of who may access.
    let capability = raw(&[0x0200_0001, 0x400, 0, 0, 0]);
    for (name, value) in [
        (&b"security.capability\0"[..], &capability[..]),
        (b"user.x\0", b"v"),
    ] {
        let body = [&raw(&[value.len() as u32, 0, 0, 0]), name, value].concat();
        ask(21, file, &body, unknown);
        ask(22, file, &with(&[100, 0], name), unknown);
        ask(23, file, &raw(&[1000, 0]), unknown);
        ask(24, file, name, unknown);
    }
    ask(
        22,
        file,
        &with(&[100, 0], b"system.posix_acl_access\0"),
        unknown,
    );
    let made = ask(35, 1, &with(&[2, 0o600, 0o22, 0], b"made\0"), &[]);
    let (node, handle) = (number(&made, 0), number(&made, 128));
    ask(18, node, &raw(&[handle, 0, 0, 0, 0, 0]), &[]);
    ask(8, 1, &with(&[0o10600, 0, 0, 0], b"pipe\0"), &[]);
    ask(9, 1, &with(&[0o700, 0], b"folder\0"), &[]);
    let link = number(&ask(6, 1, b"link\0to\0", &[]), 0);
    ask(5, link, &[], &[]);
    ask(13, 1, &with(&[node, 0], b"again\0"), &[]);
    ask(45, 1, &with(&[1, 0, 2, 0], b"again\0link\0"), &[]);
    ask(45, 1, &with(&[1, 0, 0, 0], b"pipe\0moved\0"), &[]);
    ask(12, 1, &with(&[1, 0], b"moved\0pipe\0"), &[]);
    let hidden = ask(51, 1, &with(&[2, 0o600, 0, 0], b"/\0"), unknown);
    if !hidden.is_empty() {
        ask(13, 1, &with(&[number(&hidden, 0), 0], b"shown\0"), &[]);
    }
    ask(10, 1, b"made\0", &[]);
    ask(11, 1, b"folder\0", &[]);
    ask(18, file, &raw(&[open, 0, 0, 0, 0, 0]), &[]);
    ask(2, file, &raw(&[1, 0]), &[]);
    ask(38, 0, &[], &[]);
    // Those who wait try again.
    assert!(session.server.finished(&session.view).is_empty());
}

#[test]
fn the_file_server_needs_nothing_that_is_not_on_its_list() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("inside"), b"x").unwrap();
    let mode = std::fs::Permissions::from_mode(0o6755);
    std::fs::set_permissions(dir.path().join("inside"), mode).unwrap();
    // For somebody else, too: rights that were given up come back when the thread acts for another.
    let folder = File::open(dir.path()).unwrap();
    let prepare = || {
        let prepared = Prepared::new(&Options::default()).unwrap();
        // Standard error tells what was refused.
        prepared
            .enter(folder.into(), &[libc::STDERR_FILENO])
            .unwrap()
    };
    let (code, said) = attempt_after(Kind::Files, prepare, |(server, left)| {
        serve_all(&mut Session::new(server));
        // Its descriptors are those of another table.
        std::mem::forget(left);
    });
    assert_eq!(code, Some(0), "{said}");
    let mut names: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names.retain(|name| name != "shown");
    assert_eq!(names, ["again", "inside", "link", "pipe"]);
}
