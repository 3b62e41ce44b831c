//! What a pod's security context asks for, as the container sees it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use kiln_e2e::cases;
use kiln_k8s::Test;

use super::{Case, same};

pub(crate) fn cases() -> Vec<Case> {
    cases![
        users_and_groups_are_as_asked,
        privileges_are_as_asked.short(),
        seccomp_profiles_are_applied,
        sysctls_are_set_for_the_pod,
        shared_process_namespace_is_shared.short(),
    ]
}

async fn users_and_groups_are_as_asked(test: Test) -> Result<()> {
    let log = test
        .finish(
            r#"
restartPolicy: Never
securityContext: {runAsUser: 1000, runAsGroup: 3000, fsGroup: 2000, supplementalGroups: [4000], runAsNonRoot: true}
volumes: [{name: empty, emptyDir: {}}]
containers:
- name: main
  command: [sh, -c, "id -u; id -g; id -G; touch /empty/file; stat -c '%u %g' /empty/file; touch /root/file 2>/dev/null || echo refused"]
  volumeMounts: [{name: empty, mountPath: /empty}]
"#,
        )
        .await?;
    let lines: Vec<_> = log.lines().collect();
    let [user, group, groups, file, refused] = lines[..] else {
        anyhow::bail!("{log:?}");
    };
    same!(
        (user, group, file, refused),
        ("1000", "3000", "1000 2000", "refused")
    );
    for id in ["2000", "3000", "4000"] {
        ensure!(groups.split(' ').any(|group| group == id), "{groups}");
    }
    Ok(())
}

/// Prints what the kernel says of this process's privileges, a name and a value a line.
const STATUS: &str = "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status";

fn value<'a>(log: &'a str, name: &str) -> Result<&'a str> {
    let line = log.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|rest| rest.strip_prefix(':'));
    value
        .map(str::trim)
        .with_context(|| format!("no {name} in {log:?}"))
}

fn capabilities(log: &str, name: &str) -> Result<u64> {
    Ok(u64::from_str_radix(value(log, name)?, 16)?)
}

async fn privileges_are_as_asked(test: Test) -> Result<()> {
    const CHOWN: u64 = 1 << 0;
    const NET_RAW: u64 = 1 << 13;
    const SYS_TIME: u64 = 1 << 25;
    const POD: &str = r#"
restartPolicy: Never
containers:
- name: plain
  command: [sh, -c, "${STATUS}; touch /file && echo written"]
- name: bound
  command: [sh, -c, "${STATUS}; touch /file 2>/dev/null || echo refused"]
  securityContext:
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL], add: [NET_RAW]}
- name: more
  command: [sh, -c, "${STATUS}"]
  securityContext: {capabilities: {add: [SYS_TIME], drop: [CHOWN]}}
"#;
    test.apply_with(POD, &[("STATUS", STATUS)]).await?;
    test.ended("pod").await?;
    let plain = test.log("pod", Some("plain")).await?;
    ensure!(capabilities(&plain, "CapEff")? & CHOWN != 0, "{plain}");
    ensure!(capabilities(&plain, "CapEff")? & SYS_TIME == 0, "{plain}");
    same!(value(&plain, "NoNewPrivs")?, "0");
    ensure!(plain.ends_with("written\n"), "{plain}");
    let bound = test.log("pod", Some("bound")).await?;
    same!(capabilities(&bound, "CapEff")?, NET_RAW);
    same!(capabilities(&bound, "CapBnd")?, NET_RAW);
    same!(value(&bound, "NoNewPrivs")?, "1");
    ensure!(bound.ends_with("refused\n"), "{bound}");
    let more = test.log("pod", Some("more")).await?;
    let has = capabilities(&more, "CapEff")?;
    ensure!(has & SYS_TIME != 0 && has & CHOWN == 0, "{more}");
    Ok(())
}

/// Where kubelet looks for profiles.
const PROFILES: &str = "/var/lib/kubelet/seccomp";

async fn seccomp_profiles_are_applied(test: Test) -> Result<()> {
    let profile = Path::new(PROFILES).join(format!("{}.json", test.namespace()));
    fs::create_dir_all(PROFILES)?;
    fs::write(
        &profile,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}"#,
    )?;
    let log = test
        .apply_with(
            r#"
restartPolicy: Never
containers:
- name: none
  command: [sh, -c, "${STATUS}"]
  securityContext: {seccompProfile: {type: Unconfined}}
- name: default
  command: [sh, -c, "${STATUS}; mkdir /made && echo made"]
  securityContext: {seccompProfile: {type: RuntimeDefault}}
- name: local
  command: [sh, -c, "${STATUS}; mkdir /made 2>/dev/null || echo refused"]
  securityContext: {seccompProfile: {type: Localhost, localhostProfile: "${NAMESPACE}.json"}}
"#,
            &[("STATUS", STATUS)],
        )
        .await;
    let ended = match log {
        Ok(()) => test.ended("pod").await.map(drop),
        failed => failed,
    };
    fs::remove_file(&profile)?;
    ended?;
    let none = test.log("pod", Some("none")).await?;
    same!(value(&none, "Seccomp")?, "0");
    let default = test.log("pod", Some("default")).await?;
    same!(value(&default, "Seccomp")?, "2");
    ensure!(default.ends_with("made\n"), "{default}");
    let local = test.log("pod", Some("local")).await?;
    same!(value(&local, "Seccomp")?, "2");
    ensure!(local.ends_with("refused\n"), "{local}");
    Ok(())
}

async fn sysctls_are_set_for_the_pod(test: Test) -> Result<()> {
    let log = test
        .finish(
            r#"
restartPolicy: Never
securityContext:
  sysctls:
  - {name: kernel.shm_rmid_forced, value: "1"}
  - {name: net.ipv4.ip_local_port_range, value: "2000 3000"}
  # Those that are safe come for themselves; this one the node allows.
  - {name: net.core.somaxconn, value: "1234"}
containers:
- name: main
  command: [sh, -c, "cd /proc/sys; cat kernel/shm_rmid_forced net/core/somaxconn net/ipv4/ip_local_port_range"]
"#,
        )
        .await?;
    let words: Vec<_> = log.split_whitespace().collect();
    same!(words, ["1", "1234", "2000", "3000"]);
    Ok(())
}

async fn shared_process_namespace_is_shared(test: Test) -> Result<()> {
    let log = test
        .finish(
            r#"
restartPolicy: Never
shareProcessNamespace: true
initContainers:
- name: beside
  restartPolicy: Always
  command: [testprog, pause, beside]
containers:
- name: main
  command:
  - sh
  - -c
  - |
    until ps | grep -q 'testprog pause besid[e]'; do sleep 0.2; done
    # Kubernetes makes one dollar sign of two.
    [ $$$$ -ne 1 ] && echo not the first
    # What nobody waits for is waited for by the first process, or stays as a zombie.
    (sleep 0.1 & echo $! > /tmp/orphan)
    while [ -e /proc/$(cat /tmp/orphan) ]; do sleep 0.2; done
    echo reaped
"#,
        )
        .await?;
    same!(log, "not the first\nreaped\n");
    Ok(())
}
