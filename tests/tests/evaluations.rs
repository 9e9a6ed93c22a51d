//! Evaluations and embeddings that a run's configuration names, as a user has them: made behind the export, kept with the run, made again where missing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::path::Path;

use serde_json::Value;
use sgcl_patchset::Store;
use sgcl_tests::{Programs, Run};
use support::{patch_set, textured};

/// Patches to train on, and others with labels.
fn place() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let open = |name: &str| Store::open(folder.path().join(name).to_str().unwrap()).unwrap();
    runtime.block_on(async {
        patch_set(&open("patches"), 2, 6).await;
        patch_set(&open("labelled"), 4, 6).await;
        patch_set(&open("damaged"), 4, 5).await;
        textured(&open("unlabelled"), 2, 3, false).await;
    });
    folder
}

fn at(folder: &Path, name: &str) -> String {
    folder.join(name).display().to_string()
}

/// `sgclctl` in the folder, with features cached there.
fn call(folder: &Path, words: &[&str]) -> Run {
    let programs = Programs::find().unwrap().with(vec![("SGCL_CACHE", at(folder, "cache"))]);
    programs.call(words).unwrap()
}

fn train(folder: &Path, name: &str, evaluations: &str, more: &[&str]) -> Run {
    let config = format!(
        "epochs: 1\ndevice: cpu\nviews: {{global_px: 32, local_px: 32}}\nbatch: {{per_rank: 8}}\nkmeans: {{clusters: 4, iterations: 5}}\n\
         objective: {{negatives: 64, hard: 4, nearest: 16}}\nevaluations:\n{evaluations}"
    );
    let file = folder.join(format!("{name}.yaml"));
    std::fs::write(&file, config).unwrap();
    let (data, bucket) = (at(folder, "patches"), at(folder, "bucket"));
    let mut words = vec!["run", "--local", "--data", &data, "--bucket", &bucket, "--name", name, "--output", "json"];
    words.extend(["-f", file.to_str().unwrap()]);
    words.extend(more);
    call(folder, &words)
}

fn evals(folder: &Path, run: &str) -> Value {
    let bucket = at(folder, "bucket");
    let told = call(folder, &["status", run, "--bucket", &bucket, "--output", "json"]).success().stdout;
    serde_json::from_str::<Value>(&told).unwrap()["evals"].take()
}

#[test]
fn evaluations_are_made_behind_the_export_and_are_what_eval_finds() {
    let folder = place();
    let (folder, labelled) = (folder.path(), at(folder.path(), "labelled"));
    let named = format!(
        "- {{name: grain, dataset: '{labelled}', baselines: [random]}}\n\
         - {{name: tuned, dataset: '{labelled}', protocol: [finetune], labels: [50], epochs: 2, trials: 2, seed: 3}}\n\
         embeddings:\n- {{name: atlas, dataset: '{unlabelled}', layout: both}}\n",
        unlabelled = at(folder, "unlabelled")
    );
    let run = train(folder, "first", &named, &[]).success();
    let lines: Vec<Value> = run.stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let evaluated: Vec<&Value> =
        lines.iter().map(|line| &line["evaluated"]["evaluation"]).filter(|e| e.is_string()).collect();
    assert_eq!(evaluated, ["grain", "tuned"]);
    let embedded = lines.iter().find_map(|line| line.get("embedded")).expect("nothing was embedded");
    assert_eq!((&embedded["embedding"], &embedded["result"]["slides"]), (&"atlas".into(), &2.into()));
    assert_eq!(lines.last().unwrap()["ended"]["outcome"], "finished");

    let kept = evals(folder, "first");
    let names: Vec<&str> = kept.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(names, ["first-grain", "first-tuned", "random-grain"]);
    let bucket = at(folder, "bucket");
    let eval = |more: &[&str]| -> Vec<Value> {
        let words = ["eval", "--data", &labelled, "--bucket", &bucket, "--output", "json", "--weights", "first"];
        let told = call(folder, &[&words, more].concat()).success().stdout;
        told.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let figures = |result: &Value| -> Vec<Value> {
        let found = result["protocols"].as_array().unwrap().iter();
        found.map(|found| serde_json::json!([found["protocol"], found["accuracy"], found["roc_auc"]])).collect()
    };
    let typed = eval(&["random"]);
    assert_eq!(figures(&kept["first-grain"]), figures(&typed[0]));
    assert_eq!(figures(&kept["random-grain"]), figures(&typed[1]));
    let tuned = ["--protocol", "finetune", "--labels", "50%", "--epochs", "2", "--trials", "2", "--seed", "3"];
    assert_eq!(figures(&kept["first-tuned"]), figures(&eval(&tuned)[0]));
    assert_eq!(kept["first-tuned"]["protocols"][0]["protocol"], "finetune-50%");
    let all = evals(folder, "first");
    assert!(
        all["first"]["knn"]["20"].is_number() && all["first-finetune"].is_object(),
        "one took the other's place: {all}"
    );

    let text = call(folder, &["status", "first", "--bucket", &bucket]).success().stdout;
    let row =
        |name: &str| text.lines().find(|line| line.starts_with("evaluated") && line.contains(name)).unwrap_or(&text);
    assert!(row("first-grain").contains("knn-20 ") && row("first-grain").contains("linear "), "{text}");
    assert!(row("first-tuned").contains("finetune-50% "), "{text}");
    let atlas = text.lines().find(|line| line.starts_with("embedded"));
    assert!(
        atlas.is_some_and(|line| line.contains("atlas: features of 18 patches of 2 slide(s), 512 numbers each")),
        "{text}"
    );
    same_features(folder, &bucket);

    // What is there of these weights is not made again; what is asked for otherwise is, and what has come to be missing.
    std::fs::remove_file(folder.join("bucket/runs/first/eval/first-tuned.json")).unwrap();
    let made = kept["first-grain"]["time"].clone();
    let run = train(folder, "first", &named, &["--resume"]).success();
    for words in ["evaluation grain is there", "embedding atlas is there"] {
        assert!(run.stderr.contains(words), "{words:?} is not in {}", run.stderr);
    }
    let again = evals(folder, "first");
    assert_eq!(again["first-grain"]["time"], made);
    assert_eq!(figures(&again["first-tuned"]), figures(&kept["first-tuned"]));

    let page = at(folder, "report.html");
    let _ = call(folder, &["report", "first", "--bucket", &bucket, "--out", &page]).success();
    let page = std::fs::read_to_string(page).unwrap();
    for words in ["first (grain)", "random (grain)", "finetune-50%, accuracy"] {
        assert!(page.contains(words), "{words:?} is not in the report");
    }
}

/// An embedding's features are, byte for byte, those that `embed` writes; HDF5 files name their folder besides.
fn same_features(folder: &Path, bucket: &str) {
    let typed = at(folder, "typed");
    let words = [
        "embed",
        &at(folder, "unlabelled"),
        "--weights",
        "first",
        "--bucket",
        bucket,
        "--to",
        &typed,
        "--layout",
        "both",
    ];
    let _ = call(folder, &words).success();
    let exports = std::fs::read_dir(folder.join("bucket/runs/first/features")).unwrap();
    let commits: Vec<_> = exports.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(commits.len(), 1, "{commits:?}");
    let mut compared = 0;
    for layout in ["features_first", "h5_files", "pt_files"] {
        for file in std::fs::read_dir(Path::new(&typed).join(layout)).unwrap() {
            let file = file.unwrap();
            let kept = commits[0].join("atlas").join(layout).join(file.file_name());
            let [kept_bytes, typed_bytes] = [&kept, &file.path()].map(|path| std::fs::read(path).unwrap());
            assert!(
                !kept_bytes.is_empty() && (layout != "pt_files" || kept_bytes == typed_bytes),
                "{}",
                kept.display()
            );
            compared += 1;
        }
    }
    assert_eq!(compared, 6, "two slides in three files each");
}

#[test]
fn an_evaluation_that_fails_is_named_and_the_run_is_whole() {
    let folder = place();
    let folder = folder.path();
    // Its manifest is whole, which is all that is looked at before the run.
    for shard in std::fs::read_dir(folder.join("damaged/shards")).unwrap() {
        std::fs::write(shard.unwrap().path(), "no tar").unwrap();
    }
    let (damaged, labelled) = (at(folder, "damaged"), at(folder, "labelled"));
    let named = format!(
        "- {{name: torn, dataset: '{damaged}', protocol: [knn]}}\n- {{name: whole, dataset: '{labelled}', protocol: [knn]}}\n"
    );
    let run = train(folder, "second", &named, &[]);
    assert_eq!(run.code, Some(65), "{}", run.stderr);
    for words in
        ["evaluation torn: ", "00000.tar", "finished and exported, but not made: torn", "sgclctl resume second"]
    {
        assert!(run.stderr.contains(words), "{words:?} is not in {}", run.stderr);
    }
    let kept = evals(folder, "second");
    let names: Vec<&str> = kept.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(names, ["second-whole"]);
    assert!(folder.join("bucket/runs/second/exports").is_dir());
}

#[test]
fn evaluations_that_cannot_be_are_configuration_errors_before_anything_is_trained() {
    let folder = place();
    let folder = folder.path();
    let (missing, unlabelled, labelled) = (at(folder, "missing"), at(folder, "unlabelled"), at(folder, "labelled"));
    for (named, words) in [
        (format!("- {{name: a, dataset: '{missing}'}}\n"), "no patch set here"),
        (
            format!("- {{name: a, dataset: '{labelled}'}}\n- {{name: b, dataset: '{unlabelled}'}}\n"),
            "no patch has a label",
        ),
        (format!("- {{name: a, dataset: '{labelled}'}}\n- {{name: a, dataset: '{labelled}'}}\n"), "is that of another"),
        (format!("- {{name: detection, dataset: '{labelled}'}}\n"), "is taken"),
        ("- {name: a}\n".to_owned(), "evaluations[0].dataset is missing"),
        (format!("- {{name: a, dataset: '{labelled}', labels: [0]}}\n"), "labels 0"),
        (format!("- {{name: a, dataset: '{labelled}', protocol: [svm]}}\n"), "svm"),
        (
            format!("- {{name: a, dataset: '{labelled}'}}\nembeddings:\n- {{name: a, dataset: '{unlabelled}'}}\n"),
            "embeddings[0].name \"a\" is that of another",
        ),
        (
            format!("- {{name: a, dataset: '{labelled}'}}\nembeddings:\n- {{name: b, dataset: '{missing}'}}\n"),
            "embeddings[0].dataset",
        ),
    ] {
        let run = train(folder, "third", &named, &[]);
        assert_eq!(run.code, Some(78), "{named}: {}", run.stderr);
        assert!(run.stderr.contains(words), "{words:?} is not in {}", run.stderr);
    }
    assert!(!folder.join("bucket/runs/third").exists(), "a run that was refused is there");
}
