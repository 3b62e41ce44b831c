//! The devices of a baked μVM, by PCI slot: the contract between who bakes a guest and who resumes it.
//!
//! A host side is given by slot at resume, so both must mean the same device by the same number. The
//! slots are part of the saved state: changing one makes every baked μVM unusable with the new kiln.

/// Sockets to the host: the agent's API and the streams.
pub const VSOCK: u8 = 1;
/// Entropy.
pub const RNG: u8 = 2;
/// Memory hot-plug.
pub const MEM: u8 = 3;
/// The pod's network card: one queue pair, no cable until the resume gives it a tap.
pub const NET: u8 = 4;
/// The pod's directory of volumes.
pub const FS: u8 = 5;
/// The disk that the containers' writable layers lie on, mounted in the baked guest. At resume it is an overlay over the
/// disk as it was then.
pub const SCRATCH: u8 = 7;
/// The first of the disk slots, which follow each other; those are empty in the baked guest.
pub const FIRST_DISK: u8 = 8;
/// The last slot of the bus.
pub const LAST: u8 = 31;

/// The tag of the file system in [`FS`].
pub const FS_TAG: &str = "kiln";

/// The guest's vsock address. Every μVM has the same one: each has its own VMM.
pub const GUEST_CID: u64 = 3;

/// The network card's address in the baked guest. The agent replaces it by the pod's at resume.
pub const PLACEHOLDER_MAC: [u8; 6] = [0x02, 0x6b, 0x69, 0x6c, 0x6e, 0x00];

/// The most disk slots a μVM can be baked with.
pub const MAX_DISKS: u8 = LAST - FIRST_DISK + 1;

const _: () = assert!(FS < SCRATCH && SCRATCH < FIRST_DISK && FIRST_DISK <= LAST);
// Locally administered, and no multicast address.
const _: () = assert!(PLACEHOLDER_MAC[0] & 0b11 == 0b10);

/// The serial of the disk in a slot, which the guest reads in `/sys/block/*/serial`.
#[must_use]
pub fn disk_id(slot: u8) -> String {
    format!("kiln-{slot}")
}

/// The guest's name of the disk in a slot: the driver names disks in the order of their slots.
///
/// `None` for a slot that is no disk's.
#[must_use]
pub fn disk_name(slot: u8) -> Option<String> {
    let index = match slot {
        SCRATCH => 0,
        FIRST_DISK..=LAST => slot - FIRST_DISK + 1,
        _ => return None,
    };
    Some(format!("/dev/vd{}", char::from(b'a' + index)))
}

/// What stands before the slot in a plugged disk's path.
const PLUGGED: &str = "slot:";

/// How a mount names a disk that was plugged by PCI hot-plug. The guest gives it a name that nobody else knows.
#[must_use]
pub fn plugged_disk_path(slot: u8) -> String {
    format!("{PLUGGED}{slot}")
}

/// The slot of a plugged disk, if that is what a mount names.
#[must_use]
pub fn plugged_disk(source: &str) -> Option<u8> {
    source.strip_prefix(PLUGGED)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_named_in_the_order_of_their_slots() {
        assert_eq!(disk_name(SCRATCH).as_deref(), Some("/dev/vda"));
        assert_eq!(disk_name(FIRST_DISK).as_deref(), Some("/dev/vdb"));
        assert_eq!(disk_name(LAST).as_deref(), Some("/dev/vdy"));
        assert_eq!(disk_name(NET), None);
        assert_eq!(disk_name(LAST + 1), None);
    }

    #[test]
    fn plugged_disks_are_told_from_baked_ones() {
        assert_eq!(plugged_disk(&plugged_disk_path(17)), Some(17));
        assert_eq!(plugged_disk("/dev/vdb"), None);
        assert_eq!(plugged_disk("slot:x"), None);
    }
}
