//! kiln beside runc: which differences are known, and what they are due to.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::report::{Outcome, Specs};

/// Why the list of exceptions cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("cannot read the exceptions {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// Its text.
    #[error("{} is no list of exceptions", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// An entry that says nothing.
    #[error("the exception of {spec:?} has no reason")]
    NoReason {
        /// Its first spec.
        spec: String,
    },
    /// A spec with two reasons.
    #[error("{spec:?} is listed twice among the exceptions")]
    Twice {
        /// The spec.
        spec: String,
    },
}

/// Specs that kiln cannot pass, by name, each with what in being a VM is the reason.
#[derive(Debug, Default)]
pub struct Exceptions(BTreeMap<String, String>);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(default)]
    exception: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    reason: String,
    specs: Vec<String>,
}

impl Exceptions {
    /// Reads `exceptions.toml`.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        let written: Written = toml::from_str(&text).map_err(|source| Error::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let mut all = BTreeMap::new();
        for Entry { reason, specs } in written.exception {
            for spec in specs {
                if reason.trim().is_empty() {
                    return Err(Error::NoReason { spec });
                }
                if all.insert(spec.clone(), reason.clone()).is_some() {
                    return Err(Error::Twice { spec });
                }
            }
        }
        Ok(Exceptions(all))
    }
}

/// How many specs came to what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Passed.
    pub passed: usize,
    /// Failed.
    pub failed: usize,
    /// Skipped.
    pub skipped: usize,
}

impl Counts {
    /// Of these specs.
    pub fn of(specs: &Specs) -> Self {
        let count = |outcome| {
            specs
                .values()
                .filter(|spec| spec.outcome == outcome)
                .count()
        };
        Counts {
            passed: count(Outcome::Passed),
            failed: count(Outcome::Failed),
            skipped: count(Outcome::Skipped),
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts {
            passed,
            failed,
            skipped,
        } = self;
        write!(out, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// What is to be said of kiln after both ran. All lists but the first two are what fails a run.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Listed, and kiln does not pass them.
    pub excepted: Vec<String>,
    /// Skipped with kiln, passed with runc, not listed: a feature that kiln does not claim to have.
    pub unclaimed: Vec<String>,
    /// Failed with kiln, passed with runc, not listed.
    pub worse: Vec<String>,
    /// Listed, and kiln passes them.
    pub mended: Vec<String>,
    /// Listed, and no spec has the name.
    pub unknown: Vec<String>,
}

impl Verdict {
    /// Compares. Specs that only one of the two ran say nothing.
    pub fn of(kiln: &Specs, runc: &Specs, exceptions: &Exceptions) -> Self {
        let mut verdict = Verdict::default();
        for (name, spec) in kiln {
            let listed = exceptions.0.contains_key(name);
            let runc_passes = runc
                .get(name)
                .is_some_and(|spec| spec.outcome == Outcome::Passed);
            let list = match (spec.outcome, listed) {
                (Outcome::Passed, true) => &mut verdict.mended,
                (_, true) => &mut verdict.excepted,
                (Outcome::Failed, false) if runc_passes => &mut verdict.worse,
                (Outcome::Skipped, false) if runc_passes => &mut verdict.unclaimed,
                _ => continue,
            };
            list.push(name.clone());
        }
        let unknown = exceptions.0.keys().filter(|name| !kiln.contains_key(*name));
        verdict.unknown = unknown.cloned().collect();
        verdict
    }

    /// Whether the run stands.
    pub fn holds(&self) -> bool {
        self.worse.is_empty() && self.mended.is_empty() && self.unknown.is_empty()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lists = [
            (
                "excepted",
                "does not pass, for a reason that is listed",
                &self.excepted,
            ),
            ("unclaimed", "skipped with kiln only", &self.unclaimed),
            (
                "worse",
                "fails with kiln only, and is not listed",
                &self.worse,
            ),
            (
                "mended",
                "passes with kiln: take it from the exceptions",
                &self.mended,
            ),
            ("unknown", "listed, but no spec has the name", &self.unknown),
        ];
        for (word, meaning, names) in lists.into_iter().filter(|(_, _, names)| !names.is_empty()) {
            writeln!(out, "{word}: {meaning}: {}", names.len())?;
            for name in names {
                writeln!(out, "  {name}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Spec;
    use super::*;

    fn specs(list: &[(&str, Outcome)]) -> Specs {
        let spec = |outcome| Spec {
            outcome,
            message: String::new(),
        };
        list.iter()
            .map(|(name, outcome)| ((*name).to_owned(), spec(*outcome)))
            .collect()
    }

    fn exceptions(text: &str) -> Result<Exceptions, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Exceptions::read(file.path())
    }

    const LISTED: &str = "[[exception]]\nreason = \"a VM\"\nspecs = [\"listed\", \"mended\"]\n";

    #[test]
    fn each_difference_is_in_the_list_that_it_belongs_in() {
        use Outcome::{Failed, Passed, Skipped};
        let kiln = specs(&[
            ("both fail", Failed),
            ("fine", Passed),
            ("listed", Failed),
            ("mended", Passed),
            ("no feature", Skipped),
            ("only kiln ran", Failed),
            ("worse", Failed),
        ]);
        let runc = specs(&[
            ("both fail", Failed),
            ("fine", Passed),
            ("listed", Passed),
            ("mended", Passed),
            ("no feature", Passed),
            ("worse", Passed),
        ]);
        let verdict = Verdict::of(&kiln, &runc, &exceptions(LISTED).unwrap());
        let expected = Verdict {
            excepted: vec!["listed".into()],
            unclaimed: vec!["no feature".into()],
            worse: vec!["worse".into()],
            mended: vec!["mended".into()],
            unknown: vec![],
        };
        assert_eq!(verdict, expected);
        assert!(!verdict.holds());
        assert!(
            verdict
                .to_string()
                .contains("worse: fails with kiln only, and is not listed: 1\n  worse\n")
        );
    }

    #[test]
    fn a_run_stands_on_known_differences_alone() {
        use Outcome::{Failed, Passed};
        let kiln = specs(&[("fine", Passed), ("listed", Failed), ("mended", Failed)]);
        let runc = specs(&[("fine", Passed), ("listed", Passed), ("mended", Passed)]);
        let listed = exceptions(LISTED).unwrap();
        assert!(Verdict::of(&kiln, &runc, &listed).holds());
        let without = specs(&[("fine", Passed), ("listed", Failed)]);
        let verdict = Verdict::of(&without, &runc, &listed);
        assert_eq!(verdict.unknown, ["mended"]);
        assert!(!verdict.holds());
    }

    #[test]
    fn an_exception_has_a_reason_and_one_only() {
        let no_reason = "[[exception]]\nreason = \" \"\nspecs = [\"a\"]\n";
        assert!(matches!(exceptions(no_reason), Err(Error::NoReason { .. })));
        let twice = "[[exception]]\nreason = \"x\"\nspecs = [\"a\", \"a\"]\n";
        assert!(matches!(exceptions(twice), Err(Error::Twice { .. })));
        let pattern = "[[exception]]\nreason = \"x\"\npattern = \"a.*\"\nspecs = []\n";
        assert!(matches!(exceptions(pattern), Err(Error::Parse { .. })));
    }

    #[test]
    fn counts_are_of_all_specs() {
        use Outcome::{Failed, Passed, Skipped};
        let counts = Counts::of(&specs(&[
            ("a", Passed),
            ("b", Passed),
            ("c", Failed),
            ("d", Skipped),
        ]));
        assert_eq!(counts.to_string(), "2 passed, 1 failed, 1 skipped");
    }
}
