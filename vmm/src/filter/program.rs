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

fn instruction(code: u16, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

fn give(value: u32) -> libc::sock_filter {
    instruction(RETURN, value, 0, 0)
}

/// The lower half of an argument. Upper halves are not looked at: the kernel does not either for what is asked here
/// (ioctl's request, protection bits, flags, process ids).
fn argument(n: u32) -> libc::sock_filter {
    instruction(LOAD, AT_ARGUMENTS + 8 * n, 0, 0)
}

/// What all of KVM's requests have in their second byte (linux/kvm.h).
const KVMIO: u32 = 0xae;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
/// Raises SIGSYS, whose handler says what was refused and ends the process.
const REFUSE: u32 = libc::SECCOMP_RET_TRAP;

fn rule(rule: Rule, pid: u32) -> Vec<libc::sock_filter> {
    match rule {
        Rule::Allow => vec![give(ALLOW)],
        Rule::Fail(errno) => vec![give(libc::SECCOMP_RET_ERRNO | errno.unsigned_abs())],
        Rule::Among(n, values) => {
            let mut all = vec![argument(n)];
            among(values, &mut all);
            all
        }
        Rule::Requests(values) => {
            let mut all = vec![
                argument(1),
                instruction(AND, 0xff00, 0, 0),
                instruction(EQUAL, KVMIO << 8, 0, 1),
                give(ALLOW),
                argument(1),
            ];
            among(values, &mut all);
            all
        }
        Rule::Without(n, bits) => vec![
            argument(n),
            instruction(ANY_BIT, bits, 1, 0),
            give(ALLOW),
            give(REFUSE),
        ],
        Rule::Holding(n, bits) => vec![
            argument(n),
            instruction(AND, bits, 0, 0),
            instruction(EQUAL, bits, 0, 1),
            give(ALLOW),
            give(REFUSE),
        ],
        Rule::OnSelf => vec![
            argument(0),
            instruction(EQUAL, pid, 0, 1),
            give(ALLOW),
            give(REFUSE),
        ],
    }
}

fn among(values: &[u32], all: &mut Vec<libc::sock_filter>) {
    for value in values {
        all.push(instruction(EQUAL, *value, 0, 1));
        all.push(give(ALLOW));
    }
    all.push(give(REFUSE));
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
    let mut program = vec![
        instruction(LOAD, AT_ARCHITECTURE, 0, 0),
        instruction(EQUAL, ARCHITECTURE, 1, 0),
        give(libc::SECCOMP_RET_KILL_PROCESS),
        instruction(LOAD, AT_NUMBER, 0, 0),
    ];
    program.extend(halve(&runs, pid));
    program
}

fn halve(runs: &[(u32, Option<Rule>)], pid: u32) -> Vec<libc::sock_filter> {
    let (low, high) = runs.split_at(runs.len() / 2);
    let Some((first, fate)) = high.first() else {
        return vec![give(REFUSE)];
    };
    if low.is_empty() {
        return fate.map_or_else(|| vec![give(REFUSE)], |fate| rule(fate, pid));
    }
    let (below, above) = (halve(low, pid), halve(high, pid));
    let mut all = Vec::with_capacity(below.len() + above.len() + 2);
    match u8::try_from(below.len()) {
        Ok(skip) => all.push(instruction(AT_LEAST, *first, skip, 0)),
        Err(_) => {
            // Too far for a conditional jump's eight bits.
            all.push(instruction(AT_LEAST, *first, 0, 1));
            let far = (libc::BPF_JMP | libc::BPF_JA) as u16;
            // A filter has at most 4096 instructions.
            all.push(instruction(far, below.len() as u32, 0, 0));
        }
    }
    all.extend(below);
    all.extend(above);
    all
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
