//! Constants of the objective and whether they fit a patch set.

use tch::Kind;

/// Which loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Variant {
    /// The loss as meant.
    #[default]
    Exact,
    /// The published code, quirks included.
    Released,
}

/// How neighbours enter the loss. Sums are over e^{s/T}, T = `t_spatial`; anchors that have no positives are left out of the mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Inter {
    /// Not at all: nothing is ranked, and k-means is not needed.
    None,
    /// SGCL: −log P/(P + H), P spatial ∪ semantic positives, H hard negatives.
    #[default]
    United,
    /// Local aggregation: −log (C ∩ B)/B. B, the background, are the `nearest` bank rows of the anchor; C are the rows that share
    /// its labels in every k-means run. Its own row is a row like any other: in C always, in B where it is near enough.
    Aggregated,
    /// SSLP: spatial −log S/(S + H) and semantic −log Σ_{j∈M} s_j/(s_j + H), s_j = e^{s/T} of a semantic positive, each with its own mean.
    /// Spatial positives S, semantic ones M and hard negatives H are SGCL's; a row in both S and M counts in both. The own row is
    /// told from the hard negatives too, instead of random ones.
    Apart,
}

/// What an anchor has besides the query of its global view.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Local {
    /// Nothing.
    None,
    /// Four local views, each against its corner's own row and random rows of all corners: the inner term as METHOD has it.
    #[default]
    Corners,
    /// DenseCL: a query at every position of the feature map, each against a key of its own and pooled keys, which lie in the backbone's
    /// bank. The loss is (1 − share)·intra + share·inner.
    Dense {
        /// Positions P of the map.
        positions: i64,
        /// Weight of the inner term.
        share: f64,
    },
}

impl Local {
    /// Local queries of an anchor.
    #[must_use]
    pub fn parts(self) -> i64 {
        match self {
            Self::None | Self::Corners => 4,
            Self::Dense { positions, .. } => positions,
        }
    }

    /// Weights of the intra and the inner term.
    pub(super) fn weights(self) -> (f64, f64) {
        match self {
            Self::None | Self::Corners => (1.0, 1.0),
            Self::Dense { share, .. } => (1.0 - share, share),
        }
    }
}

/// How hard negatives are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HardBy {
    /// By rank where a step's scores are few enough to send, else by strata.
    #[default]
    Auto,
    /// Rows at exactly the drawn ranks.
    Rank,
    /// Rows drawn within strata of the ranking.
    Strata,
}

/// Constants of a step; defaults as published.
#[derive(Clone, Debug, PartialEq)]
pub struct Params {
    /// Which loss.
    pub variant: Variant,
    /// Whether the intra term is part of the loss: the own row against random rows, or hard negatives ([`Inter::Apart`]).
    pub intra: bool,
    /// How neighbours are.
    pub inter: Inter,
    /// What the inner term is made of.
    pub local: Local,
    /// Radius of spatial positives, grid units, strict.
    pub radius: f64,
    /// Auxiliary anchors A of an anchor.
    pub auxiliary: i64,
    /// Nearest bank rows searched for semantic positives.
    pub nearest: i64,
    /// Random negatives K, a multiple of 4.
    pub negatives: i64,
    /// Hard negatives H.
    pub hard: i64,
    /// How hard negatives are found.
    pub hard_by: HardBy,
    /// Share of the ranking hard negatives come from.
    pub top_fraction: f64,
    /// Temperature of intra and inner.
    pub t_instance: f64,
    /// Temperature of inter.
    pub t_spatial: f64,
    /// Clusters of a k-means run.
    pub clusters: i64,
    /// Weight of new features in a bank row.
    pub bank_momentum: f64,
    /// Similarities and sums in f64: what is left of their order is lost in rounding to f32, so every world computes the same to the
    /// last bit. Some two times slower.
    pub double: bool,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            variant: Variant::Exact,
            intra: true,
            inter: Inter::United,
            local: Local::Corners,
            radius: 3.0,
            auxiliary: 1,
            nearest: 4096,
            negatives: 65_536,
            hard: 4096,
            hard_by: HardBy::Auto,
            top_fraction: 0.2,
            t_instance: 0.2,
            t_spatial: 0.07,
            clusters: 1000,
            bank_momentum: 0.5,
            double: false,
        }
    }
}

/// Constants that do not fit the patch set, or no set at all.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum ParamsError {
    /// Too many hard negatives.
    #[error("hard negatives: {hard} asked, but the top {top_fraction} of {n} patches holds {top}; set at most {top}")]
    Hard {
        /// H.
        hard: i64,
        /// Share of the ranking.
        top_fraction: f64,
        /// N.
        n: i64,
        /// Ranks in the share.
        top: i64,
    },
    /// Too many nearest rows.
    #[error("nearest: {nearest} asked of {n} patches; set at least 1 and fewer than {n}")]
    Nearest {
        /// Rows asked.
        nearest: i64,
        /// N.
        n: i64,
    },
    /// Too many clusters.
    #[error("k-means: {clusters} clusters asked of {n} patches; set 1 to {n}")]
    Clusters {
        /// Clusters asked.
        clusters: i64,
        /// N.
        n: i64,
    },
    /// Too many auxiliary anchors.
    #[error("auxiliary anchors: {auxiliary} asked of {n} patches; set 0 to {n}")]
    Auxiliary {
        /// Anchors asked.
        auxiliary: i64,
        /// N.
        n: i64,
    },
    /// K not a positive multiple of 4.
    #[error(
        "negatives: {0} is no positive multiple of 4 (a local view takes a quarter from each corner); set such a number"
    )]
    Negatives(i64),
    /// A form that only SGCL's loss has.
    #[error("the released variant repeats SGCL's published code; {0:?} neighbours have the exact one alone")]
    Released(Inter),
    /// A number outside its range.
    #[error("{name}: {value} is outside {range}")]
    Range {
        /// Field.
        name: &'static str,
        /// Value.
        value: f64,
        /// What is allowed.
        range: &'static str,
    },
}

impl Params {
    /// Whether random negatives are drawn.
    #[must_use]
    pub fn draws(&self) -> bool {
        self.intra && self.inter != Inter::Apart || self.local != Local::None
    }

    /// Whether hard negatives are, which takes a backbone bank.
    #[must_use]
    pub fn ranks(&self) -> bool {
        matches!(self.inter, Inter::United | Inter::Apart)
    }

    /// Whether local queries have keys of their own.
    #[must_use]
    pub fn dense(&self) -> bool {
        matches!(self.local, Local::Dense { .. })
    }

    /// What similarities and sums are computed in.
    pub(super) fn kind(&self) -> Kind {
        if self.double { Kind::Double } else { Kind::Float }
    }

    /// Ranks hard negatives are drawn from: ⌊top fraction · n⌋.
    #[must_use]
    pub fn top(&self, n: i64) -> i64 {
        (self.top_fraction * n as f64) as i64
    }

    /// Refuses what does not fit a patch set of `n` patches.
    pub fn check(&self, n: i64) -> Result<(), ParamsError> {
        let positive = |v: f64| v > 0.0 && v.is_finite();
        // Below, e^((s - 1)/T) of unrelated rows is no f32.
        let warm = |v: f64| v >= 0.02 && v.is_finite();
        let share = |v: f64| v > 0.0 && v <= 1.0;
        for (name, value, fits, range) in [
            ("radius", self.radius, positive(self.radius), "(0, inf)"),
            ("t_instance", self.t_instance, warm(self.t_instance), "[0.02, inf)"),
            ("t_spatial", self.t_spatial, warm(self.t_spatial), "[0.02, inf)"),
            ("top_fraction", self.top_fraction, share(self.top_fraction), "(0, 1]"),
            ("bank_momentum", self.bank_momentum, share(self.bank_momentum), "(0, 1]"),
        ] {
            if !fits {
                return Err(ParamsError::Range { name, value, range });
            }
        }
        if let Local::Dense { share: value, .. } = self.local
            && !(0.0..=1.0).contains(&value)
        {
            return Err(ParamsError::Range { name: "dense_share", value, range: "[0, 1]" });
        }
        if self.draws() && (self.negatives < 4 || self.negatives % 4 != 0) {
            return Err(ParamsError::Negatives(self.negatives));
        }
        if self.inter == Inter::None {
            return Ok(());
        }
        if self.variant == Variant::Released && self.inter != Inter::United {
            return Err(ParamsError::Released(self.inter));
        }
        let top = self.top(n);
        if self.ranks() && (self.hard < 1 || self.hard > top) {
            return Err(ParamsError::Hard { hard: self.hard, top_fraction: self.top_fraction, n, top });
        }
        if self.nearest < 1 || self.nearest >= n {
            return Err(ParamsError::Nearest { nearest: self.nearest, n });
        }
        if self.clusters < 1 || self.clusters > n {
            return Err(ParamsError::Clusters { clusters: self.clusters, n });
        }
        if self.auxiliary < 0 || self.auxiliary > n {
            return Err(ParamsError::Auxiliary { auxiliary: self.auxiliary, n });
        }
        Ok(())
    }
}
