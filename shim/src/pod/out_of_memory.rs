//! What a pod does about memory that runs out: on the node, where its VMM may be chosen to be killed,
//! and in its guest, which tells of it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Container, Kind, Phase, Pod, Process, lock};
use crate::events::Event;
use crate::oom;
use crate::uvm::{GuestEvent, Uvm};

/// A container's OOM kills within this time are told as one: what is told of a container is that there were any.
const TOGETHER: Duration = Duration::from_secs(1);

impl Pod {
    /// Gives the VMM the score that goes with the containers there are now.
    pub(super) fn adjust_oom_score(&self) {
        let Some(uvm) = self.uvm.get() else {
            return;
        };
        if self.ended.borrow().is_some() {
            return;
        }
        let Some(of_pod) = lock(&self.setup).as_ref().map(|l| l.setup.oom_score_adj) else {
            return;
        };
        // Held until the score is set, so that the last change is the one that stays.
        let mut known = lock(&self.oom_score_adj);
        let score = {
            let containers = lock(&self.containers);
            let live = containers
                .values()
                .filter(|c| c.kind == Kind::Guest && c.init.phase() != Phase::Stopped);
            oom::of_containers(of_pod, live.map(|c| c.oom_score_adj))
        };
        if score == known.unwrap_or(of_pod) {
            return;
        }
        match uvm.set_oom_score(score) {
            Ok(()) => *known = Some(score),
            Err(error) => tracing::warn!(error = error.chain(), "the pod keeps its OOM score"),
        }
    }

    /// Tells that a container's first process, which is about to be told as ended, went with the VMM for want of memory.
    pub(super) fn tell_killed_for_memory(&self, container: &Container, process: &Process) {
        let ran = matches!(process.phase(), Phase::Running | Phase::Paused);
        if ran && container.kind == Kind::Guest && process.exec_id().is_empty() {
            self.publisher.publish(&Event::Oom {
                container: container.id.clone(),
            });
        }
    }

    /// Passes on what the guest tells unasked.
    pub(super) async fn follow_events(self: Arc<Self>, uvm: Arc<dyn Uvm>) {
        let mut told = Told::default();
        while let Some(GuestEvent::Oom { container }) = uvm.next_event().await {
            if !self.has_container(&container) || !told.is_news(&container, Instant::now()) {
                continue;
            }
            told.forget_all_but(|known| self.has_container(known));
            self.publisher.publish(&Event::Oom { container });
        }
    }
}

/// When each container's last OOM event was passed on. A guest may send any number, and the events that
/// containerd doesn't take at once would crowd out others.
#[derive(Debug, Default)]
struct Told(HashMap<String, Instant>);

impl Told {
    fn is_news(&mut self, container: &str, now: Instant) -> bool {
        let last = self.0.get(container);
        if last.is_some_and(|last| now.saturating_duration_since(*last) < TOGETHER) {
            return false;
        }
        self.0.insert(container.to_owned(), now);
        true
    }

    fn forget_all_but(&mut self, is_known: impl Fn(&str) -> bool) {
        self.0.retain(|container, _| is_known(container));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_oom_events_is_one_a_second_for_each_container() {
        let mut told = Told::default();
        let start = Instant::now();
        let passed = (0..3000)
            .filter(|ms| told.is_news("c", start + Duration::from_millis(*ms)))
            .count();
        assert_eq!(passed, 3);
        assert!(told.is_news("d", start));
        told.forget_all_but(|container| container == "c");
        assert_eq!(told.0.len(), 1);
    }
}
