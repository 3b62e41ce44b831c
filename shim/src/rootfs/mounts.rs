//! The kernel's table of mounts: what a directory is the root of.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const TABLE: &str = "/proc/self/mountinfo";

/// A mount, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mounted {
    id: u64,
    /// The device below it, major and minor; the major one is 0 where there is none.
    pub(super) device: (u32, u32),
    /// The directory of the file system that is mounted.
    pub(super) root: PathBuf,
    /// Where.
    target: PathBuf,
    /// The file system.
    pub(super) kind: OsString,
    /// What it was made of, as whoever mounted it wrote that.
    pub(super) source: PathBuf,
}

/// All mounts.
#[derive(Debug)]
pub(super) struct Mounts(Vec<Mounted>);

impl Mounts {
    /// Those that this process sees now.
    pub(super) fn read() -> io::Result<Self> {
        Ok(Self::parse(&fs::read(TABLE)?))
    }

    /// Those that were read before, or are now: a node has thousands.
    pub(super) fn once(known: &mut Option<Self>) -> io::Result<&Self> {
        let mounts = match known.take() {
            Some(mounts) => mounts,
            None => Self::read()?,
        };
        Ok(known.insert(mounts))
    }

    /// Whether anything is mounted below a directory.
    pub(super) fn any_below(&self, dir: &Path) -> bool {
        let below = |mount: &Mounted| mount.target.starts_with(dir) && mount.target != dir;
        self.0.iter().any(below)
    }

    /// What of the directory `top` a directory is, which may be bound somewhere else.
    pub(super) fn part(&self, top: &Path, dir: &Path) -> Option<PathBuf> {
        let (top, dir) = (self.place(top)?, self.place(dir)?);
        let part = dir.1.strip_prefix(&top.1).ok()?;
        (top.0 == dir.0).then(|| part.to_owned())
    }

    /// The device of a directory's file system, and where in it that is.
    fn place(&self, dir: &Path) -> Option<((u32, u32), PathBuf)> {
        // The last one lies on top of those before it.
        let on = |dir: &Path| self.0.iter().rfind(|mount| mount.target == dir);
        let (mount, below) = dir
            .ancestors()
            .find_map(|above| Some((on(above)?, dir.strip_prefix(above).ok()?)))?;
        // Joined with nothing, a path ends with a slash.
        Some((mount.device, mount.root.join(below).components().collect()))
    }

    pub(super) fn parse(table: &[u8]) -> Self {
        Self(
            table
                .split(|&byte| byte == b'\n')
                .filter_map(line)
                .collect(),
        )
    }

    /// The mount that a directory is the root of.
    pub(super) fn at(&self, dir: &Path) -> io::Result<Option<&Mounted>> {
        // Mounts can lie on top of each other. The kernel tells which one a path leads to.
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(dir)?;
        let number = opened.as_raw_fd();
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
        let id = info
            .lines()
            .find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
        let path = fs::read_link(format!("/proc/self/fd/{number}"))?;
        let is_it = |mount: &&Mounted| Some(mount.id) == id && mount.target == path;
        Ok(self.0.iter().find(is_it))
    }
}

/// `ID PARENT MAJOR:MINOR ROOT TARGET OPTIONS [FIELD...] - KIND SOURCE OPTIONS`
fn line(line: &[u8]) -> Option<Mounted> {
    let mut words = line.split(|&byte| byte == b' ');
    let id = number(words.next()?)?;
    let mut device = words.nth(1)?.splitn(2, |&byte| byte == b':');
    let device = (number(device.next()?)?, number(device.next()?)?);
    let (root, target) = (path(words.next()?), path(words.next()?));
    let mut words = words.skip_while(|word| *word != b"-").skip(1);
    Some(Mounted {
        id,
        device,
        root,
        target,
        kind: OsString::from_vec(unescape(words.next()?)),
        source: path(words.next()?),
    })
}

fn number<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn path(word: &[u8]) -> PathBuf {
    OsString::from_vec(unescape(word)).into()
}

/// The kernel writes what would break the table up as a backslash with three octal digits.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&byte, after)) = rest.split_first() {
        let code = after
            .get(..3)
            .filter(|_| byte == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(code) => {
                plain.push(code);
                rest = &after[3..];
            }
            None => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_is_found_below_a_directory_and_where_it_is_bound() {
        const TOP: &str = "/pods/u/volumes/kubernetes.io~empty-dir";
        const PARTS: &str = "/pods/u/volume-subpaths";
        let table = Mounts::parse(
            format!(
                "20 1 8:1 /@ / rw - ext4 /dev/sda1 rw\n\
                 36 35 0:54 / {TOP}/memory rw - tmpfs tmpfs rw\n\
                 37 35 0:54 /a/b {PARTS}/memory/main/0 rw - tmpfs tmpfs rw\n\
                 38 35 8:1 /@{TOP}/disk/c {PARTS}/disk/main/0 rw - ext4 /dev/sda1 rw\n\
                 39 35 0:55 / {TOP}/disk/other rw - tmpfs tmpfs rw\n"
            )
            .as_bytes(),
        );
        let part = |top: &str, dir: String| {
            table.part(Path::new(&format!("{TOP}/{top}")), Path::new(&dir))
        };
        assert_eq!(part("memory", format!("{TOP}/memory")), Some("".into()));
        assert_eq!(part("memory", format!("{TOP}/memory/c")), Some("c".into()));
        assert_eq!(
            part("memory", format!("{PARTS}/memory/main/0")),
            Some("a/b".into())
        );
        assert_eq!(part("memory", format!("{PARTS}/memory/main/1")), None);
        assert_eq!(
            part("disk", format!("{PARTS}/disk/main/0/d")),
            Some("c/d".into())
        );
        assert_eq!(part("disk", format!("{TOP}/disk/other/x")), None);
    }

    #[test]
    fn lines_with_and_without_optional_fields_and_with_escapes_are_read() {
        let table = b"\
            36 35 7:3 / /mnt/a\\040b ro,relatime shared:1 master:2 - erofs /dev/loop3 ro\n\
            41 35 0:54 /sub /mnt/c ro - erofs /srv/x\\134y\\011z/layer.erofs ro,user_xattr\n\
            not a mount\n";
        let Mounts(mounts) = Mounts::parse(table);
        assert_eq!(
            mounts,
            [
                Mounted {
                    id: 36,
                    device: (7, 3),
                    root: "/".into(),
                    target: "/mnt/a b".into(),
                    kind: "erofs".into(),
                    source: "/dev/loop3".into(),
                },
                Mounted {
                    id: 41,
                    device: (0, 54),
                    root: "/sub".into(),
                    target: "/mnt/c".into(),
                    kind: "erofs".into(),
                    source: "/srv/x\\y\tz/layer.erofs".into(),
                },
            ]
        );
    }

    #[test]
    fn what_is_below_a_directory_is_found_by_whole_names() {
        let mounts = Mounts::parse(
            b"36 35 0:3 / /mnt/data rw - tmpfs t rw\n37 36 0:4 / /mnt/data/x rw - tmpfs t rw\n",
        );
        let below = |dir| mounts.any_below(Path::new(dir));
        assert!(below("/mnt") && below("/mnt/data"));
        assert!(!below("/mnt/dat") && !below("/mnt/data/x"));
    }

    #[test]
    fn what_is_no_escape_stays() {
        assert_eq!(unescape(b"a\\04"), b"a\\04");
        assert_eq!(unescape(b"\\9990\\"), b"\\9990\\");
        assert_eq!(unescape(b"\\777"), b"\\777", "more than a byte");
    }

    #[test]
    fn only_the_root_of_a_mount_is_one() {
        let mounts = Mounts::read().unwrap();
        let proc = mounts.at(Path::new("/proc")).unwrap().unwrap();
        assert_eq!((proc.kind.to_str(), proc.device.0), (Some("proc"), 0));
        assert_eq!(mounts.at(Path::new("/proc/self")).unwrap(), None);
        assert!(mounts.at(Path::new("/no/such/directory")).is_err());
    }
}
