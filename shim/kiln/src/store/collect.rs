//! `kiln gc`.

use std::path::Path;
use std::process::ExitCode;

use kiln_store::{Collected, Digest, Named, Policy, Store, Usage, Why};
use serde::Serialize;

use super::kind;
use crate::args::Gc;
use crate::failure::Failure;
use crate::output::{Output, size};

#[derive(Serialize)]
struct CollectedJson {
    dry_run: bool,
    removed: Vec<RemovedJson>,
    in_use: Vec<NamedJson>,
    parents: Vec<NamedJson>,
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
            parents: report.parents.iter().map(NamedJson::from).collect(),
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

pub(super) fn collected_text(report: &Collected, dry_run: bool, usage: &Usage) -> String {
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
    for named in &report.parents {
        text += &format!(
            "kept {} (others are stored as what differs from it: `kiln inspect` names them)\n",
            said(named)
        );
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
