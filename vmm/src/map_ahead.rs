//! Mapping pages for a guest before it touches them: as a page fault of its own, each would be an exit, and several
//! times the work.

use std::io;
use std::os::fd::AsRawFd;

use kiln_vmm_control::PageRun;
use kvm_bindings::kvm_pre_fault_memory;
use kvm_ioctls::VcpuFd;

use crate::layout;
use crate::memory::{Memory, PAGE};

/// `KVM_PRE_FAULT_MEMORY`: `_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)`.
const PRE_FAULT: libc::c_ulong = 0xc040_aed5;
const _: () = assert!(size_of::<kvm_pre_fault_memory>() == 0x40);

/// Maps runs of base RAM. What can't be mapped now (Linux has the call since 6.9) is mapped when it is touched.
pub(crate) fn map_ahead(vcpu: &VcpuFd, memory: &Memory, runs: &[PageRun]) {
    let ram = memory.shape().ram;
    // What lies beyond is hot-plugged memory, or the list is another guest's.
    let in_ram = |run: &&PageRun| start(run) + len(run) <= ram;
    // A page that the guest writes is mapped as its copy, so that writing it needs no exit either.
    for run in runs.iter().filter(in_ram).filter(|run| run.written) {
        if memory.copy_pages(start(run), len(run)).is_err() {
            return;
        }
    }
    let mut rest = runs;
    while let [first, after @ ..] = rest {
        // Read or written, neighbours are one call.
        let mut end = start(first) + len(first);
        rest = after;
        while let [next, after @ ..] = rest
            && start(next) == end
        {
            end += len(next);
            rest = after;
        }
        if end > ram {
            return;
        }
        for (gpa, len) in in_guest(ram, start(first), end - start(first)) {
            if pre_fault(vcpu, gpa, len).is_err() {
                return;
            }
        }
    }
}

fn start(run: &PageRun) -> u64 {
    u64::from(run.first) * PAGE
}

fn len(run: &PageRun) -> u64 {
    u64::from(run.pages) * PAGE
}

/// Where a range of the memory file's base RAM is for the guest: in two parts, if it spans the gap below 4 GiB.
fn in_guest(ram: u64, start: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let (low, _) = layout::split_ram(ram);
    let below = low.saturating_sub(start).min(len);
    let above = layout::RAM_ABOVE_4G + (start + below).saturating_sub(low);
    [(start, below), (above, len - below)]
        .into_iter()
        .filter(|(_, len)| *len > 0)
}

fn pre_fault(vcpu: &VcpuFd, gpa: u64, size: u64) -> io::Result<()> {
    let mut range = kvm_pre_fault_memory {
        gpa,
        size,
        ..Default::default()
    };
    // KVM moves the range's start on and comes back for a signal.
    while range.size > 0 {
        // SAFETY: the request's structure, which KVM reads and writes, and which lives through the call.
        if unsafe { libc::ioctl(vcpu.as_raw_fd(), PRE_FAULT, &raw mut range) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_over_the_gap_is_two_for_the_guest() {
        let (gib, ram) = (1 << 30, 4 << 30);
        let of = |start, len| in_guest(ram, start, len).collect::<Vec<_>>();
        assert_eq!(of(0, gib), [(0, gib)]);
        assert_eq!(of(3 * gib, gib), [(4 * gib, gib)]);
        assert_eq!(
            of(3 * gib - 4096, 3 * 4096),
            [(3 * gib - 4096, 4096), (4 * gib, 2 * 4096)]
        );
    }
}
