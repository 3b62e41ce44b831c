//! The program that a container's process runs.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::OnceLock;

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
    "push 0", // rt_sigprocmask(SIG_SETMASK, none, null, 8): it is started with all signals held back
    "mov rsi, rsp",
    "mov eax, 14",
    "mov edi, 2",
    "xor edx, edx",
    "mov r10d, 8",
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

/// The program as a file that can be executed, without a name. One for all that the shim starts.
pub(super) fn executable() -> io::Result<&'static File> {
    static FILE: OnceLock<File> = OnceLock::new();
    if FILE.get().is_none() {
        // Made for nothing if another thread was quicker.
        let _ = FILE.set(make()?);
    }
    FILE.get().ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn make() -> io::Result<File> {
    let file = |flags| {
        // SAFETY: the name is a string with an end, and the call returns a new descriptor or an error.
        let fd = unsafe { libc::memfd_create(c"kiln-container".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
    };
    let mut file = match file(libc::MFD_CLOEXEC | libc::MFD_EXEC) {
        // A kernel before 6.3, where all such files can be executed.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => file(libc::MFD_CLOEXEC)?,
        made => made?,
    };
    file.write_all(program())?;
    Ok(file)
}
