//! The threads that run vCPUs, and how they are stopped and started together.
//!
//! A vCPU's descriptor is behind a lock that its thread holds while the machine runs. To stop, the control
//! thread changes the run state and sends each vCPU thread a signal whose handler sets `immediate_exit`
//! in that vCPU's shared page: a signal that comes just before KVM_RUN is then not lost. A thread stops only
//! when KVM_RUN returns with EINTR, because KVM completes the previous exit (the guest's half-done I/O
//! instruction) before it looks at the flag; only then the registers can be saved.

use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::CpuError;

/// What the machine does with the exits of its vCPUs.
pub trait ExitHandler: Send + Sync {
    /// The guest reads an I/O port.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// The guest writes an I/O port.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// The guest reads memory that is not RAM.
    fn mmio_read(&self, addr: u64, data: &mut [u8]);
    /// The guest writes memory that is not RAM.
    fn mmio_write(&self, addr: u64, data: &[u8]);
    /// A vCPU can't go on. Called once per vCPU.
    fn vcpu_ended(&self, index: u8, how: VcpuEnd);
}

/// Why a vCPU can't go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEnd {
    /// A triple fault, which is how a PC resets when nothing else works.
    TripleFault,
    /// KVM gave up on the guest.
    Error(String),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum RunState {
    Paused,
    Running,
    Ended,
}

#[derive(Debug)]
struct Gate {
    state: RunState,
    /// vCPUs that are between two runs.
    parked: usize,
}

/// Starts and stops the vCPUs of one machine.
#[derive(Debug)]
pub struct Vcpus {
    gate: Mutex<Gate>,
    changed: Condvar,
    all: Mutex<Vec<Vcpu>>,
}

#[derive(Debug)]
struct Vcpu {
    index: u8,
    fd: Arc<Mutex<VcpuFd>>,
    shared: Arc<ThreadShared>,
    thread: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct ThreadShared {
    /// The thread's kernel id, for tgkill; 0 before it runs.
    tid: std::sync::atomic::AtomicI32,
    /// Set when the thread has left its loop.
    gone: AtomicBool,
}

thread_local! {
    static IMMEDIATE_EXIT: AtomicPtr<u8> = const { AtomicPtr::new(null_mut()) };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic aborts the process, so a poisoned lock is never seen outside unit tests.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The signal that makes a vCPU leave the guest.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int) {
    // Only loads and stores: safe in a signal handler. The thread-local is const-initialised and has no
    // destructor, so touching it allocates nothing.
    let _ = IMMEDIATE_EXIT.try_with(|published| {
        let flag = published.load(Ordering::Acquire);
        if !flag.is_null() {
            // SAFETY: non-null means `run` of this thread published a pointer into the vCPU's shared
            // page and has not withdrawn it yet; that page outlives `run`.
            unsafe { flag.write_volatile(1) };
        }
    });
}

/// Installs the handler of the kick signal for the whole process.
pub fn install_kick_handler() -> io::Result<()> {
    // SAFETY: all-zero is a valid sigaction; the handler is async-signal-safe as argued there.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as usize;
        if libc::sigaction(kick_signal(), &action, null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

impl Default for Vcpus {
    fn default() -> Self {
        Self {
            gate: Mutex::new(Gate {
                state: RunState::Paused,
                parked: 0,
            }),
            changed: Condvar::new(),
            all: Mutex::default(),
        }
    }
}

impl Vcpus {
    /// Adds a vCPU with its thread. It runs when the machine runs.
    ///
    /// `enter` is called first on the new thread: the jail's filter goes there, and what has to be done before the
    /// vCPU runs and need not hold up anyone else.
    pub fn add(
        self: &Arc<Self>,
        index: u8,
        fd: VcpuFd,
        handler: Arc<dyn ExitHandler>,
        enter: impl FnOnce(&VcpuFd) -> io::Result<()> + Send + 'static,
    ) -> Result<(), CpuError> {
        let fd = Arc::new(Mutex::new(fd));
        let shared = Arc::new(ThreadShared::default());
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(128 << 10)
            .spawn({
                let (vcpus, fd, shared) = (self.clone(), fd.clone(), shared.clone());
                move || {
                    // SAFETY: gettid has no preconditions.
                    shared
                        .tid
                        .store(unsafe { libc::gettid() }, Ordering::Release);
                    let entered = enter(&lock(&fd));
                    match entered {
                        Ok(()) => vcpus.run(index, &fd, handler.as_ref()),
                        Err(e) => handler.vcpu_ended(
                            index,
                            VcpuEnd::Error(format!("confining its thread failed: {e}")),
                        ),
                    }
                    shared.gone.store(true, Ordering::Release);
                    let mut gate = lock(&vcpus.gate);
                    gate.parked += 1;
                    vcpus.changed.notify_all();
                }
            })
            .map_err(|source| CpuError::Thread { index, source })?;
        lock(&self.all).push(Vcpu {
            index,
            fd,
            shared,
            thread,
        });
        Ok(())
    }

    /// Number of vCPUs.
    pub fn count(&self) -> usize {
        lock(&self.all).len()
    }

    /// Whether there is a vCPU with this index.
    pub fn contains(&self, index: u8) -> bool {
        lock(&self.all).iter().any(|v| v.index == index)
    }

    /// Lets all vCPUs run.
    pub fn start(&self) {
        let mut gate = lock(&self.gate);
        if gate.state == RunState::Paused {
            gate.state = RunState::Running;
            self.changed.notify_all();
        }
    }

    /// Stops all vCPUs and returns when none runs.
    pub fn pause(&self) {
        self.halt(RunState::Paused);
    }

    /// Stops all vCPUs for good and joins their threads. Not for a vCPU thread to call.
    pub fn end(&self) {
        self.halt(RunState::Ended);
        for vcpu in lock(&self.all).drain(..) {
            let _ = vcpu.thread.join();
        }
    }

    /// Makes every vCPU stop soon, without waiting; for a vCPU thread that ends the machine.
    pub fn end_soon(&self) {
        let mut gate = lock(&self.gate);
        gate.state = RunState::Ended;
        self.changed.notify_all();
        drop(gate);
        // A vCPU that is being added right now sees the state before it runs.
        if let Ok(all) = self.all.try_lock() {
            for vcpu in all.iter() {
                vcpu.kick();
            }
        }
    }

    fn halt(&self, to: RunState) {
        let all = lock(&self.all);
        let mut gate = lock(&self.gate);
        if gate.state != RunState::Ended {
            gate.state = to;
        }
        self.changed.notify_all();
        for vcpu in all.iter() {
            vcpu.kick();
        }
        while gate.parked < all.len() {
            gate = self
                .changed
                .wait(gate)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Calls `f` with every vCPU, in order of index. The vCPUs must be paused.
    pub fn for_each<E>(
        &self,
        mut f: impl FnMut(u8, &mut VcpuFd) -> Result<(), E>,
    ) -> Result<(), E> {
        for vcpu in lock(&self.all).iter() {
            f(vcpu.index, &mut lock(&vcpu.fd))?;
        }
        Ok(())
    }

    fn run(&self, index: u8, fd: &Mutex<VcpuFd>, handler: &dyn ExitHandler) {
        // Published before the run state is read, so that a kick at any moment after that is seen. The page
        // stays where it is as long as the vCPU lives.
        let flag: *mut u8 = &raw mut lock(fd).get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.with(|published| published.store(flag, Ordering::Release));
        let end = self.run_until_ended(fd, handler);
        IMMEDIATE_EXIT.with(|published| published.store(null_mut(), Ordering::Release));
        if let Some(how) = end {
            handler.vcpu_ended(index, how);
        }
    }

    fn run_until_ended(&self, fd: &Mutex<VcpuFd>, handler: &dyn ExitHandler) -> Option<VcpuEnd> {
        loop {
            let mut gate = lock(&self.gate);
            gate.parked += 1;
            self.changed.notify_all();
            while gate.state == RunState::Paused {
                gate = self
                    .changed
                    .wait(gate)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            gate.parked -= 1;
            let ended = gate.state == RunState::Ended;
            drop(gate);
            if ended {
                return None;
            }
            let end = self.run_until_kicked(&mut lock(fd), handler);
            if end.is_some() {
                return end;
            }
        }
    }

    fn run_until_kicked(&self, fd: &mut VcpuFd, handler: &dyn ExitHandler) -> Option<VcpuEnd> {
        loop {
            match fd.run() {
                Ok(VcpuExit::MmioWrite(addr, data)) => handler.mmio_write(addr, data),
                Ok(VcpuExit::MmioRead(addr, data)) => handler.mmio_read(addr, data),
                Ok(VcpuExit::IoOut(port, data)) => handler.pio_write(port, data),
                Ok(VcpuExit::IoIn(port, data)) => handler.pio_read(port, data),
                Ok(VcpuExit::Shutdown) => return Some(VcpuEnd::TripleFault),
                // With an in-kernel local APIC KVM handles HLT; these come only from odd hosts.
                Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    return Some(VcpuEnd::Error(format!(
                        "the processor refused the guest's state (reason {reason:#x} on CPU {cpu})"
                    )));
                }
                Ok(other) => return Some(VcpuEnd::Error(format!("unexpected exit {other:?}"))),
                Err(e) if e.errno() == libc::EINTR => {
                    fd.set_kvm_immediate_exit(0);
                    if lock(&self.gate).state != RunState::Running {
                        return None;
                    }
                }
                // EAGAIN: an application processor that waits for its start-up message woke up for nothing.
                Err(e) if e.errno() == libc::EAGAIN => {}
                Err(e) => return Some(VcpuEnd::Error(format!("KVM_RUN: {e}"))),
            }
        }
    }
}

impl Vcpu {
    fn kick(&self) {
        let tid = self.shared.tid.load(Ordering::Acquire);
        if tid == 0 || self.shared.gone.load(Ordering::Acquire) {
            // Not in its loop: it reads the run state before it runs, or never will.
            return;
        }
        // SAFETY: tgkill has no memory effects; the thread is one of this process.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, kick_signal()) };
    }
}
