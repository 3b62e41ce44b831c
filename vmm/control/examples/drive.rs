//! Drives a VMM by hand, through the client: for a node with `/dev/kvm`.
//!
//! `drive PROGRAM KERNEL INITRD DIR` reads commands from standard input, one a line:
//!
//! ```text
//! boot             a machine with all devices, 1 of 4 vCPUs, 256 MiB and 2 GiB of room
//! sh SCRIPT        runs it in the guest (which takes scripts as `testprog guest 1024` does)
//! resize CPUS MIB  changes the size
//! disk MIB         attaches an empty disk;  undisk SLOT  takes it out
//! save | resume    snapshot and end;  resume in a new process
//! sleep SECONDS | stats | stop | wait
//! ```

use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_vmm_control::{DeviceKind, DeviceSpec, End, Jail, MachineSpec, Request, Spawn, Vmm};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

struct Driver {
    program: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    dir: PathBuf,
    vmm: Option<Vmm>,
}

impl Driver {
    fn vmm(&self) -> Result<&Vmm> {
        Ok(self.vmm.as_ref().ok_or("no machine: boot or resume one")?)
    }

    fn spawn(&self) -> Result<Vmm> {
        let root = self.dir.join("empty");
        std::fs::create_dir_all(&root)?;
        Ok(Vmm::spawn(Spawn {
            program: self.program.clone(),
            jail: Some(Jail {
                uid: 65534,
                gid: 65534,
                root,
            }),
            log: None,
        })?)
    }

    fn listen(&self) -> Result<UnixListener> {
        let path = self.dir.join("vsock");
        // Of the machine before.
        let _ = std::fs::remove_file(&path);
        Ok(UnixListener::bind(path)?)
    }

    fn boot(&mut self) -> Result<()> {
        let mut devices = vec![
            (1, DeviceKind::Vsock { cid: 3 }),
            (2, DeviceKind::Rng),
            (3, DeviceKind::Mem),
            (
                4,
                DeviceKind::Net {
                    pairs: 1,
                    mac: [2, 0, 0, 0, 0, 1],
                },
            ),
            (
                5,
                DeviceKind::Fs {
                    tag: "kiln".to_owned(),
                },
            ),
        ];
        devices.extend((8..10).map(|slot| {
            let id = format!("slot{slot}");
            (slot, DeviceKind::Block { id, queues: 1 })
        }));
        let machine = MachineSpec {
            cpus: 1,
            max_cpus: 4,
            memory: 256 << 20,
            hotplug: 2 << 30,
            serial: true,
            devices: devices
                .into_iter()
                .map(|(slot, kind)| DeviceSpec { slot, kind })
                .collect(),
        };
        let vmm = self.spawn()?;
        let listener = self.listen()?;
        let (kernel, initrd) = (File::open(&self.kernel)?, File::open(&self.initrd)?);
        let console = File::create(self.dir.join("console"))?;
        let boot = Request::Boot {
            machine,
            kernel: 0,
            initrd: Some(1),
            cmdline: "console=ttyS0 panic=-1 no_timer_check memhp_default_state=online_movable"
                .to_owned(),
            console: Some(2),
            ends: vec![(1, End::Listener(3))],
        };
        let fds = [
            kernel.as_fd(),
            initrd.as_fd(),
            console.as_fd(),
            listener.as_fd(),
        ];
        println!("{:?}", vmm.call(&boot, &fds)?);
        self.vmm = Some(vmm);
        for _ in 0..300 {
            if self.sh("true").is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Err("the guest does not come up".into())
    }

    fn save(&mut self) -> Result<()> {
        let (s, m) = (self.dir.join("state"), self.dir.join("memory"));
        let (s, m) = (File::create(s)?, File::create(m)?);
        let save = Request::Snapshot {
            state: 0,
            memory: 1,
            digest: [1; 32],
            go_on: false,
        };
        println!("{:?}", self.vmm()?.call(&save, &[s.as_fd(), m.as_fd()])?);
        self.vmm = None;
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        let vmm = self.spawn()?;
        let listener = self.listen()?;
        let (s, m) = (self.dir.join("state"), self.dir.join("memory"));
        let (s, m) = (File::open(s)?, File::open(m)?);
        let console = File::options()
            .append(true)
            .open(self.dir.join("console"))?;
        let resume = Request::Resume {
            state: 0,
            memory: 1,
            console: Some(3),
            ends: vec![(1, End::Listener(2))],
            touched: Vec::new(),
            one_by_one: false,
        };
        let fds = [s.as_fd(), m.as_fd(), listener.as_fd(), console.as_fd()];
        println!("{:?}", vmm.call(&resume, &fds)?);
        self.vmm = Some(vmm);
        Ok(())
    }

    fn sh(&self, script: &str) -> Result<String> {
        let mut s = UnixStream::connect(self.dir.join("vsock"))?;
        s.set_read_timeout(Some(Duration::from_secs(30)))?;
        write!(s, "CONNECT 1024\n{}\n{script}", script.len())?;
        let mut text = String::new();
        s.read_to_string(&mut text)?;
        if text.contains("exit=") {
            Ok(text)
        } else {
            Err(format!("cut off: {text:?}").into())
        }
    }

    fn disk(&self, mib: u64) -> Result<()> {
        let disk = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(self.dir.join("disk"))?;
        disk.set_len(mib << 20)?;
        println!("slot {}", self.vmm()?.attach_block(None, &disk, false)?);
        Ok(())
    }

    fn run(&mut self, line: &str) -> Result<()> {
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        match command {
            "boot" => self.boot()?,
            "save" => self.save()?,
            "resume" => self.resume()?,
            "sh" => println!("{}", self.sh(rest)?),
            "resize" => {
                let (cpus, mib) = rest.split_once(' ').ok_or("resize CPUS MIB")?;
                let request = Request::Resize {
                    cpus: cpus.parse()?,
                    memory: mib.parse::<u64>()? << 20,
                    timeout_ms: 20_000,
                };
                println!("{:?}", self.vmm()?.call(&request, &[])?);
            }
            "disk" => self.disk(rest.parse()?)?,
            "undisk" => {
                let slot = rest.parse()?;
                self.vmm()?.order(&Request::DetachBlock { slot }, &[])?;
            }
            "sleep" => std::thread::sleep(Duration::from_secs_f64(rest.parse()?)),
            "stats" => println!("{:?}", self.vmm()?.call(&Request::Stats, &[])?),
            "stop" => self.vmm()?.order(&Request::Stop, &[])?,
            "wait" => println!("ended with {}", self.vmm()?.wait()?),
            _ => return Err(format!("unknown command {line:?}").into()),
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(Into::into).collect();
    let [program, kernel, initrd, dir] = args.as_slice() else {
        return Err("usage: drive PROGRAM KERNEL INITRD DIR < COMMANDS".into());
    };
    std::fs::create_dir_all(Path::new(dir))?;
    let mut driver = Driver {
        program: program.clone(),
        kernel: kernel.clone(),
        initrd: initrd.clone(),
        dir: dir.clone(),
        vmm: None,
    };
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        println!("> {line}");
        if let Err(e) = driver.run(line.trim()) {
            println!("failed: {e}");
        }
    }
    Ok(())
}
