//! Classes of the Breast Cancer Semantic Segmentation dataset: the 22 codes of its masks, grouped into five as SGCL publishes them.

use super::IGNORED;

/// What its masks may hold: `meta/gtruth_codes.tsv` of the dataset, by code.
pub const CODES: [&str; 22] = [
    "outside_roi",
    "tumor",
    "stroma",
    "lymphocytic_infiltrate",
    "necrosis_or_debris",
    "glandular_secretions",
    "blood",
    "exclude",
    "metaplasia_NOS",
    "fat",
    "plasma_cells",
    "other_immune_infiltrate",
    "mucoid_material",
    "normal_acinus_or_duct",
    "lymphatics",
    "undetermined",
    "nerve",
    "skin_adnexa",
    "blood_vessel",
    "angioinvasion",
    "dcis",
    "other",
];

/// The classes that are learnt, by number.
pub const CLASSES: [&str; 5] = ["other", "tumour", "stroma", "inflammatory", "necrosis"];

/// Institutes, by the second part of a TCGA barcode, whose slides are validated on.
pub const VALIDATION: [&str; 6] = ["OL", "LL", "E2", "EW", "GM", "S3"];

/// The class of a code: nothing outside the region of interest; angioinvasion and DCIS are tumour; plasma cells, other immune
/// infiltrate and lymphatics are inflammatory; tumour, stroma, lymphocytes and necrosis are themselves; all else is other. `None` for what
/// is no code.
#[must_use]
pub fn class(code: u16) -> Option<u8> {
    Some(match code {
        0 => IGNORED,
        1 | 19 | 20 => 1,
        2 => 2,
        3 | 10 | 11 | 14 => 3,
        4 => 4,
        5..=21 => 0,
        _ => return None,
    })
}

/// The institute of a file called by its TCGA barcode, `TCGA-XX-…`: XX.
#[must_use]
pub fn institute(name: &str) -> Option<&str> {
    let code = name.strip_prefix("TCGA-")?.split('-').next()?;
    (code.len() == 2 && code.bytes().all(|b| b.is_ascii_alphanumeric())).then_some(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_the_published_class() {
        let found: Vec<Option<u8>> = (0..=22).map(class).collect();
        let expected = [255, 1, 2, 3, 4, 0, 0, 0, 0, 0, 3, 3, 0, 0, 3, 0, 0, 0, 0, 1, 1, 0];
        let expected: Vec<Option<u8>> = expected.into_iter().map(Some).chain([None]).collect();
        assert_eq!(found, expected);
        assert_eq!((CODES[10], CODES[11], CODES[14]), ("plasma_cells", "other_immune_infiltrate", "lymphatics"));
        assert_eq!((CODES[19], CODES[20]), ("angioinvasion", "dcis"));
    }

    #[test]
    fn the_institute_is_the_second_part_of_the_barcode() {
        assert_eq!(institute("TCGA-OL-A5D6-DX1_xmin115108_ymin40554_MPP-0.2500.png"), Some("OL"));
        for name in ["OL-A5D6.png", "TCGA-OLX-A5D6.png", "TCGA--A5D6.png", "TCGA-"] {
            assert_eq!(institute(name), None, "{name}");
        }
    }
}
