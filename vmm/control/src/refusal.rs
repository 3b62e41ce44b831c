//! Why the VMM did not do what it was asked, as far as a program can make something of it.

use serde::{Deserialize, Serialize};

/// Kinds of refusals: each is another thing to do about it. What happened stands in the text beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalKind {
    /// The saved machine is another kiln's or another kind of host's. It has to be baked again.
    Foreign,
    /// The saved machine's files are damaged. It has to be baked again.
    Corrupt,
    /// A file that the VMM writes has no room: its file system, a quota or its own limit is used up.
    NoSpace,
    /// Something is in use, or the guest does not let go or did not follow in time. It may be asked again.
    Busy,
    /// The request makes no sense for this machine, or not as it is now. Asked again, it is refused again.
    Usage,
    /// Anything else: the system or KVM refused a step.
    Failed,
}
