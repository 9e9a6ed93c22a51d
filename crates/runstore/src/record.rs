//! What the JSON records of a run share: a version in front, a random write id, a limit on size.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sgcl_patchset::{Created, Store};

use crate::RunStoreError;

/// Version of the JSON formats written here. Readers refuse newer ones by name. Since 2 an epoch is read in steps of equal size: what is in
/// the bucket of an older run can be read, but it is not gone on with.
pub const FORMAT_VERSION: u32 = 2;

/// Longest JSON record read.
pub(crate) const MAX_RECORD_BYTES: u64 = 16 << 20;

/// 128 random bits as hex: tells our write from a rival's.
#[must_use]
pub fn new_write_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

pub(crate) fn to_json<T: Serialize>(value: &T, object: &str) -> Result<Vec<u8>, RunStoreError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| RunStoreError::damaged(object, e))?;
    text.push(b'\n');
    Ok(text)
}

pub(crate) fn from_json<T: DeserializeOwned>(bytes: &[u8], object: &str) -> Result<T, RunStoreError> {
    let head: Versioned = serde_json::from_slice(bytes).map_err(|e| RunStoreError::damaged(object, e))?;
    if head.version > FORMAT_VERSION {
        return Err(RunStoreError::FutureVersion {
            object: object.to_owned(),
            version: head.version,
            ours: FORMAT_VERSION,
        });
    }
    serde_json::from_slice(bytes).map_err(|e| RunStoreError::damaged(object, e))
}

pub(crate) async fn read<T: DeserializeOwned>(store: &Store, rel: &str) -> Result<T, RunStoreError> {
    let bytes = store.get(rel, MAX_RECORD_BYTES).await?;
    from_json(&bytes, &store.object(rel))
}

/// Creates a record; `Some` with the rival's bytes where one was there first.
pub(crate) async fn create<T: Serialize>(
    store: &Store,
    rel: &str,
    value: &T,
    write_id: &str,
) -> Result<Option<bytes::Bytes>, RunStoreError> {
    let bytes = to_json(value, &store.object(rel))?;
    Ok(match store.create(rel, bytes, write_id).await? {
        Created::Created => None,
        Created::Exists(theirs) => Some(theirs),
    })
}
