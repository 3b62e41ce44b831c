//! Parts that are programs of Go modules.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{Recipe, Workshop};

/// Fetched as a module if another one is installed.
const TOOLCHAIN: &str = "go1.26.8";
/// The first that fetches another Go by itself.
const OLDEST: (u32, u32) = (1, 21);
/// What Go's caches and the programs take when nothing of them is there yet.
const SPACE_GIB: u64 = 12;

#[derive(Debug)]
pub(super) struct GoModule {
    /// A module of ours, which requires what is built and nothing else: go.mod and go.sum.
    pub(super) files: (&'static str, &'static str),
    /// The module whose packages are built.
    pub(super) of: &'static str,
    pub(super) tags: &'static str,
    /// String variables, NAME=VALUE, set as the programs are linked. `{version}` (v1.2.3), `{number}` (1.2.3), `{major}` and
    /// `{minor}` are the module's.
    pub(super) variables: &'static str,
    pub(super) programs: &'static [Program],
}

#[derive(Debug)]
pub(super) struct Program {
    name: &'static str,
    /// Its package, without the module's path.
    package: &'static str,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Program,
    /// The package's tests, as a program.
    Tests,
}

impl Program {
    pub(super) const fn new(name: &'static str, package: &'static str) -> Program {
        Program {
            name,
            package,
            kind: Kind::Program,
        }
    }

    pub(super) const fn tests(name: &'static str, package: &'static str) -> Program {
        Program {
            name,
            package,
            kind: Kind::Tests,
        }
    }
}

impl Recipe for GoModule {
    fn key(&self) -> Result<Vec<u8>> {
        let mut key = format!("{TOOLCHAIN}\n{:?}\n", self.environment());
        for program in self.programs {
            let arguments = self.arguments(program, Path::new(program.name))?;
            key.push_str(&format!("{arguments:?}\n"));
        }
        key.push_str(self.files.0);
        key.push_str(self.files.1);
        Ok(key.into_bytes())
    }

    fn write(&self, workshop: &Workshop) -> Result<()> {
        let go = find_go()?;
        for folder in go_caches(&go)?.iter().chain([&workshop.content]) {
            check_space(folder)?;
        }
        fs::write(workshop.scratch.join("go.mod"), self.files.0)?;
        fs::write(workshop.scratch.join("go.sum"), self.files.1)?;
        let bin = workshop.content.join("bin");
        fs::create_dir(&bin)?;
        let version = self.version()?;
        eprintln!(
            "node: building {} {version} with Go: minutes, or seconds if Go's cache has it already",
            self.of
        );
        for (number, program) in (1..).zip(self.programs) {
            eprintln!(
                "node: {} ({number} of {})",
                program.name,
                self.programs.len()
            );
            workshop.run(
                Command::new(&go)
                    .args(self.arguments(program, &bin.join(program.name))?)
                    .envs(self.environment())
                    .current_dir(&workshop.scratch),
                "if the disk is full, make room; if a module cannot be fetched, see to `go env GOPROXY`; \
                 then run it again: Go keeps what it has built",
            )?;
        }
        Ok(())
    }
}

impl GoModule {
    fn arguments(&self, program: &Program, output: &Path) -> Result<Vec<String>> {
        let verb: &[&str] = match program.kind {
            Kind::Program => &["build"],
            Kind::Tests => &["test", "-c"],
        };
        let mut linker = "-s -w".to_owned();
        for variable in self.stamped_variables()?.split_whitespace() {
            linker.push_str(&format!(" -X {variable}"));
        }
        let output = output.to_string_lossy();
        let package = format!("{}{}", self.of, program.package);
        let rest = [
            "-trimpath",
            "-tags",
            self.tags,
            "-ldflags",
            &linker,
            "-o",
            &output,
            &package,
        ];
        Ok(verb
            .iter()
            .chain(&rest)
            .map(|word| (*word).to_owned())
            .collect())
    }

    /// What must not depend on whose machine it is.
    fn environment(&self) -> [(&'static str, &'static str); 7] {
        [
            ("CGO_ENABLED", "0"),
            ("GOARCH", "amd64"),
            ("GOFLAGS", "-buildvcs=false"),
            ("GOOS", "linux"),
            ("GOTOOLCHAIN", TOOLCHAIN),
            ("GOWORK", "off"),
            ("GOAMD64", "v1"),
        ]
    }

    fn stamped_variables(&self) -> Result<String> {
        let version = self.version()?;
        let number = version.trim_start_matches('v');
        let mut numbers = number.split('.');
        let (major, minor) = (numbers.next(), numbers.next());
        Ok(self
            .variables
            .replace("{version}", version)
            .replace("{number}", number)
            .replace("{major}", major.unwrap_or_default())
            .replace("{minor}", minor.unwrap_or_default()))
    }

    /// The version that go.mod requires: the one place where it is written.
    fn version(&self) -> Result<&'static str> {
        self.files
            .0
            .lines()
            .filter_map(|line| {
                let mut words = line.trim().trim_start_matches("require ").split(' ');
                (words.next() == Some(self.of))
                    .then(|| words.next())
                    .flatten()
            })
            .find(|word| word.starts_with('v'))
            .with_context(|| format!("its go.mod requires no version of {}", self.of))
    }
}

/// A Go that is new enough to fetch the one that is wanted.
fn find_go() -> Result<PathBuf> {
    let mut candidates: Vec<PathBuf> = std::env::var_os("PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .map(|folder| folder.join("go"))
        .collect();
    candidates.push("/usr/local/go/bin/go".into());
    // Debian's packages of one version each.
    if let Ok(entries) = fs::read_dir("/usr/lib") {
        let folders = entries.filter_map(|entry| Some(entry.ok()?.path()));
        candidates.extend(
            folders
                .filter(|path| {
                    let name = path.file_name().and_then(|name| name.to_str());
                    name.is_some_and(|name| name.starts_with("go-"))
                })
                .map(|path| path.join("bin/go")),
        );
    }
    candidates
        .into_iter()
        .filter(|path| path.is_file())
        .find(|go| installed_version(go).is_some_and(|version| version >= OLDEST))
        .with_context(|| {
            format!(
                "it is built with Go, and no Go {}.{} or later is here: `make setup NODE=k8s` installs one",
                OLDEST.0, OLDEST.1
            )
        })
}

fn installed_version(go: &Path) -> Option<(u32, u32)> {
    let output = Command::new(go)
        .args(["env", "GOVERSION"])
        .env("GOTOOLCHAIN", "local")
        .current_dir("/")
        .output()
        .ok()?;
    parse_version(&String::from_utf8(output.stdout).ok()?)
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim().strip_prefix("go")?.split('.');
    let digits = |text: &str| {
        text.split(|c: char| !c.is_ascii_digit())
            .next()?
            .parse()
            .ok()
    };
    Some((digits(numbers.next()?)?, digits(numbers.next()?)?))
}

fn go_caches(go: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new(go)
        .args(["env", "GOCACHE", "GOMODCACHE"])
        .env("GOTOOLCHAIN", "local")
        .current_dir("/")
        .output()
        .with_context(|| format!("running {} env", go.display()))?;
    if !output.status.success() {
        bail!(
            "{} env: {}",
            go.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let text = String::from_utf8(output.stdout).context("Go's folders")?;
    Ok(text.lines().map(PathBuf::from).collect())
}

fn check_space(folder: &Path) -> Result<()> {
    let exists = folder
        .ancestors()
        .find(|ancestor| ancestor.is_dir())
        .with_context(|| format!("{} is not an absolute path", folder.display()))?;
    let system = nix::sys::statvfs::statvfs(exists)
        .with_context(|| format!("asking for the free space of {}", exists.display()))?;
    enough(folder, system.blocks_available() * system.fragment_size())
}

fn enough(folder: &Path, free: u64) -> Result<()> {
    if free >> 30 < SPACE_GIB {
        bail!(
            "building it takes up to {SPACE_GIB} GiB, and the disk of {} has {} GiB free: make room, or move what fills \
             it with KILN_CACHE, GOCACHE and GOMODCACHE",
            folder.display(),
            free >> 30
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: GoModule = GoModule {
        files: (
            "module kiln.test/x\n\nrequire (\n\texample.com/other v9.9.9 // indirect\n\texample.com/x v1.37.2 // indirect\n)\n\
             replace (\n\texample.com/x/y => example.com/x/y v0.37.2\n)\n",
            "sums\n",
        ),
        of: "example.com/x",
        tags: "no_btrfs",
        variables: "example.com/v.version={version} example.com/v.minor={minor}",
        programs: &[Program::new("one", "/cmd/one"), Program::tests("two", "")],
    };

    #[test]
    fn programs_are_built_with_the_version_that_go_mod_requires() {
        let one = MODULE
            .arguments(&MODULE.programs[0], Path::new("/out/one"))
            .unwrap();
        let linker = "-s -w -X example.com/v.version=v1.37.2 -X example.com/v.minor=37";
        assert_eq!(
            one,
            [
                "build",
                "-trimpath",
                "-tags",
                "no_btrfs",
                "-ldflags",
                linker,
                "-o",
                "/out/one",
                "example.com/x/cmd/one"
            ]
        );
        let two = MODULE
            .arguments(&MODULE.programs[1], Path::new("/out/two"))
            .unwrap();
        assert_eq!(two[..2], ["test", "-c"]);
        assert_eq!(two.last().unwrap(), "example.com/x");
    }

    #[test]
    fn the_key_changes_with_whatever_the_programs_depend_on() {
        let key = MODULE.key().unwrap();
        let (go_mod, go_sum) = MODULE.files;
        let leaked: &'static str = go_mod.replace("v9.9.9", "v9.9.8").leak();
        for other in [
            GoModule {
                files: (leaked, go_sum),
                ..MODULE
            },
            GoModule {
                files: (go_mod, "other sums\n"),
                ..MODULE
            },
            GoModule { tags: "", ..MODULE },
            GoModule {
                variables: "",
                ..MODULE
            },
            GoModule {
                programs: &MODULE.programs[..1],
                ..MODULE
            },
        ] {
            assert_ne!(other.key().unwrap(), key, "{other:?}");
        }
        assert_eq!(MODULE.key().unwrap(), key);
    }

    #[test]
    fn a_module_that_is_not_required_has_no_version() {
        let other = GoModule {
            of: "example.com/x/y",
            ..MODULE
        };
        let error = other.version().unwrap_err().to_string();
        assert_eq!(error, "its go.mod requires no version of example.com/x/y");
    }

    #[test]
    fn versions_of_go_are_told_apart() {
        assert_eq!(parse_version("go1.26.8\n"), Some((1, 26)));
        assert_eq!(parse_version("go1.21rc2"), Some((1, 21)));
        assert!(parse_version("go1.9").unwrap() < OLDEST);
        assert_eq!(parse_version("devel"), None);
    }

    #[test]
    fn a_disk_without_room_is_named_before_anything_is_built() {
        let folder = Path::new("/home/x/.cache/go-build");
        enough(folder, SPACE_GIB << 30).unwrap();
        let error = enough(folder, (SPACE_GIB << 30) - 1)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("/home/x/.cache/go-build has 11 GiB free"),
            "{error}"
        );
    }
}
