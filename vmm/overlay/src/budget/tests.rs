use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;

use super::layout::{FILE_LEN, page_offset};
use super::*;

const MIB: u64 = 1 << 20;
const CHILD: &str = "KILN_OVERLAY_BUDGET_TEST";
const VMM: &str = "KILN_OVERLAY_BUDGET_TEST_VMM";
const ANY: u64 = u64::MAX;

/// A VMM and the process that started it, in one.
struct Member {
    seat: Seat,
    membership: Membership,
}

impl Deref for Member {
    type Target = Membership;

    fn deref(&self) -> &Membership {
        &self.membership
    }
}

/// A descriptor as it arrives at the other end of a socket.
fn sent(fd: BorrowedFd<'_>) -> File {
    fd.try_clone_to_owned().unwrap().into()
}

fn membership_of(seat: &Seat) -> Membership {
    Membership::new(sent(seat.view()), sent(seat.page()), seat.number().into()).unwrap()
}

fn sit(path: &Path, limit: u64) -> Seat {
    Budget::open_or_make(path, 0).unwrap().join(limit).unwrap()
}

fn join(path: &Path, limit: u64) -> Member {
    let seat = sit(path, limit);
    let membership = membership_of(&seat);
    Member { seat, membership }
}

fn budget(total: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(Budget::FILE_NAME);
    Budget::open_or_make(&path, total).unwrap();
    (dir, path)
}

/// Writes to the page of a member as a VMM may that has been broken.
fn lie(member: &Member, used: u64, claim: u64) {
    let file = sent(member.seat.page());
    let at = page_offset(member.seat.number().into()).cast_unsigned();
    file.write_all_at(&u64::MAX.to_le_bytes(), at).unwrap();
    file.write_all_at(&used.to_le_bytes(), at + 8).unwrap();
    file.write_all_at(&claim.to_le_bytes(), at + 16).unwrap();
}

#[test]
fn level_is_the_max_min_fair_share() {
    assert_eq!(level(vec![], 100), u64::MAX);
    assert_eq!(level(vec![10, 20], 100), u64::MAX);
    assert_eq!(level(vec![100, 100], 100), 50);
    assert_eq!(level(vec![10, 100, 100], 100), 45);
    assert_eq!(level(vec![10, 30, 100], 100), 60);
    assert_eq!(level(vec![100], 0), 0);
    assert_eq!(level(vec![u64::MAX; 3], u64::MAX), u64::MAX / 3);
}

#[test]
fn all_may_grow_while_there_is_room_and_then_up_to_the_fair_share() {
    let (_dir, path) = budget(100 * MIB);
    let (a, b) = (join(&path, ANY), join(&path, ANY));
    assert!(a.grow(90 * MIB, 200 * MIB));
    assert_eq!(a.allowance(), u64::MAX);
    // Full, but within its share; the other has to go down to its own.
    assert!(b.grow(20 * MIB, 200 * MIB));
    assert_eq!(a.allowance(), 50 * MIB);
    assert!(!a.grow(91 * MIB, 200 * MIB));
    assert_eq!(a.used(), 90 * MIB);
    assert_eq!(a.allowance(), 50 * MIB);
    a.shrink(50 * MIB, true);
    assert!(b.grow(50 * MIB, 200 * MIB));
    assert!(!b.grow(51 * MIB, 200 * MIB));
    drop(a);
    assert!(b.grow(100 * MIB, 200 * MIB));
    b.shrink(10 * MIB, true);
    assert_eq!(b.allowance(), u64::MAX);
}

#[test]
fn who_is_above_its_share_is_woken_through_memory_that_is_read_only() {
    let (_dir, path) = budget(100 * MIB);
    let (a, b) = (join(&path, ANY), join(&path, ANY));
    assert!(a.grow(90 * MIB, 200 * MIB));
    let (woken, hears) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let word = a.wake_word();
            let seen = word.load(Ordering::SeqCst);
            // SAFETY: the word outlives the call; no timeout.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    word.as_ptr(),
                    libc::FUTEX_WAIT,
                    seen,
                    std::ptr::null::<libc::timespec>(),
                )
            };
            woken.send(result).unwrap();
        });
        // Each try wakes, so one that comes before the sleep does not matter.
        let heard = (0..500).find_map(|_| {
            assert!(b.grow(20 * MIB, 200 * MIB));
            hears.recv_timeout(Duration::from_millis(20)).ok()
        });
        assert_eq!(heard, Some(0));
    });
    assert_eq!(a.wake_word().load(Ordering::SeqCst), 0);
}

#[test]
fn everyone_can_have_a_little_however_small_the_budget() {
    let (_dir, path) = budget(0);
    let members: Vec<_> = (0..5).map(|_| join(&path, ANY)).collect();
    assert!(members.iter().all(|member| member.grow(LEAST, MIB << 10)));
    assert!(!members[0].grow(LEAST + 1, MIB << 10));
}

#[test]
fn nobody_grows_beyond_what_it_was_let_join_for() {
    let (_dir, path) = budget(100 * MIB);
    let member = join(&path, 10 * MIB);
    assert!(member.grow(10 * MIB, ANY));
    assert!(!member.grow(10 * MIB + 1, ANY));
    assert_eq!(member.allowance(), 10 * MIB);
    member.seat.set_limit(20 * MIB);
    assert!(member.grow(20 * MIB, ANY));
}

#[test]
fn budget_has_more_slots_than_a_node_has_pods_and_no_more() {
    let (dir, path) = budget(MIB);
    let mut seats: Vec<_> = (0..SLOTS).map(|_| sit(&path, MIB)).collect();
    assert!(seats.len() > 255);
    let numbers: std::collections::BTreeSet<_> = seats.iter().map(Seat::number).collect();
    assert_eq!(numbers.len(), SLOTS);
    let last = membership_of(&seats[SLOTS - 1]);
    assert!(last.grow(MIB, MIB));
    let more = || Budget::open_or_make(&path, 0).unwrap().join(MIB);
    assert!(matches!(more(), Err(BudgetError::Full)));
    seats.remove(7);
    assert_eq!(more().unwrap().number(), 7);
    drop(dir);
}

#[test]
fn pages_of_slots_that_were_never_taken_take_no_memory() {
    let (_dir, path) = budget(100 * MIB);
    let members: Vec<_> = (0..3).map(|_| join(&path, ANY)).collect();
    for member in &members {
        // All of the others' pages that there are have been read afterwards.
        assert!(member.grow(30 * MIB, 60 * MIB));
    }
    let meta = fs::metadata(&path).unwrap();
    assert_eq!(meta.len(), FILE_LEN);
    assert!(meta.blocks() * 512 <= 64 << 10, "{} blocks", meta.blocks());
    assert_eq!(meta.mode() & 0o777, 0o600);
}

#[test]
fn liar_is_worth_what_an_honest_member_is_that_fills_its_limit() {
    const LIMIT: u64 = 30 * MIB;
    let figures = [
        (LIMIT, LIMIT),
        (u64::MAX, u64::MAX),
        (u64::MAX, 0),
        (0, u64::MAX),
        (1 << 63, 0x5555_5555_5555_5555),
        (0, 0),
    ];
    let shares = figures.map(|(used, claim)| {
        let (_dir, path) = budget(100 * MIB);
        let liar = join(&path, LIMIT);
        let (small, large) = (join(&path, ANY), join(&path, ANY));
        assert!(small.grow(20 * MIB, 20 * MIB) && large.grow(80 * MIB, 200 * MIB));
        lie(&liar, used, claim);
        // Full, or about to be: each learns what it may have.
        let grows = large.grow(81 * MIB, 200 * MIB);
        assert!(small.grow(20 * MIB, 20 * MIB));
        // The liar itself may not take what it says.
        assert!(!liar.grow(LIMIT + 1, u64::MAX));
        (large.allowance(), grows)
    });
    let honest = shares[0].0;
    assert_eq!(honest, 50 * MIB);
    assert!(
        shares.iter().all(|(share, _)| *share >= honest),
        "{shares:?}"
    );
}

#[test]
fn garbage_in_every_page_makes_nobody_panic() {
    let (_dir, path) = budget(u64::MAX);
    let members: Vec<_> = (0..40).map(|_| join(&path, ANY)).collect();
    let honest = join(&path, 50 * MIB);
    for pattern in [0, 1, 0x8000_0000_0000_0000, 0xdead_beef_dead_beef, u64::MAX] {
        for member in &members {
            lie(member, pattern, !pattern);
        }
        assert!(honest.grow(LEAST, 50 * MIB));
        assert!(honest.allowance() >= LEAST);
    }
}

/// With others' figures only as large as an honest member's could be, nobody gets less beside a liar.
#[test]
fn more_claims_never_make_a_share_larger_and_capped_ones_never_smaller_than_honest_ones() {
    let mut seed = 1u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 33) % below
    };
    for _ in 0..2000 {
        let total = random(1000);
        let others: Vec<u64> = (0..random(8)).map(|_| random(500)).collect();
        let limit = random(500);
        let beside = |claim: u64| level([others.as_slice(), &[claim.min(limit)]].concat(), total);
        let honest = beside(limit);
        for lie in [0, random(1000), u64::MAX] {
            assert!(beside(lie) >= honest);
        }
    }
}

#[test]
fn file_that_is_no_budget_is_replaced() {
    let (_dir, path) = budget(MIB);
    let damage: [fn(&File); 5] = [
        |file| file.set_len(0).unwrap(),
        |file| file.set_len(FILE_LEN + 1).unwrap(),
        |file| file.write_all_at(b"X", 0).unwrap(),
        |file| file.write_all_at(&[9], 8).unwrap(),
        |file| file.write_all_at(&[0; 8], 12).unwrap(),
    ];
    for damage in damage {
        let before = fs::metadata(&path).unwrap().ino();
        damage(&File::options().write(true).open(&path).unwrap());
        let held = File::open(&path).unwrap();
        let member = Budget::open_or_make(&path, 50 * MIB).unwrap().join(ANY);
        assert!(membership_of(&member.unwrap()).grow(50 * MIB, ANY));
        let after = fs::metadata(&path).unwrap().ino();
        assert_ne!(after, before);
        drop(held);
    }
}

#[test]
fn many_who_find_a_damaged_file_at_once_agree_on_its_successor() {
    let (_dir, path) = budget(MIB);
    fs::write(&path, b"damaged").unwrap();
    let seats: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| sit(&path, MIB))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let named = fs::metadata(&path).unwrap().ino();
    let mut numbers: Vec<_> = seats
        .iter()
        .map(|seat| {
            assert_eq!(sent(seat.view()).metadata().unwrap().ino(), named);
            seat.number()
        })
        .collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 8);
}

#[test]
fn damage_below_the_header_does_no_harm() {
    let (_dir, path) = budget(100 * MIB);
    let file = File::options().write(true).open(&path).unwrap();
    // Slots in use, and the table: members that never were, with limits that never were.
    file.write_all_at(&[0xff; 8], 24).unwrap();
    file.write_all_at(&[0xff; 16 * SLOTS], 64).unwrap();
    let member = join(&path, 50 * MIB);
    assert!(member.grow(50 * MIB, 50 * MIB));
    assert_eq!(member.view().sum, 50 * MIB);
}

#[test]
fn view_can_not_be_made_writable_and_a_writable_one_is_refused() {
    let (_dir, path) = budget(MIB);
    let seat = sit(&path, MIB);
    let view: layout::Mapping<layout::Shared> =
        layout::Mapping::new(&sent(seat.view()), 0, layout::Access::Read).unwrap();
    assert!(!view.can_be_made_writable());
    let wrong = Membership::new(sent(seat.page()), sent(seat.page()), 0);
    assert!(matches!(wrong, Err(BudgetError::Descriptors(_))));
}

#[test]
fn descriptors_of_something_else_are_refused() {
    let (_dir, path) = budget(MIB);
    let seat = sit(&path, MIB);
    let other = tempfile::tempfile().unwrap();
    let two = Membership::new(sent(seat.view()), other.try_clone().unwrap(), 0);
    assert!(matches!(two, Err(BudgetError::Descriptors(_))));
    let short = Membership::new(other.try_clone().unwrap(), other, 0);
    assert!(matches!(short, Err(BudgetError::Format)));
    for slot in [1, SLOTS, usize::MAX] {
        let nobodys = Membership::new(sent(seat.view()), sent(seat.page()), slot);
        assert!(matches!(nobodys, Err(BudgetError::Slot(_))));
    }
}

/// Why the VMM's filter has to refuse `mremap` and `MADV_REMOVE`: the kernel does not.
#[test]
fn page_of_a_member_ends_where_its_neighbours_begins_for_as_long_as_mremap_is_forbidden() {
    let (_dir, path) = budget(MIB);
    let (first, second) = (join(&path, MIB), join(&path, MIB));
    let page: layout::Mapping<layout::Page> = layout::Mapping::new(
        &sent(first.seat.page()),
        page_offset(0),
        layout::Access::Write,
    )
    .unwrap();
    // SAFETY: the mapping is not used any more but through the new address, and forgotten.
    let grown = unsafe { libc::mremap(page.address(), 4096, 8192, libc::MREMAP_MAYMOVE) };
    std::mem::forget(page);
    assert_ne!(grown, libc::MAP_FAILED);
    lie(&second, 77, 0);
    // SAFETY: two pages of the file, which is that long.
    let neighbour = unsafe { grown.byte_add(4096 + 8).cast::<u64>().read_volatile() };
    assert_eq!(neighbour, 77);
    // SAFETY: mapped above; nothing borrows it.
    unsafe { libc::munmap(grown, 8192) };
}

/// Not a test of its own: the processes of the next ones.
///
/// A holder joins and starts a VMM, to which it gives the seat's own descriptor as its standard input.
#[test]
fn child_of_the_next_tests() {
    let Some(path) = std::env::var_os(CHILD) else {
        return;
    };
    let path = PathBuf::from(path);
    if std::env::var_os(VMM).is_some() {
        let page = sent(std::io::stdin().as_fd());
        // SAFETY: nobody else uses this number in this process.
        unsafe { libc::close(0) };
        let member = Membership::new(File::open(path).unwrap(), page, 1).unwrap();
        assert!(member.grow(80 * MIB, 200 * MIB));
        std::io::stderr().write_all(b"\ngrown\n").unwrap();
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    let seat = sit(&path, ANY);
    let mut vmm = child(&path)
        .env(VMM, "")
        .stdin(sent(seat.page()))
        .spawn()
        .unwrap();
    std::io::stderr()
        .write_all(format!("\nvmm {}\n", vmm.id()).as_bytes())
        .unwrap();
    vmm.wait().unwrap();
}

fn child(path: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--exact",
            "budget::tests::child_of_the_next_tests",
            "--nocapture",
        ])
        .env(CHILD, path);
    command
}

/// A holder whose VMM has 80 MiB, and the VMM's process id.
fn holder(path: &Path) -> (Child, i32) {
    let mut holder = child(path)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(holder.stderr.take().unwrap()).lines();
    // Two processes say one line each, in any order, and maybe something else.
    let said: Vec<_> = lines
        .map(Result::unwrap)
        .filter(|line| line == "grown" || line.starts_with("vmm "))
        .take(2)
        .collect();
    assert!(said.iter().any(|line| line == "grown"), "{said:?}");
    let pid = said.iter().find_map(|line| line.strip_prefix("vmm "));
    (holder, pid.unwrap().parse().unwrap())
}

/// Waits until all its threads are gone, as the shim does: a zombie whose other threads still end has its memory yet.
fn kill_and_wait_for(pid: i32) {
    // SAFETY: plain numbers, and a poll of one descriptor that was just made; the process is this test's.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        assert!(fd >= 0);
        libc::kill(pid, libc::SIGKILL);
        let mut poll = libc::pollfd {
            fd: fd.try_into().unwrap(),
            events: libc::POLLIN,
            revents: 0,
        };
        assert_eq!(libc::poll(&raw mut poll, 1, 10_000), 1);
        libc::close(poll.fd);
    }
}

#[test]
fn killed_holder_and_vmm_leave_nothing_behind() {
    let (_dir, path) = budget(100 * MIB);
    let me = join(&path, ANY);
    let (mut shim, vmm) = holder(&path);
    assert!(!me.grow(60 * MIB, 60 * MIB));
    shim.kill().unwrap();
    shim.wait().unwrap();
    kill_and_wait_for(vmm);
    Budget::bury_at(&path).unwrap();
    assert!(me.grow(60 * MIB, 60 * MIB));
    assert_eq!(me.view().sum, 60 * MIB);
    assert_eq!(sit(&path, MIB).number(), 1);
}

#[test]
fn slot_is_nobody_elses_while_a_vmm_lives_whose_holder_was_killed() {
    let (_dir, path) = budget(100 * MIB);
    let me = join(&path, ANY);
    let (mut shim, vmm) = holder(&path);
    shim.kill().unwrap();
    shim.wait().unwrap();
    Budget::bury_at(&path).unwrap();
    // Still counted, and its page still its own.
    assert_eq!(me.view().sum, 80 * MIB);
    assert_eq!(sit(&path, MIB).number(), 2);
    kill_and_wait_for(vmm);
    assert_eq!(sit(&path, MIB).number(), 1);
}

#[test]
fn a_damaged_file_that_somebody_keeps_locked_is_an_error_and_not_a_wait() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("budget");
    std::fs::write(&path, "damaged").unwrap();
    let held = std::fs::File::open(&path).unwrap();
    held.lock().unwrap();
    let error = Budget::open_or_make(&path, 1 << 20).unwrap_err();
    assert!(error.to_string().contains("lock"), "{error}");
    drop(held);
    Budget::open_or_make(&path, 1 << 20).unwrap();
}
