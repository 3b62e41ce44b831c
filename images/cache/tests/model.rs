//! Random layers against a plain model of what they show together, read back from the image by an independent
//! reader. Needs no privileges: overlayfs' marks are written as `userxattr` mounts have them.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, FileTimes};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use erofs_rs::EroFS;
use erofs_rs::backend::SliceImage;
use kiln_cache::Lowers;
use kiln_cache::erofs::Plan;
use proptest::prelude::*;
use rustix::fs::XattrFlags;

type Name = Vec<u8>;
type Children = BTreeMap<Name, Node>;

#[derive(Debug, Clone)]
enum Node {
    File(Content),
    Symlink(Vec<u8>),
    Whiteout,
    Directory { opaque: bool, children: Children },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Content {
    len: usize,
    seed: u8,
    mode: u32,
    mtime: (u64, u32),
    xattr: Option<Vec<u8>>,
}

impl Content {
    fn bytes(&self) -> Vec<u8> {
        (0..self.len)
            .map(|i| (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0] ^ self.seed)
            .collect()
    }
}

/// What shows in the end: by path.
#[derive(Debug, PartialEq, Eq)]
enum Shown {
    File(Content, Vec<u8>),
    Symlink(Vec<u8>),
    Directory,
}

/// Few names, so that layers meet; some of them odd.
fn name() -> impl Strategy<Value = Name> {
    prop_oneof![
        8 => prop::sample::select(vec![b"a".to_vec(), b"b".to_vec(), b"c".to_vec(), b"d".to_vec()]),
        1 => prop::sample::select(vec![b"\xff\x80".to_vec(), b"!".to_vec(), b"...".to_vec(), vec![b'n'; 255]]),
        2 => prop::collection::vec(any::<u8>().prop_filter("no name has it", |b| *b != 0 && *b != b'/'), 1..40)
            .prop_filter("taken", |name| name != b"." && name != b".."),
    ]
}

fn content() -> impl Strategy<Value = Content> {
    let len = prop_oneof![
        Just(0),
        1..200usize,
        3900..4200usize,
        8000..9000usize,
        500_000..700_000usize
    ];
    let mode = prop::sample::select(vec![0o644, 0o755, 0o4755, 0o600]);
    let mtime = prop_oneof![Just((0, 0)), (0..4_000_000_000u64, 0..1_000_000_000u32)];
    let xattr = prop::option::weighted(0.3, prop::collection::vec(any::<u8>(), 0..600));
    (len, any::<u8>(), mode, mtime, xattr).prop_map(|(len, seed, mode, mtime, xattr)| Content {
        len,
        seed,
        mode,
        mtime,
        xattr,
    })
}

fn node() -> impl Strategy<Value = Node> {
    let leaf = prop_oneof![
        4 => content().prop_map(Node::File),
        1 => prop::collection::vec(b'a'..=b'z', 1..100).prop_map(Node::Symlink),
        2 => Just(Node::Whiteout),
    ];
    leaf.prop_recursive(4, 60, 8, |inner| {
        (
            prop::bool::weighted(0.2),
            prop::collection::btree_map(name(), inner, 0..8),
        )
            .prop_map(|(opaque, children)| Node::Directory { opaque, children })
    })
}

fn layers() -> impl Strategy<Value = Vec<Children>> {
    prop::collection::vec(prop::collection::btree_map(name(), node(), 0..8), 1..5)
}

fn mark(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn make(dir: &Path, children: &Children, opaque: bool) {
    fs::create_dir_all(dir).unwrap();
    // An opaque directory has no use for whiteouts, and the mark can say only one of the two.
    mark(dir, "user.overlay.opaque", if opaque { b"y" } else { b"x" });
    for (name, node) in children {
        let path = dir.join(OsStr::from_bytes(name));
        match node {
            Node::Directory { opaque, children } => make(&path, children, *opaque),
            Node::Symlink(target) => symlink(OsStr::from_bytes(target), &path).unwrap(),
            Node::Whiteout if opaque => {}
            Node::Whiteout => {
                fs::write(&path, b"").unwrap();
                mark(&path, "user.overlay.whiteout", b"");
            }
            Node::File(content) => {
                fs::write(&path, content.bytes()).unwrap();
                if let Some(value) = &content.xattr {
                    mark(&path, "user.test", value);
                }
                fs::set_permissions(&path, fs::Permissions::from_mode(content.mode)).unwrap();
                let mtime = UNIX_EPOCH + Duration::new(content.mtime.0, content.mtime.1);
                let file = File::open(&path).unwrap();
                file.set_times(FileTimes::new().set_modified(mtime))
                    .unwrap();
            }
        }
    }
}

/// What the layers show, by the words of overlayfs' documentation.
fn merge(layers: &[&Children], at: &[u8], shown: &mut BTreeMap<Vec<u8>, Shown>) {
    let names: std::collections::BTreeSet<&Name> =
        layers.iter().flat_map(|layer| layer.keys()).collect();
    for name in names {
        let path = [at, b"/", name].concat();
        let mut directories = Vec::new();
        for node in layers.iter().filter_map(|layer| layer.get(name)) {
            match node {
                Node::Directory { opaque, children } => {
                    directories.push(children);
                    if *opaque {
                        break;
                    }
                    continue;
                }
                _ if !directories.is_empty() => {}
                Node::File(content) => {
                    let bytes = content.bytes();
                    shown.insert(path.clone(), Shown::File(content.clone(), bytes));
                }
                Node::Symlink(target) => {
                    shown.insert(path.clone(), Shown::Symlink(target.clone()));
                }
                Node::Whiteout => {}
            }
            break;
        }
        if !directories.is_empty() {
            shown.insert(path.clone(), Shown::Directory);
            merge(&directories, &path, shown);
        }
    }
}

/// What the independent reader finds.
fn read(image: &[u8], expected: &BTreeMap<Vec<u8>, Shown>) -> BTreeMap<Vec<u8>, Shown> {
    let fs = EroFS::new(SliceImage::new(image)).unwrap();
    let mut shown = BTreeMap::new();
    for entry in fs.walk_dir("/").unwrap() {
        let entry = entry.unwrap();
        let name = entry.dir_entry.file_name();
        if name == b"." || name == b".." {
            continue;
        }
        let path = entry.dir_entry.path().as_bytes().to_vec();
        let inode = entry.inode;
        let found = if inode.is_dir() {
            Shown::Directory
        } else if inode.is_symlink() {
            Shown::Symlink(fs.read_link_inode(inode).unwrap().as_bytes().to_vec())
        } else {
            let (seconds, nanoseconds) = inode.modified_unix();
            let file = fs.open_inode_file(inode).unwrap();
            let mut bytes = vec![0; usize::try_from(file.size()).unwrap()];
            let mut at = 0;
            while at < bytes.len() {
                let read = file.read_at(&mut bytes[at..], at as u64).unwrap();
                assert!(read > 0, "the file ends before its size");
                at += read;
            }
            // The seed shows only in the bytes, which are compared as well.
            let seed = match expected.get(&path) {
                Some(Shown::File(content, _)) => content.seed,
                _ => 0,
            };
            let content = Content {
                len: bytes.len(),
                seed,
                mode: inode.permissions().mode() & 0o7777,
                mtime: (u64::try_from(seconds).unwrap(), nanoseconds),
                xattr: fs.xattrs_inode(inode).unwrap().remove(&b"user.test"[..]),
            };
            Shown::File(content, bytes)
        };
        shown.insert(path, found);
    }
    shown
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn an_image_shows_what_its_layers_show_together(layers in layers()) {
        let scratch = tempfile::tempdir().unwrap();
        let dirs: Vec<_> = (0..layers.len()).map(|n| scratch.path().join(n.to_string())).collect();
        for (dir, children) in dirs.iter().zip(&layers) {
            make(dir, children, false);
        }
        let mut expected = BTreeMap::new();
        merge(&layers.iter().collect::<Vec<_>>(), b"", &mut expected);

        let path = scratch.path().join("image.erofs");
        let out = OwnedFd::from(File::create(&path).unwrap());
        Plan::new(&Lowers::overlay_with_user_xattrs(dirs)).unwrap().write(&out).unwrap();
        let image = fs::read(&path).unwrap();
        let seen = read(&image, &expected);

        let names = |all: &BTreeMap<Vec<u8>, Shown>| all.keys().cloned().collect::<Vec<_>>();
        prop_assert_eq!(names(&expected), names(&seen));
        for (name, expected) in &expected {
            prop_assert!(expected == &seen[name], "{}", String::from_utf8_lossy(name));
        }
    }
}
