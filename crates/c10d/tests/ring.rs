//! Collectives, gradient averaging and loss of a peer, on real processes over Gloo.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::process::Command;
use std::time::Duration;

use common::{Rank, form, local, run};
use rstest::rstest;
use sgcl_c10d::norm::{Norm, sync_batch_norm};
use sgcl_c10d::{Buckets, Error, ProcessGroup, Reduce, Reducer, Store, backward, zero_grad};
use tch::{Device, Kind, Tensor};

const LONG: Duration = Duration::from_secs(60);

#[test]
#[ignore = "not a test: the process of one rank, started by the tests of this file"]
fn a_rank_of_the_other_tests() {
    let (scenario, rank) = Rank::from_env().expect("started by another test of this file");
    match scenario.as_str() {
        "collectives" => collectives(&rank),
        "train" => train_and_save(&rank, 1),
        "accumulate" => train_and_save(&rank, 2),
        "normalise" => normalise(&rank),
        "peer dies" => peer_dies(&rank),
        "peer dies in backward" => peer_dies_in_backward(&rank),
        "peer aborts" => peer_aborts(&rank),
        "own abort" => own_abort(&rank),
        "abort of a send" => abort_of_a_send(&rank),
        other => panic!("no scenario {other}"),
    }
}

#[test]
fn normalising_over_ranks_is_batch_norm_over_all_their_batches() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(run("normalise", 3, folder.path()), vec![Some(0); 3]);
}

/// Batches of 3, 5 and none.
fn normalise(me: &Rank) {
    let store = me.store(LONG);
    let group = me.group(&store, "generation-1");
    let float = (Kind::Float, Device::Cpu);
    // Far from zero: a variance taken from squares in 32 bits would be all rounding.
    let all = Tensor::arange(8 * 4 * 3 * 2, float).sin().view([8, 4, 3, 2]) + 300.0;
    let slope = Tensor::arange(8 * 4 * 3 * 2, float).cos().view([8, 4, 3, 2]);
    let (from, count) = [(0, 3), (3, 5), (8, 0)][me.rank];
    let scale = || Tensor::from_slice(&[1_f32, 0.5, -2.0, 3.0]).set_requires_grad(true);
    let shift = || Tensor::from_slice(&[0_f32, 0.1, 0.2, -0.3]).set_requires_grad(true);
    let running = || (Tensor::zeros([4], float), Tensor::ones([4], float));

    let (whole, scale_all, shift_all, (mean_all, var_all)) =
        (all.copy().set_requires_grad(true), scale(), shift(), running());
    let expected =
        whole.batch_norm(Some(&scale_all), Some(&shift_all), Some(&mean_all), Some(&var_all), true, 0.1, 1e-5, false);
    (&expected * &slope).sum(Kind::Float).backward();

    let (x, scale, shift, (mean, var)) =
        (all.narrow(0, from, count).copy().set_requires_grad(true), scale(), shift(), running());
    let norm = Norm { scale: &scale, shift: &shift, running_mean: &mean, running_var: &var, momentum: 0.1, eps: 1e-5 };
    let y = sync_batch_norm(&x, norm, &group).unwrap();
    backward(&(&y * slope.narrow(0, from, count)).sum(Kind::Float)).unwrap();

    let close = |what: &str, found: &Tensor, expected: &Tensor| {
        assert!(found.allclose(expected, 1e-4, 1e-4, false), "rank {}: {what}\n{found}\n{expected}", me.rank);
    };
    close("output", &y.detach(), &expected.detach().narrow(0, from, count));
    close("gradient", &x.grad(), &whole.grad().narrow(0, from, count));
    close("running mean", &mean, &mean_all);
    close("running variance", &var, &var_all);
    for (what, part, all) in [("scale", &scale, &scale_all), ("shift", &shift, &shift_all)] {
        let mut sum = part.grad().copy();
        group.all_reduce(&mut sum, Reduce::Sum).unwrap();
        close(what, &sum, &all.grad());
    }
}

#[rstest]
fn collectives_give_the_values_computed_by_hand(#[values(1, 2, 3)] world: usize) {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(run("collectives", world, folder.path()), vec![Some(0); world]);
}

fn collectives(me: &Rank) {
    let store = me.store(LONG);
    let group = me.group(&store, "generation-1");
    assert_eq!((group.rank(), group.world()), (me.rank, me.world));
    let (rank, world) = (me.rank as i64, me.world as i64);

    let mut tensor = Tensor::from_slice(&[rank as f32 + 1.0, -(rank as f32)]);
    group.all_reduce(&mut tensor, Reduce::Sum).unwrap();
    let sum = (world * (world + 1) / 2) as f32;
    assert_eq!(floats(&tensor), [sum, world as f32 - sum]);
    let mut tensor = Tensor::from_slice(&[rank, -rank]);
    group.all_reduce(&mut tensor, Reduce::Max).unwrap();
    assert_eq!(Vec::<i64>::try_from(&tensor).unwrap(), [world - 1, 0]);
    let mut tensor = Tensor::from_slice(&[rank + 7]);
    group.all_reduce(&mut tensor, Reduce::Min).unwrap();
    assert_eq!(Vec::<i64>::try_from(&tensor).unwrap(), [7]);

    // A transposed, differentiable input: neither its strides nor its graph may matter.
    let mine = (Tensor::from_slice(&[1_f32, 2.0, 3.0, 4.0]).view([2, 2]) + 10.0 * rank as f64).set_requires_grad(true);
    let all = group.all_gather(&mine.tr()).unwrap();
    let expected: Vec<f32> = (0..me.world).flat_map(|r| [1.0, 3.0, 2.0, 4.0].map(|v| v + 10.0 * r as f32)).collect();
    assert_eq!((all.size(), floats(&all)), (vec![2 * world, 2], expected));

    // Rank r brings r rows: rank 0 none.
    let mine = Tensor::full([rank, 3], rank, (Kind::Int64, Device::Cpu));
    let parts = group.all_gather_uneven(&mine).unwrap();
    assert_eq!(parts.len(), me.world);
    for (r, part) in (0..).zip(&parts) {
        assert_eq!(part.size(), [r, 3]);
        assert_eq!(Vec::<i64>::try_from(&part.reshape([-1])).unwrap(), vec![r; 3 * r as usize]);
    }

    let input = Tensor::arange(2 * world, (Kind::Float, Device::Cpu)) + rank as f64;
    let kept = input.copy();
    let part = group.reduce_scatter(&input).unwrap();
    let offset = (world * (world - 1) / 2) as f32;
    assert_eq!(floats(&part), [2 * rank, 2 * rank + 1].map(|i| (world * i) as f32 + offset));
    assert_eq!(floats(&input), floats(&kept), "the input of reduce_scatter changed");

    let mut tensor = Tensor::from_slice(&[rank as f64]);
    group.broadcast(&mut tensor, me.world - 1).unwrap();
    assert_eq!(Vec::<f64>::try_from(&tensor).unwrap(), [world as f64 - 1.0]);

    // Nobody leaves the barrier before everybody has counted.
    store.add("arrived", 1).unwrap();
    group.barrier().unwrap();
    assert_eq!(store.add("arrived", 0).unwrap(), world);
    refuses_what_does_not_fit(&group);
    group.barrier().unwrap();
    group.shutdown().unwrap();
}

fn refuses_what_does_not_fit(group: &ProcessGroup) {
    let scalar = Tensor::from(1_f32);
    assert!(matches!(group.all_gather(&scalar), Err(Error::Refused { .. })));
    let odd = Tensor::zeros([group.world() as i64 * 2 + 1], (Kind::Float, Device::Cpu));
    let refusal = group.reduce_scatter(&odd).err();
    assert_eq!(refusal.is_some(), group.world() > 1, "{refusal:?}");
    let mut turned = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)).tr();
    let error = group.all_reduce(&mut turned, Reduce::Sum).unwrap_err();
    assert!(error.to_string().contains("not contiguous") && !error.regroup_may_help(), "{error}");
    let error = group.broadcast(&mut Tensor::from_slice(&[1_f32]), group.world()).unwrap_err();
    assert!(error.to_string().contains("not in a world of"), "{error}");
}

/// A small residual net with batch-free layers, so that the joint batch and its halves see the same function.
struct Net(Vec<Tensor>);

impl Net {
    fn new() -> Self {
        // Fixed weights, without the process-wide generator.
        let weight = |shape: &[i64], phase: f64| {
            let count: i64 = shape.iter().product();
            let wave =
                ((Tensor::arange(count, (Kind::Double, Device::Cpu)) * 0.7 + phase).sin() * 0.3).to_kind(Kind::Float);
            wave.view(shape).set_requires_grad(true)
        };
        Self(vec![
            weight(&[8, 3, 3, 3], 0.1),
            weight(&[8], 0.2),
            weight(&[8, 8, 3, 3], 0.3),
            weight(&[8], 0.4),
            weight(&[8, 8, 3, 3], 0.5),
            weight(&[8], 0.6),
            weight(&[5, 8], 0.7),
            weight(&[5], 0.8),
        ])
    }

    /// Mean loss of (n, 3, 8, 8) images.
    fn loss(&self, images: &Tensor, labels: &Tensor) -> Tensor {
        let p = &self.0;
        let convolve = |x: &Tensor, w: &Tensor, b: &Tensor| x.conv2d(w, Some(b), [1, 1], [1, 1], [1, 1], 1);
        let stem = convolve(images, &p[0], &p[1]).relu();
        let block = convolve(&convolve(&stem, &p[2], &p[3]).relu(), &p[4], &p[5]);
        let pooled = (block + stem).relu().mean_dim([2_i64, 3].as_slice(), false, Kind::Float);
        pooled.linear(&p[6], Some(&p[7])).cross_entropy_for_logits(labels)
    }

    fn descend(&self, rate: f64) {
        tch::no_grad(|| {
            for parameter in &self.0 {
                let mut parameter = parameter.shallow_clone();
                let gradient = parameter.grad();
                let _ = parameter.f_sub_(&(gradient * rate)).unwrap();
            }
        });
    }
}

const STEPS: i64 = 6;
const BATCH: i64 = 8;

/// The joint batch of a step.
fn batch(step: i64) -> (Tensor, Tensor) {
    let pixels = Tensor::arange(BATCH * 192, (Kind::Double, Device::Cpu));
    let images = ((pixels * 1.3 + step as f64 * 17.0).sin()).to_kind(Kind::Float).view([BATCH, 3, 8, 8]);
    let labels = (Tensor::arange(BATCH, (Kind::Int64, Device::Cpu)) + step).remainder(5);
    (images, labels)
}

/// Trains on this rank's share of each joint batch, in `micro` backward passes a step; rank 0 saves the weights.
fn train_and_save(me: &Rank, micro: i64) {
    let store = me.store(LONG);
    let group = me.group(&store, "generation-1");
    let net = Net::new();
    // Buckets of a few parameters, so that several are in flight.
    let buckets = Buckets { first_bytes: 64, bytes: 4096, ..Buckets::default() };
    let reducer = Reducer::new(&net.0, &group, buckets).unwrap();
    let share = BATCH / me.world as i64;
    for step in 0..STEPS {
        let (images, labels) = batch(step);
        zero_grad(&net.0);
        for part in 0..micro {
            if part == micro - 1 {
                reducer.prepare().unwrap();
            }
            let rows = share / micro;
            let first = me.rank as i64 * share + part * rows;
            let loss = net.loss(&images.narrow(0, first, rows), &labels.narrow(0, first, rows)) / micro as f64;
            backward(&loss).unwrap();
        }
        net.descend(0.2);
    }
    for parameter in &net.0 {
        let flat = parameter.detach().reshape([1, -1]);
        let all = group.all_gather(&flat).unwrap();
        let same = i64::try_from(all.eq_tensor(&flat).all()).unwrap();
        assert_eq!(same, 1, "ranks ended with different weights");
    }
    if me.rank == 0 {
        Tensor::save_multi(&named(&net), me.folder.join("weights.ot")).unwrap();
    }
}

fn named(net: &Net) -> Vec<(String, Tensor)> {
    net.0.iter().enumerate().map(|(index, tensor)| (index.to_string(), tensor.detach())).collect()
}

#[rstest]
fn ranks_train_to_the_weights_of_one_rank_on_the_joint_batch(
    #[values("train", "accumulate")] scenario: &str,
    #[values(1, 2)] world: usize,
) {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(run(scenario, world, folder.path()), vec![Some(0); world]);
    let trained = Tensor::load_multi(folder.path().join("weights.ot")).unwrap();

    let (alone, start) = (Net::new(), Net::new());
    for step in 0..STEPS {
        let (images, labels) = batch(step);
        zero_grad(&alone.0);
        backward(&alone.loss(&images, &labels)).unwrap();
        alone.descend(0.2);
    }
    for (index, (name, tensor)) in trained.iter().enumerate() {
        assert_eq!(name, &index.to_string());
        let largest = |difference: Tensor| f64::try_from(difference.abs().max()).unwrap();
        let apart = largest(tensor - alone.0[index].detach());
        let moved = largest(tensor - start.0[index].detach());
        assert!(apart < 1e-6, "parameter {name} is {apart:e} from one rank's");
        assert!(moved > 1e-3, "parameter {name} was not trained");
    }
}

#[test]
fn the_survivors_of_a_killed_peer_get_an_error_and_regroup_in_process() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(run("peer dies", 3, folder.path()), [Some(0), Some(0), None]);
}

fn peer_dies(me: &Rank) {
    let store = me.store(LONG);
    let group = me.group(&store, "generation-1");
    let mut tensor = Tensor::from_slice(&[1_f32]);
    group.all_reduce(&mut tensor, Reduce::Sum).unwrap();
    if me.rank == 2 {
        die();
    }
    let error = group.all_reduce(&mut tensor, Reduce::Sum).unwrap_err();
    assert!(matches!(error, Error::Broken { .. }) && error.regroup_may_help(), "{error}");
    drop(group);

    let group = form(&store, "generation-2", me.rank, 2);
    let mut tensor = Tensor::from_slice(&[me.rank as f32 + 1.0]);
    group.all_reduce(&mut tensor, Reduce::Sum).unwrap();
    assert_eq!(floats(&tensor), [3.0]);
    group.barrier().unwrap();
}

#[test]
fn a_peer_killed_in_the_middle_of_a_step_is_an_error_of_backward_and_training_goes_on_without_it() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(run("peer dies in backward", 3, folder.path()), [Some(0), Some(0), None]);
}

fn peer_dies_in_backward(me: &Rank) {
    let store = me.store(LONG);
    let net = Net::new();
    let group = me.group(&store, "generation-1");
    let reducer = Reducer::new(&net.0, &group, Buckets::default()).unwrap();
    let (images, labels) = batch(me.rank as i64);
    for step in 0..2 {
        zero_grad(&net.0);
        reducer.prepare().unwrap();
        if (step, me.rank) == (1, 2) {
            die();
        }
        let outcome = backward(&net.loss(&images, &labels));
        if step == 1 {
            let error = outcome.unwrap_err();
            assert!(matches!(error, Error::Broken { .. }), "{error}");
        } else {
            outcome.unwrap();
        }
    }
    drop((reducer, group));

    let group = form(&store, "generation-2", me.rank, 2);
    let reducer = Reducer::new(&net.0, &group, Buckets::default()).unwrap();
    zero_grad(&net.0);
    reducer.prepare().unwrap();
    backward(&net.loss(&images, &labels)).unwrap();
    // The mean of both ranks' own gradients.
    let own = Net::new();
    backward(&own.loss(&images, &labels)).unwrap();
    for (reduced, own) in net.0.iter().zip(&own.0) {
        let mut mean = own.grad() / 2.0;
        group.all_reduce(&mut mean, Reduce::Sum).unwrap();
        let apart = f64::try_from((mean - reduced.grad()).abs().max()).unwrap();
        assert!(apart < 1e-6, "a gradient is {apart:e} from the mean of the survivors");
    }
    group.barrier().unwrap();
}

#[test]
fn a_rank_that_aborts_frees_the_peers_that_wait_for_it() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(run("peer aborts", 2, folder.path()), [Some(0), Some(0)]);
}

fn peer_aborts(me: &Rank) {
    let store = me.store(LONG);
    let group = me.group(&store, "generation-1");
    group.barrier().unwrap();
    if me.rank == 1 {
        group.abort().unwrap();
        // Alive for as long as the peer needs: what frees it is the abort, not this process's end.
        store.wait("freed", LONG).unwrap();
    } else {
        let error = group.all_reduce(&mut Tensor::from_slice(&[1_f32]), Reduce::Sum).unwrap_err();
        assert!(matches!(error, Error::Broken { .. }), "{error}");
        store.set("freed", b"yes").unwrap();
        // The store lives here: let the peer read before it goes.
        store.wait("freed", LONG).unwrap();
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_rank_that_aborts_is_freed_itself_though_its_peers_keep_their_connections() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(run("own abort", 2, folder.path()), [Some(0), Some(0)]);
}

fn own_abort(me: &Rank) {
    let store = me.store(LONG);
    let group = me.group(&store, "generation-1");
    group.barrier().unwrap();
    if me.rank == 1 {
        // As a rank that hangs: it neither comes nor goes.
        store.wait("freed", LONG).unwrap();
        return;
    }
    let reduce = || group.all_reduce(&mut Tensor::from_slice(&[1_f32]), Reduce::Sum).unwrap_err();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(reduce);
        // Most often it waits by then; should it not, the error is the same.
        std::thread::sleep(Duration::from_millis(200));
        group.abort().unwrap();
        // A timeout would be another error.
        let error = waiting.join().unwrap();
        assert!(matches!(error, Error::Broken { .. }), "{error}");
    });
    let error = reduce();
    assert!(matches!(error, Error::Broken { .. }), "begun after the abort: {error}");
    store.set("freed", b"yes").unwrap();
    // The store lives here: let the peer read before it goes.
    std::thread::sleep(Duration::from_millis(200));
}

#[test]
fn a_rank_that_aborts_is_freed_from_a_send_that_its_peer_has_stopped_reading() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(run("abort of a send", 2, folder.path()), [Some(0), Some(0)]);
}

fn abort_of_a_send(me: &Rank) {
    let store = me.store(LONG);
    let group = me.group(&store, "generation-1");
    // More than a connection holds: the sends of both stay in flight where one reads no more.
    let gather = || group.all_gather(&Tensor::zeros([64 << 20], (Kind::Float, Device::Cpu)));
    group.barrier().unwrap();
    if me.rank == 1 {
        store.set("pid", std::process::id().to_string().as_bytes()).unwrap();
        // Stopped and woken by its peer, in the middle of this.
        let _ = gather();
        return;
    }
    let pid = String::from_utf8(store.get("pid").unwrap()).unwrap();
    let signal = |name: &str| assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    std::thread::scope(|scope| {
        signal("-STOP");
        let waiting = scope.spawn(|| gather().unwrap_err());
        std::thread::sleep(Duration::from_millis(500));
        group.abort().unwrap();
        // A timeout would be another error.
        let error = waiting.join().unwrap();
        assert!(matches!(error, Error::Broken { .. }), "{error}");
        signal("-CONT");
    });
}

#[test]
fn a_group_whose_peer_never_comes_times_out() {
    let (store, _) = Store::listen("127.0.0.1", 0, Duration::from_secs(1)).unwrap();
    let error = ProcessGroup::gloo(&store, 0, 2, Duration::from_secs(1), &local()).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[test]
fn keys_of_one_generation_are_unseen_by_the_next() {
    let (server, port) = Store::listen("127.0.0.1", 0, Duration::from_millis(300)).unwrap();
    let client = Store::connect("127.0.0.1", port, LONG).unwrap();
    let (first, second) = (server.prefix("1").unwrap(), server.prefix("2").unwrap());
    client.prefix("1").unwrap().set("key", b"value\0\xff").unwrap();
    assert_eq!(first.get("key").unwrap(), b"value\0\xff");
    client.set("empty", b"").unwrap();
    assert_eq!(server.get("empty").unwrap(), b"");
    let error = second.get("key").unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    let error = second.wait("key", Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[test]
fn a_store_that_nobody_serves_is_an_error_that_says_so() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let error = Store::connect("127.0.0.1", free, Duration::from_secs(1)).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. } | Error::Store { .. }), "{error:?}");
    assert!(error.to_string().starts_with("connect to the rendezvous store"), "{error}");
}

#[test]
fn the_reducer_refuses_what_it_could_not_average() {
    let (store, _) = Store::listen("127.0.0.1", 0, LONG).unwrap();
    let group = form(&store, "1", 0, 1);
    let fixed = Tensor::ones([2], (Kind::Float, Device::Cpu));
    let error = Reducer::new(&[fixed], &group, Buckets::default()).unwrap_err();
    assert!(error.to_string().contains("parameter 0"), "{error}");
    assert!(Reducer::new(&[], &group, Buckets::default()).is_err());
}

/// kill -9, from within, so that it strikes at one known point.
fn die() -> ! {
    // SAFETY: raise has no preconditions.
    unsafe { libc::raise(libc::SIGKILL) };
    unreachable!("SIGKILL cannot be survived")
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(&tensor.reshape([-1])).unwrap()
}
