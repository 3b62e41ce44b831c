use std::collections::BTreeMap;

use serde_json::Value;

use super::*;

fn base() -> Layer {
    root(b"busybox", &["sh".to_owned(), "nc".to_owned()])
}

fn all() -> Vec<Named> {
    let base = base();
    let mut images = pauses(b"testprog").unwrap();
    images.extend(plain(&base).unwrap());
    images.extend(servers(&base).unwrap());
    images.extend(users(&base).unwrap());
    images.push(nonewprivs(&base, b"testprog").unwrap());
    images
}

/// Digest of the manifest by name.
fn by_name() -> BTreeMap<String, String> {
    let mut all_names = BTreeMap::new();
    for Named { names, image } in all() {
        for name in names {
            let digest = image.manifest.descriptor.digest.clone();
            assert!(
                all_names.insert(name.clone(), digest).is_none(),
                "{name} twice"
            );
        }
    }
    all_names
}

#[test]
fn the_image_with_two_names_has_no_third() {
    let names = by_name();
    let two = &names["registry.k8s.io/pause:3.9"];
    let same: Vec<&String> = names
        .iter()
        .filter_map(|(name, digest)| (digest == two).then_some(name))
        .collect();
    assert_eq!(same, ["k8s.gcr.io/pause:3.9", "registry.k8s.io/pause:3.9"]);
}

#[test]
fn images_that_critest_tells_apart_differ_and_tags_of_one_do_not() {
    let names = by_name();
    let digest = |name: &str| names[&format!("{CRI_TOOLS}/test-image-{name}")].clone();
    let different: BTreeSet<String> = [
        "1:latest",
        "2:latest",
        "3:latest",
        "tag:test",
        "latest:latest",
    ]
    .map(digest)
    .into();
    assert_eq!(different.len(), 5);
    assert_eq!(digest("tags:1"), digest("tags:2"));
    assert_eq!(digest("tags:1"), digest("tags:3"));
}

#[test]
fn the_same_inputs_give_the_same_digests() {
    assert_eq!(by_name(), by_name());
}

#[test]
fn no_two_images_of_one_repository_have_the_same_tag() {
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    for (name, digest) in by_name() {
        let asked = name.split_once('/').unwrap().1.to_owned();
        let before = seen.insert(asked, digest.clone());
        assert!(before.is_none_or(|before| before == digest), "{name}");
    }
}

#[test]
fn the_program_that_shows_its_user_has_the_bits_that_set_it() {
    let image = nonewprivs(&base(), b"testprog").unwrap().image;
    let tar = flate2::read::GzDecoder::new(&image.layers[1].bytes[..]);
    let modes: Vec<(String, u32)> = tar::Archive::new(tar)
        .entries()
        .unwrap()
        .map(Result::unwrap)
        .map(|entry| {
            let path = entry.path().unwrap().display().to_string();
            (path, entry.header().mode().unwrap())
        })
        .collect();
    assert_eq!(
        modes.last().unwrap(),
        &("usr/local/bin/nonewprivs".to_owned(), 0o6755)
    );
    let config: Value = serde_json::from_slice(&image.config.bytes).unwrap();
    assert_eq!(config["config"]["Cmd"], serde_json::json!(["nonewprivs"]));
}

#[test]
fn a_source_that_is_missing_is_named_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    for name in ["testprog", "agnhost", "localhost.crt"] {
        std::fs::write(file(name), name).unwrap();
    }
    let sources = Sources {
        testprog: file("testprog"),
        agnhost: file("agnhost"),
        porter: folder.path().to_owned(),
    };
    let error = sources.read().map(drop).unwrap_err().to_string();
    assert!(error.contains("localhost.key: Go's module"), "{error}");
}
