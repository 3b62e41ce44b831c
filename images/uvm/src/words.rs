//! What a VMM says: its standard error, line by line. The last line is kept, for it says why a VMM ended.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::watch;

/// Longest line that is kept whole.
const LONGEST: usize = 4096;
/// How long the reader may be behind a VMM that has ended.
const BEHIND: Duration = Duration::from_millis(500);

/// How a VMM begins the lines in which it passes on the end of the guest's console.
const OF_GUEST: &str = "the guest's last words: ";
/// Lines of a console that are kept. No VMM passes on more.
const MOST_LINES: usize = 60;

/// The last thing a VMM said, and what its guest said last.
#[derive(Debug, Clone, Default)]
pub struct LastWords(watch::Sender<Said>);

#[derive(Debug, Default)]
struct Said {
    line: String,
    console: Vec<String>,
    /// Nothing more will come.
    over: bool,
}

impl LastWords {
    fn set(&self, line: &str) {
        self.0.send_modify(|said| {
            line.clone_into(&mut said.line);
            if let Some(line) = line.strip_prefix(OF_GUEST)
                && said.console.len() < MOST_LINES
            {
                said.console.push(printable(line));
            }
        });
    }

    fn finish(&self) {
        self.0.send_modify(|said| said.over = true);
    }

    /// What a VMM that has ended said last, once all that it said has been read, and the lines of the guest's console that
    /// it passed on.
    pub(crate) async fn after_the_end(&self) -> (String, Vec<String>) {
        let mut said = self.0.subscribe();
        // What came until then is taken if the reader stays behind.
        let _ = tokio::time::timeout(BEHIND, said.wait_for(|said| said.over)).await;
        let said = self.0.borrow();
        (said.line.clone(), said.console.clone())
    }
}

/// A guest may write what it likes, and terminals are to show it.
fn printable(line: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    line.trim_end().chars().map(plain).collect()
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
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn the_last_line_is_known_when_all_was_said() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hearing = heard.clone();
        let tell = move |line: &str| hearing.lock().unwrap().push(line.to_owned());
        let (mut file, words) = pipe(tell).unwrap();
        file.write_all(b"kiln-vmm: one\n\nkiln-vmm: the disk is full")
            .unwrap();
        drop(file);
        assert_eq!(words.after_the_end().await.0, "the disk is full");
        assert_eq!(*heard.lock().unwrap(), ["one", "the disk is full"]);
    }

    #[tokio::test]
    async fn a_pipe_that_somebody_else_holds_open_keeps_nobody_waiting() {
        let words = LastWords::default();
        words.set("going");
        assert_eq!(words.after_the_end().await.0, "going");
    }

    #[tokio::test]
    async fn guests_console_is_kept_to_the_last_lines_that_the_vmm_passes_on() {
        let words = LastWords::default();
        words.set("resumed");
        words.set("the guest's last words: Kernel panic - not syncing: sysrq\u{1b}[31m\r");
        for _ in 0..100 {
            words.set("the guest's last words: Call Trace:");
        }
        words.set("the machine has ended: Panicked");
        words.finish();
        let (last, console) = words.after_the_end().await;
        assert_eq!(last, "the machine has ended: Panicked");
        assert_eq!(console.len(), MOST_LINES);
        assert_eq!(console[0], "Kernel panic - not syncing: sysrq [31m");
    }
}
