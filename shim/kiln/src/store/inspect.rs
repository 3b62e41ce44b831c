//! `kiln inspect` of what is in the store.

use std::path::Path;
use std::process::ExitCode;

use kiln_agent_api::PROTOCOL_VERSION;
use kiln_store::{Holding, Host, ImageEntry, Manifest, Store};

use super::list::{Listed, ListedImage};
use crate::failure::Failure;
use crate::output::{Output, moment, size, table};

/// Whether this host can resume it, and why not.
fn here(manifest: &Manifest) -> String {
    match manifest.resumes_here(&Host::this(PROTOCOL_VERSION)) {
        Ok(()) => "yes".to_owned(),
        Err(why) => format!("no: {why}"),
    }
}

pub(crate) fn inspect(root: &Path, name: &str, output: &Output) -> Result<ExitCode, Failure> {
    let store = Store::open(root)?;
    let id = store.resolve(name)?;
    if let Some(image) = store.images().entry(&id.into()) {
        return inspect_image(&image, output);
    }
    let entry = store.entry(id)?;
    // What it shares depends on all others.
    let holding = store.holdings(&store.list()?)?.get(&id).copied();
    if output.is_json() {
        output.json(&Listed::new(&entry, holding))?;
        return Ok(ExitCode::SUCCESS);
    }
    let Holding { alone, shared } = holding.unwrap_or_default();
    let (id, used_at, pinned) = (entry.id, entry.used_at, entry.pinned);
    let manifest = entry.manifest?;
    let about = &manifest.about;
    let mut rows: Vec<Vec<String>> = [
        ("μVM", id.to_string()),
        (
            "baked",
            format!(
                "{} UTC by kiln {}",
                moment(about.baked_at),
                about.kiln_version
            ),
        ),
        ("last used", format!("{} UTC", moment(used_at))),
        ("pinned", if pinned { "yes" } else { "no" }.to_owned()),
        ("class", about.class.to_string()),
        ("kernel", about.kernel.release.clone()),
        ("command line", about.kernel.command_line.clone()),
        ("kernel image", about.kernel.digest.to_string()),
        ("initramfs", about.initramfs.to_string()),
        ("agent", about.agent_version.clone()),
        ("CPU", format!("{} {}", about.cpu.vendor, about.cpu.model)),
        ("protocol", about.protocol.to_string()),
        ("resumes here", here(&manifest)),
        ("guest memory used", size(about.guest_used_kib << 10)),
        ("recipe", about.recipe.to_string()),
        (
            "stored",
            format!(
                "{} alone, {} together with others",
                size(alone),
                size(shared)
            ),
        ),
    ]
    .map(|(name, value)| vec![name.to_owned(), value])
    .to_vec();
    if let Some(saved) = &about.saved {
        rows.push(vec!["saved as".to_owned(), saved.name.clone()]);
        rows.push(vec!["resumed from".to_owned(), saved.bake.to_string()]);
        for disk in &saved.disks {
            rows.push(vec!["runs on image".to_owned(), disk.image.clone()]);
        }
    }
    for parent in &manifest.parents {
        rows.push(vec!["child of".to_owned(), parent.uvm.to_string()]);
    }
    for child in store.children(id)? {
        rows.push(vec!["parent of".to_owned(), child.to_string()]);
    }
    for object in &manifest.objects {
        let sizes = format!(
            "{} of data, {} stored, {} long",
            size(object.data),
            size(store.stored_bytes(object)?),
            size(object.length)
        );
        rows.push(vec![
            object.kind.to_string(),
            format!("{}  {sizes}", object.digest),
        ]);
    }
    output.text(&table(&rows))?;
    Ok(ExitCode::SUCCESS)
}

fn inspect_image(image: &ImageEntry, output: &Output) -> Result<ExitCode, Failure> {
    if output.is_json() {
        output.json(&ListedImage::from(image))?;
        return Ok(ExitCode::SUCCESS);
    }
    let content = image
        .content
        .map_or("unknown".to_owned(), |digest| digest.to_string());
    let sizes = format!("{} long, {} on disk", size(image.length), size(image.bytes));
    let after_power_cut = match image.synced {
        true => "used as it is",
        false => "read once before it is used",
    };
    let rows = [
        ("image", image.key.to_string()),
        ("last used", format!("{} UTC", moment(image.used_at))),
        ("size", sizes),
        ("content", content),
        ("after a restart", after_power_cut.to_owned()),
    ]
    .map(|(name, value)| vec![name.to_owned(), value]);
    output.text(&table(&rows))?;
    Ok(ExitCode::SUCCESS)
}
