//! A function's 256 bytes of configuration space: values and which bits the guest may change.

use serde::{Deserialize, Serialize};

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
/// Command register bit: the function answers memory accesses.
const MEMORY_ENABLE: u16 = 1 << 1;

/// What identifies a function.
#[derive(Clone, Copy, Debug)]
pub struct PciId {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Base class, subclass, interface.
    pub class: u32,
    /// Subsystem device; the subsystem vendor is the vendor.
    pub subsystem: u16,
}

/// Values and write masks.
#[derive(Clone, Debug)]
pub struct PciConfig {
    values: [u8; 256],
    writable: [u8; 256],
    next_cap: usize,
    last_cap_link: usize,
}

/// The registers the guest can change, as saved; the rest is made again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciConfigState {
    /// All 256 bytes.
    pub values: Vec<u8>,
}

impl PciConfig {
    /// Configuration space of a function without BARs.
    pub fn new(id: PciId) -> Self {
        let mut c = Self {
            values: [0; 256],
            writable: [0; 256],
            next_cap: 0x40,
            last_cap_link: CAPABILITIES,
        };
        c.put16(0x00, id.vendor);
        c.put16(0x02, id.device);
        c.put32(0x08, (id.class << 8) | 1);
        c.put16(0x2c, id.vendor);
        c.put16(0x2e, id.subsystem);
        // Memory enable, bus master, interrupt disable.
        c.allow(COMMAND, &0x0406u16.to_le_bytes());
        // Cache line size and interrupt line are scratch registers.
        c.allow(0x0c, &[0xff]);
        c.allow(0x3c, &[0xff]);
        c
    }

    /// Makes BAR 0 a 32-bit memory BAR of `size` (a power of two) bytes at `base`.
    pub fn set_bar0(&mut self, base: u32, size: u32) {
        self.put32(BAR0, base);
        self.allow(BAR0, &(!(size - 1)).to_le_bytes());
    }

    /// Appends a capability; `body` follows id and link. Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next_cap;
        self.put(self.last_cap_link, &[at as u8]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.last_cap_link = at + 1;
        self.next_cap = (at + 2 + body.len()).next_multiple_of(4);
        let status = u16::from_le_bytes([self.get(STATUS), self.get(STATUS + 1)]);
        self.put16(STATUS, status | 1 << 4);
        at
    }

    /// Lets the guest change the bits set in `mask`.
    pub fn allow(&mut self, at: usize, mask: &[u8]) {
        for (m, bits) in self.writable.iter_mut().skip(at).zip(mask) {
            *m = *bits;
        }
    }

    /// One byte.
    pub fn get(&self, at: usize) -> u8 {
        self.values.get(at).copied().unwrap_or(0)
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (v, b) in self.values.iter_mut().skip(at).zip(bytes) {
            *v = *b;
        }
    }

    fn put16(&mut self, at: usize, value: u16) {
        self.put(at, &value.to_le_bytes());
    }

    fn put32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    /// Where BAR 0 answers now; `None` while memory decoding is off.
    pub fn bar0(&self) -> Option<u64> {
        let command = u16::from_le_bytes([self.get(COMMAND), self.get(COMMAND + 1)]);
        let bar = [0, 1, 2, 3].map(|i| self.get(BAR0 + i));
        (command & MEMORY_ENABLE != 0).then(|| u64::from(u32::from_le_bytes(bar) & !0xf))
    }

    /// The guest reads.
    pub fn read(&self, at: usize, data: &mut [u8]) {
        for (i, b) in data.iter_mut().enumerate() {
            *b = self.get(at + i);
        }
    }

    /// The guest writes.
    pub fn write(&mut self, at: usize, data: &[u8]) {
        let cells = self.values.iter_mut().zip(&self.writable).skip(at);
        for ((v, mask), b) in cells.zip(data) {
            *v = (*v & !mask) | (b & mask);
        }
    }

    /// What to save.
    pub fn save(&self) -> PciConfigState {
        PciConfigState {
            values: self.values.to_vec(),
        }
    }

    /// Takes over what the guest had changed. Refuses state of another kind of function.
    pub fn restore(&mut self, state: &PciConfigState) -> bool {
        if state.values.len() != self.values.len() {
            return false;
        }
        let fixed_match = self
            .values
            .iter()
            .zip(&self.writable)
            .zip(&state.values)
            .all(|((own, mask), saved)| own & !mask == saved & !mask);
        if fixed_match {
            self.values.copy_from_slice(&state.values);
        }
        fixed_match
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> PciConfig {
        let id = PciId {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_8000,
            subsystem: 2,
        };
        let mut c = PciConfig::new(id);
        c.set_bar0(0xc001_0000, 0x8000);
        c
    }

    #[test]
    fn bar_sizing_reads_back_the_size_and_ids_stay() {
        let mut c = config();
        c.write(0x10, &[0xff; 4]);
        let mut bar = [0; 4];
        c.read(0x10, &mut bar);
        assert_eq!(u32::from_le_bytes(bar), !0x7fff);
        c.write(0, &[0; 4]);
        assert_eq!((c.get(0), c.get(1)), (0xf4, 0x1a));
    }

    #[test]
    fn bar_answers_only_with_memory_decoding_on() {
        let mut c = config();
        assert_eq!(c.bar0(), None);
        c.write(4, &2u16.to_le_bytes());
        assert_eq!(c.bar0(), Some(0xc001_0000));
    }

    #[test]
    fn state_of_another_function_is_refused() {
        let mut other = config();
        other.put16(2, 0x1041);
        assert!(!config().restore(&other.save()));
        assert!(config().restore(&config().save()));
    }
}
