//! Images in Parquet, as datasets on Hugging Face have them.
//!
//! | column | type | meaning |
//! |---|---|---|
//! | `image`, or what the metadata call an Image | struct of `bytes` (and `path`), or binary | the encoded image |
//! | `label`, or what they call a ClassLabel; may be missing | whole number or text | the class; a number is named by the metadata where they can |
//! | `slide`, `x`, `y`; may be missing | text and two whole numbers | the place, in tiles |
//!
//! Rows are wanted in random order and Parquet gives them one after another, so the images are copied to a scratch file once, when the
//! first of them is asked for.

use std::fs::File;
use std::io::{BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use arrow::array::{Array, ArrayRef, AsArray as _, BinaryArray, Int64Array, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Int64Type, Schema};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

use super::container::{Container, MAX_IMAGE, MAX_ITEMS, Opened, Sample};
use super::webdataset::called;

/// Rows of small columns that are read together.
const ROWS: usize = 8_192;
/// Rows with images that are read together.
const IMAGES: usize = 16;

/// A Parquet file whose columns were found.
#[derive(Debug)]
pub(crate) struct Parquet {
    path: PathBuf,
    /// Number of the column of images.
    column: usize,
    copied: OnceLock<Result<Copied, String>>,
}

/// Its images, one behind the other.
#[derive(Debug)]
struct Copied {
    file: Mutex<File>,
    /// Offset and length of each row's image, or why there is none.
    places: Vec<Result<(u64, u64), &'static str>>,
}

impl Parquet {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The image of a row.
    pub(super) fn read(&self, row: usize) -> Result<Vec<u8>, String> {
        let copied = self.copied.get_or_init(|| copy(&self.path, self.column)).as_ref().map_err(Clone::clone)?;
        let (offset, length) = match copied.places.get(row) {
            Some(Ok(place)) => *place,
            Some(Err(why)) => return Err((*why).to_owned()),
            None => return Err("the file has become shorter".to_owned()),
        };
        let mut file = copied.file.lock().map_err(|_| "its reader broke off".to_owned())?;
        file.seek(SeekFrom::Start(offset)).map_err(|e| e.to_string())?;
        let mut bytes = vec![0; length as usize];
        file.read_exact(&mut bytes).map_err(|e| e.to_string())?;
        Ok(bytes)
    }
}

fn reader(path: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>, String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| format!("is not Parquet, or damaged: {e}"))
}

/// Finds the images of a Parquet file.
pub(super) fn open(path: &Path) -> Opened {
    let builder = reader(path)?;
    let rows = usize::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
    if rows == 0 || rows > MAX_ITEMS {
        return Err(format!("has {rows} rows; 1 to {MAX_ITEMS} are taken"));
    }
    let said = said(&builder);
    let schema = builder.schema().clone();
    let column = image_column(&schema, &said)?;
    let find = |name: &str| schema.index_of(name).ok();
    let label = feature(&said, "ClassLabel").and_then(|name| find(&name)).or_else(|| find("label"));
    let places = [find("slide"), find("x"), find("y")];
    let names = label.map(|label| class_names(&said, schema.field(label).name())).unwrap_or_default();

    let wanted: Vec<usize> = label.into_iter().chain(places.into_iter().flatten()).collect();
    let mut samples: Vec<Sample> = (0..rows).map(|item| Sample { item, ..Sample::default() }).collect();
    if !wanted.is_empty() {
        let mask = ProjectionMask::roots(builder.parquet_schema(), wanted);
        let batches = builder.with_projection(mask).with_batch_size(ROWS).build().map_err(|e| e.to_string())?;
        let mut at = 0;
        for batch in batches {
            let batch = batch.map_err(|e| format!("is damaged: {e}"))?;
            let column = |number: Option<usize>| number.and_then(|n| batch.column_by_name(schema.field(n).name()));
            let some = samples.get_mut(at..at + batch.num_rows()).ok_or("has more rows than it says")?;
            if let Some(labels) = column(label) {
                put_classes(some, labels, &names)?;
            }
            if let (Some(slide), Some(x), Some(y)) = (column(places[0]), column(places[1]), column(places[2])) {
                put_places(some, slide, x, y)?;
            }
            at += batch.num_rows();
        }
    }
    let parquet = Parquet { path: path.to_owned(), column, copied: OnceLock::new() };
    Ok((Container::Parquet(parquet), samples))
}

/// What Hugging Face's metadata say of the columns; null without them.
fn said(builder: &ParquetRecordBatchReaderBuilder<File>) -> Value {
    let pairs = builder.metadata().file_metadata().key_value_metadata();
    let text =
        pairs.and_then(|pairs| pairs.iter().find(|pair| pair.key == "huggingface")).and_then(|p| p.value.as_ref());
    let all: Value = text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    all["info"]["features"].clone()
}

/// The first column of a type.
fn feature(said: &Value, kind: &str) -> Option<String> {
    said.as_object()?.iter().find(|(_, feature)| feature["_type"] == kind).map(|(name, _)| name.clone())
}

fn class_names(said: &Value, column: &str) -> Vec<String> {
    let names = said[column]["names"].as_array();
    names.into_iter().flatten().map(|name| name.as_str().unwrap_or_default().to_owned()).collect()
}

fn image_column(schema: &Schema, said: &Value) -> Result<usize, String> {
    let name = feature(said, "Image").unwrap_or_else(|| "image".to_owned());
    let columns = || schema.fields().iter().map(|field| field.name().as_str()).collect::<Vec<_>>().join(", ");
    let column = schema.index_of(&name).map_err(|_| format!("has no column `{name}`; it has {}", columns()))?;
    let binary = |kind: &DataType| matches!(kind, DataType::Binary | DataType::LargeBinary | DataType::BinaryView);
    let fits = match schema.field(column).data_type() {
        DataType::Struct(fields) => fields.iter().any(|field| field.name() == "bytes" && binary(field.data_type())),
        kind => binary(kind),
    };
    if !fits {
        let kind = schema.field(column).data_type();
        return Err(format!("its column `{name}` is {kind}; binary, or a struct with binary `bytes`, is wanted"));
    }
    Ok(column)
}

fn put_classes(samples: &mut [Sample], labels: &ArrayRef, names: &[String]) -> Result<(), String> {
    if labels.data_type().is_integer() {
        let labels = numbers(labels, "label")?;
        for (row, sample) in samples.iter_mut().enumerate().filter(|&(row, _)| labels.is_valid(row)) {
            let label = labels.value(row);
            sample.class = match (usize::try_from(label), names.is_empty()) {
                // What has no label is -1 there.
                (Err(_), _) if label == -1 => None,
                (Ok(_), true) => Some(label.to_string()),
                (Ok(at), false) => match names.get(at) {
                    Some(name) => Some(called(name)?),
                    None => return Err(format!("row {} has label {label}, but {} names", sample.item, names.len())),
                },
                _ => return Err(format!("row {} has label {label}; labels count from 0", sample.item)),
            };
        }
        return Ok(());
    }
    let labels = texts(labels, "label")?;
    for (row, sample) in samples.iter_mut().enumerate().filter(|&(row, _)| labels.is_valid(row)) {
        sample.class = Some(called(labels.value(row)).map_err(|e| format!("the label of row {} {e}", sample.item))?);
    }
    Ok(())
}

fn put_places(samples: &mut [Sample], slide: &ArrayRef, x: &ArrayRef, y: &ArrayRef) -> Result<(), String> {
    let (slide, x, y) = (texts(slide, "slide")?, numbers(x, "x")?, numbers(y, "y")?);
    for (row, sample) in samples.iter_mut().enumerate() {
        if [slide.is_null(row), x.is_null(row), y.is_null(row)].contains(&true) {
            continue;
        }
        let [x, y] = [x.value(row), y.value(row)].map(i32::try_from);
        let (Ok(x), Ok(y)) = (x, y) else { return Err(format!("row {} lies too far out for a place", sample.item)) };
        let slide = called(slide.value(row)).map_err(|e| format!("the slide of row {} {e}", sample.item))?;
        sample.place = Some((slide, x, y));
    }
    Ok(())
}

fn numbers(column: &ArrayRef, name: &str) -> Result<Int64Array, String> {
    let wrong = || format!("its column `{name}` is {}; whole numbers are wanted", column.data_type());
    if !column.data_type().is_integer() {
        return Err(wrong());
    }
    let cast = cast(column, &DataType::Int64).map_err(|_| wrong())?;
    Ok(cast.as_primitive_opt::<Int64Type>().ok_or_else(wrong)?.clone())
}

fn texts(column: &ArrayRef, name: &str) -> Result<StringArray, String> {
    let wrong = || format!("its column `{name}` is {}; text is wanted", column.data_type());
    let inner = match column.data_type() {
        DataType::Dictionary(_, values) => values.as_ref(),
        kind => kind,
    };
    if !matches!(inner, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) {
        return Err(wrong());
    }
    let cast = cast(column, &DataType::Utf8).map_err(|_| wrong())?;
    Ok(cast.as_string_opt::<i32>().ok_or_else(wrong)?.clone())
}

/// Copies all images to a scratch file.
fn copy(path: &Path, column: usize) -> Result<Copied, String> {
    let builder = reader(path)?;
    let mask = ProjectionMask::roots(builder.parquet_schema(), [column]);
    let batches = builder.with_projection(mask).with_batch_size(IMAGES).build().map_err(|e| e.to_string())?;
    let scratch = |e: std::io::Error| format!("its images cannot be copied to {}: {e}", std::env::temp_dir().display());
    let mut file = BufWriter::new(tempfile::tempfile().map_err(scratch)?);
    let (mut places, mut offset) = (Vec::new(), 0);
    for batch in batches {
        let batch = batch.map_err(|e| format!("is damaged: {e}"))?;
        let images = bytes_of(batch.column(0))?;
        for row in 0..images.len() {
            let image = if images.is_null(row) { &[] } else { images.value(row) };
            let length = image.len() as u64;
            places.push(match length {
                0 => Err("it has no bytes; images that are only named by a path are not taken"),
                1..=MAX_IMAGE => {
                    file.write_all(image).map_err(scratch)?;
                    offset += length;
                    Ok((offset - length, length))
                }
                _ => Err("it has too many bytes for a tile"),
            });
        }
    }
    let file = file.into_inner().map_err(|e| scratch(e.into_error()))?;
    Ok(Copied { file: Mutex::new(file), places })
}

/// The encoded images of a column.
fn bytes_of(column: &ArrayRef) -> Result<BinaryArray, String> {
    let wrong = || "its images are not binary".to_owned();
    let bytes = match column.as_struct_opt() {
        Some(parts) => {
            let bytes = parts.column_by_name("bytes").ok_or_else(wrong)?;
            if parts.null_count() > 0 {
                // A row without a struct has no bytes either.
                arrow::compute::nullif(bytes, &arrow::compute::is_null(parts).map_err(|e| e.to_string())?)
                    .map_err(|e| e.to_string())?
            } else {
                bytes.clone()
            }
        }
        None => column.clone(),
    };
    let cast = cast(&bytes, &DataType::Binary).map_err(|_| wrong())?;
    Ok(cast.as_binary_opt::<i32>().ok_or_else(wrong)?.clone())
}
