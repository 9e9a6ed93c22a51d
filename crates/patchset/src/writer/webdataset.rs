//! A shard as a WebDataset tar: `<id>.jpg`, then `<id>.json`, for each patch. The same patches give the same bytes.

use bytes::Bytes;
use serde::Serialize;

const BLOCK: usize = 512;

/// The `<id>.json` beside an image.
#[derive(Serialize)]
pub(super) struct Annotation<'a> {
    pub(super) slide: &'a str,
    pub(super) x: i32,
    pub(super) y: i32,
    /// Index of the class.
    pub(super) label: Option<u16>,
    /// Name of the class.
    pub(super) class: Option<&'a str>,
}

/// A tar being built in memory.
pub(super) struct ShardBuilder {
    tar: Vec<u8>,
}

impl ShardBuilder {
    /// With room for `patches` patches and `jpeg_bytes` of images.
    pub(super) fn with_capacity(patches: usize, jpeg_bytes: usize) -> Self {
        // Two headers, an annotation of one block, half a block of padding on average.
        Self { tar: Vec::with_capacity(jpeg_bytes + patches * 4 * BLOCK + 2 * BLOCK) }
    }

    /// Appends a patch whose image `read` fills in; returns where the image starts.
    pub(super) fn push(
        &mut self,
        id: u32,
        length: u32,
        annotation: &Annotation<'_>,
        read: impl FnOnce(&mut [u8]) -> std::io::Result<()>,
    ) -> std::io::Result<u64> {
        let offset = self.entry(&format!("{id:09}.jpg"), length as usize, read)?;
        let json = serde_json::to_vec(annotation)?;
        self.entry(&format!("{id:09}.json"), json.len(), |into| {
            into.copy_from_slice(&json);
            Ok(())
        })?;
        Ok(offset)
    }

    fn entry(
        &mut self,
        name: &str,
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> std::io::Result<()>,
    ) -> std::io::Result<u64> {
        let mut header = tar::Header::new_ustar();
        header.set_path(name)?;
        header.set_size(length as u64);
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_cksum();
        self.tar.extend_from_slice(header.as_bytes());
        let at = self.tar.len();
        self.tar.resize(at + length.next_multiple_of(BLOCK), 0);
        fill(&mut self.tar[at..at + length])?;
        Ok(at as u64)
    }

    /// The finished tar.
    pub(super) fn finish(mut self) -> Bytes {
        self.tar.resize(self.tar.len() + 2 * BLOCK, 0);
        self.tar.into()
    }
}
