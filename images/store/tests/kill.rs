//! A baker that is killed at a random moment, again and again, and one that runs out of disk,
//! against a store that must stay whole.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::env;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use kiln_store::testing::description;
use kiln_store::{Digest, Error, Host, ImageKey, Kind, Policy, SegmentDigest, Store, Turn, Wanted};
use kiln_vmm_saved::cpu::{Fingerprint, WORDS};

const CHILD: &str = "KILN_STORE_TEST_ROOT";
const OPENER: &str = "KILN_STORE_TEST_OPEN";

fn bake(store: &Store, seed: u64) -> Result<Digest, Error> {
    let staging = store.begin(0)?;
    let memory = staging.create(Kind::Memory)?;
    memory.set_len(4 << 20).unwrap();
    memory.write_all_at(&noise(256 << 10), 3 << 20).unwrap();
    for i in 0..16 {
        memory
            .write_all_at(&[(seed % 251) as u8 + 1; 5000], i * 200_000)
            .unwrap();
    }
    staging
        .create(Kind::State)?
        .write_all_at(&seed.to_le_bytes(), 0)
        .unwrap();
    let mut about = description(&seed.to_string());
    about.baked_at = seed;
    // Those of another class can be its parents.
    about.class.slots = (seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 62) as u32;
    about.cpu.features = Fingerprint([0; WORDS]);
    staging.commit(about)
}

/// Bytes that do not compress, the same each time.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut bytes = vec![0; length];
    bytes.fill_with(|| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
        (state >> 56) as u8
    });
    bytes
}

/// Opens every memory as after a start of the machine, and says how many of them have parents.
fn open_all_cold(store: &Store) -> u64 {
    go_cold(store);
    let mut children = 0;
    for entry in store.list().unwrap() {
        let lease = store.lease(entry.id).unwrap();
        lease.open(Kind::Memory).unwrap();
        children += u64::from(!lease.manifest().parents.is_empty());
    }
    children
}

/// Makes an image, or finds it.
fn image(store: &Store, seed: u64) -> Result<(), Error> {
    let key = ImageKey::from_identity([seed.to_le_bytes()]);
    let images = store.images();
    if images.lookup(&key)?.is_some() {
        return Ok(());
    }
    if let Turn::Make(making) = images.turn(&key)? {
        let content = vec![seed as u8 + 1; 300_000];
        let hash = *blake3::hash(&content).as_bytes();
        let len = content.len() as u64;
        let file = making.reserve(len)?;
        file.write_all_at(&content, 0).unwrap();
        making.finish(hash, vec![SegmentDigest { len, hash }])?;
    }
    Ok(())
}

/// Not a test of its own: what the tests below run in a process that they kill.
#[test]
fn child() {
    let Some(root) = env::var_os(CHILD) else {
        return;
    };
    let store = Store::open_or_create(Path::new(&root)).unwrap();
    for round in 0u64.. {
        let seed = u64::from(std::process::id()) * 1000 + round;
        bake(&store, seed).unwrap();
        image(&store, round % 7).unwrap();
        if round % 3 == 2 {
            store
                .collect(Policy {
                    target: Some(20 << 20),
                    ..Policy::default()
                })
                .unwrap();
        }
    }
}

/// Does not outlive the test, however that ends.
struct Child(std::process::Child);

impl Child {
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn_child(root: &Path) -> Child {
    spawn("child", CHILD, root, Stdio::null())
}

fn spawn(test: &str, variable: &str, root: &Path, output: Stdio) -> Child {
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(variable, root)
        .stdout(output)
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    Child(child)
}

#[test]
fn store_is_whole_after_kill_9_at_60_moments() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let (mut baked, mut made, mut children) = (0, 0, 0);
    for round in 0..60u64 {
        let mut child = spawn_child(&root);
        // Spread over a bake's length; a generator of our own keeps the moments reproducible.
        let moment = (round * 7919 + 13) % 61;
        sleep(Duration::from_millis(5 + moment));
        child.kill();
        let store = Store::open_or_create(&root).unwrap();
        let report = store.verify(&[]).unwrap();
        assert!(
            report.damage.is_empty(),
            "round {round}: {:?}",
            report.damage
        );
        let host = Host {
            cpu: Fingerprint([0; WORDS]),
            protocol: 1,
        };
        let picked = store.pick(&host, &Wanted::default()).unwrap();
        let newest = store.find(|_| true).unwrap();
        assert_eq!(picked.ok(), newest, "round {round}");
        if round % 3 == 0 {
            children += open_all_cold(&store);
        }
        baked += u64::from(report.uvms);
        made += u64::from(report.images);
    }
    assert!(
        baked > 10 && made > 10 && children > 3,
        "the child was killed before it did anything: {baked} {made} {children}"
    );
    let store = Store::open(&root).unwrap();
    let last = bake(&store, u64::MAX).unwrap();
    store
        .collect(Policy {
            all: true,
            ..Policy::default()
        })
        .unwrap();
    assert!(matches!(store.lease(last), Err(Error::NotFound(_))));
    for empty in ["tmp", "making", "images"] {
        assert_eq!(std::fs::read_dir(root.join(empty)).unwrap().count(), 0);
    }
    assert_eq!(store.verify(&[]).unwrap().orphans, 0);
}

#[test]
fn two_bakers_and_a_collector_at_once_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    let mut children = [spawn_child(&root), spawn_child(&root)];
    let store = Store::open_or_create(&root).unwrap();
    for _ in 0..20 {
        sleep(Duration::from_millis(20));
        let report = store.verify(&[]).unwrap();
        assert!(report.damage.is_empty(), "{:?}", report.damage);
        store.collect(Policy::default()).unwrap();
    }
    for child in &mut children {
        assert!(child.0.try_wait().unwrap().is_none(), "a baker gave up");
        child.kill();
    }
}

/// A lease ends with its holder, however that ended.
#[test]
fn lease_of_a_killed_process_holds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_or_create(dir.path().join("store")).unwrap();
    let id = bake(&store, 1).unwrap();
    let lease = store.lease(id).unwrap();
    // The holder: a process that inherits the lease's descriptor and nothing else of ours.
    use std::os::fd::AsFd;
    let inherited = lease.as_fd().try_clone_to_owned().unwrap();
    let mut holder = Command::new("sleep")
        .arg("60")
        .stdin(Stdio::from(inherited))
        .spawn()
        .unwrap();
    drop(lease);
    assert!(matches!(store.remove(id), Err(Error::InUse { .. })));
    holder.kill().unwrap();
    holder.wait().unwrap();
    // A process that another test is just starting has all our descriptors until it runs its program.
    for _ in 0..100 {
        match store.remove(id) {
            Err(Error::InUse { .. }) => sleep(Duration::from_millis(20)),
            other => return other.unwrap(),
        }
    }
    panic!("the lease outlives its holder");
}

/// Not a test of its own: a process that opens the memory of the only μVM, and says which file it was given.
#[test]
fn opener() {
    let Some(root) = env::var_os(OPENER) else {
        return;
    };
    let store = Store::open(Path::new(&root)).unwrap();
    let lease = store.lease(store.find(|_| true).unwrap().unwrap()).unwrap();
    let file = lease.open(Kind::Memory).unwrap();
    println!("inode={}", file.metadata().unwrap().ino());
}

/// A store with one μVM whose memory takes a while to be rebuilt, perhaps as what differs from that of another one. Gives
/// the memory, and the names of all memories that are rebuilt for it.
struct Cold {
    store: Store,
    id: Digest,
    memory: Vec<u8>,
    rebuilt: Vec<String>,
}

fn cold_store(dir: &Path, has_parent: bool) -> Cold {
    let store = Store::open_or_create(dir.join("store")).unwrap();
    let mut memory = noise(8 << 20);
    memory.iter_mut().for_each(|byte| *byte >>= 4);
    let enter = |memory: &[u8], name: &str, baked_at| {
        let staging = store.begin(0).unwrap();
        for (kind, bytes) in [(Kind::Memory, memory), (Kind::State, b"state")] {
            let file = staging.create(kind).unwrap();
            file.write_all_at(bytes, 0).unwrap();
        }
        let mut about = description(name);
        (about.baked_at, about.class.slots) = (baked_at, baked_at as u32);
        staging.commit(about).unwrap()
    };
    let mut ids = vec![enter(&memory, "one", 1)];
    if has_parent {
        memory.iter_mut().step_by(512).for_each(|byte| *byte ^= 1);
        ids.push(enter(&memory, "two", 2));
    }
    let memory_of = |id: &Digest| {
        let lease = store.lease(*id).unwrap();
        assert_eq!(lease.manifest().parents.len(), usize::from(*id != ids[0]));
        let object = lease.manifest().object(Kind::Memory).unwrap();
        object.digest.to_string()
    };
    let mut rebuilt: Vec<String> = ids.iter().map(memory_of).collect();
    rebuilt.sort();
    let id = *ids.last().unwrap();
    go_cold(&store);
    Cold {
        store,
        id,
        memory,
        rebuilt,
    }
}

/// As after a start of the machine.
fn go_cold(store: &Store) {
    std::fs::remove_dir_all(store.root().join("flat")).unwrap();
}

/// Files of all boots below `flat/`.
fn flats(store: &Store) -> Vec<String> {
    let list = |dir: &Path| -> Vec<_> {
        let entries = std::fs::read_dir(dir).into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let boots = list(&store.root().join("flat"));
    let files = boots.iter().flat_map(|boot| list(boot));
    let name = |path: std::path::PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    let mut names: Vec<String> = files.map(name).collect();
    names.sort();
    names
}

#[test]
fn processes_that_open_a_cold_memory_at_once_share_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let Cold {
        store,
        id,
        memory,
        rebuilt,
    } = cold_store(dir.path(), true);
    let start = || spawn("opener", OPENER, store.root(), Stdio::piped());
    let mut openers: Vec<_> = (0..16).map(|_| start()).collect();
    let mut inodes = BTreeSet::new();
    for opener in &mut openers {
        let mut text = String::new();
        let output = opener.0.stdout.as_mut().unwrap();
        output.read_to_string(&mut text).unwrap();
        let inode = text.lines().find_map(|line| line.split_once("inode="));
        inodes.insert(inode.expect(&text).1.to_owned());
        assert!(opener.0.wait().unwrap().success());
    }
    assert_eq!(inodes.len(), 1, "{inodes:?}");
    assert_eq!(flats(&store), rebuilt);
    let path = store.lease(id).unwrap().path(Kind::Memory).unwrap();
    assert!(std::fs::read(path).unwrap() == memory);
}

#[test]
fn memory_is_whole_after_kill_9_of_those_who_rebuild_it() {
    kill_those_who_rebuild(false);
}

#[test]
fn child_and_parent_are_whole_after_kill_9_of_those_who_rebuild_them() {
    kill_those_who_rebuild(true);
}

fn kill_those_who_rebuild(has_parent: bool) {
    /// Moments within a rebuild.
    const ROUNDS: u32 = 12;
    let dir = tempfile::tempdir().unwrap();
    let Cold {
        store,
        id,
        memory,
        rebuilt,
    } = cold_store(dir.path(), has_parent);
    // Begins to rebuild.
    let leader = || {
        let mut leader = spawn("opener", OPENER, store.root(), Stdio::null());
        while flats(&store).is_empty() && leader.0.try_wait().unwrap().is_none() {
            sleep(Duration::from_micros(100));
        }
        leader
    };
    // On some machines it takes a few milliseconds.
    let mut undisturbed = leader();
    let begun = Instant::now();
    assert!(undisturbed.0.wait().unwrap().success());
    let takes = begun.elapsed();
    go_cold(&store);
    let mut interrupted = 0;
    for round in 0.. {
        if round >= ROUNDS && interrupted > 0 {
            break;
        }
        assert!(
            round < 20 * ROUNDS,
            "nobody was killed in the midst of a rebuild"
        );
        let mut leader = leader();
        sleep(takes * (round * 7 % ROUNDS) / ROUNDS);
        let mut follower = spawn("opener", OPENER, store.root(), Stdio::null());
        leader.kill();
        interrupted += u64::from(flats(&store).iter().any(|name| name.contains(".new-")));
        if round % 2 == 0 {
            follower.kill();
        } else {
            assert!(follower.0.wait().unwrap().success());
        }
        let lease = store.lease(id).unwrap();
        let path = lease.path(Kind::Memory).unwrap();
        assert!(std::fs::read(path).unwrap() == memory, "round {round}");
        // A leader that dies lets go of the pack before its own file; if that was seen, the next writer takes the file.
        if flats(&store) != rebuilt {
            drop(store.begin(0).unwrap());
        }
        assert_eq!(flats(&store), rebuilt, "round {round}");
        go_cold(&store);
    }
}
