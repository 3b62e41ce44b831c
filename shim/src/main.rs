//! The containerd shim's program: the command line, and nothing else.

fn main() {}
