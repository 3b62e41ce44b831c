//! `kiln doctor`: what this machine can do, and how to mend what it cannot.
//!
//! Each check is a plain function over a [`System`], which is the real one or, in tests, a
//! directory that looks like one. None of them changes anything.

mod containerd;
mod kernel;
mod kvm;
mod programs;
mod space;
mod state;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;

use crate::failure::Failure;
use crate::output::{Colour, Output};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Status {
    /// As it should be.
    Ok,
    /// Pods run, but not as well as they could.
    Warn,
    /// Pods cannot run.
    Fail,
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// Which check: a word that programs can rely on.
    pub(crate) name: &'static str,
    pub(crate) status: Status,
    /// What was found.
    pub(crate) found: String,
    /// How to mend it, unless all is well.
    pub(crate) remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Check {
        Check {
            name,
            status: Status::Ok,
            found: found.into(),
            remedy: None,
        }
    }

    fn warn(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Check {
        let (found, remedy) = (found.into(), Some(remedy.into()));
        Check {
            name,
            status: Status::Warn,
            found,
            remedy,
        }
    }

    fn fail(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Check {
        let (found, remedy) = (found.into(), Some(remedy.into()));
        Check {
            name,
            status: Status::Fail,
            found,
            remedy,
        }
    }
}

/// The machine that is looked at.
#[derive(Debug, Clone)]
pub(crate) struct System {
    root: PathBuf,
    /// Directories that programs are looked for in.
    path: Vec<PathBuf>,
    store: PathBuf,
}

impl System {
    /// The machine we run on.
    fn this(store: &Path) -> System {
        let mut path: Vec<PathBuf> =
            std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
        // Where containerd's unit, the node installer and distributions put things, whatever the
        // PATH of the person who asks.
        for dir in [
            "/opt/kiln/bin",
            "/usr/local/bin",
            "/usr/local/sbin",
            "/usr/sbin",
            "/usr/bin",
        ] {
            path.push(dir.into());
        }
        if let Some(own) = std::env::current_exe()
            .ok()
            .as_deref()
            .and_then(Path::parent)
        {
            path.push(own.to_owned());
        }
        System {
            root: "/".into(),
            path,
            store: store.to_owned(),
        }
    }

    /// A file of the machine, by its absolute path.
    fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn read(&self, path: impl AsRef<Path>) -> Option<String> {
        std::fs::read_to_string(self.at(path)).ok()
    }

    /// Where a program lies.
    fn program(&self, name: &str) -> Option<PathBuf> {
        use std::os::unix::fs::PermissionsExt;
        self.path
            .iter()
            .map(|dir| self.at(dir).join(name))
            .find(|path| {
                path.metadata()
                    .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
            })
    }
}

/// Every check, in the order in which things depend on each other.
fn checks(system: &System) -> Vec<Check> {
    let report = kiln_kvm_probe::probe();
    let containerd = containerd::find(system);
    let mut checks = vec![kvm::runs_guests(&report)];
    checks.extend(kvm::hints(&report));
    checks.extend([
        kernel::user(),
        kernel::tun(system),
        kernel::userfaultfd(system),
        kernel::cgroup(system),
        containerd::installed(containerd.as_ref()),
        containerd::running(system),
        containerd::registered(system, containerd.as_ref()),
        programs::shim(system),
        programs::vmm(system),
        space::disk(system),
        space::memory(system),
        state::configuration(system),
        state::store(system),
    ]);
    checks
}

#[derive(Serialize)]
struct Report<'a> {
    pods_can_run: bool,
    checks: &'a [Check],
}

pub(crate) fn run(store: &Path, output: &Output) -> Result<ExitCode, Failure> {
    let checks = checks(&System::this(store));
    let pods_can_run = checks.iter().all(|check| check.status != Status::Fail);
    if output.is_json() {
        output.json(&Report {
            pods_can_run,
            checks: &checks,
        })?;
    } else {
        output.text(&render(&checks, output))?;
    }
    Ok(ExitCode::from(u8::from(!pods_can_run)))
}

/// `kiln containerd-config`.
pub(crate) fn containerd_config(store: &Path, output: &Output) -> Result<ExitCode, Failure> {
    let text = containerd::registration(&System::this(store))?;
    output.text(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn render(checks: &[Check], output: &Output) -> String {
    let width = checks
        .iter()
        .map(|check| check.name.len())
        .max()
        .unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let (colour, word) = match check.status {
            Status::Ok => (Colour::Green, "ok  "),
            Status::Warn => (Colour::Yellow, "warn"),
            Status::Fail => (Colour::Red, "FAIL"),
        };
        let status = output.paint(colour, word);
        text += &format!("{status}  {:width$}  {}\n", check.name, check.found);
        if let Some(remedy) = &check.remedy {
            for (i, line) in remedy.lines().enumerate() {
                let arrow = if i == 0 { "→ " } else { "  " };
                let line = output.paint(Colour::Dim, &format!("{arrow}{line}"));
                text += &format!("      {:width$}  {line}\n", "");
            }
        }
    }
    let count = |status| checks.iter().filter(|check| check.status == status).count();
    text += &match (count(Status::Fail), count(Status::Warn)) {
        (0, 0) => output.paint(Colour::Green, "\nPods can run here.\n"),
        (0, warnings) => format!(
            "\n{}, with {warnings} {} above.\n",
            output.paint(Colour::Green, "Pods can run here"),
            if warnings == 1 {
                "thing to note"
            } else {
                "things to note"
            }
        ),
        (failures, _) => format!(
            "\n{}: mend the {failures} marked FAIL above, from the top.\n",
            output.paint(Colour::Red, "Pods cannot run here")
        ),
    };
    text
}

#[cfg(test)]
mod tests;
