//! Jobs that live on their files: one that syncs all the time, one that only writes, one that builds.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::files::Content;
use crate::load::Random;
use crate::text::say;

const MIB: u64 = 1 << 20;
/// As many as a folder of sources has.
const FILES_OF_A_FOLDER: usize = 32;
/// Octaves of files' sizes, from [`LEAST`] on; each has as many files as the others. So half of the files are
/// shorter than 6 KiB, their mean is 21 KiB, and the longest are 128 KiB: about as the sources of a kernel.
const OCTAVES: u64 = 9;
const LEAST: u64 = 256;

/// Appends 4 KiB and syncs, `count` times.
pub(crate) fn syncs(root: &str, count: u32) -> Result<()> {
    let path = Path::new(root).join("journal");
    let mut file = File::create(&path).with_context(|| path.display().to_string())?;
    for number in 0..count {
        file.write_all(&[number as u8; 4096])?;
        file.sync_all().context("syncing")?;
    }
    fs::remove_file(&path)?;
    say("done")
}

/// Writes `mib` MiB in pieces of `step` MiB, syncs each, and prints how many microseconds each took.
pub(crate) fn grow(path: &str, mib: u64, step: u64) -> Result<()> {
    if step == 0 {
        bail!("a step of 0 MiB never gets there");
    }
    let mut file = File::create(path).with_context(|| format!("cannot create {path}"))?;
    let mut left = mib;
    while left > 0 {
        let now = step.min(left);
        // Made before the clock runs.
        let piece = Content::new(now * MIB, left).collect::<Vec<_>>().concat();
        let begin = Instant::now();
        file.write_all(&piece)
            .and_then(|()| file.sync_data())
            .with_context(|| format!("cannot write to {path}"))?;
        say(&format!("piece {}", begin.elapsed().as_micros()))?;
        left -= now;
    }
    say("done")
}

/// Unpacks a tree of `mib` MiB of sources, makes an object of each file, links these to one output, deletes all.
/// It computes next to nothing: what it takes is what its files take. After each folder, and after the output, it syncs.
pub(crate) fn build(root: &str, mib: u64) -> Result<()> {
    let root = Path::new(root).join("build");
    let stamps = Stamps(root.clone());
    let tree = Tree::unpack(&root.join("sources"), mib * MIB, &stamps)?;
    let objects = tree.compile(&root.join("objects"), &stamps)?;
    let linked = objects.link(&root.join("output"))?;
    if linked != mib * MIB {
        bail!("{mib} MiB of sources became {linked} bytes of output");
    }
    fs::remove_dir_all(&root).with_context(|| format!("cannot delete {}", root.display()))?;
    say("done")
}

/// Where it is noted, and synced, that a folder is finished: what a job that may be interrupted does.
struct Stamps(PathBuf);

impl Stamps {
    fn finished(&self, folder: &Path) -> Result<()> {
        let path = self.0.join("stamps");
        let mut stamps = File::options()
            .append(true)
            .create(true)
            .open(&path)
            .with_context(|| path.display().to_string())?;
        writeln!(stamps, "{}", folder.display())
            .and_then(|()| stamps.sync_all())
            .with_context(|| format!("cannot write to {}", path.display()))
    }
}

/// Files by folder.
struct Tree {
    folders: Vec<(PathBuf, Vec<String>)>,
}

impl Tree {
    fn unpack(root: &Path, bytes: u64, stamps: &Stamps) -> Result<Self> {
        let mut random = Random::new(bytes);
        let (mut left, mut folders) = (bytes, Vec::new());
        while left > 0 {
            let number = folders.len();
            let folder = root.join(format!("{}/{number}", number / FILES_OF_A_FOLDER));
            fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
            let mut names = Vec::new();
            while left > 0 && names.len() < FILES_OF_A_FOLDER {
                let size = size(&mut random).min(left);
                let name = format!("file-{}", names.len());
                let content = Content::new(size, left).collect::<Vec<_>>().concat();
                write(&folder.join(&name), &content)?;
                names.push(name);
                left -= size;
            }
            stamps.finished(&folder)?;
            folders.push((folder, names));
        }
        Ok(Tree { folders })
    }

    /// Makes a tree of objects, each as long as its source.
    fn compile(&self, root: &Path, stamps: &Stamps) -> Result<Self> {
        let mut objects = Vec::new();
        for (number, (folder, names)) in self.folders.iter().enumerate() {
            let into = root.join(number.to_string());
            fs::create_dir_all(&into).with_context(|| into.display().to_string())?;
            for name in names {
                let mut content = read(&folder.join(name))?;
                content.reverse();
                write(&into.join(name), &content)?;
            }
            stamps.finished(&into)?;
            objects.push((into, names.clone()));
        }
        Ok(Tree { folders: objects })
    }

    /// Makes one file of all. Returns how long it is.
    fn link(&self, path: &Path) -> Result<u64> {
        let mut output = File::create(path).with_context(|| path.display().to_string())?;
        let mut bytes = 0;
        for (folder, names) in &self.folders {
            for name in names {
                let content = read(&folder.join(name))?;
                output
                    .write_all(&content)
                    .with_context(|| format!("cannot write to {}", path.display()))?;
                bytes += content.len() as u64;
            }
        }
        output.sync_all().context("cannot sync the output")?;
        Ok(bytes)
    }
}

fn size(random: &mut Random) -> u64 {
    let octave = LEAST << (random.next() % OCTAVES);
    octave + random.next() % octave
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut content))
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_the_size_asked_for_and_files_of_all_sizes() {
        let root = tempfile::tempdir().unwrap();
        let bytes = 3 * MIB + 5;
        let stamps = Stamps(root.path().to_owned());
        let tree = Tree::unpack(&root.path().join("sources"), bytes, &stamps).unwrap();
        let mut sizes = Vec::new();
        for (folder, names) in &tree.folders {
            assert!(names.len() <= FILES_OF_A_FOLDER);
            for name in names {
                sizes.push(fs::metadata(folder.join(name)).unwrap().len());
            }
        }
        assert_eq!(sizes.iter().sum::<u64>(), bytes);
        sizes.sort_unstable();
        assert!(sizes[0] < 1024 && sizes[sizes.len() / 2] < 16 << 10);
        assert!(*sizes.last().unwrap() >= 64 << 10);
        let objects = tree.compile(&root.path().join("objects"), &stamps).unwrap();
        assert_eq!(objects.link(&root.path().join("output")).unwrap(), bytes);
    }

    #[test]
    fn a_build_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        build(root.path().to_str().unwrap(), 1).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_grows_by_whole_pieces_and_a_rest() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file");
        grow(path.to_str().unwrap(), 5, 2).unwrap();
        assert_eq!(fs::metadata(path).unwrap().len(), 5 * MIB);
        assert!(grow("/nowhere", 1, 0).is_err());
    }
}
