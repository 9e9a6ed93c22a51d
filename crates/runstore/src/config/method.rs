//! The methods of the family, and what each of them needs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The method that is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Spatially guided contrastive learning: intra + inter + inner.
    #[default]
    Sgcl,
    /// Instance discrimination: each patch against random patches (intra).
    Npid,
    /// The same with four local views of a patch (intra + inner).
    NpidMcrop,
    /// Local aggregation (Zhuang et al. 2019): −log Σ_{C∩B} e^{s/T} / Σ_B e^{s/T} with T = `objective.t_spatial`. B, the background, are
    /// the `objective.nearest` bank rows most similar to the anchor; C are the rows that share its label in all `kmeans.runs`, as
    /// METHOD's semantic positives do. The paper takes those that share it in any run: with `kmeans.runs: 1` the two are one. As
    /// in the paper the anchor's own row is a row like any other: it is in C, and in B where it is near enough. An anchor whose
    /// C∩B is empty is left out of the mean. There is no spatial term, no local view and no random or hard negative.
    LocalAggregation,
    /// SSLP, SGCL's predecessor: intra + w(epoch) · (spatial + semantic), one view, all temperatures one (`configs/sslp.yaml`: 0.07).
    /// Intra tells the own row from the hard negatives H instead of random ones. Spatial is −log S/(S + H) with S = Σ e^{s/T} over
    /// spatial positives, semantic −log Σ_{j∈M} s_j/(s_j + H) over semantic positives M, s_j = e^{s/T} of one of them: its value can be
    /// negative (the published code divides the sum by |M|, which changes no gradient). S, M and H are found as SGCL finds them;
    /// an anchor without S, or without M, is left out of that term's mean. The published projector is linear: `projector.layers: 1`.
    Sslp,
    /// MoCo v2 (Chen et al. 2020): −log e^{q·k/T} / (e^{q·k/T} + Σ_Q e^{q·row/T}), T = `objective.t_instance`, published 0.2. q is the anchor's
    /// global view; its key k a second global view, seen by a key encoder that keeps `objective.key_momentum` of itself in a step
    /// and takes the rest from the trained one. Keys become their patches' bank rows as they are (`bank.momentum: 0`). The
    /// queue Q are the rows of the `objective.negatives` patches trained on last, the anchor's own row left out; until as many
    /// were trained on, random rows besides. A patch that comes again before it has left the queue stands there twice, with its
    /// newest key. Views are the family's; MoCo blurs besides. BatchNorm is not shuffled over ranks: keys and queries of a
    /// micro-batch are normalised by statistics of the same patches.
    MocoV2,
    /// DenseCL (Wang et al. 2021): (1 − λ)·MoCo v2's loss + λ·its dense one, λ = `objective.dense_share`. A second head of 1×1 convolutions gives
    /// a query at every position of the last feature map; its key is the position of the second view's map whose backbone features
    /// are most similar, and its negatives are the pooled dense keys of the queue's patches. The dense loss is a mean over positions and
    /// is reported as inner. All else is as in MoCo v2.
    Densecl,
}

impl Method {
    /// Whether neighbours and clusters are part of the loss.
    #[must_use]
    pub fn has_inter(self) -> bool {
        matches!(self, Self::Sgcl | Self::LocalAggregation | Self::Sslp)
    }

    /// Whether hard negatives are, which takes a bank of the backbone's features.
    #[must_use]
    pub fn has_hard(self) -> bool {
        matches!(self, Self::Sgcl | Self::Sslp)
    }

    /// Whether patches have local views.
    #[must_use]
    pub fn has_local_views(self) -> bool {
        matches!(self, Self::Sgcl | Self::NpidMcrop)
    }

    /// What a reader knows it by.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Sgcl => "spatially guided contrastive learning (SGCL)",
            Self::Npid => "instance discrimination (NPID)",
            Self::NpidMcrop => "instance discrimination with local views (NPID)",
            Self::LocalAggregation => "local aggregation",
            Self::Sslp => "spatially guided self-supervised learning (SSLP)",
            Self::MocoV2 => "momentum contrast (MoCo v2)",
            Self::Densecl => "dense contrastive learning (DenseCL)",
        }
    }

    /// Terms of the loss, as metrics name them (`loss/intra`).
    #[must_use]
    pub fn terms(self) -> &'static [&'static str] {
        match self {
            Self::Sgcl => &["intra", "inter", "inner"],
            Self::Npid | Self::MocoV2 => &["intra"],
            Self::NpidMcrop | Self::Densecl => &["intra", "inner"],
            Self::LocalAggregation => &["inter"],
            Self::Sslp => &["intra", "spatial", "semantic"],
        }
    }

    /// Whether a key encoder makes the bank's rows.
    #[must_use]
    pub fn has_keys(self) -> bool {
        matches!(self, Self::MocoV2 | Self::Densecl)
    }

    /// Whether positions of the feature map have keys too.
    #[must_use]
    pub fn has_dense(self) -> bool {
        matches!(self, Self::Densecl)
    }

    /// Whether neighbours come in gradually, by METHOD's w(epoch). Where they are all there is they count in full.
    #[must_use]
    pub fn ramps_up(self) -> bool {
        matches!(self, Self::Sgcl | Self::Sslp)
    }

    /// Whether the published code's form of the loss is here too (`variant: released`).
    #[must_use]
    pub fn has_released(self) -> bool {
        matches!(self, Self::Sgcl | Self::Npid | Self::NpidMcrop)
    }
}
