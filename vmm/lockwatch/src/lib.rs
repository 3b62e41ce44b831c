//! What a guest's agent and the file server say to each other of processes that wait for a lock.
//!
//! A guest's kernel does not tell a virtio-fs device that a request was interrupted: a process that waits for a lock which
//! somebody outside has could not even be killed. So the agent watches: it asks by an `ioctl` on the share's root, which is
//! answered when some process has waited for a while, by who waits. The next question names those waits that are to end,
//! because a signal has come for their threads.

#![forbid(unsafe_code)]

/// `_IOC_READ | _IOC_WRITE`, in the upper two bits.
const BOTH_WAYS: u32 = 3 << 30;
const TYPE: u32 = b'k' as u32;
/// Bytes of a question and of its answer.
pub const LEN: usize = 256;
/// The command of the `ioctl`.
pub const COMMAND: u32 = BOTH_WAYS | (LEN as u32) << 16 | TYPE << 8 | 1;
const HEADER: usize = 8;
const ENTRY: usize = 16;
/// The most waits in one message.
pub const MOST: usize = (LEN - HEADER) / ENTRY;

/// A request that waits for a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait {
    /// The request's number.
    pub unique: u64,
    /// The thread that waits, as the guest's first process knows it.
    pub thread: u32,
}

/// A message about these waits, or as many of them as fit: a count, then number and thread of each, the lower byte first.
pub fn encode(waits: &[Wait]) -> [u8; LEN] {
    let mut message = [0; LEN];
    let waits = waits.get(..MOST).unwrap_or(waits);
    let (header, entries) = message.split_at_mut(HEADER);
    header[0] = waits.len() as u8;
    for (entry, wait) in entries.chunks_exact_mut(ENTRY).zip(waits) {
        entry[..8].copy_from_slice(&wait.unique.to_le_bytes());
        entry[8..12].copy_from_slice(&wait.thread.to_le_bytes());
    }
    message
}

/// What a message names. One that names more than it can hold says nothing.
pub fn decode(message: &[u8; LEN]) -> Vec<Wait> {
    let (header, entries) = message.split_at(HEADER);
    let mut count = [0; HEADER];
    count.copy_from_slice(header);
    let count = usize::try_from(u64::from_le_bytes(count)).unwrap_or(usize::MAX);
    if count > MOST {
        return Vec::new();
    }
    let entries = entries.chunks_exact(ENTRY).take(count);
    entries
        .map(|entry| {
            let (mut unique, mut thread) = ([0; 8], [0; 4]);
            unique.copy_from_slice(&entry[..8]);
            thread.copy_from_slice(&entry[8..12]);
            Wait {
                unique: u64::from_le_bytes(unique),
                thread: u32::from_le_bytes(thread),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(count: usize) -> Vec<Wait> {
        let wait = |number: usize| Wait {
            unique: number as u64 + (1 << 40),
            thread: number as u32 + 7,
        };
        (0..count).map(wait).collect()
    }

    #[test]
    fn what_is_said_is_heard() {
        for count in [0, 1, MOST] {
            assert_eq!(decode(&encode(&waits(count))), waits(count));
        }
        assert_eq!(decode(&encode(&waits(MOST + 3))), waits(MOST));
    }

    #[test]
    fn more_than_fits_is_nothing() {
        for count in [MOST as u64 + 1, u64::MAX] {
            let mut message = encode(&waits(2));
            message[..8].copy_from_slice(&count.to_le_bytes());
            assert_eq!(decode(&message), []);
        }
    }

    #[test]
    fn command_is_what_the_kernels_macro_makes_of_it() {
        assert_eq!(COMMAND, 0xC100_6B01);
    }
}
