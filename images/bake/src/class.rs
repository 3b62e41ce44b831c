//! The machine of a size class, with the devices every baked μVM has.

use kiln_agent_api::slots;
use kiln_store::Class;
use kiln_uvm::{DeviceKind, DeviceSpec, MachineSpec};

/// A number of the size class is more than any machine has.
#[derive(Debug, thiserror::Error)]
#[error("{what} cannot be {number}: at most {most} is possible")]
pub struct ClassError {
    /// The option that sets it.
    pub what: &'static str,
    /// What it is.
    pub number: u32,
    /// What it may be.
    pub most: u32,
}

/// MiB of room for memory to be plugged in: the VMM has it in whole GiB.
fn hotplug_mib(class: &Class) -> u32 {
    class
        .max_memory_mib
        .saturating_sub(class.memory_mib)
        .next_multiple_of(1024)
}

/// The machine of a size class, with the devices every baked μVM has.
pub(crate) fn machine(class: &Class) -> Result<MachineSpec, ClassError> {
    let small = |what, number: u32, most: u8| {
        u8::try_from(number)
            .ok()
            .filter(|number| *number <= most)
            .ok_or(ClassError {
                what,
                number,
                most: most.into(),
            })
    };
    let device = |slot, kind| DeviceSpec { slot, kind };
    let mut devices = vec![
        device(
            slots::VSOCK,
            DeviceKind::Vsock {
                cid: slots::GUEST_CID,
            },
        ),
        device(slots::RNG, DeviceKind::Rng),
        device(
            slots::NET,
            DeviceKind::Net {
                pairs: 1,
                mac: slots::PLACEHOLDER_MAC,
            },
        ),
        device(
            slots::FS,
            DeviceKind::Fs {
                tag: slots::FS_TAG.to_owned(),
            },
        ),
    ];
    let hotplug = u64::from(hotplug_mib(class)) << 20;
    if hotplug > 0 {
        devices.push(device(slots::MEM, DeviceKind::Mem));
    }
    let disks = small("--slots", class.slots, slots::MAX_DISKS)?;
    for slot in (slots::FIRST_DISK..).take(disks.into()) {
        let id = slots::disk_id(slot);
        devices.push(device(slot, DeviceKind::Block { id, queues: 1 }));
    }
    devices.push(device(
        slots::SCRATCH,
        DeviceKind::Block {
            id: slots::disk_id(slots::SCRATCH),
            queues: 1,
        },
    ));
    devices.sort_by_key(|device| device.slot);
    Ok(MachineSpec {
        cpus: small("--cpus", class.cpus, u8::MAX)?,
        max_cpus: small("--max-cpus", class.max_cpus, u8::MAX)?,
        memory: u64::from(class.memory_mib) << 20,
        hotplug,
        serial: true,
        devices,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class() -> Class {
        Class {
            cpus: 1,
            max_cpus: 8,
            memory_mib: 256,
            max_memory_mib: 4096,
            slots: 8,
        }
    }

    #[test]
    fn every_machine_has_the_devices_of_the_contract() {
        let spec = machine(&class()).unwrap();
        let of = |slot: u8| {
            let mut devices = spec.devices.iter();
            &devices.find(|device| device.slot == slot).unwrap().kind
        };
        assert!(matches!(of(slots::VSOCK), DeviceKind::Vsock { .. }));
        assert!(matches!(of(slots::RNG), DeviceKind::Rng));
        assert!(matches!(of(slots::MEM), DeviceKind::Mem));
        assert!(matches!(of(slots::NET), DeviceKind::Net { pairs: 1, .. }));
        assert!(matches!(of(slots::FS), DeviceKind::Fs { tag } if tag == slots::FS_TAG));
        let disk = |kind: &DeviceKind| matches!(kind, DeviceKind::Block { .. });
        let disks: Vec<u8> = spec
            .devices
            .iter()
            .filter(|device| disk(&device.kind))
            .map(|device| device.slot)
            .collect();
        assert_eq!(disks, (slots::SCRATCH..16).collect::<Vec<u8>>());
        assert_eq!((spec.memory, spec.hotplug), (256 << 20, 4 << 30));
    }

    #[test]
    fn class_that_cannot_grow_has_no_hotplug() {
        let mut fixed = class();
        fixed.max_memory_mib = fixed.memory_mib;
        let spec = machine(&fixed).unwrap();
        assert_eq!(spec.hotplug, 0);
        assert!(spec.devices.iter().all(|d| d.kind != DeviceKind::Mem));
    }

    #[test]
    fn numbers_no_machine_has_are_refused_by_option() {
        let mut class = class();
        class.slots = 25;
        let error = machine(&class).unwrap_err().to_string();
        assert!(error.contains("--slots") && error.contains("24"), "{error}");
    }
}
