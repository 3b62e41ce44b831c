//! The log: lines on standard error, which the client reads and passes on.
//!
//! What a guest does can make lines, so there are only so many of these in a second; how many were left out stands
//! before the next. A line is written in one piece, and nothing in it can end it or move a terminal's cursor.

use std::fmt::{self, Debug, Write as _};
use std::io::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Characters of a line that is not cut.
const LONGEST: usize = 1024;

/// Has events logged from now on.
pub(crate) fn init() {
    let log = Log {
        limit: Mutex::new(Limit::new(Instant::now())),
        now: Instant::now,
        write,
    };
    // Fails only if there is a log already.
    let _ = tracing::subscriber::set_global_default(log);
}

/// Logs what is said once in the process's life, such as why it ends, whatever was logged before.
pub(crate) fn say(text: &str) {
    write(&format!("kiln-vmm: {}\n", shown(text)));
}

fn write(line: &str) {
    // A client that does not read any more has ended, and so will this process.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// A text without control characters, cut if it is long.
fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for (i, c) in text.chars().enumerate() {
        if i == LONGEST {
            shown.push('…');
            break;
        }
        if c.is_control() {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// How many lines may be written.
#[derive(Debug)]
struct Limit {
    left: u32,
    counted: Instant,
    left_out: u64,
}

impl Limit {
    const AT_ONCE: u32 = 20;
    /// In which one more may be written.
    const EACH: Duration = Duration::from_secs(1);

    fn new(now: Instant) -> Self {
        Self {
            left: Self::AT_ONCE,
            counted: now,
            left_out: 0,
        }
    }

    /// Whether a line may be written now, and how many were left out before it.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let passed = now.saturating_duration_since(self.counted);
        let more = u32::try_from(passed.as_secs() / Self::EACH.as_secs()).unwrap_or(u32::MAX);
        if more >= Self::AT_ONCE - self.left {
            // Full: a second that has begun does not count.
            (self.left, self.counted) = (Self::AT_ONCE, now);
        } else {
            self.left += more;
            self.counted += Self::EACH * more;
        }
        match self.left {
            0 => {
                self.left_out += 1;
                None
            }
            _ => {
                self.left -= 1;
                Some(std::mem::take(&mut self.left_out))
            }
        }
    }
}

/// Writes events; has no spans.
struct Log<N, W> {
    limit: Mutex<Limit>,
    now: N,
    write: W,
}

impl<N: Fn() -> Instant + 'static, W: Fn(&str) + 'static> Subscriber for Log<N, W> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= LevelFilter::INFO
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::INFO)
    }

    fn event(&self, event: &Event<'_>) {
        let allowed = {
            let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
            limit.take((self.now)())
        };
        let Some(left_out) = allowed else { return };
        let mut text = Text::default();
        event.record(&mut text);
        let (level, target) = (event.metadata().level(), event.metadata().target());
        let mut line = String::new();
        if left_out > 0 {
            line = format!("WARN kiln_vmm: {left_out} lines left out\n");
        }
        let said = shown(&format!("{}{}", text.message, text.fields));
        // Writing to a string does not fail.
        let _ = writeln!(line, "{level} {target}: {said}");
        (self.write)(&line);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// What an event says.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

impl<N, W> Debug for Log<N, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Log")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// What is written while `f` runs, which may turn the clock on by seconds.
    fn written(f: impl FnOnce(&AtomicU64)) -> Vec<String> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (start, clock) = (Instant::now(), Arc::new(AtomicU64::new(0)));
        let log = Log {
            limit: Mutex::new(Limit::new(start)),
            now: {
                let clock = clock.clone();
                move || start + Duration::from_secs(clock.load(Ordering::Relaxed))
            },
            write: {
                let lines = lines.clone();
                move |line: &str| lines.lock().unwrap().push(line.to_owned())
            },
        };
        tracing::subscriber::with_default(log, || f(&clock));
        lines.lock().unwrap().clone()
    }

    #[test]
    fn a_burst_is_written_and_then_a_line_each_second() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut limit = Limit::new(start);
        for _ in 0..Limit::AT_ONCE {
            assert_eq!(limit.take(start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(limit.take(at(999)), None);
        }
        assert_eq!(limit.take(at(1000)), Some(1000));
        assert_eq!(limit.take(at(1999)), None);
        // What is over of a second counts towards the next.
        assert_eq!(limit.take(at(2500)), Some(1));
        assert_eq!(limit.take(at(2999)), None);
        assert_eq!(limit.take(at(3000)), Some(1));
    }

    #[test]
    fn no_more_than_a_burst_is_saved_up() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        for _ in 0..Limit::AT_ONCE + 5 {
            limit.take(start);
        }
        let later = start + Duration::from_secs(1 << 40);
        assert_eq!(limit.take(later), Some(5));
        let allowed = (0..100).filter(|_| limit.take(later).is_some());
        assert_eq!(allowed.count(), 19);
        // A clock that goes back gives nothing.
        assert_eq!(limit.take(start), None);
    }

    #[test]
    fn a_line_has_level_origin_message_and_fields() {
        let lines = written(|_| {
            let error: &dyn std::error::Error = &std::io::Error::other("full");
            tracing::warn!(slot = 3, name = "disk", error, "can't {}", "spill");
            tracing::debug!("not for the log");
        });
        let expected = "WARN kiln_vmm::log::tests: can't spill slot=3 name=\"disk\" error=full\n";
        assert_eq!(lines, [expected]);
    }

    #[test]
    fn nothing_that_a_guest_says_ends_a_line_or_is_longer_than_one() {
        let lines = written(|_| {
            tracing::info!("a\nb\u{1b}[2J{}", "x".repeat(5000));
        });
        let [line] = lines.as_slice() else {
            panic!("{lines:?}")
        };
        assert!(line.contains(r": a\nb\u{1b}[2Jxxx"), "{line}");
        assert!(line.ends_with("x…\n"));
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.len() < 4096);
    }

    #[test]
    fn lines_beyond_the_limit_are_counted() {
        let lines = written(|clock| {
            for n in 0..100 {
                tracing::warn!(n, "driver error");
            }
            clock.fetch_add(1, Ordering::Relaxed);
            tracing::warn!("the disk is full");
        });
        assert_eq!(lines.len(), 21);
        let last =
            "WARN kiln_vmm: 80 lines left out\nWARN kiln_vmm::log::tests: the disk is full\n";
        assert_eq!(lines.last().map(String::as_str), Some(last));
    }
}
