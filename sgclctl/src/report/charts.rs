//! Line charts as inline SVG. Colours are CSS classes, so a chart follows the page's light or dark.

use std::fmt::Write as _;

/// Points of a line after thinning: more than the chart has pixels would only add bytes.
const POINTS: usize = 300;
const WIDTH: f64 = 400.0;
const HEIGHT: f64 = 230.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 36.0;

/// A line: its name in the legend, the CSS class of its colour, its points.
pub(crate) struct Line {
    pub(crate) name: &'static str,
    pub(crate) class: &'static str,
    pub(crate) points: Vec<(f64, f64)>,
}

/// A chart over steps.
pub(crate) struct Chart {
    pub(crate) title: &'static str,
    pub(crate) unit: &'static str,
    /// Whether the axis begins at 0.
    pub(crate) from_zero: bool,
    pub(crate) lines: Vec<Line>,
    /// Steps at which an epoch began.
    pub(crate) marks: Vec<f64>,
}

impl Chart {
    /// The chart as an `<svg>` element; `None` where there is nothing to draw.
    pub(crate) fn svg(&self) -> Option<String> {
        let lines: Vec<(&Line, Vec<(f64, f64)>)> = self
            .lines
            .iter()
            .map(|line| (line, thinned(&line.points)))
            .filter(|(_, points)| !points.is_empty())
            .collect();
        let all = || lines.iter().flat_map(|(_, points)| points.iter());
        let (x_low, x_high) = range(all().map(|p| p.0))?;
        let (mut low, high) = range(all().map(|p| p.1))?;
        if self.from_zero {
            low = low.min(0.0);
        }
        let ticks = ticks(low, high, 5);
        let (low, high) = (ticks.first().copied()?.min(low), ticks.last().copied()?.max(high));
        let x_span = if x_high > x_low { x_high - x_low } else { 1.0 };
        let x = |value: f64| LEFT + (value - x_low) / x_span * (WIDTH - LEFT - RIGHT);
        let y = |value: f64| TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM);

        let mut svg = format!(
            r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{} by step, from {} to {}">"#,
            self.title,
            number(all().map(|p| p.1).fold(f64::INFINITY, f64::min)),
            number(all().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max)),
        );
        // Writing to a String cannot fail, here and below.
        for mark in self.marks.iter().filter(|mark| **mark > x_low && **mark < x_high) {
            let at = x(*mark);
            let _ =
                write!(svg, r#"<line class="mark" x1="{at:.1}" x2="{at:.1}" y1="{TOP}" y2="{:.1}"/>"#, HEIGHT - BOTTOM);
        }
        for tick in &ticks {
            let at = y(*tick);
            let _ = write!(
                svg,
                r#"<line class="grid" x1="{LEFT}" x2="{:.1}" y1="{at:.1}" y2="{at:.1}"/><text class="tick" x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
                WIDTH - RIGHT,
                LEFT - 6.0,
                at + 3.5,
                number(*tick)
            );
        }
        for tick in self::ticks(x_low, x_high, 5).iter().filter(|t| **t >= x_low && **t <= x_high) {
            let _ = write!(
                svg,
                r#"<text class="tick" x="{:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
                x(*tick),
                HEIGHT - BOTTOM + 15.0,
                number(*tick)
            );
        }
        let _ = write!(
            svg,
            r#"<text class="axis" x="{:.1}" y="{:.1}" text-anchor="middle">step</text>"#,
            f64::midpoint(LEFT, WIDTH - RIGHT),
            HEIGHT - 4.0
        );
        for (line, points) in &lines {
            let _ = write!(svg, r#"<g class="line {}"><title>{}</title>"#, line.class, line.name);
            if let [(px, py)] = points.as_slice() {
                let _ = write!(svg, r#"<circle cx="{:.1}" cy="{:.1}" r="3"/>"#, x(*px), y(*py));
            } else {
                let path: Vec<String> = points.iter().map(|(px, py)| format!("{:.1} {:.1}", x(*px), y(*py))).collect();
                let _ = write!(svg, r#"<polyline points="{}"/>"#, path.join(" "));
            }
            svg.push_str("</g>");
        }
        svg.push_str("</svg>");
        Some(svg)
    }
}

/// Means of equal stretches where there are more than [`POINTS`].
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|p| p.0.is_finite() && p.1.is_finite()).collect();
    if finite.len() <= POINTS {
        return finite;
    }
    let stretch = finite.len().div_ceil(POINTS);
    #[allow(clippy::cast_precision_loss)]
    let mean = |part: &[(f64, f64)], of: fn(&(f64, f64)) -> f64| part.iter().map(of).sum::<f64>() / part.len() as f64;
    finite.chunks(stretch).map(|part| (mean(part, |p| p.0), mean(part, |p| p.1))).collect()
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |range: Option<(f64, f64)>, value| {
        Some(range.map_or((value, value), |(low, high)| (low.min(value), high.max(value))))
    })
}

/// Round numbers that enclose `low..=high`, about `count` of them.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn ticks(low: f64, high: f64, count: u32) -> Vec<f64> {
    let span = if high > low { high - low } else { low.abs().max(1e-6) };
    let raw = span / f64::from(count);
    let magnitude = 10_f64.powf(raw.log10().floor());
    let step =
        [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * magnitude).find(|s| *s >= raw).unwrap_or(10.0 * magnitude);
    let (first, last) = ((low / step).floor(), (high / step).ceil());
    let last = if last > first { last } else { first + 1.0 };
    (0..=(last - first) as u32).map(|i| (first + f64::from(i)) * step).collect()
}

/// A number as an axis shows it: `12.5k`, `0.0015`.
pub(crate) fn number(value: f64) -> String {
    let trim = |text: String| {
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    };
    let size = value.abs();
    match size {
        0.0 => "0".to_owned(),
        _ if size < 1e-12 => "0".to_owned(),
        _ if size < 1e-3 => format!("{value:.1e}"),
        _ if size < 1.0 => trim(format!("{value:.4}")),
        _ if size < 10_000.0 => trim(format!("{value:.2}")),
        _ if size < 1e6 => format!("{}k", trim(format!("{:.1}", value / 1e3))),
        _ => format!("{}M", trim(format!("{:.1}", value / 1e6))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>) -> Chart {
        Chart {
            title: "Loss",
            unit: "",
            from_zero: false,
            lines: vec![Line { name: "total", class: "c1", points }],
            marks: vec![],
        }
    }

    #[test]
    fn every_point_lies_inside_the_chart() {
        let svg = chart((0..1000).map(|i| (f64::from(i), 9.0 - f64::from(i) * 0.004)).collect()).svg().unwrap();
        let points = svg.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        let numbers: Vec<f64> = points.split_whitespace().map(|n| n.parse().unwrap()).collect();
        assert!(numbers.len() / 2 <= POINTS);
        for pair in numbers.chunks(2) {
            assert!((LEFT - 0.1..=WIDTH - RIGHT + 0.1).contains(&pair[0]), "{pair:?}");
            assert!((TOP - 0.1..=HEIGHT - BOTTOM + 0.1).contains(&pair[1]), "{pair:?}");
        }
    }

    #[test]
    fn a_flat_line_one_point_and_none_are_drawn_or_left_out() {
        assert!(chart(vec![(0.0, 2.0), (1.0, 2.0)]).svg().unwrap().contains("polyline"));
        assert!(chart(vec![(3.0, 2.0)]).svg().unwrap().contains("circle"));
        assert!(chart(vec![(3.0, f64::NAN)]).svg().is_none());
    }

    #[test]
    fn ticks_are_round_and_enclose_the_data() {
        assert_eq!(ticks(0.0, 9.3, 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(-1.0, 1.0, 4), [-1.0, -0.5, 0.0, 0.5, 1.0]);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([12_500.0, 0.0015, 8.0, 0.0].map(number), ["12.5k", "0.0015", "8", "0"]);
    }
}
