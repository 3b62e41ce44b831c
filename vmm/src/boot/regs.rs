//! The boot vCPU's registers, page tables and descriptors.

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::cpu::CpuError;
use crate::cpu::state::set_msrs;
use crate::layout;
use crate::memory::GuestRam;

use super::BootError;

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode with `boot_params` in RSI.
    Long {
        /// Entry address.
        rip: u64,
    },
    /// 32-bit mode without paging, with the PVH start info in EBX.
    Pvh {
        /// Entry address.
        eip: u64,
    },
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// GDT slots: boot.rst wants code at selector 0x10 and data at 0x18.
const GDT: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_ffff,
];
const GDT_CODE32: u64 = 0x00cf_9b00_0000_ffff;

fn segment(index: u16, descriptor: u64) -> kvm_segment {
    let flags = descriptor >> 40;
    let granular = (descriptor >> 55) & 1;
    let limit = (descriptor & 0xffff) | ((descriptor >> 32) & 0xf_0000);
    kvm_segment {
        base: 0,
        limit: if granular == 1 {
            ((limit << 12) | 0xfff) as u32
        } else {
            limit as u32
        },
        selector: index * 8,
        type_: (flags & 0xf) as u8,
        present: 1,
        dpl: 0,
        db: ((descriptor >> 54) & 1) as u8,
        s: ((flags >> 4) & 1) as u8,
        l: ((descriptor >> 53) & 1) as u8,
        g: granular as u8,
        ..Default::default()
    }
}

/// Writes page tables that map the first 4 GiB one to one in 2 MiB pages.
fn write_page_tables(ram: &GuestRam) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const HUGE: u64 = 1 << 7;
    let mem = ram.memory();
    let pdpt = layout::BOOT_PAGE_TABLES + 0x1000;
    mem.write_obj(
        pdpt | PRESENT_WRITABLE,
        GuestAddress(layout::BOOT_PAGE_TABLES),
    )?;
    for gib in 0..4u64 {
        let pd = pdpt + 0x1000 * (gib + 1);
        mem.write_obj(pd | PRESENT_WRITABLE, GuestAddress(pdpt + gib * 8))?;
        for i in 0..512u64 {
            let page = (gib << 30) | (i << 21) | PRESENT_WRITABLE | HUGE;
            mem.write_obj(page, GuestAddress(pd + i * 8))?;
        }
    }
    Ok(())
}

/// Why the boot vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum RegsError {
    /// Guest memory.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The vCPU.
    #[error(transparent)]
    Cpu(#[from] CpuError),
}

/// Brings the boot vCPU to the kernel's entry.
pub fn set_boot_registers(fd: &VcpuFd, ram: &GuestRam, entry: Entry) -> Result<(), RegsError> {
    let kvm = |call| {
        move |source| CpuError::Kvm {
            call,
            index: 0,
            source,
        }
    };
    let long = matches!(entry, Entry::Long { .. });
    let mut gdt = GDT;
    if !long {
        gdt[2] = GDT_CODE32;
    }
    let mem = ram.memory();
    for (at, descriptor) in (layout::BOOT_GDT..).step_by(8).zip(gdt) {
        mem.write_obj(descriptor, GuestAddress(at))
            .map_err(BootError::Memory)?;
    }

    let mut sregs = fd.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
    let data = segment(3, gdt[3]);
    sregs.cs = segment(2, gdt[2]);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = segment(4, gdt[4]);
    sregs.gdt.base = layout::BOOT_GDT;
    sregs.gdt.limit = (size_of::<[u64; 5]>() - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    if long {
        write_page_tables(ram)?;
        sregs.cr3 = layout::BOOT_PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
        sregs.efer = EFER_LME | EFER_LMA;
    } else {
        sregs.cr4 = 0;
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.efer = 0;
    }
    fd.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;

    let mut regs = kvm_regs {
        rflags: 2,
        ..Default::default()
    };
    match entry {
        Entry::Long { rip } => {
            regs.rip = rip;
            regs.rsi = layout::BOOT_INFO;
            regs.rsp = layout::BOOT_STACK;
            regs.rbp = layout::BOOT_STACK;
        }
        Entry::Pvh { eip } => {
            regs.rip = eip;
            regs.rbx = layout::BOOT_INFO;
        }
    }
    fd.set_regs(&regs).map_err(kvm("KVM_SET_REGS"))?;

    const MSR_MISC_ENABLE: u32 = 0x1a0;
    const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    // Fast strings on; memory write-back by default, as firmware would leave it.
    set_msrs(
        fd,
        0,
        &[
            entry(MSR_MISC_ENABLE, 1),
            entry(MSR_MTRR_DEF_TYPE, (1 << 11) | 6),
        ],
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_segment_is_64_bit_and_flat() {
        let cs = segment(2, GDT[2]);
        assert_eq!((cs.selector, cs.l, cs.db, cs.s, cs.g), (0x10, 1, 0, 1, 1));
        assert_eq!((cs.type_, cs.limit), (0xb, 0xffff_ffff));
        let cs = segment(2, GDT_CODE32);
        assert_eq!((cs.l, cs.db), (0, 1));
    }
}
