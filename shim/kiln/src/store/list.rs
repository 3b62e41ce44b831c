//! `kiln list`.

use std::path::Path;
use std::process::ExitCode;

use kiln_store::{Digest, Entry, Error, Holding, ImageEntry, Manifest, Store};
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{Output, moment, size, table};

/// A μVM as programs see it.
#[derive(Serialize)]
pub(super) struct Listed<'a> {
    kind: &'static str,
    id: Digest,
    pinned: bool,
    used_at: u64,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    manifest: Option<&'a Manifest>,
    /// None if it is not known what it needs.
    #[serde(skip_serializing_if = "Option::is_none")]
    stored: Option<Stored>,
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<String>,
}

/// Bytes on disk of what a μVM needs.
#[derive(Serialize)]
struct Stored {
    /// It is the only one that does.
    alone: u64,
    /// Others need it as well: objects that are equal, and memory that is stored as what differs from another.
    shared: u64,
}

impl<'a> Listed<'a> {
    pub(super) fn new(entry: &'a Entry, holding: Option<Holding>) -> Listed<'a> {
        Listed {
            kind: "uvm",
            id: entry.id,
            pinned: entry.pinned,
            used_at: entry.used_at,
            manifest: entry.manifest.as_ref().ok(),
            stored: holding.map(|Holding { alone, shared }| Stored { alone, shared }),
            damage: entry.manifest.as_ref().err().map(ToString::to_string),
        }
    }
}

/// An image as programs see it.
#[derive(Serialize)]
pub(super) struct ListedImage {
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

fn data(manifest: &Manifest) -> u64 {
    manifest.objects.iter().map(|object| object.data).sum()
}

pub(crate) fn list(root: &Path, output: &Output) -> Result<ExitCode, Failure> {
    let (uvms, images) = match Store::open(root) {
        Ok(store) => (listed(&store)?, store.images().entries()?),
        // Nothing was baked yet: that is a short list, not a failure.
        Err(Error::NoStore(_)) => (Vec::new(), Vec::new()),
        Err(error) => return Err(error.into()),
    };
    if output.is_json() {
        let uvms = uvms.iter();
        let uvms = uvms.map(|(uvm, holding)| Thing::Uvm(Listed::new(uvm, *holding)));
        let images = images.iter().map(|image| Thing::Image(image.into()));
        output.json(&uvms.chain(images).collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    output.text(&list_text(&uvms, &images))?;
    Ok(ExitCode::SUCCESS)
}

/// All μVMs, and what each makes the store hold.
pub(super) fn listed(store: &Store) -> Result<Vec<(Entry, Option<Holding>)>, Error> {
    let entries = store.list()?;
    let holdings = store.holdings(&entries)?;
    let with_holding = |entry: Entry| {
        let holding = holdings.get(&entry.id).copied();
        (entry, holding)
    };
    Ok(entries.into_iter().map(with_holding).collect())
}

pub(super) fn list_text(uvms: &[(Entry, Option<Holding>)], images: &[ImageEntry]) -> String {
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
            "ALONE",
            "SHARED",
            "",
        ];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        rows.extend(
            uvms.iter()
                .map(|(entry, holding)| list_row(entry, *holding)),
        );
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

pub(super) fn list_row(entry: &Entry, holding: Option<Holding>) -> Vec<String> {
    match &entry.manifest {
        Ok(manifest) => {
            let class = &manifest.about.class;
            let Holding { alone, shared } = holding.unwrap_or_default();
            let pin = entry.pinned.then(|| "pinned".to_owned());
            let parents = manifest.parents.iter();
            let parents = parents.map(|parent| format!("child of {}", parent.uvm.short()));
            let saved = manifest.about.saved.as_ref();
            let saved = saved.map(|saved| format!("saved as {}", saved.name));
            let notes: Vec<String> = saved.into_iter().chain(pin).chain(parents).collect();
            vec![
                entry.id.short(),
                moment(manifest.about.baked_at),
                format!("{}-{}", class.cpus, class.max_cpus),
                format!("{}-{} MiB", class.memory_mib, class.max_memory_mib),
                class.slots.to_string(),
                manifest.about.kernel.release.clone(),
                size(data(manifest)),
                size(alone),
                size(shared),
                notes.join(", "),
            ]
        }
        Err(error @ (Error::Older { .. } | Error::Newer { .. })) => {
            vec![entry.id.short(), error.to_string()]
        }
        Err(error) => vec![entry.id.short(), format!("damaged: {error}")],
    }
}
