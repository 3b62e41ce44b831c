//! Why a container ended with its μVM, told where the kubelet looks for it.
//!
//! A task's end has a status and nothing else. But the kubelet gives each container a file of the node's for its last message
//! (`terminationMessagePath`), and what is in it when the container ends is its message in the pod's status. A container whose
//! μVM is gone can't write there any more, and the shim does.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kiln_uvm::end::End;

use super::container::Container;
use crate::spec::SpecMount;

/// How a kernel begins its last message.
const PANIC: &str = "Kernel panic";
/// The kubelet reads no more.
const LONGEST: usize = 4096;

/// The file, if one of the mounts is the kubelet's for it. It is in the kubelet's own directory, where no container writes.
pub(super) fn file(mounts: &[SpecMount]) -> Option<PathBuf> {
    let mounts = mounts
        .iter()
        .filter(|m| m.is_bind() && !m.has("ro") && !m.has("rro"));
    let mut sources = mounts.map(|m| Path::new(&m.source));
    sources
        .find(|source| is_kubelets(source))
        .map(Path::to_owned)
}

/// `…/pods/UID/containers/NAME/FILE`
fn is_kubelets(path: &Path) -> bool {
    let name = |nth: usize| path.ancestors().nth(nth).and_then(Path::file_name);
    path.is_absolute()
        && name(0).is_some_and(|file| file != "..")
        && name(2).is_some_and(|folder| folder == "containers")
        && name(4).is_some_and(|folder| folder == "pods")
}

/// The end of a μVM, for people.
fn text(end: &End) -> String {
    let mut text = format!("kiln: the pod's μVM has ended: {}", end.reason);
    if end.console.is_empty() {
        return text;
    }
    text += "\nThe end of its console:\n";
    // A kernel says why before it says where: that line has its place, and the last ones have the rest.
    let why = end.console.iter().position(|line| line.contains(PANIC));
    let why = why.and_then(|at| Some((at, end.console.get(at)?)));
    let kept = why.map_or(0, |(_, line)| line.len() + 1);
    let mut first = end.console.len();
    let mut left = LONGEST.saturating_sub(text.len() + kept);
    while let Some(line) = first.checked_sub(1).and_then(|n| end.console.get(n)) {
        let Some(rest) = left.checked_sub(line.len() + 1) else {
            break;
        };
        (left, first) = (rest, first - 1);
    }
    if let Some((_, line)) = why.filter(|(at, _)| *at < first) {
        text += line;
        text.push('\n');
    }
    text += &end.console.get(first..).unwrap_or_default().join("\n");
    text
}

impl Container {
    /// Writes why its μVM has ended where the kubelet looks, unless the container has left a message of its own.
    pub(super) fn leave_message(&self, end: &End) {
        let Some(path) = self.message.as_deref().filter(|_| !end.wanted) else {
            return;
        };
        if let Err(error) = write(path, &text(end)) {
            tracing::warn!(%error, file = %path.display(), "why the container ended will not be in its status");
        }
    }
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .append(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    let found = file.metadata()?;
    if !found.is_file() || found.len() > 0 {
        return Ok(());
    }
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn bind(source: &str, options: &[&str]) -> SpecMount {
        SpecMount {
            destination: "/dev/termination-log".into(),
            kind: "bind".into(),
            source: source.into(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            ..SpecMount::default()
        }
    }

    fn end(console: &[&str]) -> End {
        End {
            reason: "the guest's kernel panicked".into(),
            out_of_memory: false,
            wanted: false,
            console: console.iter().map(|l| (*l).to_owned()).collect(),
        }
    }

    #[test]
    fn only_the_kubelets_own_file_is_one() {
        let own = "/var/lib/kubelet/pods/5a/containers/main/0f1e2d3c";
        assert_eq!(
            file(&[bind("/etc", &["rbind"]), bind(own, &["rbind", "rw"])]),
            Some(own.into())
        );
        assert_eq!(file(&[bind(own, &["rbind", "ro"])]), None);
        let others = [
            "/var/lib/kubelet/pods/5a/volumes/kubernetes.io~empty-dir/x",
            "/var/lib/kubelet/pods/5a/containers/main",
            "containers/main/x",
            "/data",
        ];
        for other in others {
            assert_eq!(file(&[bind(other, &["rbind", "rw"])]), None, "{other}");
        }
    }

    #[test]
    fn message_ends_with_the_console_and_is_no_longer_than_what_is_read() {
        assert_eq!(
            text(&end(&["Kernel panic: x", "at y"])),
            "kiln: the pod's μVM has ended: the guest's kernel panicked\nThe end of its console:\n\
             Kernel panic: x\nat y"
        );
        let long = "x".repeat(1000);
        let text = text(&end(&[&long, &long, &long, &long, &long, "the last"]));
        assert!(text.len() <= LONGEST && text.len() > 3000, "{}", text.len());
        assert!(text.ends_with("the last"));
    }

    #[test]
    fn message_of_the_containers_own_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("message");
        assert!(
            write(&path, "kiln").is_err(),
            "a file that is not there is not made"
        );
        fs::write(&path, "").unwrap();
        write(&path, "kiln: ended").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "kiln: ended");
        write(&path, "again").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "kiln: ended");
        let link = dir.path().join("link");
        fs::write(&path, "").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(write(&link, "through a link").is_err());
    }
}
