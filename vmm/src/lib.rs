//! The virtual machine monitor
