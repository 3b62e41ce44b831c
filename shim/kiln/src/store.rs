//! Commands on the store: list, inspect, verify, rm, pin, gc.

use std::path::Path;
use std::process::ExitCode;

use kiln_agent_api::PROTOCOL_VERSION;
use kiln_store::{
    Collected, Digest, Entry, Error, Host, ImageEntry, Manifest, Named, Policy, Store, Usage, Why,
};
use serde::Serialize;

use crate::args::Gc;
use crate::failure::Failure;
use crate::output::{Colour, Output, moment, size, table};

/// A μVM as programs see it.
#[derive(Serialize)]
struct Listed<'a> {
    kind: &'static str,
    id: Digest,
    pinned: bool,
    used_at: u64,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    manifest: Option<&'a Manifest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<String>,
}

impl<'a> From<&'a Entry> for Listed<'a> {
    fn from(entry: &'a Entry) -> Listed<'a> {
        Listed {
            kind: "uvm",
            id: entry.id,
            pinned: entry.pinned,
            used_at: entry.used_at,
            manifest: entry.manifest.as_ref().ok(),
            damage: entry.manifest.as_ref().err().map(ToString::to_string),
        }
    }
}

/// An image as programs see it.
#[derive(Serialize)]
struct ListedImage {
    kind: &'static str,
    id: Digest,
    used_at: u64,
    length: u64,
    on_disk: u64,
    /// Digest of what is in it; none if its record can't be read.
    content: Option<Digest>,
    synced: bool,
}

impl From<&ImageEntry> for ListedImage {
    fn from(entry: &ImageEntry) -> ListedImage {
        ListedImage {
            kind: "image",
            id: entry.key.digest(),
            used_at: entry.used_at,
            length: entry.length,
            on_disk: entry.bytes,
            content: entry.content,
            synced: entry.synced,
        }
    }
}

/// An entry of the list.
#[derive(Serialize)]
#[serde(untagged)]
enum Thing<'a> {
    Uvm(Listed<'a>),
    Image(ListedImage),
}

/// Whether this host can resume it, and why not.
fn here(manifest: &Manifest) -> String {
    match manifest.resumes_here(&Host::this(PROTOCOL_VERSION)) {
        Ok(()) => "yes".to_owned(),
        Err(why) => format!("no: {why}"),
    }
}

fn data(manifest: &Manifest) -> u64 {
    manifest.objects.iter().map(|object| object.data).sum()
}

/// Bytes on disk of its objects. μVMs can share some.
fn stored(store: &Store, entry: &Entry) -> Result<u64, Error> {
    let objects = entry.manifest.iter().flat_map(|manifest| &manifest.objects);
    objects.map(|object| store.stored_bytes(object)).sum()
}

pub(crate) fn list(root: &Path, output: &Output) -> Result<ExitCode, Failure> {
    let (uvms, images) = match Store::open(root) {
        Ok(store) => (listed(&store)?, store.images().entries()?),
        // Nothing was baked yet: that is a short list, not a failure.
        Err(Error::NoStore(_)) => (Vec::new(), Vec::new()),
        Err(error) => return Err(error.into()),
    };
    if output.is_json() {
        let uvms = uvms.iter().map(|(uvm, _)| Thing::Uvm(uvm.into()));
        let images = images.iter().map(|image| Thing::Image(image.into()));
        output.json(&uvms.chain(images).collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    output.text(&list_text(&uvms, &images))?;
    Ok(ExitCode::SUCCESS)
}

/// All μVMs, and the bytes that each has stored.
fn listed(store: &Store) -> Result<Vec<(Entry, u64)>, Error> {
    let with_bytes = |entry: Entry| stored(store, &entry).map(|bytes| (entry, bytes));
    store.list()?.into_iter().map(with_bytes).collect()
}

fn list_text(uvms: &[(Entry, u64)], images: &[ImageEntry]) -> String {
    let mut text = if uvms.is_empty() {
        "No μVM is baked yet: `kiln bake` makes one.\n".to_owned()
    } else {
        let head = [
            "UVM",
            "BAKED (UTC)",
            "CPUS",
            "MEMORY",
            "SLOTS",
            "KERNEL",
            "DATA",
            "STORED",
            "",
        ];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        rows.extend(uvms.iter().map(|(entry, stored)| list_row(entry, *stored)));
        table(&rows)
    };
    if !images.is_empty() {
        let mut rows = vec![
            ["IMAGE", "USED (UTC)", "SIZE", ""]
                .map(str::to_owned)
                .to_vec(),
        ];
        rows.extend(images.iter().rev().map(image_row));
        text += &format!("\n{}", table(&rows));
    }
    text
}

fn image_row(image: &ImageEntry) -> Vec<String> {
    let state = match image.content {
        Some(_) => "",
        None => "not usable: it is made again when it is needed",
    };
    vec![
        image.key.digest().short(),
        moment(image.used_at),
        size(image.length),
        state.to_owned(),
    ]
}

fn list_row(entry: &Entry, stored: u64) -> Vec<String> {
    let pin = if entry.pinned { "pinned" } else { "" };
    match &entry.manifest {
        Ok(manifest) => {
            let class = &manifest.about.class;
            vec![
                entry.id.short(),
                moment(manifest.about.baked_at),
                format!("{}-{}", class.cpus, class.max_cpus),
                format!("{}-{} MiB", class.memory_mib, class.max_memory_mib),
                class.slots.to_string(),
                manifest.about.kernel.release.clone(),
                size(data(manifest)),
                size(stored),
                pin.to_owned(),
            ]
        }
        Err(error @ (Error::Older { .. } | Error::Newer { .. })) => {
            vec![entry.id.short(), error.to_string()]
        }
        Err(error) => vec![entry.id.short(), format!("damaged: {error}")],
    }
}

pub(crate) fn inspect(root: &Path, name: &str, output: &Output) -> Result<ExitCode, Failure> {
    let store = Store::open(root)?;
    let id = store.resolve(name)?;
    if let Some(image) = store.images().entry(&id.into()) {
        return inspect_image(&image, output);
    }
    let entry = store.entry(id)?;
    if output.is_json() {
        output.json(&Listed::from(&entry))?;
        return Ok(ExitCode::SUCCESS);
    }
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
    ]
    .map(|(name, value)| vec![name.to_owned(), value])
    .to_vec();
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

#[derive(Serialize)]
struct VerifiedJson {
    uvms: u32,
    images: u32,
    objects: u32,
    data: u64,
    orphans: u32,
    damage: Vec<DamageJson>,
}

#[derive(Serialize)]
struct DamageJson {
    kind: &'static str,
    id: Digest,
    what: String,
}

pub(crate) fn verify(root: &Path, names: &[String], output: &Output) -> Result<ExitCode, Failure> {
    let store = Store::open(root)?;
    let ids = names
        .iter()
        .map(|name| store.resolve(name))
        .collect::<Result<Vec<_>, _>>()?;
    let report = store.verify(&ids)?;
    let good = report.damage.is_empty();
    if output.is_json() {
        let describe = |damage: &kiln_store::Damage| DamageJson {
            kind: kind(damage.of()),
            id: damage.of().id,
            what: causes(damage),
        };
        output.json(&VerifiedJson {
            uvms: report.uvms,
            images: report.images,
            objects: report.objects,
            data: report.data,
            orphans: report.orphans,
            damage: report.damage.iter().map(describe).collect(),
        })?;
    } else {
        let mut text = String::new();
        for damage in &report.damage {
            text += &format!(
                "{} {}\n",
                output.paint(Colour::Red, "damaged"),
                causes(damage)
            );
        }
        text += &format!(
            "{} μVMs and {} images, {} objects with {} of data read: {}\n",
            report.uvms,
            report.images,
            report.objects,
            size(report.data),
            if good {
                output.paint(Colour::Green, "nothing is damaged")
            } else {
                "remove what is damaged (`kiln rm`), and bake it again (`kiln bake`) if it is a μVM"
                    .to_owned()
            }
        );
        if report.orphans > 0 {
            text += &format!(
                "{} objects belong to nothing (an interrupted bake): `kiln gc` removes them\n",
                report.orphans
            );
        }
        output.text(&text)?;
    }
    Ok(ExitCode::from(u8::from(!good)))
}

/// Its kind, as programs see it.
fn kind(named: Named) -> &'static str {
    match named.kind {
        "μVM" => "uvm",
        other => other,
    }
}

/// An error and all its causes in one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    text
}

pub(crate) fn remove(root: &Path, names: &[String], output: &Output) -> Result<ExitCode, Failure> {
    let store = Store::open(root)?;
    // All names are looked up before anything is removed: a typing error removes nothing.
    let ids = names
        .iter()
        .map(|name| store.resolve(name))
        .collect::<Result<Vec<_>, _>>()?;
    for id in &ids {
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

#[derive(Serialize)]
struct CollectedJson {
    dry_run: bool,
    removed: Vec<RemovedJson>,
    in_use: Vec<NamedJson>,
    damaged: Vec<NamedJson>,
    objects: u32,
    interrupted: u32,
    freed: u64,
    used: u64,
    budget: Option<u64>,
    flat: u64,
}

#[derive(Serialize)]
struct NamedJson {
    kind: &'static str,
    id: Digest,
}

impl From<&Named> for NamedJson {
    fn from(named: &Named) -> NamedJson {
        NamedJson {
            kind: kind(*named),
            id: named.id,
        }
    }
}

#[derive(Serialize)]
struct RemovedJson {
    #[serde(flatten)]
    what: NamedJson,
    why: &'static str,
}

fn why(why: Why) -> &'static str {
    match why {
        Why::Superseded => "superseded",
        Why::Room => "room",
        Why::Older => "older",
        Why::Unusable => "unusable",
        Why::All => "all",
    }
}

pub(crate) fn collect(root: &Path, options: &Gc, output: &Output) -> Result<ExitCode, Failure> {
    let store = match options.set_budget.or(options.set_flat_budget) {
        // A budget may be set before the first bake.
        Some(_) => Store::open_or_create(root)?,
        None => Store::open(root)?,
    };
    if !options.dry_run {
        if let Some(budget) = options.set_budget {
            store.set_budget(budget.0)?;
        }
        if let Some(budget) = options.set_flat_budget {
            store.set_flat_budget(budget.0)?;
        }
    }
    let report = store.collect(Policy {
        all: options.all,
        keep_superseded: options.keep_superseded,
        target: options.target,
        dry_run: options.dry_run,
    })?;
    let usage = store.usage()?;
    if output.is_json() {
        let removed = report
            .removed
            .iter()
            .map(|r| RemovedJson {
                what: (&r.what).into(),
                why: why(r.why),
            })
            .collect();
        output.json(&CollectedJson {
            dry_run: options.dry_run,
            removed,
            in_use: report.in_use.iter().map(NamedJson::from).collect(),
            damaged: report.damaged.iter().map(NamedJson::from).collect(),
            objects: report.objects,
            interrupted: report.interrupted,
            freed: report.freed,
            used: report.used,
            budget: usage.budget,
            flat: usage.flat,
        })?;
    } else {
        output.text(&collected_text(&report, options.dry_run, &usage))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn said(named: &Named) -> String {
    format!("{} {}", named.kind, named.id.short())
}

fn collected_text(report: &Collected, dry_run: bool, usage: &Usage) -> String {
    let mut text = String::new();
    let verb = if dry_run { "would remove" } else { "removed" };
    for removed in &report.removed {
        let reason = match removed.why {
            Why::Superseded => "a newer one serves the same purpose",
            Why::Room => "least recently used, to make room",
            Why::Older => "an older kiln baked it",
            Why::Unusable => "it can't be used: it is damaged, or another kiln made it",
            Why::All => "asked to remove all",
        };
        text += &format!("{verb} {} ({reason})\n", said(&removed.what));
    }
    for named in &report.in_use {
        text += &format!("kept {} (in use)\n", said(named));
    }
    for named in &report.damaged {
        text += &format!(
            "kept {} (it can't be read: `kiln rm` removes it)\n",
            said(named)
        );
    }
    if report.interrupted > 0 {
        text += &format!(
            "removed what {} interrupted bakes left\n",
            report.interrupted
        );
    }
    let freed = if dry_run { "would free" } else { "freed" };
    text += &format!(
        "{freed} {}; the store takes {}",
        size(report.freed),
        size(report.used)
    );
    if let Some(budget) = usage.budget {
        text += &format!(" of {}", size(budget));
    }
    if usage.flat > 0 {
        text += &format!(", and {} of memory rebuilt from packs", size(usage.flat));
    }
    text.push('\n');
    text
}

#[cfg(test)]
pub(crate) mod tests;
