//! `kiln run IMAGE.tar`: a container of an image, in a μVM that was baked.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use kiln_node::config::Config;
use kiln_oci::Image;
use kiln_store::SavedDisk;
use kiln_uvm::baked::Baked;
use kiln_uvm::guest::Identity;
use kiln_uvm::launch::{Order, launch};
use kiln_uvm::size::{BLOCK, Size};
use kiln_uvm::timeline::{Timeline, step};
use kiln_uvm::uvm::Uvm;
use kiln_uvm::{pick, share};

use super::guest;
use super::net::Net;
use super::place::Place;
use super::saving::{Container, Running};
use super::spec::{self, Wanted};
use super::volumes::{Volume, Volumes};
use super::{
    HostFiles, facts, host_side, jail_of_vmms, keep_trace, seccomp, spawn, terminal, token,
    unless_it_ends,
};
use crate::args;

/// All that is known before anything is resumed.
pub(super) struct Fresh<'a> {
    config: &'a Config,
    options: &'a args::Run,
    image: Image,
    archive: PathBuf,
    process: serde_json::Value,
    volumes: Option<Volumes>,
    net: Net,
    seccomp: Option<serde_json::Value>,
    vmm: PathBuf,
}

impl<'a> Fresh<'a> {
    pub(super) fn open(
        config: &'a Config,
        options: &'a args::Run,
        archive: &Path,
    ) -> Result<Fresh<'a>> {
        let image = Image::open(archive)?;
        let user = options.user.as_deref().unwrap_or(&image.defaults().user);
        let wanted = Wanted {
            command: &options.command,
            entrypoint: options.entrypoint.as_deref(),
            environment: &options.env,
            directory: options.workdir.as_deref(),
            owner: image.user(user)?,
            terminal: options.tty,
        };
        let process = spec::process(&wanted, image.defaults())?;
        let volumes = options
            .volumes
            .iter()
            .map(|text| Volume::parse(text))
            .collect::<Result<Vec<_>>>()?;
        Ok(Fresh {
            volumes: Volumes::make(&volumes)?,
            net: Net::open(&options.net, &options.ip, &options.gateway, &options.dns)?,
            seccomp: seccomp::profile(options.seccomp.as_deref())?,
            vmm: crate::bake::vmm(options.vmm.as_deref(), config)?,
            archive: fs::canonicalize(archive)?,
            config,
            options,
            image,
            process,
        })
    }

    /// Resumes a μVM of the store, and starts the command in it.
    pub(super) async fn run(
        mut self,
        name: &str,
        place: &Place,
        timeline: &Timeline,
    ) -> Result<Running> {
        let container = Container {
            image: self.archive.clone(),
            hostname: self.hostname(name).to_owned(),
            process: self.process.clone(),
            token: token()?,
            stdin: self.options.interactive,
        };
        let resumed = self.resume(name, place, timeline);
        let mut running = Running {
            uvm: timeline.of(step::LAUNCH, resumed).await?,
            container,
            disks: Vec::new(),
            obstacle: self.obstacle(),
            volumes: None,
        };
        let begun = self.begin(name, place, &running, timeline);
        running.disks = vec![unless_it_ends(&running.uvm, begun).await?];
        running.volumes = self.volumes.take();
        Ok(running)
    }

    fn hostname<'n>(&'n self, name: &'n str) -> &'n str {
        self.options.hostname.as_deref().unwrap_or(name)
    }

    /// What of it can't be saved.
    fn obstacle(&self) -> Option<&'static str> {
        if self.volumes.is_some() {
            return Some("it uses files of this machine (-v)");
        }
        (!self.net.is_none()).then_some("it has a network (--net)")
    }

    async fn resume(&self, name: &str, place: &Place, timeline: &Timeline) -> Result<Uvm> {
        let (config, options) = (self.config, self.options);
        let size = Size {
            cpus: options.cpus,
            memory: options
                .memory
                .unwrap_or(config.memory_without_limit())
                .next_multiple_of(BLOCK),
        };
        let limits = super::limits(config, options);
        let jail = jail_of_vmms(config)?;
        let shares_budget = jail.is_some();
        // A store without a fitting μVM costs no process.
        let lease = timeline.time(step::FILES, || pick::lease(&config.store, size))?;
        let machine = timeline.time(step::SPAWN, || spawn(&self.vmm, jail, place))?;
        let (baked, host) = timeline.time(step::FILES, || {
            let files = HostFiles {
                shares_budget,
                share: self.volumes.as_ref().map(Volumes::open).transpose()?,
                taps: self.net.taps()?,
            };
            let host = host_side(config, options, place, limits, files)?;
            anyhow::Ok((Baked::open(lease)?, host))
        })?;
        let order = Order {
            size,
            identity: Identity {
                hostname: self.hostname(name).to_owned(),
                network: Some(self.net.in_the_guest()?),
                mounts: self.volumes.iter().map(|_| share::guest_mount()).collect(),
                scratch_limit: limits.content(),
                ..Default::default()
            },
            patient: true,
        };
        Ok(launch(machine, baked, host, order, timeline).await?)
    }

    /// Starts the command in its container; the image is this disk of it.
    async fn begin(
        &self,
        name: &str,
        place: &Place,
        running: &Running,
        timeline: &Timeline,
    ) -> Result<SavedDisk> {
        let (options, uvm) = (self.options, &running.uvm);
        let hostname = self.hostname(name);
        let begun = timeline.now();
        let root = self.image.root(&self.config.store)?;
        let found = if root.made {
            step::IMAGE_MAKE
        } else {
            step::IMAGE_FIND
        };
        timeline.add(found, begun, timeline.now() - begun);
        let (image, content) = (root.key.to_string(), root.content);
        let attached = timeline.of(step::PLUG_ROOT, uvm.attach_disk(root.file, true));
        let disk = attached.await?;
        let files = guest::write_files(uvm.agent(), hostname, self.net.resolv_conf());
        timeline.of(step::GUEST_FILES, files).await?;
        let size = uvm.grown().await?;
        place.tell(&facts(name, running, &size)?)?;
        let binds = self.volumes.as_ref().map_or(&[][..], Volumes::binds);
        // A guest cannot be smaller than it was baked; its container can.
        let base = Size::of(uvm.class()).memory;
        let limit = options.memory.filter(|memory| *memory < base);
        let seccomp = self.seccomp.as_ref();
        let spec = spec::container(&self.process, hostname, limit, binds, seccomp);
        let process = running.container.process();
        let (agent, terminal) = (uvm.agent(), terminal::size());
        guest::start(agent, &spec, &process, &disk, terminal, timeline).await?;
        keep_trace(place, timeline);
        Ok(SavedDisk {
            slot: disk.slot,
            image,
            content,
        })
    }
}
