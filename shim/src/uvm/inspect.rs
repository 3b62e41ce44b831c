//! What a running pod's μVM is and takes, for whoever asks: a socket in the pod's directory that answers every
//! connection with one JSON object. `kiln inspect POD` shows it.

use std::io;
use std::path::Path;
use std::sync::Arc;

use kiln_store::private;
use kiln_vmm_control::{OverlayFigures, Reply, Request, Vmm};
use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;

/// What does not change while the pod runs.
#[derive(Debug, Clone, Serialize)]
pub(super) struct About {
    /// The pod's id.
    pub(super) pod: String,
    /// The baked μVM it was resumed from.
    pub(super) uvm: String,
    /// The VMM's process id.
    pub(super) vmm_pid: u32,
}

#[derive(Debug, Serialize)]
struct Answer<'a> {
    #[serde(flatten)]
    about: &'a About,
    cpus: u8,
    memory: u64,
    paused: bool,
    /// The writable layers of the pod's containers.
    overlay: Option<OverlayFigures>,
}

/// Answers until the shim ends; the socket goes with the pod's directory.
pub(super) fn serve(path: &Path, vmm: Arc<Vmm>, about: About) -> io::Result<()> {
    let listener = private::listen(path)?;
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (vmm, about) = (Arc::clone(&vmm), about.clone());
            tokio::spawn(async move {
                let asked = tokio::task::spawn_blocking(move || vmm.call(&Request::Stats, &[]));
                // Whoever asks after the end gets no answer, which is true.
                if let Ok(Ok(reply)) = asked.await
                    && let Some(text) = answer(&about, &reply)
                {
                    let _ = stream.write_all(text.as_bytes()).await;
                }
            });
        }
    });
    Ok(())
}

fn answer(about: &About, reply: &Reply) -> Option<String> {
    let Reply::Stats {
        cpus,
        memory,
        paused,
        overlays,
        ..
    } = reply
    else {
        return None;
    };
    serde_json::to_string(&Answer {
        about,
        cpus: *cpus,
        memory: *memory,
        paused: *paused,
        overlay: *overlays,
    })
    .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_has_the_figures_of_the_overlay() {
        let about = About {
            pod: "p".into(),
            uvm: "u".into(),
            vmm_pid: 7,
        };
        let reply = Reply::Stats {
            cpus: 2,
            memory: 1 << 28,
            paused: false,
            devices: Vec::new(),
            overlays: Some(OverlayFigures {
                ram: 4096,
                read_spill: 512,
                ..Default::default()
            }),
        };
        let json: serde_json::Value =
            serde_json::from_str(&answer(&about, &reply).unwrap()).unwrap();
        assert_eq!(json["vmm_pid"], 7);
        assert_eq!(json["overlay"]["ram"], 4096);
        assert_eq!(json["overlay"]["read_spill"], 512);
        assert!(answer(&about, &Reply::Done).is_none());
    }
}
