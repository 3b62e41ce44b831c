//! Working in another network namespace, on a thread of its own.

use std::fs::File;
use std::io;
use std::thread;

use nix::sched::{CloneFlags, setns};
use rtnetlink::Handle;

use super::NetworkError;

/// Runs `work` in the namespace. A namespace belongs to a thread, so the thread ends with the work.
pub fn enter<T, F>(netns: &File, work: F) -> Result<T, NetworkError>
where
    F: FnOnce() -> Result<T, NetworkError> + Send,
    T: Send,
{
    thread::scope(|scope| {
        scope
            .spawn(|| {
                setns(netns, CloneFlags::CLONE_NEWNET)
                    .map_err(|e| NetworkError::Enter(e.into()))?;
                work()
            })
            .join()
            .unwrap_or(Err(NetworkError::Thread))
    })
}

/// Runs `work` there with a netlink handle of the namespace.
pub(super) fn run<T, F>(netns: &File, work: F) -> Result<T, NetworkError>
where
    F: AsyncFnOnce(Handle) -> Result<T, NetworkError> + Send,
    T: Send,
{
    enter(netns, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(NetworkError::Enter)?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(|e: io::Error| NetworkError::Enter(e))?;
            let connection = tokio::spawn(connection);
            let result = work(handle).await;
            connection.abort();
            result
        })
    })
}
