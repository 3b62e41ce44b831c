//! `kiln verify`.

use std::path::Path;
use std::process::ExitCode;

use kiln_store::{Digest, Store};
use serde::Serialize;

use super::kind;
use crate::failure::Failure;
use crate::output::{Colour, Output, size};

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
