//! The timed steps behind an answer.

use std::time::{Duration, Instant};

use kiln_agent_api::proto;

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Steps of one call.
#[derive(Debug)]
pub(crate) struct Spans {
    start: Instant,
    spans: Vec<proto::Span>,
}

impl Spans {
    /// From now on.
    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            spans: Vec::new(),
        }
    }

    /// Times what is awaited.
    pub(crate) async fn of<T>(&mut self, name: &str, step: impl Future<Output = T>) -> T {
        let begun = Instant::now();
        let result = step.await;
        self.add(name, begun);
        result
    }

    /// Times what is done at once.
    pub(crate) fn now<T>(&mut self, name: &str, step: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = step();
        self.add(name, begun);
        result
    }

    /// The steps of a step, which were timed on another thread.
    pub(crate) fn within(&mut self, name: &str, inner: Self) {
        let offset = microseconds(inner.start - self.start);
        for mut span in inner.spans {
            span.name = format!("{name}.{}", span.name);
            span.start_us += offset;
            self.spans.push(span);
        }
    }

    fn add(&mut self, name: &str, begun: Instant) {
        let mut span = proto::Span::new();
        span.name = name.to_owned();
        span.start_us = microseconds(begun - self.start);
        span.duration_us = microseconds(begun.elapsed());
        self.spans.push(span);
    }

    /// For the answer.
    pub(crate) fn finish(self) -> Vec<proto::Span> {
        self.spans
    }
}
