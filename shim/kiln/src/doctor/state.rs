//! Is the configuration one, and is there a baked μVM to resume?

use kiln_node::config::{Config, DEFAULT_PATH};
use kiln_store::{Error, Store};

use super::{Check, System};

/// Is kiln's configuration one?
pub(super) fn configuration(system: &System) -> Check {
    const NAME: &str = "configuration";
    let path = system.at(DEFAULT_PATH);
    if !path.exists() {
        return Check::ok(NAME, format!("no {DEFAULT_PATH}: the defaults"));
    }
    match Config::load(Some(&path)) {
        Ok(_) => Check::ok(NAME, DEFAULT_PATH),
        Err(error) => Check::fail(
            NAME,
            format!("{:#}", anyhow::Error::from(error)),
            "mend the file: docs/shim.md lists what it may say",
        ),
    }
}

pub(super) fn store(system: &System) -> Check {
    const NAME: &str = "store";
    let bake = "bake one: `kiln bake`";
    let entries = match Store::open(system.at(&system.store)).and_then(|store| store.list()) {
        Ok(entries) => entries,
        Err(Error::NoStore(_)) => return Check::fail(NAME, "no μVM is baked yet", bake),
        Err(error) => {
            let source = std::error::Error::source(&error);
            let found = source.map_or(error.to_string(), |source| format!("{error}: {source}"));
            return Check::fail(NAME, found, "run as root, or see `kiln verify`");
        }
    };
    let good = entries
        .iter()
        .filter(|entry| entry.manifest.is_ok())
        .count();
    let bad = entries.len() - good;
    match (good, bad) {
        (0, 0) => Check::fail(NAME, "no μVM is baked yet", bake),
        (0, _) => Check::fail(
            NAME,
            format!("the manifest of every μVM ({bad}) is damaged"),
            "remove them (`kiln rm`) and bake again (`kiln bake`)",
        ),
        (_, 0) => Check::ok(NAME, format!("{good} μVMs in {}", system.store.display())),
        _ => Check::warn(
            NAME,
            format!("{good} μVMs, and {bad} with a damaged manifest"),
            "see `kiln list`, and remove the damaged ones (`kiln rm`)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::super::tests::Fixture;
    use super::*;
    use crate::store::tests::bake;

    #[test]
    fn configuration_that_cannot_be_used_is_named_with_its_key() {
        let fixture = Fixture::new();
        assert_eq!(configuration(&fixture.system).status, Status::Ok);
        fixture.file("etc/kiln/config.toml", "stroe = '/s'");
        let check = configuration(&fixture.system);
        assert_eq!(check.status, Status::Fail);
        assert!(check.found.contains("stroe"), "{check:?}");
        fixture.file("etc/kiln/config.toml", "store = '/s'");
        assert_eq!(configuration(&fixture.system).status, Status::Ok);
    }

    #[test]
    fn pods_need_one_undamaged_uvm() {
        let fixture = Fixture::new();
        assert!(store(&fixture.system).found.contains("no μVM"));
        let root = fixture.system.at(&fixture.system.store);
        std::fs::create_dir_all(root.parent().unwrap()).unwrap();
        let opened = Store::open_or_create(&root).unwrap();
        assert_eq!(store(&fixture.system).status, Status::Fail);
        let id = bake(&opened, "one");
        assert_eq!(store(&fixture.system).status, Status::Ok);
        std::fs::write(root.join("uvms").join("ab".repeat(32)), "junk").unwrap();
        assert_eq!(store(&fixture.system).status, Status::Warn);
        opened.remove(id).unwrap();
        assert!(store(&fixture.system).found.contains("damaged"));
    }
}
