//! Whom a VMM becomes, and where it is locked in.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use kiln_store::private;
pub use kiln_vmm_control::Jail;

use crate::Error;

/// User ids of jailed VMMs begin here unless the configuration says otherwise. The id of the process that starts one is
/// added, so no two VMMs of a node have one id at a time: that process lives as long as its VMM.
pub const FIRST_ID: u32 = 0x7000_0000;

/// An empty directory that may be the root of every jail: nobody can put anything there.
const EMPTY_ROOT: &str = "/run/kiln/empty";

/// The jail of a VMM that this process starts, with user ids from `first` on, if it has the right to lock one in. Its root
/// is made if it is not there.
pub fn of_this_process(first: u32) -> Result<Option<Jail>, Error> {
    // SAFETY: geteuid takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Ok(None);
    }
    let root = Path::new(EMPTY_ROOT);
    private::directory(root.parent().unwrap_or(root))?;
    Ok(Some(at(first, root.to_owned())?))
}

/// The jail of a VMM that this process starts, with user ids from `first` on and a root that is made if it is not there.
pub fn at(first: u32, root: PathBuf) -> Result<Jail, Error> {
    // Nobody but root gets as far as this; the VMM changes its root before its user.
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o555)
        .create(&root)
        .map_err(Error::file("make", &root))?;
    let id = first.saturating_add(std::process::id());
    Ok(Jail {
        uid: id,
        gid: id,
        root,
    })
}
