//! Ingest of images inside other files, tars of WebDataset and Parquet as on Hugging Face, and of the tiles that a list names.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryArray, Int64Array, RecordBatch, StringArray, StructArray};
use arrow::datatypes::{DataType, Field, Fields, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use rstest::rstest;
use serde_json::{Value, json};
use sgcl_patchset::ingest::{IngestError, IngestOptions, IngestReport, Scale, ingest};
use sgcl_patchset::{PatchSet, Store};
use support::{layout, text};
use tempfile::TempDir;

fn options() -> IngestOptions {
    IngestOptions { patch_px: 32, scale: Scale::Level(0), ..IngestOptions::default() }
}

async fn run(folder: &TempDir, source: &Path, options: &IngestOptions) -> Result<IngestReport, IngestError> {
    run_all(folder, &[source.to_owned()], options).await
}

async fn run_all(folder: &TempDir, sources: &[PathBuf], options: &IngestOptions) -> Result<IngestReport, IngestError> {
    let to = folder.path().join("set");
    ingest(sources, &Store::open(text(&to)).unwrap(), options, Arc::new(|_| {})).await
}

/// Slide, place, class and red of every patch, in order.
async fn patches(folder: &TempDir) -> Vec<(String, i32, i32, Option<String>, u8)> {
    let set = PatchSet::open(text(&folder.path().join("set"))).await.unwrap();
    let reader = set.reader(None);
    let rows = 0..u32::try_from(set.len()).unwrap();
    let mut found: Vec<_> = rows
        .map(|id| {
            let (row, image) = (set.index().row(id).unwrap(), reader.decode_blocking(id).unwrap());
            let class = row.label.map(|label| set.manifest().classes[usize::from(label)].clone());
            let slide = set.manifest().slides[row.slide as usize].name.clone();
            (slide, row.x, row.y, class, image.pixels[3 * (16 * 32 + 16)])
        })
        .collect();
    found.sort_by_key(|patch| patch.4);
    found
}

/// Class and colour of patches without a place.
fn loose(found: Vec<(String, i32, i32, Option<String>, u8)>) -> Vec<(Option<String>, u8)> {
    assert!(found.iter().all(|patch| patch.0.starts_with("loose-")), "{found:?}");
    // JPEG keeps an even colour to a few values.
    found.into_iter().map(|(.., class, red)| (class, (red + 5) / 10 * 10)).collect()
}

fn class(name: &str) -> Option<String> {
    Some(name.to_owned())
}

#[tokio::test]
async fn shards_of_webdataset_are_one_set_with_their_places_and_classes() {
    let folder = tempfile::tempdir().unwrap();
    let shards = folder.path().join("shards");
    std::fs::create_dir(&shards).unwrap();
    let [one, two] = ["000.tar", "001.tar"].map(|name| shards.join(name));
    let long = "d/".repeat(70) + "c";
    let first = json!([
        ["train/a.jpg", [50, 9, 9]], ["train/a.json", {"slide": "s", "x": 0, "y": 0, "label": 1, "class": "TUM"}],
        ["train/b.png", [60, 9, 9]], ["train/b.json", {"slide": "s", "x": 1, "y": 0, "label": "NORM"}],
        ["train/b.txt", "passed over"], [format!("{long}.jpg"), [70, 9, 9]],
        [format!("{long}.json"), {"slide": "s", "x": 1, "y": 1}], ["train/text-alone.txt", "no image"],
    ]);
    let second = json!([
        ["d.json", {"slide": "s", "x": 2, "y": 1, "class": "TUM"}], ["d.JPG.jpg", [80, 9, 9]],
        ["e.jpg", [90, 9, 9]], ["e.cls", " 7\n"],
    ]);
    layout(&["webdataset", text(&one), &first.to_string()]);
    layout(&["webdataset", text(&two), &second.to_string()]);
    let report = run(&folder, &shards, &options()).await.unwrap();
    assert!(report.skipped.is_empty(), "{:?}", report.skipped);
    let found = patches(&folder).await;
    let places: Vec<_> =
        found.iter().map(|(slide, x, y, class, _)| (slide.as_str(), *x, *y, class.as_deref())).collect();
    let expected = [
        ("s", 0, 0, Some("TUM")),
        ("s", 1, 0, Some("NORM")),
        ("s", 1, 1, None),
        ("s", 2, 1, Some("TUM")),
        ("loose-000", 0, 0, Some("7")),
    ];
    assert_eq!(places, expected);
    for ((.., red), expected) in found.iter().zip([50, 60, 70, 80, 90]) {
        assert!(red.abs_diff(expected) < 4, "{red} is not {expected}");
    }
    let split: Value = serde_json::from_slice(&std::fs::read(folder.path().join("set/split.json")).unwrap()).unwrap();
    assert_eq!(split["train"].as_array().unwrap().len() + split["test"].as_array().unwrap().len(), 2);
    assert_eq!(report.slides.iter().map(|slide| slide.labelled).collect::<Vec<_>>(), [Some(3), Some(1)]);
}

#[tokio::test]
async fn a_patch_sets_own_shards_go_in_again_as_they_came_out() {
    let folder = tempfile::tempdir().unwrap();
    let shard = folder.path().join("in.tar");
    let samples: Vec<Value> = (0..20)
        .flat_map(|at: i32| {
            let says = json!({ "slide": format!("s{}", at % 2), "x": at / 2, "y": 0, "class": if at < 10 { "a" } else { "b" } });
            [json!([format!("{at}.jpg"), [10 * at, 100, 100]]), json!([format!("{at}.json"), says])]
        })
        .collect();
    layout(&["webdataset", text(&shard), &Value::from(samples).to_string()]);
    run(&folder, &shard, &options()).await.unwrap();
    let before = patches(&folder).await;
    let again = tempfile::tempdir().unwrap();
    run(&again, &folder.path().join("set/shards"), &options()).await.unwrap();
    assert_eq!(patches(&again).await, before);
    assert_eq!(before.len(), 20);
}

#[rstest]
#[case::twins(json!([["a.jpg", [1, 1, 1]], ["a.png", [1, 1, 1]]]), "two images under one key, a.jpg and a.png")]
#[case::json(json!([["a.jpg", [1, 1, 1]], ["a.json", {"slide": "s", "x": "left", "y": 2}]]), "a.json in it: slide \"s\" at x \"left\"")]
#[case::class(json!([["a.jpg", [1, 1, 1]], ["a.cls", ""]]), "a.cls in it holds no name")]
#[case::empty(json!([["a.txt", "b"]]), "holds no image of a WebDataset")]
#[tokio::test]
async fn shards_that_do_not_fit_are_refused_with_the_file_and_the_reason(#[case] samples: Value, #[case] says: &str) {
    let folder = tempfile::tempdir().unwrap();
    let shard = folder.path().join("x.tar");
    layout(&["webdataset", text(&shard), &samples.to_string()]);
    let error = run(&folder, &shard, &options()).await.unwrap_err().to_string();
    assert!(error.contains(text(&shard)) && error.contains(says), "{error}");
}

#[tokio::test]
async fn a_shard_that_breaks_off_or_is_compressed_is_refused_and_a_damaged_image_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let shard = folder.path().join("x.tar");
    let samples = json!([["a.jpg", [40, 9, 9]], ["a.cls", 1], ["b.png", [50, 9, 9]], ["b.cls", 2]]);
    layout(&["webdataset", text(&shard), &samples.to_string()]);
    let whole = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &whole[..700]).unwrap();
    let error = run(&folder, &shard, &options()).await.unwrap_err().to_string();
    assert!(error.contains("x.tar") && error.contains("breaks off within a.jpg"), "{error}");
    std::fs::write(&shard, b"no tar at all").unwrap();
    let error = run(&folder, &shard, &options()).await.unwrap_err().to_string();
    assert!(error.contains("x.tar") && error.contains("holds no image") || error.contains("is not a tar"), "{error}");
    let packed = folder.path().join("x.tar.gz");
    std::fs::write(&packed, b"").unwrap();
    let error = run(&folder, &packed, &options()).await.unwrap_err().to_string();
    assert!(error.contains("x.tar.gz") && error.contains("unpack it"), "{error}");

    let at = whole.windows(2).position(|pair| pair == [0xff, 0xd8]).unwrap();
    let mut damaged = whole;
    damaged[at..at + 30].fill(0);
    std::fs::write(&shard, damaged).unwrap();
    let report = run(&folder, &shard, &options()).await.unwrap();
    assert_eq!(report.skipped.len(), 1);
    assert!(report.skipped[0].source.starts_with("a.jpg in ") && report.skipped[0].source.ends_with("x.tar"));
    assert_eq!(loose(patches(&folder).await), [(class("2"), 50)]);
}

/// Encoded tiles of these reds, JPEG and PNG in turn.
fn images(folder: &TempDir, reds: &[u8]) -> Vec<Vec<u8>> {
    let out = folder.path().join("encoded");
    std::fs::create_dir_all(&out).unwrap();
    let colours: Vec<[u8; 3]> = reds.iter().map(|&red| [red, 9, 9]).collect();
    layout(&["jpegs", text(&out), &json!(colours).to_string()]);
    (0..reds.len()).map(|at| std::fs::read(out.join(at.to_string())).unwrap()).collect()
}

/// `image` as Hugging Face's datasets write it: a struct of bytes and path.
fn image_struct(images: &[Option<&[u8]>]) -> (DataType, ArrayRef) {
    let fields =
        Fields::from(vec![Field::new("bytes", DataType::Binary, true), Field::new("path", DataType::Utf8, true)]);
    let bytes: ArrayRef = Arc::new(BinaryArray::from(images.to_vec()));
    let paths: ArrayRef = Arc::new(StringArray::from(vec![Some("somewhere.png"); images.len()]));
    (DataType::Struct(fields.clone()), Arc::new(StructArray::new(fields, vec![bytes, paths], None)))
}

/// Name, type and values.
type Column = (&'static str, DataType, ArrayRef);

fn write(path: &Path, columns: Vec<Column>, huggingface: Option<Value>) {
    let fields: Vec<Field> = columns.iter().map(|(name, kind, _)| Field::new(*name, kind.clone(), true)).collect();
    let schema = Arc::new(Schema::new(fields));
    let batch =
        RecordBatch::try_new(Arc::clone(&schema), columns.into_iter().map(|(_, _, array)| array).collect()).unwrap();
    let metadata = huggingface.map(|value| vec![KeyValue::new("huggingface".to_owned(), value.to_string())]);
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_max_row_group_row_count(Some(3))
        .set_key_value_metadata(metadata)
        .build();
    let mut writer = ArrowWriter::try_new(std::fs::File::create(path).unwrap(), schema, Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[tokio::test]
async fn parquet_of_hugging_face_has_its_classes_by_the_names_in_its_metadata() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("train-00000.parquet");
    let encoded = images(&folder, &[20, 30, 40, 50, 60, 70, 80]);
    let mut some: Vec<Option<&[u8]>> = encoded.iter().map(|bytes| Some(bytes.as_slice())).collect();
    some[6] = None;
    let (kind, array) = image_struct(&some);
    let labels: ArrayRef =
        Arc::new(Int64Array::from(vec![Some(0), Some(1), Some(2), Some(1), Some(-1), None, Some(0)]));
    let says = json!({ "info": { "features": {
        "picture": { "_type": "Image" }, "kind": { "names": ["ADI", "BACK", "TUM"], "_type": "ClassLabel" } } } });
    write(&file, vec![("picture", kind, array), ("kind", DataType::Int64, labels)], Some(says));
    let report = run(&folder, &file, &options()).await.unwrap();
    assert_eq!(report.skipped.len(), 1, "{:?}", report.skipped);
    assert!(report.skipped[0].source.starts_with("row 6 of ") && report.skipped[0].reason.contains("has no bytes"));
    let expected =
        [(class("ADI"), 20), (class("BACK"), 30), (class("TUM"), 40), (class("BACK"), 50), (None, 60), (None, 70)];
    assert_eq!(loose(patches(&folder).await), expected);

    // The same call again finds the set as it is.
    let again = run(&folder, &file, &options()).await.unwrap();
    assert!(again.slides.iter().all(|slide| slide.resumed));
}

#[tokio::test]
async fn parquet_with_plain_columns_has_text_labels_and_places() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.parquet");
    let encoded = images(&folder, &[20, 30, 40, 50]);
    let image: ArrayRef = Arc::new(BinaryArray::from(encoded.iter().map(Vec::as_slice).collect::<Vec<_>>()));
    let labels: ArrayRef = Arc::new(StringArray::from(vec![Some("tumour"), None, Some("normal"), Some("tumour")]));
    let slides: ArrayRef = Arc::new(StringArray::from(vec![Some("s"), Some("s"), Some("s"), None]));
    let [x, y] = [[0, 1, 1, 0], [0, 0, 1, 0]].map(|values| Arc::new(Int64Array::from(values.to_vec())) as ArrayRef);
    let columns = vec![
        ("image", DataType::Binary, image),
        ("label", DataType::Utf8, labels),
        ("slide", DataType::Utf8, slides),
        ("x", DataType::Int64, x),
        ("y", DataType::Int64, y),
    ];
    write(&file, columns, None);
    run(&folder, &file, &options()).await.unwrap();
    let found: Vec<_> =
        patches(&folder).await.into_iter().map(|(slide, x, y, class, _)| (slide, x, y, class)).collect();
    let expected = [
        ("s", 0, 0, class("tumour")),
        ("s", 1, 0, None),
        ("s", 1, 1, class("normal")),
        ("loose-000", 0, 0, class("tumour")),
    ];
    assert_eq!(found, expected.map(|(slide, x, y, class)| (slide.to_owned(), x, y, class)));
}

#[tokio::test]
async fn parquet_that_does_not_fit_is_refused_with_the_file_and_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.parquet");
    let encoded = images(&folder, &[20, 30]);
    let image = || -> ArrayRef { Arc::new(BinaryArray::from(encoded.iter().map(Vec::as_slice).collect::<Vec<_>>())) };
    let numbers = |values: [i64; 2]| -> ArrayRef { Arc::new(Int64Array::from(values.to_vec())) };
    let named = json!({ "info": { "features": { "label": { "names": ["a", "b"], "_type": "ClassLabel" } } } });
    let cases: Vec<(Vec<Column>, Option<Value>, &str)> = vec![
        (vec![("img", DataType::Binary, image())], None, "has no column `image`; it has img"),
        (vec![("image", DataType::Int64, numbers([1, 2]))], None, "its column `image` is Int64"),
        (
            vec![("image", DataType::Binary, image()), ("label", DataType::Int64, numbers([0, -7]))],
            None,
            "row 1 has label -7",
        ),
        (
            vec![("image", DataType::Binary, image()), ("label", DataType::Int64, numbers([0, 2]))],
            Some(named),
            "row 1 has label 2, but 2 names",
        ),
        (
            vec![("image", DataType::Binary, image()), ("label", DataType::Binary, image())],
            None,
            "its column `label` is Binary",
        ),
    ];
    for (columns, says, reason) in cases {
        write(&file, columns, says);
        let error = run(&folder, &file, &options()).await.unwrap_err().to_string();
        assert!(error.contains(text(&file)) && error.contains(reason), "{error}");
    }
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() - 20]).unwrap();
    let error = run(&folder, &file, &options()).await.unwrap_err().to_string();
    assert!(error.contains("x.parquet") && error.contains("is not Parquet, or damaged"), "{error}");
}

/// Tiles as the seed's are: `<class>/<slide>/<slide>_<x>_<y>_<level>.png`.
fn tiles(folder: &TempDir) -> PathBuf {
    let root = folder.path().join("tiles");
    let encoded = images(folder, &[20, 30, 40, 50, 60]);
    let names = [
        "tumor/t1/t1_0_0_0.png",
        "tumor/t1/t1_1_0_0.png",
        "normal/n1/n1_0_0_0.png",
        "normal/n1/n1_0_1_0.png",
        "other/odd.png",
    ];
    for (name, bytes) in names.iter().zip(encoded) {
        std::fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        std::fs::write(root.join(name), bytes).unwrap();
    }
    root
}

#[tokio::test]
async fn a_list_names_tiles_their_labels_or_else_their_folders_their_classes() {
    let folder = tempfile::tempdir().unwrap();
    let root = tiles(&folder);
    let list = folder.path().join("train.txt");
    let options = IngestOptions { list: Some(list.clone()), ..options() };
    std::fs::write(
        &list,
        "tumor/t1/t1_0_0_0.png 1\ntumor/t1/t1_1_0_0.png 1\n\nnormal/n1/n1_0_0_0.png 0\nother/odd.png\n",
    )
    .unwrap();
    run(&folder, &root, &options).await.unwrap();
    let places = |found: Vec<(String, i32, i32, Option<String>, u8)>| -> Vec<_> {
        found.into_iter().map(|(slide, x, y, class, _)| (slide, x, y, class)).collect()
    };
    let t1 = |x: i32, name: &str| ("t1".to_owned(), x, 0, class(name));
    let n1 = |name: &str| ("n1".to_owned(), 0, 0, class(name));
    let odd = ("loose-000".to_owned(), 0, 0, None);
    assert_eq!(places(patches(&folder).await), [t1(0, "1"), t1(1, "1"), n1("0"), odd]);
    assert!(folder.path().join("set/split.json").exists());

    std::fs::remove_dir_all(folder.path().join("set")).unwrap();
    std::fs::write(&list, "tumor/t1/t1_0_0_0.png\r\ntumor/t1/t1_1_0_0.png\r\nnormal/n1/n1_0_0_0.png\r\n").unwrap();
    run(&folder, &root, &options).await.unwrap();
    assert_eq!(places(patches(&folder).await), [t1(0, "tumor"), t1(1, "tumor"), n1("normal")]);
}

#[rstest]
#[case::missing("tumor/t1/t1_9_9_0.png 1\n", "names tumor/t1/t1_9_9_0.png, which is no file below")]
#[case::label("tumor/t1/t1_0_0_0.png 1\ntumor/t1/t1_1_0_0.png -2\n", "line 2: label -2 is below 0")]
#[case::empty("\n \n", "names no tile")]
#[tokio::test]
async fn lists_that_do_not_fit_are_refused_with_the_file_and_the_reason(#[case] lines: &str, #[case] says: &str) {
    let folder = tempfile::tempdir().unwrap();
    let root = tiles(&folder);
    let list = folder.path().join("train.txt");
    std::fs::write(&list, lines).unwrap();
    let options = IngestOptions { list: Some(list.clone()), ..options() };
    let error = run(&folder, &root, &options).await.unwrap_err().to_string();
    assert!(error.contains(text(&list)) && error.contains(says), "{error}");
    let error = run_all(&folder, &[root.clone(), root], &options).await.unwrap_err().to_string();
    assert!(error.contains("--list wants one source"), "{error}");
}
