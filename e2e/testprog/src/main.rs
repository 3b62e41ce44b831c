//! What runs in the tests' containers

fn main() {}
