//! What comes and goes over vsock and over the network card.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::uvm::{Uvm, slots};
use kiln_e2e::{Test, cases};
use kiln_uvm::ends::Ends;
use sha2::{Digest, Sha256};

use super::{baked, blocking};
use crate::suite::same;

pub(super) fn cases() -> Vec<Case> {
    cases![
        a_hundred_streams_at_once_mix_up_nothing,
        a_hundred_megabytes_arrive_whole_through_the_network_card.limit(300),
    ]
}

async fn a_hundred_streams_at_once_mix_up_nothing(test: Test) -> Result<()> {
    blocking(test, |dir| {
        const COUNT: usize = 100;
        const BYTES: usize = 200_000;
        let uvm = Uvm::resume(dir, &baked()?, Ends::new())?;
        // All are open before the first is used, each to a process of the guest's.
        let mut streams = (0..COUNT)
            .map(|_| uvm.connect())
            .collect::<Result<Vec<_>>>()?;
        for (i, stream) in streams.iter_mut().enumerate() {
            // Much in one direction, then much in the other.
            let text = format!("{i:03}-").repeat(5_000);
            let script = format!(
                "x={text}; echo ${{#x}}; echo \"$x\" | cut -c 19997-20000; yes stream {i:03} | head -c {BYTES}"
            );
            stream.write_all(format!("{}\n{script}", script.len()).as_bytes())?;
        }
        for (i, stream) in streams.iter_mut().enumerate().rev() {
            let mut got = String::new();
            stream
                .read_to_string(&mut got)
                .with_context(|| format!("stream {i}"))?;
            let mut expected = format!("stream {i:03}\n").repeat(BYTES / 11 + 1);
            expected.truncate(BYTES);
            let expected = format!("20000\n{i:03}-\n{expected}\nexit=0\n");
            ensure!(
                got == expected,
                "stream {i}: {} bytes that begin with {:?}, expected {}",
                got.len(),
                got.get(..40),
                expected.len()
            );
        }
        Ok(())
    })
    .await
}

const TAP: &str = "kilntest0";
const HERE: &str = "10.99.0.1";

async fn a_hundred_megabytes_arrive_whole_through_the_network_card(test: Test) -> Result<()> {
    blocking(test, |dir| {
        const BYTES: usize = 100 << 20;
        let uvm = Uvm::resume(dir, &baked()?, Ends::new())?;
        let tap = open_tap(TAP)?;
        run(&["ip", "addr", "add", "10.99.0.1/24", "dev", TAP])?;
        run(&["ip", "link", "set", TAP, "up"])?;
        uvm.vmm().connect_net(slots::NET, Some(tap.as_fd()))?;
        uvm.sh(&format!(
            "n=$(basename /sys/bus/pci/devices/0000:00:{:02x}.0/virtio*/net/*); \
             ip addr add 10.99.0.2/24 dev $n; ip link set $n up; \
             for i in $(seq 50); do [ $(cat /sys/class/net/$n/carrier) = 1 ] && exit 0; usleep 100000; done; exit 1",
            slots::NET
        ))?;
        let listener = TcpListener::bind((HERE, 0))?;
        let port = listener.local_addr()?.port();
        // To the guest.
        let sender = std::thread::spawn({
            let listener = listener.try_clone()?;
            move || -> Result<String> {
                let (mut socket, _) = listener.accept()?;
                socket.set_write_timeout(Some(Duration::from_secs(60)))?;
                let mut hash = Sha256::new();
                let mut block = vec![0u8; 1 << 20];
                File::open("/dev/urandom")?.read_exact(&mut block)?;
                for i in 0..BYTES >> 20 {
                    block[..8].copy_from_slice(&i.to_le_bytes());
                    hash.update(&block);
                    socket.write_all(&block)?;
                }
                socket.shutdown(Shutdown::Write)?;
                Ok(hex(hash))
            }
        });
        let got = uvm.sh(&format!("nc {HERE} {port} < /dev/null | sha256sum"));
        let got = got.map_err(|error| uvm.explain(&error))?;
        let sent = sender.join().map_err(|_| anyhow!("the sender died"))??;
        same!(got.split_whitespace().next(), Some(sent.as_str()));
        // And from it.
        let receiver = std::thread::spawn(move || -> Result<(usize, String)> {
            let (socket, _) = listener.accept()?;
            receive(socket)
        });
        let sum = uvm.sh(&format!(
            "head -c 1048576 /dev/urandom > /tmp/r; for i in $(seq 32); do echo $i; cat /tmp/r; done > /tmp/f; \
             sha256sum < /tmp/f; nc {HERE} {port} < /tmp/f"
        ))?;
        let (bytes, received) = receiver
            .join()
            .map_err(|_| anyhow!("the receiver died"))??;
        ensure!(bytes > 32 << 20, "{bytes} bytes came");
        same!(sum.split_whitespace().next(), Some(received.as_str()));
        // The cable is pulled.
        uvm.vmm().connect_net(slots::NET, None)?;
        uvm.sh(&format!(
            "for i in $(seq 50); do [ $(cat /sys/bus/pci/devices/0000:00:{:02x}.0/virtio*/net/*/carrier) = 0 ] && exit 0; \
             usleep 100000; done; exit 1",
            slots::NET
        ))?;
        Ok(())
    })
    .await
}

fn receive(mut socket: TcpStream) -> Result<(usize, String)> {
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    let (mut hash, mut sum) = (Sha256::new(), 0);
    let mut block = vec![0u8; 1 << 16];
    loop {
        match socket.read(&mut block)? {
            0 => return Ok((sum, hex(hash))),
            length => {
                hash.update(&block[..length]);
                sum += length;
            }
        }
    }
}

fn hex(hash: Sha256) -> String {
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A tap as the VMM wants it; it goes with its descriptor.
fn open_tap(name: &str) -> Result<File> {
    /// `_IOW('T', 202, int)`.
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("opening /dev/net/tun")?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // Flags of 16 bits.
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &raw mut request) };
    ensure!(
        done == 0,
        "making the tap {name}: {}",
        std::io::Error::last_os_error()
    );
    Ok(file)
}

fn run(command: &[&str]) -> Result<()> {
    let output = Command::new("busybox").args(command).output()?;
    ensure!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
