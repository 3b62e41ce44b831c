use std::io::Write;

use kiln_store::{Class, Cpu, Description, Digest, Kernel};
use kiln_vmm_control::cpu::Fingerprint;

use super::*;

fn class() -> Class {
    Class {
        cpus: 1,
        max_cpus: 4,
        memory_mib: 128,
        max_memory_mib: 1024,
        slots: 8,
    }
}

fn size(cpus: u32, mib: u64) -> Size {
    Size {
        cpus,
        memory: mib * MIB,
    }
}

fn launcher(store: PathBuf) -> StoreLauncher {
    let config = Config {
        store,
        ..Config::default()
    };
    StoreLauncher::new(&config, PodDir::new(&config.state_dir, "n", "p"))
}

#[test]
fn without_a_store_the_error_names_the_command_that_bakes() {
    let dir = tempfile::tempdir().unwrap();
    let error = launcher(dir.path().join("none"))
        .pick(size(2, 320))
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("kiln bake") && text.contains("320 MiB"),
        "{text}"
    );
}

#[test]
fn empty_store_is_a_failed_precondition() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    Store::open_or_create(&store).unwrap();
    let error = launcher(store).pick(size(1, 64)).unwrap_err();
    assert!(matches!(error, Error::FailedPrecondition(_)), "{error:?}");
}

/// Enters a μVM of [`class`] that was baked here, but for what `change` does to it.
fn bake(store: &Store, name: &str, change: impl FnOnce(&mut Description)) -> Digest {
    let staging = store.begin(0).unwrap();
    for kind in [Kind::State, Kind::Memory, Kind::Scratch] {
        let mut file = staging.create(kind).unwrap();
        file.write_all(name.as_bytes()).unwrap();
    }
    let digest = Digest::of_bytes(name.as_bytes());
    let mut about = Description {
        recipe: digest,
        baked_at: 1,
        kiln_version: "0.1.0".into(),
        class: class(),
        kernel: Kernel {
            release: "6.12".into(),
            digest,
            command_line: String::new(),
        },
        initramfs: digest,
        agent_version: "0.1.0".into(),
        protocol: PROTOCOL_VERSION,
        cpu: Cpu {
            vendor: "v".into(),
            model: "m".into(),
            features: Fingerprint::of_this_cpu(),
        },
        guest_used_kib: 0,
    };
    change(&mut about);
    staging.commit(about).unwrap()
}

fn foreign_cpu(about: &mut Description) {
    about.baked_at = 3;
    about.cpu.features.0[9] ^= 1 << 16;
}

fn old_protocol(about: &mut Description) {
    about.baked_at = 2;
    about.protocol = PROTOCOL_VERSION - 1;
}

#[test]
fn newer_uvms_of_another_cpu_and_protocol_do_not_hide_one_that_fits() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path().join("store")).unwrap();
    let good = bake(&store, "good", |_| {});
    bake(&store, "protocol", old_protocol);
    bake(&store, "cpu", foreign_cpu);
    let lease = launcher(dir.path().join("store")).pick(size(4, 1024));
    assert_eq!(lease.unwrap().id(), good);
}

#[test]
fn what_keeps_the_only_uvm_from_being_resumed_is_said() {
    let old = PROTOCOL_VERSION - 1;
    let protocols = format!("its agent speaks protocol {old}, this kiln speaks {PROTOCOL_VERSION}");
    for (change, reason) in [
        (
            foreign_cpu as fn(&mut Description),
            "another CPU (cpuid leaf 0x7.0 ebx",
        ),
        (old_protocol, &protocols),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(dir.path().join("store")).unwrap();
        let id = bake(&store, "x", change);
        let launcher = launcher(dir.path().join("store"));
        let error = launcher.pick(size(1, 64)).unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error:?}");
        let text = error.to_string();
        for part in [reason, id.short().as_str(), "kiln bake"] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }
}
