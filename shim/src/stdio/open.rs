//! From a path or URI to something to read or write.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::unix::pipe;

/// How long containerd may take to open its end of an output FIFO.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);

/// A stream can't be connected.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A scheme kiln doesn't serve.
    #[error("stdio scheme {scheme:?} of {uri} is not supported; use fifo or file{hint}")]
    Scheme {
        /// The scheme.
        scheme: String,
        /// The whole URI.
        uri: String,
        /// What to change, if it is known.
        hint: &'static str,
    },
    /// Opening failed.
    #[error("open {path}")]
    Open {
        /// What was opened.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// containerd never opened its end.
    #[error("nobody opened {0} for reading in {t} s", t = OPEN_TIMEOUT.as_secs())]
    NoReader(PathBuf),
}

/// Where output goes.
#[derive(Debug)]
pub enum OutputTarget {
    /// A FIFO, with the reading end that keeps it from breaking.
    Fifo {
        /// To write to.
        writer: pipe::Sender,
        /// Held, never read.
        keeper: File,
    },
    /// A plain file, appended to.
    File(tokio::fs::File),
}

/// Where input comes from.
#[derive(Debug)]
pub struct InputSource {
    /// To read from.
    pub reader: pipe::Receiver,
    /// Held until `CloseIO`.
    pub keeper: File,
}

#[derive(Debug, PartialEq, Eq)]
enum Location {
    Path(PathBuf),
    AppendTo(PathBuf),
}

fn locate(uri: &str) -> Result<Location, StdioError> {
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Ok(Location::Path(uri.into()));
    };
    let path = rest.split(['?', '#']).next().unwrap_or_default();
    match scheme {
        "fifo" => Ok(Location::Path(path.into())),
        "file" => Ok(Location::AppendTo(path.into())),
        _ => Err(StdioError::Scheme {
            scheme: scheme.to_owned(),
            uri: uri.to_owned(),
            hint: if scheme.contains('+') || scheme == "streaming" {
                "; remove io_type = \"streaming\" from the runtime's table"
            } else {
                ""
            },
        }),
    }
}

/// Opens an output; `None` for an empty name.
pub async fn open_output(uri: &str) -> Result<Option<OutputTarget>, StdioError> {
    if uri.is_empty() {
        return Ok(None);
    }
    match locate(uri)? {
        Location::Path(path) => {
            let metadata = std::fs::metadata(&path).map_err(|e| failed(&path, e))?;
            if metadata.file_type().is_fifo() {
                open_fifo(path).await
            } else {
                append(&path, false)
            }
        }
        Location::AppendTo(path) => append(&path, true),
    }
    .map(Some)
}

async fn open_fifo(path: PathBuf) -> Result<OutputTarget, StdioError> {
    let opening = {
        let path = path.clone();
        tokio::task::spawn_blocking(move || OpenOptions::new().write(true).open(path))
    };
    let opened = tokio::time::timeout(OPEN_TIMEOUT, opening).await;
    let keeper = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .map_err(|e| failed(&path, e))?;
    // After a timeout the keeper has just released the thread that waits in open().
    let writer = opened
        .map_err(|_| StdioError::NoReader(path.clone()))?
        .map_err(|e| failed(&path, io::Error::other(e)))?
        .map_err(|e| failed(&path, e))?;
    let writer = pipe::Sender::from_file(writer).map_err(|e| failed(&path, e))?;
    Ok(OutputTarget::Fifo { writer, keeper })
}

fn append(path: &Path, create: bool) -> Result<OutputTarget, StdioError> {
    if let (true, Some(dir)) = (create, path.parent()) {
        std::fs::create_dir_all(dir).map_err(|e| failed(dir, e))?;
    }
    OpenOptions::new()
        .append(true)
        .create(create)
        .open(path)
        .map(|file| OutputTarget::File(tokio::fs::File::from_std(file)))
        .map_err(|e| failed(path, e))
}

/// Opens an input; `None` for an empty name. Never waits: the two ends we open make it complete.
pub fn open_input(uri: &str) -> Result<Option<InputSource>, StdioError> {
    if uri.is_empty() {
        return Ok(None);
    }
    let (Location::Path(path) | Location::AppendTo(path)) = locate(uri)?;
    let open = |options: &mut OpenOptions| {
        options
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(|e| failed(&path, e))
    };
    let reader = open(OpenOptions::new().read(true))?;
    let keeper = open(OpenOptions::new().write(true))?;
    let reader = pipe::Receiver::from_file(reader).map_err(|e| failed(&path, e))?;
    Ok(Some(InputSource { reader, keeper }))
}

fn failed(path: &Path, source: io::Error) -> StdioError {
    StdioError::Open {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_paths_and_uris_are_told_apart() {
        assert_eq!(locate("/run/a").unwrap(), Location::Path("/run/a".into()));
        assert_eq!(
            locate("fifo:///run/a?x=1").unwrap(),
            Location::Path("/run/a".into())
        );
        assert_eq!(
            locate("file:///var/l").unwrap(),
            Location::AppendTo("/var/l".into())
        );
    }

    #[test]
    fn streaming_is_refused_with_the_setting_to_change() {
        let error = locate("ttrpc+unix:///run/s?streaming_id=1").unwrap_err();
        assert!(error.to_string().contains("io_type"), "{error}");
    }
}
