//! The control API of kiln-vmm and its client
