//! The copying itself.

use std::fs::File;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::open::{InputSource, OutputTarget};

const BUFFER: usize = 64 * 1024;

/// The outputs of one process on their way to containerd.
#[derive(Debug, Default)]
pub struct Outputs {
    copies: Mutex<Vec<JoinHandle<()>>>,
}

impl Outputs {
    /// Starts copying a stream of the process to its target, until the stream ends.
    pub fn add<R>(&self, name: &'static str, source: R, target: OutputTarget)
    where
        R: AsyncRead + Unpin + Send + 'static,
    {
        let copy = tokio::spawn(async move {
            let result = match target {
                OutputTarget::Fifo { mut writer, keeper } => {
                    let result = copy(source, &mut writer).await;
                    // Both of our ends are closed together: the reader then sees the end.
                    drop((writer, keeper));
                    result
                }
                OutputTarget::File(mut file) => copy(source, &mut file).await,
            };
            match result {
                Ok(bytes) => tracing::debug!(stream = name, bytes, "stream ended"),
                Err(error) => tracing::warn!(stream = name, %error, "copying a stream failed"),
            }
        });
        self.copies
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(copy);
    }

    /// Waits until all is copied, at most so long; what is left then is cut off. True if nothing was.
    pub async fn drain(&self, limit: Duration) -> bool {
        let copies =
            std::mem::take(&mut *self.copies.lock().unwrap_or_else(PoisonError::into_inner));
        let deadline = tokio::time::Instant::now() + limit;
        let mut whole = true;
        for mut copy in copies {
            if tokio::time::timeout_at(deadline, &mut copy).await.is_err() {
                copy.abort();
                whole = false;
            }
        }
        whole
    }
}

async fn copy<R, W>(mut from: R, to: &mut W) -> io::Result<u64>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            to.flush().await?;
            return Ok(total);
        }
        to.write_all(&buffer[..n]).await?;
        total += n as u64;
    }
}

/// The input of one process.
#[derive(Debug)]
pub struct Input {
    keeper: Mutex<Option<File>>,
    stop: watch::Sender<bool>,
}

impl Input {
    /// Starts copying to the process, until everybody who writes has closed (and `close` was
    /// called), the process's end is closed, or `stop`.
    pub fn start<W>(source: InputSource, mut process: W) -> Self
    where
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let InputSource { reader, keeper } = source;
        let (stop, mut stopped) = watch::channel(false);
        tokio::spawn(async move {
            tokio::select! {
                result = copy(reader, &mut process) => {
                    if let Err(error) = result {
                        tracing::debug!(%error, "input ended");
                    }
                }
                _ = stopped.wait_for(|stop| *stop) => {}
            }
            // Half-closes the stream: the process reads the end of its input.
            let _ = process.shutdown().await;
        });
        Self {
            keeper: Mutex::new(Some(keeper)),
            stop,
        }
    }

    /// `CloseIO`: when the writers that are left have closed too, the process reads the end.
    pub fn close(&self) {
        self.keeper
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// Stops at once; for a process that has ended.
    pub fn stop(&self) {
        self.close();
        // No receiver is left when the copy has ended by itself.
        let _ = self.stop.send(true);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{open_input, open_output};
    use super::*;
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use std::fs::OpenOptions;
    use std::io::{Read, Write};
    use std::path::{Path, PathBuf};
    use std::thread;
    use tempfile::TempDir;

    fn fifo() -> (TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        (dir, path)
    }

    fn text(path: &Path) -> &str {
        path.to_str().unwrap()
    }

    #[tokio::test]
    async fn a_slow_reader_gets_every_byte_in_order() {
        let (_dir, path) = fifo();
        let reader = {
            let path = path.clone();
            thread::spawn(move || {
                let mut file = File::open(path).unwrap();
                let mut all = Vec::new();
                let mut chunk = [0; 777];
                loop {
                    let n = file.read(&mut chunk).unwrap();
                    if n == 0 {
                        return all;
                    }
                    all.extend_from_slice(&chunk[..n]);
                    if all.len() % 50 == 0 {
                        thread::sleep(Duration::from_millis(1));
                    }
                }
            })
        };
        let target = open_output(text(&path)).await.unwrap().unwrap();
        let (mut process, ours) = tokio::io::duplex(4096);
        let outputs = Outputs::default();
        outputs.add("stdout", ours, target);
        let sent: Vec<u8> = (0..100_000)
            .flat_map(|n| format!("line {n}\n").into_bytes())
            .collect();
        process.write_all(&sent).await.unwrap();
        drop(process);
        assert!(outputs.drain(Duration::from_secs(30)).await);
        assert_eq!(reader.join().unwrap(), sent);
    }

    #[tokio::test]
    async fn a_process_stops_while_nobody_reads_its_output() {
        let (_dir, path) = fifo();
        let reader = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let target = open_output(text(&path)).await.unwrap().unwrap();
        let (mut process, ours) = tokio::io::duplex(4096);
        let outputs = Outputs::default();
        outputs.add("stdout", ours, target);
        // More than FIFO, duplex and buffer hold together: the write must not finish.
        let block = vec![b'x'; 1 << 20];
        let write = tokio::time::timeout(Duration::from_millis(200), process.write_all(&block));
        assert!(write.await.is_err());
        drop((process, reader));
        assert!(!outputs.drain(Duration::from_millis(100)).await);
    }

    #[tokio::test]
    async fn a_reader_that_comes_back_finds_the_pipe_whole() {
        let (_dir, path) = fifo();
        let first = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let target = open_output(text(&path)).await.unwrap().unwrap();
        let (mut process, ours) = tokio::io::duplex(4096);
        let outputs = Outputs::default();
        outputs.add("stdout", ours, target);
        // containerd goes away, the process writes, containerd comes back.
        drop(first);
        process.write_all(b"while you were out\n").await.unwrap();
        let reader = {
            let path = path.clone();
            tokio::task::spawn_blocking(move || {
                let mut file = File::open(path).unwrap();
                let mut line = [0; 19];
                file.read_exact(&mut line).unwrap();
                (line, file)
            })
        };
        let (line, mut file) = reader.await.unwrap();
        assert_eq!(&line, b"while you were out\n");
        process.write_all(b"and after\n").await.unwrap();
        drop(process);
        assert!(outputs.drain(Duration::from_secs(5)).await);
        let mut rest = String::new();
        file.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "and after\n");
    }

    #[tokio::test]
    async fn input_ends_only_after_close_io() {
        let (_dir, path) = fifo();
        let source = open_input(text(&path)).unwrap().unwrap();
        let (ours, mut process) = tokio::io::duplex(4096);
        let input = Input::start(source, ours);

        // A client writes and detaches: the process gets the bytes and no end.
        let mut client = OpenOptions::new().write(true).open(&path).unwrap();
        client.write_all(b"one").unwrap();
        drop(client);
        let mut three = [0; 3];
        process.read_exact(&mut three).await.unwrap();
        let more = tokio::time::timeout(Duration::from_millis(100), process.read(&mut three));
        assert!(more.await.is_err(), "input must stay open");

        // Another one attaches, then CloseIO, then it closes: the rest and the end.
        let mut client = OpenOptions::new().write(true).open(&path).unwrap();
        client.write_all(b"two").unwrap();
        input.close();
        drop(client);
        let mut rest = String::new();
        process.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "two");
    }

    #[tokio::test]
    async fn file_uri_appends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/out");
        for part in ["a", "b"] {
            let target = open_output(&format!("file://{}", text(&path)))
                .await
                .unwrap()
                .unwrap();
            let outputs = Outputs::default();
            outputs.add("stdout", part.as_bytes(), target);
            assert!(outputs.drain(Duration::from_secs(5)).await);
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), "ab");
    }
}
