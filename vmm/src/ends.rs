//! What comes with a request: descriptors, and the host sides of devices that are made of them.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use kiln_overlay::{
    Caching, DiskFile, FileBase, FlushPolicy, Membership, Overlay, Pool, PoolConfig, Watch,
};
use kiln_vmm::devices::fs::FsServer;
use kiln_vmm::machine::{HostEnd, HostEnds};
use kiln_vmm_control::api::{self, End, OverlayFigures};
use kiln_vmm_fs::Prepared;

use crate::filter::{self, Kind};
use crate::serve::RequestError;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Descriptors of a frame, each taken at most once.
pub(crate) struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    pub(crate) fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    pub(crate) fn take(&mut self, index: u8) -> Result<OwnedFd> {
        self.0
            .get_mut(usize::from(index))
            .and_then(Option::take)
            .ok_or_else(|| RequestError::Descriptor(index).into())
    }

    pub(crate) fn take_all(&mut self, indexes: Vec<u8>) -> Result<Vec<OwnedFd>> {
        indexes.into_iter().map(|index| self.take(index)).collect()
    }

    pub(crate) fn file(&mut self, index: u8) -> Result<File> {
        self.take(index).map(File::from)
    }

    /// Host sides from the client's list. A folder's server is started at once, on the rights that this thread has.
    pub(crate) fn ends(
        &mut self,
        ends: Vec<(u8, End)>,
        mut prepared: Option<Prepared>,
        overlays: &Overlays,
    ) -> Result<HostEnds> {
        let mut all = HostEnds::new();
        for (slot, end) in ends {
            let end = match end {
                End::Disk { fd, read_only } => HostEnd::Disk {
                    file: self.file(fd)?,
                    read_only,
                },
                End::Listener(fd) => {
                    let listener = UnixListener::from(self.take(fd)?);
                    listener.set_nonblocking(true)?;
                    HostEnd::Listener(listener)
                }
                End::Tap(queues) => HostEnd::Tap(
                    queues
                        .into_iter()
                        .map(|fd| self.take(fd))
                        .collect::<Result<_>>()?,
                ),
                End::Overlay(overlay) => HostEnd::Overlay(overlays.make(self, &overlay)?),
                End::Directory(fd) => {
                    let folder = self.take(fd)?;
                    let prepared = prepared.take().ok_or(RequestError::SecondFolder)?;
                    let (server, left) = FsServer::start(move |in_use| {
                        let made = prepared.enter(folder, in_use)?;
                        filter::install(Kind::Files)?;
                        anyhow::Ok(made)
                    })??;
                    drop(left);
                    HostEnd::Files(server)
                }
            };
            all.insert(slot, end);
        }
        Ok(all)
    }
}

/// The pool that all overlays draw on, once there is one, and the overlays themselves.
#[derive(Default)]
pub(crate) struct Overlays(Mutex<Option<Known>>);

struct Known {
    pool: Pool,
    disks: Vec<Watch>,
}

impl Overlays {
    pub(crate) fn make(&self, fds: &mut Fds, spec: &api::Overlay) -> Result<Overlay> {
        let mut known = lock(&self.0);
        let known = match (&mut *known, &spec.pool) {
            (Some(known), None) => known,
            (none @ None, Some(spec)) => none.insert(Known {
                pool: pool(fds, spec)?,
                disks: Vec::new(),
            }),
            (None, None) => return Err(RequestError::NoPool.into()),
            (Some(_), Some(_)) => return Err(RequestError::SecondPool.into()),
        };
        let base = match spec.base {
            Some(fd) => {
                let base = FileBase::new(fds.file(fd)?).context("the disk below the overlay")?;
                Some(Box::new(base) as Box<dyn kiln_overlay::Base>)
            }
            None => None,
        };
        let overlay = Overlay::new(&known.pool, spec.size, base)?;
        known.disks.retain(|disk| disk.stats().is_some());
        known.disks.push(overlay.watch());
        Ok(overlay)
    }

    pub(crate) fn limit(&self, ram: u64, spill: u64) -> Result<()> {
        lock(&self.0)
            .as_ref()
            .ok_or(RequestError::NoOverlay)?
            .pool
            .set_limits(ram, spill);
        Ok(())
    }

    pub(crate) fn figures(&self) -> Option<OverlayFigures> {
        let known = lock(&self.0);
        let known = known.as_ref()?;
        let s = known.pool.stats();
        let mut figures = OverlayFigures {
            ram: s.ram_bytes,
            ram_limit: s.ram_limit,
            spill: s.spill_bytes,
            spill_limit: s.spill_limit,
            spilled: s.spilled_bytes,
            returned_chunks: s.returned_chunks,
            stalls: s.stalls,
            stall_ns: s.stall_nanos,
            spill_errors: s.spill_errors,
            ..OverlayFigures::default()
        };
        for disk in known.disks.iter().filter_map(Watch::stats) {
            figures.written += disk.written;
            figures.read_ram += disk.read_ram;
            figures.read_spill += disk.read_spill;
            figures.read_base += disk.read_base;
        }
        Some(figures)
    }
}

fn pool(fds: &mut Fds, spec: &api::OverlayPool) -> Result<Pool> {
    let mut config = PoolConfig::new(spec.ram);
    config.spill_limit = spec.spill_limit;
    config.flush = match spec.flush {
        api::Flush::None => FlushPolicy::Memory,
        api::Flush::Disk => FlushPolicy::Disk,
    };
    if let Some(fd) = spec.spill {
        config.spill = Some(Box::new(DiskFile::new(fds.file(fd)?, Caching::Direct)));
    }
    if let Some(seat) = spec.budget {
        let (view, page) = (fds.file(seat.view)?, fds.file(seat.page)?);
        config.budget = Some(Membership::new(view, page, seat.number.into())?);
    }
    Ok(Pool::new(config))
}
