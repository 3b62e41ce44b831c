//! The flags containerd passes, in the way Go's `flag` package reads them: one or two dashes,
//! `-name value` or `-name=value`, and the first word without a dash ends them.

use std::path::PathBuf;

/// What containerd asks the binary to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make (or find) the shim of a pod and answer with its address.
    Start,
    /// Remove whatever a dead shim left behind.
    Delete,
    /// Describe the runtime (`-info`).
    Info,
    /// Print the version (`-v`).
    Version,
}

/// The parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// The task's or sandbox's id.
    pub id: String,
    /// containerd's gRPC address.
    pub address: String,
    /// The containerd binary, for publishing events by command; kiln publishes by ttrpc.
    pub publish_binary: String,
    /// The bundle, given to `delete` only.
    pub bundle: Option<PathBuf>,
    /// containerd runs with debug logging.
    pub debug: bool,
}

/// A command line the shim can't act on.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ArgsError {
    /// A flag that isn't in the shim contract.
    #[error(
        "flag -{0} is unknown; containerd passes -namespace, -address, -publish-binary, -id, -bundle, -debug, -info and -v"
    )]
    UnknownFlag(String),
    /// A flag without its value.
    #[error("flag -{0} needs a value")]
    MissingValue(String),
    /// No action.
    #[error("no action given; the shim is started by containerd with `start` or `delete`")]
    NoAction,
    /// An action that doesn't exist.
    #[error("action {0:?} is unknown; the shim knows `start` and `delete`")]
    UnknownAction(String),
    /// A required flag is absent or empty.
    #[error("-{0} must be given and not be empty")]
    Required(&'static str),
    /// An id that can't be a file name.
    #[error("id {0:?} is not a valid containerd identifier")]
    BadId(String),
}

impl Args {
    /// Parses the words after the program's name.
    pub fn parse<I>(words: I) -> Result<Self, ArgsError>
    where
        I: IntoIterator<Item = String>,
    {
        let mut parsed = Self {
            action: Action::Start,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            publish_binary: String::new(),
            bundle: None,
            debug: false,
        };
        let (mut info, mut version) = (false, false);
        let mut action = None;
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                action = Some(word);
                break;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (flag.to_owned(), None),
            };
            let switch = |inline: Option<String>| inline.is_none_or(|v| v == "true" || v == "1");
            match name.as_str() {
                "debug" => parsed.debug = switch(inline),
                "info" => info = switch(inline),
                "v" | "version" => version = switch(inline),
                "namespace" | "id" | "address" | "publish-binary" | "bundle" | "socket"
                | "debug-socket" => {
                    let value = inline
                        .or_else(|| words.next())
                        .ok_or_else(|| ArgsError::MissingValue(name.clone()))?;
                    match name.as_str() {
                        "namespace" => parsed.namespace = value,
                        "id" => parsed.id = value,
                        "address" => parsed.address = value,
                        "publish-binary" => parsed.publish_binary = value,
                        "bundle" => parsed.bundle = Some(value.into()),
                        // Sockets that a service manager would pass; kiln binds its own.
                        _ => {}
                    }
                }
                _ => return Err(ArgsError::UnknownFlag(name)),
            }
        }
        if version || info {
            parsed.action = if version {
                Action::Version
            } else {
                Action::Info
            };
            return Ok(parsed);
        }
        parsed.action = match action.as_deref() {
            Some("start") => Action::Start,
            Some("delete") => Action::Delete,
            Some(other) => return Err(ArgsError::UnknownAction(other.to_owned())),
            None => return Err(ArgsError::NoAction),
        };
        if parsed.namespace.is_empty() {
            return Err(ArgsError::Required("namespace"));
        }
        if parsed.id.is_empty() {
            return Err(ArgsError::Required("id"));
        }
        for id in [&parsed.id, &parsed.namespace] {
            if !is_identifier(id) {
                return Err(ArgsError::BadId(id.clone()));
            }
        }
        Ok(parsed)
    }
}

/// containerd's rule for identifiers: letters, digits, and single `.`, `_`, `-` between them, at
/// most 76 characters. Ids become file names, so the rule is enforced on everything that comes in.
pub fn is_identifier(id: &str) -> bool {
    let bytes = id.as_bytes();
    let separator = |b: u8| matches!(b, b'.' | b'_' | b'-');
    !bytes.is_empty()
        && bytes.len() <= 76
        && bytes
            .iter()
            .all(|&b| b.is_ascii_alphanumeric() || separator(b))
        && bytes[0].is_ascii_alphanumeric()
        && bytes[bytes.len() - 1].is_ascii_alphanumeric()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn start_line_of_containerd_is_understood() {
        let args = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id abc123 -debug start",
        )
        .unwrap();
        assert_eq!(args.action, Action::Start);
        assert_eq!(args.namespace, "k8s.io");
        assert_eq!(args.address, "/run/containerd/containerd.sock");
        assert_eq!(args.id, "abc123");
        assert!(args.debug);
    }

    #[test]
    fn delete_line_carries_the_bundle() {
        let args =
            parse("-namespace default -address a -id x --bundle=/run/b -publish-binary c delete")
                .unwrap();
        assert_eq!(args.action, Action::Delete);
        assert_eq!(args.bundle, Some(PathBuf::from("/run/b")));
    }

    #[test]
    fn info_and_version_need_nothing_else() {
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
    }

    #[test]
    fn identifiers_that_leave_the_state_directory_are_refused() {
        assert_eq!(
            parse("-namespace n -id ../../etc start"),
            Err(ArgsError::BadId("../../etc".into()))
        );
        assert_eq!(
            parse("-namespace .. -id a start"),
            Err(ArgsError::BadId("..".into()))
        );
    }

    #[test]
    fn missing_pieces_are_named() {
        assert_eq!(parse("-id a start"), Err(ArgsError::Required("namespace")));
        assert_eq!(parse("-namespace n start"), Err(ArgsError::Required("id")));
        assert_eq!(parse("-namespace n -id a"), Err(ArgsError::NoAction));
        assert_eq!(
            parse("-namespace"),
            Err(ArgsError::MissingValue("namespace".into()))
        );
        assert_eq!(parse("-frob"), Err(ArgsError::UnknownFlag("frob".into())));
        assert_eq!(
            parse("-namespace n -id a stop"),
            Err(ArgsError::UnknownAction("stop".into()))
        );
    }
}
