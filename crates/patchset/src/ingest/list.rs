//! Lists of tiles, as SGCL's own code reads them: a line for each, its path below the folder and, if it has one, its label, a whole
//! number from 0.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};

use super::container::MAX_ITEMS;

/// Largest list.
const MAX_BYTES: u64 = 4 << 30;
/// Longest line.
const MAX_LINE: usize = 8 << 10;

/// A line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) path: PathBuf,
    pub(super) label: Option<String>,
}

/// The lines of a list; blank ones are passed over.
pub(super) fn read(list: &Path) -> Result<Vec<Listed>, String> {
    let file = File::open(list).map_err(|e| e.to_string())?;
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    if length > MAX_BYTES {
        return Err(format!("has {length} bytes; at most {MAX_BYTES} are read"));
    }
    let mut listed = Vec::new();
    let mut lines = BufReader::new(file);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if lines.read_until(b'\n', &mut line).map_err(|e| e.to_string())? == 0 {
            break;
        }
        if line.len() > MAX_LINE || number > MAX_ITEMS {
            return Err(format!(
                "line {number}: lines have at most {MAX_LINE} bytes, and there are at most {MAX_ITEMS}"
            ));
        }
        let text = std::str::from_utf8(&line).map_err(|_| format!("line {number} is not UTF-8"))?;
        if !text.trim().is_empty() {
            listed.push(parse(text.trim()).map_err(|e| format!("line {number}: {e}"))?);
        }
    }
    if listed.is_empty() {
        return Err("names no tile; a line is a path and, if it has one, a label".to_owned());
    }
    Ok(listed)
}

fn parse(line: &str) -> Result<Listed, String> {
    match line.rsplit_once(char::is_whitespace) {
        None => Ok(Listed { path: line.into(), label: None }),
        Some((path, label)) => match label.parse::<i64>() {
            Ok(number) if number >= 0 => Ok(Listed { path: path.trim_end().into(), label: Some(number.to_string()) }),
            Ok(number) => Err(format!("label {number} is below 0")),
            // A blank in the path, or another kind of list.
            Err(_) if Path::new(label).extension().is_some() => Ok(Listed { path: line.into(), label: None }),
            Err(_) => Err(format!("{label:?} is no label; a whole number from 0 is wanted")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_path_and_perhaps_a_label() {
        let of = |path: &str, label: Option<&str>| Ok(Listed { path: path.into(), label: label.map(str::to_owned) });
        assert_eq!(parse("tumor/a/a_1_2_0.png 1"), of("tumor/a/a_1_2_0.png", Some("1")));
        assert_eq!(parse("a b/c d.png\t07"), of("a b/c d.png", Some("7")));
        assert_eq!(parse("a b/c d.png"), of("a b/c d.png", None));
        assert_eq!(parse("a.png"), of("a.png", None));
        assert!(parse("a.png -1").is_err() && parse("a.png tumour").is_err());
    }
}
