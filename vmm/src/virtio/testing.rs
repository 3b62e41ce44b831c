//! What tests of devices need in place of a transport: a sink that counts.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Interrupt, InterruptSink};

/// Counts interrupts and keeps the reason a device was stopped for.
#[derive(Debug, Default)]
pub struct RecordingSink {
    queues: [AtomicU32; 32],
    configs: AtomicU32,
    failure: Mutex<Option<String>>,
}

impl RecordingSink {
    /// A sink and the interrupt handle that leads to it.
    pub fn new() -> (Arc<Self>, Interrupt) {
        let sink = Arc::new(Self::default());
        (sink.clone(), Interrupt::new(sink))
    }

    /// How often this queue's interrupt was raised.
    pub fn queue_count(&self, index: usize) -> u32 {
        self.queues
            .get(index)
            .map_or(0, |n| n.load(Ordering::SeqCst))
    }

    /// How often the configuration interrupt was raised.
    pub fn config_count(&self) -> u32 {
        self.configs.load(Ordering::SeqCst)
    }

    /// Why the device was stopped, if it was.
    pub fn failure(&self) -> Option<String> {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl InterruptSink for RecordingSink {
    fn queue(&self, index: u16) {
        if let Some(n) = self.queues.get(usize::from(index)) {
            n.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn config(&self) {
        self.configs.fetch_add(1, Ordering::SeqCst);
    }

    fn fail(&self, reason: &str) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.to_owned());
    }
}
