//! `kiln trace`: draws where the time of a start went, from the file that whoever started something has kept.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use kiln_node::config::Config;
use kiln_node::pods;
use kiln_uvm::timeline::Step;

use crate::args;
use crate::failure::Failure;
use crate::output::{Colour, Output};

/// Columns of the picture.
const WIDTH: u64 = 32;

/// `kiln trace`.
pub(crate) fn run(
    config: &Config,
    options: &args::Trace,
    output: &Output,
) -> Result<ExitCode, Failure> {
    let path = match &options.name {
        None => crate::run::last_trace(),
        Some(name) => match crate::run::trace_of(name)? {
            Some(path) => path,
            None => of_pod(&config.state_dir, name)?,
        },
    };
    let bytes = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(anyhow::anyhow!(
                "nothing was timed yet: `kiln run` does, and so does every pod's start"
            )
            .into());
        }
        other => other.with_context(|| format!("reading {}", path.display()))?,
    };
    let steps: Vec<Step> = serde_json::from_slice(&bytes)
        .with_context(|| format!("{} is no timeline", path.display()))?;
    if output.is_json() {
        output.json(&steps)?;
    } else {
        output.text(&all_drawn(&steps, |bar| output.paint(Colour::Green, bar)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The file of a pod, by its id or the first digits of it.
fn of_pod(state: &Path, name: &str) -> Result<PathBuf> {
    let pod = pods::find(state, name)?.with_context(|| {
        format!(
            "neither a container of `kiln run` (see `kiln ps`) nor a pod (see `crictl pods`) that runs \
             here has the name or id {name}"
        )
    })?;
    Ok(pod.join(pods::TRACE))
}

/// The start of all, and below it that of each container.
fn all_drawn(steps: &[Step], paint: impl Fn(&str) -> String) -> String {
    let mut text = String::new();
    for steps in steps.chunk_by(|one, next| one.container == next.container) {
        let container = steps.first().map_or("", |step| &step.container);
        if !container.is_empty() {
            text += &format!("\ncontainer {container}\n");
        }
        text += &drawn(steps, &paint);
    }
    text
}

/// One line a step: when it began, how long it took, its name, and a bar.
pub(crate) fn drawn(steps: &[Step], paint: impl Fn(&str) -> String) -> String {
    let end = |step: &Step| step.start_us.saturating_add(step.duration_us);
    let total = steps.iter().map(end).max().unwrap_or(0);
    let column = |at: u64| {
        let at = u128::from(at) * u128::from(WIDTH) / u128::from(total.max(1));
        usize::try_from(at).unwrap_or(0)
    };
    let milliseconds = |us: u64| format!("{}.{:03} ms", us / 1000, us % 1000);
    let longest = steps.iter().map(|step| step.name.chars().count()).max();
    let longest = longest.unwrap_or(0);
    let mut text = format!("{:>14}  {:>14}  {:longest$}\n", "BEGAN AT", "TOOK", "STEP");
    for step in steps {
        let first = column(step.start_us).min(WIDTH as usize - 1);
        // One too short for a column is still there.
        let length = column(end(step)).saturating_sub(first).max(1);
        text += &format!(
            "{:>14}  {:>14}  {:longest$}  {}{}\n",
            milliseconds(step.start_us),
            milliseconds(step.duration_us),
            step.name,
            " ".repeat(first),
            paint(&"█".repeat(length)),
        );
    }
    text += &format!("{:>14}  {:>14}  all\n", "", milliseconds(total));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(name: &str, start_us: u64, duration_us: u64) -> Step {
        Step {
            name: name.into(),
            start_us,
            duration_us,
            container: String::new(),
        }
    }

    #[test]
    fn containers_are_drawn_each_for_itself() {
        let of = |container: &str, step: Step| Step {
            container: container.into(),
            ..step
        };
        let steps = [
            step("launch", 0, 30_000),
            of("main", step("create", 0, 4000)),
            of("main", step("start", 5000, 1000)),
            of("aside", step("create", 0, 2000)),
        ];
        let text = all_drawn(&steps, str::to_owned);
        let titles: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with("container "))
            .collect();
        assert_eq!(titles, ["container main", "container aside"]);
        for total in ["30.000 ms  all", "6.000 ms  all", "2.000 ms  all"] {
            assert!(text.contains(total), "{total} in {text}");
        }
    }

    #[test]
    fn bars_stand_where_their_steps_were() {
        let steps = [
            step("vmm.resume", 0, 16_000),
            step("agent.identity", 16_000, 15_999),
            step("short", 31_999, 1),
        ];
        let text = drawn(&steps, str::to_owned);
        let bar = |name: &str| {
            let line = text.lines().find(|line| line.contains(name)).unwrap();
            let bar = &line[line.find(name).unwrap()..];
            let cells: Vec<char> = bar.chars().skip("agent.identity  ".len()).collect();
            let first = cells.iter().position(|cell| *cell == '█').unwrap();
            (first, cells.len() - first)
        };
        assert_eq!(bar("vmm.resume"), (0, 16));
        assert_eq!(bar("agent.identity").0, 16);
        assert_eq!(bar("short"), (31, 1));
        assert!(text.contains("32.000 ms  all"), "{text}");
        assert!(drawn(&[], str::to_owned).contains("0.000 ms  all"));
    }

    #[test]
    fn pod_that_is_not_there_is_told_where_to_look() {
        let state = tempfile::tempdir().unwrap();
        fs::create_dir_all(pods::directory(state.path()).join("k8s.io/ef019")).unwrap();
        assert!(
            of_pod(state.path(), "ef01")
                .unwrap()
                .ends_with("ef019/trace.json")
        );
        let error = of_pod(state.path(), "no-such").unwrap_err().to_string();
        assert!(
            error.contains("kiln ps") && error.contains("no-such"),
            "{error}"
        );
    }
}
