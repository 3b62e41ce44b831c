//! Finds and executes a container's program.
//!
//! The texts of the errors are the ones that Kubernetes' users know, for they end up in a pod's
//! status.

use std::ffi::CString;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{Process, Spec};
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};

use super::fault::{Fault, FaultKind};

/// The search path of a process that has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where `process`'s program is, from inside the container.
pub(super) fn find(process: &Process) -> Result<PathBuf, Fault> {
    let name = process
        .args()
        .as_ref()
        .and_then(|args| args.first())
        .filter(|name| !name.is_empty())
        .ok_or_else(|| {
            Fault::other("the process has no arguments, so there is nothing to run".to_owned())
        })?;
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(error) => Err(unusable(name, &error)),
        };
    }
    let path = process
        .env()
        .iter()
        .flatten()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    let mut refused = None;
    for folder in path.split(':') {
        // As execvp has it: an empty element is the working directory.
        let folder = if folder.is_empty() { "." } else { folder };
        let candidate = Path::new(folder).join(name);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => refused = Some(error),
            Err(_) => {}
        }
    }
    match refused {
        Some(error) => Err(unusable(name, &error)),
        None => Err(Fault {
            kind: FaultKind::NoProgram,
            text: format!("exec: {name:?}: executable file not found in $PATH"),
        }),
    }
}

/// What is wrong with the file that `name` leads to.
fn unusable(name: &str, error: &io::Error) -> Fault {
    let (kind, reason) = match error.kind() {
        io::ErrorKind::NotFound => (
            FaultKind::NoProgram,
            format!("stat {name}: no such file or directory"),
        ),
        io::ErrorKind::PermissionDenied => {
            (FaultKind::NotExecutable, "permission denied".to_owned())
        }
        io::ErrorKind::IsADirectory => (FaultKind::NotExecutable, "is a directory".to_owned()),
        io::ErrorKind::NotADirectory => (FaultKind::NotExecutable, error.to_string()),
        _ => (FaultKind::Other, error.to_string()),
    };
    Fault {
        kind,
        text: format!("exec: {name:?}: {reason}"),
    }
}

fn executable(path: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let special = metadata.file_type().is_block_device()
        || metadata.file_type().is_char_device()
        || metadata.file_type().is_fifo()
        || metadata.file_type().is_socket();
    if special || metadata.mode() & 0o111 == 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(())
}

/// Replaces this process by `process`'s program; returns only if that fails.
pub(super) fn execute(process: &Process) -> Result<std::convert::Infallible, Fault> {
    let program = find(process)?;
    let strings = |list: &Option<Vec<String>>| -> Result<Vec<CString>, Fault> {
        let string = |text: &String| {
            CString::new(text.as_str()).map_err(|_| {
                Fault::other(format!(
                    "{text:?} contains a NUL byte, which no program can get"
                ))
            })
        };
        list.iter().flatten().map(string).collect()
    };
    let path = crate::sys::c_path(&program).map_err(|error| Fault::other(error.to_string()))?;
    let arguments = strings(process.args())?;
    let environment = strings(process.env())?;
    let error = nix::unistd::execve(&path, &arguments, &environment).unwrap_err();
    let (kind, reason) = match error {
        nix::Error::ENOENT => (FaultKind::NoProgram, "no such file or directory"),
        nix::Error::EACCES => (FaultKind::NotExecutable, "permission denied"),
        nix::Error::ENOEXEC => (FaultKind::NotExecutable, "exec format error"),
        other => (FaultKind::Other, other.desc()),
    };
    Err(Fault {
        kind,
        text: format!("exec {}: {reason}", program.display()),
    })
}

/// libcontainer's last steps, with an answer to whoever makes and starts the container: of libcontainer itself one gets
/// no more than a text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Program {
    /// Where to tell of a program that can't be run.
    pub(super) validation: RawFd,
    /// Where to tell of a failing `exec`; closes when it succeeds.
    pub(super) status: RawFd,
}

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        match execute(process) {
            Ok(never) => match never {},
            Err(error) => {
                error.tell(self.status);
                Err(ExecutorError::Other(error.text))
            }
        }
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let no_process = || ExecutorValidationError::ArgValidationError("no process".to_owned());
        let process = spec.process().as_ref().ok_or_else(no_process)?;
        find(process).map(drop).map_err(|error| {
            error.tell(self.validation);
            ExecutorValidationError::ArgValidationError(error.text)
        })
    }

    fn setup_envs(
        &self,
        _: std::collections::HashMap<String, String>,
    ) -> Result<(), libcontainer::workload::ExecutorSetEnvsError> {
        // `execute` passes the spec's own list, in its order.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use libcontainer::oci_spec::runtime::ProcessBuilder;

    use super::*;

    fn process(args: &[&str], env: &[&str]) -> Process {
        let owned = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        ProcessBuilder::default()
            .args(owned(args))
            .env(owned(env))
            .build()
            .expect("process")
    }

    #[test]
    fn a_program_is_searched_in_the_process_own_path() {
        let found = find(&process(&["sh"], &["PATH=/nonexistent:/bin"]));
        assert_eq!(found, Ok(PathBuf::from("/bin/sh")));
        assert_eq!(
            find(&process(&["/bin/sh"], &[])),
            Ok(PathBuf::from("/bin/sh"))
        );
    }

    #[test]
    fn errors_read_as_users_know_them() {
        use FaultKind::{NoProgram, NotExecutable, Other};

        let absent = r#"exec: "nope": executable file not found in $PATH"#;
        let nowhere = r#"exec: "/no": stat /no: no such file or directory"#;
        let plain = r#"exec: "/etc/passwd": permission denied"#;
        let folder = r#"exec: "/bin": is a directory"#;
        let below = r#"exec: "/etc/passwd/x": Not a directory (os error 20)"#;
        let nothing = "the process has no arguments, so there is nothing to run";
        let cases: [(&[&str], _, _); 6] = [
            (&["nope"], NoProgram, absent),
            (&["/no"], NoProgram, nowhere),
            (&["/etc/passwd"], NotExecutable, plain),
            (&["/bin"], NotExecutable, folder),
            (&["/etc/passwd/x"], NotExecutable, below),
            (&[], Other, nothing),
        ];
        for (args, kind, text) in cases {
            let text = text.to_owned();
            assert_eq!(
                find(&process(args, &["PATH=/bin"])),
                Err(Fault { kind, text })
            );
        }
    }

    #[test]
    fn program_without_a_format_can_not_be_executed() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), b"no program").expect("write");
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o755))
            .expect("mode");
        // execve wants that nobody has it open for writing.
        let path = file.into_temp_path();
        let fault = execute(&process(&[path.to_str().expect("path")], &[])).expect_err("no format");
        assert_eq!(fault.kind, FaultKind::NotExecutable);
    }

    #[test]
    fn a_process_without_path_gets_the_usual_one() {
        assert!(find(&process(&["sh"], &[])).is_ok());
    }
}
