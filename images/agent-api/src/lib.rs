//! The guest agent's API: what the host says to PID 1 of a μVM, and how it reaches it.
//!
//! Owned here: the protobuf package `kiln.agent.v1` (`proto/agent.proto`, the reference for every
//! call), the numbers both sides must agree on, the devices of a baked μVM by slot ([`slots`]), the
//! header that opens a stdio stream ([`stream`]), what kind of reason a refusal has ([`Refusal`]),
//! the maps of user namespaces ([`users`]), and the host's way in through the VMM's vsock socket ([`client`]). Nothing here knows of KVM,
//! containerd or the agent's inside.
//!
//! ```no_run
//! # async fn f() -> Result<(), Box<dyn std::error::Error>> {
//! use kiln_agent_api::{client::Vsock, proto::HelloRequest};
//!
//! let vsock = Vsock::new("/run/kiln/vm/vsock.sock");
//! let agent = vsock.agent().await?;
//! let hello = agent.hello(Default::default(), &HelloRequest::new()).await?;
//! # Ok(()) }
//! ```

pub mod client;
pub mod modules;
mod refusal;
pub mod slots;
pub mod stream;
pub mod users;

pub use refusal::{Refusal, RefusalKind, refusal};

/// Messages and services as generated; use [`proto`].
#[doc(hidden)]
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::unwrap_used,
    clippy::needless_pass_by_value,
    reason = "generated code"
)]
pub mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

/// The messages, the client and the server trait of `kiln.agent.v1`.
pub mod proto {
    pub use crate::generated::agent::*;
    pub use crate::generated::agent_ttrpc::{Agent, AgentClient, create_agent};
}

/// Version of the API. It counts up when an old host could misunderstand a new agent, or the other
/// way round; fields that are merely new don't change it.
pub const PROTOCOL_VERSION: u32 = 4;

/// vsock port of the ttrpc service, in the guest.
pub const RPC_PORT: u32 = 1024;

/// vsock port of the stdio streams, in the guest.
pub const STREAM_PORT: u32 = 1025;

/// vsock port **on the host** that a cold-booted agent connects to once, when it is ready; it writes
/// [`READY_LINE`] and closes. Whoever bakes listens there, so that nobody has to poll.
pub const READY_PORT: u32 = 1026;

/// What the agent writes to [`READY_PORT`].
pub const READY_LINE: &[u8] = b"kiln-agent ready\n";

/// Least number of bytes of entropy in `SetIdentity`.
pub const MIN_ENTROPY: usize = 32;

/// Where the agent keeps what belongs to the pod, in the guest: `resolv.conf`, containers, sockets.
pub const GUEST_STATE_DIR: &str = "/run/kiln";

/// The file that `Network.dns` becomes, in the guest.
pub const GUEST_RESOLV_CONF: &str = "/run/kiln/resolv.conf";

/// Where whoever runs the guest writes files that are bound over the images' (`WriteFile`), in the guest.
pub const GUEST_FILES: &str = "/run/kiln/etc";

/// Where the file system of the containers' writable layers is mounted, in the guest.
pub const GUEST_SCRATCH: &str = "/run/kiln/scratch";

/// Where they lie on it. Not at its top, whose directories ext4 spreads over the whole disk: the guest has nothing of a far-off
/// part of it in memory.
pub const GUEST_LAYERS: &str = "/run/kiln/scratch/layers";

/// The pod's shared memory file system, in the guest: the source of a container's `/dev/shm`.
pub const GUEST_SHM: &str = "/run/kiln/shm";

/// Where the pod's volumes of memory are mounted, in the guest.
pub const GUEST_MEMORY: &str = "/run/kiln/memory";

/// Where the guest's copies of what the kubelet writes for a pod are, by their volumes' names.
pub const GUEST_COPIES: &str = "/run/kiln/copies";

/// Where those that are disks of the guest are mounted, by their names.
pub const GUEST_DISKS: &str = "/run/kiln/disks";

// A baked μVM carries an agent with these numbers inside it; a host with others cannot reach it. A
// change here is a new PROTOCOL_VERSION.
const _: () = assert!(RPC_PORT == 1024 && STREAM_PORT == 1025 && READY_PORT == 1026);
const _: () = assert!(PROTOCOL_VERSION == 4);
