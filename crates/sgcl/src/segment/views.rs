//! Tiles as a network sees them: scaled, cut, mirrored and recoloured at random, the classes of their pixels with them.

use fast_image_resize::images::{CroppedImage, Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use rand::Rng as _;
use rand::seq::SliceRandom;
use sgcl_draw::{Purpose, Rng, rng};

use super::IGNORED;
use crate::augment::render::normalize;
use crate::augment::{ColorOp, Crop, JitterDraw, color};
use crate::image::RgbImage;

/// By what a tile is scaled.
const SCALE: (f64, f64) = (0.5, 2.0);

/// A piece of an image and the class of each pixel, row-major.
#[derive(Clone, Debug)]
pub struct Tile {
    /// The picture.
    pub image: RgbImage,
    /// Width × height classes; [`IGNORED`] where there is none.
    pub classes: Vec<u8>,
}

/// What is done to a tile at random while learning: the steps of mmsegmentation's usual pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Augment {
    /// Scaled by 0.5 to 2, then a random part of it as large as a tile; what is missing is ignored.
    pub crop: bool,
    /// Mirrored half of the time.
    pub flip: bool,
    /// Brightness ±1/8, contrast and saturation ±1/2, hue ±1/10 of a turn, each half of the time.
    pub colour: bool,
}

/// All that is random about a view.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Draw {
    crop: Crop,
    /// Size to which the crop is brought.
    size: [u32; 2],
    flip: bool,
    jitter: JitterDraw,
}

impl Augment {
    /// The view of a tile of `width` × `height` pixels, a pure function of seed, epoch and tile.
    fn draw(self, width: u32, height: u32, px: u32, [seed, epoch, tile]: [u64; 3]) -> Draw {
        let mut rng = rng(seed, Purpose::Augment, epoch, tile);
        let (crop, size) = self.place(width, height, px, &mut rng);
        let flip = self.flip && rng.random::<f64>() < 0.5;
        Draw { crop, size, flip, jitter: self.jitter(&mut rng) }
    }

    fn place(self, width: u32, height: u32, px: u32, rng: &mut Rng) -> (Crop, [u32; 2]) {
        let (w, h) = (width.min(px), height.min(px));
        if !self.crop {
            return (Crop { left: 0, top: 0, width: w, height: h }, [w, h]);
        }
        let scale = SCALE.0 + (SCALE.1 - SCALE.0) * rng.random::<f64>();
        let cut = ((f64::from(px) / scale).round() as u32).max(1);
        let (w, h) = (width.min(cut), height.min(cut));
        let (left, top) = (rng.random_range(0..=width - w), rng.random_range(0..=height - h));
        let scaled = |side: u32| ((f64::from(side) * scale).round() as u32).clamp(1, px);
        (Crop { left, top, width: w, height: h }, [scaled(w), scaled(h)])
    }

    fn jitter(self, rng: &mut Rng) -> JitterDraw {
        let mut order = [ColorOp::Brightness, ColorOp::Contrast, ColorOp::Saturation, ColorOp::Hue];
        if !self.colour {
            return JitterDraw { order, brightness: 1.0, contrast: 1.0, saturation: 1.0, hue: 0.0 };
        }
        order.shuffle(rng);
        let mut around = |middle: f64, spread: f64| {
            let (done, value) = (rng.random::<f64>() < 0.5, rng.random::<f64>());
            if done { middle + spread * (2.0 * value - 1.0) } else { middle }
        };
        let (brightness, contrast) = (around(1.0, 0.125), around(1.0, 0.5));
        JitterDraw { order, brightness, contrast, saturation: around(1.0, 0.5), hue: around(0.0, 0.1) }
    }
}

/// Where a view goes: 3 × px × px normalised values, CHW, and px × px classes.
#[derive(Debug)]
pub struct Slot<'a> {
    /// Normalised values; zeros, the mean colour, where the tile does not reach.
    pub values: &'a mut [f32],
    /// Classes; [`IGNORED`] where the tile does not reach.
    pub classes: &'a mut [i64],
    /// Side of the view.
    pub px: u32,
}

impl Slot<'_> {
    /// A tile as it is, in the upper left corner.
    pub fn test(&mut self, tile: &Tile) {
        let nothing = Augment { crop: false, flip: false, colour: false };
        self.render(tile, &nothing.draw(tile.image.width(), tile.image.height(), self.px, [0; 3]));
    }

    /// A tile's view of an epoch.
    pub fn train(&mut self, tile: &Tile, augment: Augment, seed: u64, epoch: u64, number: u64) {
        let draw = augment.draw(tile.image.width(), tile.image.height(), self.px, [seed, epoch, number]);
        self.render(tile, &draw);
    }

    fn render(&mut self, tile: &Tile, draw: &Draw) {
        let [wide, high] = draw.size.map(|side| side as usize);
        let mut pixels = resized(&tile.image, draw.crop, draw.size);
        color::jitter(&mut pixels, &draw.jitter);
        let px = self.px as usize;
        self.classes.fill(i64::from(IGNORED));
        // Onto the ground first, so that all of it is normalised alike; the ground itself is the mean.
        let mut canvas = vec![0; 3 * px * px];
        for (row, line) in pixels.chunks_exact(3 * wide).enumerate() {
            canvas[3 * row * px..3 * (row * px + wide)].copy_from_slice(line);
        }
        normalize(&canvas, px, false, self.values);
        for plane in self.values.chunks_exact_mut(px * px) {
            for (row, line) in plane.chunks_exact_mut(px).enumerate() {
                line[if row < high { wide } else { 0 }..].fill(0.0);
                if draw.flip {
                    line[..wide].reverse();
                }
            }
        }
        let nearest = |at: usize, from: u32, of: u32, to: usize| {
            from as usize + ((at as f64 + 0.5) * f64::from(of) / to as f64) as usize
        };
        let Crop { left, top, width, height } = draw.crop;
        let stride = tile.image.width() as usize;
        for (row, line) in self.classes.chunks_exact_mut(px).take(high).enumerate() {
            let y = nearest(row, top, height, high);
            for (column, class) in line[..wide].iter_mut().enumerate() {
                *class = i64::from(tile.classes[y * stride + nearest(column, left, width, wide)]);
            }
            if draw.flip {
                line[..wide].reverse();
            }
        }
    }
}

#[expect(clippy::expect_used, reason = "sizes are made to fit here")]
/// A part of an image at another size: bilinear, antialiased.
fn resized(image: &RgbImage, crop: Crop, [width, height]: [u32; 2]) -> Vec<u8> {
    let mut pixels = vec![0; 3 * (width * height) as usize];
    let source = ImageRef::new(image.width(), image.height(), image.pixels(), PixelType::U8x3)
        .expect("RgbImage holds 3 × width × height bytes");
    let source = CroppedImage::new(&source, crop.left, crop.top, crop.width, crop.height)
        .expect("a crop is drawn inside its image");
    let mut target =
        Image::from_slice_u8(width, height, &mut pixels, PixelType::U8x3).expect("the buffer was sized for the view");
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear)).use_alpha(false);
    Resizer::new().resize(&source, &mut target, &options).expect("both images are RGB bytes");
    pixels
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A tile whose classes follow from its colours: red 0 or 255 by class 0 or 1.
    fn tile(width: u32, height: u32) -> Tile {
        let class = |at: u32| u8::from(at % width >= width / 3) ^ u8::from(at / width >= height / 4);
        let classes: Vec<u8> = (0..width * height).map(class).collect();
        let pixels = classes.iter().flat_map(|&class| [255 * class, 90, 160]).collect();
        Tile { image: RgbImage::new(width, height, pixels).unwrap(), classes }
    }

    fn view(tile: &Tile, px: u32, draw: impl Fn(&mut Slot<'_>, &Tile)) -> (Vec<f32>, Vec<i64>) {
        let mut values = vec![7.0; 3 * (px * px) as usize];
        let mut classes = vec![7; (px * px) as usize];
        draw(&mut Slot { values: &mut values, classes: &mut classes, px }, tile);
        (values, classes)
    }

    #[test]
    fn a_test_view_is_the_tile_and_beyond_it_nothing_counts() {
        let tile = tile(20, 30);
        let (values, classes) = view(&tile, 32, |slot, tile| slot.test(tile));
        for y in 0..32 {
            for x in 0..32 {
                let (at, inside) = (y * 32 + x, x < 20 && y < 30);
                if inside {
                    assert_eq!(classes[at], i64::from(tile.classes[y * 20 + x]));
                    assert_eq!(values[at] > 0.0, classes[at] == 1, "red says the class");
                } else {
                    assert_eq!((classes[at], values[at]), (255, 0.0));
                }
            }
        }
    }

    #[test]
    fn classes_follow_their_pixels_wherever_a_view_takes_them() {
        let tile = tile(48, 40);
        let augment = Augment { crop: true, flip: true, colour: false };
        let mut seen = [false; 3];
        for epoch in 0..40 {
            let (values, classes) = view(&tile, 48, |slot, tile| slot.train(tile, augment, 5, epoch, 3));
            let counted = classes.iter().filter(|&&class| class != 255).count();
            assert!(counted > 0);
            let agree = (0..classes.len()).filter(|&at| classes[at] != 255 && (values[at] > 0.0) == (classes[at] == 1));
            // Bilinear and nearest differ along the edges alone.
            assert!(agree.count() as f64 > 0.9 * counted as f64, "epoch {epoch}");
            seen[0] |= counted < classes.len();
            let draw = augment.draw(48, 40, 48, [5, epoch, 3]);
            seen[1] |= draw.flip;
            seen[2] |= draw.crop.width < 48;
            assert_eq!(draw, augment.draw(48, 40, 48, [5, epoch, 3]));
        }
        assert_eq!(seen, [true; 3], "padded, mirrored and cut");
    }

    #[test]
    fn colours_change_half_of_the_time_each_and_classes_never() {
        let augment = Augment { crop: false, flip: false, colour: true };
        let jitters: Vec<JitterDraw> = (0..200).map(|epoch| augment.draw(8, 8, 8, [1, epoch, 0]).jitter).collect();
        for factor in [|j: &JitterDraw| j.brightness - 1.0, |j: &JitterDraw| j.contrast - 1.0, |j: &JitterDraw| j.hue] {
            let changed = jitters.iter().filter(|jitter| factor(jitter) != 0.0).count();
            assert!((60..140).contains(&changed), "{changed} of 200");
        }
    }
}
