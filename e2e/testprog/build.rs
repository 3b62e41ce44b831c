//! The program goes into every test image: leave the symbols out, whatever the profile keeps.

fn main() {
    println!("cargo:rustc-link-arg-bins=-s");
    println!("cargo:rerun-if-changed=build.rs");
}
