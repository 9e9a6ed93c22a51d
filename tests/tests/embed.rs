//! `sgclctl embed`, as a user calls it; what it writes, read by h5py, torch and a CLAM-shaped reader, and computed again by torchvision.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use rstest::rstest;
use serde_json::Value;
use sgcl_patchset::PatchSet;
use sgcl_tests::{Programs, Run, S3Server};
use tempfile::TempDir;

/// Largest difference to torchvision, relative to the largest value: rounding of 20 layers in 32 bits.
const ROUNDING: f64 = 1e-4;
/// Side of a patch.
const PX: &str = "64";

fn seed() -> String {
    std::env::var("SGCL_SEED").unwrap_or_else(|_| "3".to_owned())
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn oracle(arguments: &[&str]) -> Vec<Value> {
    let python = std::env::var_os("SGCL_PYTHON").expect("SGCL_PYTHON is not set; run `make setup`");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracles/embed.py");
    // libtorch's own copies must not shadow the ones that Python's torch brings.
    let out = Command::new(python).arg(script).args(arguments).env_remove("LD_LIBRARY_PATH").output().unwrap();
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Drawn slides as .tif, which OpenSlide opens, and the same pixels as .png.
struct Slides {
    folder: TempDir,
    programs: Programs,
    tifs: Vec<PathBuf>,
    pngs: Vec<PathBuf>,
}

impl Slides {
    fn draw(count: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let programs = Programs::find().unwrap();
        let (drawn, pictures) = (folder.path().join("tif"), folder.path().join("png"));
        let number = count.to_string();
        let arguments = ["phantom", "--out", &text(&drawn), "--slides", &number, "--size", "512", "--seed", &seed()];
        let _ = programs.call(&arguments).unwrap().success();
        std::fs::create_dir(&pictures).unwrap();
        let mut tifs: Vec<PathBuf> = std::fs::read_dir(&drawn).unwrap().map(|entry| entry.unwrap().path()).collect();
        tifs.retain(|path| path.extension().is_some_and(|e| e == "tif"));
        tifs.sort();
        let pngs: Vec<PathBuf> =
            tifs.iter().map(|tif| pictures.join(tif.with_extension("png").file_name().unwrap())).collect();
        for (tif, png) in tifs.iter().zip(&pngs) {
            oracle(&["png", &text(tif), &text(png)]);
        }
        Self { folder, programs, tifs, pngs }
    }

    fn path(&self, name: &str) -> String {
        text(&self.folder.path().join(name))
    }

    fn weights(&self, name: &str, arch: &str) -> String {
        let file = self.path(name);
        oracle(&["weights", &file, arch, "5"]);
        file
    }

    fn embed(&self, slides: &[PathBuf], to: &str, weights: &str, more: &[&str]) -> Run {
        let slides: Vec<String> = slides.iter().map(|path| text(path)).collect();
        let mut arguments = vec!["embed", "--to", to, "--weights", weights, "--output", "json", "--device", "cpu"];
        arguments.extend(["--patch-px", PX, "--px", PX]);
        arguments.extend(more);
        arguments.extend(slides.iter().map(String::as_str));
        self.programs.call(&arguments).unwrap()
    }

    fn name(&self, number: usize) -> String {
        self.tifs[number].file_stem().unwrap().to_str().unwrap().to_owned()
    }
}

fn lines(run: &Run) -> Vec<Value> {
    run.stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

fn result(run: &Run) -> Value {
    lines(run).pop().expect("a last line")["result"].clone()
}

fn modified(path: &str) -> SystemTime {
    std::fs::metadata(path).unwrap().modified().unwrap()
}

#[rstest]
#[case::under_a_prefix("w.pth", "resnet18", 512)]
#[case::plain("w.safetensors", "resnet50", 2048)]
fn features_are_those_that_torchvision_computes_at_the_coordinates(
    #[case] file: &str,
    #[case] arch: &str,
    #[case] dim: u64,
) {
    let slides = Slides::draw(1);
    let (to, weights) = (slides.path("features"), slides.weights(file, arch));
    let run =
        slides.embed(&slides.pngs, &to, &weights, &["--level", "0", "--layout", "both", "--name", "enc"]).success();
    let told = result(&run);

    let (name, side) = (slides.name(0), PX.parse::<i64>().unwrap());
    let h5 = format!("{to}/features_enc/{name}.h5");
    let found = &oracle(&["check", &h5, &text(&slides.pngs[0]), arch, "5", PX, PX])[0];
    assert_eq!(found["shape"][1].as_u64(), Some(dim));
    assert_eq!(found["shape"][0], told["patches"]);
    let apart = found["apart"].as_f64().unwrap() / found["largest"].as_f64().unwrap();
    assert!(apart < ROUNDING, "{apart}");
    let coords: Vec<(i64, i64)> = serde_json::from_value(found["coords"].clone()).unwrap();
    assert!(coords.len() > 10 && coords.len() < 64, "{} of 64 tiles have tissue", coords.len());
    assert!(coords.iter().all(|(x, y)| x % side == 0 && y % side == 0));
    assert!(coords.windows(2).all(|pair| (pair[0].1, pair[0].0) < (pair[1].1, pair[1].0)), "row-major, each once");
    let attributes = &found["attributes"];
    assert_eq!((&attributes["patch_size"], &attributes["patch_size_level0"]), (&side.into(), &side.into()));
    assert_eq!((&attributes["name"], &attributes["overlap"]), (&name.as_str().into(), &0.into()));
    assert_eq!(attributes["level0_width"], 512);
    assert_eq!(attributes["savetodir"].as_str().map(|dir| dir.trim_end_matches('/')), Some(to.as_str()));
    assert_eq!(found["features_attributes"]["encoder"], "enc");
    let bag = &oracle(&["clam", &to, &format!("{to}/features_enc"), &name])[0];
    assert_eq!(bag["shape"], found["shape"]);
}

#[test]
fn a_slide_at_half_its_resolution_has_coordinates_of_level_0_and_magnifications() {
    let slides = Slides::draw(1);
    let to = slides.path("features");
    let _ = slides.embed(&slides.tifs, &to, "random", &["--mpp", "1.0"]).success();
    let h5 = format!("{to}/features_random-resnet18-0/{}.h5", slides.name(0));
    let found = &oracle(&["same", &h5, &h5])[0];
    let attributes = &found["attributes"][0];
    for (name, value) in [
        ("patch_size", 64),
        ("patch_size_level0", 128),
        ("level0_magnification", 20),
        ("target_magnification", 10),
        ("level0_height", 512),
    ] {
        assert_eq!(attributes[name], value, "{name} in {attributes}");
    }
    assert_eq!((&attributes["mpp"], &attributes["frame"]), (&1.0.into(), &"pixels of level 0".into()));
}

#[tokio::test]
async fn a_patch_set_gives_the_features_of_its_slides_through_storage_over_http_too() {
    let slides = Slides::draw(2);
    let server = S3Server::start(&slides.folder.path().join("s3"), &["lab"]).unwrap();
    let slides = Slides { programs: Programs::find().unwrap().with(server.environment()), ..slides };
    let weights = slides.weights("w.pth", "resnet18");
    let (set, direct, local) = (slides.path("set"), slides.path("direct"), slides.path("from-set"));
    let more = ["--mpp", "1.0", "--jpeg-quality", "90", "--name", "enc"];
    let run = slides.embed(&slides.tifs, &direct, &weights, &more).success();
    for data in [set.as_str(), "s3://lab/set"] {
        let mut arguments = vec!["ingest", "--to", data, "--patch-px", PX, "--mpp", "1.0"];
        let tifs: Vec<String> = slides.tifs.iter().map(|path| text(path)).collect();
        arguments.extend(tifs.iter().map(String::as_str));
        let _ = slides.programs.call(&arguments).unwrap().success();
    }
    let embed = |data: &str, to: &str| {
        let arguments =
            ["embed", data, "--to", to, "--weights", &weights, "--layout", "both", "--name", "enc", "--px", PX];
        slides.programs.call(&[&arguments[..], &["--output", "json"]].concat()).unwrap().success()
    };
    let from_set = embed(&set, &local);
    assert_eq!(result(&from_set)["patches"], result(&run)["patches"]);
    let far = embed("s3://lab/set", "s3://lab/features");
    assert_eq!(result(&far)["patches"], result(&run)["patches"]);
    assert_eq!(result(&embed("s3://lab/set", "s3://lab/features"))["resumed"], 2);

    let opened = PatchSet::open(&set).await.unwrap();
    let bucket = slides.path("s3/lab/features");
    for slide in &opened.manifest().slides {
        assert_eq!(slide.downsample, Some(2.0));
        let file = format!("features_enc/{}.h5", slide.name);
        for other in [&local, &bucket] {
            let found = &oracle(&["same", &format!("{direct}/{file}"), &format!("{other}/{file}")])[0];
            assert_eq!(found["coords"], true, "{other}");
            // Batches are made of other patches, so sums are rounded otherwise.
            assert!(found["apart"].as_f64().unwrap() < 1e-5, "{other}: {found}");
            assert_eq!(found["patches"], slide.patches);
            assert_eq!(found["attributes"][0]["patch_size_level0"], found["attributes"][1]["patch_size_level0"]);
        }
    }
}

#[test]
fn a_slide_that_is_whole_is_not_computed_again_and_one_that_is_not_is() {
    let slides = Slides::draw(2);
    let (to, weights) = (slides.path("features"), slides.weights("w.pth", "resnet18"));
    let embed = || slides.embed(&slides.pngs, &to, &weights, &["--level", "0", "--layout", "both"]).success();
    let first = embed();
    assert_eq!((&result(&first)["slides"], &result(&first)["resumed"]), (&2.into(), &0.into()));
    let files: Vec<String> = (0..2)
        .flat_map(|n| {
            let name = slides.name(n);
            [
                format!("{to}/features_w/{name}.h5"),
                format!("{to}/h5_files/{name}.h5"),
                format!("{to}/pt_files/{name}.pt"),
            ]
        })
        .collect();
    let times: Vec<SystemTime> = files.iter().map(|file| modified(file)).collect();
    let whole: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();

    let again = embed();
    assert_eq!((&result(&again)["slides"], &result(&again)["resumed"]), (&0.into(), &2.into()));
    assert_eq!(files.iter().map(|file| modified(file)).collect::<Vec<_>>(), times, "nothing is written again");

    // Cut off in the middle, as a copy that broke off leaves it.
    std::fs::write(&files[1], &whole[1][..whole[1].len() / 2]).unwrap();
    let redone = embed();
    assert_eq!((&result(&redone)["slides"], &result(&redone)["resumed"]), (&1.into(), &1.into()));
    // Without its record a slide is not there, whatever its files look like.
    let record = format!("{to}/records/features_w/{}.json", slides.name(1));
    std::fs::remove_file(&record).unwrap();
    std::fs::remove_file(&files[5]).unwrap();
    assert_eq!(result(&embed())["slides"], 1);
    for (file, whole) in files.iter().zip(&whole) {
        assert!(std::fs::read(file).unwrap() == *whole, "{file} is what it was at first");
    }
    // Another slide of the same name.
    std::fs::copy(&slides.pngs[1], &slides.pngs[0]).unwrap();
    assert_eq!((&result(&embed())["slides"], &result(&embed())["resumed"]), (&1.into(), &2.into()));
    assert!(std::fs::read(&files[0]).unwrap() != whole[0]);

    let other = slides.weights("other.safetensors", "resnet50");
    let refused = slides.embed(&slides.pngs, &to, &other, &["--level", "0", "--layout", "clam"]);
    assert_eq!(refused.code, Some(73), "{}", refused.stderr);
    for word in ["records/clam", "encoder: w there, other now", "hint: write to another --to"] {
        assert!(refused.stderr.contains(word), "{word} in {}", refused.stderr);
    }
}

#[test]
fn what_was_written_for_trident_says_where_patches_lie_when_it_is_read_again() {
    let slides = Slides::draw(1);
    let (to, again) = (slides.path("features"), slides.path("again"));
    let more = ["--mpp", "1.0", "--name", "enc"];
    let _ = slides.embed(&slides.tifs, &to, "random", &more).success();
    let h5 = PathBuf::from(format!("{to}/features_enc/{}.h5", slides.name(0)));
    // Without --mpp: the file's scale counts.
    let run = slides.embed(&[slides.tifs[0].clone(), h5.clone()], &again, "random", &["--name", "enc"]).success();
    let found = &oracle(&["same", &text(&h5), &format!("{again}/features_enc/{}.h5", slides.name(0))])[0];
    assert_eq!((&found["coords"], &found["patches"]), (&true.into(), &result(&run)["patches"]));
    assert!(found["apart"].as_f64().unwrap() < 1e-5, "{found}");
    assert_eq!(found["attributes"][0]["patch_size_level0"], found["attributes"][1]["patch_size_level0"]);
}

#[test]
fn a_dry_run_counts_and_writes_nothing() {
    let slides = Slides::draw(1);
    let to = slides.path("features");
    let dry = slides.embed(&slides.pngs, &to, "random", &["--level", "0", "--dry-run"]).success();
    let told = &lines(&dry)[0];
    assert!(!Path::new(&to).exists());
    let run = slides.embed(&slides.pngs, &to, "random", &["--level", "0"]).success();
    assert_eq!(told["patches"], result(&run)["patches"]);
    assert_eq!(told["slides"][0]["name"], slides.name(0));
}

#[test]
fn what_cannot_be_embedded_is_named_with_what_to_do() {
    let slides = Slides::draw(1);
    let to = slides.path("features");
    let good = slides.weights("good.pth", "resnet50");
    let evil = slides.path("evil.pth");
    oracle(&["evil", &evil]);
    let (empty, note) = (slides.path("empty.pth"), slides.folder.path().join("png/note.svs"));
    std::fs::write(&empty, "").unwrap();
    std::fs::write(&note, "no slide").unwrap();
    let tiles = slides.folder.path().join("tiles/class/s");
    std::fs::create_dir_all(&tiles).unwrap();
    std::fs::copy(&slides.pngs[0], tiles.join("s_0_0_0.png")).unwrap();
    let tiles = vec![slides.folder.path().join("tiles")];

    let missing = slides.path("missing.pth");
    for (given, weights, more, code, words) in [
        (&slides.pngs, "missing", vec![], 64, vec!["missing is neither `random` nor a file", "--bucket"]),
        (&slides.pngs, missing.as_str(), vec!["--bucket", "nowhere"], 64, vec!["missing.pth"]),
        (&slides.pngs, empty.as_str(), vec![], 65, vec!["empty.pth", "the file is empty"]),
        (&slides.pngs, evil.as_str(), vec![], 65, vec!["evil.pth is refused", "system"]),
        (&slides.pngs, good.as_str(), vec!["--arch", "resnet18"], 65, vec!["good.pth", "architecture"]),
        (&slides.pngs, "random", vec!["--name", "a/b"], 64, vec!["\"a/b\" cannot name an encoder"]),
        (&slides.pngs, "random", vec!["--tissue-min", "7"], 64, vec!["--tissue-min"]),
        (&tiles, "random", vec![], 65, vec!["holds tiles, not slides", "sgclctl ingest"]),
    ] {
        let level = ["--level", "0"];
        let run = slides.embed(given, &to, weights, &[&level[..], &more].concat());
        assert_eq!(run.code, Some(code), "{weights} {more:?}: {}", run.stderr);
        for word in words {
            assert!(run.stderr.contains(word), "{word} for {weights} {more:?} in {}", run.stderr);
        }
    }
    assert!(!Path::new(&format!("{evil}.ran")).exists(), "a pickle was executed");
    assert!(!Path::new(&to).exists(), "nothing was written");

    // A file that is no slide is left out and named; the others are embedded.
    let mixed = [slides.pngs.clone(), vec![note]].concat();
    let run = slides.embed(&mixed, &to, "random", &["--level", "0"]);
    assert_eq!(run.code, Some(65), "{}", run.stderr);
    let told = result(&run);
    assert_eq!(told["slides"], 1);
    assert!(told["skipped"][0]["source"].as_str().unwrap().ends_with("note.svs"), "{told}");
    assert!(told["skipped"][0]["reason"].as_str().unwrap().contains("neither a slide"), "{told}");
}
