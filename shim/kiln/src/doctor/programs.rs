//! Are kiln's own programs where containerd and the shim look for them?

use super::{Check, System};

/// containerd starts this one by its runtime's name, or by a path in its configuration.
pub(super) fn shim(system: &System) -> Check {
    program(system, "shim", "containerd-shim-kiln-v2")
}

/// The shim starts this one.
pub(super) fn vmm(system: &System) -> Check {
    program(system, "vmm", "kiln-vmm")
}

fn program(system: &System, name: &'static str, file: &str) -> Check {
    match system.program(file) {
        Some(path) => Check::ok(name, path.display().to_string()),
        None => Check::fail(
            name,
            format!("{file} was not found"),
            format!("install kiln's programs into one directory, such as /usr/local/bin ({file})"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::super::tests::Fixture;
    use super::*;

    #[test]
    fn program_must_be_there_and_executable() {
        let fixture = Fixture::new();
        assert_eq!(shim(&fixture.system).status, Status::Fail);
        fixture.file("usr/bin/containerd-shim-kiln-v2", "");
        assert_eq!(shim(&fixture.system).status, Status::Fail, "not executable");
        fixture.program("usr/bin/containerd-shim-kiln-v2", "");
        assert_eq!(shim(&fixture.system).status, Status::Ok);
        assert!(vmm(&fixture.system).found.contains("kiln-vmm"));
    }
}
