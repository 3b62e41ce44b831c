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

use super::child;

/// The search path of a process that has none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where `process`'s program is, from inside the container.
pub(super) fn find(process: &Process) -> Result<PathBuf, String> {
    let name = process
        .args()
        .as_ref()
        .and_then(|args| args.first())
        .filter(|name| !name.is_empty())
        .ok_or("the process has no arguments, so there is nothing to run")?;
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(error) => Err(format!("exec: {name:?}: {}", reason(name, &error))),
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
        Some(error) => Err(format!("exec: {name:?}: {}", reason(name, &error))),
        None => Err(format!(
            "exec: {name:?}: executable file not found in $PATH"
        )),
    }
}

fn reason(name: &str, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => format!("stat {name}: no such file or directory"),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        io::ErrorKind::IsADirectory => "is a directory".to_owned(),
        _ => error.to_string(),
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
pub(super) fn execute(process: &Process) -> Result<std::convert::Infallible, String> {
    let program = find(process)?;
    let strings = |list: &Option<Vec<String>>| -> Result<Vec<CString>, String> {
        list.iter()
            .flatten()
            .map(|text| {
                CString::new(text.as_str())
                    .map_err(|_| format!("{text:?} contains a NUL byte, which no program can get"))
            })
            .collect()
    };
    let path = crate::sys::c_path(&program).map_err(|error| error.to_string())?;
    let arguments = strings(process.args())?;
    let environment = strings(process.env())?;
    let error = nix::unistd::execve(&path, &arguments, &environment).unwrap_err();
    let text = match error {
        nix::Error::ENOENT => "no such file or directory".to_owned(),
        nix::Error::EACCES => "permission denied".to_owned(),
        nix::Error::ENOEXEC => "exec format error".to_owned(),
        other => other.desc().to_owned(),
    };
    Err(format!("exec {}: {text}", program.display()))
}

/// libcontainer's last step, with an answer to whoever starts the container.
#[derive(Debug, Clone, Copy)]
pub(super) struct Program {
    /// Where to tell of a failing `exec`; closes when it succeeds.
    pub(super) status: RawFd,
}

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        match execute(process) {
            Ok(never) => match never {},
            Err(error) => {
                child::tell(self.status, &error);
                Err(ExecutorError::Other(error))
            }
        }
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let no_process = || ExecutorValidationError::ArgValidationError("no process".to_owned());
        let process = spec.process().as_ref().ok_or_else(no_process)?;
        find(process)
            .map(drop)
            .map_err(ExecutorValidationError::ArgValidationError)
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
        let error = |args: &[&str], env: &[&str]| find(&process(args, env)).expect_err("not found");
        assert_eq!(
            error(&["nope"], &["PATH=/bin"]),
            r#"exec: "nope": executable file not found in $PATH"#
        );
        assert_eq!(
            error(&["/no"], &[]),
            r#"exec: "/no": stat /no: no such file or directory"#
        );
        assert_eq!(
            error(&["/etc/passwd"], &[]),
            r#"exec: "/etc/passwd": permission denied"#
        );
        assert_eq!(error(&["/bin"], &[]), r#"exec: "/bin": is a directory"#);
        assert!(error(&[], &[]).contains("no arguments"));
    }

    #[test]
    fn a_process_without_path_gets_the_usual_one() {
        assert!(find(&process(&["sh"], &[])).is_ok());
    }
}
