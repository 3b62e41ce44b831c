//! What a container may not ask its kernel, and that the rest still works.

use anyhow::{Result, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::{ContainerSpec, Test, cases};

use super::kiln_run::Kiln;
use super::same;

pub(crate) fn cases() -> Vec<Case> {
    let mut all = cases![default_profile_refuses_namespaces_and_lets_programs_run];
    all.extend(
        cases![containers_of_kiln_run_have_a_profile]
            .into_iter()
            .map(|case| case.only_with("kiln", "run")),
    );
    all
}

/// Makes processes by every way that a shell has, then asks for a namespace.
const SCRIPT: &str = "echo $(echo one) | cat; (echo two); sleep 0 & wait; \
                      unshare -U true 2>/dev/null && echo unshared; grep Seccomp: /proc/self/status";

async fn default_profile_refuses_namespaces_and_lets_programs_run(test: Test) -> Result<()> {
    let pod = test.pod().await?;
    let spec = ContainerSpec::shell("main", SCRIPT).default_seccomp();
    let (code, log) = pod.finish(&spec).await?;
    same!(code, 0);
    let lines = log.stdout()?;
    same!(lines, ["one", "two", "Seccomp:\t2"]);
    // A process beside the first one is no freer.
    let spec = ContainerSpec::pause("beside").default_seccomp();
    let container = pod.start(&spec).await?;
    same!(container.shell(SCRIPT).await?, "one\ntwo\nSeccomp:\t2");
    Ok(())
}

async fn containers_of_kiln_run_have_a_profile(test: Test) -> Result<()> {
    let kiln = Kiln::new(&test)?;
    same!(kiln.shell(&[], SCRIPT).await?, "one\ntwo\nSeccomp:\t2\n");
    let free = kiln.shell(&["--seccomp", "unconfined"], SCRIPT).await?;
    ensure!(free.ends_with("Seccomp:\t0\n"), "{free}");
    let profile = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls":
        [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}"#;
    let profile = test.write("profile.json", profile)?.display().to_string();
    let script = "mkdir /tmp/x 2>&1; cat < /dev/null && echo else";
    let text = kiln.shell(&["--seccomp", &profile], script).await?;
    ensure!(
        text.contains("No space left on device") && text.ends_with("else\n"),
        "{text}"
    );
    Ok(())
}
