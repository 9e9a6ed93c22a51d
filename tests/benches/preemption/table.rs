//! The figures for people: one table, the bars beside it.

use serde_json::{Map, Value, json};

use crate::Args;
use crate::cost;
use crate::faults::{Effects, Fault, Kind};
use crate::figures::Figure;
use crate::ours;
use crate::torchrun;

/// A column of effects.
fn figure(effects: &[(Fault, Effects)], kinds: &[Kind], of: impl Fn(&Effects) -> Option<f64>) -> Figure {
    effects.iter().filter(|(fault, _)| kinds.contains(&fault.kind)).filter_map(|(_, effect)| of(effect)).collect()
}

/// Every fault, and each kind's figures.
pub fn faults_json(effects: &[(Fault, Effects)]) -> Value {
    let phases = |phases: &[(&'static str, f64)]| {
        phases.iter().map(|(name, seconds)| ((*name).to_owned(), json!(seconds))).collect::<Map<_, _>>()
    };
    let each: Vec<Value> = effects
        .iter()
        .map(|(fault, e)| {
            json!({
                "kind": fault.kind.name(), "step": e.step, "lost": e.lost, "stepping": e.stepping, "full": e.full, "join": e.join,
                "still": e.still, "while_away": e.while_away, "phases": phases(&e.phases), "join_phases": phases(&e.join_phases),
                "note": e.note,
            })
        })
        .collect();
    let mut kinds = Map::new();
    for kind in Kind::ALL {
        let of = |pick: fn(&Effects) -> Option<f64>| figure(effects, &[kind], pick).json();
        if effects.iter().any(|(fault, _)| fault.kind == kind) {
            kinds.insert(
                kind.name().into(),
                json!({
                    "lost": of(|e| Some(e.lost as f64)), "stepping": of(|e| e.stepping), "full": of(|e| e.full),
                    "join": of(|e| e.join), "still": of(|e| e.still),
                }),
            );
        }
    }
    json!({ "each": each, "kinds": kinds })
}

/// Prints what a fault did.
pub fn one(fault: &Fault, e: &Effects) {
    let seconds = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.2}"));
    let phases = |phases: &[(&'static str, f64)]| {
        phases.iter().map(|(name, took)| format!("{name} {took:.2}")).collect::<Vec<_>>().join(", ")
    };
    let away = e.while_away.map(|steps| format!("{steps} steps while away")).unwrap_or_default();
    let more = [e.note.clone(), away, phases(&e.phases), phases(&e.join_phases)];
    println!(
        "{:<7} step {:>5}  lost {:>4}  stepping {:>6}  full size {:>6}  join {:>5}  no step for {:>6}  {}",
        fault.kind.name(),
        e.step,
        e.lost,
        seconds(e.stepping),
        seconds(e.full),
        seconds(e.join),
        seconds(e.still),
        more.into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join(" | ")
    );
}

/// Prints all figures; returns the bars.
pub fn print(
    args: &Args,
    ours: Option<&ours::Found>,
    torchrun: Option<&torchrun::Found>,
    cost: Option<&cost::Found>,
) -> Value {
    println!("\n{:<44} {:>30} {:>30}", "median (least to most, count)", "sgcl", "torchrun elastic");
    let row = |what: &str, kinds: &[Kind], digits: usize, of: fn(&Effects) -> Option<f64>| {
        let text = |effects: Option<&Vec<(Fault, Effects)>>| {
            effects.map_or("–".into(), |effects| figure(effects, kinds, of).text(digits))
        };
        println!("{what:<44} {:>30} {:>30}", text(ours.map(|it| &it.effects)), text(torchrun.map(|it| &it.effects)));
    };
    row("notice: steps lost", &[Kind::Notice], 0, |e| Some(e.lost as f64));
    row("kill, a copy lives: steps lost", &[Kind::Rank, Kind::Node, Kind::Away], 0, |e| Some(e.lost as f64));
    row("kill of every copy: steps lost", &[Kind::All], 0, |e| Some(e.lost as f64));
    row("notice: survivors stepping after, s", &[Kind::Notice], 2, |e| e.stepping);
    row("kill of a rank: stepping after, s", &[Kind::Rank], 2, |e| e.stepping);
    row("kill of a node: stepping after, s", &[Kind::Node, Kind::Away], 2, |e| e.stepping);
    row("kill of all: stepping after, s", &[Kind::All], 2, |e| e.stepping);
    row("notice: no step for, s", &[Kind::Notice], 2, |e| e.still);
    row("kill, a copy lives: no step for, s", &[Kind::Rank, Kind::Node, Kind::Away], 2, |e| e.still);
    row("hang: stepping after, s", &[Kind::Hang], 2, |e| e.stepping);
    row("silent node: stepping after, s", &[Kind::Silent], 2, |e| e.stepping);
    row("steps while a node was away", &[Kind::Away], 0, |e| e.while_away.map(|steps| steps as f64));
    row("loss → full size, s", &[Kind::Notice, Kind::Rank, Kind::Node], 2, |e| e.full);
    row("join → full size, s", &Kind::ALL, 2, |e| e.join);
    let pace = |step: Option<&Figure>| step.map_or("–".into(), |step| step.text(3));
    println!("{:<44} {:>30} {:>30}", "step, s", pace(ours.map(|it| &it.step)), pace(torchrun.map(|it| &it.step)));
    if let Some(ours) = ours {
        println!("{:<44} {:>30}", "step's end → commit, s", ours.commits.text(2));
        let (epochs, missed) = (ours.proof.epochs.len(), ours.missed());
        let holds = if ours.proof.holds() { "proves it" } else { "finds problems" };
        println!("samples missed in {epochs} epochs: {missed}; verify {holds}: {:?}", ours.proof.problems);
    }
    if let Some(cost) = cost {
        println!("\n{} stretches, {} steps or more, two nodes of one rank", cost.bare.len(), cost.steps);
        for (what, seconds) in [
            ("bare c10d, no second copies", &cost.bare),
            ("system, no second copies", &cost.single),
            ("system, second copies", &cost.system),
            ("system, second copies, checkpoints", &cost.checkpoints),
        ] {
            println!("{what:<44} {:>30} s a step", seconds.iter().copied().collect::<Figure>().text(4));
        }
        println!("{:<44} {:>30} s", "one checkpoint takes from training", cost.checkpoint_seconds().text(3));
        println!(
            "{:<44} {:>30} %",
            format!("checkpoints every {} steps", args.every),
            cost.checkpointing(args.every).percent().text(2)
        );
        println!("{:<44} {:>30} %", "second copies of the bank", cost.replicas().percent().text(2));
        println!("{:<44} {:>30} %", "all of it over bare c10d", cost.whole(args.every).percent().text(2));
    }
    bars(args, ours, torchrun, cost)
}

/// What issue and table hold each other to.
fn bars(
    args: &Args,
    ours: Option<&ours::Found>,
    torchrun: Option<&torchrun::Found>,
    cost: Option<&cost::Found>,
) -> Value {
    let mut bars = Vec::new();
    println!();
    let mut bar = |what: &str, bar: f64, measured: Option<f64>| {
        let Some(measured) = measured else { return };
        let held = measured <= bar;
        println!("{:<8} {what}: {measured:.3}, the bar is {bar:.3}", if held { "held" } else { "NOT HELD" });
        bars.push(json!({ "bar": what, "at_most": bar, "measured": measured, "held": held }));
    };
    if let Some(ours) = ours {
        let kept: Vec<Kind> = Kind::ALL.into_iter().filter(|kind| !kind.takes_all()).collect();
        let lost = |kinds: &[Kind]| figure(&ours.effects, kinds, |e| Some(e.lost as f64)).largest();
        bar("steps lost while a copy lives, most", 0.0, lost(&kept));
        bar("steps lost when all is lost, most", args.every as f64, lost(&[Kind::All]));
        bar("samples missed", 0.0, Some(ours.missed() as f64));
        bar("problems that verify finds", 0.0, Some(ours.proof.problems.len() as f64));
        let stepping = |kinds: &[Kind]| figure(&ours.effects, kinds, |e| e.stepping);
        let hang = args.step_timeout as f64 + 2.0;
        bar("hang → stepping, most, s", hang, stepping(&[Kind::Hang]).largest());
        // Both sides give a line up after 1.5 s without a beat and as long again.
        bar("silent node → stepping, most, s", 3.0 + 1.0, stepping(&[Kind::Silent]).largest());
        bar("step's end → commit, median, s", 5.0, ours.commits.median());
        // After a notice the world goes on stepping until all stop at the same step, so both are told: the first step of the smaller world,
        // and how long no step ended.
        let median = |kinds: &[Kind], of: fn(&Effects) -> Option<f64>| figure(&ours.effects, kinds, of).median();
        for (what, of) in [
            ("notice → stepping over kill → stepping, medians", (|e| e.stepping) as fn(&Effects) -> Option<f64>),
            ("no step after a notice over no step after a kill, medians", |e| e.still),
        ] {
            let both = median(&[Kind::Notice], of).zip(median(&[Kind::Rank, Kind::Node, Kind::Away], of));
            bar(what, 1.0, both.map(|(notice, kill)| notice / kill));
        }
        for (what, kinds) in
            [("a rank", &[Kind::Rank][..]), ("a node", &[Kind::Node, Kind::Away]), ("all", &[Kind::All])]
        {
            let theirs = torchrun.and_then(|it| figure(&it.effects, kinds, |e| e.stepping).median());
            let ratio = stepping(kinds).median().zip(theirs).map(|(mine, theirs)| mine / theirs);
            bar(&format!("kill of {what} → stepping over torchrun's, medians"), 0.5, ratio);
        }
    }
    if let Some(cost) = cost {
        bar("checkpoints' share of step time, median", 0.005, cost.checkpointing(args.every).median());
        bar("replicas' share of step time, median", 0.02, cost.replicas().median());
        bar("the whole system over bare c10d, median", 0.015, cost.whole(args.every).median());
    }
    Value::Array(bars)
}
