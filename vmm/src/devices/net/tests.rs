//! The device between a driver and a pair of datagram sockets, which keep packets apart as a tap does;
//! and a real tap, where one can be made.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::tap::{VNET_HEADER_LEN, count};
use super::*;
use crate::devices::testing::{BUFFERS_BASE, Bench};
use crate::virtio::{DeviceError, VirtioDevice};

const MEMORY: usize = 8 << 20;
const RX_BASE: u64 = BUFFERS_BASE;
const TX_BASE: u64 = BUFFERS_BASE + 0x40_0000;
const CONTROL: u64 = BUFFERS_BASE + 0x60_0000;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MQ: u64 = 1 << 22;
const MRG_RXBUF: u64 = 1 << 15;
const GUEST_TSO: u64 = 1 << 7 | 1 << 8;

#[derive(Debug)]
struct Wire {
    socket: UnixDatagram,
    log: Arc<Mutex<Vec<String>>>,
}

impl NetBackend for Wire {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
    unsafe fn receive(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: as promised by the caller.
        count(unsafe { libc::readv(self.fd(), iovecs.as_ptr(), iovecs.len() as i32) })
    }
    unsafe fn send(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: as promised by the caller.
        count(unsafe { libc::writev(self.fd(), iovecs.as_ptr(), iovecs.len() as i32) })
    }
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let Offloads {
            checksum,
            tso4,
            tso6,
        } = offloads;
        self.log
            .lock()
            .unwrap()
            .push(format!("offloads {checksum} {tso4} {tso6}"));
        Ok(())
    }
    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        self.log.lock().unwrap().push(format!("enabled {enabled}"));
        Ok(())
    }
}

type Log = Arc<Mutex<Vec<String>>>;

fn wire() -> (Box<dyn NetBackend>, UnixDatagram, Log) {
    let (socket, other) = UnixDatagram::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    other.set_nonblocking(true).unwrap();
    let log = Log::default();
    (
        Box::new(Wire {
            socket,
            log: log.clone(),
        }),
        other,
        log,
    )
}

fn config(pairs: u16) -> NetConfig {
    NetConfig {
        mac: MAC,
        pairs,
        queue_size: 256,
    }
}

fn card(features: u64) -> (Bench<Net>, UnixDatagram, Log) {
    let mut device = Net::new(&config(1));
    let (backend, other, log) = wire();
    device.attach(vec![backend]).unwrap();
    (
        Bench::with_features(device, MEMORY, 256, features),
        other,
        log,
    )
}

fn packet(len: usize) -> Vec<u8> {
    let mut packet: Vec<u8> = (0..len).map(|i| (i * 13 + i / 256) as u8).collect();
    packet[..VNET_HEADER_LEN].fill(0);
    packet
}

fn status(bench: &Bench<Net>) -> u16 {
    let mut raw = [0; 2];
    bench.device.read_config(6, &mut raw);
    u16::from_le_bytes(raw)
}

/// Gives `count` receive buffers of `len` bytes.
fn give(bench: &mut Bench<Net>, count: u64, len: u32) {
    for i in 0..count {
        bench.drivers[0].add(&[], &[(RX_BASE + i * u64::from(len), len)]);
    }
    bench.kick(0);
}

/// Puts together the next received packet, from as many buffers as its header says.
fn received(bench: &mut Bench<Net>, buffer: u64) -> Option<Vec<u8>> {
    let driver = &mut bench.drivers[0];
    let (head, len) = driver.used()?;
    let mut packet = driver.peek(RX_BASE + u64::from(head) * buffer, len as usize);
    let buffers = u16::from_le_bytes([packet[10], packet[11]]);
    for _ in 1..buffers {
        let (head, len) = driver.used().unwrap();
        packet.extend(driver.peek(RX_BASE + u64::from(head) * buffer, len as usize));
    }
    packet[10..12].fill(0);
    Some(packet)
}

#[test]
fn packets_are_received_into_as_many_buffers_as_they_need() {
    let (mut bench, other, _) = card(MRG_RXBUF | GUEST_TSO);
    give(&mut bench, 200, 1536);
    for len in [60, 1536, 1537, 40_000, 65_000] {
        other.send(&packet(len)).unwrap();
        bench.run();
        assert_eq!(received(&mut bench, 1536), Some(packet(len)), "{len}");
    }
    assert_eq!(bench.sink.queue_count(0), 5);
}

#[test]
fn without_merging_a_packet_takes_one_buffer_and_what_does_not_fit_is_lost() {
    let (mut bench, other, _) = card(0);
    give(&mut bench, 4, 2048);
    other.send(&packet(1000)).unwrap();
    other.send(&packet(3000)).unwrap();
    other.send(&packet(2048)).unwrap();
    bench.run();
    assert_eq!(received(&mut bench, 2048), Some(packet(1000)));
    assert_eq!(received(&mut bench, 2048), Some(packet(2048)));
    assert_eq!(received(&mut bench, 2048), None);
    assert!(!bench.failed());
}

#[test]
fn packets_wait_while_the_guest_has_no_room_for_a_large_one() {
    let (mut bench, other, _) = card(MRG_RXBUF | GUEST_TSO);
    give(&mut bench, 10, 4096);
    other.send(&packet(50_000)).unwrap();
    bench.run();
    assert_eq!(received(&mut bench, 4096), None);
    for i in 10..20 {
        bench.drivers[0].add(&[], &[(RX_BASE + i * 4096, 4096)]);
    }
    bench.kick(0);
    assert_eq!(received(&mut bench, 4096), Some(packet(50_000)));
}

#[test]
fn packets_are_sent_from_any_layout() {
    let (mut bench, other, _) = card(0);
    let sent = packet(5000);
    bench.drivers[1].poke(TX_BASE, &sent);
    bench.drivers[1].add(
        &[(TX_BASE, 5), (TX_BASE + 5, 10), (TX_BASE + 15, 4985)],
        &[],
    );
    bench.drivers[1].add(&[(TX_BASE, 60)], &[]);
    bench.kick(1);
    let mut buffer = vec![0; 70_000];
    let len = other.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], &sent);
    assert_eq!(other.recv(&mut buffer).unwrap(), 60);
    assert_eq!(bench.drivers[1].used(), Some((0, 0)));
    assert_eq!(bench.sink.queue_count(1), 1);
}

#[test]
fn packets_that_cannot_be_are_dropped() {
    let (mut bench, other, _) = card(0);
    let driver = &mut bench.drivers[1];
    driver.add(&[(TX_BASE, 25)], &[]);
    driver.add(&[(TX_BASE, 70_000)], &[]);
    driver.add(&[], &[(TX_BASE, 100)]);
    driver.add(&[(MEMORY as u64 - 10, 100)], &[]);
    bench.kick(1);
    assert!(other.recv(&mut [0; 100]).is_err());
    for _ in 0..4 {
        assert_eq!(bench.drivers[1].used().unwrap().1, 0);
    }
    assert!(!bench.failed());
}

#[test]
fn a_full_tap_holds_packets_back_and_loses_none() {
    let (backend, other, _) = wire();
    let small: libc::c_int = 4608;
    // SAFETY: the option is read from a local of the type it has.
    let result = unsafe {
        let len = size_of::<libc::c_int>() as u32;
        let value = (&raw const small).cast();
        libc::setsockopt(backend.fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, value, len)
    };
    assert_eq!(result, 0);
    let mut device = Net::new(&config(1));
    device.attach(vec![backend]).unwrap();
    let mut bench = Bench::with_features(device, MEMORY, 256, 0);
    for i in 0..200u64 {
        bench.drivers[1].poke(TX_BASE + i * 64, &packet(60));
        bench.drivers[1].poke(TX_BASE + i * 64 + 40, &(i as u16).to_le_bytes());
        bench.drivers[1].add(&[(TX_BASE + i * 64, 60)], &[]);
    }
    bench.kick(1);
    let mut used = std::iter::from_fn(|| bench.drivers[1].used()).count();
    assert!(used < 200, "the socket took everything at once");
    for i in 0..200u16 {
        let mut buffer = [0; 100];
        bench.run_until(|_| other.recv(&mut buffer).is_ok());
        assert_eq!(u16::from_le_bytes([buffer[40], buffer[41]]), i);
    }
    bench.run();
    used += std::iter::from_fn(|| bench.drivers[1].used()).count();
    assert_eq!(used, 200);
}

#[test]
fn the_link_follows_the_cable_and_the_wish() {
    let mut bench = Bench::new(Net::new(&config(1)), MEMORY, 256);
    assert_eq!(status(&bench), 0);
    bench.drivers[1].add(&[(TX_BASE, 60)], &[]);
    bench.kick(1);
    assert_eq!(bench.drivers[1].used(), Some((0, 0)));

    let (backend, other, _) = wire();
    bench.device.attach(vec![backend]).unwrap();
    assert_eq!((status(&bench), bench.sink.config_count()), (1, 1));
    bench.drivers[1].add(&[(TX_BASE, 60)], &[]);
    bench.kick(1);
    assert_eq!(other.recv(&mut [0; 100]).unwrap(), 60);

    bench.device.set_link(false);
    assert_eq!((status(&bench), bench.sink.config_count()), (0, 2));
    bench.drivers[1].add(&[(TX_BASE, 60)], &[]);
    bench.kick(1);
    assert!(other.recv(&mut [0; 100]).is_err());
    bench.device.set_link(true);
    assert_eq!(status(&bench), 1);

    let (backend, ..) = wire();
    assert!(matches!(
        bench.device.attach(vec![backend]),
        Err(DeviceError::Busy(_))
    ));
    bench.device.detach().unwrap();
    assert_eq!((status(&bench), bench.sink.config_count()), (0, 4));
    assert!(matches!(bench.device.detach(), Err(DeviceError::Usage(_))));
    let two = vec![wire().0, wire().0];
    assert!(matches!(
        bench.device.attach(two),
        Err(DeviceError::Usage(_))
    ));
}

/// Sends a control command. Gives the acknowledgement.
fn control(bench: &mut Bench<Net>, queue: usize, command: &[u8]) -> u8 {
    let driver = &mut bench.drivers[queue];
    driver.poke(CONTROL, command);
    driver.poke(CONTROL + 0x100, &[0xee]);
    driver.add(&[(CONTROL, command.len() as u32)], &[(CONTROL + 0x100, 1)]);
    bench.kick(queue as u16);
    assert_eq!(bench.drivers[queue].used().unwrap().1, 1);
    bench.drivers[queue].peek(CONTROL + 0x100, 1)[0]
}

#[test]
fn the_driver_sets_the_address() {
    let (mut bench, ..) = card(0);
    let mut mac = [0; 6];
    bench.device.read_config(0, &mut mac);
    assert_eq!(mac, MAC);
    assert_eq!(control(&mut bench, 2, &[1, 1, 2, 9, 9, 9, 9, 9]), 0);
    bench.device.read_config(0, &mut mac);
    assert_eq!(mac, [2, 9, 9, 9, 9, 9]);
    assert_eq!(bench.device.mac(), mac);
}

#[test]
fn the_driver_chooses_pairs_and_offloads() {
    let mut device = Net::new(&config(2));
    let (first, _other, log) = wire();
    let (second, _another, second_log) = wire();
    device.attach(vec![first, second]).unwrap();
    let features = device.features();
    let mut bench = Bench::with_features(device, MEMORY, 256, features);
    assert_eq!(
        *log.lock().unwrap(),
        ["offloads true true true", "enabled true"]
    );
    assert_eq!(
        *second_log.lock().unwrap(),
        ["offloads true true true", "enabled false"]
    );
    assert_eq!(control(&mut bench, 4, &[4, 0, 2, 0]), 0);
    assert_eq!(second_log.lock().unwrap().last().unwrap(), "enabled true");
    let tso4_only = (1u64 << 1 | 1 << 7).to_le_bytes();
    assert_eq!(
        control(&mut bench, 4, &[&[5, 0], &tso4_only[..]].concat()),
        0
    );
    assert_eq!(
        second_log.lock().unwrap().last().unwrap(),
        "offloads true true false"
    );

    for wrong in [
        &[4, 0, 0, 0][..],
        &[4, 0, 3, 0],
        &[4, 0, 255, 255],
        &[4, 0, 1],
        &[4, 1, 1, 0],
        &[1, 1, 1, 2, 3],
        &[1, 0, 0, 0, 0, 0],
        &[0, 0, 1],
        &[5, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        &[9, 9],
    ] {
        assert_eq!(control(&mut bench, 4, wrong), 1, "{wrong:?}");
    }
    // A command too short to be one, and one without room for an answer.
    bench.drivers[4].add(&[(CONTROL, 1)], &[(CONTROL + 0x100, 1)]);
    bench.drivers[4].add(&[(CONTROL, 2)], &[]);
    bench.kick(4);
    assert_eq!(bench.drivers[4].used().unwrap().1, 1);
    assert_eq!(bench.drivers[4].used().unwrap().1, 0);
    assert!(!bench.failed());
}

#[test]
fn one_tap_serves_all_pairs_of_a_card() {
    let mut device = Net::new(&config(2));
    let (backend, other, _) = wire();
    device.attach(vec![backend]).unwrap();
    let mut bench = Bench::with_features(device, MEMORY, 256, MQ);
    assert_eq!(control(&mut bench, 4, &[4, 0, 2, 0]), 0);
    for queue in [1u16, 3] {
        bench.drivers[usize::from(queue)].add(&[(TX_BASE, 60)], &[]);
        bench.kick(queue);
        assert_eq!(other.recv(&mut [0; 100]).unwrap(), 60);
    }
}

#[test]
fn queues_that_are_no_pairs_are_refused() {
    let activate = |indices: &[usize], features| {
        let mut bench = Bench::with_features(Net::new(&config(2)), MEMORY, 256, MQ);
        bench.device.reset();
        let queues = indices.iter().map(|i| bench.drivers[*i].queue()).collect();
        let (_, interrupt) = crate::virtio::testing::RecordingSink::new();
        let events = crate::event::EventLoop::new().unwrap();
        struct Deaf;
        impl crate::event::Subscriber for Deaf {
            fn ready(&self, _token: u32, _events: vmm_sys_util::epoll::EventSet) {}
        }
        bench.device.activate(crate::virtio::Activation {
            memory: bench.memory.clone(),
            queues,
            features,
            interrupt,
            watches: events.watches(Arc::new(Deaf)),
        })
    };
    for (indices, features) in [
        (&[][..], MQ),
        (&[0][..], MQ),
        (&[1], MQ),
        (&[4], MQ),
        (&[2, 3], MQ),
        (&[0, 3], MQ),
        (&[0, 1, 2], MQ),
        (&[0, 1, 2, 3], 0),
    ] {
        assert!(
            matches!(activate(indices, features), Err(DeviceError::Driver(_))),
            "{indices:?}"
        );
    }
    activate(&[0, 1, 2, 3, 4], MQ).unwrap();
    activate(&[0, 1, 4], MQ).unwrap();
    activate(&[0, 1, 2], 0).unwrap();
}

#[test]
fn receive_buffers_taken_ahead_are_given_back_before_a_save() {
    let (mut bench, other, _) = card(MRG_RXBUF | GUEST_TSO);
    give(&mut bench, 100, 1536);
    other.send(&packet(3000)).unwrap();
    bench.run();
    bench.device.pause().unwrap();
    let rx = bench.device.queues()[0];
    assert_eq!((rx.next_avail, rx.next_used), (2, 2));
    other.send(&packet(100)).unwrap();
    bench.device.unpause();
    assert_eq!(received(&mut bench, 1536), Some(packet(3000)));
    assert_eq!(received(&mut bench, 1536), Some(packet(100)));
}

#[test]
fn a_card_goes_on_with_a_new_tap_after_a_restore() {
    let (mut bench, ..) = card(0);
    assert_eq!(control(&mut bench, 2, &[1, 1, 2, 9, 9, 9, 9, 9]), 0);
    bench.device.pause().unwrap();
    let state = bench.device.save().unwrap();
    // The same link: nothing to tell. No tap: the link is down now.
    for (attached, told) in [(true, 0), (false, 1)] {
        let mut device = Net::new(&config(1));
        device.restore(&state).unwrap();
        assert_eq!(device.mac(), [2, 9, 9, 9, 9, 9]);
        let (backend, _other, log) = wire();
        if attached {
            device.attach(vec![backend]).unwrap();
        }
        let bench = Bench::with_features(device, MEMORY, 256, 0);
        assert_eq!(
            (bench.sink.config_count(), bench.device.link_up()),
            (told, attached)
        );
        assert_eq!(log.lock().unwrap().len(), usize::from(attached));
    }
    assert!(matches!(
        Net::new(&config(2)).restore(&state),
        Err(DeviceError::State(_))
    ));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Packets of any size arrive whole and in order in buffers of any size.
    #[test]
    fn any_packets_fit_any_buffers(
        lens in proptest::collection::vec(14usize..5000, 1..20),
        buffer in 1000u32..5000,
    ) {
        let (mut bench, other, _) = card(MRG_RXBUF);
        for len in &lens {
            other.send(&packet(*len)).unwrap();
        }
        give(&mut bench, 250, buffer);
        for len in lens {
            prop_assert_eq!(received(&mut bench, u64::from(buffer)), Some(packet(len)));
        }
        prop_assert_eq!(received(&mut bench, u64::from(buffer)), None);
    }
}

/// Makes a tap interface, if this process may.
fn tap(name: &str, flags: i32) -> Option<OwnedFd> {
    // SAFETY: a system call with a constant string; the descriptor is ours if it succeeds.
    let fd = unsafe {
        let fd = libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if fd < 0 {
            return None;
        }
        OwnedFd::from_raw_fd(fd)
    };
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&(flags as u16).to_le_bytes());
    // SAFETY: TUNSETIFF reads and writes one `ifreq` of 40 bytes.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) };
    (result == 0).then_some(fd)
}

#[test]
fn a_real_tap_is_set_up_and_anything_else_refused() {
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(Tap::new(null.into()), Err(TapError::Call { .. })));
    let good = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let Some(fd) = tap("kilntest0", good) else {
        eprintln!("skipped: no tap can be made here");
        return;
    };
    let tap_queue = Tap::new(fd).unwrap();
    let all = Offloads {
        checksum: true,
        tso4: true,
        tso6: true,
    };
    tap_queue.set_offloads(all).unwrap();
    tap_queue.set_offloads(Offloads::default()).unwrap();
    drop(tap_queue);
    let plain = tap("kilntest1", libc::IFF_TAP | libc::IFF_NO_PI).unwrap();
    assert!(matches!(Tap::new(plain), Err(TapError::Flags { .. })));
    let multi = good | libc::IFF_MULTI_QUEUE;
    let queues = [(), ()].map(|()| Tap::new(tap("kilntest2", multi).unwrap()).unwrap());
    queues[1].set_enabled(false).unwrap();
    queues[1].set_enabled(false).unwrap();
    queues[1].set_enabled(true).unwrap();
    queues[1].set_enabled(true).unwrap();
}
