//! Commands on the store: list, inspect, verify, rm, pin, gc.

mod collect;
mod inspect;
mod list;
mod verify;

use std::path::Path;
use std::process::ExitCode;

use kiln_store::{Digest, Error, Named, Store};

use crate::failure::Failure;
use crate::output::Output;

pub(crate) use collect::collect;
pub(crate) use inspect::inspect;
pub(crate) use list::list;
pub(crate) use verify::verify;

pub(crate) fn remove(root: &Path, names: &[String], output: &Output) -> Result<ExitCode, Failure> {
    let store = Store::open(root)?;
    // All names are looked up before anything is removed: a typing error removes nothing.
    let ids = names
        .iter()
        .map(|name| store.resolve(name))
        .collect::<Result<Vec<_>, _>>()?;
    for id in &children_first(&store, &ids)? {
        store.remove(*id)?;
        if !output.is_json() {
            output.text(&format!("removed {}\n", id.short()))?;
        }
    }
    if output.is_json() {
        output.json(&serde_json::json!({ "removed": ids }))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A μVM that others are stored as the difference to can be removed after those only.
fn children_first(store: &Store, ids: &[Digest]) -> Result<Vec<Digest>, Error> {
    let uvms = store.list()?;
    let is_child = |id: &Digest| {
        let entry = uvms.iter().find(|entry| entry.id == *id);
        let manifest = entry.and_then(|entry| entry.manifest.as_ref().ok());
        manifest.is_some_and(|manifest| !manifest.parents.is_empty())
    };
    let mut ids = ids.to_vec();
    ids.sort_by_key(|id| !is_child(id));
    Ok(ids)
}

pub(crate) fn pin(root: &Path, name: &str, pinned: bool) -> Result<ExitCode, Failure> {
    let store = Store::open(root)?;
    let id = store.resolve(name)?;
    if pinned {
        store.pin(id)?;
    } else {
        store.unpin(id)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Its kind, as programs see it.
fn kind(named: Named) -> &'static str {
    match named.kind {
        "μVM" => "uvm",
        other => other,
    }
}

#[cfg(test)]
pub(crate) mod tests;
