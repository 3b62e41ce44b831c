//! Logging to the bundle's `log` FIFO, which containerd copies into its own log.
//!
//! The FIFO is opened for reading and writing: a containerd that restarts must not cost the shim a
//! broken pipe. It is never waited for: when nobody reads and the pipe is full, lines are dropped
//! and counted, and the count is told with the next line that fits.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use tracing::Subscriber;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Registry, reload};

/// A writer that never waits.
#[derive(Debug, Clone)]
pub struct LogPipe {
    file: Arc<File>,
    dropped: Arc<AtomicU64>,
}

impl LogPipe {
    /// Opens the FIFO that containerd made in the bundle.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        Ok(Self {
            file: Arc::new(file),
            dropped: Arc::new(AtomicU64::new(0)),
        })
    }
}

impl Write for LogPipe {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            let note = format!("kiln: {dropped} log lines dropped, nobody read the log\n");
            if (&*self.file).write_all(note.as_bytes()).is_err() {
                self.dropped.fetch_add(dropped + 1, Ordering::Relaxed);
                return Ok(line.len());
            }
        }
        if (&*self.file).write_all(line).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogPipe {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Sends tracing to the bundle's log. Without a FIFO (a shim driven by hand) nothing is logged:
/// standard error belongs to the answer of `start`.
pub fn init(bundle: &Path, debug: bool) {
    let Ok(pipe) = LogPipe::open(&bundle.join("log")) else {
        return;
    };
    let level = if debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::INFO
    };
    let (subscriber, filter) = subscriber(pipe, level);
    // An error means that somebody set a subscriber before; theirs stays.
    if tracing::subscriber::set_global_default(subscriber).is_ok() {
        let _ = FILTER.set(filter);
    }
}

/// Logs at debug level from now on.
pub fn debug() {
    if let Some(filter) = FILTER.get() {
        // It is gone only with its subscriber, which is never.
        let _ = filter.modify(|level| *level = LevelFilter::DEBUG);
    }
}

type Filter = reload::Handle<LevelFilter, Registry>;

static FILTER: OnceLock<Filter> = OnceLock::new();

fn subscriber(pipe: LogPipe, level: LevelFilter) -> (impl Subscriber + Send + Sync, Filter) {
    let (filter, handle) = reload::Layer::new(level);
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_target(false)
        .with_writer(pipe);
    let subscriber = tracing_subscriber::registry().with(filter).with(lines);
    (subscriber, handle)
}

/// Logs a line of a pod's VMM at the level that it begins with. The VMM limits how many lines a guest can cause.
pub fn vmm(pod: &str, line: &str) {
    match line.split_once(' ') {
        Some(("ERROR", rest)) => tracing::error!(pod, vmm = rest),
        Some(("WARN", rest)) => tracing::warn!(pod, vmm = rest),
        _ => tracing::info!(pod, vmm = line.strip_prefix("INFO ").unwrap_or(line)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use std::io::Read;
    use std::sync::Mutex;

    #[test]
    fn full_pipe_drops_lines_and_says_how_many() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let mut log = LogPipe::open(&path).unwrap();
        let line = [b'x'; 4095];
        // More than any pipe holds, with nobody reading: must return.
        for _ in 0..64 {
            log.write_all(&line).unwrap();
        }
        assert!(log.dropped.load(Ordering::Relaxed) > 0);

        let mut reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        let mut buffer = vec![0; 1 << 20];
        while reader.read(&mut buffer).is_ok_and(|n| n > 0) {}
        log.write_all(b"after\n").unwrap();
        let n = reader.read(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..n]).into_owned();
        assert!(text.contains("log lines dropped"), "{text}");
        assert!(text.ends_with("after\n"), "{text}");
    }

    #[test]
    fn level_can_be_raised_while_it_runs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let pipe = LogPipe::open(&path).unwrap();
        let (subscriber, filter) = subscriber(pipe.clone(), LevelFilter::INFO);
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!("first");
            filter.modify(|level| *level = LevelFilter::DEBUG).unwrap();
            tracing::debug!("second");
        });
        let mut buffer = vec![0; 1 << 16];
        let n = (&*pipe.file).read(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..n]).into_owned();
        assert!(text.contains("DEBUG second"), "{text}");
        assert!(!text.contains("first"), "{text}");
    }

    /// What a line becomes in the shim's log.
    fn logged(line: &str) -> String {
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
        tracing::subscriber::with_default(subscriber, || vmm("a-pod", line));
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
    fn a_vmms_line_is_logged_at_its_level_with_the_pod_and_without_control_characters() {
        let line = logged("WARN kiln_vmm::disk: full \x1b[2J slot=3");
        let expected = r#"WARN pod="a-pod" vmm="kiln_vmm::disk: full \u{1b}[2J slot=3""#;
        assert_eq!(line, expected);
        assert!(logged("ERROR kiln_vmm: gone").starts_with("ERROR pod="));
        assert_eq!(
            logged("INFO kiln_vmm: here"),
            r#"INFO pod="a-pod" vmm="kiln_vmm: here""#
        );
        assert_eq!(
            logged("the machine has ended"),
            r#"INFO pod="a-pod" vmm="the machine has ended""#
        );
    }
}
