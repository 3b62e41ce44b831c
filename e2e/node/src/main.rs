//! Builds, boots and talks to the node VM

fn main() {}
