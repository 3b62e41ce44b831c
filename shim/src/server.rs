//! The shim in the background: its socket, its services, and its end.

use std::future::Future;
use std::io::{self, PipeReader};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::pod::Pod;
use crate::publisher::Publisher;
use crate::record::PodDir;
use crate::service::services;
use crate::spec::Spec;
use crate::uvm::Launcher;
use crate::{cleanup, log};
use kiln_node::config::Config;

/// How long the last events may take to be delivered.
const LAST_EVENTS: Duration = Duration::from_secs(3);
/// How long the answers under way may take.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// What a shim serves.
#[derive(Debug)]
pub struct Shim {
    /// containerd's namespace.
    pub namespace: String,
    /// The pod's id.
    pub group: String,
    /// The bundle it was started in.
    pub bundle: PathBuf,
    /// Its own address.
    pub address: String,
    /// containerd's, for events.
    pub ttrpc_address: String,
    /// Log at debug level.
    pub debug: bool,
    /// The configuration.
    pub config: Config,
}

impl Shim {
    /// The pod's directory.
    pub fn pod_dir(&self) -> PodDir {
        PodDir::new(&self.config.state_dir, &self.namespace, &self.group)
    }

    /// Serves until the pod is gone, then cleans up. Called in the background process; makes the
    /// runtime.
    pub fn run<L>(
        self,
        starter: PipeReader,
        listener: UnixListener,
        spec: Option<&Spec>,
        launcher: L,
    ) -> io::Result<()>
    where
        L: FnOnce(&Self) -> Arc<dyn Launcher>,
    {
        log::init(&self.bundle, self.debug || self.config.debug);
        // One thread: a shim waits nearly always, and there is one for every pod.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let result = runtime.block_on(self.serve(starter, listener, spec, launcher));
        // Threads that wait in open() for a FIFO's other end must not keep the process.
        runtime.shutdown_background();
        cleanup::orphans(&self.pod_dir());
        cleanup::pod(&self.pod_dir(), &self.address);
        result
    }

    async fn serve<L>(
        &self,
        starter: PipeReader,
        listener: UnixListener,
        spec: Option<&Spec>,
        launcher: L,
    ) -> io::Result<()>
    where
        L: FnOnce(&Self) -> Arc<dyn Launcher>,
    {
        let publisher = Publisher::start(&self.ttrpc_address, &self.namespace);
        let pod = Pod::new(
            &self.group,
            self.config.clone(),
            publisher.clone(),
            launcher(self),
        );
        if let Some(spec) = spec {
            pod.launch_ahead(spec);
        }
        listener.set_nonblocking(true)?;
        let listener = Listener::from(tokio::net::UnixListener::from_std(listener)?);
        let mut server = Server::new()
            .add_listener(listener)
            .register_service(services(&pod));
        server.start().await.map_err(io::Error::other)?;
        tracing::info!(
            pod = self.group,
            version = env!("CARGO_PKG_VERSION"),
            "serving"
        );

        let asked = wait_for_end(
            &pod,
            starter,
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        );
        // Awaited outside of the macro: a field of a disabled event is never evaluated.
        let reason = asked.await;
        tracing::info!(reason, "ending");
        pod.close().await;
        if !publisher.flush(LAST_EVENTS).await {
            tracing::warn!("containerd did not take the last events");
        }
        // The call that asked for the end has to be answered before the socket goes.
        if tokio::time::timeout(LAST_ANSWERS, server.shutdown())
            .await
            .is_err()
        {
            tracing::debug!("a connection was cut off");
        }
        Ok(())
    }
}

fn wait_for_end(
    pod: &Arc<Pod>,
    starter: PipeReader,
    mut terminate: tokio::signal::unix::Signal,
    mut interrupt: tokio::signal::unix::Signal,
) -> impl Future<Output = &'static str> {
    let pod = Arc::clone(pod);
    async move {
        tokio::select! {
            () = pod.until_shutdown() => "containerd asked for it",
            () = unknown_to_containerd(starter) => "`start` was killed before it had answered",
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    }
}

/// Returns if `start` ends without having answered. Nobody would ever ask anything of this shim.
async fn unknown_to_containerd(starter: PipeReader) {
    let word = async { Receiver::from_owned_fd(starter.into())?.read_u8().await };
    if word.await.is_ok() {
        std::future::pending::<()>().await;
    }
}
