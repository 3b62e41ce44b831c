//! Disks that come and go: files, overlays, in baked slots and beyond them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kiln_e2e::harness::Case;
use kiln_e2e::uvm::{Uvm, slots};
use kiln_e2e::{Test, cases};
use kiln_uvm::ends::Ends;
use kiln_uvm::ends::Pool;
use kiln_uvm::{Flush, OverlayFigures};

use super::{baked, blocking};
use crate::suite::same;

const MIB: u64 = 1 << 20;

pub(super) fn cases() -> Vec<Case> {
    cases![
        a_disk_comes_into_a_slot_is_written_and_goes,
        a_disk_given_at_resume_is_there,
        disks_beyond_the_slots_are_plugged_and_unplugged,
        an_overlay_keeps_what_is_written_over_a_template_and_spills,
        an_overlays_content_is_saved_with_the_machine.limit(300),
        an_overlay_without_room_fails_the_write_and_nothing_else,
    ]
}

fn disk(path: &Path, len: u64) -> Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    file.set_len(len)?;
    Ok(file)
}

/// As a pod's machine: its first disks get rings, those after them threads.
fn with_rings() -> Ends<'static> {
    let mut ends = Ends::new();
    ends.disks_later(2);
    ends
}

/// Waits until the disk in a slot has a size in the guest; its name there.
fn name_of(uvm: &Uvm, slot: u8, size: u64) -> Result<String> {
    let script = format!(
        "d=$(basename /sys/bus/pci/devices/0000:00:{slot:02x}.0/virtio*/block/*) && \
         : < /dev/$d && echo $d $(cat /sys/block/$d/size)"
    );
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let seen = uvm.run(&script)?.1;
        if let Some((name, sectors)) = seen.split_once(' ')
            && sectors == (size / 512).to_string()
        {
            return Ok(name.to_owned());
        }
        if Instant::now() > deadline {
            bail!("slot {slot} is not a disk of {size} bytes but {seen:?}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn wait_gone(uvm: &Uvm, slot: u8) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while uvm
        .run(&format!(
            "test ! -e /sys/bus/pci/devices/0000:00:{slot:02x}.0"
        ))?
        .0
        != 0
    {
        ensure!(Instant::now() < deadline, "slot {slot} stays on the bus");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

async fn a_disk_comes_into_a_slot_is_written_and_goes(test: Test) -> Result<()> {
    blocking(test, |dir| {
        let uvm = Uvm::resume(dir, &baked()?, with_rings())?;
        let file = disk(&dir.join("disk"), 64 * MIB)?;
        file.write_all_at(b"from the node", 1 << 20)?;
        let slot = uvm.vmm().attach_disk(None, &file, false)?;
        same!(slot, slots::DISK);
        let name = name_of(&uvm, slot, 64 * MIB)?;
        same!(
            uvm.sh(&format!("dd if=/dev/{name} bs=1M skip=1 count=1 2>/dev/null | head -c 13"))?,
            "from the node"
        );
        // Written in the guest, the same on the node.
        let sum = uvm.sh(&format!(
            "head -c 16777216 /dev/urandom > /tmp/r; dd if=/tmp/r of=/dev/{name} bs=1M seek=8 conv=fsync 2>&1; \
             sha256sum < /tmp/r; rm /tmp/r"
        ))?;
        let mut written = vec![0; 16 << 20];
        file.read_exact_at(&mut written, 8 << 20)?;
        ensure!(
            sum.contains(&sha256(&written)),
            "the disk's content differs: {sum}"
        );
        // Discarded: holes in the file.
        use std::os::unix::fs::MetadataExt;
        let before = file.metadata()?.blocks();
        uvm.sh(&format!("blkdiscard -o 8388608 -l 16777216 /dev/{name}"))?;
        let after = file.metadata()?.blocks();
        ensure!(after + 30_000 < before, "{before} blocks before the discard, {after} after");
        uvm.vmm().detach_disk(slot)?;
        name_of(&uvm, slot, 0)?;
        // Another one in the same slot.
        let other = disk(&dir.join("other"), 32 * MIB)?;
        other.write_all_at(b"the other", 0)?;
        same!(uvm.vmm().attach_disk(None, &other, true)?, slot);
        let name = name_of(&uvm, slot, 32 * MIB)?;
        same!(uvm.sh(&format!("head -c 9 /dev/{name}"))?, "the other");
        // Which the guest takes for writable, and is not.
        let (code, _) = uvm.run(&format!("dd if=/dev/zero of=/dev/{name} count=1 conv=fsync"))?;
        ensure!(code != 0, "a read-only disk was written");
        let mut start = [0; 9];
        other.read_exact_at(&mut start, 0)?;
        same!(&start, b"the other");
        Ok(())
    })
    .await
}

async fn a_disk_given_at_resume_is_there(test: Test) -> Result<()> {
    blocking(test, |dir| {
        let file = disk(&dir.join("disk"), 3 * MIB)?;
        file.write_all_at(b"early", 0)?;
        let mut ends = Ends::new();
        ends.disk(slots::DISK + 1, &file, true);
        let uvm = Uvm::resume(dir, &baked()?, ends)?;
        let name = name_of(&uvm, slots::DISK + 1, 3 * MIB)?;
        same!(uvm.sh(&format!("head -c 5 /dev/{name}"))?, "early");
        Ok(())
    })
    .await
}

async fn disks_beyond_the_slots_are_plugged_and_unplugged(test: Test) -> Result<()> {
    blocking(test, |dir| {
        let mut uvm = Uvm::resume(dir, &baked()?, with_rings())?;
        // Disks come and go while others are read.
        uvm.sh(
            "(while :; do cat /dev/vd* > /dev/null 2>&1; usleep 20000; done) > /dev/null 2>&1 &",
        )?;
        // The second round after a snapshot with everything in place.
        for round in 0..2 {
            let mut taken = Vec::new();
            for i in 0..u64::from(slots::DISKS) + 8 {
                let size = (i + 1) * MIB;
                let file = disk(&dir.join(format!("disk{i}")), size)?;
                file.write_all_at(format!("disk {i:02}").as_bytes(), 0)?;
                let slot = uvm.vmm().attach_disk(None, &file, false)?;
                let name = name_of(&uvm, slot, size)?;
                same!(
                    uvm.sh(&format!("head -c 7 /dev/{name}"))?,
                    format!("disk {i:02}")
                );
                taken.push(slot);
            }
            while let Some(slot) = taken.pop() {
                uvm.vmm()
                    .detach_disk(slot)
                    .with_context(|| format!("slot {slot}"))?;
                if (slots::DISK..slots::DISK + slots::DISKS).contains(&slot) {
                    name_of(&uvm, slot, 0)?;
                } else {
                    wait_gone(&uvm, slot)?;
                }
            }
            if round == 0 {
                let again = uvm.snapshot(&dir.join("again"), false)?;
                drop(uvm);
                uvm = Uvm::resume(dir, &again, with_rings())?;
            }
        }
        Ok(())
    })
    .await
}

/// A pool and a spill file for it.
fn pool(ram: u64, spill: Option<&File>) -> Pool<'_> {
    Pool {
        ram,
        spill: spill.map(|file| (file, 1 << 30)),
        seat: None,
        flush: Flush::None,
    }
}

fn figures(uvm: &Uvm) -> Result<OverlayFigures> {
    let figures = uvm.vmm().figures()?;
    figures.overlays.context("there are no overlays")
}

async fn an_overlay_keeps_what_is_written_over_a_template_and_spills(test: Test) -> Result<()> {
    blocking(test, |dir| {
        const SIZE: u64 = 512 * MIB;
        let uvm = Uvm::resume(dir, &baked()?, Ends::new())?;
        let template = disk(&dir.join("template"), SIZE)?;
        make_file_system(&dir.join("template"))?;
        let before = std::fs::read(dir.join("template"))?;
        let spill = disk(&dir.join("spill"), 0)?;
        std::fs::remove_file(dir.join("spill"))?;
        let pool = pool(16 * MIB, Some(&spill));
        let slot = uvm
            .vmm()
            .attach_overlay(None, Some(&template), SIZE, Some(&pool))?;
        let name = name_of(&uvm, slot, SIZE)?;
        uvm.sh(&format!("mount -t ext4 /dev/{name} /mnt"))?;
        let sum = uvm.sh(
            "head -c 67108864 /dev/urandom > /mnt/big && sync && sha256sum < /mnt/big; \
             echo 3 > /proc/sys/vm/drop_caches",
        )?;
        let f = figures(&uvm)?;
        ensure!(
            f.ram <= 17 * MIB && f.spill >= 40 * MIB && f.spill_errors == 0,
            "{f:?}"
        );
        same!(uvm.sh("sha256sum < /mnt/big")?, sum);
        uvm.sh("rm /mnt/big && sync && fstrim /mnt; umount /mnt")?;
        let f = figures(&uvm)?;
        ensure!(f.spill < 8 * MIB, "space was not given back: {f:?}");
        ensure!(
            std::fs::read(dir.join("template"))? == before,
            "the template was written"
        );
        Ok(())
    })
    .await
}

/// Saved while a file system on it is mounted and written to, and resumed by another process, twice.
async fn an_overlays_content_is_saved_with_the_machine(test: Test) -> Result<()> {
    blocking(test, |dir| {
        const SIZE: u64 = 512 * MIB;
        let slot = slots::DISK;
        let mut base = disk(&dir.join("template"), SIZE)?;
        make_file_system(&dir.join("template"))?;
        let mut saved = baked()?;
        let mut sums = Vec::new();
        for round in 0..3 {
            let spill = disk(&dir.join("spill"), 0)?;
            std::fs::remove_file(dir.join("spill"))?;
            let mut ends = Ends::new();
            let pool = pool(8 * MIB, Some(&spill));
            ends.overlay(slot, Some(&base), SIZE, Some(&pool));
            let uvm = Uvm::resume(dir, &saved, ends)?;
            if round == 0 {
                let name = name_of(&uvm, slot, SIZE)?;
                uvm.sh(&format!("mount -t ext4 /dev/{name} /mnt"))?;
            }
            for (earlier, sum) in sums.iter().enumerate() {
                let file = format!("echo 3 > /proc/sys/vm/drop_caches; sha256sum < /mnt/{earlier}");
                same!(uvm.sh(&file)?, *sum, "written in round {earlier}");
            }
            // More than the overlay's RAM.
            let script = format!(
                "head -c 12000000 /dev/urandom > /mnt/{round}; sync; sha256sum < /mnt/{round}"
            );
            sums.push(uvm.sh(&script)?);
            ensure!(
                uvm.vmm().save_overlay(slot, &spill).is_err(),
                "a running machine's overlay was saved"
            );
            // What the guest has not written back yet is in its memory, which is saved, too.
            uvm.sh(&format!("echo late > /mnt/late{round}"))?;
            uvm.vmm().pause()?;
            let content = disk(&dir.join(format!("content{round}")), 0)?;
            let bytes = uvm.vmm().save_overlay(slot, &content)?;
            ensure!(
                (12_000_000..SIZE / 2).contains(&bytes),
                "{bytes} bytes saved"
            );
            saved = uvm.snapshot(&dir.join(format!("round{round}")), false)?;
            base = content;
        }
        Ok(())
    })
    .await
}

async fn an_overlay_without_room_fails_the_write_and_nothing_else(test: Test) -> Result<()> {
    blocking(test, |dir| {
        let uvm = Uvm::resume(dir, &baked()?, Ends::new())?;
        let pool = pool(8 * MIB, None);
        let slot = uvm
            .vmm()
            .attach_overlay(None, None, 64 * MIB, Some(&pool))?;
        let name = name_of(&uvm, slot, 64 * MIB)?;
        uvm.sh(&format!(
            "dd if=/dev/urandom of=/tmp/r bs=1M count=4 && dd if=/tmp/r of=/dev/{name} bs=1M conv=fsync"
        ))?;
        let (code, _) = uvm.run(&format!(
            "dd if=/dev/urandom of=/dev/{name} bs=1M seek=4 count=32 conv=fsync"
        ))?;
        ensure!(code != 0, "36 MiB fitted into 8");
        uvm.sh(&format!(
            "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/{name} bs=1M count=4 | cmp - /tmp/r"
        ))?;
        // More room, and it goes on.
        uvm.vmm().limit_overlays(64 * MIB, 0)?;
        uvm.sh(&format!(
            "dd if=/dev/urandom of=/dev/{name} bs=1M seek=4 count=32 conv=fsync"
        ))?;
        Ok(())
    })
    .await
}

/// As a bake does it once; on a pod's way nothing is formatted.
fn make_file_system(path: &Path) -> Result<()> {
    let made = std::process::Command::new("mkfs.ext4")
        .args(["-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1"])
        .arg(path)
        .output()
        .context("mkfs.ext4 can't be run; install e2fsprogs")?;
    ensure!(
        made.status.success(),
        "mkfs.ext4: {}",
        String::from_utf8_lossy(&made.stderr)
    );
    Ok(())
}

fn sha256(data: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(data)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}
