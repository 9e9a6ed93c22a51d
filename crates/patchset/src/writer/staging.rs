//! The staging area of an ingest under way.
//!
//! ```text
//! staging/ingest.json     the settings it was begun with
//! staging/<slide>.bin     a finished slide: JPEGs end to end, then 24 bytes a patch, row-major
//! staging/<slide>.json    its head, written after the .bin: it says that the slide is finished
//! ```

use std::collections::{BTreeMap, HashMap};

use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{SlideInfo, WriteError, WriterOptions};
use crate::manifest::Manifest;
use crate::store::{Store, StoreError};

/// Folder of the staging area in the set.
pub(super) const FOLDER: &str = "staging";
const SETTINGS: &str = "staging/ingest.json";
const MAX_SETTINGS_BYTES: u64 = 16 << 20;
const MAX_HEAD_BYTES: u64 = 64 << 20;
const REQUESTS: usize = 16;
const ROW_BYTES: usize = 24;
const NO_LABEL: u32 = u32::MAX;

/// A finished slide.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Head {
    pub(super) info: SlideInfo,
    pub(super) patches: u32,
    /// Where the rows start in the .bin.
    pub(super) jpeg_bytes: u64,
    pub(super) rows_crc32c: u32,
    /// Classes of this slide, in order of appearance; labels of its rows are indices into it.
    pub(super) classes: Vec<String>,
    pub(super) preview: Option<String>,
    #[serde(default)]
    pub(super) downsample: Option<f64>,
}

/// One patch in a .bin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StagedPatch {
    pub(super) x: i32,
    pub(super) y: i32,
    pub(super) label: Option<u16>,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Head {
    pub(super) fn data(&self) -> String {
        format!("{FOLDER}/{}.bin", file_name(&self.info.name))
    }

    fn path(&self) -> String {
        format!("{FOLDER}/{}.json", file_name(&self.info.name))
    }

    /// Length of the .bin.
    pub(super) fn data_bytes(&self) -> u64 {
        self.jpeg_bytes + u64::from(self.patches) * ROW_BYTES as u64
    }
}

/// A name safe in any storage, different for different slides: escaped names carry a hash of the original.
pub(super) fn file_name(slide: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !slide.is_empty()
        && slide.len() <= 120
        && slide.chars().all(safe)
        && !slide.starts_with('.')
        && slide != "ingest"
    {
        return slide.to_owned();
    }
    let escaped: String = slide.chars().take(80).map(|c| if safe(c) { c } else { '_' }).collect();
    format!("{}-{}", escaped.trim_start_matches('.'), &blake3::hash(slide.as_bytes()).to_hex()[..16])
}

/// The settings that an ingest must keep, by name.
fn identity(options: &WriterOptions) -> BTreeMap<String, Value> {
    let mut identity = options.settings.clone();
    identity.insert("patch_px".to_owned(), options.patch_px.into());
    identity.insert("jpeg_quality".to_owned(), options.jpeg_quality.into());
    identity.insert("seed".to_owned(), options.seed.into());
    identity
}

/// The same of a finished set.
pub(super) fn identity_of(manifest: &Manifest) -> BTreeMap<String, Value> {
    let mut options = WriterOptions::new(manifest.patch_px, manifest.jpeg_quality, manifest.seed);
    options.settings.clone_from(&manifest.settings);
    identity(&options)
}

/// Refuses other settings than those `there`, naming each. `what` is what to delete below the URL to begin anew.
pub(super) fn same_settings(
    store: &Store,
    there: &BTreeMap<String, Value>,
    options: &WriterOptions,
    what: &'static str,
) -> Result<(), WriteError> {
    let now = identity(options);
    let shown = |value: Option<&Value>| value.map_or_else(|| "unset".to_owned(), Value::to_string);
    let names: std::collections::BTreeSet<_> = there.keys().chain(now.keys()).collect();
    let differences: Vec<_> = names
        .into_iter()
        .filter(|name| there.get(*name) != now.get(*name))
        .map(|name| format!("{name}: {} there, {} now", shown(there.get(name)), shown(now.get(name))))
        .collect();
    if differences.is_empty() {
        return Ok(());
    }
    let differences = differences.join("; ");
    Err(WriteError::Settings { url: store.url().trim_end_matches('/').to_owned(), differences, what })
}

/// Notes the settings, or compares them with those noted, and reads the heads of the slides finished so far.
pub(super) async fn begin(store: &Store, options: &WriterOptions) -> Result<HashMap<String, Head>, WriteError> {
    let staged = store.list(FOLDER).await?;
    let heads: Vec<_> =
        staged.into_iter().map(|found| found.rel).filter(|rel| rel.ends_with(".json") && rel != SETTINGS).collect();
    let noted = match store.get(SETTINGS, MAX_SETTINGS_BYTES).await {
        Ok(bytes) => Some(parse::<BTreeMap<String, Value>>(store, SETTINGS, &bytes)?),
        Err(StoreError::NotFound { .. }) => None,
        Err(e) => return Err(e.into()),
    };
    match noted {
        // Settings that no finished slide depends on are no reason to refuse new ones.
        Some(noted) if !heads.is_empty() => same_settings(store, &noted, options, FOLDER)?,
        _ => store.put(SETTINGS, encode_json(store, SETTINGS, &identity(options))?).await?,
    }
    let read = |rel: String| async move {
        let bytes = store.get(&rel, MAX_HEAD_BYTES).await?;
        let head: Head = parse(store, &rel, &bytes)?;
        if head.path() != rel {
            let reason = format!("it is about slide {:?}, which belongs elsewhere", head.info.name);
            return Err(WriteError::Staged { object: store.object(&rel), reason });
        }
        Ok((head.info.name.clone(), head))
    };
    futures::stream::iter(heads).map(read).buffer_unordered(REQUESTS).try_collect().await
}

/// Stages a slide: `spool` holds what its .bin is to hold. The head last, since it says that the rest is there.
pub(super) async fn put(store: &Store, head: &Head, spool: std::fs::File) -> Result<(), WriteError> {
    // A slide that changed may have a head already: it must not vouch for the data that replaces its own.
    store.delete(&head.path()).await?;
    store.put_open_file(&head.data(), spool).await?;
    store.put(&head.path(), encode_json(store, &head.path(), head)?).await?;
    Ok(())
}

/// Empties the staging area. The heads go first, so that what is left cannot look finished.
pub(super) async fn clear(store: &Store) -> Result<(), WriteError> {
    let mut staged: Vec<_> = store.list(FOLDER).await?.into_iter().map(|found| found.rel).collect();
    staged.sort_by_key(|rel| (!rel.ends_with(".json"), rel == SETTINGS));
    for rel in staged {
        store.delete(&rel).await?;
    }
    if let Some(folder) = store.local_path(FOLDER) {
        // An empty folder is untidy, no more.
        let _ = std::fs::remove_dir(folder);
    }
    Ok(())
}

/// The rows of a .bin.
pub(super) fn encode(patches: &[StagedPatch]) -> Vec<u8> {
    let mut out = Vec::with_capacity(patches.len() * ROW_BYTES);
    for patch in patches {
        out.extend_from_slice(&patch.x.to_le_bytes());
        out.extend_from_slice(&patch.y.to_le_bytes());
        out.extend_from_slice(&patch.label.map_or(NO_LABEL, u32::from).to_le_bytes());
        out.extend_from_slice(&patch.offset.to_le_bytes());
        out.extend_from_slice(&patch.length.to_le_bytes());
    }
    out
}

/// Reads the rows of a staged slide.
pub(super) async fn rows(store: &Store, head: &Head) -> Result<Vec<StagedPatch>, WriteError> {
    let rel = head.data();
    let damaged = |reason: &str| WriteError::Staged { object: store.object(&rel), reason: reason.to_owned() };
    let bytes = store.get_range(&rel, head.jpeg_bytes..head.data_bytes()).await?;
    if crc32c::crc32c(&bytes) != head.rows_crc32c {
        return Err(damaged("its checksum is wrong"));
    }
    let rows: Vec<_> = bytes.chunks_exact(ROW_BYTES).map(decode).collect();
    let inside =
        |row: &StagedPatch| row.offset.checked_add(row.length.into()).is_some_and(|end| end <= head.jpeg_bytes);
    let known = |row: &StagedPatch| row.label.is_none_or(|label| usize::from(label) < head.classes.len());
    if rows.iter().all(|row| inside(row) && known(row)) { Ok(rows) } else { Err(damaged("a row points outside")) }
}

fn decode(row: &[u8]) -> StagedPatch {
    fn field<const N: usize>(row: &[u8], at: usize) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&row[at..at + N]);
        out
    }
    StagedPatch {
        x: i32::from_le_bytes(field(row, 0)),
        y: i32::from_le_bytes(field(row, 4)),
        label: u16::try_from(u32::from_le_bytes(field(row, 8))).ok(),
        offset: u64::from_le_bytes(field(row, 12)),
        length: u32::from_le_bytes(field(row, 20)),
    }
}

fn parse<T: serde::de::DeserializeOwned>(store: &Store, rel: &str, bytes: &[u8]) -> Result<T, WriteError> {
    serde_json::from_slice(bytes)
        .map_err(|e| WriteError::Staged { object: store.object(rel), reason: format!("not a staging file: {e}") })
}

fn encode_json<T: Serialize>(store: &Store, rel: &str, value: &T) -> Result<Vec<u8>, WriteError> {
    serde_json::to_vec_pretty(value)
        .map_err(|e| WriteError::Encode { object: store.object(rel), reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_survive_being_staged() {
        let rows = [
            StagedPatch { x: -3, y: i32::MAX, label: None, offset: 1 << 40, length: 7 },
            StagedPatch { x: 5, y: 0, label: Some(u16::MAX), offset: 0, length: u32::MAX },
        ];
        let decoded: Vec<_> = encode(&rows).chunks_exact(ROW_BYTES).map(decode).collect();
        assert_eq!(decoded, rows);
    }

    #[test]
    fn names_are_safe_and_stay_apart() {
        assert_eq!(file_name("TCGA-02_0001.svs"), "TCGA-02_0001.svs");
        let odd = ["a/b", "a b", "a_b", "../a", ".a", "", "ingest", "é"];
        let names: std::collections::HashSet<_> = odd.iter().map(|name| file_name(name)).collect();
        assert_eq!(names.len(), odd.len());
        assert!(
            names.iter().all(|name| !name.contains('/') && !name.starts_with('.') && name != "ingest"),
            "{names:?}"
        );
    }
}
