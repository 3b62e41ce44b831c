//! What the node has in place of a container's processes: one that stands for it.

use std::path::Path;
use std::sync::Arc;

use kiln_agent_api::proto::PidNamespace as Namespace;

use super::{Kind, Phase, Pod, lock};
use crate::error::Result;
use crate::refusal;
use crate::spec::{PidNamespace, Spec};
use crate::stand_in::StandIn;
use crate::uvm::Uvm;

/// Whose namespace a path on the node names.
#[derive(Debug, PartialEq, Eq)]
enum Owner {
    Pod,
    Container(String),
}

impl Pod {
    /// Starts a process that stands for a container, or for the pod itself. Whoever kills it ends what it stands for.
    pub(super) fn stand_in(self: &Arc<Self>, uvm: &dyn Uvm, id: &str) -> Result<StandIn> {
        let stand_in = uvm.stand_in(id)?;
        match stand_in.ended() {
            Ok(ended) => {
                let (pod, id) = (Arc::clone(self), id.to_owned());
                tokio::spawn(async move {
                    ended.await;
                    pod.stand_in_ended(&id).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, id, "killing the process that stands for it will not end it");
            }
        }
        Ok(stand_in)
    }

    /// It has mostly been ended here, because what it stands for has ended.
    async fn stand_in_ended(&self, id: &str) {
        let Some(uvm) = self.uvm.get() else { return };
        let container = self.container(id).ok();
        if self.ended.borrow().is_some()
            || container
                .as_ref()
                .is_some_and(|c| c.init.phase() == Phase::Stopped)
        {
            return;
        }
        match container {
            Some(container) if container.kind == Kind::Guest => {
                tracing::info!(
                    id,
                    "somebody killed the process that stands for the container"
                );
                if let Err(error) = uvm.guest().kill(id, "", 9, false).await {
                    tracing::warn!(%error, id, "the container could not be killed");
                }
            }
            None if id != self.id => {}
            _ => {
                tracing::info!(id, "somebody killed the process that stands for the pod");
                uvm.stop().await;
            }
        }
    }

    /// Which PID namespace the guest is to put a container in, and the container whose it is, if it is one's.
    pub(super) fn pid_namespace(&self, spec: &Spec) -> Result<(Namespace, String)> {
        for (kind, path, process) in spec.shared_namespaces() {
            self.owner(kind, &path, process)?;
        }
        let owner = match spec.pid_namespace() {
            PidNamespace::Own => return Ok((Namespace::PID_OWN, String::new())),
            // The node's owner lets it mean that.
            PidNamespace::Host => Owner::Pod,
            PidNamespace::Of(pid) => {
                let path = format!("/proc/{pid}/ns/pid");
                self.owner("pid", Path::new(&path), Some(pid))?
            }
            PidNamespace::Other(path) => self.owner("pid", &path, None)?,
        };
        Ok(match owner {
            Owner::Pod => (Namespace::PID_POD, String::new()),
            Owner::Container(id) => (Namespace::PID_CONTAINER, id),
        })
    }

    fn owner(&self, kind: &str, path: &Path, process: Option<u32>) -> Result<Owner> {
        let foreign = || refusal::foreign_namespace(kind, &path.display().to_string());
        let pid = process.ok_or_else(foreign)?;
        let of_sandbox = lock(&self.sandbox).as_ref().map(|sandbox| sandbox.pid());
        if of_sandbox == Some(pid) {
            return Ok(Owner::Pod);
        }
        let containers = lock(&self.containers);
        let owner = containers.values().find(|c| c.is_process(pid));
        match owner.ok_or_else(foreign)? {
            container if container.kind == Kind::Pause => Ok(Owner::Pod),
            container => Ok(Owner::Container(container.id.clone())),
        }
    }
}
