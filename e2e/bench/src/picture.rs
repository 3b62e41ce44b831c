//! Pictures: a bar for each series' median with its samples as dots, series of one unit on one
//! scale. Below them, curves.

use std::fmt::Write as _;

use crate::curve;
use crate::report::number;
use crate::result::{BenchResult, Series};

pub(crate) const WIDTH: f64 = 860.0;
const LABELS: f64 = 250.0;
const VALUES: f64 = 90.0;
const ROW: f64 = 26.0;
const COLOURS: [&str; 6] = [
    "#4878a8", "#d1783c", "#5a9a5a", "#9a6ab0", "#b05a5a", "#7a7a7a",
];

/// The result as an SVG image.
pub(crate) fn svg(result: &BenchResult) -> String {
    let mut units: Vec<&str> = Vec::new();
    for series in &result.series {
        if !units.contains(&series.unit.as_str()) {
            units.push(&series.unit);
        }
    }
    let mut body = String::new();
    let mut y = 52.0;
    for unit in units {
        let group: Vec<&Series> = result
            .series
            .iter()
            .filter(|series| series.unit == unit)
            .collect();
        let _ = writeln!(
            body,
            "<text x=\"16\" y=\"{y}\" class=\"unit\">{}</text>",
            escape(unit)
        );
        y += 10.0;
        let most = group
            .iter()
            .flat_map(|series| series.samples.iter().copied())
            .fold(f64::MIN_POSITIVE, f64::max);
        for series in group {
            row(&mut body, series, y, (WIDTH - LABELS - VALUES) / most);
            y += ROW;
        }
        y += 22.0;
    }
    y += curve::plot(&mut body, &result.curves, y);
    let mut ratios: Vec<String> = Vec::new();
    for (name, ratio) in &result.ratios {
        ratios.push(format!("{name} = {ratio:.2}"));
    }
    let _ = writeln!(
        body,
        "<text x=\"16\" y=\"{y}\" class=\"foot\">{}</text>\n<text x=\"16\" y=\"{}\" class=\"foot\">{}</text>",
        escape(&ratios.join("   ")),
        y + 18.0,
        escape(&format!("{}, {}", result.commit, result.machine))
    );
    let height = y + 32.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <style>.title{{font-size:17px;font-weight:bold}}.unit{{font-weight:bold}}\
         .foot{{fill:#555;font-size:12px}}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"16\" y=\"26\" class=\"title\">{}: medians (bars) and samples (dots)</text>\n\
         {body}</svg>\n",
        escape(&result.name)
    )
}

fn row(body: &mut String, series: &Series, y: f64, scale: f64) {
    let colour = colour(&series.name);
    let middle = y + ROW / 2.0;
    let _ = writeln!(
        body,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
         <rect x=\"{LABELS}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\" fill-opacity=\"0.75\"/>",
        LABELS - 8.0,
        middle + 4.0,
        escape(&series.name),
        y + 4.0,
        (series.median * scale).max(0.5),
        ROW - 8.0,
    );
    for sample in &series.samples {
        let _ = write!(
            body,
            "<circle cx=\"{:.1}\" cy=\"{middle:.1}\" r=\"2\" fill=\"#000\" fill-opacity=\"0.45\"/>",
            LABELS + sample * scale
        );
    }
    let _ = writeln!(
        body,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
        WIDTH - 12.0,
        middle + 4.0,
        number(series.median)
    );
}

/// The first word of a series' name is what is compared: one colour for each.
pub(crate) fn colour(name: &str) -> &'static str {
    let subject = name.split([' ', ',']).next().unwrap_or_default();
    COLOURS[match subject {
        "runc" => 0,
        "kiln" => 1,
        other => 2 + other.bytes().map(usize::from).sum::<usize>() % (COLOURS.len() - 2),
    }]
}

pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::Measured;

    #[test]
    fn bars_have_lengths_in_proportion_and_text_is_escaped() {
        let mut measured = Measured::default();
        measured.add("runc <total>", "ms", 100.0);
        measured.add("kiln total", "ms", 50.0);
        measured.add("kiln faults", "count", 7.0);
        let svg = svg(&measured.named("pod-start", "a&b", "here"));
        // The largest of a unit takes the whole width, whatever the other units' sizes.
        for width in ["width=\"520.0\"", "width=\"260.0\""] {
            assert!(svg.contains(width), "{svg}");
        }
        assert_eq!(svg.matches("width=\"520.0\"").count(), 2, "{svg}");
        assert!(
            svg.contains("runc &lt;total&gt;") && svg.contains("a&amp;b"),
            "{svg}"
        );
        assert_eq!(svg.matches("<circle").count(), 3);
    }
}
