//! What the paths on the command line stand for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use rand::seq::SliceRandom;
use sgcl_draw::{Purpose, rng};

use super::container::{self, Opened, Origin, Sample};
use super::tiles::{Tile, Tiles};
use super::whole::{self, Plan};
use super::{GROUP, IngestError, IngestOptions, Skipped, SlideError, labels, list, parquet, polygons, webdataset};

/// Most files of a folder that are looked at.
const MAX_FILES: usize = 20_000_000;

/// Something that becomes a slide of the set.
#[derive(Debug)]
pub(crate) struct Unit {
    pub(crate) name: String,
    pub(crate) source: String,
    pub(crate) fingerprint: String,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Whole(Whole),
    Tiles(Tiles),
}

/// A slide, with what other programs said about it.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) path: PathBuf,
    /// Where its patches lie: CLAM's or TRIDENT's .h5.
    pub(crate) places: Given,
    /// What is on it: ASAP's .xml.
    pub(crate) annotations: Given,
}

/// A file about a slide.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Given {
    /// No slide has one.
    Nothing,
    /// This one.
    File(PathBuf),
    /// Other slides have one.
    Missing,
}

/// Files about slides, by the slides' names.
#[derive(Default)]
struct Companions {
    places: BTreeMap<String, PathBuf>,
    annotations: BTreeMap<String, PathBuf>,
}

impl Companions {
    /// Whether `path` is such a file; then it is kept.
    fn take(&mut self, path: &Path) -> Result<bool, IngestError> {
        let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
        let (files, name) = match extension.as_str() {
            "h5" => (&mut self.places, name.strip_suffix("_patches").unwrap_or(&name).to_owned()),
            "xml" if polygons::is_asap(path) => (&mut self.annotations, name),
            _ => return Ok(false),
        };
        match files.insert(name, path.to_owned()) {
            None => Ok(true),
            Some(first) => Err(bad(path, &format!("is about the same slide as {}; give one of them", first.display()))),
        }
    }

    /// Gives every slide its files.
    fn join(mut self, units: &mut [Unit]) -> Result<(), IngestError> {
        let (placed, annotated) = (!self.places.is_empty(), !self.annotations.is_empty());
        let given = |files: &mut BTreeMap<String, PathBuf>, name: &str, any: bool| match files.remove(name) {
            Some(file) => Given::File(file),
            None if any => Given::Missing,
            None => Given::Nothing,
        };
        for unit in units {
            let Kind::Whole(whole) = &mut unit.kind else { continue };
            whole.places = given(&mut self.places, &unit.name, placed);
            whole.annotations = given(&mut self.annotations, &unit.name, annotated);
            unit.fingerprint = whole.fingerprint();
        }
        match self.places.into_iter().chain(self.annotations).next() {
            Some((name, file)) => {
                Err(bad(&file, &format!("is about a slide {name}, which is not among the sources; name it too")))
            }
            None => Ok(()),
        }
    }
}

impl Whole {
    fn fingerprint(&self) -> String {
        let sidecars = labels::sidecars(&self.path);
        let given = [&self.places, &self.annotations].into_iter().filter_map(|given| match given {
            Given::File(file) => Some(file.as_path()),
            Given::Nothing | Given::Missing => None,
        });
        state([self.path.as_path()].into_iter().chain(sidecars.iter().map(PathBuf::as_path)).chain(given))
    }
}

impl Unit {
    /// What an earlier ingest left out of it, where it made `kept` patches. Of a slide that is for tissue detection to say.
    pub(crate) fn left_out(&self, kept: u32) -> Option<Skipped> {
        let Kind::Tiles(Tiles { tiles, .. }) = &self.kind else { return None };
        let missing = tiles.len().saturating_sub(kept as usize);
        (missing > 0).then(|| Skipped {
            source: self.source.clone(),
            reason: format!("{missing} of its {} images could not be read when {} was made", tiles.len(), self.name),
        })
    }

    /// Whether somebody else cut it into tiles.
    pub(crate) fn is_tiles(&self) -> bool {
        matches!(self.kind, Kind::Tiles(_))
    }

    /// Whether annotations label its patches.
    pub(crate) fn is_annotated(&self) -> bool {
        matches!(&self.kind, Kind::Whole(Whole { annotations: Given::File(_), .. }))
    }

    fn is_loose(&self) -> bool {
        matches!(self.kind, Kind::Tiles(Tiles { spatial: false, .. }))
    }

    /// Opens it and decides what will be read.
    pub(crate) fn plan(self, options: &IngestOptions) -> Result<Plan, SlideError> {
        match self.kind {
            Kind::Whole(whole) => whole::plan(&whole, &self.name, self.fingerprint, options),
            Kind::Tiles(tiles) => tiles.plan(self.name, self.source, self.fingerprint, options),
        }
    }
}

/// Everything under `sources`, each with a name of its own; with a `list`, the tiles that it names below one folder.
pub(crate) fn discover(sources: &[PathBuf], list: Option<&Path>, seed: u64) -> Result<Vec<Unit>, IngestError> {
    let (mut units, mut companions) = (Vec::new(), Companions::default());
    let mut packed = Packed::default();
    if let Some(list) = list {
        listed(sources, list, seed, &mut units)?;
    }
    for source in sources.iter().filter(|_| list.is_none()) {
        if source.is_dir() {
            folder(source, seed, &mut units, &mut companions, &mut packed)?;
        } else if source.is_file() && packed.take(source)? {
            // Its tiles go in with those of the others.
        } else if source.is_file() && companions.take(source)? {
            // It goes in with its slide.
        } else if source.is_file() && is_sidecar(source) {
            // `slides/*` names the label maps too; they go in with their slides.
        } else if source.is_file() {
            units.push(whole_unit(source)?);
        } else {
            return Err(bad(source, "no such file or folder"));
        }
    }
    companions.join(&mut units)?;
    packed.join(seed, &mut units);
    if units.is_empty() {
        let given: Vec<String> = sources.iter().map(|s| s.display().to_string()).collect();
        return Err(IngestError::Source { path: given.join(", "), reason: "holds no slide, image or tile".into() });
    }
    let mut seen: BTreeMap<&str, &str> = BTreeMap::new();
    for unit in &units {
        if let Some(first) = seen.insert(&unit.name, &unit.source) {
            let (name, first, second) = (unit.name.clone(), first.to_owned(), unit.source.clone());
            return Err(IngestError::Twins { name, first, second });
        }
    }
    Ok(units)
}

/// A folder of classes (of slides of tiles, or of images), or of slides.
fn folder(
    root: &Path,
    seed: u64,
    units: &mut Vec<Unit>,
    companions: &mut Companions,
    packed: &mut Packed,
) -> Result<(), IngestError> {
    let mut found = Found::default();
    let mut files = Vec::new();
    for class in list(root)? {
        if !class.is_dir() {
            files.push(class);
            continue;
        }
        let label = file_name(&class);
        for entry in list(&class)? {
            if entry.is_dir() {
                let slide = file_name(&entry);
                for tile in list(&entry)?.into_iter().filter(|path| is_image(path)) {
                    let (x, y) = place(&tile, &slide)?;
                    let tile = Tile { origin: Origin::File(tile), x, y, class: Some(label.clone()) };
                    found.slides.entry(slide.clone()).or_default().push(tile);
                }
            } else if is_image(&entry) {
                found.loose.push(Tile { origin: Origin::File(entry), x: 0, y: 0, class: Some(label.clone()) });
            }
        }
    }
    // Slides may lie beside folders of tiles.
    for file in files {
        if !companions.take(&file)? && !packed.take(&file)? && !is_sidecar(&file) {
            units.push(whole_unit(&file)?);
        }
    }
    found.join(&root.display().to_string(), None, seed, units);
    Ok(())
}

/// The tiles that a list names below a folder. One called `<slide>/<slide>_<x>_<y>_<level>.png` has its place by that. Classes are the
/// list's labels; those of a list without any are the folders above the slides'.
fn listed(sources: &[PathBuf], list: &Path, seed: u64, units: &mut Vec<Unit>) -> Result<(), IngestError> {
    let [root] = sources else {
        return Err(IngestError::Setting("--list wants one source: the folder that its paths begin in".into()));
    };
    let mut found = Found::default();
    let lines = list::read(list).map_err(|reason| bad(list, &reason))?;
    let labelled = lines.iter().any(|line| line.label.is_some());
    for line in lines {
        let path = root.join(&line.path);
        if !path.is_file() {
            return Err(bad(
                list,
                &format!("names {}, which is no file below {}", line.path.display(), root.display()),
            ));
        }
        let above =
            |path: &Path| path.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
        let slide = above(&line.path).and_then(|slide| place(&path, &slide).ok().map(|(x, y)| (slide, x, y)));
        let class = if labelled { line.label } else { line.path.parent().and_then(above) };
        let (x, y) = slide.as_ref().map_or((0, 0), |&(_, x, y)| (x, y));
        let tile = Tile { origin: Origin::File(path), x, y, class };
        match slide {
            Some((slide, ..)) => found.slides.entry(slide).or_default().push(tile),
            None => found.loose.push(tile),
        }
    }
    found.join(&list.display().to_string(), Some(list), seed, units);
    Ok(())
}

/// Tiles that somebody else cut, by slide where they have a place.
#[derive(Default)]
struct Found {
    slides: BTreeMap<String, Vec<Tile>>,
    loose: Vec<Tile>,
}

impl Found {
    /// Makes units of them; `told` is a file that says something about them all.
    fn join(self, source: &str, told: Option<&Path>, seed: u64, units: &mut Vec<Unit>) {
        let Self { slides, mut loose } = self;
        for (name, tiles) in slides {
            let source = format!("{name} in {source}");
            let fingerprint = state_of_tiles(&tiles, told);
            units.push(Unit { name, source, fingerprint, kind: Kind::Tiles(Tiles { tiles, spatial: true }) });
        }
        loose.shuffle(&mut rng(seed, Purpose::Ingest, 0, 1));
        let mut loose = loose.into_iter().peekable();
        // Sources given together number on.
        let first = units.iter().filter(|unit| unit.is_loose()).count();
        for number in first.. {
            let mut tiles: Vec<Tile> = loose.by_ref().take(GROUP).collect();
            if tiles.is_empty() {
                break;
            }
            // Far enough apart that no radius makes neighbours of them.
            for (tile, x) in tiles.iter_mut().zip((0..).step_by(1000)) {
                tile.x = x;
            }
            let fingerprint = state_of_tiles(&tiles, told);
            units.push(Unit {
                name: format!("loose-{number:03}"),
                source: source.to_owned(),
                fingerprint,
                kind: Kind::Tiles(Tiles { tiles, spatial: false }),
            });
        }
    }
}

/// Files that hold many images: WebDataset's tars, Parquet. Together they are one dataset, however it is cut into files.
#[derive(Default)]
struct Packed {
    found: Found,
    files: Vec<PathBuf>,
}

impl Packed {
    /// Whether `path` is such a file; then its images are found.
    fn take(&mut self, path: &Path) -> Result<bool, IngestError> {
        let name = file_name(path).to_lowercase();
        if container::is_compressed(&name) {
            return Err(bad(path, "is compressed as a whole; unpack it to .tar first"));
        }
        let open: fn(&Path) -> Opened = if name.ends_with(".tar") {
            webdataset::open
        } else if name.ends_with(".parquet") {
            parquet::open
        } else {
            return Ok(false);
        };
        let (container, samples) = open(path).map_err(|reason| bad(path, &reason))?;
        let container = Arc::new(container);
        for Sample { item, place, class } in samples {
            let (slide, x, y) = place.map_or((None, 0, 0), |(slide, x, y)| (Some(slide), x, y));
            let tile = Tile { origin: Origin::Part(Arc::clone(&container), item), x, y, class };
            match slide {
                Some(slide) => self.found.slides.entry(slide).or_default().push(tile),
                None => self.found.loose.push(tile),
            }
        }
        self.files.push(path.to_owned());
        Ok(true)
    }

    fn join(self, seed: u64, units: &mut Vec<Unit>) {
        let Some(first) = self.files.first() else { return };
        let source = match self.files.len() - 1 {
            0 => first.display().to_string(),
            more => format!("{} and {more} more", first.display()),
        };
        self.found.join(&source, None, seed, units);
    }
}

fn whole_unit(path: &Path) -> Result<Unit, IngestError> {
    let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    path.metadata().map_err(|e| bad(path, &e.to_string()))?;
    let whole = Whole { path: path.to_owned(), places: Given::Nothing, annotations: Given::Nothing };
    let fingerprint = whole.fingerprint();
    Ok(Unit { name, source: path.display().to_string(), fingerprint, kind: Kind::Whole(whole) })
}

/// Tells one state of some files from another: their names, lengths and times of change. A file that is not there counts as such.
fn state<'a>(files: impl Iterator<Item = &'a Path>) -> String {
    let mut hasher = blake3::Hasher::new();
    for file in files {
        let meta = file.metadata().ok();
        let modified = meta.as_ref().and_then(|meta| meta.modified().ok()?.duration_since(UNIX_EPOCH).ok());
        let length = meta.map(|meta| meta.len());
        hasher.update(format!("{}\0{length:?} {modified:?}\0", file_name(file)).as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

/// The same of tiles, by their own files or by those they lie in.
fn state_of_tiles(tiles: &[Tile], told: Option<&Path>) -> String {
    let files: Option<Vec<&Path>> = tiles
        .iter()
        .map(|tile| match &tile.origin {
            Origin::File(path) => Some(path.as_path()),
            Origin::Part(..) => None,
        })
        .collect();
    if let Some(files) = files {
        return state(told.into_iter().chain(files));
    }
    let mut hasher = blake3::Hasher::new();
    let mut states: BTreeMap<&Path, String> = BTreeMap::new();
    for tile in tiles {
        let path = match &tile.origin {
            Origin::File(path) => path.as_path(),
            Origin::Part(container, _) => container.path(),
        };
        let state = states.entry(path).or_insert_with(|| state([path].into_iter()));
        hasher
            .update(format!("{state} {} {:?} {} {}\0", tile.origin.describe(), tile.class, tile.x, tile.y).as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

/// x and y of `<slide>_<x>_<y>_<level>.png`.
fn place(tile: &Path, slide: &str) -> Result<(i32, i32), IngestError> {
    let stem = tile.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let parse = || {
        let mut numbers = stem.strip_prefix(slide)?.strip_prefix('_')?.split('_');
        let place = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
        let _level: u32 = numbers.next()?.parse().ok()?;
        numbers.next().is_none().then_some(place)
    };
    parse().ok_or_else(|| {
        bad(tile, &format!("a tile of {slide} is named {slide}_<x>_<y>_<level>, x and y counting tiles"))
    })
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, IngestError> {
    let entries = std::fs::read_dir(folder).map_err(|e| bad(folder, &e.to_string()))?;
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| bad(folder, &e.to_string()))?.path();
        if !file_name(&path).starts_with('.') {
            paths.push(path);
        }
        if paths.len() > MAX_FILES {
            return Err(bad(folder, "more files than are taken from one folder (20,000,000)"));
        }
    }
    paths.sort();
    Ok(paths)
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    matches!(extension.as_str(), "png" | "jpg" | "jpeg" | "tif" | "tiff" | "bmp")
}

/// Labels that lie beside slides, and other notes.
fn is_sidecar(path: &Path) -> bool {
    let name = file_name(path).to_lowercase();
    name.ends_with(".labels.png") || [".json", ".csv", ".md", ".txt", ".xml"].iter().any(|end| name.ends_with(end))
}

fn bad(path: &Path, reason: &str) -> IngestError {
    IngestError::Source { path: path.display().to_string(), reason: reason.to_owned() }
}
