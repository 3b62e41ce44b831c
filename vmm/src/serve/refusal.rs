//! What kind of refusal an error is told as. The only place that knows both.

use std::error::Error;
use std::io;

use kiln_overlay::BudgetError;
use kiln_vmm::cpu::CpuError;
use kiln_vmm::devices::block::FileError;
use kiln_vmm::devices::net::TapError;
use kiln_vmm::machine::MachineError;
use kiln_vmm::memory::MemoryError;
use kiln_vmm::snapshot::{HeaderError, SnapshotError};
use kiln_vmm::virtio::pci::TransportError;
use kiln_vmm::virtio::{DeviceError, StateError};
use kiln_vmm_control::RefusalKind;
use kiln_vmm_control::api::Reply;

/// A request that can't be meant as it is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// Nothing runs yet.
    #[error("the first request has to be Boot or Resume")]
    NoMachine,
    /// Something runs.
    #[error("there is a machine already")]
    SecondMachine,
    /// The machine runs and may not.
    #[error("the machine has to be paused for that to be saved")]
    NotPaused,
    /// None, or more than can be.
    #[error("a plugged network card wants a tap for each of its queue pairs")]
    Taps,
    /// An index without a descriptor, or one that was taken.
    #[error("descriptor {0} did not come with the request")]
    Descriptor(u8),
    /// A second directory.
    #[error("there can be one folder only")]
    SecondFolder,
    /// Overlays have nothing to draw on.
    #[error("the first overlay has to bring the pool")]
    NoPool,
    /// Overlays draw on one pool.
    #[error("there is a pool already; use LimitOverlays to change it")]
    SecondPool,
    /// Nothing to set limits of.
    #[error("there is no overlay")]
    NoOverlay,
}

/// The reply to a request that failed.
pub(super) fn of(error: &anyhow::Error) -> Reply {
    Reply::Refused {
        kind: error.chain().find_map(kind).unwrap_or(RefusalKind::Failed),
        why: format!("{error:#}"),
    }
}

/// What one error of a chain says; nothing if only its cause can.
fn kind(error: &(dyn Error + 'static)) -> Option<RefusalKind> {
    use RefusalKind::{Busy, Corrupt, Foreign, NoSpace, Usage};
    if error.is::<RequestError>() {
        return Some(Usage);
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            HeaderError::Short(_) | HeaderError::Magic | HeaderError::Damaged { .. } => {
                Some(Corrupt)
            }
            HeaderError::Version { .. } | HeaderError::Unknown { .. } | HeaderError::Cpu(_) => {
                Some(Foreign)
            }
        };
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            SnapshotError::Body(_)
            | SnapshotError::Contradiction(_)
            | SnapshotError::Memory(_)
            | SnapshotError::MemoryLength { .. } => Some(Corrupt),
            SnapshotError::NotEmpty(_) => Some(Usage),
            SnapshotError::Header(_) | SnapshotError::Io { .. } => None,
        };
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            MachineError::Damaged(_) | MachineError::SavedConfig(_) => Some(Corrupt),
            MachineError::Busy(_) => Some(Busy),
            MachineError::Usage(_) | MachineError::Config(_) => Some(Usage),
            MachineError::Memory(_)
            | MachineError::Boot(_)
            | MachineError::Acpi(_)
            | MachineError::Cpu(_)
            | MachineError::Transport(_)
            | MachineError::Device { .. }
            | MachineError::Tap { .. }
            | MachineError::Disk { .. }
            | MachineError::Kvm { .. }
            | MachineError::Io { .. } => None,
        };
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            MemoryError::Size { .. } => Some(Usage),
            MemoryError::Damaged(_) => Some(Corrupt),
            MemoryError::Map { .. } | MemoryError::Regions(_) | MemoryError::Slot { .. } => None,
        };
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            CpuError::Msr { .. } => Some(Foreign),
            // What another KVM, or another microcode, was given is no value here.
            CpuError::Restore { source, .. } if source.errno() == libc::EINVAL => Some(Foreign),
            _ => None,
        };
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            TransportError::Mismatch { .. } => Some(Foreign),
            TransportError::Device { .. } => None,
        };
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            DeviceError::Busy(_) => Some(Busy),
            DeviceError::Usage(_) => Some(Usage),
            DeviceError::Driver(_) | DeviceError::Io { .. } | DeviceError::State(_) => None,
        };
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            StateError::Version { .. } => Some(Foreign),
            StateError::Kind { .. } | StateError::Damaged { .. } => Some(Corrupt),
        };
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            FileError::Kind | FileError::Access(_) => Some(Usage),
            FileError::Inspect { .. } => None,
        };
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            TapError::Flags { .. } => Some(Usage),
            TapError::Call { .. } => None,
        };
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            kiln_overlay::Error::OutOfRange { .. } | kiln_overlay::Error::Misaligned { .. } => {
                Some(Usage)
            }
            kiln_overlay::Error::NoSpace => Some(NoSpace),
            _ => None,
        };
    }
    if let Some(error) = error.downcast_ref() {
        return match error {
            BudgetError::Full => Some(Busy),
            BudgetError::Format | BudgetError::Slot(_) | BudgetError::Descriptors(_) => Some(Usage),
            BudgetError::File { .. } => None,
        };
    }
    match error.downcast_ref::<io::Error>()?.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some(NoSpace),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs::{File, OpenOptions};

    use anyhow::Context;
    use kiln_vmm::devices::block::{Block, BlockConfig, FileBackend};
    use kiln_vmm::machine::{DeviceKind, DeviceSpec, MachineConfig};
    use kiln_vmm::memory::MemoryShape;
    use kiln_vmm::snapshot::{self, Header};

    use crate::ends::Fds;

    const STATE: &[u8] = include_bytes!("../../tests/golden/state-v2.bin");
    const OLD_STATE: &[u8] = include_bytes!("../../tests/golden/state-v1.bin");

    fn kind_of<T: std::fmt::Debug>(result: Result<T, impl Into<anyhow::Error>>) -> RefusalKind {
        let error = result.unwrap_err().into().context("resuming");
        let whole = format!("{error:#}");
        let Reply::Refused { kind, why } = of(&error) else {
            panic!("{error:?} is no refusal");
        };
        assert_eq!(why, whole);
        kind
    }

    #[test]
    fn state_of_another_version_or_cpu_is_foreign() {
        let old = snapshot::decode(OLD_STATE);
        assert_eq!(kind_of(old), RefusalKind::Foreign);
        let (mut header, body) = Header::parse(STATE).unwrap();
        header.cpu.0[4] ^= !0;
        let other = [&header.to_bytes(), body].concat();
        assert_eq!(kind_of(snapshot::decode(&other)), RefusalKind::Foreign);
    }

    #[test]
    fn damaged_files_are_corrupt() {
        let (header, _) = Header::parse(STATE).unwrap();
        let short = snapshot::decode(&STATE[..STATE.len() - 1]);
        assert_eq!(kind_of(short), RefusalKind::Corrupt);
        let mut flipped = STATE.to_vec();
        flipped[600] ^= 1;
        assert_eq!(kind_of(snapshot::decode(&flipped)), RefusalKind::Corrupt);
        let memory = tempfile::tempfile().unwrap();
        let short = snapshot::check_memory_file(&header, &memory);
        assert_eq!(kind_of(short), RefusalKind::Corrupt);
    }

    #[test]
    fn full_disk_is_no_space() {
        let mut full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let state = snapshot::write_file(&mut full, STATE);
        assert_eq!(kind_of(state), RefusalKind::NoSpace);
        let memory = snapshot::write_memory(&full, &[&[1; 4096]]);
        assert_eq!(kind_of(memory), RefusalKind::NoSpace);
        let quota = Err::<(), _>(io::Error::from_raw_os_error(libc::EDQUOT));
        assert_eq!(kind_of(quota), RefusalKind::NoSpace);
    }

    #[test]
    fn slot_in_use_is_busy() {
        let disk = || {
            let file = tempfile::tempfile().unwrap();
            file.set_len(4096).unwrap();
            Box::new(FileBackend::new(file, false).unwrap())
        };
        let mut block = Block::new(&BlockConfig {
            id: "data".to_owned(),
            queues: 1,
            queue_size: 128,
            read_only: false,
        });
        block.attach(disk()).unwrap();
        let again = block.attach(disk());
        let again = again.map_err(|source| MachineError::Device { slot: 4, source });
        assert_eq!(kind_of(again), RefusalKind::Busy);
    }

    #[test]
    fn what_can_not_be_meant_is_usage() {
        let absent = Fds::new(Vec::new()).file(3);
        assert_eq!(kind_of(absent), RefusalKind::Usage);
        let device = DeviceSpec {
            slot: 4,
            kind: DeviceKind::Rng,
        };
        let config = MachineConfig {
            boot_cpus: 1,
            max_cpus: 1,
            memory: MemoryShape {
                ram: 64 << 20,
                hotplug: 0,
                usable: 0,
            },
            serial: false,
            devices: vec![device.clone(), device],
        };
        let twice = config.check().map_err(MachineError::from);
        assert_eq!(kind_of(twice), RefusalKind::Usage);
        let folder = File::open("/").unwrap();
        let disk = FileBackend::new(folder, true);
        let disk = disk.map_err(|source| MachineError::Disk { slot: 4, source });
        assert_eq!(kind_of(disk), RefusalKind::Usage);
    }

    #[test]
    fn anything_else_is_a_failure() {
        let folder = snapshot::read_file(&mut File::open("/").unwrap());
        assert_eq!(kind_of(folder), RefusalKind::Failed);
        let dead = Err::<(), _>(anyhow::anyhow!("a thread died")).context("making the VM");
        assert_eq!(kind_of(dead), RefusalKind::Failed);
    }
}
