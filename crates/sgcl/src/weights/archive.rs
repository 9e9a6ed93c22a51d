//! The two containers of `torch.save`: a zip (since 1.6) and a chain of pickles with raw storages behind (before).

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::Path;

use tch::{Kind, Tensor};

use super::WeightsError;
use super::pickle::{Id, Pickle, TensorRef, Value};

/// First bytes of a legacy file: protocol 2, then the long 0x1950a86a20f9469cfc6c.
pub(super) const LEGACY_MAGIC: [u8; 15] =
    [0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.'];

/// A pickle without storages is small: names and shapes.
const MAX_PICKLE: u64 = 256 << 20;
const MAX_NESTING: usize = 6;
const MAX_VISITS: usize = 1 << 20;
const MAX_NAME: usize = 512;

/// A [`WeightsError`] that does not know its file yet.
pub(super) enum Fault {
    Io(std::io::Error),
    Format(String),
    Unsafe(String),
    Damaged(String),
}

impl Fault {
    pub(super) fn at(self, path: &Path) -> WeightsError {
        let path = path.to_owned();
        match self {
            Fault::Io(source) => WeightsError::Io { path, source },
            Fault::Format(reason) => WeightsError::Format { path, reason },
            Fault::Unsafe(global) => WeightsError::Unsafe { path, global },
            Fault::Damaged(reason) => WeightsError::Damaged { path, reason },
        }
    }
}

fn damaged(what: &str, error: impl std::fmt::Display) -> Fault {
    Fault::Damaged(format!("{what}: {error}"))
}

pub(super) fn read_zip(path: &Path) -> Result<BTreeMap<String, Tensor>, Fault> {
    let file = std::fs::File::open(path).map_err(Fault::Io)?;
    let mut zip = zip::ZipArchive::new(std::io::BufReader::new(file)).map_err(|error| damaged("zip", error))?;
    let root = zip
        .file_names()
        .find_map(|name| name.strip_suffix("data.pkl"))
        .ok_or_else(|| Fault::Format("a zip without data.pkl".to_owned()))?
        .to_owned();
    if let Ok(order) = read_entry(&mut zip, &format!("{root}byteorder"), 16)
        && order != b"little"
    {
        return Err(Fault::Format("big-endian storages".to_owned()));
    }
    let pickle = Pickle::read(&read_entry(&mut zip, &format!("{root}data.pkl"), MAX_PICKLE)?)?;
    let mut storages = HashMap::new();
    collect(&pickle, |tensor| {
        let storage = match storages.get(&tensor.storage) {
            Some(storage) => storage,
            None => {
                let kind = tensor.kind;
                let limit = tensor.numel.saturating_mul(kind.elt_size_in_bytes() as u64);
                let bytes = read_entry(&mut zip, &format!("{root}data/{}", tensor.storage), limit)?;
                storages.entry(tensor.storage.clone()).or_insert(to_storage(&bytes, kind)?)
            }
        };
        view(storage, tensor)
    })
}

fn read_entry<R: Read + std::io::Seek>(zip: &mut zip::ZipArchive<R>, name: &str, limit: u64) -> Result<Vec<u8>, Fault> {
    let entry = zip.by_name(name).map_err(|error| damaged(name, error))?;
    // torch.save never compresses; a stored entry cannot be larger than its file.
    if entry.compression() != zip::CompressionMethod::Stored {
        return Err(Fault::Format(format!("{name} is compressed")));
    }
    if entry.size() > limit {
        return Err(Fault::Damaged(format!("{name} has {} bytes, at most {limit} expected", entry.size())));
    }
    let mut bytes = Vec::new();
    entry.take(limit).read_to_end(&mut bytes).map_err(|error| damaged(name, error))?;
    Ok(bytes)
}

pub(super) fn read_legacy(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, Fault> {
    let mut rest = bytes;
    let mut next = || -> Result<Pickle, Fault> {
        let pickle = Pickle::read(rest)?;
        rest = &rest[pickle.length..];
        Ok(pickle)
    };
    let (_magic, _protocol, _system, object, keys) = (next()?, next()?, next()?, next()?, next()?);
    // Storages follow in the order of the key list, each with its element count in front.
    let mut kinds = HashMap::new();
    for value in &object.values {
        if let Value::Storage { key, kind, .. } = value {
            kinds.insert(key.as_str(), *kind);
        }
    }
    let Value::List(order) = keys.get(keys.root) else {
        return Err(Fault::Damaged("no list of storages".to_owned()));
    };
    let mut storages = HashMap::new();
    for &id in order {
        let Value::Text(key) = keys.get(id) else { return Err(Fault::Damaged("a storage key is no text".to_owned())) };
        let kind = *kinds.get(key.as_str()).ok_or_else(|| Fault::Damaged(format!("storage {key} has no type")))?;
        let short = || Fault::Damaged(format!("the file ends inside storage {key}"));
        let (count, tail) = rest.split_first_chunk::<8>().ok_or_else(short)?;
        let length = usize::try_from(u64::from_le_bytes(*count))
            .ok()
            .and_then(|count| count.checked_mul(kind.elt_size_in_bytes()))
            .ok_or_else(short)?;
        let data = tail.get(..length).ok_or_else(short)?;
        rest = &tail[length..];
        storages.insert(key.clone(), to_storage(data, kind)?);
    }
    collect(&object, |tensor| {
        let storage = storages.get(&tensor.storage);
        view(storage.ok_or_else(|| Fault::Damaged(format!("storage {} is missing", tensor.storage)))?, tensor)
    })
}

fn to_storage(bytes: &[u8], kind: Kind) -> Result<Tensor, Fault> {
    let count = bytes.len() / kind.elt_size_in_bytes();
    Tensor::f_from_data_size(bytes, &[count as i64], kind).map_err(|error| damaged("storage", error))
}

/// A tensor as a view of its storage; never reaches outside it.
fn view(storage: &Tensor, tensor: &TensorRef) -> Result<Tensor, Fault> {
    let mut last = Some(tensor.offset);
    let mut count = Some(1_i64);
    for (&size, &stride) in tensor.size.iter().zip(&tensor.stride) {
        if size < 0 || stride < 0 {
            return Err(Fault::Damaged("a tensor has a negative size or stride".to_owned()));
        }
        last = last.and_then(|last| last.checked_add((size - 1).max(0).checked_mul(stride)?));
        count = count.and_then(|count| count.checked_mul(size));
    }
    let held = storage.numel() as i64;
    let inside = tensor.offset >= 0
        && tensor.size.len() == tensor.stride.len()
        && count.is_some_and(|count| count == 0 || (count <= held && last.is_some_and(|last| last < held)));
    if !inside {
        return Err(Fault::Damaged(format!("a tensor of shape {:?} reaches past its storage of {held}", tensor.size)));
    }
    storage.f_as_strided(&tensor.size, &tensor.stride, tensor.offset).map_err(|error| damaged("tensor", error))
}

/// Walks nested dictionaries for tensors; keys that are no text (an optimiser's) are passed over.
fn collect(
    pickle: &Pickle,
    mut load: impl FnMut(&TensorRef) -> Result<Tensor, Fault>,
) -> Result<BTreeMap<String, Tensor>, Fault> {
    let mut tensors = BTreeMap::new();
    let mut visits = 0;
    let mut open: Vec<(String, Id, usize)> = vec![(String::new(), pickle.root, 0)];
    while let Some((path, id, depth)) = open.pop() {
        match pickle.get(id) {
            Value::Dict(entries) if depth < MAX_NESTING => {
                visits += entries.len();
                if visits > MAX_VISITS {
                    return Err(Fault::Damaged(format!("more than {MAX_VISITS} entries")));
                }
                for &(key, value) in entries {
                    if let Value::Text(key) = pickle.get(key)
                        && key.len() <= MAX_NAME
                    {
                        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                        open.push((path, value, depth + 1));
                    }
                }
            }
            Value::Tensor(tensor) => drop(tensors.insert(path, load(tensor)?)),
            _ => {}
        }
    }
    Ok(tensors)
}
