//! Which devices a container may use: a program of the kernel's at its cgroup, made of the specification's rules.
//!
//! A specification's rules name devices of the host by their numbers. Those of the disks would be other disks here, and are left
//! out; disks that the container is given are allowed by what is mounted into it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use libcontainer::oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, Mount};

use super::cgroup::Cgroup;
use crate::error::{Action, AgentError};

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

/// The kernel's numbers for kinds of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Block = 1,
    Char = 2,
}

/// A rule. What is not said is any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<Kind>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    const fn allow(kind: Kind, major: Option<u32>, minor: Option<u32>, access: u32) -> Self {
        Self {
            allow: true,
            kind: Some(kind),
            major,
            minor,
            access,
        }
    }
}

/// What every container may, as with runc: make nodes, and use null, zero, full, random, urandom, tty, ptmx and terminals.
const DEFAULTS: [Rule; 10] = {
    const fn char(major: u32, minor: Option<u32>) -> Rule {
        Rule::allow(Kind::Char, Some(major), minor, ALL)
    }
    [
        Rule::allow(Kind::Char, None, None, MKNOD),
        Rule::allow(Kind::Block, None, None, MKNOD),
        char(1, Some(3)),
        char(1, Some(5)),
        char(1, Some(7)),
        char(1, Some(8)),
        char(1, Some(9)),
        char(5, Some(0)),
        char(5, Some(2)),
        char(136, None),
    ]
};

/// Lets the processes of a cgroup use what the rules allow. No rules: anything.
pub(super) fn attach(
    cgroup: &Cgroup,
    rules: &[LinuxDeviceCgroup],
    mounts: &[Mount],
) -> Result<(), AgentError> {
    if rules.is_empty() {
        return Ok(());
    }
    let mut all: Vec<Rule> = rules.iter().filter_map(guests).collect();
    all.extend(DEFAULTS);
    all.extend(mounts.iter().filter_map(mounted));
    let path = cgroup.path().display();
    let cgroup = File::open(cgroup.path()).action(&format!("open {path}"))?;
    let program = load(&compile(&all))
        .action("load the filter of a container's devices (CONFIG_CGROUP_BPF)")?;
    attach_to(&cgroup, &program).action(&format!("filter the devices of {path}"))
}

/// A rule of the host's as one of the guest's.
fn guests(rule: &LinuxDeviceCgroup) -> Option<Rule> {
    let kind = match rule.typ().unwrap_or_default() {
        LinuxDeviceType::B => Some(Kind::Block),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(Kind::Char),
        _ => None,
    };
    // Any is said by nothing, or by less than nothing.
    let number = |number: Option<i64>| number.and_then(|n| u32::try_from(n).ok());
    let (major, minor) = (number(rule.major()), number(rule.minor()));
    if rule.allow() && kind == Some(Kind::Block) && major.is_some() {
        return None;
    }
    let access = rule.access().as_deref().unwrap_or("rwm");
    let access = access.chars().fold(0, |access, letter| {
        access
            | match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => 0,
            }
    });
    Some(Rule {
        allow: rule.allow(),
        kind,
        major,
        minor,
        access,
    })
}

/// A device that is mounted into the container.
fn mounted(mount: &Mount) -> Option<Rule> {
    let source = mount
        .source()
        .as_deref()
        .filter(|path| path.is_absolute())?;
    let found = std::fs::metadata(source).ok()?;
    let kind = match found.file_type() {
        kind if kind.is_block_device() => Kind::Block,
        kind if kind.is_char_device() => Kind::Char,
        _ => return None,
    };
    let (major, minor) = (libc::major(found.rdev()), libc::minor(found.rdev()));
    Some(Rule::allow(kind, Some(major), Some(minor), ALL))
}

/// An instruction as the kernel reads it: code, registers, offset, number.
type Instruction = u64;

/// The registers: what is returned, the context, and what is read of it.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// Instructions' codes (`include/uapi/linux/bpf.h`).
mod code {
    pub(super) const LOAD_WORD: u8 = 0x61;
    pub(super) const MOVE_REGISTER: u8 = 0xbc;
    pub(super) const MOVE: u8 = 0xb4;
    pub(super) const AND: u8 = 0x54;
    pub(super) const SHIFT_RIGHT: u8 = 0x74;
    pub(super) const JUMP_IF_EQUAL: u8 = 0x15;
    pub(super) const JUMP_IF_NOT_EQUAL: u8 = 0x55;
    pub(super) const EXIT: u8 = 0x95;
}

fn instruction(code: u8, to: u8, from: u8, offset: u16, number: u32) -> Instruction {
    u64::from(code)
        | u64::from(to) << 8
        | u64::from(from) << 12
        | u64::from(offset) << 16
        | u64::from(number) << 32
}

/// The rules as a program. The last rule that says something of an access decides; without one it is denied.
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    let load = |to, offset| instruction(code::LOAD_WORD, to, CONTEXT, offset, 0);
    // The context: access << 16 | kind, major, minor.
    let mut program = vec![
        load(KIND, 0),
        instruction(code::MOVE_REGISTER, ACCESS, KIND, 0, 0),
        instruction(code::AND, KIND, 0, 0, 0xffff),
        instruction(code::SHIFT_RIGHT, ACCESS, 0, 0, 16),
        load(MAJOR, 4),
        load(MINOR, 8),
    ];
    for rule in rules.iter().rev() {
        let part = compile_rule(rule);
        let always = part.len() == 2;
        program.extend(part);
        if always {
            // The kernel takes no program with a part that is never reached.
            return program;
        }
    }
    program.extend(decide(false));
    program
}

fn decide(allow: bool) -> [Instruction; 2] {
    [
        instruction(code::MOVE, RESULT, 0, 0, allow.into()),
        instruction(code::EXIT, 0, 0, 0, 0),
    ]
}

fn compile_rule(rule: &Rule) -> Vec<Instruction> {
    // What leads on to the next rule: the tests' codes, registers and numbers.
    let mut tests = Vec::new();
    if let Some(kind) = rule.kind {
        tests.push((code::JUMP_IF_NOT_EQUAL, KIND, kind as u32));
    }
    let numbers = [(MAJOR, rule.major), (MINOR, rule.minor)];
    for (register, number) in numbers {
        tests.extend(number.map(|number| (code::JUMP_IF_NOT_EQUAL, register, number)));
    }
    let mut part: Vec<_> = tests
        .iter()
        .map(|&(code, register, number)| instruction(code, register, 0, 0, number))
        .collect();
    if rule.access != ALL {
        // An access is allowed by a rule that allows all of it, and denied by one that denies part of it.
        let (of, leads_on) = match rule.allow {
            true => (ALL & !rule.access, code::JUMP_IF_NOT_EQUAL),
            false => (rule.access, code::JUMP_IF_EQUAL),
        };
        part.extend([
            instruction(code::MOVE_REGISTER, RESULT, ACCESS, 0, 0),
            instruction(code::AND, RESULT, 0, 0, of),
            instruction(leads_on, RESULT, 0, 0, 0),
        ]);
    }
    part.extend(decide(rule.allow));
    let length = part.len();
    for (position, instruction) in part.iter_mut().enumerate() {
        let code = (*instruction & 0xff) as u8;
        if matches!(code, code::JUMP_IF_EQUAL | code::JUMP_IF_NOT_EQUAL) {
            // To behind this rule, counted from the next instruction.
            *instruction |= ((length - position - 1) as u64) << 16;
        }
    }
    part
}

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const TYPE_CGROUP_DEVICE: u32 = 15;
const AT_CGROUP_DEVICE: u32 = 6;

/// `union bpf_attr` for a program to be loaded, as far as it is needed.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    rest: [u64; 4],
}

/// The same for one to be attached.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    at: u32,
    flags: u32,
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = Load {
        kind: TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        rest: [0; 4],
    };
    let fd = loop {
        // SAFETY: the kernel reads the attributes, whose size it is told, and from them as many instructions as are said,
        // and a string with an end. All live until the call returns.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                PROG_LOAD,
                &raw const attributes,
                size_of::<Load>(),
            )
        };
        if fd >= 0 {
            break fd;
        }
        let error = io::Error::last_os_error();
        // The kernel leaves off checking a program when a signal arrives, such as that of a child's end.
        if error.kind() != io::ErrorKind::WouldBlock {
            return Err(error);
        }
    };
    let fd = libc::c_int::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn attach_to(cgroup: &File, program: &OwnedFd) -> io::Result<()> {
    let attributes = Attach {
        target: cgroup.as_raw_fd().cast_unsigned(),
        program: program.as_raw_fd().cast_unsigned(),
        at: AT_CGROUP_DEVICE,
        flags: 0,
    };
    // SAFETY: the kernel reads the attributes, whose size it is told; both descriptors are open.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            PROG_ATTACH,
            &raw const attributes,
            size_of::<Attach>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Does what the kernel does with a program: one more way to read the instructions.
    fn run(program: &[Instruction], access: u32, kind: Kind, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind as u32, major, minor];
        let mut registers = [0_u32; 6];
        let mut at = 0;
        loop {
            let word = program[at];
            let (to, from) = ((word >> 8 & 0xf) as usize, (word >> 12 & 0xf) as usize);
            let (offset, number) = ((word >> 16 & 0xffff) as usize, (word >> 32) as u32);
            at += 1;
            match (word & 0xff) as u8 {
                code::LOAD_WORD => registers[to] = context[offset / 4],
                code::MOVE_REGISTER => registers[to] = registers[from],
                code::MOVE => registers[to] = number,
                code::AND => registers[to] &= number,
                code::SHIFT_RIGHT => registers[to] >>= number,
                code::JUMP_IF_EQUAL if registers[to] == number => at += offset,
                code::JUMP_IF_NOT_EQUAL if registers[to] != number => at += offset,
                code::JUMP_IF_EQUAL | code::JUMP_IF_NOT_EQUAL => {}
                code::EXIT => return registers[0] == 1,
                other => panic!("{other:#x}"),
            }
        }
    }

    fn rules(json: &str) -> Vec<Rule> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).expect("rules");
        rules.iter().filter_map(guests).collect()
    }

    /// What containerd writes for a container, and a disk and a card that it is given.
    const USUAL: &str = r#"[
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
        {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "r"},
        {"allow": true, "type": "b", "major": 254, "minor": 16, "access": "rwm"}]"#;

    #[test]
    fn only_what_is_allowed_can_be_used() {
        let program = compile(&rules(USUAL));
        assert!(run(&program, READ | WRITE, Kind::Char, 1, 3));
        assert!(!run(&program, READ, Kind::Block, 1, 3), "another kind");
        assert!(!run(&program, READ, Kind::Char, 1, 1), "another minor");
        assert!(run(&program, READ, Kind::Char, 10, 229));
        assert!(
            !run(&program, READ | WRITE, Kind::Char, 10, 229),
            "more than is allowed"
        );
    }

    #[test]
    fn numbers_of_the_hosts_disks_allow_nothing() {
        let program = compile(&rules(USUAL));
        assert!(!run(&program, READ, Kind::Block, 254, 16));
    }

    #[test]
    fn defaults_let_nodes_be_made_but_not_used() {
        let mut all = rules(r#"[{"allow": false, "access": "rwm"}]"#);
        all.extend(DEFAULTS);
        let program = compile(&all);
        assert!(run(&program, MKNOD, Kind::Block, 254, 0));
        assert!(!run(&program, READ, Kind::Block, 254, 0));
        assert!(run(&program, READ | WRITE, Kind::Char, 136, 7));
        assert!(run(&program, READ, Kind::Char, 1, 9));
    }

    #[test]
    fn later_rules_outdo_earlier_ones() {
        let text = r#"[{"allow": true, "access": "rwm"},
            {"allow": false, "type": "b", "major": 8, "minor": -1, "access": "w"}]"#;
        let program = compile(&rules(text));
        assert!(run(&program, READ, Kind::Block, 8, 1));
        assert!(!run(&program, READ | WRITE, Kind::Block, 8, 1));
        assert!(run(&program, ALL, Kind::Char, 8, 1));
    }

    #[test]
    fn rule_for_everything_is_the_programs_end() {
        let text = r#"[{"allow": false, "type": "c", "major": 1, "access": "rwm"}, {"allow": true, "access": "rwm"}]"#;
        let program = compile(&rules(text));
        assert_eq!(program.len(), 8);
        assert!(run(&program, ALL, Kind::Block, 254, 0));
    }

    #[test]
    fn mounted_device_is_allowed_by_its_own_number() {
        let mount: Mount =
            serde_json::from_str(r#"{"destination": "/x", "source": "/dev/null"}"#).expect("mount");
        assert_eq!(
            mounted(&mount),
            Some(Rule::allow(Kind::Char, Some(1), Some(3), ALL))
        );
    }
}
