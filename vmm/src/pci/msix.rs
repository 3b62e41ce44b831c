//! A function's MSI-X table and pending bits, delivered by `KVM_SIGNAL_MSI`.
//!
//! Devices live in this process, so a message goes to KVM as a message: no eventfd, no irqfd and no GSI route
//! per vector. An idle device's vectors then cost a resume nothing (an irqfd each would cost two system
//! calls and an SRCU grace period for the routing table), and delivery is one system call either way. Only a thread that
//! has no descriptor of the machine's, and much to say, is given a [`Wire`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::wire::{Routes, Wire};

/// Where messages go.
pub trait MsiTarget: Send + Sync + std::fmt::Debug {
    /// Delivers one message.
    fn deliver(&self, address: u64, data: u32);

    /// Has the message delivered whenever `signal` is written to, without this process; the number by which that is ended,
    /// or none if it can't be done.
    fn connect(&self, signal: &EventFd, message: (u64, u32)) -> Option<u32>;

    /// Ends that.
    fn disconnect(&self, signal: &EventFd, number: u32);
}

/// KVM's local APICs.
#[derive(Debug)]
pub struct KvmMsi {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

impl KvmMsi {
    /// Those of a VM.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            routes: Mutex::default(),
        }
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MsiTarget for KvmMsi {
    fn deliver(&self, address: u64, data: u32) {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        // Fails if the guest programmed a vector no APIC takes; on hardware that message is lost too.
        let _ = self.vm.signal_msi(msi);
    }

    fn connect(&self, signal: &EventFd, message: (u64, u32)) -> Option<u32> {
        self.routes().connect(&self.vm, signal, message)
    }

    fn disconnect(&self, signal: &EventFd, number: u32) {
        self.routes().disconnect(&self.vm, signal, number);
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

impl MsixState {
    /// Address and data of a vector's message; none if there is no such vector, or if it is masked.
    fn message(&self, vector: usize) -> Option<(u64, u32)> {
        let [low, high, data, control] = *self.entries.get(vector)?;
        let masked = self.control & ENABLE == 0
            || self.control & FUNCTION_MASK != 0
            || control & ENTRY_MASKED != 0;
        (!masked).then_some((u64::from(low) | u64::from(high) << 32, data))
    }
}

/// The table of one function.
#[derive(Debug)]
pub struct Msix {
    table: Mutex<Table>,
    target: Arc<dyn MsiTarget>,
}

#[derive(Debug, Default)]
struct Table {
    state: MsixState,
    /// What is connected to a vector, until anything about the table changes.
    wires: Vec<Connected>,
}

#[derive(Debug)]
struct Connected {
    vector: usize,
    wire: Arc<Wire>,
    number: u32,
}

/// Pending bits are one word.
pub const MAX_VECTORS: usize = 64;

impl Msix {
    /// A table with all vectors masked.
    pub fn new(vectors: usize, target: Arc<dyn MsiTarget>) -> Self {
        let entries = vec![[0, 0, 0, ENTRY_MASKED]; vectors.min(MAX_VECTORS)];
        Self {
            table: Mutex::new(Table {
                state: MsixState {
                    entries,
                    ..Default::default()
                },
                ..Default::default()
            }),
            target,
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of vectors.
    pub fn len(&self) -> usize {
        self.table().state.entries.len()
    }

    /// Whether there are no vectors.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Raises a vector, or remembers it if it is masked.
    pub fn signal(&self, vector: usize) {
        let s = &mut self.table().state;
        if vector >= s.entries.len() || s.control & ENABLE == 0 {
            return;
        }
        s.pending |= 1 << vector;
        Self::flush(s, self.target.as_ref());
    }

    /// Has a wire raise a vector, until anything about the table changes. Says whether it does.
    pub fn connect(&self, vector: usize, wire: &Arc<Wire>) -> bool {
        let mut table = self.table();
        let Some(message) = table.state.message(vector) else {
            return false;
        };
        if wire.is_connected() || table.wires.iter().any(|known| known.vector == vector) {
            return false;
        }
        let Some(number) = self.target.connect(wire.signal(), message) else {
            return false;
        };
        wire.connect();
        table.wires.push(Connected {
            vector,
            wire: wire.clone(),
            number,
        });
        true
    }

    /// Disconnects all wires. What they were raised for is pending.
    pub fn disconnect(&self) {
        let table = &mut *self.table();
        self.cut(table);
        Self::flush(&mut table.state, self.target.as_ref());
    }

    fn cut(&self, table: &mut Table) {
        for Connected {
            vector,
            wire,
            number,
        } in table.wires.drain(..)
        {
            self.target.disconnect(wire.signal(), number);
            if wire.disconnect() {
                table.state.pending |= 1 << vector;
            }
        }
    }

    /// Message control changed.
    pub fn set_control(&self, control: u16) {
        let table = &mut *self.table();
        let control = control & (ENABLE | FUNCTION_MASK);
        if table.state.control != control {
            self.cut(table);
            table.state.control = control;
        }
        Self::flush(&mut table.state, self.target.as_ref());
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let s = &self.table().state;
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
        let table = &mut *self.table();
        self.cut(table);
        for (i, b) in data.iter().enumerate() {
            let at = offset as usize + i;
            let Some(word) = table
                .state
                .entries
                .get_mut(at / 16)
                .and_then(|e| e.get_mut(at / 4 % 4))
            else {
                return;
            };
            let shift = 8 * (at % 4);
            *word = (*word & !(0xff << shift)) | (u32::from(*b) << shift);
        }
        Self::flush(&mut table.state, self.target.as_ref());
    }

    /// The guest reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let bits = self.table().state.pending.to_le_bytes();
        for (i, b) in data.iter_mut().enumerate() {
            *b = bits.get(offset as usize + i).copied().unwrap_or(0);
        }
    }

    fn flush(s: &mut MsixState, target: &dyn MsiTarget) {
        if s.pending == 0 {
            return;
        }
        for vector in 0..s.entries.len() {
            if s.pending & (1 << vector) != 0
                && let Some((address, data)) = s.message(vector)
            {
                s.pending &= !(1 << vector);
                target.deliver(address, data);
            }
        }
    }

    /// What to save.
    pub fn save(&self) -> MsixState {
        let table = &mut *self.table();
        self.cut(table);
        table.state.clone()
    }

    /// Takes over a saved table of the same length.
    pub fn restore(&self, state: &MsixState) -> bool {
        let table = &mut *self.table();
        if state.entries.len() != table.state.entries.len() {
            return false;
        }
        self.cut(table);
        table.state.clone_from(state);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Log(Mutex<Vec<(u64, u32)>>, Mutex<Vec<(u64, u32)>>);

    impl MsiTarget for Log {
        fn deliver(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }

        fn connect(&self, _: &EventFd, message: (u64, u32)) -> Option<u32> {
            self.1.lock().unwrap().push(message);
            Some(24)
        }

        fn disconnect(&self, _: &EventFd, number: u32) {
            assert_eq!(number, 24);
            self.1.lock().unwrap().pop();
        }
    }

    /// A table of two vectors, of which the second is not masked.
    fn enabled() -> (Arc<Log>, Msix) {
        let log = Arc::new(Log::default());
        let m = Msix::new(2, log.clone());
        m.set_control(ENABLE);
        for (word, value) in [0xfee0_0000, 0, 0x41, 0].into_iter().enumerate() {
            m.write_table(16 + 4 * word as u64, &u32::to_le_bytes(value));
        }
        (log, m)
    }

    #[test]
    fn wire_is_connected_to_what_is_not_masked() {
        let (log, m) = enabled();
        let wire = Arc::new(Wire::new().unwrap());
        assert!(!m.connect(0, &wire) && !m.connect(7, &wire));
        assert!(m.connect(1, &wire) && wire.raise());
        assert_eq!(*log.1.lock().unwrap(), [(0xfee0_0000, 0x41)]);
        let other = Arc::new(Wire::new().unwrap());
        assert!(!m.connect(1, &other), "two on one vector");
        assert!(!m.connect(1, &wire), "twice");
    }

    #[test]
    fn whatever_changes_the_table_ends_wires_and_loses_nothing() {
        let changes: [fn(&Msix); 4] = [
            |m| m.write_table(28, &1u32.to_le_bytes()),
            |m| m.set_control(ENABLE | FUNCTION_MASK),
            |m| assert_eq!(m.save().pending, 2),
            |m| m.set_control(0),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let (log, m) = enabled();
            let wire = Arc::new(Wire::new().unwrap());
            assert!(m.connect(1, &wire) && wire.raise());
            change(&m);
            assert!(!wire.is_connected() && !wire.raise(), "{number}");
            assert!(log.1.lock().unwrap().is_empty());
            assert_eq!(m.table().state.pending, 2, "{number}");
            m.set_control(ENABLE);
            m.write_table(28, &0u32.to_le_bytes());
            assert_eq!(*log.0.lock().unwrap(), [(0xfee0_0000, 0x41)], "{number}");
            assert!(m.connect(1, &wire) && wire.raise());
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
