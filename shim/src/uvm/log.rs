//! What a VMM says: its standard error, line by line into the shim's log, at the level that a line begins with. The
//! VMM limits how many lines a guest can cause. The last line is kept, for it says why a VMM ended.

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

/// A pipe for the standard error of a pod's VMM, read until the VMM has closed it.
pub(super) fn pipe(pod: &str) -> io::Result<(File, LastLine)> {
    let (ours, theirs) = io::pipe()?;
    let reader = pipe::Receiver::from_owned_fd(ours.into())?;
    let last = LastLine::default();
    tokio::spawn(follow(reader, pod.to_owned(), last.clone()));
    Ok((File::from(std::os::fd::OwnedFd::from(theirs)), last))
}

async fn follow(mut reader: pipe::Receiver, pod: String, last: LastLine) {
    let mut line = Vec::new();
    let mut buffer = [0; 1024];
    while let Ok(n @ 1..) = reader.read(&mut buffer).await {
        for byte in &buffer[..n] {
            if *byte == b'\n' || line.len() >= LONGEST {
                tell(&line, &pod, &last);
                line.clear();
            }
            if *byte != b'\n' {
                line.push(*byte);
            }
        }
    }
    tell(&line, &pod, &last);
}

fn tell(line: &[u8], pod: &str, last: &LastLine) {
    let text = String::from_utf8_lossy(line);
    let text = text.trim();
    let text = text.strip_prefix("kiln-vmm: ").unwrap_or(text);
    if text.is_empty() {
        return;
    }
    last.set(text);
    match text.split_once(' ') {
        Some(("ERROR", rest)) => tracing::error!(pod, vmm = rest),
        Some(("WARN", rest)) => tracing::warn!(pod, vmm = rest),
        _ => tracing::info!(pod, vmm = text.strip_prefix("INFO ").unwrap_or(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::time::Duration;

    #[tokio::test]
    async fn the_last_line_is_known() {
        let (mut file, last) = pipe("pod").unwrap();
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

    /// What a line becomes in the shim's log.
    fn logged(line: &[u8]) -> String {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let writer = {
            let lines = lines.clone();
            move || Shared(lines.clone())
        };
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .without_time()
            .with_target(false)
            .with_writer(writer)
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tell(line, "a-pod", &LastLine::default());
        });
        let bytes = lines.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap().trim().to_owned()
    }

    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_is_logged_at_its_level_with_the_pod_and_without_control_characters() {
        let line = logged(b"WARN kiln_vmm::disk: full \x1b[2J slot=3");
        let expected = r#"WARN pod="a-pod" vmm="kiln_vmm::disk: full \u{1b}[2J slot=3""#;
        assert_eq!(line, expected);
        assert!(logged(b"ERROR kiln_vmm: gone").starts_with("ERROR pod="));
        assert_eq!(
            logged(b"INFO kiln_vmm: here"),
            r#"INFO pod="a-pod" vmm="kiln_vmm: here""#
        );
        assert_eq!(
            logged(b"kiln-vmm: the machine has ended"),
            r#"INFO pod="a-pod" vmm="the machine has ended""#
        );
    }
}
