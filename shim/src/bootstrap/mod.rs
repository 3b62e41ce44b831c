//! How containerd starts the shim and learns where it listens.
//!
//! Owns the command line, what comes in on standard input, what goes out on standard output, the
//! address of the socket and the step into the background. The three forms that containerd's
//! versions speak are told apart here and nowhere else. Nothing here may print to standard error:
//! containerd reads both streams of `start` as one answer.

mod answer;
mod args;
mod daemon;
mod params;
#[cfg(test)]
mod recorded;
mod socket;
mod version;

pub use answer::Answer;
pub use args::{Action, Args, ArgsError, is_identifier};
pub use daemon::{Fork, adjust_oom_score, fork_daemon};
pub use params::{StartParams, StartProtocol, runtime_options_config_path};
pub use socket::{ShimSocket, SocketError, address_for, bind_or_find, is_alive, path_of, remove};
pub use version::{VersionError, containerd_version, major_version};
