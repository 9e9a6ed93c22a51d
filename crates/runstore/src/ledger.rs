//! Which patches an epoch has used: a roaring bitmap of patch ids. At the end of an epoch it is full.
//!
//! Stored in roaring's portable format, which other languages read. Patch ids are part of it: they never change for a patch set.

use bytes::Bytes;
use roaring::RoaringBitmap;

use crate::RunStoreError;

/// Largest stored ledger: every id of 2³² used takes 512 MiB.
pub const MAX_LEDGER_BYTES: u64 = 600 << 20;

/// Used patches of one epoch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ledger {
    used: RoaringBitmap,
}

impl Ledger {
    /// Nothing used.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Marks patches used; returns how many were already.
    pub fn extend(&mut self, ids: impl IntoIterator<Item = u32>) -> u64 {
        ids.into_iter().map(|id| u64::from(!self.used.insert(id))).sum()
    }

    /// Adds what another ledger has used.
    pub fn union(&mut self, other: &Self) {
        self.used |= &other.used;
    }

    /// Whether a patch is used.
    #[must_use]
    pub fn contains(&self, id: u32) -> bool {
        self.used.contains(id)
    }

    /// Patches used.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.used.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.used.is_empty()
    }

    /// Whether all of `patches` (those trained on) are used, and no other.
    #[must_use]
    pub fn is_full(&self, patches: &RoaringBitmap) -> bool {
        self.used == *patches
    }

    /// The bitmap.
    #[must_use]
    pub fn bitmap(&self) -> &RoaringBitmap {
        &self.used
    }

    /// roaring's portable format.
    ///
    /// # Errors
    /// Larger than [`MAX_LEDGER_BYTES`].
    pub fn to_bytes(&self) -> Result<Bytes, RunStoreError> {
        let size = self.used.serialized_size();
        limit("ledger", size as u64)?;
        let mut out = Vec::with_capacity(size);
        self.used.serialize_into(&mut out).map_err(|e| RunStoreError::damaged("ledger", e))?;
        Ok(out.into())
    }

    /// Reads the portable format; `object` is what errors call it.
    ///
    /// # Errors
    /// Not a bitmap, or too large.
    pub fn from_bytes(bytes: &[u8], object: &str) -> Result<Self, RunStoreError> {
        limit(object, bytes.len() as u64)?;
        let mut rest = bytes;
        let used = RoaringBitmap::deserialize_from(&mut rest).map_err(|e| RunStoreError::damaged(object, e))?;
        if !rest.is_empty() {
            return Err(RunStoreError::damaged(object, format!("{} bytes behind the bitmap", rest.len())));
        }
        Ok(Self { used })
    }
}

impl From<RoaringBitmap> for Ledger {
    fn from(used: RoaringBitmap) -> Self {
        Self { used }
    }
}

fn limit(object: &str, bytes: u64) -> Result<(), RunStoreError> {
    if bytes > MAX_LEDGER_BYTES {
        return Err(RunStoreError::Limit { what: format!("{object} in bytes"), found: bytes, limit: MAX_LEDGER_BYTES });
    }
    Ok(())
}
