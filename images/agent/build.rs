//! How the agent is linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // At a fixed address. A program that can lie anywhere has a table of relocations, and every process that runs
    // it (there are two) its own copy of what they change: 2 MiB in the memory of every μVM. What it would be
    // given for that, an address of its own, all resumed copies of one bake share anyway.
    for argument in ["-static", "-no-pie"] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
