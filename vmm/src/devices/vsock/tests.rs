//! The device between real Unix sockets and a guest made of packets.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;

use super::connection::BUF_ALLOC;
use super::packet::{HEADER_LEN, Header, Op};
use super::*;
use crate::devices::testing::{BUFFERS_BASE, Bench};
use crate::virtio::VirtioDevice;

const CID: u64 = 3;
const MEMORY: usize = 8 << 20;
const RX_BASE: u64 = BUFFERS_BASE;
const RX_LEN: u32 = 4096;
const TX_BASE: u64 = BUFFERS_BASE + 0x20_0000;
const EVENT_BASE: u64 = BUFFERS_BASE + 0x60_0000;
const GUEST_CREDIT: u32 = 256 << 10;

struct World {
    bench: Bench<Vsock>,
    dir: TempDir,
    seen: Vec<(Header, Vec<u8>)>,
}

fn listener(dir: &TempDir) -> UnixListener {
    let path = dir.path().join("vsock");
    let _ = std::fs::remove_file(&path);
    UnixListener::bind(path).unwrap()
}

impl World {
    fn new() -> Self {
        Self::with_buffers(64)
    }

    fn with_buffers(count: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let device = Vsock::new(CID, Some(listener(&dir)));
        let mut world = World {
            bench: Bench::new(device, MEMORY, 256),
            dir,
            seen: Vec::new(),
        };
        for i in 0..count {
            world.give(i);
        }
        world.bench.kick(0);
        world
    }

    /// Gives the device the receive buffer with this number.
    fn give(&mut self, i: u64) {
        let addr = RX_BASE + i % 256 * u64::from(RX_LEN);
        self.bench.drivers[0].add(&[], &[(addr, RX_LEN)]);
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("vsock")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream
    }

    /// Collects what the device has sent so far, giving each buffer back.
    fn collect(&mut self) {
        self.bench.run();
        while let Some((head, len)) = self.bench.drivers[0].used() {
            // One descriptor a chain, in a ring of 256: the address follows from the table.
            let desc = self.bench.drivers[0]
                .peek(self.bench.drivers[0].desc_table() + u64::from(head) * 16, 8);
            let addr = u64::from_le_bytes(desc.try_into().unwrap());
            let raw = self.bench.drivers[0].peek(addr, len as usize);
            let header = Header::decode(raw[..HEADER_LEN as usize].try_into().unwrap());
            assert_eq!(header.len as usize, raw.len() - HEADER_LEN as usize);
            self.seen
                .push((header, raw[HEADER_LEN as usize..].to_vec()));
            self.bench.drivers[0].add(&[], &[(addr, RX_LEN)]);
            self.bench.kick(0);
        }
    }

    /// Waits for the next packet with this operation, skipping credit updates.
    fn expect(&mut self, op: Op) -> (Header, Vec<u8>) {
        for _ in 0..1000 {
            self.collect();
            self.seen
                .retain(|(header, _)| op == Op::CreditUpdate || header.op != Op::CreditUpdate);
            if !self.seen.is_empty() {
                let first = self.seen.remove(0);
                assert_eq!(first.0.op, op, "{first:?}");
                return first;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("no {op:?} within a second");
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let driver = &mut self.bench.drivers[1];
        driver.poke(TX_BASE, &header.encode());
        driver.poke(TX_BASE + 0x1000, data);
        let mut chain = vec![(TX_BASE, HEADER_LEN as u32)];
        if !data.is_empty() {
            chain.push((TX_BASE + 0x1000, data.len() as u32));
        }
        driver.add(&chain, &[]);
        self.bench.kick(1);
        let mut answered = false;
        while self.bench.drivers[1].used().is_some() {
            answered = true;
        }
        assert!(answered || self.bench.failed());
    }

    /// A stream to guest port 1024, open on both sides.
    fn open(&mut self) -> (UnixStream, Header) {
        let mut client = self.connect();
        client.write_all(b"CONNECT 1024\n").unwrap();
        let (request, _) = self.expect(Op::Request);
        assert_eq!(
            (request.src_cid, request.dst_cid, request.dst_port),
            (2, CID, 1024)
        );
        let guest = answer_to(&request);
        self.send(
            Header {
                op: Op::Response,
                ..guest
            },
            &[],
        );
        let mut line = vec![0; format!("OK {}\n", request.src_port).len()];
        client.read_exact(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", request.src_port).as_bytes());
        (client, guest)
    }
}

/// A header from the guest for the connection that `header` came on.
fn answer_to(header: &Header) -> Header {
    Header {
        buf_alloc: GUEST_CREDIT,
        ..header.reset_for()
    }
}

fn data_header(guest: Header, len: usize) -> Header {
    Header {
        op: Op::Data,
        len: len as u32,
        ..guest
    }
}

fn closed(client: &mut UnixStream) -> bool {
    matches!(client.read(&mut [0; 16]), Ok(0) | Err(_))
}

#[test]
fn data_flows_both_ways_after_the_handshake() {
    let mut world = World::new();
    let (mut client, guest) = world.open();
    client.write_all(b"hello guest").unwrap();
    let (header, data) = world.expect(Op::Data);
    assert_eq!(
        (header.dst_port, data.as_slice()),
        (1024, b"hello guest".as_slice())
    );
    world.send(data_header(guest, 10), b"hello host");
    let mut answer = [0; 10];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello host");
}

#[test]
fn a_greeting_in_pieces_with_data_behind_it_is_understood() {
    let mut world = World::new();
    let mut client = world.connect();
    client.write_all(b"CONN").unwrap();
    world.collect();
    client.write_all(b"ECT 77\nearly data").unwrap();
    let (request, _) = world.expect(Op::Request);
    assert_eq!(request.dst_port, 77);
    world.send(
        Header {
            op: Op::Response,
            ..answer_to(&request)
        },
        &[],
    );
    assert_eq!(world.expect(Op::Data).1, b"early data");
}

#[test]
fn a_wrong_greeting_closes_the_socket_and_the_guest_hears_nothing() {
    let mut world = World::new();
    for greeting in [
        "HELLO 1\n",
        "CONNECT x\n",
        "CONNECT 00000000000000000000000000000000000000",
    ] {
        let mut client = world.connect();
        client.write_all(greeting.as_bytes()).unwrap();
        world.collect();
        assert!(closed(&mut client), "{greeting}");
    }
    drop(world.connect());
    world.collect();
    assert!(world.seen.is_empty());
    assert_eq!(world.bench.device.connections(), 0);
}

#[test]
fn a_refusal_by_the_guest_closes_the_socket() {
    let mut world = World::new();
    let mut client = world.connect();
    client.write_all(b"CONNECT 1\n").unwrap();
    let (request, _) = world.expect(Op::Request);
    world.send(
        Header {
            op: Op::Reset,
            ..answer_to(&request)
        },
        &[],
    );
    assert!(closed(&mut client));
    world.collect();
    assert!(world.seen.is_empty());
    assert_eq!(world.bench.device.connections(), 0);
}

#[test]
fn either_side_can_end_its_half_and_still_be_sent_to() {
    let mut world = World::new();
    let (mut client, guest) = world.open();
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(world.expect(Op::Data).1, b"last words");
    assert_eq!(world.expect(Op::Shutdown).0.flags, 2);
    world.send(data_header(guest, 5), b"still");
    let mut text = [0; 5];
    client.read_exact(&mut text).unwrap();
    drop(client);
    assert_eq!(world.expect(Op::Shutdown).0.flags, 3);
    world.send(
        Header {
            op: Op::Reset,
            ..guest
        },
        &[],
    );
    assert_eq!(world.bench.device.connections(), 0);

    let (mut client, guest) = world.open();
    world.send(
        Header {
            op: Op::Shutdown,
            flags: 2,
            ..guest
        },
        &[],
    );
    assert!(closed(&mut client));
    client.write_all(b"still").unwrap();
    assert_eq!(world.expect(Op::Data).1, b"still");
    world.send(
        Header {
            op: Op::Shutdown,
            flags: 3,
            ..guest
        },
        &[],
    );
    world.expect(Op::Reset);
    assert_eq!(world.bench.device.connections(), 0);
}

#[test]
fn what_the_client_wrote_before_it_closed_reaches_the_guest() {
    let mut world = World::new();
    let (mut client, _) = world.open();
    let sent: Vec<u8> = (0..100_000u32).map(|i| (i * 31) as u8).collect();
    client.write_all(&sent).unwrap();
    drop(client);
    let mut got = Vec::new();
    while got.len() < sent.len() {
        got.extend(world.expect(Op::Data).1);
    }
    assert_eq!(got, sent);
    assert_eq!(world.expect(Op::Shutdown).0.flags, 3);
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut world = World::new();
    let (mut client, guest) = world.open();
    world.send(
        Header {
            op: Op::CreditUpdate,
            buf_alloc: 1000,
            ..guest
        },
        &[],
    );
    client.write_all(&[7; 3000]).unwrap();
    assert_eq!(world.expect(Op::Data).1.len(), 1000);
    world.expect(Op::CreditRequest);
    world.collect();
    assert!(world.seen.is_empty());
    world.send(
        Header {
            op: Op::CreditUpdate,
            buf_alloc: 1000,
            fwd_cnt: 600,
            ..guest
        },
        &[],
    );
    assert_eq!(world.expect(Op::Data).1.len(), 600);
    // A count that claims more than was ever sent is no credit at all.
    world.send(
        Header {
            op: Op::CreditUpdate,
            buf_alloc: 1000,
            fwd_cnt: 9999,
            ..guest
        },
        &[],
    );
    world.expect(Op::CreditRequest);
    world.collect();
    assert!(world.seen.is_empty());
    world.send(
        Header {
            op: Op::CreditUpdate,
            buf_alloc: 4000,
            fwd_cnt: 1600,
            ..guest
        },
        &[],
    );
    assert_eq!(world.expect(Op::Data).1.len(), 1400);
}

#[test]
fn a_guest_that_ignores_its_credit_loses_the_connection() {
    let mut world = World::new();
    let (mut client, guest) = world.open();
    let chunk = vec![1; 32 << 10];
    // The socket takes some; what it does not take waits in the device, up to its limit.
    let mut sent = 0u32;
    while world.bench.device.connections() == 1 {
        world.send(data_header(guest, chunk.len()), &chunk);
        sent += chunk.len() as u32;
        assert!(sent < 64 << 20);
    }
    assert!(sent > BUF_ALLOC);
    world.expect(Op::Reset);
    let mut all = Vec::new();
    let _ = client.read_to_end(&mut all);
    assert!(all.len() < sent as usize);
}

#[test]
fn a_slow_client_holds_the_guest_back_and_loses_nothing() {
    let mut world = World::new();
    let (mut client, guest) = world.open();
    let total = 3 << 20;
    let data: Vec<u8> = (0..total).map(|i: u32| (i ^ i >> 8) as u8).collect();
    let (mut sent, mut got) = (0usize, Vec::<u8>::new());
    let (mut buf_alloc, mut fwd_cnt) = (BUF_ALLOC, 0u32);
    let mut stalls = 0;
    while got.len() < data.len() {
        world.collect();
        for (header, _) in std::mem::take(&mut world.seen) {
            assert_eq!(header.op, Op::CreditUpdate);
            (buf_alloc, fwd_cnt) = (header.buf_alloc, header.fwd_cnt);
        }
        let room = buf_alloc - (sent as u32).wrapping_sub(fwd_cnt);
        let len = (data.len() - sent).min(room as usize).min(16 << 10);
        if len > 0 {
            world.send(data_header(guest, len), &data[sent..sent + len]);
            sent += len;
        } else {
            stalls += 1;
            assert!(stalls < 10_000, "sent {sent}, read {}", got.len());
            let mut buffer = vec![0; 50_000];
            let n = client.read(&mut buffer).unwrap();
            got.extend(&buffer[..n]);
        }
    }
    assert_eq!(got, data);
    assert!(stalls > 2);
}

#[test]
fn what_the_guest_wrote_before_it_closed_reaches_a_client_that_takes_its_time() {
    let mut world = World::new();
    let (mut client, guest) = world.open();
    let data: Vec<u8> = (0..2 * BUF_ALLOC).map(|i| (i ^ i >> 8) as u8).collect();
    for part in data.chunks(16 << 10) {
        world.send(data_header(guest, part.len()), part);
    }
    let last = |op, flags| Header { op, flags, ..guest };
    world.send(last(Op::Shutdown, 3), &[]);
    // As Linux does when it has waited for our goodbye long enough.
    world.send(last(Op::Reset, 0), &[]);
    let mut got = Vec::<u8>::new();
    while got.len() < data.len() {
        let mut buffer = vec![0; 50_000];
        let n = client.read(&mut buffer).unwrap();
        assert!(n > 0, "it ends after {} of {} bytes", got.len(), data.len());
        got.extend(&buffer[..n]);
        world.collect();
    }
    assert_eq!(got, data);
    assert!(closed(&mut client));
    assert_eq!(world.bench.device.connections(), 0);

    // A client that loses patience instead.
    let mut world = World::new();
    let (client, guest) = world.open();
    for part in data.chunks(16 << 10) {
        world.send(data_header(guest, part.len()), part);
    }
    let last = |op, flags| Header { op, flags, ..guest };
    world.send(last(Op::Shutdown, 3), &[]);
    world.send(last(Op::Reset, 0), &[]);
    assert_eq!(world.bench.device.connections(), 1);
    drop(client);
    world.collect();
    assert_eq!(world.bench.device.connections(), 0);
}

#[test]
fn a_hundred_streams_share_the_device() {
    let mut world = World::new();
    let mut streams: Vec<_> = (0..100).map(|_| world.open()).collect();
    assert_eq!(world.bench.device.connections(), 100);
    for (i, (client, guest)) in streams.iter_mut().enumerate() {
        client.write_all(&vec![i as u8; 10_000]).unwrap();
        world.send(data_header(*guest, 500), &[i as u8; 500]);
    }
    let mut got = vec![0; 100];
    for _ in 0..1000 {
        world.collect();
        for (header, data) in std::mem::take(&mut world.seen) {
            let i = streams
                .iter()
                .position(|(_, g)| g.dst_port == header.src_port)
                .unwrap();
            assert!(data.iter().all(|b| usize::from(*b) == i));
            got[i] += data.len();
        }
        if got.iter().all(|n| *n == 10_000) {
            break;
        }
    }
    assert!(got.iter().all(|n| *n == 10_000), "{got:?}");
    for (i, (client, _)) in streams.iter_mut().enumerate() {
        let mut text = [0; 500];
        client.read_exact(&mut text).unwrap();
        assert_eq!(text, [i as u8; 500]);
    }
    drop(streams);
    for _ in 0..100 {
        world.expect(Op::Shutdown);
    }
}

#[test]
fn data_waits_for_the_guests_buffers() {
    let mut world = World::with_buffers(0);
    let mut client = world.connect();
    client.write_all(b"CONNECT 5\n").unwrap();
    world.collect();
    assert!(world.seen.is_empty());
    world.give(0);
    world.bench.kick(0);
    world.expect(Op::Request);
}

#[test]
fn odd_packets_are_answered_by_a_reset() {
    let mut world = World::new();
    let stray = Header {
        src_cid: CID,
        dst_cid: 2,
        src_port: 9,
        dst_port: 1024,
        len: 0,
        kind: 1,
        op: Op::Request,
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    };
    for odd in [
        stray,
        Header {
            op: Op::Data,
            ..stray
        },
        Header {
            op: Op::Unknown(99),
            ..stray
        },
        Header { kind: 2, ..stray },
    ] {
        world.send(odd, &[]);
        let (reset, _) = world.expect(Op::Reset);
        assert_eq!(
            (reset.dst_port, reset.src_port, reset.kind),
            (9, 1024, odd.kind)
        );
    }
    for silent in [
        Header {
            op: Op::Reset,
            ..stray
        },
        Header {
            src_cid: 4,
            ..stray
        },
        Header {
            dst_cid: 1,
            ..stray
        },
    ] {
        world.send(silent, &[]);
        world.collect();
        assert!(world.seen.is_empty());
    }
    // On an open connection, each of these ends it.
    for (op, kind, len, flags) in [
        (Op::Request, 1, 0, 0),
        (Op::Response, 1, 0, 0),
        (Op::Unknown(0), 1, 0, 0),
        (Op::CreditUpdate, 7, 0, 0),
        (Op::Data, 1, 100, 0),
        (Op::Data, 1, u32::MAX, 0),
        (Op::Shutdown, 1, 0, 3),
    ] {
        let (mut client, guest) = world.open();
        world.send(
            Header {
                op,
                kind,
                len,
                flags,
                ..guest
            },
            b"short",
        );
        world.expect(Op::Reset);
        assert!(closed(&mut client), "{op:?}");
        assert_eq!(world.bench.device.connections(), 0);
    }
    assert!(!world.bench.failed());
}

#[test]
fn malformed_chains_are_given_back() {
    let mut world = World::with_buffers(0);
    let driver = &mut world.bench.drivers[0];
    // Too small for a packet; not writable; outside memory. Then a good one.
    driver.add(&[], &[(RX_BASE, 44)]);
    driver.add(&[(RX_BASE, 4096)], &[]);
    driver.add(&[], &[(MEMORY as u64, 4096)]);
    driver.add(&[], &[(RX_BASE, 30), (RX_BASE + 30, 100)]);
    let mut client = world.connect();
    client.write_all(b"CONNECT 5\n").unwrap();
    world.bench.run();
    for _ in 0..3 {
        assert_eq!(world.bench.drivers[0].used().unwrap().1, 0);
    }
    assert_eq!(world.bench.drivers[0].used().unwrap().1, 44);
    let driver = &mut world.bench.drivers[1];
    driver.add(&[(TX_BASE, 43)], &[]);
    driver.add(&[], &[(TX_BASE, 44)]);
    driver.add(&[(MEMORY as u64, 44)], &[]);
    world.bench.kick(1);
    for _ in 0..3 {
        assert_eq!(world.bench.drivers[1].used().unwrap().1, 0);
    }
    assert!(!world.bench.failed());
}

#[test]
fn a_flood_of_stray_packets_waits_for_its_resets_to_be_read() {
    let mut world = World::with_buffers(0);
    let stray = Header {
        src_cid: CID,
        dst_cid: 2,
        src_port: 9,
        dst_port: 1024,
        len: 0,
        kind: 1,
        op: Op::Data,
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    };
    let driver = &mut world.bench.drivers[1];
    driver.poke(TX_BASE, &stray.encode());
    for _ in 0..200 {
        driver.add(&[(TX_BASE, 44)], &[]);
    }
    world.bench.kick(1);
    let answered = |world: &mut World| std::iter::from_fn(|| world.bench.drivers[1].used()).count();
    assert_eq!(answered(&mut world), 64);
    for i in 0..64 {
        world.give(i);
    }
    world.bench.kick(0);
    for _ in 0..200 {
        world.expect(Op::Reset);
    }
    assert_eq!(answered(&mut world), 136);
}

#[test]
fn connections_are_reset_on_resume_before_new_ones_are_made() {
    let mut world = World::new();
    let _stream = world.open();
    world.collect();
    world.bench.device.pause().unwrap();
    let state = world.bench.device.save().unwrap();
    let queues = world.bench.device.queues();

    let mut device = Vsock::new(0, Some(listener(&world.dir)));
    device.restore(&state).unwrap();
    let mut cid = [0; 8];
    device.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), CID);
    world.bench.device = device;
    for i in 0..4 {
        world.bench.drivers[2].add(&[], &[(EVENT_BASE + i * 8, 4)]);
    }
    world.bench.drivers[2].poke(EVENT_BASE, &[0xff; 8]);
    let active = world
        .bench
        .drivers
        .iter()
        .zip(queues)
        .map(|(driver, saved)| {
            let mut queue = driver.queue();
            queue.queue = saved.to_queue().unwrap();
            virtio_queue::QueueT::set_event_idx(&mut queue.queue, true);
            queue
        })
        .collect();
    let mut client = world.connect();
    client.write_all(b"CONNECT 1024\n").unwrap();
    world.bench.activate_with(0, active);
    assert_eq!(world.bench.drivers[2].used(), Some((0, 4)));
    assert_eq!(
        world.bench.drivers[2].peek(EVENT_BASE, 5),
        [0, 0, 0, 0, 0xff]
    );
    world.collect();
    assert!(world.seen.is_empty());
    // A kick that brings no buffer back is no acknowledgement.
    world.bench.kick(2);
    world.collect();
    assert!(world.seen.is_empty());
    // The position that makes the driver kick when it adds the next buffer.
    let driver = &world.bench.drivers[2];
    let avail_event = driver.peek(driver.used_ring() + 4 + 8 * u64::from(driver.size), 2);
    assert_eq!(avail_event, [4, 0]);
    world.bench.drivers[2].add(&[], &[(EVENT_BASE, 4)]);
    world.bench.kick(2);
    world.expect(Op::Request);
}

#[test]
fn a_state_without_connections_needs_no_reset() {
    let mut world = World::new();
    let (client, guest) = world.open();
    drop(client);
    world.expect(Op::Shutdown);
    world.send(
        Header {
            op: Op::Reset,
            ..guest
        },
        &[],
    );
    let state = world.bench.device.save().unwrap();
    let mut device = Vsock::new(CID, Some(listener(&world.dir)));
    device.restore(&state).unwrap();
    let mut world = World {
        bench: Bench::new(device, MEMORY, 256),
        ..world
    };
    world.bench.drivers[2].add(&[], &[(EVENT_BASE, 4)]);
    world.bench.kick(2);
    assert_eq!(world.bench.drivers[2].used(), None);
}

#[test]
fn unpausing_looks_again_at_every_socket() {
    let mut world = World::new();
    let (mut client, _) = world.open();
    world.bench.device.pause().unwrap();
    client.write_all(b"while paused").unwrap();
    let mut other = world.connect();
    other.write_all(b"CONNECT 2\n").unwrap();
    world.bench.device.unpause();
    let ops: Vec<_> = {
        world.collect();
        world.seen.iter().map(|(header, _)| header.op).collect()
    };
    assert!(
        ops.contains(&Op::Data) && ops.contains(&Op::Request),
        "{ops:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// Whatever the guest sends on an open connection, the device lives and every buffer comes back.
    #[test]
    fn no_packet_harms_the_device(packets in proptest::collection::vec(
        (0u16..10, any::<u16>(), prop_oneof![0u32..70_000, Just(u32::MAX)], any::<u32>(), any::<u32>(), any::<u32>(), 0usize..2000),
        1..40,
    )) {
        let mut world = World::new();
        let (_client, guest) = world.open();
        for (op, kind, len, flags, buf_alloc, fwd_cnt, actual) in packets {
            let mut raw = Header {
                kind: if kind < 60_000 { 1 } else { kind }, len, flags, buf_alloc, fwd_cnt, ..guest
            }.encode();
            raw[30..32].copy_from_slice(&op.to_le_bytes());
            world.send(Header::decode(&raw), &vec![5; actual]);
            world.collect();
        }
        prop_assert!(!world.bench.failed());
    }
}
