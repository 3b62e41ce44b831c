//! The identity gate.
//!
//! Every μVM that is resumed from one bake starts with the same memory: the same state of the random
//! number generator, the same clock, the same names. Until the host has given this one an identity
//! of its own, nothing of a user may run; the agent refuses it ([`Gate::check`]).
//!
//! The gate shuts again when the guest is about to be baked (`Settle`) and when the kernel tells of a
//! new VM generation. The kernel's announcement may come before or after the host's call for the same
//! resume, so both are counted: an announcement shuts the gate only if it is one more than the
//! identities given.
//!
//! What needs no work here: the boot id is made when it is first read, which nothing does before the
//! gate; TCP's secrets are made with the first connection. What stays the same in all clones of a
//! bake, as in every resumed VM: the kernel's and the agent's address space layout.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kiln_agent_api::{GUEST_STATE_DIR, MIN_ENTROPY, proto};
use tokio::sync::watch;

use crate::error::{Action, AgentError};
use crate::spans::Spans;
use crate::sys;

type Result<T> = std::result::Result<T, AgentError>;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// No clock that was set is earlier: 2020.
const EARLIEST_NS: i64 = 1_577_836_800_000_000_000;

/// How much of an identity this agent may change.
#[derive(Debug, Clone)]
pub(crate) struct Scope {
    /// The wall clock is the guest's own (not so outside a VM).
    pub(crate) clock: bool,
    /// Files to write the machine id to.
    pub(crate) machine_id: Vec<PathBuf>,
}

#[derive(Debug, Default)]
struct State {
    open: bool,
    generation: String,
    /// Identities that were given.
    given: u64,
    /// New VM generations that the kernel told of.
    told: u64,
    /// What containers see in place of the kernel's boot id, which lasts as long as the kernel. It is the same file for
    /// every identity, so that those that run already see a new one too.
    boot_id_file: Option<PathBuf>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Gate {
    scope: Scope,
    state: Mutex<State>,
    /// How many identities were given.
    identities: watch::Sender<u64>,
}

impl Gate {
    /// Shut.
    pub(crate) fn new(scope: Scope) -> Self {
        Self {
            scope,
            state: Mutex::default(),
            identities: watch::Sender::new(0),
        }
    }

    /// Refuses while the gate is shut.
    pub(crate) fn check(&self) -> Result<()> {
        if self.lock().open {
            Ok(())
        } else {
            Err(AgentError::GateShut)
        }
    }

    /// For `Hello`: whether it is open, and for which generation.
    pub(crate) fn state(&self) -> (bool, String) {
        let state = self.lock();
        (state.open, state.generation.clone())
    }

    /// Tells when there is a new identity: whoever was connected before is connected to nobody, which the kernel does not
    /// tell those that wait to read.
    pub(crate) fn identities(&self) -> watch::Receiver<u64> {
        self.identities.subscribe()
    }

    /// What containers shall see in place of the kernel's boot id.
    pub(crate) fn boot_id_file(&self) -> Option<PathBuf> {
        self.lock().boot_id_file.clone()
    }

    /// Shuts it, before a bake.
    pub(crate) fn shut(&self) {
        self.lock().open = false;
    }

    /// The kernel tells of a new generation. True: that shut the gate.
    pub(crate) fn resumed(&self) -> bool {
        let mut state = self.lock();
        state.told += 1;
        let shuts = state.open && state.told > state.given;
        if shuts {
            state.open = false;
        }
        shuts
    }

    /// Gives the guest an identity and opens the gate. Asked again for the same generation, it does
    /// nothing.
    pub(crate) fn open(
        &self,
        request: &proto::SetIdentityRequest,
        spans: &mut Spans,
    ) -> Result<proto::SetIdentityResponse> {
        check(request)?;
        let mut state = self.lock();
        if state.open && state.generation == request.generation {
            return response(&state);
        }
        state.open = false;
        spans
            .now("reseed", || sys::add_entropy(&request.entropy))
            .action("reseed the kernel")?;
        if self.scope.clock {
            sys::set_wall_clock(request.wall_clock_ns).action("set the wall clock")?;
        }
        spans.now("names", || self.set_names(request))?;
        spans.now("boot-id", || set_boot_id(&request.boot_id, &mut state))?;
        state.given += 1;
        state.generation.clone_from(&request.generation);
        state.open = true;
        self.identities.send_replace(state.given);
        response(&state)
    }

    fn set_names(&self, request: &proto::SetIdentityRequest) -> Result<()> {
        for path in &self.scope.machine_id {
            let text = format!("{}\n", request.machine_id);
            fs::write(path, text).action(&format!("write {}", path.display()))?;
        }
        if !request.hostname.is_empty() {
            nix::unistd::sethostname(&request.hostname).action("set the host name")?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check(request: &proto::SetIdentityRequest) -> Result<()> {
    let wrong = |text: &str| Err(AgentError::Invalid(text.to_owned()));
    if request.generation.is_empty() {
        return wrong("an identity needs a generation, different at every resume");
    }
    if request.entropy.len() < MIN_ENTROPY {
        let got = request.entropy.len();
        return wrong(&format!(
            "an identity needs {MIN_ENTROPY} bytes of entropy, not {got}"
        ));
    }
    if request
        .entropy
        .iter()
        .all(|byte| *byte == request.entropy[0])
    {
        return wrong("the entropy of an identity is one byte repeated");
    }
    if request.wall_clock_ns < EARLIEST_NS {
        return wrong("an identity's wall clock lies before 2020; is the host's clock set?");
    }
    let hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    if request.machine_id.len() != 32 || !request.machine_id.chars().all(hex) {
        return wrong("a machine id has 32 lower-case hexadecimal digits");
    }
    if !request.boot_id.is_empty() && !is_uuid(&request.boot_id) {
        return wrong("a boot id is a UUID in lower case");
    }
    Ok(())
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.char_indices().all(|(at, c)| match at {
            8 | 13 | 18 | 23 => c == '-',
            _ => c.is_ascii_digit() || ('a'..='f').contains(&c),
        })
}

fn response(state: &State) -> Result<proto::SetIdentityResponse> {
    let file = state.boot_id_file.as_deref();
    let boot_id = fs::read_to_string(file.unwrap_or(Path::new(BOOT_ID)));
    Ok(proto::SetIdentityResponse {
        generation: state.generation.clone(),
        boot_id: boot_id.action("read the boot id")?.trim().to_owned(),
        random_sample: sys::random_bytes::<16>()
            .action("read random bytes")?
            .to_vec(),
        wall_clock_ns: sys::now_ns(),
        ..Default::default()
    })
}

/// The first identity gets the kernel's own boot id, made at its first reading from the generator that has just been
/// reseeded. A later one gets another.
fn set_boot_id(wanted: &str, state: &mut State) -> Result<()> {
    let boot_id = match (wanted, &state.boot_id_file) {
        ("", None) => fs::read_to_string(BOOT_ID).action("read the boot id")?,
        ("", Some(_)) => {
            fs::read_to_string("/proc/sys/kernel/random/uuid").action("make a boot id")?
        }
        (wanted, _) => format!("{wanted}\n"),
    };
    let file = Path::new(GUEST_STATE_DIR).join("boot_id");
    fs::write(&file, boot_id).action("write the boot id")?;
    state.boot_id_file = Some(file);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> proto::SetIdentityRequest {
        proto::SetIdentityRequest {
            generation: "g1".into(),
            entropy: (0..32).collect(),
            wall_clock_ns: EARLIEST_NS,
            machine_id: "0123456789abcdef0123456789abcdef".into(),
            ..Default::default()
        }
    }

    fn refused(change: impl FnOnce(&mut proto::SetIdentityRequest)) -> String {
        let mut request = request();
        change(&mut request);
        check(&request).expect_err("refused").to_string()
    }

    #[test]
    fn an_identity_must_be_whole() {
        check(&request()).expect("whole");
        assert!(refused(|r| r.generation.clear()).contains("generation"));
        assert!(refused(|r| r.entropy.truncate(31)).contains("32 bytes"));
        assert!(refused(|r| r.entropy = vec![0; 64]).contains("repeated"));
        assert!(refused(|r| r.wall_clock_ns = 0).contains("2020"));
        assert!(refused(|r| r.machine_id = "0123".into()).contains("machine id"));
        assert!(refused(|r| r.machine_id = "X".repeat(32)).contains("machine id"));
        assert!(refused(|r| r.boot_id = "x".into()).contains("UUID"));
    }

    fn gate(open: bool, given: u64, told: u64) -> Gate {
        let gate = Gate::new(Scope {
            clock: false,
            machine_id: Vec::new(),
        });
        *gate.lock() = State {
            open,
            given,
            told,
            ..State::default()
        };
        gate
    }

    #[test]
    fn a_gate_is_shut_until_an_identity_is_given() {
        assert!(matches!(
            gate(false, 0, 0).check(),
            Err(AgentError::GateShut)
        ));
        assert!(gate(true, 1, 0).check().is_ok());
    }

    #[test]
    fn an_announcement_of_the_identitys_own_resume_does_not_shut_the_gate() {
        // The call came first, the announcement after it.
        let gate = gate(true, 1, 0);
        assert!(!gate.resumed());
        assert!(gate.check().is_ok());
    }

    #[test]
    fn an_announcement_that_no_identity_answers_shuts_the_gate() {
        let gate = gate(true, 1, 1);
        assert!(gate.resumed());
        assert!(gate.check().is_err());
    }

    #[test]
    fn uuids_are_recognised() {
        assert!(is_uuid("01234567-89ab-cdef-0123-456789abcdef"));
        assert!(!is_uuid("0123456789abcdef0123456789abcdef"));
        assert!(!is_uuid("01234567-89AB-cdef-0123-456789abcdef"));
    }
}
