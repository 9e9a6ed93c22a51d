//! Configuration: what is refused, and in which words.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use rstest::rstest;
use sgcl_runstore::config::{Arch, AutoOr, Data, RunConfig};

fn load(yaml: &str, sets: &[&str]) -> Result<RunConfig, String> {
    let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
    RunConfig::from_yaml(yaml, "a.yaml", &sets).map_err(|e| e.to_string())
}

#[test]
fn overrides_win_over_the_file_and_the_file_over_defaults() {
    let config = load("epochs: 7\nbackbone:\n  arch: resnet34\nseed: 1\n", &["epochs=9", "loader.threads=3"]).unwrap();
    assert_eq!((config.epochs, config.seed, config.backbone.arch), (9, 1, Arch::Resnet34));
    assert_eq!(config.loader.threads, AutoOr::Count(3));
    assert_eq!(config.objective, RunConfig::default().objective);
}

#[test]
fn a_file_of_comments_is_all_defaults() {
    assert_eq!(load("# nothing\n\n", &[]).unwrap(), RunConfig::default());
}

#[test]
fn a_misspelt_key_is_shown_in_its_line_with_the_nearest_one() {
    let error = load("epochs: 3\noptimizer:\n  momentun: 0.9\n", &[]).unwrap_err();
    for part in ["a.yaml", "momentun", "3:3", "^", "hint: did you mean \"momentum\"?"] {
        assert!(error.contains(part), "{part:?} is not in:\n{error}");
    }
}

#[rstest]
#[case::misspelt("optimzer.lr=1", "did you mean \"optimizer.lr\"?")]
#[case::no_section("lr=1", "did you mean \"optimizer.lr\"?")]
#[case::no_value("epochs", "key=value")]
#[case::wrong_type("epochs=many", "invalid type")]
#[case::unknown_variant("backbone.arch=resnet19", "resnet18")]
#[case::unknown_key_in_section("batch={size: 3}", "unknown field `size`")]
fn a_wrong_override_is_refused_with_its_words(#[case] word: &str, #[case] expected: &str) {
    let error = load("", &[word]).unwrap_err();
    assert!(error.starts_with(&format!("--set {word}: ")) && error.contains(expected), "{error}");
}

#[test]
fn a_section_can_be_set_whole_and_keeps_its_other_keys() {
    let config = load("", &["objective={hard: 8, nearest: 9}"]).unwrap();
    assert_eq!((config.objective.hard, config.objective.nearest, config.objective.negatives), (8, 9, 65_536));
}

#[rstest]
#[case("epochs: 0", "epochs must be at least 1")]
#[case("objective: {negatives: 10}", "multiple of 4")]
#[case("views: {global_scale: [0.9, 0.2]}", "views.global_scale")]
#[case("optimizer: {lr: .nan}", "optimizer.lr")]
#[case("bank: {replicas: 2}", "bank.replicas 2")]
#[case("data: {holdout_fraction: 1.0}", "data.holdout_fraction 1")]
#[case("projector: {layers: 3}", "projector.layers 3")]
#[case("{method: sslp, variant: released}", "variant: released")]
#[case("{method: local-aggregation, variant: released}", "variant: released")]
#[case("method: moco-v2", "bank.momentum 0.5")]
#[case("objective: {dense_share: -0.1}", "objective.dense_share -0.1")]
#[case("objective: {key_momentum: 1.5}", "objective.key_momentum 1.5")]
#[case("probe: {every_epochs: 0}", "probe.every_epochs must be at least 1")]
#[case("probe: {k: 1001}", "probe.k 1001")]
#[case("probe: {max_patches: 200000}", "probe.max_patches 200000")]
fn values_that_do_not_hold_together_are_named(#[case] yaml: &str, #[case] expected: &str) {
    let error = load(yaml, &[]).unwrap_err();
    assert!(error.contains(expected), "{error}");
}

#[rstest]
#[case::duplicate("epochs: 1\nepochs: 2\n")]
#[case::list("- 1\n- 2\n")]
#[case::broken("epochs: [1\n")]
#[case::type_("epochs: many\n")]
fn wrong_yaml_is_an_error_that_names_the_file(#[case] yaml: &str) {
    assert!(load(yaml, &[]).unwrap_err().contains("a.yaml"));
}

#[test]
fn a_configuration_that_does_not_fit_is_refused_with_the_numbers() {
    let error = RunConfig::default().check_against(100, 4).unwrap_err().to_string();
    for part in ["100 patches on 4 rank(s)", "= 128 patches", "hard 4096", "= 20", "nearest 4096", "clusters 1000"] {
        assert!(error.contains(part), "{part:?} is not in:\n{error}");
    }
    RunConfig::default().check_against(20_480, 4).unwrap();
    RunConfig::default().check_against(20_479, 4).unwrap_err();
}

#[rstest]
#[case("npid", &[])]
#[case("moco-v2", &["negatives 65536"])]
#[case("densecl", &["negatives 65536"])]
#[case("local-aggregation", &["nearest 4096", "clusters 1000"])]
#[case("sslp", &["hard 4096", "nearest 4096", "clusters 1000"])]
fn only_what_a_method_uses_must_fit(#[case] method: &str, #[case] expected: &[&str]) {
    let config = load(&format!("method: {method}\nbank: {{momentum: 0}}\n"), &[]).unwrap();
    let refused = config.check_against(200, 1).err().map(|e| e.to_string()).unwrap_or_default();
    for part in ["hard 4096", "nearest 4096", "clusters 1000", "negatives 65536"] {
        assert_eq!(refused.contains(part), expected.contains(&part), "{part:?} in:\n{refused}");
    }
}

#[test]
fn a_probe_comes_every_so_many_epochs_and_after_the_last() {
    let due = |sets: &[&str]| -> Vec<u32> {
        let config = load("", sets).unwrap();
        (0..8).filter(|&epoch| config.probe.is_due(epoch, 8)).collect()
    };
    assert_eq!(due(&["probe.dataset=labelled", "probe.every_epochs=3"]), [2, 5, 7]);
    assert_eq!(due(&["probe.every_epochs=1"]), [0; 0]);
}

#[test]
fn the_learning_rate_follows_the_global_batch() {
    let config = RunConfig::default();
    assert_eq!((config.base_lr(4), config.base_lr(8)), (0.015, 0.03));
}

#[test]
fn a_split_is_a_function_of_names_and_seed_alone() {
    let names: Vec<String> = (0..20).map(|i| format!("slide-{i}")).collect();
    let data = Data { holdout_fraction: 0.25, ..Data::default() };
    let split = data.split(&names).unwrap();
    assert_eq!((split.train.len(), split.held_out.len()), (15, 5));
    let mut reversed = names.clone();
    reversed.reverse();
    let again = data.split(&reversed).unwrap();
    let of = |s: &[usize], n: &[String]| {
        let mut v: Vec<String> = s.iter().map(|&i| n[i].clone()).collect();
        v.sort();
        v
    };
    assert_eq!(of(&split.held_out, &names), of(&again.held_out, &reversed));
    // Which slides a seed holds out must never change: probes of older runs would see trained slides.
    assert_eq!(split.held_out, GOLDEN_HELD_OUT);
    assert_ne!(Data { holdout_seed: 1, ..data.clone() }.split(&names).unwrap(), split);
    let few = Data { holdout_fraction: 0.9, ..data }.split(&names[..2]).unwrap_err().to_string();
    assert!(few.contains("none to train on"), "{few}");
}

const GOLDEN_HELD_OUT: [usize; 5] = [4, 8, 10, 14, 18];

#[test]
fn a_slide_that_is_not_there_is_named_with_the_nearest() {
    let data = Data { slides: Some(vec!["slide-l".into()]), ..Data::default() };
    let error = data.split(&["slide-1", "other"]).unwrap_err().to_string();
    assert!(error.contains("slide-l") && error.contains("did you mean \"slide-1\"?"), "{error}");
}
