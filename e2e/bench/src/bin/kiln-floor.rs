//! The floor under every resume: a bare program that maps a saved machine's memory, makes a VM with its state,
//! and runs its vCPU to the first exit. No devices, no jail, no threads, no control.
//!
//! `kiln-floor STATE MEMORY` prints, for each step, its name and the monotonic clock's nanoseconds at its end.

use std::fs::File;

use anyhow::{Context, Result, bail, ensure};
use kiln_vmm::memory::{FileSource, HostMemory};
use kiln_vmm::snapshot;
use kiln_vmm::vm::VmSeed;
use kvm_bindings::{kvm_clock_data, kvm_mp_state, kvm_vcpu_events};
use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// `out %al, $0x80`, which the machine's own exits know nothing of.
const EXIT: [u8; 2] = [0xe6, PORT as u8];
const PORT: u16 = 0x80;
const INTERRUPTS: u64 = 1 << 9;
const PAGE: u64 = 4096;

#[derive(Default)]
struct Laps(Vec<(&'static str, u64)>);

impl Laps {
    fn end(&mut self, name: &'static str) {
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the kernel writes one timespec, which `now` is.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
        // A monotonic clock counts up from 0.
        self.0
            .push((name, now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64));
    }
}

fn main() -> Result<()> {
    let mut steps = Laps::default();
    steps.end("exec");
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().context("usage: kiln-floor STATE MEMORY");
    let mut state = File::open(next()?).context("opening the state file")?;
    let memory = File::open(next()?).context("opening the memory file")?;

    let bytes = snapshot::read_file(&mut state)?;
    let (_, state) = snapshot::decode(&bytes)?;
    steps.end("state");
    let source = FileSource {
        file: &memory,
        holes: &state.holes,
        singly: false,
    };
    let memory = HostMemory::from_file(state.config.memory.into(), &source)?;
    steps.end("map");
    let seed = VmSeed::create(None)?;
    steps.end("create VM");

    let memory = memory.attach(seed.vm.clone())?;
    for chip in &state.irqchips {
        seed.vm.set_irqchip(chip)?;
    }
    seed.vm.set_clock(&kvm_clock_data {
        clock: state.clock.clock,
        ..Default::default()
    })?;
    let saved = state.vcpus.first().context("a machine without vCPUs")?;
    let mut vcpu = seed.vm.create_vcpu(0)?;
    saved.restore(&vcpu)?;
    steps.end("vCPU state");

    // Where the guest stands, it finds an instruction that exits, and nothing comes in between.
    let place = saved.regs.rip - saved.regs.rip % PAGE;
    let found = vcpu.translate_gva(place)?;
    ensure!(found.valid != 0, "the guest stands at no page: {place:#x}");
    memory
        .ram()
        .memory()
        .write_slice(&EXIT, GuestAddress(found.physical_address))?;
    let mut regs = saved.regs;
    (regs.rip, regs.rflags) = (place, regs.rflags & !INTERRUPTS);
    vcpu.set_regs(&regs)?;
    vcpu.set_vcpu_events(&kvm_vcpu_events::default())?;
    vcpu.set_mp_state(kvm_mp_state {
        mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE,
    })?;
    match vcpu.run()? {
        VcpuExit::IoOut(PORT, _) => steps.end("first exit"),
        other => bail!("the vCPU left with {other:?}"),
    }
    for (name, end) in &steps.0 {
        println!("{end} {name}");
    }
    Ok(())
}
