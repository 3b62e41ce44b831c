//! The μVM that pods are resumed from, and its agent, without containerd.

use std::path::Path;

use anyhow::{Context, Result};
use kiln_agent_api::client::Vsock;
use kiln_agent_api::proto::SetIdentityResponse;
use kiln_store::{Kind, Lease, Store};
use kiln_uvm::guest::{Agent, Identity};

use crate::setup;
use crate::uvm::Baked;

/// The newest baked μVM of the store, baked first if there is none. It stays as long as the lease.
pub fn baked() -> Result<(Lease, Baked)> {
    setup::bake()?;
    let store = Store::open(kiln_store::DEFAULT_ROOT)?;
    let id = store.find(|_| true)?.context("the store is empty")?;
    let lease = store.lease(id)?;
    let baked = Baked {
        state: lease.path(Kind::State)?,
        memory: lease.path(Kind::Memory)?,
        touched: lease.touched_first(&lease.open(Kind::Memory)?)?,
    };
    Ok((lease, baked))
}

/// Gives a resumed μVM whose sockets are in `dir` an identity of its own; what the agent says of it.
pub async fn identify(dir: &Path) -> Result<SetIdentityResponse> {
    let agent = Agent::connect(&Vsock::new(dir.join("vsock"))).await?;
    Ok(agent.set_identity(&Identity::default()).await?)
}
