//! Where the time of a start goes: named steps, measured from the process's first instruction on.

use std::time::Instant;

use kiln_vmm_control::Span;

/// Steps in the order they ended.
#[derive(Clone, Debug)]
pub struct Timeline {
    start: Instant,
    last: Instant,
    steps: Vec<Span>,
}

impl Default for Timeline {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            start: now,
            last: now,
            steps: Vec::with_capacity(16),
        }
    }
}

impl Timeline {
    /// Ends a step that began where the last one ended.
    pub fn mark(&mut self, name: &'static str) {
        let now = Instant::now();
        let ns = |d: std::time::Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
        self.steps.push(Span {
            name: name.into(),
            start_ns: ns(self.last - self.start),
            duration_ns: ns(now - self.last),
        });
        self.last = now;
    }

    /// Forgets the time since the last step, which was spent waiting for someone else.
    pub fn skip(&mut self) {
        self.last = Instant::now();
    }

    /// The steps.
    pub fn steps(&self) -> &[Span] {
        &self.steps
    }
}
