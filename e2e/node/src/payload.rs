//! What goes into the node: kiln's set-up of the system, and the caller's files.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result};

use crate::parts::Part;
use crate::suite::Suite;

/// A pair of paths, `FROM:TO`.
#[derive(Debug, Clone)]
pub(crate) struct Put {
    pub(crate) from: PathBuf,
    pub(crate) to: String,
}

impl FromStr for Put {
    type Err = String;

    fn from_str(text: &str) -> Result<Put, String> {
        match text.split_once(':') {
            Some((from, to)) if !from.is_empty() && !to.is_empty() => Ok(Put {
                from: from.into(),
                to: to.to_owned(),
            }),
            _ => Err(format!("{text:?} is not a pair of paths, FROM:TO")),
        }
    }
}

/// The node's configuration, readable as files under `system/`.
pub(crate) fn system_files(suite: Suite, parts: &[Part]) -> Vec<(String, u32, Vec<u8>)> {
    let mut files: Vec<(&str, u32, &[u8])> = vec![
        ("kiln-node/setup", 0o755, include_bytes!("../system/setup")),
        (
            "etc/kiln/config.toml",
            0o644,
            include_bytes!("../system/kiln.toml"),
        ),
        (
            "etc/kiln/hostile.toml",
            0o644,
            include_bytes!("../system/hostile.toml"),
        ),
        (
            "etc/kiln/old.toml",
            0o644,
            include_bytes!("../system/old.toml"),
        ),
        (
            "etc/cni/net.d/10-bridge.conflist",
            0o644,
            include_bytes!("../system/10-bridge.conflist"),
        ),
        (
            "etc/profile.d/kiln-node.sh",
            0o644,
            include_bytes!("../system/profile.sh"),
        ),
        (
            "etc/hosts",
            0o644,
            b"127.0.0.1 localhost node\n::1 localhost\n",
        ),
    ];
    if suite == Suite::K8s {
        files.push((
            "kiln-node/setup-k8s",
            0o755,
            include_bytes!("../system/setup-k8s"),
        ));
        files.push((
            "etc/crictl.yaml",
            0o644,
            include_bytes!("../system/crictl.yaml"),
        ));
        files.push((
            "usr/local/bin/sudo",
            0o755,
            include_bytes!("../system/sudo"),
        ));
    }
    let containerd = containerd_configuration(suite, parts);
    let mut files: Vec<_> = files
        .into_iter()
        .map(|(path, permissions, content)| (path.to_owned(), permissions, content.to_vec()))
        .collect();
    files.push((
        "etc/containerd/config.toml".to_owned(),
        0o644,
        containerd.into_bytes(),
    ));
    files
}

/// The pieces that hold for such a node, one after the other. No two of them set the same table.
fn containerd_configuration(suite: Suite, parts: &[Part]) -> String {
    let mut pieces = match suite {
        Suite::Trixie => vec![include_str!("../system/containerd-1.7.toml")],
        Suite::Sid => vec![include_str!("../system/containerd-2.toml")],
        Suite::K8s => vec![
            include_str!("../system/containerd-2.toml"),
            include_str!("../system/containerd-k8s.toml"),
        ],
    };
    if parts.contains(&Part::Gvisor) {
        pieces.push(match suite {
            Suite::Trixie => include_str!("../system/containerd-1.7-gvisor.toml"),
            Suite::Sid | Suite::K8s => include_str!("../system/containerd-2-gvisor.toml"),
        });
    }
    pieces.join("\n")
}

/// A tar archive of the caller's files. Its paths are relative to the node's root.
pub(crate) fn archive(puts: &[Put]) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for put in puts {
        let to = put.to.trim_start_matches('/');
        let added = if put.from.is_dir() {
            archive.append_dir_all(to, &put.from)
        } else {
            archive.append_path_with_name(&put.from, to)
        };
        added.with_context(|| format!("packing {} for the node", put.from.display()))?;
    }
    archive.into_inner().context("packing files for the node")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GVISOR: &str = "runtimes.gvisor]";

    #[test]
    fn gvisor_is_a_handler_where_its_part_is() {
        for suite in [Suite::Trixie, Suite::Sid, Suite::K8s] {
            let with = containerd_configuration(suite, &[Part::Gvisor]);
            assert!(with.contains(GVISOR), "{with}");
            let without = containerd_configuration(suite, suite.parts());
            assert!(!without.contains(GVISOR), "{without}");
        }
    }

    #[test]
    fn no_piece_of_the_configuration_sets_what_another_sets() {
        let whole = containerd_configuration(Suite::K8s, &[Part::Gvisor]);
        let mut tables: Vec<_> = whole
            .lines()
            .map(str::trim)
            .filter(|line| line.starts_with('['))
            .collect();
        let all = tables.len();
        tables.sort_unstable();
        tables.dedup();
        assert_eq!(tables.len(), all, "{whole}");
    }
}
