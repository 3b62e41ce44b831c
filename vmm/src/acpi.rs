//! Hardware-reduced ACPI tables: what Linux needs to find CPUs, PCI, power registers and hot-plug events.
//!
//! The registers behind the AML are in [`crate::platform`]; ports in [`crate::layout`]. AML names: `GED_`
//! generic event device, `CPUS` CPU container, `PHPR` PCI hot-plug registers, `VGEN` generation id.

use acpi_tables::aml::{
    Acquire, AddressSpace, AddressSpaceCacheable, And, Arg, BufferData, Device, EISAName, Equal,
    Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt,
    LessThan, Local, Memory32Fixed, Method, MethodCall, Mutex, Name, Notify, OpRegion,
    OpRegionSpace, Package, Path, Release, ResourceTemplate, Return, Scope, Store, While,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::{GenericAddress, Sdt};
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::layout;
use crate::memory::GuestRam;

const OEM: [u8; 6] = *b"KILN  ";
const OEM_TABLE: [u8; 8] = *b"KILNUVM ";

/// A generic event: a bit in the register at [`layout::EVENT_PORT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Event {
    /// A vCPU came or should go.
    Cpus = 1,
    /// A PCI device came or should go.
    Pci = 2,
    /// The generation id changed.
    Generation = 4,
    /// The power button was pressed.
    PowerButton = 8,
}

/// What the tables describe.
#[derive(Clone, Copy, Debug)]
pub struct AcpiConfig {
    /// vCPUs present at boot.
    pub boot_cpus: u8,
    /// vCPUs there may ever be.
    pub max_cpus: u8,
    /// Whether there is a serial port.
    pub serial: bool,
}

/// Why tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They do not fit.
    #[error("ACPI tables need {needed} bytes, there is room for {room}")]
    Room {
        /// Bytes needed.
        needed: u64,
        /// Bytes there are.
        room: u64,
    },
    /// Guest memory.
    #[error("writing ACPI tables to guest memory failed")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Already encoded AML.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn encode(aml: &dyn Aml) -> Encoded {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    Encoded(bytes)
}

fn path(name: &str) -> Path {
    Path::new(name)
}

fn name(of: &str, value: &dyn Aml) -> Encoded {
    encode(&Name::new(path(of), value))
}

fn field(region: &str, access: FieldAccessType, entries: Vec<FieldEntry>) -> Encoded {
    let preserve = FieldUpdateRule::WriteAsZeroes;
    encode(&Field::new(
        path(region),
        access,
        FieldLockRule::NoLock,
        preserve,
        entries,
    ))
}

fn io_region(of: &str, port: u16, len: u8) -> Encoded {
    encode(&OpRegion::new(
        path(of),
        OpRegionSpace::SystemIO,
        &port,
        &len,
    ))
}

/// The name of a vCPU's device.
fn cpu_name(index: u8) -> String {
    format!("C{index:03X}")
}

/// The name of a PCI slot's device.
fn slot_name(slot: u8) -> String {
    format!("S{slot:03X}")
}

/// Local APIC entry of the MADT, also what `_MAT` returns.
fn lapic_entry(index: u8, flags: u32) -> Vec<u8> {
    let mut e = vec![0, 8, index, index];
    e.extend_from_slice(&flags.to_le_bytes());
    e
}

fn ged() -> Encoded {
    let on = |bit: Event, then: &dyn Aml| {
        encode(&If::new(
            &And::new(&acpi_tables::aml::ZERO, &Local(0), &(bit as u32)),
            vec![then],
        ))
    };
    let cpus = on(
        Event::Cpus,
        &MethodCall::new(path("\\_SB_.CPUS.CSCN"), vec![]),
    );
    let pci = on(
        Event::Pci,
        &MethodCall::new(path("\\_SB_.PCI0.PSCN"), vec![]),
    );
    let vgen = on(
        Event::Generation,
        &Notify::new(&path("\\_SB_.VGEN"), &0x80u8),
    );
    let button = on(
        Event::PowerButton,
        &Notify::new(&path("\\_SB_.PWRB"), &0x80u8),
    );
    encode(&Device::new(
        path("GED_"),
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_UID", &0u8),
            &name(
                "_CRS",
                &ResourceTemplate::new(vec![&Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    layout::EVENT_IRQ,
                )]),
            ),
            &io_region("EVTR", layout::EVENT_PORT, 4),
            &field(
                "EVTR",
                FieldAccessType::DWord,
                vec![FieldEntry::Named(*b"EVTS", 32)],
            ),
            &Method::new(
                path("_EVT"),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &path("EVTS")),
                    &cpus,
                    &pci,
                    &vgen,
                    &button,
                ],
            ),
        ],
    ))
}

fn cpus(max: u8) -> Encoded {
    let fields = vec![
        FieldEntry::Named(*b"CSEL", 32),
        FieldEntry::Named(*b"CPEN", 1),
        FieldEntry::Named(*b"CINS", 1),
        FieldEntry::Named(*b"CRMV", 1),
        FieldEntry::Named(*b"CEJE", 1),
        FieldEntry::Reserved(28),
        FieldEntry::Named(*b"COST", 32),
    ];
    let select = |what: &dyn Aml| encode(&Store::new(&path("CSEL"), what));
    let acquire = || Acquire::new(path("CLCK"), 0xffff);
    let release = || Release::new(path("CLCK"));

    let mut children = vec![
        name("_HID", &"ACPI0010"),
        name("_CID", &EISAName::new("PNP0A05")),
        name("_UID", &0x10u8),
        io_region("CREG", layout::CPU_PORT, 12),
        field("CREG", FieldAccessType::DWord, fields),
        encode(&Mutex::new(path("CLCK"), 0)),
        encode(&Method::new(
            path("CSTA"),
            1,
            true,
            vec![
                &acquire(),
                &select(&Arg(0)),
                &Store::new(&Local(0), &0u8),
                &If::new(
                    &Equal::new(&path("CPEN"), &1u8),
                    vec![&Store::new(&Local(0), &0xfu8)],
                ),
                &release(),
                &Return::new(&Local(0)),
            ],
        )),
        encode(&Method::new(
            path("CEJ0"),
            1,
            true,
            vec![
                &acquire(),
                &select(&Arg(0)),
                &Store::new(&path("CEJE"), &1u8),
                &release(),
            ],
        )),
        // Arg0 vCPU, Arg1 status, for the VMM to learn whether the guest took the request.
        encode(&Method::new(
            path("COS0"),
            2,
            true,
            vec![
                &acquire(),
                &select(&Arg(0)),
                &Store::new(&path("COST"), &Arg(1)),
                &release(),
            ],
        )),
    ];

    let notify: Vec<Encoded> = (0..max)
        .map(|i| {
            encode(&If::new(
                &Equal::new(&Arg(0), &i),
                vec![&Notify::new(&path(&cpu_name(i)), &Arg(1))],
            ))
        })
        .collect();
    children.push(encode(&Method::new(
        path("CTFY"),
        2,
        true,
        notify.iter().map(|n| n as &dyn Aml).collect(),
    )));

    // The event bits are cleared before the notification, so that a request made meanwhile is not lost.
    let event = |bit: &str, code: u8| {
        encode(&If::new(
            &Equal::new(&path(bit), &1u8),
            vec![
                &Store::new(&path(bit), &1u8),
                &MethodCall::new(path("CTFY"), vec![&Local(0), &code]),
            ],
        ))
    };
    children.push(encode(&Method::new(
        path("CSCN"),
        0,
        true,
        vec![
            &acquire(),
            &Store::new(&Local(0), &0u8),
            &While::new(
                &LessThan::new(&Local(0), &max),
                vec![
                    &select(&Local(0)),
                    &event("CINS", 1),
                    &event("CRMV", 3),
                    &acpi_tables::aml::Add::new(&Local(0), &Local(0), &1u8),
                ],
            ),
            &release(),
        ],
    )));
    for i in 0..max {
        let call = |method: &str, args: Vec<&dyn Aml>| encode(&MethodCall::new(path(method), args));
        let mut own = vec![
            name("_HID", &"ACPI0007"),
            name("_UID", &i),
            encode(&Method::new(
                path("_STA"),
                0,
                false,
                vec![&Return::new(&call("CSTA", vec![&i]))],
            )),
            name("_MAT", &BufferData::new(lapic_entry(i, 1))),
            encode(&Method::new(
                path("_OST"),
                3,
                false,
                vec![&call("COS0", vec![&i, &Arg(1)])],
            )),
        ];
        // The boot processor stays.
        if i > 0 {
            own.push(encode(&Method::new(
                path("_EJ0"),
                1,
                false,
                vec![&call("CEJ0", vec![&i])],
            )));
        }
        children.push(encode(&Device::new(
            path(&cpu_name(i)),
            own.iter().map(|c| c as &dyn Aml).collect(),
        )));
    }
    encode(&Device::new(
        path("CPUS"),
        children.iter().map(|c| c as &dyn Aml).collect(),
    ))
}

fn pci() -> Encoded {
    let last = layout::PCI_WINDOW + layout::PCI_WINDOW_LEN - 1;
    let mut children = vec![
        name("_HID", &EISAName::new("PNP0A08")),
        name("_CID", &EISAName::new("PNP0A03")),
        name("_ADR", &0u8),
        name("_SEG", &0u8),
        name("_BBN", &0u8),
        name("_UID", &0u8),
        name("_CCA", &1u8),
        name(
            "_CRS",
            &ResourceTemplate::new(vec![
                &AddressSpace::new_bus_number(0u16, 0u16),
                &AddressSpace::new_memory(
                    AddressSpaceCacheable::NotCacheable,
                    true,
                    layout::PCI_WINDOW as u32,
                    last as u32,
                    None,
                ),
            ]),
        ),
        io_region("PHPR", layout::PCI_HOTPLUG_PORT, 12),
        field(
            "PHPR",
            FieldAccessType::DWord,
            vec![
                FieldEntry::Named(*b"PCIU", 32),
                FieldEntry::Named(*b"PCID", 32),
                FieldEntry::Named(*b"PCEJ", 32),
            ],
        ),
        encode(&Mutex::new(path("PLCK"), 0)),
    ];
    for slot in 1..layout::PCI_SLOTS {
        children.push(encode(&Device::new(
            path(&slot_name(slot)),
            vec![
                &name("_ADR", &(u32::from(slot) << 16)),
                &name("_SUN", &slot),
                &Method::new(
                    path("_EJ0"),
                    1,
                    true,
                    vec![
                        &Acquire::new(path("PLCK"), 0xffff),
                        &Store::new(&path("PCEJ"), &(1u32 << slot)),
                        &Release::new(path("PLCK")),
                    ],
                ),
            ],
        )));
    }
    // Arg0: slots that changed; Arg1: 1 for arrival, 3 for removal.
    let notify: Vec<Encoded> = (1..layout::PCI_SLOTS)
        .map(|slot| {
            encode(&If::new(
                &And::new(&acpi_tables::aml::ZERO, &Arg(0), &(1u32 << slot)),
                vec![&Notify::new(&path(&slot_name(slot)), &Arg(1))],
            ))
        })
        .collect();
    children.push(encode(&Method::new(
        path("PTFY"),
        2,
        true,
        notify.iter().map(|n| n as &dyn Aml).collect(),
    )));
    children.push(encode(&Method::new(
        path("PSCN"),
        0,
        true,
        vec![
            &Acquire::new(path("PLCK"), 0xffff),
            &Store::new(&Local(0), &path("PCIU")),
            &Store::new(&Local(1), &path("PCID")),
            &Release::new(path("PLCK")),
            &MethodCall::new(path("PTFY"), vec![&Local(0), &1u8]),
            &MethodCall::new(path("PTFY"), vec![&Local(1), &3u8]),
        ],
    )));
    encode(&Device::new(
        path("PCI0"),
        children.iter().map(|c| c as &dyn Aml).collect(),
    ))
}

fn dsdt(config: &AcpiConfig) -> Sdt {
    let io = |port: u16, len: u8| IO::new(port, port, 1, len);
    let vgen = encode(&Device::new(
        path("VGEN"),
        vec![
            &name("_HID", &"VMGENCTR"),
            &name(
                "_CID",
                &Package::new(vec![&"VM_Gen_Counter", &"VM_GEN_COUNTER"]),
            ),
            &name("_DDN", &"VM_Gen_Counter"),
            &name("_UID", &0u8),
            &name(
                "ADDR",
                &Package::new(vec![&(layout::VMGENID as u32), &0u32]),
            ),
        ],
    ));
    let button = encode(&Device::new(
        path("PWRB"),
        vec![
            &name("_HID", &EISAName::new("PNP0C0C")),
            &name("_UID", &0u8),
        ],
    ));
    let panic = encode(&Device::new(
        path("PEVT"),
        vec![
            &name("_HID", &"QEMU0001"),
            &name("_UID", &0u8),
            &name("_STA", &0xfu8),
            &name(
                "_CRS",
                &ResourceTemplate::new(vec![&io(layout::PVPANIC_PORT, 1)]),
            ),
        ],
    ));
    let board = encode(&Device::new(
        path("MBRD"),
        vec![
            &name("_HID", &EISAName::new("PNP0C02")),
            &name("_UID", &0u8),
            &name(
                "_CRS",
                &ResourceTemplate::new(vec![&Memory32Fixed::new(
                    true,
                    layout::ECAM as u32,
                    layout::ECAM_LEN as u32,
                )]),
            ),
        ],
    ));
    let mut all = vec![
        ged(),
        cpus(config.max_cpus),
        pci(),
        vgen,
        button,
        panic,
        board,
    ];
    if config.serial {
        all.push(encode(&Device::new(
            path("COM1"),
            vec![
                &name("_HID", &EISAName::new("PNP0501")),
                &name("_UID", &0u8),
                &name(
                    "_CRS",
                    &ResourceTemplate::new(vec![
                        &Interrupt::new(true, true, false, false, layout::SERIAL_IRQ),
                        &io(layout::SERIAL_PORT, layout::SERIAL_PORTS as u8),
                    ]),
                ),
            ],
        )));
    }
    let scope = encode(&Scope::new(
        path("_SB_"),
        all.iter().map(|a| a as &dyn Aml).collect(),
    ));
    let s5 = name("_S5_", &Package::new(vec![&5u8, &0u8, &0u8, &0u8]));
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, 1);
    table.append_slice(&s5.0);
    table.append_slice(&scope.0);
    table
}

fn fadt(dsdt: u64) -> Sdt {
    const NO_VGA: u16 = 1 << 2;
    const NO_ASPM: u16 = 1 << 4;
    const NO_RTC: u16 = 1 << 5;
    const WBINVD: u32 = 1;
    const RESET_REG: u32 = 1 << 10;
    const HW_REDUCED: u32 = 1 << 20;
    let power = |offset| GenericAddress::io_port_address::<u8>(layout::POWER_PORT + offset);
    // Offsets: ACPI 6.4, table 5.9.
    let mut t = Sdt::new(*b"FACP", 276, 6, OEM, OEM_TABLE, 1);
    t.write_u16(109, NO_VGA | NO_ASPM | NO_RTC);
    t.write_u32(112, WBINVD | RESET_REG | HW_REDUCED);
    t.write(116, power(2));
    t.write_u8(128, crate::platform::power::RESET_VALUE);
    t.write_u8(131, 3);
    t.write_u64(140, dsdt);
    t.write(244, power(0));
    t.write(256, power(1));
    t.write_bytes(268, b"KILN    ");
    t
}

fn madt(config: &AcpiConfig) -> Sdt {
    const ENABLED: u32 = 1;
    const ONLINE_CAPABLE: u32 = 2;
    let mut t = Sdt::new(*b"APIC", 44, 5, OEM, OEM_TABLE, 1);
    t.write_u32(36, layout::LAPIC as u32);
    for i in 0..config.max_cpus {
        let flags = if i < config.boot_cpus {
            ENABLED
        } else {
            ONLINE_CAPABLE
        };
        t.append_slice(&lapic_entry(i, flags));
    }
    let mut ioapic = vec![1, 12, 0, 0];
    ioapic.extend_from_slice(&(layout::IOAPIC as u32).to_le_bytes());
    ioapic.extend_from_slice(&0u32.to_le_bytes());
    t.append_slice(&ioapic);
    t
}

fn mcfg() -> Sdt {
    let mut t = Sdt::new(*b"MCFG", 44 + 16, 1, OEM, OEM_TABLE, 1);
    t.write_u64(44, layout::ECAM);
    // Segment 0, buses 0 to 0: all zero.
    t
}

/// What Linux runs to reset a machine with hardware-reduced ACPI: it takes such a machine for one with EFI, finds none,
/// and jumps to where a firmware would be, in real mode. `mov dx, RESET; mov al, value; out dx, al; hlt; jmp`.
const RESET_CODE: [u8; 9] = {
    let [low, high] = (layout::POWER_PORT + 2).to_le_bytes();
    [
        0xba,
        low,
        high,
        0xb0,
        crate::platform::power::RESET_VALUE,
        0xee,
        0xf4,
        0xeb,
        0xfd,
    ]
};

/// Writes all tables; returns the address of the RSDP.
pub fn write_tables(ram: &GuestRam, config: &AcpiConfig) -> Result<u64, AcpiError> {
    let room = layout::RESET_VECTOR - layout::ACPI_START;
    let rsdp_at = layout::ACPI_START;
    let mut at = rsdp_at + 64;
    let mut image: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut place = |t: &Sdt| {
        let here = at;
        image.push((here, t.as_slice().to_vec()));
        at = (at + t.len() as u64).next_multiple_of(64);
        here
    };
    let dsdt_at = place(&dsdt(config));
    let entries = [place(&fadt(dsdt_at)), place(&madt(config)), place(&mcfg())];
    let mut xsdt = Sdt::new(*b"XSDT", 36, 1, OEM, OEM_TABLE, 1);
    for e in entries {
        xsdt.append_slice(&e.to_le_bytes());
    }
    let xsdt_at = place(&xsdt);
    image.push((rsdp_at, encode(&Rsdp::new(OEM, xsdt_at)).0));
    image.push((layout::RESET_VECTOR, RESET_CODE.to_vec()));
    if at > layout::RESET_VECTOR {
        return Err(AcpiError::Room {
            needed: at - layout::ACPI_START,
            room,
        });
    }
    let mem = ram.memory();
    for (at, bytes) in image {
        mem.write_slice(&bytes, GuestAddress(at))?;
    }
    Ok(rsdp_at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
    }

    #[test]
    fn every_table_sums_to_zero_and_all_fit_with_64_cpus() {
        let ram =
            GuestRam::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap());
        let config = AcpiConfig {
            boot_cpus: 1,
            max_cpus: layout::MAX_CPUS,
            serial: true,
        };
        let rsdp = write_tables(&ram, &config).unwrap();
        let mem = ram.memory();
        let bytes = |at: u64, len: usize| {
            let mut b = vec![0; len];
            mem.read_slice(&mut b, GuestAddress(at)).unwrap();
            b
        };
        let root = bytes(rsdp, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!(sum(&root), 0);
        let xsdt_at = u64::from_le_bytes(root[24..32].try_into().unwrap());
        let len = |at| u32::from_le_bytes(bytes(at + 4, 4).try_into().unwrap()) as usize;
        let xsdt = bytes(xsdt_at, len(xsdt_at));
        assert_eq!(sum(&xsdt), 0);
        let mut seen = Vec::new();
        for e in xsdt[36..].chunks(8) {
            let at = u64::from_le_bytes(e.try_into().unwrap());
            let table = bytes(at, len(at));
            assert_eq!(sum(&table), 0);
            seen.push(String::from_utf8_lossy(&table[..4]).into_owned());
        }
        assert_eq!(seen, ["FACP", "APIC", "MCFG"]);
    }

    #[test]
    fn absent_cpus_are_online_capable() {
        let t = madt(&AcpiConfig {
            boot_cpus: 1,
            max_cpus: 3,
            serial: false,
        });
        let flags: Vec<u32> = t.as_slice()[44..44 + 24]
            .chunks(8)
            .map(|e| u32::from_le_bytes(e[4..8].try_into().unwrap()))
            .collect();
        assert_eq!(flags, [1, 2, 2]);
    }
}
