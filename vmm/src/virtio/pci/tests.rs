use super::*;
use crate::virtio::StateError;
use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryMmap};

#[derive(Debug, Default)]
struct Host {
    messages: Mutex<Vec<u32>>,
    bells: Mutex<Vec<u64>>,
}

impl MsiTarget for Host {
    fn deliver(&self, _address: u64, data: u32) {
        lock(&self.messages).push(data);
    }
}

impl DoorbellHost for Host {
    fn add(&self, address: u64, _signal: &EventFd) -> bool {
        lock(&self.bells).push(address);
        true
    }

    fn remove(&self, address: u64, _signal: &EventFd) {
        lock(&self.bells).retain(|a| *a != address);
    }
}

/// Counts what the transport tells it.
#[derive(Debug, Default)]
struct Echo {
    activation: Option<Activation>,
    kicks: Arc<AtomicU32>,
    resets: Arc<AtomicU32>,
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }
    fn features(&self) -> u64 {
        FEATURE_EVENT_IDX
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[64, 128]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.activation = Some(activation);
        Ok(())
    }
    fn queue_event(&mut self, queue: u16) {
        self.kicks.fetch_add(1, Ordering::SeqCst);
        if let Some(a) = &self.activation {
            a.interrupt.signal_queue(queue);
        }
    }
    fn event(&mut self, _token: u32, _ready: EventSet) {}
    fn reset(&mut self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
        self.activation = None;
    }
    fn pause(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn unpause(&mut self) {}
    fn queues(&self) -> Vec<SavedQueue> {
        self.activation
            .iter()
            .flat_map(|a| a.queues.iter().map(ActiveQueue::save))
            .collect()
    }
    fn save(&self) -> Result<DeviceState, DeviceError> {
        Ok(DeviceState::encode("echo", 1, &())?)
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        Ok(state.decode("echo", 1)?)
    }
}

struct Rig {
    host: Arc<Host>,
    events: EventLoop,
    kicks: Arc<AtomicU32>,
    resets: Arc<AtomicU32>,
    pci: Arc<VirtioPci>,
}

fn rig() -> Rig {
    let host = Arc::new(Host::default());
    let events = EventLoop::new().unwrap();
    let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let env = TransportEnv {
        doorbells: host.clone(),
        msi: host.clone(),
        ram: GuestRam::new(map),
        events: events.clone(),
    };
    let echo = Echo::default();
    let (kicks, resets) = (echo.kicks.clone(), echo.resets.clone());
    let pci = VirtioPci::new(3, Box::new(echo), env);
    Rig {
        host,
        events,
        kicks,
        resets,
        pci,
    }
}

impl Rig {
    fn write(&self, offset: u64, value: u64, len: usize) {
        self.pci.bar_write(offset, &value.to_le_bytes()[..len]);
    }

    fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.pci.bar_read(offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    /// What a driver does up to DRIVER_OK, with queue 0 enabled at `ring`.
    fn bring_up(&self, ring: u64) {
        self.pci.config_write(4, &6u16.to_le_bytes());
        let control = self.pci.msix_cap + 2;
        self.pci.config_write(control, &0x8000u16.to_le_bytes());
        for (v, data) in [(0, 0x30u64), (1, 0x31), (2, 0x32)] {
            self.write(MSIX_TABLE + v * 16 + 8, data, 4);
            self.write(MSIX_TABLE + v * 16 + 12, 0, 4);
        }
        self.write(20, 1, 1);
        self.write(20, 3, 1);
        self.write(8, 1, 4);
        self.write(12, 1, 4);
        self.write(20, 11, 1);
        self.write(16, 0, 2);
        self.write(22, 0, 2);
        self.write(26, 1, 2);
        self.write(32, ring, 8);
        self.write(40, ring + 0x1000, 8);
        self.write(48, ring + 0x2000, 8);
        self.write(28, 1, 2);
        self.write(20, 15, 1);
    }

    fn drain(&self) {
        assert!(self.events.still().drain().unwrap());
    }
}

#[test]
fn driver_brings_a_device_up_and_is_interrupted() {
    let r = rig();
    r.bring_up(0x1000);
    assert!(r.pci.is_active());
    assert_eq!(r.read(20, 1), 15);
    r.write(NOTIFY, 0, 2);
    r.drain();
    assert_eq!(r.kicks.load(Ordering::SeqCst), 1);
    assert_eq!(*lock(&r.host.messages), [0x31]);
    assert_eq!(r.read(ISR, 1), 1);
    assert_eq!(r.read(ISR, 1), 0);
}

#[test]
fn features_never_offered_are_not_accepted() {
    let r = rig();
    r.write(20, 3, 1);
    r.write(8, 0, 4);
    r.write(12, 1 << 5, 4);
    r.write(8, 1, 4);
    r.write(12, 1, 4);
    r.write(20, 11, 1);
    assert_eq!(r.read(20, 1), 3);
}

#[test]
fn queue_outside_memory_stops_the_device_until_reset() {
    let r = rig();
    r.bring_up(1 << 40);
    assert!(!r.pci.is_active());
    assert_eq!(r.read(20, 1) & 64, 64);
    assert_eq!(*lock(&r.host.messages), [0x30]);
    r.write(20, 0, 1);
    assert_eq!(r.read(20, 1), 0);
    r.bring_up(0x1000);
    assert!(r.pci.is_active());
}

#[test]
fn busy_queue_earns_a_doorbell_and_reset_takes_it_away() {
    let r = rig();
    r.bring_up(0x1000);
    for _ in 0..KICKS_BEFORE_IOEVENTFD {
        r.write(NOTIFY, 0, 2);
    }
    assert!(lock(&r.host.bells).is_empty());
    r.write(NOTIFY, 0, 2);
    assert_eq!(
        *lock(&r.host.bells),
        [layout::PCI_WINDOW + 3 * BAR_STRIDE + NOTIFY]
    );
    r.write(20, 0, 1);
    assert!(lock(&r.host.bells).is_empty());
    assert_eq!(r.resets.load(Ordering::SeqCst), 1);
    r.write(NOTIFY, 0, 2);
    r.drain();
}

#[test]
fn saved_transport_goes_on_where_it_was() {
    let a = rig();
    a.bring_up(0x1000);
    let state = a.pci.save().unwrap();
    let b = rig();
    b.pci.restore(&state).unwrap();
    assert!(b.pci.is_active());
    assert_eq!(b.pci.save().unwrap(), state);
    b.write(NOTIFY, 0, 2);
    b.drain();
    assert_eq!(*lock(&b.host.messages), [0x31]);
}

#[test]
fn state_of_another_device_is_refused() {
    let mut state = rig().pci.save().unwrap();
    state.device.kind = "block".to_owned();
    let e = rig().pci.restore(&state).unwrap_err();
    let TransportError::Device {
        source: DeviceError::State(StateError::Kind { found, .. }),
        ..
    } = e
    else {
        panic!("{e:?}");
    };
    assert_eq!(found, "block");
}

proptest! {
    /// Whatever is written where, in whatever width, nothing panics and reads stay in bounds.
    #[test]
    fn register_writes_never_panic(
        ops in proptest::collection::vec((0..BAR_LEN, any::<u64>(), 1usize..=8), 1..60)
    ) {
        let r = rig();
        r.bring_up(0x1000);
        for (offset, value, len) in ops {
            r.write(offset, value, len);
            r.read(offset, len);
            r.pci.config_write((offset & 0xfff) as usize, &value.to_le_bytes()[..len]);
            let mut data = [0; 8];
            r.pci.config_read((offset & 0xfff) as usize, &mut data[..len]);
        }
    }
}
