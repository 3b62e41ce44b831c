//! Tables: one for each bench, all in `report.md`.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

use crate::result::{BenchResult, quantile};

/// A bench's result as a table in Markdown.
pub(crate) fn table(result: &BenchResult) -> String {
    let mut text = format!("## {}\n\n", result.name);
    let _ = writeln!(text, "Commit {}, {}.\n", result.commit, result.machine);
    text.push_str(
        "| what | median | quartiles | least | most | unit | n |\n|---|--:|--:|--:|--:|---|--:|\n",
    );
    for series in &result.series {
        let least = series.samples.iter().copied().fold(f64::INFINITY, f64::min);
        let most = series
            .samples
            .iter()
            .copied()
            .fold(f64::NEG_INFINITY, f64::max);
        let _ = writeln!(
            text,
            "| {} | {} | {} – {} | {} | {} | {} | {} |",
            series.name,
            number(series.median),
            number(quantile(&series.samples, 0.25)),
            number(quantile(&series.samples, 0.75)),
            number(least),
            number(most),
            series.unit,
            series.samples.len()
        );
    }
    if !result.ratios.is_empty() {
        text.push_str("\n| ratio of medians | |\n|---|--:|\n");
        for (name, ratio) in &result.ratios {
            let _ = writeln!(text, "| {name} | {ratio:.2} |");
        }
    }
    let _ = writeln!(text, "\n![{0}]({0}.svg)", result.name);
    text
}

/// Three significant digits, or all before the point.
pub(crate) fn number(value: f64) -> String {
    let magnitude = value.abs();
    if magnitude >= 100.0 || value == 0.0 {
        format!("{value:.0}")
    } else if magnitude >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// Writes `report.md` of every result in the folder, also those of earlier runs.
pub(crate) fn write(folder: &Path) -> Result<()> {
    let mut results = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("{}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == "json") {
            let text = std::fs::read_to_string(&path)?;
            let result: BenchResult = serde_json::from_str(&text)
                .with_context(|| format!("{} is not a bench's result", path.display()))?;
            results.push(result);
        }
    }
    results.sort_by(|one, other| one.name.cmp(&other.name));
    let mut report = String::from(
        "# Benches\n\nOnly ratios of things measured in one run mean something: the machine may be \
         emulated.\n",
    );
    for result in &results {
        let _ = write!(report, "\n{}", table(result));
    }
    let path = folder.join("report.md");
    std::fs::write(&path, report).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::Measured;

    #[test]
    fn the_report_has_every_bench_of_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["two", "one"] {
            let mut measured = Measured::default();
            measured.add("runc total", "ms", 12.3456);
            measured
                .named(name, "abc", "here")
                .write(folder.path())
                .unwrap();
        }
        write(folder.path()).unwrap();
        let report = std::fs::read_to_string(folder.path().join("report.md")).unwrap();
        let (one, two) = (report.find("## one"), report.find("## two"));
        assert!(one.is_some() && one < two, "{report}");
        assert!(
            report.contains("| runc total | 12.3 | 12.3 – 12.3 | 12.3 | 12.3 | ms | 1 |"),
            "{report}"
        );
    }

    #[test]
    fn numbers_are_as_long_as_they_are_good() {
        for (value, text) in [
            (0.0, "0"),
            (1.234, "1.23"),
            (12.34, "12.3"),
            (1234.5, "1234"),
        ] {
            assert_eq!(number(value), text);
        }
    }
}
