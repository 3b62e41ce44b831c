//! A μVM that runs.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use kiln_agent_api::proto;
use kiln_store::{Class, Lease};
use kiln_vmm_control::RefusalKind;
use tokio::sync::watch;

use crate::Error;
use crate::baked::Baked;
use crate::control::{Control, Figures};
use crate::disks::{DiskSlots, GuestDisk};
use crate::end::End;
use crate::guest::Agent;
use crate::machine::{Killer, Machine};
use crate::size::{MIB, Size};

/// How long the guest may take to give memory and vCPUs back.
const SHRINK_LIMIT_MS: u32 = 10_000;

/// How the growth to the size that was ordered went; `None` while it is under way.
pub(crate) type Grown = Option<Result<proto::ResourceState, String>>;

/// A running μVM. Dropping it ends it.
#[derive(Debug)]
pub struct Uvm {
    machine: Machine,
    agent: Agent,
    grown: watch::Receiver<Grown>,
    /// Held while a disk comes or goes: the VMM chooses among the same slots once those that were baked are in use.
    disks: tokio::sync::Mutex<DiskSlots>,
    class: Class,
    /// Held as long as the VMM maps the store's files.
    lease: Option<Lease>,
}

impl Uvm {
    pub(crate) fn new(
        machine: Machine,
        agent: Agent,
        grown: watch::Receiver<Grown>,
        baked: Baked,
    ) -> Uvm {
        Uvm {
            machine,
            agent,
            grown,
            disks: tokio::sync::Mutex::new(DiskSlots::new(
                baked.class.slots,
                baked.disks.iter().map(|(slot, _)| *slot),
            )),
            class: baked.class,
            lease: baked.lease,
        }
    }

    pub(crate) fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The VMM's process id.
    pub fn pid(&self) -> u32 {
        self.machine.pid()
    }

    /// The guest.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// What its VMM can be told.
    pub fn control(&self) -> &Control {
        self.machine.control()
    }

    /// What it was baked as.
    pub fn class(&self) -> &Class {
        &self.class
    }

    /// The baked μVM it was resumed from, if that is in a store.
    pub fn baked(&self) -> Option<&Lease> {
        self.lease.as_ref()
    }

    /// Waits until it has the size that was ordered.
    pub async fn grown(&self) -> Result<proto::ResourceState, Error> {
        let mut grown = self.grown.clone();
        let result = grown
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|known| known.clone());
        match result {
            Some(result) => result.map_err(Error::NotGrown),
            // Whoever was to tell is gone, as the μVM is then.
            None => Err(Error::Ended {
                action: "grow",
                end: self.ended().await,
            }),
        }
    }

    /// The machine as it is now.
    pub async fn figures(&self) -> Result<Figures, Error> {
        self.machine
            .call("read the μVM's figures", Control::figures)
            .await
    }

    async fn plugged(&self) -> Result<Size, Error> {
        let Figures { cpus, memory, .. } = self.figures().await?;
        Ok(Size { cpus, memory })
    }

    /// Gives the guest a disk, in a slot that was baked or else in a new one.
    pub async fn attach_disk(&self, image: File, read_only: bool) -> Result<GuestDisk, Error> {
        // A device's metadata has no size.
        let size = (&image)
            .seek(SeekFrom::End(0))
            .map_err(Error::system("read the size of a disk image"))?;
        let mut disks = self.disks.lock().await;
        let baked = disks.take();
        let attached = self
            .machine
            .call("attach a disk", move |vmm| {
                vmm.attach_disk(baked, &image, read_only)
            })
            .await;
        let slot = match (attached, baked) {
            (Ok(slot), _) => slot,
            (Err(error), Some(slot)) => {
                disks.put_back(slot);
                return Err(error);
            }
            (Err(error), None) if error.is_gone() => return Err(error),
            (Err(error), None) => return Err(Error::NoSlot(Box::new(error))),
        };
        Ok(GuestDisk {
            path: disks.path(slot),
            slot,
            size,
        })
    }

    /// Takes it away.
    pub async fn detach_disk(&self, disk: &GuestDisk) -> Result<(), Error> {
        let slot = disk.slot;
        let mut disks = self.disks.lock().await;
        self.machine
            .call("detach a disk", move |vmm| vmm.detach_disk(slot))
            .await?;
        disks.put_back(slot);
        Ok(())
    }

    /// Changes its size, but to no less than it was baked with. Memory that the guest cannot give back stays with it.
    pub async fn resize(&self, size: Size) -> Result<(), Error> {
        // Two resizes at once would undo one another.
        self.grown().await.map(drop).or_else(|error| match error {
            // One that could not have its first size may still get another one.
            Error::NotGrown(_) => Ok(()),
            error => Err(error),
        })?;
        let size = size.at_least(Size::of(&self.class));
        let now = self.plugged().await?;
        let most = size.at_least(now);
        if most != now {
            self.machine
                .call("grow the μVM", move |vmm| {
                    vmm.resize(most.cpus, most.memory, 0)
                })
                .await?;
            self.agent.set_resources(most.cpus, most.memory).await?;
        }
        if most == size {
            return Ok(());
        }
        // The guest lets go of CPUs before they are taken.
        self.agent.set_resources(size.cpus, 0).await?;
        let shrunk = self
            .machine
            .call("shrink the μVM", move |vmm| {
                vmm.resize(size.cpus, size.memory, SHRINK_LIMIT_MS)
            })
            .await;
        let left = self.plugged().await?;
        match shrunk {
            // The containers' limits hold all the same.
            Err(error) if error.refusal() == Some(RefusalKind::Busy) && left.cpus <= size.cpus => {
                tracing::warn!(
                    wanted_mib = size.memory / MIB,
                    left_mib = left.memory / MIB,
                    %error,
                    "the μVM did not give back all of its memory"
                );
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// What ends it now.
    pub fn killer(&self) -> Killer {
        self.machine.killer()
    }

    /// Asks the VMM to end the machine, and waits for that.
    pub async fn stop(&self) -> Result<(), Error> {
        self.machine.call("stop the guest", Control::stop).await
    }

    /// Comes back when it has ended.
    pub async fn ended(&self) -> End {
        self.machine.ended().await
    }
}
