//! First process of a guest, for tests of the virtual machine monitor: whoever connects over vsock sends a
//! shell script and gets back what it prints, and `exit=CODE` as the last line. An empty script is answered by this
//! process itself, which tells how soon the guest answers at all.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};

/// Answers scripts on this port until the guest ends.
pub(crate) fn serve(port: u32) -> Result<()> {
    let listener = listen(port).context("listening on vsock")?;
    let pool = Arc::new(Pool {
        listener,
        waiting: AtomicUsize::new(WAITING),
    });
    for _ in 1..WAITING {
        pool.start_another()?;
    }
    // For whoever reads the console.
    println!("guest: ready");
    pool.work();
    Ok(())
}

/// Threads that wait for connections: an answer does not begin with the start of a thread.
const WAITING: usize = 3;

/// Whoever takes a connection stays with it, and sees to it that another one waits for the next.
struct Pool {
    listener: OwnedFd,
    waiting: AtomicUsize,
}

impl Pool {
    fn start_another(self: &Arc<Self>) -> Result<()> {
        let pool = Arc::clone(self);
        std::thread::Builder::new().spawn(move || pool.work())?;
        Ok(())
    }

    fn work(self: &Arc<Self>) {
        loop {
            // SAFETY: a descriptor of ours; no address is asked for.
            let fd = unsafe {
                libc::accept4(
                    self.listener.as_raw_fd(),
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    libc::SOCK_CLOEXEC,
                )
            };
            if fd < 0 {
                // A connection that went away, or one that a snapshot has cut.
                eprintln!("guest: accepting: {}", io::Error::last_os_error());
                std::thread::sleep(std::time::Duration::from_millis(10));
                continue;
            }
            if self.waiting.fetch_sub(1, Ordering::SeqCst) == 1 {
                self.waiting.fetch_add(1, Ordering::SeqCst);
                if let Err(e) = self.start_another() {
                    eprintln!("guest: {e:#}");
                }
            }
            // SAFETY: just accepted, and nobody else's.
            let connection = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
            if let Err(e) = answer(connection) {
                eprintln!("guest: {e:#}");
            }
            self.waiting.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn listen(port: u32) -> io::Result<OwnedFd> {
    let check = |result: libc::c_int| match result {
        r if r < 0 => Err(io::Error::last_os_error()),
        r => Ok(r),
    };
    // SAFETY: plain numbers.
    let fd =
        check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: just made, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero is a valid address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_port = port;
    address.svm_cid = libc::VMADDR_CID_ANY;
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: an address of the length that is said, and a descriptor of ours.
    unsafe {
        check(libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            length,
        ))?;
        check(libc::listen(socket.as_raw_fd(), 128))?;
    }
    Ok(socket)
}

/// The script comes with its length in front, as a line.
fn answer(mut connection: File) -> Result<()> {
    let mut length = Vec::new();
    let mut byte = [0];
    while connection.read(&mut byte)? == 1 && byte != *b"\n" {
        length.push(byte[0]);
        ensure!(length.len() < 10, "no length in front of the script");
    }
    let length: usize = String::from_utf8(length)?.parse()?;
    let mut script = vec![0; length];
    connection.read_exact(&mut script)?;
    if script.is_empty() {
        return finish(connection, 0);
    }
    let script = String::from_utf8(script)?;
    let status = Command::new("/bin/sh")
        .args(["-c", &script])
        .stdin(Stdio::null())
        .stdout(connection.try_clone()?)
        .stderr(connection.try_clone()?)
        .status()?;
    finish(connection, status.code().unwrap_or(-1))
}

fn finish(mut connection: File, code: i32) -> Result<()> {
    connection.write_all(format!("\nexit={code}\n").as_bytes())?;
    let socket = std::os::unix::net::UnixStream::from(OwnedFd::from(connection));
    // It is a vsock socket; for shutting down, that makes no difference.
    Ok(socket.shutdown(Shutdown::Write)?)
}
