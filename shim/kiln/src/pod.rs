//! Pods that shims run on this machine, by what their shims tell of them.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use kiln_node::inspect::{Answer, ask};
use kiln_uvm::OverlayFigures;

use crate::failure::Failure;
use crate::output::{Output, size, table};

/// `kiln inspect POD`.
pub(crate) fn inspect(dir: &Path, output: &Output) -> Result<ExitCode, Failure> {
    let said = ask(dir).context("the pod cannot be inspected")?;
    if output.is_json() {
        output.json(&said)?;
    } else {
        output.text(&table(&rows(&said)))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn rows(said: &Answer) -> Vec<Vec<String>> {
    let mut rows = vec![
        ("pod", said.about.pod.clone()),
        ("μVM", said.about.uvm.clone()),
        ("VMM", format!("process {}", said.about.vmm_pid)),
        ("vCPUs", said.cpus.to_string()),
        ("memory", size(said.memory)),
        ("paused", if said.paused { "yes" } else { "no" }.to_owned()),
    ];
    if let Some(overlay) = &said.overlay {
        rows.extend([
            (
                "overlay in RAM",
                format!("{} of {}", size(overlay.ram), size(overlay.ram_limit)),
            ),
            (
                "overlay on disk",
                format!("{} of {}", size(overlay.spill), size(overlay.spill_limit)),
            ),
            ("written", size(overlay.written)),
            ("read", hits(overlay)),
            (
                "moved",
                format!(
                    "{} to the disk, {} chunks back",
                    size(overlay.spilled),
                    overlay.returned_chunks
                ),
            ),
            (
                "writes that waited",
                format!(
                    "{}, {} ms in all",
                    overlay.stalls,
                    overlay.stall_ns / 1_000_000
                ),
            ),
            ("disk errors", overlay.spill_errors.to_string()),
        ]);
    }
    rows.into_iter()
        .map(|(name, value)| vec![name.to_owned(), value])
        .collect()
}

/// Where reads found what they read.
fn hits(overlay: &OverlayFigures) -> String {
    let parts = [
        ("RAM", overlay.read_ram),
        ("disk", overlay.read_spill),
        ("below", overlay.read_base),
    ];
    let all: u64 = parts.iter().map(|(_, bytes)| bytes).sum();
    if all == 0 {
        return "nothing yet".to_owned();
    }
    let shares: Vec<String> = parts
        .iter()
        .map(|(name, bytes)| format!("{} % {name}", (bytes * 100 + all / 2) / all))
        .collect();
    format!("{}: {}", size(all), shares.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hits_add_up() {
        let overlay = OverlayFigures {
            read_ram: 3 << 20,
            read_spill: 1 << 20,
            ..OverlayFigures::default()
        };
        let text = hits(&overlay);
        assert!(text.contains("75 % RAM, 25 % disk, 0 % below"), "{text}");
    }
}
