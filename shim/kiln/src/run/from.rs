//! `kiln run --from`: goes on with a container that was saved.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use kiln_agent_api::PROTOCOL_VERSION;
use kiln_node::config::Config;
use kiln_oci::Image;
use kiln_store::{Digest, Host, Images, Lease, Saved, SavedDisk, Store};
use kiln_uvm::baked::Baked;
use kiln_uvm::guest::{Guest, Identity};
use kiln_uvm::launch::{Order, launch};
use kiln_uvm::size::{BLOCK, Size};
use kiln_uvm::timeline::{Timeline, step};

use super::guest::CONTAINER;
use super::net::Net;
use super::place::Place;
use super::saving::{Container, Running};
use super::{HostFiles, facts, host_side, jail_of_vmms, keep_trace, spawn, unless_it_ends};
use crate::args;

/// A saved μVM, and all that is known before it is resumed.
pub(super) struct Earlier<'a> {
    config: &'a Config,
    options: &'a args::Run,
    lease: Lease,
    saved: Saved,
    container: Container,
    disks: Vec<(u8, File)>,
    vmm: PathBuf,
}

impl<'a> Earlier<'a> {
    pub(super) fn open(
        config: &'a Config,
        options: &'a args::Run,
        name: &str,
    ) -> Result<Earlier<'a>> {
        let store = Store::open(&config.store)?;
        let lease = store.lease(store.resolve(name)?)?;
        let short = lease.id().short();
        let Some(saved) = lease.manifest().about.saved.clone() else {
            bail!(
                "μVM {short} was baked, not saved: `kiln run IMAGE.tar` starts a container in it"
            );
        };
        if let Err(why) = lease.manifest().resumes_here(&Host::this(PROTOCOL_VERSION)) {
            bail!(
                "{name} cannot go on here: {why}; go on with it where it was saved, or remove it (`kiln rm {name}`)"
            );
        }
        let container: Container = serde_json::from_str(&saved.container)
            .with_context(|| format!("{name} was saved by another kiln: go on with it by that one, or remove it (`kiln rm {name}`)"))?;
        ensure!(
            container.stdin || !options.interactive,
            "{name} was started without an input (-i), and so it has none"
        );
        let disks = disks(&config.store, &saved.disks, &container.image)
            .with_context(|| format!("{name} can't go on without its image"))?;
        Ok(Earlier {
            vmm: crate::bake::vmm(options.vmm.as_deref(), config)?,
            config,
            options,
            lease,
            saved,
            container,
            disks,
        })
    }
}

/// The images that were its disks, to the byte.
fn disks(store: &Path, wanted: &[SavedDisk], archive: &Path) -> Result<Vec<(u8, File)>> {
    let open = |disk: &SavedDisk| {
        let key: Digest = disk
            .image
            .parse()
            .with_context(|| format!("{:?} is no image's name", disk.image))?;
        let image = match Images::at(store).lookup(&key.into())? {
            Some(image) => image,
            // It made way for others, or was not looked at since the machine was started.
            None => Image::open(archive)?.root(store)?,
        };
        ensure!(
            image.key.digest() == key && image.content == disk.content,
            "{} is not the image that it was saved with: put that back there",
            archive.display()
        );
        Ok((disk.slot, image.file))
    };
    wanted.iter().map(open).collect()
}

impl Earlier<'_> {
    /// Resumes it, and lets its container go on.
    pub(super) async fn resume(
        self,
        name: &str,
        place: &Place,
        timeline: &Timeline,
    ) -> Result<Running> {
        let (config, options) = (self.config, self.options);
        let jail = jail_of_vmms(config)?;
        let host = HostFiles {
            shares_budget: jail.is_some(),
            share: None,
            taps: Vec::new(),
        };
        let base = Size::of(&self.lease.manifest().about.class);
        let asked = Size {
            cpus: options.cpus,
            memory: options.memory.unwrap_or(0).next_multiple_of(BLOCK),
        };
        let (limits, hostname) = (super::limits(config, options), &self.container.hostname);
        let order = Order {
            size: asked.at_least(base),
            identity: Identity {
                network: Some(Net::default().in_the_guest()?),
                hostname: options.hostname.as_ref().unwrap_or(hostname).clone(),
                scratch_limit: limits.content(),
                ..Default::default()
            },
            patient: true,
        };
        let machine = timeline.time(step::SPAWN, || spawn(&self.vmm, jail, place))?;
        let (baked, host) = timeline.time(step::FILES, || {
            let host = host_side(config, options, place, limits, host)?;
            anyhow::Ok((Baked::open(self.lease)?.with_disks(self.disks), host))
        })?;
        let uvm = launch(machine, baked, host, order, timeline).await?;
        let running = Running {
            uvm,
            container: self.container,
            disks: self.saved.disks,
            obstacle: None,
            volumes: None,
        };
        let begun = async {
            let size = running.uvm.grown().await?;
            place.tell(&facts(name, &running, &size)?)?;
            // Its streams wait for whoever takes them.
            running.uvm.agent().unpause(CONTAINER).await?;
            keep_trace(place, timeline);
            Ok(())
        };
        unless_it_ends(&running.uvm, begun).await?;
        Ok(running)
    }
}
