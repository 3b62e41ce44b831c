//! The kernel as the judge: an image, mounted, shows what an overlay mount of the same layers shows.
//!
//! Needs root, loop devices, EROFS and overlayfs; says so and passes where they are missing.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_cache::Lowers;
use kiln_cache::erofs::Plan;
use rustix::fs::{CWD, FileType, Mode, XattrFlags};

/// What can be seen of one name.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    uid: u32,
    gid: u32,
    size: u64,
    mtime: (i64, i64),
    rdev: u64,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    content: Vec<u8>,
}

fn look(root: &Path) -> BTreeMap<Vec<u8>, Seen> {
    let mut all = BTreeMap::new();
    let mut queue = vec![root.to_owned()];
    while let Some(path) = queue.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        let content = if kind.is_file() {
            blake3::hash(&fs::read(&path).unwrap()).as_bytes().to_vec()
        } else if kind.is_symlink() {
            fs::read_link(&path)
                .unwrap()
                .as_os_str()
                .as_bytes()
                .to_vec()
        } else {
            Vec::new()
        };
        if kind.is_dir() {
            queue.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        let device = kind.is_char_device() || kind.is_block_device();
        let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes();
        let seen = Seen {
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            // A directory's length is its file system's own business.
            size: if kind.is_dir() { 0 } else { meta.size() },
            mtime: (meta.mtime(), meta.mtime_nsec()),
            rdev: if device { meta.rdev() } else { 0 },
            xattrs: xattrs(&path),
            content,
        };
        all.insert(name.to_vec(), seen);
    }
    all
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65536];
    let len = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    names[..len]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 65536];
            let len = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            value.truncate(len);
            (name.to_vec(), value)
        })
        .collect()
}

fn set(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn node(path: &Path, kind: FileType, device: u64) {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(0o640), device).unwrap();
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    ))
}

/// A mount that ends with its owner.
struct Mounted(PathBuf);

impl Mounted {
    fn new(arguments: &[&str], at: &Path) -> Result<Mounted, String> {
        fs::create_dir_all(at).unwrap();
        run("mount", &[arguments, &[at.to_str().unwrap()]].concat())?;
        Ok(Mounted(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = run("umount", &[self.0.to_str().unwrap()]);
    }
}

/// Whether this machine lets the tests mount; says why if not.
fn can_mount() -> bool {
    let scratch = tempfile::tempdir().unwrap();
    let lower = |name: &str| scratch.path().join(name);
    fs::create_dir(lower("a")).unwrap();
    fs::create_dir(lower("b")).unwrap();
    let both = format!("lowerdir={}:{}", lower("a").display(), lower("b").display());
    let tried = Mounted::new(
        &["-t", "overlay", "overlay", "-o", &both],
        &scratch.path().join("m"),
    );
    match tried {
        Ok(_) if Path::new("/dev/loop-control").exists() => true,
        Ok(_) => {
            println!("skipped: no loop devices");
            false
        }
        Err(e) => {
            println!("skipped: cannot mount: {e}");
            false
        }
    }
}

fn image(lowers: &Lowers, path: &Path) {
    let plan = Plan::new(lowers).unwrap();
    let written = plan
        .write(&OwnedFd::from(File::create(path).unwrap()))
        .unwrap();
    assert_eq!(written.size, fs::metadata(path).unwrap().len());
    assert_eq!(plan.xattrs_left_out(), 0);
}

fn assert_same(layers: &[PathBuf]) {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path();
    let file = at.join("image.erofs");
    image(&Lowers::overlay(layers.to_vec()), &file);
    if Command::new("fsck.erofs").arg("--help").output().is_ok() {
        run("fsck.erofs", &["--extract", file.to_str().unwrap()]).unwrap();
    }
    let lowerdir: Vec<_> = layers.iter().map(|l| l.to_str().unwrap()).collect();
    let options = format!("ro,redirect_dir=follow,lowerdir={}", lowerdir.join(":"));
    let overlay =
        Mounted::new(&["-t", "overlay", "overlay", "-o", &options], &at.join("o")).unwrap();
    let source = file.to_str().unwrap();
    let erofs = Mounted::new(&["-t", "erofs", "-o", "loop,ro", source], &at.join("e")).unwrap();
    let (expected, seen) = (look(&overlay.0), look(&erofs.0));
    let names = |all: &BTreeMap<Vec<u8>, Seen>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&expected), names(&seen));
    for (name, expected) in &expected {
        assert_eq!(expected, &seen[name], "{}", String::from_utf8_lossy(name));
    }
}

#[test]
fn every_kind_of_inode_survives() {
    if !can_mount() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let (top, low) = (scratch.path().join("top"), scratch.path().join("low"));
    fs::create_dir(&top).unwrap();
    fs::create_dir(&low).unwrap();
    node(&low.join("fifo"), FileType::Fifo, 0);
    node(&low.join("socket"), FileType::Socket, 0);
    node(
        &low.join("disk"),
        FileType::BlockDevice,
        rustix::fs::makedev(259, 70_000),
    );
    node(
        &low.join("tty"),
        FileType::CharacterDevice,
        rustix::fs::makedev(4, 64),
    );
    symlink("target", low.join("link")).unwrap();
    symlink("a".repeat(4050), low.join("long-link")).unwrap();
    fs::write(low.join("empty"), b"").unwrap();
    for size in [
        1, 4031, 4032, 4033, 4095, 4096, 4097, 8191, 70_000, 600_000, 9_000_001,
    ] {
        let content: Vec<u8> = (0..size)
            .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        fs::write(low.join(format!("file-{size}")), content).unwrap();
    }
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe \n!");
    fs::write(low.join(odd), b"odd").unwrap();
    fs::write(low.join("n".repeat(255)), b"long").unwrap();
    std::os::unix::fs::chown(low.join("file-1"), Some(100_000), Some(70_000)).unwrap();

    let mut sparse = File::create(low.join("sparse")).unwrap();
    sparse.seek(SeekFrom::Start(10 << 20)).unwrap();
    sparse.write_all(&[7; 250_000]).unwrap();
    sparse.set_len((50 << 20) + 77).unwrap();
    drop(sparse);

    // Version 2, cap_net_raw permitted and effective.
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let acl = [
        2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0, 255,
        255, 255, 255, 0x10, 0, 4, 0, 255, 255, 255, 255, 0x20, 0, 4, 0, 255, 255, 255, 255,
    ];
    for (index, file) in ["file-1", "file-4032", "file-4096", "file-600000"]
        .iter()
        .enumerate()
    {
        let path = low.join(file);
        set(&path, "security.capability", &capability);
        set(&path, "user.own", &[index as u8; 300]);
        set(&path, "trusted.shared", b"shared");
        set(&path, "system.posix_acl_access", &acl);
    }
    fs::create_dir(low.join("with-default-acl")).unwrap();
    set(
        &low.join("with-default-acl"),
        "system.posix_acl_default",
        &acl,
    );
    assert_same(&[top, low]);
}

#[test]
fn whiteouts_opaque_directories_and_redirects_mean_what_they_mean_to_overlayfs() {
    if !can_mount() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let layer = |n: usize| scratch.path().join(n.to_string());
    for dir in [
        "0/d/sub",
        "0/op",
        "0/was-file",
        "1/d",
        "1/op/x",
        "2/d/e/f",
        "2/op/y",
        "2/gone",
    ] {
        fs::create_dir_all(scratch.path().join(dir)).unwrap();
    }
    fs::write(layer(2).join("d/low"), b"low").unwrap();
    fs::write(layer(2).join("d/both"), b"low").unwrap();
    fs::write(layer(0).join("d/both"), b"top").unwrap();
    fs::write(layer(2).join("op/hidden"), b"hidden").unwrap();
    fs::write(layer(2).join("d/e/f/deep"), b"deep").unwrap();
    fs::write(layer(2).join("was-file"), b"file").unwrap();
    fs::write(layer(2).join("removed-dir"), b"").unwrap();
    node(&layer(1).join("d/e"), FileType::CharacterDevice, 0);
    node(&layer(0).join("gone"), FileType::CharacterDevice, 0);
    node(&layer(0).join("never-was"), FileType::CharacterDevice, 0);
    set(&layer(1).join("op"), "trusted.overlay.opaque", b"y");
    // An opaque root hides nothing.
    set(&layer(0), "trusted.overlay.opaque", b"y");
    set(&layer(0), "trusted.overlay.impure", b"y");

    // Renamed directories: beside where they were, and from somewhere else in the tree.
    for dir in [
        "0/renamed",
        "1/far",
        "1/d/moved",
        "2/origin/inner",
        "2/elsewhere/deep",
    ] {
        fs::create_dir_all(scratch.path().join(dir)).unwrap();
    }
    fs::write(layer(2).join("origin/inner/file"), b"renamed").unwrap();
    fs::write(layer(2).join("elsewhere/deep/file"), b"moved").unwrap();
    fs::write(layer(1).join("d/moved/own"), b"own").unwrap();
    node(&layer(0).join("origin"), FileType::CharacterDevice, 0);
    set(
        &layer(0).join("renamed"),
        "trusted.overlay.redirect",
        b"origin",
    );
    set(
        &layer(1).join("d/moved"),
        "trusted.overlay.redirect",
        b"/elsewhere/deep",
    );
    assert_same(&[layer(0), layer(1), layer(2)]);
}

#[test]
fn a_directory_of_twenty_thousand_names_can_be_listed_and_searched() {
    if !can_mount() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let (top, low) = (scratch.path().join("top"), scratch.path().join("low"));
    fs::create_dir(&top).unwrap();
    fs::create_dir_all(low.join("huge")).unwrap();
    for i in 0..20_000 {
        fs::write(low.join(format!("huge/{}-{i}", "x".repeat(i % 150))), b"").unwrap();
    }
    assert_same(&[top, low]);
}

#[test]
fn fsck_finds_nothing_however_full_the_last_block_is() {
    if Command::new("fsck.erofs").arg("--help").output().is_err() {
        println!("skipped: no fsck.erofs");
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let (tree, file) = (scratch.path().join("tree"), scratch.path().join("image"));
    fs::create_dir(&tree).unwrap();
    // Two blocks of inodes without a time of their own, or more of others.
    for i in 0..260 {
        File::create(tree.join(i.to_string())).unwrap();
        image(&Lowers::plain(tree.clone()), &file);
        run("fsck.erofs", &[file.to_str().unwrap()]).unwrap();
    }
}

#[test]
fn hard_links_stay_one_inode() {
    if !can_mount() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let tree = scratch.path().join("tree");
    fs::create_dir_all(tree.join("d")).unwrap();
    fs::write(tree.join("a"), b"one").unwrap();
    fs::hard_link(tree.join("a"), tree.join("b")).unwrap();
    fs::hard_link(tree.join("a"), tree.join("d/c")).unwrap();
    let file = scratch.path().join("image.erofs");
    image(&Lowers::plain(tree), &file);
    let source = file.to_str().unwrap();
    let erofs = Mounted::new(
        &["-t", "erofs", "-o", "loop,ro", source],
        &scratch.path().join("e"),
    )
    .unwrap();
    let inodes: Vec<_> = ["a", "b", "d/c"]
        .iter()
        .map(|name| fs::metadata(erofs.0.join(name)).unwrap())
        .map(|meta| (meta.ino(), meta.nlink()))
        .collect();
    assert_eq!(inodes, vec![(inodes[0].0, 3); 3]);
}

#[test]
fn the_same_tree_gives_the_same_image() {
    let scratch = tempfile::tempdir().unwrap();
    let tree = scratch.path().join("tree");
    fs::create_dir(&tree).unwrap();
    for i in 0..500 {
        fs::write(tree.join(i.to_string()), vec![i as u8; i * 37]).unwrap();
    }
    let (one, two) = (scratch.path().join("1"), scratch.path().join("2"));
    image(&Lowers::plain(tree.clone()), &one);
    image(&Lowers::plain(tree), &two);
    assert!(fs::read(one).unwrap() == fs::read(two).unwrap());
}
