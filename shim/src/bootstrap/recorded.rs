//! What real daemons said and took, to the byte, in `recorded/VERSION`: a pod's start through CRI with a configuration
//! file named in the runtime's options, the answer that the daemon then worked with, and the end of the same pod's shim.
//! Without options each of them leaves standard input empty.

use std::path::Path;

use kiln_node::config::AnswerForm;

use super::{
    Action, Answer, Args, StartParams, StartProtocol, address_for, major_version,
    runtime_options_config_path,
};

struct Recorded {
    version: &'static str,
    start: &'static str,
    environment: &'static str,
    input: &'static [u8],
    answer: &'static [u8],
    delete: &'static str,
}

macro_rules! recorded {
    ($($version:literal),*) => {
        [$(Recorded {
            version: $version,
            start: include_str!(concat!("recorded/", $version, "/start.args")),
            environment: include_str!(concat!("recorded/", $version, "/start.env")),
            input: include_bytes!(concat!("recorded/", $version, "/options.stdin")),
            answer: include_bytes!(concat!("recorded/", $version, "/answer")),
            delete: include_str!(concat!("recorded/", $version, "/delete.args")),
        }),*]
    };
}

const ALL: [Recorded; 3] = recorded!["1.6.20", "1.7.24", "2.1.9"];

impl Recorded {
    fn variable(&self, name: &str) -> &str {
        let mut all = self.environment.lines().filter_map(|l| l.split_once('='));
        all.find(|(n, _)| *n == name).map_or("", |(_, value)| value)
    }

    fn args(lines: &str) -> Args {
        Args::parse(lines.lines().map(str::to_owned)).unwrap()
    }
}

#[test]
fn every_daemon_is_understood() {
    for daemon in ALL {
        let args = Recorded::args(daemon.start);
        assert_eq!(args.action, Action::Start, "{}", daemon.version);
        assert_eq!(args.namespace, "k8s.io");
        assert_eq!(args.address, "/run/containerd/containerd.sock");
        let read = StartParams::read(daemon.input, &args, daemon.variable("TTRPC_ADDRESS"));
        assert_eq!(read.protocol, StartProtocol::Legacy, "{}", daemon.version);
        assert_eq!(read.ttrpc_address, "/run/containerd/containerd.sock.ttrpc");
        let path = read.options.as_ref().and_then(runtime_options_config_path);
        assert_eq!(path.as_deref(), Some("/etc/kiln/config.toml"));
        assert!(!read.debug);

        let end = Recorded::args(daemon.delete);
        assert_eq!(end.action, Action::Delete, "{}", daemon.version);
        assert_eq!((&end.namespace, &end.id), (&args.namespace, &args.id));
        assert!(end.bundle.unwrap().ends_with(Path::new(&end.id)));
    }
}

#[test]
fn every_daemon_gets_the_answer_it_took() {
    for daemon in ALL {
        let args = Recorded::args(daemon.start);
        let answer = |form| Answer {
            form,
            address: address_for(None, &args.address, &args.namespace, &args.id),
        };
        let form = match major_version(daemon.version) {
            Some(2) => AnswerForm::JsonV3,
            _ => AnswerForm::Bare,
        };
        assert_eq!(
            String::from_utf8(answer(form).encode()).unwrap(),
            String::from_utf8_lossy(daemon.answer),
            "{}",
            daemon.version
        );
    }
}
