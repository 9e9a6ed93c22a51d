//! Pixels of a slide or image, level by level.

use std::io::{BufRead, Cursor, Seek};
use std::path::Path;

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{PixelType, Resizer};

use super::SlideError;

/// Side of a plain image that is still read.
const MAX_IMAGE_SIDE: u32 = 65_535;
/// Memory that decoding a plain image may take.
const MAX_IMAGE_BYTES: u64 = 12 << 30;
/// Memory that decoding a tile may take.
const MAX_TILE_BYTES: u64 = 512 << 20;

/// RGB bytes, row-major.
#[derive(Clone, Debug)]
pub(crate) struct Rgb {
    pub(crate) width: u32,
    pub(crate) height: u32,
    pub(crate) pixels: Vec<u8>,
}

impl Rgb {
    /// A tile out of its encoded bytes.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, SlideError> {
        plain(image::ImageReader::new(Cursor::new(bytes)), MAX_TILE_BYTES)
            .map_err(|e| SlideError::Skip(format!("not a PNG, JPEG, TIFF or BMP image: {e}")))
    }

    /// A copy of another size.
    pub(crate) fn resized(self, width: u32, height: u32) -> Result<Self, SlideError> {
        if (self.width, self.height) == (width, height) {
            return Ok(self);
        }
        let odd =
            |e: &dyn std::fmt::Display| SlideError::Skip(format!("cannot resize {}×{}: {e}", self.width, self.height));
        let source = ImageRef::new(self.width, self.height, &self.pixels, PixelType::U8x3).map_err(|e| odd(&e))?;
        let mut target = Image::new(width, height, PixelType::U8x3);
        Resizer::new().resize(&source, &mut target, None).map_err(|e| odd(&e))?;
        Ok(Self { width, height, pixels: target.into_vec() })
    }

    /// As a JPEG.
    pub(crate) fn jpeg(&self, quality: u8) -> Result<Vec<u8>, SlideError> {
        let side = |px: u32| u16::try_from(px).map_err(|_| SlideError::Skip(format!("{px} px do not fit a JPEG")));
        let mut out = Vec::new();
        jpeg_encoder::Encoder::new(&mut out, quality)
            .encode(&self.pixels, side(self.width)?, side(self.height)?, jpeg_encoder::ColorType::Rgb)
            .map_err(|e| SlideError::Skip(format!("cannot encode a patch: {e}")))?;
        Ok(out)
    }
}

/// A plain image of any format; what is transparent becomes white.
fn plain<R: BufRead + Seek>(reader: image::ImageReader<R>, memory: u64) -> image::ImageResult<Rgb> {
    let mut reader = reader.with_guessed_format()?;
    let mut limits = image::Limits::default();
    limits.max_image_width = Some(MAX_IMAGE_SIDE);
    limits.max_image_height = Some(MAX_IMAGE_SIDE);
    limits.max_alloc = Some(memory);
    reader.limits(limits);
    let image = reader.decode()?;
    let (width, height) = (image.width(), image.height());
    let pixels = if image.color().has_alpha() {
        let rgba = image.into_rgba8();
        let over = |c: u8, a: u8| ((u32::from(c) * u32::from(a) + 255 * (255 - u32::from(a)) + 127) / 255) as u8;
        rgba.pixels().flat_map(|p| [0, 1, 2].map(|c| over(p.0[c], p.0[3]))).collect()
    } else {
        image.into_rgb8().into_raw()
    };
    Ok(Rgb { width, height, pixels })
}

/// Formats that hold no pyramid.
#[cfg(feature = "openslide")]
fn is_never_a_slide(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    ["png", "jpg", "jpeg", "bmp"].iter().any(|plain| extension.eq_ignore_ascii_case(plain))
}

/// An opened slide or image.
pub(crate) enum Pixels {
    #[cfg(feature = "openslide")]
    Slide(Box<sgcl_openslide::Slide>),
    Image(Rgb),
}

impl Pixels {
    /// Opens what OpenSlide knows, else a plain image.
    pub(crate) fn open(path: &Path) -> Result<Self, SlideError> {
        #[cfg(feature = "openslide")]
        match sgcl_openslide::knows(path) {
            Ok(true) => {
                let slide = sgcl_openslide::Slide::open(path)
                    .map_err(|e| SlideError::Skip(format!("OpenSlide cannot read it: {e}; is the file whole?")))?;
                return Ok(Self::Slide(Box::new(slide)));
            }
            Ok(false) => {}
            // Read as a plain image, a slide would lose its levels and its scale.
            Err(missing) if !is_never_a_slide(path) => return Err(SlideError::Skip(missing.to_string())),
            Err(_) => {}
        }
        let skip = |e: &dyn std::fmt::Display| {
            SlideError::Skip(format!("neither a slide that OpenSlide opens nor a PNG, JPEG, TIFF or BMP image: {e}"))
        };
        let reader = image::ImageReader::open(path).map_err(|e| skip(&e))?;
        plain(reader, MAX_IMAGE_BYTES).map(Self::Image).map_err(|e| skip(&e))
    }

    /// Width, height and downsample of each level.
    pub(crate) fn levels(&self) -> Vec<(u32, u32, f64)> {
        match self {
            #[cfg(feature = "openslide")]
            Self::Slide(slide) => {
                slide.levels().iter().map(|level| (level.width, level.height, level.downsample)).collect()
            }
            Self::Image(image) => vec![(image.width, image.height, 1.0)],
        }
    }

    /// Microns per pixel of level 0.
    pub(crate) fn mpp(&self) -> Option<f64> {
        match self {
            #[cfg(feature = "openslide")]
            Self::Slide(slide) => {
                let side = |name| slide.property(name)?.parse::<f64>().ok();
                let (x, y) = (side("openslide.mpp-x")?, side("openslide.mpp-y")?);
                let mpp = (x + y) / 2.0;
                (mpp.is_finite() && mpp > 0.0).then_some(mpp)
            }
            Self::Image(_) => None,
        }
    }

    /// Pixels of a level from a corner in its own pixels; beyond the edge they are white.
    pub(crate) fn read(&self, level: u32, x: u32, y: u32, width: u32, height: u32) -> Result<Rgb, SlideError> {
        let levels = self.levels();
        let downsample = levels.get(level as usize).map_or(1.0, |&(_, _, downsample)| downsample);
        let [x, y] = [x, y].map(|v| (f64::from(v) * downsample).round() as u32);
        self.read_at(level, [x, y], width, height)
    }

    /// Pixels of a level from a corner in pixels of level 0, as OpenSlide wants it; beyond the edge they are white.
    pub(crate) fn read_at(&self, level: u32, [x, y]: [u32; 2], width: u32, height: u32) -> Result<Rgb, SlideError> {
        match self {
            #[cfg(feature = "openslide")]
            Self::Slide(slide) => {
                let argb = slide
                    .read_region(level, [x, y], width, height)
                    .map_err(|e| SlideError::Skip(format!("cannot read at {x}, {y}: {e}")))?;
                // Premultiplied: what is missing to full opacity is white light.
                let over_white = |pixel: u32| {
                    let [alpha, rgb @ ..] = pixel.to_be_bytes();
                    rgb.map(|colour| colour.saturating_add(255 - alpha))
                };
                let pixels = argb.into_iter().flat_map(over_white).collect();
                Ok(Rgb { width, height, pixels })
            }
            Self::Image(image) => {
                debug_assert_eq!(level, 0, "an image has one level");
                let mut pixels = vec![255; 3 * width as usize * height as usize];
                let wide = width.min(image.width.saturating_sub(x)) as usize;
                for row in 0..height.min(image.height.saturating_sub(y)) {
                    let from = 3 * ((y + row) as usize * image.width as usize + x as usize);
                    let to = 3 * row as usize * width as usize;
                    pixels[to..to + 3 * wide].copy_from_slice(&image.pixels[from..from + 3 * wide]);
                }
                Ok(Rgb { width, height, pixels })
            }
        }
    }
}
