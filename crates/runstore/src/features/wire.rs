//! How `sgclctl`, which reads slides, hands patches to `sgcl-worker embed`, which has torch: on its standard input.
//!
//! ```text
//! slide:  length of the header (u32, little-endian), header (JSON), then for each patch a byte 1 and its pixels (RGB, row-major)
//! a slide that cannot be read to its end: a byte 0 in place of a patch
//! ```

use std::io::{Error, ErrorKind, Read, Result, Write};

use serde::{Deserialize, Serialize};

use super::Geometry;

/// Longest header: a hundred million coordinates do not fit, four million do.
const MAX_HEADER_BYTES: u32 = 256 << 20;
/// Largest side of a patch.
pub const MAX_PATCH_PX: u32 = 4096;

const PATCH: u8 = 1;
const ABANDON: u8 = 0;

/// What comes before a slide's patches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlideHeader {
    /// The slide's name.
    pub name: String,
    /// Tells one state of its file from another.
    pub fingerprint: String,
    /// What the coordinates mean.
    pub geometry: Geometry,
    /// (n, 2): corners of the patches that follow.
    pub coords: Vec<[i64; 2]>,
}

impl SlideHeader {
    /// Bytes of a patch.
    #[must_use]
    pub fn patch_bytes(&self) -> usize {
        3 * (self.geometry.patch_px as usize).pow(2)
    }
}

/// Begins a slide.
///
/// # Errors
/// The reader is gone, or the header is too long.
pub fn write_header(to: &mut impl Write, header: &SlideHeader) -> Result<()> {
    let text = serde_json::to_vec(header)?;
    match u32::try_from(text.len()) {
        Ok(length) if length <= MAX_HEADER_BYTES => to.write_all(&length.to_le_bytes())?,
        _ => return Err(Error::new(ErrorKind::InvalidInput, "the slide has too many patches to be handed on")),
    }
    to.write_all(&text)
}

/// The next slide; `None` when there is none.
///
/// # Errors
/// The stream broke off or is not one of these.
pub fn read_header(from: &mut impl Read) -> Result<Option<SlideHeader>> {
    let mut length = [0; 4];
    match from.read(&mut length[..1])? {
        0 => return Ok(None),
        _ => from.read_exact(&mut length[1..])?,
    }
    let length = u32::from_le_bytes(length);
    let odd = |reason: String| Error::new(ErrorKind::InvalidData, reason);
    if length > MAX_HEADER_BYTES {
        return Err(odd(format!("a header of {length} bytes")));
    }
    let mut text = vec![0; length as usize];
    from.read_exact(&mut text)?;
    let header: SlideHeader = serde_json::from_slice(&text)?;
    let px = header.geometry.patch_px;
    if !(1..=MAX_PATCH_PX).contains(&px) {
        return Err(odd(format!("patches of {px} px")));
    }
    Ok(Some(header))
}

/// Hands on a patch.
///
/// # Errors
/// The reader is gone.
pub fn write_patch(to: &mut impl Write, pixels: &[u8]) -> Result<()> {
    to.write_all(&[PATCH])?;
    to.write_all(pixels)
}

/// Ends a slide before its last patch: nothing of it will be kept.
///
/// # Errors
/// The reader is gone.
pub fn write_abandon(to: &mut impl Write) -> Result<()> {
    to.write_all(&[ABANDON])
}

/// Reads a patch into `pixels`; false where the slide was abandoned.
///
/// # Errors
/// The stream broke off or is not one of these.
pub fn read_patch(from: &mut impl Read, pixels: &mut [u8]) -> Result<bool> {
    let mut tag = [0];
    from.read_exact(&mut tag)?;
    match tag[0] {
        PATCH => from.read_exact(pixels).map(|()| true),
        ABANDON => Ok(false),
        other => Err(Error::new(ErrorKind::InvalidData, format!("a patch that begins with {other}"))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn slides_go_through_patch_by_patch_and_may_be_abandoned() {
        let geometry =
            Geometry { patch_px: 2, mpp: Some(0.5), downsample: Some(2.0), level0: None, overlap: 0, spatial: true };
        let header = SlideHeader { name: "a".into(), fingerprint: "1".into(), geometry, coords: vec![[0, 0], [4, 0]] };
        let mut stream = Vec::new();
        for abandoned in [false, true] {
            write_header(&mut stream, &header).unwrap();
            write_patch(&mut stream, &[7; 12]).unwrap();
            if abandoned {
                write_abandon(&mut stream).unwrap();
            } else {
                write_patch(&mut stream, &[8; 12]).unwrap();
            }
        }
        let whole = stream.len();
        let mut from = stream.as_slice();
        let mut pixels = vec![0; header.patch_bytes()];
        assert_eq!(read_header(&mut from).unwrap().unwrap(), header);
        assert!(read_patch(&mut from, &mut pixels).unwrap() && pixels == [7; 12]);
        assert!(read_patch(&mut from, &mut pixels).unwrap() && pixels == [8; 12]);
        assert_eq!(read_header(&mut from).unwrap().unwrap(), header);
        assert!(read_patch(&mut from, &mut pixels).unwrap());
        assert!(!read_patch(&mut from, &mut pixels).unwrap());
        assert!(read_header(&mut from).unwrap().is_none());

        let mut cut = &stream[..whole / 2 - 3];
        read_header(&mut cut).unwrap().unwrap();
        assert!(read_patch(&mut cut, &mut pixels).unwrap());
        assert_eq!(read_patch(&mut cut, &mut pixels).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
