//! A pod's running μVM, with what the host keeps for it: the shared folder, the port forwarder, the timeline.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use kiln_uvm::disks::GuestDisk;
use kiln_uvm::end::End;
use kiln_uvm::guest::{Guest, GuestEvent};
use kiln_uvm::share::{Share, Volume};
use kiln_uvm::size::Size;
use kiln_uvm::timeline::{Timeline, Trace};
use tokio::sync::mpsc;

use super::{Uvm, Written};
use crate::error::{Error, Result};
use crate::network::Forwarder;
use crate::oom::Scored;
use crate::stand_in::StandIn;

/// A pod's μVM.
pub(super) struct RunningUvm {
    pub(super) uvm: kiln_uvm::uvm::Uvm,
    /// The pod's network namespace.
    pub(super) netns: Option<PathBuf>,
    pub(super) events: tokio::sync::Mutex<mpsc::Receiver<GuestEvent>>,
    pub(super) share: Arc<Share>,
    pub(super) scored: Scored,
    pub(super) spill: Arc<File>,
    /// The way from the pod's namespace on the host, once it is open.
    pub(super) forwarder: Arc<Mutex<Option<Forwarder>>>,
    pub(super) trace: Arc<Trace>,
}

/// Nothing depends on a trace.
pub(super) fn save(trace: &Trace) {
    if let Err(error) = trace.save() {
        tracing::warn!(%error, "the start's timeline can't be kept");
    }
}

#[async_trait]
impl Uvm for RunningUvm {
    fn stand_in(&self, id: &str) -> Result<StandIn> {
        StandIn::start(id, self.netns.as_deref())
    }

    fn guest(&self) -> &dyn Guest {
        self.uvm.agent()
    }

    async fn next_event(&self) -> Option<GuestEvent> {
        self.events.lock().await.recv().await
    }

    async fn grown(&self) -> Result<()> {
        Ok(self.uvm.grown().await.map(drop)?)
    }

    async fn resize(&self, size: Size) -> Result<()> {
        Ok(self.uvm.resize(size).await?)
    }

    async fn attach_disk(&self, image: File, read_only: bool) -> Result<GuestDisk> {
        Ok(self.uvm.attach_disk(image, read_only).await?)
    }

    async fn detach_disk(&self, disk: &GuestDisk) -> Result<()> {
        Ok(self.uvm.detach_disk(disk).await?)
    }

    fn share(&self, volume: &Volume) -> Result<String> {
        Ok(self.share.add(volume)?)
    }

    fn unshare(&self, volume: &Volume) {
        self.share.release(volume);
    }

    async fn written(&self, containers: &[String]) -> Result<Written> {
        let figures = self.uvm.figures().await?;
        let overlay = figures.overlays.unwrap_or_default();
        let told = self.guest().written(containers).await?;
        let held = overlay.ram.saturating_add(overlay.spill);
        Ok(Written {
            held,
            limit: held.saturating_add(figures.memory),
            total: told.total_bytes,
            own: told.containers.iter().map(|one| one.bytes).collect(),
        })
    }

    fn spill(&self) -> Option<Arc<File>> {
        Some(Arc::clone(&self.spill))
    }

    fn keep_trace(&self, container: &str, name: &str, timeline: &Timeline) {
        self.trace.keep(container, name, timeline);
        let trace = Arc::clone(&self.trace);
        // After the answer: nobody waits for it.
        tokio::spawn(async move { save(&trace) });
    }

    fn forget_trace(&self, container: &str) {
        self.trace.forget(container);
    }

    fn set_oom_score(&self, score: i32) -> Result<()> {
        self.scored
            .set(score)
            .map(drop)
            .map_err(|e| Error::failed(format!("set the VMM's OOM score to {score}"), e))
    }

    async fn stop(&self) {
        drop(
            self.forwarder
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        let (killer, share) = (self.uvm.killer(), Arc::clone(&self.share));
        let stopping = tokio::task::spawn_blocking(move || {
            killer.kill();
            share.close();
        });
        if let Err(error) = stopping.await {
            tracing::error!(%error, "stopping the VMM failed");
        }
    }

    async fn ended(&self) -> End {
        self.uvm.ended().await
    }
}
