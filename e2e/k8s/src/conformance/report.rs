//! What a suite said of its specs: Ginkgo's JSON report, of which a few fields are read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// What became of a spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// It ran and passed.
    Passed,
    /// It did not pass: failed, panicked, ran out of time, was interrupted.
    Failed,
    /// It skipped itself or is pending.
    Skipped,
}

/// Specs by their full names.
pub type Specs = BTreeMap<String, Spec>;

/// One spec of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// What became of it.
    pub outcome: Outcome,
    /// Why it failed or was skipped; may be empty.
    pub message: String,
}

/// A report that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("cannot read the report {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// Its text.
    #[error("{} is no report of Ginkgo's: remove it to have its area run again", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    #[serde(default)]
    spec_reports: Option<Vec<SpecReport>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SpecReport {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    #[serde(default)]
    leaf_node_text: String,
    state: String,
    failure: Option<Failure>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    #[serde(default)]
    message: String,
}

impl SpecReport {
    fn outcome(&self) -> Outcome {
        match self.state.as_str() {
            "passed" => Outcome::Passed,
            "skipped" | "pending" => Outcome::Skipped,
            _ => Outcome::Failed,
        }
    }

    /// The texts of all that it stands in, and its own.
    fn name(&self) -> String {
        let around = self.container_hierarchy_texts.iter().flatten();
        let texts: Vec<&str> = around
            .map(String::as_str)
            .chain([self.leaf_node_text.as_str()])
            .filter(|text| !text.is_empty())
            .collect();
        texts.join(" ")
    }

    /// The outermost container's text.
    fn area(&self) -> Option<&str> {
        self.container_hierarchy_texts
            .as_ref()?
            .first()
            .map(String::as_str)
    }

    /// What is set up before all specs is one too, but only if it fails.
    fn counts(&self) -> bool {
        self.leaf_node_type == "It" || self.outcome() == Outcome::Failed
    }
}

fn parse(path: &Path) -> Result<Vec<SpecReport>, Error> {
    let text = std::fs::read(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })?;
    let suites: Vec<Suite> = serde_json::from_slice(&text).map_err(|source| Error::Parse {
        path: path.to_owned(),
        source,
    })?;
    let specs = suites.into_iter().filter_map(|suite| suite.spec_reports);
    Ok(specs.flatten().collect())
}

/// The specs of a report whose area is `area`: what the run's focus left out is in the report as skipped.
pub fn read(path: &Path, area: &str) -> Result<Specs, Error> {
    let mut specs = Specs::new();
    for report in parse(path)?.into_iter().filter(SpecReport::counts) {
        if report.area().is_some_and(|other| other != area) {
            continue;
        }
        let spec = Spec {
            outcome: report.outcome(),
            message: report
                .failure
                .as_ref()
                .map(|failure| failure.message.clone())
                .unwrap_or_default(),
        };
        let name = match report.name() {
            name if name.is_empty() => format!("{area}: {}", report.leaf_node_type),
            name => name,
        };
        specs.insert(name, spec);
    }
    Ok(specs)
}

/// The areas that a report has, in the order of their first specs.
pub fn areas(path: &Path) -> Result<Vec<String>, Error> {
    let mut areas: Vec<String> = Vec::new();
    for report in parse(path)?
        .iter()
        .filter(|report| report.leaf_node_type == "It")
    {
        let area = report.area().unwrap_or_default();
        if !areas.iter().any(|known| known == area) {
            areas.push(area.to_owned());
        }
    }
    Ok(areas)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"[{"SuitePath": "/", "SpecReports": [
        {"ContainerHierarchyTexts": null, "LeafNodeType": "BeforeSuite", "LeafNodeText": "", "State": "passed"},
        {"ContainerHierarchyTexts": ["Image", "pulling"], "LeafNodeType": "It", "LeafNodeText": "works", "State": "passed"},
        {"ContainerHierarchyTexts": ["Image"], "LeafNodeType": "It", "LeafNodeText": "is listed", "State": "timedout",
         "Failure": {"Message": "too long", "Location": {}}},
        {"ContainerHierarchyTexts": ["Pod"], "LeafNodeType": "It", "LeafNodeText": "runs", "State": "skipped"}
    ]}]"#;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn the_specs_of_one_area_are_read_with_what_became_of_them() {
        let specs = read(file(REPORT).path(), "Image").unwrap();
        let outcomes: Vec<(&str, Outcome, &str)> = specs
            .iter()
            .map(|(name, spec)| (name.as_str(), spec.outcome, spec.message.as_str()))
            .collect();
        assert_eq!(
            outcomes,
            [
                ("Image is listed", Outcome::Failed, "too long"),
                ("Image pulling works", Outcome::Passed, ""),
            ]
        );
    }

    #[test]
    fn a_set_up_that_failed_is_a_failure_of_the_area() {
        let failed = REPORT.replacen("passed", "failed", 1);
        let specs = read(file(&failed).path(), "Pod").unwrap();
        assert_eq!(specs["Pod: BeforeSuite"].outcome, Outcome::Failed);
    }

    #[test]
    fn areas_are_the_outermost_containers() {
        assert_eq!(areas(file(REPORT).path()).unwrap(), ["Image", "Pod"]);
    }

    #[test]
    fn a_report_that_broke_off_is_named_with_the_remedy() {
        let error = read(file("[{\"SpecRep").path(), "Pod")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("remove it to have its area run again"),
            "{error}"
        );
    }
}
