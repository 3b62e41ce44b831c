//! What CRI tells about a pod when containerd's sandboxer is the shim: `CreateSandbox` carries the
//! kubelet's `PodSandboxConfig` in its options.
//!
//! CRI's messages are many; of this one a handful of fields matter, so they are read off the wire
//! by number (kubernetes/cri-api, `runtime/v1/api.proto`): hostname 2, dns_config 4 (servers 1, searches 2, options 3), annotations 7, linux 8 with
//! cgroup_parent 1, security_context 2 (namespace_options 1: pid 2, ipc 3), sysctls 3, resources 5 (cpu_period 1, cpu_quota 2, memory_limit_in_bytes 4).

use std::collections::BTreeMap;

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use protobuf::CodedInputStream;

use crate::error::{Error, Result};
use crate::pod::{Dns, SandboxRequest};
use crate::size::Limits;

const CONFIG: &str = "runtime.v1.PodSandboxConfig";

/// One field of a message as it is on the wire.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Translates the request.
pub(super) fn request(r: CreateSandboxRequest) -> Result<SandboxRequest> {
    let mut request = SandboxRequest {
        id: r.sandbox_id,
        netns: Some(r.netns_path).filter(|p| !p.is_empty()).map(Into::into),
        ..Default::default()
    };
    if let Some(options) = r.options.as_ref()
        && options.type_url.rsplit('/').next() == Some(CONFIG)
    {
        read_config(&options.value, &mut request).ok_or_else(|| {
            Error::InvalidArgument(format!("the sandbox's options are no valid {CONFIG}"))
        })?;
    }
    request.annotations.extend(r.annotations);
    Ok(request)
}

fn read_config(message: &[u8], out: &mut SandboxRequest) -> Option<()> {
    fields(message, |number, field| {
        match (number, field) {
            (2, Field::Bytes(b)) => out.hostname = text(b)?,
            (4, Field::Bytes(b)) => out.dns = read_dns(b)?,
            (7, Field::Bytes(b)) => insert(&mut out.annotations, b)?,
            (8, Field::Bytes(b)) => read_linux(b, out)?,
            _ => {}
        }
        Some(())
    })
}

fn read_dns(message: &[u8]) -> Option<Dns> {
    let mut dns = Dns::default();
    fields(message, |number, field| {
        match (number, field) {
            (1, Field::Bytes(b)) => dns.servers.push(text(b)?),
            (2, Field::Bytes(b)) => dns.searches.push(text(b)?),
            (3, Field::Bytes(b)) => dns.options.push(text(b)?),
            _ => {}
        }
        Some(())
    })?;
    Some(dns)
}

fn read_linux(message: &[u8], out: &mut SandboxRequest) -> Option<()> {
    fields(message, |number, field| {
        match (number, field) {
            (1, Field::Bytes(b)) => out.cgroup_parent = Some(text(b)?).filter(|p| !p.is_empty()),
            (2, Field::Bytes(b)) => out.host_namespaces = read_security(b)?,
            (3, Field::Bytes(b)) => insert(&mut out.sysctls, b)?,
            (5, Field::Bytes(b)) => out.limits = read_resources(b)?,
            _ => {}
        }
        Some(())
    })
}

/// The namespaces that are to be the node's.
fn read_security(message: &[u8]) -> Option<Vec<&'static str>> {
    /// `NamespaceMode.NODE`.
    const NODE: u64 = 2;
    let mut kinds = Vec::new();
    fields(message, |number, field| {
        let (1, Field::Bytes(options)) = (number, field) else {
            return Some(());
        };
        fields(options, |number, field| {
            match (number, field) {
                (2, Field::Number(NODE)) => kinds.push("pid"),
                (3, Field::Number(NODE)) => kinds.push("ipc"),
                _ => {}
            }
            Some(())
        })
    })?;
    Some(kinds)
}

fn read_resources(message: &[u8]) -> Option<Limits> {
    let mut limits = Limits::default();
    fields(message, |number, field| {
        match (number, field) {
            // int64 on the wire: a varint in two's complement.
            (1, Field::Number(n)) => limits.cpu_period = n,
            (2, Field::Number(n)) => limits.cpu_quota = n.cast_signed(),
            (4, Field::Number(n)) => limits.memory = n.cast_signed(),
            _ => {}
        }
        Some(())
    })?;
    Some(limits)
}

/// An entry of a map: key 1, value 2.
fn insert(map: &mut BTreeMap<String, String>, entry: &[u8]) -> Option<()> {
    let (mut key, mut value) = (String::new(), String::new());
    fields(entry, |number, field| {
        match (number, field) {
            (1, Field::Bytes(b)) => key = text(b)?,
            (2, Field::Bytes(b)) => value = text(b)?,
            _ => {}
        }
        Some(())
    })?;
    map.insert(key, value);
    Some(())
}

fn text(bytes: &[u8]) -> Option<String> {
    String::from_utf8(bytes.to_vec()).ok()
}

fn fields(message: &[u8], mut each: impl FnMut(u32, Field<'_>) -> Option<()>) -> Option<()> {
    let mut input = CodedInputStream::from_bytes(message);
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        match tag & 7 {
            0 => each(tag >> 3, Field::Number(input.read_raw_varint64().ok()?))?,
            2 => each(tag >> 3, Field::Bytes(&input.read_bytes().ok()?))?,
            1 => input.skip_raw_bytes(8).ok()?,
            5 => input.skip_raw_bytes(4).ok()?,
            _ => return None,
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::well_known_types::any::Any;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
        out.extend_from_slice(bytes);
        out
    }

    fn entry(key: &str, value: &str) -> Vec<u8> {
        [field(1, key.as_bytes()), field(2, value.as_bytes())].concat()
    }

    fn with_options(value: Vec<u8>) -> CreateSandboxRequest {
        CreateSandboxRequest {
            sandbox_id: "sb".into(),
            netns_path: "/run/netns/x".into(),
            options: Some(Any {
                type_url: CONFIG.into(),
                value,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        }
    }

    #[test]
    fn the_fields_that_matter_are_read_and_the_rest_skipped() {
        // cpu_period 100000, cpu_quota 50000, cpu_shares 2, memory 1 MiB.
        let resources = [
            0x08, 0xa0, 0x8d, 0x06, 0x10, 0xd0, 0x86, 0x03, 0x18, 0x02, 0x20, 0x80, 0x80, 0x40,
        ];
        let linux = [
            field(1, b"/kubepods/pod1"),
            field(2, &field(1, &[0x10, 2, 0x18, 0])),
            field(3, &entry("net.core.somaxconn", "1024")),
            field(5, &resources),
        ]
        .concat();
        let config = [
            field(1, &field(1, b"web")),
            field(2, b"web-0"),
            field(
                4,
                &[field(1, b"10.96.0.10"), field(2, b"a.b"), field(2, b"c")].concat(),
            ),
            field(6, &entry("app", "web")),
            field(7, &entry("kiln.dev/cpus", "2")),
            field(8, &linux),
        ]
        .concat();
        let request = request(with_options(config)).unwrap();
        assert_eq!(request.hostname, "web-0");
        assert_eq!(request.dns.servers, ["10.96.0.10"]);
        assert_eq!(request.dns.searches, ["a.b", "c"]);
        assert_eq!(request.netns, Some("/run/netns/x".into()));
        assert_eq!(
            request.annotations.get("kiln.dev/cpus").map(String::as_str),
            Some("2")
        );
        assert_eq!(request.annotations.len(), 1);
        assert_eq!(request.cgroup_parent.as_deref(), Some("/kubepods/pod1"));
        assert_eq!(request.host_namespaces, ["pid"]);
        assert_eq!(request.sysctls.len(), 1);
        assert_eq!(
            request.limits,
            Limits {
                cpu_quota: 50_000,
                cpu_period: 100_000,
                memory: 1 << 20
            }
        );
    }

    #[test]
    fn cut_off_options_are_refused() {
        let error = request(with_options(vec![0x12, 0x20, b'x'])).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
    }
}
