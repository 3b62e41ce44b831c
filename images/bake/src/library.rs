//! The library of modules that a guest loads when something needs them: what of a kernel is for software. Drivers of devices
//! that no μVM has are left out.
//!
//! What modules need and are asked for by is in `depmod`'s lists, where it ran; else in the modules themselves, which takes
//! unpacking them all.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kiln_agent_api::modules::Entry;

use crate::elf;
use crate::modules::{self, ModuleError, Modules};

/// Folders of what is for software.
const TAKEN: [&str; 10] = [
    "kernel/arch/",
    "kernel/block/",
    "kernel/crypto/",
    "kernel/drivers/block/",
    "kernel/drivers/md/",
    "kernel/drivers/net/",
    "kernel/drivers/vhost/",
    "kernel/fs/",
    "kernel/lib/",
    "kernel/net/",
];
/// Folders in these that are for devices, or for a host of virtual machines.
const LEFT: [&str; 14] = [
    "kernel/arch/x86/kvm/",
    "kernel/arch/x86/events/",
    "kernel/drivers/block/mtip32xx/",
    "kernel/drivers/net/can/",
    "kernel/drivers/net/ethernet/",
    "kernel/drivers/net/fddi/",
    "kernel/drivers/net/hyperv/",
    "kernel/drivers/net/ieee802154/",
    "kernel/drivers/net/mdio/",
    "kernel/drivers/net/phy/",
    "kernel/drivers/net/usb/",
    "kernel/drivers/net/vmxnet3/",
    "kernel/drivers/net/wireless/",
    "kernel/drivers/net/wwan/",
];

/// What is known of a module besides its file.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct About {
    needs: Vec<String>,
    aliases: Vec<String>,
}

/// The modules of a kernel that are for software, and what they need, by name.
pub(crate) fn entries(kernel: &Modules) -> Result<Vec<Entry>, ModuleError> {
    let wanted: BTreeSet<&String> = kernel
        .files
        .iter()
        .filter(|(_, path)| is_taken(path.strip_prefix(&kernel.dir).unwrap_or(path)))
        .map(|(name, _)| name)
        .collect();
    let known = match depmods_lists(&kernel.dir)? {
        Some(lists) => lists,
        None => of_the_modules_themselves(kernel, &wanted)?,
    };
    let mut all = BTreeSet::new();
    let mut queue: Vec<&String> = wanted.into_iter().collect();
    while let Some(name) = queue.pop() {
        if !all.insert(name) {
            continue;
        }
        let needs = known.get(name).into_iter().flat_map(|about| &about.needs);
        queue.extend(needs.filter(|need| kernel.files.contains_key(*need)));
    }
    let entry = |name: &String| {
        let path = kernel.files.get(name)?;
        let about = known.get(name).cloned().unwrap_or_default();
        let content = fs::read(path).map_err(|source| ModuleError::Read {
            path: path.clone(),
            source,
        });
        Some(content.map(|content| Entry {
            name: name.clone(),
            needs: about.needs,
            aliases: about.aliases,
            content,
        }))
    };
    all.into_iter().filter_map(entry).collect()
}

fn is_taken(path: &Path) -> bool {
    let path = path.to_string_lossy();
    let begins = |list: &[&str]| list.iter().any(|folder| path.starts_with(folder));
    begins(&TAKEN) && !begins(&LEFT)
}

/// `modules.dep`, `modules.alias` and `modules.softdep`, if `depmod` has written them.
fn depmods_lists(dir: &Path) -> Result<Option<BTreeMap<String, About>>, ModuleError> {
    let read = |name: &str| -> Result<Option<String>, ModuleError> {
        let path: PathBuf = dir.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(ModuleError::Read { path, source }),
        }
    };
    let (Some(needs), Some(aliases)) = (read("modules.dep")?, read("modules.alias")?) else {
        return Ok(None);
    };
    let mut known: BTreeMap<String, About> = BTreeMap::new();
    for (module, list) in needs.lines().filter_map(|line| line.split_once(':')) {
        if let Some(name) = modules::name_of(module) {
            let list = list.split_whitespace().filter_map(modules::name_of);
            known.entry(name).or_default().needs = list.collect();
        }
    }
    for line in aliases.lines() {
        let mut words = line.split_whitespace();
        if let (Some("alias"), Some(alias), Some(name)) = (words.next(), words.next(), words.next())
        {
            let about = known.entry(name.replace('-', "_")).or_default();
            about.aliases.push(alias.to_owned());
        }
    }
    for line in read("modules.softdep")?.unwrap_or_default().lines() {
        let mut words = line.splitn(3, char::is_whitespace);
        if let (Some("softdep"), Some(name), Some(list)) =
            (words.next(), words.next(), words.next())
        {
            let about = known.entry(name.replace('-', "_")).or_default();
            about.needs.extend(modules::named_before(list));
        }
    }
    Ok(Some(known))
}

fn of_the_modules_themselves(
    kernel: &Modules,
    wanted: &BTreeSet<&String>,
) -> Result<BTreeMap<String, About>, ModuleError> {
    let mut known = BTreeMap::new();
    let mut queue: Vec<String> = wanted.iter().map(|name| (*name).clone()).collect();
    while let Some(name) = queue.pop() {
        let Some(path) = kernel
            .files
            .get(&name)
            .filter(|_| !known.contains_key(&name))
        else {
            continue;
        };
        let content = modules::read_module(path)?;
        let info =
            elf::module_info(&content).ok_or_else(|| ModuleError::NotAModule(path.clone()))?;
        let mut needs = modules::depends(&info);
        needs.extend(modules::soft_depends(&info));
        let said = info.into_iter().filter(|(key, _)| key == "alias");
        let aliases = said.map(|(_, alias)| alias).collect();
        queue.extend(needs.iter().cloned());
        known.insert(name, About { needs, aliases });
    }
    Ok(known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::tests::module;

    fn kernel(lists: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let file = |path: &str, content: &[u8]| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        file(
            "kernel/net/bridge/bridge.ko",
            &module(&["depends=stp", "alias=rtnl-link-bridge"]),
        );
        file("kernel/net/802/stp.ko", &module(&["depends=far-away"]));
        file("kernel/drivers/misc/far-away.ko", &module(&["depends="]));
        file(
            "kernel/drivers/net/dummy.ko",
            &module(&["softdep=pre: stp"]),
        );
        file("kernel/drivers/net/ethernet/e.ko", &module(&["depends="]));
        file("kernel/drivers/gpu/g.ko", &module(&["depends="]));
        for (name, text) in lists {
            file(name, text.as_bytes());
        }
        dir
    }

    fn listed(dir: &tempfile::TempDir) -> Vec<(String, String, String)> {
        let kernel = Modules::open(dir.path()).unwrap();
        let all = entries(&kernel).unwrap();
        all.into_iter()
            .map(|entry| (entry.name, entry.needs.join(","), entry.aliases.join(",")))
            .collect()
    }

    #[test]
    fn software_is_taken_with_what_it_needs_and_devices_are_left() {
        let of_modules = listed(&kernel(&[]));
        let expected = [
            ("bridge", "stp", "rtnl-link-bridge"),
            ("dummy", "stp", ""),
            ("far_away", "", ""),
            ("stp", "far_away", ""),
        ]
        .map(|(a, b, c)| (a.to_owned(), b.to_owned(), c.to_owned()));
        assert_eq!(of_modules, expected);
        let lists = [
            (
                "modules.dep",
                "kernel/net/bridge/bridge.ko: kernel/net/802/stp.ko\n\
                 kernel/net/802/stp.ko: kernel/drivers/misc/far-away.ko\n\
                 kernel/drivers/net/dummy.ko:\n",
            ),
            (
                "modules.alias",
                "# by depmod\nalias rtnl-link-bridge bridge\n",
            ),
            ("modules.softdep", "softdep dummy pre: stp post: e\n"),
        ];
        assert_eq!(listed(&kernel(&lists)), expected);
    }
}
