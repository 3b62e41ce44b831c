//! A running μVM: the VMM's control client and the guest agent's, as one.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use kiln_agent_api::stream::Header;
use kiln_agent_api::{proto, slots};
use kiln_overlay::Seat;
use kiln_store::Lease;
use kiln_uvm::share::{Share, Volume};
use kiln_vmm_control::{RefusalKind, Reply, Request, Vmm, VmmError, exit};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

use super::log::LastLine;
use super::{End, Guest, GuestDisk, GuestEvent, Uvm, Written};
use crate::cgroup::OomKills;
use crate::error::{Error, Result};
use crate::events::Exit;
use crate::network::Forwarder;
use crate::oom::Scored;
use crate::size::{MIB, Size};
use crate::timeline::{Timeline, Trace};

/// How long the guest may take to give memory and vCPUs back.
const SHRINK_TIMEOUT_MS: u32 = 10_000;

/// How the growth to the pod's size went; `None` while it is under way.
pub(super) type Grown = Option<std::result::Result<(), String>>;

/// A μVM.
pub(super) struct RunningUvm {
    vmm: Arc<Vmm>,
    guest: Guest,
    events: tokio::sync::Mutex<mpsc::Receiver<GuestEvent>>,
    grown: watch::Receiver<Grown>,
    /// Held while a disk comes or goes: the VMM chooses among the same slots once those that were baked are in use.
    disks: tokio::sync::Mutex<DiskSlots>,
    share: Arc<Share>,
    life: Life,
    spill: Arc<File>,
    /// What the μVM was baked with: it can't become smaller.
    baked: Size,
    /// Held as long as the VMM maps the store's files.
    _lease: Lease,
    /// The way from the pod's namespace on the host, once it is open.
    forwarder: Arc<Mutex<Option<Forwarder>>>,
    trace: Arc<Trace>,
}

/// What makes one.
pub(super) struct Parts {
    pub(super) vmm: Arc<Vmm>,
    pub(super) guest: Guest,
    pub(super) events: mpsc::Receiver<GuestEvent>,
    pub(super) grown: watch::Receiver<Grown>,
    pub(super) share: Arc<Share>,
    pub(super) life: Life,
    pub(super) spill: Arc<File>,
    pub(super) baked: Size,
    pub(super) lease: Lease,
    pub(super) forwarder: Arc<Mutex<Option<Forwarder>>>,
    pub(super) trace: Trace,
}

/// The disk slots that are free, of those that were baked.
#[derive(Debug)]
struct DiskSlots {
    free: BTreeSet<u8>,
    /// The first slot that was not baked.
    end: u8,
}

impl DiskSlots {
    fn new(count: u32) -> Self {
        let count = u8::try_from(count).unwrap_or(u8::MAX).min(slots::MAX_DISKS);
        let end = slots::FIRST_DISK + count;
        Self {
            free: (slots::FIRST_DISK..end).collect(),
            end,
        }
    }

    fn take(&mut self) -> Option<u8> {
        self.free.pop_first()
    }

    /// A plugged disk's slot goes with it.
    fn put_back(&mut self, slot: u8) {
        if slot < self.end {
            self.free.insert(slot);
        }
    }
}

pub(super) fn vmm_error(action: &str) -> impl FnOnce(VmmError) -> Error {
    let action = action.to_owned();
    move |error| match error {
        VmmError::Gone => Error::Unavailable(format!("the VMM has ended, it can't {action}")),
        VmmError::Refused { kind, why } => {
            let text = format!("the VMM can't {action}: {why}");
            match kind {
                RefusalKind::Foreign | RefusalKind::Corrupt | RefusalKind::Busy => {
                    Error::FailedPrecondition(text)
                }
                RefusalKind::NoSpace => Error::ResourceExhausted(text),
                RefusalKind::Usage => Error::InvalidArgument(text),
                RefusalKind::Failed => Error::failed(action, VmmError::Refused { kind, why }),
            }
        }
        error => Error::failed(action, error),
    }
}

/// A VMM's process, from its start to its end.
#[derive(Debug)]
pub(super) struct Life {
    scored: Scored,
    /// Set before the shim kills it.
    stopping: Arc<AtomicBool>,
    ended: watch::Receiver<Option<End>>,
}

impl Life {
    /// Follows it to its end, on a thread of its own, which waits for nothing else and keeps the VMM's seat in the
    /// node's budget until then.
    pub(super) fn follow(
        vmm: &Arc<Vmm>,
        scored: Scored,
        kills: Option<OomKills>,
        last: LastLine,
        seat: Arc<Seat>,
    ) -> std::io::Result<Self> {
        let (tell, ended) = watch::channel(None);
        let stopping = Arc::new(AtomicBool::new(false));
        let (vmm, killed_by_us) = (Arc::clone(vmm), Arc::clone(&stopping));
        std::thread::Builder::new()
            .name("vmm-end".into())
            .spawn(move || {
                let status = vmm.wait_status();
                drop(seat);
                let by_us = killed_by_us.load(Ordering::SeqCst);
                let kills = || kills.is_some_and(|kills| kills.any());
                tell.send_replace(Some(end(status, by_us, kills, &last.get())));
            })?;
        Ok(Self {
            scored,
            stopping,
            ended,
        })
    }
}

/// `oom_kills` tells whether the kernel killed any process of the pod's cgroup; the shim, the only other one, lives.
fn end(
    status: std::result::Result<ExitStatus, VmmError>,
    by_us: bool,
    oom_kills: impl FnOnce() -> bool,
    last_words: &str,
) -> End {
    let signal = status.as_ref().ok().and_then(ExitStatusExt::signal);
    let out_of_memory = signal == Some(libc::SIGKILL) && !by_us && oom_kills();
    let how = match status {
        _ if out_of_memory => "the kernel killed kiln-vmm because memory ran out".to_owned(),
        Ok(status) => match (status.code(), signal) {
            (Some(exit::ENDED), _) => "it was powered off or stopped".to_owned(),
            (Some(exit::RESET), _) => "the guest asked for a reset".to_owned(),
            (Some(exit::PANICKED), _) => "the guest's kernel panicked".to_owned(),
            (Some(code), _) => format!("kiln-vmm failed with status {code}"),
            (None, _) if by_us => "it was stopped".to_owned(),
            (None, signal) => format!("kiln-vmm was killed by signal {}", signal.unwrap_or(0)),
        },
        Err(error) => format!("kiln-vmm can't be waited for: {error}"),
    };
    let reason = if last_words.is_empty() {
        how
    } else {
        format!("{how}; its last words: {last_words}")
    };
    End {
        reason,
        out_of_memory,
    }
}

impl RunningUvm {
    pub(super) fn new(parts: Parts) -> Self {
        let disks = DiskSlots::new(parts.lease.manifest().about.class.slots);
        Self {
            vmm: parts.vmm,
            guest: parts.guest,
            events: tokio::sync::Mutex::new(parts.events),
            grown: parts.grown,
            disks: tokio::sync::Mutex::new(disks),
            share: parts.share,
            life: parts.life,
            spill: parts.spill,
            baked: parts.baked,
            _lease: parts.lease,
            forwarder: parts.forwarder,
            trace: Arc::new(parts.trace),
        }
    }

    /// Writes down where the time of the launch went.
    pub(super) fn save_trace(&self) {
        save(&self.trace);
    }

    /// Runs a blocking call of the VMM's client.
    async fn call<T, F>(&self, action: &str, call: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Vmm) -> std::result::Result<T, VmmError> + Send + 'static,
    {
        let vmm = Arc::clone(&self.vmm);
        tokio::task::spawn_blocking(move || call(&vmm))
            .await
            .map_err(|e| Error::failed(action, e))?
            .map_err(vmm_error(action))
    }

    /// Waits until the μVM has the pod's size.
    async fn grown(&self) -> Result<()> {
        let mut grown = self.grown.clone();
        let gone = || Error::Unavailable("the μVM ended before it had the pod's size".into());
        let result = grown.wait_for(Option::is_some).await.map_err(|_| gone())?;
        match &*result {
            Some(Err(why)) => Err(Error::ResourceExhausted(why.clone())),
            _ => Ok(()),
        }
    }

    async fn plugged(&self) -> Result<Size> {
        let action = "read the μVM's size";
        match self
            .call(action, |vmm| vmm.call(&Request::Stats, &[]))
            .await?
        {
            Reply::Stats { cpus, memory, .. } => Ok(Size {
                cpus: u32::from(cpus),
                memory,
            }),
            _ => Err(vmm_error(action)(VmmError::Protocol)),
        }
    }
}

/// Nothing depends on a trace.
fn save(trace: &Trace) {
    if let Err(error) = trace.save() {
        tracing::warn!(%error, "the start's timeline can't be kept");
    }
}

/// The request for a size. With no time it returns at once, and the guest follows in its own time.
pub(super) fn resize_request(size: Size, timeout_ms: u32) -> Request {
    Request::Resize {
        cpus: u8::try_from(size.cpus).unwrap_or(u8::MAX),
        memory: size.memory,
        timeout_ms,
    }
}

#[async_trait]
impl Uvm for RunningUvm {
    fn pid(&self) -> u32 {
        self.vmm.pid()
    }

    async fn write_file(&self, path: String, text: String) -> Result<()> {
        self.guest.write_file(path, text).await
    }

    async fn create(
        &self,
        request: proto::CreateContainerRequest,
        timeline: &Timeline,
    ) -> Result<()> {
        self.guest.create(request, timeline).await
    }

    async fn start(&self, container: &str, timeline: &Timeline) -> Result<()> {
        // The first thing many programs do is to count CPUs and memory.
        timeline.of("guest.grown", self.grown()).await?;
        self.guest.start(container, timeline).await
    }

    fn keep_trace(&self, container: &str, name: &str, timeline: &Timeline) {
        self.trace.keep(container, name, timeline);
        let trace = Arc::clone(&self.trace);
        // After the answer: nobody waits for it.
        tokio::spawn(async move { save(&trace) });
    }

    async fn exec(&self, request: proto::ExecRequest) -> Result<()> {
        self.guest.exec(request).await
    }

    async fn kill(&self, container: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        self.guest.kill(container, exec, signal, all).await
    }

    async fn wait(&self, container: &str, exec: &str) -> Result<Exit> {
        self.guest.wait(container, exec).await
    }

    async fn pause(&self, container: &str) -> Result<()> {
        self.guest.pause(container).await
    }

    async fn unpause(&self, container: &str) -> Result<()> {
        self.guest.unpause(container).await
    }

    async fn update(&self, container: &str, resources: Vec<u8>) -> Result<()> {
        self.guest.update(container, resources).await
    }

    async fn stats(&self, container: &str) -> Result<proto::StatsResponse> {
        self.guest.stats(container).await
    }

    async fn written(&self, containers: &[String]) -> Result<Written> {
        let action = "read what the overlay holds";
        let reply = self
            .call(action, |vmm| vmm.call(&Request::Stats, &[]))
            .await?;
        let Reply::Stats {
            overlays, memory, ..
        } = reply
        else {
            return Err(vmm_error(action)(VmmError::Protocol));
        };
        let overlay = overlays.unwrap_or_default();
        let told = self.guest.written(containers).await?;
        let held = overlay.ram.saturating_add(overlay.spill);
        Ok(Written {
            held,
            limit: held.saturating_add(memory),
            total: told.total_bytes,
            own: told.containers.iter().map(|one| one.bytes).collect(),
        })
    }

    fn spill(&self) -> Option<Arc<File>> {
        Some(Arc::clone(&self.spill))
    }

    async fn pids(&self, container: &str) -> Result<Vec<u32>> {
        self.guest.pids(container).await
    }

    async fn network(&self) -> Result<proto::NetworkState> {
        self.guest.network().await
    }

    async fn resize_tty(&self, container: &str, exec: &str, w: u32, h: u32) -> Result<()> {
        self.guest.resize_tty(container, exec, w, h).await
    }

    async fn delete(&self, container: &str, exec: &str) -> Result<()> {
        if exec.is_empty() {
            self.trace.forget(container);
        }
        self.guest.delete(container, exec).await
    }

    async fn stream(&self, header: &Header) -> Result<UnixStream> {
        self.guest.stream(header).await
    }

    async fn next_event(&self) -> Option<GuestEvent> {
        self.events.lock().await.recv().await
    }

    fn share(&self, volume: &Volume) -> Result<String> {
        Ok(self.share.add(volume)?)
    }

    fn unshare(&self, volume: &Volume) {
        self.share.release(volume);
    }

    async fn attach_disk(&self, image: File, read_only: bool) -> Result<GuestDisk> {
        // A device's metadata has no size.
        let size = (&image)
            .seek(SeekFrom::End(0))
            .map_err(|e| Error::failed("read the size of a disk image", e))?;
        let mut disks = self.disks.lock().await;
        let baked = disks.take();
        let attached = self
            .call("attach a disk", move |vmm| {
                vmm.attach_block(baked, &image, read_only)
            })
            .await;
        let slot = match (attached, baked) {
            (Ok(slot), _) => slot,
            (Err(error), Some(slot)) => {
                disks.put_back(slot);
                return Err(error);
            }
            (Err(error), None) => {
                return Err(Error::ResourceExhausted(format!(
                    "all disk slots of the pod's μVM are in use, one for each container and block volume, and none could \
                     be plugged ({}); bake one with more: kiln bake --slots",
                    error.chain()
                )));
            }
        };
        let path = match baked {
            Some(slot) => slots::disk_name(slot).unwrap_or_default(),
            None => slots::plugged_disk_path(slot),
        };
        Ok(GuestDisk {
            slot: slot.into(),
            path,
            size,
        })
    }

    async fn detach_disk(&self, disk: &GuestDisk) -> Result<()> {
        let slot = u8::try_from(disk.slot)
            .map_err(|e| Error::InvalidArgument(format!("slot {}: {e}", disk.slot)))?;
        let mut disks = self.disks.lock().await;
        self.call("detach a disk", move |vmm| {
            vmm.order(&Request::DetachBlock { slot }, &[])
        })
        .await?;
        disks.put_back(slot);
        Ok(())
    }

    async fn resize(&self, size: Size) -> Result<()> {
        // Two resizes at once would undo one another.
        self.grown().await.or_else(|error| match error {
            // A pod that could not have its first size may still get another one.
            Error::ResourceExhausted(_) => Ok(()),
            error => Err(error),
        })?;
        let size = Size {
            cpus: size.cpus.max(self.baked.cpus),
            memory: size.memory.max(self.baked.memory),
        };
        let now = self.plugged().await?;
        let most = Size {
            cpus: size.cpus.max(now.cpus),
            memory: size.memory.max(now.memory),
        };
        if most != now {
            let request = resize_request(most, 0);
            self.call("grow the μVM", move |vmm| {
                vmm.call(&request, &[]).map(drop)
            })
            .await?;
            self.guest.set_resources(most.cpus, most.memory).await?;
        }
        if most == size {
            return Ok(());
        }
        // The guest lets go of CPUs before they are taken.
        self.guest.set_resources(size.cpus, 0).await?;
        let request = resize_request(size, SHRINK_TIMEOUT_MS);
        let shrunk = self
            .call("shrink the μVM", move |vmm| {
                vmm.call(&request, &[]).map(drop)
            })
            .await;
        let left = self.plugged().await?;
        match shrunk {
            // Memory the guest can't move stays with it. The containers' limits hold all the same.
            Err(error @ Error::FailedPrecondition(_)) if left.cpus <= size.cpus => {
                tracing::warn!(
                    wanted_mib = size.memory / MIB,
                    left_mib = left.memory / MIB,
                    error = error.chain(),
                    "the μVM did not give back all of its memory"
                );
                Ok(())
            }
            other => other,
        }
    }

    async fn stop(&self) {
        drop(
            self.forwarder
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        let (vmm, share) = (Arc::clone(&self.vmm), Arc::clone(&self.share));
        self.life.stopping.store(true, Ordering::SeqCst);
        let stopping = tokio::task::spawn_blocking(move || {
            vmm.kill();
            share.close();
        });
        if let Err(error) = stopping.await {
            tracing::error!(%error, "stopping the VMM failed");
        }
    }

    fn set_oom_score(&self, score: i32) -> Result<()> {
        self.life
            .scored
            .set(score)
            .map(drop)
            .map_err(|e| Error::failed(format!("set the VMM's OOM score to {score}"), e))
    }

    async fn ended(&self) -> End {
        let mut ended = self.life.ended.clone();
        let unknown = || End {
            reason: "nobody waits for it any more".into(),
            out_of_memory: false,
        };
        match ended.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or_else(unknown),
            Err(_) => unknown(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_slots_are_used_lowest_first_and_again() {
        let mut disks = DiskSlots::new(2);
        let (a, b) = (disks.take().unwrap(), disks.take().unwrap());
        assert_eq!((a, b), (slots::FIRST_DISK, slots::FIRST_DISK + 1));
        assert_eq!(disks.take(), None);
        disks.put_back(a);
        assert_eq!(disks.take(), Some(a));
        // A plugged disk's.
        disks.put_back(slots::FIRST_DISK + 2);
        assert_eq!(disks.take(), None);
        let most = DiskSlots::new(1000).free.len();
        assert_eq!(most, usize::from(slots::MAX_DISKS));
    }

    #[test]
    fn only_a_kill_that_is_not_ours_and_that_the_cgroup_counted_is_for_want_of_memory() {
        let killed = || Ok(ExitStatus::from_raw(libc::SIGKILL));
        let of = |status, by_us, counted| end(status, by_us, || counted, "").out_of_memory;
        assert!(of(killed(), false, true));
        assert!(!of(killed(), false, false));
        assert!(!of(killed(), true, true));
        assert!(!of(Ok(ExitStatus::from_raw(libc::SIGABRT)), false, true));
        assert!(!of(Ok(ExitStatus::from_raw(1 << 8)), false, true));
        assert!(!of(Err(VmmError::Gone), false, true));
    }

    #[test]
    fn end_says_how_it_came_and_what_the_vmm_said_last() {
        let of = |status| end(status, false, || false, "the disk is full").reason;
        let aborted = of(Ok(ExitStatus::from_raw(libc::SIGABRT)));
        assert!(aborted.contains("signal 6") && aborted.ends_with("the disk is full"));
        let reset = of(Ok(ExitStatus::from_raw(exit::RESET << 8)));
        assert!(reset.contains("reset"), "{reset}");
    }

    #[test]
    fn refusals_keep_their_kind() {
        let of = |kind| {
            let why = "because".to_owned();
            vmm_error("attach a disk")(VmmError::Refused { kind, why })
        };
        let full = of(RefusalKind::NoSpace);
        assert!(matches!(&full, Error::ResourceExhausted(_)), "{full:?}");
        assert_eq!(full.to_string(), "the VMM can't attach a disk: because");
        let wrong = of(RefusalKind::Usage);
        assert!(matches!(wrong, Error::InvalidArgument(_)), "{wrong:?}");
        for now in [
            RefusalKind::Busy,
            RefusalKind::Foreign,
            RefusalKind::Corrupt,
        ] {
            let error = of(now);
            assert!(matches!(error, Error::FailedPrecondition(_)), "{error:?}");
        }
        let failed = of(RefusalKind::Failed);
        assert!(matches!(failed, Error::Failed { .. }), "{failed:?}");
    }

    #[test]
    fn an_ended_vmm_means_that_the_guest_is_gone() {
        assert!(matches!(
            vmm_error("x")(VmmError::Gone),
            Error::Unavailable(_)
        ));
    }
}
