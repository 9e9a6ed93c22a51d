//! The HDF5 file of a slide, as TRIDENT writes it. Made by hdf5-pure in memory: libhdf5 would have to be installed wherever a worker
//! runs, and a file that is put whole needs none of what it is for.

use hdf5_pure::{AttrValue, Error, FileBuilder};

use super::{Geometry, SlideFeatures};

/// `features` (n, d) float32 and `coords` (n, 2) int64 with TRIDENT's attributes, contiguous.
pub(super) fn encode(slide: &SlideFeatures, encoder: &str, savetodir: &str) -> Result<Vec<u8>, Error> {
    let rows = slide.coords.len() as u64;
    let text = |value: &str| AttrValue::VarLenString(value.to_owned());
    let mut file = FileBuilder::new();
    file.create_dataset("features")
        .with_f32_data(&slide.features)
        .with_shape(&[rows, slide.dim as u64])
        .set_attr("name", text(&slide.name))
        .set_attr("savetodir", text(savetodir))
        .set_attr("encoder", text(encoder));
    let flat: Vec<i64> = slide.coords.iter().flatten().copied().collect();
    let coords = file.create_dataset("coords").with_i64_data(&flat).with_shape(&[rows, 2]);
    for (name, value) in attributes(&slide.geometry) {
        coords.set_attr(name, value);
    }
    coords.set_attr("name", text(&slide.name)).set_attr("savetodir", text(savetodir));
    file.finish()
}

/// Attributes of `coords`. Magnifications are the nominal ones that go with microns per pixel, as TRIDENT has them.
fn attributes(geometry: &Geometry) -> Vec<(&'static str, AttrValue)> {
    let side = f64::from(geometry.patch_px);
    let level0 = (side * geometry.downsample.unwrap_or(1.0)).round() as i64;
    let frame = match (geometry.spatial, geometry.downsample) {
        (false, _) => "none: the patches have no known places",
        (true, None) => "pixels at the patches' magnification",
        (true, Some(_)) => "pixels of level 0",
    };
    let mut found = vec![
        ("patch_size", AttrValue::I64(geometry.patch_px.into())),
        ("patch_size_level0", AttrValue::I64(level0)),
        ("overlap", AttrValue::I64(geometry.overlap.into())),
        ("frame", AttrValue::VarLenString(frame.to_owned())),
    ];
    if let Some(mpp) = geometry.mpp {
        found.push(("mpp", AttrValue::F64(mpp)));
        let downsample = geometry.downsample.unwrap_or(1.0);
        if let Some(magnification) = magnification(mpp / downsample) {
            let target = f64::from(magnification) / downsample;
            let whole = ((target - target.round()).abs() < 1e-6).then_some(target.round() as i64);
            found.push(("level0_magnification", AttrValue::I64(magnification.into())));
            found.push(("target_magnification", whole.map_or(AttrValue::F64(target), AttrValue::I64)));
        }
    }
    if let Some([width, height]) = geometry.level0 {
        found.push(("level0_width", AttrValue::I64(width.into())));
        found.push(("level0_height", AttrValue::I64(height.into())));
    }
    found
}

/// The objective that goes with a pixel of `mpp` microns.
fn magnification(mpp: f64) -> Option<u32> {
    [(0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5)]
        .into_iter()
        .find(|&(below, _)| mpp < below)
        .map(|(_, magnification)| magnification)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(geometry: &Geometry, name: &str) -> Option<AttrValue> {
        attributes(geometry).into_iter().find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    #[rstest::rstest]
    #[case::twice(Some(0.5), Some(2.0), Some(AttrValue::I64(40)), Some(AttrValue::I64(20)), 512)]
    #[case::as_scanned(Some(0.5), Some(1.0), Some(AttrValue::I64(20)), Some(AttrValue::I64(20)), 256)]
    #[case::odd(Some(0.6), Some(1.2), Some(AttrValue::I64(20)), Some(AttrValue::F64(20.0 / 1.2)), 307)]
    #[case::unknown(None, Some(2.0), None, None, 512)]
    #[case::tiles(None, None, None, None, 256)]
    fn magnifications_go_with_microns(
        #[case] mpp: Option<f64>,
        #[case] downsample: Option<f64>,
        #[case] level0: Option<AttrValue>,
        #[case] target: Option<AttrValue>,
        #[case] side: i64,
    ) {
        let geometry = Geometry { patch_px: 256, mpp, downsample, level0: None, overlap: 0, spatial: true };
        assert_eq!(found(&geometry, "level0_magnification"), level0);
        assert_eq!(found(&geometry, "target_magnification"), target);
        assert_eq!(found(&geometry, "patch_size_level0"), Some(AttrValue::I64(side)));
    }
}
