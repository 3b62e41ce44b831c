//! virtio-rng (virtio 1.2 §5.4): random bytes from the host's kernel.
//!
//! A driver keeps bytes it asked for before a snapshot, so all clones of a baked μVM share those. The
//! device can't take them back: reseeding after a resume is the guest agent's gate, not this device's.

use std::io;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::chain::Chain;
use super::ring::{self, Complaints, Handled, Mem, RingError};
use crate::memory::GuestRam;
use crate::virtio::{
    Activation, ActiveQueue, DeviceError, DeviceState, DeviceType, Interrupt, SavedQueue,
    VirtioDevice,
};

const KIND: &str = "rng";
const VERSION: u16 = 1;
const QUEUE_SIZES: [u16; 1] = [64];
/// Most bytes given for one chain. A driver that wants more asks again (§5.4.6.1 lets a device give less).
const MAX_BYTES: usize = 1024;

/// A virtio-rng device.
#[derive(Debug)]
pub struct Rng {
    active: Option<Active>,
    complaints: Complaints,
}

#[derive(Debug)]
struct Active {
    memory: GuestRam,
    queue: ActiveQueue,
    interrupt: Interrupt,
}

/// The device has no registers; its queue is saved by the transport.
#[derive(Debug, Serialize, Deserialize)]
struct RngState {}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

impl Rng {
    /// A device that takes its bytes from `getrandom`.
    pub fn new() -> Self {
        Rng {
            active: None,
            complaints: Complaints::new(KIND),
        }
    }

    fn serve(&mut self) -> Result<(), RingError> {
        let Some(Active {
            memory,
            queue,
            interrupt,
        }) = &mut self.active
        else {
            return Ok(());
        };
        let mem = memory.memory();
        let since = queue.queue.next_used();
        ring::turn(queue, &mem, &mut self.complaints, |chain, complaints| {
            Ok(Handled::Used(fill(&mem, &chain).unwrap_or_else(|e| {
                complaints.add(e);
                0
            })))
        })?;
        ring::notify(queue, &mem, interrupt, since)
    }
}

/// Puts random bytes into a chain; gives their number.
fn fill(mem: &Mem, chain: &Chain) -> io::Result<u32> {
    let mut bytes = [0; MAX_BYTES];
    let len = chain.writable.len().min(MAX_BYTES as u64) as usize;
    if len == 0 {
        return Err(io::Error::other("request has no room for a single byte"));
    }
    let bytes = bytes.get_mut(..len).unwrap_or_default();
    random(bytes)?;
    chain
        .writable
        .write(mem, 0, bytes)
        .map_err(io::Error::other)?;
    // At most `MAX_BYTES`.
    Ok(len as u32)
}

fn random(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        // SAFETY: the pointer and length are those of a slice we hold exclusively.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        if got < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        } else {
            done += got.unsigned_abs();
        }
    }
    Ok(())
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config(&[], offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // There is none.
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            interrupt,
            ..
        } = activation;
        let queue = queues
            .into_iter()
            .next()
            .ok_or(DeviceError::Driver("the queue is not enabled"))?;
        self.active = Some(Active {
            memory,
            queue,
            interrupt,
        });
        Ok(())
    }

    fn queue_event(&mut self, _queue: u16) {
        let served = self.serve();
        if let (Err(e), Some(active)) = (served, &self.active) {
            active.interrupt.fail_device(e);
        }
    }

    fn event(&mut self, _token: u32, _ready: EventSet) {
        // Nothing is watched.
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        // Requests are done as they come; none is ever in flight.
        Ok(())
    }

    fn unpause(&mut self) {}

    fn queues(&self) -> Vec<SavedQueue> {
        self.active
            .iter()
            .map(|active| active.queue.save())
            .collect()
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        Ok(DeviceState::encode(KIND, VERSION, &RngState {})?)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        let RngState {} = state.decode(KIND, VERSION)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{BUFFERS_BASE, Bench};

    #[test]
    fn two_requests_get_different_bytes() {
        let mut bench = Bench::new(Rng::new(), 2 << 20, 64);
        let driver = &mut bench.drivers[0];
        driver.add(&[], &[(BUFFERS_BASE, 32)]);
        driver.add(
            &[],
            &[(BUFFERS_BASE + 0x1000, 7), (BUFFERS_BASE + 0x2000, 25)],
        );
        bench.kick(0);
        let driver = &mut bench.drivers[0];
        assert_eq!(
            (driver.used(), driver.used()),
            (Some((0, 32)), Some((1, 32)))
        );
        let first = driver.peek(BUFFERS_BASE, 32);
        let second = [
            driver.peek(BUFFERS_BASE + 0x1000, 7),
            driver.peek(BUFFERS_BASE + 0x2000, 25),
        ]
        .concat();
        assert_ne!(first, second);
        assert_ne!(first, vec![0; 32]);
        assert_eq!(bench.sink.queue_count(0), 1);
    }

    #[test]
    fn a_huge_request_costs_a_bounded_amount_of_work() {
        let mut bench = Bench::new(Rng::new(), 4 << 20, 64);
        bench.drivers[0].add(&[], &[(BUFFERS_BASE, 2 << 20)]);
        bench.kick(0);
        assert_eq!(bench.drivers[0].used(), Some((0, 1024)));
        assert_eq!(bench.drivers[0].peek(BUFFERS_BASE + 1024, 16), [0; 16]);
    }

    #[test]
    fn a_request_without_room_is_given_back() {
        let mut bench = Bench::new(Rng::new(), 2 << 20, 64);
        bench.drivers[0].add(&[(BUFFERS_BASE, 8)], &[]);
        bench.drivers[0].add(&[], &[(4 << 20, 8)]);
        bench.kick(0);
        let driver = &mut bench.drivers[0];
        assert_eq!((driver.used(), driver.used()), (Some((0, 0)), Some((1, 0))));
        assert!(!bench.failed());
    }
}
