//! A μVM in a host program's hands, from the store to its end. The shim, `kiln run`, the bake's try-out and the tests are
//! its users.
//!
//! From the outside in:
//!
//! - [`pick`]: which μVM of the store is resumed; [`baked`]: its files; [`size`]: how big it is to be
//! - [`launch`]: all that is done until the guest is one of its own; [`timeline`]: where the time of it goes
//! - [`uvm`]: one that runs; [`disks`] and [`root`]: what its containers' roots are made of
//! - [`save`]: a running one becomes files
//! - [`guest`]: what its agent can be asked
//! - [`scratch`]: what its writable layers lie on; [`share`]: the folder of volumes that the guest sees
//! - [`machine`]: the VMM's process; [`jail`]: whom it becomes; [`words`]: what it says; [`end`]: how it ended
//! - [`control`]: what a VMM can be told; [`ends`]: the host's sides of its devices
//! - [`touched`]: which pages of a memory file a guest needs
//! - [`random`]: what must be unique
//!
//! Trusted: the caller. Not trusted: the guest, and the VMM that faces it. Nothing here names a path that either of
//! them can write.

pub mod baked;
pub mod control;
pub mod disks;
pub mod end;
pub mod ends;
mod error;
pub mod ext4;
pub mod guest;
pub mod jail;
pub mod launch;
pub mod machine;
mod mounts;
pub mod pick;
pub mod random;
pub mod root;
pub mod save;
pub mod scratch;
pub mod share;
pub mod size;
mod text;
pub mod timeline;
pub mod touched;
pub mod uvm;
pub mod words;

pub use error::Error;
pub use kiln_vmm_control::{
    DeviceKind, DeviceSpec, Flush, MachineSpec, OverlayFigures, PageRun, RefusalKind, Span, cpu,
    exit,
};
