//! What a running pod's μVM is and takes, for whoever asks: a socket in the pod's directory that answers every connection
//! with one JSON object.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_uvm::OverlayFigures;
use serde::{Deserialize, Serialize};

use crate::pods;

/// A shim answers at once or never.
const PATIENCE: Duration = Duration::from_secs(10);

/// What does not change while the pod runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The pod's id.
    pub pod: String,
    /// The baked μVM it was resumed from.
    pub uvm: String,
    /// The VMM's process id.
    pub vmm_pid: u32,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Which pod it is.
    #[serde(flatten)]
    pub about: About,
    /// vCPUs.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Whether it stands still.
    pub paused: bool,
    /// The writable layers of the pod's containers.
    pub overlay: Option<OverlayFigures>,
}

/// There is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The shim can't be asked.
    #[error("cannot ask the pod's shim by {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The shim said nothing that makes sense.
    #[error("the pod's shim did not answer: its μVM has ended")]
    Ended(#[source] serde_json::Error),
}

/// Asks the shim of the pod with this directory.
pub fn ask(pod: &Path) -> Result<Answer, AskError> {
    let path = pod.join(pods::INSPECT);
    let asked = || -> io::Result<String> {
        let mut stream = UnixStream::connect(&path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    let text = asked().map_err(|source| AskError::Socket {
        path: path.clone(),
        source,
    })?;
    serde_json::from_str(&text).map_err(AskError::Ended)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    #[test]
    fn answer_is_one_json_object_and_an_ended_pod_is_told_as_such() {
        let answer = Answer {
            about: About {
                pod: "p".into(),
                uvm: "u".into(),
                vmm_pid: 7,
            },
            cpus: 2,
            memory: 1 << 28,
            paused: false,
            overlay: Some(OverlayFigures {
                ram: 4096,
                read_spill: 512,
                ..Default::default()
            }),
        };
        let text = serde_json::to_string(&answer).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&json["vmm_pid"], &json["overlay"]["ram"]),
            (&7.into(), &4096.into())
        );

        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(ask(dir.path()), Err(AskError::Socket { .. })));
        let listener = UnixListener::bind(dir.path().join(pods::INSPECT)).unwrap();
        let answers = std::thread::spawn(move || {
            for text in [text.as_str(), ""] {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(text.as_bytes()).unwrap();
            }
        });
        assert_eq!(ask(dir.path()).unwrap(), answer);
        assert!(matches!(ask(dir.path()), Err(AskError::Ended(_))));
        answers.join().unwrap();
    }
}
