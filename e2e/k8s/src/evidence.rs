//! What is kept of a test that failed: what the node has to say, as for every end-to-end test, and
//! what Kubernetes has.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Event, Pod};
use kiln_e2e::evidence::{Kept, Marks};
use kube::api::ListParams;

use crate::Test;
use crate::config::LOGS;

/// Writes all that can be had into the folder of `test`; what cannot be had is noted there.
pub async fn keep(test: &Test, marks: &Marks, failure: &str) -> Result<PathBuf> {
    let mut kept = Kept::of_node(&test.to_string(), marks, failure)?;
    kept.put("pods.json", pods(test).await)?;
    kept.put("events.txt", events(test).await)?;
    for program in ["kubelet", "kube-controller-manager", "kube-scheduler"] {
        let log = format!("{program}.log");
        kept.put(
            &log,
            lines_about(test.namespace(), &Path::new(LOGS).join(&log)),
        )?;
    }
    let of_the_test = format!("{}_", test.namespace());
    for entry in fs::read_dir("/var/log/pods")
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(pod) = name.strip_prefix(&of_the_test) {
            kept.copy(&entry.path(), &format!("container-logs/{pod}"))?;
        }
    }
    Ok(kept.folder().to_owned())
}

async fn pods(test: &Test) -> Result<String> {
    let list = test.api::<Pod>().list(&ListParams::default()).await?;
    serde_json::to_string_pretty(&list.items).context("pods as JSON")
}

async fn events(test: &Test) -> Result<String> {
    let list = test.api::<Event>().list(&ListParams::default()).await?;
    let mut text = String::new();
    for event in list.items {
        let object = event.involved_object.name.unwrap_or_default();
        let reason = event.reason.unwrap_or_default();
        let message = event.message.unwrap_or_default();
        writeln!(text, "{object}: {reason}: {message}")?;
    }
    Ok(text)
}

fn lines_about(word: &str, log: &Path) -> Result<String> {
    let text = fs::read(log).with_context(|| format!("{}", log.display()))?;
    let text = String::from_utf8_lossy(&text);
    let about: Vec<&str> = text.lines().filter(|line| line.contains(word)).collect();
    Ok(about.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_log_the_lines_about_a_namespace_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "a test-1\nb test-2\nc test-1\n").unwrap();
        assert_eq!(lines_about("test-1", &path).unwrap(), "a test-1\nc test-1");
        assert!(lines_about("x", &folder.path().join("none")).is_err());
    }
}
