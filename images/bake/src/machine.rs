//! Runs `kiln-vmm` in the foreground of a bake: boots a guest or resumes one, has it saved, ends it.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_store::Class;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;

/// How much of the guest's console is kept, for the case that it says why it failed.
const CONSOLE: usize = 64 << 10;

/// Why a machine did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The VMM could not be started.
    #[error("starting {}", path.display())]
    Start {
        /// The VMM.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It ended.
    #[error("the VMM ended: {said}{}", console_text(console))]
    Ended {
        /// Its last words.
        said: String,
        /// The end of the guest's console.
        console: String,
    },
    /// It refused a command.
    #[error("the VMM could not {action}: {said}")]
    Refused {
        /// What it was to do.
        action: &'static str,
        /// Its answer.
        said: String,
    },
    /// It took too long.
    #[error("the VMM did not {action} within {} s{}", limit.as_secs(), console_text(console))]
    Slow {
        /// What it was to do.
        action: &'static str,
        /// How long it was given.
        limit: Duration,
        /// The end of the guest's console.
        console: String,
    },
}

fn console_text(console: &str) -> String {
    let last: Vec<&str> = console.lines().rev().take(12).collect();
    if last.is_empty() {
        return String::new();
    }
    let lines: Vec<&str> = last.into_iter().rev().collect();
    format!(
        "\nthe end of the guest's console:\n  {}",
        lines.join("\n  ")
    )
}

/// What to boot.
#[derive(Debug)]
pub struct Boot<'a> {
    /// The kernel.
    pub kernel: &'a Path,
    /// The initramfs.
    pub initramfs: &'a Path,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// The size class.
    pub class: &'a Class,
}

/// MiB of room for memory to be plugged in: the VMM has it in whole GiB.
fn hotplug_mib(class: &Class) -> u32 {
    class
        .max_memory_mib
        .saturating_sub(class.memory_mib)
        .next_multiple_of(1024)
}

/// A running machine. Dropping it ends it.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    stdin: ChildStdin,
    said: UnboundedReceiver<String>,
    console: Arc<Mutex<Vec<u8>>>,
}

impl Machine {
    /// Boots a guest whose agent is reached through the Unix socket `vsock`.
    pub fn boot(vmm: &Path, boot: &Boot<'_>, vsock: &Path) -> Result<Machine, MachineError> {
        let class = boot.class;
        let mut command = Command::new(vmm);
        command.arg("boot").arg("--kernel").arg(boot.kernel);
        command
            .arg("--initrd")
            .arg(boot.initramfs)
            .arg("--cmdline")
            .arg(boot.command_line);
        for (option, number) in [
            ("--cpus", class.cpus),
            ("--max-cpus", class.max_cpus),
            ("--memory", class.memory_mib),
            ("--hotplug", hotplug_mib(class)),
            ("--slots", class.slots),
        ] {
            command.arg(option).arg(number.to_string());
        }
        Machine::start(vmm, command, vsock)
    }

    /// Resumes what [`Machine::save`] left in a directory.
    pub fn resume(vmm: &Path, dir: &Path, vsock: &Path) -> Result<Machine, MachineError> {
        let mut command = Command::new(vmm);
        command.arg("resume").arg(dir);
        Machine::start(vmm, command, vsock)
    }

    fn start(vmm: &Path, mut command: Command, vsock: &Path) -> Result<Machine, MachineError> {
        command.arg("--vsock").arg(vsock);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.kill_on_drop(true);
        // Ctrl-C is for us to handle; a machine that dies of it would look like a failure.
        command.as_std_mut().process_group(0);
        let parent = std::process::id();
        // SAFETY: between fork and exec only system calls are made.
        unsafe {
            command.pre_exec(move || {
                // Whatever ends us, the machine ends with us.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                if libc::getppid().cast_unsigned() == parent {
                    Ok(())
                } else {
                    Err(io::Error::from_raw_os_error(libc::ESRCH))
                }
            });
        }
        let start = |source| MachineError::Start {
            path: vmm.to_owned(),
            source,
        };
        let mut child = command.spawn().map_err(start)?;
        let gone = || start(io::Error::from(io::ErrorKind::BrokenPipe));
        let stdin = child.stdin.take().ok_or_else(gone)?;
        let mut stdout = child.stdout.take().ok_or_else(gone)?;
        let stderr = child.stderr.take().ok_or_else(gone)?;

        let console = Arc::new(Mutex::new(Vec::new()));
        let kept = console.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = stdout.read(&mut buffer).await {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(&buffer[..read]);
                let surplus = kept.len().saturating_sub(CONSOLE);
                kept.drain(..surplus);
            }
        });
        let (sender, said) = unbounded_channel();
        tokio::spawn(async move {
            let mut lines = BufReader::new(stderr).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let line = line.strip_prefix("kiln-vmm: ").unwrap_or(&line).to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Machine {
            child,
            stdin,
            said,
            console,
        })
    }

    /// What the guest wrote to its console of late.
    pub fn console(&self) -> String {
        let kept = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept).replace('\r', "")
    }

    /// Comes back only if the machine ends by itself.
    pub async fn ended(&mut self) -> MachineError {
        let mut last = String::new();
        while let Some(line) = self.said.recv().await {
            last = line;
        }
        let status = self.child.wait().await;
        if last.is_empty() {
            last = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        }
        MachineError::Ended {
            said: last,
            console: self.console(),
        }
    }

    /// Saves the machine into the files `state` and `memory` of a directory.
    pub async fn save(&mut self, dir: &Path, limit: Duration) -> Result<(), MachineError> {
        let command = format!("snapshot {}\n", dir.display());
        let saved = |line: &str| line.starts_with("saved:");
        self.ask("save the guest", &command, saved, limit).await
    }

    /// Ends the machine.
    pub async fn stop(mut self) -> Result<(), MachineError> {
        let ended = |line: &str| line.starts_with("ended:");
        self.ask("stop", "stop\n", ended, Duration::from_secs(10))
            .await
    }

    async fn ask(
        &mut self,
        action: &'static str,
        command: &str,
        is_answer: impl Fn(&str) -> bool,
        limit: Duration,
    ) -> Result<(), MachineError> {
        if self.stdin.write_all(command.as_bytes()).await.is_err() {
            return Err(self.ended().await);
        }
        // What it says of its own accord: not an answer.
        let chatter = |line: &str| line.starts_with("guest:") || line.starts_with("stopping");
        let answer = async {
            loop {
                match self.said.recv().await {
                    Some(line) if is_answer(&line) => return Some(Ok(())),
                    Some(line) if chatter(&line) || line.ends_with(" ns") => {}
                    Some(said) => return Some(Err(MachineError::Refused { action, said })),
                    None => return None,
                }
            }
        };
        match timeout(limit, answer).await {
            Ok(Some(result)) => result,
            Ok(None) => Err(self.ended().await),
            Err(_) => Err(MachineError::Slow {
                action,
                limit,
                console: self.console(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A stand-in that speaks the VMM's side of the pipe, to test this side of it.
    fn script(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        (dir, path)
    }

    /// A script that was just written may be busy while another test forks.
    async fn resume(path: &Path) -> Machine {
        for _ in 0..100 {
            match Machine::resume(path, Path::new("/d"), Path::new("/s")) {
                Err(MachineError::Start { source, .. })
                    if source.kind() == io::ErrorKind::ExecutableFileBusy =>
                {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                machine => return machine.unwrap(),
            }
        }
        panic!("{} stays busy", path.display());
    }

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn answers_are_told_from_chatter_and_refusals() {
        let (_dir, path) = script(
            "read a; echo 'kiln-vmm: guest: x' >&2; echo 'kiln-vmm: saved: 3' >&2
             read b; echo 'kiln-vmm: the disk is full' >&2
             read c; echo 'kiln-vmm: stopping' >&2; echo 'kiln-vmm: ended: Stopped' >&2",
        );
        let mut machine = resume(&path).await;
        machine.save(Path::new("/x"), LIMIT).await.unwrap();
        let refused = machine
            .save(Path::new("/x"), LIMIT)
            .await
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("save the guest: the disk is full"),
            "{refused}"
        );
        machine.stop().await.unwrap();
    }

    #[tokio::test]
    async fn end_of_the_vmm_shows_its_last_words_and_the_console() {
        let (_dir, path) = script("echo 'Kernel panic'; echo 'kiln-vmm: ended: Reset' >&2; exit 3");
        let mut machine = resume(&path).await;
        let error = machine.ended().await.to_string();
        assert!(
            error.contains("ended: Reset") && error.contains("Kernel panic"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn silence_is_given_up_at_the_limit_and_the_vmm_killed() {
        let (_dir, path) = script("sleep 60");
        let mut machine = resume(&path).await;
        let pid = machine.child.id().unwrap();
        let error = machine
            .save(Path::new("/x"), Duration::from_millis(50))
            .await
            .unwrap_err();
        assert!(matches!(error, MachineError::Slow { .. }));
        drop(machine);
        let deadline = std::time::Instant::now() + LIMIT;
        let state = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit(')')
                .next()
                .and_then(|rest| rest.trim().chars().next())
        };
        while !matches!(state(), None | Some('Z')) {
            assert!(std::time::Instant::now() < deadline, "it is still alive");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn missing_vmm_is_named() {
        let error = Machine::resume(Path::new("/no/vmm"), Path::new("/d"), Path::new("/s"));
        assert!(error.unwrap_err().to_string().contains("/no/vmm"));
    }
}
