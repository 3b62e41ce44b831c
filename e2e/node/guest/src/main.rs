//! The node VM's end of the command channel

fn main() {}
