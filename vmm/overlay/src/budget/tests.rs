use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::*;

const MIB: u64 = 1 << 20;
const CHILD: &str = "KILN_OVERLAY_BUDGET_TEST";

fn budget(total: u64) -> (tempfile::TempDir, impl Fn() -> Membership) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("budget");
    (dir, move || {
        Membership::join(Budget::open_or_make(&path, total).unwrap()).unwrap()
    })
}

#[test]
fn level_is_the_max_min_fair_share() {
    assert_eq!(level(vec![], 100), u64::MAX);
    assert_eq!(level(vec![10, 20], 100), u64::MAX);
    assert_eq!(level(vec![100, 100], 100), 50);
    assert_eq!(level(vec![10, 100, 100], 100), 45);
    assert_eq!(level(vec![10, 30, 100], 100), 60);
    assert_eq!(level(vec![100], 0), 0);
}

#[test]
fn all_may_grow_while_there_is_room_and_then_up_to_the_fair_share() {
    let (_dir, join) = budget(100 * MIB);
    let (a, b) = (join(), join());
    assert!(a.grow(90 * MIB, 200 * MIB));
    assert_eq!(a.allowance(), u64::MAX);
    // Full, but within its share; the other is woken and has to go down to its own.
    let before = a.wake_word().load(Ordering::SeqCst);
    assert!(b.grow(20 * MIB, 200 * MIB));
    assert_ne!(a.wake_word().load(Ordering::SeqCst), before);
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
fn everyone_can_have_a_little_however_small_the_budget() {
    let (_dir, join) = budget(0);
    let members: Vec<_> = (0..5).map(|_| join()).collect();
    assert!(members.iter().all(|member| member.grow(LEAST, MIB << 10)));
    assert!(!members[0].grow(LEAST + 1, MIB << 10));
}

#[test]
fn budget_has_so_many_slots_and_no_more() {
    let (dir, join) = budget(MIB);
    let mut members: Vec<_> = (0..SLOTS).map(|_| join()).collect();
    let path = dir.path().join("budget");
    let open = || Budget::open_or_make(&path, 0).unwrap();
    assert!(matches!(Membership::join(open()), Err(BudgetError::Full)));
    members.pop();
    assert!(Membership::join(open()).is_ok());
}

#[test]
fn file_that_is_no_budget_is_refused() {
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(
        Membership::join(file.try_clone().unwrap()),
        Err(BudgetError::Format)
    ));
    file.set_len(Budget::FILE_LEN).unwrap();
    assert!(matches!(Membership::join(file), Err(BudgetError::Format)));
}

/// Not a test of its own: what the next one runs in another process.
#[test]
fn child_of_the_next_test() {
    let Some(path) = std::env::var_os(CHILD) else {
        return;
    };
    let member = Membership::join(Budget::open_or_make(Path::new(&path), 0).unwrap()).unwrap();
    assert!(member.grow(80 * MIB, 200 * MIB));
    println!("\ngrown");
    std::thread::sleep(std::time::Duration::from_secs(60));
}

#[test]
fn killed_member_leaves_nothing_behind() {
    let (dir, join) = budget(100 * MIB);
    let me = join();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "budget::tests::child_of_the_next_test",
            "--nocapture",
        ])
        .env(CHILD, dir.path().join("budget"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.map(Result::unwrap).any(|line| line == "grown"));
    assert!(!me.grow(60 * MIB, 60 * MIB));
    // SIGKILL.
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(me.grow(60 * MIB, 60 * MIB));
    assert_eq!(me.view().sum, 60 * MIB);
}
