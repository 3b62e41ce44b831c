//! A function's MSI-X table and pending bits, delivered by `KVM_SIGNAL_MSI`.
//!
//! Devices live in this process, so a message goes to KVM as a message: no eventfd, no irqfd and no GSI route
//! per vector. An idle device's vectors then cost a resume nothing (an irqfd each would cost two system
//! calls and an SRCU grace period for the routing table), and delivery is one system call either way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// Where messages go.
pub trait MsiTarget: Send + Sync + std::fmt::Debug {
    /// Delivers one message.
    fn deliver(&self, address: u64, data: u32);
}

/// KVM's local APICs.
#[derive(Debug)]
pub struct KvmMsi(pub Arc<VmFd>);

impl MsiTarget for KvmMsi {
    fn deliver(&self, address: u64, data: u32) {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        // Fails if the guest programmed a vector no APIC takes; on hardware that message is lost too.
        let _ = self.0.signal_msi(msi);
    }
}

/// Vector-control bit: masked.
const ENTRY_MASKED: u32 = 1;
/// Message control bits.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

/// Saved table, pending bits and message control.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// Four words an entry, as in the table.
    pub entries: Vec<[u32; 4]>,
    /// One bit a vector.
    pub pending: u64,
    /// Message control's enable and mask bits.
    pub control: u16,
}

/// The table of one function.
#[derive(Debug)]
pub struct Msix {
    state: Mutex<MsixState>,
    target: Arc<dyn MsiTarget>,
}

/// Pending bits are one word.
pub const MAX_VECTORS: usize = 64;

impl Msix {
    /// A table with all vectors masked.
    pub fn new(vectors: usize, target: Arc<dyn MsiTarget>) -> Self {
        let entries = vec![[0, 0, 0, ENTRY_MASKED]; vectors.min(MAX_VECTORS)];
        Self {
            state: Mutex::new(MsixState {
                entries,
                ..Default::default()
            }),
            target,
        }
    }

    fn state(&self) -> MutexGuard<'_, MsixState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of vectors.
    pub fn len(&self) -> usize {
        self.state().entries.len()
    }

    /// Whether there are no vectors.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Raises a vector, or remembers it if it is masked.
    pub fn signal(&self, vector: usize) {
        let mut s = self.state();
        if vector >= s.entries.len() || s.control & ENABLE == 0 {
            return;
        }
        s.pending |= 1 << vector;
        Self::flush(&mut s, self.target.as_ref());
    }

    /// Message control changed.
    pub fn set_control(&self, control: u16) {
        let mut s = self.state();
        s.control = control & (ENABLE | FUNCTION_MASK);
        Self::flush(&mut s, self.target.as_ref());
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let s = self.state();
        for (i, b) in data.iter_mut().enumerate() {
            let at = offset as usize + i;
            let word = s
                .entries
                .get(at / 16)
                .and_then(|e| e.get(at / 4 % 4))
                .copied();
            *b = word
                .unwrap_or(0)
                .to_le_bytes()
                .get(at % 4)
                .copied()
                .unwrap_or(0);
        }
    }

    /// The guest writes the table.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut s = self.state();
        for (i, b) in data.iter().enumerate() {
            let at = offset as usize + i;
            let Some(word) = s
                .entries
                .get_mut(at / 16)
                .and_then(|e| e.get_mut(at / 4 % 4))
            else {
                return;
            };
            let shift = 8 * (at % 4);
            *word = (*word & !(0xff << shift)) | (u32::from(*b) << shift);
        }
        Self::flush(&mut s, self.target.as_ref());
    }

    /// The guest reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let bits = self.state().pending.to_le_bytes();
        for (i, b) in data.iter_mut().enumerate() {
            *b = bits.get(offset as usize + i).copied().unwrap_or(0);
        }
    }

    fn flush(s: &mut MsixState, target: &dyn MsiTarget) {
        if s.pending == 0 || s.control & ENABLE == 0 || s.control & FUNCTION_MASK != 0 {
            return;
        }
        for (v, [low, high, data, control]) in s.entries.iter().enumerate() {
            if s.pending & (1 << v) != 0 && control & ENTRY_MASKED == 0 {
                s.pending &= !(1 << v);
                target.deliver(u64::from(*low) | u64::from(*high) << 32, *data);
            }
        }
    }

    /// What to save.
    pub fn save(&self) -> MsixState {
        self.state().clone()
    }

    /// Takes over a saved table of the same length.
    pub fn restore(&self, state: &MsixState) -> bool {
        let mut s = self.state();
        if state.entries.len() != s.entries.len() {
            return false;
        }
        s.clone_from(state);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Log(Mutex<Vec<(u64, u32)>>);

    impl MsiTarget for Log {
        fn deliver(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }

    #[test]
    fn masked_vector_is_delivered_once_when_unmasked() {
        let log = Arc::new(Log::default());
        let m = Msix::new(2, log.clone());
        m.set_control(ENABLE);
        m.write_table(16, &0xfee0_0000u32.to_le_bytes());
        m.write_table(24, &0x41u32.to_le_bytes());
        m.signal(1);
        m.signal(1);
        assert!(log.0.lock().unwrap().is_empty());
        let mut pending = [0];
        m.read_pending(0, &mut pending);
        assert_eq!(pending, [2]);
        m.write_table(28, &0u32.to_le_bytes());
        assert_eq!(*log.0.lock().unwrap(), [(0xfee0_0000, 0x41)]);
        m.signal(1);
        assert_eq!(log.0.lock().unwrap().len(), 2);
    }

    #[test]
    fn table_accesses_out_of_range_are_harmless() {
        let m = Msix::new(1, Arc::new(Log::default()));
        m.write_table(8, &[0xff; 64]);
        let mut data = [0xaa; 64];
        m.read_table(u64::from(u32::MAX), &mut data);
        assert_eq!(data, [0; 64]);
        m.signal(usize::MAX);
    }
}
