//! Finds out whether this machine's KVM runs an ordinary guest
