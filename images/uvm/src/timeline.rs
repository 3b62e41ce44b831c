//! Where the time of a start goes: named steps with their beginning and length, as spans for the log and as a file for
//! `kiln trace`.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_agent_api::proto::Span;
use kiln_store::private;
use kiln_vmm_control::Span as VmmSpan;
use serde::{Deserialize, Serialize};
use tracing::Instrument;

use crate::text::beginning;

/// The names of steps: where it happens, a dot, what it does.
pub mod step {
    /// All of a μVM's start, from the order to the guest's identity.
    pub const LAUNCH: &str = "launch";
    /// The VMM's process is started.
    pub const SPAWN: &str = "host.spawn";
    /// The μVM is picked, its files are opened, and what the host keeps for it is made.
    pub const FILES: &str = "host.files";
    /// A container's image is found among those that were made.
    pub const IMAGE_FIND: &str = "host.image.find";
    /// A container's image is made.
    pub const IMAGE_MAKE: &str = "host.image.make";
    /// The VMM resumes the machine.
    pub const RESUME: &str = "vmm.resume";
    /// Network cards after the first are plugged.
    pub const PLUG_NET: &str = "vmm.plug-net";
    /// The VMM is asked for the size that is wanted.
    pub const GROW: &str = "vmm.grow";
    /// The disks of a container's root are attached.
    pub const PLUG_ROOT: &str = "vmm.plug-root";
    /// The agent is connected to.
    pub const CONNECT: &str = "guest.connect";
    /// The guest takes its identity.
    pub const IDENTITY: &str = "guest.identity";
    /// The guest takes what was plugged into use.
    pub const GROWN: &str = "guest.grow";
    /// The guest's own files are written.
    pub const GUEST_FILES: &str = "guest.files";
    /// The guest makes the container.
    pub const CREATE: &str = "guest.create";
    /// The guest starts the container's first process.
    pub const START: &str = "guest.start";
}

/// How much of a guest's answer is believed to be a timeline: it goes into a file, and from there to a terminal.
const MOST_SPANS: usize = 64;
const LONGEST_NAME: usize = 64;

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Its name: where it happens, a dot, what it does.
    pub name: String,
    /// When it began, in microseconds after the start.
    pub start_us: u64,
    /// How long it took, in microseconds.
    pub duration_us: u64,
    /// The container whose start it belongs to, and is counted from; empty: the pod's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub container: String,
}

/// Steps, which may overlap. Clones share them.
#[derive(Debug, Clone)]
pub struct Timeline {
    start: Instant,
    steps: Arc<Mutex<Vec<Step>>>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            steps: Arc::default(),
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Timeline {
    fn lock(&self) -> MutexGuard<'_, Vec<Step>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Microseconds since the start.
    pub fn now(&self) -> u64 {
        micros(self.start.elapsed())
    }

    /// Adds a step that somebody else timed.
    pub fn add(&self, name: impl Into<String>, start_us: u64, duration_us: u64) {
        self.lock().push(Step {
            name: name.into(),
            start_us,
            duration_us,
            container: String::new(),
        });
    }

    /// Adds what the guest says it did in the step that began at `start_us`.
    pub fn add_guest(&self, step: &str, start_us: u64, spans: &[Span]) {
        for span in spans.iter().take(MOST_SPANS) {
            let told = beginning(&span.name, LONGEST_NAME).replace(char::is_control, "?");
            let start = start_us.saturating_add(span.start_us);
            self.add(format!("{step}.{told}"), start, span.duration_us);
        }
    }

    /// Adds what the VMM says it did in the step that began at `start_us`. It counts from its own start: only the
    /// lengths of its steps can be told exactly.
    pub(crate) fn add_vmm(&self, start_us: u64, steps: &[VmmSpan]) {
        let first = steps.first().map_or(0, |step| step.start_ns);
        for step in steps {
            let after = step.start_ns.saturating_sub(first) / 1000;
            let start = start_us.saturating_add(after);
            self.add(&*step.name, start, step.duration_ns / 1000);
        }
    }

    /// Times a function.
    pub fn time<T>(&self, name: &'static str, work: impl FnOnce() -> T) -> T {
        let _span = tracing::debug_span!("step", name).entered();
        let start = self.now();
        let result = work();
        self.add(name, start, self.now() - start);
        result
    }

    /// Times a future.
    pub async fn of<T>(&self, name: &'static str, work: impl Future<Output = T>) -> T {
        let start = self.now();
        let span = tracing::debug_span!("step", name);
        let result = work.instrument(span).await;
        self.add(name, start, self.now() - start);
        result
    }

    /// The steps in the order of their beginning; one that holds others comes before them.
    pub fn steps(&self) -> Vec<Step> {
        let mut steps = self.lock().clone();
        steps.sort_by_key(|s| (s.start_us, u64::MAX - s.duration_us));
        steps
    }
}

/// What `kiln trace` shows of a pod: the timeline of its launch, and that of each of its containers, in a file.
#[derive(Debug)]
pub struct Trace {
    path: PathBuf,
    launch: Timeline,
    containers: Mutex<Vec<Traced>>,
}

#[derive(Debug)]
struct Traced {
    id: String,
    name: String,
    timeline: Timeline,
}

impl Trace {
    /// Nothing is written yet.
    pub fn new(path: PathBuf, launch: Timeline) -> Self {
        Self {
            path,
            launch,
            containers: Mutex::default(),
        }
    }

    /// Has a container's timeline among the others.
    pub fn keep(&self, id: &str, name: &str, timeline: &Timeline) {
        let mut containers = self.lock();
        containers.retain(|known| known.id != id);
        containers.push(Traced {
            id: id.to_owned(),
            name: name.to_owned(),
            timeline: timeline.clone(),
        });
    }

    /// A container is gone, and its timeline from the next [`Trace::save`] on.
    pub fn forget(&self, id: &str) {
        self.lock().retain(|known| known.id != id);
    }

    /// Writes all to the file, as a whole: somebody may be reading it.
    pub fn save(&self) -> io::Result<()> {
        let mut steps = self.launch.steps();
        for traced in self.lock().iter() {
            steps.extend(traced.timeline.steps().into_iter().map(|step| Step {
                container: traced.name.clone(),
                ..step
            }));
        }
        private::replace(&self.path, &serde_json::to_vec(&steps)?)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Traced>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[tokio::test]
    async fn steps_come_in_the_order_they_began() {
        let timeline = Timeline::default();
        let inner = timeline.clone();
        let answer = timeline
            .of("outer", async move { inner.time("inner", || 7) })
            .await;
        timeline.add("last", u64::from(u32::MAX), 1);
        assert_eq!(answer, 7);
        let names: Vec<_> = timeline.steps().into_iter().map(|s| s.name).collect();
        assert_eq!(names.first().map(String::as_str), Some("outer"));
        assert_eq!(names.last().map(String::as_str), Some("last"));
        assert_eq!(names.len(), 3);
    }

    #[test]
    fn a_guest_that_tells_too_much_fills_nothing_and_breaks_nothing() {
        let timeline = Timeline::default();
        let span = Span {
            name: format!("\u{1b}{}", "ü".repeat(1 << 20)),
            start_us: u64::MAX,
            duration_us: u64::MAX,
            ..Default::default()
        };
        timeline.add_guest("guest.create", 7, &vec![span; 1000]);
        let steps = timeline.steps();
        assert_eq!(steps.len(), MOST_SPANS);
        assert_eq!(steps[0].start_us, u64::MAX);
        let told = steps[0].name.strip_prefix("guest.create.").unwrap();
        assert!(
            told.len() <= LONGEST_NAME && told.starts_with("?ü"),
            "{told}"
        );
    }

    #[test]
    fn a_containers_steps_are_in_the_file_until_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        let step = |name: &str, at: u64| {
            let timeline = Timeline::default();
            timeline.add(name, at, 1);
            timeline
        };
        let launch = step("launch", 7);
        let trace = Trace::new(path.clone(), launch.clone());
        let read = || -> Vec<Step> { serde_json::from_slice(&fs::read(&path).unwrap()).unwrap() };
        trace.save().unwrap();
        assert_eq!(read(), launch.steps());

        trace.keep("c1", "main", &step("create", 3));
        trace.keep("c2", "aside", &step("create", 2));
        // Started since.
        trace.keep("c1", "main", &step("start", 4));
        trace.save().unwrap();
        let all = read();
        let told: Vec<_> = all.iter().map(|s| (&*s.container, &*s.name)).collect();
        assert_eq!(
            told,
            [("", "launch"), ("aside", "create"), ("main", "start")]
        );

        trace.forget("c2");
        trace.save().unwrap();
        assert_eq!(read().len(), 2);
    }
}
