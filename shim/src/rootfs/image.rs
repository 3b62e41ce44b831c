//! Finds out what containerd's mounts are made of, and has directories turned into EROFS images.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;
use kiln_cache::{Cache, ImageKey, Lease, Lowers, OverlayMount};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::pod::random;

/// What a root file system is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// Layers that don't change any more.
    Committed(Lowers),
    /// Directories that may differ the next time they are looked at.
    Fleeting(Lowers),
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
            return Ok(Source::Fleeting(Lowers::plain(bundle.join("rootfs"))));
        }
        let kinds: Vec<_> = mounts.iter().map(|m| m.type_.as_str()).collect();
        return Err(Error::Unimplemented(format!(
            "a root file system of several mounts ({}) is not supported; use the overlayfs, \
             native, blockfile or devmapper snapshotter",
            kinds.join(", ")
        )));
    };
    let read_only = mount.options.iter().any(|o| o == "ro");
    match mount.type_.as_str() {
        "overlay" => overlay(mount),
        "bind" => {
            let lowers = Lowers::plain(PathBuf::from(&mount.source));
            Ok(if read_only {
                Source::Committed(lowers)
            } else {
                Source::Fleeting(lowers)
            })
        }
        "ext4" | "xfs" | "btrfs" | "erofs" => Ok(Source::Image {
            path: PathBuf::from(&mount.source),
            kind: mount.type_.clone(),
            read_only: read_only || mount.type_ == "erofs",
        }),
        other => Err(Error::Unimplemented(format!(
            "a root file system of type {other:?} is not supported; use the overlayfs, native, \
             blockfile or devmapper snapshotter"
        ))),
    }
}

fn overlay(mount: &Mount) -> Result<Source> {
    let parsed = OverlayMount::parse(&mount.options)
        .map_err(|e| Error::InvalidArgument(format!("containerd's mount: {e}")))?;
    // The upper directory is where a container's own writes would go; what is in it already was put
    // there by containerd and belongs to the root.
    let Some(upper) = parsed.upper.filter(|u| !is_empty(u)) else {
        return Ok(Source::Committed(parsed.lowers));
    };
    let layers = parsed.lowers.dirs().map(Path::to_owned);
    let layers = std::iter::once(upper).chain(layers).collect();
    Ok(Source::Fleeting(
        if mount.options.iter().any(|o| o == "userxattr") {
            Lowers::overlay_with_user_xattrs(layers)
        } else {
            Lowers::overlay(layers)
        },
    ))
}

/// One that isn't there, or can't be read, has nothing to give.
fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).map_or(true, |mut entries| entries.next().is_none())
}

/// The image of committed or fleeting layers, made now if the cache hasn't got it. The lease holds it
/// for as long as its file is open anywhere. Blocks.
pub(super) fn erofs(config: &Config, lowers: &Lowers, committed: bool) -> Result<Lease> {
    let cache = Cache::open(&config.rootfs_cache, config.rootfs_cache_size)
        .map_err(|e| Error::failed("open the cache of root file system images", e))?;
    let key = if committed {
        ImageKey::from_lowers(lowers)
            .map_err(|e| Error::failed("look at the layers of the root file system", e))?
    } else {
        // For this container only: nothing tells whether another one's directory has the same in it.
        let mut once = [0; 16];
        random(&mut once)?;
        ImageKey::from_identity([&b"once"[..], &once])
    };
    let lease = cache
        .image_for(&key, lowers)
        .map_err(|e| Error::failed("make an image of the root file system", e))?;
    tracing::debug!(image = %lease.path.display(), made = lease.made, "root file system image");
    Ok(lease)
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
        let layers = vec!["/b".into(), "/a:x".into()];
        assert_eq!(found, Source::Committed(Lowers::overlay(layers)));

        fs::write(upper.path().join("seeded"), "").unwrap();
        let Source::Fleeting(layers) = find(&mounts, Path::new("/bundle")).unwrap() else {
            panic!("what is in the upper directory may change");
        };
        assert_eq!(layers.dirs().next(), Some(upper.path()));
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
        assert_eq!(found, Source::Fleeting(Lowers::plain("/b/rootfs".into())));
    }

    #[test]
    fn unknown_kinds_are_unimplemented_and_say_what_to_use() {
        let error = find(&mounts("zfs", "pool", &[]), Path::new("/b")).unwrap_err();
        assert!(matches!(error, Error::Unimplemented(_)));
        assert!(error.to_string().contains("overlayfs"));
    }

    #[test]
    fn committed_layers_share_an_image_and_fleeting_ones_never_do() {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("layer");
        fs::create_dir(&layer).unwrap();
        fs::write(layer.join("hello"), "hello").unwrap();
        let config = Config {
            rootfs_cache: dir.path().join("cache"),
            ..Config::default()
        };
        let lowers = Lowers::plain(layer);
        let first = erofs(&config, &lowers, true).unwrap();
        // EROFS's magic number, 1024 bytes in.
        let bytes = fs::read(&first.path).unwrap();
        assert_eq!(bytes[1024..1028], 0xE0F5_E1E2_u32.to_le_bytes());
        let again = erofs(&config, &lowers, true).unwrap();
        assert!(!again.made && again.path == first.path);
        let once = erofs(&config, &lowers, false).unwrap();
        assert!(once.made && once.path != first.path);
    }
}
