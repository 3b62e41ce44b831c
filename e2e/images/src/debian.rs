//! The root that `agnhost` has: the suites run a shell, curl, dig and others beside it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::command::run;
use crate::image::fingerprint;
use crate::layer::MTIME;
use crate::once::{host, once};

const RELEASE: &str = "trixie";
const PACKAGES: &[&str] = &[
    "bash",
    "bind9-dnsutils",
    "ca-certificates",
    "curl",
    "iperf",
    "iproute2",
    "iputils-ping",
    "netcat-openbsd",
    "procps",
    "socat",
    "util-linux",
];
/// Nobody reads them in a container.
const LEFT_OUT: &[&str] = &["doc", "info", "locale", "man"];

/// A user with a group that no one names: a spec on supplementary groups looks for them.
const USERS: &str = r#"
echo user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh >> "$1/etc/passwd"
printf '%s\n' user-defined-in-image:x:1000: group-defined-in-image:x:50000:user-defined-in-image >> "$1/etc/group"
"#;

const REMEDY: &str = "`make setup` installs mmdebstrap; the packages come from Debian's mirrors: look at the network";

/// The root as a tar, from the cache or made now, which takes a minute.
pub(crate) fn root(cache: &Path) -> Result<PathBuf> {
    let hash = fingerprint([include_bytes!("debian.rs").as_slice()]);
    once(cache, "debian.tar", &hash, |work| {
        let users = work.join("users");
        host("write", &users, fs::write(&users, USERS))?;
        let tar = work.join("root.tar");
        let mut command = Command::new("mmdebstrap");
        command
            .env("SOURCE_DATE_EPOCH", MTIME.to_string())
            .args(["--variant=essential", "--skip=output/dev"])
            .arg(format!("--include={}", PACKAGES.join(",")))
            .arg(format!("--customize-hook=sh {} \"$1\"", users.display()));
        for folder in LEFT_OUT {
            command.arg(format!("--dpkgopt=path-exclude=/usr/share/{folder}/*"));
        }
        run(command.arg(RELEASE).arg(&tar), REMEDY)?;
        Ok(tar)
    })
}
