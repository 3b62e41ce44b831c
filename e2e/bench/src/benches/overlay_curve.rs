//! Throughput of a container that writes more and more: into the overlay's RAM, and past its threshold.
//!
//! The container syncs after each piece, so that its own page cache hides nothing. It is compared with "disk", an
//! overlay with next to no RAM, whose flushes are answered by the node's disk, and with other runtimes on theirs.

use anyhow::{Context, Result, ensure};

use super::Settings;
use super::overlay::{KILN, ON_DISK, RUNS, Way, others, prepare};
use crate::curve::Curve;
use crate::result::{Measured, median};

/// In MiB, as [`THRESHOLD_SIZE`].
const THRESHOLD: u32 = 64;
const THRESHOLD_SIZE: &str = "64Mi";
const WRITTEN: u32 = 3 * THRESHOLD;
const STEP: u32 = 4;
const GROWING: &str = "kiln 64 MiB of RAM";
const DISK: &str = "disk";

/// Throughput of each piece in MiB/s.
fn throughput(said: &[String]) -> Result<Vec<f64>> {
    let micros = said.iter().filter_map(|line| line.strip_prefix("piece "));
    let speeds: Vec<f64> = micros
        .map(|text| {
            let micros: f64 = text.parse().with_context(|| format!("piece {text:?}"))?;
            Ok(f64::from(STEP) * 1e6 / micros.max(1.0))
        })
        .collect::<Result<_>>()?;
    let pieces = usize::try_from(WRITTEN / STEP)?;
    ensure!(
        speeds.len() == pieces,
        "{} pieces, expected {pieces}",
        speeds.len()
    );
    Ok(speeds)
}

/// Of pieces that are equally long.
fn mean(speeds: &[f64]) -> f64 {
    speeds.len() as f64 / speeds.iter().map(|speed| 1.0 / speed).sum::<f64>()
}

fn least(speeds: &[f64]) -> f64 {
    speeds.iter().copied().fold(f64::INFINITY, f64::min)
}

pub(crate) async fn run(settings: Settings) -> Result<Measured> {
    let mut ways = vec![
        Way::new(GROWING, KILN, &[("kiln.dev/overlay-ram", THRESHOLD_SIZE)]),
        Way::new(DISK, KILN, ON_DISK),
    ];
    ways.extend(others(&settings)?);
    prepare().await?;
    let (size, step) = (WRITTEN.to_string(), STEP.to_string());
    let runs = settings.runs.min(RUNS);
    let before = usize::try_from(THRESHOLD / STEP)?;
    let mut measured = Measured::default();
    let mut all = vec![Vec::new(); ways.len()];
    // Run 0 reads programs from the disk and the like: it is not counted.
    for number in 0..=runs {
        for (way, runs_of_way) in ways.iter().zip(&mut all) {
            let what = || format!("run {number}, {}", way.name);
            let (said, _) = way
                .run(&["grow", "/file", &size, &step])
                .await
                .with_context(what)?;
            let speeds = throughput(&said).with_context(what)?;
            if number == 0 {
                continue;
            }
            let (first, rest) = speeds.split_at(before);
            measured.add(&format!("{}, first third", way.name), "MiB/s", mean(first));
            measured.add(&format!("{}, rest", way.name), "MiB/s", mean(rest));
            measured.add(
                &format!("{}, slowest piece of the rest", way.name),
                "MiB/s",
                least(rest),
            );
            runs_of_way.push(speeds);
        }
        println!("  run {number} of {runs}");
    }
    for (way, runs_of_way) in ways.iter().zip(&all) {
        let points = (0..usize::try_from(WRITTEN / STEP)?).map(|piece| {
            let speeds: Vec<f64> = runs_of_way.iter().map(|speeds| speeds[piece]).collect();
            (f64::from(STEP) * (piece + 1) as f64, median(&speeds))
        });
        measured.curve(Curve {
            name: way.name.clone(),
            x: "MiB written".to_owned(),
            y: "MiB/s".to_owned(),
            points: points.collect(),
        });
    }
    let past = format!("{GROWING}, rest");
    for way in &ways[1..] {
        let to = format!("{}, rest", way.name);
        measured.ratio(&format!("past-threshold/{}", way.name), &past, &to)?;
    }
    // Below 1 there is a moment past the threshold at which it would have been better not to have had the RAM.
    measured.ratio(
        "slowest-past-threshold/slowest-disk",
        &format!("{GROWING}, slowest piece of the rest"),
        &format!("{DISK}, slowest piece of the rest"),
    )?;
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throughput_is_what_a_piece_has_over_what_it_took() {
        let mut said = vec!["piece 1000000".to_owned(), "piece 500000".to_owned()];
        assert!(throughput(&said).is_err());
        said.resize(48, "piece 2000000".to_owned());
        said.push("done".to_owned());
        let speeds = throughput(&said).unwrap();
        assert_eq!(speeds[..3], [4.0, 8.0, 2.0]);
        assert_eq!((mean(&[2.0, 6.0]), least(&[6.0, 2.0])), (3.0, 2.0));
        said[0] = "piece of cake".to_owned();
        assert!(throughput(&said).is_err());
    }
}
