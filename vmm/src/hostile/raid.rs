//! Who attacks when, and what is said of it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::attacks;
use super::filter::{Kind, TRAPPED};

/// By then a pod has its disks, its folder and its network.
const LATER: Duration = Duration::from_secs(3);

/// `/proc/self/maps`, opened before the jail.
static MAP: OnceLock<File> = OnceLock::new();
/// Kinds of threads that there are, as bits, and how many attackers have not finished.
static BEGUN: AtomicUsize = AtomicUsize::new(0);
static BUSY: AtomicUsize = AtomicUsize::new(0);
static REFUSED: AtomicUsize = AtomicUsize::new(0);
static SUCCEEDED: AtomicUsize = AtomicUsize::new(0);

/// Device and inode of what the process has open.
static HELD: OnceLock<Vec<(u64, u64)>> = OnceLock::new();

/// How an attempt ended: what was reached, or the error.
pub(crate) type Outcome = Result<String, i32>;

/// Opens the map of the process's memory.
pub(crate) fn take_map() -> io::Result<()> {
    let map = File::open("/proc/self/maps")?;
    // Called once.
    let _ = MAP.set(map);
    Ok(())
}

/// Makes a thread beside the first one of a kind: with its rights and descriptors, and, by `confine`, its filter. It
/// attacks a while later.
pub(crate) fn begin(
    kind: Kind,
    confine: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> io::Result<()> {
    let bit = 1 << kind as usize;
    if BEGUN.fetch_or(bit, Ordering::SeqCst) & bit != 0 {
        return Ok(());
    }
    BUSY.fetch_add(1, Ordering::SeqCst);
    let attacker = std::thread::Builder::new().name("attacker".to_owned());
    attacker.spawn(move || {
        if let Err(e) = confine() {
            say(&format!("attack {kind:?}: no filter: {e}"));
            return;
        }
        // The others go by what these two find in the map.
        let finds = matches!(kind, Kind::Control | Kind::Devices);
        std::thread::sleep(if finds { LATER } else { LATER + LATER / 2 });
        if kind == Kind::Control {
            remember_held();
        }
        attacks::run(kind);
        BUSY.fetch_sub(1, Ordering::SeqCst);
        if kind == Kind::Control {
            sum_up();
        }
    })?;
    Ok(())
}

/// Tells how many attempts there were, when all have ended.
pub(crate) fn sum_up() {
    while BUSY.load(Ordering::SeqCst) > 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
    let (refused, succeeded) = (&REFUSED, &SUCCEEDED);
    say(&format!(
        "attacks done: {} refused, {} succeeded",
        refused.load(Ordering::SeqCst),
        succeeded.load(Ordering::SeqCst)
    ));
}

/// Remembers what is open, for threads with a table of their own.
pub(crate) fn remember_held() {
    // The first time counts.
    let _ = HELD.set(attacks::held());
}

pub(crate) fn held_by_others() -> &'static [(u64, u64)] {
    HELD.get().map_or(&[], Vec::as_slice)
}

/// Tells how an attempt ended.
pub(crate) fn tell(kind: Kind, name: &str, outcome: Outcome) {
    let (count, how) = match outcome {
        Ok(what) => (&SUCCEEDED, format!("SUCCEEDED {what}")),
        Err(TRAPPED) => (&REFUSED, "refused (SIGSYS)".to_owned()),
        Err(errno) => (&REFUSED, format!("refused (errno {errno})")),
    };
    count.fetch_add(1, Ordering::SeqCst);
    say(&format!("attack {kind:?} {name}: {how}"));
}

/// One line in one piece: the threads' lines don't mix.
fn say(line: &str) {
    let line = format!("{line}\n");
    // SAFETY: a buffer of the length that is said.
    unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
}

/// A part of the process's memory that is the node's overlay budget.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) writable: bool,
}

/// Where the budget is mapped. Threads that can't read the map any more go by what others found.
pub(crate) fn budget() -> Vec<Region> {
    static FOUND: OnceLock<Vec<Region>> = OnceLock::new();
    match read_map() {
        Some(text) => {
            let regions: Vec<Region> = text.lines().filter_map(region).collect();
            if regions.is_empty() {
                return regions;
            }
            FOUND.get_or_init(|| regions).clone()
        }
        None => FOUND.get().cloned().unwrap_or_default(),
    }
}

fn read_map() -> Option<String> {
    let (mut text, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    while let n @ 1.. = MAP.get()?.read_at(&mut buffer, text.len() as u64).ok()? {
        text.extend_from_slice(buffer.get(..n)?);
    }
    String::from_utf8(text).ok()
}

/// One line of the map.
fn region(line: &str) -> Option<Region> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let writable = words.next()?.starts_with("rw");
    let number = |text| usize::from_str_radix(text, 16).ok();
    let start = number(start)?;
    line.contains("/overlay-budget").then_some(Region {
        start,
        len: number(end)?.checked_sub(start)?,
        writable,
    })
}
