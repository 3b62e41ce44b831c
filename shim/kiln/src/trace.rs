//! Where the time of a start went: a list of named steps, kept in a file by whoever starts something, and
//! drawn by `kiln trace`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kiln_agent_api::proto::Span;
use kiln_vmm_control::Step as VmmStep;
use serde::{Deserialize, Serialize};

use crate::args;
use crate::failure::Failure;
use crate::output::{Colour, Output};

/// Where the runtime that containerd starts keeps what it knows of pods: `NAMESPACE/POD/trace.json`.
const PODS: &str = "/run/kiln/pods";
/// Columns of the picture.
const WIDTH: u64 = 32;

/// One step, as the runtime writes it down too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Step {
    /// Where it happens, a dot, what it does.
    pub(crate) name: String,
    /// Microseconds after the start.
    pub(crate) start_us: u64,
    pub(crate) duration_us: u64,
    /// The pod's container whose start it belongs to, and is counted from; empty: the start of all.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) container: String,
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Steps as they are done; steps within a step may be added later.
#[derive(Debug)]
pub(crate) struct Timeline {
    begun: Instant,
    steps: Vec<Step>,
}

impl Timeline {
    pub(crate) fn begin() -> Timeline {
        Timeline {
            begun: Instant::now(),
            steps: Vec::new(),
        }
    }

    /// Microseconds since the beginning.
    pub(crate) fn now(&self) -> u64 {
        micros(self.begun.elapsed())
    }

    fn add(&mut self, name: impl Into<String>, start_us: u64, duration_us: u64) {
        self.steps.push(Step {
            name: name.into(),
            start_us,
            duration_us,
            container: String::new(),
        });
    }

    /// Notes a step that began at `start` and ends now.
    pub(crate) fn since(&mut self, name: &str, start: u64) {
        let duration = self.now().saturating_sub(start);
        self.add(name, start, duration);
    }

    /// What the VMM did in the step that began at `start`.
    pub(crate) fn add_vmm(&mut self, start: u64, steps: &[VmmStep]) {
        for step in steps {
            let name = format!("vmm.{}", step.name);
            self.add(name, start + step.start_ns / 1000, step.duration_ns / 1000);
        }
    }

    /// What the guest's agent did in the step that began at `start`.
    pub(crate) fn add_guest(&mut self, start: u64, spans: &[Span]) {
        for span in spans {
            let name = format!("guest.{}", span.name);
            self.add(name, start.saturating_add(span.start_us), span.duration_us);
        }
    }

    /// In the order of their beginning; a step that holds others comes before them.
    pub(crate) fn steps(&self) -> Vec<Step> {
        let mut steps = self.steps.clone();
        steps.sort_by_key(|step| (step.start_us, u64::MAX - step.duration_us));
        steps
    }

    /// Keeps them in a file.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        // Others may be keeping theirs in the same place.
        let fresh = path.with_extension(std::process::id().to_string());
        fs::write(&fresh, serde_json::to_vec(&self.steps())?)
            .and_then(|()| fs::rename(&fresh, path))
            .with_context(|| format!("writing {}", path.display()))
    }
}

/// `kiln trace`.
pub(crate) fn run(options: &args::Trace, output: &Output) -> Result<ExitCode, Failure> {
    let path = match &options.name {
        None => crate::run::last_trace(),
        Some(name) => match crate::run::trace_of(name)? {
            Some(path) => path,
            None => of_pod(Path::new(PODS), name)?,
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
fn of_pod(root: &Path, name: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for namespace in entries(root)? {
        for pod in entries(&namespace)? {
            let id = pod.file_name().unwrap_or_default().to_string_lossy();
            let path = pod.join("trace.json");
            if id == name {
                return Ok(path);
            }
            if name.len() >= 4 && id.starts_with(name) {
                found.push(path);
            }
        }
    }
    match found.len() {
        0 => bail!(
            "neither a container of `kiln run` (see `kiln ps`) nor a pod (see `crictl pods`) that runs \
             here has the name or id {name}"
        ),
        1 => Ok(found.remove(0)),
        many => bail!("{many} pods have an id that begins with {name}: give more of it"),
    }
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("reading {}", dir.display()))?,
    };
    let mut paths = Vec::new();
    for entry in list {
        let entry = entry.with_context(|| format!("reading {}", dir.display()))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            paths.push(entry.path());
        }
    }
    Ok(paths)
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
    fn steps_are_kept_in_the_order_they_began_with_the_holder_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut timeline = Timeline::begin();
        timeline.add_guest(
            10,
            &[Span {
                name: "clock".into(),
                start_us: 0,
                duration_us: 5,
                ..Default::default()
            }],
        );
        timeline.add("agent.identity", 10, 50);
        let path = dir.path().join("trace.json");
        timeline.save(&path).unwrap();
        let read: Vec<Step> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let names: Vec<&str> = read.iter().map(|step| &*step.name).collect();
        assert_eq!(names, ["agent.identity", "guest.clock"]);
    }

    #[test]
    fn pod_is_found_by_the_first_digits_of_its_id() {
        let root = tempfile::tempdir().unwrap();
        for id in ["abcd1", "abcd2", "ef019"] {
            fs::create_dir_all(root.path().join("k8s.io").join(id)).unwrap();
        }
        let found = of_pod(root.path(), "ef01").unwrap();
        assert_eq!(found, root.path().join("k8s.io/ef019/trace.json"));
        assert!(of_pod(root.path(), "abcd1").is_ok());
        for (wrong, why) in [
            ("abcd", "2 pods"),
            ("ab", "kiln ps"),
            ("no-such", "kiln ps"),
        ] {
            let error = of_pod(root.path(), wrong).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        assert!(of_pod(Path::new("/no/such/place"), "abcd").is_err());
    }
}
