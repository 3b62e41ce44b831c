//! Directories, files and sockets that are root's alone, whatever the umask is.
//!
//! Whoever may open a directory or a file may lock it, and so keep others waiting; whoever connects
//! to a pod's socket is the host to its agent. So nobody else gets as far as that.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

const DIRECTORY: u32 = 0o700;
const FILE: u32 = 0o600;
const MODE: u32 = 0o7777;
/// A directory between may be removed, as empty, while the next one is about to be made in it.
const ATTEMPTS: u32 = 16;

/// There can be no such directory.
#[derive(Debug, thiserror::Error)]
pub enum PrivateError {
    /// It is somebody else's.
    #[error(
        "{path} belongs to user {owner}, who could read and hold up what kiln keeps there: \
         find out who made it, then remove it",
        path = path.display()
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// It is something else, such as a link.
    #[error(
        "{} is a link or a file, where kiln wants a directory of its own: remove it",
        .0.display()
    )]
    NoDirectory(PathBuf),
    /// The system refused.
    #[error("cannot make a directory of root's alone of {}", path.display())]
    Refused {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Makes a directory private that is there, or makes one. What leads to it may be anybody's to read.
pub fn directory(path: &Path) -> Result<(), PrivateError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|source| refused(parent, source))?;
    }
    one(path)
}

/// The same with each directory on the way from `top` down to `relative`; returns the last one.
pub fn below(top: &Path, relative: &Path) -> Result<PathBuf, PrivateError> {
    let mut attempts = 1;
    loop {
        match all_below(top, relative) {
            Err(PrivateError::Refused { source, .. })
                if source.kind() == ErrorKind::NotFound && attempts < ATTEMPTS =>
            {
                attempts += 1;
            }
            other => return other,
        }
    }
}

fn all_below(top: &Path, relative: &Path) -> Result<PathBuf, PrivateError> {
    directory(top)?;
    let mut path = top.to_owned();
    for component in relative.components() {
        path.push(component);
        one(&path)?;
    }
    Ok(path)
}

fn refused(path: &Path, source: io::Error) -> PrivateError {
    PrivateError::Refused {
        path: path.to_owned(),
        source,
    }
}

fn one(path: &Path) -> Result<(), PrivateError> {
    match DirBuilder::new().mode(DIRECTORY).create(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(refused(path, error)),
        _ => {}
    }
    // Opened before it is looked at: what is checked is what is changed.
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path);
    let directory = opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ELOOP | libc::ENOTDIR) => PrivateError::NoDirectory(path.to_owned()),
        _ => refused(path, error),
    })?;
    let meta = directory.metadata().map_err(|e| refused(path, e))?;
    // SAFETY: the call only reads the process's own id.
    if meta.uid() != unsafe { libc::geteuid() } {
        return Err(PrivateError::Foreign {
            path: path.to_owned(),
            owner: meta.uid(),
        });
    }
    restrict(&directory, meta.mode(), DIRECTORY).map_err(|e| refused(path, e))
}

/// An older version may have made it with another mode; one call less where it has not.
fn restrict(file: &File, mode: u32, wanted: u32) -> io::Result<()> {
    if mode & MODE == wanted {
        return Ok(());
    }
    file.set_permissions(Permissions::from_mode(wanted))
}

/// Opens a file to be written, from its beginning, by this user alone.
pub fn create(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(FILE)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    restrict(&file, file.metadata()?.mode(), FILE)?;
    Ok(file)
}

/// Gives a private file this content, which nobody sees before it is whole.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    create(Path::new(&fresh))?.write_all(content)?;
    fs::rename(&fresh, path)
}

/// Listens on a private socket, in a private directory. What an earlier listener left there goes.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(FILE))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{chown, symlink};
    use std::os::unix::net::UnixStream;

    const NOBODY: u32 = 65534;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & MODE
    }

    fn is_root() -> bool {
        // SAFETY: the call only reads the process's own id.
        unsafe { libc::geteuid() == 0 }
    }

    /// Runs `attempt` as an unprivileged user, in a process of its own, and says whether it was true.
    fn as_nobody(attempt: impl FnOnce() -> bool) -> bool {
        // SAFETY: the child makes system calls and file operations only, and ends by `_exit`.
        unsafe {
            let child = libc::fork();
            assert!(child >= 0, "fork");
            if child == 0 {
                let became = libc::setgroups(0, std::ptr::null()) == 0
                    && libc::setresgid(NOBODY, NOBODY, NOBODY) == 0
                    && libc::setresuid(NOBODY, NOBODY, NOBODY) == 0;
                libc::_exit(if became { attempt().into() } else { 2 });
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
            assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) < 2);
            libc::WEXITSTATUS(status) == 1
        }
    }

    #[test]
    fn whatever_was_there_and_whatever_the_umask_the_modes_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("kiln");
        // What an older version left.
        fs::create_dir_all(top.join("pods")).unwrap();
        fs::set_permissions(top.join("pods"), Permissions::from_mode(0o755)).unwrap();
        fs::write(top.join("old"), "").unwrap();
        fs::set_permissions(top.join("old"), Permissions::from_mode(0o644)).unwrap();

        let pod = below(&top, Path::new("pods/n/p")).unwrap();
        assert_eq!(pod, top.join("pods/n/p"));
        for made in ["", "pods", "pods/n", "pods/n/p"] {
            assert_eq!(mode(&top.join(made)), DIRECTORY, "{made:?}");
        }
        replace(&pod.join("record"), b"x").unwrap();
        create(&top.join("old")).unwrap();
        let _listener = listen(&pod.join("socket")).unwrap();
        for made in ["old", "pods/n/p/record", "pods/n/p/socket"] {
            assert_eq!(mode(&top.join(made)), FILE, "{made}");
        }
        assert_eq!(fs::read(pod.join("record")).unwrap(), b"x");
        drop(listen(&pod.join("socket")).unwrap());
    }

    #[test]
    fn links_files_and_others_directories_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (link, file) = (dir.path().join("link"), dir.path().join("file"));
        fs::create_dir(dir.path().join("elsewhere")).unwrap();
        symlink(dir.path().join("elsewhere"), &link).unwrap();
        fs::write(&file, "").unwrap();
        for path in [link, file] {
            let error = directory(&path).unwrap_err();
            assert!(matches!(error, PrivateError::NoDirectory(_)), "{error:?}");
        }
        if is_root() {
            let foreign = dir.path().join("foreign");
            fs::create_dir(&foreign).unwrap();
            chown(&foreign, Some(NOBODY), None).unwrap();
            let error = directory(&foreign).unwrap_err();
            assert!(error.to_string().contains("65534"), "{error}");
        }
    }

    #[test]
    fn an_unprivileged_user_can_open_lock_and_connect_to_nothing() {
        if !is_root() {
            println!("skipped: only root can become somebody else");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let top = dir.path().join("kiln");
        let pod = below(&top, Path::new("pods/k8s.io/p")).unwrap();
        replace(&pod.join("record.json"), b"{}").unwrap();
        // One that somebody makes without care for its mode.
        fs::write(top.join("overlay-budget"), "").unwrap();
        fs::set_permissions(top.join("overlay-budget"), Permissions::from_mode(0o666)).unwrap();
        let socket = pod.join("vsock.sock");
        let _listener = listen(&socket).unwrap();
        let paths = [
            top.clone(),
            pod.clone(),
            pod.join("record.json"),
            top.join("overlay-budget"),
        ];
        let reached = || {
            paths.iter().any(|path| File::open(path).is_ok())
                || UnixStream::connect(&socket).is_ok()
        };
        assert!(!as_nobody(reached));
        // The test can tell: with the way open it does reach something.
        fs::set_permissions(&top, Permissions::from_mode(0o755)).unwrap();
        assert!(as_nobody(|| File::open(top.join("overlay-budget")).is_ok()));
        below(&top, Path::new("pods/k8s.io/p")).unwrap();
        assert!(!as_nobody(reached));
    }
}
