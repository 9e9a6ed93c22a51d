//! Hashes and value noise: the same number for the same place, whichever thread asks.

/// 64 well mixed bits of a place.
pub(crate) fn hash(seed: u64, x: i64, y: i64) -> u64 {
    let mut h = seed ^ (x as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (y as u64).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
    h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    h ^ (h >> 31)
}

/// Numbers of one place, each uniform in 0..1.
pub(crate) struct Uniforms(u64);

impl Uniforms {
    pub(crate) fn at(seed: u64, x: i64, y: i64) -> Self {
        Self(hash(seed, x, y))
    }

    pub(crate) fn next(&mut self) -> f32 {
        self.0 = hash(self.0, 1, 2);
        (self.0 >> 40) as f32 / (1_u64 << 24) as f32
    }

    /// Uniform between two values.
    pub(crate) fn between(&mut self, from: f32, to: f32) -> f32 {
        from + (to - from) * self.next()
    }
}

/// Smooth noise in 0..1 that changes over a distance of 1.
pub(crate) fn smooth(seed: u64, x: f32, y: f32) -> f32 {
    let (x0, y0) = (x.floor(), y.floor());
    let ease = |t: f32| t * t * (3.0 - 2.0 * t);
    let (tx, ty) = (ease(x - x0), ease(y - y0));
    let value = |dx: i64, dy: i64| (hash(seed, x0 as i64 + dx, y0 as i64 + dy) >> 40) as f32 / (1_u64 << 24) as f32;
    let top = value(0, 0) + (value(1, 0) - value(0, 0)) * tx;
    let bottom = value(0, 1) + (value(1, 1) - value(0, 1)) * tx;
    top + (bottom - top) * ty
}
