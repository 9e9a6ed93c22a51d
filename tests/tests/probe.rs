//! The online probe: what it finds, that a run with it is the same run, and what becomes of it when ranks are lost.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sgcl_coordinator::{Change, Outcome};
use sgcl_patchset::{PatchSet, Store};
use sgcl_runstore::verify::verify;
use sgcl_runstore::{Commits, ProbeSet, RunConfig, RunStatus, Spec, StepMetrics, read_metrics};
use sgcl_tests::Programs;
use support::{Place, Running, config, patch_set, place, processes, start, state, textured, train, worker};

impl Place {
    /// A configuration that probes on a set, the run's own unless another is given.
    fn probing(&self, dataset: Option<&str>, sets: &[&str]) -> RunConfig {
        let dataset = format!("probe.dataset={}", dataset.unwrap_or(&self.data));
        config(&[&[dataset.as_str(), "probe.every_epochs=1"][..], sets].concat())
    }
}

fn accuracy(step: &StepMetrics) -> Option<f64> {
    step.values.get("probe/accuracy").copied()
}

/// (epoch, whether the step was the epoch's last) of the steps that have a probe's figures.
fn probed(metrics: &[StepMetrics]) -> Vec<(u32, bool)> {
    let of = |step: &StepMetrics| (step.epoch, step.epoch_step == step.epoch_steps);
    metrics.iter().filter(|step| accuracy(step).is_some()).map(of).collect()
}

#[rstest::rstest]
#[case::sgcl(1, &[])]
// Two encoders with running statistics, over all ranks.
#[case::moco_v2(2, &["bank.momentum=0", "method=moco-v2", "backbone.sync_norm=true"])]
#[tokio::test(flavor = "multi_thread")]
async fn a_run_with_probes_trains_bit_for_bit_what_one_without_does(#[case] ranks: u32, #[case] sets: &[&str]) {
    let place = place(3, 7).await;
    let sets = [sets, &["data.holdout_fraction=0.3"]].concat();
    assert_eq!(train(&place.bucket, &place.data, "plain", 1, ranks, config(&sets)).await, Outcome::Finished);
    let probing = place.probing(None, &sets);
    assert_eq!(train(&place.bucket, &place.data, "probed", 1, ranks, probing).await, Outcome::Finished);

    let (plain, with) = (state(&place.run("plain")).await, state(&place.run("probed")).await);
    assert_eq!(plain.len(), with.len());
    for ((name, a), (other, b)) in plain.iter().zip(&with) {
        assert_eq!(name, other);
        assert!(a.shape == b.shape && a.data == b.data, "{name} differs");
    }
    let plain = read_metrics(&place.run("plain")).await.unwrap();
    let with = read_metrics(&place.run("probed")).await.unwrap();
    assert_eq!(plain.len(), with.len());
    for (a, b) in plain.iter().zip(&with) {
        for (name, value) in a.values.iter().filter(|(name, _)| *name != "samples_per_second") {
            assert_eq!(Some(value), b.values.get(name), "{name} of step {}", a.step);
        }
    }
    assert_eq!(probed(&plain), []);
    assert_eq!(probed(&with), [(0, true), (1, true)]);
    for name in ["accuracy", "balanced_accuracy", "macro_f1", "roc_auc"] {
        let value = with.last().unwrap().values[&format!("probe/{name}")];
        assert!((0.0..=1.0).contains(&value), "{name} {value}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_probe_finds_what_evaluation_finds_of_the_exported_weights() {
    let place = place(4, 8).await;
    let sets = ["data.holdout_fraction=0.3", "epochs=3", "probe.every_epochs=2"];
    let probing = place.probing(None, &sets);
    assert_eq!(train(&place.bucket, &place.data, "scored", 1, 2, probing).await, Outcome::Finished);
    let metrics = read_metrics(&place.run("scored")).await.unwrap();
    assert_eq!(probed(&metrics), [(1, true), (2, true)], "every second epoch, and the last");
    let status = RunStatus::read(&place.run("scored")).await.unwrap();
    let probe = status.probe.unwrap();
    assert_eq!((probe.epoch, probe.step), (2, metrics.last().unwrap().step));

    let bucket = place.folder.path().join("bucket").display().to_string();
    let cache = place.folder.path().join("features").display().to_string();
    let mut command = Command::new(worker());
    command.args(["eval", "--data", &place.data, "--bucket", &bucket, "--weights", "scored"]);
    let out = command.args(["--protocol", "knn", "--cache", &cache]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let lines = String::from_utf8(out.stdout).unwrap();
    let result: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    let result = &result["result"];
    let tested = result["test_patches"].as_f64().unwrap();
    assert_eq!(tested, 64.0);
    let twenty = &result["protocols"][1];
    assert_eq!(twenty["protocol"], "knn-20");
    for name in ["accuracy", "balanced_accuracy"] {
        let (online, after) = (probe.figures[name], twenty[name]["value"].as_f64().unwrap());
        // Batches of another size may be rounded otherwise.
        assert!((online - after).abs() <= 2.0 / tested, "{name}: {online} online, {after} of the weights");
    }
}

async fn until_probing(running: &mut Running, step: u64) {
    let wait = running.view.wait_for(|view| view.phase == "probe" && view.step > step);
    tokio::time::timeout(Duration::from_secs(120), wait).await.expect("no probe for two minutes").unwrap();
}

async fn changes(running: &mut Running, count: usize) -> Vec<Change> {
    let wait = running.view.wait_for(|view| view.changes.len() >= count);
    let view = tokio::time::timeout(Duration::from_secs(120), wait).await.expect("no change for two minutes").unwrap();
    view.changes.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_that_are_killed_or_leave_in_the_middle_of_a_probe_cost_no_step_and_the_probe_is_made_anew() {
    let place = place(2, 9).await;
    // Enough patches for the signal to come before the end of them.
    let large = place.folder.path().join("large").display().to_string();
    patch_set(&Store::open(&large).unwrap(), 3, 14).await;
    let probing = place.probing(Some(&large), &["epochs=6", "max_restarts=10"]);
    let mut running = start(&place.bucket, &place.data, "broken", 2, 1, probing).await;

    until_probing(&mut running, 0).await;
    let rank = processes("broken").into_iter().rfind(|process| process.local_rank.is_some()).unwrap();
    assert!(rank.signal(Signal::SIGKILL));
    let seen = changes(&mut running, 2).await;
    assert_eq!((seen[0].failure, seen[0].steps_lost, seen[0].from_commit, seen[0].world), (true, 0, None, 1));
    assert_eq!((seen[1].steps_lost, seen[1].world), (0, 2), "{seen:?}");

    until_probing(&mut running, seen[1].step).await;
    let node = processes("broken").into_iter().rfind(|process| process.local_rank.is_none()).unwrap();
    assert!(node.signal(Signal::SIGTERM));
    let seen = changes(&mut running, 3).await;
    assert_eq!((seen[2].failure, seen[2].steps_lost, seen[2].from_commit), (false, 0, None), "{seen:?}");

    let outcome = tokio::time::timeout(Duration::from_secs(300), running.outcome).await.expect("never ends").unwrap();
    assert_eq!(outcome, Outcome::Finished);
    let run = place.run("broken");
    let metrics = read_metrics(&run).await.unwrap();
    assert_eq!(metrics.iter().map(|row| row.step).collect::<Vec<_>>(), (1..=metrics.len() as u64).collect::<Vec<_>>());
    assert_eq!(probed(&metrics), (0..6).map(|epoch| (epoch, true)).collect::<Vec<_>>());
    let (spec, set) = (Spec::read(&run).await.unwrap(), PatchSet::open(&place.data).await.unwrap());
    let proof = verify(&Commits::new(&run), &spec, &set, |_, _| {}).await.unwrap();
    assert!(proof.holds(), "{:#?}", proof.problems);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_split_is_the_runs_own_else_that_of_the_file_beside_the_set_else_one_that_is_drawn() {
    let place = place(4, 5).await;
    let set = PatchSet::open(&place.data).await.unwrap();
    let names: Vec<&str> = set.manifest().slides.iter().map(|slide| slide.name.as_str()).collect();
    let tested = async |sets: &[&str]| {
        let found = ProbeSet::open(&place.probing(None, sets), &set.manifest().content_id, Store::open).await;
        let patches = found.unwrap().unwrap().patches;
        let mut slides: Vec<u32> = patches.test.iter().map(|&row| patches.slides[row]).collect();
        slides.dedup();
        assert_eq!(patches.train.len() + patches.test.len(), 100);
        slides
    };
    let drawn = sgcl_patchset::split(set.manifest(), set.index(), 0.3, 0, 0).unwrap();
    assert_eq!(tested(&[]).await, drawn.test);
    let other = drawn.train[0] as usize;
    let train: Vec<&str> = (0..4).filter(|&slide| slide != other).map(|slide| names[slide]).collect();
    let file = json!({ "version": 1, "data": set.manifest().content_id, "train": train, "test": [names[other]] });
    std::fs::write(format!("{}/split.json", place.data), file.to_string()).unwrap();
    assert_eq!(tested(&[]).await, [other as u32]);
    let held_out = config(&["data.holdout_fraction=0.25"]).data.split(&names).unwrap().held_out;
    assert_eq!(tested(&["data.holdout_fraction=0.25"]).await, [held_out[0] as u32]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_that_cannot_be_probed_on_is_a_configuration_error_before_anything_is_trained() {
    let place = place(2, 6).await;
    let unlabelled = place.folder.path().join("unlabelled").display().to_string();
    textured(&Store::open(&unlabelled).unwrap(), 2, 2, false).await;
    let single = place.folder.path().join("single").display().to_string();
    patch_set(&Store::open(&single).unwrap(), 1, 6).await;
    let missing = place.folder.path().join("missing").display().to_string();

    let (data, bucket) = (place.data.clone(), place.folder.path().join("bucket").display().to_string());
    let refused = move |dataset: &str, set: &str| {
        let dataset = format!("probe.dataset={dataset}");
        let small = ["views.global_px=32", "views.local_px=32", "batch.per_rank=8", "objective.negatives=64"];
        let fits = ["objective.hard=4", "objective.nearest=16", "kmeans.clusters=4"];
        let mut words = vec!["run", "--local", "--data", &data, "--bucket", &bucket, "--name", "refused"];
        words.extend(small.iter().chain(&fits).chain(&[dataset.as_str(), set]).flat_map(|set| ["--set", set]));
        let run = Programs::find().unwrap().call(&words).unwrap();
        assert_eq!(run.code, Some(78), "{dataset}: {}", run.stderr);
        assert!(run.stderr.contains("probe.dataset") && run.stderr.contains("hint: "), "{}", run.stderr);
        run.stderr
    };
    let (at, large) = ([missing.clone(), unlabelled, single], place.data.clone());
    let said = tokio::task::spawn_blocking(move || {
        let mut said: Vec<String> = at.iter().map(|dataset| refused(dataset, "epochs=1")).collect();
        said.extend(["probe.max_patches=71", "probe.k=60"].map(|set| refused(&large, set)));
        said
    });
    let words =
        ["no patch set here", "no patch has a label", "2 slides or more", "72 patches have labels", "36 labelled"];
    for (said, word) in said.await.unwrap().iter().zip(words) {
        assert!(said.contains(word), "{word:?} is not in {said}");
    }
    assert_eq!(Spec::find(&place.run("refused")).await.unwrap(), None, "a run that was refused is there");

    // One that is gone by the time ranks start is theirs to name.
    match train(&place.bucket, &place.data, "gone", 1, 1, place.probing(Some(&missing), &["objective.hard=4"])).await {
        Outcome::Failed { message, code } => {
            assert_eq!(code, 78, "{message}");
            assert!(message.contains("probe.dataset") && message.contains("missing"), "{message}");
        }
        other => panic!("{other:?}"),
    }
}
