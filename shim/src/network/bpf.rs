//! One small BPF program: every TCP connection that is made inside a network namespace, to whatever
//! port, goes to one listening socket, which then learns from its own address which port was meant.
//!
//! It is an `sk_lookup` program (`Documentation/bpf/prog_sk_lookup.rst`), asked by the kernel when no
//! connection matches a packet. No packet filter is involved, so none has to be there, and those
//! that CNI plug-ins set up are left alone.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

// linux/bpf.h
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;
const FUNC_MAP_LOOKUP_ELEM: i32 = 1;
const FUNC_SK_RELEASE: i32 = 86;
const FUNC_SK_ASSIGN: i32 = 124;
const PSEUDO_MAP_FD: u8 = 1;
/// `bpf_sk_lookup.protocol`.
const PROTOCOL_OFFSET: i16 = 12;
const SK_PASS: i32 = 1;

#[repr(C)]
#[derive(Default)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

const _: () = assert!(size_of::<MapUpdate>() == 32 && size_of::<ProgLoad>() == 72);

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn op(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    }
}

/// The program, for the map that holds the socket.
fn program(map: RawFd) -> [Instruction; 19] {
    const MOV: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
    const MOV_IMM: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
    const ADD_IMM: u8 = 0x07; // BPF_ALU64 | BPF_ADD | BPF_K
    const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
    const STORE_IMM: u8 = 0x62; // BPF_ST | BPF_MEM | BPF_W
    const LOAD_64: u8 = 0x18; // BPF_LD | BPF_IMM | BPF_DW
    const JUMP_NE: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
    const JUMP_EQ: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const CALL: u8 = 0x85; // BPF_JMP | BPF_CALL
    const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT
    [
        op(MOV, 6, 1, 0, 0),                      // keep the context
        op(LOAD_WORD, 2, 1, PROTOCOL_OFFSET, 0),  // its protocol
        op(JUMP_NE, 2, 0, 14, libc::IPPROTO_TCP), // not TCP: leave it alone
        op(STORE_IMM, 10, 0, -4, 0),              // the map's only key, on the stack
        op(MOV, 2, 10, 0, 0),
        op(ADD_IMM, 2, 0, 0, -4),
        op(LOAD_64, 1, PSEUDO_MAP_FD, 0, map), // two instructions long
        op(0, 0, 0, 0, 0),
        op(CALL, 0, 0, 0, FUNC_MAP_LOOKUP_ELEM),
        op(JUMP_EQ, 0, 0, 7, 0), // no socket: leave it alone
        op(MOV, 7, 0, 0, 0),
        op(MOV, 1, 6, 0, 0),
        op(MOV, 2, 7, 0, 0),
        op(MOV_IMM, 3, 0, 0, 0),
        op(CALL, 0, 0, 0, FUNC_SK_ASSIGN),
        op(MOV, 1, 7, 0, 0),
        op(CALL, 0, 0, 0, FUNC_SK_RELEASE),
        op(MOV_IMM, 0, 0, 0, SK_PASS),
        op(EXIT, 0, 0, 0, 0),
    ]
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of the attributes, all of whose structures here
    // are plain numbers without padding; what they point to lives in the callers' frames.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn new_fd(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the commands that call this return a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: &impl AsFd) -> io::Result<u32> {
    u32::try_from(fd.as_fd().as_raw_fd()).map_err(io::Error::other)
}

fn address<T: ?Sized>(of: &T) -> u64 {
    std::ptr::from_ref(of).cast::<u8>().expose_provenance() as u64
}

/// Sends every TCP connection of the namespace to the socket, for as long as the returned descriptor is
/// open.
pub(super) fn catch_all(netns: &impl AsFd, listener: &impl AsFd) -> io::Result<OwnedFd> {
    let map = new_fd(bpf(
        MAP_CREATE,
        &MapCreate {
            kind: MAP_TYPE_SOCKMAP,
            key_size: 4,
            value_size: 8,
            max_entries: 1,
            flags: 0,
        },
    )?)?;
    let (key, value) = (0_u32, u64::from(number(listener)?));
    bpf(
        MAP_UPDATE_ELEM,
        &MapUpdate {
            map: number(&map)?,
            _pad: 0,
            key: address(&key),
            value: address(&value),
            flags: 0,
        },
    )?;
    let code = program(map.as_raw_fd());
    let mut name = [0; 16];
    name[..12].copy_from_slice(b"kiln_forward");
    let program = new_fd(bpf(
        PROG_LOAD,
        &ProgLoad {
            kind: PROG_TYPE_SK_LOOKUP,
            instructions: u32::try_from(code.len()).map_err(io::Error::other)?,
            code: address(&code),
            // No function it calls asks for a licence.
            license: address(c"Apache-2.0"),
            name,
            expected_attach_type: ATTACH_SK_LOOKUP,
            ..ProgLoad::default()
        },
    )?)?;
    new_fd(bpf(
        LINK_CREATE,
        &LinkCreate {
            program: number(&program)?,
            target: number(netns)?,
            attach_type: ATTACH_SK_LOOKUP,
            flags: 0,
        },
    )?)
}
