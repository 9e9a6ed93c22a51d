//! What a tissue looks like: densities of haematoxylin and eosin, pixel by pixel.
//!
//! Nuclei sit on jittered lattices that cover the whole slide, each drawn from a hash of its lattice place: a tile can be drawn
//! alone and meets its neighbours seamlessly.

use crate::layout::{Layout, Region};
use crate::noise::{Uniforms, smooth};

/// What kind of cell a nucleus is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cell {
    Fibroblast,
    Tumour,
    Lymphocyte,
    Adipocyte,
    Epithelium,
}

/// A nucleus that was drawn, perhaps in part outside its tile; pixels of the slide.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Nucleus {
    pub(crate) cell: Cell,
    pub(crate) centre: (f32, f32),
    pub(crate) axes: (f32, f32),
    /// Direction of the first axis, radians.
    pub(crate) angle: f32,
}

/// Densities of one tile.
pub(crate) struct Tile {
    pub(crate) left: i64,
    pub(crate) top: i64,
    pub(crate) side: usize,
    pub(crate) haematoxylin: Vec<f32>,
    pub(crate) eosin: Vec<f32>,
    /// The cells' nuclei, in the order they were drawn; crumbs of dead ones are none.
    pub(crate) nuclei: Vec<Nucleus>,
}

/// A lattice of things of one class.
struct Things {
    class: u8,
    /// Distance between lattice places, pixels.
    pitch: f32,
    /// Pixels that a thing may reach from its place.
    reach: f32,
    draw: fn(&mut Tile, &Region, f32, f32, &mut Uniforms),
}

const THINGS: [Things; 7] = [
    Things { class: 0, pitch: 30.0, reach: 40.0, draw: spindle },
    Things { class: 1, pitch: 25.0, reach: 40.0, draw: pleomorphic },
    Things { class: 2, pitch: 12.5, reach: 20.0, draw: lymphocyte },
    Things { class: 3, pitch: 52.0, reach: 70.0, draw: vacuole },
    Things { class: 4, pitch: 74.0, reach: 90.0, draw: gland },
    Things { class: 5, pitch: 8.0, reach: 30.0, draw: debris },
    Things { class: 6, pitch: 34.0, reach: 50.0, draw: spindle },
];

impl Tile {
    /// Draws the tile whose top left pixel is (left, top).
    pub(crate) fn draw(layout: &Layout, seed: u64, left: i64, top: i64, side: usize) -> Self {
        let empty = || vec![0.0; side * side];
        let mut tile = Tile { left, top, side, haematoxylin: empty(), eosin: empty(), nuclei: Vec::new() };
        tile.ground(layout, seed);
        for (number, things) in THINGS.iter().enumerate() {
            let margin = things.reach;
            let lattice = |from: f32| (from / things.pitch).floor() as i64;
            let (x0, y0) = (lattice(left as f32 - margin), lattice(top as f32 - margin));
            let (x1, y1) =
                (lattice((left + side as i64) as f32 + margin), lattice((top + side as i64) as f32 + margin));
            for y in y0..=y1 {
                for x in x0..=x1 {
                    let mut draws = Uniforms::at(seed ^ number as u64, x, y);
                    let cx = (x as f32 + 0.5 + 0.7 * (draws.next() - 0.5)) * things.pitch;
                    let cy = (y as f32 + 0.5 + 0.7 * (draws.next() - 0.5)) * things.pitch;
                    if let Some(region) = layout.at(cx, cy).filter(|region| region.class == things.class) {
                        // Sparser regions leave places empty.
                        if draws.next() < 1.25 / region.spacing - 0.15 {
                            (things.draw)(&mut tile, region, cx, cy, &mut draws);
                        }
                    }
                }
            }
        }
        tile
    }

    /// Fibres, cytoplasm and haze, without nuclei. The haze makes mean colours of the tissues alike.
    fn ground(&mut self, layout: &Layout, seed: u64) {
        for py in 0..self.side {
            for px in 0..self.side {
                let (x, y) = ((self.left + px as i64) as f32, (self.top + py as i64) as f32);
                let Some(region) = layout.at(x, y) else { continue };
                let at = py * self.side + px;
                let cloud = smooth(seed ^ 11, x / 55.0, y / 55.0);
                let grain = smooth(seed ^ 12, x / 2.2, y / 2.2);
                let (s, c) = region.angle.sin_cos();
                let bend = 26.0 * (smooth(seed ^ 13, x / 90.0, y / 90.0) - 0.5);
                let (along, across) = (x * c + y * s, -x * s + y * c + bend);
                let (h, e) = match region.class {
                    0 => {
                        let fibre = smooth(seed ^ 14, along / 45.0, across / 4.5);
                        (0.26, 0.25 + 0.75 * fibre * fibre)
                    }
                    1 => (0.12, 0.42 + 0.15 * grain),
                    2 => (0.10, 0.38 + 0.2 * cloud),
                    3 => (0.30, 0.55 + 0.1 * grain),
                    4 => (0.16, 0.46 + 0.2 * cloud),
                    5 => (0.20 + 0.18 * grain, 0.36 + 0.4 * grain * cloud),
                    _ => {
                        let bundle = 0.5 + 0.5 * (across * std::f32::consts::TAU / 21.0).sin();
                        (0.25, 0.25 + 0.55 * bundle + 0.1 * grain)
                    }
                };
                self.haematoxylin[at] = region.haematoxylin * h * (0.8 + 0.4 * cloud);
                self.eosin[at] = region.eosin * e * (0.85 + 0.3 * cloud);
            }
        }
    }

    /// Calls `paint(distance from the centre in radii, densities)` for the pixels of an ellipse and a soft rim.
    fn ellipse(&mut self, cx: f32, cy: f32, a: f32, b: f32, angle: f32, paint: impl Fn(f32, &mut f32, &mut f32)) {
        let (s, c) = angle.sin_cos();
        let reach = a.max(b) + 2.0;
        let side = self.side as i64;
        let clip = |v: f32, origin: i64| (v.floor() as i64 - origin).clamp(0, side) as usize;
        for py in clip(cy - reach, self.top)..clip(cy + reach + 1.0, self.top) {
            for px in clip(cx - reach, self.left)..clip(cx + reach + 1.0, self.left) {
                let (x, y) = ((self.left + px as i64) as f32 - cx, (self.top + py as i64) as f32 - cy);
                let (u, v) = ((x * c + y * s) / a, (-x * s + y * c) / b);
                let radius = (u * u + v * v).sqrt();
                let at = py * self.side + px;
                if radius < 1.0 + 1.5 / a.min(b) {
                    paint(radius, &mut self.haematoxylin[at], &mut self.eosin[at]);
                }
            }
        }
    }

    /// A nucleus: `density` of chromatin, `hollow` 0 for an even one, 1 for one that is all membrane.
    fn nucleus(&mut self, at: (f32, f32), axes: (f32, f32), angle: f32, density: f32, hollow: f32) {
        let soft = 1.2 / axes.0.min(axes.1);
        self.ellipse(at.0, at.1, axes.0, axes.1, angle, |radius, h, e| {
            let inside = ((1.0 + soft / 2.0 - radius) / soft).clamp(0.0, 1.0);
            let chromatin = 1.0 - hollow * (1.0 - radius.min(1.0).powi(4));
            *h = *h * (1.0 - inside) + (density * chromatin).max(*h * 0.7) * inside;
            *e *= 1.0 - 0.5 * inside;
        });
    }
}

impl Tile {
    /// A nucleus of a cell, drawn and remembered.
    fn cell(&mut self, nucleus: Nucleus, density: f32, hollow: f32) {
        self.nucleus(nucleus.centre, nucleus.axes, nucleus.angle, density, hollow);
        self.nuclei.push(nucleus);
    }
}

/// A long thin nucleus along the fibres.
fn spindle(tile: &mut Tile, region: &Region, x: f32, y: f32, draws: &mut Uniforms) {
    let long = draws.between(9.0, 14.0);
    let angle = region.angle + draws.between(-0.25, 0.25);
    let density = region.haematoxylin * draws.between(0.9, 1.3);
    let axes = (long, draws.between(2.2, 3.2));
    tile.cell(Nucleus { cell: Cell::Fibroblast, centre: (x, y), axes, angle }, density, 0.1);
}

/// A large, irregular nucleus with a pale inside and one or two nucleoli.
fn pleomorphic(tile: &mut Tile, region: &Region, x: f32, y: f32, draws: &mut Uniforms) {
    let a = draws.between(7.0, 13.5);
    let b = a * draws.between(0.6, 1.0);
    let angle = draws.between(0.0, 3.2);
    let density = region.haematoxylin * draws.between(0.7, 1.2);
    tile.cell(Nucleus { cell: Cell::Tumour, centre: (x, y), axes: (a, b), angle }, density, 0.6);
    for _ in 0..2 {
        let (dx, dy) = (draws.between(-0.4, 0.4) * b, draws.between(-0.4, 0.4) * b);
        tile.nucleus((x + dx, y + dy), (1.8, 1.8), 0.0, density * 1.5, 0.0);
    }
}

/// A small, round, dark nucleus with hardly any cytoplasm.
fn lymphocyte(tile: &mut Tile, region: &Region, x: f32, y: f32, draws: &mut Uniforms) {
    let radius = draws.between(3.4, 4.8);
    let density = region.haematoxylin * draws.between(0.8, 1.25);
    let axes = (radius, radius * draws.between(0.85, 1.0));
    tile.cell(Nucleus { cell: Cell::Lymphocyte, centre: (x, y), axes, angle: 0.0 }, density, 0.05);
}

/// An empty fat cell in a thin membrane, a flat nucleus at its rim.
fn vacuole(tile: &mut Tile, region: &Region, x: f32, y: f32, draws: &mut Uniforms) {
    let a = draws.between(18.0, 28.0);
    let b = a * draws.between(0.8, 1.0);
    let (angle, membrane) = (draws.between(0.0, 3.2), region.eosin * draws.between(0.5, 0.9));
    tile.ellipse(x, y, a, b, angle, |radius, h, e| {
        if radius < 0.92 {
            (*h, *e) = (*h * 0.25, *e * 0.3);
        } else {
            *e = e.max(membrane);
        }
    });
    if draws.next() < 0.6 {
        let place = draws.between(0.0, 6.3);
        let (s, c) = place.sin_cos();
        let density = region.haematoxylin * 1.2;
        let (centre, angle) = ((x + a * c, y + b * s), place + 1.57);
        tile.cell(Nucleus { cell: Cell::Adipocyte, centre, axes: (6.5, 2.2), angle }, density, 0.1);
    }
}

/// A lumen inside a ring of columnar cells, their nuclei towards the outside.
fn gland(tile: &mut Tile, region: &Region, x: f32, y: f32, draws: &mut Uniforms) {
    let outer = draws.between(26.0, 36.0);
    let squash = draws.between(0.75, 1.0);
    let angle = draws.between(0.0, 3.2);
    let lumen = draws.between(0.35, 0.5);
    let wall = region.eosin * 0.75;
    tile.ellipse(x, y, outer, outer * squash, angle, |radius, h, e| {
        if radius < lumen {
            (*h, *e) = (*h * 0.3, *e * 0.25);
        } else {
            *e = e.max(wall);
        }
    });
    let count = (outer * 0.72).round() as i32;
    let (s, c) = angle.sin_cos();
    for at in 0..count {
        let turn = at as f32 / count as f32 * std::f32::consts::TAU + draws.between(-0.05, 0.05);
        let (u, v) = (outer * 0.82 * turn.cos(), outer * squash * 0.82 * turn.sin());
        let density = region.haematoxylin * draws.between(0.85, 1.2);
        let (centre, angle) = ((x + u * c - v * s, y + u * s + v * c), turn + angle);
        tile.cell(Nucleus { cell: Cell::Epithelium, centre, axes: (5.2, 3.1), angle }, density, 0.25);
    }
}

/// Crumbs of dead nuclei, now and then the ghost of a cell.
fn debris(tile: &mut Tile, region: &Region, x: f32, y: f32, draws: &mut Uniforms) {
    if draws.next() < 0.72 {
        let radius = draws.between(0.9, 2.3);
        tile.nucleus((x, y), (radius, radius), 0.0, region.haematoxylin * draws.between(0.7, 1.5), 0.0);
    } else if draws.next() < 0.25 {
        let (a, rim) = (draws.between(7.0, 12.0), region.eosin * 0.8);
        tile.ellipse(x, y, a, a * 0.9, 0.0, |radius, _, e| {
            if radius > 0.8 {
                *e = e.max(rim);
            } else {
                *e *= 0.8;
            }
        });
    }
}
