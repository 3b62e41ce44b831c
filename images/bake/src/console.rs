//! What a guest writes on its console while it is baked.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_agent_api::READY_LINE;
use tokio::sync::watch;

/// How much of it is kept, for the case that it says why the guest failed.
const KEPT: usize = 64 << 10;
/// How many lines of it a message shows: a panic has its cause at its top.
const LINES: usize = 80;

/// The end of what a guest wrote.
#[derive(Debug)]
pub(crate) struct Console {
    kept: Arc<Mutex<Vec<u8>>>,
    ready: watch::Receiver<bool>,
}

impl Console {
    /// Collects what is written to the returned file.
    pub(crate) fn open() -> io::Result<(Console, File)> {
        let (mut reader, writer) = io::pipe()?;
        let kept = Arc::new(Mutex::new(Vec::new()));
        let (tell, ready) = watch::channel(false);
        let keeping = Arc::clone(&kept);
        let wanted = READY_LINE.trim_ascii_end();
        let read = move || {
            let mut buffer = [0; 4096];
            // Ends with the last writer: the VMM.
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                let mut kept = keeping.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(&buffer[..length]);
                if kept.windows(wanted.len()).any(|part| part == wanted) {
                    tell.send_replace(true);
                }
                let surplus = kept.len().saturating_sub(KEPT);
                kept.drain(..surplus);
            }
        };
        std::thread::Builder::new()
            .name("console".to_owned())
            .spawn(read)?;
        Ok((Console { kept, ready }, File::from(OwnedFd::from(writer))))
    }

    /// Comes back when the agent has written that it is ready; never, if it doesn't.
    pub(crate) async fn ready(&self) {
        let mut ready = self.ready.clone();
        if ready.wait_for(|ready| *ready).await.is_err() {
            std::future::pending().await
        }
    }

    /// The last lines, as a message shows them; nothing, if there are none.
    pub(crate) fn end(&self) -> String {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&kept).replace('\r', "");
        let lines: Vec<&str> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(LINES)..];
        if last.is_empty() {
            return String::new();
        }
        format!("\nthe end of the guest's console:\n  {}", last.join("\n  "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn readiness_is_heard_and_the_last_lines_are_kept() {
        let (console, mut file) = Console::open().unwrap();
        assert_eq!(console.end(), "");
        for line in 0..100 {
            writeln!(file, "line {line}\r").unwrap();
        }
        file.write_all(READY_LINE).unwrap();
        console.ready().await;
        let end = console.end();
        assert!(
            end.contains("line 99\n") && !end.contains("line 5\n"),
            "{end}"
        );
    }
}
