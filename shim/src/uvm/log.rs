//! What a VMM says: its standard error, line by line into the shim's log. The last line is kept, for
//! it says why a VMM ended.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// Longest line that is kept whole.
const LONGEST: usize = 4096;

/// The last thing a VMM said.
#[derive(Debug, Clone, Default)]
pub(super) struct LastLine(Arc<Mutex<String>>);

impl LastLine {
    pub(super) fn get(&self) -> String {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, line: &str) {
        line.clone_into(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// A pipe for a VMM's standard error, read until the VMM has closed it.
pub(super) fn pipe() -> io::Result<(File, LastLine)> {
    let (ours, theirs) = io::pipe()?;
    let reader = pipe::Receiver::from_owned_fd(ours.into())?;
    let last = LastLine::default();
    tokio::spawn(follow(reader, last.clone()));
    Ok((File::from(std::os::fd::OwnedFd::from(theirs)), last))
}

async fn follow(mut reader: pipe::Receiver, last: LastLine) {
    let mut line = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(n @ 1..) = reader.read(&mut buffer).await {
        for byte in &buffer[..n] {
            if *byte == b'\n' || line.len() >= LONGEST {
                tell(&line, &last);
                line.clear();
            }
            if *byte != b'\n' {
                line.push(*byte);
            }
        }
    }
    tell(&line, &last);
}

fn tell(line: &[u8], last: &LastLine) {
    let text = String::from_utf8_lossy(line);
    let text = text.trim();
    let text = text.strip_prefix("kiln-vmm: ").unwrap_or(text);
    if !text.is_empty() {
        tracing::info!(vmm = text);
        last.set(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::time::Duration;

    #[tokio::test]
    async fn the_last_line_is_known() {
        let (mut file, last) = pipe().unwrap();
        file.write_all(b"kiln-vmm: one\nkiln-vmm: the disk is full")
            .unwrap();
        drop(file);
        for _ in 0..100 {
            if last.get() == "the disk is full" {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{:?}", last.get());
    }
}
