//! Where baked μVMs are kept
