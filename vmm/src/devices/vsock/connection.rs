//! One stream: a Unix socket on the host's side, a vsock port pair on the guest's.
//!
//! Flow control works on both ends. Towards the guest no more is read from the socket than the guest has
//! said it can take; from the guest no more is taken than [`BUF_ALLOC`], which is where bytes wait that
//! the socket does not take yet. A guest that sends more loses the connection.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::packet::{
    HEADER_LEN, HOST_CID, Header, MAX_DATA, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::socket;
use crate::devices::chain::Chain;
use crate::devices::ring::Mem;
use crate::event::WatchGuard;

/// Bytes from the guest that may wait for the socket.
pub(super) const BUF_ALLOC: u32 = 128 << 10;
/// `CONNECT 4294967295\n` and some.
const MAX_GREETING: usize = 32;

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Waiting for the client to name a port.
    Greeting,
    /// The guest has been asked, or is about to be.
    Connecting,
    /// Data flows.
    Open,
    /// The client is gone and the guest has been told; waiting for it to say goodbye.
    Lingering,
    /// The guest is gone; the client has not read everything yet.
    Draining,
}

/// The connection is to be ended with a reset.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    /// The other side of the socket went away in the middle.
    #[error("the client is gone: {0}")]
    Client(#[source] io::Error),
    /// The client did not say what it wants.
    #[error("the client's greeting is not `CONNECT <port>`")]
    Greeting,
    /// The guest broke the protocol.
    #[error("the guest broke the protocol: {0}")]
    Guest(&'static str),
    /// Both sides are through.
    #[error("closed")]
    Closed,
}

/// What [`Connection::next_packet`] has for the guest.
#[derive(Debug)]
pub(super) enum Next {
    /// This header, and so many bytes already placed behind it.
    Packet(Header),
    /// Nothing for now.
    Nothing,
    /// A last reset, after which the connection is gone.
    Last(Header),
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    // Before the stream: a watch ends before its descriptor is closed.
    watch: Option<WatchGuard>,
    stream: Option<UnixStream>,
    phase: Phase,
    guest_cid: u64,
    local_port: u32,
    peer_port: u32,

    readable: bool,
    writable: bool,
    hung_up: bool,
    /// The client sends no more.
    client_done: bool,
    /// What the guest said it will not do any more.
    guest_shutdown: u32,
    /// The client has been told that the guest sends no more.
    write_ended: bool,

    /// From the guest, waiting for the socket.
    out: VecDeque<u8>,
    /// Bytes from the guest so far, and how many of them have left for the socket.
    received: u32,
    forwarded: u32,
    /// `forwarded` as the guest last heard of it.
    announced: u32,

    /// Bytes to the guest so far, what it said it has consumed, and how much it buffers.
    sent: u32,
    peer_forwarded: u32,
    peer_buf_alloc: u32,

    owe_request: bool,
    owe_shutdown: Option<u32>,
    owe_credit: bool,
    owe_reset: bool,
    asked_for_credit: bool,
    /// Whether the connection is in the device's list of those with something to send.
    pub(super) queued: bool,
}

impl Connection {
    /// A client that was just accepted.
    pub(super) fn new(stream: UnixStream, guest_cid: u64, local_port: u32) -> Self {
        Connection {
            watch: None,
            stream: Some(stream),
            phase: Phase::Greeting,
            guest_cid,
            local_port,
            peer_port: 0,
            readable: true,
            writable: true,
            hung_up: false,
            client_done: false,
            guest_shutdown: 0,
            write_ended: false,
            out: VecDeque::new(),
            received: 0,
            forwarded: 0,
            announced: 0,
            sent: 0,
            peer_forwarded: 0,
            peer_buf_alloc: 0,
            owe_request: false,
            owe_shutdown: None,
            owe_credit: false,
            owe_reset: false,
            asked_for_credit: false,
            queued: false,
        }
    }

    /// Keeps the watch of the socket as long as the socket.
    pub(super) fn keep(&mut self, watch: WatchGuard) {
        self.watch = Some(watch);
    }

    /// The host's and the guest's port, once the client has named the latter.
    pub(super) fn ports(&self) -> Option<(u32, u32)> {
        (self.phase != Phase::Greeting).then_some((self.local_port, self.peer_port))
    }

    /// Whether only the guest's goodbye is missing.
    pub(super) fn is_lingering(&self) -> bool {
        self.phase == Phase::Lingering
    }

    /// Whether [`next_packet`](Self::next_packet) is worth a buffer of the guest's.
    pub(super) fn has_something(&self) -> bool {
        if self.phase == Phase::Draining {
            return false;
        }
        self.owe_reset
            || self.owe_request
            || self.owe_credit
            || self.owe_shutdown.is_some()
            || (self.may_read() && (self.credit() > 0 || !self.asked_for_credit))
    }

    fn may_read(&self) -> bool {
        self.phase == Phase::Open
            && self.readable
            && !self.client_done
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// How much the guest can take.
    fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_buf_alloc.saturating_sub(in_flight)
    }

    /// Takes in what the socket is ready for.
    pub(super) fn on_ready(&mut self, ready: EventSet) -> Result<(), Ended> {
        let gone = EventSet::HANG_UP | EventSet::ERROR;
        if ready.intersects(EventSet::IN | EventSet::READ_HANG_UP | gone) {
            self.readable = true;
        }
        if ready.intersects(gone) {
            self.hung_up = true;
            if self.phase == Phase::Draining {
                return Err(Ended::Closed);
            }
            if self.client_done || self.phase == Phase::Connecting {
                self.leave();
            }
        }
        if ready.contains(EventSet::OUT) {
            self.writable = true;
            self.flush()?;
        }
        Ok(())
    }

    /// Reads the client's greeting. `Ok(true)` when the guest is to be asked.
    pub(super) fn greet(&mut self) -> Result<bool, Ended> {
        if self.phase != Phase::Greeting {
            return Ok(false);
        }
        let Some(stream) = &self.stream else {
            return Ok(false);
        };
        let mut buffer = [0; MAX_GREETING];
        let line = match socket::take_line(stream, &mut buffer) {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(false),
            Err(e) if e.kind() == io::ErrorKind::InvalidData => return Err(Ended::Greeting),
            Err(e) => return Err(Ended::Client(e)),
        };
        self.peer_port = parse_greeting(line).ok_or(Ended::Greeting)?;
        self.phase = Phase::Connecting;
        self.owe_request = true;
        Ok(true)
    }

    /// Handles a packet of the guest's for this connection.
    pub(super) fn on_packet(
        &mut self,
        mem: &Mem,
        header: &Header,
        chain: &Chain,
    ) -> Result<(), Ended> {
        if header.op == Op::Reset {
            let orderly = self.guest_shutdown & SHUTDOWN_SEND != 0;
            if !orderly || self.out.is_empty() {
                return Err(Ended::Closed);
            }
            // A guest that has closed waits some seconds for us and then forgets the stream. The client may take
            // longer to read what is its own.
            self.phase = Phase::Draining;
            self.guest_shutdown = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
            return Ok(());
        }
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.asked_for_credit = false;
        }
        match (header.op, self.phase) {
            (Op::Response, Phase::Connecting) => self.on_response(),
            (Op::Data, Phase::Open) => self.on_data(mem, header, chain),
            (Op::CreditUpdate, Phase::Open | Phase::Lingering) => Ok(()),
            (Op::CreditRequest, Phase::Open | Phase::Lingering) => {
                self.owe_credit = true;
                Ok(())
            }
            (Op::Shutdown, Phase::Open | Phase::Lingering) => self.on_shutdown(header.flags),
            // Data for a client that has left: a reset is what tells the guest.
            (Op::Data, Phase::Lingering) => Err(Ended::Closed),
            _ => Err(Ended::Guest(
                "a packet that does not fit the connection's state",
            )),
        }
    }

    fn on_response(&mut self) -> Result<(), Ended> {
        self.phase = Phase::Open;
        let Some(stream) = &self.stream else {
            return Ok(());
        };
        let greeting = format!("OK {}\n", self.local_port);
        // Nothing was sent on the socket before: this much always fits.
        match socket::send_bytes(stream, greeting.as_bytes()) {
            Ok(n) if n == greeting.len() => Ok(()),
            Ok(_) => Err(Ended::Client(io::ErrorKind::WriteZero.into())),
            Err(e) => Err(Ended::Client(e)),
        }
    }

    fn on_data(&mut self, mem: &Mem, header: &Header, chain: &Chain) -> Result<(), Ended> {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            return Err(Ended::Guest("data after its own end"));
        }
        if header.len > self.room() {
            return Err(Ended::Guest("more data than it had credit for"));
        }
        let data = chain
            .readable
            .range(HEADER_LEN, u64::from(header.len))
            .map_err(|_| Ended::Guest("less data than its header says"))?;
        self.received = self.received.wrapping_add(header.len);
        let mut taken = 0;
        if self.out.is_empty()
            && self.writable
            && header.len > 0
            && let Some(stream) = &self.stream
        {
            match socket::send(stream, mem, &data) {
                Ok(n) => taken = n as u64,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(e) => return Err(Ended::Client(e)),
            }
        }
        // At most `header.len`.
        self.forwarded = self.forwarded.wrapping_add(taken as u32);
        if taken < data.len() {
            // At most `BUF_ALLOC`, as checked above.
            let mut rest = vec![0; (data.len() - taken) as usize];
            data.read(mem, taken, &mut rest)
                .map_err(|_| Ended::Guest("a buffer outside memory"))?;
            self.out.extend(rest);
            self.flush()?;
        }
        self.consider_credit();
        Ok(())
    }

    fn on_shutdown(&mut self, flags: u32) -> Result<(), Ended> {
        let before = self.guest_shutdown;
        self.guest_shutdown |= flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
        if self.phase == Phase::Lingering {
            return Err(Ended::Closed);
        }
        if self.guest_shutdown & !before & SHUTDOWN_RECEIVE != 0
            && let Some(stream) = &self.stream
        {
            // Fails only if the client has closed, which is noticed elsewhere.
            let _ = stream.shutdown(Shutdown::Read);
        }
        self.flush()
    }

    /// Sends what waits for the socket.
    fn flush(&mut self) -> Result<(), Ended> {
        let Some(stream) = &self.stream else {
            return Ok(());
        };
        while self.writable && !self.out.is_empty() {
            let (first, _) = self.out.as_slices();
            match socket::send_bytes(stream, first) {
                Ok(n) => {
                    self.out.drain(..n);
                    // At most `BUF_ALLOC`.
                    self.forwarded = self.forwarded.wrapping_add(n as u32);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(e) => return Err(Ended::Client(e)),
            }
        }
        if self.out.is_empty() {
            // An idle connection keeps no buffer.
            self.out = VecDeque::new();
            match self.guest_shutdown {
                0 | SHUTDOWN_RECEIVE => {}
                SHUTDOWN_SEND => {
                    // Once: every shutdown is an edge that leads back here.
                    if !std::mem::replace(&mut self.write_ended, true) {
                        let _ = stream.shutdown(Shutdown::Write);
                    }
                }
                _ => return Err(Ended::Closed),
            }
        }
        self.consider_credit();
        Ok(())
    }

    /// How much the guest may send.
    fn room(&self) -> u32 {
        BUF_ALLOC.saturating_sub(self.received.wrapping_sub(self.forwarded))
    }

    /// Tells the guest of new room before it believes that there is none.
    fn consider_credit(&mut self) {
        let believed = BUF_ALLOC.saturating_sub(self.received.wrapping_sub(self.announced));
        if believed < BUF_ALLOC / 2 && self.room() > believed {
            self.owe_credit = true;
        }
    }

    /// The client has closed its socket altogether.
    fn leave(&mut self) {
        if self.phase == Phase::Open {
            self.owe_shutdown = Some(SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
            self.phase = Phase::Lingering;
        } else if self.phase == Phase::Connecting {
            self.owe_reset = true;
        }
        self.watch = None;
        self.stream = None;
        self.out = VecDeque::new();
    }

    /// The next packet for the guest. Data goes into `chain` behind the place for the header.
    pub(super) fn next_packet(&mut self, mem: &Mem, chain: &Chain) -> Next {
        if self.owe_reset {
            return Next::Last(self.header(Op::Reset));
        }
        if std::mem::take(&mut self.owe_request) {
            return Next::Packet(self.header(Op::Request));
        }
        if self.may_read() {
            let credit = self.credit();
            if credit == 0 {
                if !std::mem::replace(&mut self.asked_for_credit, true) {
                    return Next::Packet(self.header(Op::CreditRequest));
                }
            } else {
                match self.read(mem, chain, credit) {
                    Ok(0) => {}
                    Ok(len) => {
                        self.sent = self.sent.wrapping_add(len);
                        return Next::Packet(Header {
                            len,
                            ..self.header(Op::Data)
                        });
                    }
                    Err(_) => return Next::Last(self.header(Op::Reset)),
                }
            }
        }
        if let Some(flags) = self.owe_shutdown.take() {
            return Next::Packet(Header {
                flags,
                ..self.header(Op::Shutdown)
            });
        }
        if self.owe_credit {
            return Next::Packet(self.header(Op::CreditUpdate));
        }
        Next::Nothing
    }

    /// Reads from the socket into the guest's buffer. 0 when there is nothing, or no more ever.
    fn read(&mut self, mem: &Mem, chain: &Chain, credit: u32) -> io::Result<u32> {
        let Some(stream) = &self.stream else {
            return Ok(0);
        };
        let space = chain.writable.len().saturating_sub(HEADER_LEN);
        let len = space.min(u64::from(credit.min(MAX_DATA)));
        let place = chain
            .writable
            .range(HEADER_LEN, len)
            .map_err(io::Error::other)?;
        match socket::receive(stream, mem, &place) {
            Ok(0) => {
                self.client_done = true;
                if self.hung_up {
                    self.leave();
                } else {
                    self.owe_shutdown = Some(SHUTDOWN_SEND);
                }
                Ok(0)
            }
            // At most `MAX_DATA`.
            Ok(n) => Ok(n as u32),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(0)
            }
            Err(e) => Err(e),
        }
    }

    /// A header of this connection, which also carries the state of our buffer.
    fn header(&mut self, op: Op) -> Header {
        self.announced = self.forwarded;
        self.owe_credit = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.local_port,
            dst_port: self.peer_port,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded,
        }
    }

    /// The packet that ends this connection.
    pub(super) fn reset(&mut self) -> Header {
        self.header(Op::Reset)
    }
}

/// `CONNECT <port>\n`.
fn parse_greeting(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let port = text.strip_prefix("CONNECT ")?.strip_suffix('\n')?;
    // `parse` would take a sign.
    port.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| port.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greeting_names_a_port_and_nothing_else() {
        assert_eq!(parse_greeting(b"CONNECT 1024\n"), Some(1024));
        assert_eq!(parse_greeting(b"CONNECT 4294967295\n"), Some(u32::MAX));
        for wrong in [
            "CONNECT 4294967296\n",
            "CONNECT +1\n",
            "CONNECT -1\n",
            "CONNECT \n",
            "CONNECT 1 \n",
            "connect 1\n",
            "CONNECT 1",
            "\n",
        ] {
            assert_eq!(parse_greeting(wrong.as_bytes()), None, "{wrong:?}");
        }
    }
}
