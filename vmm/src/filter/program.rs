//! A filter as the kernel takes it: a classic BPF program that looks a system call's number up by halving.
//!
//! The kernel runs a new filter once for every system call there is, to find out which ones it always allows;
//! those then cost nothing. Halving keeps that short, and with it the installation.

use std::collections::BTreeMap;

/// What happens to a system call that is on the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// Allowed.
    Allow,
    /// Fails with this error.
    Fail(i32),
    /// Allowed if its `n`th argument is one of these values.
    Among(u32, &'static [u32]),
    /// For fcntl: allowed are these commands, and setting a file's flags. `O_ASYNC` can't be set, which is an error
    /// and not the end: programs in a guest may ask for it.
    Commands(&'static [u32]),
    /// For ioctl: allowed are all of KVM's requests and these.
    Requests(&'static [u32]),
    /// Allowed if its `n`th argument has none of these bits.
    Without(u32, u32),
    /// Allowed if its `n`th argument has all of these bits.
    Holding(u32, u32),
    /// Allowed if its first argument is our process id.
    OnSelf,
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const ANY_BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// `AUDIT_ARCH_X86_64`: 64-bit, little-endian, `EM_X86_64`.
const ARCHITECTURE: u32 = 0xc000_003e;
/// Places in `struct seccomp_data`.
const AT_NUMBER: u32 = 0;
const AT_ARCHITECTURE: u32 = 4;
const AT_ARGUMENTS: u32 = 16;

/// What all of KVM's requests have in their second byte (linux/kvm.h).
const KVMIO: u32 = 0xae;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
/// Raises SIGSYS, whose handler says what was refused and ends the process.
const REFUSE: u32 = libc::SECCOMP_RET_TRAP;

/// A place in the program, counted from its end.
type Place = usize;

/// A program that is written from its end to its beginning: jumps go forward only, so where they go to is written
/// already, and one ending serves all that get there. The kernel compiles every filter anew for every thread.
#[derive(Default)]
struct Backwards {
    last_first: Vec<libc::sock_filter>,
    /// Where each ending was written last.
    endings: BTreeMap<u32, Place>,
}

impl Backwards {
    fn put(&mut self, code: u16, k: u32, jt: u8, jf: u8) -> Place {
        self.last_first.push(libc::sock_filter { code, jt, jf, k });
        self.last_first.len() - 1
    }

    /// How far the next but `between` instructions to be written is from a place, if a conditional jump reaches it.
    fn distance(&self, place: Place, between: usize) -> Option<u8> {
        u8::try_from(self.last_first.len() + between - place - 1).ok()
    }

    /// An ending within a jump's reach.
    fn give(&mut self, value: u32) -> Place {
        if let Some(place) = self.endings.get(&value)
            && self.distance(*place, 2).is_some()
        {
            return *place;
        }
        let place = self.put(RETURN, value, 0, 0);
        self.endings.insert(value, place);
        place
    }

    /// The same place, or a jump to it where a conditional one does not reach.
    fn near(&mut self, place: Place, between: usize) -> Place {
        if self.distance(place, between).is_some() {
            return place;
        }
        self.jump(place)
    }

    fn jump(&mut self, to: Place) -> Place {
        // A filter has at most 4096 instructions.
        let far = (self.last_first.len() - to - 1) as u32;
        self.put((libc::BPF_JMP | libc::BPF_JA) as u16, far, 0, 0)
    }

    /// Goes on at one of two places.
    fn choose(&mut self, test: u16, k: u32, yes: Place, no: Place) -> Place {
        let yes = self.near(yes, 1);
        let no = self.near(no, 0);
        let at = self.last_first.len() - 1;
        // Both are near.
        let (jt, jf) = ((at - yes) as u8, (at - no) as u8);
        self.put(test, k, jt, jf)
    }

    /// An instruction that always goes on at a place.
    fn step(&mut self, code: u16, k: u32, then: Place) -> Place {
        if then + 1 != self.last_first.len() {
            self.jump(then);
        }
        self.put(code, k, 0, 0)
    }

    /// Loads the lower half of an argument. Upper halves are not looked at: the kernel does not either for what is
    /// asked here (commands and requests, protection bits, flags, process ids).
    fn argument(&mut self, n: u32, then: Place) -> Place {
        self.step(LOAD, AT_ARGUMENTS + 8 * n, then)
    }

    /// Allows what is loaded if the test says yes, or else refuses it.
    fn allow_if(&mut self, test: u16, k: u32) -> Place {
        let (allow, refuse) = (self.give(ALLOW), self.give(REFUSE));
        self.choose(test, k, allow, refuse)
    }

    /// Allows these values of what is loaded.
    fn among(&mut self, values: &[u32]) -> Place {
        let mut rest = self.give(REFUSE);
        for value in values {
            let allow = self.give(ALLOW);
            rest = self.choose(EQUAL, *value, allow, rest);
        }
        rest
    }

    fn rule(&mut self, rule: Rule, pid: u32) -> Place {
        match rule {
            Rule::Allow => self.give(ALLOW),
            Rule::Fail(errno) => self.give(libc::SECCOMP_RET_ERRNO | errno.unsigned_abs()),
            Rule::Among(n, values) => {
                let test = self.among(values);
                self.argument(n, test)
            }
            Rule::Commands(values) => {
                let allow = self.give(ALLOW);
                let fail = self.give(libc::SECCOMP_RET_ERRNO | libc::EINVAL.unsigned_abs());
                let test = self.choose(ANY_BIT, libc::O_ASYNC.unsigned_abs(), fail, allow);
                let flags = self.argument(2, test);
                let others = self.among(values);
                let test = self.choose(EQUAL, libc::F_SETFL.unsigned_abs(), flags, others);
                self.argument(1, test)
            }
            Rule::Requests(values) => {
                let test = self.among(values);
                let others = self.argument(1, test);
                let allow = self.give(ALLOW);
                let ours = self.choose(EQUAL, KVMIO << 8, allow, others);
                let kind = self.step(AND, 0xff00, ours);
                self.argument(1, kind)
            }
            Rule::Without(n, bits) => {
                let (refuse, allow) = (self.give(REFUSE), self.give(ALLOW));
                let test = self.choose(ANY_BIT, bits, refuse, allow);
                self.argument(n, test)
            }
            Rule::Holding(n, bits) => {
                let test = self.allow_if(EQUAL, bits);
                let held = self.step(AND, bits, test);
                self.argument(n, held)
            }
            Rule::OnSelf => {
                let test = self.allow_if(EQUAL, pid);
                self.argument(0, test)
            }
        }
    }

    /// Finds the loaded number's run.
    fn halve(&mut self, runs: &[(u32, Option<Rule>)], pid: u32) -> Place {
        let (low, high) = runs.split_at(runs.len() / 2);
        match high.first() {
            Some((first, _)) if !low.is_empty() => {
                let above = self.halve(high, pid);
                let below = self.halve(low, pid);
                self.choose(AT_LEAST, *first, above, below)
            }
            Some((_, Some(fate))) => self.rule(*fate, pid),
            None | Some((_, None)) => self.give(REFUSE),
        }
    }
}

/// Builds the program. Numbers that have no rule are refused.
pub(super) fn build(rules: &BTreeMap<u32, Rule>, pid: u32) -> Vec<libc::sock_filter> {
    // Runs of numbers with one fate, each by its first.
    let mut runs: Vec<(u32, Option<Rule>)> = vec![(0, None)];
    let mut begin = |number: u32, fate: Option<Rule>| {
        if let Some(last) = runs.last_mut()
            && last.0 == number
        {
            last.1 = fate;
        } else {
            runs.push((number, fate));
        }
    };
    for (number, rule) in rules {
        begin(*number, Some(*rule));
        begin(number + 1, None);
    }
    runs.dedup_by_key(|(_, fate)| *fate);
    let mut program = Backwards::default();
    let lookup = program.halve(&runs, pid);
    let ours = program.step(LOAD, AT_NUMBER, lookup);
    let foreign = program.give(libc::SECCOMP_RET_KILL_PROCESS);
    let test = program.choose(EQUAL, ARCHITECTURE, ours, foreign);
    program.step(LOAD, AT_ARCHITECTURE, test);
    program.last_first.reverse();
    program.last_first
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel's interpreter would return.
    fn run(program: &[libc::sock_filter], number: u32, arguments: [u32; 6]) -> u32 {
        let (mut at, mut a) = (0, 0);
        for _ in 0..10_000 {
            let i = &program[at];
            at += 1;
            let jump = |yes: bool| usize::from(if yes { i.jt } else { i.jf });
            match i.code {
                LOAD => {
                    a = match i.k {
                        AT_NUMBER => number,
                        AT_ARCHITECTURE => ARCHITECTURE,
                        k => arguments[((k - AT_ARGUMENTS) / 8) as usize],
                    }
                }
                AND => a &= i.k,
                EQUAL => at += jump(a == i.k),
                AT_LEAST => at += jump(a >= i.k),
                ANY_BIT => at += jump(a & i.k != 0),
                RETURN => return i.k,
                _ => at += i.k as usize,
            }
        }
        panic!("it does not end");
    }

    #[test]
    fn every_number_meets_its_own_rule_and_no_other() {
        let mut rules = BTreeMap::new();
        for number in [0, 1, 2, 9, 16, 17, 39, 56, 100, 101, 102, 231, 435, 446] {
            rules.insert(number, Rule::Allow);
        }
        rules.insert(16, Rule::Requests(&[0x5421]));
        rules.insert(9, Rule::Without(2, 4));
        rules.insert(39, Rule::OnSelf);
        rules.insert(435, Rule::Fail(38));
        rules.insert(72, Rule::Commands(&[3, 1030]));
        let program = build(&rules, 77);
        for number in 0..500 {
            let got = run(&program, number, [0; 6]);
            let expected = match rules.get(&number) {
                Some(Rule::Allow | Rule::Without(..)) => ALLOW,
                Some(Rule::Fail(38)) => libc::SECCOMP_RET_ERRNO | 38,
                _ => REFUSE,
            };
            assert_eq!(got, expected, "{number}");
        }
        assert_eq!(run(&program, 16, [0, 0x1234_ae80, 0, 0, 0, 0]), ALLOW);
        assert_eq!(run(&program, 16, [0, 0x5421, 0, 0, 0, 0]), ALLOW);
        assert_eq!(run(&program, 16, [0, 0x5412, 0, 0, 0, 0]), REFUSE);
        assert_eq!(run(&program, 9, [0, 0, 7, 0, 0, 0]), REFUSE);
        assert_eq!(run(&program, 72, [0, 3, 0, 0, 0, 0]), ALLOW);
        assert_eq!(run(&program, 72, [0, 1030, 0o20000, 0, 0, 0]), ALLOW);
        assert_eq!(run(&program, 72, [0, 4, 0o4002, 0, 0, 0]), ALLOW);
        let invalid = libc::SECCOMP_RET_ERRNO | 22;
        assert_eq!(run(&program, 72, [0, 4, 0o24002, 0, 0, 0]), invalid);
        assert_eq!(run(&program, 72, [0, 8, 1, 0, 0, 0]), REFUSE);
        assert_eq!(run(&program, 39, [77, 0, 0, 0, 0, 0]), ALLOW);
        // The 32-bit numbers' bit, and beyond.
        for number in [0x4000_0000, 0x4000_0001, u32::MAX] {
            assert_eq!(run(&program, number, [0; 6]), REFUSE);
        }
    }

    #[test]
    fn jumps_over_more_than_a_conditional_jump_reaches() {
        const MANY: [u32; 200] = [7; 200];
        let rules = (0..40).map(|n| (n * 2, Rule::Among(0, &MANY)));
        let program = build(&rules.collect(), 1);
        assert!(program.len() > 4 * 255);
        for number in 0..80 {
            let expected = if number % 2 == 0 { ALLOW } else { REFUSE };
            assert_eq!(run(&program, number, [7; 6]), expected, "{number}");
        }
    }
}
