//! Bakes μVMs
