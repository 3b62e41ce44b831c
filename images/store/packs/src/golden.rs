//! The formats, byte for byte. When one of these fails, `docs/formats` says what to do.

use crate::testing::{bytes_of, file_of, noise, packed, zeroes};
use crate::{Image, ImageIndex, Options, Pack, Parent, Writer, rebuild_flat};

#[test]
fn print() {
    let parent: Vec<_> = (0..3).map(noise).collect();
    let image = [noise(10), noise(11)];
    let mut near = noise(2);
    near[100] ^= 1;
    let memory = file_of(&[
        zeroes(),
        noise(1),
        vec![0xCC; 4096],
        near,
        noise(11),
        vec![0xCC; 4096],
        noise(1),
        noise(2),
    ]);
    let parent = file_of(&parent);
    let image = file_of(&image);
    let index = ImageIndex::build(&image, [0x22; 32]).unwrap();
    let (bytes, s) = packed(
        &Writer::new(&memory)
            .parent(Parent {
                id: [0x11; 32],
                memory: &parent,
            })
            .image(Image {
                content: &image,
                index: ImageIndex::parse(&index).unwrap(),
            })
            .working_set(&[2, 3])
            .options(Options {
                copy_working_set: false,
                ..Options::default()
            }),
    );
    println!("{s:?}");
    for (n, l) in bytes.chunks(16).enumerate() {
        println!("{:04} {:02x?}", n * 16, l);
    }
    println!("index");
    for (n, l) in index.chunks(16).enumerate() {
        println!("{:04} {:02x?}", n * 16, l);
    }
}
