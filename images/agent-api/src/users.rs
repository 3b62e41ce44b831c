//! User namespaces: which ids of a container are which outside of it, and a namespace that says so.
//!
//! Both sides have a use for one: the guest for containers to run in, the host for mounts whose files belong to whom
//! the container's ids say.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;

/// Ids that follow each other inside, and the ones that they are outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IdRange {
    /// The first one in the namespace.
    pub inside: u32,
    /// The first one outside.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// Whose ids are whose.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct IdMap {
    /// Users.
    pub users: Vec<IdRange>,
    /// Groups.
    pub groups: Vec<IdRange>,
}

impl IdMap {
    /// What a user of the namespace is outside, if it is anybody there.
    pub fn user(&self, inside: u32) -> Option<u32> {
        outside(&self.users, inside)
    }

    /// The same of a group.
    pub fn group(&self, inside: u32) -> Option<u32> {
        outside(&self.groups, inside)
    }

    /// Makes a user namespace with this map. It lasts as long as the descriptor, and nothing runs in it.
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        let holder = Holder::start()?;
        let proc = format!("/proc/{}", holder.0);
        fs::write(format!("{proc}/uid_map"), lines(&self.users))?;
        fs::write(format!("{proc}/gid_map"), lines(&self.groups))?;
        Ok(File::open(format!("{proc}/ns/user"))?.into())
    }
}

fn outside(ranges: &[IdRange], inside: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let distance = inside.checked_sub(range.inside)?;
        (distance < range.count).then(|| range.outside.checked_add(distance))?
    })
}

/// As the kernel reads it.
fn lines(ranges: &[IdRange]) -> String {
    let mut text = String::new();
    for range in ranges {
        // A string takes everything.
        let _ = writeln!(text, "{} {} {}", range.inside, range.outside, range.count);
    }
    text
}

/// A process in a namespace of its own that waits for its end, which comes when this is dropped: a namespace has to be
/// somebody's before it is a file.
#[derive(Debug)]
struct Holder(libc::pid_t);

impl Holder {
    fn start() -> io::Result<Self> {
        // SAFETY: takes nothing and can't fail.
        let parent = unsafe { libc::getpid() };
        // With no signal at its end, a child is nobody's who collects children without knowing them.
        let flags: libc::c_long = libc::CLONE_NEWUSER.into();
        // SAFETY: without CLONE_VM this is a fork; the child has no other thread, and calls nothing but what a signal
        // handler may.
        let made = unsafe { libc::syscall(libc::SYS_clone, flags, 0_u64, 0_u64, 0_u64, 0_u64) };
        match libc::pid_t::try_from(made) {
            Ok(0) => wait_for_the_end(parent),
            Ok(child) if child > 0 => Ok(Self(child)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // SAFETY: numbers only. The child has not been collected, so the number is its own; that it is gone already
        // leaves nothing to do.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            while libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL) < 0
                && *libc::__errno_location() == libc::EINTR
            {}
        }
    }
}

fn wait_for_the_end(parent: libc::pid_t) -> ! {
    // SAFETY: calls that take numbers, in a process of one thread.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::getppid() != parent {
            libc::_exit(1);
        }
        loop {
            libc::pause();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(inside: u32, outside: u32, count: u32) -> IdRange {
        IdRange {
            inside,
            outside,
            count,
        }
    }

    #[test]
    fn an_id_is_mapped_by_its_range_or_not_at_all() {
        let map = IdMap {
            users: vec![range(0, 65_536, 10), range(100, 200_000, 2)],
            groups: vec![range(5, u32::MAX - 1, 4)],
        };
        let users: Vec<_> = [0, 9, 10, 99, 101, 102]
            .into_iter()
            .map(|id| map.user(id))
            .collect();
        let expected = [Some(65_536), Some(65_545), None, None, Some(200_001), None];
        assert_eq!(users, expected);
        assert_eq!(map.group(4), None);
        assert_eq!(map.group(6), Some(u32::MAX));
        assert_eq!(map.group(7), None, "beyond the last id there is");
    }

    #[test]
    fn a_map_is_written_a_range_a_line() {
        let text = lines(&[range(0, 65_536, 10), range(10, 0, 1)]);
        assert_eq!(text, "0 65536 10\n10 0 1\n");
    }

    /// Without the right to make namespaces there is nothing to see.
    fn made<T>(result: io::Result<T>) -> Option<T> {
        match result {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                eprintln!("skipped: no user namespaces here (needs root)");
                None
            }
            result => Some(result.unwrap()),
        }
    }

    #[test]
    fn a_namespace_is_another_one_and_outlives_its_holder() {
        use std::os::fd::AsRawFd;

        let map = IdMap {
            users: vec![range(0, 65_536, 10)],
            groups: vec![range(0, 131_072, 10)],
        };
        let Some(namespace) = made(map.namespace()) else {
            return;
        };
        let name = |path: &str| fs::read_link(path).unwrap();
        let this = name(&format!("/proc/self/fd/{}", namespace.as_raw_fd()));
        assert!(this.to_string_lossy().starts_with("user:["), "{this:?}");
        assert_ne!(this, name("/proc/self/ns/user"));
    }

    #[test]
    fn a_holder_leaves_no_process() {
        let Some(holder) = made(Holder::start()) else {
            return;
        };
        let process = format!("/proc/{}", holder.0);
        assert!(fs::exists(&process).unwrap());
        drop(holder);
        assert!(!fs::exists(&process).unwrap());
    }
}
