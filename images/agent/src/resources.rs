//! CPUs and memory that the host plugs while the guest runs.
//!
//! The host plugs, the agent brings online and tells what the guest sees. Both are waited for by the
//! kernel's announcements, never by looking again and again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use kiln_agent_api::proto;
use thiserror::Error;

use crate::uevent;

const CPUS: &str = "/sys/devices/system/cpu";
const MEMINFO: &str = "/proc/meminfo";
const MEMORY: &str = "/sys/devices/system/memory";
/// How long to wait if the host doesn't say.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the guest has not what the host meant to give it.
#[derive(Debug, Error)]
pub(crate) enum ResourceError {
    /// A file of the kernel's.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// "read", "write 1 to", ...
        action: &'static str,
        /// The file.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It did not come in time.
    #[error("{wanted} did not come online within {limit:?}; the guest has {have}")]
    Timeout {
        /// What was asked for.
        wanted: String,
        /// What there is.
        have: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The announcements can't be heard.
    #[error("cannot listen to the kernel's device events: {0}")]
    Events(#[from] io::Error),
}

type Result<T> = std::result::Result<T, ResourceError>;

/// Makes the first `cpus` CPUs the online ones and waits for memory. Blocks the thread.
pub(crate) fn set(wanted: &proto::Resources) -> Result<proto::ResourceState> {
    let limit = match wanted.timeout_ms {
        0 => DEFAULT_TIMEOUT,
        milliseconds => Duration::from_millis(milliseconds.into()),
    };
    if wanted.cpus > 0 {
        set_cpus(Path::new(CPUS), wanted.cpus, limit)?;
    }
    if wanted.memory_bytes > 0 {
        let enough = || -> Result<bool> { Ok(online_memory()? >= wanted.memory_bytes) };
        if !uevent::wait_until(limit, enough)? {
            let wanted = format!("{} bytes of memory", wanted.memory_bytes);
            let have = format!("{} bytes", online_memory()?);
            return Err(ResourceError::Timeout {
                wanted,
                have,
                limit,
            });
        }
    }
    state()
}

/// What the guest has.
pub(crate) fn state() -> Result<proto::ResourceState> {
    let meminfo = read(Path::new(MEMINFO))?;
    let cpus = |file| read(&Path::new(CPUS).join(file));
    let of = |key: &str| meminfo_bytes(&meminfo, key);
    let mut state = proto::ResourceState::new();
    state.cpus_present = count(&cpus("present")?);
    state.cpus_online = count(&cpus("online")?);
    state.mem_total_bytes = of("MemTotal");
    state.mem_free_bytes = of("MemFree");
    state.mem_available_bytes = of("MemAvailable");
    state.memory_online_bytes = online_memory()?;
    Ok(state)
}

/// How often, and how many times, free memory is looked at until it grows no more.
const LOOKS: (Duration, u32) = (Duration::from_millis(100), 20);

/// Gives back what the kernel keeps only because it might be of use again.
pub(crate) fn give_back_caches() -> io::Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "2")?;
    shrink_slabs()?;
    // Shrinking looked up many files.
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    // What is dropped is free when every CPU has forgotten it, which the kernel does not tell.
    let mut before = free_memory()?;
    for _ in 0..LOOKS.1 {
        thread::sleep(LOOKS.0);
        let now = free_memory()?;
        if now <= before {
            break;
        }
        before = now;
    }
    Ok(())
}

/// Gives back the pages of slabs that have no object left; the kernel keeps some of each kind. Kernels without these
/// files keep them.
fn shrink_slabs() -> io::Result<()> {
    let slabs = match fs::read_dir("/sys/kernel/slab") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        slabs => slabs?,
    };
    for slab in slabs {
        let slab = slab?;
        // The other names of one that several kinds share are links.
        if slab.file_type()?.is_dir() {
            fs::write(slab.path().join("shrink"), "1")?;
        }
    }
    Ok(())
}

/// Bytes of memory that are nobody's.
pub(crate) fn free_memory() -> io::Result<u64> {
    let meminfo = fs::read_to_string(MEMINFO)?;
    Ok(meminfo_bytes(&meminfo, "MemFree"))
}

/// Bytes of memory that the kernel hands out.
pub(crate) fn total_memory() -> io::Result<u64> {
    let meminfo = fs::read_to_string(MEMINFO)?;
    Ok(meminfo_bytes(&meminfo, "MemTotal"))
}

/// Makes the first `wanted` CPUs the online ones. `folder` is the kernel's on CPUs.
fn set_cpus(folder: &Path, wanted: u32, limit: Duration) -> Result<()> {
    let present = || -> Result<Vec<u32>> { Ok(list(&read(&folder.join("present"))?)) };
    // A CPU counts as present before the kernel has made the file that switches it; that it is there is announced.
    let ready = |cpus: &[u32]| {
        let first = cpus.iter().take(wanted as usize);
        first.filter(|cpu| has_switch(folder, **cpu)).count()
    };
    let in_time = uevent::wait_until(limit, || -> Result<bool> {
        Ok(ready(&present()?) >= wanted as usize)
    })?;
    let cpus = present()?;
    if !in_time {
        let have = match (ready(&cpus), cpus.len()) {
            (ready, there) if ready == there => there.to_string(),
            (ready, there) => format!("{there}, of which {ready} can be switched on"),
        };
        return Err(ResourceError::Timeout {
            wanted: format!("{wanted} CPUs"),
            have,
            limit,
        });
    }
    let online = list(&read(&folder.join("online"))?);
    for (position, cpu) in cpus.iter().enumerate() {
        let shall = position < wanted as usize;
        if *cpu != 0 && shall != online.contains(cpu) {
            write(&switch(folder, *cpu), if shall { "1" } else { "0" })?;
        }
    }
    Ok(())
}

fn switch(folder: &Path, cpu: u32) -> PathBuf {
    folder.join(format!("cpu{cpu}/online"))
}

/// CPU 0 has none and needs none.
fn has_switch(folder: &Path, cpu: u32) -> bool {
    cpu == 0 || switch(folder, cpu).exists()
}

/// Memory blocks that come are for movable pages, so that they can go again.
pub(crate) fn online_new_memory_by_itself() -> Result<()> {
    let path = Path::new(MEMORY).join("auto_online_blocks");
    if path.exists() {
        write(&path, "online_movable")
    } else {
        Ok(())
    }
}

/// The sum of all online memory blocks; without memory hot-plug in the kernel, all memory.
fn online_memory() -> Result<u64> {
    let size_path = Path::new(MEMORY).join("block_size_bytes");
    if !size_path.exists() {
        return Ok(meminfo_bytes(&read(Path::new(MEMINFO))?, "MemTotal"));
    }
    let size = u64::from_str_radix(read(&size_path)?.trim(), 16).unwrap_or(0);
    let entries =
        fs::read_dir(MEMORY).map_err(|source| file_error("list", Path::new(MEMORY), source))?;
    let blocks = entries
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            let number = name
                .to_string_lossy()
                .strip_prefix("memory")
                .map(str::to_owned);
            number.is_some_and(|number| number.parse::<u32>().is_ok())
        })
        .filter(|entry| {
            let state = fs::read_to_string(entry.path().join("state")).unwrap_or_default();
            state.trim() == "online"
        })
        .count();
    Ok(blocks as u64 * size)
}

fn meminfo_bytes(meminfo: &str, key: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<u64>().ok())
        .map_or(0, |kilobytes| kilobytes * 1024)
}

/// The numbers of a list like `0,2-3`.
fn list(text: &str) -> Vec<u32> {
    text.trim()
        .split(',')
        .filter_map(|part| match part.split_once('-') {
            Some((first, last)) => Some(first.parse().ok()?..=last.parse().ok()?),
            None => part.parse().ok().map(|one| one..=one),
        })
        .flatten()
        .collect()
}

fn count(text: &str) -> u32 {
    u32::try_from(list(text).len()).unwrap_or(u32::MAX)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|source| file_error("read", path, source))
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::write(path, value).map_err(|source| file_error("write to", path, source))
}

fn file_error(action: &'static str, path: &Path, source: io::Error) -> ResourceError {
    ResourceError::File {
        action,
        path: path.display().to_string(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_read() {
        assert_eq!(list("0\n"), [0]);
        assert_eq!(list("0,2-4\n"), [0, 2, 3, 4]);
        assert!(list("\n").is_empty());
    }

    /// The kernel's folder for two CPUs, of which the second has only just come.
    fn two_cpus() -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("folder");
        let path = |name: &str| folder.path().join(name);
        fs::write(path("present"), "0-1\n").expect("file");
        fs::write(path("online"), "0\n").expect("file");
        fs::create_dir(path("cpu1")).expect("folder");
        folder
    }

    #[test]
    fn a_cpu_is_switched_on_once_it_has_a_switch() {
        let folder = two_cpus();
        let switch = switch(folder.path(), 1);
        let error = set_cpus(folder.path(), 2, Duration::ZERO).expect_err("no switch yet");
        let text = error.to_string();
        assert!(text.contains("2, of which 1 can be switched on"), "{text}");
        assert!(!switch.exists());
        fs::write(&switch, "0").expect("file");
        set_cpus(folder.path(), 2, Duration::ZERO).expect("both");
        assert_eq!(fs::read_to_string(&switch).expect("file"), "1");
    }

    #[test]
    fn one_cpu_does_not_wait_for_the_switch_of_another() {
        let folder = two_cpus();
        set_cpus(folder.path(), 1, Duration::ZERO).expect("one");
        let error = set_cpus(folder.path(), 3, Duration::ZERO).expect_err("three");
        assert!(error.to_string().contains("3 CPUs"), "{error}");
    }

    #[test]
    fn meminfo_is_in_kilobytes() {
        let text = "MemTotal:         251904 kB\nMemFree:            1 kB\n";
        assert_eq!(meminfo_bytes(text, "MemTotal"), 251_904 * 1024);
        assert_eq!(meminfo_bytes(text, "Mem"), 0);
    }

    #[test]
    fn this_machine_has_a_state() {
        let state = state().expect("state");
        assert!(state.cpus_online >= 1 && state.cpus_present >= state.cpus_online);
        assert!(state.mem_total_bytes > state.mem_free_bytes);
    }
}
