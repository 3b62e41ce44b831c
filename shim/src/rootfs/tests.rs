//! What the guest is told to mount.

use super::*;

fn disk(letter: char) -> GuestDisk {
    GuestDisk {
        slot: 8,
        path: format!("/dev/vd{letter}"),
        size: 4096,
    }
}

fn root(letters: &str, kind: &str, read_only: bool) -> Root {
    Root {
        disks: letters.chars().map(disk).collect(),
        kind: kind.into(),
        read_only,
        user_xattrs: false,
    }
}

#[test]
fn read_only_image_gets_a_writable_layer_on_the_scratch_disk() {
    let mounts = guest_mounts("c1", &root("c", "erofs", true), UserNamespace::None);
    let targets: Vec<_> = mounts.iter().map(|m| m.target.as_str()).collect();
    assert_eq!(
        targets,
        [
            "/run/kiln/storage/c1/lower-0",
            "/run/kiln/containers/c1/rootfs"
        ]
    );
    assert_eq!(
        (mounts[0].source.as_str(), mounts[0].min_size),
        ("/dev/vdc", 4096)
    );
    let options = [
        "lowerdir=/run/kiln/storage/c1/lower-0",
        "upperdir=/run/kiln/scratch/layers/c1/upper",
        "workdir=/run/kiln/scratch/layers/c1/work",
    ];
    assert_eq!(mounts[1].options, options);
    // The one that holds the others goes last.
    assert_eq!(mounts[1].make_directories[0], "/run/kiln/scratch/layers/c1");
}

#[test]
fn layers_are_stacked_as_they_come_the_topmost_first() {
    let root = Root {
        user_xattrs: true,
        ..root("dcb", "erofs", true)
    };
    let mounts = guest_mounts("c1", &root, UserNamespace::None);
    let lower = |number| format!("/run/kiln/storage/c1/lower-{number}");
    let below: Vec<_> = mounts[..3]
        .iter()
        .map(|m| (m.source.as_str(), m.target.clone(), m.options.join(",")))
        .collect();
    let ro = || "ro".to_owned();
    assert_eq!(
        below,
        [
            ("/dev/vdd", lower(0), ro()),
            ("/dev/vdc", lower(1), ro()),
            ("/dev/vdb", lower(2), ro()),
        ]
    );
    let stack = format!("lowerdir={}:{}:{}", lower(0), lower(1), lower(2));
    assert_eq!(mounts[3].options[0], stack);
    assert!(mounts[3].options.contains(&"userxattr".to_owned()));
}

#[test]
fn most_layers_fit_into_one_mounts_options() {
    // The kernel takes a page of them; ids are of 64 characters.
    let letters = "bcde";
    assert_eq!(letters.len(), usize::from(LAYER_SLOTS));
    let mounts = guest_mounts(
        &"i".repeat(76),
        &root(letters, "erofs", true),
        UserNamespace::None,
    );
    assert!(mounts.last().unwrap().options.join(",").len() < 4096);
}

#[test]
fn writable_image_is_the_root_itself() {
    let mounts = guest_mounts("c1", &root("b", "ext4", false), UserNamespace::None);
    assert_eq!(mounts.len(), 1);
    assert_eq!(mounts[0].target, "/run/kiln/containers/c1/rootfs");
}

#[test]
fn owners_in_an_image_are_mapped_only_if_they_are_the_containers_own() {
    let flags = |users| {
        let mounts = guest_mounts("c1", &root("cb", "erofs", true), users);
        let flags = |m: &proto::Mount| (m.idmapped, m.owned_by_user_namespace);
        mounts.iter().map(flags).collect::<Vec<_>>()
    };
    let (no, mapped, owned) = ((false, false), (true, false), (false, true));
    assert_eq!(flags(UserNamespace::None), [no, no, no]);
    assert_eq!(flags(UserNamespace::Outside), [no, no, owned]);
    assert_eq!(flags(UserNamespace::Inside), [mapped, mapped, owned]);
}
