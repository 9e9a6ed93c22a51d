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
    /// Deals shards that nobody holds yet; `nodes[rank]` is the rank's node.
    ///
    /// # Panics
    /// Without a rank.
    #[must_use]
    pub fn new(nodes: &[usize], replicas: bool) -> Self {
        Self::for_rows(SHARDS, nodes, replicas)
    }

    /// The same for a bank of `n` rows, which may be so few that some shards have none: those are dealt to nobody.
    ///
    /// # Panics
    /// Without a rank.
    #[must_use]
    pub fn for_rows(n: i64, nodes: &[usize], replicas: bool) -> Self {
        let nodes: Vec<Option<usize>> = nodes.iter().copied().map(Some).collect();
        Self::settled(&vec![Vec::new(); n.clamp(0, SHARDS) as usize], &nodes, replicas)
    }

    /// Deals shards to ranks that may hold some already: `holders[shard]` are those that do, its present owner first. A shard whose
    /// owner is gone goes to its copy; beyond that, only what evens the load out moves. A rank whose node is `None` is about to
    /// leave: it is dealt nothing. Shards beyond `holders` have no rows.
    ///
    /// # Panics
    /// Where nobody stays.
    #[must_use]
    pub fn settled(holders: &[Vec<usize>], nodes: &[Option<usize>], replicas: bool) -> Self {
        let world = nodes.len();
        let staying = nodes.iter().flatten().count();
        assert!(staying > 0, "a plan needs a rank");

        let mut owners = Quotas::new(holders.len(), nodes);
        // Who has a shard keeps it, before anybody is given one.
        let mut owner: Vec<Option<usize>> =
            holders.iter().map(|held| held.first().copied().filter(|&rank| owners.take(rank))).collect();
        for (owner, held) in owner.iter_mut().zip(holders) {
            // A copy that is here already is the cheapest owner.
            let here = held.iter().skip(1).copied().find(|&rank| owner.is_none() && owners.take(rank));
            *owner = owner.or(here);
        }
        let owner: Vec<usize> =
            owner.into_iter().map(|owner| owner.unwrap_or_else(|| owners.take_least(|_| true, |_| 0))).collect();

        let mut present = nodes.iter().flatten();
        let first = present.next();
        let several = present.any(|node| Some(node) != first);
        let fits = |shard: usize, rank: usize| rank != owner[shard] && (!several || nodes[rank] != nodes[owner[shard]]);
        let mut replica = vec![None; holders.len()];
        if replicas && staying > 1 {
            let mut copies = Quotas::new(holders.len(), nodes);
            for (shard, replica) in replica.iter_mut().enumerate() {
                let (first, others) = holders[shard].split_at(holders[shard].len().min(1));
                *replica = others.iter().chain(first).copied().find(|&r| fits(shard, r) && copies.take(r));
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

    /// Who holds each shard, the owner first.
    #[must_use]
    pub fn holders(&self) -> Vec<Vec<usize>> {
        self.owner
            .iter()
            .zip(&self.replica)
            .map(|(&owner, copy)| std::iter::once(owner).chain(*copy).collect())
            .collect()
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
        (0_i64..).zip(&self.owner).filter(move |&(_, &owner)| owner == rank).map(|(shard, _)| shard)
    }

    /// Shards that `rank` holds a second copy of, ascending.
    pub fn copied(&self, rank: usize) -> impl Iterator<Item = i64> {
        (0_i64..).zip(&self.replica).filter(move |&(_, &copy)| copy == Some(rank)).map(|(shard, _)| shard)
    }
}

/// Counts what ranks have taken: ⌈shards / world⌉ at most, and no more ranks at that size than must be.
struct Quotas {
    taken: Vec<usize>,
    stays: Vec<bool>,
    floor: usize,
    /// Ranks that may still go one above the floor.
    spare: usize,
}

impl Quotas {
    fn new(shards: usize, nodes: &[Option<usize>]) -> Self {
        let stays: Vec<bool> = nodes.iter().map(Option::is_some).collect();
        let staying = stays.iter().filter(|stays| **stays).count();
        Self { taken: vec![0; nodes.len()], stays, floor: shards / staying, spare: shards % staying }
    }

    fn take(&mut self, rank: usize) -> bool {
        let full = self.taken[rank] >= self.floor;
        if !self.stays[rank] || full && (self.taken[rank] > self.floor || self.spare == 0) {
            return false;
        }
        self.spare -= usize::from(full);
        self.taken[rank] += 1;
        true
    }

    /// The rank with least `load`, then with least taken, among those that may; the quota gives way where nodes are uneven.
    fn take_least(&mut self, may: impl Fn(usize) -> bool, load: impl Fn(usize) -> usize) -> usize {
        let key = |&rank: &usize| (load(rank), self.taken[rank], rank);
        let stay = |rank: &usize| self.stays[*rank];
        let rank = (0..self.taken.len()).filter(stay).filter(|&rank| may(rank)).min_by_key(key).unwrap_or(0);
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

    /// The plan of the next generation, where `kept[old rank]` is that rank's new number.
    fn moved(before: &ShardPlan, kept: &[Option<usize>], nodes: &[usize], replicas: bool) -> ShardPlan {
        let holders: Vec<Vec<usize>> =
            before.holders().iter().map(|held| held.iter().filter_map(|&rank| kept[rank]).collect()).collect();
        ShardPlan::settled(&holders, &nodes.iter().copied().map(Some).collect::<Vec<_>>(), replicas)
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
        let after = moved(&before, &[Some(0), None, Some(1), Some(2)], &[0, 2, 3], true);
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
        let after = moved(&before, &[Some(0), Some(1), Some(2)], &[0, 1, 2, 3], false);
        assert_eq!((after.owned(3).count(), changed(&before, &after)), (256, 256));
        assert_eq!(moved(&before, &[Some(0), Some(1), Some(2)], &[0, 1, 2], false), before);
    }

    #[test]
    fn a_rank_about_to_leave_is_dealt_nothing_and_its_copies_take_over() {
        let before = ShardPlan::new(&[0, 0, 1, 1], true);
        let after = ShardPlan::settled(&before.holders(), &[Some(0), Some(0), None, None], true);
        assert!((2..4).all(|rank| after.owned(rank).count() == 0 && after.copied(rank).count() == 0));
        assert_eq!((after.owned(0).count(), after.copied(0).count()), (512, 512));
        let elsewhere =
            (0..SHARDS).filter(|&s| before.owner(s) >= 2 && before.replica(s) != Some(after.owner(s))).count();
        assert!(elsewhere <= 20, "{elsewhere} shards went to a rank that held no copy");
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
