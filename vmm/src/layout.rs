//! The guest's physical address map and I/O ports.
//!
//! Everything here is part of every stored snapshot: a guest that was baked keeps using these addresses.
//! The assertions at the end trip when one moves; then `snapshot::FORMAT_VERSION` has to go up too
//! (docs/vmm.md, "Breaking the state format").

/// GDT for the jump into the kernel; dead after boot, like all of the low page up to the command line.
pub const BOOT_GDT: u64 = 0x500;
/// PVH start info, or `boot_params` for the 64-bit protocol.
pub const BOOT_INFO: u64 = 0x7000;
/// Module list and memory map of the PVH protocol.
pub const PVH_TABLES: u64 = 0x6000;
/// Top of the stack the kernel is entered with.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Identity-mapping page tables: one PML4, one PDPT, four page directories.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for it.
pub const CMDLINE_MAX: u64 = 0x1_0000;
/// End of conventional memory below the reserved page.
pub const LOW_RAM_END: u64 = 0x9_f000;
/// The page with the VM generation id at its start; reserved in the memory map.
pub const VMGENID: u64 = 0x9_f000;
/// RSDP and all ACPI tables.
pub const ACPI_START: u64 = 0xe_0000;
/// Where a processor starts after a reset in real mode, seen from below 1 MiB: the last 16 bytes of the ACPI area.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// End of the ACPI area.
pub const ACPI_END: u64 = 0x10_0000;
/// Where the kernel may be loaded.
pub const HIGH_RAM: u64 = 0x10_0000;

/// RAM below 4 GiB ends here at the latest.
pub const MMIO_START: u64 = 0xc000_0000;
/// Window for PCI BARs.
pub const PCI_WINDOW: u64 = MMIO_START;
/// Its length.
pub const PCI_WINDOW_LEN: u64 = 0x1000_0000;
/// PCI configuration space of bus 0.
pub const ECAM: u64 = 0xe000_0000;
/// One bus.
pub const ECAM_LEN: u64 = 0x10_0000;
/// I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APICs.
pub const LAPIC: u64 = 0xfee0_0000;
/// Three pages Intel's KVM needs for real mode.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// RAM goes on here.
pub const RAM_ABOVE_4G: u64 = 0x1_0000_0000;
/// Alignment of the hot-plug window, a multiple of every Linux memory block size.
pub const HOTPLUG_ALIGN: u64 = 0x4000_0000;

/// First serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Registers of a serial port.
pub const SERIAL_PORTS: u16 = 8;
/// Its interrupt.
pub const SERIAL_IRQ: u32 = 4;
/// pvpanic's one register.
pub const PVPANIC_PORT: u16 = 0x505;
/// ACPI sleep control (one byte), sleep status (one byte) and reset (one byte).
pub const POWER_PORT: u16 = 0x600;
/// Pending generic events: one 32-bit register, cleared by reading.
pub const EVENT_PORT: u16 = 0x610;
/// CPU hot-plug: 32-bit selector, 32-bit command/status, 32-bit result.
pub const CPU_PORT: u16 = 0x620;
/// PCI hot-plug: 32-bit up, down, eject.
pub const PCI_HOTPLUG_PORT: u16 = 0x630;
/// Keyboard controller's command port; only the reset pulse is understood.
pub const I8042_COMMAND: u16 = 0x64;
/// Interrupt of the generic event device.
pub const EVENT_IRQ: u32 = 9;

/// Largest number of vCPUs: hot-plug is described by one-byte local APIC entries.
pub const MAX_CPUS: u8 = 64;
/// Devices on bus 0, the host bridge included.
pub const PCI_SLOTS: u8 = 32;

const TRIP: () = {
    // A change here breaks every stored snapshot: raise FORMAT_VERSION with it (docs/vmm.md).
    assert!(VMGENID == 0x9_f000 && VMGENID == LOW_RAM_END);
    assert!(ACPI_START == 0xe_0000 && ACPI_END == HIGH_RAM);
    assert!(PCI_WINDOW == 0xc000_0000 && PCI_WINDOW + PCI_WINDOW_LEN <= ECAM);
    assert!(ECAM == 0xe000_0000 && ECAM + ECAM_LEN <= IOAPIC);
    assert!(SERIAL_PORT == 0x3f8 && PVPANIC_PORT == 0x505 && POWER_PORT == 0x600);
    assert!(EVENT_PORT == 0x610 && CPU_PORT == 0x620 && PCI_HOTPLUG_PORT == 0x630);
    assert!(EVENT_IRQ == 9 && SERIAL_IRQ == 4 && MAX_CPUS == 64);
    assert!(HOTPLUG_ALIGN == 1 << 30);
};

/// How much of `ram` bytes lies below the MMIO window, and how much above 4 GiB.
pub fn split_ram(ram: u64) -> (u64, u64) {
    let () = TRIP;
    let low = ram.min(MMIO_START);
    (low, ram - low)
}

/// Where the hot-plug window starts for a machine with `ram` bytes.
pub fn hotplug_base(ram: u64) -> u64 {
    let (_, high) = split_ram(ram);
    (RAM_ABOVE_4G + high).next_multiple_of(HOTPLUG_ALIGN)
}
