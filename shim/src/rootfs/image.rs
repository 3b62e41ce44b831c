//! Finds out what containerd's mounts are made of, and turns directories into EROFS images.
//!
//! Images are kept by what they were made from: the layers' directories, by path, inode and change
//! time. A layer's directory never changes once containerd has committed it, so an image is made
//! once and used by every container of that image on the node.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim_protos::api::Mount;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

const MKFS: &str = "mkfs.erofs";

/// What a root file system is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// Directories, the topmost first.
    Directories(Vec<PathBuf>),
    /// A device or an image file with a file system in it.
    Image {
        /// It.
        path: PathBuf,
        /// The file system.
        kind: String,
        /// Whether it may be written.
        read_only: bool,
    },
}

/// Reads containerd's mounts. Without any, the bundle's own `rootfs` directory is the root.
pub(super) fn find(mounts: &[Mount], bundle: &Path) -> Result<Source> {
    let [mount] = mounts else {
        if mounts.is_empty() {
            return Ok(Source::Directories(vec![bundle.join("rootfs")]));
        }
        let kinds: Vec<_> = mounts.iter().map(|m| m.type_.as_str()).collect();
        return Err(Error::Unimplemented(format!(
            "a root file system of several mounts ({}) is not supported; use the overlayfs, \
             native, blockfile or devmapper snapshotter",
            kinds.join(", ")
        )));
    };
    let option = |name: &str| {
        mount
            .options
            .iter()
            .find_map(|o| o.strip_prefix(name)?.strip_prefix('='))
    };
    match mount.type_.as_str() {
        "overlay" => {
            let lower = option("lowerdir").unwrap_or_default();
            let mut directories: Vec<PathBuf> = split_lower(lower);
            // The upper directory is where a container's own writes would go; what is in it
            // already was put there by containerd and belongs to the root.
            if let Some(upper) = option("upperdir").map(PathBuf::from)
                && !is_empty(&upper)?
            {
                directories.insert(0, upper);
            }
            if directories.is_empty() {
                return Err(Error::InvalidArgument(
                    "containerd's overlay mount has no lowerdir".into(),
                ));
            }
            Ok(Source::Directories(directories))
        }
        "bind" => Ok(Source::Directories(vec![PathBuf::from(&mount.source)])),
        "ext4" | "xfs" | "btrfs" | "erofs" => Ok(Source::Image {
            path: PathBuf::from(&mount.source),
            kind: mount.type_.clone(),
            read_only: mount.type_ == "erofs" || mount.options.iter().any(|o| o == "ro"),
        }),
        other => Err(Error::Unimplemented(format!(
            "a root file system of type {other:?} is not supported; use the overlayfs, native, \
             blockfile or devmapper snapshotter"
        ))),
    }
}

/// Splits a `lowerdir`, in which a backslash escapes a colon.
fn split_lower(text: &str) -> Vec<PathBuf> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => parts
                .last_mut()
                .into_iter()
                .for_each(|p| p.extend(chars.next())),
            ':' => parts.push(String::new()),
            c => parts.last_mut().into_iter().for_each(|p| p.push(c)),
        }
    }
    parts
        .into_iter()
        .filter(|p| !p.is_empty())
        .map(PathBuf::from)
        .collect()
}

fn is_empty(dir: &Path) -> Result<bool> {
    let mut entries = fs::read_dir(dir).map_err(|e| {
        Error::failed(
            format!("look into the upper directory {}", dir.display()),
            e,
        )
    })?;
    Ok(entries.next().is_none())
}

/// The image of these directories, made now if the cache hasn't got it. Blocks.
pub(super) fn erofs(cache: &Path, directories: &[PathBuf]) -> Result<PathBuf> {
    let key = key(directories)?;
    let image = cache.join(format!("{key}.erofs"));
    if image.exists() {
        return Ok(image);
    }
    let io = |what: &str, e| Error::failed(format!("{what} {}", image.display()), e);
    fs::create_dir_all(cache).map_err(|e| io("make the cache's directory for", e))?;
    let lock = File::create(cache.join(format!("{key}.lock"))).map_err(|e| io("lock", e))?;
    let lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, e)| io("lock", io::Error::from(e)))?;
    if !image.exists() {
        // Under the lock the name is ours; what a killed predecessor left is overwritten.
        let partial = cache.join(format!("{key}.partial"));
        let made = match directories {
            [one] => mkfs(one, &partial),
            many => {
                let view = MergedView::mount(cache, &key, many)?;
                mkfs(&view.path, &partial)
            }
        };
        let placed = made.and_then(|()| {
            File::open(&partial)
                .and_then(|f| f.sync_all())
                .and_then(|()| fs::rename(&partial, &image))
                .map_err(|e| io("keep", e))
        });
        if let Err(error) = placed {
            // Best effort: the failure that counts is being reported.
            let _ = fs::remove_file(&partial);
            return Err(error);
        }
    }
    // Removed under the lock: whoever waits for it finds the image, whoever comes later makes a
    // new lock file.
    let _ = fs::remove_file(cache.join(format!("{key}.lock")));
    drop(lock);
    Ok(image)
}

fn key(directories: &[PathBuf]) -> Result<String> {
    let mut hash = Sha256::new();
    for dir in directories {
        let metadata = fs::metadata(dir)
            .map_err(|e| Error::failed(format!("look at the layer {}", dir.display()), e))?;
        hash.update(dir.as_os_str().as_encoded_bytes());
        hash.update(
            format!(
                "\0{}:{}:{}.{}\0",
                metadata.dev(),
                metadata.ino(),
                metadata.ctime(),
                metadata.ctime_nsec()
            )
            .as_bytes(),
        );
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

fn mkfs(from: &Path, to: &Path) -> Result<()> {
    let output = Command::new(MKFS)
        .arg("--quiet")
        .arg(to)
        .arg(from)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::FailedPrecondition(format!(
                "{MKFS} is not installed; install erofs-utils on the node"
            )),
            _ => Error::failed(format!("run {MKFS}"), e),
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::failed(
        format!("make an image of {}", from.display()),
        format!("{MKFS} ended with {}: {}", output.status, said.trim()),
    ))
}

/// The directories as one, mounted for as long as this lives.
struct MergedView {
    path: PathBuf,
}

impl MergedView {
    fn mount(cache: &Path, key: &str, directories: &[PathBuf]) -> Result<Self> {
        let path = cache.join(format!("{key}.view"));
        let failed = |e: io::Error| Error::failed("mount the container's layers", e);
        fs::create_dir_all(&path).map_err(failed)?;
        // A predecessor that was killed may have left its own.
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let lower: Vec<String> = directories
            .iter()
            .map(|d| {
                d.display()
                    .to_string()
                    .replace('\\', "\\\\")
                    .replace(':', "\\:")
            })
            .collect();
        let options = format!("lowerdir={}", lower.join(":"));
        mount(
            Some("overlay"),
            &path,
            Some("overlay"),
            MsFlags::MS_RDONLY,
            Some(options.as_str()),
        )
        .map_err(|e| failed(e.into()))?;
        Ok(Self { path })
    }
}

impl Drop for MergedView {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.path, MntFlags::MNT_DETACH) {
            tracing::warn!(path = %self.path.display(), %error, "a view of layers stays mounted");
        }
        let _ = fs::remove_dir(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(kind: &str, source: &str, options: &[&str]) -> Vec<Mount> {
        vec![Mount {
            type_: kind.into(),
            source: source.into(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            ..Default::default()
        }]
    }

    #[test]
    fn overlay_gives_its_layers_top_first() {
        let upper = tempfile::tempdir().unwrap();
        let option = format!("upperdir={}", upper.path().display());
        let mounts = mounts(
            "overlay",
            "overlay",
            &["workdir=/w", &option, "lowerdir=/b:/a\\:x"],
        );
        let found = find(&mounts, Path::new("/bundle")).unwrap();
        assert_eq!(found, Source::Directories(vec!["/b".into(), "/a:x".into()]));

        fs::write(upper.path().join("seeded"), "").unwrap();
        let Source::Directories(layers) = find(&mounts, Path::new("/bundle")).unwrap() else {
            panic!("not directories");
        };
        assert_eq!(layers[0], upper.path());
    }

    #[test]
    fn devices_and_images_are_used_as_they_are() {
        assert_eq!(
            find(&mounts("ext4", "/dev/mapper/snap-1", &[]), Path::new("/b")).unwrap(),
            Source::Image {
                path: "/dev/mapper/snap-1".into(),
                kind: "ext4".into(),
                read_only: false
            }
        );
    }

    #[test]
    fn without_mounts_the_bundle_has_the_root() {
        let found = find(&[], Path::new("/b")).unwrap();
        assert_eq!(found, Source::Directories(vec!["/b/rootfs".into()]));
    }

    #[test]
    fn unknown_kinds_are_unimplemented_and_say_what_to_use() {
        let error = find(&mounts("zfs", "pool", &[]), Path::new("/b")).unwrap_err();
        assert!(matches!(error, Error::Unimplemented(_)));
        assert!(error.to_string().contains("overlayfs"));
    }

    #[test]
    fn image_is_made_once_and_remade_when_a_layer_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (layer, cache) = (dir.path().join("layer"), dir.path().join("cache"));
        fs::create_dir(&layer).unwrap();
        fs::write(layer.join("hello"), "hello").unwrap();
        let image = erofs(&cache, std::slice::from_ref(&layer)).unwrap();
        // EROFS's magic number, 1024 bytes in.
        let bytes = fs::read(&image).unwrap();
        assert_eq!(bytes[1024..1028], 0xE0F5_E1E2_u32.to_le_bytes());
        let made = fs::metadata(&image).unwrap().ino();
        assert_eq!(erofs(&cache, std::slice::from_ref(&layer)).unwrap(), image);
        assert_eq!(fs::metadata(&image).unwrap().ino(), made);

        fs::write(layer.join("more"), "more").unwrap();
        assert_ne!(erofs(&cache, &[layer]).unwrap(), image);
        // Images, and nothing half-made.
        let names: Vec<_> = fs::read_dir(&cache)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert!(
            names
                .iter()
                .all(|n| n.to_string_lossy().ends_with(".erofs")),
            "{names:?}"
        );
    }
}
