//! WebDataset shards: tars in which an image and what belongs to it follow each other under one key.
//!
//! | entry | holds |
//! |---|---|
//! | `<key>.jpg`, `.jpeg`, `.png`, `.tif`, `.tiff`, `.bmp` | the image |
//! | `<key>.cls` | the class: its number, or its name |
//! | `<key>.json` | an object; `class` (name) or `label` (number or name) say the class, `slide`, `x` and `y` (in tiles) the place |
//!
//! Other entries are passed over. A key is what stands before the first dot of a name. Headers are read and images left where they are.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Mutex;

use serde_json::Value;

use super::container::{Container, Entry, MAX_ITEMS, Opened, Sample, Tar};

/// Largest `.json` and `.cls`.
const MAX_NOTE: u64 = 1 << 20;
/// Longest name of a class or slide.
const MAX_NAME: usize = 200;

const IMAGES: [&str; 6] = ["jpg", "jpeg", "png", "tif", "tiff", "bmp"];

/// What was found under a key so far.
#[derive(Default)]
struct Group {
    key: String,
    image: Option<Entry>,
    class: Option<String>,
    json: Option<Value>,
}

/// Finds the images of a tar.
pub(super) fn open(path: &Path) -> Opened {
    let file = File::open(path).map_err(|e| e.to_string())?;
    let whole = file.metadata().map_err(|e| e.to_string())?.len();
    let damaged = |e: &dyn std::fmt::Display| format!("is not a tar, or damaged: {e}");
    let mut archive = tar::Archive::new(file.try_clone().map_err(|e| e.to_string())?);
    let (mut entries, mut samples) = (Vec::new(), Vec::new());
    let mut group = Group::default();
    for entry in archive.entries_with_seek().map_err(|e| damaged(&e))? {
        let mut entry = entry.map_err(|e| damaged(&e))?;
        if entry.header().entry_type().is_dir() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let Some((key, kind)) = parts(&name) else { continue };
        if !entry.header().entry_type().is_file() {
            return Err(format!("{name} in it is not a plain file"));
        }
        let (offset, length) = (entry.raw_file_position(), entry.size());
        if offset.checked_add(length).is_none_or(|end| end > whole) {
            return Err(format!("breaks off within {name}; fetch it again"));
        }
        if key != group.key {
            let done = std::mem::replace(&mut group, Group { key: key.to_owned(), ..Group::default() });
            done.close(&mut entries, &mut samples)?;
        }
        if IMAGES.contains(&kind.as_str()) {
            if let Some(first) = group.image.replace(Entry { name: name.clone(), offset, length }) {
                return Err(format!("has two images under one key, {} and {name}; one is wanted", first.name));
            }
        } else if kind == "cls" || kind == "json" {
            if length > MAX_NOTE {
                return Err(format!("{name} in it has {length} bytes; at most {MAX_NOTE} are read"));
            }
            let mut text = Vec::new();
            entry.read_to_end(&mut text).map_err(|e| damaged(&e))?;
            if kind == "cls" {
                group.class = Some(called(&String::from_utf8_lossy(&text)).map_err(|e| format!("{name} in it {e}"))?);
            } else {
                let json = serde_json::from_slice(&text).map_err(|e| format!("{name} in it is not JSON: {e}"))?;
                group.json = Some(json);
            }
        }
        if entries.len() > MAX_ITEMS {
            return Err(format!("has more than {MAX_ITEMS} images; split it"));
        }
    }
    group.close(&mut entries, &mut samples)?;
    if entries.is_empty() {
        return Err(format!(
            "holds no image of a WebDataset ({})",
            IMAGES.map(|kind| format!("<key>.{kind}")).join(", ")
        ));
    }
    Ok((Container::Tar(Tar { path: path.to_owned(), file: Mutex::new(file), entries }), samples))
}

impl Group {
    fn close(self, entries: &mut Vec<Entry>, samples: &mut Vec<Sample>) -> Result<(), String> {
        // Keys without an image hold text or arrays, which are none of ours.
        let Some(image) = self.image else { return Ok(()) };
        let wrong = |what: String| format!("{}.json in it: {what}", self.key);
        let (mut place, mut class) = (None, self.class);
        if let Some(json) = &self.json {
            place = place_of(json).map_err(wrong)?;
            class = class_of(json, class).map_err(wrong)?;
        }
        samples.push(Sample { item: entries.len(), place, class });
        entries.push(image);
        Ok(())
    }
}

/// Key and kind of an entry's name; none of hidden files and of those without extension.
fn parts(name: &str) -> Option<(&str, String)> {
    let base = name.rfind('/').map_or(0, |at| at + 1);
    let dot = base + name[base..].find('.')?;
    let kind = name[dot + 1..].rsplit('.').next()?.to_lowercase();
    (dot > base).then(|| (&name[..dot], kind))
}

fn place_of(json: &Value) -> Result<Option<(String, i32, i32)>, String> {
    let [slide, x, y] = ["slide", "x", "y"].map(|name| &json[name]);
    if [slide, x, y].iter().any(|part| part.is_null()) {
        return Ok(None);
    }
    let number = |value: &Value| value.as_i64().and_then(|number| i32::try_from(number).ok());
    match (slide.as_str(), number(x), number(y)) {
        (Some(slide), Some(x), Some(y)) => Ok(Some((called(slide)?, x, y))),
        _ => Err(format!("slide {slide} at x {x}, y {y} is no place; a name and two whole numbers are wanted")),
    }
}

/// A name goes before a number, the file of its own before `label`.
fn class_of(json: &Value, own: Option<String>) -> Result<Option<String>, String> {
    let name = json["class"].as_str().or_else(|| json["label"].as_str());
    match (name, own, &json["label"], &json["class"]) {
        (Some(name), ..) => called(name).map(Some),
        (None, Some(own), ..) => Ok(Some(own)),
        (None, None, Value::Number(number), _) | (None, None, Value::Null, Value::Number(number))
            if number.is_u64() =>
        {
            Ok(Some(number.to_string()))
        }
        (None, None, Value::Null, Value::Null) => Ok(None),
        (None, None, label, class) => {
            Err(format!("label {label}, class {class} are no class; a name or a number from 0 is wanted"))
        }
    }
}

/// A name without blanks around it.
pub(super) fn called(text: &str) -> Result<String, String> {
    let name = text.trim();
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        return Err(format!("holds no name of 1 to {MAX_NAME} letters"));
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_ends_at_the_first_dot_of_the_name() {
        assert_eq!(parts("a/b.c/000.left.JPG"), Some(("a/b.c/000", "jpg".to_owned())));
        assert_eq!(parts("000.cls"), Some(("000", "cls".to_owned())));
        assert_eq!(parts("a/.hidden"), None);
        assert_eq!(parts("README"), None);
    }

    #[test]
    fn names_go_before_numbers() {
        let class = |json: Value, own: Option<&str>| class_of(&json, own.map(str::to_owned));
        use serde_json::json;
        assert_eq!(class(json!({"label": 3, "class": "TUM"}), None), Ok(Some("TUM".into())));
        assert_eq!(class(json!({"label": "TUM"}), Some("4")), Ok(Some("TUM".into())));
        assert_eq!(class(json!({"label": 3}), Some("4")), Ok(Some("4".into())));
        assert_eq!(class(json!({"label": 3}), None), Ok(Some("3".into())));
        assert_eq!(class(json!({"label": null, "class": null}), None), Ok(None));
        assert_eq!(class(json!({"caption": "a"}), None), Ok(None));
        assert!(class(json!({"label": -1}), None).is_err() && class(json!({"label": [1]}), None).is_err());
    }
}
