//! Packs a memory file and prints what that comes to: bytes, ratio, frames, runs.
//!
//! `cargo run --release -p kiln-packs --example measure -- MEMORY [--parent FILE] [--image FILE] [--working-set FILE]
//! [--level N] [--no-prefix] [--no-copies]`; the working set is a text of page numbers, in order of first touch. It
//! rebuilds the memory, and compares.

use std::fs::File;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use kiln_packs::{
    Content, Copies, Image, ImageIndex, Options, PAGE, Pack, Parent, Writer, first_difference,
    rebuild_flat, rebuild_patch,
};

#[derive(Default)]
struct Arguments {
    memory: Option<File>,
    parent: Option<File>,
    image: Option<File>,
    working_set: Vec<u32>,
    options: Options,
}

fn arguments() -> anyhow::Result<Arguments> {
    let mut found = Arguments::default();
    let mut words = std::env::args().skip(1);
    let open = |path: &str| File::open(path).with_context(|| format!("opening {path}"));
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .with_context(|| format!("{word} needs a value"))
        };
        match word.as_str() {
            "--parent" => found.parent = Some(open(&value()?)?),
            "--image" => found.image = Some(open(&value()?)?),
            "--working-set" => {
                let text = std::fs::read_to_string(value()?)?;
                let pages = text.split_whitespace().map(str::parse);
                found.working_set = pages.collect::<Result<_, _>>()?;
            }
            "--level" => found.options.level = value()?.parse()?,
            "--no-prefix" => found.options.prefix = false,
            "--no-copies" => found.options.copies = Copies::None,
            path if !path.starts_with("--") => found.memory = Some(open(path)?),
            other => bail!("unknown option {other}"),
        }
    }
    Ok(found)
}

fn main() -> anyhow::Result<()> {
    let arguments = arguments()?;
    let memory = arguments.memory.context("which memory?")?;
    let timed = |what: &str, start: Instant| println!("{what}: {:?}", start.elapsed());

    let start = Instant::now();
    let index = match &arguments.image {
        Some(image) => ImageIndex::build(image, [2; 32])?,
        None => Vec::new(),
    };
    timed("index", start);
    let mut writer = Writer::new(&memory)
        .working_set(&arguments.working_set)
        .options(arguments.options);
    if let Some(memory) = &arguments.parent {
        let id = [1; 32];
        writer = writer.parent(Parent { id, memory });
    }
    if let Some(content) = &arguments.image {
        let index = ImageIndex::parse(&index)?;
        writer = writer.image(Image { content, index });
    }
    let start = Instant::now();
    let packed = tempfile::tempfile()?;
    let summary = writer.write(&packed)?;
    timed("pack", start);
    println!("{summary:#?}");
    let data = summary.data_pages * PAGE as u64;
    println!("ratio to data: {:.4}", summary.length as f64 / data as f64);

    let parents: Vec<&dyn Content> = arguments.parent.iter().map(|file| file as _).collect();
    let images: Vec<&dyn Content> = arguments.image.iter().map(|file| file as _).collect();
    let start = Instant::now();
    let pack = Pack::open(&packed)?;
    timed("open", start);
    let start = Instant::now();
    let difference = first_difference(&pack, &packed, &parents, &images, &memory)?;
    timed("compare", start);
    ensure!(difference.is_none(), "page {difference:?} differs");
    let start = Instant::now();
    let flat = tempfile::tempfile()?;
    rebuild_flat(&pack, &packed, &parents, &images, &flat)?;
    timed("rebuild", start);
    let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for offset in (0..pack.length()).step_by(1 << 20) {
        let length = (pack.length() - offset).min(1 << 20) as usize;
        memory.read_into(&mut ours[..length], offset)?;
        flat.read_into(&mut theirs[..length], offset)?;
        ensure!(ours == theirs, "the rebuilt memory differs near {offset}");
    }
    if !parents.is_empty() {
        let start = Instant::now();
        let patch = tempfile::tempfile()?;
        let ranges = rebuild_patch(&pack, &packed, &parents, &images, &patch)?;
        timed("patch", start);
        let pages: u64 = ranges.iter().map(|r| u64::from(r.end - r.start)).sum();
        println!("patch: {} maps, {pages} pages", ranges.len());
    }
    Ok(())
}
