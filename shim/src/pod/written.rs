//! Keeps containerd's account of what the pod's containers wrote.
//!
//! The kubelet asks for containers' statistics every few seconds, and each such question brings the account up to date, in the
//! background: a pod that nobody asks about costs nothing.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use super::{Pod, lock};
use crate::rootfs::{Spilled, WritableLayer};
use crate::uvm::Written;

/// At least so long from one account to the next.
const PAUSE: Duration = Duration::from_secs(3);
/// Looking through containers' files takes at most one part in so many of the time.
const RARELY: u32 = 20;
/// What the overlay may hold beyond the containers' files without being theirs: the file system's own, and parts of chunks.
const SLACK: u64 = 4 << 20;

/// When the account is due.
#[derive(Debug, Default)]
pub(super) struct Accounting {
    running: bool,
    due: Option<Instant>,
    failed: bool,
    spilled: Arc<Mutex<Spilled>>,
}

impl Pod {
    /// Brings the account up to date, unless that is being done or was a moment ago.
    pub(super) fn account_writes(self: &Arc<Self>) {
        let layers = self.layers();
        if layers.is_empty() {
            return;
        }
        {
            let mut state = lock(&self.accounting);
            if state.running || state.due.is_some_and(|due| Instant::now() < due) {
                return;
            }
            state.running = true;
        }
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            let begun = Instant::now();
            let result = pod.account(layers).await;
            let took = begun.elapsed();
            let mut state = lock(&pod.accounting);
            state.running = false;
            state.due = Some(Instant::now() + PAUSE.max(took * RARELY));
            // Once, not at every question.
            if let Err(why) = &result
                && !state.failed
            {
                tracing::warn!(why, "containerd is not told what the containers wrote");
            }
            state.failed = result.is_err();
        });
    }

    fn layers(&self) -> Vec<(String, Arc<WritableLayer>)> {
        let containers = lock(&self.containers);
        let layers = containers.values().filter_map(|container| {
            let storage = lock(&container.storage);
            let layer = storage.as_ref()?.layer()?;
            Some((container.id.clone(), layer))
        });
        layers.collect()
    }

    async fn account(&self, layers: Vec<(String, Arc<WritableLayer>)>) -> Result<(), String> {
        let uvm = self.uvm().map_err(|e| e.chain())?;
        let several = layers.len() > 1;
        let ids: Vec<_> = layers
            .iter()
            .filter(|_| several)
            .map(|(id, _)| id.clone())
            .collect();
        let written = uvm.written(&ids).await.map_err(|e| e.chain())?;
        let shares = shares(&written, layers.len());
        let (spill, spilled) = (uvm.spill(), Arc::clone(&lock(&self.accounting).spilled));
        let accounting = tokio::task::spawn_blocking(move || {
            let layers = layers.into_iter().map(|(_, layer)| layer);
            let layers: Vec<_> = layers.zip(shares).collect();
            lock(&spilled)
                .account(spill.as_deref(), &layers)
                .map_err(|e| format!("keep room for what containers wrote: {e}"))
        });
        accounting.await.map_err(|e| e.to_string())?
    }

    /// Nothing of the pod's writes is left, and nothing more of them is to be told.
    pub(super) fn forget_writes(&self) {
        let spill = self.uvm.get().and_then(|uvm| uvm.spill());
        let spilled = Arc::clone(&lock(&self.accounting).spilled);
        lock(&spilled).end(spill.as_deref());
    }
}

/// How much each of `count` containers is to answer for. The guest says how writes are divided; that there are at least as
/// many as the overlay holds is the host's own knowledge, whatever the guest says.
fn shares(written: &Written, count: usize) -> Vec<u64> {
    let mut own = match count {
        1 => vec![written.total],
        _ => written.own.clone(),
    };
    own.resize(count, 0);
    let told: u128 = own.iter().map(|bytes| u128::from(*bytes)).sum();
    // Nothing that a guest says makes it more than there can be.
    let most = written.limit;
    if told > u128::from(most) {
        for bytes in &mut own {
            *bytes = part(*bytes, most, told);
        }
        return own;
    }
    let hidden = u128::from(written.held).saturating_sub(told + told / 8 + u128::from(SLACK));
    // No more than what is held.
    let hidden = u64::try_from(hidden).unwrap_or(u64::MAX);
    if hidden > 0 {
        let all = u64::try_from(count).unwrap_or(1).max(1);
        for bytes in &mut own {
            let more = if told == 0 {
                hidden.div_ceil(all)
            } else {
                part(*bytes, hidden, told)
            };
            *bytes = bytes.saturating_add(more);
        }
    }
    own
}

/// `bytes` of `whole`, of as much as `of`.
fn part(bytes: u64, of: u64, whole: u128) -> u64 {
    let exact = u128::from(bytes) * u128::from(of) / whole.max(1);
    u64::try_from(exact).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn written(held: u64, total: u64, own: &[u64]) -> Written {
        Written {
            held: held * MIB,
            limit: 1000 * MIB,
            total: total * MIB,
            own: own.iter().map(|n| n * MIB).collect(),
        }
    }

    #[test]
    fn a_container_alone_answers_for_all_and_several_for_their_own() {
        assert_eq!(shares(&written(60, 61, &[]), 1), [61 * MIB]);
        assert_eq!(shares(&written(61, 62, &[60, 0]), 2), [60 * MIB, 0]);
        // What the guest has not written to its disk yet counts, too.
        assert_eq!(shares(&written(0, 50, &[]), 1), [50 * MIB]);
    }

    #[test]
    fn a_guest_that_hides_its_writes_answers_for_them_all_the_same() {
        assert_eq!(shares(&written(100, 0, &[]), 1), [96 * MIB]);
        assert_eq!(shares(&written(104, 0, &[0, 0]), 2), [50 * MIB, 50 * MIB]);
        let own = shares(&written(200, 0, &[10, 30]), 2);
        assert_eq!(own.iter().sum::<u64>(), (200 - 4 - 5) * MIB);
        assert!(own[0] * 3 <= own[1] + 3 && own[1] <= own[0] * 3 + 3);
    }

    #[test]
    fn a_guest_that_boasts_fills_nobodys_disk() {
        let most = written(5, u64::MAX / MIB, &[]);
        assert_eq!(shares(&most, 1), [1000 * MIB]);
        let mut lies = written(5, 0, &[0, 0, 0]);
        lies.own = vec![u64::MAX, u64::MAX, 7];
        let own = shares(&lies, 3);
        assert!(own.iter().sum::<u64>() <= 1000 * MIB, "{own:?}");
        // Fewer answers than questions.
        lies.own = vec![MIB];
        assert_eq!(shares(&lies, 3), [MIB, 0, 0]);
    }
}
