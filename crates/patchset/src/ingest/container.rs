//! Images inside other files: entries of a tar, rows of a Parquet file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::parquet::Parquet;

/// Largest image.
pub(crate) const MAX_IMAGE: u64 = 64 << 20;
/// Most images of one file.
pub(crate) const MAX_ITEMS: usize = 20_000_000;

/// Where the bytes of a tile are.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    File(PathBuf),
    /// Item of a file that holds many.
    Part(Arc<Container>, usize),
}

impl Origin {
    /// As a message names it.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Part(container, item) => container.describe(*item),
        }
    }
}

/// A file that holds many images.
#[derive(Debug)]
pub(crate) enum Container {
    Tar(Tar),
    Parquet(Parquet),
}

impl Container {
    /// The bytes of an image, [`MAX_IMAGE`] at most. May be called from several threads.
    pub(crate) fn read(&self, item: usize) -> Result<Vec<u8>, String> {
        match self {
            Self::Tar(tar) => tar.read(item),
            Self::Parquet(parquet) => parquet.read(item),
        }
    }

    fn describe(&self, item: usize) -> String {
        match self {
            Self::Tar(tar) => format!("{} in {}", tar.entries[item].name, tar.path.display()),
            Self::Parquet(parquet) => format!("row {item} of {}", parquet.path().display()),
        }
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Tar(tar) => &tar.path,
            Self::Parquet(parquet) => parquet.path(),
        }
    }
}

/// A tar whose images were found.
#[derive(Debug)]
pub(crate) struct Tar {
    pub(super) path: PathBuf,
    pub(super) file: Mutex<File>,
    pub(super) entries: Vec<Entry>,
}

/// An image in a tar.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(super) name: String,
    pub(super) offset: u64,
    pub(super) length: u64,
}

impl Tar {
    fn read(&self, item: usize) -> Result<Vec<u8>, String> {
        let Entry { offset, length, .. } = self.entries[item];
        if length > MAX_IMAGE {
            return Err(format!("{length} bytes are too many for a tile"));
        }
        // Decoding is what takes the time, and that is done beside it.
        let mut file = self.file.lock().map_err(|_| "its reader broke off".to_owned())?;
        file.seek(SeekFrom::Start(offset)).map_err(|e| e.to_string())?;
        let mut bytes = vec![0; length as usize];
        file.read_exact(&mut bytes).map_err(|e| e.to_string())?;
        Ok(bytes)
    }
}

/// What a file says of one of its images.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Sample {
    pub(crate) item: usize,
    /// The slide, with column and row in tiles.
    pub(crate) place: Option<(String, i32, i32)>,
    pub(crate) class: Option<String>,
}

/// A file with what it says of its images, or why it is refused.
pub(crate) type Opened = Result<(Container, Vec<Sample>), String>;

/// Whether a file is compressed as a whole, which nothing can be found in.
pub(crate) fn is_compressed(name: &str) -> bool {
    [".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz"].iter().any(|end| name.ends_with(end))
}
