//! What `start` prints.

use containerd_shim_protos::bootstrap_api::BootstrapResult;
use kiln_node::config::AnswerForm;
use protobuf::Message;
use serde::Serialize;

/// The answer to `start`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its form.
    pub form: AnswerForm,
    /// The shim's socket, `unix:///…`.
    pub address: String,
}

#[derive(Serialize)]
struct Json<'a> {
    version: u32,
    address: &'a str,
    protocol: &'static str,
}

impl Answer {
    /// The bytes for standard output. None of the forms ends with a newline: containerd up to 2.3.0
    /// keeps it as part of a bare address.
    pub fn encode(&self) -> Vec<u8> {
        let json = |version| {
            serde_json::to_vec(&Json {
                version,
                address: &self.address,
                protocol: "ttrpc",
            })
            .unwrap_or_else(|_| self.address.clone().into_bytes())
        };
        match self.form {
            AnswerForm::Bare => self.address.clone().into_bytes(),
            AnswerForm::JsonV2 => json(2),
            AnswerForm::JsonV3 => json(3),
            AnswerForm::Protobuf => BootstrapResult {
                version: 3,
                address: self.address.clone(),
                protocol: "ttrpc".to_owned(),
                ..Default::default()
            }
            .write_to_bytes()
            .unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(form: AnswerForm) -> Vec<u8> {
        Answer {
            form,
            address: "unix:///run/containerd/s/ab".into(),
        }
        .encode()
    }

    #[test]
    fn bare_address_is_nothing_but_the_address() {
        assert_eq!(encode(AnswerForm::Bare), b"unix:///run/containerd/s/ab");
    }

    #[test]
    fn json_has_the_three_keys_containerd_reads_and_no_newline() {
        assert_eq!(
            encode(AnswerForm::JsonV3),
            br#"{"version":3,"address":"unix:///run/containerd/s/ab","protocol":"ttrpc"}"#
        );
        assert!(encode(AnswerForm::JsonV2).starts_with(br#"{"version":2,"#));
    }

    #[test]
    fn protobuf_decodes_to_version_three_over_ttrpc() {
        let result = BootstrapResult::parse_from_bytes(&encode(AnswerForm::Protobuf)).unwrap();
        assert_eq!(result.version, 3);
        assert_eq!(result.protocol, "ttrpc");
        assert_eq!(result.address, "unix:///run/containerd/s/ab");
    }

    #[test]
    fn json_does_not_pass_for_protobuf() {
        // containerd 2.3 tries protobuf before JSON, so JSON must not decode by accident.
        assert!(BootstrapResult::parse_from_bytes(&encode(AnswerForm::JsonV3)).is_err());
        assert!(BootstrapResult::parse_from_bytes(&encode(AnswerForm::Bare)).is_err());
    }
}
