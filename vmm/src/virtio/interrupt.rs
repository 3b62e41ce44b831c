//! How a device speaks to its driver.

use std::fmt::{self, Debug};
use std::sync::Arc;

/// The transport's end of a device's interrupts.
pub trait InterruptSink: Send + Sync {
    /// Tells the driver that this queue has used buffers.
    fn queue(&self, index: u16);
    /// Tells the driver that configuration space changed; bumps the config generation first.
    fn config(&self);
    /// Declares the device broken.
    fn fail(&self, reason: &str);
}

/// A cheap handle to a device's interrupts, usable from any thread.
#[derive(Clone)]
pub struct Interrupt(Arc<dyn InterruptSink>);

impl Interrupt {
    /// Wraps a transport's sink.
    pub fn new(sink: Arc<dyn InterruptSink>) -> Self {
        Self(sink)
    }

    /// Raises the interrupt of a queue. Call it only if the queue's `needs_notification` says so.
    pub fn signal_queue(&self, index: u16) {
        self.0.queue(index);
    }

    /// Raises the configuration change interrupt. Change what `read_config` answers first.
    pub fn signal_config(&self) {
        self.0.config();
    }

    /// Stops the device because of what its driver did: logs `reason`, sets DEVICE_NEEDS_RESET and raises
    /// the configuration interrupt. No events are delivered until the driver resets the device.
    pub fn fail_device(&self, reason: impl fmt::Display) {
        self.0.fail(&reason.to_string());
    }
}

impl Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Interrupt")
    }
}
