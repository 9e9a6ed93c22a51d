//! ROC curves of a classifier as inline SVG, one line a class.

use std::fmt::Write as _;

const SIDE: f64 = 300.0;
const LEFT: f64 = 40.0;
const BOTTOM: f64 = 34.0;
const MARGIN: f64 = 12.0;

/// A class's curve.
pub(crate) struct Curve {
    pub(crate) name: String,
    /// CSS colour.
    pub(crate) colour: String,
    /// (false, true) positive rate, 0 to 1.
    pub(crate) points: Vec<(f64, f64)>,
}

/// The curves as an `<svg>` element, over the diagonal of a guess.
pub(crate) fn svg(curves: &[Curve]) -> String {
    let x = |rate: f64| LEFT + rate.clamp(0.0, 1.0) * (SIDE - LEFT - MARGIN);
    let y = |rate: f64| MARGIN + (1.0 - rate.clamp(0.0, 1.0)) * (SIDE - BOTTOM - MARGIN);
    let (left, right, top, bottom) = (x(0.0), x(1.0), y(1.0), y(0.0));
    let mut svg = format!(
        r#"<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="ROC curves of {} classes against the rest">"#,
        curves.len()
    );
    // Writing to a String cannot fail, here and below.
    for tick in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let (across, up) = (x(tick), y(tick));
        let _ = write!(
            svg,
            r#"<line class="grid" x1="{left:.1}" x2="{right:.1}" y1="{up:.1}" y2="{up:.1}"/><text class="tick" x="{:.1}" y="{:.1}" text-anchor="end">{tick}</text>"#,
            left - 6.0,
            up + 3.5
        );
        if tick > 0.0 && tick < 1.0 {
            let _ = write!(
                svg,
                r#"<text class="tick" x="{across:.1}" y="{:.1}" text-anchor="middle">{tick}</text>"#,
                bottom + 14.0
            );
        }
    }
    let _ = write!(
        svg,
        r#"<line class="mark" x1="{left:.1}" x2="{right:.1}" y1="{bottom:.1}" y2="{top:.1}"/><text class="axis" x="{:.1}" y="{:.1}" text-anchor="middle">false positive rate</text>"#,
        f64::midpoint(left, right),
        SIDE - 4.0
    );
    for curve in curves {
        let points: Vec<String> = curve.points.iter().map(|&(fp, tp)| format!("{:.1} {:.1}", x(fp), y(tp))).collect();
        let _ = write!(svg, r#"<polyline style="color:{}" points="{}"/>"#, curve.colour, points.join(" "));
    }
    svg.push_str("</svg>");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_perfect_curve_runs_along_the_top_left() {
        let curve = Curve { name: "a".into(), colour: "red".into(), points: vec![(0.0, 0.0), (0.0, 1.0), (1.0, 1.0)] };
        assert!(svg(&[curve]).contains(r#"points="40.0 266.0 40.0 12.0 288.0 12.0""#));
    }
}
