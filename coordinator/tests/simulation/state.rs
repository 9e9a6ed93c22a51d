//! What ranks hold: where training stands, which patches are used, which bank shards are here. No tensors: a state is known by a
//! hash of all steps that led to it.

use std::rc::Rc;

/// Bank shards of a run, as bits.
pub(crate) const SHARDS: u32 = 24;
/// All of them.
pub(crate) const ALL: u32 = (1 << SHARDS) - 1;

/// Patches of one epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Patches {
    words: Vec<u64>,
    count: u64,
}

impl Patches {
    fn has(&self, patch: u64) -> bool {
        self.words.get((patch / 64) as usize).is_some_and(|word| word >> (patch % 64) & 1 == 1)
    }

    /// False where it was in already.
    fn insert(&mut self, patch: u64) -> bool {
        let at = (patch / 64) as usize;
        self.words.resize(self.words.len().max(at + 1), 0);
        let fresh = !self.has(patch);
        self.words[at] |= 1 << (patch % 64);
        self.count += u64::from(fresh);
        fresh
    }
}

/// Where training stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position {
    /// Steps since the run began.
    pub(crate) step: u64,
    pub(crate) epoch: u32,
    /// Ranks of the plan that is followed, 0 before the first, and its steps so far.
    lanes: u64,
    cursor: u64,
    /// Patches used when that plan was made, and now.
    base: Patches,
    used: Patches,
    /// Of all steps, and of all but the last.
    pub(crate) hash: u64,
    pub(crate) parent: u64,
}

impl Position {
    pub(crate) fn is_over(&self, patches: u64) -> bool {
        self.used.count == patches
    }

    /// The beginning of the next epoch.
    pub(crate) fn next_epoch(&self) -> Rc<Self> {
        let Self { step, epoch, hash, parent, .. } = *self;
        Rc::new(Self { step, epoch: epoch + 1, hash, parent, ..Self::default() })
    }

    /// After a step of `world` ranks: each patch of an epoch once, whatever the worlds it is shared among.
    ///
    /// # Errors
    /// A patch that was used before.
    pub(crate) fn stepped(&self, world: u64, patches: u64) -> Result<Rc<Self>, String> {
        let mut next = self.clone();
        if next.lanes != world {
            (next.lanes, next.cursor, next.base) = (world, 0, next.used.clone());
        }
        // Another world, another order.
        let turn = (world * 7 + u64::from(self.epoch)) % patches;
        let plan = (0..patches).map(|patch| (patch + turn) % patches).filter(|&patch| !next.base.has(patch));
        let mut hash = mix(self.hash, world);
        for patch in plan.skip((next.cursor * world) as usize).take(world as usize).collect::<Vec<_>>() {
            hash = mix(hash, patch);
            if !next.used.insert(patch) {
                return Err(format!("patch {patch} of epoch {} was trained twice", self.epoch));
            }
        }
        next.cursor += 1;
        next.step += 1;
        (next.parent, next.hash) = (self.hash, mix(hash, next.step));
        Ok(Rc::new(next))
    }
}

fn mix(a: u64, b: u64) -> u64 {
    let x = (a ^ b.wrapping_mul(0x9E37_79B9_7F4A_7C15)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^ (x >> 29)
}

/// What a rank holds.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    /// Whether others could go on from it.
    pub(crate) standing: bool,
    pub(crate) position: Rc<Position>,
    pub(crate) shards: u32,
    /// Shards before a move of which this rank does not know whether it ended everywhere.
    pub(crate) before_move: Option<u32>,
    /// Epoch that the labels are of.
    pub(crate) labelled: Option<u32>,
    /// Step and done of the newest commit it knows.
    pub(crate) committed: Option<(u64, bool)>,
}

impl Held {
    pub(crate) fn nothing() -> Self {
        let position = Rc::new(Position::default());
        Self { standing: false, position, shards: 0, before_move: None, labelled: None, committed: None }
    }

    /// Shards that it can give.
    pub(crate) fn sources(&self) -> u32 {
        if self.standing { self.shards | self.before_move.unwrap_or(0) } else { 0 }
    }
}

/// Shards of each rank: an owner and, on another node where there is one, a copy. `holders` tells what each rank has; a rank whose
/// node is `None` is about to leave.
pub(crate) fn deal(holders: &[u32], nodes: &[Option<u32>], replicas: bool) -> Vec<u32> {
    let staying: Vec<usize> = (0..nodes.len()).filter(|&rank| nodes[rank].is_some()).collect();
    let mut dealt = vec![0_u32; nodes.len()];
    let quota = SHARDS.div_ceil(staying.len() as u32);
    let least = |dealt: &[u32], fits: &dyn Fn(usize) -> bool| {
        staying.iter().copied().filter(|&rank| fits(rank)).min_by_key(|&rank| (dealt[rank].count_ones(), rank))
    };
    let several = staying.iter().any(|&rank| nodes[rank] != nodes[staying[0]]);
    for shard in 0..SHARDS {
        let has = |rank: usize| holders[rank] >> shard & 1 == 1;
        let keeps = staying.iter().copied().find(|&rank| has(rank) && dealt[rank].count_ones() < quota);
        let Some(owner) = keeps.or_else(|| least(&dealt, &|_| true)) else { continue };
        dealt[owner] |= 1 << shard;
        if replicas {
            let fits = |rank: usize| rank != owner && (!several || nodes[rank] != nodes[owner]);
            let copy = staying.iter().copied().find(|&rank| has(rank) && fits(rank));
            if let Some(copy) = copy.or_else(|| least(&dealt, &fits)) {
                dealt[copy] |= 1 << shard;
            }
        }
    }
    dealt
}
