//! Tells whoever asks what a running pod's μVM is and takes. `kiln inspect POD` shows it.

use std::io;
use std::path::Path;

use kiln_node::inspect::{About, Answer};
use kiln_store::private;
use kiln_uvm::control::{Control, Figures};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;

/// Answers until the shim ends; the socket goes with the pod's directory.
pub(super) fn serve(path: &Path, vmm: Control, about: About) -> io::Result<()> {
    let listener = private::listen(path)?;
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (vmm, about) = (vmm.clone(), about.clone());
            tokio::spawn(async move {
                let asked = tokio::task::spawn_blocking(move || vmm.figures());
                // Whoever asks after the end gets no answer, which is true.
                if let Ok(Ok(figures)) = asked.await
                    && let Ok(text) = answer(about, figures)
                {
                    let _ = stream.write_all(text.as_bytes()).await;
                }
            });
        }
    });
    Ok(())
}

fn answer(about: About, figures: Figures) -> serde_json::Result<String> {
    serde_json::to_string(&Answer {
        about,
        cpus: figures.cpus,
        memory: figures.memory,
        paused: figures.paused,
        overlay: figures.overlays,
    })
}
