//! Boots a machine, snapshots it, resumes it and resizes it, through the client: for a node with `/dev/kvm`.
//!
//! `drive PROGRAM KERNEL INITRD DIR`: the guest must answer vsock port 1024 with one line and bring hot-added
//! vCPUs online.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use kiln_vmm_control::{
    DeviceKind, DeviceSpec, End, Jail, MachineSpec, Request, Spawn, Vmm, VmmError,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn ask(path: &Path) -> Result<String> {
    let start = Instant::now();
    loop {
        let mut s = UnixStream::connect(path)?;
        s.set_read_timeout(Some(Duration::from_secs(30)))?;
        s.write_all(b"CONNECT 1024\n")?;
        let mut text = String::new();
        s.read_to_string(&mut text)?;
        if text.starts_with("OK") {
            return Ok(text);
        }
        if start.elapsed() > Duration::from_secs(60) {
            return Err(format!("no answer: {text:?}").into());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn spawn(program: &str, dir: &Path) -> std::result::Result<Vmm, VmmError> {
    let root = dir.join("empty");
    // Fails if it exists, which is as good.
    let _ = std::fs::create_dir(&root);
    Vmm::spawn(Spawn {
        program: program.into(),
        jail: Some(Jail {
            uid: 65534,
            gid: 65534,
            root,
        }),
        log: None,
    })
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [program, kernel, initrd, dir] = args.as_slice() else {
        return Err("usage: drive PROGRAM KERNEL INITRD DIR".into());
    };
    let dir = Path::new(dir);
    std::fs::create_dir_all(dir)?;
    let (state, memory) = (dir.join("state"), dir.join("memory"));
    let devices = [
        DeviceKind::Vsock { cid: 3 },
        DeviceKind::Rng,
        DeviceKind::Mem,
        DeviceKind::Net {
            pairs: 1,
            mac: [2, 0, 0, 0, 0, 1],
        },
        DeviceKind::Block {
            id: "slot0".to_owned(),
            queues: 1,
        },
        DeviceKind::Block {
            id: "slot1".to_owned(),
            queues: 1,
        },
    ];
    let machine = MachineSpec {
        cpus: 1,
        max_cpus: 4,
        memory: 256 << 20,
        hotplug: 2 << 30,
        serial: true,
        devices: (1..)
            .zip(devices)
            .map(|(slot, kind)| DeviceSpec { slot, kind })
            .collect(),
    };
    let listen = |name: &str| -> Result<(UnixListener, std::path::PathBuf)> {
        let path = dir.join(name);
        Ok((UnixListener::bind(&path)?, path))
    };

    let vmm = spawn(program, dir)?;
    let (listener, path) = listen("boot.sock")?;
    let (k, i) = (File::open(kernel)?, File::open(initrd)?);
    let log = File::create(dir.join("console"))?;
    let boot = Request::Boot {
        machine,
        kernel: 0,
        initrd: Some(1),
        cmdline: "console=ttyS0 panic=-1 no_timer_check memhp_default_state=online".to_owned(),
        console: Some(2),
        ends: vec![(1, End::Listener(3))],
    };
    println!(
        "{:?}",
        vmm.call(
            &boot,
            &[k.as_fd(), i.as_fd(), log.as_fd(), listener.as_fd()]
        )?
    );
    std::thread::sleep(Duration::from_secs(10));
    println!("booted: {:?}", ask(&path)?);
    let (s, m) = (File::create(&state)?, File::create(&memory)?);
    let save = Request::Snapshot {
        state: 0,
        memory: 1,
        digest: [1; 32],
        go_on: false,
    };
    println!("{:?}", vmm.call(&save, &[s.as_fd(), m.as_fd()])?);
    vmm.order(&Request::Stop, &[])?;
    println!("ended with {}", vmm.wait()?);

    let vmm = spawn(program, dir)?;
    let (listener, path) = listen("resume.sock")?;
    let (s, m) = (File::open(&state)?, File::open(&memory)?);
    let resume = Request::Resume {
        state: 0,
        memory: 1,
        console: None,
        ends: vec![(1, End::Listener(2))],
    };
    println!(
        "{:?}",
        vmm.call(&resume, &[s.as_fd(), m.as_fd(), listener.as_fd()])?
    );
    println!("resumed: {:?}", ask(&path)?);
    let disk = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(dir.join("disk"))?;
    disk.set_len(8 << 20)?;
    println!("disk in slot {}", vmm.attach_block(None, &disk, false)?);
    for (cpus, mib) in [(2, 512), (4, 1024), (1, 256)] {
        let size = Request::Resize {
            cpus,
            memory: mib << 20,
            timeout_ms: 20_000,
        };
        println!("{cpus} vCPUs, {mib} MiB: {:?}", vmm.call(&size, &[]));
    }
    println!("{:?}", vmm.call(&Request::Stats, &[])?);
    println!("still there: {:?}", ask(&path)?);
    vmm.order(&Request::Stop, &[])?;
    println!("ended with {}", vmm.wait()?);
    Ok(())
}
