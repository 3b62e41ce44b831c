//! Kernel modules: which ones a guest needs, what they need in turn, and in which order they load.
//!
//! Dependencies are read from the modules themselves. `modules.dep` would be quicker, but exists
//! only where `depmod` ran: not in an unpacked kernel package.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::elf;

/// A module a guest wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Its name, with underscores.
    pub name: &'static str,
    /// What it is for. One that is not needed is left out if the kernel has none.
    pub needed_for: Option<&'static str>,
}

const fn needed(name: &'static str, what: &'static str) -> Wanted {
    Wanted {
        name,
        needed_for: Some(what),
    }
}

const fn optional(name: &'static str) -> Wanted {
    Wanted {
        name,
        needed_for: None,
    }
}

/// What kiln's devices and the agent need. A kernel that has one built in needs no file for it.
///
/// Each takes memory in every μVM. XFS is not among them: it is 2.6 MiB, and what is on XFS comes by
/// virtio-fs or as an image of another kind.
pub const GUEST: [Wanted; 16] = [
    needed("virtio_pci", "every device"),
    needed("virtio_blk", "root file systems"),
    needed("virtio_net", "the pod's network"),
    needed("vmw_vsock_virtio_transport", "talking to the agent"),
    needed("overlay", "root file systems"),
    needed("ext4", "the containers' writable layers"),
    optional("virtio_rng"),
    optional("virtio_mem"),
    optional("virtiofs"),
    optional("erofs"),
    optional("crc32c_generic"),
    optional("crc32c_intel"),
    optional("af_packet"),
    optional("vmgenid"),
    optional("pvpanic_mmio"),
    optional("tun"),
];

/// A module, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// Its file's path below the directory of modules, without any compression suffix.
    pub path: String,
    /// Its content, not compressed.
    pub content: Vec<u8>,
}

/// Why modules could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// The directory or a file in it cannot be read.
    #[error("reading {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A needed module is neither there nor built in.
    #[error(
        "the kernel whose modules are in {} has no {name}, which {needed_for} needs: choose another \
         kernel (`--kernel`, `--modules`), such as Debian's linux-image-cloud-amd64",
        dir.display()
    )]
    Missing {
        /// The directory of modules.
        dir: PathBuf,
        /// The module.
        name: String,
        /// What needs it.
        needed_for: String,
    },
    /// A file with a module's name is something else.
    #[error("{} is no kernel module", .0.display())]
    NotAModule(PathBuf),
    /// Modules that need each other.
    #[error("the module {0} needs itself, by way of others")]
    Circle(String),
}

/// The modules of one kernel.
#[derive(Debug)]
pub struct Modules {
    pub(crate) dir: PathBuf,
    /// Their files, by name.
    pub(crate) files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
}

const SUFFIXES: [&str; 4] = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"];

/// A module's name as the kernel says it, from a path with any suffix.
pub(crate) fn name_of(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let stem = SUFFIXES
        .iter()
        .find_map(|suffix| file.strip_suffix(suffix))?;
    Some(stem.replace('-', "_"))
}

impl Modules {
    /// Looks into a directory such as `/lib/modules/6.12.95`.
    pub fn open(dir: &Path) -> Result<Modules, ModuleError> {
        let read = |path: &Path| {
            let path = path.to_owned();
            move |source| ModuleError::Read { path, source }
        };
        let list = dir.join("modules.builtin");
        let built_in = match fs::read_to_string(&list) {
            Ok(text) => text.lines().filter_map(name_of).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeSet::new(),
            Err(error) => return Err(read(&list)(error)),
        };
        let mut files = BTreeMap::new();
        let mut queue = vec![dir.to_owned()];
        while let Some(next) = queue.pop() {
            for entry in fs::read_dir(&next).map_err(read(&next))? {
                let entry = entry.map_err(read(&next))?;
                let path = entry.path();
                // `build` and `source` link to trees of sources: links are not followed.
                let kind = entry.file_type().map_err(read(&path))?;
                if kind.is_dir() {
                    queue.push(path);
                } else if kind.is_file()
                    && let Some(name) = path.to_str().and_then(name_of)
                {
                    files.insert(name, path);
                }
            }
        }
        Ok(Modules {
            dir: dir.to_owned(),
            files,
            built_in,
        })
    }

    /// The modules that are wanted and all they need, in an order in which they can be loaded.
    pub fn resolve(&self, wanted: &[Wanted]) -> Result<Vec<Module>, ModuleError> {
        let mut loaded = BTreeMap::new();
        let mut order = Vec::new();
        for want in wanted {
            if self.built_in.contains(want.name) || self.is_out_of_reach(want) {
                continue;
            }
            let needed_for = want.needed_for.unwrap_or(want.name);
            self.visit(want.name, needed_for, &mut loaded, &mut order)?;
        }
        Ok(order)
    }

    fn is_out_of_reach(&self, want: &Wanted) -> bool {
        want.needed_for.is_none() && !self.files.contains_key(want.name)
    }

    /// Adds a module after what it needs. `loaded` holds `false` while its needs are looked after.
    fn visit(
        &self,
        name: &str,
        needed_for: &str,
        loaded: &mut BTreeMap<String, bool>,
        order: &mut Vec<Module>,
    ) -> Result<(), ModuleError> {
        match loaded.get(name) {
            Some(true) => return Ok(()),
            Some(false) => return Err(ModuleError::Circle(name.to_owned())),
            None => {}
        }
        if self.built_in.contains(name) {
            return Ok(());
        }
        let path = self.files.get(name).ok_or_else(|| ModuleError::Missing {
            dir: self.dir.clone(),
            name: name.to_owned(),
            needed_for: needed_for.to_owned(),
        })?;
        loaded.insert(name.to_owned(), false);
        let content = read_module(path)?;
        let info =
            elf::module_info(&content).ok_or_else(|| ModuleError::NotAModule(path.clone()))?;
        for need in depends(&info) {
            self.visit(&need, name, loaded, order)?;
        }
        for need in soft_depends(&info) {
            // A wish, not a need: often the name of an algorithm that is built in.
            if self.files.contains_key(&need) && loaded.get(&need) != Some(&false) {
                self.visit(&need, name, loaded, order)?;
            }
        }
        loaded.insert(name.to_owned(), true);
        let relative = path
            .strip_prefix(&self.dir)
            .unwrap_or(path)
            .to_string_lossy();
        let suffix = SUFFIXES
            .iter()
            .find(|suffix| relative.ends_with(**suffix))
            .unwrap_or(&"");
        let path = format!("{}.ko", relative.strip_suffix(suffix).unwrap_or(&relative));
        order.push(Module {
            name: name.to_owned(),
            path,
            content,
        });
        Ok(())
    }
}

pub(crate) fn depends(info: &[(String, String)]) -> Vec<String> {
    let list = info.iter().filter(|(key, _)| key == "depends");
    list.flat_map(|(_, value)| value.split(','))
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

/// From `softdep=pre: a b post: c`: the ones before.
pub(crate) fn soft_depends(info: &[(String, String)]) -> Vec<String> {
    let wishes = info.iter().filter(|(key, _)| key == "softdep");
    wishes.flat_map(|(_, value)| named_before(value)).collect()
}

/// The names after `pre:` in a module's wishes.
pub(crate) fn named_before(wishes: &str) -> Vec<String> {
    let mut needs = Vec::new();
    let mut before = false;
    for word in wishes.split_whitespace() {
        match word {
            "pre:" => before = true,
            "post:" | "platform:" => before = false,
            name if before => needs.push(name.replace('-', "_")),
            _ => {}
        }
    }
    needs
}

/// No module comes near this; a damaged file that unpacks without end is stopped.
const LARGEST: u64 = 256 << 20;

pub(crate) fn read_module(path: &Path) -> Result<Vec<u8>, ModuleError> {
    let wrap = |source| ModuleError::Read {
        path: path.to_owned(),
        source,
    };
    let raw = fs::read(path).map_err(wrap)?;
    decompress(&raw).map_err(wrap)
}

/// The content, whatever it is packed with; told by its first bytes.
fn decompress(raw: &[u8]) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    let read = match raw {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let mut out = Bounded(&mut content);
            return match lzma_rs::xz_decompress(&mut io::BufReader::new(raw), &mut out) {
                Ok(()) => Ok(content),
                Err(lzma_rs::error::Error::IoError(error)) => Err(error),
                Err(error) => Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    error.to_string(),
                )),
            };
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => zstd::Decoder::new(raw)?
            .take(LARGEST + 1)
            .read_to_end(&mut content)?,
        [0x1f, 0x8b, ..] => flate2::read::MultiGzDecoder::new(raw)
            .take(LARGEST + 1)
            .read_to_end(&mut content)?,
        _ => return Ok(raw.to_vec()),
    };
    if read as u64 > LARGEST {
        Err(too_large())
    } else {
        Ok(content)
    }
}

fn too_large() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "it unpacks to more than any module is",
    )
}

struct Bounded<'a>(&'a mut Vec<u8>);

impl io::Write for Bounded<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if (self.0.len() + bytes.len()) as u64 > LARGEST {
            return Err(too_large());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::tests::module;

    struct Kernel(tempfile::TempDir);

    impl Kernel {
        fn new(built_in: &str) -> Kernel {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("modules.builtin"), built_in).unwrap();
            Kernel(dir)
        }

        fn file(&self, path: &str, content: &[u8]) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }

        fn module(&self, path: &str, depends: &str) {
            self.file(
                path,
                &module(&["license=GPL", &format!("depends={depends}")]),
            );
        }

        fn order(&self, wanted: &[Wanted]) -> Result<Vec<String>, ModuleError> {
            let modules = Modules::open(self.0.path())?.resolve(wanted)?;
            Ok(modules.into_iter().map(|module| module.name).collect())
        }
    }

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let kernel = Kernel::new("kernel/virtio.ko\nkernel/net/built-in.ko\n");
        kernel.module("kernel/a-top.ko", "b,virtio");
        kernel.module("kernel/deep/b.ko", "c,built-in");
        kernel.module("kernel/c.ko", "");
        kernel.module("kernel/d.ko", "c,b");
        let order = kernel.order(&[
            needed("a_top", "x"),
            needed("d", "x"),
            needed("virtio", "x"),
        ]);
        assert_eq!(order.unwrap(), ["c", "b", "a_top", "d"]);
    }

    #[test]
    fn missing_module_is_named_with_what_needs_it() {
        let kernel = Kernel::new("");
        kernel.module("a.ko", "gone");
        let error = kernel
            .order(&[needed("a", "the network")])
            .unwrap_err()
            .to_string();
        assert!(error.contains("no gone, which a needs"), "{error}");
        let error = kernel
            .order(&[needed("nowhere", "the network")])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("no nowhere, which the network needs"),
            "{error}"
        );
        assert_eq!(
            kernel.order(&[optional("nowhere")]).unwrap(),
            Vec::<String>::new()
        );
    }

    #[test]
    fn circle_ends_with_an_error() {
        let kernel = Kernel::new("");
        kernel.module("a.ko", "b");
        kernel.module("b.ko", "a");
        assert!(matches!(
            kernel.order(&[needed("a", "x")]),
            Err(ModuleError::Circle(_))
        ));
    }

    #[test]
    fn soft_dependency_is_taken_if_it_is_there() {
        let kernel = Kernel::new("");
        let info = module(&["depends=", "softdep=pre: crc gone post: late"]);
        kernel.file("a.ko", &info);
        kernel.module("crc.ko", "");
        kernel.module("late.ko", "");
        assert_eq!(kernel.order(&[needed("a", "x")]).unwrap(), ["crc", "a"]);
    }

    #[test]
    fn compressed_modules_are_unpacked() {
        let content = module(&["depends="]);
        let kernel = Kernel::new("");
        let mut xz = Vec::new();
        lzma_rs::xz_compress(&mut io::BufReader::new(content.as_slice()), &mut xz).unwrap();
        kernel.file("kernel/x.ko.xz", &xz);
        kernel.file(
            "kernel/z.ko.zst",
            &zstd::encode_all(content.as_slice(), 1).unwrap(),
        );
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        io::Write::write_all(&mut gz, &content).unwrap();
        kernel.file("kernel/g.ko.gz", &gz.finish().unwrap());
        let modules = Modules::open(kernel.0.path()).unwrap();
        let wanted = [needed("x", "x"), needed("z", "x"), needed("g", "x")];
        for module in modules.resolve(&wanted).unwrap() {
            assert_eq!(module.content, content);
            assert_eq!(module.path, format!("kernel/{}.ko", module.name));
        }
    }

    #[test]
    fn damaged_files_are_errors_that_name_the_file() {
        let kernel = Kernel::new("");
        kernel.file("text.ko", b"not a module");
        let error = kernel.order(&[needed("text", "x")]).unwrap_err();
        assert!(matches!(&error, ModuleError::NotAModule(path) if path.ends_with("text.ko")));
        kernel.file("cut.ko.xz", &[0xfd, b'7', b'z', b'X', b'Z', 0, 1, 2, 3]);
        assert!(matches!(
            kernel.order(&[needed("cut", "x")]),
            Err(ModuleError::Read { .. })
        ));
        kernel.file("cut2.ko.zst", &[0x28, 0xb5, 0x2f, 0xfd, 0]);
        assert!(matches!(
            kernel.order(&[needed("cut2", "x")]),
            Err(ModuleError::Read { .. })
        ));
    }
}
