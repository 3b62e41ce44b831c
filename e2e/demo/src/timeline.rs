//! A sequence of timed steps, drawn as bars under each other.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

#[derive(Debug, Default)]
pub(crate) struct Timeline {
    steps: Vec<Timed>,
    /// What came later and does not belong to the picture's scale.
    after: Vec<Timed>,
}

#[derive(Debug)]
struct Timed {
    name: &'static str,
    time: Duration,
}

const WIDTH: u128 = 48;

impl Timeline {
    /// Times the next step.
    pub(crate) async fn step<T>(
        &mut self,
        name: &'static str,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let (step, result) = timed(name, work).await;
        self.steps.push(step);
        result
    }

    /// Times something that comes after what the picture shows.
    pub(crate) async fn after<T>(
        &mut self,
        name: &'static str,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let (step, result) = timed(name, work).await;
        self.after.push(step);
        result
    }
}

async fn timed<T>(name: &'static str, work: impl Future<Output = Result<T>>) -> (Timed, Result<T>) {
    let start = Instant::now();
    let result = work.await.context(name);
    (
        Timed {
            name,
            time: start.elapsed(),
        },
        result,
    )
}

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: Duration = self.steps.iter().map(|step| step.time).sum();
        let column = |time: Duration| {
            let at = time.as_micros() * WIDTH / total.as_micros().max(1);
            usize::try_from(at).unwrap_or_default()
        };
        let mut start = Duration::ZERO;
        for Timed { name, time } in &self.steps {
            let from = column(start);
            // A step too short for a column is still there.
            let length = (column(start + *time) - from).max(1);
            let bar = format!("{}{}", " ".repeat(from), "█".repeat(length));
            writeln!(
                f,
                "  {name:<16} {bar:<50} {:>8.1} ms",
                time.as_secs_f64() * 1e3
            )?;
            start += *time;
        }
        writeln!(
            f,
            "  {:<16} {:<50} {:>8.1} ms",
            "total",
            "",
            total.as_secs_f64() * 1e3
        )?;
        for Timed { name, time } in &self.after {
            writeln!(
                f,
                "  {name:<16} {:<50} {:>8.1} ms",
                "",
                time.as_secs_f64() * 1e3
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_begins_where_the_one_before_ended() {
        let step = |name, milliseconds| Timed {
            name,
            time: Duration::from_millis(milliseconds),
        };
        let timeline = Timeline {
            steps: vec![step("a", 750), step("b", 249), step("c", 1)],
            after: vec![],
        };
        let drawn = timeline.to_string();
        let bar = |name: &str| {
            let line = drawn
                .lines()
                .find(|line| line.trim_start().starts_with(name))
                .unwrap();
            let cells: Vec<char> = line.chars().skip(19).take(50).collect();
            let first = cells.iter().position(|cell| *cell == '█').unwrap();
            (first, cells.iter().filter(|cell| **cell == '█').count())
        };
        assert_eq!(bar("a"), (0, 36));
        assert_eq!(bar("b"), (36, 11));
        assert_eq!(bar("c"), (47, 1));
        assert!(drawn.contains("total") && drawn.contains("1000.0 ms"));
    }
}
