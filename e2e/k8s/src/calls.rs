//! CRI's calls as kubelet made them: containerd's log says when each came and when it was answered.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::jiff::Timestamp;

/// containerd's log on a node VM.
const LOG: &str = "/var/log/containerd.log";

/// From the request for a pod's sandbox to the answer that a container of it is started.
pub fn sandbox_to_start(uid: &str, container: &str) -> Result<Duration> {
    let log = fs::read_to_string(LOG).context(LOG)?;
    between(&log, uid, container)
}

fn between(log: &str, uid: &str, container: &str) -> Result<Duration> {
    let asked = time_of(log, &["RunPodSandbox for", uid])?;
    let answered = time_of(
        log,
        &["StartContainer for", container, "returns successfully"],
    )?;
    let took = answered.duration_since(asked);
    took.try_into().with_context(|| {
        format!("container {container} was started before its sandbox was asked for")
    })
}

/// When the first line was written that has all these parts.
fn time_of(log: &str, parts: &[&str]) -> Result<Timestamp> {
    let line = log
        .lines()
        .find(|line| parts.iter().all(|part| line.contains(part)))
        .with_context(|| format!("no line in {LOG} has {}", parts.join(" … ")))?;
    let time = line
        .strip_prefix("time=\"")
        .and_then(|rest| rest.split('"').next());
    let time = time.with_context(|| format!("no time in {line:?}"))?;
    time.parse()
        .with_context(|| format!("{time:?} in {line:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = r#"time="2026-11-30T13:00:01.100000000Z" level=info msg="RunPodSandbox for name:\"pod\" uid:\"other\""
time="2026-11-30T13:00:02.100000000Z" level=info msg="RunPodSandbox for name:\"pod\" uid:\"u-1\""
time="2026-11-30T13:00:02.300000000Z" level=info msg="StartContainer for \"c1\""
time="2026-11-30T13:00:02.350000001Z" level=info msg="StartContainer for \"c1\" returns successfully"
"#;

    #[test]
    fn time_is_that_between_the_pods_own_lines() {
        let took = between(LINES, "u-1", "c1").unwrap();
        assert_eq!(took, Duration::from_nanos(250_000_001));
    }

    #[test]
    fn a_line_that_is_missing_is_named() {
        let error = between(LINES, "u-2", "c1").unwrap_err().to_string();
        assert!(error.contains("RunPodSandbox for … u-2"), "{error}");
        assert!(between(LINES, "u-1", "c2").is_err());
    }
}
