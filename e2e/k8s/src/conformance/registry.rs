//! The registry on this node, which serves the images of Kubernetes' suites to containerd, whatever registry they name.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kiln_test_images::registry::{ADDRESS, HOSTS_FOLDER};

use crate::component::Component;
use crate::config::LOGS;

/// Where the node has the part that holds the images.
const PART: &str = "/opt/parts/suite-images";
/// What containerd's `config_path` is on the node.
const CERTS: &str = "/etc/containerd/certs.d";
const CGROUPS: &str = "/sys/fs/cgroup/registry";
const READY: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(100);

/// Starts the registry unless it runs, and has containerd pull from it.
pub(super) fn serve() -> Result<()> {
    let part = Path::new(PART);
    let configuration = part.join("registry.yml");
    if !configuration.is_file() {
        bail!(
            "{} is not there: boot the node with the part suite-images (docs/node.md)",
            configuration.display()
        );
    }
    let folder = Path::new(CERTS).join(HOSTS_FOLDER);
    let hosts = folder.join("hosts.toml");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    fs::copy(part.join("hosts.toml"), &hosts)
        .with_context(|| format!("writing {}", hosts.display()))?;
    let arguments = vec!["serve".to_owned(), configuration.display().to_string()];
    let registry = Component::new(
        "docker-registry",
        arguments,
        Path::new(CGROUPS),
        Path::new(LOGS),
    );
    registry.start()?;
    let begin = Instant::now();
    while let Err(error) = TcpStream::connect(ADDRESS) {
        registry.check()?;
        if begin.elapsed() > READY {
            return Err(registry.not_ready(READY, error.to_string()).into());
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}
