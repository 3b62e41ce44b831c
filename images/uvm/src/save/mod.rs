//! A running μVM becomes files that others are resumed from.
//!
//! Most of its memory is copied while it runs ([`copy`]): it stands still only for what it wrote meanwhile, its CPUs and
//! devices, and what its containers have written.

mod copy;

use std::fs::File;
use std::time::{Duration, Instant};

use kiln_agent_api::slots;
use kiln_store::Kind;

use crate::Error;
use crate::control::Control;
use crate::uvm::Uvm;
use copy::Copying;

/// Copying what was written meanwhile is repeated until it is no more than this, but not more often.
const ENOUGH: u64 = 4 << 20;
const ROUNDS: u32 = 4;

/// The files that a saved μVM consists of: empty ones.
#[derive(Debug)]
pub struct Files {
    /// For CPUs and devices.
    pub state: File,
    /// For its memory.
    pub memory: File,
    /// For what its containers have written, unless it has no disk for that.
    pub scratch: Option<File>,
}

/// What becomes of a μVM that was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Afterwards {
    /// It goes on.
    GoesOn,
    /// It stands still until it is ended.
    StandsStill,
}

/// How a μVM was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stood {
    /// How long it stood still, at the end.
    pub still: Duration,
    /// Bytes of memory that were copied meanwhile.
    pub copied: u64,
}

/// Memory that was copied while the guest ran, but for what it has written since.
#[derive(Debug)]
pub struct Prepared {
    files: Files,
    copying: Copying,
}

impl Uvm {
    /// Lets one that stands still go on.
    pub async fn go_on(&self) -> Result<(), Error> {
        let action = "let the guest go on";
        self.machine().call(action, Control::unpause).await
    }

    /// Begins to save it: it runs meanwhile.
    pub async fn prepare_to_save(&self, files: Files) -> Result<Prepared, Error> {
        // What is being plugged would be saved half.
        self.grown().await?;
        let baked = self.baked().map(|lease| lease.open(Kind::Memory));
        let baked = baked.transpose().map_err(Error::Baked)?;
        // What is plugged comes in pieces.
        let most = (u64::from(self.class().max_memory_mib) << 20) + (1 << 30);
        let prepare = move |vmm: &Control| prepare(vmm, files, baked, most);
        self.machine().call("save the guest", prepare).await
    }

    /// Saves it, and says how long it stood still for that. If that fails, it goes on.
    ///
    /// The caller has frozen its containers: in whoever is resumed they stay frozen until that one has an identity.
    /// `digest` is kept in the state's header.
    pub async fn save(
        &self,
        prepared: Prepared,
        digest: [u8; 32],
        afterwards: Afterwards,
    ) -> Result<Stood, Error> {
        let finish = move |vmm: &Control| finish(vmm, prepared, digest, afterwards);
        self.machine().call("save the guest", finish).await
    }
}

/// Copies the memory of a machine while it runs: no more than `most` bytes. It was resumed from the file `baked`, unless it
/// was booted.
pub fn prepare(
    vmm: &Control,
    files: Files,
    baked: Option<File>,
    most: u64,
) -> Result<Prepared, Error> {
    let memory = files.memory.try_clone().map_err(not_copied)?;
    let copying = Copying::begin(vmm.pid(), vmm.memory()?, memory, baked, most);
    let mut copying = copying.map_err(not_copied)?;
    let rounds = if copying.finds_writes() { ROUNDS } else { 0 };
    for _ in 0..rounds {
        // What is found and forgotten at one moment is found again if it is written later.
        vmm.pause()?;
        let found = copying.find();
        vmm.unpause()?;
        let copied = copying.copy(found.map_err(not_copied)?);
        if copied.map_err(not_copied)? <= ENOUGH {
            break;
        }
    }
    Ok(Prepared { files, copying })
}

/// Saves the rest, and says how long the machine stood still for that.
pub fn finish(
    vmm: &Control,
    prepared: Prepared,
    digest: [u8; 32],
    afterwards: Afterwards,
) -> Result<Stood, Error> {
    let begun = Instant::now();
    vmm.pause()?;
    let saved = save_the_rest(vmm, prepared, digest);
    if saved.is_err() || afterwards == Afterwards::GoesOn {
        vmm.unpause()?;
    }
    Ok(Stood {
        copied: saved?,
        still: begun.elapsed(),
    })
}

/// Of a machine that stands still. Tells how much memory was left to copy.
fn save_the_rest(vmm: &Control, prepared: Prepared, digest: [u8; 32]) -> Result<u64, Error> {
    let Prepared { files, mut copying } = prepared;
    let places = vmm.memory()?;
    let copied = if copying.is_of(&places) && copying.finds_writes() {
        let found = copying.find().map_err(not_copied)?;
        copying.copy(found).map_err(not_copied)?
    } else {
        // Memory came or went, or nobody knows what was written.
        copying = copying.anew(places).map_err(not_copied)?;
        copying.length()
    };
    if let Some(scratch) = &files.scratch {
        vmm.save_overlay(slots::SCRATCH, scratch)?;
    }
    vmm.save_state(&files.state, digest, copying.holes())?;
    Ok(copied)
}

fn not_copied(source: std::io::Error) -> Error {
    Error::System {
        action: "copy the guest's memory",
        source,
    }
}
