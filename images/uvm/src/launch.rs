//! A μVM is resumed and made one of its own: what every program that starts one does, once it has its files and a VMM
//! that waits.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use kiln_agent_api::client::Vsock;
use kiln_agent_api::slots;
use tokio::sync::watch;

use crate::Error;
use crate::baked::{Baked, Reading};
use crate::control::{Control, Resume};
use crate::ends::Ends;
use crate::guest::{Agent, GuestError, Identity};
use crate::machine::Machine;
use crate::scratch::Scratch;
use crate::size::Size;
use crate::timeline::{Timeline, step};
use crate::uvm::{Grown, Uvm};

/// A tap, and the address of the card in front of it.
#[derive(Debug)]
pub struct Tap {
    /// Its queue.
    pub fd: OwnedFd,
    /// The card's address. The first card has the one that the guest's identity says.
    pub mac: [u8; 6],
}

/// The host's sides of the devices.
#[derive(Debug)]
pub struct HostSide {
    /// Where the guest's ports are reached, and the socket that listens there.
    pub vsock: (PathBuf, UnixListener),
    /// What the writable layers lie on.
    pub scratch: Scratch,
    /// The folder that the guest sees by virtio-fs.
    pub share: Option<File>,
    /// What the network cards are connected to.
    pub taps: Vec<Tap>,
    /// Where the serial port's output goes.
    pub console: Option<File>,
}

/// What a μVM is to become.
#[derive(Debug, Clone)]
pub struct Order {
    /// How big; what it was baked with it has in any case.
    pub size: Size,
    /// What makes it one of its own.
    pub identity: Identity,
    /// Whether its agent may take as long as it likes to answer: whoever says so has a limit of their own.
    pub patient: bool,
}

/// Resumes the μVM in a VMM that waits for it and gives it its identity. When this returns, the gate for the user's
/// containers is open and the network is up; the guest may still be growing. A failure ends the VMM.
pub async fn launch(
    machine: Machine,
    baked: Baked,
    host: HostSide,
    order: Order,
    timeline: &Timeline,
) -> Result<Uvm, Error> {
    machine.keep(host.scratch.seat.clone());
    let base = Size::of(&baked.class);
    let size = order.size.at_least(base);
    let grow = (size != base).then_some(size);
    let vsock = Vsock::new(&host.vsock.0);
    let resuming = {
        let timeline = timeline.clone();
        machine.call("resume the guest", move |vmm| {
            timeline.time(step::RESUME, || resume(vmm, &baked, &host, &timeline))?;
            // The agent waits for those that it is told of and does not have yet.
            for tap in host.taps.get(1..).unwrap_or_default() {
                timeline.time(step::PLUG_NET, || vmm.plug_net(tap.fd.as_fd(), tap.mac))?;
            }
            if let Some(size) = grow {
                timeline.time(step::GROW, || vmm.resize(size.cpus, size.memory, 0))?;
            }
            Ok(baked)
        })
    };
    let baked = resuming.await?;
    let set_up = async {
        let agent = timeline
            .of(step::CONNECT, connect(&vsock, order.patient))
            .await?;
        let asked = timeline.now();
        let identity = agent.set_identity(&order.identity);
        let identity = timeline.of(step::IDENTITY, identity).await?;
        timeline.add_guest(step::IDENTITY, asked, &identity.spans);
        Ok(agent)
    };
    let action = "give the guest its identity";
    let agent = tokio::select! {
        agent = set_up => match agent {
            Ok(agent) => agent,
            Err(error) => return Err(machine.explain(action, error).await),
        },
        end = machine.ended() => return Err(Error::Ended { action, end }),
    };
    let grown = follow_growth(agent.clone(), size, timeline.clone());
    Ok(Uvm::new(machine, agent, grown, baked))
}

async fn connect(vsock: &Vsock, patient: bool) -> Result<Agent, GuestError> {
    match patient {
        true => Agent::connect_patiently(vsock).await,
        false => Agent::connect(vsock).await,
    }
}

/// Most pods have one container, and so one disk that comes later; some have a second or a volume.
const DISKS: u8 = 2;

fn resume(vmm: &Control, baked: &Baked, host: &HostSide, timeline: &Timeline) -> Result<(), Error> {
    let mut ends = Ends::new();
    ends.disks_later(DISKS);
    ends.listener(slots::VSOCK, &host.vsock.1);
    host.scratch.end(&mut ends, baked);
    for (slot, image) in &baked.disks {
        ends.disk(*slot, image, true);
    }
    if let Some(share) = &host.share {
        ends.directory(slots::FS, share);
    }
    if let Some(tap) = host.taps.first() {
        ends.tap(slots::NET, &tap.fd);
    }
    let (touched, one_by_one) = match &baked.reading {
        Reading::Ahead(touched) => (&touched[..], false),
        Reading::OneByOne => (&[][..], true),
    };
    let asked = timeline.now();
    let steps = vmm.resume(
        &Resume {
            state: &baked.state,
            memory: &baked.memory,
            touched,
            one_by_one,
            console: host.console.as_ref(),
        },
        ends,
    )?;
    timeline.add_vmm(asked, &steps);
    Ok(())
}

/// Waits, in the background, until the guest has what was plugged.
fn follow_growth(agent: Agent, size: Size, timeline: Timeline) -> watch::Receiver<Grown> {
    let (tell, grown) = watch::channel(None);
    tokio::spawn(async move {
        let online = agent.set_resources(size.cpus, size.memory);
        let result = timeline.of(step::GROWN, online).await;
        tell.send_replace(Some(result.map_err(|error| format!("{size}: {error}"))));
    });
    grown
}
