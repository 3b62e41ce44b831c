//! Processes of the node that stand for containers.
//!
//! A container's processes are in the guest, but on the node a container is known by a process. cAdvisor and people with
//! `nsenter` look for the pod's network where that process is, containerd says by its number whose PID namespace a
//! container is to join (`kubectl debug --target`), and whoever kills it means the container. The VMM is none of this: it has
//! a network namespace of its own, and there is one of it for all containers.
//!
//! So each container has a process that does nothing, in the pod's network namespace. It holds about as much memory as the
//! kernel needs for a process, and ends with the shim, however that ends: it waits for the end of a pipe.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use kiln_uvm::machine::process_ended;

use crate::cleanup::pidfd_open;
use crate::error::{Error, Result};
use crate::network;

// The program: an ELF header, a program header, and a loop that reads its standard input until that ends. A program of its
// own, for a copy of the shim would hold the shim's memory.
std::arch::global_asm!(
    ".pushsection .rodata.kiln_stand_in, \"a\", @progbits",
    ".balign 8",
    ".globl kiln_stand_in",
    ".hidden kiln_stand_in",
    ".globl kiln_stand_in_end",
    ".hidden kiln_stand_in_end",
    "kiln_stand_in:",
    ".byte 0x7f, 'E', 'L', 'F', 2, 1, 1, 0", // 64 bits, little-endian, version 1, System V
    ".quad 0",
    ".short 2, 62",                        // an executable for x86-64
    ".long 1",                             // version
    ".quad 0x400000 + 2f - kiln_stand_in", // its first instruction
    ".quad 64, 0",                         // program headers from here, no sections
    ".long 0",                             // flags
    ".short 64, 56, 2, 0, 0, 0",           // sizes of the headers; two program headers
    ".long 1, 5",                          // load it, to read and to execute
    ".quad 0, 0x400000, 0x400000",
    ".quad kiln_stand_in_end - kiln_stand_in, kiln_stand_in_end - kiln_stand_in",
    ".quad 0x1000",
    ".long 0x6474e551, 6", // a stack that is not executable
    ".quad 0, 0, 0, 0, 0, 16",
    "2: mov eax, 157", // prctl(PR_SET_NAME, name)
    "mov edi, 15",
    "lea rsi, [rip + 5f]",
    "syscall",
    "mov eax, 80", // chdir("/")
    "lea rdi, [rip + 6f]",
    "syscall",
    "3: xor eax, eax", // read(0, stack, 1)
    "xor edi, edi",
    "mov rsi, rsp",
    "mov edx, 1",
    "syscall",
    "cmp rax, -4", // interrupted
    "je 3b",
    "test rax, rax",
    "jg 3b",
    "mov eax, 60", // exit(0)
    "xor edi, edi",
    "syscall",
    "5: .asciz \"kiln-container\"",
    "6: .asciz \"/\"",
    "kiln_stand_in_end:",
    ".popsection",
);

unsafe extern "C" {
    #[link_name = "kiln_stand_in"]
    safe static START: u8;
    #[link_name = "kiln_stand_in_end"]
    safe static END: u8;
}

fn program() -> &'static [u8] {
    let (start, end) = (&raw const START, &raw const END);
    let length = end.addr().saturating_sub(start.addr());
    // SAFETY: both symbols are labels of the same read-only data above, the second behind the last of its bytes.
    unsafe { std::slice::from_raw_parts(start, length) }
}

/// The program as a file that can be executed, without a name.
fn executable() -> io::Result<File> {
    let make = |flags| {
        // SAFETY: the name is a string with an end, and the call returns a new descriptor or an error.
        let fd = unsafe { libc::memfd_create(c"kiln-container".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
    };
    let mut file = match make(libc::MFD_CLOEXEC | libc::MFD_EXEC) {
        // A kernel before 6.3, where all such files can be executed.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => make(libc::MFD_CLOEXEC)?,
        made => made?,
    };
    file.write_all(program())?;
    Ok(file)
}

/// A process that stands for a container, or for a pod. It ends when this is dropped.
#[derive(Debug)]
pub struct StandIn {
    process: Child,
}

impl StandIn {
    /// Starts one in a network namespace; without one, in the shim's.
    pub fn start(id: &str, netns: Option<&Path>) -> Result<Self> {
        let failed = |e: io::Error| {
            Error::failed(
                format!("start the process that stands for {id} on the node"),
                e,
            )
        };
        let file = executable().map_err(failed)?;
        let spawn = || {
            // The standard input's other end is in the child's handle, here. The program changes its directory itself: by
            // the library that takes a fork, after which each page that the shim writes to is copied.
            Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()))
                .arg0(format!("kiln-container {id}"))
                .env_clear()
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
        };
        let process = match netns {
            None => spawn(),
            Some(path) => {
                let netns = File::open(path).map_err(failed)?;
                // It inherits the namespace of the thread that starts it.
                network::enter(&netns, || Ok(spawn())).map_err(|e| failed(io::Error::other(e)))?
            }
        };
        Ok(Self {
            process: process.map_err(failed)?,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Returns when somebody has ended it, or it was dropped. Has to be called within a runtime.
    pub fn ended(&self) -> io::Result<impl Future<Output = ()> + Send + use<>> {
        let pid = i32::try_from(self.pid()).map_err(io::Error::other)?;
        // It is not reaped before it is dropped, so the number is its own.
        let pidfd = pidfd_open(pid)?.ok_or(io::ErrorKind::NotFound)?;
        process_ended(pidfd)
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        // Both fail only if it has ended and was reaped.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn command_line(pid: u32) -> String {
        fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default()
    }

    #[test]
    fn it_has_the_containers_name_and_ends_when_it_is_dropped() {
        let stand_in = StandIn::start("c1", None).unwrap();
        let pid = stand_in.pid();
        assert_eq!(command_line(pid), "kiln-container c1\0");
        // It gives up the shim's directory once it runs.
        while fs::read_link(format!("/proc/{pid}/cwd")).unwrap() != Path::new("/") {
            std::thread::yield_now();
        }
        drop(stand_in);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn it_ends_with_the_pipe_of_whoever_started_it() {
        let mut stand_in = StandIn::start("c1", None).unwrap();
        drop(stand_in.process.stdin.take());
        assert!(stand_in.process.wait().unwrap().success());
    }

    #[test]
    fn it_holds_hardly_any_memory() {
        let stand_in = StandIn::start("c1", None).unwrap();
        let status = fs::read_to_string(format!("/proc/{}/status", stand_in.pid())).unwrap();
        let resident = status.lines().find_map(|line| {
            let number = line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?;
            number.trim().parse::<u32>().ok()
        });
        assert!(resident.unwrap() <= 64, "{status}");
    }

    #[tokio::test]
    async fn its_end_is_seen() {
        let stand_in = StandIn::start("c1", None).unwrap();
        let ended = stand_in.ended().unwrap();
        let pid = i32::try_from(stand_in.pid()).unwrap();
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGTERM,
        )
        .unwrap();
        ended.await;
    }

    #[test]
    fn namespace_that_is_not_there_is_an_error_that_names_the_container() {
        let error = StandIn::start("c1", Some(Path::new("/no/such/namespace"))).unwrap_err();
        assert!(error.chain().contains("stands for c1"), "{}", error.chain());
    }
}
