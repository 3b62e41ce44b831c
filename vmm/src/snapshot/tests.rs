use super::*;
use crate::machine::{DeviceKind, DeviceSpec, MachineConfig};
use crate::memory::MemoryShape;
use crate::platform::hotplug::HotplugRegisters;

fn config() -> MachineConfig {
    let kinds = [
        DeviceKind::Vsock { cid: 3 },
        DeviceKind::Block {
            id: "slot0".to_owned(),
            queues: 1,
        },
    ];
    MachineConfig {
        boot_cpus: 1,
        max_cpus: 4,
        memory: MemoryShape {
            ram: 256 << 20,
            hotplug: 1 << 30,
            usable: 4 << 20,
        },
        serial: false,
        devices: specs(kinds),
    }
}

fn specs(kinds: impl IntoIterator<Item = DeviceKind>) -> Vec<DeviceSpec> {
    let spec = |(slot, kind)| DeviceSpec { slot, kind };
    (1..).zip(kinds).map(spec).collect()
}

fn state() -> MachineState {
    MachineState {
        config: ConfigState::from(&config()),
        clock: Default::default(),
        irqchips: Vec::new(),
        vcpus: Vec::new(),
        hotplug: HotplugRegisters::new(1).save(),
        serial: None,
        devices: Vec::new(),
        holes: vec![(2 << 20, 64 << 20)],
    }
}

fn file() -> Vec<u8> {
    let labels = Labels {
        kernel: "6.12.0-cloud".to_owned(),
        digest: [7; 32],
    };
    encode(&state(), &labels).unwrap()
}

#[test]
fn memory_that_no_machine_has_is_refused() {
    let huge = !0 << 21;
    for (ram, hotplug, usable) in [
        (huge, 0, 0),
        (64 << 20, huge, huge),
        (huge, huge, huge),
        (64 << 20, 0, 2 << 20),
        ((64 << 20) + 1, 0, 0),
        (0, 0, 0),
    ] {
        let mut state = state();
        state.config.memory = MemoryState {
            ram,
            hotplug,
            usable,
        };
        let refused = decode(&encode(&state, &Labels::default()).unwrap());
        assert!(
            matches!(refused, Err(SnapshotError::Memory(_))),
            "{ram:#x} {hotplug:#x} {usable:#x}: {refused:?}"
        );
    }
}

#[test]
fn state_file_reads_back() {
    let (header, back) = decode(&file()).unwrap();
    assert_eq!(header.kernel, "6.12.0-cloud");
    assert_eq!(header.digest, [7; 32]);
    assert_eq!(header.memory_file, (256 << 20) + (4 << 20));
    assert_eq!(MachineConfig::from(back.config), config());
}

#[test]
fn every_kind_of_device_is_the_same_after_a_resume_and_has_its_number() {
    let kinds = [
        DeviceKind::Block {
            id: "b".to_owned(),
            queues: 2,
        },
        DeviceKind::Net {
            pairs: 3,
            mac: [4; 6],
        },
        DeviceKind::Vsock { cid: 5 },
        DeviceKind::Rng,
        DeviceKind::Mem,
        DeviceKind::Fs {
            tag: "f".to_owned(),
        },
    ];
    let all = MachineConfig {
        devices: specs(kinds),
        ..config()
    };
    let saved = ConfigState::from(&all);
    let bytes: Vec<Vec<u8>> = saved
        .devices
        .iter()
        .map(|entry| postcard::to_stdvec(&entry.kind).unwrap())
        .collect();
    let expected: [&[u8]; 6] = [
        &[0, 1, b'b', 2],
        &[1, 3, 4, 4, 4, 4, 4, 4],
        &[2, 5],
        &[3],
        &[4],
        &[5, 1, b'f'],
    ];
    assert_eq!(bytes, expected);
    assert_eq!(MachineConfig::from(saved), all);
}

#[test]
fn truncation_anywhere_is_refused() {
    let whole = file();
    for len in [0, 7, 8, 511, 512, whole.len() - 1] {
        assert!(decode(&whole[..len]).is_err(), "{len} bytes");
    }
}

#[test]
fn every_flipped_bit_is_refused() {
    let whole = file();
    for at in 0..whole.len() {
        let mut bad = whole.clone();
        bad[at] ^= 1 << (at % 8);
        assert!(decode(&bad).is_err(), "byte {at}");
    }
}

#[test]
fn another_version_names_itself_and_its_writer() {
    let mut other = file();
    other[8] = 99;
    let e = Header::parse(&other).unwrap_err();
    assert_eq!(
        e,
        HeaderError::Version {
            found: 99,
            kiln: env!("CARGO_PKG_VERSION").to_owned()
        }
    );
}

#[test]
fn another_cpu_is_refused_by_the_leaf_that_differs() {
    let whole = file();
    let (mut header, body) = Header::parse(&whole).unwrap();
    header.cpu.0[4 + 2] ^= 1 << 20;
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend_from_slice(body);
    let e = decode(&bytes).unwrap_err();
    let SnapshotError::Header(HeaderError::Cpu(what)) = e else {
        panic!("{e:?}")
    };
    assert!(what.contains("leaf 0x1.0 ecx"), "{what}");
}

#[test]
fn memory_file_of_another_length_is_refused() {
    let (header, _) = decode(&file()).unwrap();
    let f = tempfile::tempfile().unwrap();
    f.set_len(header.memory_file - 4096).unwrap();
    assert!(matches!(
        check_memory_file(&header, &f),
        Err(SnapshotError::MemoryLength { .. })
    ));
}

/// A state file committed when the format was made. If this fails, the format changed: raise FORMAT_VERSION,
/// keep the old file as a golden that must be refused by name, and commit a new one (docs/vmm.md), which this test
/// writes when KILN_WRITE_GOLDEN is set.
#[test]
fn golden_file_of_this_version_is_still_read() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/state-v2.bin");
    if std::env::var_os("KILN_WRITE_GOLDEN").is_some() {
        std::fs::write(path, file()).unwrap();
    }
    let golden = std::fs::read(path).unwrap();
    let (header, body) = Header::parse(&golden).unwrap();
    assert_eq!(
        (header.ram, header.kernel.as_str()),
        (256 << 20, "6.12.0-cloud")
    );
    let back: MachineState = postcard::from_bytes(body).unwrap();
    assert_eq!(back.config, state().config);
    assert_eq!(postcard::to_stdvec(&back).unwrap(), body);
}

#[test]
fn golden_files_of_older_versions_are_refused_by_their_version() {
    let old = include_bytes!("../../tests/golden/state-v1.bin");
    let Err(HeaderError::Version { found: 1, .. }) = Header::parse(old) else {
        panic!("{:?}", Header::parse(old));
    };
}
