//! Finds out what containerd's mounts are made of, and has directories turned into EROFS images.

use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;
use kiln_agent_api::users::{IdMap, IdRange};
use kiln_cache::{Lowers, OverlayMount, image_for};
use kiln_store::{Image, ImageKey, Images};

use super::layers::{self, Layer};
use crate::error::{Error, Result};
use kiln_node::config::Config;
use kiln_uvm::random;

/// What a root file system is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// Directories to make an image of.
    Directories(Directories),
    /// Layers that are images already.
    Layers {
        /// They, the topmost first.
        layers: Vec<Layer>,
        /// The directories that they are mounted on, for when there are too many of them.
        directories: Directories,
        /// Whether the attributes of overlayfs are in `user.overlay.`.
        user_xattrs: bool,
    },
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

/// Directories, and how long they stay as they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Directories {
    lowers: Lowers,
    lasting: Lasting,
}

/// What tells whether directories are the same as others.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Lasting {
    /// They themselves: layers that don't change any more.
    Committed,
    /// The images that are mounted there, and where their attributes are; the mounts come and go.
    Mounts(Vec<Layer>, bool),
    /// Nothing: they may differ the next time they are looked at.
    Fleeting,
}

impl Directories {
    fn committed(lowers: Lowers) -> Source {
        let lasting = Lasting::Committed;
        Source::Directories(Self { lowers, lasting })
    }

    fn fleeting(lowers: Lowers) -> Source {
        let lasting = Lasting::Fleeting;
        Source::Directories(Self { lowers, lasting })
    }
}

/// Reads containerd's mounts. Without any, the bundle's own `rootfs` directory is the root.
pub(super) fn find(mounts: &[Mount], bundle: &Path) -> Result<Source> {
    let [mount] = mounts else {
        if mounts.is_empty() {
            let own = Lowers::plain(bundle.join("rootfs"));
            return Ok(Directories::fleeting(own));
        }
        let kinds: Vec<_> = mounts.iter().map(|m| m.type_.as_str()).collect();
        return Err(Error::Unimplemented(format!(
            "a root file system of several mounts ({}) is not supported; use the overlayfs, \
             native, erofs, blockfile or devmapper snapshotter",
            kinds.join(", ")
        )));
    };
    let read_only = mount.options.iter().any(|o| o == "ro");
    match mount.type_.as_str() {
        "overlay" => overlay(mount),
        "bind" => {
            let lowers = Lowers::plain(PathBuf::from(&mount.source));
            Ok(if read_only {
                Directories::committed(lowers)
            } else {
                Directories::fleeting(lowers)
            })
        }
        "erofs" if mount.options.iter().any(|o| o.starts_with("device=")) => {
            Err(Error::Unimplemented(format!(
                "the image {} has content on other devices, which is not supported; turn that off \
                 in the erofs snapshotter, or use the overlayfs one",
                mount.source
            )))
        }
        "ext4" | "xfs" | "btrfs" | "erofs" => Ok(Source::Image {
            path: PathBuf::from(&mount.source),
            kind: mount.type_.clone(),
            read_only: read_only || mount.type_ == "erofs",
        }),
        other => Err(Error::Unimplemented(format!(
            "a root file system of type {other:?} is not supported; use the overlayfs, native, \
             erofs, blockfile or devmapper snapshotter"
        ))),
    }
}

/// Whose the files are that a snapshotter leaves as they are in the image, for a runtime that maps their owners itself.
pub(super) fn owners(mounts: &[Mount]) -> Result<Option<IdMap>> {
    let value = |name: &str| {
        let mut options = mounts.iter().flat_map(|mount| &mount.options);
        options.find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
    };
    let ranges = |text: Option<&str>| -> Option<Vec<IdRange>> {
        let range = |text: &str| {
            let mut numbers = text.split(':').map(|number| number.parse().ok());
            Some(IdRange {
                inside: numbers.next()??,
                outside: numbers.next()??,
                count: numbers.next()??,
            })
        };
        text?.split(',').map(range).collect()
    };
    let (users, groups) = (value("uidmap"), value("gidmap"));
    if users.is_none() && groups.is_none() {
        return Ok(None);
    }
    match (ranges(users), ranges(groups)) {
        (Some(users), Some(groups)) => Ok(Some(IdMap { users, groups })),
        _ => Err(Error::InvalidArgument(format!(
            "containerd's mount: uidmap={} and gidmap={} are no maps of ids",
            users.unwrap_or_default(),
            groups.unwrap_or_default()
        ))),
    }
}

fn overlay(mount: &Mount) -> Result<Source> {
    let parsed = OverlayMount::parse(&mount.options)
        .map_err(|e| Error::InvalidArgument(format!("containerd's mount: {e}")))?;
    let user_xattrs = mount.options.iter().any(|o| o == "userxattr");
    let remapped = mount.options.iter().any(|o| o.starts_with("uidmap="));
    // The upper directory is where a container's own writes would go; what is in it already was put
    // there by containerd and belongs to the root.
    let Some(upper) = parsed.upper.filter(|u| !is_empty(u)) else {
        return committed(parsed.lowers, user_xattrs);
    };
    if remapped {
        return Err(Error::Unimplemented(format!(
            "the upper directory {} is not empty and its owners are not those of the layers below: \
             give the pod hostUsers: true, or use another snapshotter",
            upper.display()
        )));
    }
    let layers = parsed.lowers.dirs().map(Path::to_owned);
    let layers = std::iter::once(upper).chain(layers).collect();
    Ok(Directories::fleeting(if user_xattrs {
        Lowers::overlay_with_user_xattrs(layers)
    } else {
        Lowers::overlay(layers)
    }))
}

fn committed(lowers: Lowers, user_xattrs: bool) -> Result<Source> {
    let dirs: Vec<_> = lowers.dirs().collect();
    let Some(layers) = layers::find(&dirs)? else {
        return Ok(Directories::committed(lowers));
    };
    let lasting = Lasting::Mounts(layers.clone(), user_xattrs);
    Ok(Source::Layers {
        layers,
        directories: Directories { lowers, lasting },
        user_xattrs,
    })
}

/// One that isn't there, or can't be read, has nothing to give.
fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).map_or(true, |mut entries| entries.next().is_none())
}

/// The image of directories, made now if the store hasn't got it. It stays for as long as its file is open
/// anywhere. Blocks.
pub(super) fn erofs(config: &Config, directories: &Directories) -> Result<Image> {
    let lowers = &directories.lowers;
    let key = match &directories.lasting {
        Lasting::Committed => lowers
            .key()
            .map_err(|e| Error::failed("look at the layers of the root file system", e))?,
        Lasting::Mounts(layers, user_xattrs) => {
            let mut parts = vec![vec![u8::from(*user_xattrs)]];
            for layer in layers {
                parts.push(layer.identity()?);
            }
            ImageKey::from_identity(parts)
        }
        Lasting::Fleeting => {
            // For this container only: nothing tells whether another one's directory has the same in it.
            let once: [u8; 16] = random::bytes()
                .map_err(|e| Error::failed("get random bytes from the kernel", e))?;
            ImageKey::from_identity([&b"once"[..], &once])
        }
    };
    let image = image_for(&Images::at(&config.store), &key, lowers)
        .map_err(|e| Error::failed("make an image of the root file system", e))?;
    tracing::debug!(image = %image.path.display(), made = image.made, "root file system image");
    Ok(image)
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
    fn the_owners_of_a_remapping_snapshotter_are_read_or_refused() {
        let overlay = |options: &[&str]| owners(&mounts("overlay", "overlay", options));
        assert_eq!(overlay(&["lowerdir=/a"]).unwrap(), None);
        let map = overlay(&["uidmap=0:65536:10,10:9:1", "gidmap=0:131072:10"]);
        let map = map.unwrap().unwrap();
        assert_eq!((map.user(10), map.group(9)), (Some(9), Some(131_081)));
        for wrong in [["uidmap=0:65536:10", "x"], ["uidmap=0:1:2", "gidmap=0:1"]] {
            let error = overlay(&wrong).unwrap_err().to_string();
            assert!(error.contains("uidmap=0:"), "{error}");
        }
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
        assert_eq!(found, Directories::committed(Lowers::overlay(layers)));

        fs::write(upper.path().join("seeded"), "").unwrap();
        let Source::Directories(found) = find(&mounts, Path::new("/bundle")).unwrap() else {
            panic!("these are directories");
        };
        // What is in the upper directory may change.
        assert_eq!(found.lasting, Lasting::Fleeting);
        assert_eq!(found.lowers.dirs().next(), Some(upper.path()));
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
    fn image_on_several_devices_is_refused() {
        let mounts = mounts("erofs", "/s/fsmeta.erofs", &["ro", "device=/s/1"]);
        let error = find(&mounts, Path::new("/b")).unwrap_err();
        assert!(matches!(error, Error::Unimplemented(_)));
        assert!(error.to_string().contains("/s/fsmeta.erofs"));
    }

    #[test]
    fn without_mounts_the_bundle_has_the_root() {
        let found = find(&[], Path::new("/b")).unwrap();
        let own = Lowers::plain("/b/rootfs".into());
        assert_eq!(found, Directories::fleeting(own));
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
            store: dir.path().join("store"),
            ..Config::default()
        };
        let directories = |lasting| Directories {
            lowers: Lowers::plain(layer.clone()),
            lasting,
        };
        let committed = directories(Lasting::Committed);
        let first = erofs(&config, &committed).unwrap();
        // EROFS's magic number, 1024 bytes in.
        let bytes = fs::read(&first.path).unwrap();
        assert_eq!(bytes[1024..1028], 0xE0F5_E1E2_u32.to_le_bytes());
        let again = erofs(&config, &committed).unwrap();
        assert!(!again.made && again.path == first.path);
        let once = erofs(&config, &directories(Lasting::Fleeting)).unwrap();
        assert!(once.made && once.path != first.path);

        // Of what is mounted, the images count.
        let image = dir.path().join("layer.erofs");
        fs::copy(&first.path, &image).unwrap();
        let mounted = |user_xattrs| {
            let layers = vec![Layer::open(&image).unwrap()];
            erofs(&config, &directories(Lasting::Mounts(layers, user_xattrs))).unwrap()
        };
        let (made, again) = (mounted(false), mounted(false));
        assert!(made.made && !again.made && again.path == made.path);
        assert!(mounted(true).made);
        fs::copy(&once.path, &image).unwrap();
        assert!(mounted(false).made);
    }
}
