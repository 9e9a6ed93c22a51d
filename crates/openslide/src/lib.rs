//! Whole-slide images through [OpenSlide](https://openslide.org), 3.4 or newer.
//!
//! The library is loaded when the first slide is asked for, not linked: a program that never reads a slide starts where there is none, and one
//! that does says what to install.

mod api;

use std::ffi::{CStr, CString, c_char};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::NonNull;

use api::{Api, Handle};

/// What keeps a slide from being read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenSlideError {
    /// The library is not there, or is not one that we know.
    #[error(
        "OpenSlide is not installed ({0}); it is Debian's package libopenslide0 (libopenslide1 in newer ones), Homebrew's openslide"
    )]
    Missing(String),
    /// No format that it knows.
    #[error("no slide that OpenSlide knows")]
    Unknown,
    /// In its own words.
    #[error("{0}")]
    Failed(String),
}

/// A level of a slide's pyramid.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    /// Pixels across.
    pub width: u32,
    /// Pixels down.
    pub height: u32,
    /// Pixels of level 0 to one of this.
    pub downsample: f64,
}

/// Whether OpenSlide knows the format of a file, by a look at its head.
///
/// # Errors
/// OpenSlide is [missing](OpenSlideError::Missing).
pub fn knows(path: &Path) -> Result<bool, OpenSlideError> {
    let api = Api::get()?;
    let Ok(path) = c_path(path) else { return Ok(false) };
    // SAFETY: a valid string that outlives the call; what it returns is only compared with null.
    Ok(unsafe { !(api.detect_vendor)(path.as_ptr()).is_null() })
}

/// An open slide; any number of threads may read it at once.
#[derive(Debug)]
pub struct Slide {
    api: &'static Api,
    handle: NonNull<Handle>,
    levels: Vec<Level>,
}

// SAFETY: OpenSlide's objects may be used by any thread, and by several at once; only `close` must be the last call, and `drop` is.
unsafe impl Send for Slide {}
// SAFETY: as above.
unsafe impl Sync for Slide {}

impl Slide {
    /// Opens a file.
    ///
    /// # Errors
    /// OpenSlide is missing, does not know the format, or finds the file damaged.
    pub fn open(path: &Path) -> Result<Self, OpenSlideError> {
        let api = Api::get()?;
        let path = c_path(path)?;
        // SAFETY: a valid string that outlives the call.
        let handle = NonNull::new(unsafe { (api.open)(path.as_ptr()) }).ok_or(OpenSlideError::Unknown)?;
        let mut slide = Self { api, handle, levels: Vec::new() };
        slide.well()?;
        slide.levels = slide.read_levels()?;
        Ok(slide)
    }

    /// The pyramid, from the finest level.
    #[must_use]
    pub fn levels(&self) -> &[Level] {
        &self.levels
    }

    /// A property such as `openslide.mpp-x`.
    #[must_use]
    pub fn property(&self, name: &str) -> Option<String> {
        let name = CString::new(name).ok()?;
        // SAFETY: the handle is open; what is returned lives as long as it, and is copied here.
        unsafe { text((self.api.get_property_value)(self.handle.as_ptr(), name.as_ptr())) }
    }

    /// Pixels of a level as 0xAARRGGBB, colours premultiplied, row-major, `width` × `height`; beyond the edge they are 0. The corner is given
    /// in pixels of level 0.
    ///
    /// # Errors
    /// The file is damaged there; every later reading of this slide then fails too. Or the region does not fit the memory.
    pub fn read_region(
        &self,
        level: u32,
        [x, y]: [u32; 2],
        width: u32,
        height: u32,
    ) -> Result<Vec<u32>, OpenSlideError> {
        let failed = |what: &str| OpenSlideError::Failed(format!("{width}×{height} pixels of level {level}: {what}"));
        let level = i32::try_from(level).map_err(|_| failed("there is no such level"))?;
        let pixels = (width as usize).checked_mul(height as usize).ok_or_else(|| failed("too many"))?;
        let mut argb = Vec::new();
        argb.try_reserve_exact(pixels).map_err(|_| failed("they do not fit the memory"))?;
        argb.resize(pixels, 0);
        let (x, y, width, height) = (x.into(), y.into(), width.into(), height.into());
        // SAFETY: the handle is open, and the buffer has room for width × height values.
        unsafe { (self.api.read_region)(self.handle.as_ptr(), argb.as_mut_ptr(), x, y, level, width, height) };
        self.well()?;
        Ok(argb)
    }

    fn read_levels(&self) -> Result<Vec<Level>, OpenSlideError> {
        // SAFETY: the handle is open.
        let count = unsafe { (self.api.get_level_count)(self.handle.as_ptr()) };
        let read = |level| {
            let (mut width, mut height) = (0_i64, 0_i64);
            // SAFETY: the handle is open, both places are ours.
            unsafe { (self.api.get_level_dimensions)(self.handle.as_ptr(), level, &mut width, &mut height) };
            // SAFETY: the handle is open.
            let downsample = unsafe { (self.api.get_level_downsample)(self.handle.as_ptr(), level) };
            let side = |pixels: i64| u32::try_from(pixels).ok().filter(|&pixels| pixels > 0);
            match (side(width), side(height)) {
                (Some(width), Some(height)) if downsample > 0.0 => Ok(Level { width, height, downsample }),
                _ => Err(OpenSlideError::Failed(format!(
                    "level {level} has {width}×{height} pixels, downsample {downsample}"
                ))),
            }
        };
        (0..count).map(read).collect()
    }

    /// Whether an earlier call failed: OpenSlide then refuses all others.
    fn well(&self) -> Result<(), OpenSlideError> {
        // SAFETY: the handle is open; what is returned lives as long as it, and is copied here.
        match unsafe { text((self.api.get_error)(self.handle.as_ptr())) } {
            Some(error) => Err(OpenSlideError::Failed(error)),
            None => Ok(()),
        }
    }
}

impl Drop for Slide {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and nobody can use it afterwards.
        unsafe { (self.api.close)(self.handle.as_ptr()) }
    }
}

fn c_path(path: &Path) -> Result<CString, OpenSlideError> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| OpenSlideError::Failed(format!("{}: a path cannot have a zero byte", path.display())))
}

/// A copy of a C string; none for null.
///
/// # Safety
/// It is null, or valid and ends with a zero byte.
unsafe fn text(string: *const c_char) -> Option<String> {
    // SAFETY: as the caller promises.
    (!string.is_null()).then(|| unsafe { CStr::from_ptr(string) }.to_string_lossy().into_owned())
}
