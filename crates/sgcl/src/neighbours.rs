//! Spatial neighbours on the slides' lattices.

/// Patches ordered by (slide, y, x): the neighbours in one grid row are one contiguous run, found by bisection.
#[derive(Clone, Debug)]
pub struct Lattice {
    /// Position of each patch id.
    at: Vec<(u32, i32, i32)>,
    /// (slide, y, x, patch id), ascending.
    sorted: Vec<(u32, i32, i32, u32)>,
}

/// Positions that make no lattice.
#[derive(Debug, thiserror::Error)]
pub enum LatticeError {
    /// Columns of different lengths.
    #[error("the index has {slides} slides but {x} x and {y} y; read the patch set's index again")]
    Lengths {
        /// Length of the slide column.
        slides: usize,
        /// Length of x.
        x: usize,
        /// Length of y.
        y: usize,
    },
    /// More patches than ids.
    #[error("{0} patches are more than 2^32 - 1; split the patch set")]
    TooMany(usize),
}

impl Lattice {
    /// Patch id = position in the columns; x, y in grid units.
    pub fn new(slide: &[u32], x: &[i32], y: &[i32]) -> Result<Self, LatticeError> {
        if slide.len() != x.len() || slide.len() != y.len() {
            return Err(LatticeError::Lengths { slides: slide.len(), x: x.len(), y: y.len() });
        }
        u32::try_from(slide.len()).map_err(|_| LatticeError::TooMany(slide.len()))?;
        let at: Vec<_> = slide.iter().zip(y).zip(x).map(|((&s, &y), &x)| (s, y, x)).collect();
        let mut sorted: Vec<_> = at.iter().zip(0_u32..).map(|(&(s, y, x), row)| (s, y, x, row)).collect();
        sorted.sort_unstable();
        Ok(Self { at, sorted })
    }

    /// Patches N.
    #[must_use]
    pub fn len(&self) -> usize {
        self.at.len()
    }

    /// Whether there are no patches.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.at.is_empty()
    }

    /// Patch ids on the same slide with 0 < distance < `radius` (grid units), ascending; `None` where `id` is no patch.
    #[must_use]
    pub fn neighbours(&self, id: i64, radius: f64) -> Option<Vec<i64>> {
        let &(slide, y, x) = self.at.get(usize::try_from(id).ok()?)?;
        let reach = radius.clamp(0.0, f64::from(i32::MAX)).ceil() as i32;
        let mut found = Vec::new();
        let (bottom, top) = (y.saturating_sub(reach), y.saturating_add(reach));
        let (left, right) = (x.saturating_sub(reach), x.saturating_add(reach));
        let mut next = self.sorted.partition_point(|&(s, b, a, _)| (s, b, a) < (slide, bottom, left));
        while let Some(&(s, b, a, row)) = self.sorted.get(next) {
            if (s, b) > (slide, top) {
                break;
            }
            // Outside the square: bisect to the next grid row that can hold a neighbour.
            if a < left || a > right {
                let row = if a < left { b } else { b.saturating_add(1) };
                let skip = self.sorted[next..].partition_point(|&(s, b, a, _)| (s, b, a) < (slide, row, left));
                next += skip.max(1);
                continue;
            }
            let (dx, dy) = (f64::from(a) - f64::from(x), f64::from(b) - f64::from(y));
            let d2 = dx * dx + dy * dy;
            if d2 > 0.0 && d2 < radius * radius {
                found.push(i64::from(row));
            }
            next += 1;
        }
        found.sort_unstable();
        Some(found)
    }
}
