//! Reading patches: from a folder, over a "network" with and without a cache, and from damaged shards.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use sgcl_patchset::{CacheOptions, PatchSet, ReadError, Store, StoreError};
use support::{jpeg, memory, options, write};

async fn set(store: &Store) -> PatchSet {
    let mut options = options();
    options.shard_bytes = 30_000;
    write(store, 3, 10, options).await;
    PatchSet::load(store.clone()).await.unwrap()
}

fn folder() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("set").to_str().unwrap()).unwrap();
    (dir, store)
}

fn expected(set: &PatchSet, id: u32) -> Vec<u8> {
    let row = set.index().row(id).unwrap();
    jpeg(u8::try_from(row.slide).unwrap(), row.x, row.y)
}

fn cached_bytes(dir: &std::path::Path) -> u64 {
    let walk = |path: &std::path::Path| std::fs::read_dir(path).unwrap().map(|e| e.unwrap()).collect::<Vec<_>>();
    walk(dir).iter().flat_map(|folder| walk(&folder.path())).map(|file| file.metadata().unwrap().len()).sum()
}

/// Flips a bit in the middle of the first shard.
async fn damage(store: &Store, set: &PatchSet) {
    let path = &set.manifest().shards[0].path;
    let mut bytes = store.get(path, u64::MAX).await.unwrap().to_vec();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    store.put(path, bytes).await.unwrap();
}

fn in_first_shard(set: &PatchSet) -> u32 {
    (0..).find(|&id| set.index().row(id).unwrap().shard == 0).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_patch_reads_as_it_was_written_by_every_way() {
    let (_dir, file) = folder();
    let memory = memory();
    let cache = tempfile::tempdir().unwrap();
    let options = CacheOptions { dir: cache.path().join("new"), max_bytes: 1 << 30 };
    for (store, cache) in [(&file, None), (&memory, None), (&memory, Some(options))] {
        let set = set(store).await_or_open(store).await;
        let reader = set.reader(cache);
        for id in 0..300 {
            assert_eq!(reader.read(id).await.unwrap(), expected(&set, id), "patch {id}");
        }
        let (blocking, wanted) = (reader.clone(), expected(&set, 7));
        let read = tokio::task::spawn_blocking(move || blocking.read_blocking(7).unwrap()).await.unwrap();
        assert_eq!(read, wanted);
        assert!(matches!(reader.read(300).await, Err(ReadError::NoSuchPatch { id: 300, patches: 300 })));
    }
}

/// Opens a set that an earlier turn of the loop wrote.
trait AwaitOrOpen {
    async fn await_or_open(self, store: &Store) -> PatchSet;
}

impl<F: Future<Output = PatchSet>> AwaitOrOpen for F {
    async fn await_or_open(self, store: &Store) -> PatchSet {
        match PatchSet::load(store.clone()).await {
            Ok(set) => set,
            Err(_) => self.await,
        }
    }
}

#[tokio::test]
async fn the_cache_keeps_within_its_limit_and_drops_what_was_used_least() {
    let store = memory();
    let set = set(&store).await;
    let shards = &set.manifest().shards;
    assert!(shards.len() > 3);
    let limit = shards[0].bytes + shards[1].bytes + shards[2].bytes / 2;
    let dir = tempfile::tempdir().unwrap();
    let reader = set.reader(Some(CacheOptions { dir: dir.path().into(), max_bytes: limit }));
    for shard in 0..shards.len() {
        reader.prefetch(u32::try_from(shard).unwrap()).await.unwrap();
        assert!(cached_bytes(dir.path()) <= limit);
    }
    // Files that were evicted stay readable to those who have them open.
    for id in 0..300 {
        assert_eq!(reader.read(id).await.unwrap(), expected(&set, id));
    }
}

#[tokio::test]
async fn a_cache_too_small_or_not_writable_is_done_without() {
    let store = memory();
    let set = set(&store).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "not a folder").unwrap();
    for cache in
        [CacheOptions { dir: dir.path().into(), max_bytes: 10 }, CacheOptions { dir: file, max_bytes: 1 << 30 }]
    {
        let reader = set.reader(Some(cache));
        assert_eq!(reader.read(5).await.unwrap(), expected(&set, 5));
    }
}

#[tokio::test]
async fn a_spoilt_copy_in_the_cache_is_fetched_again() {
    let store = memory();
    let set = set(&store).await;
    let dir = tempfile::tempdir().unwrap();
    let options = CacheOptions { dir: dir.path().into(), max_bytes: 1 << 30 };
    set.reader(Some(options.clone())).prefetch(0).await.unwrap();
    let folder = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
    let copy = std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let length = copy.metadata().unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&copy).unwrap().set_len(length / 2).unwrap();
    let id = in_first_shard(&set);
    assert_eq!(set.reader(Some(options)).read(id).await.unwrap(), expected(&set, id));
    assert_eq!(copy.metadata().unwrap().len(), length);
}

#[tokio::test]
async fn a_damaged_shard_is_named_with_what_was_expected_and_found() {
    let (_dir, file) = folder();
    let cache = tempfile::tempdir().unwrap();
    let options = CacheOptions { dir: cache.path().into(), max_bytes: 1 << 30 };
    for (store, cache) in [(file, None), (memory(), Some(options))] {
        let set = set(&store).await;
        damage(&store, &set).await;
        let error = set.reader(cache).read(in_first_shard(&set)).await.unwrap_err();
        let entry = &set.manifest().shards[0];
        let text = error.to_string();
        assert!(matches!(error, ReadError::Corrupt { .. }), "{text}");
        assert!(text.contains(&store.object(&entry.path)) && text.contains(&format!("{:08x}", entry.crc32c)), "{text}");
    }
}

#[tokio::test]
async fn a_truncated_and_a_missing_shard_are_named() {
    let (_dir, store) = folder();
    let set = set(&store).await;
    let id = in_first_shard(&set);
    let entry = &set.manifest().shards[0];
    let path = store.local_path(&entry.path).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(entry.bytes - 1).unwrap();
    match set.reader(None).read(id).await {
        Err(ReadError::Corrupt { expected_bytes, bytes, .. }) => {
            assert_eq!((expected_bytes, bytes), (entry.bytes, entry.bytes - 1))
        }
        other => panic!("{other:?}"),
    }
    std::fs::remove_file(path).unwrap();
    let error = set.reader(None).read(id).await.unwrap_err();
    assert!(matches!(error, ReadError::Store(StoreError::NotFound { .. })), "{error}");
}

#[test]
fn images_decode_and_damaged_ones_do_not() {
    let jpeg = jpeg(3, 5, 7);
    let image = sgcl_patchset::decode(&jpeg).unwrap();
    assert_eq!((image.width, image.height, image.pixels.len()), (16, 16, 768));
    for (found, wanted) in image.pixels.chunks(3).flat_map(|px| px.iter().zip([50_i16, 70, 60])) {
        assert!((i16::from(*found) - wanted).abs() <= 3, "{found} for {wanted}");
    }
    assert!(sgcl_patchset::decode(b"GIF89a").is_err());
    assert!(sgcl_patchset::decode(&jpeg[..jpeg.len() / 4]).is_err());

    let mut grey = Vec::new();
    jpeg_encoder::Encoder::new(&mut grey, 95).encode(&[99; 64], 8, 8, jpeg_encoder::ColorType::Luma).unwrap();
    assert_eq!(sgcl_patchset::decode(&grey).unwrap().pixels.len(), 192);
}
