//! Camelyon16's annotations: `<slide>.xml` as ASAP writes it, polygons in pixels of level 0.
//!
//! Annotations of the group `_2` or `Exclusion` are holes; all others are tumour. A patch is `tumor` where polygons less holes cover at
//! least a share of its area, `normal` elsewhere.

use std::path::Path;

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// Largest file read.
const MAX_BYTES: u64 = 256 << 20;
/// Most corners of all polygons.
const MAX_CORNERS: usize = 10_000_000;
/// Bytes in which the name of the root element is looked for.
const HEAD: usize = 4096;
/// The root element.
const ROOT: &[u8] = b"ASAP_Annotations";

/// Class of patches with enough of a polygon.
pub(crate) const TUMOR: &str = "tumor";
/// Class of the others.
pub(crate) const NORMAL: &str = "normal";

/// A closed line, and the box round it.
#[derive(Debug)]
struct Polygon {
    corners: Vec<[f64; 2]>,
    low: [f64; 2],
    high: [f64; 2],
    hole: bool,
}

/// The annotations of a slide.
#[derive(Debug, Default)]
pub(crate) struct Polygons(Vec<Polygon>);

/// Whether a file is of ASAP: other programs write other .xml beside slides.
pub(crate) fn is_asap(file: &Path) -> bool {
    use std::io::Read as _;
    let mut head = Vec::new();
    let read = std::fs::File::open(file).and_then(|open| open.take(HEAD as u64).read_to_end(&mut head));
    read.is_ok() && head.windows(ROOT.len()).any(|window| window == ROOT)
}

impl Polygons {
    /// Reads a file.
    pub(crate) fn read(file: &Path) -> Result<Self, String> {
        let bytes = file.metadata().map_err(|e| e.to_string())?.len();
        if bytes > MAX_BYTES {
            return Err(format!("{bytes} bytes are too many for annotations"));
        }
        Self::parse(&std::fs::read_to_string(file).map_err(|e| e.to_string())?)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut reader = Reader::from_str(text);
        let (mut all, mut open, mut corners) = (Vec::new(), None::<Polygon>, 0);
        let (mut rooted, mut depth) = (false, 0_u32);
        loop {
            let at = reader.buffer_position();
            let event =
                reader.read_event().map_err(|e| format!("not XML at byte {at}, or it breaks off there: {e}"))?;
            let wrong = |reason: String| format!("at byte {at}: {reason}");
            match &event {
                Event::Start(tag) | Event::Empty(tag) => {
                    let empty = matches!(event, Event::Empty(_));
                    depth += u32::from(!empty);
                    match tag.name().as_ref() {
                        ROOT => rooted = true,
                        b"Annotation" if !empty => open = Some(begin(tag).map_err(wrong)?),
                        b"Coordinate" => {
                            let polygon =
                                open.as_mut().ok_or_else(|| wrong("a Coordinate outside an Annotation".into()))?;
                            let side = |name| number(tag, name).map_err(wrong);
                            polygon.add([side("X")?, side("Y")?]);
                            corners += 1;
                            if corners > MAX_CORNERS {
                                return Err(format!("more than {MAX_CORNERS} corners"));
                            }
                        }
                        _ => {}
                    }
                }
                Event::End(tag) => {
                    depth = depth.saturating_sub(1);
                    if tag.name().as_ref() == b"Annotation" {
                        // Points and lines have no area.
                        all.extend(open.take().filter(|polygon| polygon.corners.len() >= 3));
                    }
                }
                Event::Eof if depth > 0 => return Err("it breaks off before its end".into()),
                Event::Eof if !rooted => return Err("its root is not ASAP_Annotations".into()),
                Event::Eof => return Ok(Self(all)),
                _ => {}
            }
        }
    }

    /// The class of a square of level-0 pixels, tumour from a share of `min`.
    pub(crate) fn class(&self, x: f64, y: f64, side: f64, min: f64) -> &'static str {
        let share = self.share(x, y, side);
        if share > 0.0 && share >= min { TUMOR } else { NORMAL }
    }

    /// Share of a square that polygons less holes cover.
    pub(crate) fn share(&self, x: f64, y: f64, side: f64) -> f64 {
        let area: f64 = self
            .0
            .iter()
            .filter(|p| p.low[0] < x + side && p.high[0] > x && p.low[1] < y + side && p.high[1] > y)
            .map(|polygon| polygon.area_within([x, y], side) * if polygon.hole { -1.0 } else { 1.0 })
            .sum();
        (area / (side * side)).clamp(0.0, 1.0)
    }
}

fn begin(tag: &BytesStart) -> Result<Polygon, String> {
    let group = attribute(tag, "PartOfGroup")?.unwrap_or_default();
    let hole = group == "_2" || group.eq_ignore_ascii_case("exclusion");
    Ok(Polygon { corners: Vec::new(), low: [f64::INFINITY; 2], high: [f64::NEG_INFINITY; 2], hole })
}

fn attribute(tag: &BytesStart, name: &str) -> Result<Option<String>, String> {
    let found = tag.try_get_attribute(name).map_err(|e| e.to_string())?;
    found.map(|found| String::from_utf8(found.value.into_owned()).map_err(|e| e.to_string())).transpose()
}

fn number(tag: &BytesStart, name: &str) -> Result<f64, String> {
    let text = attribute(tag, name)?.ok_or_else(|| format!("a Coordinate without {name}"))?;
    // Where ASAP runs under another locale it writes a comma.
    let value = text.replace(',', ".").parse::<f64>().ok().filter(|value| value.is_finite());
    value.ok_or_else(|| format!("{name}={text:?} is no number"))
}

impl Polygon {
    fn add(&mut self, corner: [f64; 2]) {
        for axis in [0, 1] {
            self.low[axis] = self.low[axis].min(corner[axis]);
            self.high[axis] = self.high[axis].max(corner[axis]);
        }
        self.corners.push(corner);
    }

    /// Area of what lies within a square: the line is cut at each of its sides in turn (Sutherland and Hodgman). Where a concave one falls
    /// into pieces, they hang together by lines along the side that have no area.
    fn area_within(&self, from: [f64; 2], side: f64) -> f64 {
        let mut line = self.corners.clone();
        for axis in [0, 1] {
            line = cut(&line, axis, from[axis], 1.0);
            line = cut(&line, axis, from[axis] + side, -1.0);
        }
        let next = line.iter().cycle().skip(1);
        let doubled: f64 = line.iter().zip(next).map(|(a, b)| a[0] * b[1] - b[0] * a[1]).sum();
        doubled.abs() / 2.0
    }
}

/// The part of a closed line where `sign` × (coordinate - `edge`) is not negative.
fn cut(line: &[[f64; 2]], axis: usize, edge: f64, sign: f64) -> Vec<[f64; 2]> {
    let depth = |corner: &[f64; 2]| sign * (corner[axis] - edge);
    let mut kept = Vec::with_capacity(line.len() + 4);
    for (a, b) in line.iter().zip(line.iter().cycle().skip(1)) {
        let (from, to) = (depth(a), depth(b));
        if from >= 0.0 {
            kept.push(*a);
        }
        if (from < 0.0) != (to < 0.0) {
            let t = from / (from - to);
            let mut crossing = [0, 1].map(|i| a[i] + t * (b[i] - a[i]));
            crossing[axis] = edge;
            kept.push(crossing);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rand::Rng as _;
    use sgcl_draw::{Purpose, rng};

    use super::*;

    fn annotation(group: &str, corners: &[[f64; 2]]) -> String {
        let points: String = (0..)
            .zip(corners)
            .map(|(order, [x, y])| format!("<Coordinate Order=\"{order}\" X=\"{x}\" Y=\"{y}\" />"))
            .collect();
        format!(
            "<Annotation Name=\"A\" Type=\"Polygon\" PartOfGroup=\"{group}\" Color=\"#F4FA58\"><Coordinates>{points}</Coordinates></Annotation>"
        )
    }

    fn file(annotations: &str) -> String {
        format!(
            "<?xml version=\"1.0\"?>\n<ASAP_Annotations><Annotations>{annotations}</Annotations>\
             <AnnotationGroups><Group Name=\"_0\" PartOfGroup=\"None\" /></AnnotationGroups></ASAP_Annotations>"
        )
    }

    fn seed() -> u64 {
        std::env::var("SGCL_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
    }

    #[test]
    fn holes_are_taken_out_of_what_is_round_them() {
        let outer = annotation("_0", &[[0.0, 0.0], [100.0, 0.0], [100.0, 100.0], [0.0, 100.0]]);
        let hole = annotation("_2", &[[20.0, 20.0], [20.0, 60.0], [60.0, 60.0], [60.0, 20.0]]);
        let found = Polygons::parse(&file(&(outer + &hole))).unwrap();
        assert!((found.share(0.0, 0.0, 100.0) - 0.84).abs() < 1e-12);
        assert!(found.share(20.0, 20.0, 40.0) == 0.0 && found.share(200.0, 0.0, 10.0) == 0.0);
        assert_eq!(found.class(0.0, 0.0, 100.0, 0.84), TUMOR);
        assert_eq!(found.class(0.0, 0.0, 100.0, 0.85), NORMAL);
        assert_eq!(found.class(300.0, 0.0, 100.0, 0.0), NORMAL);
    }

    /// Whether a point is inside, by the number of sides to its right.
    fn inside(corners: &[[f64; 2]], x: f64, y: f64) -> bool {
        let sides = corners.iter().zip(corners.iter().cycle().skip(1));
        let crossings =
            sides.filter(|(a, b)| (a[1] > y) != (b[1] > y) && x < (b[0] - a[0]) * (y - a[1]) / (b[1] - a[1]) + a[0]);
        crossings.count() % 2 == 1
    }

    #[test]
    fn shares_of_drawn_stars_are_those_that_points_inside_them_give() {
        let mut draw = rng(seed(), Purpose::Phantom, 0, 0);
        for _ in 0..20 {
            // A star round (50, 50): concave, without crossings.
            let corners: Vec<[f64; 2]> = (0..24)
                .map(|i| {
                    let (angle, radius) = (f64::from(i) * std::f64::consts::TAU / 24.0, draw.random_range(5.0..60.0));
                    [50.0 + radius * angle.cos(), 50.0 + radius * angle.sin()]
                })
                .collect();
            let found = Polygons::parse(&file(&annotation("Tumor", &corners))).unwrap();
            let (x, y, side) = (draw.random_range(0.0..60.0), draw.random_range(0.0..60.0), 40.0);
            let steps = 400;
            let at = |from: f64, n: i32| from + side * (f64::from(n) + 0.5) / f64::from(steps);
            let hits = (0..steps * steps).filter(|n| inside(&corners, at(x, n % steps), at(y, n / steps))).count();
            let expected = hits as f64 / f64::from(steps * steps);
            assert!((found.share(x, y, side) - expected).abs() < 5e-3, "{} {expected}", found.share(x, y, side));
        }
    }

    #[rstest::rstest]
    #[case::cut("<ASAP_Annotations><Annotations><Annotation PartOfGroup=\"_0\">", "breaks off")]
    #[case::other("<Annotations></Annotations>", "not ASAP_Annotations")]
    #[case::word(
        "<ASAP_Annotations><Annotation><Coordinate X=\"a\" Y=\"1\"/></Annotation></ASAP_Annotations>",
        "X=\"a\" is no number"
    )]
    #[case::lacks("<ASAP_Annotations><Annotation><Coordinate X=\"1\"/></Annotation></ASAP_Annotations>", "without Y")]
    #[case::tags("<ASAP_Annotations></Annotation>", "not XML")]
    fn what_is_wrong_with_a_file_is_said(#[case] text: &str, #[case] says: &str) {
        let error = Polygons::parse(text).unwrap_err();
        assert!(error.contains(says), "{error}");
    }
}
