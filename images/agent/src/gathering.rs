//! When to let more of a process's output come together before it is sent.

use std::time::{Duration, Instant};

/// Keeps a process that writes many small pieces from costing the host a message for each. Whatever says little, or much
/// at a time, or waits for an answer to each piece, is not held up.
#[derive(Debug)]
pub(crate) enum Gathering {
    Watching {
        since: Instant,
        pieces: u32,
    },
    /// More is waited for before each read; a single piece had so many bytes.
    Pausing {
        pause: Duration,
        piece: usize,
    },
}

impl Gathering {
    /// A piece that is worth a message.
    const ENOUGH: usize = 4 << 10;
    /// Half of what a pipe holds: the process may have to wait for us.
    const PLENTY: usize = 32 << 10;
    /// So many smaller ones may follow each other within this time.
    const FEW: (u32, Duration) = (8, Duration::from_millis(100));
    /// How long more is waited for then, at first and at most.
    const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(8));

    pub(crate) fn new() -> Self {
        Self::Watching {
            since: Instant::now(),
            pieces: 0,
        }
    }

    /// How long to let more come together before the next piece is read.
    pub(crate) fn pause_after(&mut self, length: usize) -> Option<Duration> {
        match self {
            Self::Watching { since, .. } if since.elapsed() >= Self::FEW.1 => *self = Self::new(),
            // Nothing came of it: the process waits for an answer, or has become slow.
            Self::Pausing { piece, .. } if length < 2 * *piece => *self = Self::new(),
            Self::Pausing { pause, .. } if length >= Self::PLENTY => {
                *pause /= 2;
                if *pause < Self::PAUSE.0 {
                    *self = Self::new();
                }
            }
            Self::Pausing { pause, .. } if length < Self::ENOUGH => {
                *pause = (*pause * 2).min(Self::PAUSE.1);
            }
            _ => {}
        }
        match self {
            Self::Watching { pieces, .. } => {
                *pieces += u32::from(length < Self::ENOUGH);
                if *pieces <= Self::FEW.0 {
                    return None;
                }
                let pause = Self::PAUSE.0;
                *self = Self::Pausing {
                    pause,
                    piece: length,
                };
                Some(pause)
            }
            Self::Pausing { pause, .. } => Some(*pause),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_pieces_are_not_held_up() {
        let mut gathering = Gathering::new();
        let few = Gathering::FEW.0;
        // However slow this machine: a new start only asks for more pieces.
        let pauses = (0..few).filter_map(|_| gathering.pause_after(10)).count();
        assert_eq!(pauses, 0);
    }

    #[test]
    fn pauses_grow_while_they_gather_more_and_end_when_they_do_not() {
        let millis = |pause: u64| Some(Duration::from_millis(pause));
        let pausing = || Gathering::Pausing {
            pause: Gathering::PAUSE.0,
            piece: 30,
        };
        let mut stream = pausing();
        let pauses = [600, 1200, 2400, 4800, 6000].map(|length| stream.pause_after(length));
        assert_eq!(pauses, [2, 4, 8, 8, 8].map(millis));
        // Larger pieces follow, and the process must not wait for us.
        let pauses = [60 << 10; 4].map(|length| stream.pause_after(length));
        assert_eq!(pauses, [millis(4), millis(2), millis(1), None]);
        // One that waits for an answer to each piece.
        assert_eq!(pausing().pause_after(30), None);
    }
}
