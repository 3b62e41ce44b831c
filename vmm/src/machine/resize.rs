//! Changes that the guest takes part in: what it was asked, what it answered, and how long it is waited for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::build::HostEnd;
use super::config::{DeviceKind, DeviceSpec};
use super::exits::lock;
use super::{Machine, MachineError};
use crate::devices::mem::MemStatus;
use crate::platform::hotplug::HotplugAction;

/// Serial of disks that came by PCI hot-plug; their slots go with them.
const PLUGGED: &str = "kiln-plugged";
/// How long a guest may take to let go of a device.
const EJECT_LIMIT: Duration = Duration::from_secs(10);

/// How long a guest is waited for that gives no memory back.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// A guest that has given nothing back for so long, though it was asked again and again, keeps what it has.
    shrink: Duration,
    /// How often it is asked again. By itself, Linux' driver waits most of a minute after a block that was busy, which a
    /// page under I/O is enough for.
    again: Duration,
}

const PATIENCE: Patience = Patience {
    shrink: Duration::from_secs(20),
    again: Duration::from_secs(2),
};

/// What the guest was asked and has answered.
#[derive(Debug, Default)]
pub struct Answers {
    open: Mutex<Open>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Open {
    /// vCPUs asked to come or go.
    cpus: BTreeSet<u8>,
    /// vCPUs the guest refused, with ACPI's status.
    refused: BTreeMap<u8, u32>,
    /// Counts up with everything that happens: whoever has looked and found nothing sees whether it still is so.
    events: u64,
}

impl Answers {
    /// The guest did something. Called on vCPU threads.
    pub fn hear(&self, action: HotplugAction) {
        // ACPI 6.4 table 6.x: an insertion or ejection that is under way reports these first.
        const IN_PROGRESS: [u32; 2] = [0x80, 0x84];
        let mut open = lock(&self.open);
        match action {
            HotplugAction::EjectCpu(i) | HotplugAction::CpuStatus(i, 0) => {
                open.cpus.remove(&i);
            }
            HotplugAction::CpuStatus(i, status)
                if !IN_PROGRESS.contains(&status) && open.cpus.remove(&i) =>
            {
                open.refused.insert(i, status);
            }
            _ => {}
        }
        drop(open);
        self.wake();
    }

    /// Has those who wait look again. Never waits long itself: the lock is held for no call to anything else.
    pub fn wake(&self) {
        lock(&self.open).events += 1;
        self.changed.notify_all();
    }

    /// The guest is going to be asked for these vCPUs.
    fn expect(&self, cpus: BTreeSet<u8>) {
        let mut open = lock(&self.open);
        open.refused.clear();
        open.cpus = cpus;
    }

    /// Waits for something to happen after the event numbered `seen`, but no longer than to `until`.
    fn wait(&self, seen: u64, until: Instant) {
        let left = until.saturating_duration_since(Instant::now());
        let open = lock(&self.open);
        let nothing = |open: &mut Open| open.events == seen;
        drop(
            self.changed
                .wait_timeout_while(open, left, nothing)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Waits until the guest has followed what it was asked, or has given back what memory it can.
    fn follow(
        &self,
        timeout: Duration,
        patience: Patience,
        memory: impl Fn() -> MemStatus,
        remind: impl Fn(),
    ) -> Result<(), MachineError> {
        let deadline = Instant::now() + timeout;
        let mut last = (memory().plugged, Instant::now());
        let mut asked = Instant::now();
        loop {
            let (seen, cpus) = {
                let open = lock(&self.open);
                if let Some((cpu, status)) = open.refused.first_key_value() {
                    return Err(MachineError::Busy(format!(
                        "the guest refused to change vCPU {cpu} (ACPI status {status:#x})"
                    )));
                }
                (open.events, open.cpus.clone())
            };
            let MemStatus {
                plugged, requested, ..
            } = memory();
            if cpus.is_empty() && plugged == requested {
                return Ok(());
            }
            let now = Instant::now();
            if plugged != last.0 {
                last = (plugged, now);
                asked = now;
            } else if plugged > requested && now - asked >= patience.again {
                remind();
                asked = now;
            }
            let stuck = now - last.1 >= patience.shrink || now >= deadline;
            if cpus.is_empty() && plugged > requested && stuck {
                tracing::info!(
                    plugged,
                    requested,
                    "the guest keeps memory that it can't free now"
                );
                return Ok(());
            }
            if now >= deadline {
                return Err(MachineError::Busy(format!(
                    "the guest did not follow in {timeout:?}: vCPUs {cpus:?} are open, {plugged} of {requested} bytes \
                     are plugged"
                )));
            }
            let until = if plugged <= requested {
                deadline
            } else if cpus.is_empty() {
                deadline
                    .min(asked + patience.again)
                    .min(last.1 + patience.shrink)
            } else {
                deadline.min(asked + patience.again)
            };
            self.wait(seen, until);
        }
    }

    /// Waits until something is so, but no longer than `limit`: whether it is.
    fn until(&self, limit: Duration, so: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let seen = lock(&self.open).events;
            if so() {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            self.wait(seen, deadline);
        }
    }
}

impl Machine {
    /// Asks the guest for a size and waits until it has followed, or has given back what memory it can.
    /// `answers` hears what the guest does.
    pub fn resize(
        &self,
        answers: &Arc<Answers>,
        cpus: u8,
        memory: u64,
        timeout: Duration,
    ) -> Result<(), MachineError> {
        let before: BTreeSet<u8> = self.present_cpus().into_iter().collect();
        // Before it is asked: it may answer at once.
        answers.expect(self.planned_cpus(cpus, &before));
        self.request_cpus(cpus)
            .inspect_err(|_| answers.expect(BTreeSet::new()))?;
        self.observe_memory({
            let answers = answers.clone();
            move || answers.wake()
        });
        self.request_memory(memory)?;
        if timeout.is_zero() {
            return Ok(());
        }
        let remind = || self.remind_of_memory();
        answers.follow(timeout, PATIENCE, || self.plugged(), remind)
    }

    /// Puts a disk into a slot: the one that is named, else the first empty one, else a new one.
    pub fn attach_disk(&self, slot: Option<u8>, disk: HostEnd) -> Result<u8, MachineError> {
        let empty = || {
            let mut slots = self.device_specs().into_iter().map(|s| s.slot);
            slots.find(|s| self.disk_attached(*s) == Some(false))
        };
        match slot.or_else(empty) {
            Some(slot) => {
                self.attach_block(slot, disk)?;
                Ok(slot)
            }
            None => {
                let kind = DeviceKind::Block {
                    id: PLUGGED.to_owned(),
                    queues: 1,
                };
                self.plug_device(kind, Some(disk))
            }
        }
    }

    /// Takes a disk out of its slot. One that came by hot-plug goes off the bus, for which the guest is waited for.
    pub fn detach_disk(&self, answers: &Answers, slot: u8) -> Result<(), MachineError> {
        let spec = |s: &DeviceSpec| s.slot == slot;
        let plugged = self
            .device_specs()
            .into_iter()
            .find(spec)
            .is_some_and(|s| matches!(s.kind, DeviceKind::Block { id, .. } if id == PLUGGED));
        if !plugged {
            return self.detach_block(slot);
        }
        self.unplug_device(slot)?;
        let gone = || !self.device_specs().iter().any(spec);
        if answers.until(EJECT_LIMIT, gone) {
            return Ok(());
        }
        Err(MachineError::Busy(format!(
            "the guest has not let go of slot {slot} in {EJECT_LIMIT:?}"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    const MIB: u64 = 1 << 20;
    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(50);
    const SLOW: Patience = Patience {
        shrink: LONG,
        again: LONG,
    };

    /// A guest's memory, of which 128 MiB are asked for.
    fn memory(plugged: &AtomicU64) -> impl Fn() -> MemStatus {
        || MemStatus {
            region: 1024 * MIB,
            requested: 128 * MIB,
            plugged: plugged.load(Ordering::SeqCst),
        }
    }

    fn asked(cpus: impl IntoIterator<Item = u8>) -> Answers {
        let answers = Answers::default();
        answers.expect(cpus.into_iter().collect());
        answers
    }

    #[test]
    fn guest_that_keeps_memory_is_reminded_and_then_left_with_it() {
        let plugged = AtomicU64::new(256 * MIB);
        let reminders = AtomicU64::new(0);
        let patience = Patience {
            shrink: 4 * SHORT,
            again: SHORT,
        };
        let remind = || {
            reminders.fetch_add(1, Ordering::SeqCst);
        };
        let start = Instant::now();
        let kept = asked([]).follow(LONG, patience, memory(&plugged), remind);
        assert!(kept.is_ok(), "{kept:?}");
        let took = start.elapsed();
        assert!(took >= 4 * SHORT && took < LONG / 2, "{took:?}");
        assert!((1..=4).contains(&reminders.load(Ordering::SeqCst)));
    }

    #[test]
    fn guest_that_keeps_memory_to_the_deadline_is_left_with_it() {
        let plugged = AtomicU64::new(256 * MIB);
        let kept = asked([]).follow(SHORT, SLOW, memory(&plugged), || ());
        assert!(kept.is_ok(), "{kept:?}");
    }

    #[test]
    fn late_answers_are_waited_for_and_end_the_wait_at_once() {
        let answers = asked([1, 2]);
        let plugged = AtomicU64::new(0);
        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for answer in [
                    // Under way is no answer.
                    HotplugAction::CpuStatus(1, 0x80),
                    HotplugAction::CpuStatus(1, 0),
                    HotplugAction::EjectCpu(2),
                ] {
                    std::thread::sleep(SHORT);
                    answers.hear(answer);
                }
                std::thread::sleep(SHORT);
                plugged.store(128 * MIB, Ordering::SeqCst);
                answers.wake();
            });
            let followed = answers.follow(LONG, SLOW, memory(&plugged), || ());
            assert!(followed.is_ok(), "{followed:?}");
        });
        let took = start.elapsed();
        assert!(took >= 4 * SHORT && took < LONG / 2, "{took:?}");
    }

    #[test]
    fn what_happens_between_looking_and_waiting_ends_the_wait() {
        let answers = asked([]);
        let looked = AtomicU64::new(0);
        let start = Instant::now();
        let so = answers.until(LONG, || {
            let first = looked.fetch_add(1, Ordering::SeqCst) == 0;
            if first {
                answers.wake();
            }
            !first
        });
        assert!(so && start.elapsed() < LONG / 2);
    }

    #[test]
    fn guest_that_does_not_answer_is_busy() {
        let plugged = AtomicU64::new(128 * MIB);
        let silent = asked([3]).follow(SHORT, SLOW, memory(&plugged), || ());
        let Err(MachineError::Busy(why)) = silent else {
            panic!("{silent:?}");
        };
        assert!(why.contains("vCPUs {3} are open"), "{why}");
        plugged.store(64 * MIB, Ordering::SeqCst);
        let short = asked([]).follow(SHORT, SLOW, memory(&plugged), || ());
        assert!(matches!(short, Err(MachineError::Busy(_))), "{short:?}");
        assert!(!asked([]).until(SHORT, || false));
    }

    #[test]
    fn refused_vcpu_is_busy_and_forgotten_with_the_next_request() {
        let answers = asked([1, 2]);
        let plugged = AtomicU64::new(128 * MIB);
        answers.hear(HotplugAction::CpuStatus(1, 0));
        answers.hear(HotplugAction::CpuStatus(2, 0x82));
        // Of a vCPU that nobody asked about.
        answers.hear(HotplugAction::CpuStatus(7, 1));
        let refused = answers.follow(LONG, SLOW, memory(&plugged), || ());
        let Err(MachineError::Busy(why)) = refused else {
            panic!("{refused:?}");
        };
        assert!(why.contains("vCPU 2 (ACPI status 0x82)"), "{why}");
        answers.expect(BTreeSet::new());
        let next = answers.follow(LONG, SLOW, memory(&plugged), || ());
        assert!(next.is_ok(), "{next:?}");
    }
}
