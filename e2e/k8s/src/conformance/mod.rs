//! Kubernetes' own suite of the runtime interface, critest, with kiln and with runc.
//!
//! [`run`] works on a node: it runs the suite area by area and keeps each area's report, so that a run that was broken off
//! goes on where it stopped. [`judge`] works anywhere: it reads the reports of all handlers and says where kiln's differ.

mod registry;
pub mod report;
pub mod verdict;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use report::Specs;
use verdict::{Counts, Exceptions, Verdict};

/// The one spec that no image of ours can serve: it pulls the original by its digest.
const LEFT_OUT: &str = "public image with digest";
/// How long an area may take: many times what it needs on an emulated machine.
const LIMIT: &str = "2h";
const NRI: &str = "/var/run/nri/nri.sock";
/// What the others are compared with.
const PEER: &str = "runc";

/// Which part of the suite is run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The folder of results; what is there already is not run again.
    #[arg(long)]
    pub results: PathBuf,
    /// The runtimes' handlers.
    #[arg(long = "runtime", default_values = ["kiln", "kiln-sandbox", PEER])]
    pub runtimes: Vec<String>,
    /// Only areas whose names contain this.
    #[arg(long, default_value = "")]
    pub area: String,
    /// No area is begun after so many seconds; those that are left wait for the next run.
    #[arg(long)]
    pub budget: Option<u64>,
}

/// Runs what has no result yet. Whether nothing is left.
pub fn run(options: &Options) -> Result<bool> {
    registry::serve()?;
    let begin = Instant::now();
    let areas = areas(&options.results)?;
    let wanted: Vec<&String> = areas
        .iter()
        .filter(|area| area.contains(&options.area))
        .collect();
    if wanted.is_empty() {
        bail!(
            "no area of critest's has {:?} in its name; it has: {}",
            options.area,
            areas.join(", ")
        );
    }
    for area in wanted {
        for runtime in &options.runtimes {
            let result = result(&options.results, runtime, area);
            if !result.is_file() {
                let spent = options
                    .budget
                    .is_some_and(|budget| begin.elapsed() > Duration::from_secs(budget));
                if spent {
                    println!(
                        "the time is used up; the next run goes on with {area:?} for {runtime}"
                    );
                    return Ok(false);
                }
                critest(runtime, area, &result)?;
            }
            println!(
                "{runtime}: {area}: {}",
                Counts::of(&report::read(&result, area)?)
            );
        }
    }
    Ok(true)
}

/// Where an area's report is kept.
fn result(results: &Path, runtime: &str, area: &str) -> PathBuf {
    results
        .join(runtime)
        .join(format!("{}.json", file_name(area)))
}

fn file_name(area: &str) -> String {
    let words = area.split(|letter: char| !letter.is_ascii_alphanumeric());
    let words: Vec<String> = words
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect();
    words.join("-")
}

/// The areas that critest has.
fn areas(results: &Path) -> Result<Vec<String>> {
    fs::create_dir_all(results).with_context(|| format!("making {}", results.display()))?;
    let list = results.join("all.json");
    let output = Command::new("critest")
        .arg("--ginkgo.dry-run")
        .arg(format!("--ginkgo.json-report={}", list.display()))
        .stdin(Stdio::null())
        .output()
        .context("cannot run critest; the node needs the part cri-tools, as one of suite k8s has (docs/node.md)")?;
    if !output.status.success() {
        bail!(
            "critest cannot list its specs: {}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
    let areas = report::areas(&list)?;
    fs::remove_file(&list).with_context(|| format!("removing {}", list.display()))?;
    Ok(areas)
}

/// Runs an area. Its report appears only when it came to its end.
fn critest(runtime: &str, area: &str, result: &Path) -> Result<()> {
    let folder = result.parent().context("a result lies in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let log_path = result.with_extension("log");
    let log = File::create(&log_path).with_context(|| format!("making {}", log_path.display()))?;
    let unfinished = result.with_extension("unfinished");
    let mut command = Command::new("critest");
    command
        .arg(format!("--runtime-handler={runtime}"))
        // What it is matched against begins with the suite's own name.
        .arg(format!("--ginkgo.focus={} ", escape(area)))
        .arg(format!("--ginkgo.skip={LEFT_OUT}"))
        .arg(format!("--ginkgo.timeout={LIMIT}"))
        .args(["--ginkgo.v", "--ginkgo.no-color"])
        .arg(format!("--ginkgo.json-report={}", unfinished.display()))
        .arg(format!(
            "--ginkgo.junit-report={}",
            result.with_extension("xml").display()
        ));
    if Path::new(NRI).exists() {
        command.arg(format!("--nri-socket={NRI}"));
    }
    let status = command
        .current_dir("/tmp")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .status()
        .context("cannot run critest")?;
    // That specs failed is in the report; without one, it was critest that did.
    fs::rename(&unfinished, result).with_context(|| {
        format!(
            "critest left no report ({status}); {} says more",
            log_path.display()
        )
    })
}

/// The text as a regular expression of Go's that matches it alone.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for letter in text.chars() {
        if r"\.+*?()|[]{}^$".contains(letter) {
            escaped.push('\\');
        }
        escaped.push(letter);
    }
    escaped
}

/// The specs of a runtime: of all areas that have a result.
fn specs(results: &Path, runtime: &str) -> Result<Specs> {
    let folder = results.join(runtime);
    let mut specs = Specs::new();
    let entries = fs::read_dir(&folder)
        .with_context(|| format!("no results of {runtime} in {}", results.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            for area in report::areas(&path)?
                .iter()
                .filter(|area| path == result(results, runtime, area))
            {
                specs.extend(report::read(&path, area)?);
            }
        }
    }
    Ok(specs)
}

/// The handlers that have results.
fn handlers(results: &Path) -> Result<Vec<String>> {
    let entries =
        fs::read_dir(results).with_context(|| format!("no results in {}", results.display()))?;
    let mut handlers = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            handlers.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    handlers.sort();
    Ok(handlers)
}

/// Says how each handler of kiln's differs from runc, writes it beside the results as `summary.txt`, and whether the run
/// stands.
pub fn judge(results: &Path, exceptions: &Path) -> Result<bool> {
    let exceptions = Exceptions::read(exceptions)?;
    let peer = specs(results, PEER)?;
    let mut summary = format!("{PEER}: {}\n", Counts::of(&peer));
    let mut holds = true;
    let handlers = handlers(results)?;
    for handler in handlers.iter().filter(|handler| *handler != PEER) {
        let specs = specs(results, handler)?;
        let verdict = Verdict::of(&specs, &peer, &exceptions);
        writeln!(summary, "\n{handler}: {}\n{verdict}", Counts::of(&specs))?;
        for name in &verdict.worse {
            let message = specs.get(name).map_or("", |spec| spec.message.trim());
            writeln!(summary, "{name}:\n{message}\n")?;
        }
        holds &= verdict.holds();
    }
    let path = results.join("summary.txt");
    fs::write(&path, &summary).with_context(|| format!("writing {}", path.display()))?;
    print!("{summary}");
    Ok(holds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_area_is_matched_literally_and_its_file_has_a_plain_name() {
        assert_eq!(escape("[k8s.io] A+B"), r"\[k8s\.io\] A\+B");
        assert_eq!(
            file_name("[k8s.io] Security Context"),
            "k8s-io-security-context"
        );
    }
}
