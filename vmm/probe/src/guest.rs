//! The guest: a few hundred bytes of machine code that do what a kernel does in its first
//! milliseconds, and the memory it runs in.
//!
//! It starts in real mode (as a second CPU does), switches itself to protected and to long mode,
//! computes with integer and floating-point registers, takes and mends a page fault, drops to
//! ring 3 and comes back by `syscall`, sleeps until an MSI wakes it, sleeps until its own timer
//! wakes it, and writes to a doorbell. After each step it writes the step's number to a port.
//!
//! An instruction emulator or a KVM flavour that only runs kernels made for it fails at one of
//! them; which one is worth knowing, so each has a name.

use std::arch::global_asm;

/// Bytes of guest memory, from guest physical address 0.
pub(crate) const MEMORY: usize = 0x2_0000;
/// The port the guest reports its steps on.
pub(crate) const PORT: u16 = 0x0510;
/// Guest physical address of the doorbell: mapped by the guest, backed by nothing.
pub(crate) const DOORBELL: u64 = 0x10_0000;
/// Interrupt vector of the message-signalled interrupt.
pub(crate) const MSI_VECTOR: u8 = 0x40;
/// Guest physical address of the code; also its real-mode segment times 16.
pub(crate) const CODE: u64 = 0x8000;

const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const PML4: u64 = 0x4000;
const PDPT: u64 = 0x5000;
const PD: u64 = 0x6000;
const PT: u64 = 0x7000;
const KERNEL_STACK: u64 = 0xb000;
const USER_STACK: u64 = 0xc000;
const RESULTS: u64 = 0xd000;
const POINTERS: u64 = 0xe000;
const SCRATCH: u64 = 0x1_0000;
const FAULT_PAGE: u64 = 0x1_f000;

const KERNEL_CODE_32: u16 = 0x08;
const KERNEL_CODE: u16 = 0x10;
const KERNEL_DATA: u16 = 0x18;
const USER_DATA: u16 = 0x20;
const USER_CODE: u16 = 0x28;
const TASK: u16 = 0x30;
const TIMER_VECTOR: u8 = 0x41;

const REAL_MODE_SUM: u32 = 1000;
const WORK_ROUNDS: u32 = 100_000;
const WORK_FACTOR: u64 = 6_364_136_223_846_793_005;
const WORK_TERM: u64 = 1_442_695_040_888_963_407;
const MAGIC: u32 = 0x6b69_6c6e;
/// What the guest reports when it takes an exception it did not provoke.
pub(crate) const UNEXPECTED_EXCEPTION: u32 = 0xbad;

/// What the guest proves, in order. The discriminant is what it writes to [`PORT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Step {
    RealMode = 1,
    LongMode = 2,
    PageFault = 3,
    UserMode = 4,
    Msi = 5,
    Timer = 6,
    Doorbell = 7,
}

impl Step {
    pub(crate) const ALL: [Step; 7] = [
        Step::RealMode,
        Step::LongMode,
        Step::PageFault,
        Step::UserMode,
        Step::Msi,
        Step::Timer,
        Step::Doorbell,
    ];

    pub(crate) fn text(self) -> &'static str {
        match self {
            Step::RealMode => "run real-mode code",
            Step::LongMode => "compute in 64-bit mode with paging",
            Step::PageFault => "handle its own page fault",
            Step::UserMode => "enter user mode and return by a system call",
            Step::Msi => "be woken from HLT by an MSI through irqfd",
            Step::Timer => "be woken from HLT by its local APIC timer",
            Step::Doorbell => "ring an ioeventfd doorbell",
        }
    }
}

// AT&T syntax: operand sizes are visible in each mnemonic, which three CPU modes in one file need.
global_asm!(
    r#"
    .pushsection .rodata.kiln_probe_guest,"a",@progbits
    .global kiln_probe_guest_start, kiln_probe_guest_end
    .global kiln_probe_guest_fault, kiln_probe_guest_msi
    .global kiln_probe_guest_timer, kiln_probe_guest_bad
    .balign 16
kiln_probe_guest_start:
    .code16
    cli
    movl    ${real_sum}, %ecx
    xorl    %eax, %eax
1:  addl    %ecx, %eax
    decl    %ecx
    jnz     1b
    movl    %eax, {results}
    xorl    %eax, %eax
    cpuid
    movl    %ebx, {results} + 4
    movl    %edx, {results} + 8
    movl    %ecx, {results} + 12
    movl    $1, %eax
    movw    ${port}, %dx
    outl    %eax, %dx

    lgdtl   {pointers}
    movl    %cr0, %eax
    orl     $1, %eax
    movl    %eax, %cr0
    ljmpl   ${cs32}, $({code} + 2f - kiln_probe_guest_start)
    .code32
2:  movw    ${ds}, %ax
    movw    %ax, %ds
    movw    %ax, %es
    movw    %ax, %ss
    movl    %cr4, %eax
    orl     $0x620, %eax                # PAE, OSFXSR, OSXMMEXCPT
    movl    %eax, %cr4
    movl    ${pml4}, %eax
    movl    %eax, %cr3
    movl    $0xc0000080, %ecx           # EFER: LME, SCE
    rdmsr
    orl     $0x101, %eax
    wrmsr
    movl    %cr0, %eax
    orl     $0x80010022, %eax           # PG, WP, NE, MP
    andl    $0xfffffffb, %eax           # not EM
    movl    %eax, %cr0
    ljmpl   ${cs}, $({code} + 3f - kiln_probe_guest_start)
    .code64
3:  movq    ${kernel_stack}, %rsp
    lidtq   {pointers} + 16
    movw    ${task}, %ax
    ltr     %ax

                                        # what emulators lack comes before what they do slowly
    movl    ${magic}, %eax
    cvtsi2sdq %rax, %xmm0
    sqrtsd  %xmm0, %xmm1
    mulsd   %xmm1, %xmm0
    movsd   %xmm0, {results} + 24
    movl    ${rounds}, %ecx
    movabsq ${factor}, %rsi
    movabsq ${term}, %rdi
    xorl    %eax, %eax
4:  imulq   %rsi, %rax
    addq    %rdi, %rax
    movl    %ecx, %edx
    andl    $0x7fff, %edx
    movb    %al, {scratch}(%rdx)
    decl    %ecx
    jnz     4b
    movq    %rax, {results} + 16
    movl    $2, %eax
    movw    ${port}, %dx
    outl    %eax, %dx

    movl    ${magic}, %eax
    movq    %rax, {fault_page}
    movq    {fault_page}, %rax
    movq    %rax, {results} + 40
    movl    $3, %eax
    outl    %eax, %dx

    movl    $0xc0000081, %ecx           # STAR: selectors of both rings
    xorl    %eax, %eax
    movl    $(({ds} | 3) << 16 | {cs}), %edx
    wrmsr
    movl    $0xc0000082, %ecx           # LSTAR
    movl    $({code} + 6f - kiln_probe_guest_start), %eax
    xorl    %edx, %edx
    wrmsr
    movl    $0xc0000084, %ecx           # SFMASK: interrupts stay off
    movl    $0x200, %eax
    wrmsr
    pushq   $({user_ds} | 3)
    pushq   ${user_stack}
    pushq   $2
    pushq   $({user_cs} | 3)
    pushq   $({code} + 5f - kiln_probe_guest_start)
    iretq
5:  movl    %cs, %ebx
    pushq   %rbx
    movq    %rbx, {results} + 48
    syscall
6:  movq    %rsp, {results} + 56
    movq    ${kernel_stack}, %rsp
    movl    %cs, %eax
    movq    %rax, {results} + 64

    movl    $0x1b, %ecx                 # APIC base: enabled, x2APIC
    rdmsr
    orl     $0xc00, %eax
    wrmsr
    movl    $0x80f, %ecx                # spurious vector; software enable
    movl    $0x1ff, %eax
    xorl    %edx, %edx
    wrmsr
    movl    $4, %eax
    movw    ${port}, %dx
    outl    %eax, %dx

7:  cli
    cmpl    $0, {results} + 72
    jne     8f
    sti
    hlt
    jmp     7b
8:  movl    $5, %eax
    movw    ${port}, %dx
    outl    %eax, %dx

    movl    $0x832, %ecx                # LVT timer: one shot
    movl    ${timer_vector}, %eax
    xorl    %edx, %edx
    wrmsr
    movl    $0x83e, %ecx                # divide by 1
    movl    $0xb, %eax
    wrmsr
    movl    $0x838, %ecx                # initial count
    movl    $1000000, %eax
    wrmsr
9:  cli
    cmpl    $0, {results} + 76
    jne     10f
    sti
    hlt
    jmp     9b
10: movl    $6, %eax
    movw    ${port}, %dx
    outl    %eax, %dx

    movl    ${magic}, %eax
    movl    %eax, {doorbell}
    movl    $7, %eax
    outl    %eax, %dx
11: hlt
    jmp     11b

kiln_probe_guest_fault:
    pushq   %rax
    movq    %cr2, %rax
    movq    %rax, {results} + 32
    movq    ${fault_page} + 3, {pt} + 8 * ({fault_page} / 4096)
    invlpg  {fault_page}
    popq    %rax
    addq    $8, %rsp                    # the error code
    iretq
kiln_probe_guest_msi:
    incl    {results} + 72
    jmp     12f
kiln_probe_guest_timer:
    incl    {results} + 76
12: pushq   %rax
    pushq   %rcx
    pushq   %rdx
    movl    $0x80b, %ecx                # end of interrupt
    xorl    %eax, %eax
    xorl    %edx, %edx
    wrmsr
    popq    %rdx
    popq    %rcx
    popq    %rax
    iretq
kiln_probe_guest_bad:
    movl    ${unexpected}, %eax
    movw    ${port}, %dx
    outl    %eax, %dx
    hlt
    jmp     kiln_probe_guest_bad
kiln_probe_guest_end:
    .popsection
    "#,
    real_sum = const REAL_MODE_SUM,
    results = const RESULTS,
    pointers = const POINTERS,
    port = const PORT,
    code = const CODE,
    cs32 = const KERNEL_CODE_32,
    cs = const KERNEL_CODE,
    ds = const KERNEL_DATA,
    user_ds = const USER_DATA,
    user_cs = const USER_CODE,
    task = const TASK,
    pml4 = const PML4,
    pt = const PT,
    kernel_stack = const KERNEL_STACK,
    user_stack = const USER_STACK,
    rounds = const WORK_ROUNDS,
    factor = const WORK_FACTOR,
    term = const WORK_TERM,
    scratch = const SCRATCH,
    magic = const MAGIC,
    fault_page = const FAULT_PAGE,
    timer_vector = const TIMER_VECTOR,
    doorbell = const DOORBELL,
    unexpected = const UNEXPECTED_EXCEPTION,
    options(att_syntax)
);

// The scratch area is indexed by 15 bits and must not run into the page that faults.
const _: () = assert!(SCRATCH + 0x8000 <= FAULT_PAGE && FAULT_PAGE + 0x1000 <= MEMORY as u64);
const _: () = assert!(DOORBELL >= MEMORY as u64 && DOORBELL < 0x20_0000);

unsafe extern "C" {
    static kiln_probe_guest_start: u8;
    static kiln_probe_guest_end: u8;
    static kiln_probe_guest_fault: u8;
    static kiln_probe_guest_msi: u8;
    static kiln_probe_guest_timer: u8;
    static kiln_probe_guest_bad: u8;
}

fn code() -> &'static [u8] {
    let start = &raw const kiln_probe_guest_start;
    let end = &raw const kiln_probe_guest_end;
    // SAFETY: the assembly above places both labels, in this order, round one run of read-only
    // bytes in one section, which live as long as the program.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}

fn guest_address(label: *const u8) -> u64 {
    CODE + (label as u64 - (&raw const kiln_probe_guest_start) as u64)
}

/// The image of guest memory as the guest finds it.
pub(crate) fn image() -> Box<[u8]> {
    let mut memory = vec![0u8; MEMORY].into_boxed_slice();
    let mut put = |at: u64, bytes: &[u8]| {
        let at = at as usize;
        memory[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(CODE, code());

    let tss_low = 0x0000_8900_0000_0067 | (TSS & 0xff_ffff) << 16;
    let segments: [u64; 8] = [
        0,
        0x00cf_9b00_0000_ffff, // 32-bit code
        0x00af_9b00_0000_ffff, // 64-bit code
        0x00cf_9300_0000_ffff, // data
        0x00cf_f300_0000_ffff, // user data
        0x00af_fb00_0000_ffff, // user 64-bit code
        tss_low,
        TSS >> 32,
    ];
    for (i, segment) in (0u64..).zip(segments) {
        put(GDT + 8 * i, &segment.to_le_bytes());
    }
    put(POINTERS, &(8 * segments.len() as u16 - 1).to_le_bytes());
    put(POINTERS + 2, &GDT.to_le_bytes());
    put(POINTERS + 16, &0xfffu16.to_le_bytes());
    put(POINTERS + 18, &IDT.to_le_bytes());
    put(TSS + 4, &KERNEL_STACK.to_le_bytes());

    for vector in 0..=255u8 {
        let handler = match vector {
            14 => &raw const kiln_probe_guest_fault,
            MSI_VECTOR => &raw const kiln_probe_guest_msi,
            TIMER_VECTOR => &raw const kiln_probe_guest_timer,
            _ => &raw const kiln_probe_guest_bad,
        };
        let at = guest_address(handler);
        // A 64-bit interrupt gate: offset 15..0, selector, type, offset 31..16.
        let gate =
            (at & 0xffff) | u64::from(KERNEL_CODE) << 16 | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48;
        put(IDT + 16 * u64::from(vector), &gate.to_le_bytes());
    }

    const TABLE: u64 = 7; // present, writable, user
    put(PML4, &(PDPT | TABLE).to_le_bytes());
    put(PDPT, &(PD | TABLE).to_le_bytes());
    put(PD, &(PT | TABLE).to_le_bytes());
    for page in 0..512u64 {
        if page * 4096 != FAULT_PAGE {
            put(PT + 8 * page, &((page * 4096) | TABLE).to_le_bytes());
        }
    }
    memory
}

fn word(memory: &[u8], at: u64) -> u32 {
    let at = (RESULTS + at) as usize;
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&memory[at..at + 4]);
    u32::from_le_bytes(bytes)
}

fn quad(memory: &[u8], at: u64) -> u64 {
    u64::from(word(memory, at)) | u64::from(word(memory, at + 4)) << 32
}

/// Whether guest memory holds what `step` must have left there. `vendor` is the CPU vendor that
/// the guest was promised (EBX, EDX, ECX of leaf 0).
pub(crate) fn check(step: Step, memory: &[u8], vendor: [u32; 3]) -> bool {
    match step {
        Step::RealMode => {
            word(memory, 0) == REAL_MODE_SUM * (REAL_MODE_SUM + 1) / 2
                && [word(memory, 4), word(memory, 8), word(memory, 12)] == vendor
        }
        Step::LongMode => {
            let mut value = 0u64;
            for _ in 0..WORK_ROUNDS {
                value = value.wrapping_mul(WORK_FACTOR).wrapping_add(WORK_TERM);
            }
            let real = f64::from(MAGIC);
            quad(memory, 16) == value && quad(memory, 24) == (real * real.sqrt()).to_bits()
        }
        Step::PageFault => quad(memory, 32) == FAULT_PAGE && quad(memory, 40) == u64::from(MAGIC),
        Step::UserMode => {
            quad(memory, 48) == u64::from(USER_CODE | 3)
                && quad(memory, 56) == USER_STACK - 8
                && quad(memory, 64) == u64::from(KERNEL_CODE)
        }
        Step::Msi => word(memory, 72) == 1,
        Step::Timer => word(memory, 76) == 1,
        Step::Doorbell => true, // seen by the host, in the eventfd
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_fits_its_page_and_every_handler_lies_inside() {
        assert!(code().len() <= 4096, "{} bytes", code().len());
        for label in [
            &raw const kiln_probe_guest_fault,
            &raw const kiln_probe_guest_bad,
        ] {
            let at = guest_address(label);
            assert!(at > CODE && at < CODE + code().len() as u64);
        }
    }

    #[test]
    fn untouched_memory_passes_no_check() {
        let memory = image();
        for step in Step::ALL.iter().filter(|s| **s != Step::Doorbell) {
            assert!(!check(*step, &memory, [1, 2, 3]), "{step:?}");
        }
    }

    #[test]
    fn page_that_must_fault_is_the_only_one_not_mapped() {
        let memory = image();
        let absent: Vec<u64> = (0..512u64)
            .filter(|page| memory[(PT + 8 * page) as usize] & 1 == 0)
            .map(|page| page * 4096)
            .collect();
        assert_eq!(absent, [FAULT_PAGE]);
    }
}
