//! A pod's life, from the API server's side.

use anyhow::Result;
use kiln_e2e::cases;
use kiln_k8s::Test;

use super::{Case, same};

pub(crate) fn cases() -> Vec<Case> {
    cases![pod_gets_ready_and_its_log_is_followed]
}

async fn pod_gets_ready_and_its_log_is_followed(test: Test) -> Result<()> {
    test.run(
        r#"
containers:
- name: main
  command: [sh, -c, "echo one; until [ -e /tmp/go ]; do sleep 0.2; done; echo two"]
restartPolicy: Never
"#,
    )
    .await?;
    let kubectl = test.kubectl();
    let follow = kubectl.run(&["logs", "--follow", "pod"]);
    let (log, ()) = tokio::try_join!(follow, async {
        test.logged("pod", None, "one").await?;
        test.exec("touch /tmp/go").await.map(drop)
    })?;
    same!(log, "one\ntwo\n");
    test.ended("pod").await.map(drop)
}
