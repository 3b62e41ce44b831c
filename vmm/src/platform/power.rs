//! Power-off, reset and panic as the guest reports them.

use serde::{Deserialize, Serialize};

/// What the guest writes to the reset register (FADT RESET_VALUE).
pub const RESET_VALUE: u8 = 0x42;
/// Sleep type of S5 in `_S5`.
const S5: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;

/// Why a machine is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The guest powered off.
    PoweredOff,
    /// The guest asked for a reset, by the register or the keyboard controller.
    Reset,
    /// A vCPU could not even begin to handle a fault, which is a reset on a real machine.
    TripleFault,
    /// The guest's kernel panicked.
    Panicked,
    /// The control side stopped it.
    Stopped,
    /// The machine can't go on; the text says why.
    Failed(String),
}

/// A write to the sleep control register.
pub fn sleep_control(value: u8) -> Option<Outcome> {
    (value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == S5).then_some(Outcome::PoweredOff)
}

/// A write to the reset register.
pub fn reset(value: u8) -> Option<Outcome> {
    (value == RESET_VALUE).then_some(Outcome::Reset)
}

/// A write to the keyboard controller's command port: 0xfe pulses the reset line.
pub fn i8042(value: u8) -> Option<Outcome> {
    (value == 0xfe).then_some(Outcome::Reset)
}

/// What the panic device announces: panics only, no crash kernels.
pub const PANIC_EVENTS: u8 = 0b01;

/// A write to the panic device.
pub fn panic(value: u8) -> Option<Outcome> {
    (value & PANIC_EVENTS != 0).then_some(Outcome::Panicked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_s5_with_enable_powers_off() {
        assert_eq!(sleep_control(5 << 2 | 0x20), Some(Outcome::PoweredOff));
        assert_eq!(sleep_control(5 << 2), None);
        assert_eq!(sleep_control(3 << 2 | 0x20), None);
    }
}
