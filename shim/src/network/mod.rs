//! The pod's network: read from the namespace that CNI has set up, and handed to the guest.
//!
//! Every interface of the namespace that is up or has an address gets a tap beside it, and traffic control
//! redirects what arrives on the one to the other, whole frames, in the kernel. The guest's
//! interface has the same MAC address, addresses, routes and MTU, so that CNI, its network policies
//! and the neighbours see what they set up.

mod bpf;
mod forward;
mod inspect;
mod namespace;
mod routes;
mod tap;

pub use forward::{Forwarder, catch};
pub use inspect::{Interface, PodNetwork};
pub use namespace::enter;

use std::fs::File;
use std::io;

use kiln_uvm::launch::Tap;
use rtnetlink::Handle;
use rtnetlink::packet_route::link::LinkMessage;
use rtnetlink::packet_route::tc::TcHandle;

use crate::refusal::Refusal;

/// The network could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace can't be entered.
    #[error("enter the pod's network namespace")]
    Enter(#[source] io::Error),
    /// The kernel refused a netlink request.
    #[error("{action} {name}")]
    Netlink {
        /// What was asked.
        action: &'static str,
        /// Of which interface.
        name: String,
        /// Why not.
        #[source]
        source: Box<rtnetlink::Error>,
    },
    /// A tap can't be made.
    #[error("make the tap {name}; is the tun module loaded?")]
    Tap {
        /// Its name.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Connections inside the namespace can't be caught.
    #[error("catch the connections made in the pod's network namespace")]
    Forward(#[source] io::Error),
    /// CNI has set up what a guest can't have.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The thread died.
    #[error("the thread in the pod's network namespace died")]
    Thread,
}

/// How the n-th tap of a pod is called.
pub fn tap_name(n: usize) -> String {
    format!("kiln{n}")
}

/// Reads what the namespace has.
pub fn inspect(netns: &File) -> Result<PodNetwork, NetworkError> {
    namespace::run(netns, async |handle| inspect::inspect(&handle).await)
}

/// Makes a tap for every interface and wires them up. The taps are gone when their descriptors are
/// closed; nothing has to be removed from a namespace that goes too.
pub fn connect(netns: &File, network: &PodNetwork) -> Result<Vec<Tap>, NetworkError> {
    namespace::run(netns, async |handle| {
        let mut taps = Vec::with_capacity(network.interfaces.len());
        for (n, interface) in network.interfaces.iter().enumerate() {
            taps.push(wire(&handle, interface, tap_name(n)).await?);
        }
        Ok(taps)
    })
}

async fn wire(handle: &Handle, interface: &Interface, name: String) -> Result<Tap, NetworkError> {
    let tap = tap::create(&name, interface.mac)?;
    let index = inspect::index_of(handle, &name).await?;
    let failed = |action, name: &str| {
        let name = name.to_owned();
        move |source| NetworkError::Netlink {
            action,
            name,
            source: Box::new(source),
        }
    };
    let up = rtnetlink::LinkMessageBuilder::<rtnetlink::LinkUnspec>::new()
        .index(index)
        .mtu(interface.mtu)
        .up()
        .build();
    handle
        .link()
        .set(up)
        .execute()
        .await
        .map_err(failed("bring up", &name))?;
    redirect(handle, &interface.name, interface.index, index).await?;
    redirect(handle, &name, index, interface.index).await?;
    Ok(tap)
}

/// Sends every frame that arrives on one interface out of the other.
async fn redirect(handle: &Handle, name: &str, from: u32, to: u32) -> Result<(), NetworkError> {
    let failed = |source| NetworkError::Netlink {
        action: "redirect the traffic of",
        name: name.to_owned(),
        source: Box::new(source),
    };
    // The kernel's interface indexes are positive ints; the two crates' types differ.
    let index = from.cast_signed();
    handle
        .qdisc()
        .add(index)
        .ingress()
        .execute()
        .await
        .map_err(failed)?;
    handle
        .traffic_filter(index)
        .add()
        // The ingress qdisc is ffff:0.
        .parent(0xffff_0000)
        .priority(1)
        // ETH_P_ALL, in network order.
        .protocol(0x0003_u16.to_be())
        .redirect(to)
        .map_err(failed)?
        .execute()
        .await
        .map_err(failed)
}

/// Takes the wiring away again: the redirection from interfaces that stay, and taps.
pub fn remove(netns: &File, redirected: &[String], taps: &[String]) -> Result<(), NetworkError> {
    namespace::run(netns, async |handle| {
        for name in redirected {
            // Gone already is as good as removed.
            let Ok(index) = inspect::index_of(&handle, name).await else {
                continue;
            };
            let mut request = handle.qdisc().del(index.cast_signed());
            request.message_mut().header.parent = TcHandle::INGRESS;
            let _ = request.execute().await;
        }
        for name in taps {
            let Ok(index) = inspect::index_of(&handle, name).await else {
                continue;
            };
            let _ = handle.link().del(index).execute().await;
        }
        Ok(())
    })
}

/// The name in a link message.
fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|a| match a {
        rtnetlink::packet_route::link::LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

#[cfg(test)]
mod tests;
