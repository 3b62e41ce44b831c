//! What comes in on standard input.
//!
//! containerd before 2.3 writes the runtime options there, as an `Any`, and only if there are any;
//! containerd 2.3 and later write `BootstrapParams`. The bytes of an `Any` can decode as
//! `BootstrapParams` by accident (both begin with a string), so the new form is believed only when
//! it names the same instance and namespace as the command line.

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, Message};

use super::Args;

/// Which form of the protocol the caller speaks, and so in which form it wants its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartProtocol {
    /// containerd 2.3 and later: protobuf in, protobuf out.
    Bootstrap,
    /// containerd before 2.3: options or nothing in, text out.
    Legacy,
}

/// Everything `start` was told, whichever way it was told.
#[derive(Debug, Clone, PartialEq)]
pub struct StartParams {
    /// The form of the protocol.
    pub protocol: StartProtocol,
    /// Where events go.
    pub ttrpc_address: String,
    /// containerd's gRPC address; part of the socket's name.
    pub grpc_address: String,
    /// Where the socket shall lie, if containerd says.
    pub socket_dir: Option<String>,
    /// Log at debug level.
    pub debug: bool,
    /// The daemon's version, if it says.
    pub containerd_version: Option<String>,
    /// The runtime options from containerd's configuration.
    pub options: Option<Any>,
}

impl StartParams {
    /// Reads what containerd wrote to standard input (all of it) beside the command line.
    /// `ttrpc_address` is the environment's TTRPC_ADDRESS.
    pub fn read(input: &[u8], args: &Args, ttrpc_address: &str) -> Self {
        if let Some(params) = bootstrap_params(input, args) {
            return Self {
                protocol: StartProtocol::Bootstrap,
                ttrpc_address: or(&params.containerd_ttrpc_address, ttrpc_address),
                grpc_address: or(&params.containerd_grpc_address, &args.address),
                socket_dir: params.socket_dir.clone().filter(|d| !d.is_empty()),
                // DEBUG is -4; more verbose levels are lower still.
                debug: args.debug || params.log_level.value() <= -4,
                containerd_version: Some(params.containerd_version.clone())
                    .filter(|v| !v.is_empty()),
                options: params
                    .extensions
                    .iter()
                    .find_map(|e| e.value.clone().into_option()),
            };
        }
        Self {
            protocol: StartProtocol::Legacy,
            ttrpc_address: ttrpc_address.to_owned(),
            grpc_address: args.address.clone(),
            socket_dir: None,
            debug: args.debug,
            containerd_version: None,
            options: Any::parse_from_bytes(input)
                .ok()
                .filter(|any| !any.type_url.is_empty()),
        }
    }
}

fn bootstrap_params(input: &[u8], args: &Args) -> Option<BootstrapParams> {
    let params = BootstrapParams::parse_from_bytes(input).ok()?;
    (params.instance_id == args.id && params.namespace == args.namespace).then_some(params)
}

fn or(value: &str, fallback: &str) -> String {
    if value.is_empty() {
        fallback.to_owned()
    } else {
        value.to_owned()
    }
}

/// The path of kiln's configuration file from containerd's generic runtime options
/// (`runtimeoptions.v1.Options`: type_url = 1, config_path = 2, config_body = 3), which is what CRI
/// sends for a runtime it has no options type for.
pub fn runtime_options_config_path(options: &Any) -> Option<String> {
    let name = options.type_url.rsplit('/').next()?;
    if name != "runtimeoptions.v1.Options" && name != "cri.runtimeoptions.v1.Options" {
        return None;
    }
    let mut input = CodedInputStream::from_bytes(&options.value);
    let mut path = None;
    while let Ok(Some(tag)) = input.read_raw_tag_or_eof() {
        // Every field of the message is length-delimited (wire type 2).
        if tag & 7 != 2 {
            return None;
        }
        let bytes = input.read_bytes().ok()?;
        if tag >> 3 == 2 {
            path = String::from_utf8(bytes).ok().filter(|p| !p.is_empty());
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::bootstrap_api::{Extension, LogLevel};

    fn args() -> Args {
        Args::parse(
            [
                "-namespace",
                "k8s.io",
                "-id",
                "pod1",
                "-address",
                "/run/c.sock",
                "start",
            ]
            .map(str::to_owned),
        )
        .unwrap()
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "pod1".into(),
            namespace: "k8s.io".into(),
            containerd_version: "2.3.4".into(),
            containerd_ttrpc_address: "/run/new.ttrpc".into(),
            containerd_grpc_address: "/run/new.sock".into(),
            log_level: LogLevel::LOG_LEVEL_DEBUG.into(),
            socket_dir: Some("/run/s".into()),
            ..Default::default()
        }
    }

    fn options_any(path: &str) -> Any {
        let mut value = vec![0x12, u8::try_from(path.len()).unwrap()];
        value.extend_from_slice(path.as_bytes());
        Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value,
            ..Default::default()
        }
    }

    #[test]
    fn empty_input_is_the_old_protocol_without_options() {
        let read = StartParams::read(b"", &args(), "/run/c.sock.ttrpc");
        assert_eq!(read.protocol, StartProtocol::Legacy);
        assert_eq!(read.ttrpc_address, "/run/c.sock.ttrpc");
        assert_eq!(read.grpc_address, "/run/c.sock");
        assert_eq!(read.options, None);
    }

    #[test]
    fn bootstrap_params_win_over_flags_and_environment() {
        let mut sent = params();
        sent.extensions.push(Extension {
            value: Some(options_any("/etc/kiln.toml")).into(),
            ..Default::default()
        });
        let read = StartParams::read(&sent.write_to_bytes().unwrap(), &args(), "/run/old");
        assert_eq!(read.protocol, StartProtocol::Bootstrap);
        assert_eq!(read.ttrpc_address, "/run/new.ttrpc");
        assert_eq!(read.grpc_address, "/run/new.sock");
        assert_eq!(read.socket_dir.as_deref(), Some("/run/s"));
        assert_eq!(read.containerd_version.as_deref(), Some("2.3.4"));
        assert!(read.debug);
        let path = runtime_options_config_path(&read.options.unwrap());
        assert_eq!(path.as_deref(), Some("/etc/kiln.toml"));
    }

    #[test]
    fn an_any_that_decodes_as_params_stays_an_any() {
        let bytes = options_any("/etc/kiln.toml").write_to_bytes().unwrap();
        // The trap is real: the bytes do decode as the other message.
        assert!(BootstrapParams::parse_from_bytes(&bytes).is_ok());
        let read = StartParams::read(&bytes, &args(), "t");
        assert_eq!(read.protocol, StartProtocol::Legacy);
        let path = runtime_options_config_path(&read.options.unwrap());
        assert_eq!(path.as_deref(), Some("/etc/kiln.toml"));
    }

    #[test]
    fn params_of_another_instance_are_not_believed() {
        let mut sent = params();
        sent.instance_id = "other".into();
        let read = StartParams::read(&sent.write_to_bytes().unwrap(), &args(), "t");
        assert_eq!(read.protocol, StartProtocol::Legacy);
    }

    #[test]
    fn garbage_is_the_old_protocol_without_options() {
        let read = StartParams::read(&[0xff; 40], &args(), "t");
        assert_eq!((read.protocol, read.options), (StartProtocol::Legacy, None));
    }

    #[test]
    fn options_of_another_runtime_have_no_config_path() {
        let mut any = options_any("/etc/kiln.toml");
        any.type_url = "containerd.runc.v1.Options".into();
        assert_eq!(runtime_options_config_path(&any), None);
    }
}
