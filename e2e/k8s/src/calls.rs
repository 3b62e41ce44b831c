//! CRI's calls as kubelet made them: containerd's log says when each came and when it was answered.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::jiff::Timestamp;

/// containerd's log on a node VM.
const LOG: &str = "/var/log/containerd.log";
/// How its lines end that tell of an answer.
const SUCCESS: &str = "returns successfully";
/// What stands before a new sandbox's id.
const SANDBOX: &str = "returns sandbox id";

/// From the request for a pod's sandbox to the answer that a container of it is started.
pub fn sandbox_to_start(uid: &str, container: &str) -> Result<Duration> {
    let log = fs::read_to_string(LOG).context(LOG)?;
    between(&log, uid, container)
}

/// From the request to stop a pod's container to the answer that its sandbox is stopped.
pub fn stop_to_stopped(uid: &str, container: &str) -> Result<Duration> {
    let log = fs::read_to_string(LOG).context(LOG)?;
    until_stopped(&log, uid, container)
}

fn between(log: &str, uid: &str, container: &str) -> Result<Duration> {
    let asked = ["RunPodSandbox for", uid];
    took(log, &asked, &["StartContainer for", container, SUCCESS])
}

fn until_stopped(log: &str, uid: &str, container: &str) -> Result<Duration> {
    let line = line_of(log, &["RunPodSandbox for", uid, SANDBOX])?;
    let id = line.split(SANDBOX).nth(1).unwrap_or_default();
    let id: String = id.chars().filter(char::is_ascii_alphanumeric).collect();
    let asked = ["StopContainer for", container];
    took(log, &asked, &["StopPodSandbox for", &id, SUCCESS])
}

/// The time between the first lines that have these parts.
fn took(log: &str, asked: &[&str], answered: &[&str]) -> Result<Duration> {
    let took = time_of(log, answered)?.duration_since(time_of(log, asked)?);
    took.try_into().with_context(|| {
        let [answered, asked] = [answered, asked].map(|parts| parts.join(" … "));
        format!("{answered} is in {LOG} before {asked}")
    })
}

/// The first line that has all these parts.
fn line_of<'a>(log: &'a str, parts: &[&str]) -> Result<&'a str> {
    log.lines()
        .find(|line| parts.iter().all(|part| line.contains(part)))
        .with_context(|| format!("no line in {LOG} has {}", parts.join(" … ")))
}

/// When the first line was written that has all these parts.
fn time_of(log: &str, parts: &[&str]) -> Result<Timestamp> {
    let line = line_of(log, parts)?;
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
time="2026-11-30T13:00:02.250000000Z" level=info msg="RunPodSandbox for name:\"pod\" uid:\"u-1\" returns sandbox id \"5b\""
time="2026-11-30T13:00:02.300000000Z" level=info msg="StartContainer for \"c1\""
time="2026-11-30T13:00:02.350000001Z" level=info msg="StartContainer for \"c1\" returns successfully"
time="2026-11-30T13:00:03.100000000Z" level=info msg="StopContainer for \"c1\" with timeout 30 (s)"
time="2026-11-30T13:00:03.300000000Z" level=info msg="StopPodSandbox for \"5b\""
time="2026-11-30T13:00:03.350000000Z" level=info msg="StopPodSandbox for \"5b\" returns successfully"
"#;

    #[test]
    fn time_is_that_between_the_pods_own_lines() {
        let took = between(LINES, "u-1", "c1").unwrap();
        assert_eq!(took, Duration::from_nanos(250_000_001));
        let took = until_stopped(LINES, "u-1", "c1").unwrap();
        assert_eq!(took, Duration::from_millis(250));
    }

    #[test]
    fn a_line_that_is_missing_is_named() {
        let error = between(LINES, "u-2", "c1").unwrap_err().to_string();
        assert!(error.contains("RunPodSandbox for … u-2"), "{error}");
        assert!(between(LINES, "u-1", "c2").is_err());
    }
}
