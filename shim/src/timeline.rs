//! Where the time of a pod's start goes: named steps with their beginning and length, as spans for
//! the log and as a file for `kiln trace`.

use std::fs;
use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracing::Instrument;

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Its name: where it happens, a dot, what it does.
    pub name: String,
    /// When it began, in microseconds after the start.
    pub start_us: u64,
    /// How long it took, in microseconds.
    pub duration_us: u64,
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
        });
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

    /// The steps in the order of their beginning.
    pub fn steps(&self) -> Vec<Step> {
        let mut steps = self.lock().clone();
        steps.sort_by_key(|s| s.start_us);
        steps
    }

    /// Writes them to a file.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        fs::write(path, serde_json::to_vec(&self.steps())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn steps_come_in_the_order_they_began_and_out_of_the_file_as_they_went_in() {
        let timeline = Timeline::default();
        let inner = timeline.clone();
        let answer = timeline
            .of("outer", async move { inner.time("inner", || 7) })
            .await;
        timeline.add("last", u64::from(u32::MAX), 1);
        assert_eq!(answer, 7);
        let names: Vec<_> = timeline.steps().into_iter().map(|s| s.name).collect();
        assert_eq!(names.last().map(String::as_str), Some("last"));
        assert_eq!(names.len(), 3);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        timeline.save(&path).unwrap();
        let read: Vec<Step> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        assert_eq!(read, timeline.steps());
    }
}
