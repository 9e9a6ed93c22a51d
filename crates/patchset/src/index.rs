//! `index.parquet`: where every patch lies, on its slide and in its shard. The row number is the patch id.
//!
//! | column | type | meaning |
//! |---|---|---|
//! | `slide` | u32 | number of the slide in the manifest |
//! | `x`, `y` | i32 | position in tiles |
//! | `label` | i32, nullable | index into the manifest's classes |
//! | `shard` | u32 | number of the shard in the manifest |
//! | `offset` | u64 | where the JPEG starts in the shard, in bytes |
//! | `length` | u32 | length of the JPEG in bytes |

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, Int32Array, PrimitiveArray, RecordBatch, UInt32Array, UInt64Array};
use arrow::datatypes::{ArrowPrimitiveType, DataType, Field, Int32Type, Schema, UInt32Type, UInt64Type};
use bytes::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;

use crate::manifest::Manifest;
use crate::store::{Store, StoreError};

/// Name of the index in a patch set.
pub const INDEX: &str = "index.parquet";

const MAX_INDEX_BYTES: u64 = 16 << 30;
const BATCH_ROWS: usize = 1 << 16;
const NO_LABEL: i32 = -1;

/// The index in memory, a column a vector: 32 bytes a patch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    slide: Vec<u32>,
    x: Vec<i32>,
    y: Vec<i32>,
    label: Vec<i32>,
    shard: Vec<u32>,
    offset: Vec<u64>,
    length: Vec<u32>,
}

/// One row of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Number of the slide.
    pub slide: u32,
    /// Column in tiles.
    pub x: i32,
    /// Row in tiles.
    pub y: i32,
    /// Index of the class.
    pub label: Option<u16>,
    /// Number of the shard.
    pub shard: u32,
    /// Where the JPEG starts in the shard, bytes.
    pub offset: u64,
    /// Length of the JPEG, bytes.
    pub length: u32,
}

/// An index that cannot be read or contradicts its manifest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// Not what the manifest says it is.
    #[error(
        "{object}: expected {expected_bytes} bytes with crc32c {expected_crc32c:08x}, found {bytes} with {crc32c:08x}; the file is damaged, ingest again"
    )]
    Damaged {
        /// Full name of the file.
        object: String,
        /// Length by the manifest.
        expected_bytes: u64,
        /// Checksum by the manifest.
        expected_crc32c: u32,
        /// Length found.
        bytes: u64,
        /// Checksum found.
        crc32c: u32,
    },
    /// Not a table of this form.
    #[error("{object}: {reason}")]
    Malformed {
        /// Full name of the file.
        object: String,
        /// What is wrong.
        reason: String,
    },
    /// A row contradicts the manifest or another row.
    #[error("{object}: patch {id}: {reason}")]
    Row {
        /// Full name of the file.
        object: String,
        /// Patch id.
        id: u64,
        /// What is wrong.
        reason: String,
    },
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Index {
    /// An index with room for `patches` rows.
    #[must_use]
    pub fn with_capacity(patches: usize) -> Self {
        Self {
            slide: Vec::with_capacity(patches),
            x: Vec::with_capacity(patches),
            y: Vec::with_capacity(patches),
            label: Vec::with_capacity(patches),
            shard: Vec::with_capacity(patches),
            offset: Vec::with_capacity(patches),
            length: Vec::with_capacity(patches),
        }
    }

    /// Appends the row of the next patch id.
    pub fn push(&mut self, row: Row) {
        self.slide.push(row.slide);
        self.x.push(row.x);
        self.y.push(row.y);
        self.label.push(row.label.map_or(NO_LABEL, i32::from));
        self.shard.push(row.shard);
        self.offset.push(row.offset);
        self.length.push(row.length);
    }

    /// Says where in the shards patch `id` lies.
    pub(crate) fn place(&mut self, id: u32, shard: u32, offset: u64) {
        self.shard[id as usize] = shard;
        self.offset[id as usize] = offset;
    }

    /// Patches.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slide.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slide.is_empty()
    }

    /// The row of patch `id`, `None` past the end.
    #[must_use]
    pub fn row(&self, id: u32) -> Option<Row> {
        let at = id as usize;
        Some(Row {
            slide: *self.slide.get(at)?,
            x: self.x[at],
            y: self.y[at],
            label: self.label(id),
            shard: self.shard[at],
            offset: self.offset[at],
            length: self.length[at],
        })
    }

    /// Class of patch `id`; `None` where it has none or there is no such patch.
    #[must_use]
    pub fn label(&self, id: u32) -> Option<u16> {
        self.label.get(id as usize).and_then(|&label| u16::try_from(label).ok())
    }

    /// Slide numbers by patch id.
    #[must_use]
    pub fn slides(&self) -> &[u32] {
        &self.slide
    }

    /// Columns, in tiles, by patch id.
    #[must_use]
    pub fn xs(&self) -> &[i32] {
        &self.x
    }

    /// Rows, in tiles, by patch id.
    #[must_use]
    pub fn ys(&self) -> &[i32] {
        &self.y
    }

    /// Shard numbers by patch id.
    #[must_use]
    pub fn shards(&self) -> &[u32] {
        &self.shard
    }

    /// Lengths of the JPEGs in bytes, by patch id.
    #[must_use]
    pub fn lengths(&self) -> &[u32] {
        &self.length
    }

    /// Whether any patch has a label.
    #[must_use]
    pub fn is_labelled(&self) -> bool {
        self.label.iter().any(|&label| label != NO_LABEL)
    }

    /// The index as a Parquet file.
    ///
    /// # Errors
    /// Never for rows of this type; the Parquet writer's own.
    pub fn to_parquet(&self) -> Result<Vec<u8>, parquet::errors::ParquetError> {
        let schema = Arc::new(Schema::new(vec![
            Field::new("slide", DataType::UInt32, false),
            Field::new("x", DataType::Int32, false),
            Field::new("y", DataType::Int32, false),
            Field::new("label", DataType::Int32, true),
            Field::new("shard", DataType::UInt32, false),
            Field::new("offset", DataType::UInt64, false),
            Field::new("length", DataType::UInt32, false),
        ]));
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        let mut out = Vec::new();
        let mut writer = ArrowWriter::try_new(&mut out, Arc::clone(&schema), Some(properties))?;
        for from in (0..self.len()).step_by(BATCH_ROWS) {
            let rows = from..(from + BATCH_ROWS).min(self.len());
            let u32s = |column: &[u32]| Arc::new(UInt32Array::from(column[rows.clone()].to_vec())) as ArrayRef;
            let i32s = |column: &[i32]| Arc::new(Int32Array::from(column[rows.clone()].to_vec())) as ArrayRef;
            let labels: Int32Array =
                self.label[rows.clone()].iter().map(|&label| (label != NO_LABEL).then_some(label)).collect();
            let columns = vec![
                u32s(&self.slide),
                i32s(&self.x),
                i32s(&self.y),
                Arc::new(labels) as ArrayRef,
                u32s(&self.shard),
                Arc::new(UInt64Array::from(self.offset[rows.clone()].to_vec())) as ArrayRef,
                u32s(&self.length),
            ];
            writer.write(&RecordBatch::try_new(Arc::clone(&schema), columns)?)?;
        }
        writer.close()?;
        Ok(out)
    }

    /// Reads the index of the set at `store` and validates it against its manifest.
    ///
    /// # Errors
    /// It is missing, damaged, of another form, contradicts the manifest, or storage fails.
    pub async fn load(store: &Store, manifest: &Manifest) -> Result<Self, IndexError> {
        let entry = &manifest.index;
        let object = store.object(&entry.path);
        let bytes = store.get(&entry.path, MAX_INDEX_BYTES).await?;
        let crc32c = crc32c::crc32c(&bytes);
        if bytes.len() as u64 != entry.bytes || crc32c != entry.crc32c {
            return Err(IndexError::Damaged {
                object,
                expected_bytes: entry.bytes,
                expected_crc32c: entry.crc32c,
                bytes: bytes.len() as u64,
                crc32c,
            });
        }
        let index = Self::from_parquet(bytes, manifest.patches, &object)?;
        index.validate(manifest, &object)?;
        Ok(index)
    }

    fn from_parquet(bytes: Bytes, patches: u64, object: &str) -> Result<Self, IndexError> {
        let malformed = |reason: String| IndexError::Malformed { object: object.to_owned(), reason };
        let builder = ParquetRecordBatchReaderBuilder::try_new(bytes).map_err(|e| malformed(e.to_string()))?;
        let rows = builder.metadata().file_metadata().num_rows();
        if u64::try_from(rows) != Ok(patches) {
            return Err(malformed(format!("{rows} rows, but the manifest says {patches} patches")));
        }
        let reader = builder.with_batch_size(BATCH_ROWS).build().map_err(|e| malformed(e.to_string()))?;
        let mut index = Self::with_capacity(usize::try_from(patches).map_err(|e| malformed(e.to_string()))?);
        for batch in reader {
            let batch = batch.map_err(|e| malformed(e.to_string()))?;
            extend::<UInt32Type>(&mut index.slide, &batch, "slide").map_err(malformed)?;
            extend::<Int32Type>(&mut index.x, &batch, "x").map_err(malformed)?;
            extend::<Int32Type>(&mut index.y, &batch, "y").map_err(malformed)?;
            extend::<UInt32Type>(&mut index.shard, &batch, "shard").map_err(malformed)?;
            extend::<UInt64Type>(&mut index.offset, &batch, "offset").map_err(malformed)?;
            extend::<UInt32Type>(&mut index.length, &batch, "length").map_err(malformed)?;
            let labels = column::<Int32Type>(&batch, "label").map_err(malformed)?;
            index.label.extend(labels.iter().map(|label| label.unwrap_or(NO_LABEL)));
        }
        if index.len() as u64 != patches {
            return Err(malformed(format!("{} rows read of {patches}", index.len())));
        }
        Ok(index)
    }

    /// Checks every row: slides in order, row-major without a position twice, labels among the classes, JPEGs inside their shards.
    fn validate(&self, manifest: &Manifest, object: &str) -> Result<(), IndexError> {
        let wrong = |id: u64, reason: String| IndexError::Row { object: object.to_owned(), id, reason };
        let mut in_shard = vec![0_u32; manifest.shards.len()];
        let mut id = 0_usize;
        for (number, slide) in (0_u32..).zip(&manifest.slides) {
            let mut before: Option<(i32, i32)> = None;
            for _ in 0..slide.patches {
                let fail = |reason: String| Err(wrong(id as u64, reason));
                if self.slide[id] != number {
                    return fail(format!("on slide {} instead of {number} ({})", self.slide[id], slide.name));
                }
                let at = (self.y[id], self.x[id]);
                if before.is_some_and(|before| before >= at) {
                    return fail(format!("position x {}, y {} is out of order or taken twice", at.1, at.0));
                }
                before = Some(at);
                let label = self.label[id];
                let known = label == NO_LABEL || usize::try_from(label).is_ok_and(|l| l < manifest.classes.len());
                if !known {
                    return fail(format!("label {label}, but there are {} classes", manifest.classes.len()));
                }
                let Some(shard) = manifest.shards.get(self.shard[id] as usize) else {
                    return fail(format!("in shard {}, but there are {}", self.shard[id], manifest.shards.len()));
                };
                let end = self.offset[id].checked_add(u64::from(self.length[id]));
                if self.length[id] == 0 || end.is_none_or(|end| end > shard.bytes) {
                    return fail(format!(
                        "bytes {} + {} lie outside {} ({} bytes)",
                        self.offset[id], self.length[id], shard.path, shard.bytes
                    ));
                }
                in_shard[self.shard[id] as usize] += 1;
                id += 1;
            }
        }
        for (shard, &found) in manifest.shards.iter().zip(&in_shard) {
            if shard.patches != found {
                let reason = format!("{found} patches in {}, but the manifest says {}", shard.path, shard.patches);
                return Err(IndexError::Malformed { object: object.to_owned(), reason });
            }
        }
        Ok(())
    }

    /// Feeds every column to a content hash.
    pub(crate) fn hash_into(&self, hasher: &mut blake3::Hasher) {
        fn feed<T: Copy, const N: usize>(hasher: &mut blake3::Hasher, column: &[T], bytes: impl Fn(T) -> [u8; N]) {
            let mut buffer = Vec::with_capacity(N * 4096);
            for chunk in column.chunks(4096) {
                buffer.clear();
                chunk.iter().for_each(|&value| buffer.extend_from_slice(&bytes(value)));
                hasher.update(&buffer);
            }
        }
        feed(hasher, &self.slide, u32::to_le_bytes);
        feed(hasher, &self.x, i32::to_le_bytes);
        feed(hasher, &self.y, i32::to_le_bytes);
        feed(hasher, &self.label, i32::to_le_bytes);
        feed(hasher, &self.shard, u32::to_le_bytes);
        feed(hasher, &self.offset, u64::to_le_bytes);
        feed(hasher, &self.length, u32::to_le_bytes);
    }
}

fn column<'a, T: ArrowPrimitiveType>(batch: &'a RecordBatch, name: &str) -> Result<&'a PrimitiveArray<T>, String> {
    let found = batch.column_by_name(name).ok_or_else(|| format!("it has no column {name:?}"))?;
    found
        .as_any()
        .downcast_ref::<PrimitiveArray<T>>()
        .ok_or_else(|| format!("column {name:?} is {} instead of {}", found.data_type(), T::DATA_TYPE))
}

fn extend<T: ArrowPrimitiveType>(into: &mut Vec<T::Native>, batch: &RecordBatch, name: &str) -> Result<(), String> {
    let values = column::<T>(batch, name)?;
    if values.null_count() > 0 {
        return Err(format!("column {name:?} has empty fields"));
    }
    into.extend_from_slice(values.values());
    Ok(())
}
