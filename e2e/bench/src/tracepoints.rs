//! Counts of kernel trace points over all CPUs: system calls and VM exits cost next to nothing to
//! count, and no busy machine changes their number.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, ensure};

const TRACEFS: &str = "/sys/kernel/tracing";

/// The first form of the kernel's `perf_event_attr`, which every kernel accepts.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint: u32,
    config1: u64,
}

const KIND_TRACEPOINT: u32 = 2;
const CLOSE_ON_EXEC: libc::c_ulong = 8;

/// A trace point that is being counted.
#[derive(Debug)]
pub(crate) struct Tracepoint {
    /// What a report calls it.
    pub(crate) name: &'static str,
    counters: Vec<OwnedFd>,
}

impl Tracepoint {
    /// Begins to count `event`, as in `raw_syscalls/sys_enter`. `None` if this kernel has no such event:
    /// its module may not be loaded.
    pub(crate) fn count(name: &'static str, event: &str) -> Result<Option<Self>> {
        let Some(id) = id_of(event)? else {
            return Ok(None);
        };
        // SAFETY: sysconf only reads its number.
        let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
        let cpus = i32::try_from(cpus).context("the number of CPUs")?;
        let counters = (0..cpus)
            .map(|cpu| open(id, -1, cpu).with_context(|| format!("cannot count {event}")))
            .collect::<Result<_>>()?;
        Ok(Some(Tracepoint { name, counters }))
    }

    /// The same by this thread alone.
    pub(crate) fn of_this_thread(event: &'static str) -> Result<Option<Self>> {
        let Some(id) = id_of(event)? else {
            return Ok(None);
        };
        let counter = open(id, 0, -1).with_context(|| format!("cannot count {event}"))?;
        Ok(Some(Tracepoint {
            name: event,
            counters: vec![counter],
        }))
    }

    /// How often it was passed so far.
    pub(crate) fn read(&self) -> Result<u64> {
        let mut sum = 0;
        for counter in &self.counters {
            let mut value = [0u8; 8];
            // SAFETY: pointer and length describe a live buffer.
            let got =
                unsafe { libc::read(counter.as_raw_fd(), value.as_mut_ptr().cast(), value.len()) };
            ensure!(got == 8, "cannot read the count of {}", self.name);
            sum += u64::from_ne_bytes(value);
        }
        Ok(sum)
    }
}

fn id_of(event: &str) -> Result<Option<u64>> {
    mount_tracefs()?;
    let file = Path::new(TRACEFS).join("events").join(event).join("id");
    match fs::read_to_string(&file) {
        Ok(text) => Ok(Some(text.trim().parse().context("a trace point's number")?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{}", file.display())),
    }
}

/// Of one thread, or of all (-1), on one CPU, or on all (-1).
fn open(id: u64, thread: i32, cpu: i32) -> Result<OwnedFd> {
    let attributes = Attributes {
        kind: KIND_TRACEPOINT,
        size: u32::try_from(size_of::<Attributes>())?,
        config: id,
        ..Attributes::default()
    };
    // SAFETY: the attributes are a live structure whose size stands in it; the rest are numbers.
    let raw = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            thread,
            cpu,
            -1,
            CLOSE_ON_EXEC,
        )
    };
    if raw < 0 {
        return Err(io::Error::last_os_error()).context("perf_event_open");
    }
    // SAFETY: the descriptor was opened just now and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(raw)?) })
}

fn mount_tracefs() -> Result<()> {
    if Path::new(TRACEFS).join("events").exists() {
        return Ok(());
    }
    // SAFETY: all pointers are to strings ended by a zero byte, or null where that is allowed.
    let result = unsafe {
        libc::mount(
            c"tracefs".as_ptr(),
            c"/sys/kernel/tracing".as_ptr(),
            c"tracefs".as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error())
            .context("cannot mount tracefs, whose events the benches count");
    }
    Ok(())
}
