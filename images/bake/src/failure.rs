//! A guest that fails while it is baked, and what it wrote on its console until then.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use kiln_uvm::machine::{Machine, Start, in_time};
use kiln_uvm::{Error as UvmError, jail, words};

use crate::bake::{BakeError, Order};
use crate::console::Console;

/// A stage of the bake, whose failures show the end of the guest's console.
#[derive(Debug)]
pub(crate) struct Stage<'a> {
    pub(crate) name: &'static str,
    pub(crate) console: &'a Console,
}

impl Stage<'_> {
    pub(crate) fn failed(&self, error: impl Into<UvmError>) -> BakeError {
        BakeError::Machine {
            stage: self.name,
            what: chain(&error.into()),
            console: self.console.end(),
        }
    }

    /// Waits no longer than a machine that works takes.
    pub(crate) async fn within<T>(
        &self,
        limit: Duration,
        action: &'static str,
        work: impl Future<Output = Result<T, UvmError>>,
    ) -> Result<T, BakeError> {
        let done = in_time(action, limit, work).await;
        done.map_err(|error| self.failed(error))
    }

    pub(crate) fn wrong(&self, problem: impl Into<String>) -> BakeError {
        BakeError::Wrong {
            stage: self.name,
            problem: problem.into(),
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Starts a VMM in a jail, if there is the right to lock one in.
pub(crate) fn start(order: &Order) -> Result<Machine, UvmError> {
    let (log, words) =
        words::pipe(|_| {}).map_err(UvmError::system("make a pipe for the VMM's log"))?;
    Machine::start(Start {
        program: &order.vmm,
        jail: jail::of_this_process(order.vmm_ids)?,
        log,
        words: Some(words),
        oom_kills: Box::new(|| false),
    })
}

/// A new console, and the VMM's end of it.
pub(crate) fn console() -> Result<(Console, File), BakeError> {
    Console::open().map_err(|source| BakeError::System {
        action: "read the guest's console",
        source,
    })
}

/// The socket through which the guest is reached.
pub(crate) fn listen(path: &Path) -> Result<UnixListener, UvmError> {
    UnixListener::bind(path).map_err(UvmError::file("listen on", path))
}
