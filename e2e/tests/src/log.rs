//! Container log files in the format that CRI prescribes:
//! `2025-01-01T00:00:00.000000000Z stdout F text`, one line each, `P` for a part of a longer line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::wait;

/// Which stream a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One line, put together from its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// When its first part was written, RFC 3339 with nanoseconds.
    pub time: String,
    /// Where it came from.
    pub stream: Stream,
    /// What was written, without the newline.
    pub text: String,
    /// Into how many entries of the log it was divided.
    pub parts: usize,
}

/// Reads a log; a last entry that is still being written is left out.
pub fn parse(log: &str) -> Result<Vec<Line>> {
    let mut lines: Vec<Line> = Vec::new();
    let mut open: [Option<Line>; 2] = [None, None];
    for entry in log.split_inclusive('\n') {
        let Some(entry) = entry.strip_suffix('\n') else {
            break;
        };
        let (time, stream, full, text) =
            fields(entry).with_context(|| format!("not in CRI's log format: {entry:?}"))?;
        let slot = &mut open[usize::from(stream == Stream::Stderr)];
        let mut line = slot.take().unwrap_or_else(|| Line {
            time: time.to_owned(),
            stream,
            text: String::new(),
            parts: 0,
        });
        line.text.push_str(text);
        line.parts += 1;
        if full {
            lines.push(line);
        } else {
            *slot = Some(line);
        }
    }
    Ok(lines)
}

fn fields(entry: &str) -> Option<(&str, Stream, bool, &str)> {
    let (time, rest) = entry.split_once(' ')?;
    let (stream, rest) = rest.split_once(' ')?;
    let (tag, text) = rest.split_once(' ')?;
    let stream = match stream {
        "stdout" => Stream::Stdout,
        "stderr" => Stream::Stderr,
        _ => return None,
    };
    let full = match tag {
        "F" => true,
        "P" => false,
        _ => return None,
    };
    let plausible = time.len() >= 20 && time.as_bytes()[10] == b'T';
    plausible.then_some((time, stream, full, text))
}

/// A container's log file.
#[derive(Debug, Clone)]
pub struct LogFile {
    path: PathBuf,
}

impl LogFile {
    pub(crate) fn new(path: PathBuf) -> Self {
        LogFile { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All lines so far; none if the file does not exist yet.
    pub fn lines(&self) -> Result<Vec<Line>> {
        match std::fs::read_to_string(&self.path) {
            Ok(log) => parse(&log),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error).with_context(|| format!("{}", self.path.display())),
        }
    }

    /// Standard output so far, as lines.
    pub fn stdout(&self) -> Result<Vec<String>> {
        self.of(Stream::Stdout)
    }

    /// Standard error so far, as lines.
    pub fn stderr(&self) -> Result<Vec<String>> {
        self.of(Stream::Stderr)
    }

    fn of(&self, stream: Stream) -> Result<Vec<String>> {
        let lines = self.lines()?.into_iter();
        Ok(lines
            .filter(|line| line.stream == stream)
            .map(|line| line.text)
            .collect())
    }

    /// Waits for a line that starts with `prefix` and returns the rest of it.
    pub async fn wait_for(&self, prefix: &str, limit: Duration) -> Result<String> {
        let what = format!("line {prefix:?} in {}", self.path.display());
        let found = wait::until(&what, limit, || async {
            let lines = self.lines()?;
            Ok(lines
                .iter()
                .find_map(|line| line.text.strip_prefix(prefix).map(str::to_owned)))
        });
        match found.await {
            Ok(rest) => Ok(rest),
            Err(error) => {
                let lines = self.lines()?;
                let last: Vec<&str> = lines
                    .iter()
                    .rev()
                    .take(5)
                    .map(|line| line.text.as_str())
                    .collect();
                bail!(
                    "{error}; {} lines there, the last (newest first): {last:?}",
                    lines.len()
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TIME: &str = "2026-01-02T03:04:05.123456789Z";

    #[test]
    fn parts_of_a_line_are_joined_although_the_other_stream_comes_between() {
        let log = format!(
            "{TIME} stdout P one \n{TIME} stderr F other\n{TIME} stdout F line\n{TIME} stdout F \n\
             {TIME} stdout F still being wri"
        );
        let lines = parse(&log).unwrap();
        let texts: Vec<_> = lines
            .iter()
            .map(|line| (line.text.as_str(), line.parts))
            .collect();
        assert_eq!(texts, [("other", 1), ("one line", 2), ("", 1)]);
    }

    #[test]
    fn what_is_not_in_the_format_is_an_error() {
        for bad in [
            "hello\n".to_owned(),
            format!("{TIME} stdin F x\n"),
            format!("{TIME} stdout X x\n"),
            "yesterday stdout F x\n".to_owned(),
        ] {
            assert!(parse(&bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_text_comes_back(texts in proptest::collection::vec("[^\n]{0,80}", 0..20)) {
            let log: String = texts.iter().map(|text| format!("{TIME} stdout F {text}\n")).collect();
            let back: Vec<String> = parse(&log).unwrap().into_iter().map(|line| line.text).collect();
            prop_assert_eq!(back, texts);
        }
    }
}
