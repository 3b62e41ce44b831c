//! What a bench found, and the one form in which all benches of the project keep it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::curve::Curve;
use crate::picture;

/// Samples of one thing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) unit: String,
    pub(crate) samples: Vec<f64>,
    pub(crate) median: f64,
}

/// A bench's result as it is kept: `NAME.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct BenchResult {
    pub(crate) name: String,
    pub(crate) commit: String,
    pub(crate) machine: String,
    pub(crate) series: Vec<Series>,
    /// Of benches in which one thing depends on another.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) curves: Vec<Curve>,
    pub(crate) ratios: BTreeMap<String, f64>,
}

/// Samples while they are being taken. Series keep the order in which they first appear.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    series: Vec<Series>,
    curves: Vec<Curve>,
    ratios: BTreeMap<String, f64>,
}

impl Measured {
    /// Adds a sample of `name`.
    pub(crate) fn add(&mut self, name: &str, unit: &str, sample: f64) {
        let index = match self.series.iter().position(|series| series.name == name) {
            Some(index) => index,
            None => {
                self.series.push(Series {
                    name: name.to_owned(),
                    unit: unit.to_owned(),
                    samples: Vec::new(),
                    median: 0.0,
                });
                self.series.len() - 1
            }
        };
        let series = &mut self.series[index];
        series.samples.push(sample);
        series.median = median(&series.samples);
    }

    pub(crate) fn curve(&mut self, curve: Curve) {
        self.curves.push(curve);
    }

    /// Adds the ratio of two series' medians under the name `name`.
    pub(crate) fn ratio(&mut self, name: &str, of: &str, to: &str) -> Result<()> {
        let median = |wanted: &str| {
            let found = self.series.iter().find(|series| series.name == wanted);
            found
                .map(|series| series.median)
                .with_context(|| format!("no series {wanted}"))
        };
        let (of, to) = (median(of)?, median(to)?);
        anyhow::ensure!(to > 0.0, "ratio {name}: its second median is {to}");
        self.ratios.insert(name.to_owned(), of / to);
        Ok(())
    }

    pub(crate) fn named(self, name: &str, commit: &str, machine: &str) -> BenchResult {
        BenchResult {
            name: name.to_owned(),
            commit: commit.to_owned(),
            machine: machine.to_owned(),
            series: self.series,
            curves: self.curves,
            ratios: self.ratios,
        }
    }
}

impl BenchResult {
    /// Writes `NAME.json` and `NAME.svg`.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self).context("cannot write JSON")? + "\n";
        for (ending, content) in [("json", json), ("svg", picture::svg(self))] {
            let path = folder.join(format!("{}.{ending}", self.name));
            std::fs::write(&path, content)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

/// The middle sample, or the mean of the two in the middle; 0 of none.
pub(crate) fn median(samples: &[f64]) -> f64 {
    quantile(samples, 0.5)
}

/// The value below which this part of the samples is, between two samples in proportion; 0 of none.
pub(crate) fn quantile(samples: &[f64], part: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    // There are never so many samples that an f64 could not count them.
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss
    )]
    let (below, rest) = {
        let place = part * last as f64;
        (place as usize, place.fract())
    };
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_does_not_depend_on_order_or_outliers() {
        assert_eq!(median(&[3.0, 1.0, 1000.0]), 3.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
        assert_eq!(quantile(&[5.0, 1.0, 2.0, 3.0, 4.0], 0.25), 2.0);
        assert_eq!(quantile(&[1.0, 2.0], 0.75), 1.75);
    }

    #[test]
    fn a_result_is_kept_in_the_form_that_all_benches_share() {
        let mut measured = Measured::default();
        for (kiln, runc) in [(2.0, 1.0), (4.0, 2.0), (6.0, 4.0)] {
            measured.add("runc total", "ms", runc);
            measured.add("kiln total", "ms", kiln);
        }
        measured
            .ratio("kiln/runc", "kiln total", "runc total")
            .unwrap();
        assert!(measured.ratio("x", "kiln total", "no such").is_err());
        let folder = tempfile::tempdir().unwrap();
        let result = measured.named("pod-start", "abc", "here");
        result.write(folder.path()).unwrap();
        let text = std::fs::read_to_string(folder.path().join("pod-start.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["ratios"]["kiln/runc"], 2.0);
        assert_eq!(
            json["series"][0],
            serde_json::json!({"name": "runc total", "unit": "ms",
                "samples": [1.0, 2.0, 4.0], "median": 2.0})
        );
        assert_eq!(serde_json::from_str::<BenchResult>(&text).unwrap(), result);
    }
}
