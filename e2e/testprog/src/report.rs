//! What a process sees from inside its container.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::json::Json;

/// Everything a test may want to compare: identity, limits, mounts, environment.
pub(crate) fn report() -> Json {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let working = std::env::current_dir()
        .map(|path| path.display().to_string())
        .ok();
    object([
        // SAFETY: getpid has no preconditions and touches no memory.
        ("pid", unsafe { libc::getpid() }.into()),
        ("args", std::env::args().collect::<Vec<_>>().into()),
        ("env", environment()),
        ("cwd", working.into()),
        ("hostname", hostname().into()),
        ("uid", numbers_of(&status, "Uid")),
        ("gid", numbers_of(&status, "Gid")),
        ("groups", numbers_of(&status, "Groups")),
        ("capabilities", capabilities(&status)),
        ("no_new_privs", number_of(&status, "NoNewPrivs")),
        ("seccomp", number_of(&status, "Seccomp")),
        ("cpus", available_cpus().into()),
        ("memory_kib", number_of(&text("/proc/meminfo"), "MemTotal")),
        ("kernel", line("/proc/sys/kernel/osrelease").into()),
        ("boot_id", line("/proc/sys/kernel/random/boot_id").into()),
        ("machine_id", line("/etc/machine-id").into()),
        ("namespaces", namespaces()),
        ("cgroup", cgroup()),
        ("mounts", mounts(&text("/proc/self/mountinfo"))),
        ("status", fields(&status)),
    ])
}

pub(crate) fn hostname() -> String {
    line("/proc/sys/kernel/hostname").unwrap_or_default()
}

fn object<const N: usize>(fields: [(&str, Json); N]) -> Json {
    Json::Object(
        fields
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
    )
}

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn line(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim_end().to_owned())
}

fn environment() -> Json {
    Json::Object(
        std::env::vars_os()
            .map(|(name, value)| {
                (
                    name.to_string_lossy().into_owned(),
                    value.to_string_lossy().as_ref().into(),
                )
            })
            .collect(),
    )
}

/// The `Name:\tvalue` lines of a file in /proc.
fn fields(text: &str) -> Json {
    Json::Object(
        text.lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_owned(), value.trim().into()))
            .collect(),
    )
}

fn value_of<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

fn number_of(text: &str, name: &str) -> Json {
    value_of(text, name)
        .and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok())
        .into()
}

fn numbers_of(text: &str, name: &str) -> Json {
    value_of(text, name)
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|word| word.parse::<u64>().ok())
        .collect::<Vec<_>>()
        .into()
}

fn capabilities(status: &str) -> Json {
    object([
        ("inheritable", value_of(status, "CapInh").into()),
        ("permitted", value_of(status, "CapPrm").into()),
        ("effective", value_of(status, "CapEff").into()),
        ("bounding", value_of(status, "CapBnd").into()),
        ("ambient", value_of(status, "CapAmb").into()),
    ])
}

fn available_cpus() -> u64 {
    // Not available_parallelism(): that looks at cgroup quotas too, a test wants them apart.
    text("/proc/self/status")
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
        .map_or(0, |list| count_list(list.trim()))
}

/// How many numbers a kernel list such as `0-3,8` names.
fn count_list(list: &str) -> u64 {
    list.split(',')
        .filter_map(|part| match part.split_once('-') {
            Some((first, last)) => {
                let (first, last) = (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?);
                Some(last.checked_sub(first)? + 1)
            }
            None => part.parse::<u64>().ok().map(|_| 1),
        })
        .sum()
}

fn namespaces() -> Json {
    let mut found = Vec::new();
    for name in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
        let inode = fs::metadata(format!("/proc/self/ns/{name}"))
            .map(|meta| meta.ino())
            .ok();
        found.push((name.to_owned(), inode.into()));
    }
    Json::Object(found)
}

/// The limits of this process's cgroup as seen from inside, cgroup v2 names (v1's in brackets).
fn cgroup() -> Json {
    let read = |paths: [&str; 2]| paths.iter().find_map(|path| line(path));
    object([
        ("path", line("/proc/self/cgroup").into()),
        (
            "memory_max",
            read([
                "/sys/fs/cgroup/memory.max",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            ])
            .into(),
        ),
        (
            "cpu_max",
            read([
                "/sys/fs/cgroup/cpu.max",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
            ])
            .into(),
        ),
        (
            "pids_max",
            read(["/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max"]).into(),
        ),
    ])
}

fn mounts(mountinfo: &str) -> Json {
    Json::List(mountinfo.lines().filter_map(mount).collect())
}

/// One line of mountinfo, `ID PARENT DEV ROOT TARGET OPTIONS [TAGS] - TYPE SOURCE SUPER`.
fn mount(line: &str) -> Option<Json> {
    let (before, after) = line.split_once(" - ")?;
    let before: Vec<&str> = before.split(' ').collect();
    let after: Vec<&str> = after.split(' ').collect();
    Some(object([
        ("target", (*before.get(4)?).into()),
        (
            "options",
            before
                .get(5)?
                .split(',')
                .map(Json::from)
                .collect::<Vec<_>>()
                .into(),
        ),
        ("type", (*after.first()?).into()),
        ("source", (*after.get(1)?).into()),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_list_is_counted() {
        for (list, count) in [("0", 1), ("0-3", 4), ("0,2-3,9", 4), ("", 0), ("3-1", 0)] {
            assert_eq!(count_list(list), count, "{list}");
        }
    }

    #[test]
    fn a_mountinfo_line_is_split_at_the_dash_whatever_tags_stand_before_it() {
        let line = "36 35 98:0 /mnt1 /mnt2 ro,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue";
        assert_eq!(
            mount(line).unwrap().to_string(),
            r#"{"target":"/mnt2","options":["ro","noatime"],"type":"ext3","source":"/dev/root"}"#
        );
        assert!(mount("nonsense").is_none());
    }

    #[test]
    fn the_report_names_this_process() {
        let text = report().to_string();
        assert!(
            text.contains(&format!("\"pid\":{}", std::process::id())),
            "{text}"
        );
        assert!(text.contains("\"effective\":\""), "{text}");
    }
}
