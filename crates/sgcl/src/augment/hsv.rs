//! PIL's HSV on bytes (`Convert.c`: `rgb2hsv_row`, `hsv2rgb`), the divisions in tables. Equal to PIL in every colour.

use std::sync::LazyLock;

/// Hue and saturation bytes by what PIL computes them from.
struct Tables {
    /// [which of the six sectors][highest - lowest][highest - middle]
    hue: Vec<u8>,
    /// [highest][highest - lowest]
    saturation: Vec<u8>,
    /// By hue: the sector of the way back, 0 to 5.
    sector: [u8; 256],
    /// By hue: the position in that sector, 0 to 1.
    fraction: [f32; 256],
    /// By saturation: the same from 0 to 1.
    share: [f32; 256],
    /// [value][saturation]: the lowest channel of the way back.
    low: Vec<u8>,
}

static TABLES: LazyLock<Tables> = LazyLock::new(Tables::new);

impl Tables {
    fn new() -> Self {
        let mut hue = vec![0; 6 << 16];
        for sector in 0..6 {
            for chroma in 1..256 {
                for rest in 0..=chroma {
                    hue[sector << 16 | chroma << 8 | rest] = hue_byte(sector, rest as f32 / chroma as f32);
                }
            }
        }
        let mut saturation = vec![0; 1 << 16];
        let mut low = vec![0; 1 << 16];
        for high in 0..256 {
            for second in 0..256 {
                if second <= high && high > 0 {
                    saturation[high << 8 | second] = (f64::from(second as f32 / high as f32) * 255.0) as u8;
                }
                let share = f64::from((f64::from(second as f32) / 255.0) as f32);
                low[high << 8 | second] = (high as f64 * (1.0 - share)).round() as u8;
            }
        }
        let turn = |hue: usize| f64::from(hue as f32) * 6.0 / 255.0;
        Tables {
            hue,
            saturation,
            sector: std::array::from_fn(|hue| (turn(hue).floor() as u8) % 6),
            fraction: std::array::from_fn(|hue| (turn(hue) - f64::from(turn(hue).floor() as f32)) as f32),
            share: std::array::from_fn(|saturation| (f64::from(saturation as f32) / 255.0) as f32),
            low,
        }
    }
}

/// The hue of a colour whose middle channel lies at `middle` (0: at the highest, 1: at the lowest), as PIL rounds it.
/// Sectors: red highest, blue lowest (0) or green lowest (1); green highest, blue (2) or red (3); blue highest, red (4) or green (5).
fn hue_byte(sector: usize, middle: f32) -> u8 {
    let wide = f64::from(middle);
    let sixth = match sector {
        0 => 1.0 - middle,
        1 => middle - 1.0,
        2 => (2.0 + wide - 1.0) as f32,
        3 => (2.0 + 1.0 - wide) as f32,
        4 => (4.0 + wide - 1.0) as f32,
        _ => (4.0 + 1.0 - wide) as f32,
    };
    let turn = ((f64::from(sixth) / 6.0 + 1.0) % 1.0) as f32;
    (f64::from(turn) * 255.0) as u8
}

/// Sector by which channels are highest and lowest: bit 0 red highest, 1 green highest, 2 blue lowest, 3 red lowest.
const SECTORS: [usize; 16] = {
    let mut table = [0; 16];
    let mut bits = 0;
    while bits < 16 {
        let (blue_low, red_low) = (bits & 4 != 0, bits & 8 != 0);
        table[bits] = match bits & 3 {
            1 | 3 => !blue_low as usize,
            2 => 2 + !blue_low as usize,
            _ => 4 + !red_low as usize,
        };
        bits += 1;
    }
    table
};

/// By sector of the way back, which of (highest, lowest, falling, rising) red, green and blue are.
const ORDER: [[usize; 3]; 8] = [[0, 3, 1], [2, 0, 1], [1, 0, 3], [1, 2, 0], [3, 1, 0], [0, 1, 2], [0, 0, 0], [0, 0, 0]];

/// Adds `shift` to the hue byte of every pixel, modulo 256. Without a branch: colours of neighbours are hard to predict.
pub(super) fn rotate(pixels: &mut [u8], shift: u8) {
    let tables = &*TABLES;
    for pixel in pixels.chunks_exact_mut(3) {
        let (r, g, b) = (pixel[0], pixel[1], pixel[2]);
        let (high, low) = (r.max(g).max(b), r.min(g).min(b));
        let middle = u16::from(r) + u16::from(g) + u16::from(b) - u16::from(high) - u16::from(low);
        let bits = usize::from(r == high)
            | usize::from(g == high) << 1
            | usize::from(b == low) << 2
            | usize::from(r == low) << 3;
        let (chroma, rest) = (usize::from(high - low), usize::from(u16::from(high) - middle));
        let hue = tables.hue[SECTORS[bits] << 16 | chroma << 8 | rest].wrapping_add(shift);
        // A grey has saturation 0, and the way back then gives its value three times.
        let saturation = tables.saturation[usize::from(high) << 8 | chroma];
        let value = f64::from(high);
        let share = tables.share[usize::from(saturation)];
        let fraction = tables.fraction[usize::from(hue)];
        let falling = (value * (1.0 - f64::from(share * fraction)) + 0.5) as u8;
        let rising = (value * (1.0 - f64::from(share) * (1.0 - f64::from(fraction))) + 0.5) as u8;
        let channels = [high, tables.low[usize::from(high) << 8 | usize::from(saturation)], falling, rising];
        let [red, green, blue] = ORDER[usize::from(tables.sector[usize::from(hue)] & 7)];
        pixel[0] = channels[red & 3];
        pixel[1] = channels[green & 3];
        pixel[2] = channels[blue & 3];
    }
}
