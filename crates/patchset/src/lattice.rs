//! The tile lattice of a slide: positions are small integers, neighbours are one apart.

use std::collections::HashSet;

/// Fewer patches than this can lie apart by chance.
const ENOUGH_TO_JUDGE: usize = 16;
/// A common divisor from here on is a step in pixels, not a sparse choice of tiles.
const PIXEL_STEP: u64 = 16;

/// Positions that are not a tile lattice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LatticeError {
    /// Pixels given for tiles.
    #[error(
        "all positions are {step} apart: they look like pixels, not tiles; divide by the patch size so that neighbours are 1 apart"
    )]
    Pixels {
        /// Greatest common divisor of the distances.
        step: u64,
    },
    /// No patch has a neighbour.
    #[error(
        "none of {patches} patches has a neighbour: positions must be in tiles (neighbours 1 apart), and spatial positives need patches that touch"
    )]
    NoNeighbours {
        /// Patches looked at.
        patches: usize,
    },
    /// Two patches in one place.
    #[error("two patches at x {x}, y {y}; positions must be unique on a slide")]
    Twice {
        /// Column in tiles.
        x: i32,
        /// Row in tiles.
        y: i32,
    },
}

/// Checks the positions (x, y) of one slide's patches: unique, and neighbours where there are enough to judge.
///
/// # Errors
/// Which of the conditions fails.
pub fn check(positions: &[(i32, i32)]) -> Result<(), LatticeError> {
    let mut taken = HashSet::with_capacity(positions.len());
    for &(x, y) in positions {
        if !taken.insert((x, y)) {
            return Err(LatticeError::Twice { x, y });
        }
    }
    let touches = |&(x, y): &(i32, i32)| {
        let around = [(1, 0), (0, 1), (1, 1), (1, -1)];
        around.iter().any(|&(dx, dy)| {
            x.checked_add(dx).zip(y.checked_add(dy)).is_some_and(|neighbour| taken.contains(&neighbour))
        })
    };
    if positions.len() < 2 || positions.iter().any(touches) {
        return Ok(());
    }
    let (x0, y0) = positions[0];
    let step = positions.iter().fold(0, |step, &(x, y)| gcd(gcd(step, x.abs_diff(x0).into()), y.abs_diff(y0).into()));
    if step >= PIXEL_STEP {
        Err(LatticeError::Pixels { step })
    } else if positions.len() >= ENOUGH_TO_JUDGE {
        Err(LatticeError::NoNeighbours { patches: positions.len() })
    } else {
        Ok(())
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(step: i32, side: i32) -> Vec<(i32, i32)> {
        (0..side * side).map(|i| (i % side * step, i / side * step)).collect()
    }

    #[test]
    fn tiles_one_apart_are_a_lattice() {
        assert_eq!(check(&grid(1, 5)), Ok(()));
        assert_eq!(check(&[(3, 4)]), Ok(()));
        assert_eq!(check(&[(3, 4), (9, 7)]), Ok(()), "two patches far apart can be all the tissue there is");
    }

    #[test]
    fn pixel_coordinates_are_refused_with_their_step() {
        assert_eq!(check(&grid(256, 2)), Err(LatticeError::Pixels { step: 256 }));
    }

    #[test]
    fn a_source_without_neighbours_is_refused() {
        assert_eq!(check(&grid(2, 4)), Err(LatticeError::NoNeighbours { patches: 16 }));
    }

    #[test]
    fn a_position_taken_twice_is_named() {
        assert_eq!(check(&[(1, 2), (2, 2), (1, 2)]), Err(LatticeError::Twice { x: 1, y: 2 }));
    }
}
