//! What the Sandbox service asks of a pod.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kiln_agent_api::{GUEST_FILES, proto};

use super::{Launched, Pod, lock};
use crate::error::{Error, Result};
use crate::events::Exit;
use crate::oom;
use crate::refusal;
use crate::rootfs::POD_FILES;
use crate::size::{Limits, size_of};
use crate::stand_in::StandIn;
use crate::time::UnixNanos;
use crate::uvm::{PodSetup, Uvm};
use kiln_node::config::PodOverrides;

/// How long containerd has to read the last answer before its connection is closed.
const ANSWER_TIME: Duration = Duration::from_millis(50);

/// What `CreateSandbox` is asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SandboxRequest {
    /// The sandbox's id.
    pub id: String,
    /// The pod's network namespace; empty: the host's.
    pub netns: Option<PathBuf>,
    /// The kinds of namespaces of which it asks for the node's.
    pub host_namespaces: Vec<&'static str>,
    /// The pod's host name.
    pub hostname: String,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Sysctls.
    pub sysctls: BTreeMap<String, String>,
    /// The pod's limits.
    pub limits: Limits,
    /// The pod's cgroup.
    pub cgroup_parent: Option<String>,
    /// Where names are looked up; nothing of it is set: as on the host.
    pub dns: Dns,
}

/// How a pod looks up names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// Servers.
    pub servers: Vec<String>,
    /// Domains that are searched.
    pub searches: Vec<String>,
    /// Options of the resolver.
    pub options: Vec<String>,
}

impl Dns {
    /// As `/etc/resolv.conf` has it; `None` if nothing is set.
    fn resolv_conf(&self) -> Option<String> {
        let mut text = String::new();
        if !self.searches.is_empty() {
            text += &format!("search {}\n", self.searches.join(" "));
        }
        for server in &self.servers {
            text += &format!("nameserver {server}\n");
        }
        if !self.options.is_empty() {
            text += &format!("options {}\n", self.options.join(" "));
        }
        Some(text).filter(|text| !text.is_empty())
    }
}

/// A sandbox made through the Sandbox service.
#[derive(Debug)]
pub(super) struct Sandbox {
    launched: Launched,
    dns: Dns,
    started_at: Option<UnixNanos>,
    /// The process that stands for it on the node, once it is started.
    stand_in: Option<StandIn>,
}

impl Sandbox {
    /// Its process id on the node; 0 before it is started.
    pub(super) fn pid(&self) -> u32 {
        self.stand_in.as_ref().map_or(0, StandIn::pid)
    }
}

/// What `SandboxStatus` answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SandboxStatus {
    /// The process id on the host.
    pub pid: u32,
    /// When it was started.
    pub started_at: Option<UnixNanos>,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
}

impl SandboxStatus {
    /// Whether containers can be made in it.
    pub fn ready(&self) -> bool {
        self.started_at.is_some() && self.exit.is_none()
    }
}

impl Pod {
    /// `CreateSandbox`: notes what is wanted.
    pub fn create_sandbox(&self, request: SandboxRequest) -> Result<()> {
        self.check_sandbox_id(&request.id)?;
        if request.netns.is_none() {
            return Err(refusal::host_network().into());
        }
        let policy = self.config.host_namespaces;
        let refused = |kind: &&str| refusal::host_namespace(kind, policy);
        if let Some(refusal) = request.host_namespaces.iter().find_map(refused) {
            return Err(refusal.into());
        }
        let cgroup = request
            .cgroup_parent
            .map(|parent| format!("{parent}/{}", self.id));
        let setup = PodSetup {
            id: self.id.clone(),
            size: size_of(request.limits, &PodOverrides::default(), &self.config),
            overlay: self.config.overlay,
            overlay_flush: self.config.overlay_flush,
            hostname: request.hostname,
            netns: request.netns,
            sysctls: request.sysctls,
            oom_score_adj: oom::of_pod(cgroup.as_deref(), 0),
            cgroup,
        };
        let launched = self.with_overrides(setup, request.limits, &request.annotations)?;
        let mut sandbox = lock(&self.sandbox);
        if sandbox.is_some() {
            return Err(Error::AlreadyExists(format!("sandbox {}", self.id)));
        }
        *sandbox = Some(Sandbox {
            launched,
            dns: request.dns,
            started_at: None,
            stand_in: None,
        });
        Ok(())
    }

    /// `StartSandbox`: resumes the μVM.
    pub async fn start_sandbox(self: &Arc<Self>, id: &str) -> Result<SandboxStatus> {
        self.check_sandbox_id(id)?;
        let (launched, dns) = match lock(&self.sandbox).as_ref() {
            Some(sandbox) => (sandbox.launched.clone(), sandbox.dns.clone()),
            None => return Err(self.no_sandbox()),
        };
        let hostname = launched.setup.hostname.clone();
        let uvm = self.launch(launched).await?;
        write_files(uvm.as_ref(), &hostname, &dns).await?;
        let stand_in = self.stand_in(uvm.as_ref(), id)?;
        if let Some(sandbox) = lock(&self.sandbox).as_mut() {
            sandbox.stand_in.get_or_insert(stand_in);
            sandbox.started_at.get_or_insert_with(UnixNanos::now);
        }
        self.sandbox_status(id)
    }

    /// `SandboxStatus`.
    pub fn sandbox_status(&self, id: &str) -> Result<SandboxStatus> {
        self.check_sandbox_id(id)?;
        let sandbox = lock(&self.sandbox);
        let sandbox = sandbox.as_ref().ok_or_else(|| self.no_sandbox())?;
        Ok(SandboxStatus {
            pid: sandbox.pid(),
            started_at: sandbox.started_at,
            exit: *self.ended.borrow(),
        })
    }

    /// `WaitSandbox`.
    pub async fn wait_sandbox(&self, id: &str) -> Result<Exit> {
        self.sandbox_status(id)?;
        let mut ended = self.ended.subscribe();
        let exit = ended.wait_for(Option::is_some).await.ok().and_then(|e| *e);
        Ok(exit.unwrap_or_else(Exit::killed_now))
    }

    /// `StopSandbox`: ends the μVM, which ends all that runs in it.
    pub async fn stop_sandbox(&self, id: &str) -> Result<()> {
        self.sandbox_status(id)?;
        // A wanted end, told before the μVM's own end can be: status 0.
        let exit = Exit {
            status: 0,
            at: UnixNanos::now(),
        };
        self.set_ended(exit);
        if let Some(uvm) = self.uvm.get() {
            uvm.stop().await;
        }
        Ok(())
    }

    /// `ShutdownSandbox`: ends the sandbox and the shim.
    pub async fn shutdown_sandbox(&self, id: &str) -> Result<()> {
        self.check_sandbox_id(id)?;
        if lock(&self.sandbox).is_some() {
            self.stop_sandbox(id).await?;
        }
        lock(&self.sandbox).take();
        let shutdown = self.shutdown.clone();
        tokio::spawn(async move {
            // containerd takes an answer that comes with the connection's end for none, now and then.
            tokio::time::sleep(ANSWER_TIME).await;
            shutdown.send_replace(true);
        });
        Ok(())
    }

    /// `SandboxMetrics`.
    pub async fn sandbox_stats(
        &self,
        id: &str,
    ) -> Result<(proto::StatsResponse, proto::NetworkState)> {
        self.sandbox_status(id)?;
        self.usage("").await
    }

    fn check_sandbox_id(&self, id: &str) -> Result<()> {
        if id == self.id {
            return Ok(());
        }
        Err(Error::NotFound(format!(
            "sandbox {id} (this shim serves {})",
            self.id
        )))
    }

    fn no_sandbox(&self) -> Error {
        Error::NotFound(format!("sandbox {}", self.id))
    }
}

/// Writes what containerd makes for its own sandboxes only, and binds into containers from there.
async fn write_files(uvm: &dyn Uvm, hostname: &str, dns: &Dns) -> Result<()> {
    let of_host = |path, otherwise: &str| {
        std::fs::read_to_string(path).unwrap_or_else(|_| otherwise.to_owned())
    };
    let files = [
        of_host("/etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost\n"),
        format!("{hostname}\n"),
        dns.resolv_conf()
            .unwrap_or_else(|| of_host("/etc/resolv.conf", "")),
    ];
    for (name, text) in POD_FILES.iter().zip(files) {
        uvm.guest()
            .write_file(format!("{GUEST_FILES}/{name}"), text)
            .await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_has_what_was_asked_for_and_is_the_hosts_otherwise() {
        let list = |items: &[&str]| items.iter().map(|i| (*i).to_owned()).collect();
        let dns = Dns {
            servers: list(&["10.96.0.10", "fd00::a"]),
            searches: list(&["default.svc.cluster.local", "cluster.local"]),
            options: list(&["ndots:5"]),
        };
        assert_eq!(
            dns.resolv_conf().unwrap(),
            "search default.svc.cluster.local cluster.local\nnameserver 10.96.0.10\n\
             nameserver fd00::a\noptions ndots:5\n"
        );
        assert_eq!(Dns::default().resolv_conf(), None);
    }
}
