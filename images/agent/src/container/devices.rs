//! Devices that a container asks for: they are the guest's own, where its kernel has a driver.

use std::path::Path;

use libcontainer::oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType, Mount};

use super::spec::SpecError;

/// Drivers of one major number that come and go by the minor one: fuse, tun, kvm.
const MISC: i64 = 10;

/// Leaves out what the kernel has no driver for, unless it is given to the container by a rule of its own: that is refused.
/// (The devices of a privileged container are just all that there are.) Returns what was left out.
pub(super) fn keep(
    linux: &mut Linux,
    has_driver: impl Fn(i64, i64) -> bool,
) -> Result<Vec<String>, SpecError> {
    let Some(devices) = linux.devices().clone() else {
        return Ok(Vec::new());
    };
    let missing = |device: &LinuxDevice| {
        device.typ() == LinuxDeviceType::C
            && device.major() == MISC
            && !has_driver(device.major(), device.minor())
    };
    let (missing, kept): (Vec<_>, Vec<_>) = devices.into_iter().partition(missing);
    if let Some(device) = missing.iter().find(|device| is_given(device, linux)) {
        return Err(no_driver(device.path()));
    }
    linux.set_devices(Some(kept));
    let name = |device: &LinuxDevice| format!("device {} (no driver)", device.path().display());
    Ok(missing.iter().map(name).collect())
}

fn is_given(device: &LinuxDevice, linux: &Linux) -> bool {
    let rules = linux
        .resources()
        .as_ref()
        .and_then(|r| r.devices().as_ref());
    rules.into_iter().flatten().any(|rule| {
        rule.allow() && rule.major() == Some(device.major()) && rule.minor() == Some(device.minor())
    })
}

/// A device that is mounted like a file has to be there, too.
pub(super) fn check_mounts(mounts: &[Mount]) -> Result<(), SpecError> {
    let sources = mounts.iter().filter_map(|mount| mount.source().as_deref());
    let mut devices = sources.filter(|source| source.starts_with("/dev/"));
    match devices.find(|device| !device.exists()) {
        Some(device) => Err(no_driver(device)),
        None => Ok(()),
    }
}

/// Whether the kernel has a driver for a character device.
pub(super) fn has_driver(major: i64, minor: i64) -> bool {
    Path::new("/sys/dev/char")
        .join(format!("{major}:{minor}"))
        .exists()
}

fn no_driver(device: &Path) -> SpecError {
    SpecError::NoDriver(device.display().to_string())
}

#[cfg(test)]
mod tests {
    use libcontainer::oci_spec::runtime::MountBuilder;

    use super::*;

    fn linux(rules: &str) -> Linux {
        let text = format!(
            r#"{{"devices": [
                {{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}},
                {{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}},
                {{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}}],
                "resources": {{"devices": [{rules}]}}}}"#
        );
        serde_json::from_str(&text).expect("linux")
    }

    fn only_fuse(_: i64, minor: i64) -> bool {
        minor == 229
    }

    #[test]
    fn device_that_is_given_and_has_no_driver_is_refused_by_its_name() {
        let rule = r#"{"allow": true, "type": "c", "major": 10, "minor": 232, "access": "rwm"}"#;
        let error = keep(&mut linux(rule), only_fuse).expect_err("no kvm");
        assert!(error.to_string().contains("/dev/kvm"), "{error}");
    }

    #[test]
    fn device_that_is_only_listed_is_left_out() {
        let mut linux = linux(r#"{"allow": true, "access": "rwm"}"#);
        let left_out = keep(&mut linux, only_fuse).expect("left out");
        assert_eq!(left_out, ["device /dev/kvm (no driver)"]);
        let kept = linux.devices().as_ref().expect("devices");
        assert_eq!(kept.len(), 2);
    }

    #[test]
    fn mounted_device_has_to_be_there() {
        let mount = |source: &str| {
            let mount = MountBuilder::default().destination("/x").source(source);
            mount.build().expect("mount")
        };
        assert!(check_mounts(&[mount("/dev/null"), mount("/none")]).is_ok());
        let error = check_mounts(&[mount("/dev/kiln-none")]).expect_err("none");
        assert!(error.to_string().contains("/dev/kiln-none"), "{error}");
    }
}
