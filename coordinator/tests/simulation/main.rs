//! The coordinator's state machine in a simulated world: nodes, ranks, rings, lines, storage and clocks, with faults at random moments.
//! What must hold is looked at after every event. Everything is drawn from one seed; a failure names it, and the command that repeats it.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod bucket;
mod checks;
mod coordinator;
mod dice;
mod faults;
mod launcher;
mod line;
mod node;
mod rank;
mod ring;
mod scenario;
mod state;
mod world;

use dice::Dice;
use scenario::Scenario;
use world::{Report, SECOND, World};

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |value| value.parse().unwrap())
}

fn run(seed: u64, whole_log: bool) -> Report {
    World::new(seed, Scenario::draw(seed), whole_log).run()
}

fn complain(seed: u64, report: &Report) -> String {
    format!(
        "seed {seed}, at {:.3} s: {}\n{:?}\nthe last of what happened:\n{}\nrepeat it with: SGCL_SEED={seed} SGCL_SEEDS=1 make test-simulation",
        report.took as f64 / SECOND as f64,
        report.violation.as_deref().unwrap_or_default(),
        Scenario::draw(seed),
        report.log
    )
}

#[test]
fn whatever_happens_a_run_ends_with_all_its_steps() {
    let (base, count) = (number("SGCL_SEED", 1), number("SGCL_SEEDS", 5000));
    let (mut events, mut generations, mut rollbacks, mut took) = (0, 0, 0, 0);
    for seed in base..base + count {
        let report = run(seed, count == 1);
        assert!(report.violation.is_none(), "{}", complain(seed, &report));
        events += report.events;
        generations += report.generations;
        rollbacks += report.rollbacks;
        took += report.took;
    }
    println!(
        "{count} seeds from {base}: {events} events, {generations} generations, {rollbacks} times back to a commit, {} h",
        took / SECOND / 3600
    );
}

#[test]
fn one_seed_twice_gives_the_same_log() {
    let base = number("SGCL_SEED", 1);
    for seed in base..base + 20 {
        let (first, second) = (run(seed, true), run(seed, true));
        assert!(first.log == second.log && first.events == second.events, "seed {seed} gives two logs");
        assert!(!first.log.is_empty());
    }
}

#[test]
fn a_run_of_a_thousand_nodes_ends_with_all_its_steps() {
    let seed = number("SGCL_SEED", 1);
    let scenario = Scenario::of(1000, 1, 12, &mut Dice::new(seed));
    let report = World::new(seed, scenario, false).run();
    assert!(report.violation.is_none(), "{}", complain(seed, &report));
}
