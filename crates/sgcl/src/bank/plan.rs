//! Which rank holds which virtual shards: a pure function of the ranks and of who held what before.

/// Virtual shards a bank is dealt in.
pub const SHARDS: i64 = 1024;

/// Virtual shard of a bank row.
#[must_use]
pub fn shard_of(row: i64) -> i64 {
    row.rem_euclid(SHARDS)
}

/// Bank rows below `n` in a virtual shard, ascending.
pub fn rows_of_shard(shard: i64, n: i64) -> impl Iterator<Item = i64> {
    (shard..n).step_by(SHARDS as usize)
}

/// Rows below `n` in a virtual shard.
#[must_use]
pub fn rows_in_shard(shard: i64, n: i64) -> i64 {
    (n - shard + SHARDS - 1).max(0) / SHARDS
}

/// Owner and, where wanted, replica of each virtual shard. A replica lies on another node where there is one, else on another
/// rank; a world of one has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardPlan {
    owner: Vec<usize>,
    replica: Vec<Option<usize>>,
    world: usize,
}

impl ShardPlan {
    /// Deals shards to ranks; `nodes[rank]` is the rank's node.
    ///
    /// # Panics
    /// Without a rank.
    #[must_use]
    pub fn new(nodes: &[usize], replicas: bool) -> Self {
        let shards = SHARDS as usize;
        let nobody = Self { owner: vec![usize::MAX; shards], replica: vec![None; shards], world: 0 };
        nobody.moved(&[], nodes, replicas)
    }

    /// The plan of the next generation: `kept[old rank]` is that rank's new number, `None` where it is gone. A shard whose owner
    /// is gone goes to its replica; beyond that, only what evens the load out moves.
    ///
    /// # Panics
    /// Without a rank.
    #[must_use]
    pub fn moved(&self, kept: &[Option<usize>], nodes: &[usize], replicas: bool) -> Self {
        let world = nodes.len();
        assert!(world > 0, "a plan needs a rank");
        let now = |old: usize| kept.get(old).copied().flatten();
        let held: Vec<(Option<usize>, Option<usize>)> =
            self.owner.iter().zip(&self.replica).map(|(&owner, replica)| (now(owner), replica.and_then(now))).collect();

        let mut owners = Quotas::new(held.len(), world);
        // Who has a shard keeps it, before anybody is given one.
        let mut owner: Vec<Option<usize>> =
            held.iter().map(|&(owner, _)| owner.filter(|&rank| owners.take(rank))).collect();
        for (shard, owner) in owner.iter_mut().enumerate() {
            // A copy that is here already is the cheapest owner.
            let here = held[shard].1.filter(|&rank| owner.is_none() && owners.take(rank));
            *owner = owner.or(here);
        }
        let owner: Vec<usize> =
            owner.into_iter().map(|owner| owner.unwrap_or_else(|| owners.take_least(|_| true, |_| 0))).collect();

        let several = nodes.iter().any(|node| *node != nodes[0]);
        let fits = |shard: usize, rank: usize| rank != owner[shard] && (!several || nodes[rank] != nodes[owner[shard]]);
        let mut replica = vec![None; held.len()];
        if replicas && world > 1 {
            let mut copies = Quotas::new(held.len(), world);
            for (shard, replica) in replica.iter_mut().enumerate() {
                let (first, second) = held[shard];
                *replica = [second, first].into_iter().flatten().find(|&r| fits(shard, r) && copies.take(r));
            }
            // An owner's copies are spread over the others: when it is lost, all of them take a part and nothing moves.
            let mut pairs = vec![vec![0; world]; world];
            for (&owner, replica) in owner.iter().zip(&replica) {
                replica.iter().for_each(|&rank: &usize| pairs[owner][rank] += 1);
            }
            for (shard, replica) in replica.iter_mut().enumerate() {
                if replica.is_none() {
                    let pairs = &mut pairs[owner[shard]];
                    let rank = copies.take_least(|rank| fits(shard, rank), |rank| pairs[rank]);
                    pairs[rank] += 1;
                    *replica = Some(rank);
                }
            }
        }
        Self { owner, replica, world }
    }

    /// Ranks.
    #[must_use]
    pub fn world(&self) -> usize {
        self.world
    }

    /// The rank that owns a shard.
    #[must_use]
    pub fn owner(&self, shard: i64) -> usize {
        self.owner[shard as usize]
    }

    /// The rank that holds a second copy of a shard.
    #[must_use]
    pub fn replica(&self, shard: i64) -> Option<usize> {
        self.replica[shard as usize]
    }

    /// Shards that `rank` owns, ascending.
    pub fn owned(&self, rank: usize) -> impl Iterator<Item = i64> {
        (0..SHARDS).filter(move |&shard| self.owner(shard) == rank)
    }

    /// Shards that `rank` holds a second copy of, ascending.
    pub fn copied(&self, rank: usize) -> impl Iterator<Item = i64> {
        (0..SHARDS).filter(move |&shard| self.replica(shard) == Some(rank))
    }
}

/// Counts what ranks have taken: ⌈shards / world⌉ at most, and no more ranks at that size than must be.
struct Quotas {
    taken: Vec<usize>,
    floor: usize,
    /// Ranks that may still go one above the floor.
    spare: usize,
}

impl Quotas {
    fn new(shards: usize, world: usize) -> Self {
        Self { taken: vec![0; world], floor: shards / world, spare: shards % world }
    }

    fn take(&mut self, rank: usize) -> bool {
        let full = self.taken[rank] >= self.floor;
        if full && (self.taken[rank] > self.floor || self.spare == 0) {
            return false;
        }
        self.spare -= usize::from(full);
        self.taken[rank] += 1;
        true
    }

    /// The rank with least `load`, then with least taken, among those that may; the quota gives way where nodes are uneven.
    fn take_least(&mut self, may: impl Fn(usize) -> bool, load: impl Fn(usize) -> usize) -> usize {
        let key = |&rank: &usize| (load(rank), self.taken[rank], rank);
        let rank = (0..self.taken.len()).filter(|&rank| may(rank)).min_by_key(key).unwrap_or(0);
        if !self.take(rank) {
            self.taken[rank] += 1;
        }
        rank
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(a: &ShardPlan, b: &ShardPlan) -> usize {
        (0..SHARDS).filter(|&shard| a.owner(shard) != b.owner(shard)).count()
    }

    #[test]
    fn shards_are_dealt_evenly_and_copies_lie_on_other_nodes() {
        let plan = ShardPlan::new(&[0, 0, 1, 1, 2], true);
        // A node of one rank can copy from everybody, so it copies somewhat more.
        for rank in 0..5 {
            assert!((204..=205).contains(&plan.owned(rank).count()), "rank {rank} owns {}", plan.owned(rank).count());
            assert!((150..=280).contains(&plan.copied(rank).count()), "rank {rank}: {}", plan.copied(rank).count());
        }
        let nodes = [0, 0, 1, 1, 2];
        assert!((0..SHARDS).all(|s| plan.replica(s).is_some_and(|r| nodes[r] != nodes[plan.owner(s)])));
        assert!((0..SHARDS).all(|s| ShardPlan::new(&[0], true).replica(s).is_none()), "alone there is no copy");
        assert!(
            (0..SHARDS)
                .all(|s| ShardPlan::new(&[0, 0], true).replica(s) == Some(1 - ShardPlan::new(&[0, 0], true).owner(s)))
        );
    }

    #[test]
    fn a_lost_rank_moves_its_own_shards_alone_and_to_their_copies() {
        let before = ShardPlan::new(&[0, 1, 2, 3], true);
        let after = before.moved(&[Some(0), None, Some(1), Some(2)], &[0, 2, 3], true);
        let number = [0, usize::MAX, 1, 2];
        let mut fetched = 0;
        for shard in 0..SHARDS {
            let (was, is) = (before.owner(shard), after.owner(shard));
            if was != 1 {
                assert_eq!(is, number[was], "a shard whose owner lives stays where it is");
            } else if before.replica(shard).map(|rank| number[rank]) != Some(is) {
                fetched += 1;
            }
        }
        assert!(fetched <= 20, "{fetched} shards went to a rank that held no copy");
    }

    #[test]
    fn a_rank_that_joins_is_given_its_share_and_nothing_else_moves() {
        let before = ShardPlan::new(&[0, 1, 2], false);
        let after = before.moved(&[Some(0), Some(1), Some(2)], &[0, 1, 2, 3], false);
        assert_eq!((after.owned(3).count(), changed(&before, &after)), (256, 256));
        assert_eq!(before.moved(&[Some(0), Some(1), Some(2)], &[0, 1, 2], false), before);
    }

    #[test]
    fn rows_of_shards_are_all_rows_once() {
        let n = 2500;
        let mut rows: Vec<i64> = (0..SHARDS).flat_map(|shard| rows_of_shard(shard, n)).collect();
        rows.sort_unstable();
        assert_eq!(rows, (0..n).collect::<Vec<_>>());
        assert!((0..SHARDS).all(|s| rows_in_shard(s, n) == rows_of_shard(s, n).count() as i64));
        assert_eq!(rows_in_shard(1000, 5), 0);
    }
}
