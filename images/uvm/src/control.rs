//! What a VMM can be told: its control API with a name for each request. All of it blocks.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kiln_vmm_control::{
    MachineSpec, OverlayFigures, PageRun, RefusalKind, Reply, Request, Span, Vmm, VmmError,
};

use crate::Error;
use crate::ends::{Descriptors, Ends, Pool, overlay};

/// What to boot.
#[derive(Debug)]
pub struct Boot<'a> {
    /// The machine.
    pub machine: MachineSpec,
    /// The kernel.
    pub kernel: &'a File,
    /// The initramfs.
    pub initramfs: &'a File,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// Where the serial port's output goes.
    pub console: Option<&'a File>,
}

/// What to resume.
#[derive(Debug)]
pub struct Resume<'a> {
    /// The state file.
    pub state: &'a File,
    /// The memory file.
    pub memory: &'a File,
    /// Pages that are mapped before the guest runs.
    pub touched: &'a [PageRun],
    /// Whether pages of the memory file are read singly.
    pub one_by_one: bool,
    /// Where the serial port's output goes.
    pub console: Option<&'a File>,
}

/// A machine as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    /// vCPUs.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Whether it stands still.
    pub paused: bool,
    /// What its overlays take, if there are any.
    pub overlays: Option<OverlayFigures>,
}

/// A VMM that can be told what to do. Clones tell the same one.
#[derive(Debug, Clone)]
pub struct Control(Arc<Vmm>);

impl Control {
    pub(crate) fn new(vmm: Arc<Vmm>) -> Control {
        Control(vmm)
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.0.pid()
    }

    pub(crate) fn kill(&self) {
        self.0.kill();
    }

    fn ask<T>(
        &self,
        action: &'static str,
        request: &Request,
        fds: &Descriptors<'_>,
        answer: impl FnOnce(Reply) -> Option<T>,
    ) -> Result<T, Error> {
        let failed = |source| Error::Vmm { action, source };
        let reply = self.0.call(request, fds.all()).map_err(failed)?;
        answer(reply).ok_or_else(|| failed(VmmError::Protocol))
    }

    fn order(
        &self,
        action: &'static str,
        request: &Request,
        fds: &Descriptors<'_>,
    ) -> Result<(), Error> {
        self.ask(action, request, fds, |reply| {
            matches!(reply, Reply::Done).then_some(())
        })
    }

    /// Boots a machine. Only of a VMM that has none yet.
    pub fn boot(&self, boot: &Boot<'_>, ends: Ends<'_>) -> Result<Vec<Span>, Error> {
        let Ends {
            mut fds,
            by_slot,
            rings,
        } = ends;
        let request = Request::Boot {
            machine: boot.machine.clone(),
            kernel: fds.add(boot.kernel),
            initrd: Some(fds.add(boot.initramfs)),
            cmdline: boot.command_line.to_owned(),
            console: boot.console.map(|console| fds.add(console)),
            ends: by_slot,
            rings,
        };
        self.ask("start the guest", &request, &fds, started)
    }

    /// Resumes a machine. Only of a VMM that has none yet. The answer says where the time went.
    pub fn resume(&self, resume: &Resume<'_>, ends: Ends<'_>) -> Result<Vec<Span>, Error> {
        let Ends {
            mut fds,
            by_slot,
            rings,
        } = ends;
        let request = Request::Resume {
            state: fds.add(resume.state),
            memory: fds.add(resume.memory),
            console: resume.console.map(|console| fds.add(console)),
            ends: by_slot,
            rings,
            touched: resume.touched.to_vec(),
            one_by_one: resume.one_by_one,
        };
        let resumed = self.ask("resume the guest", &request, &fds, started);
        resumed.map_err(|error| match error {
            Error::Vmm {
                source:
                    VmmError::Refused {
                        kind: kind @ (RefusalKind::Foreign | RefusalKind::Corrupt),
                        why,
                    },
                ..
            } => Error::NotResumable { kind, why },
            error => error,
        })
    }

    /// Saves the machine into empty files. `digest` is kept in the state's header.
    pub fn save(
        &self,
        state: &File,
        memory: &File,
        digest: [u8; 32],
        go_on: bool,
    ) -> Result<(), Error> {
        let mut fds = Descriptors::default();
        let request = Request::Snapshot {
            state: fds.add(state),
            memory: fds.add(memory),
            digest,
            go_on,
        };
        self.ask("save the guest", &request, &fds, |reply| {
            matches!(reply, Reply::Saved { .. }).then_some(())
        })
    }

    /// Where guest memory lies in the VMM's process, as addresses and lengths, in the order of a memory file.
    pub(crate) fn memory(&self) -> Result<Vec<(u64, u64)>, Error> {
        let action = "find the guest's memory";
        self.ask(
            action,
            &Request::Memory,
            &Descriptors::default(),
            |reply| match reply {
                Reply::Memory(places) => Some(places),
                _ => None,
            },
        )
    }

    /// Saves all but the memory of a paused machine into an empty file. `digest` is kept in its header; `holes` are whole
    /// huge pages of the memory file that hold no data.
    pub(crate) fn save_state(
        &self,
        state: &File,
        digest: [u8; 32],
        holes: Vec<(u64, u64)>,
    ) -> Result<(), Error> {
        let mut fds = Descriptors::default();
        let request = Request::SaveState {
            state: fds.add(state),
            digest,
            holes,
        };
        self.order("save the guest", &request, &fds)
    }

    /// Stops vCPUs and devices.
    pub fn pause(&self) -> Result<(), Error> {
        self.order("pause the guest", &Request::Pause, &Descriptors::default())
    }

    /// Lets them run.
    pub fn unpause(&self) -> Result<(), Error> {
        self.order(
            "let the guest go on",
            &Request::Unpause,
            &Descriptors::default(),
        )
    }

    /// Ends the machine and its VMM.
    pub fn stop(&self) -> Result<(), Error> {
        self.order("stop the guest", &Request::Stop, &Descriptors::default())
    }

    /// Puts a disk into a slot, or into the first empty one or a new one; answers which one it is.
    pub fn attach_disk(&self, slot: Option<u8>, disk: &File, read_only: bool) -> Result<u8, Error> {
        let mut fds = Descriptors::default();
        let request = Request::AttachBlock {
            slot,
            fd: fds.add(disk),
            read_only,
        };
        self.ask("attach a disk", &request, &fds, slot_of)
    }

    /// The same with an overlay.
    pub fn attach_overlay(
        &self,
        slot: Option<u8>,
        base: Option<&File>,
        size: u64,
        pool: Option<&Pool<'_>>,
    ) -> Result<u8, Error> {
        let mut fds = Descriptors::default();
        let overlay = overlay(&mut fds, base, size, pool);
        let request = Request::AttachOverlay { slot, overlay };
        self.ask("attach an overlay", &request, &fds, slot_of)
    }

    /// Takes a disk out.
    pub fn detach_disk(&self, slot: u8) -> Result<(), Error> {
        let request = Request::DetachBlock { slot };
        self.order("detach a disk", &request, &Descriptors::default())
    }

    /// Changes how much all overlays together may take.
    pub fn limit_overlays(&self, ram: u64, spill_limit: u64) -> Result<(), Error> {
        let request = Request::LimitOverlays { ram, spill_limit };
        self.order("limit its overlays", &request, &Descriptors::default())
    }

    /// Writes the content of a paused machine's overlay into an empty file; answers how many bytes it has.
    pub fn save_overlay(&self, slot: u8, into: &File) -> Result<u64, Error> {
        let mut fds = Descriptors::default();
        let request = Request::SaveOverlay {
            slot,
            into: fds.add(into),
        };
        self.ask("save an overlay", &request, &fds, |reply| match reply {
            Reply::SavedOverlay { bytes } => Some(bytes),
            _ => None,
        })
    }

    /// Plugs a network card with one queue pair in front of a tap; answers its slot.
    pub fn plug_net(&self, tap: BorrowedFd<'_>, mac: [u8; 6]) -> Result<u8, Error> {
        let mut fds = Descriptors::default();
        let request = Request::PlugNet {
            taps: vec![fds.add(&tap)],
            mac,
        };
        self.ask("plug a network card", &request, &fds, slot_of)
    }

    /// Puts a tap behind a network card, or pulls its cable.
    pub fn connect_net(&self, slot: u8, tap: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let mut fds = Descriptors::default();
        let request = Request::SetNet {
            slot,
            taps: tap.iter().map(|tap| fds.add(tap)).collect(),
            mac: None,
        };
        self.order("connect a network card", &request, &fds)
    }

    /// Asks for another number of vCPUs and amount of memory, and waits for the guest to follow, for so long; without
    /// time it answers at once, and the guest follows in its own.
    pub fn resize(&self, cpus: u32, memory: u64, timeout_ms: u32) -> Result<Figures, Error> {
        let request = Request::Resize {
            cpus: u8::try_from(cpus).unwrap_or(u8::MAX),
            memory,
            timeout_ms,
        };
        self.ask(
            "change the μVM's size",
            &request,
            &Descriptors::default(),
            figures,
        )
    }

    /// The machine as it is now.
    pub fn figures(&self) -> Result<Figures, Error> {
        self.ask(
            "read the μVM's figures",
            &Request::Stats,
            &Descriptors::default(),
            figures,
        )
    }

    /// Waits for the process to end: its exit code, or -1 for a signal.
    pub fn wait(&self) -> Result<i32, Error> {
        self.0.wait().map_err(|source| Error::Vmm {
            action: "wait for the VMM's end",
            source,
        })
    }
}

fn started(reply: Reply) -> Option<Vec<Span>> {
    match reply {
        Reply::Started { steps, .. } => Some(steps),
        _ => None,
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "`ask` hands over the reply to all that read one"
)]
fn slot_of(reply: Reply) -> Option<u8> {
    match reply {
        Reply::Slot(slot) => Some(slot),
        _ => None,
    }
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "`ask` hands over the reply to all that read one"
)]
fn figures(reply: Reply) -> Option<Figures> {
    match reply {
        Reply::Stats {
            cpus,
            memory,
            paused,
            overlays,
            ..
        } => Some(Figures {
            cpus: cpus.into(),
            memory,
            paused,
            overlays,
        }),
        _ => None,
    }
}
