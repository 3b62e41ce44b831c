use std::error::Error as _;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use serde_json::{Value, json};

use super::*;

/// What a layer's tar is made of.
enum Item<'a> {
    Dir(&'a str, u32),
    File(&'a str, &'a [u8], u32),
    Link(&'a str, &'a str),
    Hard(&'a str, &'a str),
    Fifo(&'a str),
}

fn layer(items: &[Item<'_>]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for item in items {
        let mut header = tar::Header::new_ustar();
        header.set_uid(rustix::process::geteuid().as_raw().into());
        header.set_gid(rustix::process::getegid().as_raw().into());
        header.set_mtime(1_000_000);
        header.set_mode(0o644);
        let (path, kind, content): (&str, _, &[u8]) = match item {
            Item::Dir(path, mode) => {
                header.set_mode(*mode);
                (path, tar::EntryType::Directory, b"")
            }
            Item::File(path, content, mode) => {
                header.set_mode(*mode);
                (path, tar::EntryType::Regular, content)
            }
            Item::Link(path, target) => {
                header.set_link_name(target).unwrap();
                (path, tar::EntryType::Symlink, b"")
            }
            Item::Hard(path, target) => {
                header.set_link_name(target).unwrap();
                (path, tar::EntryType::Link, b"")
            }
            Item::Fifo(path) => (path, tar::EntryType::Fifo, b""),
        };
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        // Not by `append_data`, which refuses the paths that an unfriendly layer has.
        let name = &mut header.as_mut_bytes()[..100];
        name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        tar.append(&header, content).unwrap();
    }
    tar.into_inner().unwrap()
}

fn digest(bytes: &[u8]) -> String {
    Hashing::new(bytes).finish().unwrap()
}

fn archive(files: &[(String, Vec<u8>)]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o444);
        tar.append_data(&mut header, name, bytes.as_slice())
            .unwrap();
    }
    file.write_all(&tar.into_inner().unwrap()).unwrap();
    file
}

fn config(layers: &[Vec<u8>]) -> Vec<u8> {
    let ids: Vec<String> = layers.iter().map(|layer| digest(layer)).collect();
    let config = json!({
        "architecture": "amd64",
        "config": {"Cmd": ["sh"], "User": "web", "Env": ["A=1"], "WorkingDir": "/srv"},
        "rootfs": {"type": "layers", "diff_ids": ids},
    });
    config.to_string().into_bytes()
}

/// As `docker save` writes it.
fn docker(layers: &[Vec<u8>]) -> tempfile::NamedTempFile {
    let names: Vec<String> = (0..layers.len())
        .map(|n| format!("{n}/layer.tar"))
        .collect();
    let manifest = json!([{"Config": "c.json", "RepoTags": ["x:1"], "Layers": names}]);
    let mut files = vec![
        (
            "manifest.json".to_owned(),
            manifest.to_string().into_bytes(),
        ),
        ("c.json".to_owned(), config(layers)),
    ];
    files.extend(names.into_iter().zip(layers.iter().cloned()));
    archive(&files)
}

/// The text of an error with those of its causes, as the command shows it. None says what another says.
fn chain(error: &Error) -> String {
    let mut texts = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        let said = texts.iter().find(|said| said.contains(&text));
        assert_eq!(said, None, "{text:?} is said twice");
        texts.push(text);
        cause = error.source();
    }
    texts.join(": ")
}

fn unpacked(layers: &[Vec<u8>]) -> Result<tempfile::TempDir, Error> {
    let file = docker(layers);
    let image = Image::open(file.path())?;
    let dir = tempfile::tempdir().unwrap();
    image.unpack(dir.path())?;
    Ok(dir)
}

#[test]
fn oci_archive_with_compressed_layers_and_other_platforms_is_read() {
    let plain = layer(&[Item::File("a", b"1", 0o600)]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let packed = [
        gzip.finish().unwrap(),
        zstd::encode_all(plain.as_slice(), 1).unwrap(),
    ];
    for packed in packed {
        let config = config(std::slice::from_ref(&plain));
        let manifest = json!({
            "config": {"digest": digest(&config)}, "layers": [{"digest": digest(&packed)}],
        });
        let manifest = manifest.to_string().into_bytes();
        let platforms = json!({"manifests": [
            {"digest": digest(&manifest), "platform": {"architecture": "amd64", "os": "linux"}},
            {"digest": digest(b"arm"), "platform": {"architecture": "arm64", "os": "linux"}},
        ]});
        let platforms = platforms.to_string().into_bytes();
        let index = json!({"manifests": [{
            "digest": digest(&platforms), "mediaType": "application/vnd.oci.image.index.v1+json",
        }]});
        let mut files = vec![("index.json".to_owned(), index.to_string().into_bytes())];
        for bytes in [config, manifest, platforms, packed] {
            files.push((
                format!("./blobs/{}", digest(&bytes).replace(':', "/")),
                bytes,
            ));
        }
        let file = archive(&files);
        let image = Image::open(file.path()).unwrap();
        assert_eq!(image.defaults().cmd, Some(vec!["sh".to_owned()]));
        assert_eq!(image.file("a").unwrap().as_deref(), Some("1"));
    }
}

#[test]
fn upper_layers_replace_and_hide_what_lower_ones_have() {
    let lower = layer(&[
        Item::Dir("dir", 0o700),
        Item::File("dir/old", b"old", 0o644),
        Item::File("dir/kept", b"kept", 0o4755),
        Item::Dir("opaque", 0o755),
        Item::Dir("opaque/sub", 0o755),
        Item::File("opaque/sub/gone", b"", 0o644),
        Item::Link("link", "dir"),
        Item::File("file", b"", 0o644),
        Item::Hard("hard", "dir/kept"),
        Item::Fifo("pipe"),
    ]);
    let upper = layer(&[
        Item::File("dir/.wh.old", b"", 0o644),
        Item::File("opaque/sub/new", b"new", 0o644),
        Item::File("opaque/.wh..wh..opq", b"", 0o644),
        Item::File("link/inside", b"x", 0o644),
        Item::Dir("file", 0o755),
        Item::File("dir/.wh.never", b"", 0o644),
    ]);
    let dir = unpacked(&[lower, upper]).unwrap();
    let at = |path: &str| dir.path().join(path);
    assert!(!at("dir/old").exists() && !at("dir/.wh.old").exists());
    // A directory that the upper layer doesn't name keeps what the lower one says of it.
    assert_eq!(fs::metadata(at("dir")).unwrap().mode() & 0o7777, 0o700);
    let kept = fs::metadata(at("dir/kept")).unwrap();
    assert_eq!((kept.mode() & 0o7777, kept.mtime()), (0o4755, 1_000_000));
    assert_eq!(kept.ino(), fs::metadata(at("hard")).unwrap().ino());
    assert!(!at("opaque/sub/gone").exists());
    assert_eq!(fs::read(at("opaque/sub/new")).unwrap(), b"new");
    // As in a stack of overlay mounts: a directory takes the link's place.
    assert!(fs::symlink_metadata(at("link")).unwrap().is_dir());
    assert!(!at("dir/inside").exists());
    assert!(at("file").is_dir());
    assert!(fs::metadata(at("pipe")).unwrap().file_type().is_fifo());
}

#[test]
fn nothing_is_written_outside_whatever_a_layer_says() {
    let outside = tempfile::tempdir().unwrap();
    let path = outside.path().to_str().unwrap();
    let through = layer(&[Item::Link("out", path), Item::File("out/file", b"x", 0o644)]);
    unpacked(&[through]).unwrap();
    let gone = layer(&[Item::Link("out", path), Item::File("out/.wh.x", b"", 0o644)]);
    unpacked(&[gone]).unwrap();
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    for climbing in ["../escaped", "a/../../escaped"] {
        let error = unpacked(&[layer(&[Item::File(climbing, b"x", 0o644)])]).unwrap_err();
        let text = chain(&error);
        assert!(
            text.contains(&format!("{climbing} leaves the image")),
            "{text}"
        );
    }
    // Links to what is not in the image, whether or not the host has it.
    for target in ["/etc/passwd", "gone"] {
        let hard = layer(&[Item::Dir("etc", 0o755), Item::Hard("here", target)]);
        let text = chain(&unpacked(&[hard]).unwrap_err());
        let target = target.trim_start_matches('/');
        let wanted =
            format!("0/layer.tar cannot be unpacked: here links to {target}, which is not");
        assert!(text.contains(&wanted), "{text}");
    }
    let climbing = layer(&[Item::Hard("here", "../passwd")]);
    let text = chain(&unpacked(&[climbing]).unwrap_err());
    assert!(text.contains("../passwd leaves the image"), "{text}");
}

#[test]
fn damaged_layer_is_named_and_nothing_is_kept() {
    let file = docker(&[layer(&[Item::File("a", &[7; 3000], 0o644)])]);
    let mut bytes = fs::read(file.path()).unwrap();
    let at = bytes.windows(9).position(|part| part == [7; 9]).unwrap();
    bytes[at + 5] = 8;
    fs::write(file.path(), bytes).unwrap();
    let store = tempfile::tempdir().unwrap();
    let error = Image::open(file.path()).unwrap().root(store.path());
    let text = chain(&error.unwrap_err());
    assert!(text.contains("0/layer.tar is damaged"), "{text}");
    assert!(text.contains("save the image again"), "{text}");
    assert_eq!(
        fs::read_dir(store.path().join("images")).unwrap().count(),
        0
    );
    assert_eq!(fs::read_dir(store.path().join("tmp")).unwrap().count(), 0);
}

#[test]
fn root_is_made_once() {
    let file = docker(&[layer(&[Item::File("a", b"1", 0o644)])]);
    let image = Image::open(file.path()).unwrap();
    let store = tempfile::tempdir().unwrap();
    assert!(image.root(store.path()).unwrap().made);
    let again = image.root(store.path()).unwrap();
    assert!(!again.made);
    let left = fs::read_dir(store.path().join("tmp")).unwrap().count();
    assert_eq!(left, 0, "what was unpacked is still there");
}

#[test]
fn archives_that_cannot_be_used_say_what_to_do() {
    let says = |file: &Path, wanted: &str| {
        let text = chain(&Image::open(file).unwrap_err());
        assert!(text.contains(wanted), "{text}");
    };
    let files = |files: &[(&str, &Value)]| {
        let files = files
            .iter()
            .map(|(name, content)| ((*name).to_owned(), content.to_string().into_bytes()));
        archive(&files.collect::<Vec<_>>())
    };
    let dir = tempfile::tempdir().unwrap();
    says(&dir.path().join("gone"), "cannot open the image");
    says(dir.path(), "is no image archive: give a file");
    says(
        archive(&[("x".to_owned(), b"y".to_vec())]).path(),
        "docker save",
    );
    let mut packed = tempfile::NamedTempFile::new().unwrap();
    packed.write_all(&[0x1f, 0x8b, 8, 0]).unwrap();
    says(packed.path(), "gunzip");
    let mut text = tempfile::NamedTempFile::new().unwrap();
    text.write_all(&[b'x'; 1024]).unwrap();
    says(
        text.path(),
        "is no tar archive, or it is cut off: save the image again",
    );

    let two = json!([
        {"Config": "c", "RepoTags": ["a:1"], "Layers": []},
        {"Config": "c", "RepoTags": ["b:1"], "Layers": []},
    ]);
    says(
        files(&[("manifest.json", &two)]).path(),
        "2 images (a:1, b:1)",
    );
    says(
        files(&[("manifest.json", &json!([]))]).path(),
        "holds no image",
    );
    let odd = json!({});
    says(
        files(&[("manifest.json", &odd)]).path(),
        "manifest.json in /",
    );
    says(files(&[("manifest.json", &odd)]).path(), "is damaged: save");
    says(files(&[("index.json", &json!([1]))]).path(), "index in /");
    says(
        files(&[("index.json", &odd)]).path(),
        "no image for linux/amd64",
    );

    let docker = json!([{"Config": "c", "Layers": ["l"]}]);
    says(
        files(&[("manifest.json", &docker)]).path(),
        "has no c: save",
    );
    let with = |config: Value| files(&[("manifest.json", &docker), ("c", &config)]);
    says(with(json!({})).path(), "the image's configuration in /");
    let other = json!({"architecture": "arm64", "rootfs": {"diff_ids": []}});
    says(with(other).path(), "is for arm64, this machine is amd64");
    let fewer = json!({"architecture": "amd64", "rootfs": {"diff_ids": []}});
    says(
        with(fewer).path(),
        "names 0 layers but holds 1: save it again",
    );
}

#[test]
fn index_that_names_itself_is_refused() {
    let own = "sha256:1";
    let index = json!({"manifests": [{
        "digest": own, "mediaType": "application/vnd.oci.image.index.v1+json",
    }]});
    let index = index.to_string().into_bytes();
    let file = archive(&[
        ("index.json".to_owned(), index.clone()),
        ("blobs/sha256/1".to_owned(), index),
    ]);
    let error = Image::open(file.path()).unwrap_err();
    assert!(matches!(error, Error::DeepIndex(_)), "{error}");
}

#[test]
fn layer_that_cannot_be_read_is_named_with_the_cause() {
    let plain = layer(&[Item::File("a", b"1", 0o644)]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).unwrap();
    let gzip = gzip.finish().unwrap();
    for cut in [12, gzip.len() - 4] {
        let file = docker(&[gzip[..cut].to_vec()]);
        let image = Image::open(file.path()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let error = image.unpack(dir.path()).unwrap_err();
        let text = chain(&error);
        assert!(
            text.contains("cannot read layer 0/layer.tar; save"),
            "{text}"
        );
        let cause = error.source().unwrap().downcast_ref::<io::Error>();
        let kind = cause.map(io::Error::kind);
        assert_eq!(kind, Some(io::ErrorKind::UnexpectedEof), "{text}");
    }
    let binary = layer(&[Item::File("etc/passwd", &[0xff; 9], 0o644)]);
    let file = docker(&[binary]);
    let error = Image::open(file.path()).unwrap().user("web").unwrap_err();
    let text = chain(&error);
    assert!(text.contains("etc/passwd of layer 0/layer.tar"), "{text}");
}

#[test]
fn entry_that_the_system_refuses_is_named_with_the_cause() {
    // No file system takes a link with as long a name as this.
    let long = "x".repeat(300);
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mode(0o777);
    header.set_mtime(0);
    tar.append_link(&mut header, &long, "to").unwrap();
    let error = unpacked(&[tar.into_inner().unwrap()]).unwrap_err();
    let text = chain(&error);
    assert!(
        text.contains(&format!(
            "0/layer.tar cannot be unpacked: cannot make {long}"
        )),
        "{text}"
    );
    let cause = error.source().unwrap().downcast_ref::<io::Error>();
    assert_eq!(
        cause.map(io::Error::kind),
        Some(io::ErrorKind::InvalidFilename),
        "{text}"
    );
}

#[test]
fn users_are_found_by_name_and_number() {
    let passwd = b"root:x:0:0::/:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n";
    let group = b"root:x:0:\nstaff:x:50:web\n";
    let file = docker(&[layer(&[
        Item::File("./etc/passwd", passwd, 0o644),
        Item::File("etc/group", group, 0o644),
    ])]);
    let image = Image::open(file.path()).unwrap();
    let found = |text: &str| image.user(text).unwrap();
    assert_eq!(found(""), (0, 0));
    assert_eq!(found("web"), (33, 34));
    assert_eq!(found("33"), (33, 34));
    assert_eq!(found("web:staff"), (33, 50));
    assert_eq!(found("1000"), (1000, 0));
    assert_eq!(found("5:6"), (5, 6));
    let text = chain(&image.user("nobody").unwrap_err());
    assert!(
        text.contains("no user \"nobody\": give a number (-u UID)"),
        "{text}"
    );
    let text = chain(&image.user("web:nogroup").unwrap_err());
    assert!(
        text.contains("no group \"nogroup\": give a number"),
        "{text}"
    );
}
