//! PID 1 inside the μVM

fn main() {}
