//! The network of a container that a person started: none, or a tap that is there already and that the person
//! wires up as they like.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use kiln_agent_api::{proto, slots};
use kiln_uvm::{launch, random};

/// The interface's name in the guest.
const INTERFACE: &str = "eth0";
/// Length of the header before every frame, as virtio 1 has it.
const VNET_HEADER: libc::c_int = 12;
// linux/if_tun.h: _IOW('T', 202, int) and _IOW('T', 216, int).
const TUNSETIFF: u32 = 0x4004_54ca;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;

/// What the command line says of it: `none`, or `tap:NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum Wanted {
    /// A card without a cable.
    #[default]
    None,
    /// The tap of this name.
    Tap(String),
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Wanted, String> {
        match text.split_once(':') {
            None if text == "none" => Ok(Wanted::None),
            // The kernel's limit, with the zero byte behind it.
            Some(("tap", name)) if (1..libc::IFNAMSIZ).contains(&name.len()) => {
                Ok(Wanted::Tap(name.to_owned()))
            }
            _ => Err(format!("'{text}' is no network: use none or tap:NAME")),
        }
    }
}

/// An address with the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    ip: IpAddr,
    prefix: u8,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        let wrong = || format!("'{text}' is no address with a prefix: write it like 10.0.0.2/24");
        let (ip, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let ip: IpAddr = ip.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        (prefix <= most)
            .then_some(Address { ip, prefix })
            .ok_or_else(wrong)
    }
}

/// A container's network.
#[derive(Debug, Default)]
pub(super) struct Net {
    tap: Option<Tap>,
    addresses: Vec<Address>,
    gateways: Vec<IpAddr>,
    name_servers: Vec<IpAddr>,
}

#[derive(Debug)]
struct Tap {
    fd: OwnedFd,
    mtu: u32,
}

impl Net {
    /// Takes the tap, if one is wanted.
    pub(super) fn open(
        wanted: &Wanted,
        addresses: &[Address],
        gateways: &[IpAddr],
        name_servers: &[IpAddr],
    ) -> Result<Net> {
        let tap = match wanted {
            Wanted::None => {
                ensure!(
                    addresses.is_empty() && gateways.is_empty() && name_servers.is_empty(),
                    "a container without a network has no addresses: name a tap (--net tap:NAME)"
                );
                None
            }
            Wanted::Tap(name) => Some(Tap::open(name)?),
        };
        Ok(Net {
            tap,
            addresses: addresses.to_vec(),
            gateways: gateways.to_vec(),
            name_servers: name_servers.to_vec(),
        })
    }

    /// Whether the guest's card has no cable.
    pub(super) fn is_none(&self) -> bool {
        self.tap.is_none()
    }

    /// What the guest's card is connected to.
    pub(super) fn taps(&self) -> Result<Vec<launch::Tap>> {
        let tap = |tap: &Tap| {
            Ok(launch::Tap {
                fd: tap.fd.try_clone()?,
                mac: slots::PLACEHOLDER_MAC,
            })
        };
        let taps: io::Result<Vec<_>> = self.tap.iter().map(tap).collect();
        taps.context("passing the tap on")
    }

    /// What the guest's agent sets up. Two cards never have one address, with or without a cable.
    pub(super) fn in_the_guest(&self) -> Result<proto::Network> {
        let mac: [u8; 5] = random::bytes().context("making an address")?;
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        let mut interface = proto::Interface {
            mac: format!("02:{mac}"),
            down: true,
            ..Default::default()
        };
        let mut routes = Vec::new();
        if let Some(tap) = &self.tap {
            interface.name = INTERFACE.to_owned();
            interface.down = false;
            interface.mtu = tap.mtu;
            let text = |address: &Address| format!("{}/{}", address.ip, address.prefix);
            interface.addresses = self.addresses.iter().map(text).collect();
            routes.extend(self.gateways.iter().map(|gateway| proto::Route {
                gateway: gateway.to_string(),
                device: INTERFACE.to_owned(),
                ..Default::default()
            }));
        }
        Ok(proto::Network {
            interfaces: vec![interface],
            routes,
            ..Default::default()
        })
    }

    /// `/etc/resolv.conf`.
    pub(super) fn resolv_conf(&self) -> String {
        let line = |server: &IpAddr| format!("nameserver {server}\n");
        self.name_servers.iter().map(line).collect()
    }
}

impl Tap {
    /// Takes a tap that is there and that nobody else uses. It stays when the container goes.
    fn open(name: &str) -> Result<Tap> {
        let dir = Path::new("/sys/class/net").join(name);
        ensure!(
            dir.join("tun_flags").exists(),
            "there is no tap {name}: make one (ip tuntap add {name} mode tap; ip link set {name} up)"
        );
        let mtu = fs::read_to_string(dir.join("mtu"))
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let mtu = mtu.with_context(|| format!("the tap {name} has no MTU"))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .context("opening /dev/net/tun")?;
        attach(&file, name)
            .with_context(|| format!("taking the tap {name} (does something else use it?)"))?;
        Ok(Tap {
            fd: file.into(),
            mtu,
        })
    }
}

fn attach(file: &File, name: &str) -> io::Result<()> {
    // SAFETY: all of ifreq's fields are plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the ioctls read or write the ifreq and the int they are given, which live through the calls.
    let set = unsafe {
        libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &raw mut request) == 0
            && libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ as _, &VNET_HEADER) == 0
    };
    if set {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_and_addresses_are_read_and_wrong_ones_refused_with_the_form() {
        assert_eq!("none".parse(), Ok(Wanted::None));
        assert_eq!("tap:t0".parse(), Ok(Wanted::Tap("t0".into())));
        for wrong in ["", "tap", "tap:", "bridge", "tap:a-name-that-is-too-long"] {
            assert!(wrong.parse::<Wanted>().unwrap_err().contains("tap:NAME"));
        }
        let address: Address = "fd00::7/64".parse().unwrap();
        assert_eq!(address.prefix, 64);
        for wrong in ["10.0.0.2", "10.0.0.2/33", "x/8", "::1/129"] {
            assert!(wrong.parse::<Address>().unwrap_err().contains("/24"));
        }
    }

    #[test]
    fn container_without_a_tap_has_a_card_without_a_cable() {
        let net = Net::open(&Wanted::None, &[], &[], &[]).unwrap();
        let network = net.in_the_guest().unwrap();
        assert!(network.interfaces[0].down && network.routes.is_empty());
        assert!(net.taps().unwrap().is_empty());
        let address = ["10.0.0.2/24".parse().unwrap()];
        let error = Net::open(&Wanted::None, &address, &[], &[]).unwrap_err();
        assert!(error.to_string().contains("--net"));
        let error = Net::open(&Wanted::Tap("no-such-tap".into()), &[], &[], &[]).unwrap_err();
        assert!(error.to_string().contains("ip tuntap"), "{error}");
    }

    #[test]
    fn guest_is_told_its_addresses_gateways_and_name_servers() {
        let net = Net {
            tap: Some(Tap {
                fd: File::open("/dev/null").unwrap().into(),
                mtu: 1400,
            }),
            addresses: vec!["10.0.0.2/24".parse().unwrap()],
            gateways: vec!["10.0.0.1".parse().unwrap()],
            name_servers: vec!["10.0.0.1".parse().unwrap()],
        };
        let network = net.in_the_guest().unwrap();
        let interface = &network.interfaces[0];
        assert_eq!((interface.mtu, interface.down), (1400, false));
        assert_eq!(interface.addresses, ["10.0.0.2/24"]);
        assert_eq!(network.routes[0].gateway, "10.0.0.1");
        assert_eq!(net.resolv_conf(), "nameserver 10.0.0.1\n");
    }
}
