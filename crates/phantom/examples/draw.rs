//! Draws slides: `draw FOLDER SEED SLIDES SIDE`, and prints what colour alone achieves on them.
#![allow(clippy::print_stdout)]

use sgcl_phantom::{Phantom, hardness::hardness};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, folder, seed, slides, side] = arguments.as_slice() else { return Err("FOLDER SEED SLIDES SIDE".into()) };
    let (seed, slides, side) = (seed.parse()?, slides.parse()?, side.parse()?);
    for slide in 0..slides {
        let began = std::time::Instant::now();
        let path = Phantom::draw(seed, slide, side)?.write(folder.as_ref(), &format!("phantom-{slide:02}"))?;
        println!("{} in {:.1} s", path.display(), began.elapsed().as_secs_f64());
    }
    println!("{:?}", hardness(seed, slides, side, 128)?);
    Ok(())
}
