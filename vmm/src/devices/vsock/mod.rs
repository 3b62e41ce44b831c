//! virtio-vsock (virtio 1.2 §5.10): the host's way to the guest's agent.
//!
//! The host's side is a Unix socket that the VMM inherits, listening. A client connects and writes
//! `CONNECT <port>\n`; when the guest has accepted on that vsock port the client reads `OK <n>\n`, where `n`
//! is the host's port, and from there on the socket is the stream. A refusal closes the socket. The guest
//! can't connect to the host.
//!
//! Connections don't survive a snapshot: their sockets are the host's. A device restored from a state in
//! which there were some tells the guest so by a transport reset event, and holds everything else back
//! until the guest has handled it, lest a new connection fall victim to it. A μVM baked without
//! connections has nothing to reset, and a new connection reaches its guest at once.

mod connection;
mod device;
mod packet;
mod socket;

#[cfg(test)]
mod tests;

pub use device::Vsock;
