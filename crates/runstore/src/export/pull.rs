//! Fetching an export: into a folder beside the target, verified, then renamed. The target is whole or absent.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use sgcl_patchset::Store;
use sha2::{Digest, Sha256};

use super::{ExportError, MANIFEST, MAX_FILE_BYTES, Manifest, folder, list_exports, read_manifest, torch::hex};
use crate::record;

/// What was fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// Where it lies.
    pub dir: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
}

/// Fetches the export of `commit` (the newest when none) into `dir`, which must not exist or be empty. `progress` hears
/// (bytes done, bytes in all).
///
/// # Errors
/// No export, a file that is not what the manifest says, no place to write, or the storage. Nothing is left at `dir` then.
pub async fn pull(
    run_store: &Store,
    commit: Option<u64>,
    dir: &Path,
    mut progress: impl FnMut(u64, u64),
) -> Result<Pulled, ExportError> {
    let seq = match commit {
        Some(seq) => seq,
        None => match list_exports(run_store).await?.last() {
            Some(&seq) => seq,
            None => return Err(ExportError::None { run: run_store.url().to_owned() }),
        },
    };
    let manifest = read_manifest(run_store, seq).await?;
    check_names(&manifest)?;
    let dir = std::path::absolute(dir).map_err(|e| io(dir, e))?;
    let parent = dir.parent().unwrap_or(Path::new("/")).to_owned();
    if dir.exists() {
        let empty = dir.is_dir() && fs::read_dir(&dir).map_err(|e| io(&dir, e))?.next().is_none();
        if !empty {
            return Err(ExportError::Occupied { dir: dir.display().to_string() });
        }
    }
    fs::create_dir_all(&parent).map_err(|e| io(&parent, e))?;
    let temp = parent.join(format!(".sgcl-pull-{}", record::new_write_id()));
    fs::create_dir(&temp).map_err(|e| io(&temp, e))?;
    let fetched = fetch(run_store, seq, &manifest, &temp, &mut progress).await;
    let moved = fetched.and_then(|()| fs::rename(&temp, &dir).map_err(|e| io(&dir, e)));
    if let Err(e) = moved {
        // The first error is the one to report.
        let _ = fs::remove_dir_all(&temp);
        return Err(e);
    }
    Ok(Pulled { dir, manifest })
}

async fn fetch(
    run_store: &Store,
    seq: u64,
    manifest: &Manifest,
    temp: &Path,
    progress: &mut impl FnMut(u64, u64),
) -> Result<(), ExportError> {
    let total = manifest.files.iter().map(|f| f.bytes).sum();
    let mut done = 0;
    for file in &manifest.files {
        let path = temp.join(&file.name);
        let mut out = fs::File::create(&path).map_err(|e| io(&path, e))?;
        run_store
            .get_streamed(&format!("{}/{}", folder(seq), file.name), |chunk| {
                done += chunk.len() as u64;
                progress(done, total);
                out.write_all(&chunk).map_err(|e| io(&path, e))
            })
            .await?;
        out.sync_all().map_err(|e| io(&path, e))?;
    }
    let path = temp.join(MANIFEST);
    fs::write(&path, record::to_json(manifest, MANIFEST)?).map_err(|e| io(&path, e))?;
    verify_export(temp)?;
    Ok(())
}

/// Compares a folder with its `export.json`.
///
/// # Errors
/// A file that is missing, of another length or checksum, or no manifest.
pub fn verify_export(dir: &Path) -> Result<Manifest, ExportError> {
    let path = dir.join(MANIFEST);
    let mut text = Vec::new();
    let manifest = fs::File::open(&path).map_err(|e| io(&path, e))?;
    manifest.take(record::MAX_RECORD_BYTES).read_to_end(&mut text).map_err(|e| io(&path, e))?;
    let manifest: Manifest = record::from_json(&text, &path.display().to_string())?;
    check_names(&manifest)?;
    for file in &manifest.files {
        let path = dir.join(&file.name);
        let mismatch = |reason| ExportError::Mismatch { file: path.display().to_string(), reason };
        let mut reader = fs::File::open(&path).map_err(|e| io(&path, e))?;
        let bytes = reader.metadata().map_err(|e| io(&path, e))?.len();
        if bytes != file.bytes {
            return Err(mismatch(format!("{bytes} bytes, export.json says {}", file.bytes)));
        }
        let mut hash = Sha256::new();
        std::io::copy(&mut reader, &mut hash).map_err(|e| io(&path, e))?;
        let found = hex(&hash.finalize());
        if found != file.sha256 {
            return Err(mismatch(format!("sha256 {found}, export.json says {}", file.sha256)));
        }
    }
    Ok(manifest)
}

/// The manifest comes from outside: its names must stay in the folder.
fn check_names(manifest: &Manifest) -> Result<(), ExportError> {
    for file in &manifest.files {
        let plain = !file.name.is_empty() && !file.name.starts_with('.') && !file.name.contains(['/', '\\', '\0']);
        if !plain || file.bytes > MAX_FILE_BYTES {
            let reason = "export.json names a file that no export has".to_owned();
            return Err(ExportError::Mismatch { file: format!("{:?}", file.name), reason });
        }
    }
    Ok(())
}

fn io(file: &Path, source: std::io::Error) -> ExportError {
    ExportError::Io { file: file.display().to_string(), source }
}
