//! `Update`: a container's limits, and with them the size of the μVM.

use serde::Deserialize;
use serde_json::Value;

use super::{Kind, Launched, Pod, lock};
use crate::cgroup;
use crate::error::{Error, Result};
use crate::refusal;
use crate::size::{Limits, Resources, size_of};
use crate::uvm::Uvm;
use kiln_uvm::size::Size;

impl Pod {
    /// Changes a container's limits to an OCI `LinuxResources` (JSON). The μVM grows before the
    /// limits do and shrinks after them, so that the limits are never more than there is.
    pub async fn update(&self, id: &str, resources: &[u8]) -> Result<()> {
        let container = self.container(id)?;
        let wrong = |e| Error::InvalidArgument(format!("the resources of container {id}: {e}"));
        let written: Value = serde_json::from_slice(resources).map_err(wrong)?;
        refusal::check_resources(&written)?;
        let parsed = Resources::deserialize(&written).map_err(wrong)?;
        let uvm = self.uvm()?;
        let limits = merge(container.limits(), parsed.limits());
        let wanted = self.size_with(id, container.kind, limits);
        let now = self.size();
        if let (Some(wanted), Some(now)) = (wanted, now) {
            let grown = Size {
                cpus: wanted.cpus.max(now.cpus),
                memory: wanted.memory.max(now.memory),
            };
            if grown != now {
                uvm.resize(grown).await?;
                self.set_size(grown);
            }
        }
        if container.kind == Kind::Guest {
            uvm.guest().update(id, resources.to_vec()).await?;
        }
        *lock(&container.limits) = limits;
        if let (Some(wanted), Some(now)) = (wanted, self.size())
            && wanted != now
        {
            uvm.resize(wanted).await?;
            self.set_size(wanted);
        }
        Ok(())
    }

    /// Makes room for a container without limits in a pod that others have limits in.
    pub(super) async fn make_room(&self, uvm: &dyn Uvm, mut limits: Limits) -> Result<()> {
        let wanted = {
            let launched = lock(&self.setup);
            let Some(Launched {
                setup,
                asked,
                overrides,
            }) = launched.as_ref()
            else {
                return Ok(());
            };
            // Most containers have what the sandbox said, and their start need not ask the kernel.
            if asked.with_room_for(limits, &self.config) == *asked {
                return Ok(());
            }
            // One that was added to a pod whose limits are set, such as a debugger, has its part of these.
            let is_set = |file| cgroup::pod_has_limit(setup.cgroup.as_deref().unwrap_or(""), file);
            if is_set("memory.max") {
                limits.memory = asked.memory;
            }
            if is_set("cpu.max") {
                (limits.cpu_quota, limits.cpu_period) = (asked.cpu_quota, asked.cpu_period);
            }
            let room = asked.with_room_for(limits, &self.config);
            let wanted = size_of(room, overrides, &self.config).at_least(setup.size);
            if wanted == setup.size {
                return Ok(());
            }
            wanted
        };
        uvm.resize(wanted).await?;
        self.set_size(wanted);
        Ok(())
    }

    fn size(&self) -> Option<Size> {
        lock(&self.setup).as_ref().map(|l| l.setup.size)
    }

    fn set_size(&self, size: Size) {
        if let Some(launched) = lock(&self.setup).as_mut() {
            launched.setup.size = size;
        }
    }

    /// The size the μVM should have if the container had these limits. `None` leaves it alone:
    /// with an unlimited container in the pod the sum says nothing.
    fn size_with(&self, id: &str, kind: Kind, limits: Limits) -> Option<Size> {
        let overrides = lock(&self.setup).as_ref()?.overrides.clone();
        if kind == Kind::Pause {
            return Some(size_of(limits, &overrides, &self.config));
        }
        let sum = lock(&self.containers)
            .values()
            .filter(|c| c.kind == Kind::Guest && c.id != id)
            .map(|c| c.limits())
            .fold(limits, Limits::plus);
        let now = self.size()?;
        let mut size = size_of(sum, &overrides, &self.config);
        if sum.cpu_quota <= 0 && overrides.cpus.is_none() {
            size.cpus = now.cpus;
        }
        if sum.memory <= 0 && overrides.memory.is_none() {
            size.memory = now.memory;
        }
        Some(size)
    }
}

/// An update leaves alone what it doesn't mention.
fn merge(old: Limits, new: Limits) -> Limits {
    Limits {
        cpu_quota: if new.cpu_quota == 0 {
            old.cpu_quota
        } else {
            new.cpu_quota
        },
        cpu_period: if new.cpu_period == 0 {
            old.cpu_period
        } else {
            new.cpu_period
        },
        memory: if new.memory == 0 {
            old.memory
        } else {
            new.memory
        },
    }
}
