//! Benchmarks

fn main() {}
