//! Writing a patch set, interrupted and not.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::collections::HashSet;
use std::io::Read;

use sgcl_patchset::{Index, Manifest, Opened, PatchSetWriter, Store, WriteError};
use support::{info, jpeg, memory, open, options, stage, write};

fn stores() -> (tempfile::TempDir, [Store; 2]) {
    let dir = tempfile::tempdir().unwrap();
    let file = Store::open(dir.path().join("new/set").to_str().unwrap()).unwrap();
    (dir, [file, memory()])
}

#[tokio::test]
async fn a_set_reads_back_as_it_was_written_from_a_folder_and_from_a_bucket() {
    let (_dir, stores) = stores();
    let mut ids = HashSet::new();
    for store in stores {
        let written = write(&store, 3, 7, options()).await;
        let manifest = Manifest::load(&store).await.unwrap();
        assert_eq!(manifest, written);
        assert_eq!((manifest.patches, manifest.slides.len()), (147, 3));
        assert_eq!(manifest.classes, ["stroma", "tumour"]);
        ids.insert(manifest.content_id.clone());

        let index = Index::load(&store, &manifest).await.unwrap();
        for id in 0..147 {
            let row = index.row(id).unwrap();
            let shard = &manifest.shards[row.shard as usize].path;
            let found = store.get_range(shard, row.offset..row.offset + u64::from(row.length)).await.unwrap();
            assert_eq!(found, jpeg(u8::try_from(row.slide).unwrap(), row.x, row.y), "patch {id}");
            assert_eq!(id, row.slide * 49 + u32::try_from(row.y * 7 + row.x).unwrap(), "ids are row-major");
            assert_eq!(row.label, Some(u16::from(row.x >= 3)));
        }
        assert!(store.list("staging").await.unwrap().is_empty(), "staging is cleared");
        assert!(store.exists(manifest.slides[0].preview.as_ref().unwrap()).await.unwrap());
    }
    assert_eq!(ids.len(), 1, "the same data has the same content id wherever it lies");
}

#[tokio::test]
async fn a_shard_is_a_tar_that_webdataset_reads() {
    let store = memory();
    let manifest = write(&store, 1, 3, options()).await;
    let bytes = store.get(&manifest.shards[0].path, 1 << 20).await.unwrap();
    assert_eq!(crc32c::crc32c(&bytes), manifest.shards[0].crc32c);
    let mut names = Vec::new();
    for entry in tar::Archive::new(&bytes[..]).entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        if let Some(id) = name.strip_suffix(".json") {
            let value: serde_json::Value = serde_json::from_slice(&content).unwrap();
            let id: i64 = id.parse().unwrap();
            assert_eq!((&value["x"], &value["y"]), (&(id % 3).into(), &(id / 3).into()));
            assert_eq!(value["slide"], "slide 0");
            assert_eq!(value["class"], if id % 3 == 0 { "stroma" } else { "tumour" });
        }
        names.push(name);
    }
    assert_eq!(names.len(), 18);
    assert!(names.chunks(2).all(|pair| pair[0].strip_suffix(".jpg") == pair[1].strip_suffix(".json")), "{names:?}");
}

#[tokio::test]
async fn shards_are_fair_samples_of_their_group() {
    let store = memory();
    let mut options = options();
    options.shard_bytes = 20_000;
    let manifest = write(&store, 4, 10, options).await;
    assert!(manifest.shards.len() >= 4, "{}", manifest.shards.len());
    let index = Index::load(&store, &manifest).await.unwrap();
    for shard in 0..u32::try_from(manifest.shards.len()).unwrap() {
        let slides: HashSet<_> =
            (0..400).filter_map(|id| index.row(id)).filter(|r| r.shard == shard).map(|r| r.slide).collect();
        assert_eq!(slides.len(), 4, "shard {shard} holds patches of every slide");
    }
    let sizes: Vec<_> = manifest.shards.iter().map(|s| s.patches).collect();
    assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{sizes:?}");
}

#[tokio::test]
async fn groups_bound_what_is_shuffled_together() {
    let (_dir, stores) = stores();
    for store in stores {
        let mut options = options();
        options.group_bytes = 1;
        let manifest = write(&store, 3, 9, options).await;
        let index = Index::load(&store, &manifest).await.unwrap();
        for shard in 0..u32::try_from(manifest.shards.len()).unwrap() {
            let slides: HashSet<_> =
                (0..243).filter_map(|id| index.row(id)).filter(|r| r.shard == shard).map(|r| r.slide).collect();
            assert_eq!(slides.len(), 1);
        }
    }
}

#[tokio::test]
async fn an_interrupted_ingest_continues_and_ends_in_the_same_set() {
    let undisturbed = write(&memory(), 3, 6, options()).await;

    let (_dir, stores) = stores();
    for store in stores {
        let first = open(&store, options()).await;
        stage(&first, 0, 6).await;
        let mut half = first.slide(info(1)).unwrap();
        half.push(0, 0, None, &jpeg(1, 0, 0)).unwrap();
        drop((half, first));
        assert!(matches!(Manifest::load(&store).await, Err(sgcl_patchset::ManifestError::Missing { .. })));

        let second = open(&store, options()).await;
        assert_eq!(second.resume("slide 0", "v1"), Some(36));
        assert_eq!(second.resume("slide 0", "v2"), None, "a source that changed is written again");
        assert_eq!(second.resume("slide 1", "v1"), None, "half a slide is no slide");
        stage(&second, 1, 6).await;
        stage(&second, 2, 6).await;
        let manifest = second.finish(|_, _| {}).await.unwrap();
        assert_eq!(manifest, undisturbed);

        match PatchSetWriter::open(store, options()).await.unwrap() {
            Opened::Complete(found) => assert_eq!(*found, manifest),
            Opened::Writer(_) => panic!("a finished set is not begun again"),
        }
    }
}

#[tokio::test]
async fn other_settings_on_the_same_url_are_refused_by_name() {
    let store = memory();
    let writer = open(&store, options()).await;
    stage(&writer, 0, 3).await;
    let mut other = options();
    other.patch_px = 224;
    other.settings.insert("mpp".into(), 1.0.into());
    let error = PatchSetWriter::open(store.clone(), other.clone()).await.unwrap_err().to_string();
    assert!(error.contains("mpp: 0.5 there, 1.0 now; patch_px: 16 there, 224 now"), "{error}");
    writer.finish(|_, _| {}).await.unwrap();
    let error = PatchSetWriter::open(store, other).await.unwrap_err().to_string();
    assert!(error.contains("patch_px: 16 there, 224 now"), "{error}");
}

#[tokio::test]
async fn settings_that_no_slide_depends_on_may_change() {
    let store = memory();
    drop(open(&store, options()).await);
    let mut other = options();
    other.patch_px = 224;
    open(&store, other).await;
}

#[tokio::test]
async fn pixel_coordinates_and_empty_slides_are_refused() {
    let store = memory();
    let writer = open(&store, options()).await;
    let mut slide = writer.slide(info(1)).unwrap();
    for i in 0..4 {
        slide.push(i % 2 * 256, i / 2 * 256, None, &jpeg(1, 0, 0)).unwrap();
    }
    let error = slide.finish().await.unwrap_err().to_string();
    assert!(error.contains("slide 1") && error.contains("256 apart"), "{error}");
    assert!(matches!(writer.slide(info(2)).unwrap().finish().await, Err(WriteError::NoPatches { .. })));
    assert!(matches!(writer.slide(info(3)).unwrap().push(0, 0, None, b"GIF89a"), Err(WriteError::Patch { .. })));
    assert!(matches!(writer.finish(|_, _| {}).await, Err(WriteError::NoSlides { .. })));
}

#[tokio::test]
async fn an_index_that_was_damaged_is_refused_with_both_checksums() {
    let store = memory();
    let manifest = write(&store, 1, 3, options()).await;
    let mut bytes = store.get("index.parquet", 1 << 20).await.unwrap().to_vec();
    bytes[20] ^= 1;
    store.put("index.parquet", bytes).await.unwrap();
    let error = Index::load(&store, &manifest).await.unwrap_err().to_string();
    assert!(error.contains("index.parquet") && error.contains(&format!("{:08x}", manifest.index.crc32c)), "{error}");
}
