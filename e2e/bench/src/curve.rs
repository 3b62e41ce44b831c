//! Curves: what depends on something else, as lines in one frame.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::picture::{WIDTH, colour, escape};
use crate::report::number;

const LEFT: f64 = 70.0;
const RIGHT: f64 = 30.0;
const HEIGHT: f64 = 240.0;
/// Of the names above the frame, each.
const LINE: f64 = 18.0;
/// Of what is written below the frame.
const BELOW: f64 = 56.0;

/// One thing's dependence on another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Curve {
    pub(crate) name: String,
    /// What the points' places are, and in which unit.
    pub(crate) x: String,
    /// What their values are, and in which unit.
    pub(crate) y: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Draws curves into an SVG image from `top` on. Returns how high that is.
pub(crate) fn plot(body: &mut String, curves: &[Curve], top: f64) -> f64 {
    let Some(first) = curves.first() else {
        return 0.0;
    };
    let most = |of: fn(&(f64, f64)) -> f64| {
        let values = curves.iter().flat_map(|curve| &curve.points).map(of);
        values.fold(f64::MIN_POSITIVE, f64::max)
    };
    let (most_x, most_y) = (most(|point| point.0), most(|point| point.1));
    for (index, curve) in curves.iter().enumerate() {
        let y = top + index as f64 * LINE;
        let _ = writeln!(
            body,
            "<rect x=\"{LEFT}\" y=\"{:.1}\" width=\"20\" height=\"4\" fill=\"{}\"/>\
             <text x=\"{}\" y=\"{y:.1}\">{}</text>",
            y - 6.0,
            colour(&curve.name),
            LEFT + 28.0,
            escape(&curve.name)
        );
    }
    let above = curves.len() as f64 * LINE;
    let (upper, lower) = (top + above, top + above + HEIGHT);
    let _ = writeln!(
        body,
        "<rect x=\"{LEFT}\" y=\"{upper:.1}\" width=\"{:.1}\" height=\"{HEIGHT}\" fill=\"none\" stroke=\"#999\"/>",
        WIDTH - LEFT - RIGHT
    );
    let mut label = |x: f64, y: f64, anchor: &str, text: &str| {
        let text = escape(text);
        let _ = writeln!(
            body,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
        );
    };
    label(LEFT - 8.0, upper + 10.0, "end", &number(most_y));
    label(LEFT - 8.0, upper + 28.0, "end", &first.y);
    label(LEFT - 8.0, lower, "end", "0");
    label(LEFT, lower + LINE, "middle", "0");
    label(WIDTH - RIGHT, lower + LINE, "end", &number(most_x));
    label(WIDTH / 2.0, lower + LINE, "middle", &first.x);
    for curve in curves {
        let mut points = String::new();
        for (x, y) in &curve.points {
            let _ = write!(
                points,
                "{:.1},{:.1} ",
                LEFT + x / most_x * (WIDTH - LEFT - RIGHT),
                lower - y / most_y * HEIGHT
            );
        }
        let _ = writeln!(
            body,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"/>",
            points.trim_end(),
            colour(&curve.name)
        );
    }
    above + HEIGHT + BELOW
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_in_proportion_and_stay_in_the_frame() {
        let curve = |name: &str, points: &[(f64, f64)]| Curve {
            name: name.to_owned(),
            x: "MiB written".to_owned(),
            y: "MiB/s".to_owned(),
            points: points.to_vec(),
        };
        let mut body = String::new();
        let curves = [
            curve("kiln <ram>", &[(1.0, 200.0), (2.0, 100.0)]),
            curve("disk", &[(2.0, 50.0)]),
        ];
        assert_eq!(plot(&mut body, &curves, 100.0), 2.0 * 18.0 + 240.0 + 56.0);
        assert!(
            body.contains("points=\"450.0,136.0 830.0,256.0\""),
            "{body}"
        );
        assert!(body.contains("points=\"830.0,316.0\""), "{body}");
        assert!(body.contains("kiln &lt;ram&gt;"), "{body}");
        assert_eq!(plot(&mut body, &[], 100.0), 0.0);
    }
}
