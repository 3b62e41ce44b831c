//! Puts a kernel, its initramfs and its command line into guest memory.
//!
//! Two forms are understood: bzImage, entered by the 64-bit boot protocol
//! (`Documentation/arch/x86/boot.rst`), and ELF with a PVH note, entered in 32-bit mode. The kernel file
//! comes from whoever started the VMM and is trusted no more than its header needs: sizes are checked.

mod regs;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use crate::layout;
use crate::memory::{GuestRam, PAGE};

pub use regs::{Entry, RegsError, set_boot_registers};

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file is neither of the two forms.
    #[error("the kernel is neither a bzImage nor an ELF file with a PVH entry")]
    Format,
    /// The loader gave up.
    #[error("loading the kernel failed")]
    Kernel(#[source] linux_loader::loader::Error),
    /// A file could not be read.
    #[error("reading the {what} failed")]
    Read {
        /// Which file.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Something does not fit.
    #[error(
        "the {what} of {size} bytes does not fit below {limit:#x}; give the machine more memory"
    )]
    Room {
        /// What does not fit.
        what: &'static str,
        /// Its size.
        size: u64,
        /// The address it must stay below.
        limit: u64,
    },
    /// Guest memory could not be written.
    #[error("writing boot data to guest memory failed")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What to boot.
#[derive(Debug)]
pub struct BootFiles<'a> {
    /// The kernel.
    pub kernel: &'a mut File,
    /// The initramfs.
    pub initrd: Option<&'a mut File>,
    /// The kernel's command line.
    pub cmdline: &'a str,
}

/// A loaded kernel.
#[derive(Debug)]
pub struct Loaded {
    /// Where and how the boot vCPU starts.
    pub entry: Entry,
    /// The kernel's own version text, if its format carries one.
    pub version: String,
}

/// Loads everything and writes the boot information. `ram_size` is base RAM; `rsdp` the root ACPI table.
pub fn load(
    ram: &GuestRam,
    ram_size: u64,
    files: BootFiles<'_>,
    rsdp: u64,
) -> Result<Loaded, BootError> {
    let mem = ram.memory();
    let mem: &GuestMemoryMmap<()> = &mem;
    let cmdline = files.cmdline.as_bytes();
    if cmdline.len() as u64 + 1 > layout::CMDLINE_MAX {
        return Err(BootError::Room {
            what: "command line",
            size: cmdline.len() as u64 + 1,
            limit: layout::CMDLINE + layout::CMDLINE_MAX,
        });
    }
    mem.write_slice(cmdline, GuestAddress(layout::CMDLINE))?;
    mem.write_obj(0u8, GuestAddress(layout::CMDLINE + cmdline.len() as u64))?;

    let mut magic = [0u8; 4];
    let read = |source| BootError::Read {
        what: "kernel",
        source,
    };
    files.kernel.rewind().map_err(read)?;
    files.kernel.read_exact(&mut magic).map_err(read)?;
    if magic == *b"\x7fELF" {
        load_elf(mem, ram_size, files, rsdp)
    } else {
        load_bzimage(mem, ram_size, files, rsdp)
    }
}

fn load_bzimage(
    mem: &GuestMemoryMmap<()>,
    ram_size: u64,
    files: BootFiles<'_>,
    rsdp: u64,
) -> Result<Loaded, BootError> {
    let loaded = BzImage::load(
        mem,
        Some(GuestAddress(layout::HIGH_RAM)),
        files.kernel,
        Some(GuestAddress(layout::HIGH_RAM)),
    )
    .map_err(BootError::Kernel)?;
    let header = loaded.setup_header.ok_or(BootError::Format)?;
    // xloadflags bit 0: the kernel has the 64-bit entry.
    if header.version < 0x20c || header.xloadflags & 1 == 0 {
        return Err(BootError::Format);
    }
    let limit = u64::from(header.initrd_addr_max).saturating_add(1);
    // The kernel unpacks itself in place of init_size bytes from its preferred address.
    let floor = header
        .pref_address
        .saturating_add(u64::from(header.init_size));
    let initrd = load_initrd(mem, ram_size, limit, floor, files.initrd)?;
    let version = kernel_version(files.kernel, &header);

    let mut params = boot_params {
        hdr: header,
        ..Default::default()
    };
    params.hdr.type_of_loader = 0xff;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = layout::CMDLINE_MAX as u32 - 1;
    params.acpi_rsdp_addr = rsdp;
    if let Some((at, len)) = initrd {
        // Both are below 4 GiB: the limit comes from a 32-bit field.
        params.hdr.ramdisk_image = at as u32;
        params.hdr.ramdisk_size = len as u32;
    }
    let map = memory_map(ram_size);
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: *kind,
        };
    }
    params.e820_entries = map.len() as u8;
    mem.write_obj(params, GuestAddress(layout::BOOT_INFO))?;
    // boot.rst, 64-bit protocol: the entry is 0x200 behind the load address.
    Ok(Loaded {
        entry: Entry::Long {
            rip: loaded.kernel_load.0 + 0x200,
        },
        version,
    })
}

fn load_elf(
    mem: &GuestMemoryMmap<()>,
    ram_size: u64,
    files: BootFiles<'_>,
    rsdp: u64,
) -> Result<Loaded, BootError> {
    let loaded = Elf::load(
        mem,
        None,
        files.kernel,
        Some(GuestAddress(layout::HIGH_RAM)),
    )
    .map_err(BootError::Kernel)?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::Format);
    };
    let limit = layout::MMIO_START;
    let initrd = load_initrd(mem, ram_size, limit, loaded.kernel_end, files.initrd)?;

    let mut tables = Vec::new();
    if let Some((at, len)) = initrd {
        for word in [at, len, 0, 0] {
            tables.extend_from_slice(&word.to_le_bytes());
        }
    }
    let map_at = layout::PVH_TABLES + tables.len() as u64;
    let map = memory_map(ram_size);
    for (addr, size, kind) in &map {
        tables.extend_from_slice(&addr.to_le_bytes());
        tables.extend_from_slice(&size.to_le_bytes());
        tables.extend_from_slice(&kind.to_le_bytes());
        tables.extend_from_slice(&0u32.to_le_bytes());
    }
    mem.write_slice(&tables, GuestAddress(layout::PVH_TABLES))?;

    // struct hvm_start_info, version 1.
    let mut info = Vec::new();
    for word in [0x336e_c578u32, 1, 0, u32::from(initrd.is_some())] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    for word in [layout::PVH_TABLES, layout::CMDLINE, rsdp, map_at] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    info.extend_from_slice(&(map.len() as u32).to_le_bytes());
    info.extend_from_slice(&0u32.to_le_bytes());
    mem.write_slice(&info, GuestAddress(layout::BOOT_INFO))?;
    Ok(Loaded {
        entry: Entry::Pvh { eip: entry.0 },
        version: String::new(),
    })
}

/// Loads the initramfs as high as it may be; returns address and length.
fn load_initrd(
    mem: &GuestMemoryMmap<()>,
    ram_size: u64,
    limit: u64,
    floor: u64,
    initrd: Option<&mut File>,
) -> Result<Option<(u64, u64)>, BootError> {
    let Some(file) = initrd else { return Ok(None) };
    let read = |source| BootError::Read {
        what: "initramfs",
        source,
    };
    let len = file.seek(SeekFrom::End(0)).map_err(read)?;
    file.rewind().map_err(read)?;
    let limit = layout::split_ram(ram_size).0.min(limit);
    let room = BootError::Room {
        what: "initramfs",
        size: len,
        limit,
    };
    let Some(at) = limit.checked_sub(len).map(|at| at & !(PAGE - 1)) else {
        return Err(room);
    };
    if at < floor {
        return Err(room);
    }
    let count = usize::try_from(len).map_err(|_| BootError::Format)?;
    mem.read_exact_volatile_from(GuestAddress(at), file, count)?;
    Ok(Some((at, len)))
}

/// The text `uname -r` and more, which a bzImage keeps in its real-mode part.
fn kernel_version(file: &mut File, header: &setup_header) -> String {
    let mut text = [0u8; 128];
    if header.kernel_version == 0
        || file
            .seek(SeekFrom::Start(u64::from(header.kernel_version) + 0x200))
            .is_err()
    {
        return String::new();
    }
    let Ok(n) = file.read(&mut text) else {
        return String::new();
    };
    let text = text.get(..n).unwrap_or_default();
    let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
    String::from_utf8_lossy(text.get(..end).unwrap_or_default()).into_owned()
}

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const E820_ACPI: u32 = 3;

/// The map the kernel gets: address, size, E820 type.
pub(crate) fn memory_map(ram_size: u64) -> Vec<(u64, u64, u32)> {
    let (low, high) = layout::split_ram(ram_size);
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (layout::VMGENID, PAGE, E820_RESERVED),
        (
            layout::ACPI_START,
            layout::ACPI_END - layout::ACPI_START,
            E820_ACPI,
        ),
        (layout::HIGH_RAM, low - layout::HIGH_RAM, E820_RAM),
        // Linux uses ECAM early only if the map reserves it.
        (layout::ECAM, layout::ECAM_LEN, E820_RESERVED),
    ];
    if high > 0 {
        map.push((layout::RAM_ABOVE_4G, high, E820_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn ram(bytes: usize) -> GuestRam {
        GuestRam::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap())
    }

    fn temp(bytes: &[u8]) -> File {
        let mut f = tempfile::tempfile().unwrap();
        f.write_all(bytes).unwrap();
        f
    }

    /// A bzImage's header with one sector of set-up code and a payload.
    fn bzimage() -> Vec<u8> {
        let mut image = vec![0u8; 0x400 + 0x1000];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        image[0x211] = 1;
        image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        image[0x236] = 1;
        image[0x258..0x260].copy_from_slice(&0x10_0000u64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image[0x300..0x306].copy_from_slice(b"6.12.0");
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image
    }

    #[test]
    fn bzimage_is_entered_in_long_mode_with_its_initramfs_on_top() {
        let mem = ram(32 << 20);
        let mut kernel = temp(&bzimage());
        let mut initrd = temp(&[0xaa; 5000]);
        let files = BootFiles {
            kernel: &mut kernel,
            initrd: Some(&mut initrd),
            cmdline: "console=ttyS0",
        };
        let loaded = load(&mem, 32 << 20, files, layout::ACPI_START).unwrap();
        assert_eq!(loaded.entry, Entry::Long { rip: 0x10_0200 });
        assert_eq!(loaded.version, "6.12.0");
        let m = mem.memory();
        let at: u32 = m.read_obj(GuestAddress(layout::BOOT_INFO + 0x218)).unwrap();
        assert_eq!(u64::from(at), (32 << 20) - 8192);
        assert_eq!(
            m.read_obj::<u8>(GuestAddress(u64::from(at) + 4999))
                .unwrap(),
            0xaa
        );
        assert_eq!(
            m.read_obj::<u64>(GuestAddress(layout::BOOT_INFO + 0x70))
                .unwrap(),
            0xe_0000
        );
    }

    #[test]
    fn initramfs_that_would_overlap_the_kernel_is_refused() {
        let mem = ram(32 << 20);
        let mut kernel = temp(&bzimage());
        let mut initrd = tempfile::tempfile().unwrap();
        initrd.set_len(31 << 20).unwrap();
        let files = BootFiles {
            kernel: &mut kernel,
            initrd: Some(&mut initrd),
            cmdline: "",
        };
        assert!(matches!(
            load(&mem, 32 << 20, files, 0),
            Err(BootError::Room {
                what: "initramfs",
                ..
            })
        ));
    }

    #[test]
    fn something_else_is_not_a_kernel() {
        let mem = ram(32 << 20);
        let mut kernel = temp(&[0x55; 4096]);
        let files = BootFiles {
            kernel: &mut kernel,
            initrd: None,
            cmdline: "",
        };
        assert!(load(&mem, 32 << 20, files, 0).is_err());
    }
}
