//! What a VMM says: its standard error, line by line. The last line is kept, for it says why a VMM ended.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// Longest line that is kept whole.
const LONGEST: usize = 4096;
/// How long the reader may be behind a VMM that has ended.
const BEHIND: Duration = Duration::from_millis(500);

/// The last thing a VMM said.
#[derive(Debug, Clone, Default)]
pub struct LastWords(Arc<(Mutex<Said>, Condvar)>);

#[derive(Debug, Default)]
struct Said {
    line: String,
    /// Nothing more will come.
    over: bool,
}

impl LastWords {
    fn set(&self, line: &str) {
        line.clone_into(&mut self.lock().line);
    }

    fn finish(&self) {
        self.lock().over = true;
        self.0.1.notify_all();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Said> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a VMM that has ended said last, once all that it said has been read.
    pub(crate) fn after_the_end(&self) -> String {
        let (said, _) = self
            .0
            .1
            .wait_timeout_while(self.lock(), BEHIND, |said| !said.over)
            .unwrap_or_else(PoisonError::into_inner);
        said.line.clone()
    }
}

/// A pipe for the standard error of a VMM, read until the VMM has closed it. `tell` gets each line without its end.
pub fn pipe(tell: impl FnMut(&str) + Send + 'static) -> io::Result<(File, LastWords)> {
    let (ours, theirs) = io::pipe()?;
    let reader = pipe::Receiver::from_owned_fd(ours.into())?;
    let words = LastWords::default();
    tokio::spawn(follow(reader, tell, words.clone()));
    Ok((File::from(OwnedFd::from(theirs)), words))
}

async fn follow(mut reader: pipe::Receiver, mut tell: impl FnMut(&str), words: LastWords) {
    let mut line = Vec::new();
    let mut buffer = [0; 1024];
    let mut take = |line: &mut Vec<u8>| {
        let text = String::from_utf8_lossy(line);
        let text = text.trim();
        let text = text.strip_prefix("kiln-vmm: ").unwrap_or(text);
        if !text.is_empty() {
            words.set(text);
            tell(text);
        }
        line.clear();
    };
    while let Ok(n @ 1..) = reader.read(&mut buffer).await {
        for byte in &buffer[..n] {
            if *byte == b'\n' || line.len() >= LONGEST {
                take(&mut line);
            }
            if *byte != b'\n' {
                line.push(*byte);
            }
        }
    }
    take(&mut line);
    words.finish();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn the_last_line_is_known_when_all_was_said() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hearing = heard.clone();
        let tell = move |line: &str| hearing.lock().unwrap().push(line.to_owned());
        let (mut file, words) = pipe(tell).unwrap();
        file.write_all(b"kiln-vmm: one\n\nkiln-vmm: the disk is full")
            .unwrap();
        drop(file);
        let last = tokio::task::spawn_blocking(move || words.after_the_end());
        assert_eq!(last.await.unwrap(), "the disk is full");
        assert_eq!(*heard.lock().unwrap(), ["one", "the disk is full"]);
    }

    #[test]
    fn a_pipe_that_somebody_else_holds_open_keeps_nobody_waiting() {
        let words = LastWords::default();
        words.set("going");
        assert_eq!(words.after_the_end(), "going");
    }
}
