//! What a machine consists of.

pub use kiln_vmm_control::api::{DeviceKind, DeviceSpec};

use crate::layout;
use crate::memory::MemoryShape;

/// A machine's fixed parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// vCPUs at boot.
    pub boot_cpus: u8,
    /// vCPUs there may ever be.
    pub max_cpus: u8,
    /// Base RAM and hot-plug window.
    pub memory: MemoryShape,
    /// Whether there is a serial port.
    pub serial: bool,
    /// Devices on the bus.
    pub devices: Vec<DeviceSpec>,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// CPU counts that can't be.
    #[error(
        "{boot} of {max} vCPUs: there must be 1 to {}, and at most as many at boot",
        layout::MAX_CPUS
    )]
    Cpus {
        /// At boot.
        boot: u8,
        /// At most.
        max: u8,
    },
    /// A slot that can't be, or twice.
    #[error("PCI slot {0} is taken or not in 1 to 31")]
    Slot(u8),
    /// Two devices of a kind there may be only one of.
    #[error("there is more than one {0} device")]
    Twice(&'static str),
}

impl MachineConfig {
    /// Checks what does not depend on the host.
    pub fn check(&self) -> Result<(), ConfigError> {
        let (boot, max) = (self.boot_cpus, self.max_cpus);
        if boot == 0 || boot > max || max > layout::MAX_CPUS {
            return Err(ConfigError::Cpus { boot, max });
        }
        let mut taken = 1u32;
        let mut singles = Vec::new();
        for d in &self.devices {
            if d.slot >= layout::PCI_SLOTS || taken & (1 << d.slot) != 0 {
                return Err(ConfigError::Slot(d.slot));
            }
            taken |= 1 << d.slot;
            let single = match d.kind {
                DeviceKind::Vsock { .. } => "vsock",
                DeviceKind::Mem => "mem",
                DeviceKind::Fs { .. } => "fs",
                _ => continue,
            };
            if singles.contains(&single) {
                return Err(ConfigError::Twice(single));
            }
            singles.push(single);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(slots: &[u8]) -> MachineConfig {
        MachineConfig {
            boot_cpus: 1,
            max_cpus: 4,
            memory: MemoryShape {
                ram: 64 << 20,
                hotplug: 0,
                usable: 0,
            },
            serial: false,
            devices: slots
                .iter()
                .map(|&slot| DeviceSpec {
                    slot,
                    kind: DeviceKind::Rng,
                })
                .collect(),
        }
    }

    #[test]
    fn slots_are_used_once_and_never_the_bridges() {
        assert_eq!(config(&[1, 31]).check(), Ok(()));
        assert_eq!(config(&[0]).check(), Err(ConfigError::Slot(0)));
        assert_eq!(config(&[3, 3]).check(), Err(ConfigError::Slot(3)));
        assert_eq!(config(&[32]).check(), Err(ConfigError::Slot(32)));
    }
}
