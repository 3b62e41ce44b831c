//! Finds out whether this machine's KVM runs an ordinary, unmodified guest, by running one.
//!
//! A `/dev/kvm` that exists proves nothing: it may belong to a KVM flavour that only runs kernels
//! made for it, or to a nested set-up that breaks on the first page fault. So [`probe`] makes a VM
//! the way kiln does and takes a small guest through what a kernel does while it starts (see the
//! `guest` module for the list). It takes milliseconds when all is well and [`LIMIT`] plus a little
//! when it is not, and any program may call it, from any thread: the work is done in a contained
//! child process, so neither a hang nor a crash nor a signal reaches the caller.

mod contained;
mod guest;
mod host;
mod ioctl;
mod machine;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde::Serialize;

use contained::{End, Shared};
use guest::Step;
pub use host::Host;
use machine::{Call, Prepared, Progress, REQUIRED, Verdict};

/// How long the guest may take for all its steps.
pub const LIMIT: Duration = Duration::from_secs(3);

const DEVICE: &str = "/dev/kvm";

/// What this machine's KVM is good for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Report {
    /// An ordinary guest ran, and everything kiln needs is there.
    Usable {
        /// How long making the VM and running the guest took.
        elapsed: Duration,
        /// The most vCPUs a VM may have here.
        max_vcpus: u32,
        /// The most memory slots a VM may have here.
        memory_slots: u32,
        /// What the host says about itself.
        host: Host,
    },
    /// There is a KVM, but no ordinary guest runs on it.
    Unusable {
        /// What went wrong.
        reason: Reason,
        /// What to do about it.
        remedy: String,
    },
    /// There is no KVM.
    Absent {
        /// What to do about it.
        remedy: String,
    },
    /// There is a KVM, but this user may not open it.
    NoPermission {
        /// What to do about it.
        remedy: String,
    },
}

/// Why a KVM is unusable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Reason {
    /// The device answers, but not as KVM does.
    #[error("{DEVICE} does not speak KVM's API version 12")]
    NotKvm,
    /// A capability that kiln needs is missing or too small.
    #[error("{name} is {found}, kiln needs {needed}")]
    MissingCapability {
        /// Its name in `linux/kvm.h`.
        name: String,
        /// What the kernel answered.
        found: i32,
        /// The least that will do.
        needed: i32,
    },
    /// A KVM call failed.
    #[error("{call} failed: {error}")]
    CallFailed {
        /// The name of the call.
        call: String,
        /// What the kernel said.
        error: String,
    },
    /// The guest stopped where it should have gone on.
    #[error("the guest could not {step}: {how}")]
    GuestFailed {
        /// What the guest was about to do.
        step: String,
        /// What happened instead.
        how: String,
    },
    /// The guest made no progress for as long as it was given.
    #[error("the guest hung while it was to {step} (given up after {seconds} s)")]
    Hung {
        /// What the guest was about to do.
        step: String,
        /// How long it was given.
        seconds: u64,
    },
    /// The kernel did not let go of the probing process even when it was killed.
    #[error("the kernel hung inside {call} and does not let go of the probing process")]
    Stuck {
        /// The last call made.
        call: String,
    },
    /// The probing process was killed by a signal.
    #[error("the probing process was killed by signal {signal}")]
    Crashed {
        /// The signal.
        signal: i32,
    },
    /// The probe could not be carried out.
    #[error("the probe itself failed: {error}")]
    NotProbed {
        /// The operating system's reason.
        error: String,
    },
}

impl Report {
    /// Whether pods can run.
    pub fn is_usable(&self) -> bool {
        matches!(self, Report::Usable { .. })
    }

    /// What to do to make it usable; `None` if it is.
    pub fn remedy(&self) -> Option<&str> {
        match self {
            Report::Usable { .. } => None,
            Report::Unusable { remedy, .. }
            | Report::Absent { remedy }
            | Report::NoPermission { remedy } => Some(remedy),
        }
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Report::Usable { elapsed, host, .. } => {
                write!(f, "usable: an ordinary guest ran on {DEVICE}")?;
                if let [module, ..] = host.modules.as_slice() {
                    write!(f, " ({module})")?;
                }
                write!(f, " in {} ms", elapsed.as_millis())
            }
            Report::Unusable { reason, .. } => write!(f, "unusable: {reason}"),
            Report::Absent { .. } => write!(f, "absent: there is no {DEVICE}"),
            Report::NoPermission { .. } => write!(f, "no permission to open {DEVICE}"),
        }
    }
}

/// Runs an ordinary guest on this machine's KVM and says how it went.
pub fn probe() -> Report {
    let host = Host::read(Path::new("/"));
    match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(device) => probe_device(&device, host, LIMIT),
        Err(error) => report_unopened(&error, &host),
    }
}

fn report_unopened(error: &io::Error, host: &Host) -> Report {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Report::Absent {
            remedy: host.remedy_absent(),
        },
        Some(libc::EACCES | libc::EPERM) => Report::NoPermission {
            remedy: "run as root, or join the group that owns it (`usermod -aG kvm USER`, then \
                     log in again); in a container, allow the device"
                .into(),
        },
        _ => Report::Unusable {
            reason: Reason::CallFailed {
                call: format!("opening {DEVICE}"),
                error: error.to_string(),
            },
            remedy: host.remedy_unusable(),
        },
    }
}

fn probe_device(device: &File, host: Host, limit: Duration) -> Report {
    let start = Instant::now();
    let (end, progress) = match run_guest(device, limit) {
        Ok(done) => done,
        Err(error) => {
            return Report::Unusable {
                reason: Reason::NotProbed {
                    error: error.to_string(),
                },
                remedy: "free memory or process slots, then try again".into(),
            };
        }
    };
    match judge(end, &progress, limit) {
        None => Report::Usable {
            elapsed: start.elapsed(),
            max_vcpus: progress.max_vcpus.load(Relaxed).unsigned_abs(),
            memory_slots: progress.memory_slots.load(Relaxed).unsigned_abs(),
            host,
        },
        Some(reason) => {
            let remedy = match reason {
                Reason::MissingCapability { .. } => "use a newer host kernel (6.1 or later)".into(),
                Reason::NotKvm => format!("see what {DEVICE} is: `ls -l {DEVICE}`"),
                _ => host.remedy_unusable(),
            };
            Report::Unusable { reason, remedy }
        }
    }
}

fn run_guest(device: &File, limit: Duration) -> io::Result<(End, Shared<Progress>)> {
    let progress = Shared::<Progress>::zeroed()?;
    let image = guest::image();
    let memory = GuestMemory::holding(&image)?;
    let prepared = Prepared {
        kvm: device.as_raw_fd(),
        memory: memory.at.cast(),
        progress: &progress,
    };
    // SAFETY: `machine::probe` makes system calls and touches memory prepared above, no more.
    let end = unsafe { contained::run(|| machine::probe(&prepared), limit)? };
    Ok((end, progress))
}

/// Why the KVM is unusable, from how the child ended and what it left behind; `None` if it is not.
fn judge(end: End, progress: &Progress, limit: Duration) -> Option<Reason> {
    let verdict = progress.verdict.load(Relaxed);
    let finished = progress.steps.load(Relaxed);
    let call = Call::name(progress.call.load(Relaxed)).to_owned();
    let step = Step::ALL
        .get(finished as usize)
        .map_or("answer an immediate exit", |step| step.text())
        .to_owned();
    let detail = progress.detail.load(Relaxed);
    let rip = progress.rip.load(Relaxed);
    let is = |wanted: Verdict| verdict == wanted as u32;
    match end {
        End::Stuck => return Some(Reason::Stuck { call }),
        End::TimedOut => {
            return Some(Reason::Hung {
                step,
                seconds: limit.as_secs(),
            });
        }
        End::Signalled(signal) => return Some(Reason::Crashed { signal }),
        End::Exited(_) => {}
    }
    if is(Verdict::Usable) {
        return None;
    }
    let failed = |how: String| {
        Some(Reason::GuestFailed {
            step: step.clone(),
            how,
        })
    };
    if is(Verdict::MissingCapability) {
        let capability = progress.capability.load(Relaxed);
        let (_, needed, name) = REQUIRED.iter().find(|(number, ..)| *number == capability)?;
        Some(Reason::MissingCapability {
            name: (*name).to_owned(),
            found: progress.capability_value.load(Relaxed),
            needed: *needed,
        })
    } else if is(Verdict::ApiVersion) {
        Some(Reason::NotKvm)
    } else if is(Verdict::CallFailed) {
        let error = io::Error::from_raw_os_error(progress.errno.load(Relaxed));
        match error.raw_os_error() {
            Some(libc::ENOTTY) if progress.call.load(Relaxed) == Call::ApiVersion as u32 => {
                Some(Reason::NotKvm)
            }
            _ if progress.call.load(Relaxed) == Call::Run as u32 => {
                failed(format!("KVM_RUN failed: {error}"))
            }
            _ => Some(Reason::CallFailed {
                call,
                error: error.to_string(),
            }),
        }
    } else if is(Verdict::UnexpectedExit) {
        failed(format!(
            "{} at {rip:#x}",
            exit_text(progress.exit_reason.load(Relaxed), detail)
        ))
    } else if is(Verdict::WrongOutput) && detail == u64::from(guest::UNEXPECTED_EXCEPTION) {
        failed(format!(
            "it took an exception that a real CPU does not raise, at {rip:#x}"
        ))
    } else if is(Verdict::WrongOutput) {
        failed(format!(
            "it reported step {detail} out of turn, at {rip:#x}"
        ))
    } else if is(Verdict::WrongResult) {
        failed("it computed a wrong result".into())
    } else if is(Verdict::NoDoorbell) {
        failed("the doorbell's eventfd was not signalled".into())
    } else if is(Verdict::NoImmediateExit) {
        failed("KVM_RUN with immediate_exit did not return at once".into())
    } else {
        Some(Reason::NotProbed {
            error: format!("the probing process left no verdict ({end:?})"),
        })
    }
}

fn exit_text(reason: u32, detail: u64) -> String {
    match reason {
        kvm_bindings::KVM_EXIT_INTERNAL_ERROR if detail == 1 => {
            "KVM could not emulate an instruction (internal error 1)".into()
        }
        kvm_bindings::KVM_EXIT_INTERNAL_ERROR => format!("KVM internal error {detail}"),
        kvm_bindings::KVM_EXIT_FAIL_ENTRY => {
            format!("the CPU refused to enter the guest (hardware reason {detail:#x})")
        }
        kvm_bindings::KVM_EXIT_SHUTDOWN => "triple fault".into(),
        kvm_bindings::KVM_EXIT_HLT => "it halted".into(),
        kvm_bindings::KVM_EXIT_MMIO => "it touched memory that is not there".into(),
        other => format!("unexpected exit {other}"),
    }
}

/// Memory for the guest, page-aligned.
struct GuestMemory {
    at: *mut libc::c_void,
}

impl GuestMemory {
    fn holding(image: &[u8]) -> io::Result<GuestMemory> {
        // SAFETY: a new anonymous mapping, of which nothing else knows.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                guest::MEMORY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        assert!(image.len() <= guest::MEMORY);
        // SAFETY: the mapping is at least as long as the image, and new.
        unsafe { std::ptr::copy_nonoverlapping(image.as_ptr(), at.cast(), image.len()) };
        Ok(GuestMemory { at })
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `holding`; the child has a copy of its own.
        unsafe { libc::munmap(self.at, guest::MEMORY) };
    }
}

#[cfg(test)]
mod tests;
