//! Features that were computed before: one safetensors file for each (encoder, patch set, side, preprocessing), named by their hash.
//!
//! Losing the folder costs time alone. A file that is damaged, of another key or of the wrong size is computed again.

use std::collections::HashMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tch::{Kind, Tensor};

use crate::encoder::bytes;

/// Rises whenever features of the same patches and weights would come out otherwise.
const PREPROCESSING: u32 = 1;
/// What a file may hold beside its values.
const HEADER_LIMIT: u64 = 64 << 10;
/// Entry of a file's header that says what it holds.
const SAID: &str = "features";

/// A folder of features.
pub(super) struct Cache {
    folder: PathBuf,
}

/// What features belong to, and their shape.
pub(super) struct Key {
    text: String,
    /// Hash of the text: the file's name.
    pub(super) id: String,
    rows: usize,
    width: usize,
}

impl Key {
    /// `weights` and `data` are content hashes.
    pub(super) fn new(weights: &str, data: &str, px: u32, device: &str, rows: usize, width: i64) -> Self {
        let text = format!(
            "preprocessing {PREPROCESSING}\nweights {weights}\ndata {data}\npx {px}\ndevice {device}\nshape {rows} {width}"
        );
        let id = blake3::hash(text.as_bytes()).to_hex()[..32].to_owned();
        Self { text, id, rows, width: usize::try_from(width).unwrap_or(0) }
    }

    /// What a file of these values says of itself.
    fn said(&self, values: &[u8]) -> String {
        format!("{}\nblake3 {}", self.text, blake3::hash(values).to_hex())
    }
}

impl Cache {
    /// `folder`, else `features` in sgcl's cache folder ($SGCL_CACHE, $XDG_CACHE_HOME/sgcl or ~/.cache/sgcl); `None` without a home.
    pub(super) fn new(folder: Option<&Path>) -> Option<Self> {
        let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder = folder.map(Path::to_path_buf).or_else(|| {
            let own = var("SGCL_CACHE")
                .or_else(|| var("XDG_CACHE_HOME").map(|folder| folder.join("sgcl")))
                .or_else(|| var("HOME").map(|folder| folder.join(".cache/sgcl")))?;
            Some(own.join("features"))
        })?;
        Some(Self { folder })
    }

    /// Features (rows, width) of an earlier call; `None` where there are none or they cannot be used, which a warning then says.
    pub(super) fn read(&self, key: &Key) -> Option<Tensor> {
        let path = self.path(key);
        match self.take(key, &path) {
            Ok(features) => features,
            Err(error) => {
                tracing::warn!("cached features {} cannot be used ({error:#}): computing them again", path.display());
                None
            }
        }
    }

    fn take(&self, key: &Key, path: &Path) -> Result<Option<Tensor>> {
        let file = match fs::File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let values = 4 * key.rows as u64 * key.width as u64;
        let length = file.metadata()?.len();
        ensure!((values..=values + HEADER_LIMIT).contains(&length), "{length} bytes for {values} bytes of features");
        let mut content = Vec::new();
        file.take(length).read_to_end(&mut content)?;
        let (_, header) = SafeTensors::read_metadata(&content)?;
        let said = header.metadata().as_ref().and_then(|said| said.get(SAID).cloned());
        let tensors = SafeTensors::deserialize(&content)?;
        let view = tensors.tensor("features")?;
        ensure!(view.dtype() == Dtype::F32 && view.shape() == [key.rows, key.width], "shape {:?}", view.shape());
        ensure!(said == Some(key.said(view.data())), "its checksum is wrong, or it is of other features");
        let shape = [key.rows as i64, key.width as i64];
        Ok(Some(Tensor::f_from_data_size(view.data(), &shape, Kind::Float)?))
    }

    /// Keeps features; a folder that cannot be written is a warning.
    pub(super) fn write(&self, key: &Key, features: &Tensor) {
        if let Err(error) = self.put(key, features) {
            tracing::warn!("features are not kept in {}: {error:#}", self.folder.display());
        }
    }

    fn put(&self, key: &Key, features: &Tensor) -> Result<()> {
        fs::create_dir_all(&self.folder)?;
        let data = bytes(features)?;
        // One entry: of several, a map would write another order each time.
        let said = HashMap::from([(SAID.to_owned(), key.said(&data))]);
        let view = TensorView::new(Dtype::F32, vec![key.rows, key.width], &data)?;
        let content = safetensors::serialize([("features", view)], Some(said))?;
        // Beside the target, then renamed: another process reads all of it or nothing.
        let mut draft = tempfile::NamedTempFile::new_in(&self.folder)?;
        draft.write_all(&content)?;
        draft.persist(self.path(key)).context("cannot rename the draft")?;
        Ok(())
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.folder.join(format!("{}.safetensors", key.id))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn features() -> Tensor {
        Tensor::arange(12, (Kind::Float, tch::Device::Cpu)).view([4, 3])
    }

    #[test]
    fn features_come_back_for_their_own_key_alone() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(folder.path())).unwrap();
        let key = Key::new("w", "d", 224, "cpu", 4, 3);
        assert!(cache.read(&key).is_none());
        cache.write(&key, &features());
        assert_eq!(cache.read(&key).unwrap(), features());
        for other in [
            Key::new("v", "d", 224, "cpu", 4, 3),
            Key::new("w", "e", 224, "cpu", 4, 3),
            Key::new("w", "d", 96, "cpu", 4, 3),
        ] {
            assert_ne!(other.id, key.id);
            fs::copy(cache.path(&key), cache.path(&other)).unwrap();
            assert!(cache.read(&other).is_none(), "a file under another name is believed");
        }
    }

    #[test]
    fn a_damaged_file_is_not_used_wherever_it_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(folder.path())).unwrap();
        let key = Key::new("w", "d", 224, "cpu", 4, 3);
        cache.write(&key, &features());
        let whole = fs::read(cache.path(&key)).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 4;
            fs::write(cache.path(&key), &damaged).unwrap();
            // Padding of the header and keys that are not read may differ; the features may not.
            assert!(cache.read(&key).is_none_or(|read| read == features()), "byte {at}");
        }
        for length in [0, 7, 60, whole.len() - 1] {
            fs::write(cache.path(&key), &whole[..length]).unwrap();
            assert!(cache.read(&key).is_none(), "{length} bytes");
        }
        let long = [whole.as_slice(), &vec![0; (HEADER_LIMIT + 1) as usize]].concat();
        fs::write(cache.path(&key), long).unwrap();
        assert!(cache.read(&key).is_none());
    }
}
