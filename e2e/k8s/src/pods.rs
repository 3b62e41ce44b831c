//! What a pod's status says.

pub use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateTerminated, ContainerStatus, PodCondition, PodStatus,
};

/// The pod's phase; empty before it has one.
pub fn phase(pod: &Pod) -> &str {
    let status = pod.status.as_ref();
    status
        .and_then(|status| status.phase.as_deref())
        .unwrap_or("")
}

/// Why the pod is in its phase, such as `Evicted`.
pub fn reason(pod: &Pod) -> &str {
    let status = pod.status.as_ref();
    status
        .and_then(|status| status.reason.as_deref())
        .unwrap_or("")
}

/// Whether a condition of the pod is `True`.
pub fn has(pod: &Pod, condition: &str) -> bool {
    holding(pod, condition).is_some()
}

/// The reason of a condition of the pod that is `True`.
pub fn why<'a>(pod: &'a Pod, condition: &str) -> Option<&'a str> {
    holding(pod, condition)?.reason.as_deref()
}

fn holding<'a>(pod: &'a Pod, condition: &str) -> Option<&'a PodCondition> {
    let all = pod.status.as_ref()?.conditions.as_ref()?;
    all.iter()
        .find(|is| is.type_ == condition && is.status == "True")
}

/// Whether it is Ready.
pub fn is_ready(pod: &Pod) -> bool {
    has(pod, "Ready")
}

/// The status of a container of any kind.
pub fn container<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    let PodStatus {
        container_statuses,
        init_container_statuses,
        ephemeral_container_statuses,
        ..
    } = status;
    [
        container_statuses,
        init_container_statuses,
        ephemeral_container_statuses,
    ]
    .into_iter()
    .flatten()
    .flatten()
    .find(|status| status.name == name)
}

/// How often a container was started again.
pub fn restarts(pod: &Pod, name: &str) -> i32 {
    container(pod, name).map_or(0, |status| status.restart_count)
}

/// Whether a container runs.
pub fn is_running(pod: &Pod, name: &str) -> bool {
    state(pod, name).is_some_and(|state| state.running.is_some())
}

/// How a container ended, if it has.
pub fn terminated<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerStateTerminated> {
    state(pod, name)?.terminated.as_ref()
}

/// How a container ended the last time, if it was started again.
pub fn terminated_before<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerStateTerminated> {
    container(pod, name)?
        .last_state
        .as_ref()?
        .terminated
        .as_ref()
}

/// Why a container waits, such as `CrashLoopBackOff`; empty if it does not.
pub fn waits<'a>(pod: &'a Pod, name: &str) -> &'a str {
    let waiting = state(pod, name).and_then(|state| state.waiting.as_ref());
    waiting
        .and_then(|waiting| waiting.reason.as_deref())
        .unwrap_or("")
}

fn state<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerState> {
    container(pod, name)?.state.as_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(status: &serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({"status": status})).unwrap()
    }

    #[test]
    fn containers_of_every_kind_are_found_by_name() {
        let status = |name: &str| {
            serde_json::json!([{
                "name": name, "image": "", "imageID": "", "ready": true, "restartCount": 2,
                "state": {"running": {}},
            }])
        };
        let pod = pod(&serde_json::json!({
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "False"}, {"type": "PodScheduled", "status": "True"}],
            "containerStatuses": status("main"),
            "initContainerStatuses": status("init"),
            "ephemeralContainerStatuses": status("debugger"),
        }));
        for name in ["main", "init", "debugger"] {
            assert!(is_running(&pod, name), "{name}");
            assert_eq!(restarts(&pod, name), 2);
        }
        assert!(!is_running(&pod, "other"));
        assert!(!is_ready(&pod));
        assert!(has(&pod, "PodScheduled"));
    }

    #[test]
    fn a_pod_without_a_status_is_in_no_phase() {
        let pod = Pod::default();
        assert_eq!(
            (phase(&pod), reason(&pod), waits(&pod, "main")),
            ("", "", "")
        );
        assert!(terminated(&pod, "main").is_none());
    }
}
