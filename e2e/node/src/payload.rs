//! What goes into the node: kiln's set-up of the system, and the caller's files.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result};

use crate::image::Suite;

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
pub(crate) fn system_files(suite: Suite) -> Vec<(String, u32, Vec<u8>)> {
    let containerd: &[u8] = match suite {
        Suite::Trixie => include_bytes!("../system/containerd-1.7.toml"),
        Suite::Sid => include_bytes!("../system/containerd-2.toml"),
    };
    let files: [(&str, u32, &[u8]); 8] = [
        ("kiln-node/setup", 0o755, include_bytes!("../system/setup")),
        ("etc/containerd/config.toml", 0o644, containerd),
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
    files
        .map(|(path, permissions, content)| (path.to_owned(), permissions, content.to_vec()))
        .into()
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
