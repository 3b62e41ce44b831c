//! A guest made of arbitrary bytes: what the fuzz targets and the property tests have in common.
//!
//! The bytes are a program for a hostile driver: it writes descriptors, buffers and ring indices,
//! kicks queues, and has the device paused and resumed. A device may refuse, or stop; it may not panic,
//! hang or touch memory that is not the guest's.

use std::sync::{Arc, LazyLock};

use super::block::{Block, BlockConfig, FileBackend, Rings};
use super::fs::{Fs, FsConfig, FsServer};
use super::mem::Mem;
use super::net::{Net, NetConfig};
use super::rng::Rng;
use super::testing::{BUFFERS_BASE, Bench, Desc};
use super::vsock::Vsock;
use crate::cpu::Fingerprint;
use crate::memory::{HotplugRegion, MemoryShape};
use crate::snapshot::MachineState;
use crate::snapshot::{self, HEADER_LEN, Header};
use crate::virtio::{DeviceState, VirtioDevice};

const MEMORY: usize = 2 << 20;
const MAX_STEPS: usize = 400;

/// Reads numbers off the front of the input; zeroes when it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn number(&mut self, len: usize) -> u64 {
        let (now, later) = self.0.split_at(len.min(self.0.len()));
        self.0 = later;
        now.iter().rev().fold(0, |all, b| all << 8 | u64::from(*b))
    }

    fn byte(&mut self) -> u8 {
        // One byte was read.
        self.number(1) as u8
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let (now, later) = self.0.split_at(len.min(self.0.len()));
        self.0 = later;
        now.to_vec()
    }

    /// An address: mostly among the buffers, now and then anywhere.
    fn addr(&mut self) -> u64 {
        match self.byte() {
            0 => self.number(8),
            1 => MEMORY as u64 - u64::from(self.byte()),
            _ => BUFFERS_BASE + self.number(2),
        }
    }
}

/// Runs the program in `data` against a device.
pub fn drive<D: VirtioDevice>(device: D, data: &[u8]) {
    let mut bench = Bench::new(device, MEMORY, 16);
    let mut input = Input(data);
    let queues = bench.drivers.len();
    for _ in 0..MAX_STEPS {
        if input.0.is_empty() || bench.failed() {
            break;
        }
        let op = input.byte();
        let queue = usize::from(input.byte()) % queues;
        let Some(driver) = bench.drivers.get_mut(queue) else {
            break;
        };
        match op % 8 {
            0 | 1 => {
                let (index, addr) = (u16::from(input.byte() % 16), input.addr());
                // Two, one and one bytes were read for each.
                let len = input.number(2) as u32 | if op > 250 { 0xffff_0000 } else { 0 };
                let flags = u16::from(input.byte() & 7);
                driver.set_desc(
                    index,
                    Desc {
                        addr,
                        len,
                        flags,
                        next: u16::from(input.byte() % 17),
                    },
                );
            }
            2 | 3 => {
                let (addr, len) = (input.addr(), usize::from(input.byte()));
                let bytes = input.bytes(len);
                driver.poke(addr, &bytes);
            }
            4 => driver.make_available(u16::from(input.byte() % 17)),
            // At most what a queue number's type holds.
            5 => bench.kick(queue as u16),
            6 => {
                // Two bytes were read.
                let index = input.number(2) as u16;
                driver.set_avail_idx(index);
            }
            _ => {
                let offset = input.number(2);
                let bytes = input.bytes(8);
                bench.device.write_config(offset, &bytes);
                bench.device.read_config(offset, &mut [0; 16]);
                if bench.device.pause().is_ok() {
                    let _ = bench.device.save();
                    bench.device.unpause();
                }
            }
        }
    }
    bench.device.reset();
}

#[derive(Debug)]
struct Region;

impl HotplugRegion for Region {
    fn base(&self) -> u64 {
        // Where programs that use `Input::addr` reach it.
        BUFFERS_BASE
    }
    fn len(&self) -> u64 {
        1 << 30
    }
    fn block_size(&self) -> u64 {
        2 << 20
    }
    fn set_usable(&self, _bytes: u64) -> std::io::Result<()> {
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> std::io::Result<()> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len()));
        Ok(())
    }
}

/// One ring for all runs, which it serves one after the other.
static RINGS: LazyLock<Rings> = LazyLock::new(|| Rings::new(1));

/// virtio-blk over a small file.
pub fn block(data: &[u8]) {
    let config = BlockConfig {
        id: "f".to_owned(),
        queues: 2,
        queue_size: 16,
        read_only: false,
    };
    let mut device = Block::new(&config);
    // SAFETY: a constant name and no flags; the descriptor, if any, is nobody else's.
    let file = unsafe {
        let fd = libc::memfd_create(c"fuzz".as_ptr(), 0);
        (fd >= 0).then(|| <std::fs::File as std::os::fd::FromRawFd>::from_raw_fd(fd))
    };
    if let Some(file) = file
        && file.set_len(1 << 20).is_ok()
        && let Ok(mut backend) = FileBackend::new(file, false)
        && backend.start(&RINGS).is_ok()
    {
        // A fresh device's slot is empty.
        let _ = device.attach(Box::new(backend));
    }
    drive(device, data);
}

/// virtio-net without a tap: what is sent is dropped.
pub fn net(data: &[u8]) {
    drive(
        Net::new(&NetConfig {
            mac: [2, 0, 0, 0, 0, 1],
            pairs: 2,
            queue_size: 16,
        }),
        data,
    );
}

/// virtio-vsock without clients.
pub fn vsock(data: &[u8]) {
    drive(Vsock::new(3, None), data);
}

/// virtio-rng.
pub fn rng(data: &[u8]) {
    drive(Rng::new(), data);
}

/// virtio-mem with half its region wanted.
pub fn mem(data: &[u8]) {
    let mut device = Mem::new(Arc::new(Region));
    // The region is large enough for it.
    let _ = device.request(512 << 20);
    drive(device, data);
}

/// virtio-fs with a server on an empty folder, which the program may fill.
pub fn fs(root: &std::path::Path, data: &[u8]) {
    let root = root.to_string_lossy().into_owned();
    let options = kiln_vmm_fs::Options {
        root,
        ..kiln_vmm_fs::Options::default()
    };
    let mut device = Fs::new(&FsConfig {
        tag: "f".to_owned(),
        queue_size: 16,
    });
    let make = move |_: &[_]| kiln_vmm_fs::Server::new(&options).map(|server| (server, ()));
    if let Ok(Ok((server, ()))) = FsServer::start(make) {
        // A fresh device has no server yet.
        let _ = device.attach(server);
    }
    drive(device, data);
}

/// Saved state of any device, made of arbitrary bytes.
pub fn state(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.byte();
    let bytes = input.0.to_vec();
    let state = |kind: &str| DeviceState {
        kind: kind.to_owned(),
        version: 1,
        bytes: bytes.clone(),
    };
    // An error is the expected answer.
    let _ = match kind % 6 {
        0 => {
            let config = BlockConfig {
                id: String::new(),
                queues: 2,
                queue_size: 16,
                read_only: false,
            };
            Block::new(&config).restore(&state("block"))
        }
        1 => {
            let config = NetConfig {
                mac: [0; 6],
                pairs: 2,
                queue_size: 16,
            };
            Net::new(&config).restore(&state("net"))
        }
        2 => Vsock::new(3, None).restore(&state("vsock")),
        3 => Rng::new().restore(&state("rng")),
        4 => Mem::new(Arc::new(Region)).restore(&state("mem")),
        _ => Fs::new(&FsConfig {
            tag: String::new(),
            queue_size: 16,
        })
        .restore(&state("fs")),
    };
}

/// A state file: as it is, and with a header that is right for whatever the body is.
pub fn file(data: &[u8]) {
    // Errors are the expected answers.
    let _ = snapshot::decode(data);
    let body = data.get(HEADER_LEN..).unwrap_or(data);
    let nothing = MemoryShape {
        ram: 0,
        hotplug: 0,
        usable: 0,
    };
    let shape = postcard::from_bytes::<MachineState>(body)
        .map_or(nothing, |state| state.config.memory.into());
    let header = Header {
        body_len: body.len() as u64,
        body_crc: crc32fast::hash(body),
        ram: shape.ram,
        hotplug: shape.hotplug,
        memory_file: shape.file_len(),
        kiln: String::new(),
        kernel: String::new(),
        digest: [0; 32],
        cpu: Fingerprint::of_this_cpu(),
        tsc_khz: 0,
    };
    let _ = snapshot::decode(&[&header.to_bytes(), body].concat());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    fn program() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), 0..600)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

        #[test]
        fn no_guest_harms_block(data in program()) {
            super::block(&data);
        }

        #[test]
        fn no_guest_harms_net(data in program()) {
            super::net(&data);
        }

        #[test]
        fn no_guest_harms_vsock(data in program()) {
            super::vsock(&data);
        }

        #[test]
        fn no_guest_harms_rng(data in program()) {
            super::rng(&data);
        }

        #[test]
        fn no_guest_harms_mem(data in program()) {
            super::mem(&data);
        }

        #[test]
        fn no_guest_harms_fs(data in program()) {
            let dir = tempfile::tempdir().unwrap();
            super::fs(dir.path(), &data);
        }

        #[test]
        fn no_saved_state_harms_any_device(data in program()) {
            super::state(&data);
        }

        #[test]
        fn no_state_file_harms(changes in proptest::collection::vec((0usize..700, any::<u8>()), 0..8)) {
            let mut data = include_bytes!("../../tests/golden/state-v2.bin").to_vec();
            for (at, value) in changes {
                if let Some(byte) = data.get_mut(at) {
                    *byte = value;
                }
            }
            super::file(&data);
        }
    }
}
