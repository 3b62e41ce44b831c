//! The serial console of a machine that is baked or debugged.

use std::collections::VecDeque;
use std::fmt::{self, Debug};
use std::fs::File;
use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState as LiveState};
use vm_superio::{Serial, Trigger};

use crate::layout;

/// Raises the port's interrupt.
#[derive(Debug)]
pub struct IrqLine(Arc<VmFd>);

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        // Edge-triggered: up and down again.
        for level in [true, false] {
            self.0
                .set_irq_line(layout::SERIAL_IRQ, level)
                .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        }
        Ok(())
    }
}

/// A 16550 whose output goes to a file, if there is one. Its end is remembered in any case.
pub struct Console(Serial<IrqLine, NoEvents, Sink>);

/// Where a console's bytes go.
#[derive(Debug)]
pub struct Sink {
    file: Option<File>,
    end: VecDeque<u8>,
}

/// How much of the output's end is remembered: a kernel's oops and its panic.
const REMEMBERED: usize = 4096;

impl Sink {
    fn new(file: Option<File>) -> Self {
        let end = VecDeque::new();
        Self { file, end }
    }
}

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.end.extend(bytes);
        let surplus = self.end.len().saturating_sub(REMEMBERED);
        self.end.drain(..surplus);
        if let Some(file) = &mut self.file {
            // A full or closed log must not stop the guest.
            let _ = file.write_all(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port's registers, as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    registers: [u8; 9],
    in_buffer: Vec<u8>,
}

impl Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Console")
    }
}

impl Console {
    /// A port in its reset state.
    pub fn new(vm: Arc<VmFd>, out: Option<File>) -> Self {
        Self(Serial::new(IrqLine(vm), Sink::new(out)))
    }

    /// A port with saved registers.
    pub fn restore(vm: Arc<VmFd>, out: Option<File>, state: &SerialState) -> Option<Self> {
        let [baud_low, baud_high, ier, iir, lcr, lsr, mcr, msr, scratch] = state.registers;
        let live = LiveState {
            baud_divisor_low: baud_low,
            baud_divisor_high: baud_high,
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            in_buffer: state.in_buffer.clone(),
        };
        Serial::from_state(&live, IrqLine(vm), NoEvents, Sink::new(out))
            .ok()
            .map(Self)
    }

    /// Registers to save.
    pub fn save(&self) -> SerialState {
        let s = self.0.state();
        SerialState {
            registers: [
                s.baud_divisor_low,
                s.baud_divisor_high,
                s.interrupt_enable,
                s.interrupt_identification,
                s.line_control,
                s.line_status,
                s.modem_control,
                s.modem_status,
                s.scratch,
            ],
            in_buffer: s.in_buffer,
        }
    }

    /// The end of the guest's output, as text.
    pub fn last_words(&self) -> String {
        let end: Vec<u8> = self.0.writer().end.iter().copied().collect();
        let text = String::from_utf8_lossy(&end);
        // A guest's escape sequences have no business in a log.
        let shown = text.chars().filter(|c| *c == '\n' || !c.is_control());
        shown.collect::<String>().trim().to_owned()
    }

    /// The guest reads a register.
    pub fn read(&mut self, offset: u8) -> u8 {
        self.0.read(offset)
    }

    /// The guest writes a register.
    pub fn write(&mut self, offset: u8, value: u8) {
        // Fails only if the interrupt can't be raised; the guest then polls.
        let _ = self.0.write(offset, value);
    }
}
