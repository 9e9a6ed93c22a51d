//! Learning rate and the weight of the inter term, by epoch.

/// `initial` at epoch 0, then a cosine to 0 at `epochs`.
#[must_use]
pub fn cosine(initial: f64, epoch: u64, epochs: u64) -> f64 {
    let done = (epoch as f64 / epochs.max(1) as f64).min(1.0);
    initial * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
}

/// Weight of the inter term: exp(−5·(1 − min(e, 10)/10)²), e counted from 0.
#[must_use]
pub fn rampup(epoch: f64) -> f64 {
    let p = 1.0 - epoch.clamp(0.0, 10.0) / 10.0;
    (-5.0 * p * p).exp()
}
